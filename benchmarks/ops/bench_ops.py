"""The ops on the CPU, by every backend and instruction set, beside plain torch, torch.compile and the floor.

    make bench
    make bench ARGS="--only matmul"
    make bench ARGS="--out benchmarks/results/bench_ops.json"

All sides of a case are timed in turns, once their results are right. JSON with provenance goes to ``--out``, a plot
beside it; without ``--out`` to runs/bench_ops.json, which git ignores, so that committed results are replaced only when
asked for.

Exit status 1 if a result was wrong. A missed target is in the tables and no failure.
"""

from __future__ import annotations

import gc
import sys
from collections.abc import Sequence
from pathlib import Path

import torch

from benchmarks.harness.program import ROOT, command, parser
from benchmarks.harness.timing import DRY, Pace, Side, in_turns, threads
from benchmarks.ops import loss_cases, pack_cases
from benchmarks.ops.ops_tables import Report, tables
from benchmarks.ops.sides import Case


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure every case that is asked for, print, write."""
    options_of = parser("benchmarks.ops.bench_ops", __doc__)
    options_of.add_argument(
        "--out", type=Path, default=ROOT / "runs" / "bench_ops.json", help="JSON file, a plot beside it"
    )
    options_of.add_argument(
        "--only", action="append", metavar="TEXT", help="cases whose name has it; may be given several times"
    )
    options_of.add_argument("--dry-run", action="store_true", help="tiny sizes, each call once: measures nothing")
    options = options_of.parse_args(arguments)
    every = [*pack_cases.cases(options.dry_run), *loss_cases.cases(options.dry_run)]
    chosen = [case for case in every if any(text in case.name for text in options.only or [""])]
    if not chosen:
        options_of.error(f"--only: expected parts of {', '.join(case.name for case in every)}")
    report = Report(options.dry_run, command(options_of, options))
    for case in chosen:
        print(case.name, file=sys.stderr, flush=True)
        try:
            measure(case, report)
        except Exception as error:  # the others are measured all the same
            report.problems.append(f"{case.name}: {type(error).__name__}: {str(error).splitlines()[0]}")
        gc.collect()
    content = report.write(options.out)
    print(tables(content), end="")
    print(f"written: {options.out.name}, {options.out.with_suffix('.svg').name}")
    return 1 if report.problems else 0


def measure(case: Case, report: Report) -> None:
    """Time the sides that are there; AssertionError if a result is wrong."""
    # Without what was compiled before, a code object's number of shapes does not reach its limit.
    torch._dynamo.reset()
    with threads(case.threads):
        sides = case.prepare()
        present = {name: side for name, side in sides.items() if isinstance(side, Side)}
        found = in_turns(present, DRY if report.dry else Pace())
    report.add(case, found, {name: side for name, side in sides.items() if isinstance(side, str)})


if __name__ == "__main__":
    sys.exit(main())
