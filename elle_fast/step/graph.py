"""A CUDA graph of any function, and what its capture needs: a warm-up, and everything put back as it was."""

from __future__ import annotations

import gc
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import TypeVar

import torch
from torch import Tensor

T = TypeVar("T")


class Graph:
    """One CUDA graph, whose replays draw anew from the device's generator and from ``generators``.

    It shares the memory of a graph ``beside`` it, so the two must never run at the same time.
    """

    def __init__(
        self, device: torch.device, generators: Iterable[torch.Generator] = (), beside: Graph | None = None
    ) -> None:
        self._device = device
        self._graph = torch.cuda.CUDAGraph()
        for generator in generators:
            self._graph.register_generator_state(generator)
        # Graphs that share a pool have to be captured in one stream.
        self._pool = None if beside is None else beside._graph.pool()
        self._stream: torch.cuda.Stream = torch.cuda.Stream(device) if beside is None else beside._stream

    def capture(self, run: Callable[[], T]) -> T:
        """Make a graph of what ``run`` launches; nothing runs. A replay writes to the tensors that are returned."""
        collecting = gc.isenabled()
        gc.collect()
        gc.disable()  # a kernel or a graph that the collector unloads would break the capture
        try:
            with torch.cuda.device(self._device), warnings.catch_warnings():
                warnings.filterwarnings("error", message=".*CUDA Graph is empty")
                # thread_local: other threads, such as a loader's that pins memory, may go on calling CUDA.
                with torch.cuda.graph(
                    self._graph, pool=self._pool, stream=self._stream, capture_error_mode="thread_local"
                ):
                    return run()
        finally:
            if collecting:
                gc.enable()

    def replay(self) -> None:
        """Launch it."""
        self._graph.replay()


def warm_up(device: torch.device, runs: Iterable[Callable[[], T]]) -> T:
    """Call each function in a side stream, as ``torch.cuda.graph`` will, and return what the last one returns."""
    stream = torch.cuda.Stream(device)
    stream.wait_stream(torch.cuda.current_stream(device))
    with torch.cuda.stream(stream):
        for run in runs:
            result = run()
    torch.cuda.current_stream(device).wait_stream(stream)
    return result


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
