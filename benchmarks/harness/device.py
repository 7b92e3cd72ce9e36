"""The GPU to measure on; a dry run tries every path on the CPU, in Triton's interpreter."""

from __future__ import annotations

import gc
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.profiler import ProfilerActivity, profile

from benchmarks.harness.timing import DRY, Call, EventClock, Pace, Samples, Side, WallClock, in_turns
from elle_fast.step.graph import Graph


class Device:
    """The first CUDA or ROCm device, or (``dry``) the CPU."""

    about: ClassVar = {
        "events": "device events around one call, after a fill of 256 MB (more than the L2 cache holds); the host runs "
        "ahead during that fill, so part of the launch cost of a short call is hidden; backends take turns",
        "replay": "the same of the replay of a CUDA graph of many calls, divided by their number; each call has inputs "
        "and outputs of its own, so that none finds in the cache what another one read",
        "host": "wall clock of a millisecond of calls without a synchronisation, divided by their number",
    }

    def __init__(self, *, dry: bool) -> None:
        self.dry = dry
        self.device = torch.device("cpu") if dry else torch.device("cuda", 0)
        self._clock = WallClock() if dry else EventClock()
        # At least ten calls, however slow.
        self._pace = DRY if dry else Pace(sample=0.0, side=0.12, fewest=10, most=600)

    def events(self, sides: Mapping[str, Call]) -> dict[str, Samples]:
        """One call at a time, on the device's clock."""
        return in_turns({name: Side(call) for name, call in sides.items()}, self._pace, self._clock)

    def replay(self, sides: Mapping[str, Sequence[Call]], *, repeatable: bool) -> dict[str, Samples]:
        """One call, with all calls of a side in one graph; ``repeatable`` calls give the same result each time."""
        if self.dry:
            kept: dict[str, Any] = {}
            found = self.events({name: partial(_keep, kept, name, calls[-1]) for name, calls in sides.items()})
        else:
            graphs, outputs = {}, {}
            for name, calls in sides.items():
                graphs[name], outputs[name] = graph_of(calls)
            replays = {name: Side(graph.replay, holds=len(sides[name])) for name, graph in graphs.items()}
            found = in_turns(replays, self._pace, self._clock)
            torch.cuda.synchronize()
            kept = {name: each[-1] for name, each in outputs.items()}
        for name, calls in sides.items():
            _check_replay(kept[name], calls[-1]() if repeatable else None)
        return found

    def host(self, sides: Mapping[str, Call]) -> dict[str, Samples]:
        """The time that a call takes on the host, without waiting for the device."""
        pace = DRY if self.dry else Pace(sample=0.001, fewest=7, most=7)
        named = {name: Side(call) for name, call in sides.items()}
        return in_turns(named, pace, WallClock(self.device.type, waits=False))

    def launches(self, call: Call) -> int | None:
        """Kernels that a call starts, by torch's profiler; None in a dry run."""
        return None if self.dry else launches(call)

    def waits(self, call: Call) -> int | None:
        """How often a call waits for the device, as far as torch notices; None in a dry run."""
        call()
        if self.dry:
            return None
        torch.cuda.synchronize()
        # Warnings, as an error would leave a step half done.
        with warnings.catch_warnings(record=True) as said:
            warnings.simplefilter("always")
            torch.cuda.set_sync_debug_mode("warn")
            try:
                call()
            finally:
                torch.cuda.set_sync_debug_mode("default")
        torch.cuda.synchronize()
        return sum("synchronizing CUDA operation" in str(each.message) for each in said)

    def free(self) -> None:
        """Free unused memory of the device."""
        if not self.dry:
            gc.collect()
            torch.cuda.synchronize()
            torch.cuda.empty_cache()


def compiled(function: Callable[..., Any], *, dry: bool) -> Callable[..., Any]:
    """The function under torch.compile, for the shapes of its first call; ``dry``: traced, not translated."""
    from torch._functorch import config

    # To time a backward alone, it runs several times on one forward.
    config.donated_buffer = False
    return torch.compile(function, backend="aot_eager" if dry else "inductor", dynamic=False, fullgraph=True)


@contextmanager
def tf32(allowed: bool) -> Iterator[None]:
    """Let float32 matrix products and convolutions round their inputs to tf32, or not (CUDA only)."""
    matmul, cudnn = torch.backends.cuda.matmul, torch.backends.cudnn
    before = matmul.allow_tf32, cudnn.allow_tf32
    matmul.allow_tf32 = cudnn.allow_tf32 = allowed
    try:
        yield
    finally:
        matmul.allow_tf32, cudnn.allow_tf32 = before


def launches(call: Call) -> int:
    """Kernels that a call starts on the device, by torch's profiler."""
    for _ in range(3):
        call()
    torch.cuda.synchronize()
    with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as profiled:
        call()
        torch.cuda.synchronize()
    events = [event for event in profiled.events() if event.device_type.name == "CUDA"]
    return sum(not event.name.startswith(("Memcpy", "Memset")) for event in events)


def graph_of(calls: Sequence[Call]) -> tuple[Graph, list[Any]]:
    """All calls as one graph, and their results, which must be kept so that each call writes to its own memory."""
    # First eagerly on a side stream: what is compiled, loaded or allocated on first use cannot be captured.
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for call in (*calls[:2], *calls):
            call()
    torch.cuda.current_stream().wait_stream(stream)
    torch.cuda.synchronize()
    graph = Graph(torch.device("cuda", torch.cuda.current_device()))
    kept = graph.capture(lambda: [call() for call in calls])
    return graph, kept


def _keep(kept: dict[str, Any], name: str, call: Call) -> None:
    kept[name] = call()


def _check_replay(kept: Any, again: Any) -> None:
    """Check that what a replay wrote is finite, and equals what a call returns (``again``, if it is repeatable)."""
    tensors = kept if isinstance(kept, tuple) else (kept,)
    if not all(bool(tensor.isfinite().all()) for tensor in tensors if isinstance(tensor, Tensor)):
        raise AssertionError("a replay left values that are not finite")
    if again is not None:
        torch.testing.assert_close(kept, again)
