"""The part of gpu_report.py that times other block sizes and numbers of warps than those chosen."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any
from unittest import mock

from torch import Tensor

from benchmarks.gpu.elle_loss import check_loss, loss_calls, loss_inputs
from benchmarks.gpu.pack_points import check_points, pack_inputs
from benchmarks.gpu.run import Run, copy_rate, recorded
from benchmarks.ops.sizes import BF16, EPS, F32, LARGE, LossCase, PackCase, short
from elle_fast.functional import elle_loss, pack_points
from elle_fast.ops.dispatch import forget_plans


def part_sweep(run: Run) -> None:
    """Blocks and warps of the launches, other than those chosen, each checked before it is timed."""
    run.record["rows"] = []
    for dtype in (F32, BF16):
        with recorded(run.record, f"error in pack, {short(dtype)}"):
            sweep_pack(run, PackCase((1, 3, 16, 16) if run.device.dry else LARGE, dtype))
        run.device.free()
    shapes = ((4096, 32000, BF16), (4096, 32000, F32), (4096, 1000, BF16), (1024, 1000, F32))
    for rows, classes, dtype in ((16, 300, BF16),) if run.device.dry else shapes:
        with recorded(run.record, f"error in loss, {classes} {short(dtype)}"):
            sweep_loss(run, LossCase(rows, classes, dtype))
        run.device.free()


@contextmanager
def patched(launches: Any, name: str, chooses: Callable[..., Any]) -> Iterator[None]:
    """Inside it, launches are planned anew, with ``chooses`` in the place of the host module's own function."""
    try:
        with mock.patch.object(launches, name, chooses):
            forget_plans()
            yield
    finally:
        forget_plans()


def sweep_pack(run: Run, case: PackCase) -> None:
    """BLOCK and num_warps of pack_cube."""
    from elle_fast.ops.pack_points import triton as launches

    original, inputs, moved = launches._cube, pack_inputs(case, run.device.device), case.bytes
    elements = math.prod(case.shape[1:])

    def call(backend: str) -> tuple[Tensor, Tensor]:
        return pack_points(*inputs[:2], EPS, seed=inputs.seed, backend=backend, **case.options)

    def changed(block: int, warps: int) -> Callable[..., Any]:
        def plan(*arguments: Any) -> Any:
            _, (groups, _), tile, _ = original(*arguments)
            tiles = -(-elements // block)
            return (case.shape[0] * tiles,), (groups, tiles), tile._replace(block=block), warps

        return plan

    def add(block: int | None, warps: int | None) -> None:
        if run.left() <= 0:
            run.record["skipped"] = "out of time"
            return
        check_points(call("triton"), expected, case)
        timing = run.device.events({"": lambda: call("triton")})[""]
        row = {"op": "pack_points", "case": case.name, "BLOCK": block, "num_warps": warps, **timing.microseconds()}
        run.record["rows"].append({**row, "of_copy_rate": round(moved / timing.median / rate, 4)})
        run.save()

    rate = copy_rate(run)
    expected = call("reference")
    add(None, None)
    for block in (512, 1024, 2048, 4096):
        for warps in (2, 4, 8):
            # Fewer elements than a thread's vector would be done twice.
            if block < 32 * warps * 16 // case.dtype.itemsize or (run.device.dry and (block, warps) != (512, 2)):
                continue
            # A setting may ask for more than the device has.
            where = f"error in {case.name}, {block}, {warps}"
            with recorded(run.record, where), patched(launches, "_cube", changed(block, warps)):
                add(block, warps)


def sweep_loss(run: Run, case: LossCase) -> None:
    """Rows, columns and num_warps of the row kernels."""
    from elle_fast.ops.elle_loss import triton as launches

    original, inputs = launches._tile, loss_inputs(case, run.device.device)

    def call(*arguments: Any) -> tuple[Tensor, Tensor, Tensor]:
        return elle_loss(*arguments, backend="triton")

    def changed(rows: int, columns: int, warps: int) -> Callable[..., Any]:
        def tile(*arguments: Any) -> Any:
            return original(*arguments)[0]._replace(rows=rows, block=columns), warps

        return tile

    def add(rows: int | None, columns: int | None, warps: int | None) -> None:
        if run.left() <= 0:
            run.record["skipped"] = "out of time"
            return
        check_loss(call, inputs)
        row: dict[str, Any] = {"op": "elle_loss", "case": case.name, "ROWS": rows, "BLOCK": columns, "num_warps": warps}
        timings = run.device.events({what: calls[0] for what, calls in loss_calls(call, [inputs]).items()})
        whole = timings["both"]
        row |= {what: timing.microseconds() for what, timing in timings.items()} | whole.microseconds()
        run.record["rows"].append({**row, "of_copy_rate": round(moved / whole.median / rate, 4)})
        run.save()

    rate, moved = copy_rate(run), case.bytes("both")
    add(None, None, None)
    whole = 1 << (case.classes - 1).bit_length()
    for columns in (1024, 2048, 4096, 8192) if whole > 1024 else (whole,):
        for rows in (1,) if whole > 1024 else (1, 2, 4):
            for warps in (2, 4, 8, 16):
                if not 128 * warps <= rows * columns <= 1024 * warps or (run.device.dry and (rows, warps) != (2, 4)):
                    continue
                where = f"error in {case.name}, {rows}, {columns}, {warps}"
                with recorded(run.record, where), patched(launches, "_tile", changed(rows, columns, warps)):
                    add(rows, columns, warps)
