"""What the compiler makes of every kernel, read from its machine code; needs no GPU.

    python -m benchmarks.compile.static_report --out benchmarks/results/static_report.json
    python -m benchmarks.compile.static_report --targets sm_90 --only "pack l2"

The launches are recorded from the host functions themselves, called with tensors that have no data, and specialised by
Triton's own code (alignment, divisibility, 1 and None compiled in). The variants are each value of each option, with
the others at their defaults, and every pair of dtypes for the usual attack: not the product of all options.

Exits with 1, naming the variant, if a bound is broken:

- no spills and no local memory;
- 16 bytes at a time for all data where the tensors allow it: aligned, samples (or rows of logits) a multiple of 16
  bytes long, in the same layout. Allowed to be narrower there: the seed, alpha, the channels' mean and std, and what
  the loss reads once a row (label, its logit, maximum, sum, slope). The reduction reads a few numbers a row: no bound;
- at most 128 registers a thread, see bounds.REGISTERS.

A count of instructions is not a measurement. The predicted time of the pack kernels is the larger of bytes / bandwidth
and instructions / (128 lanes a clock and multiprocessor): latencies, waves and tails are not in it.
"""

from __future__ import annotations

import argparse
import multiprocessing
import os
import sys
import time
from collections import Counter
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

from benchmarks.compile.bounds import broken_bounds, data_accesses, per_element
from benchmarks.compile.compiling import TARGETS, Variant, compiled
from benchmarks.compile.machine_code import SPILLS, accesses, narrow, wide
from benchmarks.compile.variants import variants
from benchmarks.harness.program import command, listed, parser, write_lines
from elle_fast.backends import triton_host
from elle_fast.recipes.provenance import provenance

# Of a variant on a target, as the file has it; those after the second where a width is asked for. Wide: of 16 bytes.
COLUMNS = (
    *("registers", "spills", "wide loads", "at least", "narrower loads", "at most"),
    *("wide stores", "at least", "narrower stores", "at most"),
)


def inspect(variant: Variant, target: str) -> dict[str, Any]:
    """Compile for the target and say what came out, and which bounds it breaks."""
    code, resources = compiled(variant, target)
    found: dict[str, Any] = {**resources, "instructions": len(code), **accesses(code)}
    if TARGETS[target][0] == "cuda":
        found.update(per_element(variant, code, target))
    data = data_accesses(variant, TARGETS[target][2])
    loads, stores = found["loads"], found["stores"]
    row = [found["registers"], sum(found.get(name, 0) for name in SPILLS)]
    if not data.why:
        row += [wide(loads), data.loads, narrow(loads), data.narrow_loads]
        row += [wide(stores), data.stores, narrow(stores), data.narrow_stores]
    return {**found, "row": row, "broken": broken_bounds(found, data)}


def main(arguments: Sequence[str] | None = None) -> int:
    """Compile, print the table, write the file; 1 if a bound is broken."""
    options_of = _parser()
    options = options_of.parse_args(arguments)
    if triton_host.interpreted():
        options_of.error("TRITON_INTERPRET=1 is set, with which Triton compiles nothing: unset it for this command")
    began = time.perf_counter()
    parts = options.only or [""]
    places = [
        place
        for place, variant in enumerate(variants())
        if any(part in name for part in parts for name in (variant.name, *variant.also))
    ]
    if not places:
        options_of.error(f"--only: expected parts of variants' names, got {', '.join(map(repr, parts))}")
    names = [variants()[place].name for place in places]
    if options.list:
        print("\n".join(names))
        return 0
    work = [(place, target) for place in places for target in options.targets]
    if options.jobs == 1:
        results = [_inspect(*item) for item in work]
    else:
        with ProcessPoolExecutor(options.jobs, mp_context=multiprocessing.get_context("spawn")) as pool:
            results = list(pool.map(_inspect, *zip(*work, strict=True), chunksize=4))
    reports: dict[str, dict[str, dict[str, Any]]] = {name: {} for name in names}
    for (place, target), result in zip(work, results, strict=True):
        reports[variants()[place].name][target] = result
    short = summary(reports)
    if options.out is not None:
        content = {
            "note": (__doc__ or "").split("\n", 1)[0],
            **provenance(command(options_of, options)),
            "summary": short,
            "columns": COLUMNS,
            "variants": {
                name: {target: result.get("row", result["broken"]) for target, result in on.items()}
                for name, on in reports.items()
            },
        }
        write_lines(options.out, content)
    print("\n".join(table(short)))
    failures = [
        f"{target}: {name}: {reason}"
        for name, on in reports.items()
        for target, result in on.items()
        for reason in result["broken"]
    ]
    print(f"{len(places)} variants on {', '.join(options.targets)} in {time.perf_counter() - began:.0f} s")
    for failure in failures:
        print(f"broken bound: {failure}", file=sys.stderr)
    return 1 if failures else 0


def _inspect(place: int, target: str) -> dict[str, Any]:
    """For a process of its own, which makes the list of variants anew; a failed compilation is a result, too."""
    try:
        return inspect(variants()[place], target)
    except Exception as error:
        # Triton's messages quote the source and end in what is wrong with it.
        lines = [line.strip() for line in str(error).splitlines() if line.strip(" ^")]
        return {"broken": [f"does not compile: {type(error).__name__}: {' / '.join(lines[-2:])[-300:]}"]}


def summary(reports: dict[str, dict[str, dict[str, Any]]]) -> dict[str, dict[str, Any]]:
    """Per target and kernel: the most of everything over its variants, and what bounds the pack kernels."""
    groups: dict[str, list[dict[str, Any]]] = {}
    for name, on in reports.items():
        for target, result in on.items():
            groups.setdefault(f"{target} {name.rsplit(' | ', 1)[1]}", []).extend([result] * ("row" in result))
    found: dict[str, dict[str, Any]] = {}
    for group, results in groups.items():
        row: dict[str, Any] = {"variants": len(results)}
        for name in ("registers", "shared", "instructions"):
            row[name] = max((result[name] for result in results), default=None)
        row["spills"] = sum(result["row"][1] for result in results)
        row["fast path"] = sum(len(result["row"]) > 2 for result in results)
        each = [result["per_element"] for result in results if "per_element" in result]
        row["per element"] = {
            kind: [min(one[kind] for one in each), max(one[kind] for one in each)]
            for kind in ("integer", "float", "all")
            if each
        }
        row["bound"] = dict(Counter(result["bound"] for result in results if "bound" in result))
        found[group] = row
    return found


def table(rows: dict[str, dict[str, Any]]) -> list[str]:
    """The summary, a line for each target and kernel."""
    head = f"{'':22} {'variants':>8} {'regs':>5} {'shared':>7} {'spills':>6} {'instr':>6}"
    lines = [f"{head} {'fast path':>9} {'per element: int':>17} {'float':>9} {'all':>9}  bound"]
    for group, row in rows.items():
        if not row["variants"]:
            lines.append(f"{group:22} does not compile")
            continue
        line = f"{group:22} {row['variants']:8} {row['registers']:5} {row['shared']:7} {row['spills']:6}"
        line += f" {row['instructions']:6} {row['fast path']:9}"
        cells = [f"{low:.0f}-{high:.0f}" for low, high in row["per element"].values()] or [""] * 3
        bounds = ", ".join(f"{name} {count}" for name, count in row["bound"].items())
        lines.append(f"{line} {cells[0]:>17} {cells[1]:>9} {cells[2]:>9}  {bounds}".rstrip())
    return lines


def _parser() -> argparse.ArgumentParser:
    def target(text: str) -> str:
        if text not in TARGETS:
            raise argparse.ArgumentTypeError(f"expected some of {', '.join(TARGETS)}, got {text!r}")
        return text

    options_of = parser("benchmarks.compile.static_report", __doc__)
    options_of.add_argument("--targets", type=listed(target), default=tuple(TARGETS), help="sm_80,sm_90; default: all")
    options_of.add_argument(
        "--only", action="append", metavar="TEXT", help="variants whose name has it; may be given several times"
    )
    options_of.add_argument("--list", action="store_true", help="print the names of the variants and compile nothing")
    options_of.add_argument("--out", type=Path, help="the JSON file")
    options_of.add_argument("--jobs", type=int, default=os.cpu_count() or 1, help="processes (default: one a core)")
    return options_of


if __name__ == "__main__":
    sys.exit(main())
