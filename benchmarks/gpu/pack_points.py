"""The part of gpu_report.py that checks, then times, pack_points."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

from benchmarks.gpu.run import (
    Run,
    add_ratios,
    add_timings,
    copy_rate,
    eager_backends,
    poisoned,
    recorded,
    sets_of_inputs,
)
from benchmarks.harness.device import compiled
from benchmarks.ops.sizes import EPS, PACK_CASES, PACKED, PackCase, dry_pack_cases
from elle_fast.functional import draw_seed, pack_points


class PackInputs(NamedTuple):
    """Fresh random inputs."""

    x: Tensor
    grad: Tensor
    seed: Tensor


def pack_inputs(case: PackCase, device: torch.device) -> PackInputs:
    """x uniform in [0, 1), a gradient with both signs and some zeros, a seed."""
    memory_format = torch.channels_last if case.channels_last else torch.contiguous_format
    x = torch.rand(case.shape, device=device, dtype=case.dtype).contiguous(memory_format=memory_format)
    grad = torch.randn_like(x)
    grad = torch.where(grad.abs() < 0.05, 0, grad)
    return PackInputs(x, grad, draw_seed(device))


def measure_pack(run: Run, case: PackCase, result: dict[str, Any]) -> None:
    """Check, then time, one case of pack_points."""

    def call(backend: str) -> Callable[..., tuple[Tensor, Tensor]]:
        def packed(x: Tensor, grad: Tensor, seed: Tensor) -> tuple[Tensor, Tensor]:
            return pack_points(x, grad, EPS, seed=seed, backend=backend, **case.options)

        return packed

    rotated = [pack_inputs(case, run.device.device) for _ in range(sets_of_inputs(run, case.launch_bound))]
    functions = {name: call(backend) for name, backend in eager_backends().items()}
    for name in list(functions)[:-1]:
        with poisoned():
            packed = functions[name](*rotated[0])
        result["check" if name == "triton" else f"check {name}"] = check_points(
            packed, functions["eager"](*rotated[0]), case
        )
        del packed
    # Compiling takes seconds, which may not be left for the last cases; tracing alone takes a second on the CPU.
    if case.target or (run.left() > 0.3 and not run.device.dry):
        with recorded(result, "error in pack, compiled"):
            translated = compiled(call("reference"), dry=run.device.dry)
            check_points(translated(*rotated[0]), functions["eager"](*rotated[0]), case)
            functions["compiled"] = translated
    result["bytes"] = case.bytes
    result["timings"] = {}
    sides = {name: [partial(function, *inputs) for inputs in rotated] for name, function in functions.items()}
    add_timings(run, result, "pack", sides, replay=True, repeatable=True)
    add_ratios(result, "pack", case.bytes, run.record["copy"][0]["bytes_per_second"])


def check_points(packed: tuple[Tensor, Tensor], expected: tuple[Tensor, Tensor], case: PackCase) -> dict[str, Any]:
    """The largest error: at most 16 roundings in float32 and one step of the points' dtype, of the largest value.

    In the l2 ball 1e-5 of the largest value more: each backend sums a sample's length in another order.
    """
    points, alpha = packed
    if (
        points.dtype != expected[0].dtype
        or points.stride() != expected[0].stride()
        or points.shape[1:] != case.shape[1:]
    ):
        raise AssertionError(f"got points {points.dtype} {points.stride()}, not as {expected[0].stride()}")
    largest = expected[0].abs().max().item()
    error = max(
        (ours.float() - theirs.float()).abs().max().item()
        for ours, theirs in zip(points.chunk(2 * PACKED), expected[0].chunk(2 * PACKED), strict=True)
    )
    roundings = 16 * 2.0**-24 + torch.finfo(points.dtype).eps + (1e-5 if case.options.get("norm") == "l2" else 0)
    allowed = largest * roundings
    if not error <= allowed:
        raise AssertionError(f"points differ from the reference's by {error:.3g}, more than {allowed:.3g}")
    torch.testing.assert_close(alpha, expected[1], rtol=0, atol=0)
    return {"largest_error": error, "allowed": allowed}


def part_pack_points(run: Run) -> None:
    """The cases of pack_points."""
    copy_rate(run)
    cases = dry_pack_cases() if run.device.dry else PACK_CASES
    run.each(cases, measure_pack)
    copy_rate(run)
