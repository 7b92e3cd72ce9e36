"""A module's buffers, kept while a pass goes through it."""

from __future__ import annotations

import torch
from torch import nn


class Buffers:
    """The buffers of a module, to be put back as they were; those of modules of the kinds ``but`` are left alone."""

    def __init__(self, root: nn.Module, but: tuple[type[nn.Module], ...] = ()) -> None:
        self.kept = [
            (module, name, buffer, buffer.detach().clone())
            for module in root.modules()
            if not isinstance(module, but)
            for name, buffer in module._buffers.items()
            if buffer is not None
        ]

    @torch.no_grad()
    def restore(self) -> None:
        """Put them back, also where a module has another tensor by now."""
        for module, name, buffer, before in self.kept:
            buffer.data.copy_(before)  # an earlier graph of the step, whose batch norm saved them, does not mind
            module._buffers[name] = buffer
