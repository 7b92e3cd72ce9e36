"""Sides of a comparison, timed in turns: whatever else the machine does in that time falls on all of them alike."""

from __future__ import annotations

import gc
import math
import resource
import statistics
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch

from elle_fast.backends import extension


@dataclass(frozen=True)
class Side:
    """One of the calls that are compared."""

    call: Callable[[], Any]
    before: Callable[[], Any] | None = None  # before each call, in no sample
    isa: str = ""  # the instruction set of the compiled kernels, where it is not the widest


@dataclass(frozen=True)
class Case:
    """What is compared with what."""

    name: str
    sides: tuple[str, ...]
    # Inputs, and each side or why it is left out; AssertionError if their results are wrong.
    prepare: Callable[[], Mapping[str, Side | str]]
    bytes: int | None = None  # that a call has to move
    threads: int | None = None  # torch's own number
    device: str = "cpu"
    plotted: bool = True


@dataclass(frozen=True)
class Pace:
    """Seconds, and numbers of samples."""

    sample: float = 0.005  # a sample is as many calls as take this long
    side: float = 2.5  # for all samples of a side
    fewest: int = 3
    most: int = 40


_SLOW = 2.0  # seconds of a call that is not made once more to warm up
_WARM = 0.001  # seconds of calls before a sample of several
DRY = Pace(sample=0.0, side=0.0, fewest=1, most=1)


@dataclass
class Samples:
    """The times of one side: seconds of a call, each the mean of ``calls`` in a row."""

    calls: int
    seconds: list[float] = field(default_factory=list)
    faults: list[float] = field(default_factory=list)  # pages of a call that were new to the process

    @property
    def median(self) -> float:
        """Seconds of a call."""
        return statistics.median(self.seconds)

    def microseconds(self) -> dict[str, Any]:
        """As JSON types; a fifth of the samples lies below ``low``, a fifth above ``high``."""
        each = sorted(self.seconds)
        last = len(each) - 1
        values = {"median_us": self.median, "low_us": each[round(0.2 * last)], "high_us": each[round(0.8 * last)]}
        rounded = {name: float(f"{1e6 * value:.5g}") for name, value in values.items()}
        counts = {"samples": len(each), "calls_per_sample": self.calls}
        return {**rounded, **counts, "page_faults": round(statistics.median(self.faults), 1)}


def interleave(sides: Mapping[str, Side], pace: Pace, device: str = "cpu") -> dict[str, Samples]:
    """Time all sides, a sample of each in every round; a slow side sits out some of the rounds, evenly spread."""
    wait = torch.cuda.synchronize if device == "cuda" else _nothing
    found, turns = {}, {}
    for name, side in sides.items():
        once = _once(side, wait)
        found[name] = Samples(max(1, math.ceil(pace.sample / once)))
        lasting = once * (found[name].calls + 1)
        turns[name] = min(pace.most, max(pace.fewest, int(pace.side / lasting)))
    rounds = max(turns.values())
    gc.collect()
    gc.disable()
    try:
        for i in range(rounds):
            for name, side in sides.items():
                if (i + 1) * turns[name] // rounds > i * turns[name] // rounds:
                    _sample(side, found[name], wait)
    finally:
        gc.enable()
    return found


def _once(side: Side, wait: Callable[[], None]) -> float:
    """Seconds of a call that is not the first, where that does not take too long."""
    with use_isa(side.isa):
        lasting = _after(side.before or _nothing, side.call, wait)
        return lasting if lasting > _SLOW else _after(side.before or _nothing, side.call, wait)


def _sample(side: Side, samples: Samples, wait: Callable[[], None]) -> None:
    call, before, calls = side.call, side.before, samples.calls
    with use_isa(side.isa):
        if calls > 1 and before is None:
            _warm_up(call)
        wait()
        faults = _faults()
        if before is not None:
            lasting = sum(_after(before, call, wait) for _ in range(calls))
        else:
            begin = time.perf_counter()
            for _ in range(calls):
                call()
            wait()
            lasting = time.perf_counter() - begin
        samples.faults.append((_faults() - faults) / calls)
        samples.seconds.append(lasting / calls)


def _warm_up(call: Callable[[], Any]) -> None:
    """Brings back to the caches what the other sides have pushed out, and the clock to what such calls run at.

    For a time, not for a number of calls: a side of 0.2 ms needs five of them where one of 4 ms needs one.
    """
    until = time.perf_counter() + _WARM
    call()
    while time.perf_counter() < until:
        call()


def _after(before: Callable[[], Any], call: Callable[[], Any], wait: Callable[[], None]) -> float:
    before()
    wait()
    begin = time.perf_counter()
    call()
    wait()
    return time.perf_counter() - begin


def _faults() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt


def _nothing() -> None:
    pass


@contextmanager
def use_isa(isa: str) -> Iterator[None]:
    """The compiled kernels for that instruction set, if one is named."""
    module = extension.load() if isa else None
    if module is None:
        yield
        return
    before = module.isa()
    module.use_isa(isa)
    try:
        yield
    finally:
        module.use_isa(before)


@contextmanager
def threads(count: int | None) -> Iterator[None]:
    """That many threads of torch, if a number is given."""
    before = torch.get_num_threads()
    torch.set_num_threads(count or before)
    try:
        yield
    finally:
        torch.set_num_threads(before)


class Replay:
    """A timer for pytest-benchmark on which times pass that were measured before.

    pytest-benchmark times one function to its end and then the next; the samples here were taken in turns.
    """

    def __init__(self) -> None:
        self._now = 0.0

    def read(self) -> float:
        """The time now."""
        return self._now

    def play(self, benchmark: Any, seconds: list[float]) -> None:
        """Every sample a round of the benchmark."""
        left = iter(seconds)

        def passing() -> None:
            self._now += next(left)

        benchmark.pedantic(passing, rounds=len(seconds))
