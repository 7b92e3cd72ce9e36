"""Torch's default dtype and default device change nothing: what is made takes those of the inputs."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from functools import partial
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from elle_fast import AdaptiveLambda, ELLELoss, LocalLinearity, TrainingStep, attacks, capture, methods
from elle_fast.functional import random_start
from elle_fast.regularizers import CURE, GAT, LLR, AdvLC, GradAlign, NuAT
from tests.helpers import Called, built, labels, random

B, C, D = 6, 3, 5
X, Y = random(B, D, seed=1), labels(B, C)

CRITERIA: dict[str, Callable[[], Any]] = {
    "elle": lambda: ELLELoss(0.1, 10_001.0),
    "elle-a": lambda: ELLELoss(0.1, AdaptiveLambda(10_001.0, min_history=1, sensitivity=0.0)),
    "window": lambda: ELLELoss(
        0.1, AdaptiveLambda(10_001.0, window=3), backend="reference", mean=[0.5] * D, std=[0.3] * D
    ),
    "light": lambda: ELLELoss(0.1, 10_001.0, adaptive=True, skip_below=0.5, attack="n-fgsm"),
    "split": lambda: ELLELoss(0.1, 10_001.0, forward="split", backend="reference", alpha="argmax"),
    "checkpoint": lambda: ELLELoss(0.1, 10_001.0, forward="checkpoint", norm="l2", attack="rs-fgsm"),
    "zero-grad": lambda: ELLELoss(0.1, 10_001.0, attack="zero-grad", of="logits", penalty="abs", points="five-point"),
    **{name: partial(built, name, eps=0.1, bounds=(-1.0, 2.0)) for name in methods.NAMES},
}
REGULARIZERS: dict[str, Callable[[], Any]] = {
    "gradalign": lambda: GradAlign(0.1),
    "llr": lambda: LLR(0.1),
    "cure": CURE,
    "gat": GAT,
    "nuat": NuAT,
    "advlc": AdvLC,
    "e_lin": lambda: LocalLinearity(0.1),
}


@contextmanager
def default_dtype(dtype: torch.dtype) -> Iterator[None]:
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


OTHER_DEFAULTS: dict[str, Callable[[], Any]] = {
    "float16": lambda: default_dtype(torch.float16),
    "meta": lambda: torch.device("meta"),
}
others = pytest.mark.parametrize("other", OTHER_DEFAULTS.values(), ids=OTHER_DEFAULTS)


def parts() -> tuple[nn.Module, torch.optim.Optimizer]:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(D, 8), nn.Tanh(), nn.Linear(8, C))
    return model, torch.optim.SGD(model.parameters(), lr=0.1, fused=True)


def compared(under: Any, run: Any) -> None:
    """The same results, to the bit and in the same dtypes, under another default."""
    expected = run(nullcontext)
    found = run(under)
    assert len(expected) == len(found)
    for one, other in zip(expected, found, strict=True):
        assert (one.dtype, one.device) == (other.dtype, other.device)
        assert torch.equal(one, other)


@others
@pytest.mark.parametrize("name", CRITERIA)
def test_criteria(name, other):
    def run(under: Any) -> list[Tensor]:
        model, optimizer = parts()
        with under():
            criterion = CRITERIA[name]()
            step = TrainingStep(Called(criterion), model, optimizer)
            results = [step(X, Y) for _ in range(3)]
            stats, state = criterion.stats, criterion.state_dict()
            criterion = pickle.loads(pickle.dumps(copy.deepcopy(criterion))) if name == "elle-a" else criterion
            criterion.load_state_dict(state)
        kept = [*stats.values(), criterion.output, *(value for value in state.values() if isinstance(value, Tensor))]
        return [*results, *kept, *model.parameters()]

    compared(other, run)


def test_criterion_under_float64():
    for name in ("elle", "light", "window"):
        test_criteria(name, lambda: default_dtype(torch.float64))


@others
@pytest.mark.parametrize("name", REGULARIZERS)
def test_regularizers(name, other):
    def run(under: Any) -> list[Tensor]:
        model, _ = parts()
        with under():
            value = REGULARIZERS[name]()(model, X, Y, X + 0.05)
            value.backward()
        return [value.detach(), *(each.grad for each in model.parameters())]

    compared(other, run)


@others
def test_attacks_and_capture(other):
    def run(under: Any) -> list[Tensor]:
        model, optimizer = parts()
        with under():
            calls: list[Any] = [*attacks.SINGLE_STEP.values(), attacks.pgd]
            made = [attack(model, X, Y, 0.1, bounds=(-1, 2)) for attack in calls]
            step = capture(ELLELoss(0.1, adaptive=True), model, optimizer, X, Y)
            return [*made, step(X, Y), *step.criterion.stats.values()]

    compared(other, run)


@pytest.mark.parametrize("backend", ["reference", "cpp"])
def test_no_random_start_is_x_itself(backend):
    x = torch.tensor([[-0.0, 0.0, -1.0, 2.0, -0.0]])
    for norm in ("linf", "l2"):
        start = random_start(x, 0.1, seed=torch.tensor(3), start=0, norm=norm, bounds=(0, 1), backend=backend)
        assert torch.equal(start.view(torch.int32), x.view(torch.int32))
        assert start.data_ptr() != x.data_ptr()


def test_the_loss_of_a_model_in_another_dtype():
    """A model and inputs in a 16-bit default dtype: the numbers of float32 all the same."""
    with default_dtype(torch.bfloat16):
        model, _ = parts()
        criterion = ELLELoss(0.1, 10_001.0)
        criterion(model, X.bfloat16(), Y)
    assert criterion.stats["lam"].item() == 10_001.0
    assert {value.dtype for value in criterion.stats.values()} == {torch.float32}
    assert criterion.output is not None
    assert F.cross_entropy(criterion.output.float(), Y).item() == pytest.approx(criterion.stats["ce"].item(), rel=1e-6)
