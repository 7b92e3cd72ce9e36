"""Free AT: one backward pass gives the gradients of the weights and of the perturbation."""

from __future__ import annotations

from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from elle_fast import attacks
from elle_fast._core import checks
from elle_fast.linearity import Model
from elle_fast.methods.base import Bounds, Criterion, within

REPLAYS = 8


class FreeAT(Criterion):
    """Free adversarial training (Shafahi et al. 2019, arXiv 1904.12843, Algorithm 1).

    The loss is the mean cross-entropy at x'. Its ``backward()`` also gives delta's gradient g, and

        delta <- clamp(x' - x + eps sign(g), -eps, eps),   x' = x + delta clamped to ``bounds``

    is what the next call begins with. The training loop gives a batch m times in a row (:data:`REPLAYS`), an optimiser
    step each; delta is kept across these replays and, as in Algorithm 1, from batch to batch. It begins with 0, and is
    part of ``state_dict``. A smaller batch takes delta's first rows; samples of another shape begin with 0 again.

    Args:
        eps: radius of the linf ball, in units of x.
        bounds: range to which x + delta is clamped; ``None`` clamps nothing.
    """

    def __init__(self, eps: float, bounds: Bounds = None) -> None:
        super().__init__()
        self.eps = checks.real("eps", eps, low=0)
        self.bounds = checks.bounds(bounds)
        self.perturbation = torch.empty(0)

    def forward(self, model: Model, x: Tensor, target: Tensor) -> Tensor:
        """The loss of one replay, 0-dim. Its backward pass changes the perturbation, in train mode."""
        attacks.check_batch(x, target, None)
        delta = self.perturbation.to(x)
        if delta.shape[1:] != x.shape[1:] or delta.shape[0] < x.shape[0]:
            delta = torch.zeros_like(x)
        self.perturbation = delta
        point = within(x + delta[: x.shape[0]], self.bounds)
        if self.training and torch.is_grad_enabled():
            point.requires_grad_().register_hook(partial(self._ascend, x, point.detach()))
        logits = model(point)
        loss = F.cross_entropy(logits, target)
        return self._record(loss, output=logits, ce=loss)

    def _ascend(self, x: Tensor, point: Tensor, grad: Tensor) -> None:
        # Of a NaN the step is 0: it would be kept for ever.
        delta = (point - x + self.eps * grad.sign().nan_to_num()).clamp(-self.eps, self.eps)
        self.perturbation = torch.cat([delta, self.perturbation[x.shape[0] :]])

    # Not a buffer, whose shape a checkpoint would have to share.
    def get_extra_state(self) -> Tensor:
        """The perturbation, for ``state_dict``."""
        return self.perturbation

    def set_extra_state(self, state: Tensor) -> None:
        """The perturbation, from ``load_state_dict``."""
        self.perturbation = state.clone()
