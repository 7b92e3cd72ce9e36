"""What is kept of training samples: two gloo ranks keep what one process would."""

from __future__ import annotations

import io
import os
import signal
from dataclasses import replace
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch.nn.parallel import DistributedDataParallel

from elle_fast import methods
from elle_fast.methods.sample_table import SampleTable
from elle_fast.recipes import checkpoint
from elle_fast.recipes import train as training
from elle_fast.recipes.train import CHECKPOINT
from tests.helpers import built
from tests.methods.formulas import BATCH, EPS, SAMPLES, epochs, smooth, training_set
from tests.recipes.test_train import CONFIG, assert_same_run, dataset, quiet

# One of them starts the ranks, for 11 s: among the first, all are in one of pytest-xdist's processes.
pytestmark = pytest.mark.slow

RANKS = 2
NAMES = ("pgi", "pco", "mep-cs", "rs-cs")


def trained(rank: int, ranks: int) -> dict[str, Any]:
    """The criterion's state and the weights after four epochs, of which a rank has its share of each batch."""
    x, target = training_set()
    found = {}
    for name in NAMES:
        model = smooth()
        criterion: Any = methods.build(name, eps=EPS, samples=SAMPLES, epoch_steps=SAMPLES // BATCH)
        wrapped = DistributedDataParallel(model) if ranks > 1 else model
        optimizer = torch.optim.SGD(model.parameters(), lr=0.3)
        torch.manual_seed(rank)  # process 0 sends what all begin with
        for epoch in epochs(4):
            for index in epoch:
                part = index.chunk(ranks)[rank]
                optimizer.zero_grad()
                # A random start of this batch alone would be another one in each rank.
                if name == "rs-cs":
                    torch.manual_seed(0)
                options = {"samples": part} if criterion.per_sample else {}
                criterion(wrapped, x[part], target[part], **options).backward()
                optimizer.step()
        if rank == 0:  # no other process has to take part in an evaluation
            criterion.eval()(model, x, target)
        state = {key: value.clone() for key, value in criterion.state_dict().items()}
        found[name] = {"state": state, "weights": [p.detach().clone() for p in model.parameters()]}
    return found


def runs(rank: int, folder: Path) -> None:
    """A whole training run, and one that a signal to rank 1 interrupts and that is resumed."""
    config, step = replace(CONFIG, method="pgi"), training._Loop._step
    training.train(config, folder / "whole", dataset=dataset(), console=quiet())

    def interrupted(loop: Any, *args: Any) -> Any:
        if loop.run.step == 12 and rank == 1:
            os.kill(os.getpid(), signal.SIGTERM)
        return step(loop, *args)

    training._Loop._step = interrupted  # type: ignore[assignment, method-assign]
    with pytest.raises(training.InterruptedRunError):
        training.train(config, folder / "resumed", dataset=dataset(), console=quiet())
    training._Loop._step = step  # type: ignore[method-assign]
    training.train(config, folder / "resumed", resume=True, dataset=dataset(), console=quiet())


def worker(rank: int, folder: str) -> None:
    store = f"file://{folder}/rendezvous"
    wait = timedelta(seconds=60)
    dist.init_process_group("gloo", init_method=store, rank=rank, world_size=RANKS, timeout=wait)
    torch.set_num_threads(1)
    torch.save(trained(rank, RANKS), f"{folder}/{rank}.pt")
    runs(rank, Path(folder))
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where the two ranks left what they found; they are started once for all tests."""
    if not dist.is_available():
        pytest.skip("torch was built without torch.distributed")
    folder: Path = tmp_path_factory.mktemp("ranks")
    mp.spawn(worker, (str(folder),), nprocs=RANKS)  # type: ignore[attr-defined]
    return folder


@pytest.fixture(scope="module")
def ranks(folder: Path) -> list[dict[str, Any]]:
    return [torch.load(folder / f"{rank}.pt") for rank in range(RANKS)]


@pytest.mark.long
@pytest.mark.parametrize("name", NAMES)
def test_all_ranks_keep_the_same(ranks, name):
    one, other = (found[name] for found in ranks)
    for part in ("state", "weights"):
        pairs = zip(*(each[part].values() if part == "state" else each[part] for each in (one, other)), strict=True)
        assert all(torch.equal(*pair) for pair in pairs)
    assert len(one["state"]) > 1


@pytest.mark.parametrize("name", ["pgi", "mep-cs"])
def test_two_ranks_keep_what_one_process_would(ranks, name):
    """Signs of a sample's gradient do not depend on the rest of the batch; PCO's weights would, by its |.|."""
    alone, one = trained(0, 1)[name], ranks[0][name]
    key = "perturbations._extra_state"
    assert torch.equal(alone["state"][key], one["state"][key])
    assert 0 < (alone["state"][key] == 0).double().mean() < 1
    for mine, theirs in zip(alone["weights"], one["weights"], strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-9, atol=1e-12)
    if name == "mep-cs":
        means = [each["state"]["convergence._extra_state"][[0, 2]] for each in (alone, one)]
        torch.testing.assert_close(*means, rtol=1e-9, atol=1e-12)


def test_a_run_of_two_ranks_resumes_to_the_bit_from_one_copy_of_what_is_kept(folder):
    assert_same_run(folder / "whole", folder / "resumed")
    saved = checkpoint.load(folder / "whole" / CHECKPOINT)
    assert saved["criterion"]["perturbations._extra_state"].shape == (8 * 16, 1, 8, 8)
    assert [own["criterion"] for own in saved["other_ranks"]] == [{}]


@pytest.mark.parametrize("name", ["pgi", "mep-cs", "rs-cs"])
def test_join_is_refused(name):
    """A rank that has no batch left would take no part in the exchange."""
    from torch._C._distributed_c10d import HashStore

    (x, target), index = training_set(), torch.arange(BATCH)
    dist.init_process_group("gloo", store=HashStore(), rank=0, world_size=1)
    try:
        model, criterion = DistributedDataParallel(smooth()), built(name, eps=EPS)
        with model.join(), pytest.raises(RuntimeError, match=r"^model: expected no join\(\) around .*drop_last=True.*"):
            criterion(model, x[index], target[index], samples=index)
    finally:
        dist.destroy_process_group()


def test_a_state_survives_a_file_and_nothing_else_is_taken():
    table, x = SampleTable(5, torch.int8), torch.zeros(2, 3)
    assert not table.filled
    table.fill(x, lambda values: values.copy_(torch.arange(15).view(5, 3)))
    assert table.filled
    file = io.BytesIO()
    torch.save(table.state_dict(), file)
    file.seek(0)
    other = SampleTable(5, torch.int8)
    other.load_state_dict(torch.load(file))
    rows = other.read(torch.tensor([4, 1]), x)
    assert rows.tolist() == [[12, 13, 14], [3, 4, 5]]
    rows.zero_()
    other.write(torch.tensor([0]), torch.full((1, 3), 9, dtype=torch.int8))
    assert other.values.tolist() == [[9, 9, 9], *torch.arange(3, 15).view(4, 3).tolist()]
    assert table.values[0].tolist() == [0, 1, 2]  # a copy
    for wrong in (torch.zeros(5, 3), torch.zeros(4, 3, dtype=torch.int8)):
        with pytest.raises(ValueError, match=r"^criterion: expected the state of 5 training samples, torch.int8, got "):
            other.set_extra_state(wrong)
    with pytest.raises(TypeError, match=r"^criterion: expected what it keeps of samples as a tensor, got 3"):
        other.set_extra_state(3)
    for samples in (0, 2.5):
        with pytest.raises((TypeError, ValueError), match=r"^samples: expected an integer >= 1"):
            SampleTable(samples, torch.int8)
