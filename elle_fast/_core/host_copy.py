"""Numbers on their way from the device to the host."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor


class HostCopy(NamedTuple):
    """A copy of a small tensor that was started at some point, and which value of the tensor that was."""

    tensor: Tensor
    version: int
    copy: Tensor
    event: torch.cuda.Event

    @classmethod
    def start(cls, tensor: Tensor) -> HostCopy | None:
        """Start one; nothing waits. ``None`` where there is no stream of work that reading it would wait for."""
        if tensor.device.type != "cuda":
            return None
        copy = tensor.to("cpu", non_blocking=True)  # into pinned memory
        event = torch.cuda.Event()
        event.record(torch.cuda.current_stream(tensor.device))
        return cls(tensor, tensor._version, copy, event)

    def holds(self, tensor: Tensor) -> bool:
        """Whether it is of this tensor, and the tensor has not changed since."""
        return self.tensor is tensor and self.version == tensor._version

    def arrived(self) -> bool:
        """Whether it is there; does not wait."""
        return bool(self.event.query())

    def item(self) -> float:
        """The number, of a 0-dim tensor; waits until it is there."""
        self.event.synchronize()
        return self.copy.item()

    def tolist(self) -> list[float]:
        """The numbers, of a tensor of one dimension; waits until they are there."""
        self.event.synchronize()
        found: list[float] = self.copy.tolist()
        return found
