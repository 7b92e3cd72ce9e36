"""The processes of gpu_report.py: one for each part, with a time limit, and the tools that it calls."""

from __future__ import annotations

import json
import math
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from argparse import Namespace
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from benchmarks.harness.program import ROOT
from elle_fast import backends
from elle_fast._core.files import write_json

# A part looks at the clock between measurements only, so it is told of this much less than it has.
GRACE = 8.0
LOG = "gpu_report.log"
LONGEST_LOG = 8 << 20  # bytes
MEMORY = Path("/dev/shm")
INTERRUPTED = "still running, and ended"

Work = Callable[[Namespace, float], dict[str, Any]]  # the options of the report, and seconds


def build(options: Namespace, seconds: float) -> dict[str, Any]:
    """The compiled extension with CUDA kernels for this GPU, in place, if nvcc is there and they are not."""
    why = backends.BACKENDS["cuda"].why_not()
    if options.dry_run or why is None:
        return {"built": "a dry run: nothing is built" if options.dry_run else "it was there"}
    command = [sys.executable, "setup.py", "--quiet", "build_ext", "--inplace"]
    # Empty: for the GPUs that nvidia-smi shows.
    status, output = child(options, "build", command, seconds, interpreted=False, ELLE_FAST_CUDA="")
    found = {"reason": why, "tail": output[-3000:]}
    # The build of the rest succeeds where that of the CUDA kernels does not.
    failure = ROOT / "elle_fast" / "_build_failure.txt"
    if status != 0 or failure.exists():
        return {"error": failure.read_text() if failure.exists() else _ending(status, seconds, output), **found}
    kinds = re.search(r"CUDA kernels: (.*?)\. ", output)
    return {"built": "now, CUDA kernels: " + (kinds[1] if kinds else "unknown"), **found}


def sanitized(options: Namespace, seconds: float) -> dict[str, Any]:
    """Every kernel once, and again under compute-sanitizer."""
    begin = time.monotonic()
    # First without the tool, under which compiling would take too long.
    found = measured("kernels")(options, 0.6 * seconds)
    tool = shutil.which("compute-sanitizer") or shutil.which("compute-sanitizer", path="/usr/local/cuda/bin")
    if "error" in found or tool is None or options.dry_run:
        reason = "a dry run" if options.dry_run else "there is no compute-sanitizer"
        return {"memcheck": f"not run: {'it fails without' if 'error' in found else reason}", **found}
    command = [tool, "--tool", "memcheck", "--report-api-errors", "no", "--error-exitcode", "86"]
    command += part_command(options, "kernels", seconds)
    rest = seconds - (time.monotonic() - begin)
    # Torch's caching allocator puts many tensors in one allocation, where the tool cannot see their ends.
    status, output = child(options, "kernels", command, rest, interpreted=False, PYTORCH_NO_CUDA_MEMORY_CACHING="1")
    left_behind(options, "kernels")
    summary = re.findall(r"ERROR SUMMARY: (\d+) error", output)
    if status is None:
        return {"memcheck": f"not finished after {rest:.0f} s", **found}
    if not summary or "Device not supported" in output:
        return {"memcheck": f"does not work here: {output.strip()[-300:]}", **found}
    if status == 0 and summary[-1] == "0":
        return {"memcheck": "0 errors", **found}
    return {"memcheck": f"{summary[-1]} errors", "error": f"under compute-sanitizer: {output[-3000:]}", **found}


def measured(name: str) -> Work:
    """A part of gpu_report.PARTS, in its process."""

    def work(options: Namespace, seconds: float) -> dict[str, Any]:
        status, output = child(
            options, name, part_command(options, name, seconds), seconds, interpreted=options.dry_run
        )
        found = left_behind(options, name)
        if status != 0 and "error" not in found:
            found["error"] = _ending(status, seconds, output)
        return found

    return work


def trainings(options: Namespace, seconds: float) -> dict[str, Any]:
    """Whole trainings and attacks on them, in a process; if that dies, another one goes on behind what it died of."""
    if options.root is None and not options.dry_run:
        return {"status": "skipped, there is no --root"}
    begin, path, before = time.monotonic(), part_file(options, "trainings"), 0
    # In memory where there is such a folder: each epoch writes its checkpoint.
    in_memory = MEMORY.is_dir() and shutil.disk_usage(MEMORY).free > 8e9
    with tempfile.TemporaryDirectory(dir=MEMORY if in_memory else None) as folder:
        while True:
            rest = seconds - (time.monotonic() - begin)
            command = [*part_command(options, "trainings", rest), "--folder", folder]
            status, output = child(options, "trainings", command, rest, interpreted=options.dry_run)
            record = json.loads(path.read_text()) if path.exists() else {}
            for job in record.get("jobs", ()):
                if job["status"] == "running":
                    job.update(status="failed", error=_ending(status, rest, output))
            pending = sum(job["status"] == "pending" for job in record.get("jobs", ()))
            ended = len(record.get("jobs", ())) - pending
            if status in (0, None) or not pending or ended == before or rest < 2 * GRACE:
                break
            before = ended
            write_json(path, {name: value for name, value in record.items() if name != "error"})
    path.unlink(missing_ok=True)
    if status != 0 and "error" not in record and not any(job["status"] == "failed" for job in record.get("jobs", ())):
        record["error"] = _ending(status, rest, output)
    return record


def _ending(status: int | None, seconds: float, output: str) -> str:
    what = f"{INTERRUPTED} after {seconds:.0f} s" if status is None else f"ended with status {status}"
    return f"{what}: {output[-2000:]}"


def child(
    options: Namespace, name: str, command: Sequence[str], seconds: float, *, interpreted: bool, **more: str
) -> tuple[int | None, str]:
    """A process' exit status (None if it was ended at its time limit) and output, which is also appended to the log."""
    hidden = ("TRITON_INTERPRET", "PYTEST_", "COV_")
    environment = {key: value for key, value in os.environ.items() if not key.startswith(hidden)} | more
    # Compile in the process itself: a pool of workers would disturb the host's timings.
    environment["TORCHINDUCTOR_COMPILE_THREADS"] = "1"
    if interpreted:
        environment["TRITON_INTERPRET"] = "1"
    path = options.out / LOG
    with path.open("ab") as file:
        file.write(f"\n==== {name}\n".encode())
        file.flush()
        begin = file.tell()
        # In its own session, so that all it starts can be ended with it.
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
            status = _wait(process, seconds)
        finally:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()
    written = path.read_bytes()
    if len(written) > LONGEST_LOG:
        path.write_bytes(written[-LONGEST_LOG:])
    return status, written[begin:].decode(errors="replace").replace(f"{ROOT}{os.sep}", "")


def _wait(process: subprocess.Popen[bytes], seconds: float) -> int | None:
    """The exit status, or None at the time limit; shortly before, Ctrl-C has it say where it is."""
    if not math.isfinite(seconds):
        return process.wait()
    last_words = min(3.0, 0.1 * seconds)
    try:
        return process.wait(seconds - last_words)
    except subprocess.TimeoutExpired:
        process.send_signal(signal.SIGINT)
    with suppress(subprocess.TimeoutExpired):
        process.wait(last_words)
    return None


def part_command(options: Namespace, name: str, seconds: float) -> list[str]:
    """How a part's process is started."""
    command = [sys.executable, "-m", "benchmarks.gpu.gpu_report", "--out", str(options.out.resolve())]
    command += ["--dry-run"] * options.dry_run + ["--data", options.data]
    command += [] if options.root is None else ["--root", str(options.root.resolve())]
    return [*command, "--part", name, "--part-seconds", f"{seconds - GRACE:.1f}"]


def part_file(options: Namespace, name: str) -> Path:
    """Where a part's process writes what it has found so far."""
    path: Path = options.out / f"part-{name}.json"
    return path


def left_behind(options: Namespace, name: str) -> dict[str, Any]:
    """Read and remove the file of a part's process."""
    path = part_file(options, name)
    if not path.exists():
        return {}
    found: dict[str, Any] = json.loads(path.read_text())
    path.unlink()
    return found
