"""elle_fast.step.graph with torch's own torch.cuda.graph and a made-up device: what a broken capture leaves."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import pytest
import torch

from elle_fast.step import graph as graphs

CPU = torch.device("cpu")
LATER = "CUDA error: operation failed due to a previous error during capture"


class Stream:
    def __init__(self, device: Any = None) -> None:
        self.device = CPU

    def wait_stream(self, other: Stream) -> None: ...


class Device:
    """As torch before 2.12 (CUDAGraph.cpp): an end that CUDA refuses ends neither the allocations nor the draws."""

    def __init__(self) -> None:
        self.stream, self.broken, self.drawing = Stream(), False, True
        self.underway: list[Any] = []
        self.captures: list[Any] = []  # the generators of each that ended well
        self.mode, self.pools = 0, 0

    def pool(self) -> tuple[int, int]:
        self.pools += 1
        return 0, self.pools

    def empty_cache(self) -> None:
        assert not self.underway, "captures_underway.empty() INTERNAL ASSERT FAILED"

    def end(self, index: int, pool: Any) -> None:
        if pool not in self.underway:
            raise RuntimeError("endAllocatePool: not currently recording to mempool_id")
        self.underway.remove(pool)

    def draw(self) -> None:
        if not self.drawing:
            raise RuntimeError("Offset increment outside graph capture encountered unexpectedly.")

    def set_mode(self, mode: Any) -> None:
        self.mode = {"default": 0, "warn": 1, "error": 2}.get(mode, mode)


@pytest.fixture
def device(monkeypatch):
    made = Device()

    class CUDAGraph:
        def __init__(self) -> None:
            self.generators: list[Any] = []

        def register_generator_state(self, generator: Any) -> None:
            self.generators.append(generator)

        def capture_begin(self, pool: Any = None, **options: Any) -> None:
            self.pool = made.pool() if pool is None else pool
            assert options["capture_error_mode"] == "thread_local"
            made.underway.append(self.pool)
            made.drawing, made.broken = False, False

        def capture_end(self) -> None:
            if made.broken:
                raise RuntimeError(LATER)
            made.end(0, self.pool)
            made.drawing = True
            made.captures.append(self.generators)

    class StreamContext:
        def __init__(self, stream: Stream) -> None:
            self.to = stream

        def __enter__(self) -> None:
            self.before, made.stream = made.stream, self.to

        def __exit__(self, *args: object) -> None:
            made.stream = self.before

    fakes: dict[str, Any] = {
        "CUDAGraph": CUDAGraph,
        "Stream": Stream,
        "stream": StreamContext,
        "current_stream": lambda device=None: made.stream,
        "current_device": lambda: 0,
        "device": lambda device: nullcontext(),
        "graph_pool_handle": made.pool,
        "synchronize": lambda: None,
        "empty_cache": made.empty_cache,
        "get_sync_debug_mode": lambda: made.mode,
        "set_sync_debug_mode": made.set_mode,
    }
    for name, fake in fakes.items():
        monkeypatch.setattr(torch.cuda, name, fake)
    monkeypatch.setattr(torch._C, "_host_emptyCache", lambda: None, raising=False)
    for name in graphs._END_OF_ALLOCATION:
        monkeypatch.delattr(torch._C, name, raising=False)
    monkeypatch.setattr(torch._C, graphs._END_OF_ALLOCATION[0], made.end, raising=False)
    monkeypatch.setattr(graphs, "_failed", [])
    return made


def breaks(device: Device, error: BaseException) -> Callable[[], None]:
    def run() -> None:
        device.broken = True
        raise error

    return run


@pytest.mark.parametrize("kind", [RuntimeError, KeyboardInterrupt])
def test_after_a_broken_capture_all_is_as_before(device, kind):
    """Its own exception is raised; the stream, the allocator and the generators are as they were, for the next one."""
    before, generator, error = device.stream, object(), kind("operation not permitted when stream is capturing (item)")
    graph = graphs.Graph(CPU, [generator])  # type: ignore[list-item]
    with pytest.raises(kind, match="item") as raised:
        graph.capture(breaks(device, error))
    assert raised.value is error
    assert error.__cause__ is None
    assert device.stream is before
    assert device.underway == []
    device.draw()
    torch.cuda.empty_cache()
    assert device.captures == [[generator]]  # its end is what puts the generators right
    assert graphs._failed == [graph._graph]
    again = graphs.Graph(CPU)
    assert again.capture(lambda: 5) == 5
    assert graphs.Graph(CPU, (), again).capture(lambda: 6) == 6
    assert device.stream is before
    assert device.underway == []


def test_a_second_graph_that_breaks_ends_the_shared_pool(device):
    first = graphs.Graph(CPU)
    assert first.capture(lambda: 1) == 1
    second = graphs.Graph(CPU, (), first)
    with pytest.raises(ValueError, match="why"):
        second.capture(breaks(device, ValueError("why")))
    assert device.underway == []
    assert second._pool == first._pool
    device.draw()


def test_an_exception_that_breaks_nothing_is_left_to_torch(device):
    def run() -> None:
        raise ValueError("of the host alone")

    with pytest.raises(ValueError, match="host alone"):
        graphs.Graph(CPU).capture(run)
    assert len(device.captures) == 1
    assert graphs._failed == []
    device.draw()


def test_an_end_that_fails_by_itself_is_reported(device):
    def run() -> None:
        device.broken = True

    with pytest.raises(RuntimeError, match="previous error during capture"):
        graphs.Graph(CPU).capture(run)
    assert device.underway == []
    device.draw()


def test_what_cannot_be_put_right_hides_nothing(device, monkeypatch):
    monkeypatch.setattr(graphs.Graph, "_recover", lambda self: torch.zeros(2).view(3))
    with pytest.raises(ValueError, match="why"):
        graphs.Graph(CPU).capture(breaks(device, ValueError("why")))


def test_only_the_last_round_of_a_warm_up_must_not_wait(device):
    modes: list[Any] = []
    device.mode = 1  # a user's
    runs = [lambda: modes.append(device.mode) or len(modes) for _ in range(2)]  # type: ignore[func-returns-value]
    assert graphs.warm_up(CPU, runs, 3) == 6
    assert modes == [1, 1, 1, 1, 2, 2]
    assert device.mode == 1

    def waits() -> None:
        if device.mode == 2:
            raise RuntimeError("called a synchronizing CUDA operation")

    with pytest.raises(RuntimeError, match="synchronizing"):
        graphs.warm_up(CPU, [waits], 3)
    assert device.mode == 1
