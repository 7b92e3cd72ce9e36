"""Methods that do something else as the run goes on."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

from elle_fast._core.unwrapping import Model
from elle_fast.criterion import TrainingLoss


class CountsSteps(TrainingLoss):
    """Base class of methods whose steps depend on how many there were, which is part of ``state_dict``.

    The calls of one step have one number: those inside :meth:`~elle_fast.ELLELoss.frozen` have that of the last call
    that was counted, so that is to be the first. The count is the host's, so a step cannot be captured as a CUDA graph.
    """

    _uncapturable = "counts its steps on the host"
    _done = 0
    _ahead = 0

    @property
    def _repeats(self) -> bool:
        """Whether a call belongs to the step that was counted last."""
        return self._frozen > self._ahead

    def _count(self, model: Model, x: Tensor) -> int:
        """The number of training steps before this one."""
        if x.is_cuda and torch.cuda.is_current_stream_capturing():
            raise RuntimeError(
                f"criterion: {type(self).__name__} cannot be captured as a CUDA graph, as its steps depend on their "
                "number, which replays do not count"
            )
        done = max(0, self._done - self._repeats)
        self._done += self.updates(model)
        return done

    # Not a buffer on the device: reading that would wait for it.
    def get_extra_state(self) -> Tensor:
        """The number of training steps, for ``state_dict``."""
        return torch.tensor(self._done, device="cpu")

    def set_extra_state(self, state: Tensor) -> None:
        """The number of training steps, from ``load_state_dict``."""
        self._done = int(state)


@contextmanager
def ahead(criterion: TrainingLoss) -> Iterator[None]:
    """Inside it a criterion is frozen, and its calls belong to the next step that it takes outside."""
    counting = [module for module in criterion.modules() if isinstance(module, CountsSteps)]
    for module in counting:
        module._ahead += 1
    try:
        with criterion.frozen():
            yield
    finally:
        for module in counting:
            module._ahead -= 1
