"""pack_points in Triton: what a launch needs from the host. The kernels: triton_cube.py (linf), triton_ball.py (l2).

A tensor that is neither contiguous nor channels-last is copied first; one that is not aligned to 16 bytes, or whose
samples are not a multiple of 16 bytes long, is read and written in smaller pieces.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

from torch import Tensor

from elle_fast.backends.device import on_device
from elle_fast.backends.triton_host import Launch, next_power_of_2
from elle_fast.ops import layout
from elle_fast.ops.pack_points.launch import Form, prepare, prepare_start
from elle_fast.ops.pack_points.schema import PACK_POINTS, RANDOM_START
from elle_fast.ops.pack_points.triton_ball import pack_ball, start_ball
from elle_fast.ops.pack_points.triton_cube import pack_cube, start_cube
from elle_fast.ops.pack_points.validation import Packing


class Numbers(NamedTuple):
    """What the kernels read beside sizes and tensors."""

    triplets: int
    eps: float
    step_size: float
    radius: float  # of the random start
    low: float
    high: float


class Options(NamedTuple):
    """What the kernels are compiled for; the start alone needs no more than the first four."""

    clamp: bool
    # The kernels divide by the channels and by what remains of a sample; 0 where they do not.
    channels: int
    plane: int
    last: bool  # channels last in the points
    adv: str = "none"  # Form.adv
    start: bool = False
    project: bool = False
    normalize: bool = False
    points: str = "elle"
    blocks: int = 3
    alpha: str = "uniform"  # Form.alpha
    x_same: bool = True  # in the points' layout
    given_same: bool = True


class Tile(NamedTuple):
    """What a program does at a time: ``rows`` samples, ``block`` elements of each, in vectors of ``vec``."""

    wide: bool  # offsets in a sample need 64 bits
    align: int  # divides a sample's length
    rows: int
    vec: int
    block: int


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
        PACK_POINTS.plan(pack_launch, form, packing)(tensors, statistics)
    return tensors.points, tensors.alphas


def random_start(x: Tensor, seed: Tensor, packing: Packing) -> Tensor:
    """The point ``[B, ...]`` from which the attack takes its gradient; pack_points draws the same one again."""
    with on_device(x):
        tensors, form = prepare_start(x, seed, packing)
        RANDOM_START.plan(start_launch, form, packing)(tensors)
    return tensors.points


def pack_launch(form: Form, packing: Packing) -> Launch:
    """How the kernel for such tensors is launched."""
    by_channel, batch = packing.mean is not None, form.shape[0]
    options = Options(
        packing.bounds is not None,
        *_channels(form, by_channel),
        adv=form.adv,
        start=packing.start != 0,
        project=packing.project,
        normalize=by_channel,
        points=packing.points,
        blocks=layout.BLOCKS[packing.points],
        alpha=form.alpha(packing),
        x_same=form.x_last == form.points_last,
        given_same=form.given_last == form.points_last,
    )
    heavy = form.adv == "step" and options.start and options.project
    kernel, plan = (pack_cube, _cube(form)) if packing.norm == "linf" else (pack_ball, _ball(form, heavy=heavy))
    return _launch(kernel, plan, (batch, packing.part(batch)), packing, options)


def start_launch(form: Form, packing: Packing) -> Launch:
    """How the kernel for such tensors is launched."""
    options = Options(packing.bounds is not None, *_channels(form, by_channel=False))
    if packing.norm == "linf":
        return _launch(start_cube, _cube(form), (), packing, options)
    return _launch(start_ball, _ball(form, heavy=False), form.shape[:1], packing, options)


# Grid, sizes, tile, warps.
Plan = tuple[tuple[int], tuple[int, ...], Tile, int]


def _launch(kernel: Any, plan: Plan, batch: tuple[int, ...], packing: Packing, options: Options) -> Launch:
    grid, sizes, tile, warps = plan
    radius, bounds = packing.start * packing.eps, packing.bounds or (0.0, 0.0)
    numbers = Numbers(packing.triplets, packing.eps, packing.step_size, radius, *bounds)
    # Contractions would make the points depend on the compiler; the kernels name the one they want.
    return Launch(kernel, grid, (*batch, *sizes, packing.sample_offset, numbers), options, tile, warps, contract=False)


def _cube(form: Form) -> Plan:
    """Tiles of one sample each."""
    elements = math.prod(form.shape[1:])
    narrowest = min(dtype.itemsize for dtype in (form.x, form.given or form.x, form.points))
    vector = 16 // max(narrowest, 2) if narrowest < 4 else 4
    align = math.gcd(elements, 16)
    # Up to 16 elements a thread share the words of their sample; a call for each element leaves registers for 8.
    most = 2048 if elements >= 16384 and not form.points_last else 1024
    block = max(32 * vector, min(next_power_of_2(elements), most))
    tiles = -(-elements // block)
    tile = Tile(elements + block >= 1 << 31, align, rows=1, vec=vector, block=block)
    return (form.shape[0] * tiles,), (elements // align, tiles), tile, min(4, block // (32 * vector))


def _ball(form: Form, *, heavy: bool) -> Plan:
    """Whole samples, several short ones to a program."""
    elements = math.prod(form.shape[1:])
    align = math.gcd(elements, 16)
    # Elements a thread: fewer, so that no register is spilled, where each has an address of its own, or a start and a
    # projection besides.
    each = 4 if align < 8 or heavy else 8
    block = min(next_power_of_2(elements), 2048 if each == 8 else 1024)
    rows = max(1, min(512 // block, next_power_of_2(form.shape[0])))
    tile = Tile(elements + block >= 1 << 31, align, rows, vec=1, block=block)
    return (-(-form.shape[0] // rows),), (elements // align,), tile, max(1, rows * block // (32 * each))


def _channels(form: Form, by_channel: bool) -> tuple[int, int, bool]:
    """:class:`Options`' channels, plane and last."""
    if not (by_channel or form.points_last or form.x_last or form.given_last):
        return 0, 0, False
    return form.shape[1], math.prod(form.shape[2:]), form.points_last
