"""ELLELoss and LocalLinearity against Algorithm 1 written out plainly, and in the company training loops keep."""

from __future__ import annotations

import copy
import itertools
import math
import pickle
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from elle_fast import AdaptiveLambda, ELLELoss, LocalLinearity, attacks
from elle_fast.functional import draw_seed, pack_points, random_start
from elle_fast.ops.pack_points import op as pack_op
from elle_fast.presets import FAST, NAMES
from elle_fast.testing import call_counter, no_host_sync
from tests.helpers import Recorder, Smooth, convnet, grads_of, labels, probabilities, random, rng, shown

EPS = 0.1
FEATURES, CLASSES, BATCH = 6, 4, 5
F64 = torch.float64

# In float64 a loss below 3 with some hundred roundings is known to 5e-14; a residual r of 1e-4 or more then to 5e-10,
# and E_lin, its square, to 1e-9. The models here are bent so that r is at least that (asserted where it matters).
CLOSE: dict[str, Any] = {"rtol": 1e-9, "atol": 1e-13}


def data(shape: tuple[int, ...] = (BATCH, FEATURES), seed: int = 1, dtype: torch.dtype = F64) -> tuple[Tensor, Tensor]:
    return random(*shape, seed=seed, dtype=dtype), labels(shape[0], CLASSES, seed=seed)


def bent(seed: int = 0, features: int = FEATURES) -> Smooth:
    return Smooth(features, CLASSES, seed=seed, gain=8.0).double()


def close(actual: Any, expected: Any, **tolerance: Any) -> None:
    torch.testing.assert_close(
        torch.as_tensor(actual, dtype=F64), torch.as_tensor(expected, dtype=F64), **{**CLOSE, **tolerance}
    )


def ce_rows(model: Any, x: Tensor, y: Tensor, label_smoothing: float = 0.0) -> Tensor:
    """Cross-entropy per sample, from log-probabilities."""
    logp = model(x).log_softmax(dim=1)
    q = y if y.is_floating_point() else F.one_hot(y, logp.shape[1]).to(logp.dtype)
    q = (1 - label_smoothing) * q + label_smoothing / logp.shape[1]
    losses: Tensor = -(q * logp).sum(dim=1)
    return losses


def per_sample(weight: Tensor, like: Tensor) -> Tensor:
    return weight.view(-1, *[1] * (like.dim() - 1))


def fgsm_by_hand(model: Any, x: Tensor, y: Tensor, eps: float, **kwargs: float) -> Tensor:
    point = x.clone().requires_grad_()
    (grad,) = torch.autograd.grad(ce_rows(model, point, y, **kwargs).sum(), point)
    return x + eps * grad.sign()


def noise_of(x: Tensor, eps: float, seed: Tensor, **options: Any) -> tuple[Tensor, Tensor, Tensor]:
    """x_a, x_b and alpha: the only thing taken from the package (tests/ops/test_pack_points.py checks it)."""
    points, alpha = pack_points(x, None, eps, seed=seed, **options)
    return points[: len(alpha)], points[len(alpha) : 2 * len(alpha)], alpha


def residual(h: Any, x_a: Tensor, x_b: Tensor, alpha: Tensor) -> Tensor:
    a = per_sample(alpha, x_a)
    h_a, h_b, h_c = h(x_a), h(x_b), h((1 - a) * x_a + a * x_b)
    a = per_sample(alpha, h_a)
    out: Tensor = h_c - (1 - a) * h_a - a * h_b
    return out


# ---- Algorithm 1


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
    fraction = o.get("triplet_fraction", 1.0)
    part = math.ceil(fraction * x.shape[0])
    shared = {"norm": o.get("norm", "linf"), "bounds": o.get("bounds"), "alpha": o.get("alpha", "uniform")}
    packed, alpha = pack_points(x, None, EPS, seed=seed, triplets=triplets, fraction=fraction, **shared)
    if o.get("of", "loss") == "loss":

        def h(p: Tensor) -> Tensor:
            return ce_rows(model, p, y[:part], smoothing)
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
    # So much that the attack goes elsewhere than it would without.
    {"label_smoothing": 0.9},
    {"label_smoothing": 0.9, "points": "elle-2p"},
    {"triplet_fraction": 0.5},
    {"triplet_fraction": 0.01, "triplets": 2},
    {"bounds": (0.1, 0.9)},
]


@pytest.mark.parametrize("options", VARIANTS, ids=shown)
@pytest.mark.parametrize("forward", ["packed", "split", "checkpoint"])
@pytest.mark.parametrize("soft", [False, True])
def test_variants(options, forward, soft):
    model, (x, y) = bent(), data()
    y = probabilities(BATCH, CLASSES) if soft else y
    criterion = ELLELoss(EPS, lam=3.0, forward=forward, generator=rng(4), **options)
    loss = criterion(model, x, y)
    x_adv = fgsm_by_hand(model, x, y, EPS, label_smoothing=options.get("label_smoothing", 0.0))
    if "bounds" in options:
        x_adv = x_adv.clamp(*options["bounds"])
    ce, e_lin = restated(model, x, y, x_adv, draw_seed(x.device, rng(4)), **options)
    assert e_lin.item() > 1e-8
    close(criterion.stats["ce"], ce)
    close(criterion.stats["e_lin"], e_lin)
    close(loss, ce + 3 * e_lin)
    for one, other in zip(grads_of(loss, model), grads_of(ce + 3 * e_lin, model), strict=True):
        close(one, other, rtol=1e-8, atol=1e-10)

    alone = {k: v for k, v in options.items() if k not in ("forward",)}
    regulariser = LocalLinearity(EPS, generator=rng(4), **alone)
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
    assert seen[0][1] is x
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


# ---- What the model sees


@pytest.mark.parametrize("attack", ["fgsm", "n-fgsm", "callable"])
@pytest.mark.parametrize("alpha", ["uniform", "argmax"])
def test_mean_and_std_are_a_normalize_layer(attack, alpha):
    mean, std = (0.4, 0.5, 0.6), (0.2, 0.25, 0.3)
    x, y = data((4, 3, 4, 4))
    model = bent(features=48)

    class Normalised(nn.Module):
        def forward(self, pixels: Tensor) -> Any:
            channels = [torch.tensor(v, dtype=F64).view(1, 3, 1, 1) for v in (mean, std)]
            return model((pixels - channels[0]) / channels[1])

    if attack == "callable":
        options: dict[str, Any] = {"attack": lambda m, x, y: attacks.fgsm(m, x, y, EPS, bounds=(0.0, 1.0))}
    else:
        options = {"attack": attack}
    options |= {"bounds": (0.0, 1.0), "alpha": alpha}
    inside = ELLELoss(EPS, lam=3.0, mean=mean, std=std, generator=rng(2), **options)
    outside = ELLELoss(EPS, lam=3.0, generator=rng(2), **options)
    close(inside(model, x, y), outside(Normalised(), x, y))
    close(inside.stats["e_lin"], outside.stats["e_lin"])
    assert inside.stats["e_lin"] > 1e-6


class Wrapped(nn.Module):
    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, x: Tensor) -> dict[str, Any]:
        return {"logits": self.model(x), "hidden": None}


@pytest.mark.parametrize("options", [{}, {"alpha": "argmax"}, {"of": "logits"}, {"forward": "split"}], ids=shown)
def test_logits_hook(options):
    model, (x, y) = bent(), data()
    plain = ELLELoss(EPS, generator=rng(2), **options)(model, x, y)
    hooked = ELLELoss(EPS, generator=rng(2), logits=lambda out: out["logits"], **options)(Wrapped(model), x, y)
    assert torch.equal(plain, hooked)
    alone = LocalLinearity(EPS, generator=rng(2), logits=lambda out: out["logits"], **_alone(options))
    assert torch.equal(
        alone(Wrapped(model), x, y), LocalLinearity(EPS, generator=rng(2), **_alone(options))(model, x, y)
    )


def _alone(options: dict[str, Any]) -> dict[str, Any]:
    return {k: v for k, v in options.items() if k != "forward"}


def cross_entropy(output: Tensor, target: Tensor) -> Tensor:
    return F.cross_entropy(output, target, reduction="none")


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"forward": "split"},
        {"points": "elle-2p"},
        {"points": "five-point"},
        {"triplets": 2, "triplet_fraction": 0.5},
        {"alpha": "argmax"},
        {"adaptive": True},
        {"penalty": "abs"},
    ],
    ids=shown,
)
def test_loss_fn_of_cross_entropy_is_the_same_loss(options):
    model, (x, y) = bent(), data()
    own, builtin = (ELLELoss(EPS, lam=3.0, generator=rng(2), loss_fn=fn, **options) for fn in (cross_entropy, None))
    for step in range(5):
        x, y = data(seed=step)
        loss, expected = own(model, x, y), builtin(model, x, y)
        close(loss, expected)
        for one, other in zip(grads_of(loss, model), grads_of(expected, model), strict=True):
            close(one, other, rtol=1e-8, atol=1e-10)
    assert list(own.stats) == list(builtin.stats)
    alone = {k: v for k, v in _alone(options).items() if k != "adaptive"}
    x_adv = fgsm_by_hand(model, x, y, EPS) if options.get("points") == "elle-2p" else None
    own_part, part = (LocalLinearity(EPS, generator=rng(2), loss_fn=fn, **alone) for fn in (cross_entropy, None))
    close(own_part(model, x, y, x_adv), part(model, x, y, x_adv))


def test_loss_fn_on_tokens():
    """Inputs [B, T, D], one label a token: the loss of a sample is the mean over its tokens."""
    x = random(3, 5, 8, seed=3, dtype=F64)
    y = torch.randint(CLASSES, (3, 5), generator=rng(1))
    model = nn.Sequential(nn.Linear(8, 16), nn.Tanh(), nn.Linear(16, CLASSES)).double()
    with torch.no_grad():
        model[0].weight.mul_(5)  # type: ignore[operator]

    def loss_fn(output: Tensor, target: Tensor) -> Tensor:
        return F.cross_entropy(output.transpose(1, 2), target, reduction="none").mean(dim=1)

    criterion = ELLELoss(EPS, lam=3.0, loss_fn=loss_fn, generator=rng(2))
    loss = criterion(model, x, y)
    x_a, x_b, alpha = noise_of(x, EPS, draw_seed(x.device, rng(2)))
    e_lin = residual(lambda p: loss_fn(model(p), y), x_a, x_b, alpha).square().mean()
    point = x.clone().requires_grad_()
    (grad,) = torch.autograd.grad(loss_fn(model(point), y).sum(), point)
    close(loss, loss_fn(model(x + EPS * grad.sign()), y).mean() + 3 * e_lin, rtol=1e-8)
    close(criterion.stats["e_lin"], e_lin, rtol=1e-7)


def test_a_half_precision_loss_fn_keeps_e_lin():
    """E_lin of 1e-6 and less is below what float16 resolves."""
    x = torch.tensor([[0.5], [0.25]])
    criterion = LocalLinearity(0.1, loss_fn=lambda out, t: out.half(), generator=rng(2))
    e_lin = criterion(lambda p: (p.squeeze(1) * 1.0).square(), x, labels(2, 3))
    assert e_lin.dtype == torch.float32
    assert e_lin.item() > 0


@pytest.mark.parametrize("shape", [(5,), (5, 1), (5, 7), (5, 3, 6), (5, 3, 4, 4), (5, 2, 2, 3, 2)], ids=shown)
@pytest.mark.parametrize("norm", ["linf", "l2"])
@pytest.mark.parametrize("attack", ["fgsm", "zero-grad"])
def test_inputs_of_any_shape(shape, norm, attack):
    x, y = data(shape)
    model = bent(features=x[0].numel())
    criterion = ELLELoss(EPS, lam=3.0, norm=norm, attack=attack, generator=rng(2))
    loss = criterion(lambda p: model(p.reshape(p.shape[0], -1)), x, y)
    seen = ELLELoss(EPS, lam=3.0, norm=norm, attack=attack, generator=rng(2))
    flat = seen(model, x.reshape(5, -1), y)
    close(loss, flat, rtol=1e-8)
    assert criterion.stats["e_lin"] > 0


def test_dtype_of_the_points():
    x, y = data((4, 3, 8, 8), dtype=torch.float32)
    model = convnet(norm=False).double()
    criterion = ELLELoss(EPS, lam=3.0, dtype=torch.float64, generator=rng(2))
    loss = criterion(model, x, y)
    assert loss.dtype == torch.float64
    expected = ELLELoss(EPS, lam=3.0, generator=rng(2))(model, x.double(), y)
    # The points are rounded to float32 in the one, which moves a residual of 1e-2 by some 1e-6.
    torch.testing.assert_close(loss, expected, rtol=1e-4, atol=0)
    half = convnet(norm=False).to(torch.bfloat16)
    for options in ({}, {"attack": "rs-fgsm"}, {"alpha": "argmax"}, {"mean": [0.5] * 3, "std": [0.2] * 3}):
        loss = ELLELoss(EPS, dtype=torch.bfloat16, **options)(half, x, y)
        assert loss.dtype == torch.float32
        loss.backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in half.parameters())


def test_channels_last():
    x, y = data((4, 3, 8, 8), dtype=torch.float32)
    model = convnet(norm=False).eval()
    formats: list[bool] = []

    def watched(p: Tensor) -> Any:
        formats.append(p.is_contiguous(memory_format=torch.channels_last))
        return model(p)

    expected = ELLELoss(EPS, generator=rng(2))(watched, x, y)
    assert formats == [False, False]
    formats.clear()
    kept = ELLELoss(EPS, generator=rng(2))(watched, x.contiguous(memory_format=torch.channels_last), y)
    assert formats == [True, True]
    asked = ELLELoss(EPS, generator=rng(2), memory_format=torch.channels_last)(watched, x, y)
    assert formats[-1]
    # The same points; a convolution's other order of summation moves losses of 1 by some 1e-6, lam 4000 magnifies.
    for other in (kept, asked):
        torch.testing.assert_close(other, expected, rtol=0, atol=1e-2)


COPIES = {"_to_copy", "copy_", "clone", "cat", "contiguous", "stack", "index"}


@pytest.mark.parametrize("attack", ["fgsm", "n-fgsm"])
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"dtype": torch.bfloat16},
        {"dtype": torch.bfloat16, "memory_format": torch.channels_last, "mean": [0.5] * 3, "std": [0.2] * 3},
    ],
    ids=str,
)
def test_a_step_converts_nothing_that_the_kernels_have_not(options, attack):
    """No copy and no cast of anything as large as the batch, outside the model and by the whole step."""
    batch, size = 4, 16
    x, y = data((batch, 3, size, size), dtype=torch.float32)
    model = nn.Sequential(nn.Conv2d(3, 8, 3, bias=False), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten())
    model = model.to(options.get("dtype", torch.float32))
    model = model.to(memory_format=options.get("memory_format", torch.contiguous_format))  # type: ignore[call-overload]
    if "memory_format" not in options:
        x = x.contiguous(memory_format=torch.channels_last)
    criterion = ELLELoss(EPS, adaptive=True, attack=attack, **options)
    criterion(model, x, y).backward()  # what is made once, as statistics on the device
    seen: list[Tensor] = []
    hook = model.register_forward_pre_hook(lambda module, args: seen.append(args[0]))
    with Recorder() as recorder:
        criterion(model, x, y).backward()
    hook.remove()
    large = [name for name, _, result in recorder.calls if isinstance(result, Tensor) and result.numel() >= x.numel()]
    assert "convolution" in large
    assert not COPIES & set(large), large
    wanted = options.get("dtype", torch.float32)
    assert all(p.dtype == wanted and p.is_contiguous(memory_format=torch.channels_last) for p in seen)


# ---- In a training loop


ATTACKS = ["fgsm", "rs-fgsm", "n-fgsm", "zero-grad", "none"]
STEPS: list[dict[str, Any]] = [
    *({"attack": attack, "adaptive": adaptive} for attack, adaptive in itertools.product(ATTACKS, (False, True))),
    {"adaptive": True, "lagged": True},
    {"lam": AdaptiveLambda(4000.0, window=4)},
    {"points": "elle-2p", "penalty": "abs"},
    {"points": "five-point"},
    {"alpha": "argmax"},
    {"norm": "l2"},
    {"of": "logits", "forward": "split", "triplets": 2, "triplet_fraction": 0.3},
    {"bounds": (0.0, 1.0), "mean": [0.5] * 3, "std": [0.2] * 3},
    {"loss_fn": cross_entropy, "adaptive": True},
    {"label_smoothing": 0.1},
]


@pytest.mark.parametrize("options", STEPS, ids=shown)
def test_no_step_waits_for_the_device(options):
    model, criterion = convnet(), ELLELoss(EPS, **options)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    x, y = data((4, 3, 8, 8), dtype=torch.float32)
    if "mean" in options:
        criterion(model, x, y)  # the constants are copied once
    with no_host_sync():
        for _ in range(2):
            loss = criterion(model, x, y)
            loss.backward()
            optimizer.step()
            dict(criterion.stats)


@pytest.mark.parametrize("options", STEPS, ids=shown)
def test_stats(options):
    model, (x, y) = convnet(), data((4, 3, 8, 8), dtype=torch.float32)
    criterion = ELLELoss(EPS, **options)
    if criterion.controller is not None:
        criterion.controller.lam.fill_(7.0)  # decays from step to step
    assert criterion.stats == {}
    loss = criterion(model, x, y)
    keys = ["loss", "ce", "e_lin", "lam"] + (["skipped"] if criterion.adaptive else [])
    stats = criterion.stats
    assert list(stats) == keys
    assert all(v.dim() == 0 and not v.requires_grad and v.device == x.device for v in stats.values())
    assert stats["loss"].item() == loss.item()
    before = {name: value.item() for name, value in stats.items()}
    criterion(model, x + 0.1, y)
    assert {name: value.item() for name, value in stats.items()} == before


@pytest.mark.parametrize("attack", ATTACKS)
def test_the_attack_touches_no_gradient(attack):
    model, (x, y) = convnet(), data((4, 3, 8, 8), dtype=torch.float32)
    ELLELoss(EPS, attack=attack)(model, x, y)
    assert all(p.grad is None for p in model.parameters())
    assert not x.requires_grad


def test_gradient_accumulation():
    model, other = bent(), bent()
    together, apart = (ELLELoss(EPS, AdaptiveLambda(50.0, min_history=1), generator=rng(2)) for _ in range(2))
    batches = [data(seed=s) for s in (1, 2, 3, 4)]
    sum(together(model, x, y) for x, y in batches).backward()
    for x, y in batches:
        apart(other, x, y).backward()
    assert apart.controller is not None
    assert apart.controller.lam > 0
    for one, two in zip(model.parameters(), other.parameters(), strict=True):
        assert one.grad is not None
        close(one.grad, two.grad, rtol=1e-9, atol=1e-11)


def test_two_criteria_do_not_disturb_each_other():
    model, (x, y) = bent(), data()
    alone = ELLELoss(EPS, AdaptiveLambda(3.0, min_history=1), generator=rng(2))
    expected = [alone(model, *data(seed=s)).item() for s in range(6)]
    first = ELLELoss(EPS, AdaptiveLambda(3.0, min_history=1), generator=rng(2))
    second = ELLELoss(2 * EPS, AdaptiveLambda(9.0, min_history=1), generator=rng(7))
    found = []
    for s in range(6):
        second(model, x, y)
        found.append(first(model, *data(seed=s)).item())
        second(model, 2 * x, y)
    assert found == expected


def test_seeds():
    model, (x, y) = bent(), data()
    criterion = ELLELoss(EPS)
    results = []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        results.append([criterion(model, x, y).item(), criterion(model, x, y).item()])
    assert results[0] == results[1]
    assert results[0] != results[2]
    assert results[0][0] != results[0][1]
    before = torch.get_rng_state()
    owned = [ELLELoss(EPS, generator=rng(seed))(model, x, y).item() for seed in (1, 1, 2)]
    assert torch.equal(torch.get_rng_state(), before)
    assert owned[0] == owned[1] != owned[2]
    # A saved state of torch's generator continues the noise.
    state = torch.get_rng_state()
    again = criterion(model, x, y).item()
    torch.set_rng_state(state)
    assert criterion(model, x, y).item() == again


def test_a_resume_is_exact():
    model = bent()
    criterion = ELLELoss(EPS, AdaptiveLambda(3.0, min_history=1), generator=rng(2))
    for s in range(5):
        criterion(model, *data(seed=s))
    source = rng(0)
    assert criterion.linearity.generator is not None
    source.set_state(criterion.linearity.generator.get_state())
    resumed = ELLELoss(EPS, AdaptiveLambda(3.0, min_history=1), generator=source)
    resumed.load_state_dict(copy.deepcopy(criterion.state_dict()))
    for s in range(5, 12):
        assert torch.equal(resumed(model, *data(seed=s)), criterion(model, *data(seed=s)))
        assert torch.equal(resumed.stats["lam"], criterion.stats["lam"])
    assert criterion.stats["lam"] > 0
    assert ELLELoss(EPS).state_dict() == {}


@pytest.mark.parametrize("adaptive", [False, True])
@pytest.mark.parametrize("stepped", [False, True])
def test_copies(adaptive, stepped):
    model, (x, y) = bent(), data()
    criterion = ELLELoss(EPS, adaptive=adaptive, mean=[0.5] * FEATURES, std=[2.0] * FEATURES)
    if stepped:
        criterion(model, x, y)
    for twin in (copy.deepcopy(criterion), pickle.loads(pickle.dumps(criterion))):
        results = []
        for one in (copy.deepcopy(criterion), twin):
            torch.manual_seed(5)
            results.append(one(model, x, y).item())
        assert results[0] == results[1]
        assert repr(twin) == repr(criterion)
    regulariser = pickle.loads(pickle.dumps(LocalLinearity(EPS)))
    assert regulariser(model, x, y) >= 0


def test_model_in_train_mode_with_batch_norm_and_dropout():
    model, (x, y) = convnet(dropout=True), data((4, 3, 8, 8), dtype=torch.float32)
    running = model[1].running_mean.clone()  # type: ignore[index]
    ELLELoss(EPS)(model, x, y).backward()
    assert model.training
    assert not torch.equal(running, model[1].running_mean)  # type: ignore[index]
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())


def test_model_in_eval_mode_is_left_alone():
    model, (x, y) = convnet(dropout=True).eval(), data((4, 3, 8, 8), dtype=torch.float32)
    before = {name: t.clone() for name, t in model.state_dict().items()}
    losses = [ELLELoss(EPS, generator=rng(1))(model, x, y) for _ in range(2)]
    assert not model.training
    assert torch.equal(*losses)
    assert all(torch.equal(t, before[name]) for name, t in model.state_dict().items())


@pytest.mark.parametrize("adaptive", [False, True])
def test_autocast(adaptive):
    model, (x, y) = convnet(), data((8, 3, 8, 8), dtype=torch.float32)
    criterion = ELLELoss(EPS, adaptive=adaptive)
    with torch.autocast("cpu", torch.bfloat16):
        loss = criterion(model, x, y)
    assert loss.dtype == torch.float32
    loss.backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())
    # As good as bfloat16 logits allow: 10 layers' worth of roundings of 2^-9 on logits below 3.
    plain = ELLELoss(EPS, lam=0.0, generator=rng(1))
    cast = ELLELoss(EPS, lam=0.0, generator=rng(1))
    plain(model, x, y)
    with torch.autocast("cpu", torch.bfloat16):
        cast(model, x, y)
    assert abs(plain.stats["ce"].item() - cast.stats["ce"].item()) < 10 * 3 * 2.0**-9


@pytest.mark.parametrize("window", [None, 6])
@pytest.mark.parametrize("options", [{}, {"lagged": True}, {"loss_fn": cross_entropy}], ids=shown)
def test_a_nan_of_the_model_leaves_the_history_clean(options, window):
    model: Any = bent()
    criterion = ELLELoss(EPS, AdaptiveLambda(5.0, min_history=1, window=window), **options)
    controller = criterion.controller
    assert isinstance(controller, AdaptiveLambda)
    for s in range(4):
        criterion(model, *data(seed=s))
    before = {name: t.clone() for name, t in controller.state_dict().items()}
    loss = criterion(lambda p: model(p) * math.nan, *data(seed=4))
    assert loss.isnan()
    assert criterion.stats["skipped"].item() == 1
    assert all(torch.equal(t, before[n]) for n, t in controller.state_dict().items() if n != "skipped")
    loss = criterion(model, *data(seed=5))
    assert loss.isfinite()
    assert controller.count.item() == 5
    assert criterion.stats["skipped"].item() == 1


def test_local_linearity_equals_stats_of_the_whole_loss():
    model, (x, y) = bent(), data()
    choices: list[dict[str, Any]] = [{}, {"triplets": 3}, {"alpha": "half"}, {"norm": "l2"}, {"of": "logits"}]
    for options in [*choices, {"bounds": (0.2, 0.8)}]:
        criterion = ELLELoss(EPS, generator=rng(6), **options)
        alone = LocalLinearity(EPS, generator=rng(6), **options)
        criterion(model, x, y)
        counted, rows = call_counter(model)
        e_lin = alone(counted, x, y)
        close(e_lin, criterion.stats["e_lin"], rtol=1e-8)
        assert rows == [3 * BATCH * options.get("triplets", 1)]
        assert all(g.abs().sum() > 0 for g in grads_of(e_lin, model)[:2])


def test_a_linear_model_needs_no_regulariser():
    model, (x, y) = nn.Linear(FEATURES, CLASSES).double(), data()
    # Logits below 2, some 20 roundings each, three of them with weights below 1; four classes.
    assert LocalLinearity(EPS, of="logits")(model, x, y).item() < 4 * (20 * 2 * 3 * 2.0**-53) ** 2


def test_eps_zero_is_plain_training():
    model, (x, y) = bent(), data()
    criterion = ELLELoss(0.0, lam=100.0)
    close(criterion(model, x, y), F.cross_entropy(model(x), y))
    # Equal points in one matrix product may differ by their roundings; and (1 - alpha) x + alpha x by one.
    assert criterion.stats["e_lin"].item() < 1e-24


def test_the_random_start_of_the_attack_is_drawn_once():
    """The gradient is taken where the step begins."""
    model, (x, y) = bent(), data()
    seen: list[Tensor] = []

    def watched(p: Tensor) -> Any:
        seen.append(p.detach().clone())
        return model(p)

    ELLELoss(EPS, attack="n-fgsm", step_size=0.0, generator=rng(3))(watched, x, y)
    assert torch.equal(seen[0], seen[1][:BATCH])
    assert torch.equal(seen[0], random_start(x, EPS, seed=draw_seed(x.device, rng(3)), start=2.0))


def test_training_lowers_what_it_is_asked_to_lower():
    """Forty steps on a clean batch fit it; with the regulariser they leave E_lin far lower."""
    found = {}
    for lam in (0.0, 1000.0):
        model, (x, y) = bent(), data((16, FEATURES))
        criterion = ELLELoss(3 * EPS, lam=lam, attack="none", generator=rng(1))
        optimizer = torch.optim.Adam(model.parameters(), lr=0.02)
        steps = []
        for _ in range(40):
            optimizer.zero_grad()
            criterion(model, x, y).backward()
            optimizer.step()
            steps.append({name: value.item() for name, value in criterion.stats.items()})
        found[lam] = steps
    assert found[0.0][-1]["ce"] < found[0.0][0]["ce"]
    assert found[1000.0][-1]["e_lin"] < found[0.0][-1]["e_lin"] / 10


# ---- Presets

EIGHT = 8 / 255
PRESET_LAMS = [
    # name, eps, options, lam (PAPER, section 4)
    ("cifar10", EIGHT, {}, 5_000),
    ("cifar10", EIGHT, {"adaptive": True}, 4_000),
    ("cifar10", EIGHT, {"adaptive": True, "attack": "n-fgsm"}, 4_000),
    ("cifar10-long", EIGHT, {}, 10_000),
    ("cifar10-long", EIGHT, {"adaptive": True}, 10_000),
    ("cifar100", EIGHT, {}, 5_000),
    ("cifar100", EIGHT, {"adaptive": True}, 4_000),
    ("cifar100", EIGHT, {"adaptive": True, "attack": "n-fgsm"}, 4_000),
    ("svhn", EIGHT, {}, 20_000),
    ("svhn", EIGHT, {"adaptive": True}, 20_000),
    ("svhn", EIGHT, {"adaptive": True, "attack": "n-fgsm"}, 5_000),
    ("svhn-long", EIGHT, {}, 20_000),
    ("svhn-long", EIGHT, {"adaptive": True}, 20_000),
    ("imagenet", 2 / 255, {"adaptive": True}, 10_000),
    ("imagenet", 2 / 255, {"adaptive": True, "attack": "n-fgsm"}, 20_000),
    ("imagenet", 16 / 255, {"adaptive": True, "attack": "n-fgsm"}, 100_000),
    ("imagenet", 16 / 255, {"adaptive": True}, 10_000),
    ("fast", EIGHT, {"adaptive": True}, 4_000),
    ("fast", EIGHT, {"adaptive": True, "attack": "n-fgsm"}, 4_000),
]


@pytest.mark.parametrize("name, eps, options, lam", PRESET_LAMS)
def test_presets(name, eps, options, lam):
    criterion = ELLELoss.preset(name, eps, **options)
    assert criterion.lam == lam
    assert criterion.packing.eps == eps
    assert criterion.adaptive == options.get("adaptive", False)
    assert criterion.attack == options.get("attack", "fgsm")
    assert criterion.controller is None or criterion.controller.lam_max == lam


def test_every_preset_is_tested():
    assert {name for name, *_ in PRESET_LAMS} == set(NAMES)


def test_the_fast_preset_is_elle_a_with_its_levers():
    criterion = ELLELoss.preset("fast", EIGHT)
    assert (criterion.lam, criterion.adaptive, criterion.skip_below) == (4_000, True, 0.01)
    assert criterion.packing.fraction == 0.125
    assert ELLELoss.preset("fast", EIGHT, lam=7.0, triplet_fraction=0.5).packing.fraction == 0.5
    assert ELLELoss.preset("fast", EIGHT, lam=7.0).skip_below == 0.01
    svhn = ELLELoss.preset("svhn", EIGHT, adaptive=True, **FAST)
    assert (svhn.lam, svhn.skip_below) == (20_000, 0.01)
    with pytest.raises(ValueError, match=r"^name: preset 'fast' has no ELLE with a constant lam, as its options are"):
        ELLELoss.preset("fast", EIGHT, adaptive=False)


def test_presets_take_overrides():
    criterion = ELLELoss.preset("cifar10", EIGHT, lam=AdaptiveLambda(7.0, gamma=0.5), bounds=(0.0, 1.0))
    assert criterion.lam == 7.0
    assert criterion.controller is not None
    assert (criterion.controller.gamma, criterion.controller.lam_max) == (0.5, 7.0)
    assert ELLELoss.preset("imagenet", EIGHT, lam=9.0).lam == 9.0


def test_eval_mode_leaves_lam_and_history_alone():
    for lagged in (False, True):
        criterion = ELLELoss(0.1, adaptive=True, lagged=lagged)
        model, x, y = nn.Linear(6, 5), torch.rand(4, 6), torch.tensor([0, 1, 2, 3])
        criterion(model, x, y)
        before = {name: value.clone() for name, value in criterion.state_dict().items()}
        criterion.eval()
        criterion(model, x, y)
        assert all(torch.equal(value, before[name]) for name, value in criterion.state_dict().items())


@pytest.mark.parametrize("protocol", [2, 5])
def test_a_criterion_can_be_pickled_and_copied_with_every_protocol(protocol):
    criterion = ELLELoss(0.1, adaptive=True, memory_format=torch.channels_last, mean=(0.5,), std=(0.5,))
    model, x, y = nn.Sequential(nn.Flatten(), nn.Linear(16, 5)), torch.rand(4, 1, 4, 4), torch.tensor([0, 1, 2, 3])
    criterion(model, x, y)
    for again in (lambda: pickle.loads(pickle.dumps(criterion, protocol)), lambda: copy.deepcopy(criterion)):
        other = again()
        torch.manual_seed(0)
        expected = criterion(model, x, y)
        torch.manual_seed(0)
        assert torch.equal(other(model, x, y), expected)
        assert all(torch.equal(v, other.state_dict()[k]) for k, v in criterion.state_dict().items())
