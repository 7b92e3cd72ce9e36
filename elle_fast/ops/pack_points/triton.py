"""pack_points in Triton: what a launch needs from the host. The kernels: triton_cube.py (linf), triton_ball.py (l2).

A tensor that is neither contiguous nor channels-last is copied first; one that is not aligned to 16 bytes, or whose
samples are not a multiple of 16 bytes long, is read and written in smaller pieces.
"""

from __future__ import annotations

import math
from functools import lru_cache
from typing import Any, NamedTuple

import torch
from torch import Tensor

from elle_fast.backends.triton_host import Launch, elsewhere, next_power_of_2
from elle_fast.ops import layout
from elle_fast.ops.pack_points.triton_ball import pack_ball, start_ball
from elle_fast.ops.pack_points.triton_cube import pack_cube, start_cube
from elle_fast.ops.pack_points.validation import Call, Packing, output_format, packed_rows

# What the constants of the kernels mean.
FIRST = {"none": 0, "step": 1, "given": 2}
ALPHA = {"uniform": 0, "half": 1, "given": 2}

# Contractions would make the points depend on the compiler; the kernels name the one they want.
OPTIONS = {"enable_fp_fusion": False}


class Form(NamedTuple):
    """What a launch has to know of its tensors."""

    shape: tuple[int, ...]
    width: int  # bytes of the narrowest element type among x, the gradient and the points
    x_last: bool  # channels last in memory
    given_last: bool
    out_last: bool


def pack_points(
    x: Tensor,
    grad: Tensor | None,
    x_adv: Tensor | None,
    alpha: Tensor | None,
    seed: Tensor,
    statistics: Tensor | None,
    call: Call,
    out: tuple[Tensor, Tensor] | None = None,
) -> tuple[Tensor, Tensor]:
    """The packed rows in the order of :mod:`elle_fast.ops.layout`, and alpha ``[triplets * Bt]``; one launch.

    ``statistics``: mean and 1 / std, see schema.py.
    """
    if (device := elsewhere(x)) is not None:
        with device:
            return pack_points(x, grad, x_adv, alpha, seed, statistics, call, out)
    packing, given = call.packing, x_adv if grad is None else grad
    memory_format = output_format(x, packing)
    rows, residuals = packed_rows(x.shape[0], given is not None, packing)
    if out is None:
        shape, dtype = (rows, *x.shape[1:]), packing.dtype or x.dtype
        points = torch.empty(shape, dtype=dtype, device=x.device, memory_format=memory_format)
        alphas = torch.empty(residuals, dtype=torch.float32, device=x.device)
    else:
        points, alphas = out
    x, x_last = _dense(x, memory_format)
    width, given_last, first = min(x.itemsize, points.itemsize), x_last, "none"
    if given is not None:
        given, given_last = _dense(given, memory_format)
        width, first = min(width, given.itemsize), "given" if grad is None else "step"
    if alpha is not None:
        alpha = alpha.resolve_neg().contiguous()
    seed = seed.resolve_neg()
    form = Form(x.shape, width, x_last, given_last, not points.is_contiguous())
    launch = pack_launch(form, first, alpha is not None, packing)
    launch.kernel[launch.grid](x, given, alpha, seed, statistics, points, alphas, *launch.sizes, **launch.constants)
    return points, alphas


def random_start(x: Tensor, seed: Tensor, call: Call) -> Tensor:
    """The point ``[B, ...]`` from which the attack takes its gradient; pack_points draws the same one again."""
    if (device := elsewhere(x)) is not None:
        with device:
            return random_start(x, seed, call)
    memory_format = output_format(x, call.packing)
    start = torch.empty_like(x, memory_format=memory_format)
    x, x_last = _dense(x, memory_format)
    last = not start.is_contiguous()
    if x_last != last:  # a copy without the negative bit may be channels-last where x is not
        x = x.contiguous(memory_format=memory_format)
    launch = start_launch(Form(x.shape, x.itemsize, last, last, last), call.packing)
    launch.kernel[launch.grid](x, seed.resolve_neg(), start, *launch.sizes, **launch.constants)
    return start


@lru_cache(maxsize=256)
def pack_launch(form: Form, first: str, alpha_given: bool, packing: Packing) -> Launch:
    """How the kernel for such tensors is launched."""
    batch, part = form.shape[0], layout.triplet_rows(form.shape[0], packing.fraction)
    alpha = "given" if alpha_given else "half" if packing.points == "five-point" else packing.alpha
    by_channel = packing.mean is not None
    constants: dict[str, Any] = {
        "FIRST": FIRST[first],
        "START": packing.start != 0,
        "PROJECT": packing.project,
        "CLAMP": packing.bounds is not None,
        "NORMALISE": by_channel,
        "POINTS": layout.POINTS_CODE[packing.points],
        "BLOCKS": layout.BLOCKS[packing.points],
        "ALPHA": ALPHA[alpha],
        "X_SAME": form.x_last == form.out_last,
        "GRAD_SAME": form.given_last == form.out_last,
        **_channels(form, by_channel),
    }
    sizes = (packing.triplets, packing.sample_offset, packing.eps, packing.step_size, *_reach(packing))
    if packing.norm == "linf":
        grid, cube_sizes, cube_constants = _cube(form)
        return Launch(pack_cube, grid, (batch, part, *cube_sizes, *sizes), {**constants, **cube_constants})
    heavy = first == "step" and packing.start != 0 and packing.project
    grid, groups, ball_constants = _ball(form, heavy=heavy)
    return Launch(pack_ball, grid, (batch, part, groups, *sizes), {**constants, **ball_constants})


@lru_cache(maxsize=256)
def start_launch(form: Form, packing: Packing) -> Launch:
    """How the kernel for such tensors is launched."""
    # Without a start there is no noise, and x stays as it is, whatever the bounds.
    constants = {"CLAMP": packing.bounds is not None and packing.start != 0, **_channels(form, by_channel=False)}
    sizes = (packing.sample_offset, *_reach(packing))
    if packing.norm == "linf":
        grid, cube_sizes, cube_constants = _cube(form)
        return Launch(start_cube, grid, (*cube_sizes, *sizes), {**constants, **cube_constants})
    grid, groups, ball_constants = _ball(form, heavy=False)
    return Launch(start_ball, grid, (form.shape[0], groups, *sizes), {**constants, **ball_constants})


def _cube(form: Form) -> tuple[tuple[int], tuple[int, int], dict[str, Any]]:
    """Tiles of one sample each: grid, sizes, constants."""
    elements = math.prod(form.shape[1:])
    vector = 16 // max(form.width, 2) if form.width < 4 else 4
    align = math.gcd(elements, 16)
    # Up to 16 elements a thread share the words of their sample; a call for each element leaves registers for 8.
    most = 2048 if elements >= 16384 and not form.out_last else 1024
    block = max(32 * vector, min(next_power_of_2(elements), most))
    tiles = -(-elements // block)
    constants = {
        "WIDE": elements + block >= 1 << 31,
        "ALIGN": align,
        "VEC": vector,
        "BLOCK": block,
        "num_warps": min(4, block // (32 * vector)),
        **OPTIONS,
    }
    return (form.shape[0] * tiles,), (elements // align, tiles), constants


def _ball(form: Form, *, heavy: bool) -> tuple[tuple[int], int, dict[str, Any]]:
    """Whole samples, several short ones to a program: grid, elements of a sample // ALIGN, constants."""
    elements = math.prod(form.shape[1:])
    align = math.gcd(elements, 16)
    # Elements a thread: fewer, so that no register is spilled, where each has an address of its own, or a start and a
    # projection besides.
    each = 4 if align < 8 or heavy else 8
    block = min(next_power_of_2(elements), 2048 if each == 8 else 1024)
    rows = max(1, min(512 // block, next_power_of_2(form.shape[0])))
    constants = {
        "WIDE": elements + block >= 1 << 31,
        "ALIGN": align,
        "ROWS": rows,
        "BLOCK": block,
        "num_warps": max(1, rows * block // (32 * each)),
        **OPTIONS,
    }
    return (-(-form.shape[0] // rows),), elements // align, constants


def _channels(form: Form, by_channel: bool) -> dict[str, Any]:
    """Channels and what remains of a sample; compiled in, as the kernels divide by them. 0 where they do not."""
    last = form.out_last
    if not (by_channel or last or form.x_last or form.given_last):
        return {"C": 0, "PLANE": 0, "LAST": False}
    channels = form.shape[1]
    return {"C": channels, "PLANE": math.prod(form.shape[2:]), "LAST": last}


def _reach(packing: Packing) -> tuple[float, float, float]:
    """Radius of the random start, lowest and highest value."""
    return packing.start * packing.eps, *(packing.bounds or (0.0, 0.0))


def _dense(tensor: Tensor, memory_format: torch.memory_format) -> tuple[Tensor, bool]:
    """The tensor, or a copy in ``memory_format``, and whether its channels lie last."""
    if tensor.is_neg():
        tensor = tensor.resolve_neg()
    if tensor.is_contiguous():
        return tensor, False
    last = {4: torch.channels_last, 5: torch.channels_last_3d}.get(tensor.dim())
    if last is not None and tensor.is_contiguous(memory_format=last):
        return tensor, True
    return _dense(tensor.contiguous(memory_format=memory_format), memory_format)
