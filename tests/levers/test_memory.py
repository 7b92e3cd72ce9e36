"""What the levers save of peak memory."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from elle_fast import ELLELoss, attacks
from tests.helpers import convnet, labels, random
from tests.levers.cases import BATCH, EPS, data


def peak_bytes(step: Callable[[], Any]) -> int:
    """The most memory that a step on the CPU holds beyond what there was before it."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        step()
    results = profile.profiler.kineto_results
    events = [(e.start_ns(), e.nbytes()) for e in results.events() if e.name() == "[memory]"]
    held: list[int] = list(itertools.accumulate(size for _, size in sorted(events, key=lambda event: event[0])))
    return max(held)


def deep() -> nn.Module:
    """Its activations are most of what a step holds, as in a convolutional network: 24 times [512, 64]."""
    torch.manual_seed(0)
    layers = [layer for n in range(24) for layer in (nn.Linear(64 if n else 8, 64), nn.Tanh())]
    return nn.Sequential(*layers, nn.Linear(64, 4))


@pytest.fixture(scope="module")
def peaks() -> dict[str, float]:
    """Peak memory of a step, in units of an FGSM step's."""
    model, x, y = deep(), random(512, 8, seed=1), labels(512, 4)
    for p in model.parameters():
        p.grad = torch.zeros_like(p)

    def fgsm() -> None:
        F.cross_entropy(model(attacks.fgsm(model, x, y, EPS)), y).backward()

    def elle(**options: Any) -> Callable[[], None]:
        criterion = ELLELoss(EPS, **options)
        return lambda: criterion(model, x, y).backward()

    steps = {
        "fgsm": fgsm,
        "packed": elle(),
        "split": elle(forward="split"),
        "checkpoint": elle(forward="checkpoint"),
        "light": elle(adaptive=True, skip_below=1.0, forward="checkpoint"),
    }
    found = {}
    for name, step in steps.items():
        step()
        found[name] = float(peak_bytes(step))
    return {name: value / found["fgsm"] for name, value in found.items()}


def test_peak_memory_of_checkpoint_is_that_of_one_point(peaks):
    assert peaks["checkpoint"] < 1.2
    assert peaks["light"] < 1.2
    # What it saves, or nothing is measured here.
    assert peaks["packed"] > 3
    assert peaks["split"] > 3


@pytest.mark.parametrize("forward", ["packed", "split", "checkpoint"])
def test_a_light_step_keeps_activations_of_x_adv_alone(forward):
    model, (x, y) = convnet(), data()

    def kept(step: Callable[[], Tensor]) -> int:
        sizes: dict[int, int] = {}

        def pack(tensor: Tensor) -> Tensor:
            sizes[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            loss = step()  # alive until the sizes are added up, so that no address is used twice
        assert loss.requires_grad
        return sum(sizes.values())

    x_adv = attacks.fgsm(model, x, y, EPS)
    light = ELLELoss(EPS, adaptive=True, skip_below=1.0, forward=forward)
    full = ELLELoss(EPS)
    one = kept(lambda: F.cross_entropy(model(x_adv), y))
    # Beyond those: the packed points (x_adv is a view of them) and logits, a few numbers a row.
    more = 4 * x.numel() * 4 + 4 * BATCH * 32 * 4
    assert kept(lambda: light(model, x, y, x_adv)) <= one + more
    assert kept(lambda: full(model, x, y, x_adv)) > one + more
