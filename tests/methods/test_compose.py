"""Methods put together by rule: the loss is the base's plus the terms that were added."""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from elle_fast import ELLELoss, methods, presets
from elle_fast.methods import TABLE, find
from elle_fast.methods.compose import PlusAdvLC
from elle_fast.methods.guided import Guided
from elle_fast.recipes import models
from elle_fast.recipes.config import TrainConfig
from elle_fast.testing import OpCounter, differentiable_inputs
from elle_fast.weighing import LinearityLoss
from tests.helpers import Called, about, built, labels, random
from tests.methods.cases import BATCH, CLASSES, CLOSE, EPS, LAM, batch, build, check, e_lin, smooth, step

BASES = [name for name in TABLE if "+" not in name]
# E_lin of AdvMixUp is of other targets: see test_methods.py.
WITH_ELLE = [name for name in BASES if "elle" not in TABLE[name].refuses and name != "advmixup-single"]
WITH_ADVLC = [name for name in BASES if "advlc" not in TABLE[name].refuses]


def alone(name):
    """The base, with its own weight."""
    return built(name, eps=EPS, bounds=(0.0, 1.0))


def change(model, x, x_adv):
    largest = (model(x) - model(x_adv)).abs().flatten().sort(descending=True).values
    return largest[: round(0.1 * BATCH * CLASSES)].sum() / BATCH


@pytest.mark.parametrize("base", WITH_ELLE)
def test_elle_is_added_to_any_single_step_method(base):
    """The base's loss is that of the base alone, with the same noise; E_lin is that of the last three points."""
    (x, target), model = batch(), smooth()
    criterion, plain = build(f"{base}+elle"), alone(base)
    torch.manual_seed(4)
    loss, points = step(criterion, model, x, target)
    error = e_lin(model, points[-1], target)
    if find(base).with_elle is None:
        torch.manual_seed(4)
        expected = plain(model, x, target, **about(plain, x))
        check(criterion, loss, expected + LAM * error, model)
    else:
        assert criterion.output is not None
        torch.testing.assert_close(criterion.output, model(points[-1][:BATCH]).detach(), **CLOSE)
        torch.testing.assert_close(loss.detach(), criterion.stats["ce"] + LAM * error.detach(), **CLOSE)
    assert criterion.stats["lam"] == LAM


@pytest.mark.parametrize("base", WITH_ADVLC)
def test_advlc_is_added_to_any_method_with_adversarial_points(base):
    (x, target), model = batch(), smooth()
    # lam is E_lin's, where it is there.
    lam, weight = (LAM, 0.3) if TABLE[base].levers else (None, LAM)
    criterion, plain = build(f"{base}+advlc"), built(base, eps=EPS, lam=lam, bounds=(0.0, 1.0))
    assert criterion.stats == {}
    torch.manual_seed(4)
    loss, points = step(criterion, model, x, target)
    assert torch.equal(points[-1], x)
    torch.manual_seed(4)
    expected, own = step(plain, model, x, target)
    assert plain.output is not None
    assert criterion.output is not None
    assert torch.equal(criterion.output, plain.output)
    # SLAT's second pass is not the model's own, and PCO's points have a graph.
    if base not in ("slat", "pco"):
        (x_adv, *_) = (each[:BATCH] for each in own if torch.equal(model(each)[:BATCH], plain.output))
        check(criterion, loss, expected + weight * change(model, x, x_adv), model)
    assert criterion.stats["advlc"] > 0
    torch.testing.assert_close(loss.detach(), (expected + weight * criterion.stats["advlc"]).detach(), **CLOSE)


@pytest.mark.parametrize(
    "name", ["elle-a", "plain+elle-a", "nuat+elle-a", "advmixup-single+elle-a", "n-fgsm+elle-a+advlc", "elle-a+advlc"]
)
def test_options_of_e_lin_reach_it_wherever_it_is(name):
    (x, target), model = batch(), smooth()
    criterion = build(name, window=4, penalty="smooth_l1", alpha="argmax", triplets=2)
    (inner,) = (part for part in criterion.modules() if isinstance(part, LinearityLoss))
    assert inner.controller is not None
    assert (inner.controller.window, inner.controller.lam_max) == (4, LAM)
    assert (inner.linearity.options.penalty, inner.linearity.options.triplets) == ("smooth_l1", 2)
    assert inner.linearity.ascends
    assert criterion(model, x, target).isfinite()
    assert inner.controller.history.count_nonzero() == 1


@pytest.mark.parametrize("name", ["elle", "plain+elle", "n-fgsm+elle-a", "elle-a+advlc"])
def test_l2_is_the_ball_of_attack_and_triplets(name):
    (x, target), model = batch(), smooth()
    eps = 0.5
    _, points = step(build(name, eps=eps, norm="l2", bounds=None), model, x, target)
    packed = next(each for each in reversed(points) if len(each) == 4 * BATCH)
    for block, most in zip(packed.chunk(4), (3 * eps if "n-fgsm" in name else eps, *[eps] * 3), strict=True):
        lengths = (block - x).flatten(1).norm(dim=1)
        assert lengths.max() <= most * (1 + 1e-6)
        assert lengths.min() > eps / 4 or (name == "plain+elle" and torch.equal(block, x))
    assert (packed[BATCH : 2 * BATCH] - x).abs().max() > eps / 4  # more than in the linf ball of this volume


def test_lam_follows_the_penalty():
    lams = [methods.build("nuat+elle-a", eps=EPS, penalty=penalty).lam for penalty in ("squared", "smooth_l1")]
    weight = presets.weight("nuat+elle-a")
    assert weight is not None
    assert lams == [weight, 2 * weight]
    with pytest.raises(ValueError, match=r"^lam: expected a number with penalty='abs'"):
        methods.build("elle-2p", eps=EPS, penalty="abs")
    assert methods.build("elle-2p", eps=EPS, penalty="abs", lam=2.0).lam == 2


def test_both_are_added():
    (x, target), model = batch(), smooth()
    criterion = build("nuat+elle-a+advlc", lam=0.0)
    torch.manual_seed(4)
    loss, points = step(criterion, model, x, target)
    torch.manual_seed(4)
    expected, own = step(alone("nuat"), model, x, target)
    assert len(points[-1]) == 3 * BATCH
    check(criterion, loss, expected + 0.3 * change(model, x, own[2]), model)
    assert {"lam", "e_lin", "skipped", "advlc"} <= criterion.stats.keys()


@pytest.mark.parametrize(
    "name", ["nuat+elle", "rs-fgsm+elle-a", "elle-a+advlc", "gat+advlc", "n-fgsm+elle+advlc", "pco+elle"]
)
def test_the_row_says_what_a_step_costs(name):
    row, model = find(name), models.build("mlp", in_shape=(40,), classes=10, width=40)
    x, target = random(8, 40, seed=1), labels(8, 10)
    criterion, forward, whole = build(name), OpCounter(x.device), OpCounter(x.device)
    with torch.no_grad(), forward:
        model(x)
    call = Called(criterion)
    call(model, x, target).backward()
    with differentiable_inputs(model), whole:
        call(model, x, target).backward()
    assert whole.flops / forward.flops == pytest.approx(row.units, abs=0.15)


@pytest.mark.parametrize(
    "name", ["slat+elle-a", "fast-bat+elle", "trades-single+advlc", "plain+elle-a", "pgi+elle-a+advlc"]
)
def test_they_are_copied_resumed_and_trained_by_name(name):
    (x, target), model = batch(), smooth()
    criterion = build(name)
    for _ in range(2):
        criterion(model, x, target, **about(criterion, x)).backward()
    resumed = build(name)
    resumed.load_state_dict(criterion.state_dict())
    found = []
    for each in (criterion, resumed, copy.deepcopy(criterion)):
        torch.manual_seed(3)
        found.append(each(model, x, target, **about(each, x)))
    assert all(torch.equal(loss, found[0]) for loss in found)
    config = TrainConfig(data="cifar10", method=name).resolved()
    assert config.lam == presets.weight(name)
    assert config.clamp == find(name).clamp


@pytest.mark.parametrize(
    "name, lam",
    [
        ("rs-fgsm+elle-a", 4_000),
        ("plain+elle", 5_000),
        ("nuat+elle-a", 10_000),
        ("n-fgsm+elle-a+advlc", 4_000),
        ("elle-a+advlc", 4_000),
        ("n-fgsm+advlc", 0.3),
    ],
)
def test_the_weight_is_that_of_e_lin_where_it_is_there(name, lam):
    assert presets.weight(name) == lam


# But LIET's, which is not uniform, and is of its attack too: test_liet.py.
SMOOTHED = [name for name in BASES if name != "liet"]


@pytest.mark.parametrize("name", [*SMOOTHED, "gat+elle", "nuat+elle-a", "slat+advlc", "elle-a+advlc"])
def test_label_smoothing_is_of_the_cross_entropy_that_is_trained_on(name):
    """The same points, and the same loss but for the smoothing of the logits there (of GAT, NuAT, TRADES: at x)."""
    (x, target), model = batch(), smooth()
    found = []
    for smoothing in (0.0, 0.3):
        torch.manual_seed(4)
        found.append(step(built(name, eps=EPS, bounds=(0.0, 1.0), label_smoothing=smoothing), model, x, target))
    (loss, points), (smoothed, others) = found
    assert all(torch.equal(one, other) for one, other in zip(points, others, strict=True))
    if name.startswith("advmixup"):  # its target is no label
        assert not torch.equal(loss, smoothed)
        return
    excess = []
    for point in points:
        logits = model(point)[:BATCH]
        excess.append((F.cross_entropy(logits, target, label_smoothing=0.3) - F.cross_entropy(logits, target)).item())
    if "slat" in name:
        excess.append((smoothed - loss).item())
    assert min(abs(each - (smoothed - loss).item()) for each in excess) < 1e-10
    assert abs(smoothed - loss) > 1e-3


@pytest.mark.parametrize("name", [*BASES, "gat+elle", "n-fgsm+elle-a", "advmixup-single+elle", "elle+advlc"])
def test_eps_may_be_set(name):
    (x, target), model = batch(), smooth()
    late, early = (built(name, eps=eps, bounds=(0.0, 1.0)) for eps in (EPS, 3 * EPS))
    early.eps = EPS
    assert early.eps == EPS
    found = []
    for criterion in (late, early):
        torch.manual_seed(4)
        found.append(criterion(model, x, target, **about(criterion, x)))
    assert torch.equal(*found)


def test_the_terms_of_a_call_do_not_outlive_it():
    (x, target), model = batch(), smooth()
    criterion = build("fgsm+advlc")
    assert isinstance(criterion, PlusAdvLC)
    with pytest.raises(ValueError, match="target"):
        criterion(model, x, target[:2])
    assert criterion.core._terms == ()


@pytest.mark.parametrize("name", ["gat+elle", "nuat+elle-a", "fast-bat+elle", "pgi+elle"])
def test_e_lin_on_top_of_a_model_with_batch_norm_and_dropout(name):
    """The first step finds out that it draws, and puts its buffers back, which the base's graph holds."""
    (x, target), norm = batch(), nn.BatchNorm1d(5).double()
    model = nn.Sequential(norm, nn.Dropout(0.3), smooth())
    for _ in range(2):
        criterion = build(name)
        criterion(model, x, target, **about(criterion, x)).backward()
    assert all(parameter.grad is not None for parameter in model.parameters())


def test_the_methods_own_weight_may_be_given_too():
    (x, target), model = batch(), smooth()
    for name, lam in (("gat+elle", 0.0), ("gat+advlc", 0.0), ("gat+elle-a+advlc+awp", 0.0)):
        criterion = methods.build(name, eps=EPS, lam=lam, base_lam=3.0)
        assert [each.lam for each in criterion.modules() if isinstance(each, Guided)] == [3.0]
    torch.manual_seed(4)
    loss = methods.build("gat+elle", eps=EPS, lam=0.0, base_lam=3.0)(model, x, target)
    torch.manual_seed(4)
    torch.testing.assert_close(loss, methods.build("gat", eps=EPS, lam=3.0)(model, x, target), **CLOSE)
    for name in ("gat", "n-fgsm+elle", "elle-a+advlc", "fgsm+advlc"):
        with pytest.raises(ValueError, match=rf"^base_lam: method '{name.replace('+', '.')}' has no second weight"):
            methods.build(name, eps=EPS, base_lam=3.0)


@pytest.mark.parametrize(
    "options, lam, base",
    [
        ({"method": "gat+elle-a"}, 10_000, 10),
        ({"method": "gat+elle-a", "data": "mnist"}, 1_000, 10),
        ({"method": "nuat+elle", "data": "digits"}, 300, 4.5),
        ({"method": "liet+elle-a", "data": "cifar100"}, 4_000, 200),
        ({"method": "gradalign+advlc", "data": "svhn"}, 0.3, 2.5),
        ({"method": "mart+advlc", "model": "wideresnet28-10"}, 0.3, 6),
        ({"method": "gat+elle-a", "penalty": "smooth_l1"}, 20_000, 10),
        ({"method": "gat+elle-a", "base_lam": 2.0}, 10_000, 2),
    ],
)
def test_a_runs_two_weights(options, lam, base):
    config = TrainConfig(**{"data": "cifar10", **options}).resolved()
    assert config.lam == lam
    assert config.base_lam == pytest.approx(base, rel=1e-2)


def test_options_of_what_is_inside_reach_it_or_are_refused():
    for name in ("gat+elle", "elle-a+advlc", "n-fgsm+awp", "advmixup-single+elle", "advmixup-single"):
        criterion = methods.build(name, eps=EPS)
        criterion.label_smoothing = 0.2
        assert criterion.core.label_smoothing == criterion.label_smoothing == 0.2
    for name in ("skip_below", "max_ratio", "controller"):
        with pytest.raises(AttributeError, match=r"set that of the base"):
            setattr(methods.build("elle-a+awp", eps=EPS), name, 0.1)
    with pytest.raises(ValueError, match=r"^label_smoothing: expected 0 with a loss of your own"):
        ELLELoss(EPS, loss_fn=F.cross_entropy).label_smoothing = 0.1


@pytest.mark.parametrize("name", ["cure", "liet", "cuap"])
def test_a_method_of_a_module_is_put_into_eval_mode_as_the_module_is(name):
    x, target = batch()
    counted = []
    for of in (lambda model: model, lambda model: model.forward):
        norm = nn.BatchNorm1d(5).double()
        torch.manual_seed(4)
        build(name)(of(nn.Sequential(norm, smooth())), x, target)
        counted.append(norm.num_batches_tracked)
    assert counted[0] == counted[1]
