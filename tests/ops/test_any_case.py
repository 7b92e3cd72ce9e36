"""The kernels against the reference on cases that hypothesis makes up: shapes, views, dtypes and options together."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

from elle_fast import functional
from elle_fast.ops.layout import BLOCKS
from tests.helpers import labels, probabilities, random, rng, seed_of, unit_roundoff

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="the interpreter is for machines without a GPU")

DTYPES = [torch.float32, torch.float16, torch.bfloat16]

# The same cases in every run, so that a failure is a change of the code; an interpreted launch takes long.
deterministic = settings(
    max_examples=60, deadline=None, derandomize=True, database=None, suppress_health_check=list(HealthCheck)
)


@st.composite
def views(draw: Any, shape: tuple[int, ...], dtype: torch.dtype, seed: int) -> Tensor:
    """A tensor of that shape, somehow laid out in memory."""
    x = (random(*shape, seed=seed) - 0.3).to(dtype)
    kind = draw(st.sampled_from(["plain", "plain", "unaligned", "strided", "channels_last", "expanded"]))
    if kind == "unaligned":
        flat = torch.empty(x.numel() + 1, dtype=dtype)
        flat[1:] = x.reshape(-1)
        return flat[1:].view(shape)
    if kind == "strided":
        return torch.stack((x, x + 1), dim=-1)[..., 0]
    if kind == "channels_last" and len(shape) == 4:
        return x.contiguous(memory_format=torch.channels_last)
    if kind == "expanded":
        return x[:1].expand(shape)
    return x


@st.composite
def packings(draw: Any) -> dict[str, Any]:
    rank = draw(st.integers(1, 4))
    shape = tuple(draw(st.integers(1, 7 if place != 1 else 3)) for place in range(rank))
    dtype, grad_dtype = draw(st.sampled_from(DTYPES)), draw(st.sampled_from(DTYPES))
    case: dict[str, Any] = {"x": draw(views(shape, dtype, 1))}
    first = draw(st.sampled_from(["step", "step", "given", "none"]))
    points = draw(st.sampled_from(["elle", "elle", "elle-2p", "five-point"]))
    if points == "elle-2p" and first == "none":
        first = "step"
    case["grad"] = draw(views(shape, grad_dtype, 2)) if first == "step" else None
    case["x_adv"] = draw(views(shape, grad_dtype, 3)) if first == "given" else None
    triplets = draw(st.integers(0 if first != "none" else 1, 3))
    case |= {"eps": draw(st.sampled_from([0.0, 0.03, 0.5])), "points": points, "triplets": triplets}
    case["fraction"] = draw(st.sampled_from([1.0, 1.0, 0.5, 0.01]))
    case["norm"] = draw(st.sampled_from(["linf", "linf", "l2"]))
    case["start"] = draw(st.sampled_from([0.0, 1.0, 2.0]))
    case["step_size"] = draw(st.sampled_from([None, 0.0, 0.1]))
    case["project"] = draw(st.booleans())
    case["bounds"] = draw(st.sampled_from([None, (0.0, 0.5)]))
    case["dtype"] = draw(st.sampled_from([None, *DTYPES]))
    case["sample_offset"] = draw(st.sampled_from([0, 1, 2**31 - 1]))
    if rank >= 2 and draw(st.booleans()):
        case |= {"mean": [0.1, -0.2, 0.4][: shape[1]], "std": [0.5, 2.0, 0.25][: shape[1]]}
    if rank == 4:
        case["memory_format"] = draw(st.sampled_from([torch.preserve_format, torch.channels_last]))
    if points != "five-point" and draw(st.booleans()):
        case["alpha"] = "half"
    case["seed"] = draw(st.integers(-(2**63), 2**63 - 1))
    return case


@deterministic
@given(packings())
def test_pack_points(case: dict[str, Any]) -> None:
    x, grad, seed = case.pop("x"), case.pop("grad"), seed_of(case.pop("seed"))
    results = []
    for backend in ("reference", "triton"):
        results.append(functional.pack_points(x, grad, seed=seed, backend=backend, **case))
    (expected, expected_alpha), (found, alpha) = results
    assert torch.equal(alpha, expected_alpha)
    assert (found.dtype, found.shape) == (expected.dtype, expected.shape)
    # The stride of a dimension of size 1 is anything.
    assert all(n == 1 or s == t for n, s, t in zip(found.shape, found.stride(), expected.stride(), strict=True))
    if case["norm"] == "linf" and "mean" not in case:
        assert torch.equal(found, expected)
        return
    # Values up to 1.8 + 2.1, divided by at least 0.25; 3 roundings of the normalisation on each side, and for l2 30
    # more with the d / 2 of each length, here d <= 147. Then one rounding of each result.
    roundings = 6 + (0 if case["norm"] == "linf" else 2 * (30 + 147 / 2))
    scale = 4.0 * (4 if "mean" in case else 1)
    bound = roundings * scale * unit_roundoff(torch.float32) + 2 * unit_roundoff(found.dtype) * expected.abs().float()
    assert ((found.float() - expected.float()).abs() <= bound).all()


@st.composite
def losses(draw: Any) -> dict[str, Any]:
    batch, classes = draw(st.integers(1, 9)), draw(st.sampled_from([1, 2, 3, 10, 33, 4097]))
    points, triplets = draw(st.sampled_from(list(BLOCKS))), draw(st.integers(1, 3))
    part = draw(st.integers(1, batch))
    rows = batch + BLOCKS[points] * triplets * part
    scale = draw(st.sampled_from([0.1, 3.0, 100.0]))
    logits = (scale * torch.randn(rows, classes, generator=rng(draw(st.integers(0, 99))))).to(
        draw(st.sampled_from(DTYPES))
    )
    kind = draw(st.sampled_from(["plain", "row-strided", "transposed"]))
    if kind == "row-strided":
        logits = torch.cat((logits, logits), dim=1)[:, :classes]
    if kind == "transposed":
        logits = logits.T.contiguous().T
    soft = draw(st.booleans())
    return {
        "logits": logits,
        "target": probabilities(batch, classes, dtype=torch.float32) if soft else labels(batch, classes),
        "alpha": random(triplets * part, seed=3),
        "points": points,
        "triplets": triplets,
        "of": draw(st.sampled_from(["loss", "loss", "logits"])),
        "penalty": draw(st.sampled_from(["squared", "abs", "smooth_l1"])),
        "label_smoothing": draw(st.sampled_from([0.0, 0.1])),
        "scale": scale,
    }


@deterministic
@given(losses())
def test_elle_loss(case: dict[str, Any]) -> None:
    """Against the reference in float64 on the same logits; the reference in float32 says what error is usual."""
    logits, scale = case.pop("logits"), case.pop("scale")
    runs = []
    for backend, dtype in (("reference", torch.float64), ("reference", logits.dtype), ("triton", logits.dtype)):
        z = logits.detach().to(dtype).requires_grad_()
        loss, ce, e_lin = functional.elle_loss(z, lam=2.0, backend=backend, **case)
        (grad,) = torch.autograd.grad(loss, z)
        runs.append([value.detach().double() for value in (loss, ce, e_lin, grad)])
    truth, usual, found = runs
    # Beside twice the reference's own error, 40 roundings of numbers below 2 max|z| + log C: those of the largest
    # terms of a sum, and of the tree that adds 4,097 of them. r has the errors of five losses, weights 7 in sum.
    unit = unit_roundoff(torch.float32)
    loss_error = 40 * unit * (10 * scale + 10)
    size = truth[2].abs().sqrt() + 1
    slack = (loss_error, loss_error, 2 * 7 * loss_error * (size + 7 * loss_error))
    slack = (slack[0] + 2 * slack[2], slack[1], slack[2])
    for error, usual_error, more in zip(
        [(f - t).abs() for f, t in zip(found[:3], truth[:3], strict=True)],
        [(u - t).abs() for u, t in zip(usual[:3], truth[:3], strict=True)],
        slack,
        strict=True,
    ):
        assert error <= 2 * usual_error + more
    # The gradient has one rounding to the logits' dtype beside; the derivative of |r| may jump where r is near 0.
    if case["penalty"] != "squared" and truth[2].item() < 1e-3 * scale:
        return
    largest = truth[3].abs().max()
    bound = 2 * (usual[3] - truth[3]).abs().max() + 4 * unit_roundoff(logits.dtype) * largest
    assert (found[3] - truth[3]).abs().max() <= bound + 20 * loss_error * (largest + size)
