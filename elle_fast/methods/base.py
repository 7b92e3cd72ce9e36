"""What the training methods share: a criterion's form, plain adversarial training, and points kept in range."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from elle_fast import attacks
from elle_fast.linearity import Model, unwrapped

Attack = Callable[[Model, Tensor, Tensor], Tensor]
Bounds = tuple[float, float] | None


class Criterion(nn.Module):
    """Base class: ``criterion(model, x, target) -> loss``, 0-dim.

    ``stats`` holds detached 0-dim tensors of that step, and ``output`` the logits at the points trained on, detached.

    Of a model in DistributedDataParallel the first forward pass with a graph goes through the wrapper, which then
    reduces the gradients of all of them; see :func:`elle_fast.linearity.unwrapped`.
    """

    def __init__(self) -> None:
        super().__init__()
        self.stats: dict[str, Tensor] = {}
        self.output: Tensor | None = None

    def _record(self, loss: Tensor, *, output: Tensor | None, **parts: Tensor) -> Tensor:
        self.output = None if output is None else output.detach()
        self.stats = {name: value.detach() for name, value in {"loss": loss, **parts}.items()}
        return loss


class Counting(Criterion):
    """Base class of methods whose weights depend on the number of training steps so far, which a resume keeps."""

    def __init__(self) -> None:
        super().__init__()
        self._steps = 0

    def _next(self, x: Tensor) -> int:
        """The number of this step, from 0."""
        if x.is_cuda and torch.cuda.is_current_stream_capturing():
            raise RuntimeError(
                f"criterion: expected no capture of {type(self).__name__} as a CUDA graph, whose replays cannot count "
                "the steps that its weight depends on, got one"
            )
        step = self._steps
        self._steps += self.training
        return step

    # A number of the host, not a buffer: to read one of the device is to wait for it.
    def get_extra_state(self) -> Tensor:
        """The number of steps, for ``state_dict``."""
        return torch.tensor(self._steps)

    def set_extra_state(self, state: Tensor) -> None:
        """The number of steps, from ``load_state_dict``."""
        self._steps = int(state)


class AdversarialLoss(Criterion):
    """Plain adversarial training: the mean cross-entropy at the attack's points."""

    def __init__(self, attack: Attack) -> None:
        super().__init__()
        self.attack = attack

    def forward(self, model: Model, x: Tensor, target: Tensor) -> Tensor:
        """The loss of one batch, 0-dim."""
        attacks.check_batch(x, target, None)
        # The wrapper is for the pass that has a backward; it would bring the processes together at each attack step.
        logits = model(self.attack(unwrapped(model), x, target))
        loss = F.cross_entropy(logits, target)
        return self._record(loss, output=logits, ce=loss)


class Kept:
    """A model that keeps its last output."""

    def __init__(self, model: Model) -> None:
        self.model = model
        self.output: Tensor | None = None

    def __call__(self, x: Tensor) -> Any:
        """The model's output."""
        self.output = output = self.model(x)
        return output


def within(point: Tensor, bounds: Bounds) -> Tensor:
    """The point clamped to ``bounds``, if there are any."""
    return point if bounds is None else point.clamp(*bounds)


def projected(point: Tensor, x: Tensor, eps: float, bounds: Bounds) -> Tensor:
    """The nearest point of the linf ball around x that is within ``bounds``."""
    return within(point.clamp(x - eps, x + eps), bounds)
