"""Shared by the parts of gpu_report.py: a part's record and time, the copy rate, timings and ratios."""

from __future__ import annotations

import json
import math
import os
import time
import traceback
from argparse import Namespace
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

import torch

from benchmarks.harness.device import Device
from benchmarks.harness.program import ROOT
from benchmarks.harness.timing import Call, Samples
from benchmarks.ops.sizes import BACKENDS, LossCase, PackCase
from elle_fast import backends
from elle_fast._core.files import write_json

Case = TypeVar("Case", PackCase, LossCase)


class Run:
    """A part's device, its options and time, and the file for its results.

    Another process, which did not come to its end, may have begun that file.
    """

    def __init__(self, device: Device, path: Path, options: Namespace) -> None:
        self.device, self.options = device, options
        self.record: dict[str, Any] = json.loads(path.read_text()) if path.exists() else {}
        self._path = path
        self._begin = time.monotonic()
        self._seconds: float = options.part_seconds

    def left(self) -> float:
        """The fraction of the time that is left."""
        return self.seconds() / self._seconds if math.isfinite(self._seconds) else 1.0

    def seconds(self) -> float:
        """The seconds that are left."""
        return self._seconds - (time.monotonic() - self._begin)

    def save(self) -> None:
        """Write what has been found so far."""
        write_json(self._path, self.record)

    def each(self, cases: Sequence[Case], measure: Callable[[Run, Case, dict[str, Any]], None]) -> None:
        """Measure the cases while there is time; one that fails is recorded with its error."""
        results = self.record.setdefault("cases", [])
        for case in cases:
            result: dict[str, Any] = {"case": case.name}
            results.append(result)
            if self.left() <= 0:
                result["skipped"] = "out of time"
            else:
                # Without what was compiled before, a code object's number of shapes does not reach its limit.
                torch._dynamo.reset()
                with recorded(result):
                    measure(self, case, result)
            self.save()
            self.device.free()


@contextmanager
def recorded(result: dict[str, Any], name: str = "error") -> Iterator[None]:
    """Write an exception into the result instead of ending the part."""
    try:
        yield
    except Exception:
        result[name] = traceback.format_exc(limit=-8).replace(f"{ROOT}{os.sep}", "")[-4000:]
        print(result[name], flush=True)


def copy_rate(run: Run) -> float:
    """Bytes per second of a large copy on the device, read and written."""
    elements = 1 << (10 if run.device.dry else 29)
    source = torch.rand(elements, device=run.device.device, dtype=torch.bfloat16)
    target = torch.empty_like(source)
    timing = run.device.events({"copy": lambda: target.copy_(source)})["copy"]
    if not torch.equal(target, source):
        raise AssertionError("a copy differs from its source")
    moved = 2 * source.nbytes
    rate = moved / timing.median
    entry = {"bytes": moved, "bytes_per_second": rate, **timing.microseconds()}
    run.record.setdefault("copy", []).append(entry)
    return rate


def add_timings(
    run: Run, result: dict[str, Any], what: str, sides: Mapping[str, Sequence[Call]], *, replay: bool, repeatable: bool
) -> None:
    """Time the backends in turns; the calls of each differ in their inputs alone. Of a large call there is only one."""
    entries = result["timings"].setdefault(what, {})
    able: dict[str, Sequence[Call]] = {}
    for name, calls in sides.items():
        entries[name] = {}
        # A backend that fails is left out.
        with recorded(result, f"error in {what}, {name}"):
            calls[0]()
            able[name] = calls
    several = all(len(calls) > 1 for calls in able.values())
    heads = {name: calls[0] for name, calls in able.items()}

    def add(clock: str, found: dict[str, Samples]) -> None:
        for name, samples in found.items():
            entries[name][clock] = samples.microseconds()
        run.save()

    if not able:
        return
    with recorded(result, f"error in {what}"):
        add("events", run.device.events(heads))
        if several:
            add("host", run.device.host(heads))
        if several and replay:
            add("replay", run.device.replay(able, repeatable=repeatable))


def add_ratios(result: dict[str, Any], what: str, moved: int, rate: float) -> None:
    """Bytes per second over those of the copy, and times of the reference over those of the kernels."""
    timings = result["timings"][what]
    ratios: dict[str, float] = {}
    kernel = timings["triton"]
    if "events" in kernel:
        ratios["of_copy_rate"] = moved / (1e-6 * kernel["events"]["median_us"]) / rate
    for clock in ("events", "replay"):
        for other in BACKENDS[1:]:
            if clock in kernel and clock in timings.get(other, {}):
                ratios[f"{clock}_{other}"] = timings[other][clock]["median_us"] / kernel[clock]["median_us"]
    result.setdefault("ratios", {})[what] = {name: float(f"{ratio:.4g}") for name, ratio in ratios.items()}


def eager_backends() -> dict[str, str]:
    """The backends timed without torch.compile, by their names in the report; the last one is the reference."""
    cuda = {} if backends.BACKENDS["cuda"].why_not() is not None else {"cuda": "cuda"}
    return {"triton": "triton", **cuda, "eager": "reference"}


def sets_of_inputs(run: Run, launch_bound: bool) -> int:
    """How many sets of inputs the calls take in turn."""
    if not launch_bound:
        return 1
    return 2 if run.device.dry else 24


@contextmanager
def poisoned() -> Iterator[None]:
    """``torch.empty`` is filled with NaN, so that an output that is not written shows."""
    before = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
    torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before[0], warn_only=before[1])
