"""What makes a step of ELLELoss cheap, each lever against the step without it."""

from __future__ import annotations

import copy
import itertools
import math
import os
import pickle
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils import checkpoint

from elle_fast import AdaptiveLambda, ELLELoss, attacks, recompute
from elle_fast.adaptive import _Sent
from elle_fast.testing import no_host_sync
from tests.helpers import Recorder, Smooth, convnet, grads_of, labels, random, rng, shown

EPS, BATCH = 0.1, 4
IMAGES = (BATCH, 3, 8, 8)

# Layouts and options that decide how the batch is cut into forward passes.
LAYOUTS: list[dict[str, Any]] = [
    {},
    {"points": "elle-2p", "triplets": 2, "triplet_fraction": 0.5},
    {"points": "five-point", "attack": "n-fgsm"},
    {"triplets": 2, "alpha": "argmax", "triplet_fraction": 0.3},
]


def data(shape: tuple[int, ...] = IMAGES, seed: int = 1) -> tuple[Tensor, Tensor]:
    return random(*shape, seed=seed), labels(shape[0], 4, seed=seed)


def buffers_of(model: nn.Module) -> list[Tensor]:
    return [buffer.clone() for buffer in model.buffers()]


def same(one: list[Tensor], other: list[Tensor]) -> bool:
    return len(one) == len(other) and all(map(torch.equal, one, other))


def losses_of(output: Any, target: Tensor) -> Tensor:
    return F.cross_entropy(output, target, reduction="none")


# ---- forward="checkpoint"


def without_recomputation(function: Any, callees: Any, again: Any, *inputs: Any) -> Any:
    return function(*callees, *inputs)


@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize(
    "options", [*LAYOUTS, {"logits": lambda output: 2 * output}, {"loss_fn": losses_of}], ids=shown
)
def test_checkpoint_is_the_same_forward_passes_to_the_bit(options, autocast, monkeypatch):
    """Dropout masks, autocast and running statistics included: only when activations are made differs."""
    x, y = data()
    results = []
    for plain in (False, True):
        if plain:
            monkeypatch.setattr("elle_fast.linearity.checkpointed", without_recomputation)
        model = convnet(dropout=True)
        criterion = ELLELoss(EPS, lam=30.0, forward="checkpoint", generator=rng(1), **options)
        torch.manual_seed(3)
        with torch.autocast("cpu", torch.bfloat16) if autocast else nullcontext():
            loss = criterion(model, x, y)
        buffers = buffers_of(model)
        noise = torch.rand(3)  # the recomputation may not turn the generator back
        state = torch.get_rng_state()
        grads = grads_of(loss, model)
        assert torch.equal(torch.get_rng_state(), state)
        assert same(buffers_of(model), buffers)
        results.append([loss.detach(), noise, *grads, *buffers])
    assert same(*results)
    assert all(value.isfinite().all() for value in results[0])


def test_checkpoint_has_the_gradients_of_the_packed_mode():
    """In float64 to its rounding; tests/test_loss.py has it for every variant against Algorithm 1 written out."""
    model, (x, y) = convnet(norm=False).double(), data()
    grads = [
        grads_of(ELLELoss(EPS, lam=30.0, forward=forward, generator=rng(1))(model, x.double(), y), model)
        for forward in ("packed", "checkpoint")
    ]
    for one, other in zip(*grads, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-9, atol=1e-12)


def test_checkpoint_counts_a_batch_for_batch_norm_per_point():
    model, (x, y) = convnet(), data()
    ELLELoss(EPS, forward="checkpoint", triplets=2)(model, x, y).backward()
    # The attack, x_adv, and three points of each triplet; the same number again is recomputed.
    assert model[1].num_batches_tracked.item() == 2 + 2 * 3  # type: ignore[index]


class Callees:
    """The same network, reached in ways in which its buffers are harder to find."""

    def __init__(self) -> None:
        self.net = convnet()

    def method(self, x: Tensor) -> Any:
        return self.net(x)


def shared_norm() -> nn.Module:
    norm = nn.BatchNorm2d(3)
    other = nn.BatchNorm2d(3)
    other.running_mean = norm.running_mean
    return nn.Sequential(norm, other, convnet())


def spectral() -> nn.Module:
    """Its buffers decide its output, and each forward pass changes them."""
    model = convnet()
    torch.manual_seed(0)
    nn.utils.parametrizations.spectral_norm(model[0])  # type: ignore[index]
    return model


@pytest.mark.parametrize("reach", ["module", "function", "method", "logits", "loss_fn"])
@pytest.mark.parametrize("make", [convnet, shared_norm, spectral])
def test_checkpoint_leaves_buffers_alone_however_the_model_is_called(reach, make, monkeypatch):
    x, y = data()
    results = []
    for plain in (False, True):
        if plain:
            monkeypatch.setattr("elle_fast.linearity.checkpointed", without_recomputation)
        callees = Callees()
        callees.net = model = make()
        called: Any = {"module": model, "function": lambda p, m=model: m(p), "method": callees.method}.get(reach)
        options: dict[str, Any] = {}
        if called is None:
            called = nn.Identity()
            options = {"logits": model} if reach == "logits" else {"loss_fn": lambda o, t, m=model: losses_of(m(o), t)}
        criterion = ELLELoss(EPS, lam=30.0, forward="checkpoint", generator=rng(1), **options)
        loss = criterion(called, x, y)
        results.append([loss.detach(), *grads_of(loss, model), *buffers_of(model)])
    assert same(*results)


class Counting(nn.Module):
    """A model whose calls differ: by what, and by how much."""

    def __init__(self, change: Callable[[int, Tensor, Tensor], Tensor]) -> None:
        super().__init__()
        self.net, self.change, self.calls = Smooth(3 * 8 * 8, 4), change, 0

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        return self.change(self.calls, x, self.net(x))


def drawn(calls: int, x: Tensor, output: Tensor) -> Tensor:
    return output + torch.from_numpy(np.random.default_rng().normal(size=output.shape)).to(output.dtype)


def in_place(calls: int, x: Tensor, output: Tensor) -> Tensor:
    x.data.mul_(0.9)  # behind autograd's back
    return output


DIFFERENT: dict[str, Callable[[int, Tensor, Tensor], Tensor]] = {
    "a counter": lambda calls, x, output: output * calls,
    "one row": lambda calls, x, output: output + (torch.arange(output.shape[0]) == 0)[:, None] * 0.1 * calls,
    "NumPy's random numbers": drawn,
    "its input changed in place": in_place,
    "another dtype": lambda calls, x, output: output.double() if calls > 5 else output,
    "NaN": lambda calls, x, output: output * math.nan if calls > 5 else output,
}


@pytest.mark.parametrize("change", DIFFERENT)
def test_a_recomputation_that_differs_is_an_error(change):
    model, (x, y) = Counting(DIFFERENT[change]), data()
    loss = ELLELoss(EPS, forward="checkpoint")(model, x, y)
    with pytest.raises(RuntimeError, match=r"forward='checkpoint': expected the model to repeat its output"):
        loss.backward()


@pytest.mark.parametrize("norm, dropout", [(True, False), (False, True)])
def test_a_change_of_mode_before_the_backward_pass_is_an_error(norm, dropout):
    model, (x, y) = convnet(norm=norm, dropout=dropout), data()
    loss = ELLELoss(EPS, forward="checkpoint")(model, x, y)
    buffers = buffers_of(model)
    model.eval()
    with pytest.raises(RuntimeError):  # torch's own, where it is another number of tensors that the graph needs
        loss.backward()
    assert same(buffers_of(model), buffers)


@pytest.mark.parametrize("change", [name for name in DIFFERENT if name != "another dtype"])
def test_where_looking_would_wait_a_difference_makes_the_gradients_nan(change, monkeypatch):
    monkeypatch.setattr(recompute, "_raises", lambda device: False)
    model, (x, y) = Counting(DIFFERENT[change]), data()
    loss = ELLELoss(EPS, forward="checkpoint")(model, x, y)
    with no_host_sync():
        loss.backward()
    assert loss.isfinite()
    assert all(p.grad is not None and p.grad.isnan().all() for p in model.parameters())


def test_where_looking_would_wait_gradients_are_the_same(monkeypatch):
    x, y = data()
    results = []
    for _ in range(2):
        model = convnet(dropout=True)
        torch.manual_seed(3)
        loss = ELLELoss(EPS, forward="checkpoint", generator=rng(1))(model, x, y)
        results.append(grads_of(loss, model))
        monkeypatch.setattr(recompute, "_raises", lambda device: False)
    assert same(*results)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_a_recomputation_may_differ_by_rounding(dtype):
    """Two roundings of the largest output pass, four times the documented tolerance does not."""
    x, y = data()
    eps = torch.finfo(dtype).eps
    for size, fails in ((2 * eps, False), (4 * max(4 * eps, 2.0**-13), True)):

        def change(calls: int, x: Tensor, output: Tensor, size: float = size) -> Tensor:
            return output + size * output.detach().abs().max() * (calls > 5)

        model = Counting(change).to(dtype)
        loss = ELLELoss(EPS, forward="checkpoint", dtype=dtype)(model, x, y)
        with pytest.raises(RuntimeError) if fails else nullcontext():
            loss.backward()
            assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_model_that_has_diverged_does_agree_with_itself(value):
    model, (x, y) = Smooth(3 * 8 * 8, 4), data()
    with torch.no_grad():
        model.last.bias[1] = value
    loss = ELLELoss(EPS, forward="checkpoint", attack="none")(model, x, y)
    loss.backward()
    assert not loss.isfinite()


def test_buffers_come_back_when_the_recomputation_fails():
    model, (x, y) = convnet(), data()
    loss = ELLELoss(EPS, forward="checkpoint")(model, x, y)
    kept = list(model.buffers())

    def failing(*_: Any) -> None:
        raise OSError("no more")

    model.register_forward_hook(failing)
    with pytest.raises(OSError, match="no more"):
        loss.backward()
    assert all(one is other for one, other in zip(model.buffers(), kept, strict=True))


def test_a_graph_that_is_kept_can_be_used_twice():
    model, (x, y) = spectral(), data()
    loss = ELLELoss(EPS, forward="checkpoint")(model, x, y)
    parameters = list(model.parameters())
    first = torch.autograd.grad(loss, parameters, retain_graph=True)
    assert same(list(first), list(torch.autograd.grad(loss, parameters)))


def test_checkpoint_without_a_graph():
    model, (x, y) = convnet(), data()
    with torch.no_grad():
        loss = ELLELoss(EPS, forward="checkpoint")(model, x, y)
    assert loss.isfinite()
    assert not loss.requires_grad


def test_a_model_that_is_checkpointed_itself():
    x, y = data()
    inner = convnet(dropout=True)
    results = []
    for wrapped in (False, True):
        torch.manual_seed(3)
        model: Any = (lambda p: checkpoint.checkpoint(inner, p, use_reentrant=False)) if wrapped else inner
        loss = ELLELoss(EPS, forward="checkpoint", generator=rng(1))(model, x, y)
        results.append(grads_of(loss, inner))
    assert same(*results)


@pytest.mark.parametrize("options", [{}, {"logits": lambda output: output}], ids=shown)
def test_checkpoint_of_a_compiled_model(options):
    x, y = data()
    results = []
    for compiled in (False, True):
        model = convnet()
        called: Any = torch.compile(model, backend="aot_eager") if compiled else model
        criterion = ELLELoss(EPS, forward="checkpoint", generator=rng(1), **options)
        for _ in range(2):
            loss = criterion(called, x, y)
            loss.backward()
        results.append([loss.detach(), *(p.grad for p in model.parameters()), *buffers_of(model)])
    # The same operators, of which some see another memory format.
    for one, other in zip(*results, strict=True):
        torch.testing.assert_close(one, other)


# ---- skip_below


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
    """50 steps of SGD with lam 0 in some and lam_max in others: the same weights and statistics, to the bit."""
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
        results.append([*losses, *model.state_dict().values(), *criterion.state_dict().values()])
    assert same(*results)


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


@pytest.mark.parametrize("forward", ["split", "checkpoint"])
def test_light_steps_feed_batch_norm_as_full_ones(forward):
    x, y = data()
    found = []
    for skip_below in (None, 1.0):
        model = convnet()
        ELLELoss(EPS, adaptive=True, skip_below=skip_below, forward=forward, generator=rng(1))(model, x, y).backward()
        found.append(buffers_of(model))
    assert same(*found)


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
        controller._sent = _Sent(controller.lam, controller.lam._version, torch.tensor(99.0), event)  # type: ignore[arg-type]
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


# ---- triplet_fraction


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


# ---- Bad input


@pytest.mark.parametrize(
    "error, message, options",
    [
        (ValueError, r"skip_below: expected a finite number in \[0, 1\], got -0.1", {"skip_below": -0.1}),
        (ValueError, r"skip_below: expected a finite number in \[0, 1\], got 1.01", {"skip_below": 1.01}),
        (ValueError, r"skip_below: expected a finite number in \[0, 1\], got nan", {"skip_below": math.nan}),
        (TypeError, r"skip_below: expected a finite number in \[0, 1\], got '0'", {"skip_below": "0"}),
        (TypeError, r"skip_below: expected a finite number in \[0, 1\], got True", {"skip_below": True}),
        (ValueError, r"skip_below: only ELLE-A has a history", {"skip_below": 0.0, "adaptive": False}),
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


# ---- Memory


def peak_bytes(step: Callable[[], Any]) -> int:
    """The most memory that a step on the CPU holds beyond what there was before it."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        step()
    results = profile.profiler.kineto_results
    events = [(e.start_ns(), e.nbytes()) for e in results.events() if e.name() == "[memory]"]
    held: list[int] = list(itertools.accumulate(size for _, size in sorted(events, key=lambda event: event[0])))
    return max(held)


def deep() -> nn.Module:
    """Its activations are most of what a step holds, as in a convolutional network: 24 times [512, 64]."""
    torch.manual_seed(0)
    layers = [layer for n in range(24) for layer in (nn.Linear(64 if n else 8, 64), nn.Tanh())]
    return nn.Sequential(*layers, nn.Linear(64, 4))


@pytest.fixture(scope="module")
def peaks() -> dict[str, float]:
    """Peak memory of a step, in units of an FGSM step's."""
    model, x, y = deep(), random(512, 8, seed=1), labels(512, 4)
    for p in model.parameters():
        p.grad = torch.zeros_like(p)

    def fgsm() -> None:
        F.cross_entropy(model(attacks.fgsm(model, x, y, EPS)), y).backward()

    def elle(**options: Any) -> Callable[[], None]:
        criterion = ELLELoss(EPS, **options)
        return lambda: criterion(model, x, y).backward()

    steps = {
        "fgsm": fgsm,
        "packed": elle(),
        "split": elle(forward="split"),
        "checkpoint": elle(forward="checkpoint"),
        "light": elle(adaptive=True, skip_below=1.0, forward="checkpoint"),
    }
    found = {}
    for name, step in steps.items():
        step()
        found[name] = float(peak_bytes(step))
    return {name: value / found["fgsm"] for name, value in found.items()}


def test_peak_memory_of_checkpoint_is_that_of_one_point(peaks):
    assert peaks["checkpoint"] < 1.2
    assert peaks["light"] < 1.2
    # What it saves, or nothing is measured here.
    assert peaks["packed"] > 3
    assert peaks["split"] > 3


@pytest.mark.parametrize("forward", ["packed", "split", "checkpoint"])
def test_a_light_step_keeps_activations_of_x_adv_alone(forward):
    model, (x, y) = convnet(), data()

    def kept(step: Callable[[], Tensor]) -> int:
        sizes: dict[int, int] = {}

        def pack(tensor: Tensor) -> Tensor:
            sizes[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            loss = step()  # alive until the sizes are added up, so that no address is used twice
        assert loss.requires_grad
        return sum(sizes.values())

    x_adv = attacks.fgsm(model, x, y, EPS)
    light = ELLELoss(EPS, adaptive=True, skip_below=1.0, forward=forward)
    full = ELLELoss(EPS)
    one = kept(lambda: F.cross_entropy(model(x_adv), y))
    # Beyond those: the packed points (x_adv is a view of them) and logits, a few numbers a row.
    more = 4 * x.numel() * 4 + 4 * BATCH * 32 * 4
    assert kept(lambda: light(model, x, y, x_adv)) <= one + more
    assert kept(lambda: full(model, x, y, x_adv)) > one + more


# ---- DistributedDataParallel

RANKS = 2
DISTRIBUTED: dict[str, dict[str, Any]] = {
    "packed": {},
    "split": {"forward": "split"},
    "checkpoint": {"forward": "checkpoint"},
    "light": {"skip_below": 1.0, "forward": "checkpoint"},
    "light packed": {"skip_below": 1.0},
    "argmax": {"alpha": "argmax", "attack": "n-fgsm"},
}


def worker(rank: int, folder: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=RANKS)
    found: dict[str, Any] = {}
    for name, options in DISTRIBUTED.items():
        model, alone = convnet().double(), convnet().double()
        wrapper = DistributedDataParallel(model)
        calls: list[int] = []
        wrapper.register_forward_pre_hook(lambda module, args, calls=calls: calls.append(args[0].shape[0]))
        criteria = [ELLELoss(EPS, AdaptiveLambda(9.0, min_history=1), generator=rng(rank), **options) for _ in "ab"]
        steps = []
        for step in range(3):
            x, y = data(seed=10 * step + rank)
            for each, called in zip(criteria, (wrapper, alone), strict=True):
                called.zero_grad()
                each(called, x.double(), y).backward()
            grads = [p.grad for p in model.parameters()]
            mean = [p.grad.clone() for p in alone.parameters()]  # type: ignore[union-attr]
            for grad in mean:
                dist.all_reduce(grad)
            steps.append({"grads": grads, "mean": [g / RANKS for g in mean], "lam": criteria[0].stats["lam"]})
        found[name] = {"steps": steps, "calls": calls, "batches": model[1].num_batches_tracked}  # type: ignore[index]
    torch.save(found, Path(folder) / f"{rank}.pt")
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    folder = tmp_path_factory.mktemp("ranks")
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(os.environ, "OMP_NUM_THREADS", "1")
        mp.spawn(worker, args=(str(folder),), nprocs=RANKS)  # type: ignore[attr-defined]
    return [torch.load(folder / f"{rank}.pt") for rank in range(RANKS)]


@pytest.mark.skipif(not dist.is_available(), reason="torch was built without torch.distributed")
@pytest.mark.parametrize("name", DISTRIBUTED)
def test_distributed_data_parallel(ranks, name):
    """One forward pass a step through the wrapper; gradients are the mean of what each rank has alone."""
    for rank in range(RANKS):
        found = ranks[rank][name]
        assert found["calls"] == 3 * [BATCH if name in ("split", "checkpoint", "light", "light packed") else 4 * BATCH]
        passes = {"packed": 2, "split": 3, "light packed": 3, "argmax": 2 + 12}.get(name, 5)
        assert found["batches"].item() == 3 * passes
        for step, other in zip(found["steps"], ranks[0][name]["steps"], strict=True):
            assert torch.equal(step["lam"], other["lam"])
            assert same(step["grads"], other["grads"])
            for one, expected in zip(step["grads"], step["mean"], strict=True):
                # Sums of two float64 numbers, divided before or after they are added up.
                torch.testing.assert_close(one, expected, rtol=1e-12, atol=1e-15)


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
