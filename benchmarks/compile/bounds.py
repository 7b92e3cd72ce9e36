"""What a compiled kernel is held to, and by its instructions and bytes, what bounds the time of a pack kernel."""

from __future__ import annotations

import math
from collections import Counter
from dataclasses import dataclass
from typing import Any, NamedTuple

from torch import Tensor

from benchmarks.compile.compiling import Variant
from benchmarks.compile.machine_code import SPILLS, Step, narrow, wide

# Most registers a thread. An NVIDIA multiprocessor has 65,536, so that 128 leave room for 512 threads. Each has at
# least 32 bytes of x and grad on their way, 16 kB together. An H100 moves 3.35 TB/s / 132 SM * 0.7 us = 18 kB while a
# load is under way, and of what the pack kernels move at most a half is loads. On AMD, 128 of a SIMD's 512 leave room
# for 4 waves.
REGISTERS = 128


class Chip(NamedTuple):
    """What a prediction needs of a GPU."""

    bandwidth: float  # bytes per second
    multiprocessors: int
    clock: float  # Hz


CHIPS = {"sm_80": Chip(2.0e12, 108, 1.41e9), "sm_90": Chip(3.35e12, 132, 1.76e9)}  # A100, H100


@dataclass
class Data:
    """What a thread has to access in a variant, in the code as written once: loops counted once.

    ``loads`` and ``stores`` are the 16-byte pieces of data; ``narrow_loads`` and ``narrow_stores`` how many narrower
    ones may be beside them. ``why`` is empty on the fast path, else why no width is asked for.
    """

    why: str
    loads: int = 0
    stores: int = 0
    narrow_loads: int = 0
    narrow_stores: int = 0


def data_accesses(variant: Variant, lanes: int) -> Data:
    """What the widths of a variant are held to."""
    bound, name = variant.bound, variant.kernel.__name__
    if name in ("reduce_forward", "update_lam"):
        return Data("a few numbers a row, by one program")
    tile, options, tensors = bound["TILE"], bound["OPTIONS"], bound["tensors"]
    elements = tile.rows * tile.block // (lanes * bound["num_warps"])
    if name.startswith("rows_"):
        return _loss_data(tensors, options, tile, elements, name == "rows_forward")
    used = [tensor for tensor in (tensors.x, tensors.given, tensors.points) if tensor is not None]
    if any(tensor.storage_offset() * tensor.itemsize % 16 for tensor in used):
        return Data("a tensor is not aligned")
    length = math.prod(tensors.x.shape[1:])
    if any(length * tensor.itemsize % 16 for tensor in used):
        return Data("samples are not a multiple of 16 bytes long")
    if elements * min(tensor.itemsize for tensor in used) < 16:
        return Data(f"a tile gives each of {lanes} lanes less than 16 bytes")

    def pieces(tensor: Tensor | None) -> int:
        return 0 if tensor is None else elements * tensor.itemsize // 16

    if name.startswith("start_"):
        return Data("", pieces(tensors.x), pieces(tensors.points), narrow_loads=1)
    adv = options.adv != "none"
    # The l2 kernel reads the gradient for its length, and both again for the projection.
    again = name == "pack_ball" and options.adv == "step"
    x_passes, given_passes = 1 + (again and options.project), adv + again * (1 + options.project)
    narrower = 1 + (options.alpha == "given") + 2 * elements * options.normalize
    pieces_in = 0
    for tensor, same, passes in (
        (tensors.x, options.x_same, x_passes),
        (tensors.given, options.given_same, given_passes),
    ):
        if same:
            pieces_in += passes * pieces(tensor)
        else:
            narrower += passes * elements  # read across its layout, an element at a time
    return Data("", pieces_in, (adv + options.blocks) * pieces(tensors.points), narrower, narrow_stores=1)


def _loss_data(tensors: Any, options: Any, tile: Any, elements: int, forward: bool) -> Data:
    """The same for the kernels over logits."""
    logits, target, of_logits = tensors.logits, tensors.target, options.of == "logits"
    if tile.align * logits.itemsize < 16 or (options.soft and tile.target_align * target.itemsize < 16):
        return Data("rows of logits are not a multiple of 16 bytes long")
    if logits.storage_offset() * logits.itemsize % 16:
        return Data("a tensor is not aligned")
    if elements * logits.itemsize < 16:
        return Data("a tile gives each lane less than 16 bytes")
    pieces = elements * logits.itemsize // 16
    soft = elements * target.itemsize // 16 if options.soft else 0
    residual = (5 if options.points == "five-point" else 3) * pieces if of_logits else 0
    # A thread may meet as many rows as it has pieces. Of each: label, its logit, alpha (forward); label, maximum, sum
    # of exponentials, sum of targets, slope, alpha (backward), and there lam and three upstream gradients once.
    rows = min(pieces, tile.rows)
    if forward:
        passes = 1 + (options.soft or options.smooth)
        return Data("", passes * pieces + soft + residual, 0, narrow_loads=3 * rows, narrow_stores=5 * rows)
    stores = (1 + (options.blocks if of_logits else 0)) * pieces
    return Data("", pieces + soft + residual, stores, narrow_loads=6 * rows + 4)


def broken_bounds(found: dict[str, Any], data: Data) -> list[str]:
    """The bounds that do not hold, in words."""
    broken = [f"{name}: expected 0, got {found[name]}" for name in SPILLS if found.get(name, 0)]
    if found["registers"] > REGISTERS:
        broken.append(f"registers: expected at most {REGISTERS}, got {found['registers']}")
    if data.why:
        return broken
    for kind, least, most in (("loads", data.loads, data.narrow_loads), ("stores", data.stores, data.narrow_stores)):
        got, narrower = wide(found[kind]), narrow(found[kind])
        if got < least:
            broken.append(f"{kind}: expected {least} of 128 bits, got {got} and {narrower} narrower")
        if narrower > most:
            broken.append(f"{kind}: expected at most {most} narrower than 128 bits, got {narrower}")
    return broken


def per_element(variant: Variant, code: list[Step], target: str) -> dict[str, Any]:
    """Instructions per element of x, and what bounds a pack kernel by that count; nothing for the others.

    The linf kernel goes over its triplets in a loop, or has the code of one; the l2 kernel goes over its tiles in
    innermost loops, which count, and what is outside of them does not.
    """
    bound, name = variant.bound, variant.kernel.__name__
    if name not in ("pack_cube", "pack_ball", "start_cube", "start_ball"):
        return {}
    elements = bound["TILE"].rows * bound["TILE"].block / (32 * bound["num_warps"])
    # Where no triplet is wanted, the l2 kernel still passes once, for x_adv.
    triplets = max(bound["numbers"].triplets, int(name.endswith("ball")))
    outer = {begin for step in code for begin in step.loops[:-1]}
    counts: Counter[str] = Counter()
    for step in code:
        times = triplets if step.loops else 1
        if name.endswith("ball"):
            innermost = bool(step.loops) and step.loops[-1] not in outer
            times = (triplets if len(step.loops) > 1 else 1) if innermost else 0
        counts["all"] += times
        counts[step.kind] += times
    each = {kind: round(counts[kind] / elements, 1) for kind in ("all", "integer", "float")}
    found: dict[str, Any] = {"per_element": each}
    if chip := CHIPS.get(target):
        memory = _bytes_per_element(bound["tensors"]) / chip.bandwidth
        issue = each["all"] / (128 * chip.multiprocessors * chip.clock)
        found["bound"] = "memory" if memory >= issue else "issue"
    return found


def _bytes_per_element(tensors: Any) -> float:
    """x and the gradient read once, each point written once."""
    read = sum(tensor.itemsize for tensor in (tensors.x, tensors.given) if tensor is not None)
    return float(read + tensors.points.itemsize * tensors.points.shape[0] / tensors.x.shape[0])
