"""One command for a GPU: its tests, then times beside torch's, ending in JSON, a plot and a short table.

    make gpu-report
    make gpu-report ARGS="--out DIR --skip-tests --sweep"
    make gpu-report ARGS=--dry-run

Needs torch and Triton, for the tests pytest, no network, and less than eight minutes.

Each part is a process of its own with a time limit, so one that hangs or ruins its CUDA context does not hurt the
others; what it has finished is always in a file. Before a call is timed, its result is compared with the reference's
on the same, fresh inputs. The folder, by default runs/gpu_report, gets gpu_report.json, the plot and the logs.

--dry-run needs no GPU: the same parts run on tiny sizes on the CPU, in Triton's interpreter. It measures nothing,
and has no time limits, so that a slow machine gets the same result.

Exit status: 0 if all is well; 1 if a test failed, a part ended in an error or ran out of time, or a target was missed
or not measured; 2 if it cannot run here.
"""

from __future__ import annotations

import argparse
import hashlib
import importlib.util
import math
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

from benchmarks.gpu.elle_loss import part_elle_loss
from benchmarks.gpu.gpu_tables import plot, problems_of, table, targets
from benchmarks.gpu.kernels import part_kernels
from benchmarks.gpu.pack_points import part_pack_points
from benchmarks.gpu.processes import GRACE, Work, kernels, left_behind, measured, tests
from benchmarks.gpu.run import Run, recorded
from benchmarks.gpu.small_step import part_step
from benchmarks.gpu.sweep import part_sweep
from benchmarks.harness.device import Device
from benchmarks.harness.program import ROOT, command, parser
from benchmarks.harness.timing import NOT_MEASURED
from benchmarks.ops.sizes import LOSS_CASES, PACK_CASES, LossCase, PackCase
from elle_fast._core.files import write_json
from elle_fast.recipes.provenance import provenance

# Seconds. A part may use less; what is left of the total bounds them all.
TOTAL = 455.0
BUDGETS = {"tests": 190.0, "kernels": 80.0, "pack_points": 95.0, "elle_loss": 85.0, "step": 30.0, "sweep": 100.0}

PARTS: dict[str, Callable[[Run], None]] = {
    "kernels": part_kernels,
    "pack_points": part_pack_points,
    "elle_loss": part_elle_loss,
    "step": part_step,
    "sweep": part_sweep,
}


# ---- The parent: parts one after the other


class Report:
    """The parts' results, and the file they are in after each of them."""

    def __init__(self, options: argparse.Namespace, words: list[str]) -> None:
        self.options = options
        self.parts: dict[str, dict[str, Any]] = {}
        self._begin = time.monotonic()
        device = None if options.dry_run else device_facts()
        # After the device was touched: provenance names only a device that is in use.
        self.about = {
            "dry_run": options.dry_run,
            "note": NOT_MEASURED if options.dry_run else "measured on the device named below",
            **provenance(words),
            "device": device,
            "sources_sha256": sources(),
            "clocks": Device.about if not options.dry_run else NOT_MEASURED,
        }
        self.about["commit"] = self.about["commit"] or "unknown"

    def seconds_for(self, name: str) -> float:
        """The time for a part, at most what is left of the total; a dry run has no limits."""
        if self.options.dry_run:
            return math.inf
        return min(BUDGETS[name], TOTAL - (time.monotonic() - self._begin))

    def value(self) -> dict[str, Any]:
        """As JSON types."""
        seconds = round(time.monotonic() - self._begin, 1)
        problems = [f"{name}: {text}" for name, part in self.parts.items() for text in problems_of(part)]
        return {
            **self.about,
            "seconds": seconds,
            "problems": problems,
            "targets": targets(self.parts, dry=self.options.dry_run),
            "parts": self.parts,
        }

    def save(self) -> None:
        """Write what there is."""
        write_json(self.options.out / "gpu_report.json", self.value())

    def run(self, name: str, work: Work) -> None:
        """Do one part, and record how it ended."""
        begin, seconds = time.monotonic(), self.seconds_for(name)
        print(f"{name} ...", flush=True)
        part: dict[str, Any] = {"status": "skipped, out of time"}
        self.parts[name] = part
        try:
            if seconds > GRACE:
                part["status"] = "failed"
                with recorded(part):
                    part.update({"status": "done", **work(self.options, seconds)})
                if "error" in part:
                    part["status"] = "failed"
        except BaseException:
            part["status"] = "interrupted"
            part.update(left_behind(self.options, name))
            raise
        finally:
            part["seconds"] = round(time.monotonic() - begin, 1)
            self.save()
        print(f"{name}: {part['status']}, {part['seconds']:.0f} s", flush=True)


# ---- The child: one part


def run_part(options: argparse.Namespace) -> int:
    """The child process of a part."""
    device = Device(dry=options.dry_run, quick=options.quick)
    run = Run(device, options.out / f"part-{options.part}.json", options.seconds, quick=options.quick)
    with recorded(run.record):
        PARTS[options.part](run)
    run.save()
    return 0 if "error" not in run.record else 1


# ---- Facts


def device_facts() -> dict[str, Any]:
    """The GPU and its driver."""
    properties = torch.cuda.get_device_properties(0)
    facts: dict[str, Any] = {
        "name": properties.name,
        "memory_bytes": properties.total_memory,
        "multiprocessors": properties.multi_processor_count,
        "l2_bytes": getattr(properties, "L2_cache_size", None),
        "capability": f"{properties.major}.{properties.minor}",
        "cuda": torch.version.cuda,
        "hip": torch.version.hip,
        "devices": torch.cuda.device_count(),
    }
    query = "driver_version,clocks.sm,clocks.max.sm,clocks.mem,power.limit,temperature.gpu"
    try:
        done = subprocess.run(
            ["nvidia-smi", "--id=0", f"--query-gpu={query}", "--format=csv,noheader"],
            capture_output=True,
            text=True,
            timeout=20,
            check=True,
        )
        facts.update(zip(query.split(","), done.stdout.strip().split(", "), strict=True))
    except (OSError, subprocess.SubprocessError, ValueError) as error:
        facts["driver_version"] = f"unknown ({type(error).__name__})"
    return facts


def sources() -> str:
    """A digest of the package and the benchmarks, which names what was measured without git."""
    digest = hashlib.sha256()
    for path in sorted(path for folder in ("elle_fast", "benchmarks") for path in (ROOT / folder).rglob("*.py")):
        digest.update(path.relative_to(ROOT).as_posix().encode() + b"\0" + path.read_bytes() + b"\0")
    return digest.hexdigest()


# ---- The command


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the parts and print the table."""
    options_of = _parser()
    options = options_of.parse_args(arguments)
    if options.out.exists() and not options.out.is_dir():
        options_of.error(f"--out: expected a folder, got the file {str(options.out)!r}")
    if not options.dry_run and not torch.cuda.is_available():
        options_of.error("torch sees no CUDA or ROCm device; --dry-run runs every part on the CPU, measuring nothing")
    options.out.mkdir(parents=True, exist_ok=True)
    if options.part is not None:
        return run_part(options)

    # When terminated, keep the report so far and end the part's process too.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    for name in ("gpu_report.json", "gpu_report.png", "gpu_report.log", "gpu_tests.log", "sanitizer.log"):
        (options.out / name).unlink(missing_ok=True)
    report = Report(options, command(options_of, options))
    work: dict[str, Work] = {"tests": tests, "kernels": kernels}
    work |= {name: measured(name) for name in ("pack_points", "elle_loss", "step")}
    if options.skip_tests:
        del work["tests"], work["kernels"]
    if options.sweep or options.dry_run:
        work["sweep"] = measured("sweep")
    if options.dry_run:
        print(f"DRY RUN on the CPU. On a GPU, in at most {TOTAL:.0f} s:\n{plan(work)}\n", flush=True)
    for name, function in work.items():
        report.run(name, function)
    value = report.value()
    if importlib.util.find_spec("matplotlib") is None:
        print("no plot, as there is no matplotlib")
    else:
        with recorded(value, "plot"):
            plot(value, options.out / "gpu_report.png")
    print(table(value), flush=True)
    missed = [row for row in value["targets"] if row["met"] is False or (row["met"] is None and not options.dry_run)]
    return 1 if value["problems"] or missed or "plot" in value else 0


def plan(work: Sequence[str] | dict[str, Any]) -> str:
    """What would run, part by part."""
    cases: dict[str, Sequence[PackCase] | Sequence[LossCase]] = {"pack_points": PACK_CASES, "elle_loss": LOSS_CASES}
    lines = []
    for name in work:
        document = {"tests": tests, "kernels": kernels, **PARTS}[name].__doc__ if name != "kernels" else kernels.__doc__
        lines.append(f"{name} ({BUDGETS[name]:.0f} s): {document}")
        lines += [f"    {case.name}" for case in cases.get(name, ())]
    return "\n".join(lines)


def _parser() -> argparse.ArgumentParser:
    options_of = parser("benchmarks.gpu.gpu_report", __doc__)
    options_of.add_argument("--out", type=Path, default=ROOT / "runs" / "gpu_report", help="folder of the results")
    options_of.add_argument("--dry-run", action="store_true", help="tiny sizes on the CPU; measures nothing")
    options_of.add_argument("--skip-tests", action="store_true", help="times alone")
    options_of.add_argument(
        "--quick", action="store_true", help="the cases of the targets alone, timed for a shorter while"
    )
    options_of.add_argument("--sweep", action="store_true", help="also time other block sizes and numbers of warps")
    # Of a part's own process.
    options_of.add_argument("--part", choices=list(PARTS), help=argparse.SUPPRESS)
    options_of.add_argument("--seconds", type=float, default=60.0, help=argparse.SUPPRESS)
    return options_of


if __name__ == "__main__":
    sys.exit(main())
