"""forward="checkpoint" against the packed mode, and recompute.py where recomputations differ."""

from __future__ import annotations

import math
from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.utils import checkpoint

from elle_fast import ELLELoss, recompute
from elle_fast.testing import no_host_sync
from tests.helpers import Smooth, convnet, grads_of, rng, shown
from tests.levers.cases import EPS, LAYOUTS, buffers_of, data, losses_of, same


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
    """In float64 to its rounding; tests/loss has it for every variant against Algorithm 1 written out."""
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


DIFFERENT: dict[str, Callable[[int, Tensor, Tensor], Tensor]] = {
    "a counter": lambda calls, x, output: output * calls,
    "one row": lambda calls, x, output: output + (torch.arange(output.shape[0]) == 0)[:, None] * 0.1 * calls,
    "NumPy's random numbers": drawn,
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
