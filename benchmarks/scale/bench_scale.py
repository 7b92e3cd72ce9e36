"""How the time and the memory of a training step grow with batch, picture, classes, network and ranks.

    make bench-scale
    make bench-scale ARGS="--device cuda --out scale.json"

Each axis leaves a common point in one size. A point's methods take turns in one process; memory is measured in another.
From the largest sizes of each axis follows the slope on log axes (1: proportional), and from it the size at which each
method fills ``--memory``: what breaks first. JSON with provenance goes to ``--out``, a picture beside it. A point that
fails is a line of the result, and ends nothing else.

On a quiet core it takes about ten minutes. A machine at work makes times too long: slopes are those of the least times.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

import torch

from benchmarks.harness.program import ROOT, command, number, parser
from benchmarks.harness.timing import NOT_MEASURED
from benchmarks.scale.growth import breaking, shares, slopes
from benchmarks.scale.points import AXES, COMMON, QUICK, QUICK_AXES, Point, along
from benchmarks.scale.scale_tables import plot, tables
from benchmarks.step.train_memory import ALLOCATOR
from elle_fast._core.files import write_json
from elle_fast.recipes.provenance import provenance

ABOUT = {
    "ms": "wall clock of a step (gradients zeroed, loss, backward, optimiser) of narrow PreActResNets in float32, "
    "channels_last; the methods take turns; least, quartiles and median of the rounds",
    "peak_bytes": "of a step, with weights, buffers and the optimiser's state, in a process whose allocator gives "
    "every block back; CUDA: max_memory_allocated",
    "pack, loss": "pack_points of the batch, and elle_loss of its four points' logits forward and backward, alone",
    "slope": "of log time or log memory over log size, least squares over the three largest sizes; 1 is proportional. "
    "Of ranks, each with the batch of one: log2 of what two take over what one takes",
    "breaking": "where a method fills the memory given, by the line through its two largest sizes",
    "elle-a-fast-light": "--fast in a step with lam = 0, which most steps of a healthy training are; -full: lam_max",
}
_LEAST_ROUNDS = 2


def main(argv: Sequence[str] | None = None) -> int:
    """Measure, print, write; 1 if a point failed."""
    options_of = _parser()
    options = options_of.parse_args(argv)
    if options.device == "cuda" and not torch.cuda.is_available():
        options_of.error("device: expected one that is there, got cuda, and torch sees no CUDA device")
    words = command(options_of, options)
    options.memory = int(2**30 * options.memory) if options.memory else _memory(options.device)
    content = measure(options, provenance(words))
    write_json(options.out, content)
    print(tables(content))
    plot(content, options.out.with_suffix(".svg"))
    print(f"written: {options.out.name}, {options.out.with_suffix('.svg').name}")
    return 1 if content["failures"] else 0


def measure(options: argparse.Namespace, about_us: dict[str, Any]) -> dict[str, Any]:
    """Everything that goes to JSON; what is there so far is written after each point."""
    common, axes = (QUICK, QUICK_AXES) if options.quick else (COMMON[options.device], AXES[options.device])
    if options.device == "cuda":
        axes = {**axes, "ranks": tuple(n for n in axes["ranks"] if n <= torch.cuda.device_count())}
    points, began, load = along(common, axes), time.monotonic(), os.getloadavg()[0]
    found: dict[str, dict[str, Any]] = {}
    failures: dict[str, str] = {}

    def content() -> dict[str, Any]:
        rows = {
            axis: {str(value): found[point.name()] for value, point in values.items() if point.name() in found}
            for axis, values in points.items()
        }
        grown = {axis: slopes(axis, each) for axis, each in rows.items()}
        return {
            "note": NOT_MEASURED if options.quick else None,
            "about": ABOUT,
            "setting": {"device": options.device, "threads": options.threads, "rounds": options.rounds},
            "common": asdict(common),
            "memory_bytes": options.memory,
            "load_before": load,
            "load_after": os.getloadavg()[0],
            "seconds": round(time.monotonic() - began, 1),
            "axes": rows,
            "slopes": grown,
            "breaking": {axis: breaking(each, options.memory) for axis, each in rows.items() if axis != "ranks"},
            "shares": {axis: shares(each) for axis, each in rows.items() if axis != "ranks"},
            "failures": failures,
            **about_us,
        }

    for axis, values in points.items():
        for point in values.values():
            name = point.name()
            if name in found or name in failures:
                continue
            print(f"{axis}: {name}", file=sys.stderr)
            try:
                found[name] = measured(point, options)
            except RuntimeError as error:
                failures[name] = str(error)
                print(f"failed: {error}", file=sys.stderr)
            write_json(options.out, content())
    return content()


def measured(point: Point, options: argparse.Namespace) -> dict[str, Any]:
    """Times and memory of one point; RuntimeError says why there are none."""
    times, memory = (worker(point, what, options) for what in ("times", "memory"))
    rows = {name: {"ms": each, "peak_bytes": memory.get(name)} for name, each in times.items()}
    return {name: row if name in memory else {"ms": row["ms"]} for name, row in rows.items()}


def worker(point: Point, what: str, options: argparse.Namespace) -> dict[str, Any]:
    """What the processes of a point find, one for each rank; that of rank 0 tells."""
    words = [sys.executable, "-m", "benchmarks.scale.worker", json.dumps(asdict(point)), f"--what={what}"]
    words += [f"--device={options.device}", f"--threads={options.threads}", f"--rounds={options.rounds}"]
    words += [f"--timeout={options.timeout}"]
    environment = {**os.environ, "OMP_NUM_THREADS": str(options.threads), **(ALLOCATOR if what == "memory" else {})}
    with tempfile.TemporaryDirectory() as folder:
        words.append(f"--meeting={folder}/meeting")
        pipes: dict[str, Any] = {"cwd": ROOT, "env": environment, "text": True}
        pipes |= {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
        ranks = [subprocess.Popen([*words, f"--rank={rank}"], **pipes) for rank in range(point.ranks)]
        until = time.monotonic() + options.timeout
        try:
            said = [rank.communicate(timeout=max(1.0, until - time.monotonic())) for rank in ranks]
        except subprocess.TimeoutExpired as error:
            raise RuntimeError(f"{point.name()}: {what} took more than {options.timeout:g} s") from error
        finally:
            for rank in ranks:
                if rank.poll() is None:
                    rank.kill()
                    rank.communicate()  # closes its pipes
    for rank, (_, errors) in zip(ranks, said, strict=True):
        if rank.returncode:
            last = (errors.strip().splitlines() or ["without a word"])[-1]
            killed = f"killed by signal {-rank.returncode}: " if rank.returncode < 0 else ""
            raise RuntimeError(f"{point.name()}: {what}: {killed}{last}")
    found: dict[str, Any] = json.loads(said[0][0].splitlines()[-1])
    return found


def _memory(device: str) -> int:
    if device == "cuda" and torch.cuda.is_available():
        return torch.cuda.get_device_properties(0).total_memory
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def _parser() -> argparse.ArgumentParser:
    options_of = parser("benchmarks.scale.bench_scale", __doc__)
    options_of.add_argument("--quick", action="store_true", help="two tiny sizes on each axis, to try it")
    options_of.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    options_of.add_argument("--threads", type=number, default=1, help="of torch in each process")
    options_of.add_argument("--rounds", type=partial(number, low=_LEAST_ROUNDS), default=7, help="steps of each method")
    options_of.add_argument("--memory", type=float, help="GiB to fill; by default all of the machine or GPU")
    options_of.add_argument("--timeout", type=float, default=300.0, help="seconds of a process")
    options_of.add_argument(
        "--out", type=Path, default=ROOT / "runs" / "bench_scale.json", help="JSON file, a picture beside it"
    )
    return options_of


if __name__ == "__main__":
    sys.exit(main())
