"""A CUDA graph of any function, and what its capture needs: a warm-up, and everything put back as it was."""

from __future__ import annotations

import gc
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from typing import Any, TypeVar

import torch
from torch import Tensor

T = TypeVar("T")

# Kept for good: torch may ask a graph whose capture failed, in later captures, whether an allocation is its own.
_failed: list[torch.cuda.CUDAGraph] = []

# Torch's private name, today's and that of its older versions, for the end of what a capture allocates.
_END_OF_ALLOCATION = ("_cuda_endAllocateToPool", "_cuda_endAllocateCurrentStreamToPool")


class Graph:
    """One CUDA graph, whose replays draw anew from the device's generator and from ``generators``.

    It shares the memory of a graph ``beside`` it, so the two must never run at the same time.
    """

    def __init__(
        self, device: torch.device, generators: Iterable[torch.Generator] = (), beside: Graph | None = None
    ) -> None:
        self._device, self._generators = device, list(generators)
        self._graph = self._registered()
        # Graphs that share a pool have to be captured in one stream.
        self._pool: Any = torch.cuda.graph_pool_handle() if beside is None else beside._pool
        self._stream: torch.cuda.Stream = torch.cuda.Stream(device) if beside is None else beside._stream

    def _registered(self) -> torch.cuda.CUDAGraph:
        graph = torch.cuda.CUDAGraph()
        for generator in self._generators:
            graph.register_generator_state(generator)
        return graph

    def capture(self, run: Callable[[], T]) -> T:
        """Make a graph of what ``run`` launches; nothing runs. A replay writes to the tensors that are returned.

        If ``run`` fails, its exception is raised, and torch is made ready for what comes next, eager or captured.
        """
        collecting = gc.isenabled()
        stopped: BaseException | None = None
        gc.collect()
        gc.disable()  # a kernel or a graph that the collector unloads would break the capture
        try:
            with torch.cuda.device(self._device), warnings.catch_warnings():
                warnings.filterwarnings("error", message=".*CUDA Graph is empty")
                # thread_local: other threads, such as a loader's that pins memory, may go on calling CUDA. The stream
                # around: where the end of a capture fails torch.cuda.graph leaves its own one current.
                with (
                    torch.cuda.stream(torch.cuda.current_stream(self._device)),
                    torch.cuda.graph(
                        self._graph, pool=self._pool, stream=self._stream, capture_error_mode="thread_local"
                    ),
                ):
                    try:
                        return run()
                    except BaseException as error:
                        stopped = error
                        raise
        except BaseException as error:
            if error is stopped:  # the capture has ended well after it
                raise
            with suppress(RuntimeError):
                self._recover()
            if stopped is None:
                raise
            # Torch ends the capture first, and says only that something had failed before.
            raise stopped from None
        finally:
            if collecting:
                gc.enable()

    def _recover(self) -> None:
        """End by hand what a capture that CUDA has broken off leaves begun, in torch before 2.12.

        The allocator would refuse to empty its cache, which each capture begins with; the generators would refuse to
        draw. Memory that the capture took is not given back.
        """
        _failed.append(self._graph)
        with torch.cuda.device(self._device):
            for end in (getattr(torch._C, name, None) for name in _END_OF_ALLOCATION):
                with suppress(RuntimeError):  # where it has ended
                    if end is not None:
                        end(torch.cuda.current_device(), self._pool)
            # The end of a capture that succeeds is what puts generators right.
            graph, number = self._registered(), torch.zeros((), device=self._device)
            stream = torch.cuda.Stream(self._device)
            stream.wait_stream(torch.cuda.current_stream(self._device))
            with torch.cuda.stream(stream):
                graph.capture_begin(capture_error_mode="thread_local")
                number.zero_()
                graph.capture_end()

    def replay(self) -> None:
        """Launch it."""
        self._graph.replay()


def warm_up(device: torch.device, runs: Sequence[Callable[[], T]], rounds: int) -> T:
    """Call all functions ``rounds`` times in a side stream, as ``torch.cuda.graph`` will; what the last one returns.

    In the last round torch raises RuntimeError where the host waits for the device: earlier than a capture would, in
    which CUDA would say less.
    """
    stream = torch.cuda.Stream(device)
    stream.wait_stream(torch.cuda.current_stream(device))
    with torch.cuda.stream(stream):
        for _ in range(rounds - 1):
            for run in runs:
                run()
        with _no_waits():
            for run in runs:
                result = run()
    torch.cuda.current_stream(device).wait_stream(stream)
    return result


@contextmanager
def _no_waits() -> Iterator[None]:
    mode = torch.cuda.get_sync_debug_mode()
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*debug mode is a prototype")
        torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode(mode)


def random_state(device: torch.device) -> Tensor:
    """The state of the device's own generator."""
    return torch.cuda.get_rng_state(device) if device.type == "cuda" else torch.get_rng_state()


@contextmanager
def restored(
    device: torch.device, tensors: Callable[[], Iterable[Tensor]], generators: Sequence[torch.Generator] = ()
) -> Iterator[None]:
    """Put tensors and random numbers (the host's, the device's, ``generators``') back as they were before.

    ``tensors`` is asked again at the end: those that were made inside are set to zero.
    """
    kept = {id(tensor): (tensor, tensor.detach().clone()) for tensor in tensors()}
    on_host, on_device = torch.get_rng_state(), random_state(device)
    own = [generator.get_state() for generator in generators]
    try:
        yield
    finally:
        with torch.no_grad():
            for tensor, before in kept.values():
                tensor.copy_(before)
            for tensor in tensors():
                if id(tensor) not in kept:
                    tensor.zero_()
        torch.set_rng_state(on_host)
        if device.type == "cuda":
            torch.cuda.set_rng_state(on_device, device)
        for generator, state in zip(generators, own, strict=True):
            generator.set_state(state)
