"""Methods that do something else as the run goes on."""

from __future__ import annotations

import torch
from torch import Tensor

from elle_fast._core.unwrapping import Model
from elle_fast.criterion import TrainingLoss


class CountsSteps(TrainingLoss):
    """Base class of methods whose steps depend on how many there were, which is part of ``state_dict``.

    The count is the host's, so a step cannot be captured as a CUDA graph.
    """

    _done = 0

    def _count(self, model: Model, x: Tensor) -> int:
        """The number of training steps before this one."""
        if x.is_cuda and torch.cuda.is_current_stream_capturing():
            raise RuntimeError(
                f"criterion: {type(self).__name__} cannot be captured as a CUDA graph, as its steps depend on their "
                "number, which replays do not count"
            )
        done = self._done
        self._done += self.updates(model)
        return done

    # Not a buffer on the device: reading that would wait for it.
    def get_extra_state(self) -> Tensor:
        """The number of training steps, for ``state_dict``."""
        return torch.tensor(self._done, device="cpu")

    def set_extra_state(self, state: Tensor) -> None:
        """The number of training steps, from ``load_state_dict``."""
        self._done = int(state)
