"""The attacks: balls and bounds, steps by hand, the input gradient and no other, restarts, seeds."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from elle_fast import attacks
from elle_fast.functional import draw_seed, random_start
from elle_fast.testing import call_counter, no_host_sync
from tests.helpers import Recorder, Smooth, convnet, labels, probabilities, random, rng, unit_roundoff

EPS = 0.03
SINGLE: dict[str, Callable[..., Tensor]] = {
    "fgsm": attacks.fgsm,
    "rs-fgsm": attacks.rs_fgsm,
    "rs-fgsm-unprojected": attacks.rs_fgsm_unprojected,
    "n-fgsm": attacks.n_fgsm,
    "zero-grad": attacks.zero_grad,
}
ALL = {**SINGLE, "pgd": attacks.pgd}
RADIUS = {"fgsm": 1, "rs-fgsm": 1, "rs-fgsm-unprojected": 2.25, "n-fgsm": 3, "zero-grad": 1, "pgd": 1}
names = pytest.mark.parametrize("name", ALL)


def batch(dtype: torch.dtype = torch.float32, seed: int = 1) -> tuple[Tensor, Tensor]:
    return random(6, 3, 8, 8, seed=seed, dtype=dtype), labels(6, 4)


def run(name: str, model: Any, x: Tensor, y: Any, eps: float = EPS, **options: Any) -> Tensor:
    if name != "fgsm":
        options.setdefault("generator", rng(5))
    return ALL[name](model, x, y, eps, **options)


# ---- Balls and bounds


@names
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
def test_stays_in_its_ball(name, dtype):
    x, y = batch(dtype)
    x_adv = run(name, convnet().to(dtype), x, y, bounds=None)
    assert (x_adv.shape, x_adv.dtype, x_adv.requires_grad) == (x.shape, dtype, False)
    # Up to three roundings (start, step, projection) of values below 1.1, in the working dtype or in x's.
    slack = 3 * 1.1 * unit_roundoff(dtype)
    distance = (x_adv.double() - x.double()).abs().max().item()
    assert distance <= RADIUS[name] * EPS + slack
    # And uses it: N-FGSM comes near its 3 eps, the others to eps.
    assert distance > 0.9 * RADIUS[name] * EPS - slack


@names
def test_stays_in_the_bounds(name):
    x, y = batch()
    x_adv = run(name, convnet(), x, y, eps=0.5, bounds=(0.0, 1.0))
    assert (x_adv.min().item(), x_adv.max().item()) == (0.0, 1.0)


@names
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
@pytest.mark.parametrize("bounds", [None, (0.0, 1.0)])
def test_stays_in_its_l2_ball(name, dtype, bounds):
    x, y = batch(dtype)
    x_adv = run(name, convnet().to(dtype), x, y, eps=0.5, bounds=bounds, norm="l2")
    lengths = (x_adv.double() - x.double()).flatten(1).norm(dim=1)
    # Four roundings of each of the 192 pixels.
    slack = 4 * math.sqrt(192) * unit_roundoff(dtype)
    assert lengths.max().item() <= RADIUS[name] * 0.5 + slack
    # A uniform start in 192 dimensions is near the sphere, and N-FGSM's step at a right angle to it.
    least = {"n-fgsm": 2.0}.get(name, 0.98) * 0.5
    assert lengths.min().item() > (least if bounds is None else 0.7 * least)
    assert bounds is None or (x_adv.min().item() >= 0 and x_adv.max().item() <= 1)
    assert (x_adv.double() - x.double()).abs().max().item() > 0.1  # some pixels by more than the mean, 0.036


@pytest.mark.parametrize("name", ["fgsm", "pgd"])
def test_in_l2_a_linear_loss_is_climbed_straight(name):
    """To x + eps w / ||w||. On the sphere each step of eps / 4 leaves 4/5 of what is across, and 0.8^60 is 2e-6."""
    w = random(5, seed=3, dtype=torch.float64) - 0.5
    x = 10 * random(4, 5, seed=1, dtype=torch.float64)

    def losses(output: Tensor, target: Tensor) -> Tensor:
        return output[:, 0]

    options: dict[str, Any] = {"steps": 70} if name == "pgd" else {}
    options |= {"norm": "l2", "bounds": None, "loss_fn": losses}
    x_adv = run(name, lambda p: (p @ w)[:, None], x, None, eps=0.3, **options)
    best = x + 0.3 * w / w.norm()
    if name == "fgsm":
        torch.testing.assert_close(x_adv, best)
        return
    assert ((x_adv - best).norm(dim=1) < 1e-5).all()
    assert ((x_adv - x).norm(dim=1) <= 0.3 * (1 + 1e-12)).all()


def test_pgd_is_bounded_unless_told_otherwise():
    x, y = batch()
    assert run("pgd", convnet(), x, y, eps=0.5).max().item() == 1.0
    assert run("pgd", convnet(), x, y, eps=0.5, bounds=None).max().item() > 1.0


@names
def test_eps_zero_changes_nothing(name):
    x, y = batch()
    assert torch.equal(run(name, convnet(), x, y, eps=0.0, bounds=None), x)


# ---- Steps by hand


def gradient(model: Any, x: Tensor, y: Tensor) -> Tensor:
    point = x.clone().requires_grad_()
    F.cross_entropy(model(point), y, reduction="sum").backward()
    assert point.grad is not None
    return point.grad


@pytest.mark.parametrize("soft", [False, True])
def test_fgsm_by_hand(soft):
    x, y = random(5, 7, seed=2, dtype=torch.float64).clamp(0.2, 0.8), labels(5, 3)
    y = probabilities(5, 3) if soft else y
    model = Smooth(7, 3).double()
    expected = x + EPS * gradient(model, x, y).sign()
    assert torch.equal(attacks.fgsm(model, x, y, EPS), expected)
    assert torch.equal(attacks.fgsm(model, x, y, EPS, bounds=(0.2, 0.8)), expected.clamp(0.2, 0.8))


@pytest.mark.parametrize(
    "name, start, step, project",
    [
        ("rs-fgsm", 1, 1.25, True),
        ("rs-fgsm-unprojected", 1, 1.25, False),
        ("n-fgsm", 2, 1.0, False),
        ("zero-grad", 1, 2.0, True),
    ],
)
@pytest.mark.parametrize("own_step", [None, 0.01])
def test_random_starts_by_hand(name, start, step, project, own_step):
    x, y = random(5, 20, seed=2, dtype=torch.float64).clamp(0.1, 0.9), labels(5, 3)
    model = Smooth(20, 3).double()
    begin = random_start(x, EPS, seed=draw_seed(x.device, rng(5)), start=start, bounds=(0.1, 0.9))
    grad = gradient(model, begin, y)
    if name == "zero-grad":
        # 0.35 * 20 = 7 entries of each sample count as zero: the seven smallest.
        order = grad.abs().argsort(dim=1)
        grad = grad.scatter(1, order[:, :7], 0.0)
    point = begin + (step * EPS if own_step is None else own_step) * grad.sign()
    if project:
        point = torch.maximum(torch.minimum(point, x + EPS), x - EPS)
    x_adv = run(name, model, x, y, step_size=own_step, bounds=(0.1, 0.9))
    # Two ways to project differ by two roundings of values below 1.
    assert (x_adv - point.clamp(0.1, 0.9)).abs().max().item() <= 2 * unit_roundoff(torch.float64)


def test_pgd_by_hand():
    x, y = random(5, 7, seed=3, dtype=torch.float64), labels(5, 3)
    model = Smooth(7, 3).double()
    point = random_start(x, EPS, seed=draw_seed(x.device, rng(5)), bounds=(0.0, 1.0))
    for _ in range(4):
        point = point + 0.01 * gradient(model, point, y).sign()
        point = torch.maximum(torch.minimum(point, x + EPS), x - EPS).clamp(0, 1)
    assert torch.equal(run("pgd", model, x, y, steps=4, step_size=0.01), point)
    quarter = run("pgd", model, x, y, steps=4, step_size=EPS / 4)
    assert torch.equal(run("pgd", model, x, y, steps=4), quarter)


@pytest.mark.parametrize("shape", [(5,), (5, 1), (5, 3, 2, 2, 2)], ids=str)
@names
def test_inputs_of_any_shape(name, shape):
    x, y = random(*shape, seed=4), labels(5, 3)
    features = x[0].numel()
    model = Smooth(features, 3)
    x_adv = run(name, lambda p: model(p.reshape(5, features)), x, y)
    assert x_adv.shape == x.shape
    assert (x_adv != x).any()


def test_a_user_s_loss():
    x, y = random(4, 3, 6, seed=4), random(4, 3, seed=5)
    model = torch.nn.Linear(6, 1)
    for name in ALL:
        x_adv = run(name, model, x, y, loss_fn=lambda out, t: (out.squeeze(-1) - t).square().sum(dim=1))
        before = (model(x).squeeze(-1) - y).square().sum()
        assert (model(x_adv).squeeze(-1) - y).square().sum() > before


def test_a_half_precision_loss_does_not_overflow():
    """The sum over the batch is taken in float32: 16 losses of 10,000 are more than float16 can hold."""
    x = random(16, 4, seed=5, dtype=torch.float16)
    losses = attacks.sample_losses(x, None, lambda out, _: 1e4 * out.sum(dim=1), 16)
    assert losses.dtype == torch.float32
    grad = attacks.input_gradient(lambda p: p, x, None, lambda out, _: 1e4 * out.sum(dim=1))  # type: ignore[arg-type]
    assert torch.equal(grad, torch.full_like(x, 1e4))


# ---- ZeroGrad's filter


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("quantile, kept", [(0.0, 10), (0.05, 9), (0.35, 6), (0.5, 5), (0.99, 1), (1.0, 1)])
def test_zero_below_quantile(dtype, quantile, kept):
    grad = torch.tensor([[1, -2, 3, -4, 5, -6, 7, -8, 9, -10], [-10, 20, 3, 14, 5, -6, 7, -8, 9, 1]], dtype=dtype)
    result = attacks.zero_below_quantile(grad, quantile)
    for row, out in zip(grad.tolist(), result.tolist(), strict=True):
        threshold = sorted(map(abs, row))[10 - kept]
        assert out == [value if abs(value) >= threshold else 0 for value in row]


@pytest.mark.parametrize("shape", [(4,), (4, 1), (2, 3, 4, 5)], ids=str)
def test_zero_below_quantile_of_any_shape(shape):
    grad = random(*shape, seed=6) + 0.1
    result = attacks.zero_below_quantile(grad, 0.5)
    assert result.shape == grad.shape
    assert (result == 0).sum().item() == shape[0] * (grad[0].numel() // 2)


@pytest.mark.parametrize("size", [2, 20, 21, 64, 784, 3072, 12_288, 150_528])
def test_zero_below_quantile_is_torchs(size):
    grad = random(2, size, seed=7, dtype=torch.float64)
    threshold = grad.abs().quantile(0.35, dim=1, keepdim=True)
    assert torch.equal(attacks.zero_below_quantile(grad, 0.35), grad * (grad.abs() >= threshold))


def test_zero_below_quantile_keeps_ties_and_zeros():
    grad = torch.tensor([[2.0, -2.0, 2.0, 0.0]])
    assert torch.equal(attacks.zero_below_quantile(grad, 0.5), grad)
    assert torch.equal(attacks.zero_below_quantile(torch.zeros(2, 3), 0.35), torch.zeros(2, 3))


# ---- The input gradient and no other


@names
def test_parameters_get_no_gradient(name):
    x, y = batch()
    model = convnet()
    run(name, model, x, y)
    assert all(p.grad is None for p in model.parameters())
    for p in model.parameters():
        p.grad = torch.randn(p.shape, generator=rng(1))
    before = [p.grad.clone() for p in model.parameters() if p.grad is not None]
    run(name, model, x, y)
    after = [p.grad for p in model.parameters() if p.grad is not None]
    assert all(torch.equal(one, other) for one, other in zip(before, after, strict=True))
    assert all(p.requires_grad for p in model.parameters())
    assert x.grad is None
    assert not x.requires_grad


@names
def test_no_weight_gradient_is_computed(name):
    x, y = batch()
    model = convnet()
    weights = {tuple(p.shape) for p in model.parameters()} | {tuple(p.shape)[::-1] for p in model.parameters()}
    with Recorder() as recorder:
        run(name, model, x, y)
    backwards = [args for op, args, _ in recorder.calls if op == "convolution_backward"]
    assert backwards
    assert all(args[-1] == [True, False, False] for args in backwards)
    norms = [args for op, args, _ in recorder.calls if op == "native_batch_norm_backward"]
    assert norms
    assert all(args[-1] == [True, False, False] for args in norms)
    products = [tuple(result.shape) for op, _, result in recorder.calls if op == "mm"]
    assert products
    assert not weights & set(products)


def test_the_recorder_sees_weight_gradients():
    """So that the test above can fail."""
    x, y = batch()
    model = convnet()
    with Recorder() as recorder:
        F.cross_entropy(model(x), y).backward()
    masks = [args[-1] for op, args, _ in recorder.calls if op == "convolution_backward"]
    assert any(mask[1] for mask in masks)
    assert tuple(model[-1].weight.shape) in {  # type: ignore[index]
        tuple(result.shape) for op, _, result in recorder.calls if op == "mm"
    }


@names
def test_works_where_gradients_are_off(name):
    x, y = batch()
    model = convnet(norm=False)
    with torch.no_grad():
        off = run(name, model, x, y)
        assert not torch.is_grad_enabled()
    assert torch.equal(off, run(name, model, x, y))


@names
def test_a_frozen_model_can_be_attacked(name):
    x, y = batch()
    model = convnet(norm=False)
    expected = run(name, model, x, y)
    assert torch.equal(run(name, model.requires_grad_(False), x, y), expected)


@names
def test_the_model_keeps_its_mode(name):
    x, y = batch()
    for training in (True, False):
        model = convnet().train(training)
        before = model[1].running_mean.clone()  # type: ignore[index]
        run(name, model, x, y)
        assert model.training == training
        assert torch.equal(before, model[1].running_mean) != training  # type: ignore[index]


@names
def test_nothing_waits_for_the_device(name):
    x, y = batch()
    model = convnet()
    with no_host_sync():
        run(name, model, x, y)


@pytest.mark.parametrize("name", SINGLE)
def test_one_forward_pass(name):
    x, y = batch()
    model, rows = call_counter(convnet())
    run(name, model, x, y)
    assert rows == [6]


@pytest.mark.parametrize("restarts, expected", [(1, 10), (3, 33)])
def test_forward_passes_of_pgd(restarts, expected):
    x, y = batch()
    model, rows = call_counter(convnet())
    run("pgd", model, x, y, restarts=restarts)
    assert rows == [6] * expected


# ---- Strength


def losses(model: Any, x: Tensor, y: Tensor) -> Tensor:
    with torch.no_grad():
        return F.cross_entropy(model(x), y, reduction="none")


@names
def test_raises_the_loss(name):
    x, y = random(32, 10, seed=7), labels(32, 4)
    model = Smooth(10, 4)
    before, after = losses(model, x, y), losses(model, run(name, model, x, y, eps=0.1, bounds=None), y)
    assert after.mean() > before.mean()
    if name in ("fgsm", "pgd"):
        assert (after > before).float().mean() > 0.95


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
def test_restarts_keep_the_best_of_the_single_runs(dtype):
    x, y = random(32, 10, seed=8, dtype=dtype), labels(32, 4)
    model = Smooth(10, 4, gain=6.0).to(dtype)  # bent enough that the starts end in different places
    source = rng(9)
    single = [attacks.pgd(model, x, y, 0.5, steps=2, step_size=0.05, generator=source) for _ in range(4)]
    best = attacks.pgd(model, x, y, 0.5, steps=2, step_size=0.05, restarts=4, generator=rng(9))
    # In float32 at least, as the attack compares them.
    found = torch.stack([losses(lambda p: model(p).float(), s, y) for s in single])
    assert torch.equal(losses(lambda p: model(p).float(), best, y), found.max(dim=0).values)
    assert len(set(found.argmax(dim=0).tolist())) > 1


def test_a_nan_loss_is_a_success():
    x, y = random(4, 3, seed=9), labels(4, 3)
    linear = torch.nn.Linear(3, 3)
    calls = [0]

    def model(p: Tensor) -> Tensor:
        calls[0] += 1
        out: Tensor = linear(p)
        # The second restart's scoring pass (3 calls each) gives NaN for sample 1.
        return out.index_fill(0, torch.tensor([1]), math.nan) if calls[0] == 6 else out

    single = attacks.pgd(linear, x, y, 0.1, steps=2, restarts=1, generator=rng(3))
    source = rng(3)
    starts = [attacks.pgd(linear, x, y, 0.1, steps=2, generator=source) for _ in range(3)]
    best = attacks.pgd(model, x, y, 0.1, steps=2, restarts=3, generator=rng(3))
    assert torch.equal(starts[0], single)
    assert torch.equal(best[1], starts[1][1])
    assert best.isfinite().all()


# ---- Random numbers


@pytest.mark.parametrize("name", [name for name in ALL if name != "fgsm"])
def test_a_generator_decides_and_leaves_torchs_alone(name):
    x, y = batch()
    model = convnet(norm=False)
    before = torch.get_rng_state()
    first, again, other = (run(name, model, x, y, generator=rng(seed)) for seed in (1, 1, 2))
    assert torch.equal(torch.get_rng_state(), before)
    assert torch.equal(first, again)
    assert not torch.equal(first, other)


@pytest.mark.parametrize("name", [name for name in ALL if name != "fgsm"])
def test_manual_seed_decides_without_a_generator(name):
    x, y = batch()
    model = convnet(norm=False)
    results = []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        results.append(ALL[name](model, x, y, EPS))
    assert torch.equal(results[0], results[1])
    assert not torch.equal(results[0], results[2])


def test_fgsm_draws_nothing():
    x, y = batch()
    before = torch.get_rng_state()
    attacks.fgsm(convnet(norm=False), x, y, EPS)
    assert torch.equal(torch.get_rng_state(), before)
