"""The stage of gpu_report.py that runs the GPU tests: those that matter most, or all."""

from __future__ import annotations

import importlib.util
import os
import re
import shlex
import sys
from argparse import Namespace
from typing import Any

from benchmarks.gpu.processes import INTERRUPTED, child

FILE = "tests/test_gpu.py"
# By subject, in the order in which they are started. What is not here is about 2**31 elements, or about code that takes
# inductor minutes to compile.
FIRST: dict[str, tuple[str, ...]] = {
    "kernels against the reference": (
        "test_noise_has_the_bits_of_the_reference_on_the_cpu",
        "test_points_of_real_sizes",
        "test_loss_of_real_sizes",
        "test_the_state_of_elle_a_follows_the_reference",
        "test_the_same_bits_on_every_run",
    ),
    "capture": (
        "test_captured_steps_are_the_eager_ones",
        "test_captured_steps_of_adamw_are_the_eager_ones",
        "test_a_captured_step_waits_for_nothing",
        "test_a_replayed_step_is_a_training_step",
    ),
    "fresh noise": ("test_each_replay_has_fresh_noise", "test_replays_repeat_after_the_same_manual_seed"),
    "no waits": ("test_a_step_waits_for_nothing",),
    "autocast": ("test_training_under_autocast",),
    "channels_last": ("test_channels_last_from_end_to_end",),
    "options of the kernels": ("test_options_on_real_sizes", "test_options_of_the_loss_on_many_classes"),
    "capture of each method": ("test_captured_steps_of_a_method_are_the_eager_ones",),
    "captures that fail": ("test_all_goes_on_after_a_capture_that_fails",),
}


def tests(options: Namespace, seconds: float) -> dict[str, Any]:
    """How many GPU tests ended how, and which failed; of tests/test_gpu.py the first ones, or with --all-tests all."""
    if importlib.util.find_spec("pytest") is None:
        return {"status": "skipped, there is no pytest"}
    # By name, not by a pattern: pytest then says so if one is gone.
    first = [f"{FILE}::{name}" for names in FIRST.values() for name in names]
    command = [sys.executable, "-m", "pytest", *(["tests", "-m", "gpu"] if options.all_tests else first)]
    # Logs of torch's compilation would fill the file.
    command += ["-v", "-o", "filterwarnings=default", "-p", "no:cacheprovider", "--tb=short", "--show-capture=no"]
    if not options.dry_run and importlib.util.find_spec("xdist") is not None:
        # Most of their time is Triton compiling, on one core a test.
        command += ["--durations=10", "-n", str(max(2, min(8, (os.cpu_count() or 2) // 2)))]
    # Poisoned memory asks torch for deterministic algorithms, of which cuBLAS has some only with this setting.
    variables = {"CUBLAS_WORKSPACE_CONFIG": ":4096:8"}
    if options.dry_run:
        # All are skipped, also where there is a GPU.
        variables["CUDA_VISIBLE_DEVICES"] = "-1"
    status, output = child(options, "tests", command, seconds, interpreted=False, **variables)
    found: dict[str, Any] = {"command": shlex.join(["python", *command[1:]]), "outcomes": outcomes(output)}
    found["failures"] = failures(output)
    found["tail"] = output[-3000:]
    if status is None:
        found["error"] = f"{INTERRUPTED} after {seconds:.0f} s"
    elif status != 0:
        found["error"] = f"pytest ended with status {status}"
    elif not options.dry_run and not found["outcomes"].get("passed"):
        found["error"] = "no test ran"
    return found


_NAMES = "PASSED|FAILED|ERROR|SKIPPED|XFAIL|XPASS"


def _ended(output: str) -> list[tuple[str, str]]:
    """How each test ended, and its name, from ``pytest -v`` with pytest-xdist or without, whole or cut off."""
    found = []
    for line in output.splitlines():
        if match := re.match(rf"\[gw\d+\] \[ *\d+%\] ({_NAMES}) (\S+::.*)", line):
            found.append((match[1], match[2].strip()))
        elif match := re.match(rf"(\S+::.*) ({_NAMES})\b.*\[ *\d+%\]$", line):
            found.append((match[2], match[1].strip()))
    return found


def outcomes(output: str) -> dict[str, int]:
    """How many tests ended how."""
    counts: dict[str, int] = {}
    for outcome, _ in _ended(output):
        counts[outcome.lower()] = counts.get(outcome.lower(), 0) + 1
    return counts


def failures(output: str) -> list[str]:
    """The tests that failed; with the reason where pytest came to its summary."""
    summary = re.findall(r"^(?:FAILED|ERROR) .*", output, flags=re.MULTILINE)
    return (summary or [f"{outcome} {name}" for outcome, name in _ended(output) if outcome in ("FAILED", "ERROR")])[:50]
