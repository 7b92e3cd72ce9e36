"""One command for a GPU: its tests, then times beside torch's, ending in JSON, a plot and a short table.

    python -m benchmarks.gpu.gpu_report --out DIR
    python -m benchmarks.gpu.gpu_report --out DIR --skip-tests --sweep
    python -m benchmarks.gpu.gpu_report --out DIR --dry-run

Needs torch and Triton, for the tests pytest, no network, and less than eight minutes.

Each part is a process of its own with a time limit, so that one that hangs or ruins its CUDA context does not take the
others with it; what it has finished is in a file at every moment. Before a call is timed, its result is compared with
the reference's on the same, fresh inputs. DIR gets gpu_report.json, gpu_report.png and the logs.

--dry-run needs no GPU: the same parts run on tiny sizes on the CPU, in Triton's interpreter. It measures nothing,
and has no time limits, so that a slow machine gets the same result.

Exit status: 0 if all is well; 1 if a test failed, a part ended in an error or ran out of time, or a target was missed
or not measured; 2 if it cannot run here.
"""

from __future__ import annotations

import argparse
import hashlib
import importlib.util
import json
import math
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

from benchmarks.gpu.gpu_tables import plot, problems_of, table, targets
from benchmarks.gpu.kernels import part_kernels
from benchmarks.gpu.parts import ROOT, Run, part_elle_loss, part_pack_points, part_step, recorded
from benchmarks.gpu.sweep import part_sweep
from benchmarks.harness.clock import NOT_MEASURED, Clock, DeviceClock, DryClock
from benchmarks.ops.sizes import LOSS_CASES, PACK_CASES, LossCase, PackCase
from elle_fast._core.files import write_json
from elle_fast.recipes.provenance import provenance

# Seconds. A part may use less; what is left of the total bounds them all.
TOTAL = 455.0
BUDGETS = {"tests": 190.0, "kernels": 80.0, "pack_points": 95.0, "elle_loss": 85.0, "step": 30.0, "sweep": 100.0}
# A part looks at the clock between measurements, so it may need a little longer; then it is ended.
GRACE = 15.0

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

    def __init__(self, options: argparse.Namespace) -> None:
        self.options = options
        self.parts: dict[str, dict[str, Any]] = {}
        self._begin = time.monotonic()
        device = None if options.dry_run else device_facts()
        # Read after the device was touched, whose name is then part of it.
        flags = ["--dry-run"] * options.dry_run + ["--skip-tests"] * options.skip_tests
        flags += ["--quick"] * options.quick + ["--sweep"] * options.sweep
        command = ["python", "-m", "benchmarks.gpu.gpu_report", *flags, "--out", options.out.name]
        self.about = {
            "dry_run": options.dry_run,
            "note": NOT_MEASURED if options.dry_run else "measured on the device named below",
            **provenance(command),
            "device": device,
            "sources_sha256": sources(),
            "clocks": (DryClock if options.dry_run else DeviceClock).about,
        }
        self.about["commit"] = self.about["commit"] or "unknown"

    def seconds_for(self, name: str) -> float:
        """The time of a part, which ends with that for everything; a dry run has no limits."""
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

    def run(self, name: str, work: Callable[[Report, float], dict[str, Any]]) -> None:
        """Do one part, and record how it ended."""
        begin, seconds = time.monotonic(), self.seconds_for(name)
        print(f"{name} ...", flush=True)
        part: dict[str, Any] = {"status": "skipped, out of time"}
        self.parts[name] = part
        try:
            if seconds > GRACE:
                part["status"] = "failed"
                with recorded(part):
                    part.update({"status": "done", **work(self, seconds)})
                if "error" in part:
                    part["status"] = "failed"
        except BaseException:
            part["status"] = "interrupted"
            part.update(self.left_behind(name))
            raise
        finally:
            part["seconds"] = round(time.monotonic() - begin, 1)
            self.save()
        print(f"{name}: {part['status']}, {part['seconds']:.0f} s", flush=True)

    def left_behind(self, name: str) -> dict[str, Any]:
        """What the process of a part has written; its file goes."""
        path = self.options.out / f"part-{name}.json"
        if not path.exists():
            return {}
        found: dict[str, Any] = json.loads(path.read_text())
        path.unlink()
        return found


# ---- What the parts are


def tests(report: Report, seconds: float) -> dict[str, Any]:
    """``pytest -m gpu``: how many tests ended how, and which failed."""
    if importlib.util.find_spec("pytest") is None:
        return {"status": "skipped, there is no pytest"}
    dry = report.options.dry_run
    where = ["tests/test_gpu.py"] if dry else ["tests"]
    command = [sys.executable, "-m", "pytest", *where, "-m", "gpu", "-v", "-o", "filterwarnings=default"]
    # What is logged while torch compiles would fill the file.
    command += ["-p", "no:cacheprovider", "--durations=10", "--tb=short", "--show-capture=no"]
    if not dry and importlib.util.find_spec("xdist") is not None:
        # Most of their time is Triton compiling, on one core a test.
        command += ["-n", "4"]
    # Poisoned memory asks torch for deterministic algorithms, of which cuBLAS has some only with this setting.
    variables = {"CUBLAS_WORKSPACE_CONFIG": ":4096:8"}
    if dry:
        # All are skipped, also where there is a GPU.
        variables["CUDA_VISIBLE_DEVICES"] = "-1"
    status, output = child(report, "tests", command, seconds, interpreted=False, log="gpu_tests.log", **variables)
    found: dict[str, Any] = {"command": shlex.join(["python", *command[1:]]), "outcomes": outcomes(output)}
    found["failures"] = re.findall(r"^(?:FAILED|ERROR) .*", output, flags=re.MULTILINE)[:50]
    found["tail"] = output[-3000:]
    if status is None:
        found["error"] = f"still running after {seconds:.0f} s; ended"
    elif status != 0:
        found["error"] = f"pytest ended with status {status}"
    elif not dry and not found["outcomes"].get("passed"):
        found["error"] = "no test ran"
    return found


def outcomes(output: str) -> dict[str, int]:
    """Counts from the lines of ``pytest -v``, with pytest-xdist or without, whole or cut off."""
    counts: dict[str, int] = {}
    names = "PASSED|FAILED|ERROR|SKIPPED|XFAIL|XPASS"
    for line in output.splitlines():
        found = re.match(rf"\[gw\d+\] \[ *\d+%\] ({names}) ", line) or re.match(
            rf"\S+::.* ({names})\b.*\[ *\d+%\]$", line
        )
        if found:
            counts[found[1].lower()] = counts.get(found[1].lower(), 0) + 1
    return counts


def kernels(report: Report, seconds: float) -> dict[str, Any]:
    """Every kernel once, and again under compute-sanitizer where that is there and works."""
    begin = time.monotonic()
    # First without: under the tool, compiling alone would take too long.
    found = measured("kernels")(report, 0.6 * seconds)
    tool = shutil.which("compute-sanitizer") or shutil.which("compute-sanitizer", path="/usr/local/cuda/bin")
    if "error" in found or tool is None or report.options.dry_run:
        reason = "there is no compute-sanitizer" if tool is None else "a dry run"
        return {"memcheck": f"not run: {reason if 'error' not in found else 'it fails without'}", **found}
    command = [tool, "--tool", "memcheck", "--report-api-errors", "no", "--error-exitcode", "86"]
    command += part_command(report, "kernels", seconds)
    rest = seconds - (time.monotonic() - begin)
    # With torch's cache one allocation holds many tensors, and the tool would not see where one ends.
    status, output = child(
        report, "kernels", command, rest, interpreted=False, log="sanitizer.log", PYTORCH_NO_CUDA_MEMORY_CACHING="1"
    )
    report.left_behind("kernels")
    summary = re.findall(r"ERROR SUMMARY: (\d+) error", output)
    if status is None:
        return {"memcheck": f"not finished after {rest:.0f} s", **found}
    if not summary or "Device not supported" in output:
        return {"memcheck": f"does not work here: {output.strip()[-300:]}", **found}
    if status == 0 and summary[-1] == "0":
        return {"memcheck": "0 errors", **found}
    return {"memcheck": f"{summary[-1]} errors", "error": f"under compute-sanitizer: {output[-3000:]}", **found}


def measured(name: str) -> Callable[[Report, float], dict[str, Any]]:
    """A part of :data:`PARTS`, in its process."""

    def work(report: Report, seconds: float) -> dict[str, Any]:
        limit = seconds + GRACE
        status, output = child(
            report,
            name,
            part_command(report, name, seconds),
            limit,
            interpreted=report.options.dry_run,
            log="gpu_report.log",
        )
        found = report.left_behind(name)
        if status is None:
            found["error"] = f"still running after {limit:.0f} s; ended"
        elif status != 0 and "error" not in found:
            found["error"] = f"ended with status {status}: {output[-2000:]}"
        return found

    return work


# ---- Their processes


def child(
    report: Report, name: str, command: Sequence[str], seconds: float, *, interpreted: bool, log: str, **more: str
) -> tuple[int | None, str]:
    """A process' exit status (None: it took too long and was ended) and output, which is also appended to a log."""
    hidden = ("TRITON_INTERPRET", "PYTEST_", "COV_")
    environment = {key: value for key, value in os.environ.items() if not key.startswith(hidden)} | more
    # Compiled in the process itself: a pool of workers would disturb the timing of the host.
    environment["TORCHINDUCTOR_COMPILE_THREADS"] = "1"
    if interpreted:
        environment["TRITON_INTERPRET"] = "1"
    path = report.options.out / log
    with path.open("ab") as file:
        file.write(f"\n==== {name}\n".encode())
        file.flush()
        begin = file.tell()
        # A session of its own, so that whatever it starts can be ended with it.
        process = subprocess.Popen(
            command,
            cwd=ROOT,
            env=environment,
            stdin=subprocess.DEVNULL,
            stdout=file,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
        try:
            status: int | None = process.wait(timeout=seconds if math.isfinite(seconds) else None)
        except subprocess.TimeoutExpired:
            status = None
        finally:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()
    with path.open("rb") as file:
        file.seek(begin)
        return status, file.read().decode(errors="replace").replace(f"{ROOT}{os.sep}", "")


def part_command(report: Report, name: str, seconds: float) -> list[str]:
    """How a part's process is started."""
    options = report.options
    command = [sys.executable, "-m", "benchmarks.gpu.gpu_report", "--out", str(options.out.resolve())]
    command += ["--dry-run"] * options.dry_run + ["--quick"] * options.quick
    return [*command, "--part", name, "--seconds", f"{seconds:.1f}"]


def run_part(options: argparse.Namespace) -> int:
    """The child process of a part."""
    if options.dry_run:
        clock: Clock = DryClock()
    else:
        clock = DeviceClock(torch.device("cuda", 0), milliseconds=20.0 if options.quick else 60.0)
    run = Run(clock, options.out / f"part-{options.part}.json", options.seconds, quick=options.quick)
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
    """Of the package and the benchmarks; names what was measured where git cannot."""
    digest = hashlib.sha256()
    for path in sorted(path for folder in ("elle_fast", "benchmarks") for path in (ROOT / folder).rglob("*.py")):
        digest.update(path.relative_to(ROOT).as_posix().encode() + b"\0" + path.read_bytes() + b"\0")
    return digest.hexdigest()


# ---- The command


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the parts and print the table."""
    parser = _parser()
    options = parser.parse_args(arguments)
    if options.out.exists() and not options.out.is_dir():
        parser.error(f"--out: expected a folder, got the file {str(options.out)!r}")
    if not options.dry_run and not torch.cuda.is_available():
        parser.error("torch sees no CUDA or ROCm device; --dry-run runs every part on the CPU, measuring nothing")
    options.out.mkdir(parents=True, exist_ok=True)
    if options.part is not None:
        return run_part(options)

    # Ended from outside, the report keeps what it has, and takes the process of the part along.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    for name in ("gpu_report.json", "gpu_report.png", "gpu_report.log", "gpu_tests.log", "sanitizer.log"):
        (options.out / name).unlink(missing_ok=True)
    report = Report(options)
    work: dict[str, Callable[[Report, float], dict[str, Any]]] = {"tests": tests, "kernels": kernels}
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
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="folder of the results")
    parser.add_argument("--dry-run", action="store_true", help="tiny sizes on the CPU; needs no GPU, measures nothing")
    parser.add_argument("--skip-tests", action="store_true", help="times alone")
    parser.add_argument(
        "--quick", action="store_true", help="the cases of the targets alone, timed for a shorter while"
    )
    parser.add_argument("--sweep", action="store_true", help="also time other block sizes and numbers of warps")
    # Of a part's own process.
    parser.add_argument("--part", choices=list(PARTS), help=argparse.SUPPRESS)
    parser.add_argument("--seconds", type=float, default=60.0, help=argparse.SUPPRESS)
    return parser


if __name__ == "__main__":
    sys.exit(main())
