"""What each regulariser costs: forward passes, backward passes, double backpropagation, units."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from elle_fast import LocalLinearity, attacks
from elle_fast.regularizers import CURE, GAT, LLR, AdvLC, GradAlign, NuAT, losses_and_gradient
from tests.helpers import Recorder, labels, random

BATCH, WIDTH, LAYERS, EPS = 6, 5, 3, 0.1
X, Y = random(BATCH, WIDTH, seed=1), labels(BATCH, WIDTH)
X_ADV = X + EPS * random(BATCH, WIDTH, seed=2)


def network() -> nn.Module:
    """A unit is a matrix product ``[B, WIDTH] x [WIDTH, WIDTH]``, or as many multiplications, for each of its layers.

    The weight of the PReLU, through which these inputs pass as they are, makes the first layer's input require grad:
    that layer has a data gradient, too.
    """
    layers = [layer for _ in range(LAYERS) for layer in (nn.Linear(WIDTH, WIDTH, bias=False), nn.Tanh())]
    return nn.Sequential(nn.PReLU(), *layers)


class Passes:
    """Forward passes of a model in samples over B, and the arrivals of a gradient at their outputs."""

    def __init__(self) -> None:
        self.forward = 0.0
        self.backward = 0

    def arrived(self, grad: Tensor) -> None:
        self.backward += 1

    def hook(self, module: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> None:
        self.forward += len(args[0]) / BATCH
        if output.requires_grad:
            output.register_hook(self.arrived)


@contextmanager
def passes(model: nn.Module) -> Iterator[Passes]:
    counted = Passes()
    hook = model.register_forward_hook(counted.hook)
    yield counted
    hook.remove()


def doubly(value: Tensor) -> bool:
    """Whether the value's graph holds the derivative of a backward pass through the model."""
    names, left = set(), [value.grad_fn]
    seen = set(left)
    while left:
        node = left.pop()
        if node is not None:
            names.add(node.name())
            left += (new := {each for each, _ in node.next_functions} - seen)
            seen |= new
    return any(name.startswith("TanhBackwardBackward") for name in names)


def shared(model: nn.Module, *names: str) -> dict[str, Tensor]:
    """What a training step may have computed already, by its argument's name."""
    losses, grad = losses_and_gradient(model, X, Y)
    _, grad_adv = losses_and_gradient(model, X_ADV, Y)
    values = {"losses": losses, "grad": grad, "grad_adv": grad_adv, "logits": model(X), "logits_adv": model(X_ADV)}
    return {name: values[name] for name in names}


OUTPUTS = [GAT(), NuAT(), AdvLC()]
# Regulariser, what it is given, forward passes, input gradients, double backpropagation, units. Each forward pass with
# a graph is 1 unit and 2 more in an ordinary backward; an input gradient is 1, and 2 more in the double one.
COSTS: list[tuple[Any, tuple[str, ...], int, int, bool, int]] = [
    (GradAlign(EPS), (), 2, 2, True, 8),
    (GradAlign(EPS), ("grad",), 1, 1, True, 6),
    (CURE(), (), 2, 2, True, 12),
    (CURE(), ("grad",), 1, 1, True, 10),
    (CURE(), ("grad", "grad_adv"), 0, 0, True, 8),
    (LLR(EPS), (), 2, 1, True, 9),
    (LLR(EPS), ("losses", "grad"), 1, 0, True, 7),
    *((each, (), 2, 0, False, 6) for each in OUTPUTS),
    *((each, ("logits",), 1, 0, False, 5) for each in OUTPUTS),
    *((each, ("logits_adv",), 1, 0, False, 5) for each in OUTPUTS),
    *((each, ("logits", "logits_adv"), 0, 0, False, 4) for each in OUTPUTS),
    # What ELLE is about: a forward pass over three points, and no gradient by the input.
    (LocalLinearity(EPS), (), 3, 0, False, 9),
]


@pytest.mark.parametrize("regulariser,given,forwards,gradients,double,units", COSTS)
def test_a_regularisers_passes(regulariser, given, forwards, gradients, double, units):
    model = network()
    options = shared(model, *given)
    if isinstance(regulariser, GradAlign):  # which holds the first gradient
        options = {name: value.detach() for name, value in options.items()}
    with passes(model) as counted, Recorder() as recorder:
        value = regulariser(model, X, Y, X_ADV, **options)
        before = counted.backward
        value.backward()
    assert (counted.forward, before, doubly(value)) == (forwards, gradients, double)
    sizes = [args[0].numel() * args[1].shape[1] for name, args, _ in recorder.calls if name == "mm"]
    # One is in the gradient of the nuclear norm.
    products = units * LAYERS + isinstance(regulariser, NuAT)
    assert sum(sizes) == products * BATCH * WIDTH * WIDTH


# ---- In the training steps that use them: F and B over the batch, each B a backward pass through the graph of one F


def gradalign(model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    grad = attacks.input_gradient(model, x, y)
    penalty: Tensor = GradAlign(EPS)(model, x, y, grad=grad)
    return F.cross_entropy(model(x + EPS * grad.sign()), y) + 0.2 * penalty


def advlc(model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    x_adv = attacks.fgsm(model, x, y, EPS)
    logits_adv = model(x_adv)
    penalty: Tensor = AdvLC()(model, x, y, x_adv, logits_adv=logits_adv)
    return F.cross_entropy(logits_adv, y) + 0.3 * penalty


def guided(regulariser: Any) -> Callable[[nn.Module, Tensor, Tensor], Tensor]:
    def step(model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
        with torch.no_grad():
            held = model(x)
        start = X_ADV.clone().requires_grad_()
        output = model(start)
        term = F.cross_entropy(output, y) + 10 * regulariser.from_logits(held, output)
        (grad,) = torch.autograd.grad(term, start)
        logits = model(x)
        penalty: Tensor = regulariser(model, x, y, X_ADV + EPS * grad.sign(), logits=logits)
        return F.cross_entropy(logits, y) + 10 * penalty

    return step


@pytest.mark.parametrize(
    "step,forwards,gradients,double",
    [
        (gradalign, 3, 2, True),
        (guided(GAT()), 4, 1, False),
        (guided(NuAT()), 4, 1, False),
        (advlc, 3, 1, False),
    ],
    ids=["gradalign", "gat", "nuat", "advlc"],
)
def test_a_training_steps_passes(step, forwards, gradients, double):
    """The methods' costs: GradAlign 3F 2B + double B, GAT and NuAT 4F 2B, AdvLC 3F 2B.

    Of these B, the last of GAT, NuAT and AdvLC is the training's own, which has not begun here.
    """
    model = network()
    with passes(model) as counted:
        loss = step(model, X, Y)
    assert (counted.forward, counted.backward, doubly(loss)) == (forwards, gradients, double)
