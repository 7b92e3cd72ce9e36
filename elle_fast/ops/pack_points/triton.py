"""pack_points in Triton: what a launch needs from the host. The kernels: triton_cube.py (linf), triton_ball.py (l2).

A tensor that is neither contiguous nor channels-last is copied first; one that is not aligned to 16 bytes, or whose
samples are not a multiple of 16 bytes long, is read and written in smaller pieces.
"""

from __future__ import annotations

import math
from typing import Any

from torch import Tensor

from elle_fast.backends.device import on_device
from elle_fast.backends.triton_host import Launch, next_power_of_2
from elle_fast.ops import layout
from elle_fast.ops.pack_points.launch import Form, prepare, prepare_start
from elle_fast.ops.pack_points.schema import PACK_POINTS, RANDOM_START
from elle_fast.ops.pack_points.triton_ball import pack_ball, start_ball
from elle_fast.ops.pack_points.triton_cube import pack_cube, start_cube
from elle_fast.ops.pack_points.validation import Packing

# What the constants of the kernels mean.
ADV = {"none": 0, "step": 1, "given": 2}
ALPHA = {"uniform": 0, "half": 1, "given": 2}

# Contractions would make the points depend on the compiler; the kernels name the one they want.
OPTIONS = {"enable_fp_fusion": False}


def pack_points(
    x: Tensor,
    grad: Tensor | None,
    x_adv: Tensor | None,
    alpha: Tensor | None,
    seed: Tensor,
    statistics: Tensor | None,
    packing: Packing,
    out: tuple[Tensor, Tensor] | None = None,
) -> tuple[Tensor, Tensor]:
    """The packed rows in the order of :mod:`elle_fast.ops.layout`, and alpha ``[triplets * Bt]``; one launch.

    ``statistics``: mean and 1 / std, see schema.py.
    """
    with on_device(x):
        tensors, form = prepare(x, grad, x_adv, alpha, seed, packing, out)
        launch = PACK_POINTS.plan(pack_launch, form, packing)
        launch.kernel[launch.grid](*tensors[:4], statistics, *tensors[4:], *launch.sizes, **launch.constants)
    return tensors.points, tensors.alphas


def random_start(x: Tensor, seed: Tensor, packing: Packing) -> Tensor:
    """The point ``[B, ...]`` from which the attack takes its gradient; pack_points draws the same one again."""
    with on_device(x):
        tensors, form = prepare_start(x, seed, packing)
        launch = RANDOM_START.plan(start_launch, form, packing)
        launch.kernel[launch.grid](tensors.x, tensors.seed, tensors.points, *launch.sizes, **launch.constants)
    return tensors.points


def pack_launch(form: Form, packing: Packing) -> Launch:
    """How the kernel for such tensors is launched."""
    batch = form.shape[0]
    by_channel = packing.mean is not None
    constants: dict[str, Any] = {
        "FIRST": ADV[form.adv],
        "START": packing.start != 0,
        "PROJECT": packing.project,
        "CLAMP": packing.bounds is not None,
        "NORMALISE": by_channel,
        "POINTS": layout.POINTS_CODE[packing.points],
        "BLOCKS": layout.BLOCKS[packing.points],
        "ALPHA": ALPHA[form.alpha(packing)],
        "X_SAME": form.x_last == form.points_last,
        "GRAD_SAME": form.given_last == form.points_last,
        **_channels(form, by_channel),
    }
    sizes = (packing.triplets, packing.sample_offset, packing.eps, packing.step_size, *_reach(packing))
    if packing.norm == "linf":
        grid, cube_sizes, cube_constants = _cube(form)
        return Launch(pack_cube, grid, (batch, packing.part(batch), *cube_sizes, *sizes), constants | cube_constants)
    heavy = form.adv == "step" and packing.start != 0 and packing.project
    grid, groups, ball_constants = _ball(form, heavy=heavy)
    return Launch(pack_ball, grid, (batch, packing.part(batch), groups, *sizes), constants | ball_constants)


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
    narrowest = min(dtype.itemsize for dtype in (form.x, form.given or form.x, form.points))
    vector = 16 // max(narrowest, 2) if narrowest < 4 else 4
    align = math.gcd(elements, 16)
    # Up to 16 elements a thread share the words of their sample; a call for each element leaves registers for 8.
    most = 2048 if elements >= 16384 and not form.points_last else 1024
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
    last = form.points_last
    if not (by_channel or last or form.x_last or form.given_last):
        return {"C": 0, "PLANE": 0, "LAST": False}
    channels = form.shape[1]
    return {"C": channels, "PLANE": math.prod(form.shape[2:]), "LAST": last}


def _reach(packing: Packing) -> tuple[float, float, float]:
    """Radius of the random start, lowest and highest value."""
    return packing.start * packing.eps, *(packing.bounds or (0.0, 0.0))
