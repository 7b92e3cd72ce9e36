"""The processes of gpu_report.py: the tests, the memory checker, and one for each part, with a time limit each."""

from __future__ import annotations

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
from argparse import Namespace
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from benchmarks.harness.program import ROOT

# A part looks at the clock between measurements only, so it may take this much longer before it is ended.
GRACE = 15.0

Work = Callable[[Namespace, float], dict[str, Any]]  # the options of the report, and seconds


def tests(options: Namespace, seconds: float) -> dict[str, Any]:
    """``pytest -m gpu``: how many tests ended how, and which failed."""
    if importlib.util.find_spec("pytest") is None:
        return {"status": "skipped, there is no pytest"}
    dry = options.dry_run
    where = ["tests/test_gpu.py"] if dry else ["tests"]
    command = [sys.executable, "-m", "pytest", *where, "-m", "gpu", "-v", "-o", "filterwarnings=default"]
    # Logs of torch's compilation would fill the file.
    command += ["-p", "no:cacheprovider", "--durations=10", "--tb=short", "--show-capture=no"]
    if not dry and importlib.util.find_spec("xdist") is not None:
        # Most of their time is Triton compiling, on one core a test.
        command += ["-n", "4"]
    # Poisoned memory asks torch for deterministic algorithms, of which cuBLAS has some only with this setting.
    variables = {"CUBLAS_WORKSPACE_CONFIG": ":4096:8"}
    if dry:
        # All are skipped, also where there is a GPU.
        variables["CUDA_VISIBLE_DEVICES"] = "-1"
    status, output = child(options, "tests", command, seconds, interpreted=False, log="gpu_tests.log", **variables)
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


def kernels(options: Namespace, seconds: float) -> dict[str, Any]:
    """Every kernel once, and again under compute-sanitizer if that is installed and works."""
    begin = time.monotonic()
    # First without the tool, under which compiling would take too long.
    found = measured("kernels")(options, 0.6 * seconds)
    tool = shutil.which("compute-sanitizer") or shutil.which("compute-sanitizer", path="/usr/local/cuda/bin")
    if "error" in found or tool is None or options.dry_run:
        reason = "there is no compute-sanitizer" if tool is None else "a dry run"
        return {"memcheck": f"not run: {reason if 'error' not in found else 'it fails without'}", **found}
    command = [tool, "--tool", "memcheck", "--report-api-errors", "no", "--error-exitcode", "86"]
    command += part_command(options, "kernels", seconds)
    rest = seconds - (time.monotonic() - begin)
    # Torch's caching allocator puts many tensors in one allocation, where the tool cannot see their ends.
    status, output = child(
        options, "kernels", command, rest, interpreted=False, log="sanitizer.log", PYTORCH_NO_CUDA_MEMORY_CACHING="1"
    )
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
        limit = seconds + GRACE
        status, output = child(
            options,
            name,
            part_command(options, name, seconds),
            limit,
            interpreted=options.dry_run,
            log="gpu_report.log",
        )
        found = left_behind(options, name)
        if status is None:
            found["error"] = f"still running after {limit:.0f} s; ended"
        elif status != 0 and "error" not in found:
            found["error"] = f"ended with status {status}: {output[-2000:]}"
        return found

    return work


def child(
    options: Namespace, name: str, command: Sequence[str], seconds: float, *, interpreted: bool, log: str, **more: str
) -> tuple[int | None, str]:
    """A process' exit status (None if it was ended at its time limit) and output, which is also appended to a log."""
    hidden = ("TRITON_INTERPRET", "PYTEST_", "COV_")
    environment = {key: value for key, value in os.environ.items() if not key.startswith(hidden)} | more
    # Compile in the process itself: a pool of workers would disturb the host's timings.
    environment["TORCHINDUCTOR_COMPILE_THREADS"] = "1"
    if interpreted:
        environment["TRITON_INTERPRET"] = "1"
    path = options.out / log
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


def part_command(options: Namespace, name: str, seconds: float) -> list[str]:
    """How a part's process is started."""
    command = [sys.executable, "-m", "benchmarks.gpu.gpu_report", "--out", str(options.out.resolve())]
    command += ["--dry-run"] * options.dry_run + ["--quick"] * options.quick
    return [*command, "--part", name, "--seconds", f"{seconds:.1f}"]


def left_behind(options: Namespace, name: str) -> dict[str, Any]:
    """Read and remove the file of a part's process."""
    path: Path = options.out / f"part-{name}.json"
    if not path.exists():
        return {}
    found: dict[str, Any] = json.loads(path.read_text())
    path.unlink()
    return found
