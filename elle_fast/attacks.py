"""Attacks for training and evaluation. Each takes the input gradient only: no parameter's ``.grad`` is touched.

The model is called as it is: in train mode, batch norm sees the attack's points, as in the methods' public code. Inputs
are floating ``[B, ...]``; ``eps`` and ``step_size`` are in units of the inputs.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from elle_fast._core import checks
from elle_fast._core.unwrapping import Model
from elle_fast.functional import draw_seed, random_start
from elle_fast.ops.elle_loss.reference import row_losses, widen
from elle_fast.ops.pack_points import op as pack_op
from elle_fast.ops.pack_points.validation import Packing

__all__ = [
    "SINGLE_STEP",
    "SingleStep",
    "fgsm",
    "input_gradient",
    "losses_and_gradient",
    "n_fgsm",
    "pgd",
    "rs_fgsm",
    "zero_grad",
]

LossFn = Callable[[Any, Tensor], Tensor]

MODEL_OUTPUT = "model's output (ELLELoss picks it out of another type with logits=)"


@dataclass(frozen=True)
class SingleStep:
    r"""A single-step attack in the linf ball, called as ``attack(model, x, target, eps)``.

    .. math::
        x_{adv} = \Pi(x_0 + step \cdot sign(\nabla L(x_0))), \qquad x_0 = x + start \cdot U[-eps, eps]^d

    Attributes:
        start: radius of the random start; 0 starts at x and draws nothing.
        step_size: length of the step, in units of eps as ``start`` is.
        project: whether the result is projected to the eps ball.
        quantile: entries of the gradient below this quantile of the sample's absolute values count as 0.
    """

    start: float
    step_size: float
    project: bool
    quantile: float = 0.0

    def __call__(
        self,
        model: Model,
        x: Tensor,
        target: Tensor,
        eps: float,
        *,
        step_size: float | None = None,
        quantile: float | None = None,
        bounds: tuple[float, float] | None = None,
        loss_fn: LossFn | None = None,
        generator: torch.Generator | None = None,
    ) -> Tensor:
        """The attack's points.

        Args:
            model: maps ``[B, ...]`` to logits ``[B, C]`` (to anything ``loss_fn`` takes, if given).
            x: floating ``[B, ...]``.
            target: int64 ``[B]`` or probabilities ``[B, C]`` (anything ``loss_fn`` takes, if given).
            eps: radius of the ball.
            step_size: in units of x; ``None`` is the attack's own.
            quantile: in ``[0, 1]``; ``None`` is the attack's own.
            bounds: ``(low, high)`` to which start and result are clamped; ``None`` clamps nothing.
            loss_fn: ``(output, target) -> losses [B]``; ``None`` is cross-entropy.
            generator: source of the start, on x's device; ``None`` is torch's default one.

        Returns:
            x_adv, of x's shape and dtype.

        Raises:
            TypeError, ValueError: naming the argument, what was expected and what was got.
        """
        packing = self.options(Packing.checked(eps, bounds=bounds, triplets=0), step_size)
        attack = self if quantile is None else replace(self, quantile=checks.real("quantile", quantile, low=0, high=1))
        check_batch(x, target, loss_fn)
        # Without a random start nothing is drawn, and torch's generator stays where it is.
        seed = draw_seed(x.device, generator) if self.start else torch.zeros((), dtype=torch.int64, device=x.device)
        grad = attack.gradient(lambda start: input_gradient(model, start, target, loss_fn), x, packing, seed)
        return pack_op.pack_points(x, grad, packing, seed=seed)[0]

    def options(self, packing: Packing, step_size: float | None) -> Packing:
        """``packing`` with this attack's step, or with one of ``step_size``."""
        step = self.step_size * packing.eps if step_size is None else checks.real("step_size", step_size, low=0)
        return packing._replace(step_size=step, start=self.start, project=self.project)

    def gradient(
        self, of: Callable[[Tensor], Tensor], x: Tensor, packing: Packing, seed: Tensor, backend: str = "auto"
    ) -> Tensor:
        """What pack_points steps along: ``of(start)`` without the entries below the quantile."""
        start = pack_op.random_start(x, packing, seed=seed, backend=backend) if self.start else x
        return zero_below_quantile(of(start), self.quantile)


# Goodfellow et al. 2015; paper, Algorithm 1, line 5.
fgsm = SingleStep(start=0.0, step_size=1.0, project=False)
# Fast AT's attack (Wong et al. 2020).
rs_fgsm = SingleStep(start=1.0, step_size=1.25, project=True)
# N-FGSM (de Jorge et al. 2022), whose result is within 3 eps of x.
n_fgsm = SingleStep(start=2.0, step_size=1.0, project=False)
# ZeroGrad (Golgooni et al. 2023).
zero_grad = SingleStep(start=1.0, step_size=2.0, project=True, quantile=0.35)

SINGLE_STEP = {"fgsm": fgsm, "rs-fgsm": rs_fgsm, "n-fgsm": n_fgsm, "zero-grad": zero_grad}


def pgd(
    model: Model,
    x: Tensor,
    target: Tensor,
    eps: float,
    *,
    step_size: float | None = None,
    steps: int = 10,
    restarts: int = 1,
    bounds: tuple[float, float] | None = (0.0, 1.0),
    loss_fn: LossFn | None = None,
    generator: torch.Generator | None = None,
) -> Tensor:
    """Projected gradient ascent in the linf ball from uniform random starts (Madry et al. 2018).

    Args:
        model, x, target, eps, bounds, loss_fn: as in :meth:`SingleStep.__call__`.
        step_size: ``None`` is eps / 4.
        steps: ascent steps, ``>= 1``.
        restarts: random starts, ``>= 1``; of several, each sample keeps the one with the highest loss.
        generator: source of the starts, on x's device; ``None`` is torch's default one.

    Returns:
        x_adv, of x's shape and dtype, within eps of x and within ``bounds``.

    Raises:
        TypeError, ValueError: naming the argument, what was expected and what was got.
    """
    eps = checks.real("eps", eps, low=0)
    step = eps / 4 if step_size is None else checks.real("step_size", step_size, low=0)
    steps = checks.integer("steps", steps, low=1)
    restarts = checks.integer("restarts", restarts, low=1)
    box = checks.bounds(bounds)
    check_batch(x, target, loss_fn)
    lowest, highest = x - eps, x + eps
    if box is not None:
        lowest, highest = lowest.clamp(*box), highest.clamp(*box)

    best, best_loss = x, widen(x.new_full((x.shape[0],), -torch.inf))
    for _ in range(restarts):
        x_adv = random_start(x, eps, seed=draw_seed(x.device, generator), bounds=box)
        for _ in range(steps):
            grad = input_gradient(model, x_adv, target, loss_fn)
            x_adv = (x_adv + step * grad.sign()).clamp(lowest, highest)
        if restarts == 1:
            return x_adv
        with torch.no_grad():
            loss = sample_losses(model(x_adv), target, loss_fn, x.shape[0]).to(best_loss.dtype)
        # A NaN loss is a success of the attack, and no comparison would say so.
        better = (loss > best_loss) | loss.isnan()
        best = torch.where(better.view(-1, *[1] * (x.dim() - 1)), x_adv, best)
        best_loss = torch.where(better, loss, best_loss)
    return best


def input_gradient(
    model: Model, x: Tensor, target: Tensor, loss_fn: LossFn | None = None, label_smoothing: float = 0.0
) -> Tensor:
    """Gradient of the summed per-sample losses with respect to x, and to nothing else.

    Summed, not averaged, so that in float16 the gradient does not underflow as the batch grows.
    """
    return losses_and_gradient(model, x, target, loss_fn, label_smoothing, create_graph=False)[1]


def losses_and_gradient(
    model: Model,
    x: Tensor,
    target: Tensor,
    loss_fn: LossFn | None = None,
    label_smoothing: float = 0.0,
    *,
    create_graph: bool = True,
) -> tuple[Tensor, Tensor]:
    """Per-sample losses ``[B]`` and the gradient of their sum with respect to x, shaped as x, both with a graph.

    For a training step that shares them: the attack takes the gradient's sign, a regulariser the rest.

    Raises:
        RuntimeError: if the model's output does not depend on x.
    """
    with torch.enable_grad():
        point = x.detach().requires_grad_()
        losses = sample_losses(model(point), target, loss_fn, x.shape[0], label_smoothing)
        if not losses.requires_grad:
            raise RuntimeError("model: expected an output that depends differentiably on x, got one without a graph")
        (grad,) = torch.autograd.grad(losses.sum(), point, create_graph=create_graph)
    return losses, grad


def sample_losses(output: Any, target: Any, loss_fn: LossFn | None, rows: int, label_smoothing: float = 0.0) -> Tensor:
    """Per-sample losses ``[rows]``, float32 or float64, of the model's output: ``loss_fn``'s, or the cross-entropy."""
    if loss_fn is None:
        logits = checks.logits(output, rows, MODEL_OUTPUT)
        checks.classes(target, logits)
        return row_losses(logits, target, label_smoothing)
    losses = loss_fn(output, target)
    floating = isinstance(losses, Tensor) and losses.is_floating_point()
    if not floating or losses.shape != (rows,):
        expected = f"loss_fn: expected a floating-point tensor of per-sample losses [{rows}] (reduction='none')"
        raise checks.refusal(expected, losses, floating)
    return widen(losses)


def check_batch(x: Tensor, target: Any, loss_fn: LossFn | None = None, x_adv: Tensor | None = None) -> None:
    """Check a batch before the model sees it."""
    checks.inputs("x", x)
    if x_adv is not None:
        checks.like("x_adv", x_adv, x)
    if loss_fn is not None and not callable(loss_fn):
        raise TypeError(f"loss_fn: expected None or a callable, got {checks.describe(loss_fn)}")
    if loss_fn is None:
        checks.target(target, x.shape[0], x.device)


def zero_below_quantile(grad: Tensor, quantile: float) -> Tensor:
    """Set the entries below each sample's quantile of absolute values to 0.

    The quantile is torch.quantile's, which interpolates: the entries below it are the ``ceil(quantile (d - 1))``
    smallest. That function takes at most 16 million numbers.
    """
    dropped = math.ceil(quantile * (grad[0].numel() - 1))
    if dropped == 0:  # as in the attacks without a quantile
        return grad
    size = grad.abs().reshape(grad.shape[0], -1)
    threshold = size.kthvalue(dropped + 1, dim=1, keepdim=True).values
    return torch.where((size < threshold).view(grad.shape), torch.zeros_like(grad), grad)
