"""State of a criterion whose shape the first step tells, and what methods that keep something by class share."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from elle_fast._core import checks
from elle_fast._core.eval_mode import in_eval_mode
from elle_fast._core.unwrapping import Model, output_at
from elle_fast.attacks import MODEL_OUTPUT
from elle_fast.methods.base import Criterion


class KeepsBuffers(Criterion):
    """Base class of methods with buffers that are empty at first, and have a checkpoint's shape and precision then."""

    def _keep(self, name: str, dtype: torch.dtype) -> None:
        """Register an empty buffer, which is part of ``state_dict``."""
        self.register_buffer(name, torch.empty(0, dtype=dtype, device="cpu"))

    @torch.no_grad()
    def _store(self, **values: Tensor) -> None:
        """Put values into the buffers: into the tensor that is there, if it fits."""
        for name, value in values.items():
            kept = self.get_buffer(name)
            if (kept.shape, kept.dtype, kept.device) == (value.shape, value.dtype, value.device):
                kept.copy_(value)
            else:
                self._buffers[name] = value

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        state, prefix = args[:2]
        for name, buffer in self.named_buffers(recurse=False):
            found = state.get(prefix + name)
            if isinstance(found, Tensor) and found.is_floating_point() == buffer.is_floating_point():
                self._buffers[name] = buffer.new_empty(found.shape, dtype=found.dtype)
        super()._load_from_state_dict(*args, **kwargs)


def count_classes(model: Model, x: Tensor) -> int:
    """The number of logits, from a forward pass in eval mode, which leaves batch norm's statistics alone."""
    with torch.no_grad(), in_eval_mode(model):
        return checks.logits(output_at(model, x), x.shape[0], MODEL_OUTPUT).shape[1]


def check_classes(number: int, logits: Tensor) -> None:
    """Whether there are as many logits as the method has classes."""
    if logits.shape[1] != number:
        raise ValueError(f"classes: expected {logits.shape[1]}, one for each of the model's logits, got {number}")


def class_of(target: Tensor) -> Tensor:
    """The class of each sample, int64 ``[B]``; of probabilities the most probable one."""
    return target if target.dim() == 1 else target.argmax(dim=1)
