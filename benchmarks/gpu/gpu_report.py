"""One command for a GPU, in stages: tests, the ops, the captured step, whole trainings; JSON, a plot, a short table.

    make gpu-report ARGS="--stages 0,1,2,3 --out DIR"
    make gpu-report ARGS="--stages 4 --root cifar10-jpeg.tar.xz --out DIR"
    make gpu-report ARGS=--dry-run

Where no environment can be made, ``python3 -m benchmarks.gpu.gpu_report`` takes the same arguments.

Needs torch, Triton and the packages of elle-fast[recipes]; for the tests pytest, for the trainings a data set, for
AutoAttack pyautoattack (from a wheel, where there is no registry); no network. All stages take less than eleven
minutes, the first call above less than seven. What a stage leaves of its time goes to
those after it.

The most valuable stage comes first, each has a time limit, and one that fails does not stop the others. DIR, by default
runs/gpu_report, holds stage-N.json, written anew after each part of a stage, the plot and a log: at most 8 files. Each
part is a process of its own, so one that hangs or ruins its CUDA context does not hurt the others. Before a call is
timed, its result is compared with the reference's on the same, fresh inputs.

--dry-run needs no GPU: the same stages run on tiny sizes on the CPU, in Triton's interpreter, in less than a minute. It
measures nothing, and has no time limits, so that a slow machine gets the same result.

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
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from benchmarks.gpu.elle_loss import part_elle_loss
from benchmarks.gpu.first_tests import tests
from benchmarks.gpu.gpu_tables import plot, problems_of, table, targets
from benchmarks.gpu.kernels import part_kernels
from benchmarks.gpu.pack_points import part_pack_points
from benchmarks.gpu.processes import GRACE, LOG, Work, build, left_behind, measured, sanitized, trainings
from benchmarks.gpu.run import Run, recorded
from benchmarks.gpu.steps import part_steps
from benchmarks.gpu.trainings import part_trainings
from benchmarks.harness.device import Device
from benchmarks.harness.program import ROOT, command, listed, parser
from benchmarks.harness.timing import NOT_MEASURED
from elle_fast._core.files import write_json
from elle_fast.data import NAMES
from elle_fast.recipes.provenance import provenance


@dataclass(frozen=True)
class Part:
    """A part of a stage, the seconds that are meant for it, and what does it."""

    name: str
    stage: int
    seconds: float
    work: Work


PLAN = (
    Part("build", 0, 75.0, build),
    Part("tests", 1, 90.0, tests),
    Part("pack_points", 2, 65.0, measured("pack_points")),
    Part("elle_loss", 2, 55.0, measured("elle_loss")),
    Part("steps", 3, 90.0, measured("steps")),
    Part("trainings", 4, 240.0, trainings),
)
STAGES = tuple(dict.fromkeys(part.stage for part in PLAN))
# With --sanitize and --all-tests.
SANITIZED = Part("kernels", 5, 100.0, sanitized)
ALL_TESTS = 400.0

# What the process of a part does.
PARTS: dict[str, Callable[[Run], None]] = {
    "kernels": part_kernels,
    "pack_points": part_pack_points,
    "elle_loss": part_elle_loss,
    "steps": part_steps,
    "trainings": part_trainings,
}


# ---- The parent: parts one after the other


class Report:
    """The parts' results, and the file of each stage, written after each of its parts."""

    def __init__(self, options: argparse.Namespace, plan: Sequence[Part], words: list[str]) -> None:
        self.options, self.plan = options, plan
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

    def seconds_for(self, part: Part) -> float:
        """The time for a part: until what is meant for it and those before it is over. A dry run has no limits."""
        if self.options.dry_run:
            return math.inf
        until = sum(each.seconds for each in self.plan[: self.plan.index(part) + 1])
        return self._begin + until - time.monotonic()

    def value(self, *stages: int) -> dict[str, Any]:
        """Some stages, or all, as JSON types."""
        names = [part.name for part in self.plan if not stages or part.stage in stages]
        parts = {name: self.parts[name] for name in names if name in self.parts}
        return {
            **self.about,
            **({"stage": stages[0]} if stages else {}),
            "seconds": round(sum(part["seconds"] for part in parts.values()), 1),
            "problems": [f"{name}: {text}" for name, part in parts.items() for text in problems_of(part)],
            "targets": targets(parts, dry=self.options.dry_run),
            "parts": parts,
        }

    def run(self, part: Part) -> None:
        """Do one part, record how it ended, and write its stage's file."""
        begin, seconds = time.monotonic(), self.seconds_for(part)
        print(f"{part.name} ...", flush=True)
        found: dict[str, Any] = {
            "status": "skipped, out of time",
            "seconds_given": round(seconds, 1) if math.isfinite(seconds) else None,
        }
        self.parts[part.name] = found
        try:
            if seconds > 2 * GRACE:
                found["status"] = "failed"
                with recorded(found):
                    found.update({"status": "done", **part.work(self.options, seconds)})
                if "error" in found:
                    found["status"] = "failed"
        except BaseException:
            found["status"] = "interrupted"
            found.update(left_behind(self.options, part.name))
            raise
        finally:
            found["seconds"] = round(time.monotonic() - begin, 1)
            write_json(self.options.out / f"stage-{part.stage}.json", self.value(part.stage))
        print(f"{part.name}: {found['status']}, {found['seconds']:.0f} s", flush=True)


# ---- The child: one part


def run_part(options: argparse.Namespace) -> int:
    """The process of a part."""
    path = options.out / f"part-{options.part}.json"
    run = Run(Device(dry=options.dry_run), path, options)
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
    if options.root is not None and not options.root.exists():
        options_of.error(f"--root: expected the files of a data set, got {str(options.root)!r}, which is not there")
    if not options.dry_run and not torch.cuda.is_available():
        options_of.error("torch sees no CUDA or ROCm device; --dry-run runs every stage on the CPU, measuring nothing")
    options.out.mkdir(parents=True, exist_ok=True)
    if options.part is not None:
        return run_part(options)

    # When terminated, keep the report so far and end the part's process too.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    plan = planned(options)
    written = [*(f"stage-{part.stage}.json" for part in plan), *(f"part-{name}.json" for name in PARTS)]
    for name in ("gpu_report.svg", LOG, *written):
        (options.out / name).unlink(missing_ok=True)
    report = Report(options, plan, command(options_of, options))
    if options.dry_run:
        print(f"DRY RUN on the CPU. On a GPU, in {sum(part.seconds for part in plan):.0f} s:", flush=True)
    for part in plan:
        print(f"stage {part.stage}, {part.seconds:.0f} s, {part.name}: {about(part)}", flush=True)
    for part in plan:
        report.run(part)
    value = report.value()
    if importlib.util.find_spec("matplotlib") is None:
        print("no plot, as there is no matplotlib")
    elif any(part.stage == 2 for part in plan):
        with recorded(value, "plot"):
            plot(value, options.out / "gpu_report.svg")
    print(table(value), flush=True)
    missed = [row for row in value["targets"] if row["met"] is False or (row["met"] is None and not options.dry_run)]
    return 1 if value["problems"] or missed or "plot" in value else 0


def planned(options: argparse.Namespace) -> list[Part]:
    """The parts of the chosen stages; with --seconds the last one has what those before it leave."""
    plan = [part for part in PLAN if part.stage in options.stages]
    if options.all_tests:
        plan = [replace(part, seconds=ALL_TESTS) if part.name == "tests" else part for part in plan]
    plan += [SANITIZED] if options.sanitize else []
    if options.seconds is not None:
        plan[-1] = replace(plan[-1], seconds=options.seconds - sum(part.seconds for part in plan[:-1]))
    return plan


def about(part: Part) -> str:
    """What a part does, in a sentence."""
    function = PARTS.get(part.name, part.work)
    return (function.__doc__ or "").split("\n\n")[0]


def _stage(text: str) -> int:
    if text not in map(str, STAGES):
        raise argparse.ArgumentTypeError(f"expected some of {','.join(map(str, STAGES))}, got {text!r}")
    return int(text)


def _parser() -> argparse.ArgumentParser:
    options_of = parser("benchmarks.gpu.gpu_report", __doc__)
    options_of.add_argument("--out", type=Path, default=ROOT / "runs" / "gpu_report", help="folder of the results")
    options_of.add_argument("--dry-run", action="store_true", help="tiny sizes on the CPU; measures nothing")
    options_of.add_argument(
        "--stages", type=listed(_stage), default=STAGES, help="numbers, with commas; all by default"
    )
    options_of.add_argument(
        "--root", type=Path, help="files of the data set to train on; without it nothing is trained"
    )
    options_of.add_argument("--data", choices=NAMES, default="image-folder", help="which data set that is")
    options_of.add_argument(
        "--seconds", type=float, help="for all stages; the last one gets what is more than their sum"
    )
    options_of.add_argument("--all-tests", action="store_true", help=f"every GPU test, in up to {ALL_TESTS:.0f} s")
    options_of.add_argument("--sanitize", action="store_true", help="launch every kernel under compute-sanitizer, too")
    # Of a part's own process.
    options_of.add_argument("--part", choices=list(PARTS), help=argparse.SUPPRESS)
    options_of.add_argument("--part-seconds", type=float, default=60.0, help=argparse.SUPPRESS)
    options_of.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    return options_of


if __name__ == "__main__":
    sys.exit(main())
