"""What it saves that glibc keeps freed memory (elle_fast/_core/kept_memory.py): a step of a training, by turns.

    python -m benchmarks.step.kept_memory

Two processes of each case take turns, one as `elle-fast train` has it and one without. A turn is --steps steps of the
run's own loop, on random pictures of 32x32 in batches of 128, one thread. Of each side there are the median seconds of
a step over all turns, its page faults a step, and the most memory that its process ever had.
"""

from __future__ import annotations

import argparse
import json
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from contextlib import ExitStack, closing
from pathlib import Path
from typing import Any

import torch

from benchmarks.harness.program import ROOT, command, number, parser
from benchmarks.harness.tables import markdown
from benchmarks.harness.timing import NOT_MEASURED
from benchmarks.step.train_rows import NETS, TINY
from elle_fast._core.files import write_json
from elle_fast._core.kept_memory import keep_freed_memory
from elle_fast.recipes.config import TrainConfig
from elle_fast.recipes.distributed import Ranks
from elle_fast.recipes.provenance import provenance
from elle_fast.recipes.run import Run

CASES = ("fgsm fp32", "fgsm bf16", "elle-a fp32", "elle-a bf16")
SIDES = ("kept", "given back")
_WARM = 4


def serve(case: str, side: str, quick: bool) -> None:
    """Take as many steps as each line that comes in says, and print what a step took; ends with the input."""
    torch.set_num_threads(1)
    if side == "kept" and not keep_freed_memory():
        raise OSError("malloc: expected glibc's, without variables of its own, got another or some")
    method, precision = case.split()
    net = (TINY if quick else NETS)["preact"]
    asked = TrainConfig(
        data="image-folder",
        model=net.model,
        width=net.width,
        method=method,
        eps=8 / 255,
        batch_size=net.batch,
        validation=0,
        augment=False,
        precision=precision,
        device="cpu",
    )
    with ExitStack() as stack:
        folder = stack.enter_context(tempfile.TemporaryDirectory())
        ranks = stack.enter_context(closing(Ranks(120.0)))
        run = Run(asked.resolved(), net.pictures(), Path(folder) / "checkpoint.pt", ranks)
        run.model.train()
        ((x, y),) = run.upcoming(1)
        for _ in range(_WARM):
            run.take_step(x, y)
        print("ready", flush=True)
        for line in sys.stdin:
            seconds, faults = [], resource.getrusage(resource.RUSAGE_SELF).ru_minflt
            for _ in range(int(line)):
                begin = time.perf_counter()
                run.take_step(x, y)
                seconds.append(time.perf_counter() - begin)
            used = resource.getrusage(resource.RUSAGE_SELF)
            row = {"seconds": seconds, "faults": used.ru_minflt - faults, "peak": used.ru_maxrss / 2**10}
            print(json.dumps(row), flush=True)


def compared(case: str, rounds: int, steps: int, quick: bool) -> dict[str, Any]:
    """The two sides of a case."""
    with ExitStack() as stack:
        processes = {}
        for side in SIDES:
            call = [sys.executable, "-W", "ignore", "-m", "benchmarks.step.kept_memory", "--serve", side]
            call += ["--cases", case, *["--quick"] * quick]
            process = subprocess.Popen(call, cwd=ROOT, text=True, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
            processes[side] = stack.enter_context(process)
            stack.callback(process.terminate)
            if process.stdout is None or process.stdout.readline() != "ready\n":
                raise RuntimeError(f"{case}, {side}: expected a process that trains, got one that ended")
        found: dict[str, dict[str, Any]] = {side: {"seconds": [], "faults": 0} for side in SIDES}
        for i in range(rounds):
            for side in SIDES if i % 2 else SIDES[::-1]:
                process = processes[side]
                assert process.stdin is not None
                assert process.stdout is not None
                print(steps, file=process.stdin, flush=True)
                row = json.loads(process.stdout.readline())
                found[side]["seconds"] += row["seconds"]
                found[side]["faults"] += row["faults"]
                found[side]["peak"] = row["peak"]
    rows = {
        side: {
            "step_ms": round(1e3 * statistics.median(row["seconds"]), 2),
            "faults_a_step": round(row["faults"] / len(row["seconds"])),
            "peak_mib": round(row["peak"]),
        }
        for side, row in found.items()
    }
    return {**rows, "ratio": round(rows["given back"]["step_ms"] / rows["kept"]["step_ms"], 3)}


def table(rows: dict[str, dict[str, Any]]) -> str:
    """Markdown, a line for each case."""
    head = ["", "ms a step, kept", "given back", "ratio", "page faults a step", "peak, MiB"]
    lines = []
    for case, row in rows.items():
        kept, back = (row[side] for side in SIDES)
        faults, peak = (f"{kept[name]} / {back[name]}" for name in ("faults_a_step", "peak_mib"))
        lines.append((case, f"{kept['step_ms']:.1f}", f"{back['step_ms']:.1f}", f"{row['ratio']:.2f}", faults, peak))
    return markdown(head, lines)


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure, print, write; 0."""
    options_of = _parser()
    options = options_of.parse_args(arguments)
    if options.serve:
        serve(options.cases[0], options.serve, options.quick)
        return 0
    rows = {case: compared(case, options.rounds, options.steps, options.quick) for case in options.cases}
    about = " ".join((__doc__ or "").split("\n\n")[-1].split())
    content = {"about": about, **({"note": NOT_MEASURED} if options.quick else {}), "rows": rows}
    write_json(options.out, content | provenance(command(options_of, options)))
    print(table(rows))
    return 0


def _parser() -> argparse.ArgumentParser:
    options_of = parser("benchmarks.step.kept_memory", __doc__)
    options_of.add_argument("--cases", nargs="+", choices=CASES, default=list(CASES))
    options_of.add_argument("--rounds", type=number, default=8, help="turns of each side")
    options_of.add_argument("--steps", type=number, default=15, help="of a turn")
    options_of.add_argument("--quick", action="store_true", help="a tiny network: try the program")
    options_of.add_argument("--serve", choices=SIDES, help=argparse.SUPPRESS)
    out = ROOT / "benchmarks" / "results" / "kept_memory.json"
    options_of.add_argument("--out", type=Path, default=out, help="the JSON file")
    return options_of


if __name__ == "__main__":
    sys.exit(main())
