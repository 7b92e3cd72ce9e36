"""The timing of every benchmark: sides of a comparison take turns, so a disturbance of the machine hits all of them."""

from __future__ import annotations

import gc
import math
import resource
import statistics
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from typing_extensions import override

from elle_fast.testing import use_isa

Call = Callable[[], Any]

NOT_MEASURED = "a dry run: tiny sizes, each call once; no number in it is a measurement"

_SLOW = 2.0  # seconds of a call that is not made once more to warm up
_WARM = 0.001  # seconds of calls before a sample of several


@dataclass(frozen=True)
class Side:
    """One of the calls that are compared."""

    call: Call
    before: Call | None = None  # runs before each call, untimed
    isa: str = ""  # the instruction set of the compiled kernels, where it is not the widest
    holds: int = 1  # how many calls this one stands for, as the replay of a CUDA graph does


@dataclass(frozen=True)
class Pace:
    """Seconds, and numbers of samples."""

    sample: float = 0.005  # a sample is as many calls as take this long
    side: float = 2.5  # for all samples of a side
    fewest: int = 3
    most: int = 40


DRY = Pace(sample=0.0, side=0.0, fewest=1, most=1)  # each call once, and no warm-up


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
        faults = {"page_faults": round(statistics.median(self.faults), 1)} if self.faults else {}
        return {**rounded, "samples": len(each), "calls_per_sample": self.calls, **faults}


class Clock(ABC):
    """How a sample is taken."""

    @abstractmethod
    def once(self, side: Side) -> float:
        """Seconds that a call adds to a sample; when it returns, the work of first calls is done."""

    @abstractmethod
    def sample(self, side: Side, into: Samples) -> None:
        """Call ``into.calls`` times and add the mean seconds of a call."""


class WallClock(Clock):
    """The host's clock. On a device the host waits before a sample, and (``waits``) after it."""

    def __init__(self, device: str = "cpu", *, waits: bool = True) -> None:
        self._ready = torch.cuda.synchronize if device == "cuda" else _nothing
        self._done = self._ready if waits else _nothing

    @override
    def once(self, side: Side) -> float:
        lasting = self._after(side)
        return lasting if lasting > _SLOW else self._after(side)

    @override
    def sample(self, side: Side, into: Samples) -> None:
        call, calls = side.call, into.calls
        if calls > 1 and side.before is None:
            _warm_up(call)
        self._ready()
        faults = _faults()
        if side.before is not None:
            lasting = sum(self._after(side) for _ in range(calls))
        else:
            begin = time.perf_counter()
            for _ in range(calls):
                call()
            self._done()
            lasting = time.perf_counter() - begin
        into.faults.append((_faults() - faults) / calls)
        into.seconds.append(lasting / calls / side.holds)

    def _after(self, side: Side) -> float:
        (side.before or _nothing)()
        self._ready()
        begin = time.perf_counter()
        side.call()
        self._done()
        return time.perf_counter() - begin


class EventClock(Clock):
    """The device's clock: events around each call, after a fill that clears the cache."""

    def __init__(self) -> None:
        self._cache = torch.empty(1 << 28, dtype=torch.int8, device="cuda")

    @override
    def once(self, side: Side) -> float:
        self._seconds(side)
        begin = time.perf_counter()
        self._seconds(side)
        return time.perf_counter() - begin

    @override
    def sample(self, side: Side, into: Samples) -> None:
        into.seconds.append(sum(self._seconds(side) for _ in range(into.calls)) / into.calls / side.holds)

    def _seconds(self, side: Side) -> float:
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        (side.before or _nothing)()
        self._cache.zero_()
        begin.record()
        side.call()
        end.record()
        torch.cuda.synchronize()
        return 1e-3 * float(begin.elapsed_time(end))


def in_turns(sides: Mapping[str, Side], pace: Pace, clock: Clock | None = None) -> dict[str, Samples]:
    """Time all sides, a sample of each in every round; a slow side sits out some of the rounds, evenly spread."""
    clock = clock or WallClock()
    found: dict[str, Samples] = {}
    turns: dict[str, int] = {}
    for name, side in sides.items():
        found[name], turns[name] = Samples(1), 1
        if pace != DRY:
            with use_isa(side.isa):
                once = clock.once(side)
            found[name].calls = max(1, math.ceil(pace.sample / once))
            turns[name] = min(pace.most, max(pace.fewest, int(pace.side / (once * (found[name].calls + 1)))))
    rounds = max(turns.values())
    if pace != DRY:  # there it would take longer than the calls
        gc.collect()
    gc.disable()
    try:
        for i in range(rounds):
            for name, side in sides.items():
                if (i + 1) * turns[name] // rounds > i * turns[name] // rounds:
                    with use_isa(side.isa):
                        clock.sample(side, found[name])
    finally:
        gc.enable()
    return found


def _warm_up(call: Call) -> None:
    """Refill the caches after the other sides, and bring the processor back to the speed of such calls.

    This takes a time, not a number of calls: a side of 0.2 ms needs five, one of 4 ms only one.
    """
    until = time.perf_counter() + _WARM
    call()
    while time.perf_counter() < until:
        call()


def _faults() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt


def _nothing() -> None:
    pass


@contextmanager
def threads(count: int | None) -> Iterator[None]:
    """Let torch use that many threads, if a number is given."""
    before = torch.get_num_threads()
    torch.set_num_threads(count or before)
    try:
        yield
    finally:
        torch.set_num_threads(before)
