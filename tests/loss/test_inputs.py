"""What the model sees, for inputs, outputs and losses of any form."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from elle_fast import ELLELoss, LocalLinearity, attacks
from elle_fast.functional import draw_seed
from tests.helpers import Recorder, convnet, grads_of, labels, random, rng, shown
from tests.loss.cases import CLASSES, EPS, F64, bent, close, cross_entropy, data, fgsm_by_hand, noise_of, residual


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


def test_the_attack_starts_in_the_layout_of_x():
    """``memory_format`` is that of the points; with one channel x has both layouts and needs no copy."""
    x, y = torch.rand(2, 1, 4, 4, generator=rng(1)), labels(2, 4)
    model, seen = convnet(channels=1), []
    model.register_forward_pre_hook(lambda module, args: seen.append(args[0].stride()))
    ELLELoss(EPS, attack="rs-fgsm", memory_format=torch.channels_last, generator=rng(2))(model, x, y)
    assert seen[0] == x.stride() == (16, 16, 4, 1)  # torch chooses its convolution by them
