"""One forward pass: from points to what a loss takes, whatever the model's output is."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor, nn

from elle_fast import attacks
from elle_fast._core import checks
from elle_fast._core.unwrapping import Model
from elle_fast.ops.elle_loss.reference import widen
from elle_fast.ops.pack_points.reference import normalize
from elle_fast.ops.pack_points.validation import Packing


class OnPixels(nn.Module):
    """A model of pixels, with the parameters, mode and device of the model inside."""

    def __init__(self, model: Model, packing: Packing, logits: Callable[[Any], Any] | None) -> None:
        super().__init__()
        self.model, self.packing, self.logits = model, packing, logits
        self.training = getattr(model, "training", True)

    def forward(self, pixels: Tensor) -> Any:
        """What the loss takes out of the model."""
        packing = self.packing
        points = normalize(widen(pixels), packing.mean, packing.std).to(packing.dtype or pixels.dtype)
        return output_of(self.model, self.logits, points)


def output_of(model: Model, logits: Callable[[Any], Any] | None, points: Tensor) -> Any:
    """The model's output, or the logits picked out of it."""
    output = model(points)
    return output if logits is None else logits(output)


def rows_of(
    model: Model,
    logits: Callable[[Any], Any] | None,
    loss_fn: attacks.LossFn | None,
    points: Tensor,
    target: Tensor | None,
) -> Tensor:
    """Logits ``[N, C]``, or losses ``[N]`` of the user's own loss, which alone looks at the target."""
    output, rows = output_of(model, logits, points), points.shape[0]
    if loss_fn is None:
        return checks.logits(output, rows, attacks.MODEL_OUTPUT)
    return attacks.sample_losses(output, target, loss_fn, rows)
