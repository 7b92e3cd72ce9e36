"""A CUDA graph on the CPU: the operators that were dispatched, run again on the same tensors, and nothing else."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from elle_fast.testing import no_host_sync

# What a capture does not permit, beside what waits for the device: tensors from the host.
_REFUSED = frozenset(["lift_fresh"])


def _tensors(tree: Any) -> list[Tensor]:
    return [leaf for leaf in tree_leaves(tree) if isinstance(leaf, Tensor)]


class _Recorder(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.calls: list[tuple[Any, Any, Any, list[tuple[int, Tensor]]]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.overloadpacket.__name__ in _REFUSED:
            raise RuntimeError(f"{func}: operation not permitted when stream is capturing")
        result = func(*args, **(kwargs or {}))
        memory = {each.untyped_storage().data_ptr() for each in _tensors((args, kwargs))}
        # Others are views, or were written to in place.
        new = [(i, each) for i, each in enumerate(_tensors(result)) if each.untyped_storage().data_ptr() not in memory]
        self.calls.append((func, args, kwargs or {}, new))
        return result


class RecordedGraph:
    """As :class:`elle_fast.step.graph.Graph`. Whatever Python decided, counted or kept stays as it was when recorded.

    It differs in that a capture runs what it records.
    """

    made: list[RecordedGraph]

    def __init__(self, device: torch.device, generators: Any = (), beside: RecordedGraph | None = None) -> None:
        self.replays, self.generators, self.beside = 0, list(generators), beside
        RecordedGraph.made.append(self)

    def capture(self, run: Callable[[], Any]) -> Any:
        with no_host_sync(), _Recorder() as recorder:
            self.results = run()
        self.calls = recorder.calls
        return self.results

    @torch.no_grad()
    def replay(self) -> None:
        self.replays += 1
        with torch.autocast("cpu", enabled=False):
            for func, args, kwargs, new in self.calls:
                values = _tensors(func(*args, **kwargs))
                for i, tensor in new:
                    tensor.copy_(values[i])
