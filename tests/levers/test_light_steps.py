"""skip_below and triplet_fraction, each against the step without it."""

from __future__ import annotations

import copy
import math
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from elle_fast import AdaptiveLambda, ELLELoss, attacks, recompute
from elle_fast._core.host_copy import HostCopy
from elle_fast.methods.elle import PlusELLE
from elle_fast.testing import no_host_sync
from tests.helpers import Recorder, Smooth, built, convnet, grads_of, labels, random, rng, shown
from tests.levers.cases import BATCH, EPS, LAYOUTS, data, losses_of, same


def calls_of(model: nn.Module) -> tuple[Callable[[Tensor], Any], list[tuple[int, bool]]]:
    """The model, and of each call the rows and whether there was a graph."""
    calls: list[tuple[int, bool]] = []

    def counted(x: Tensor) -> Any:
        output = model(x)
        calls.append((x.shape[0], output.requires_grad))
        return output

    return counted, calls


def controller_of(criterion: ELLELoss) -> AdaptiveLambda:
    assert criterion.controller is not None
    return criterion.controller


def kinds(criterion: ELLELoss) -> tuple[int, int]:
    return int(criterion.stats["full_steps"]), int(criterion.stats["light_steps"])


@pytest.mark.parametrize(
    "options", [*LAYOUTS[:3], {"loss_fn": losses_of}, {"of": "logits"}, {"backend": "reference"}], ids=shown
)
def test_skipping_at_zero_is_exact_with_the_lag(options):
    """50 steps of SGD with lam 0 in some and lam_max in others: the same weights, to the bit."""
    results = []
    for skip_below in (None, 0.0):
        model = convnet()
        optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9, weight_decay=1e-3)
        criterion = ELLELoss(
            EPS,
            AdaptiveLambda(50.0, gamma=0.0, sensitivity=0.0, min_history=1, window=4),
            lagged=True,
            forward="split",
            skip_below=skip_below,
            generator=rng(1),
            **options,
        )
        losses = []
        for step in range(50):
            x, y = data(seed=step)
            # The fainter the images, the larger eps is for batch norm, and E_lin.
            loss = criterion(model, x * (0.2 if step % 3 == 0 else 1), y)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses.append(loss.detach())
        if skip_below is not None:
            full, light = kinds(criterion)
            assert min(full, light) >= 5
            assert full + light == 50
        # The running statistics are not: those of a light step's triplets do not count.
        results.append([*losses, *(each.detach() for each in model.parameters()), *criterion.state_dict().values()])
    assert same(*results)


@pytest.mark.parametrize("name", ["elle-a", "n-fgsm+elle-a", "trades-single+elle-a", "nuat+elle-a"])
def test_while_nothing_is_detected_the_model_is_that_of_the_base(name):
    """Ten steps of SGD in float64: weights and batch norm's statistics, to the rounding of two forms of one loss."""
    base = "fgsm" if name == "elle-a" else name.removesuffix("+elle-a")
    models = []
    for method in (base, name):
        torch.manual_seed(5)
        model = convnet().double()
        optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
        levers: dict[str, Any] = {"skip_below": 0.01, "triplet_fraction": 0.5} if method == name else {}
        criterion = built(method, eps=EPS, bounds=(0.0, 1.0), clamp="attack", **levers)
        if method == name:
            criterion.controller.sensitivity = 1e9
            if isinstance(criterion, PlusELLE):  # so that the base draws what it would alone
                criterion.linearity.generator = rng(1)
        for step in range(10):
            x, y = data(seed=step)
            optimizer.zero_grad()
            criterion(model, x.double(), y).backward()
            optimizer.step()
        models.append([each.detach().clone() for each in model.state_dict().values()])
    assert criterion.stats["light_steps"].item() == 10
    for one, other in zip(*models, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-9, atol=1e-12)


def test_a_light_step_leaves_instance_norm_alone():
    model, (x, y) = nn.Sequential(nn.InstanceNorm2d(3, track_running_stats=True), convnet(norm=False)), data()
    found = []
    for criterion in (built("fgsm", eps=EPS), ELLELoss(EPS, adaptive=True, skip_below=0.5)):
        again = copy.deepcopy(model)
        criterion(again, x, y)
        found.append([each.clone() for each in again.buffers()])
    torch.testing.assert_close(*found)  # one step of eps in two forms: a rounding apart
    assert not same(found[0], [each.clone() for each in model.buffers()])


def test_a_light_step_puts_batch_norm_back_as_it_was():
    """Also after an error, and only where it was tracking."""
    model, (x, y) = convnet(), data()
    norm, after = [*model.children()][1:3]
    assert isinstance(norm, nn.BatchNorm2d)
    criterion = ELLELoss(EPS, lam=5.0, adaptive=True, skip_below=0.5)
    criterion(model, x, y)
    assert norm.track_running_stats
    assert norm.num_batches_tracked is not None
    assert norm.num_batches_tracked.item() == 2  # the attack's pass and x_adv's

    def fail(*_: Any) -> None:
        if not norm.track_running_stats:
            raise ArithmeticError

    handle = after.register_forward_hook(fail)
    with pytest.raises(ArithmeticError):
        criterion(model, x, y)
    handle.remove()
    assert norm.track_running_stats
    norm.track_running_stats = False
    criterion(model, x, y)
    assert not norm.track_running_stats


def test_without_the_lag_a_detection_on_a_light_step_acts_one_step_later():
    model, x, y = Smooth(6, 4, gain=8.0).double(), random(5, 6, seed=1, dtype=torch.float64), labels(5, 4)
    criterion = ELLELoss(EPS, AdaptiveLambda(50.0, gamma=0.5), skip_below=0.1, generator=rng(1))
    exact = ELLELoss(EPS, AdaptiveLambda(50.0, gamma=0.5), generator=rng(1))
    lams, differs = [], []
    for step in range(9):
        # E_lin jumps once; then it is below the threshold that its jump has raised.
        gain = 3.0 if step == 4 else 1.0
        grads = [grads_of(each(lambda p, gain=gain: gain * model(p), x, y), model) for each in (criterion, exact)]
        assert torch.equal(criterion.stats["lam"], exact.stats["lam"])
        # The same numbers but for what another number of rows does to the order of a product's sums.
        torch.testing.assert_close(criterion.stats["loss"], exact.stats["loss"], rtol=1e-9, atol=0)
        lams.append(criterion.stats["lam"].item())
        differs.append(any((one - other).abs().max() > 1e-6 for one, other in zip(*grads, strict=True)))
    assert lams == [0, 0, 0, 0, 50, 25, 12.5, 6.25, 3.125]
    # Light are the steps that begin with lam <= 5: all up to the detection's own, and none after it before the last.
    assert differs == [False] * 4 + [True] + [False] * 4
    assert kinds(criterion) == (4, 5)
    criterion(model, x, y)
    assert kinds(criterion) == (4, 6)


@pytest.mark.parametrize("forward", ["packed", "split", "checkpoint"])
def test_a_light_step_has_a_graph_of_x_adv_alone(forward):
    model, (x, y) = convnet(norm=False), data()
    counted, calls = calls_of(model)
    criterion = ELLELoss(EPS, lam=5.0, adaptive=True, skip_below=0.5, forward=forward, generator=rng(1))
    loss = criterion(counted, x, y)
    apart = 3 if forward == "checkpoint" else 1
    assert calls == [(BATCH, True), (BATCH, True)] + apart * [(3 * BATCH // apart, False)]
    grads = grads_of(loss, model)
    assert len(calls) == 2 + apart  # and none is recomputed

    controller_of(criterion).lam.fill_(5.0)
    calls.clear()
    loss = criterion(counted, x, y)
    assert all(graph for _, graph in calls)
    assert kinds(criterion) == (1, 1)
    assert not same(grads, grads_of(loss, model))

    # The gradient of the loss of x_adv, which is made like that.
    x_adv = attacks.fgsm(model, x, y, EPS)
    for one, other in zip(grads, grads_of(F.cross_entropy(model(x_adv), y), model), strict=True):
        torch.testing.assert_close(one, other)
    plain = ELLELoss(EPS, lam=5.0, adaptive=True, forward=forward, generator=rng(1))
    plain(model, x, y)
    light = ELLELoss(EPS, lam=5.0, adaptive=True, forward=forward, generator=rng(1), skip_below=1.0)
    light(model, x, y)
    # E_lin is that of a full step, up to what other batch sizes do to a convolution's order of summation.
    torch.testing.assert_close(light.stats["e_lin"], plain.stats["e_lin"], rtol=1e-3, atol=0)


@pytest.mark.parametrize("attack", ["fgsm", "none"])
@pytest.mark.parametrize("alpha", ["uniform", "argmax"])
def test_light_steps_under_autocast_train_the_weights(attack, alpha):
    """A forward pass without a graph must not leave graphless casts of the weights to the next one with a graph."""
    model, (x, y) = convnet(norm=False), data()
    criterion = ELLELoss(EPS, adaptive=True, skip_below=1.0, attack=attack, alpha=alpha)
    with torch.autocast("cpu", torch.bfloat16):
        for _ in range(2):
            model.zero_grad()
            criterion(model, x, y).backward()
            assert all(p.grad is not None and p.grad.abs().max() > 0 for p in model.parameters())


def test_the_bounds_of_skip_below():
    model, (x, y) = convnet(), data()
    # 0.1 is larger in float32, which lam is held in.
    always = ELLELoss(EPS, lam=0.1, adaptive=True, skip_below=1.0)
    controller_of(always).lam.fill_(0.1)
    always(model, x, y)
    assert kinds(always) == (0, 1)
    never = ELLELoss(EPS, lam=0.1, adaptive=True)
    never(model, x, y)
    assert "light_steps" not in never.stats
    # In eval mode there is no step to count.
    always.eval()
    counted, calls = calls_of(model)
    always(counted, x, y)
    assert calls == [(BATCH, True), (4 * BATCH, True)]
    assert kinds(always) == (0, 1)


def test_stats_of_skip_below():
    model, (x, y) = convnet(), data()
    criterion = ELLELoss(EPS, adaptive=True, skip_below=0.0)
    assert criterion.stats == {}
    criterion(model, x, y)
    assert list(criterion.stats) == ["loss", "ce", "e_lin", "lam", "skipped", "full_steps", "light_steps"]
    for name in ("full_steps", "light_steps"):
        value = criterion.stats[name]
        assert (value.dtype, value.dim(), value.device.type) == (torch.int64, 0, "cpu")
    assert kinds(criterion) == (0, 1)
    for twin in (copy.deepcopy(criterion), pickle.loads(pickle.dumps(criterion))):
        assert kinds(twin) == (0, 1)
        assert repr(twin) == repr(criterion)
    assert list(criterion.state_dict()) == list(ELLELoss(EPS, adaptive=True).state_dict())


@pytest.mark.parametrize("skip_below, reads", [(None, 0), (0.0, 1), (1.0, 1)])
@pytest.mark.parametrize("forward", ["packed", "split", "checkpoint"])
def test_a_step_reads_one_number_and_that_is_the_lam_of_the_step_before(skip_below, reads, forward, monkeypatch):
    monkeypatch.setattr(recompute, "_raises", lambda device: False)
    model, (x, y) = convnet(), data()
    criterion = ELLELoss(EPS, AdaptiveLambda(4000.0, min_history=1), skip_below=skip_below, forward=forward)
    for _ in range(3):
        with Recorder() as recorder:
            criterion(model, x, y).backward()
            dict(criterion.stats)
        names = [name for name, _, _ in recorder.calls]
        assert names.count("_local_scalar_dense") == reads
        assert "_local_scalar_dense" not in names[reads:]  # it comes before anything else of the step
    # Nothing else waits: the number is given instead of read.
    monkeypatch.setattr(AdaptiveLambda, "on_host", lambda self: 0.0)
    with no_host_sync():
        for _ in range(2):
            criterion(model, x, y).backward()
            dict(criterion.stats)


class Waits:
    """Stands for a CUDA event."""

    def __init__(self) -> None:
        self.count = 0

    def synchronize(self) -> None:
        self.count += 1


def test_a_copy_of_lam_under_way_is_for_that_lam_alone():
    def sent() -> tuple[AdaptiveLambda, Waits]:
        controller, event = AdaptiveLambda(5.0), Waits()
        controller.lam.fill_(1.0)
        controller._sent = HostCopy(controller.lam, controller.lam._version, torch.tensor(99.0), event)  # type: ignore[arg-type]
        return controller, event

    controller, event = sent()
    assert (controller.on_host(), event.count) == (99.0, 1)
    controller.update(torch.tensor(1.0))
    assert [controller.on_host(), event.count] == pytest.approx([0.99, 1])
    for backend in ("reference", "auto"):
        controller, event = sent()
        ELLELoss(EPS, backend=backend)(convnet(), *data())
        controller.update(torch.tensor(1.0), backend)
        assert [controller.on_host(), event.count] == pytest.approx([0.99, 0])
    controller, event = sent()
    controller.load_state_dict(AdaptiveLambda(5.0).state_dict())
    assert (controller.on_host(), event.count) == (0.0, 0)
    controller, event = sent()
    for twin in (copy.deepcopy(controller), pickle.loads(pickle.dumps(controller)), copy.copy(controller)):
        assert (twin.on_host(), event.count) == (1.0, 0)
    controller.lam = controller.lam.clone()  # as a move to another device does
    assert (controller.on_host(), event.count) == (1.0, 0)


@pytest.mark.parametrize("resume", ["state_dict", "pickle", "copy"])
def test_a_resume_takes_the_same_kinds_of_steps(resume):
    def build() -> ELLELoss:
        return ELLELoss(EPS, AdaptiveLambda(50.0, gamma=0.3, sensitivity=0.5), skip_below=0.2, generator=rng(1))

    model, criterion = convnet(), build()
    for step in range(8):
        criterion(model, *data(seed=step))
    if resume == "state_dict":
        other = build()
        other.load_state_dict(criterion.state_dict())
        assert other.linearity.generator is not None
        assert criterion.linearity.generator is not None
        other.linearity.generator.set_state(criterion.linearity.generator.get_state())
    else:
        other = copy.deepcopy(criterion) if resume == "copy" else pickle.loads(pickle.dumps(criterion))
    twin, seen = copy.deepcopy(model), []
    for step in range(8, 20):
        before = kinds(criterion)
        assert torch.equal(criterion(model, *data(seed=step)), other(twin, *data(seed=step)))
        seen.append(kinds(criterion)[0] > before[0])
    assert True in seen
    assert False in seen
    assert (kinds(criterion)[0] - kinds(other)[0]) in (0, criterion.stats["full_steps"].item() - sum(seen))


@pytest.mark.parametrize("penalty", ["squared", "abs"])
@pytest.mark.parametrize("points", ["elle", "elle-2p", "five-point"])
@pytest.mark.parametrize("backend", ["reference", "auto"])
def test_a_light_step_has_the_gradient_of_the_cross_entropy_alone(points, penalty, backend):
    """Also of ELLE-2p, whose x_b is x_adv and has a graph."""
    model, (x, y) = Smooth(6, 3, gain=2.0), (random(5, 6, seed=1), labels(5, 3))
    options: dict[str, Any] = {"adaptive": True, "points": points, "penalty": penalty, "backend": backend}
    criterion = ELLELoss(0.2, 2e4, skip_below=1.0, lagged=True, generator=rng(1), **options)
    assert criterion.controller is not None
    criterion.controller.lam.fill_(2e4)
    loss = criterion(model, x, y)
    assert criterion.stats["light_steps"].item() == 1
    stats = criterion.stats
    torch.testing.assert_close(loss.detach(), stats["ce"] + stats["lam"] * stats["e_lin"])
    assert 2e4 * stats["e_lin"] > 0.01 * stats["ce"]
    found = torch.autograd.grad(loss, list(model.parameters()))
    plain = ELLELoss(0.2, 0.0, generator=rng(1), points=points, penalty=penalty, backend=backend)
    expected = torch.autograd.grad(plain(model, x, y), list(model.parameters()))
    for one, other in zip(found, expected, strict=True):
        # The roundings of a few products and sums in float32.
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-7)


def test_part_of_a_shuffled_batch_gives_an_unbiased_estimate():
    model, x, y = Smooth(6, 4, gain=8.0), random(16, 6, seed=1), labels(16, 4)
    x = x * torch.linspace(0.1, 3, 16)[:, None]  # samples of very different E_lin

    def draws(fraction: float, shuffled: bool, count: int) -> tuple[float, float]:
        """Mean of E_lin and its standard error."""
        # Many triplets, so that most of the spread is that of the samples drawn.
        criterion = ELLELoss(EPS, attack="none", triplets=32, triplet_fraction=fraction, generator=rng(2))
        source, found = rng(3), []
        for _ in range(count):
            order = torch.randperm(16, generator=source) if shuffled else torch.arange(16)
            criterion(model, x[order], y[order])
            found.append(criterion.stats["e_lin"])
        values = torch.stack(found)
        return values.mean().item(), values.std().item() / math.sqrt(count)

    mean, error = draws(1.0, False, 60)
    for fraction in (0.25, 0.5):
        part, part_error = draws(fraction, True, 400)
        # A chance of 6e-7 for each fraction, at fixed seeds.
        assert abs(part - mean) < 5 * math.hypot(error, part_error)
        assert part_error < 0.08 * mean  # so a bias of two fifths would show
    # The first samples of a batch in order are no such estimate.
    part, part_error = draws(0.25, False, 60)
    assert abs(part - mean) > 0.4 * mean + 5 * math.hypot(error, part_error)


def test_a_fraction_always_leaves_a_sample():
    model, (x, y) = convnet(norm=False), data()
    for fraction, samples in ((1e-300, 1), (0.25, 1), (0.26, 2), (1.0, 4)):
        counted, calls = calls_of(model)
        ELLELoss(EPS, triplet_fraction=fraction, attack="none")(counted, x, y)
        assert calls == [(BATCH + 3 * samples, True)]


@pytest.mark.parametrize(
    "error, message, options",
    [
        (ValueError, r"skip_below: expected a finite number in \[0, 1\], got -0.1", {"skip_below": -0.1}),
        (ValueError, r"skip_below: expected a finite number in \[0, 1\], got 1.01", {"skip_below": 1.01}),
        (ValueError, r"skip_below: expected a finite number in \[0, 1\], got nan", {"skip_below": math.nan}),
        (TypeError, r"skip_below: expected a finite number in \[0, 1\], got '0'", {"skip_below": "0"}),
        (TypeError, r"skip_below: expected a finite number in \[0, 1\], got True", {"skip_below": True}),
        (ValueError, r"skip_below: only ELLE-A moves lam", {"skip_below": 0.0, "adaptive": False}),
        (ValueError, r"forward: expected one of .*'checkpoint', got 'recompute'", {"forward": "recompute"}),
        (TypeError, r"forward: expected one of .*'checkpoint', got None", {"forward": None}),
        (ValueError, r"triplet_fraction: expected .*\(0, 1\], got 0", {"triplet_fraction": 0}),
        (ValueError, r"triplet_fraction: expected .*\(0, 1\], got 1.5", {"triplet_fraction": 1.5}),
        (ValueError, r"triplet_fraction: expected .*\(0, 1\], got nan", {"triplet_fraction": math.nan}),
    ],
    ids=shown,
)
def test_bad_options(error, message, options):
    with pytest.raises(error, match=message):
        ELLELoss(EPS, **{"adaptive": True, **options})


def test_repr_names_the_levers():
    criterion = ELLELoss(EPS, adaptive=True, forward="checkpoint", skip_below=0.25, triplet_fraction=0.5)
    for text in ("forward='checkpoint'", "skip_below=0.25", "triplet_fraction=0.5"):
        assert text in repr(criterion)
