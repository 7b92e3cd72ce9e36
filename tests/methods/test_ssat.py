"""SSAT against its formula, sample by sample."""

import pytest
import torch
from torch import nn

from elle_fast import methods
from elle_fast.methods.ssat import SSAT
from tests.methods.cases import CLOSE, EPS, FEATURES, ball, batch, check, gradient, losses, smooth, step


@pytest.mark.parametrize("checkpoints", [1, 3, 5])
def test_each_sample_takes_the_first_checkpoint_that_deceives(checkpoints):
    model, seen = smooth(), set()
    for seed in range(20):  # enough for every case to be met
        (x, _), eps = batch(), 4 * EPS
        torch.manual_seed(seed)
        target = model(x + 0.3 * torch.randn_like(x)).argmax(dim=1)
        criterion = SSAT(eps, (0.0, 1.0), checkpoints)
        loss, points = step(criterion, model, x, target)
        start, x_adv = points[0], points[-1]
        assert len(points) == 1 + checkpoints
        delta = (start + 1.25 * eps * gradient(model, start, target).sign() - x).clamp(-eps, eps)
        delta = (x + delta).clamp(0, 1) - x
        right = [model(x + j / checkpoints * delta).argmax(dim=1) == target for j in range(1, checkpoints)]
        at_start = model(start).argmax(dim=1) == target
        for i in range(len(x)):
            parts = [j for j, each in enumerate(right, 1) if not each[i]]
            first = min(parts, default=checkpoints) if at_start[i] else 0
            seen.add(first)
            torch.testing.assert_close(x_adv[i], x[i] + first / checkpoints * delta[i], **CLOSE)
        check(criterion, loss, losses(model, x_adv, target).mean(), model)
    assert {0, checkpoints} <= seen
    assert len(seen) > 2 or checkpoints == 1


def test_checkpoints_are_looked_at_in_eval_mode_and_leave_no_trace():
    (x, target), norm = batch(), nn.BatchNorm1d(FEATURES).double()
    model = nn.Sequential(norm, smooth())
    modes = []
    model.register_forward_pre_hook(lambda module, args: modes.append(module.training))
    methods.build("ssat", eps=EPS, bounds=(0.0, 1.0))(model, x, target)
    assert modes == [True, False, False, True]
    assert norm.training
    assert norm.num_batches_tracked == 2


def test_without_eps_it_is_standard_training():
    (x, target), model = batch(), smooth()
    _, points = step(SSAT(0.0), model, x, target)
    assert all(torch.equal(point, x) for point in points)
    assert torch.equal(ball(x, x), x)
    with pytest.raises(ValueError, match=r"^checkpoints: expected an integer >= 1"):
        SSAT(EPS, checkpoints=0)
