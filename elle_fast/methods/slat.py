"""SLAT: FGSM on the input and on hidden layers at once."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager

import torch
from torch import Tensor, nn
from torch.autograd.graph import GradientEdge, get_gradient_edge

from elle_fast import attacks
from elle_fast._core import checks
from elle_fast._core.unwrapping import Model, output_at
from elle_fast.methods.base import Bounds, Criterion, Method, cross_entropy

Layers = Callable[[nn.Module], Sequence[nn.Module]]

# Of a hidden layer's step to the input's.
_HIDDEN_STEP = 0.75


def weighted_layers(model: nn.Module) -> list[nn.Module]:
    """Every convolution and linear layer but the last.

    Raises:
        ValueError: if none is left.
    """
    kinds = (nn.Linear, nn.Conv1d, nn.Conv2d)
    found: list[nn.Module] = [module for module in model.modules() if isinstance(module, kinds)]
    if len(found) < 2:
        raise ValueError(
            f"model: expected hidden layers for SLAT, so at least 2 linear or convolution layers, got {len(found)} "
            f"in a {type(model).__name__}"
        )
    return found[:-1]


class SLAT(Criterion):
    r"""Single-step latent adversarial training (Park and Lee 2021, arXiv 2104.01575).

    One clean pass gives the loss' gradient with respect to the input and to the outputs h_k of hidden layers. The loss
    is the mean cross-entropy of a second pass, to whose input eps sign(grad_x L) is added, and to each h_k as it is
    there ``0.75 eps sign(grad_{h_k} L)``, in units of h_k. ``output`` has the logits of that pass. The model is an
    ``nn.Module``.

    Args:
        layers: maps the model to its hidden layers; ``None`` is :func:`weighted_layers`.
    """

    def __init__(self, eps: float, bounds: Bounds = None, layers: Layers | None = None) -> None:
        super().__init__(eps, bounds)
        self.layers = weighted_layers if layers is None else checks.function("layers", layers)

    def _step(self, model: Model, inner: Model, x: Tensor, target: Tensor) -> Tensor:
        if not isinstance(inner, nn.Module):
            raise TypeError(f"model: expected a torch.nn.Module for SLAT, got {checks.describe(inner)}")
        layers = self.layers(inner)
        # Edges of the graph, not the outputs: the next layer may change an output in place.
        hidden: list[GradientEdge] = []
        point = attacks.leaf(x)
        with _replaced(layers, lambda output: hidden.append(get_gradient_edge(output))):
            loss = attacks.sample_losses(output_at(inner, point), target, None, x.shape[0]).sum()
        step, *steps = (grad.sign() for grad in torch.autograd.grad(loss, [get_gradient_edge(point), *hidden]))
        remaining = iter(steps)
        with _replaced(layers, lambda output: output + _HIDDEN_STEP * self.eps * next(remaining)):
            logits = model(self._within(x + self.eps * step))
        return self._record(cross_entropy(logits, target), logits)


@contextmanager
def _replaced(layers: Sequence[nn.Module], change: Callable[[Tensor], Tensor | None]) -> Iterator[None]:
    """Inside, what ``change`` makes of a layer's output takes its place, unless it is ``None``."""
    with ExitStack() as hooks:
        for layer in layers:
            hooks.enter_context(layer.register_forward_hook(lambda module, args, output: change(output)))
        yield


_ABOUT = "FGSM on the input and on hidden layers"
ROWS = {"slat": Method(_ABOUT, "2104.01575", "2F 1G 1B", 5, SLAT, takes=("layers",))}
