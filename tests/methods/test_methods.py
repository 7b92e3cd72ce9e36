"""Each training method against its formula, restated here from the points that its forward passes see."""

import copy
import pickle
import re
from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn

from elle_fast import AdaptiveLambda, attacks, methods, presets
from elle_fast.methods import NAMES, TABLE
from elle_fast.methods.elle import PlusELLE
from elle_fast.recipes import cli, models
from elle_fast.recipes.config import TrainConfig
from elle_fast.testing import OpCounter, differentiable_inputs, no_host_sync
from tests.helpers import MustNotBeCalled, Smooth, about, built, convnet, grads_of, labels, random
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
    check,
    e_lin,
    gradient,
    kl,
    losses,
    smooth,
    step,
)

# Methods whose first forward pass is not at the clean inputs.
NOISY = (
    "rs-fgsm",
    "rs-fgsm-unprojected",
    "n-fgsm",
    "rs-aaer",
    "n-aaer",
    "advlc-noise",
    "zero-grad",
    "free-at",
    "pgd-at",
    "fast-bat",
    "advmixup-single",
    "uap",
    "cuap",
    "fuap",
    "liet",
    *("pgi", "pgi-ep", "pco", "rs-cs", "mep-cs", "ssat"),
)
# The forward pass at the points trained on, where it is not the second one.
TRAINED_ON = {
    "free-at": 0,
    "pgd-at": -1,
    "advlc": -1,
    "advlc-noise": -1,
    "mart": -1,
    "fast-bat": 2,
    "gat": 2,
    "gat-fgsm": 2,
    "nuat": 2,
    "trades-single": 2,
    "fuap": 2,
    "ssat": -1,
}
# In units of eps, where it is more than 1.
RADIUS = {"rs-fgsm-unprojected": 2.25, "n-fgsm": 3, "n-aaer": 3, "liet": 3, "pco": 1.5}
RADIUS |= dict.fromkeys(("advlc-noise", "advmixup-single", "gat-fgsm", "rs-cs"), 2)
DOUBLE = ("fast-bat", "gradalign", "cure", "cure-fgsm", "llr")
ADAPTIVE_PENALTIES = ("cure-fgsm", "llr")
# Without an attack; its second point is at a 2-norm of 3 from x.
UNATTACKED = ("cure", "plain", "plain+elle", "plain+elle-a")
# Of local linearity around x, which is not clamped.
UNCLAMPED = ("gradalign", "llr")
ATTACKED = [name for name in NAMES if name not in UNATTACKED]


# ---- All of them


@pytest.mark.parametrize("name", ATTACKED)
def test_points_stay_in_the_ball_and_in_the_range(name):
    (x, target), row = batch(), TABLE[name]
    radius = RADIUS.get(name.split("+")[0], 1)
    for bounds in ((0.0, 1.0), None):
        criterion, model = build(name, bounds=bounds), smooth()
        for _ in range(3):
            loss, points = step(criterion, model, x, target)
            loss.backward()
            points = [point for point in points if len(point) % BATCH == 0]  # without LIET's constant images
            for place, point in enumerate(points):
                distance = (point - x.repeat(len(point) // BATCH, 1)).abs().max()
                assert distance <= radius * EPS + 1e-12
                # What TRADES' and MART's attacks begin with has normal noise.
                if (
                    bounds is not None
                    and name not in UNCLAMPED
                    and not (name.startswith(("trades", "mart")) and place == 1)
                ):
                    assert point.min() >= 0
                    assert point.max() <= 1
    assert len(points) > 1 or row.replays > 1
    assert torch.equal(points[0][:BATCH], x) == (name.split("+")[0] not in NOISY)


@pytest.mark.parametrize("name", ATTACKED)
def test_output_is_what_the_model_gave_at_the_points_trained_on(name):
    (x, target), criterion, model = batch(), build(name), smooth()
    assert criterion.output is None
    outputs: list[torch.Tensor] = []
    model.register_forward_hook(lambda module, args, output: outputs.append(output.detach().clone()))
    for _ in range(2):  # Free AT's first points are the clean ones
        outputs.clear()
        loss, points = step(criterion, model, x, target)
        loss.backward()
    place = range(len(points))[TRAINED_ON.get(name.split("+")[0], 1)]
    assert criterion.output is not None
    assert criterion.output.shape == (BATCH, CLASSES)
    assert not criterion.output.requires_grad
    # No view, which would keep the logits of all other points in memory too.
    assert criterion.output.untyped_storage().nbytes() == criterion.output.nbytes
    assert torch.equal(criterion.output, outputs[place][:BATCH])
    # No other pass could be meant.
    assert not torch.equal(points[place][:BATCH], x)
    for point, output in zip(points, outputs, strict=True):
        # PGD may come back to a point, but for a rounding.
        same = point.shape == points[place].shape and torch.allclose(point, points[place], rtol=0, atol=1e-12)
        assert same or not torch.equal(criterion.output, output[:BATCH])


@pytest.mark.parametrize("name", NAMES)
def test_stats_are_detached_and_do_not_follow_the_loss(name):
    (x, target), criterion, model = batch(), build(name), smooth()
    assert criterion.stats == {}
    loss = criterion(model, x, target, **about(criterion, x))
    value = loss.item()
    loss /= 2
    assert criterion.stats["loss"] == value
    assert all(number.dim() == 0 and not number.requires_grad for number in criterion.stats.values())
    kind = {"lam", "e_lin", "ce"} if TABLE[name].levers else {"ce", "penalty"}
    if name in ADAPTIVE_PENALTIES:
        kind.add("lam")
    if "lam" not in TABLE[name].takes or name == "fast-bat":
        kind = set()
    assert criterion.stats.keys() - {"skipped"} == {"loss", *kind}


@pytest.mark.parametrize("name", NAMES)
def test_the_table_says_what_a_step_costs(name):
    """FLOPs of matrix products, over those of a forward pass; on hidden layers alone a unit is a whole number."""
    row, model = TABLE[name], models.build("mlp", in_shape=(40,), classes=10, width=40)
    x, target = random(8, 40, seed=1), labels(8, 10)
    criterion, samples = build(name), []

    def call():
        model.zero_grad()
        criterion(model, x, target, **about(criterion, x)).backward()

    forward, whole = OpCounter(x.device), OpCounter(x.device)
    with torch.no_grad(), forward:
        model(x)
    call()
    with differentiable_inputs(model), whole:
        call()
    hook = model.register_forward_hook(lambda module, args, output: samples.append(len(output)))
    call()
    hook.remove()
    passes = {kind: int(count) for count, kind in re.findall(r"(\d+)([FGB])", row.passes)}
    assert sum(samples) == passes["F"] * len(x)
    # FUAP's own two layers, of 50 and 10 outputs, are no part of the model: a forward pass, and back but to the input.
    own = 2 * 8 * (2 * (40 * 50 + 50 * 10) + 50 * 10) if name == "fuap" else 0
    # The singular vectors' product in NuAT is no part of the model: 2 B C^2 of some 2 B 40^2 FLOPs.
    assert (whole.flops - own) / forward.flops == pytest.approx(row.units, abs=0.1)
    assert row.passes.endswith("D") == (name in DOUBLE)
    if name not in DOUBLE:
        assert row.units == passes["F"] + passes.get("G", 0) + 2 * passes["B"]


@pytest.mark.parametrize("name", [name for name in NAMES if name != "nuat"])  # its decomposition waits on a GPU
def test_no_step_waits_for_the_device(name):
    (x, target), criterion, model = batch(), build(name), smooth()
    criterion(model, x, target, **about(criterion, x)).backward()
    with no_host_sync():
        criterion(model, x, target, **about(criterion, x)).backward()


@pytest.mark.parametrize("name", NAMES)
def test_every_method_can_be_called_without_gradients(name):
    """As in a validation; under inference mode an attack cannot be made, which the error says."""
    (x, target), criterion, model = batch(), build(name).eval(), smooth()
    with torch.no_grad():
        assert criterion(model, x, target).isfinite()
    if not name.startswith(("free-at", "plain")):  # whose steps have no attack
        with torch.inference_mode(), pytest.raises(RuntimeError, match=r"^torch.inference_mode: "):
            criterion(model, x, target)


@pytest.mark.parametrize("name", ["cure", "cure-fgsm", "advlc", "gradalign"])
def test_each_criterion_has_a_regulariser_of_its_own(name):
    one, other = build(name), build(name)
    assert one.regularizer is not other.regularizer
    with pytest.raises(AttributeError, match=r"regularizer: expected no other value"):
        one.regularizer = other.regularizer


def test_what_belongs_to_the_criterion_inside():
    criterion = build("advmixup-single+elle")
    for name in ("lam", "controller", "max_ratio"):
        with pytest.raises(AttributeError, match=rf"^AdvMixUpSingle.{name}: .*set elle.{name}"):
            setattr(criterion, name, 3.0)
    for count in (0, "x"):
        with pytest.raises((TypeError, ValueError), match=r"^epoch_steps: expected an integer >= 1"):
            build("fgsm", epoch_steps=count)
    assert build("gat+elle", epoch_steps=3).base.epoch_steps == 3


@pytest.mark.parametrize("name", NAMES)
def test_criteria_can_be_copied_pickled_and_resumed(name):
    (x, target), criterion, model = batch(), build(name, steps=9), smooth()
    for _ in range(2):
        criterion(model, x, target, **about(criterion, x)).backward()
    resumed = build(name, steps=9)
    resumed.load_state_dict(criterion.state_dict())
    found = []
    for each in (criterion, resumed, copy.deepcopy(criterion), pickle.loads(pickle.dumps(criterion))):
        torch.manual_seed(3)
        found.append(each(model, x, target, **about(each, x)))
    assert all(torch.equal(loss, found[0]) for loss in found)


@pytest.fixture
def process_group(tmp_path):
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/rendezvous", rank=0, world_size=1)
    yield
    dist.destroy_process_group()


@pytest.mark.skipif(not dist.is_available(), reason="torch was built without torch.distributed")
def test_under_ddp_the_first_pass_with_a_graph_is_the_wrappers_and_no_other(process_group):
    """Batch norm's backward pass would not stand a later write to its buffers."""
    x, target = random(4, 3, 8, 8, seed=0), labels(4, CLASSES)
    for name in NAMES:
        model = convnet(CLASSES)
        wrapper = Wrapper(copy.deepcopy(model))
        grads = []
        for trained in (model, wrapper):
            torch.manual_seed(3)
            criterion = build(name)
            criterion(trained, x, target, **about(criterion, x)).backward()
            grads.append([parameter.grad for parameter in trained.parameters()])
        assert wrapper.passes == 1, name
        assert all(torch.equal(one, other) for one, other in zip(*grads, strict=True)), name


# ---- Attacks


def test_zero_grad_drops_the_smallest_gradients():
    (x, target), criterion, model = batch(), build("zero-grad"), smooth()
    loss, (start, x_adv) = step(criterion, model, x, target)
    grad = gradient(model, start, target)
    kept = grad.abs() >= grad.abs().quantile(0.35, dim=1, keepdim=True)
    torch.testing.assert_close(x_adv, ball(start + 2 * EPS * grad.sign() * kept, x), **CLOSE)
    check(criterion, loss, losses(model, x_adv, target).mean(), model)


def test_free_at_takes_both_gradients_from_one_backward_pass():
    (x, target), criterion, model = batch(), build("free-at"), smooth()
    delta = torch.zeros_like(x)
    for _ in range(3):
        loss, (point,) = step(criterion, model, x, target)
        torch.testing.assert_close(point, x + delta, **CLOSE)
        delta = (delta + EPS * gradient(model, point, target).sign()).clamp(-EPS, EPS)
        delta = torch.minimum(torch.maximum(delta, -x), 1 - x)
        expected = losses(model, point, target).mean()
        torch.testing.assert_close(loss, expected, **CLOSE)
        model.zero_grad()
        loss.backward()
        for parameter, grad in zip(model.parameters(), grads_of(expected, model), strict=True):
            torch.testing.assert_close(parameter.grad, grad, **CLOSE)
    torch.testing.assert_close(criterion.state_dict()["_extra_state"], delta, **CLOSE)
    # The next batch: its points are not clamped, delta was.
    _, (fewer,) = step(criterion, model, 1 - x[:2], target[:2])
    torch.testing.assert_close(fewer, 1 - x[:2] + delta[:2], **CLOSE)
    assert fewer.max() > 1
    _, (other,) = step(criterion, Smooth(3, CLASSES).double(), x[:, :3], target)
    assert torch.equal(other, x[:, :3])


def test_a_gradient_that_is_not_finite_does_not_stay_in_free_ats_perturbation():
    (x, target), criterion, model = batch(), build("free-at"), smooth()
    (criterion(model, x, target) * torch.nan).backward()
    _, (point,) = step(criterion, model, x, target)
    assert torch.equal(point, x)


def test_free_at_changes_nothing_in_eval_mode():
    (x, target), criterion, model = batch(), build("free-at"), smooth()
    criterion.eval()
    for _ in range(2):
        loss, (point,) = step(criterion, model, x, target)
        loss.backward()
        assert torch.equal(point, x)


def test_fast_bat_differentiates_through_the_attack():
    """The gradient of L(x + delta* + h (g(theta) - g) / lam), in which g(theta) moves and all else is held fixed."""
    (x, target), model = batch(), smooth()
    criterion = build("fast-bat", eps=0.4)
    criterion.step_size = 0.3  # of the authors' 12 every entry would be at the ball's boundary
    loss, (_, point, solution) = step(criterion, model, x, target)
    grad = gradient(model, point, target, create_graph=True)
    inside = (solution > (x - 0.4).clamp(0, 1)) & (solution < (x + 0.4).clamp(0, 1))
    assert 0 < inside.sum() < inside.numel()
    torch.testing.assert_close(solution[inside], (point + 0.3 * grad)[inside].detach(), **CLOSE)
    check(criterion, loss, losses(model, solution + inside * (grad - grad.detach()) / LAM, target).mean(), model)


@pytest.mark.parametrize("eps, step_size", [(8 / 255, 5000 / 255), (16 / 255, 2000 / 255)])
def test_the_step_of_fast_bat_is_its_authors(eps, step_size):
    (x, target), model = batch(), smooth()
    _, (start, point, _) = step(build("fast-bat", eps=eps), model, x, target)
    expected = (start + step_size * gradient(model, start, target)).clamp(x - eps, x + eps).clamp(0, 1)
    torch.testing.assert_close(point, expected, **CLOSE)
    assert (point != (x + eps).clamp(0, 1)).any()


def test_slat_perturbs_the_input_and_the_hidden_layer():
    (x, target), criterion, model = batch(), build("slat"), smooth()
    loss, (clean, x_adv) = step(criterion, model, x, target)
    assert torch.equal(clean, x)
    hidden = model.first(x).detach().requires_grad_()
    ce = F.cross_entropy(model.last(torch.tanh(hidden)), target)
    (grad,) = torch.autograd.grad(ce, hidden)
    torch.testing.assert_close(x_adv, (x + 0.9 * EPS * gradient(model, x, target).sign()).clamp(0, 1), **CLOSE)
    output = model.last(torch.tanh(model.first(x_adv) + EPS * grad.sign()))
    check(criterion, loss, F.cross_entropy(output, target), model)
    assert not model.first._forward_hooks


def test_slat_keeps_hidden_activations_in_the_range_of_their_sample_and_channel():
    x, target = random(BATCH, 2, 3, 3, seed=2, dtype=torch.float64), labels(BATCH, CLASSES)
    first, rest = nn.Conv2d(2, 3, 3, padding=1).double(), nn.Sequential(nn.Flatten(), nn.Linear(27, CLASSES)).double()
    model = nn.Sequential(first, rest)
    loss, (_, x_adv) = step(build("slat", layers=lambda model: [first]), model, x, target)
    hidden = first(x).detach().requires_grad_()
    (grad,) = torch.autograd.grad(F.cross_entropy(rest(hidden), target), hidden)
    there = first(x_adv).detach()
    changed = there + EPS * grad.sign()
    for sample, channel in [(i, c) for i in range(BATCH) for c in range(3)]:
        row = there[sample, channel]
        changed[sample, channel] = changed[sample, channel].clamp(row.min(), row.max())
    assert (changed - there).abs().amin() < EPS / 2 < (changed - there).abs().amax()
    # The step is a constant: no gradient is lost where it was cut.
    expected = F.cross_entropy(rest(first(x_adv) + (changed - there)), target)
    torch.testing.assert_close(loss, expected, **CLOSE)
    for one, other in zip(grads_of(loss, model), grads_of(expected, model), strict=True):
        torch.testing.assert_close(one, other, **CLOSE)


def test_slat_chooses_layers_and_says_where_there_are_none():
    net = models.build("preactresnet18", in_shape=(3, 8, 8), classes=3, width=2, mean=[0.5] * 3)
    names = {module: name for name, module in net.named_modules()}
    assert [names[layer] for layer in models.hidden_layers(net)] == ["net.stem", "net.stages.0"]
    assert len(models.hidden_layers(models.build("cnn", in_shape=(1, 8, 8), classes=3, width=2))) == 3
    x, target = batch()
    with pytest.raises(ValueError, match=r"model: expected hidden layers for SLAT.* got 1 in a Linear"):
        build("slat")(nn.Linear(FEATURES, CLASSES).double(), x, target)
    with pytest.raises(TypeError, match=r"model: expected a torch.nn.Module for SLAT"):
        build("slat")(lambda x: x, x, target)
    with pytest.raises(TypeError, match="layers: expected None or a callable, got 3"):
        build("slat", layers=3)


@pytest.mark.parametrize("inside", [False, True])
def test_slat_refuses_a_compiled_model(inside):
    """A graph that was compiled without hooks would be taken again."""
    (x, target), model = batch(), smooth()
    if inside:
        model.first = torch.compile(model.first, backend="eager")
    with pytest.raises(ValueError, match=r"^model: expected one that is not compiled for SLAT"):
        build("slat")(model if inside else torch.compile(model, backend="eager"), x, target)


def test_slat_takes_the_hidden_layers_as_an_argument():
    (x, target), model = batch(), nn.Sequential(*(nn.Linear(FEATURES, FEATURES) for _ in range(3))).double()
    inputs = []
    model[1].register_forward_pre_hook(lambda module, args: inputs.append(args[0].detach()))
    for layers in (None, lambda model: [model[1]]):
        inputs.clear()
        build("slat", layers=layers)(model, x, target)
        clean, after = inputs
        assert torch.equal(clean, model[0](x))
        # With the argument the first layer's output is not perturbed, only its input.
        x_adv = (x + 0.9 * EPS * attacks.input_gradient(model, x, target).sign()).clamp(0, 1)
        assert torch.equal(after, model[0](x_adv)) == (layers is not None)


# ---- Penalties


def guide(name, logits, logits_adv):
    if name == "gat":
        return (logits.softmax(dim=1) - logits_adv.softmax(dim=1)).square().sum(dim=1).mean()
    return torch.linalg.svdvals(logits_adv - logits).sum() / BATCH


@pytest.mark.parametrize("name", ["gat", "nuat"])
def test_gat_and_nuat_are_guided_in_every_other_step_of_an_epoch(name):
    (x, target), criterion, model = batch(), build(name, epoch_steps=3), smooth()
    for weight in (0.0, LAM, 0.0, 0.0, LAM):
        loss, (clean, start, x_adv) = step(criterion, model, x, target)
        assert torch.equal(clean, x)
        torch.testing.assert_close(start, (x + EPS / 2 * (start - x).sign()).clamp(0, 1), **CLOSE)
        point = start.clone().requires_grad_()
        guided = losses(model, point, target).mean() + weight * guide(name, model(x).detach(), model(point))
        (grad,) = torch.autograd.grad(guided, point)
        torch.testing.assert_close(x_adv, ball(start + EPS * grad.sign(), x), **CLOSE)
        check(criterion, loss, losses(model, x, target).mean() + LAM * guide(name, model(x), model(x_adv)), model)


def test_the_gat_of_the_elle_authors_trains_at_the_attacks_points_and_is_always_guided():
    (x, target), criterion, model = batch(), build("gat-fgsm"), smooth()
    for _ in range(2):
        loss, (_, start, x_adv) = step(criterion, model, x, target)
        torch.testing.assert_close(start, (x + EPS * (start - x).sign()).clamp(0, 1), **CLOSE)
        point = start.clone().requires_grad_()
        guided = losses(model, point, target).mean() + LAM * guide("gat", model(x).detach(), model(point))
        (grad,) = torch.autograd.grad(guided, point)
        torch.testing.assert_close(x_adv, (start + EPS * grad.sign()).clamp(0, 1), **CLOSE)
        assert (x_adv - x).abs().max() > 1.5 * EPS
        check(criterion, loss, losses(model, x_adv, target).mean() + LAM * guide("gat", model(x), model(x_adv)), model)


def test_the_weight_of_nuat_grows_over_nine_tenths_of_the_run():
    (x, target), criterion, model = batch(), build("nuat", lam=4.5, steps=20), smooth()
    found = []
    for _ in range(20):
        loss = criterion(model, x, target)
        found.append(float((loss.detach() - criterion.stats["ce"]) / criterion.stats["penalty"]))
    assert found == pytest.approx([4.5 * min(1, done / 18) for done in range(20)], rel=1e-6)


def test_a_step_that_the_host_counts_is_not_captured(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    with pytest.raises(RuntimeError, match="criterion: Guided cannot be captured as a CUDA graph"):
        build("gat+elle-a").base._count(None, SimpleNamespace(is_cuda=True))


def test_trades_climbs_the_divergence():
    (x, target), criterion, model = batch(), build("trades-single"), smooth()
    loss, (clean, start, x_adv) = step(criterion, model, x, target)
    assert torch.equal(clean, x)
    assert 0 < (start - x).abs().max() < 0.01
    point = start.clone().requires_grad_()
    (grad,) = torch.autograd.grad(kl(model, x, point), point)
    torch.testing.assert_close(x_adv, ball(start + EPS * grad.sign(), x), **CLOSE)
    check(criterion, loss, losses(model, x, target).mean() + LAM * kl(model, x, x_adv), model)


@pytest.mark.parametrize("name", ["gradalign", "cure-fgsm", "llr"])
def test_local_linearity_by_double_backpropagation(name):
    (x, target), criterion, model = batch(), build(name, bounds=None), smooth()
    loss, points = step(criterion, model, x, target)
    first = gradient(model, x, target, create_graph=True)
    x_adv = x + EPS * first.detach().sign()
    torch.testing.assert_close(points[1], x_adv, **CLOSE)
    second = gradient(model, points[-1], target, create_graph=True)
    if name == "gradalign":
        penalty = 1 - F.cosine_similarity(first.detach(), second).mean()
    elif name == "cure-fgsm":  # gradients of the mean loss, the first one held
        penalty = ((second - first.detach()) / BATCH).square().sum(dim=1).mean()
    else:
        x_0 = points[-2]
        assert EPS / 2 < (x_0 - x).abs().max() <= EPS
        assert (x_0 - points[-1]).abs().max() > EPS
        rise = ((points[-1] - x_0) * gradient(model, x_0, target, create_graph=True)).sum(dim=1)
        penalty = (losses(model, points[-1], target) - losses(model, x_0, target) - rise).square().mean()
    # Of the adaptive ones lam is 0 in the first step, whatever the penalty.
    lam = 0 if name in ADAPTIVE_PENALTIES else LAM
    check(criterion, loss, losses(model, x_adv, target).mean() + lam * penalty, model)
    torch.testing.assert_close(criterion.stats["penalty"], penalty.detach(), **CLOSE)


@pytest.mark.parametrize("name", ADAPTIVE_PENALTIES)
def test_the_weight_of_cure_and_llr_follows_elle_as_rule(name):
    (x, target), criterion, model = batch(), build(name, bounds=None), smooth()
    rule, found = AdaptiveLambda(LAM), []
    for gain in (1, 1, 1, 1, 5, 1):
        model.first.weight.data.mul_(gain)
        loss = criterion(model, x, target)
        found.append(criterion.stats["lam"].item())
        assert found[-1] == rule.update(criterion.stats["penalty"]).item()
        expected = criterion.stats["ce"] + found[-1] * criterion.stats["penalty"]
        torch.testing.assert_close(loss.detach(), expected, rtol=1e-6, atol=0)
        model.first.weight.data.div_(gain)
    assert found[0] == 0
    assert LAM in found
    criterion.eval()
    criterion(model, x, target)
    assert criterion.stats["lam"] == found[-1]
    assert criterion.controller.count == 6


def test_cure_is_the_original_in_eval_mode():
    x, target = batch()
    norm = nn.BatchNorm1d(FEATURES).double()
    model = nn.Sequential(norm, nn.Dropout(0.5), smooth())
    criterion = build("cure", bounds=None)
    calls: list[bool] = []
    hook = model.register_forward_pre_hook(lambda module, args: calls.append(module.training))
    torch.manual_seed(0)
    loss = criterion(model, x, target)
    hook.remove()
    assert calls == [True, False, False]
    assert all(module.training for module in model.modules())
    assert norm.num_batches_tracked == 1
    grads = grads_of(loss, model)
    torch.manual_seed(0)
    norm.reset_running_stats()
    ce = losses(model, x, target).mean()
    model.eval()
    first = gradient(model, x, target, create_graph=True) / BATCH
    sign = first.detach().sign()
    second = gradient(model, x + 3 * sign / sign.norm(dim=1, keepdim=True), target, create_graph=True) / BATCH
    expected = ce + LAM * (second - first).norm(dim=1).mean()
    torch.testing.assert_close(loss, expected, **CLOSE)
    for one, other in zip(grads, grads_of(expected, model), strict=True):
        torch.testing.assert_close(one, other, **CLOSE)


# ---- Mixup, and ELLE on top


def mixed_target(x, start, mixed, model, target):
    """What AdvMixUp's points say of the mixture."""
    vertex = (x + 2 * (ball(start + EPS * gradient(model, start, target).sign(), x) - x)).clamp(0, 1)
    beta = ((mixed - vertex) * (x - vertex)).sum(dim=1) / (x - vertex).square().sum(dim=1)
    torch.testing.assert_close(mixed, beta[:, None] * x + (1 - beta[:, None]) * vertex, **CLOSE)
    assert beta.min() >= 0
    assert beta.max() <= 1
    one_hot = F.one_hot(target, CLASSES).double()
    smoothed = 0.1 * one_hot + 0.9 / (CLASSES - 1) * (1 - one_hot)
    return beta[:, None] * one_hot + (1 - beta[:, None]) * smoothed


def test_advmixup_mixes_points_and_labels():
    (x, target), criterion, model = batch(), build("advmixup-single"), smooth()
    loss, (start, mixed) = step(criterion, model, x, target)
    check(criterion, loss, losses(model, mixed, mixed_target(x, start, mixed, model, target)).mean(), model)


@pytest.mark.parametrize("name", [name for name in NAMES if name.endswith("+elle")])
def test_elle_on_top_of_another_method(name):
    (x, target), criterion, model = batch(), build(name), smooth()
    loss, points = step(criterion, model, x, target)
    base = name.removesuffix("+elle")
    if base == "n-fgsm":
        start = points[0]
        x_adv = (start + EPS * gradient(model, start, target).sign()).clamp(0, 1)
        torch.testing.assert_close(points[1][:BATCH], x_adv, **CLOSE)
        expected = losses(model, x_adv, target).mean()
    elif base == "advmixup-single":
        mixed = points[1][:BATCH]
        target = mixed_target(x, points[0], mixed, model, target)
        expected = losses(model, mixed, target).mean()
    elif base == "plain":
        assert torch.equal(points[0][:BATCH], x)
        expected = losses(model, x, target).mean()
    else:
        # The base's own weights, whatever lam is.
        x_adv, guided = points[2], base.startswith("gat")
        penalty = 10 * guide("gat", model(x), model(x_adv)) if guided else 6 * kl(model, x, x_adv)
        expected = losses(model, x_adv if base == "gat-fgsm" else x, target).mean() + penalty
        assert len(points[3]) == 3 * BATCH
    error = e_lin(model, points[-1], target)
    torch.testing.assert_close(criterion.stats["e_lin"], error.detach(), **CLOSE)
    assert criterion.stats["lam"] == LAM
    check(criterion, loss, expected + LAM * error, model)


@pytest.mark.parametrize("name", [name for name in NAMES if name.endswith("+elle-a")])
def test_elle_a_on_top_of_another_method_updates_lam(name):
    """E_lin jumps with the logits, and so does lam."""
    (x, target), criterion, model = batch(), build(name), smooth()
    found = []
    for _ in range(6):
        criterion(model, x, target).backward()
        found.append(float(criterion.stats["lam"]))
    assert found[:3] == [0, 0, 0]
    with torch.no_grad():
        model.last.weight.mul_(30)
    criterion(model, x, target)
    assert criterion.stats["lam"] == LAM
    criterion.eval()
    criterion(model, x, target)
    assert criterion.stats["lam"] == LAM


@pytest.mark.parametrize("base", ["gat", "trades-single"])
def test_the_levers_of_elle_a_on_top(base):
    (x, target), model = batch(), smooth()
    criterion = build(f"{base}+elle-a", skip_below=1.0, triplet_fraction=0.5)
    torch.manual_seed(1)
    loss, points = step(criterion, model, x, target)
    assert len(points[3]) == 3 * BATCH // 2
    assert criterion.stats["light_steps"] == 1
    assert isinstance(criterion, PlusELLE)
    torch.manual_seed(1)
    plain = methods.build(base, eps=EPS, lam=10.0 if base == "gat" else 6.0, bounds=(0.0, 1.0))(model, x, target)
    for one, other in zip(grads_of(loss, model), grads_of(plain, model), strict=True):
        assert torch.equal(one, other)


def test_lagged_elle_a_on_top_has_the_lam_of_the_step_before():
    (x, target), model = batch(), smooth()
    criterion = build("gat+elle-a", lagged=True)
    before = 0.0
    for gain in (1, 1, 1, 30, 1):
        with torch.no_grad():
            model.last.weight.mul_(gain)
        criterion(model, x, target)
        assert criterion.stats["lam"] == before
        before = float(criterion.controller.lam)
    assert before == LAM * 0.99 or before == LAM


# ---- The table


@pytest.mark.parametrize(
    "name, message",
    [
        ("trades", r"method: expected one of 'plain', .*'elle-2p', .*, got 'trades'$"),
        ("trades+elle-a", r"method: expected one of 'plain', .* got 'trades\+elle-a': 'trades' is no method"),
        ("gradalign+elle", r"got 'gradalign\+elle': it is a regulariser of local linearity itself"),
        ("fgsm+elle-a", r"FGSM with E_lin is 'elle' or 'elle-a'"),
        ("elle-2p+elle", "it has E_lin already"),
        ("pgd-at+elle-a", "E_lin is against the overfitting to single-step attacks"),
        ("free-at+elle", "E_lin is against the overfitting to single-step attacks"),
        ("free-at+advlc", "one backward pass gives delta's gradient too"),
        ("plain+advlc", "it has no adversarial points"),
        ("cure+advlc", "it has no adversarial points"),
        ("advlc+advlc", "it has it already"),
        ("advlc+elle-a", "E_lin is against the overfitting to single-step attacks"),
        ("elle-a+elle", "it has E_lin already"),
        ("nuat+elle+elle-a", "each can be added once, in the order elle, elle-a, advlc, awp; of ELLE and ELLE-A one"),
        ("gat+advlc+elle", "each can be added once, in the order"),
        ("gat+advlc+advlc", "each can be added once, in the order"),
        ("fgsm+gradalign", "'gradalign' cannot be added; what can be is elle, elle-a, advlc, awp"),
        ("gat+elle-2p", "'elle-2p' cannot be added"),
        ("gat+", "'' cannot be added"),
        ("+elle", "'' is no method"),
    ],
)
def test_what_is_no_method_is_refused_with_the_reason(name, message):
    with pytest.raises(ValueError, match=message):
        methods.find(name)


def test_a_name_of_another_type():
    with pytest.raises(TypeError, match="method: expected one of"):
        methods.find(3)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    "options, message",
    [
        (
            {"method": "fgsm", "skip_below": 0.1},
            r"^skip_below: method 'fgsm' has no E_lin term, so this option does not apply \(got 0.1\)",
        ),
        ({"method": "gat+elle-a", "forward": "split"}, "^forward: .* takes skip_below, triplet_fraction, lagged"),
        ({"method": "elle-2p", "points": "five-point"}, "^points: method 'elle-2p' takes forward, triplet_fraction,"),
        ({"method": "gat+elle", "points": "elle-2p"}, "points: expected one of 'elle', 'five-point', got 'elle-2p'"),
        ({"method": "fgsm", "triplets": 2}, r"^triplets: method 'fgsm' has no E_lin .*\(got 2\)"),
        ({"method": "gat+elle", "lagged": True}, "lagged: .*; method 'gat\\+elle-a' takes it"),
        ({"method": "slat", "lam": 1.0}, r"^lam: method 'slat' has no weight, .*\(got 1.0\)"),
        ({"method": "gat", "lam": -1.0}, "lam: expected a finite number in"),
        ({"method": "fast-bat", "lam": 0.0}, r"lam: expected a finite number in \(0"),
    ],
)
def test_settings_that_a_method_does_not_take(options, message):
    with pytest.raises(ValueError, match=message):
        TrainConfig(**options).resolved()


@pytest.mark.parametrize(
    "options, lam",
    [
        ({"method": "gradalign", "eps": 8 / 255}, 0.2),
        ({"method": "gradalign", "eps": 16 / 255}, 2.0),
        ({"method": "gradalign", "eps": 26 / 255}, 2.0),
        ({"method": "rs-aaer", "eps": 12 / 255}, 2.75),
        ({"method": "n-aaer", "eps": 16 / 255}, 1.5),
        ({"method": "n-aaer", "eps": 15 / 255, "data": "cifar100"}, 0.5),
        ({"method": "gradalign", "eps": 1 / 255, "data": "svhn"}, 1.66),
        ({"method": "gradalign", "eps": 12 / 255, "data": "svhn"}, 3.16),
        ({"method": "elle", "schedule": "long"}, 10_000.0),
        ({"method": "elle-a", "schedule": "long-cos"}, 10_000.0),
        ({"method": "elle-a", "schedule": "constant"}, 4_000.0),
        ({"method": "n-fgsm+elle-a", "schedule": "long"}, 4_000.0),
        ({"method": "cure"}, 4.0),
        ({"method": "gat"}, 10.0),
        ({"method": "nuat"}, 4.5),
        ({"method": "trades-single"}, 6.0),
        ({"method": "advlc"}, 0.3),
        ({"method": "mart"}, 5.0),
        ({"method": "mart", "model": "wideresnet28-10"}, 6.0),
        ({"method": "fast-bat"}, 10.0),
        ({"method": "gat+elle-a"}, 10_000.0),
        ({"method": "gat+elle-a", "model": "wideresnet28-10"}, 50_000.0),
        ({"method": "trades-single+elle-a"}, 10_000.0),
        ({"method": "advmixup-single+elle-a"}, 5_000.0),
        ({"method": "n-fgsm+elle-a", "data": "svhn"}, 5_000.0),
        ({"method": "slat"}, None),
    ],
)
def test_default_weights_are_the_papers(options, lam):
    assert TrainConfig(**{"data": "cifar10", **options}).resolved().lam == pytest.approx(lam)


@pytest.mark.parametrize("name", NAMES)
def test_the_weights_are_those_of_the_methods_that_take_one(name):
    assert (presets.weight(name) is None) == ("lam" not in TABLE[name].takes)
    assert all(methods.find(method) for row in presets.TABLE for method in row.methods)
    criterion = built(name, eps=8 / 255)
    assert getattr(criterion, "lam", None) in (None, presets.weight(name))


def test_every_weight_is_the_default_of_some_run():
    """No row is hidden by those above it."""
    for row in presets.TABLE:
        eps = row.eps_from or 8 / 255
        lam = row.lam(eps) if callable(row.lam) else row.lam
        data, schedule = row.data or "image-folder", row.schedule or "short"
        for method in row.methods:
            assert presets.weight(method, data, schedule=schedule, model=row.model, eps=eps) == lam, row


def test_the_command_line_lists_every_method_with_cost_and_source(capsys):
    assert cli.main(["methods"]) == 0
    lines = {line.split()[0]: line for line in capsys.readouterr().out.splitlines() if line}
    for name, row in TABLE.items():
        assert f" {row.units:g} " in lines[name]
        assert all(text in lines[name] for text in (row.passes, row.source, row.about))
        assert len(lines[name]) <= 120


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize(
    "target", [torch.zeros(BATCH, dtype=torch.int32), torch.zeros(BATCH - 1, dtype=torch.int64), None], ids=str
)
def test_a_wrong_target_is_refused_before_the_model_sees_the_batch(name, target):
    with pytest.raises((TypeError, ValueError), match=rf"^target: expected int64 class indices \[{BATCH}\]"):
        build(name)(MustNotBeCalled(), batch()[0], target)


@pytest.mark.parametrize("name", [name for name in NAMES if name.startswith("advmixup")])
def test_vertex_mixup_takes_class_indices_alone(name):
    with pytest.raises(ValueError, match=rf"^target: expected int64 class indices \[{BATCH}\], got a tensor"):
        build(name)(MustNotBeCalled(), batch()[0], torch.ones(BATCH, CLASSES))
