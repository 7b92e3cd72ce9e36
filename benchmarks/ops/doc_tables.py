"""The tables of README and docs that are drawn from bench_ops.py's files."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from benchmarks.harness.tables import markdown
from benchmarks.tables.table import Table

_EAGER, _COMPILED = ("eager-plain", "eager-reference"), ("compiled-plain", "compiled-reference")
_SMALL, _LARGE = "pack_points-128x3x32x32-fp32-fgsm", "pack_points-256x3x224x224-fp32-fgsm"
# What README calls a case; the ending of the kernel's side; whether the floor is shown.
_CALLS = (
    (_SMALL, "`pack_points`, FGSM, 128x3x32x32", "", True),
    (_LARGE, "`pack_points(out=)`, FGSM, 256x3x224x224", "-out", True),
    (_LARGE, "the same without `out=`", "", False),
    ("elle_loss-512x10-fp32", "`elle_loss` and backward, logits [512, 10]", "", False),
    ("elle_loss-2048x10-fp32", "the same, [2048, 10]", "", False),
    ("elle_loss-1024x1000-fp32", "the same, [1024, 1000]", "", False),
)
_FIXED = "fixed-cost-"


def calls(content: dict[str, Any]) -> str:
    """Median time of a call: torch's ways, the faster of each two, beside the kernels on both instruction sets."""
    lines = []
    for case, label, ending, with_floor in _CALLS:
        found = content["cases"][case]
        sides = (_EAGER, _COMPILED, (f"cpp-avx512{ending}",), (f"cpp-avx2{ending}",))
        cells = [_fastest(found["timings"], names) for names in sides]
        lines.append((label, *cells, _time(found["floor_us"]) if with_floor else "-"))
    return markdown(["", "eager", "`torch.compile`", "`cpp`, AVX-512", "`cpp`, AVX2", "memory floor"], lines)


def fixed_cost(content: dict[str, Any]) -> str:
    """Of a call on one sample, of the kernels and in plain torch."""
    lines = []
    for case, found in content["cases"].items():
        if case.startswith(_FIXED):
            kernel = [name for name in found["timings"] if name not in _EAGER]
            lines.append((f"`{case.removeprefix(_FIXED)}`", *(_fastest(found["timings"], x) for x in (kernel, _EAGER))))
    return markdown(["one sample", "`cpp`", "`reference`"], lines)


def _fastest(timings: dict[str, Any], names: Sequence[str]) -> str:
    return _time(min((timings[name]["median_us"] for name in names if name in timings), default=None))


def _time(microseconds: float | None) -> str:
    """To three digits, or to the millisecond."""
    if microseconds is None:
        return "-"
    value, unit = (microseconds, "us") if microseconds < 1000 else (microseconds / 1000, "ms")
    return f"{value:,.0f} {unit}" if value >= 1000 else f"{value:#.3g}".rstrip(".") + f" {unit}"


TABLES = {"ops": Table("bench_ops.json", calls), "fixed-cost": Table("fixed_cost.json", fixed_cost)}
