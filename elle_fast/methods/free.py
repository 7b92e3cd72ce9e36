"""Free AT: one backward pass gives the gradients of the weights and of the perturbation."""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor

from elle_fast._core import checks
from elle_fast._core.unwrapping import Model, output_at
from elle_fast.methods.base import NOT_SINGLE_STEP, WITHOUT_WEIGHT, Bounds, Criterion, Method

_REPLAYS = 8


class FreeAT(Criterion):
    """Free adversarial training (Shafahi et al. 2019, arXiv 1904.12843, Algorithm 1), as in Wong et al. 2020.

    The loss is the mean cross-entropy at x + delta. Its ``backward()`` also gives delta's gradient g, and

        delta <- clamp(delta + eps sign(g), -eps, eps), then such that x + delta is within ``bounds``

    is what the next call begins with. On the next batch, whose pixels are others, x + delta may thus leave ``bounds``,
    as in that code. The training loop gives a batch m times in a row (``replays`` of its row in the table), an
    optimiser step each; delta is kept across these replays and, as in Algorithm 1, from batch to batch. It begins with
    0, and is part of ``state_dict``. A smaller batch takes delta's first rows; samples of another shape begin with 0
    again. Where a call is no step of the state, delta stays as it is. A step
    cannot be captured as a CUDA graph.
    """

    _elsewhere = WITHOUT_WEIGHT
    _uncapturable = "keeps its perturbation in another tensor after each step"

    def __init__(self, eps: float, bounds: Bounds = None) -> None:
        super().__init__(eps, bounds)
        self.perturbation = torch.empty(0, dtype=torch.float32, device="cpu")

    def _step(self, model: Model, inner: Model, x: Tensor, target: Tensor) -> Tensor:
        delta = self.perturbation.to(x)
        if delta.shape[1:] != x.shape[1:] or delta.shape[0] < x.shape[0]:
            delta = torch.zeros_like(x)
        point = x + delta[: x.shape[0]]
        if self.updates(model) and torch.is_grad_enabled():
            self.perturbation = delta
            point.requires_grad_().register_hook(partial(self._ascend, x))
        logits = self._logits(output_at(model, point), target)
        return self._record(self._ce(logits, target), logits)

    def _ascend(self, x: Tensor, grad: Tensor) -> None:
        rows = x.shape[0]
        # A NaN counts as a step of 0, as delta would keep it for ever.
        delta = (self.perturbation[:rows] + self.eps * grad.sign().nan_to_num()).clamp(-self.eps, self.eps)
        if self.bounds is not None:
            delta = delta.clamp(self.bounds[0] - x, self.bounds[1] - x)
        self.perturbation = torch.cat([delta, self.perturbation[rows:]])

    # Not a buffer, whose shape a checkpoint would have to share.
    def get_extra_state(self) -> Tensor:
        """The perturbation, for ``state_dict``."""
        return self.perturbation

    def set_extra_state(self, state: Tensor) -> None:
        """The perturbation, from ``load_state_dict``."""
        if not isinstance(state, Tensor):
            raise TypeError(f"criterion: expected Free AT's perturbation as a tensor, got {checks.describe(state)}")
        self.perturbation = state.clamp(-self.eps, self.eps)  # that of a larger eps would be no step of this one


_REFUSES = {
    "elle": NOT_SINGLE_STEP,
    "advlc": "one backward pass gives delta's gradient too, which the term would change",
    "awp": "one backward pass gives delta's gradient too, which would be that at the moved weights",
}
_ABOUT = f"{_REPLAYS} steps on each batch, of weights and delta at once"
ROWS = {"free-at": Method(_ABOUT, "1904.12843", "1F 1B", 3, FreeAT, replays=_REPLAYS, refuses=_REFUSES)}
