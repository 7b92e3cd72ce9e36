"""The probe: how many held-out samples withstand PGD-10."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from elle_fast import attacks
from elle_fast._core import checks
from elle_fast._core.eval_mode import in_eval_mode
from elle_fast._core.unwrapping import unwrapped
from elle_fast.guard.looking import looking
from elle_fast.linearity import LocalLinearity
from elle_fast.passes import NO_KWARGS, ModelKwargs, OnPixels

_STEPS = 10

HeldOut = tuple[Tensor, Tensor] | tuple[Tensor, Tensor, Mapping[str, Any]]


class Probe:
    """Samples that are not trained on, and the attack on them.

    Args:
        held_out: x, y, and perhaps the model's other arguments.
        linearity: whose radius, norm, normalisation, loss, precision and generator are the attack's too.
        bounds: of x.

    Raises:
        TypeError, ValueError: for samples whose predictions cannot be told to be right.
    """

    def __init__(self, held_out: HeldOut, linearity: LocalLinearity, bounds: tuple[float, float] | str | None) -> None:
        expected = "held_out: expected x and y, int64 [B] or probabilities [B, C]"
        if not isinstance(held_out, (tuple, list)) or len(held_out) not in (2, 3):
            raise TypeError(f"{expected}, and perhaps model_kwargs, got {checks.describe(held_out)}")
        x, y, *others = held_out
        attacks.check_batch(x, y, linearity.loss_fn, bounds=checks.bounds(bounds))
        if not isinstance(y, Tensor) or y.shape[:1] != x.shape[:1] or y.dim() != (2 if y.is_floating_point() else 1):
            raise ValueError(f"{expected}, got y {checks.describe(y)} for x {checks.describe(x)}")
        self.x, self.target, self.kwargs = x, y, ModelKwargs.of(others[0], len(x)) if others else NO_KWARGS
        self._linearity, self._bounds = linearity, bounds

    def withstood(self, model: nn.Module, like: Tensor) -> Tensor:
        """How many samples withstand PGD-10, of how many, and the classes ``[3]``; NaN if a logit is NaN.

        The samples go to the dtype and device of ``like``, a batch of the training.
        """
        elin = self._linearity
        self.x, self.target, self.kwargs = self.x.to(like), self.target.to(like.device), self.kwargs.to(like.device)
        options: dict[str, Any] = {"norm": elin.packing.norm, "loss_fn": elin.loss_fn, "generator": elin.generator}
        with looking(model, like.device, elin.triplet_precision), in_eval_mode(model):
            given = OnPixels(self.kwargs.given_to(unwrapped(model)), elin.packing, elin.logits)
            points = attacks.pgd(given, self.x, self.target, elin.eps, steps=_STEPS, bounds=self._bounds, **options)
            with torch.no_grad():
                logits = given(points)
        classes = self.target if self.target.dim() == 1 else self.target.argmax(1)
        right = (logits.argmax(1) == classes).sum().float()
        right = right.where(~logits.isnan().any(), torch.nan)  # the argmax of NaN is a class like another
        return torch.stack([right, torch.full_like(right, len(self.x)), torch.full_like(right, logits.shape[1])])
