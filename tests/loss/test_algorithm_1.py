"""ELLELoss and LocalLinearity against Algorithm 1 written out plainly."""

from __future__ import annotations

import copy
import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from elle_fast import AdaptiveLambda, ELLELoss, LocalLinearity, attacks
from elle_fast.functional import draw_seed, pack_points
from elle_fast.ops.pack_points import op as pack_op
from elle_fast.testing import call_counter
from tests.helpers import convnet, grads_of, probabilities, rng, shown
from tests.loss.cases import (
    BATCH,
    CLASSES,
    EPS,
    F64,
    FEATURES,
    bent,
    ce_rows,
    close,
    data,
    fgsm_by_hand,
    noise_of,
    residual,
)


@pytest.mark.parametrize(
    "adaptive, lagged, window",
    [(False, False, None), (True, False, None), (True, True, None), (True, False, 4), (True, True, 4)],
)
def test_algorithm_1_over_several_steps(adaptive, lagged, window):
    options: dict[str, Any] = (
        {"lam": AdaptiveLambda(5.0, window=window), "lagged": lagged} if adaptive else {"lam": 5.0}
    )
    model = bent()
    twin = copy.deepcopy(model)
    optimizers = [torch.optim.SGD(m.parameters(), lr=0.1, momentum=0.9) for m in (model, twin)]
    criterion = ELLELoss(EPS, generator=rng(3), **options)
    source, lam, triggered = rng(3), 0.0 if adaptive else 5.0, 0
    history: list[float] = []
    for step in range(12):
        x, y = data(seed=10 + step)
        if step == 7:
            x = 3 * x - 1  # farther out the model is less linear or more so
        loss = criterion(model, x, y)
        optimizers[0].zero_grad()
        loss.backward()
        optimizers[0].step()

        x_adv = fgsm_by_hand(twin, x, y, EPS)
        x_a, x_b, alpha = noise_of(x, EPS, draw_seed(x.device, source))
        ce = ce_rows(twin, x_adv, y).mean()
        e_lin = residual(lambda p, y=y: ce_rows(twin, p, y), x_a, x_b, alpha).square().mean()
        used = lam
        if adaptive:
            held = torch.tensor(history[-(window or len(history)) :] if history else [0.0], dtype=F64)
            threshold = held.mean() + 2 * held.std(correction=0)
            detected = len(history) >= 3 and e_lin.item() > threshold.item()
            triggered += detected
            lam = 5.0 if detected else 0.99 * lam
            history.append(e_lin.item())
            used = used if lagged else lam
        optimizers[1].zero_grad()
        (ce + used * e_lin).backward()
        optimizers[1].step()

        stats = criterion.stats
        # Errors grow with the steps; a factor 3 per step of SGD is generous for this model.
        slack = 1e-9 * 3**step if step < 6 else 1e-6
        close(stats["e_lin"], e_lin, rtol=slack)
        close(stats["ce"], ce, rtol=slack)
        close(stats["lam"], used, rtol=1e-5)  # lam is held in float32: 12 roundings
        close(loss, ce + used * e_lin, rtol=slack + 1e-6)
        assert e_lin.item() > 1e-8
    assert not adaptive or triggered


def test_the_gradient_is_that_of_algorithm_1():
    model, (x, y) = bent(), data()
    grads = grads_of(ELLELoss(EPS, lam=30.0, generator=rng(3))(model, x, y), model)
    x_adv = fgsm_by_hand(model, x, y, EPS)
    x_a, x_b, alpha = noise_of(x, EPS, draw_seed(x.device, rng(3)))
    r = residual(lambda p: ce_rows(model, p, y), x_a, x_b, alpha)
    assert r.abs().max().item() > 1e-3
    expected = grads_of(ce_rows(model, x_adv, y).mean() + 30 * r.square().mean(), model)
    for one, other in zip(grads, expected, strict=True):
        close(one, other, atol=1e-11)
    # Not that of the cross-entropy alone.
    plain = grads_of(ce_rows(model, x_adv, y).mean(), model)
    assert any((one - other).abs().max() > 1e-3 for one, other in zip(grads, plain, strict=True))


def restated(model: Any, x: Tensor, y: Tensor, x_adv: Tensor, seed: Tensor, **o: Any) -> tuple[Tensor, Tensor]:
    """ce and e_lin of any variant."""
    smoothing, triplets, points = o.get("label_smoothing", 0.0), o.get("triplets", 1), o.get("points", "elle")
    smoothing_of_r = smoothing if o.get("smoothed") == "all" else 0.0
    fraction = o.get("triplet_fraction", 1.0)
    part = math.ceil(fraction * x.shape[0])
    shared = {"norm": o.get("norm", "linf"), "bounds": o.get("bounds"), "alpha": o.get("alpha", "uniform")}
    packed, alpha = pack_points(x, None, EPS, seed=seed, triplets=triplets, fraction=fraction, **shared)
    if o.get("of", "loss") == "loss":

        def h(p: Tensor) -> Tensor:
            return ce_rows(model, p, y[:part], smoothing_of_r)
    else:
        h = model

    sizes = []
    for t in range(triplets):
        x_a, x_b, _ = packed.unflatten(0, (triplets, 3, part))[t]
        if points == "five-point":
            places = zip((-1 / 12, 4 / 3, -5 / 2, 4 / 3, -1 / 12), (0, 1 / 4, 1 / 2, 3 / 4, 1), strict=True)
            r = sum((w * h((1 - at) * x_a + at * x_b) for w, at in places), torch.zeros((), dtype=F64))
        else:
            r = residual(h, x_a, x_adv[:part] if points == "elle-2p" else x_b, alpha[t * part : (t + 1) * part])
        sizes.append(r.abs() if r.dim() == 1 else r.norm(dim=1))
    size = torch.cat(sizes)
    penalty = o.get("penalty", "squared")
    if penalty == "squared":
        e_lin = size.square().mean()
    elif penalty == "abs":
        e_lin = size.mean()
    else:
        e_lin = torch.where(size < 1, size.square() / 2, size - 0.5).mean()
    return ce_rows(model, x_adv, y, smoothing).mean(), e_lin


VARIANTS: list[dict[str, Any]] = [
    {},
    {"points": "elle-2p", "penalty": "abs"},
    {"points": "elle-2p", "triplets": 2, "triplet_fraction": 0.5},
    {"triplets": 3},
    {"alpha": "half"},
    {"points": "five-point"},
    {"points": "five-point", "triplets": 2, "of": "logits", "penalty": "abs"},
    {"of": "logits"},
    {"of": "logits", "penalty": "smooth_l1", "points": "elle-2p"},
    {"penalty": "smooth_l1"},
    {"penalty": "abs"},
    {"label_smoothing": 0.1},
    {"label_smoothing": 0.9, "points": "elle-2p"},
    {"label_smoothing": 0.1, "smoothed": "all"},
    # So much that the attack goes elsewhere than it would without.
    {"label_smoothing": 0.9, "smoothed": "all"},
    {"label_smoothing": 0.9, "smoothed": "all", "points": "elle-2p"},
    {"triplet_fraction": 0.5},
    {"triplet_fraction": 0.01, "triplets": 2},
    {"bounds": (0.1, 0.9)},
]


@pytest.mark.parametrize("options", VARIANTS, ids=shown)
@pytest.mark.parametrize("forward", ["packed", "split", "checkpoint"])
@pytest.mark.parametrize("soft", [False, True])
def test_variants(options, forward, soft):
    model, (x, y) = bent(), data()
    x = x.clamp(*options["bounds"]) if "bounds" in options else x
    y = probabilities(BATCH, CLASSES) if soft else y
    criterion = ELLELoss(EPS, lam=3.0, forward=forward, generator=rng(4), **options)
    loss = criterion(model, x, y)
    of_all = options["label_smoothing"] if options.get("smoothed") == "all" else 0.0
    x_adv = fgsm_by_hand(model, x, y, EPS, label_smoothing=of_all)
    if "bounds" in options:
        x_adv = x_adv.clamp(*options["bounds"])
    ce, e_lin = restated(model, x, y, x_adv, draw_seed(x.device, rng(4)), **options)
    assert e_lin.item() > 1e-8
    close(criterion.stats["ce"], ce)
    close(criterion.stats["e_lin"], e_lin)
    close(loss, ce + 3 * e_lin)
    for one, other in zip(grads_of(loss, model), grads_of(ce + 3 * e_lin, model), strict=True):
        close(one, other, rtol=1e-8, atol=1e-10)

    alone = {k: v for k, v in options.items() if k not in ("label_smoothing", "smoothed")}
    regulariser = LocalLinearity(EPS, generator=rng(4), label_smoothing=of_all, **alone)
    given = x_adv if options.get("points") == "elle-2p" else None
    close(regulariser(model, x, y, given), e_lin)


def test_l2():
    model, (x, y) = bent(), data()
    criterion = ELLELoss(EPS, lam=3.0, norm="l2", generator=rng(4))
    criterion(model, x, y)
    point = x.clone().requires_grad_()
    (grad,) = torch.autograd.grad(ce_rows(model, point, y).sum(), point)
    x_adv = x + EPS * grad / grad.norm(dim=1, keepdim=True)
    ce, e_lin = restated(model, x, y, x_adv, draw_seed(x.device, rng(4)), norm="l2")
    close(criterion.stats["ce"], ce)
    # r is smaller in this ball.
    close(criterion.stats["e_lin"], e_lin, rtol=1e-7)


@pytest.mark.parametrize("attack", ["rs-fgsm", "n-fgsm", "zero-grad"])
@pytest.mark.parametrize("step_size", [None, 0.02])
@pytest.mark.parametrize("bounds", [None, (0.0, 1.0)])
def test_named_attacks_are_those_of_the_attacks_module(attack, step_size, bounds):
    model, (x, y) = bent(), data()
    criterion = ELLELoss(EPS, lam=3.0, attack=attack, step_size=step_size, bounds=bounds, generator=rng(4))
    criterion(model, x, y)
    made = getattr(attacks, attack.replace("-", "_"))(
        model, x, y, EPS, step_size=step_size, bounds=bounds, generator=rng(4)
    )
    ce, e_lin = restated(model, x, y, made, draw_seed(x.device, rng(4)), bounds=bounds)
    close(criterion.stats["ce"], ce)
    close(criterion.stats["e_lin"], e_lin)


def test_no_attack_a_callable_and_points_made_elsewhere():
    model, (x, y) = bent(), data()
    seed = draw_seed(x.device, rng(4))
    _, e_lin = restated(model, x, y, x, seed)
    other = x + EPS * torch.randn(x.shape, generator=rng(1), dtype=F64).sign()
    seen: list[Any] = []

    def attack(model: Any, x: Tensor, target: Tensor) -> Tensor:
        seen.append((model, x, target))
        return other.clone().requires_grad_()

    for options, given, x_adv in (
        ({"attack": "none"}, None, x),
        ({"attack": attack}, None, other),
        ({}, other, other),
        ({"attack": attack}, x, x),
    ):
        counted, rows = call_counter(model)
        criterion = ELLELoss(EPS, lam=3.0, generator=rng(4), **options)
        loss = criterion(counted, x, y, given)
        close(criterion.stats["ce"], ce_rows(model, x_adv, y).mean())
        close(criterion.stats["e_lin"], e_lin)
        assert rows == [4 * BATCH]
        assert all(g.isfinite().all() for g in grads_of(loss, model))
    assert len(seen) == 1
    assert seen[0][1] is not x  # a copy, which the attack may write to
    assert torch.equal(seen[0][1], x)
    assert seen[0][2] is y


@pytest.mark.parametrize("of", ["loss", "logits"])
@pytest.mark.parametrize("points", ["elle", "elle-2p"])
def test_argmax(of, points):
    model, (x, y) = bent(), data((40, FEATURES))
    options: dict[str, Any] = {"of": of, "points": points, "generator": rng(4)}
    x_adv = fgsm_by_hand(model, x, y, EPS)
    seed = draw_seed(x.device, rng(4))
    x_a, x_b, start = noise_of(x, EPS, seed)
    x_b = x_adv if points == "elle-2p" else x_b
    h: Any = (lambda p: ce_rows(model, p, y)) if of == "loss" else model

    alpha = start
    for _ in range(10):
        a = alpha.clone().requires_grad_()
        (grad,) = torch.autograd.grad(residual(h, x_a, x_b, a).square().sum(), a)
        alpha = (alpha + 0.1 * grad.sign()).clamp(0, 1)
    criterion = ELLELoss(EPS, lam=3.0, alpha="argmax", **options)
    loss = criterion(model, x, y)
    r2, r2_start = (residual(h, x_a, x_b, a).square().view(40, -1).sum(dim=1) for a in (alpha, start))
    close(criterion.stats["e_lin"], r2.mean())
    close(loss, ce_rows(model, x_adv, y).mean() + 3 * r2.mean())
    assert alpha.min() >= 0
    assert alpha.max() <= 1
    assert (r2 >= r2_start - 1e-12).double().mean().item() > 0.6
    assert r2.mean() > r2_start.mean()
    regulariser = LocalLinearity(EPS, alpha="argmax", of=of, points=points, generator=rng(4))
    close(regulariser(model, x, y, x_adv if points == "elle-2p" else None), r2.mean())


def test_argmax_stays_between_the_ends(monkeypatch):
    """Where the residual is rounding alone, the search walks at random, and has to stop at 0 and 1."""
    given: list[Tensor] = []

    real = pack_op.pack_points

    def spy(*args: Any, alpha: Tensor | None = None, **kwargs: Any) -> Any:
        if alpha is not None:
            given.append(alpha)
        return real(*args, alpha=alpha, **kwargs)

    monkeypatch.setattr(pack_op, "pack_points", spy)
    x, y = data((400, FEATURES))
    LocalLinearity(EPS, alpha="argmax", of="logits")(nn.Linear(FEATURES, CLASSES).double(), x, y)
    (alpha,) = given
    assert (alpha.min().item(), alpha.max().item()) == (0.0, 1.0)


def test_argmax_with_triplets_and_part_of_the_batch():
    model, (x, y) = bent(), data((6, FEATURES))
    counted, rows = call_counter(model)
    criterion = ELLELoss(EPS, lam=3.0, alpha="argmax", triplets=2, triplet_fraction=0.5, generator=rng(4))
    loss = criterion(counted, x, y)
    # The attack; x_a and x_b; ten steps on x_c; and the packed batch.
    assert rows == [6, 6, 6] + 10 * [6] + [6 + 3 * 6]
    uniform = ELLELoss(EPS, lam=3.0, triplets=2, triplet_fraction=0.5, generator=rng(4))
    uniform(model, x, y)
    close(criterion.stats["ce"], uniform.stats["ce"])
    assert criterion.stats["e_lin"] > uniform.stats["e_lin"]
    loss.backward()


def test_argmax_under_autocast_trains_the_weights():
    """The search's forward pass without a graph must not leave graphless casts of the weights behind."""
    model, (x, y) = convnet(norm=False), data((4, 3, 8, 8), dtype=torch.float32)
    for criterion in (LocalLinearity(EPS, alpha="argmax"), ELLELoss(EPS, alpha="argmax", attack="none")):
        model.zero_grad()
        with torch.autocast("cpu", torch.bfloat16):
            loss = criterion(model, x, y)
        loss.backward()
        assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in model.parameters())


# ---- Forward modes, parts of the batch


@pytest.mark.parametrize("points", ["elle", "elle-2p", "five-point"])
def test_packed_and_split_agree_without_batch_norm(points):
    model, (x, y) = bent(), data()
    results = []
    for forward, expected in (("packed", 1), ("split", 2)):
        counted, rows = call_counter(model)
        loss = ELLELoss(EPS, forward=forward, points=points, generator=rng(1))(counted, x, y)
        assert len(rows) == 1 + expected
        assert rows[0] == BATCH
        assert forward == "packed" or rows[1] == BATCH
        results.append([loss.detach(), *grads_of(loss, model)])
    for one, other in zip(*results, strict=True):
        close(one, other, rtol=1e-8, atol=1e-9)


def test_split_keeps_batch_norms_apart():
    x, y = data((4, 3, 8, 8), dtype=torch.float32)
    losses = []
    for forward in ("packed", "split"):
        criterion = ELLELoss(EPS, lam=0.0, forward=forward, generator=rng(1))
        model = convnet()
        criterion(model, x, y)
        losses.append(criterion.stats["ce"])
        assert model[1].num_batches_tracked.item() == (2 if forward == "packed" else 3)  # type: ignore[index]
    model = convnet()
    x_adv = attacks.fgsm(model, x, y, EPS)
    # The batch of x_adv alone: the same forward pass, up to the roundings of the loss's mean.
    torch.testing.assert_close(losses[1], F.cross_entropy(model(x_adv), y), rtol=1e-5, atol=0)
    assert losses[0] != losses[1]


def test_a_batch_of_one():
    model, (x, y) = bent(), data((1, FEATURES))
    for options in ({}, {"triplet_fraction": 0.1}, {"points": "elle-2p"}, {"alpha": "argmax"}, {"norm": "l2"}):
        loss = ELLELoss(EPS, **options)(model, x, y)
        assert loss.isfinite()
        loss.backward()
