"""MART against its formula, sample by sample."""

import pytest
import torch

from elle_fast import methods
from tests.helpers import labels
from tests.methods.cases import BATCH, CLASSES, CLOSE, EPS, LAM, ball, batch, build, check, gradient, smooth, step


def loss_of(model, x, x_adv, target):
    """As the paper writes it, and with the small numbers of the authors' code."""
    boosted, weighted = [], []
    for p, q, y in zip(model(x).softmax(dim=1), model(x_adv).softmax(dim=1), target, strict=True):
        others = torch.cat([q[:y], q[y + 1 :]])
        boosted.append(-q[y].log() - (1.0001 - others.max() + 1e-12).log())
        weighted.append((1.0000001 - p[y]) * (p * (p / (q + 1e-12)).log()).sum())
    return torch.stack(boosted).mean(), torch.stack(weighted).mean()


@pytest.mark.parametrize("seed", [7, 8])
def test_mart_is_its_formula(seed):
    (x, _), criterion, model = batch(), build("mart"), smooth()
    target = labels(BATCH, CLASSES, seed=seed)
    loss, (clean, start, *points) = step(criterion, model, x, target)
    assert torch.equal(clean, x)
    assert 0 < (start - x).abs().max() < 0.01
    assert len(points) == 10
    point = start
    for each in points:
        point = ball(point + 7 / 31 * EPS * gradient(model, point, target).sign(), x)
        torch.testing.assert_close(each, point, **CLOSE)
    boosted, weighted = loss_of(model, x, point, target)
    right = model(point).argmax(dim=1) == target
    assert 0 < right.sum() < BATCH  # the most likely other class is the first, or the second
    torch.testing.assert_close(criterion.stats["ce"], boosted.detach(), **CLOSE)
    torch.testing.assert_close(criterion.stats["penalty"], weighted.detach(), **CLOSE)
    check(criterion, loss, boosted + LAM * weighted, model)


def test_confident_logits():
    """A probability that is 0 in float32 has a finite logarithm and gradient, as the authors' 1e-12 is for."""
    (x, target), model = batch(), smooth().float()
    with torch.no_grad():
        model.last.weight.mul_(1e3)
    loss = build("mart")(model, x.float(), target)
    loss.backward()
    assert loss.isfinite()
    assert all(parameter.grad.isfinite().all() for parameter in model.parameters())


def test_weights_and_targets():
    assert methods.build("mart", eps=EPS).lam == 5
    x, target = batch()
    with pytest.raises(ValueError, match=rf"^target: expected int64 class indices \[{BATCH}\], got a tensor"):
        build("mart")(smooth(), x, torch.nn.functional.one_hot(target, CLASSES).double())
