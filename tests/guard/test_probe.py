"""The probe attacks as it was asked to: its points are those of attacks.pgd with the guard's options."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from elle_fast import attacks
from elle_fast.guard import CollapseGuard
from tests.helpers import convnet, labels, random, rng

EPS = 0.1


def margin(output: Tensor, target: Tensor) -> Tensor:
    """A loss whose gradient has other signs than that of cross-entropy."""
    return output.square().sum(1) - output.gather(1, target.view(-1, 1)).squeeze(1)


@pytest.mark.parametrize("options", [{}, {"norm": "l2"}, {"bounds": None}, {"bounds": (0.0, 0.9)}, {"loss_fn": margin}])
def test_points(options):
    model = convnet().train()
    x, y = 0.9 * random(12, 3, 8, 8, seed=1), labels(12, 4)
    guard = CollapseGuard(model, torch.optim.SGD(model.parameters(), lr=0.1), eps=EPS, held_out=(x, y), **options)
    guard.eps = 2 * EPS  # as in a warm-up
    seen: list[Tensor] = []
    hook = model.register_forward_pre_hook(lambda _, args: seen.append(args[0].detach().clone()))
    assert guard._probe is not None
    right, samples, classes = guard._probe.withstood(model, x)
    hook.remove()
    assert model.training
    given: dict[str, Any] = {"eps": 2 * EPS, "steps": 10, "generator": rng(0), **options}
    points = attacks.pgd(model.eval(), x, y, **given)
    assert torch.equal(seen[-1], points)
    assert (right, samples, classes) == ((model(points).argmax(1) == y).sum(), 12, 4)


def test_a_logit_that_is_infinite_is_none_that_is_missing():
    """As of a class that a model rules out."""
    x, y = random(12, 3, 8, 8, seed=1), labels(12, 3)
    model = convnet()
    guard = CollapseGuard(
        model,
        torch.optim.SGD(model.parameters(), lr=0.1),
        eps=EPS,
        held_out=(x, y),
        logits=lambda output: F.pad(output[:, :3], (0, 1), value=-torch.inf),
    )
    assert guard._probe is not None
    assert guard._probe.withstood(model, x).isfinite().all()
