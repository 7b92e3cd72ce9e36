"""The triplets' forward pass in a precision of its own, inside an autocast."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from elle_fast import AdaptiveLambda, ELLELoss, LocalLinearity, TrainingStep, capture, methods
from elle_fast.methods.awp import _Recorded
from tests.helpers import convnet, grads_of, rng, shown
from tests.levers.cases import BATCH, EPS, buffers_of, data, losses_of, same

LAM = 300.0
LAYOUTS: list[dict[str, Any]] = [
    {},
    {"points": "five-point", "attack": "n-fgsm"},
    {"triplets": 2, "alpha": "argmax", "triplet_fraction": 0.3},
    {"loss_fn": losses_of},
    {"of": "logits", "penalty": "abs"},
]


class Seen(nn.Module):
    """A model that notes the dtype that autocast has in each call, float32 without one, and the rows."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = convnet(norm=False)
        self.calls: list[tuple[int, torch.dtype]] = []

    def forward(self, x: Tensor) -> Tensor:
        on = torch.is_autocast_enabled("cpu")
        self.calls.append((len(x), torch.get_autocast_dtype("cpu") if on else torch.float32))
        logits: Tensor = self.inner(x)
        return logits


@pytest.mark.parametrize("forward", ["packed", "split", "checkpoint"])
@pytest.mark.parametrize("light", [False, True], ids=["full", "light"])
@pytest.mark.parametrize("options", LAYOUTS, ids=shown)
def test_exact_triplets_beside_a_cross_entropy_in_bf16(options, light, forward):
    """E_lin is that of float32, the cross-entropy that of bf16, and so are their parts of the gradient."""
    model, (x, y) = convnet(norm=False), data()
    x_adv = x + 0.05
    # Of a light step E_lin has no gradient; the lam there is not 0, so that the loss' value has it.
    weight: Any = AdaptiveLambda(LAM) if light else LAM
    criterion = ELLELoss(
        EPS, weight, forward=forward, triplet_precision="fp32", generator=rng(1), skip_below=1.0 if light else None,
        **options,
    )  # fmt: skip
    if criterion.controller is not None:
        criterion.controller.lam.fill_(LAM)
    rest = {name: value for name, value in options.items() if name != "attack"}
    alone = LocalLinearity(EPS, generator=rng(1), **rest)
    with torch.autocast("cpu", torch.bfloat16):
        loss = criterion(model, x, y, x_adv=x_adv)
        ce = F.cross_entropy(model(x_adv).float(), y)
        rounded = LocalLinearity(EPS, generator=rng(1), **rest)(model, x, y)
    grads = grads_of(loss, model)
    exact = alone(model, x, y)
    stats = criterion.stats
    torch.testing.assert_close(stats["e_lin"], exact.detach(), rtol=1e-5, atol=0)
    assert abs(rounded - exact) > 1e-3 * exact  # in bf16 it is another one
    torch.testing.assert_close(stats["ce"], ce.detach(), rtol=1e-6, atol=0)
    torch.testing.assert_close(loss.detach(), (ce + stats["lam"] * exact).detach(), rtol=1e-5, atol=0)
    total = grads_of(ce if light else ce + LAM * exact, model)
    for found, wanted in zip(grads, total, strict=True):
        # The cross-entropy's part is rounded to bf16 in both, in sums of another order.
        torch.testing.assert_close(found, wanted, rtol=2**-7, atol=2**-7 * wanted.abs().max().item())


@pytest.mark.parametrize(
    ("chosen", "around", "expected"),
    [
        ("fp32", torch.bfloat16, torch.float32),
        ("fp16", torch.bfloat16, torch.float16),
        ("bf16", None, torch.bfloat16),
        ("bf16", torch.float16, torch.bfloat16),
        (None, torch.bfloat16, torch.bfloat16),
    ],
)
def test_which_pass_has_which_precision(chosen, around, expected):
    model, (x, y) = Seen(), data()
    criterion = ELLELoss(EPS, LAM, triplet_precision=chosen)
    with torch.autocast("cpu", dtype=around, enabled=around is not None):
        criterion(model, x, y).backward()
    rest = around or torch.float32
    apart = [(BATCH, rest), (3 * BATCH, expected)]
    assert model.calls == [(BATCH, rest), *([(4 * BATCH, rest)] if chosen is None else apart)]
    assert all(grad is not None and grad.abs().max() > 0 for grad in (each.grad for each in model.parameters()))


def test_what_autocast_keeps_of_the_weights_is_not_taken_over():
    """fp16 inside bf16: torch keeps the weights that it has cast by name of the weight, whatever the dtype."""
    model, (x, y) = convnet(norm=False), data()
    alone = LocalLinearity(EPS, generator=rng(1))
    with torch.autocast("cpu", torch.float16):
        wanted = alone(model, x, y)
    within = LocalLinearity(EPS, triplet_precision="fp16", generator=rng(1))
    with torch.autocast("cpu", torch.bfloat16):
        model(x)
        found = within(model, x, y)
    assert torch.equal(found, wanted)


def test_without_an_autocast_it_is_split():
    x, y = data()
    found, buffers = [], []
    cases: list[dict[str, Any]] = [{"forward": "split"}, {"triplet_precision": "fp32"}]
    for options in cases:
        model = convnet()
        criterion = ELLELoss(EPS, LAM, generator=rng(1), **options)
        found.append(grads_of(criterion(model, x, y), model))
        buffers.append(buffers_of(model))
    assert same(*found)
    assert same(*buffers)


@pytest.mark.parametrize("name", ["n-fgsm+elle-a", "gat+elle-a", "elle-a+advlc"])
def test_methods_take_it(name):
    model, (x, y) = Seen(), data()
    criterion = methods.build(name, eps=EPS, triplet_precision="fp32", triplet_fraction=0.5)
    with torch.autocast("cpu", torch.bfloat16):
        criterion(model, x, y).backward()
    assert (3 * BATCH // 2, torch.float32) in model.calls
    assert all(dtype == torch.bfloat16 for rows, dtype in model.calls if rows == BATCH)


def test_the_gradient_that_awp_takes_inside_the_autocast(monkeypatch):
    """E_lin's part of it is that of float32: lam is so large that nothing else counts."""
    found: list[list[Tensor]] = []
    original = _Recorded.gradients

    def gradients(self: _Recorded, *given: Any) -> list[Tensor]:
        found.append(original(self, *given))
        return found[-1]

    monkeypatch.setattr(_Recorded, "gradients", gradients)
    x, y = data()
    for around in (True, False):
        criterion = methods.build("elle+awp", eps=EPS, lam=1e7, forward="split", triplet_precision="fp32")
        torch.manual_seed(3)
        with torch.autocast("cpu", torch.bfloat16, enabled=around):
            criterion(convnet(norm=False), x, y)
    for rounded, exact in zip(*found, strict=True):
        # Of the cross-entropy's part bf16 has the last bits. In bf16 throughout it is another gradient altogether.
        assert (rounded - exact).norm() < 2**-5 * exact.norm()


@pytest.mark.parametrize("forward", ["packed", "checkpoint"])
@pytest.mark.parametrize("precision", ["fp32", "fp16"])
def test_a_captured_step_with_a_scaler(precision, forward):
    """The same step as without capture; with a scaler, whose factor both parts of the gradient have."""
    x, y = data()
    results = []
    for captured in (False, True):
        model = convnet()
        criterion = ELLELoss(EPS, AdaptiveLambda(LAM), generator=rng(1), forward=forward, triplet_precision=precision)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.05, fused=True)
        scaler = torch.amp.GradScaler("cpu", init_scale=2.0**8)
        options: dict[str, Any] = {"autocast": torch.float16, "scaler": scaler}
        step: Any = TrainingStep(criterion, model, optimizer, **options)
        if captured:
            step = capture(criterion, model, optimizer, x, y, **options)
        losses = [step(x, y) for _ in range(3)]
        results.append([*losses, *model.state_dict().values()])
    assert same(*results)
    assert all(value.isfinite().all() for value in results[0])


def test_bad_input():
    model, (x, y) = convnet(norm=False), data()
    with pytest.raises(ValueError, match=r"triplet_precision: expected one of .*'bf16', got 'fp8'"):
        ELLELoss(EPS, triplet_precision="fp8")
    with pytest.raises(ValueError, match=r"triplet_precision: expected None with points='elle-2p'.* got 'fp32'"):
        ELLELoss(EPS, points="elle-2p", triplet_precision="fp32")
    with pytest.raises(ValueError, match=r"dtype: expected float32 points for .* in fp32, got torch\.bfloat16"):
        ELLELoss(EPS, dtype=torch.bfloat16, triplet_precision="fp32")
    criterion = ELLELoss(EPS, triplet_precision="fp32")
    with pytest.raises(ValueError, match=r"x: expected float32 points for .* in fp32, got torch\.bfloat16"):
        criterion(model, x.bfloat16(), y)
    cast = copy.deepcopy(model).bfloat16()
    refused = pytest.raises(ValueError, match=r"model: expected weights in float32 .* got torch\.bfloat16; keep them")
    with refused, torch.autocast("cpu", torch.bfloat16):
        criterion(cast, x, y)
    with pytest.raises(AttributeError, match=r"triplet_precision: .*build another one"):
        criterion.triplet_precision = "fp16"
    # What has it may round its points.
    ELLELoss(EPS, dtype=torch.bfloat16, triplet_precision="bf16")


def test_a_regulariser_shows_its_precision():
    assert "triplet_precision='bf16'" in repr(LocalLinearity(EPS, triplet_precision="bf16"))
    assert "triplet_precision=None" in repr(ELLELoss(EPS))
