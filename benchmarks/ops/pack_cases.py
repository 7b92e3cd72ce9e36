"""pack_points in bench_ops.py: every backend, both eager ways, both compiled, and the floor."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks.harness.device import compiled
from benchmarks.harness.timing import Side
from benchmarks.ops import floor, plain_torch
from benchmarks.ops.sides import Case, kernels
from benchmarks.ops.sizes import BF16, CHANNELS, EPS, F32, LARGE, SMALL, PackCase, short
from elle_fast import functional
from elle_fast.testing import use_isa

OUT, FLOORS = "-out", ("floor-streamed", "floor-stored")  # "cpp-avx2-out": a call with out=, into memory that is there
# The reference takes some 120 bytes of memory an element; where that is more than this, it is left out.
MOST_BYTES = 12 << 30
_PART = 16  # samples that are checked at a time
_N_FGSM = {"bounds": (0.0, 1.0), "start": 2.0, "step_size": EPS}


def forms(size: tuple[int, ...]) -> list[PackCase]:
    """The case of the targets, and the others."""
    return [
        PackCase(size, F32, "fgsm", {}, target=True),
        PackCase(size, BF16, "fgsm", {}),
        PackCase(size, F32, "fgsm", {}, channels_last=True),
        PackCase(size, F32, "n-fgsm clamped", _N_FGSM),
        PackCase(size, F32, "fgsm normalised", CHANNELS),
    ]


def cases(dry: bool) -> list[Case]:
    """At both sizes; ``dry``: at tiny ones."""
    sizes = ((4, 3, 8, 8), (6, 3, 16, 16)) if dry else (SMALL, LARGE)
    return [_case(dry, form) for size in sizes for form in forms(size)]


def name_of(size: tuple[int, ...]) -> str:
    """The case of the targets at that size."""
    return _name(forms(size)[0])


def into_out(kernel: str) -> str:
    """The side of that backend with ``out=``."""
    return f"{kernel}{OUT}"


def _name(form: PackCase) -> str:
    layout = "-channels-last" if form.channels_last else ""
    return f"pack_points-{'x'.join(map(str, form.shape))}-{short(form.dtype)}{layout}-{form.label.replace(' ', '-')}"


def _case(dry: bool, form: PackCase) -> Case:
    # The others are for information: nothing is compiled for them, and large ones are kept short.
    short_one = math.prod(form.shape) > 1 << 24 and not form.target
    names = ["eager-plain", *([] if short_one else ["eager-reference"])]
    names += ["compiled-plain", "compiled-reference"] if form.target else []
    names += kernels()[:1] if short_one else kernels()
    names += [into_out(name) for name in kernels() if name.startswith("cpp-")]
    prepare = partial(_prepare, dry, form, (*names, *FLOORS))
    return Case(_name(form), prepare, form.bytes, plotted=form.target)


def _prepare(dry: bool, form: PackCase, names: tuple[str, ...]) -> dict[str, Side | str]:
    generator = torch.Generator().manual_seed(1)
    layout = torch.channels_last if form.channels_last else torch.contiguous_format
    x, grad = (
        draw(form.shape, generator=generator).to(form.dtype, memory_format=layout) for draw in (torch.rand, torch.randn)
    )
    seed = torch.tensor(1)
    points = torch.empty((4 * len(x), *x.shape[1:]), dtype=x.dtype, memory_format=layout)
    points.fill_(0)  # no page of it is new to the floor or to a call with out=
    out = (points, torch.empty(len(x)))
    packs = {
        "reference": lambda x, grad, seed: functional.pack_points(
            x, grad, EPS, seed=seed, backend="reference", **form.options
        ),
        "plain": _plain(form, x, seed),
    }
    sides: dict[str, Side | str] = {}
    for name in names:
        how, _, which = name.partition("-")
        if how in ("eager", "compiled"):
            pack = compiled(packs[which], dry=dry) if how == "compiled" else packs[which]
            too_large = which == "reference" and (reason := _too_large(x))
            sides[name] = reason if too_large else Side(partial(pack, x, grad, seed))
        elif name in FLOORS:
            stream = floor.floor(x, grad, points, streamed=name == FLOORS[0])
            sides[name] = stream if isinstance(stream, str) else Side(stream)
        else:
            kept = out if which.endswith(OUT) else None
            call = partial(functional.pack_points, x, grad, EPS, seed=seed, out=kept, backend=how, **form.options)
            sides[name] = Side(call, isa=which.removesuffix(OUT))
    _check(form, sides, x, grad, seed)
    return sides


def _plain(form: PackCase, x: Tensor, seed: Tensor) -> Callable[[Tensor, Tensor, Tensor], Any]:
    """As a user would call it: with the start that the gradient was taken at, and the statistics as tensors."""
    options = dict(form.options)
    for name in options.keys() & {"mean", "std"}:
        options[name] = torch.tensor(options[name], dtype=x.dtype).view(1, -1, 1, 1)
    start = None
    if "start" in options:
        start = functional.random_start(
            x, EPS, seed=seed, start=options.pop("start"), bounds=options["bounds"], backend="auto"
        )
    return lambda x, grad, seed: plain_torch.pack_points(x, grad, start, EPS, **options)


def _too_large(x: Tensor) -> str:
    """Why the reference cannot run on x; empty if it can."""
    needed = 120 * x.numel()
    lines = Path("/proc/meminfo").read_text().splitlines() if Path("/proc/meminfo").exists() else []
    free = min([MOST_BYTES, *(1024 * int(line.split()[1]) for line in lines if line.startswith("MemAvailable"))])
    return f"it needs {needed / 2**30:.1f} GiB, {free / 2**30:.1f} GiB may be used" if needed > free else ""


# ---- Whether the results agree


def _check(form: PackCase, sides: dict[str, Side | str], x: Tensor, grad: Tensor, seed: Tensor) -> None:
    """Compare every backend with the reference, and check the bounds of plain torch; AssertionError if one is wrong."""
    expected = [(part, _expected(form, part, x, grad, seed)) for part in _parts(len(x))]
    for name, side in sides.items():
        if isinstance(side, str) or name in FLOORS or name == "eager-reference":
            continue
        with use_isa(side.isa):
            packed: Tensor = side.call()[0]
        if name.endswith("plain"):
            _check_plain(name, form, packed, x)
            continue
        for part, right in expected:
            _check_packed(name, form, packed.unflatten(0, (4, -1))[:, part], right)


def _parts(batch: int) -> list[slice]:
    """The samples to compare with the reference, which takes ten seconds for a whole large batch."""
    whole = [slice(i, i + _PART) for i in range(0, batch, _PART)]
    return whole if batch <= SMALL[0] else [whole[i] for i in (0, len(whole) // 2, -1)]


def _expected(form: PackCase, part: slice, x: Tensor, grad: Tensor, seed: Tensor) -> Tensor:
    points, _ = functional.pack_points(
        x[part], grad[part], EPS, seed=seed, backend="reference", sample_offset=part.start, **form.options
    )
    blocks: Tensor = points.unflatten(0, (4, -1))
    return blocks


def _check_packed(name: str, form: PackCase, packed: Tensor, expected: Tensor) -> None:
    """Equal bits, unless a compiler fuses multiplications and additions or a kernel multiplies by 1 / std."""
    roundings = 0.0
    if name == "compiled-reference" or "std" in form.options:
        roundings = 8 * torch.finfo(torch.float32).eps + (0.0 if form.dtype == F32 else torch.finfo(form.dtype).eps)
    allowed = roundings * expected.abs().max().item()
    error = (packed.float() - expected.float()).abs().max().item()
    assert error <= allowed, f"{name}: {error:g} from the reference, {allowed:g} allowed"


def _check_plain(name: str, form: PackCase, packed: Tensor, x: Tensor) -> None:
    """Without the normalisation, the attack's points and the noise fill their balls and stay inside."""
    assert packed.shape == (4 * len(x), *x.shape[1:]), f"{name}: points {list(packed.shape)}"
    mean, std = (torch.tensor(form.options.get(k, (v,))) for k, v in (("mean", 0.0), ("std", 1.0)))
    reach = (form.options.get("start", 0.0) + 1) * EPS
    slack = 8 * torch.finfo(x.dtype).eps * (2 + 1 / std.min().item())
    for part in _parts(len(x)):
        for block, most in zip(packed.unflatten(0, (4, -1)), (reach, EPS, EPS, EPS), strict=True):
            back = block[part].float() * std.view(1, -1, 1, 1) + mean.view(1, -1, 1, 1)
            error = (back - x[part].float()).abs().max().item()
            assert most / 2 <= error <= most + slack, f"{name}: {error:g} from x, about {most:g} expected"
