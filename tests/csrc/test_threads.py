"""Threads and forks: the same results from any number of them."""

from __future__ import annotations

import itertools
import os
import subprocess
import sys
import threading
from collections import OrderedDict
from concurrent.futures import ThreadPoolExecutor
from functools import partial

import pytest
import torch
from torch import Tensor

from elle_fast import functional
from elle_fast.ops import dispatch
from elle_fast.ops.pack_points.schema import PACK_POINTS
from tests.csrc.cases import _C, CALLS, LOSS, PACK, everywhere, used
from tests.helpers import labels, probabilities, random, rng, seed_of


def everything(x: Tensor, grad: Tensor, logits: Tensor, many: Tensor) -> list[Tensor]:
    """Results of all functions on some large tensors."""
    results = [
        *functional.pack_points(x, grad, 0.1, seed=seed_of(1), backend="cpp"),
        *functional.pack_points(x, grad, 0.1, seed=seed_of(2), start=1.0, dtype=torch.float16, points="five-point",
                                memory_format=torch.channels_last, mean=[0.5] * 3, std=[2.0] * 3,
                                backend="cpp"),
        *functional.pack_points(x, grad, 0.1, seed=seed_of(3), norm="l2", start=1.0, project=True, backend="cpp"),
        functional.random_start(x, 0.1, seed=seed_of(4), bounds=(0.0, 1.0), backend="cpp"),
        functional.random_start(x, 0.1, seed=seed_of(4), norm="l2", backend="cpp"),
    ]  # fmt: skip
    for z, of in itertools.product((logits, many), ("loss", "logits")):
        leaf, samples = z.clone().requires_grad_(), z.shape[0] // 4
        target = (
            labels(samples, z.shape[1]) if of == "loss" else probabilities(samples, z.shape[1], dtype=torch.float32)
        )
        values = functional.elle_loss(leaf, target, random(samples, seed=6), 2.0, of=of, backend="cpp")
        results += [*(value.detach() for value in values), *torch.autograd.grad(values[0], leaf)]
    return results


def large_inputs() -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Images of 200,704 elements, logits of few and of many classes: work for several threads each."""
    logits = torch.randn(4096, 10, generator=rng(3)), torch.randn(256, 1000, generator=rng(4))
    return random(16, 3, 64, 66, seed=1), random(16, 3, 64, 66, seed=2) - 0.5, *logits


@everywhere
def test_any_number_of_threads_gives_the_same(where):
    inputs = large_inputs()
    with used(where):
        alone = everything(*inputs)
    for threads in (2, 3, 8):
        with used(where, threads):
            assert all(torch.equal(one, other) for one, other in zip(everything(*inputs), alone, strict=True))


@everywhere
def test_eight_threads_call_at_once(where):
    """Each with inputs of its own, some with threads below them."""
    cases = [tuple(t.roll(turn, 0) for t in large_inputs()) for turn in range(8)]
    with used(where):
        expected = [everything(*case) for case in cases]
        together = threading.Barrier(8)

        def call(turn: int) -> bool:
            together.wait()
            for _ in range(2):
                torch.set_num_threads(1 + turn % 2)
                found = everything(*cases[turn])
                if not all(torch.equal(one, other) for one, other in zip(found, expected[turn], strict=True)):
                    return False
            return True

        with ThreadPoolExecutor(8) as pool:
            assert list(pool.map(call, range(8))) == [True] * 8


@pytest.mark.parametrize("name", ["pack", "forward", "backward"])
def test_others_run_during_a_call(name):
    """Python by itself would switch threads after the interval, which is too long here: a call has to let others in."""
    x, seed = random(2, 40_000, seed=1), seed_of(1)
    target, ones = labels(2, 10_000), torch.ones(16)
    memory = [torch.zeros(10 * x.numel()) for _ in range(2)]
    places = {
        "x": x, "given": x, "seed": seed, "points": memory[0], "alpha": ones,
        "logits": x, "target": target, "saved": memory[0], "grad": memory[1], "loss": ones, "ce": ones, "e_lin": ones,
    }  # fmt: skip
    pack = _C.Pack(**{**PACK, "channels": 1, "plane": 40_000})
    loss = _C.Loss(**{**LOSS, "classes": 10_000, "stride": 10_000})
    names = next(names for method, _, names, _ in CALLS.values() if method == name)
    arguments = [places[n].data_ptr() if n in places else 0.5 if n is None else 0 for n in names]
    function = partial(getattr(pack if name == "pack" else loss, name), "cpu")
    events: list[str] = []
    started = threading.Event()

    def call() -> None:
        started.set()
        for _ in range(2000):
            function(*arguments, 1)
            if "met" in events:
                return
        events.append("never met")

    interval = sys.getswitchinterval()
    sys.setswitchinterval(1000.0)
    try:
        thread = threading.Thread(target=call)
        thread.start()
        started.wait()
        events.append("met")
        thread.join()
    finally:
        sys.setswitchinterval(interval)
    assert events == ["met"]


FORKS = """
import multiprocessing, os, sys
import torch
from torch.utils.data import DataLoader, Dataset
from elle_fast import functional

x, grad = torch.rand(4, 3, 100, 100), torch.randn(4, 3, 100, 100)
logits, target, alpha = torch.randn(4096, 10), torch.randint(10, (1024,)), torch.rand(1024)

torch.set_num_threads(2)
torch.ones(1 << 20).exp().sum()  # torch's own threads are at work
expected = [functional.pack_points(x, grad, 0.1, seed=torch.tensor(seed), backend="cpp")[0] for seed in range(6)]
loss = functional.elle_loss(logits, target, alpha, 2.0, backend="cpp")[0]

def same(seed):
    torch.set_num_threads(2)
    points = functional.pack_points(x, grad, 0.1, seed=torch.tensor(seed), backend="cpp")[0]
    again = functional.elle_loss(logits, target, alpha, 2.0, backend="cpp")[0]
    # Not torch's comparison: its own threads did not come along.
    return points.numpy().tobytes() == expected[seed].numpy().tobytes() and again.item() == loss.item()

child = os.fork()
if child == 0:
    os._exit(0 if same(0) and same(1) else 1)
assert os.waitpid(child, 0)[1] == 0
with multiprocessing.get_context("fork").Pool(2) as pool:
    assert pool.map(same, range(6)) == [True] * 6

class Points(Dataset):
    def __len__(self):
        return 6
    def __getitem__(self, seed):
        torch.set_num_threads(2)
        return functional.pack_points(x, grad, 0.1, seed=torch.tensor(seed), backend="cpp")[0]

loader = DataLoader(Points(), batch_size=None, num_workers=2, multiprocessing_context="fork")
assert all(torch.equal(points, wanted) for points, wanted in zip(loader, expected, strict=True))
assert same(5)  # and the parent goes on
print("done")
"""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="there is no fork here")
def test_children_of_a_process_that_has_used_threads():
    """By fork, in a pool, and as a DataLoader's workers: they have none of the parent's threads to wait for."""
    arguments = [sys.executable, "-W", "ignore::DeprecationWarning", "-c", FORKS]
    done = subprocess.run(arguments, capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stdout) == (0, "done\n"), done.stderr[-2000:]


LOADED_IN_THE_CHILD = """
import os, torch
from elle_fast import functional
torch.set_num_threads(2)
x = torch.rand(4, 3, 100, 100)
torch.ones(1 << 20).exp().sum()  # torch's own threads are at work, and the extension is not loaded
child = os.fork()
if child == 0:
    torch.set_num_threads(2)
    functional.pack_points(x, x, 0.1, seed=torch.tensor(1), backend="cpp")
    os._exit(0)
assert os.waitpid(child, 0)[1] == 0
"""


def test_a_child_that_loads_the_extension_itself():
    arguments = [sys.executable, "-W", "ignore::DeprecationWarning", "-c", LOADED_IN_THE_CHILD]
    subprocess.run(arguments, check=True, capture_output=True, timeout=60)


def test_plans_made_by_many_threads(monkeypatch):
    monkeypatch.setattr(dispatch, "MOST_PLANS", 4)
    monkeypatch.setattr(PACK_POINTS, "_plans", OrderedDict())
    before = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    try:
        with ThreadPoolExecutor(8) as pool:
            plans = list(pool.map(lambda i: PACK_POINTS.plan(str, i % 37), range(20_000)))
    finally:
        sys.setswitchinterval(before)
    assert plans == [str(i % 37) for i in range(20_000)]
    assert len(PACK_POINTS._plans) <= 4 + 8  # each thread may be about to forget one
