"""The kernels against the reference on cases that hypothesis makes up: shapes, views, dtypes and options together.

The compiled kernels are quick enough for large shapes, each instruction set, and several numbers of threads.
"""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

from elle_fast import functional
from elle_fast.ops.layout import BLOCKS, triplet_rows
from elle_fast.testing import use_isa
from tests.helpers import (
    WHERES,
    Where,
    labels,
    probabilities,
    random,
    rng,
    seed_of,
    unit_roundoff,
    use_threads,
)

ORACLE = Where("reference", "cpu")
TRITON, CPP = ([where for where in WHERES if where[:2] == (name, "cpu")] for name in ("triton", "cpp"))
interpreted = [pytest.param(where, id=where.name, marks=where.marks) for where in TRITON]
compiled = [pytest.param(where, id=where.name, marks=where.marks) for where in CPP]

DTYPES = [torch.float32, torch.float16, torch.bfloat16]
LAST = {4: torch.channels_last, 5: torch.channels_last_3d}


def deterministic(examples: int) -> settings:
    """The same cases in every run, so that a failure is a change of the code."""
    return settings(
        max_examples=examples,
        deadline=None,
        derandomize=True,
        database=None,
        suppress_health_check=list(HealthCheck),
    )


few, many = deterministic(60), deterministic(300)  # an interpreted launch takes long


@st.composite
def views(draw: Any, shape: tuple[int, ...], dtype: torch.dtype, seed: int) -> Tensor:
    """A tensor of that shape, somehow laid out in memory."""
    x = (random(*shape, seed=seed) - 0.3).to(dtype)
    kinds = ["plain", "plain", "unaligned", "strided", "last", "last", "expanded", "reversed", "negated", "part"]
    kind = draw(st.sampled_from(kinds))
    if kind == "unaligned":
        flat = torch.empty(x.numel() + 1, dtype=dtype)
        flat[1:] = x.reshape(-1)
        return flat[1:].view(shape)
    if kind == "strided":
        return torch.stack((x, x + 1), dim=-1)[..., 0]
    if kind == "last" and len(shape) in LAST:
        return x.contiguous(memory_format=LAST[len(shape)])
    if kind == "expanded":
        return x[:1].expand(shape)
    if kind == "reversed":  # the order of the dimensions in memory
        order = tuple(range(len(shape)))[::-1]
        return x.permute(order).contiguous().permute(order)
    if kind == "negated":
        return torch._neg_view(-x)
    if kind == "part":
        return torch.cat((x, x, x))[shape[0] : 2 * shape[0]]
    return x


@st.composite
def shapes(draw: Any, large: bool) -> tuple[int, ...]:
    """Of up to 5 dimensions; large ones have up to 70 channels, odd planes, now and then work for several threads."""
    rank = draw(st.integers(1, 5 if large else 4))
    if not large:
        return tuple(draw(st.integers(1, 7 if place != 1 else 3)) for place in range(rank))
    channels = draw(st.sampled_from([1, 2, 3, 3, 4, 5, 16, 33, 63, 64, 65, 70]))
    room = draw(st.sampled_from([60, 700, 3000, 3000, 3000, 70_000]))
    batch = draw(st.sampled_from([1, 1, 2, 3, 7]))
    if rank == 1:
        return (draw(st.integers(1, room)),)
    sizes = [batch, channels]
    for left in range(rank - 2, 0, -1):
        most = max(1, room // torch.Size(sizes).numel())
        sizes.append(draw(st.integers(1, most if left == 1 else max(1, min(most, 9)))))
    return tuple(sizes)


@st.composite
def packings(draw: Any, large: bool = False) -> dict[str, Any]:
    shape = draw(shapes(large))
    rank = len(shape)
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
        mean, std = [0.1, -0.2, 0.4], [0.5, 2.0, 0.25]
        case |= {name: (values * shape[1])[: shape[1]] for name, values in (("mean", mean), ("std", std))}
    if rank in LAST:
        formats = [torch.preserve_format, torch.contiguous_format, LAST[rank]]
        case["memory_format"] = draw(st.sampled_from(formats))
    if points != "five-point":
        residuals = triplets * triplet_rows(shape[0], case["fraction"])
        given = random(2 * residuals, seed=4, dtype=draw(st.sampled_from(DTYPES)))[::2]
        case["alpha"] = draw(st.sampled_from(["uniform", "uniform", "half", given]))
    case["seed"] = draw(st.integers(-(2**63), 2**63 - 1))
    return case


def check_form(found: Tensor, expected: Tensor) -> None:
    assert (found.dtype, found.shape) == (expected.dtype, expected.shape)
    # The stride of a dimension of size 1 is anything.
    assert all(n == 1 or s == t for n, s, t in zip(found.shape, found.stride(), expected.stride(), strict=True))


def check_packing(case: dict[str, Any], where: Where, threads: tuple[int, ...] = (1,)) -> None:
    case = dict(case)
    x, grad, seed = case.pop("x"), case.pop("grad"), seed_of(case.pop("seed"))
    expected, expected_alpha = functional.pack_points(x, grad, seed=seed, backend="reference", **case)
    results = []
    for number in threads:
        with use_isa(where.isa), use_threads(number):
            results.append(functional.pack_points(x, grad, seed=seed, backend=where.backend, **case))
    for one, other in itertools.pairwise(results):
        assert all(torch.equal(a, b) for a, b in zip(one, other, strict=True))
    found, alpha = results[0]
    assert torch.equal(alpha, expected_alpha)
    check_form(found, expected)
    if case["norm"] == "linf" and "mean" not in case:
        assert torch.equal(found, expected)
        return
    # Values up to 1.8 + 2.1, divided by at least 0.25; 3 roundings of the normalisation on each side, and for l2 30
    # more with the d / 2 of each length. Then one rounding of each result.
    elements = x[0].numel()
    roundings = 6 + (0 if case["norm"] == "linf" else 2 * (30 + elements / 2))
    scale = 4.0 * (4 if "mean" in case else 1)
    bound = roundings * scale * unit_roundoff(torch.float32) + 2 * unit_roundoff(found.dtype) * expected.abs().float()
    assert ((found.float() - expected.float()).abs() <= bound).all()


@pytest.mark.slow
@pytest.mark.parametrize("where", interpreted)
@few
@given(packings())
def test_pack_points(where: Where, case: dict[str, Any]) -> None:
    check_packing(case, where)


@pytest.mark.parametrize("where", compiled)
@many
@given(packings(large=True), st.integers(2, 4))
def test_pack_points_compiled(where: Where, case: dict[str, Any], threads: int) -> None:
    check_packing(case, where, (1, threads))


@pytest.mark.parametrize("where", compiled)
@many
@given(packings(large=True), st.integers(2, 4))
def test_random_start_compiled(where: Where, case: dict[str, Any], threads: int) -> None:
    x, names = case["x"], ("eps", "bounds", "norm", "sample_offset", "start")
    options: dict[str, Any] = {"seed": seed_of(case["seed"]), **{name: case[name] for name in names}}
    expected = ORACLE.random_start(x, **options)
    results = []
    for number in (1, threads):
        with use_threads(number):
            results.append(where.random_start(x, **options))
    assert torch.equal(*results)
    check_form(results[0], expected)
    if case["norm"] == "linf":
        assert torch.equal(results[0], expected)
        return
    # As above: values up to 0.7 + 1.
    roundings = 2 * (30 + x[0].numel() / 2)
    bound = roundings * 2 * unit_roundoff(torch.float32) + 2 * unit_roundoff(x.dtype) * expected.abs().float()
    assert ((results[0].float() - expected.float()).abs() <= bound).all()


@st.composite
def losses(draw: Any, large: bool = False) -> dict[str, Any]:
    batch, classes = draw(st.integers(1, 9)), draw(st.sampled_from([1, 2, 3, 10, 33, 4097]))
    if large:
        classes = draw(st.sampled_from([1, 2, 3, 4, 7, 10, 16, 17, 32, 33, 63, 64, 65, 100, 1000, 4097]))
        batch = draw(st.integers(1, 9 if classes > 1000 else 70))
    points, triplets = draw(st.sampled_from(list(BLOCKS))), draw(st.integers(1, 3))
    part = draw(st.integers(1, batch))
    rows = batch + BLOCKS[points] * triplets * part
    scale = draw(st.sampled_from([0.1, 3.0, 100.0]))
    logits = (scale * torch.randn(rows, classes, generator=rng(draw(st.integers(0, 99))))).to(
        draw(st.sampled_from(DTYPES))
    )
    kind = draw(st.sampled_from(["plain", "row-strided", "transposed", "unaligned", "negated"]))
    if kind == "row-strided":
        logits = torch.cat((logits, logits), dim=1)[:, :classes]
    if kind == "transposed":
        logits = logits.T.contiguous().T
    if kind == "unaligned":
        logits = torch.cat((logits.new_zeros(1), logits.flatten()))[1:].view(rows, classes)
    if kind == "negated":
        logits = torch._neg_view(-logits)
    soft, target = draw(st.booleans()), labels(batch, classes)
    if draw(st.booleans()):
        target = torch.stack((target, target), dim=1)[:, 0]
    return {
        "logits": logits,
        "target": probabilities(batch, classes, dtype=draw(st.sampled_from(DTYPES))) if soft else target,
        "alpha": random(2 * triplets * part, seed=3)[::2],
        "points": points,
        "triplets": triplets,
        "of": draw(st.sampled_from(["loss", "loss", "logits"])),
        "penalty": draw(st.sampled_from(["squared", "abs", "smooth_l1"])),
        "label_smoothing": draw(st.sampled_from([0.0, 0.1])),
        "scale": scale,
    }


def check_loss(case: dict[str, Any], where: Where, threads: tuple[int, ...] = (1,)) -> None:
    """Against the reference in float64 on the same logits; the reference in float32 says what error is usual."""
    case = dict(case)
    logits, scale = case.pop("logits"), case.pop("scale")
    runs = []
    kinds = [(ORACLE, torch.float64, 1), (ORACLE, logits.dtype, 1), *((where, logits.dtype, n) for n in threads)]
    for at, dtype, number in kinds:
        z = logits.detach().to(dtype).requires_grad_()
        with use_isa(at.isa), use_threads(number):
            loss, ce, e_lin = functional.elle_loss(z, lam=2.0, backend=at.backend, **case)
            (grad,) = torch.autograd.grad(loss, z)
        runs.append([value.detach().double() for value in (loss, ce, e_lin, grad)])
    truth, usual, found, *again = runs
    assert all(torch.equal(one, other) for run in again for one, other in zip(found, run, strict=True))
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


@pytest.mark.slow
@pytest.mark.parametrize("where", interpreted)
@few
@given(losses())
def test_elle_loss(where: Where, case: dict[str, Any]) -> None:
    check_loss(case, where)


@pytest.mark.parametrize("where", compiled)
@many
@given(losses(large=True), st.integers(2, 4))
def test_elle_loss_compiled(where: Where, case: dict[str, Any], threads: int) -> None:
    check_loss(case, where, (1, threads))
