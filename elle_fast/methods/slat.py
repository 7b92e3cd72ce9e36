"""SLAT: FGSM on the input and on hidden layers at once."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from elle_fast import attacks
from elle_fast._core import checks
from elle_fast.linearity import Model, unwrapped
from elle_fast.methods.base import Bounds, Criterion, within
from elle_fast.recipes.models import PreActResNet

# Of a hidden layer's step to the input's.
HIDDEN_STEP = 0.75


class SLAT(Criterion):
    r"""Single-step latent adversarial training (Park and Lee 2021, arXiv 2104.01575).

    One clean pass gives the loss' gradient with respect to the input and to the outputs h_k of hidden layers. The loss
    is the mean cross-entropy of a second pass, to whose input eps sign(grad_x L) is added, and to each h_k as it is
    there ``0.75 eps sign(grad_{h_k} L)``.

    The layers: the stem and every stage but the last of the recipes' residual networks; of another model every
    convolution and linear layer but the last.

    Args:
        eps: step of the input, in units of x; 0.75 of it is the step of a hidden layer, in units of its output.
        bounds: range to which the input's point is clamped; ``None`` clamps nothing.
    """

    def __init__(self, eps: float, bounds: Bounds = None) -> None:
        super().__init__()
        self.eps = checks.real("eps", eps, low=0)
        self.bounds = checks.bounds(bounds)

    def forward(self, model: Model, x: Tensor, target: Tensor) -> Tensor:
        """The loss of one batch, 0-dim.

        Raises:
            TypeError: if the model is no ``nn.Module``, whose layers could be looked at.
            ValueError: if it has no hidden layer.
        """
        attacks.check_batch(x, target, None)
        inner = unwrapped(model)
        layers = hidden_layers(inner)
        hidden: list[Tensor] = []
        point = x.detach().requires_grad_()
        with _replaced(layers, lambda output: hidden.append(output)):
            loss = F.cross_entropy(inner(point), target, reduction="sum")
        steps = [grad.sign() for grad in torch.autograd.grad(loss, [point, *hidden])]
        x_adv = within(x + self.eps * steps[0], self.bounds)
        remaining = iter(steps[1:])
        with _replaced(layers, lambda output: output + HIDDEN_STEP * self.eps * next(remaining)):
            logits = model(x_adv)
        loss = F.cross_entropy(logits, target)
        return self._record(loss, output=logits, ce=loss)


def hidden_layers(model: Model) -> list[nn.Module]:
    """The layers whose outputs are perturbed, see :class:`SLAT`."""
    if not isinstance(model, nn.Module):
        raise TypeError(f"model: expected a torch.nn.Module for SLAT, got {checks.describe(model)}")
    for module in model.modules():
        if isinstance(module, PreActResNet):
            return [module.stem, *cast("Sequence[nn.Module]", module.stages)[:-1]]
    weighted: list[nn.Module] = [
        module for module in model.modules() if isinstance(module, (nn.Linear, nn.Conv1d, nn.Conv2d))
    ]
    if len(weighted) < 2:
        raise ValueError(
            f"model: expected hidden layers for SLAT, so at least 2 linear or convolution layers, got {len(weighted)} "
            f"in a {type(model).__name__}"
        )
    return weighted[:-1]


@contextmanager
def _replaced(layers: Sequence[nn.Module], change: Callable[[Tensor], Tensor | None]) -> Iterator[None]:
    """Inside, what ``change`` makes of a layer's output takes its place, unless it is ``None``."""

    def hook(module: nn.Module, args: Any, output: Tensor) -> Tensor | None:
        return change(output)

    handles = [layer.register_forward_hook(hook) for layer in layers]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
