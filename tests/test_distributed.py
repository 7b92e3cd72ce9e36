"""Two gloo ranks: the same lam on both, as if one process had seen the mean of their E_lin."""

from __future__ import annotations

import math
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from elle_fast import AdaptiveLambda, ELLELoss
from tests.helpers import Smooth, labels, random, rng

pytestmark = pytest.mark.skipif(not dist.is_available(), reason="torch was built without torch.distributed")

RANKS, STEPS = 2, 60
BACKENDS = ["reference"] if torch.cuda.is_available() else ["reference", "triton"]  # in its interpreter
BAD_STEPS = {7: (0, math.nan), 20: (1, math.inf), 21: (1, math.nan)}


def e_lins() -> list[list[float]]:
    """Step by step, rank by rank; some steps are bad on one rank only."""
    source = np.random.default_rng(0)
    values = (10 ** source.uniform(-5, -2, (STEPS, RANKS))).astype(np.float32).astype(float).tolist()
    for step, (rank, value) in BAD_STEPS.items():
        values[step][rank] = value
    return values  # type: ignore[no-any-return]


def batch(step: int, rank: int) -> tuple[torch.Tensor, torch.Tensor]:
    return random(4, 6, seed=10 * step + rank), labels(4, 3, seed=step + rank)


def worker(rank: int, folder: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=RANKS)
    controllers = {"full": AdaptiveLambda(100.0), "window": AdaptiveLambda(100.0, window=9)}
    alone = AdaptiveLambda(100.0, process_group=[dist.new_group([r]) for r in range(RANKS)][rank])
    found: dict[str, list[Any]] = {name: [] for name in [*controllers, "alone", *BACKENDS]}
    for values in e_lins():
        e_lin = torch.tensor(values[rank])
        for name, controller in controllers.items():
            found[name].append(controller.update(e_lin).item())
        found["alone"].append(alone.update(e_lin).item())
        assert torch.equal(e_lin, torch.tensor(values[rank])) or e_lin.isnan()  # the reduction is of a copy
    found["state"] = [{n: t.item() for n, t in controllers["full"].state_dict().items()}]
    model = Smooth(6, 3, gain=8.0)
    for backend in BACKENDS:
        options: dict[str, Any] = {"adaptive": True, "min_history": 1, "backend": backend}
        criterion = ELLELoss(0.1, generator=rng(rank), **options)
        for step in range(8):
            # From step 4 on the logits are ten times as large, and so E_lin jumps.
            gain = 1 if step < 4 else 10
            criterion(lambda x, gain=gain: gain * model(x), *batch(step, rank)).backward()
            found[backend].append({name: value.item() for name, value in criterion.stats.items()})
    torch.save(found, Path(folder) / f"{rank}.pt")
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, list[Any]]]:
    folder = tmp_path_factory.mktemp("ranks")
    before = os.environ.get("OMP_NUM_THREADS")
    os.environ["OMP_NUM_THREADS"] = "1"
    try:
        mp.spawn(  # type: ignore[attr-defined]
            worker, args=(str(folder),), nprocs=RANKS
        )
    finally:
        if before is None:
            del os.environ["OMP_NUM_THREADS"]
        else:
            os.environ["OMP_NUM_THREADS"] = before
    return [torch.load(folder / f"{rank}.pt") for rank in range(RANKS)]


@pytest.mark.parametrize("name, window", [("full", None), ("window", 9)])
def test_every_rank_has_the_lam_of_the_mean(found, name, window):
    assert found[0][name] == found[1][name]
    single = AdaptiveLambda(100.0, window=window)
    # The sum of two float32 numbers, halved, is exact in float64 here, so this is to the last bit.
    expected = [single.update(torch.tensor(sum(values) / 2, dtype=torch.float64)).item() for values in e_lins()]
    assert found[0][name] == expected
    assert max(expected) == 100.0


def test_a_bad_value_on_one_rank_is_skipped_on_both(found):
    for rank in range(RANKS):
        (state,) = found[rank]["state"]
        assert state["skipped"] == len(BAD_STEPS)
        assert state["count"] == STEPS - len(BAD_STEPS)
        means = [sum(values) / RANKS for step, values in enumerate(e_lins()) if step not in BAD_STEPS]
        # Some 60 roundings of Welford's.
        assert state["mean"] == pytest.approx(np.mean(means), rel=60 * 4 * 2.0**-53)


def test_a_process_group_of_ones_own(found):
    """Groups of one rank each: every rank has its own lam."""
    for rank in range(RANKS):
        single = AdaptiveLambda(100.0)
        assert found[rank]["alone"] == [single.update(torch.tensor(v[rank])).item() for v in e_lins()]
    assert found[0]["alone"] != found[1]["alone"]


@pytest.mark.parametrize("backend", BACKENDS)
def test_the_whole_loss_has_the_same_lam_on_every_rank(found, backend):
    first, second = (found[rank][backend] for rank in range(RANKS))
    assert [stats["lam"] for stats in first] == [stats["lam"] for stats in second]
    assert max(stats["lam"] for stats in first) == 4000.0
    # E_lin in the loss and the stats stays the rank's own: gradients are averaged elsewhere, by DDP.
    assert all(a["e_lin"] != b["e_lin"] for a, b in zip(first, second, strict=True))
    for own in (first, second):
        for stats in own:
            # Two roundings in float32.
            assert stats["loss"] == pytest.approx(stats["ce"] + stats["lam"] * stats["e_lin"], rel=1e-6)
    # The same points and weights; lam is that of the same steps, and E_lin agrees to float32's roundings.
    for own, reference in zip((first, second), (found[rank]["reference"] for rank in range(RANKS)), strict=True):
        assert [stats["lam"] for stats in own] == [stats["lam"] for stats in reference]
