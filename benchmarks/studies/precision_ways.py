"""The ways to run the triplets' forward pass that precision.py compares, and the residuals that each one finds."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from benchmarks.harness.device import tf32
from elle_fast import LocalLinearity
from elle_fast.passes import NO_KWARGS

# For a second rounding, all pixels move by this much, which hardly moves the loss: batch norm takes it out again.
SHIFT = 1 / 256


class LastLayerExact(TorchFunctionMode):
    """Linear layers in float32 within an autocast; here that is the last layer, whose input remains rounded."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Call ``func``, a linear layer outside autocast."""
        if func is not F.linear:
            return func(*args, **(kwargs or {}))
        with torch.autocast(args[0].device.type, enabled=False):
            return func(args[0].float(), *args[1:], **(kwargs or {}))


class ProductsOfDifferences(TorchFunctionMode):
    """Convolutions and linear layers multiply in bfloat16 what tells the points of a triplet apart; the rest is fp32.

    A linear layer maps x_a, x_b - x_a and x_c's distance from the line between them as it maps points. So all three
    points share the rounding of x_a, and what is rounded of the differences is small, as they are.
    """

    def __init__(self, alpha: Tensor) -> None:
        super().__init__()
        self.alpha = alpha

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Call ``func``, a product of rows x_a, x_b, x_c in three parts."""
        if func not in (F.conv2d, F.linear):
            return func(*args, **(kwargs or {}))
        x, weight, bias, *rest = args
        alpha = self.alpha.view(-1, *[1] * (x.dim() - 1))
        a, b, c = x.chunk(3)
        parts = torch.cat([a, b - a, c - torch.lerp(a, b, alpha)]).bfloat16()
        a, to_b, off = func(parts, weight.bfloat16(), None, *rest, **(kwargs or {})).float().chunk(3)
        if bias is not None:
            a = a + bias.view(-1, *[1] * (a.dim() - 2))
        return torch.cat([a, a + to_b, a + alpha * to_b + off])


@dataclass(frozen=True)
class Way:
    """How a step might run the triplets' forward pass.

    Attributes:
        autocast: around the step, as ``TrainConfig.precision`` sets it.
        triplet_precision: of LocalLinearity.
        triplets: for each sample.
        spread: radius of the ball that x_a and x_b are drawn from, in eps.
        points: what the points are rounded to before the model sees them.
        mode: what further changes layers, given alpha.
        twice: two passes that round differently; the product of their residuals stands for the square.
        tf32: whether float32 products may use it.
    """

    autocast: torch.dtype | None = None
    triplet_precision: str | None = None
    triplets: int = 1
    spread: float = 1.0
    points: torch.dtype = torch.float32
    mode: Callable[[Tensor], AbstractContextManager[Any]] | None = None
    twice: bool = False
    tf32: bool = False

    @property
    def points_drawn(self) -> tuple[int, float]:
        """Ways that share this see the same points."""
        return self.triplets, self.spread

    @torch.no_grad()
    def residuals(self, model: nn.Module, points: Tensor, y: Tensor, alpha: Tensor) -> list[Tensor]:
        """r of each triplet in float64, from each forward pass on points that nothing has rounded."""
        linearity = LocalLinearity(0.0, triplets=self.triplets, triplet_precision=self.triplet_precision)
        found = []
        for shift in (0.0, SHIFT)[: 1 + self.twice]:
            with self._around(alpha):
                seen = (points + shift).to(self.points)
                logits = linearity.rows(model, seen, y, alpha.to(points.dtype), NO_KWARGS)
            found.append(residuals(logits, y, alpha, self.triplets))
        return found

    @contextmanager
    def _around(self, alpha: Tensor) -> Iterator[None]:
        with ExitStack() as stack:
            stack.enter_context(tf32(self.tf32))
            if self.autocast is not None:
                stack.enter_context(torch.autocast(alpha.device.type, dtype=self.autocast))
            if self.mode is not None:
                stack.enter_context(self.mode(alpha))
            yield


EXACT = Way()  # of a model and points in float64
BF16 = Way(torch.bfloat16)


def ways(device: torch.device) -> dict[str, Way]:
    """By name; tf32 where the device has it."""
    low = torch.bfloat16
    found = {"fp32": Way()}
    if device.type == "cuda" and torch.cuda.get_device_capability(device) >= (8, 0):
        found["tf32"] = Way(tf32=True)
    return found | {
        "bf16, triplets fp32": Way(low, "fp32"),
        "bf16, triplets fp16": Way(low, "fp16"),
        "bf16": BF16,
        "bf16, points too": Way(low, points=low),
        "bf16, last layer fp32": Way(low, mode=lambda alpha: LastLayerExact()),
        "bf16, products of differences": Way(mode=ProductsOfDifferences),
        "bf16, twice the ball": Way(low, spread=2.0),
        "bf16, two triplets": Way(low, triplets=2),
        "bf16, two roundings": Way(low, twice=True),
    }


def residuals(logits: Tensor, y: Tensor, alpha: Tensor, triplets: int = 1) -> Tensor:
    """r of each triplet, ``[triplets * Bt]``, in float64."""
    alpha = alpha.double()
    part = y[: len(alpha) // triplets].repeat(3 * triplets)
    losses = F.cross_entropy(logits.double(), part, reduction="none")
    l_a, l_b, l_c = losses.unflatten(0, (triplets, 3, -1)).unbind(1)
    r: Tensor = l_c.flatten() - torch.lerp(l_a.flatten(), l_b.flatten(), alpha)
    return r
