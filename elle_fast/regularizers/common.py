"""What the regularisers share: their checks, and their noise."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from elle_fast import attacks, functional
from elle_fast._core import checks


class Noisy(nn.Module):
    """Base class of regularisers whose second point is x + U[-eps, eps]^d.

    Args:
        eps: half-width of the noise, ``>= 0``, in units of x.
        generator: source of the noise, on x's device; ``None`` is torch's default generator.
    """

    def __init__(self, eps: float, *, generator: torch.Generator | None = None) -> None:
        super().__init__()
        self.eps = checks.real("eps", eps, low=0)
        self.generator = checks.generator(generator)

    def second_point(self, x: Tensor, x_adv: Tensor | None) -> Tensor:
        """``x_adv``, or else x + U[-eps, eps]^d."""
        if x_adv is not None:
            return x_adv
        return functional.random_start(x, self.eps, seed=functional.draw_seed(x.device, self.generator))

    def extra_repr(self) -> str:
        """The options, as ``repr`` shows them."""
        return f"eps={self.eps:g}"


def check_call(x: Tensor, target: Tensor, x_adv: Tensor | None) -> None:
    """Check the arguments of a regulariser before the model sees them."""
    attacks.check_batch(x, target, None)
    if x_adv is not None:
        checks.like("x_adv", x_adv, x)


def given(name: str, value: Any, shape: torch.Size, hint: str = ", as losses_and_gradient returns") -> Tensor:
    """Check what the training step has computed already. Without its graph, part of the gradient would be missing."""
    expected = f"{name}: expected a floating-point tensor {list(shape)} with its graph{hint}"
    if not isinstance(value, Tensor) or not value.is_floating_point():
        raise TypeError(f"{expected}, got {checks.describe(value)}")
    if value.shape != shape or not value.requires_grad:
        graph = "" if value.requires_grad else ", which requires no grad"
        raise ValueError(f"{expected}, got {checks.describe(value)}{graph}")
    return value
