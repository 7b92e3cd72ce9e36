"""SLAT: FGSM on the input and on hidden layers at once."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager

import torch
from torch import Tensor, nn
from torch.autograd.graph import GradientEdge, get_gradient_edge

from elle_fast import attacks
from elle_fast._core import checks
from elle_fast._core.compiled import is_compiled
from elle_fast._core.unwrapping import Model, output_at
from elle_fast.methods.base import WITHOUT_WEIGHT, Bounds, Criterion, Method
from elle_fast.passes import parts_of

Layers = Callable[[nn.Module], Sequence[nn.Module]]

# Of eps. The authors' code has twice the input's step for hidden layers, clamped to eps.
_INPUT_STEP, _HIDDEN_STEP = 0.9, 1.0


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
    is the mean cross-entropy of a second pass, to whose input ``0.9 eps sign(grad_x L)`` is added, and to each h_k as
    it is there ``eps sign(grad_{h_k} L)``, in units of h_k. The sum is clamped to the range that h_k has there over the
    positions of the sample's channel, ``[B, C, ...]``; without positions, ``[B, C]``, there is no range. ``output`` has
    the logits of that pass. The model is an ``nn.Module``. On CIFAR-10, SLAT overfits catastrophically from eps 10/255
    on (the ELLE paper, section 4.4).

    Args:
        layers: maps the model to its hidden layers; ``None`` is :func:`weighted_layers`.
    """

    _elsewhere = WITHOUT_WEIGHT

    def __init__(self, eps: float, bounds: Bounds = None, layers: Layers | None = None) -> None:
        super().__init__(eps, bounds)
        self.layers = weighted_layers if layers is None else checks.function("layers", layers)

    def _step(self, model: Model, inner: Model, x: Tensor, target: Tensor) -> Tensor:
        layers = self.layers(hooked(inner, "SLAT"))
        # Edges of the graph, not the outputs: the next layer may change an output in place.
        hidden: list[GradientEdge] = []
        point = attacks.leaf(x)
        with torch.enable_grad(), _replaced(layers, lambda output: hidden.append(get_gradient_edge(output))):
            loss = attacks.sample_losses(output_at(inner, point), target, None, x.shape[0]).sum()
            edges = [get_gradient_edge(point), *hidden]  # older torch finds none without gradients
        grad, *grads = torch.autograd.grad(loss, edges)
        remaining = iter(grads)

        def perturbed(output: Tensor) -> Tensor:
            here = output.detach()
            step = _HIDDEN_STEP * self.eps * next(remaining).sign()
            if positions := here.dim() - 2:
                # The gradient goes past the clamp, as if the step were a constant.
                lowest, highest = (
                    each.view(*here.shape[:2], *[1] * positions) for each in here.flatten(2).aminmax(dim=2)
                )
                step = (here + step).clamp(lowest, highest) - here
            return output + step

        with _replaced(layers, perturbed):
            logits = model(self._within(x + _INPUT_STEP * self.eps * grad.sign()))
        return self._record(self._ce(logits, target), logits)


def hooked(model: Model, method: str) -> nn.Module:
    """The module on whose layers a method puts hooks.

    Raises:
        TypeError, ValueError: for a function, and for a module with a compiled part, naming the method.
    """
    whole, _ = parts_of(model)
    if not isinstance(whole, nn.Module):
        raise TypeError(f"model: expected a torch.nn.Module for {method}, got {checks.describe(whole)}")
    if is_compiled(whole):
        raise ValueError(
            f"model: expected one that is not compiled for {method}, whose hooks a compiled graph leaves out, got a "
            f"{type(whole).__name__} with a compiled part"
        )
    return whole


@contextmanager
def _replaced(layers: Sequence[nn.Module], change: Callable[[Tensor], Tensor | None]) -> Iterator[None]:
    """Inside, what ``change`` makes of a layer's output takes its place, unless it is ``None``."""
    with ExitStack() as hooks:
        for layer in layers:
            hooks.enter_context(layer.register_forward_hook(lambda module, args, output: change(output)))
        yield


_ABOUT = "FGSM on the input and on hidden layers"
_REFUSES = {
    "awp": "its attack reads hidden layers, which AWP cannot hold fixed",
    "compile": "has hooks on hidden layers, which a compiled graph leaves out",
}
ROWS = {"slat": Method(_ABOUT, "2104.01575", "2F 1G 1B", 5, SLAT, takes=("layers",), refuses=_REFUSES)}
