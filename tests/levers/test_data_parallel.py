"""The levers under DistributedDataParallel."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch.nn.parallel import DistributedDataParallel

from elle_fast import AdaptiveLambda, ELLELoss
from elle_fast.draws import Level
from tests.helpers import convnet, rng
from tests.levers.cases import BATCH, EPS, data, same

RANKS = 2
DISTRIBUTED: dict[str, dict[str, Any]] = {
    "packed": {},
    "split": {"forward": "split"},
    "checkpoint": {"forward": "checkpoint"},
    "light": {"skip_below": 1.0, "forward": "checkpoint"},
    "light packed": {"skip_below": 1.0},
    "argmax": {"alpha": "argmax", "attack": "n-fgsm"},
    "dropout": {},
    "dropout in blocks": {},
}


def worker(rank: int, folder: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=RANKS)
    found: dict[str, Any] = {}
    for name, options in DISTRIBUTED.items():
        model, alone = (convnet(dropout="dropout" in name).double() for _ in "ab")
        wrapper = DistributedDataParallel(model)
        calls: list[int] = []
        wrapper.register_forward_pre_hook(lambda module, args, calls=calls: calls.append(args[0].shape[0]))
        criteria = [ELLELoss(EPS, AdaptiveLambda(9.0, min_history=1), generator=rng(rank), **options) for _ in "ab"]
        for each in criteria if name == "dropout in blocks" else ():
            each.linearity.random_layers.level = Level.BLOCKS
        steps = []
        for step in range(3):
            x, y = data(seed=10 * step + rank)
            for each, called in zip(criteria, (wrapper, alone), strict=True):
                torch.manual_seed(10 * step + rank)  # of the dropout
                called.zero_grad()
                each(called, x.double(), y).backward()
            grads = [p.grad for p in model.parameters()]
            mean = [p.grad.clone() for p in alone.parameters()]  # type: ignore[union-attr]
            for grad in mean:
                dist.all_reduce(grad)
            steps.append({"grads": grads, "mean": [g / RANKS for g in mean], "lam": criteria[0].stats["lam"]})
        found[name] = {"steps": steps, "calls": calls, "batches": model[1].num_batches_tracked}  # type: ignore[index]
    torch.save(found, Path(folder) / f"{rank}.pt")
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    folder = tmp_path_factory.mktemp("ranks")
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(os.environ, "OMP_NUM_THREADS", "1")
        mp.spawn(worker, args=(str(folder),), nprocs=RANKS)  # type: ignore[attr-defined]
    return [torch.load(folder / f"{rank}.pt") for rank in range(RANKS)]


@pytest.mark.skipif(not dist.is_available(), reason="torch was built without torch.distributed")
@pytest.mark.parametrize("name", DISTRIBUTED)
def test_distributed_data_parallel(ranks, name):
    """One forward pass a step through the wrapper; gradients are the mean of what each rank has alone."""
    for rank in range(RANKS):
        found = ranks[rank][name]
        assert found["calls"] == 3 * [4 * BATCH if name in ("packed", "argmax", "dropout") else BATCH]
        # Of a light step the attack's and x_adv's: its triplets leave no trace.
        passes = {"packed": 2, "dropout": 2, "split": 3, "light": 2, "light packed": 2, "argmax": 2 + 12}.get(name, 5)
        assert found["batches"].item() == 3 * passes
        for step, other in zip(found["steps"], ranks[0][name]["steps"], strict=True):
            assert torch.equal(step["lam"], other["lam"])
            assert same(step["grads"], other["grads"])
            for one, expected in zip(step["grads"], step["mean"], strict=True):
                # Sums of two float64 numbers, divided before or after they are added up.
                torch.testing.assert_close(one, expected, rtol=1e-12, atol=1e-15)
