"""Clocks: calls timed on a GPU; or run once on the CPU, so that all but the numbers is tried before a GPU is there."""

from __future__ import annotations

import gc
import statistics
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.profiler import ProfilerActivity, profile
from typing_extensions import override

Call = Callable[[], Any]

NOT_MEASURED = "one call in Triton's interpreter on the CPU, said to take a second: no measurement"


@dataclass(frozen=True)
class Timing:
    """Seconds of one call: the median, and between which a fifth lies below and a fifth above."""

    median: float
    low: float
    high: float
    repeats: int

    @classmethod
    def of(cls, seconds: Iterable[float]) -> Timing:
        """From the seconds of several repeats."""
        each = sorted(seconds)
        last = len(each) - 1
        return cls(statistics.median(each), each[round(0.2 * last)], each[round(0.8 * last)], len(each))

    def shared(self, calls: int) -> Timing:
        """Of one call, where what was timed was ``calls`` of them."""
        return Timing(self.median / calls, self.low / calls, self.high / calls, self.repeats)

    def microseconds(self) -> dict[str, float]:
        """As JSON types."""
        values = {"median_us": self.median, "low_us": self.low, "high_us": self.high}
        return {name: float(f"{1e6 * value:.5g}") for name, value in values.items()} | {"repeats": self.repeats}


class Clock(ABC):
    """How calls are timed on one kind of device."""

    device: torch.device
    dry: bool
    about: ClassVar[dict[str, str]]

    @abstractmethod
    def events(self, call: Call) -> Timing:
        """One call at a time, on the device's clock."""

    @abstractmethod
    def replay(self, calls: Sequence[Call], *, repeatable: bool = True) -> Timing:
        """One call, when all of them are one graph; ``repeatable``: calls give the same result each time."""

    @abstractmethod
    def host(self, call: Call) -> Timing:
        """What a call takes on the host when nobody waits for the device."""

    @abstractmethod
    def compiled(self, function: Callable[..., Any]) -> Callable[..., Any]:
        """The function under torch.compile, for the shapes of its first call."""

    @abstractmethod
    def launches(self, call: Call) -> int | None:
        """Kernels that a call starts, by torch's profiler."""

    @abstractmethod
    def without_sync(self, call: Call) -> None:
        """The call, which must not wait for the device."""

    @abstractmethod
    def free(self) -> None:
        """Give back memory that nothing uses any more."""


class DeviceClock(Clock):
    """A CUDA or ROCm device."""

    dry = False
    about: ClassVar = {
        "events": "triton.testing.do_bench: device events around one call, after a fill of 256 MB (more than the L2 "
        "cache holds); the host runs ahead during that fill, so part of the launch cost of a short call is hidden",
        "replay": "do_bench of the replay of a CUDA graph of many calls, divided by their number; each call has inputs "
        "and outputs of its own, so that none finds in the cache what another one read",
        "host": "wall clock of 50 calls without a synchronisation, divided by 50",
    }

    def __init__(self, device: torch.device, *, milliseconds: float = 60.0) -> None:
        self.device = device
        self._milliseconds = milliseconds

    @override
    def events(self, call: Call) -> Timing:
        from triton.testing import do_bench

        call()
        torch.cuda.synchronize()
        begin = time.perf_counter()
        call()
        torch.cuda.synchronize()
        once = 1e3 * (time.perf_counter() - begin)
        # At least ten repeats also of slow calls, but no more than a second and a half of them.
        repeat = max(self._milliseconds, min(10 * once, 1500.0))
        times = do_bench(call, warmup=self._milliseconds / 4, rep=repeat, return_mode="all")
        return Timing.of(value / 1e3 for value in times)

    @override
    def replay(self, calls: Sequence[Call], *, repeatable: bool = True) -> Timing:
        # On a stream of its own first: whatever is compiled, loaded or allocated on first use must be before capture.
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for call in (*calls[:2], *calls):
                call()
        torch.cuda.current_stream().wait_stream(stream)
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        # The collector may free a loaded kernel, and unloading one breaks the capture.
        gc.collect()
        gc.disable()
        try:
            # Outputs are kept, so that each call writes to memory of its own.
            with torch.cuda.graph(graph):
                kept = [call() for call in calls]
        finally:
            gc.enable()
        timing = self.events(graph.replay)
        torch.cuda.synchronize()
        _check_replay(kept[-1], calls[-1]() if repeatable else None)
        del kept
        graph.reset()
        return timing.shared(len(calls))

    @override
    def host(self, call: Call) -> Timing:
        for _ in range(10):
            call()
        times = []
        for _ in range(7):
            torch.cuda.synchronize()
            begin = time.perf_counter()
            for _ in range(50):
                call()
            times.append(time.perf_counter() - begin)
        torch.cuda.synchronize()
        return Timing.of(times).shared(50)

    @override
    def compiled(self, function: Callable[..., Any]) -> Callable[..., Any]:
        return _compiled(function, "inductor")

    @override
    def launches(self, call: Call) -> int | None:
        for _ in range(3):
            call()
        torch.cuda.synchronize()
        with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as profiled:
            call()
            torch.cuda.synchronize()
        events = [e for e in profiled.events() if e.device_type.name == "CUDA"]
        return sum(not event.name.startswith(("Memcpy", "Memset")) for event in events)

    @override
    def without_sync(self, call: Call) -> None:
        call()
        torch.cuda.synchronize()
        torch.cuda.set_sync_debug_mode("error")
        try:
            call()
        finally:
            torch.cuda.set_sync_debug_mode("default")
        torch.cuda.synchronize()

    @override
    def free(self) -> None:
        gc.collect()
        torch.cuda.synchronize()
        torch.cuda.empty_cache()


class DryClock(Clock):
    """The CPU with Triton's interpreter: every path runs, and each call is said to take a second."""

    dry = True
    device = torch.device("cpu")
    about: ClassVar = {"events": NOT_MEASURED, "replay": NOT_MEASURED, "host": NOT_MEASURED}

    @override
    def events(self, call: Call) -> Timing:
        call()
        return Timing.of([1.0])

    @override
    def replay(self, calls: Sequence[Call], *, repeatable: bool = True) -> Timing:
        kept = [call() for call in calls]
        _check_replay(kept[-1], calls[-1]() if repeatable else None)
        return Timing.of([1.0])

    @override
    def host(self, call: Call) -> Timing:
        return self.events(call)

    @override
    def compiled(self, function: Callable[..., Any]) -> Callable[..., Any]:
        # Traced as on the device, but not translated to C++, which takes seconds a function.
        return _compiled(function, "aot_eager")

    @override
    def launches(self, call: Call) -> int | None:
        with profile(activities=[ProfilerActivity.CPU]) as profiled:
            call()
        assert len(profiled.events()) > 0
        return None

    @override
    def without_sync(self, call: Call) -> None:
        call()

    @override
    def free(self) -> None:
        gc.collect()


def _compiled(function: Callable[..., Any], backend: str) -> Callable[..., Any]:
    from torch._functorch import config

    # Without what was compiled before, a code object's number of shapes does not reach its limit.
    torch._dynamo.reset()
    # The timing of a backward alone runs it several times on one forward.
    config.donated_buffer = False
    return torch.compile(function, backend=backend, dynamic=False, fullgraph=True)


def _check_replay(kept: Any, again: Any) -> None:
    """What a replay wrote has to be finite, and the same as what a call gives (``again``, if it is repeatable)."""
    tensors = kept if isinstance(kept, tuple) else (kept,)
    if not all(bool(tensor.isfinite().all()) for tensor in tensors if isinstance(tensor, Tensor)):
        raise AssertionError("a replay left values that are not finite")
    if again is not None:
        torch.testing.assert_close(kept, again)
