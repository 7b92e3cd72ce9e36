"""max_ratio: lam E_lin's part of the gradient in the logits against the cross-entropy's."""

from __future__ import annotations

from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from elle_fast import AdaptiveLambda, ELLELoss, functional, methods
from elle_fast.gradient_bound import bounded
from elle_fast.methods.elle import PlusELLE
from elle_fast.ops import layout
from elle_fast.ops.elle_loss.reference import linearity_error
from elle_fast.ops.elle_loss.validation import Linearity
from elle_fast.testing import no_host_sync
from tests.helpers import convnet, grads_of, labels, random, rng, shown
from tests.levers.cases import BATCH, EPS, LAYOUTS, data, losses_of, same

F64 = torch.float64
NEVER = 1e30
EVERY: list[dict[str, Any]] = [
    *LAYOUTS,
    {"of": "logits"},
    {"penalty": "abs"},
    {"loss_fn": losses_of},
    {"points": "elle-2p", "loss_fn": losses_of},
    {"forward": "split"},
    {"forward": "checkpoint"},
    {"backend": "reference"},
]


def gradients(*, lam: float = 1e4, scale: float = 1.0, model: nn.Module | None = None, **options: Any) -> list[Tensor]:
    """Loss and the gradients of all weights, one after the other."""
    model, (x, y) = convnet(norm=False) if model is None else model, data()
    loss = ELLELoss(EPS, lam, generator=rng(1), **options)(model, x, y)
    return [loss.detach(), *grads_of(scale * loss, model)]


def flat(grads: list[Tensor]) -> Tensor:
    return torch.cat([grad.flatten() for grad in grads[1:]]).double()


@pytest.mark.parametrize("triplets", [1, 2])
@pytest.mark.parametrize("of", ["loss", "logits", "losses"])
@pytest.mark.parametrize("points", layout.BLOCKS)
def test_it_is_the_formula(points, of, triplets):
    """The two parts' gradients taken apart, and put together again."""
    batch, part, classes, lam, ratio = 5, 3, 4, 30.0, 0.7
    options = Linearity.checked(points=points, triplets=triplets, of="loss" if of == "losses" else of)
    count, target = batch + layout.BLOCKS[points] * triplets * part, labels(batch, classes)
    alpha = random(triplets * part, seed=3, dtype=F64)
    shape = (count,) if of == "losses" else (count, classes)
    rows = (3 * random(*shape, seed=2, dtype=F64)).requires_grad_()

    def parts(rows: Tensor, options: Linearity) -> tuple[Tensor, Tensor]:
        if of == "losses":
            return rows[:batch].mean(), linearity_error(rows, alpha, batch, options)
        given = {name: getattr(options, name) for name in ("points", "triplets", "of")}
        _, ce, e_lin = functional.elle_loss(rows, target, alpha, 0.0, backend="reference", **given)
        return ce, e_lin

    ce, e_lin = parts(rows, options)
    (g_ce,), (g,) = (torch.autograd.grad(each, rows, retain_graph=True) for each in (ce, lam * e_lin))
    found_ce, found_e_lin = parts(*bounded(rows, batch, options, ratio))
    torch.testing.assert_close(torch.stack([found_ce, found_e_lin]), torch.stack([ce, e_lin]))
    (found,) = torch.autograd.grad(found_ce + lam * found_e_lin, rows)
    factor = ((found - g_ce) * g).sum() / g.square().sum()
    assert 0 < factor < 0.9
    torch.testing.assert_close(found, g_ce + factor * g)
    if points != "elle-2p" or triplets == 1:  # else the parts of one x_b are counted one by one
        torch.testing.assert_close(factor, ratio * g_ce.norm() / g.norm())


@pytest.mark.parametrize("options", EVERY, ids=shown)
def test_a_step_has_less_of_lam_and_no_other_gradient(options):
    """Whatever the model's gradient is made of, it is that of a smaller lam."""
    loss, full = (got := gradients(**options))[0], flat(got)
    without = flat(gradients(lam=0.0, **options))
    bound = gradients(max_ratio=0.5, **options)
    torch.testing.assert_close(bound[0], loss)
    difference, part = flat(bound) - without, full - without
    factor = (difference @ part) / (part @ part)
    assert 1e-6 < factor < 0.9
    # Roundings in float32 of gradients as large as those of the full lam.
    assert (difference - factor * part).norm() < 1e-4 * factor * part.norm() + 1e-5 * without.norm()


@pytest.mark.parametrize("options", EVERY, ids=shown)
def test_where_it_does_not_bind_no_bit_changes(options):
    expected, found = gradients(**options), gradients(max_ratio=NEVER, **options)
    if options.get("points") == "elle-2p":  # whose x_b has rows of its own: another order of two sums
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-6)
    else:
        assert same(expected, found)


def test_a_whole_training_that_is_never_bound_has_the_same_bits():
    def trained(**options: Any) -> list[Tensor]:
        model = convnet()
        optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
        lam = AdaptiveLambda(1e3, gamma=0.3, sensitivity=0.0, min_history=1, window=4)
        criterion = ELLELoss(EPS, lam, skip_below=0.1, generator=rng(1), **options)
        for step in range(12):
            x, y = data(seed=step)
            optimizer.zero_grad()
            # The fainter images are, the larger eps is for batch norm, and E_lin.
            criterion(model, x * (0.2 if step % 3 == 0 else 1), y).backward()
            optimizer.step()
        return [*model.state_dict().values(), *criterion.state_dict().values()]

    assert same(trained(), trained(max_ratio=NEVER))
    assert not same(trained(), trained(max_ratio=1e-3))


def test_the_scale_of_the_loss_does_not_matter():
    """GradScaler's, or that of gradient accumulation: powers of two change no bit."""
    plain, scaled = (gradients(max_ratio=1.0, scale=scale)[1:] for scale in (1.0, 2.0**16))
    assert same([2.0**16 * grad for grad in plain], scaled)


def test_under_autocast():
    with torch.autocast("cpu", torch.bfloat16):
        full, bound, without = (gradients(lam=lam, max_ratio=r) for lam, r in ((1e6, None), (1e6, 0.5), (0.0, None)))
    assert all(grad.isfinite().all() for grad in bound)
    assert (flat(bound) - flat(without)).norm() < 0.1 * (flat(full) - flat(without)).norm()


def test_a_light_step_has_no_part_to_bound():
    """Also of ELLE-2p, whose layout stays as it is then."""
    for points in ("elle", "elle-2p"):
        options: dict[str, Any] = {"adaptive": True, "skip_below": 1.0, "points": points}
        assert same(gradients(**options), gradients(max_ratio=1e-3, **options))


def test_values_that_are_not_finite_stay_in_sight():
    options, rows = Linearity.checked(), random(4 * BATCH, 3, seed=1).requires_grad_()

    def passed_on(grad: Tensor, ratio: float = 1.0) -> Tensor:
        (found,) = torch.autograd.grad(bounded(rows, BATCH, options, ratio)[0], rows, grad)
        return found

    for value in (torch.nan, torch.inf):
        grad = torch.ones(4 * BATCH, 3)
        grad[-1, -1] = value
        assert not passed_on(grad).isfinite().all()
    # Nothing to divide by, and nothing to be measured against.
    assert passed_on(torch.zeros(4 * BATCH, 3)).abs().sum() == 0
    grad = torch.ones(4 * BATCH, 3)
    grad[:BATCH] = 0
    assert passed_on(grad).abs().sum() == 0
    grad[:BATCH] = torch.nan
    assert torch.equal(passed_on(grad)[BATCH:], grad[BATCH:])
    # Half precision: both norms are above float16's 65504.
    rows = rows.detach().half().requires_grad_()
    grad = torch.full((4 * BATCH, 3), 2e4).half()
    torch.testing.assert_close(passed_on(grad)[BATCH:], grad[BATCH:] / 3**0.5)


def test_nothing_waits_for_the_device():
    model, (x, y) = convnet(), data()
    criterion = ELLELoss(EPS, adaptive=True, max_ratio=1.0, points="elle-2p")
    with no_host_sync():
        criterion(model, x, y).backward()


def test_a_second_derivative_is_an_error():
    rows = random(4 * BATCH, 3, seed=1).requires_grad_()
    packed, _ = bounded(rows, BATCH, Linearity.checked(), 0.5)
    (grad,) = torch.autograd.grad(packed.square().sum(), rows, create_graph=True)
    with pytest.raises(RuntimeError, match="twice"):
        grad.sum().backward()


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # of torch's compiler about its own calls
def test_it_is_one_graph():
    rows, options = random(4 * BATCH, 3, seed=1), Linearity.checked()

    def step(rows: Tensor) -> Tensor:
        packed, _ = bounded(rows, BATCH, options, 0.5)
        weights = torch.arange(4 * BATCH, dtype=rows.dtype)[:, None]
        return (weights * packed.square()).sum()

    compiled = torch.compile(step, backend="aot_eager", fullgraph=True)
    found = [torch.autograd.grad(each(leaf := rows.clone().requires_grad_()), leaf)[0] for each in (step, compiled)]
    torch.testing.assert_close(*found)


def test_what_takes_it():
    assert methods.build("n-fgsm+elle-a", eps=EPS, max_ratio=30.0).max_ratio == 30.0
    assert methods.build("advmixup-single+elle", eps=EPS, max_ratio=30.0).elle.max_ratio == 30.0  # type: ignore[union-attr]
    gat: Any = methods.build("gat", eps=EPS)
    for make in (partial(methods.build, "gat+elle-a", eps=EPS), partial(PlusELLE, gat, EPS, 1.0)):
        with pytest.raises(ValueError, match=r"^max_ratio: .* does not apply"):
            make(max_ratio=2.0)
    PlusELLE(gat, EPS, 1.0, max_ratio=None)


@pytest.mark.parametrize("value, error", [(0.0, ValueError), (-1, ValueError), ("1", TypeError), (True, TypeError)])
def test_bad_values(value, error):
    with pytest.raises(error, match=r"^max_ratio: expected .* in \(0, 3.4"):
        ELLELoss(EPS, max_ratio=value)
