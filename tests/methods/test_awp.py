"""AWP against its formula on a copy of the model whose weights are moved, and against its base where v is nothing."""

from __future__ import annotations

import copy
import pickle
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn

from elle_fast import ELLELoss, methods, presets
from elle_fast.methods.awp import AWP
from elle_fast.methods.converge_smooth import PriorGuidedSmooth, RandomStartSmooth
from elle_fast.methods.prior_guided import PriorGuided
from elle_fast.recipes import models
from elle_fast.recipes.config import TrainConfig
from elle_fast.testing import OpCounter, differentiable_inputs, no_host_sync
from tests.helpers import MustNotBeCalled, Smooth, convnet, grads_of, labels, random, rng
from tests.methods.cases import (
    BATCH,
    CLASSES,
    CLOSE,
    EPS,
    FEATURES,
    LAM,
    Wrapper,
    ball,
    batch,
    build,
    e_lin,
    kl,
    losses,
    step,
)

GAMMA, NOTHING = 0.05, 1e-30
# Those that keep something for each sample take another argument.
AROUND = [name for name, row in methods.TABLE.items() if "awp" not in row.refuses and "samples" not in row.takes]
# By rule; their draws after the attack make points.
NO_ROWS = ["gat+elle", "liet+elle-a", "n-fgsm+elle+advlc"]
# The passes of the loss, which are taken twice; those with double backpropagation are taken twice as a whole.
TWICE = {"pgd-at": 1, "trades-single": 2, "gat": 2, "advlc": 2, "elle": 4, "gradalign": 2, "cure": 3, "cure-fgsm": 1}


def smooth() -> Any:
    return Smooth(FEATURES, CLASSES, gain=3.0).double()


def normed(dropout: float = 0.0) -> Any:
    """With batch norm, whose statistics are means, so that the order of passes is no matter."""
    torch.manual_seed(0)
    layers = [nn.Linear(FEATURES, 7), nn.BatchNorm1d(7, momentum=None), nn.Tanh(), nn.Linear(7, CLASSES)]
    return nn.Sequential(*layers[:3], *([nn.Dropout(dropout)] if dropout else []), layers[3]).double()


def moved(model: Any, loss: Tensor) -> Any:
    """A copy of the model at w + v."""
    weights = {name: weight for name, weight in model.named_parameters() if weight.dim() > 1}
    found = dict(zip(weights, torch.autograd.grad(loss, list(weights.values())), strict=True))
    there = copy.deepcopy(model)
    with torch.no_grad():
        for name, weight in there.named_parameters():
            if name in found:
                weight += GAMMA * weight.norm() * found[name] / found[name].norm()
    return there


def check(criterion: Any, loss: Tensor, model: nn.Module, expected: Tensor, there: nn.Module) -> None:
    torch.testing.assert_close(loss, expected, **CLOSE)
    torch.testing.assert_close(criterion.stats["loss"], expected.detach(), **CLOSE)
    for one, other in zip(grads_of(loss, model), grads_of(expected, there), strict=True):
        torch.testing.assert_close(one, other, **CLOSE)


def state_of(model: nn.Module) -> list[Tensor]:
    return [value.clone() for value in model.state_dict().values()]


# ---- The formula


@pytest.mark.parametrize("name", ["n-fgsm", "pgd-at"])
def test_adversarial_training_at_moved_weights(name):
    (x, target), model = batch(), smooth()
    before, criterion = state_of(model), AWP(build(name), GAMMA)
    loss, points = step(criterion, model, x, target)
    *attack, x_adv, again = points
    assert len(attack) == (10 if name == "pgd-at" else 1)
    assert torch.equal(x_adv, again)
    there = moved(model, losses(model, x_adv, target).mean())
    assert not torch.equal(there.first.weight, model.first.weight)
    check(criterion, loss, model, losses(there, x_adv, target).mean(), there)
    assert all(map(torch.equal, before, state_of(model)))


def test_trades_at_moved_weights():
    """Both passes are, and the attack is not, though it is given the logits of the first."""
    (x, target), model = batch(), smooth()
    criterion = AWP(build("trades-single", lam=6.0), GAMMA)
    loss, (clean, start, x_adv, clean_again, again) = step(criterion, model, x, target)
    assert torch.equal(clean, clean_again)
    assert torch.equal(x_adv, again)
    point = start.clone().requires_grad_()
    (grad,) = torch.autograd.grad(kl(model, x, point), point)
    torch.testing.assert_close(x_adv, ball(start + EPS * grad.sign(), x), **CLOSE)

    def whole(net: nn.Module) -> Any:
        return losses(net, x, target).mean() + 6 * kl(net, x, x_adv)

    there = moved(model, whole(model))
    check(criterion, loss, model, whole(there), there)


def test_a_pass_that_serves_both_attack_and_loss():
    """Its output is that at w + v, the attack's gradient that at w."""
    (x, target), model = batch(), smooth()
    criterion = AWP(methods.build("gradalign", eps=EPS, lam=0.5), GAMMA)
    torch.manual_seed(1)
    loss, (clean, x_adv, near, x_adv_again, near_again) = step(criterion, model, x, target)
    assert torch.equal(clean, x)
    assert torch.equal(x_adv, x_adv_again)
    assert torch.equal(near, near_again)

    def gradients(net: nn.Module, at: Tensor, **options: Any) -> Tensor:
        point = at.clone().requires_grad_()
        return torch.autograd.grad(losses(net, point, target).sum(), point, **options)[0]

    first = gradients(model, x)

    def whole(net: nn.Module) -> Any:
        cosine = torch.cosine_similarity(first, gradients(net, near, create_graph=True)).mean()
        return losses(net, x_adv, target).mean() + 0.5 * (1 - cosine)

    there = moved(model, whole(model))
    check(criterion, loss, model, whole(there), there)


def test_points_that_the_weights_move():
    """PCO's mixture: its gradient in the weights is the loss', and no attack's to be played back."""
    (x, target), model, criterion = batch(), smooth(), AWP(build("pco"), GAMMA)
    loss, (start, mixed, x_fgsm, *again) = step(criterion, model, x, target)
    assert torch.equal(again[0], start)
    assert torch.equal(again[2], x_fgsm)

    def mixture(net: nn.Module) -> Any:
        p = net(start).softmax(dim=1).gather(1, target[:, None])
        return ((1 - p) * start + p * (x + 1.5 * (x_fgsm - x))).clamp(0, 1)

    def whole(net: nn.Module) -> Any:
        f_start, f_new, f_fgsm = net(start), net(mixture(net)), net(x_fgsm)
        change = (f_fgsm - f_start).square().mean() - (f_fgsm - f_new).square().mean()
        return nn.functional.cross_entropy(f_new, target) + LAM * change.abs()

    there = moved(model, whole(model))
    torch.testing.assert_close(mixed, mixture(model).detach(), **CLOSE)
    torch.testing.assert_close(again[1], mixture(there).detach(), **CLOSE)
    check(criterion, loss, model, whole(there), there)


def test_elle_a_at_moved_weights():
    """Its detector sees each step once."""
    (x, target), model = batch(), smooth()
    base = ELLELoss(EPS, 30.0, adaptive=True)
    criterion = AWP(base, GAMMA)
    for count in range(1, 5):
        loss, points = step(criterion, model, x, target)
        assert [len(each) // BATCH for each in points] == [1, 4, 4]
        assert torch.equal(points[1], points[2])
        assert base.controller is not None
        assert base.controller.count == count
    x_adv, x_a, x_b, x_c = points[1].chunk(4)
    alpha = ((x_c - x_a) * (x_b - x_a)).sum(dim=1) / (x_b - x_a).square().sum(dim=1)
    lam = criterion.stats["lam"].double()

    def whole(net: nn.Module) -> Any:
        a, b, c = (losses(net, each, target) for each in (x_a, x_b, x_c))
        return losses(net, x_adv, target).mean() + lam * (c - (1 - alpha) * a - alpha * b).square().mean()

    there = moved(model, whole(model))
    check(criterion, loss, model, whole(there), there)


def test_v_is_found_with_the_weight_before_the_step():
    """Where ELLE-A's lam rises from 0, v is that of the cross-entropy."""
    (x, target), model = batch(), smooth()
    torch.manual_seed(0)
    criterion = AWP(ELLELoss(EPS, 30.0, adaptive=True), GAMMA)
    for _ in range(3):  # a detection needs three values
        step(criterion, model, x, target)
        assert criterion.stats["lam"] == 0
    with torch.no_grad():
        model.last.weight.mul_(30)
    loss, (_, points, _) = step(criterion, model, x, target)
    assert criterion.stats["lam"] == 30
    x_adv = points[:BATCH]
    there = moved(model, losses(model, x_adv, target).mean())
    check(criterion, loss, model, losses(there, x_adv, target).mean() + 30 * e_lin(there, points, target), there)


def test_batch_norm_sees_the_attack_at_w_and_the_loss_at_w_plus_v():
    (x, target), model = batch(), normed()
    reference, criterion = copy.deepcopy(model), AWP(build("n-fgsm"), GAMMA)
    loss, (start, x_adv, _) = step(criterion, model, x, target)
    losses(reference, start, target)
    probe = copy.deepcopy(reference)
    there = moved(probe, losses(probe, x_adv, target).mean())
    with torch.no_grad():
        for name, buffer in reference.named_buffers():
            there.get_buffer(name).copy_(buffer)
    check(criterion, loss, model, losses(there, x_adv, target).mean(), there)
    for name, buffer in there.named_buffers():
        torch.testing.assert_close(model.get_buffer(name), buffer, **CLOSE)
    assert model.get_buffer("1.num_batches_tracked") == 2


# ---- Around every method


@pytest.mark.parametrize("dropout", [0.0, 0.3])
@pytest.mark.parametrize("name", [*AROUND, *NO_ROWS])
def test_with_a_v_of_nothing_it_is_its_base(name, dropout):
    """Bit for bit, with the base's buffers, state and random numbers, over steps that have a state."""
    found = []
    for made in (build(name, steps=9), AWP(build(name, steps=9), NOTHING)):
        model = normed(dropout)
        torch.manual_seed(3)
        for seed in range(3):
            x, target = random(BATCH, FEATURES, seed=seed, dtype=torch.float64), labels(BATCH, CLASSES, seed=seed)
            made(model, x, target).backward()
        values = {f"stats.{key}": value for key, value in made.stats.items()}
        values |= made.base.state_dict() if isinstance(made, AWP) else made.state_dict()
        values |= {key: each.grad for key, each in model.named_parameters()} | dict(model.named_buffers())
        found.append(values | {"output": made.output, "draws": torch.get_rng_state()})
    base, awp = found
    assert awp.keys() == base.keys()
    for key in ("1.running_mean", "1.running_var"):
        torch.testing.assert_close(base.pop(key), awp.pop(key), **CLOSE)
    assert [key for key in awp if not torch.equal(base[key], awp[key])] == []


KEEPING: dict[str, Any] = {
    "pgi": lambda: PriorGuided(EPS, LAM, 64, epoch_steps=1, reset_epochs=2),
    "pgi-ep": lambda: PriorGuided(EPS, LAM, 64, (0.0, 1.0), 1, reset_epochs=2, decay=None),
    "mep-cs": lambda: PriorGuidedSmooth(EPS, LAM, 64, 1, gamma=0.0, reset_epochs=2),
    "pco": lambda: build("pco"),
    "pgi+elle+advlc": lambda: build("pgi+elle+advlc", epoch_steps=3),
}


@pytest.mark.parametrize("name", KEEPING)
def test_what_is_kept_of_samples_begins_before_the_attack_at_w(name):
    """Bit for bit as above, from the first step on and where it begins anew, whichever samples a batch has."""
    found = []
    for made in (KEEPING[name](), AWP(KEEPING[name](), NOTHING)):
        model, (x, target), source = normed(0.3), batch(), rng(4)
        torch.manual_seed(3)
        for _ in range(5):
            made(model, x, target, samples=torch.randperm(64, generator=source)[:BATCH]).backward()
        values = made.base.state_dict() if isinstance(made, AWP) else made.state_dict()
        values |= {key: each.grad for key, each in model.named_parameters()}
        found.append(values | {"output": made.output, "loss": made.stats["loss"], "draws": torch.get_rng_state()})
    base, awp = found
    assert [key for key in awp if not torch.equal(base[key], awp[key])] == []


def test_a_refused_batch_does_not_tell_the_shape_of_what_is_kept():
    (x, target), criterion, model = batch(), AWP(build("pgi"), GAMMA), smooth()
    with pytest.raises(ValueError, match=r"^target: "):
        step(criterion, model, x[:, 1:], target[1:])
    loss, _ = step(criterion, model, x, target)
    assert loss.isfinite()


def test_the_mean_of_the_epoch_before_is_there_in_the_first_step():
    """ConvergeSmooth's constraint has the sign of ``l - 10`` for v too, and not that of ``l + 10``."""
    (x, target), model, base = batch(), smooth(), RandomStartSmooth(EPS, 3.0, 1, gamma=0.0)
    criterion = AWP(base, GAMMA)
    for _ in range(2):
        criterion(model, x, target)
    base.convergence.seen = torch.tensor([10.0, 1.0, -10.0], dtype=torch.float64)
    loss, (start, x_adv, *_) = step(criterion, model, x, target)

    def whole(net: nn.Module) -> Any:
        return losses(net, x_adv, target).mean() + 3 * (10 - losses(net, start, target).mean())

    there = moved(model, whole(model))
    check(criterion, loss, model, whole(there), there)


@pytest.mark.parametrize("name", AROUND)
def test_it_costs_the_passes_of_the_loss_once_more(name):
    (x, target), model = batch(), smooth()
    _, base = step(build(name), model, x, target)
    criterion = AWP(build(name), GAMMA)
    loss, points = step(criterion, model, x, target)
    again = TWICE.get(name)
    if again is not None:
        assert sum(map(len, points)) == sum(map(len, base)) + again * BATCH
    # v is there, and does not outlive the call.
    grads = grads_of(loss, model)
    torch.manual_seed(0)
    one = criterion(model, x, target)
    criterion.gamma = 0.0
    torch.manual_seed(0)
    assert one != criterion(model, x, target)
    assert all(parameter.grad is None for parameter in model.parameters())
    assert all(grad.isfinite().all() for grad in grads)


@pytest.mark.parametrize("name", [name for name in AROUND if name not in ("cure", "fast-bat")])
def test_the_points_are_those_of_the_attack_at_w(name):
    """In steps with a state too. The second points of CURE and Fast-BAT follow from gradients in the loss."""
    (x, target), model, base = batch(), smooth(), build(name)
    criterion = AWP(copy.deepcopy(base), GAMMA)
    for seed in range(3):
        torch.manual_seed(seed)
        _, expected = step(base, model, x, target)
        torch.manual_seed(seed)
        _, found = step(criterion, model, x, target)
        assert len(found) > len(expected)
        for point, other in zip(found, expected, strict=False):
            assert torch.equal(point, other)
        for point in found[len(expected) :]:
            assert any(point.shape == other.shape and torch.equal(point, other) for other in expected)


def test_the_triplets_of_a_light_step_are_at_w():
    (x, target), model = batch(), smooth()
    criterion = AWP(ELLELoss(EPS, 30.0, adaptive=True, skip_below=1.0), GAMMA)
    loss, points = step(criterion, model, x, target)
    assert [len(each) // BATCH for each in points] == [1, 1, 3, 1, 3]
    there = moved(model, losses(model, points[1], target).mean())
    torch.testing.assert_close(criterion.stats["e_lin"], e_lin(model, points[2], target).detach(), **CLOSE)
    check(criterion, loss, model, losses(there, points[1], target).mean(), there)


@pytest.mark.parametrize("name", [name for name in AROUND if name != "nuat"])
def test_no_step_waits_for_the_device(name):
    (x, target), criterion, model = batch(), AWP(build(name), GAMMA), smooth()
    criterion(model, x, target).backward()
    with no_host_sync():
        criterion(model, x, target).backward()


@pytest.fixture
def process_group(tmp_path):
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/rendezvous", rank=0, world_size=1)
    yield
    dist.destroy_process_group()


@pytest.mark.parametrize("options", [{}, {"find_unused_parameters": True}], ids=str)
@pytest.mark.skipif(not dist.is_available(), reason="torch was built without torch.distributed")
def test_one_pass_goes_through_ddp(process_group, options):
    x, target = random(4, 3, 8, 8, seed=0), labels(4, CLASSES)
    for name in AROUND:
        model = convnet(CLASSES)
        wrapper = Wrapper(copy.deepcopy(model), **options)
        grads = []
        for trained in (model, wrapper):
            torch.manual_seed(3)
            criterion = AWP(build(name), GAMMA)
            criterion(trained, x, target).backward()
            grads.append([parameter.grad for parameter in trained.parameters()])
        assert wrapper.passes == 1, name
        assert all(torch.equal(one, other) for one, other in zip(*grads, strict=True)), name


@pytest.mark.parametrize("forward", ["split", "checkpoint"])
def test_the_forward_modes_of_elle(forward):
    (x, target), model, found = batch(), smooth(), []
    for mode in ("packed", forward):
        torch.manual_seed(2)
        loss = AWP(ELLELoss(EPS, 30.0, forward=mode), GAMMA)(model, x, target)
        found.append([loss.detach(), *grads_of(loss, model)])
    for one, other in zip(*found, strict=True):
        torch.testing.assert_close(one, other, **CLOSE)


def test_a_compiled_model():
    (x, target), model, found = batch(), smooth(), []
    for called in (model, torch.compile(model, backend="eager")):
        torch.manual_seed(2)
        loss = AWP(build("elle-a"), GAMMA)(called, x, target)
        found.append([loss.detach(), *grads_of(loss, model)])
    for one, other in zip(*found, strict=True):
        torch.testing.assert_close(one, other, **CLOSE)


# ---- By name

COSTS = {
    **{"fgsm+awp": 8, "pgd-at+awp": 26, "trades-single+awp": 14, "advlc+awp": 31, "plain+awp": 6, "elle-a+awp": 26},
    **{"n-fgsm+elle+awp": 26, "gat+elle-a+advlc+awp": 38, "n-aaer+advlc+awp": 14, "nuat+awp": 14},
    # With double backpropagation.
    **{"gradalign+awp": 20, "cure+awp": 30, "cure-fgsm+awp": 14, "llr+awp": 26, "fast-bat+awp": 21},
    "fast-bat+elle+awp": 39,
}


@pytest.mark.parametrize("name", COSTS)
def test_the_row_says_what_a_step_costs(name):
    row, model = methods.find(name), models.build("mlp", in_shape=(40,), classes=10, width=40)
    x, target = random(8, 40, seed=1), labels(8, 10)
    criterion, forward, whole = build(name), OpCounter(x.device), OpCounter(x.device)
    with torch.no_grad(), forward:
        model(x)
    criterion(model, x, target).backward()
    rows: list[int] = []
    with differentiable_inputs(model), whole:
        criterion(model, x, target).backward()
    with model.register_forward_hook(lambda module, args, output: rows.append(len(output))):
        criterion(model, x, target)
    assert row.units == COSTS[name]
    passes, once = (int(each.passes.split("F")[0]) for each in (row, methods.find(name.removesuffix("+awp"))))
    assert sum(rows) == passes * len(x)
    # v takes no data gradient in the first layer, which has 4/9 of the weights.
    expected = row.units - (passes - once) * 4 / 9
    assert whole.flops / forward.flops == pytest.approx(expected, abs=0.1)
    assert row.passes.endswith("D") == methods.find(name.split("+")[0]).passes.endswith("D")


@pytest.mark.parametrize(
    "name, gamma, warmup",
    [("n-fgsm+awp", 0.01, 0), ("elle-a+advlc+awp", 0.01, 0), ("trades-single+awp", 0.005, 63), ("gat+awp", 0.01, 0)],
)
def test_the_authors_sizes(name, gamma, warmup):
    criterion = methods.build(name, eps=EPS, epoch_steps=7)
    assert isinstance(criterion, AWP)
    assert (criterion.gamma, criterion.warmup) == (gamma, warmup)
    assert methods.find(name).clamp == methods.find(name.removesuffix("+awp")).clamp
    assert getattr(criterion.core, "epoch_steps", 7) == 7
    assert presets.weight(name) == presets.weight(name.removesuffix("+awp"))


@pytest.mark.parametrize(
    "name, message",
    [
        ("slat+awp", "its attack reads hidden layers, which AWP cannot hold fixed"),
        ("free-at+awp", "one backward pass gives delta's gradient too"),
        ("fgsm+awp+advlc", "each can be added once, in the order elle, elle-a, advlc, awp"),
        ("fgsm+awp+awp", "each can be added once"),
    ],
)
def test_names_that_are_refused(name, message):
    with pytest.raises(ValueError, match=message):
        methods.find(name)


def test_a_run_takes_it_by_name():
    config = TrainConfig(data="cifar10", method="n-fgsm+elle-a+awp", skip_below=0.01, label_smoothing=0.1).resolved()
    assert (config.lam, config.clamp) == (4_000, "none")
    criterion = methods.build("n-fgsm+elle-a+awp", eps=EPS, skip_below=0.01, label_smoothing=0.1)
    assert isinstance(criterion, AWP)
    assert criterion.core.label_smoothing == 0.1
    criterion.eps = 0.05
    assert criterion.core.eps == 0.05


# ---- What it is called with


def test_warm_up_is_counted_in_steps_and_resumed():
    (x, target), model = batch(), smooth()
    criterion = AWP(build("fgsm"), GAMMA, warmup=2)

    def passes(made: Any) -> int:
        return len(step(made, model, x, target)[1])

    assert passes(criterion) == 2
    with criterion.frozen():
        assert passes(criterion) == 2
    other = AWP(build("fgsm"), GAMMA, warmup=2)
    other.load_state_dict(criterion.state_dict())
    for made in (criterion, other, copy.deepcopy(criterion), pickle.loads(pickle.dumps(criterion))):
        assert [passes(made) for _ in range(3)] == [2, 3, 3]


def test_without_gradients_and_in_eval_mode_it_is_the_base():
    (x, target), model = batch(), smooth()
    expected = build("fgsm")(model, x, target)
    criterion = AWP(build("fgsm"), GAMMA)
    with torch.no_grad():
        assert criterion(model, x, target) == expected
    assert criterion.eval()(model, x, target) == expected
    assert criterion.train()(model, x, target) != expected


def test_an_error_leaves_nothing_behind():
    (x, target), model = batch(), normed()
    criterion, calls = AWP(build("n-fgsm"), GAMMA), []

    def fails(module: nn.Module, args: Any) -> None:
        calls.append(args)
        if len(calls) == 3:
            raise KeyError("the third pass")

    parameters = [value.clone() for value in model.parameters()]
    torch.manual_seed(0)
    with model.register_forward_pre_hook(fails), pytest.raises(KeyError):
        criterion(model, x, target)
    assert all(map(torch.equal, parameters, model.parameters()))
    assert all(isinstance(each, nn.Parameter) and each.grad is None for each in model.parameters())
    assert not criterion.base._frozen
    criterion(model, x, target).backward()


def test_frozen_parameters_and_those_without_a_part_stay_where_they_are():
    (x, target), model = batch(), smooth()
    model.unused = nn.Linear(3, 3).double()
    model.first.weight.requires_grad_(False)
    seen: list[Tensor] = []
    model.first.register_forward_pre_hook(lambda module, args: seen.append(module.weight.clone()))
    model.last.register_forward_pre_hook(lambda module, args: seen.append(module.weight.clone()))
    AWP(build("fgsm"), GAMMA)(model, x, target).backward()
    assert torch.equal(seen[0], seen[-2])
    assert not torch.equal(seen[1], seen[-1])
    change = seen[-1] - seen[1]
    torch.testing.assert_close(change.norm(), GAMMA * seen[1].norm(), **CLOSE)


def test_arguments_of_the_model():
    (x, target), model = batch(), smooth()

    class Scaled(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = model

        def forward(self, points: Tensor, *, scale: Tensor, shift: float) -> Tensor:
            out: Tensor = scale * self.inner(points + shift)
            return out

    criterion = AWP(build("fgsm"), GAMMA)
    given = {"scale": torch.full((BATCH, 1), 2.0, dtype=torch.float64), "shift": 0.0}
    loss = criterion(Scaled(), x, target, model_kwargs=given)
    with torch.no_grad():
        model.last.weight.mul_(2)
        model.last.bias.mul_(2)
    torch.testing.assert_close(loss, criterion(model, x, target), **CLOSE)


def test_low_precision():
    """A loss' gradient of 1e-9 is 0 in float16, and v has no scale."""
    model, x, target = convnet(CLASSES), random(4, 3, 8, 8, seed=0), labels(4, CLASSES)
    criterion = AWP(build("fgsm"), GAMMA)
    with torch.autocast("cpu", torch.bfloat16):
        loss = criterion(model, x, target)
    loss.backward()
    assert loss.dtype == torch.float32
    full = AWP(build("fgsm"), GAMMA)(model, x, target)
    torch.testing.assert_close(loss, full, rtol=0.05, atol=0.05)
    assert full > build("fgsm")(model, x, target)


def test_a_float16_model_with_a_layer_without_gradient():
    """Its v is 0, and not 0 times the infinity that 1e20 is in float16."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(FEATURES, 6), nn.ReLU(), nn.Linear(6, CLASSES)).half()
    with torch.no_grad():
        model.get_parameter("0.bias").fill_(-100)
    x, target = random(BATCH, FEATURES, seed=0).half(), labels(BATCH, CLASSES)
    loss = AWP(build("fgsm"), GAMMA)(model, x, target)
    assert loss.isfinite()
    assert all(grad.isfinite().all() for grad in grads_of(loss, model))


@pytest.mark.parametrize(
    "model, message",
    [
        (lambda x: x, "^model: expected a torch.nn.Module for AWP, .*, got <function"),
        (
            nn.DataParallel(smooth()),
            "^model: .* and no DataParallel, whose weights cannot be replaced, got DataParallel",
        ),
        (nn.BatchNorm1d(FEATURES), "with 'weight' in their names, for AWP to perturb, got none in a BatchNorm1d"),
    ],
    ids=["function", "data parallel", "batch norm"],
)
def test_models_without_weights(model, message):
    x, target = batch()
    with pytest.raises((TypeError, ValueError), match=message):
        AWP(build("fgsm"), GAMMA)(model, x, target)


def test_a_sharded_model():
    (x, target), model = batch(), smooth()
    model.first.weight.device_mesh = "mesh"
    with pytest.raises(ValueError, match=r"^model: expected whole parameters .*got sharded ones \(FSDP\)"):
        AWP(build("fgsm"), GAMMA)(model, x, target)


@pytest.mark.parametrize(
    "options, message",
    [
        ({"base": 3}, "^base: expected a criterion, got 3"),
        (
            {"base": build("slat")},
            "^base: expected an attack that AWP can hold fixed, got SLAT, which reads hidden layers",
        ),
        ({"base": build("free-at")}, "^base: .*got FreeAT, whose attack is the backward"),
        ({"gamma": -1.0}, "^gamma: expected a finite number"),
        ({"warmup": 1.5}, "^warmup: expected an integer >= 0"),
    ],
)
def test_what_is_refused(options, message):
    with pytest.raises((TypeError, ValueError), match=message):
        AWP(**{"base": build("fgsm"), **options})


def test_options_that_are_set_later():
    criterion = AWP(build("fgsm"))
    for name in ("base", "warmup", "stats", "output"):
        with pytest.raises(AttributeError):
            setattr(criterion, name, 3)
    with pytest.raises(ValueError, match=r"^gamma: "):
        criterion.gamma = -1.0
    assert repr(criterion).startswith("AWP(\n  gamma=0.01, warmup=0")


@pytest.mark.parametrize("target", [torch.zeros(BATCH, dtype=torch.int32), None], ids=str)
def test_a_wrong_target_is_refused_before_the_model_sees_the_batch(target):
    model = MustNotBeCalled()
    with pytest.raises((TypeError, ValueError), match=r"^target: expected int64|^model: expected"):
        AWP(build("fgsm"))(model, batch()[0], target)
