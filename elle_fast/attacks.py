"""Attacks for training and evaluation. Each takes the input gradient only: no parameter's ``.grad`` is touched.

The model is called as it is: in train mode, batch norm sees the attack's points, as in the methods' public code. Inputs
are floating ``[B, ...]``; ``eps`` and ``step_size`` are in units of the inputs.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from elle_fast._core import checks
from elle_fast.functional import draw_seed, pack_points, random_start
from elle_fast.ops.elle_loss.reference import row_losses, widen

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
    """A single-step attack; ``start`` and ``step_size`` in units of eps."""

    start: float
    step_size: float
    project: bool
    quantile: float = 0.0


SINGLE_STEP = {
    "fgsm": SingleStep(start=0.0, step_size=1.0, project=False),
    "rs-fgsm": SingleStep(start=1.0, step_size=1.25, project=True),
    "n-fgsm": SingleStep(start=2.0, step_size=1.0, project=False),
    "zero-grad": SingleStep(start=1.0, step_size=2.0, project=True, quantile=0.35),
}


def fgsm(
    model: Callable[[Tensor], Any],
    x: Tensor,
    target: Tensor,
    eps: float,
    *,
    bounds: tuple[float, float] | None = None,
    loss_fn: LossFn | None = None,
) -> Tensor:
    """``x + eps sign(grad L(x))`` (Goodfellow et al. 2015; paper, Algorithm 1, line 5).

    Args:
        model: maps ``[B, ...]`` to logits ``[B, C]`` (to anything ``loss_fn`` takes, if given).
        x: floating ``[B, ...]``.
        target: int64 ``[B]`` or probabilities ``[B, C]`` (anything ``loss_fn`` takes, if given).
        eps: radius of the linf ball.
        bounds: ``(low, high)`` to which the result is clamped; ``None`` clamps nothing.
        loss_fn: ``(output, target) -> losses [B]``; ``None`` is cross-entropy.

    Returns:
        x_adv, of x's shape and dtype.

    Raises:
        TypeError, ValueError: naming the argument, what was expected and what was got.
    """
    return _single_step(SINGLE_STEP["fgsm"], model, x, target, eps, None, bounds, loss_fn, None)


def rs_fgsm(
    model: Callable[[Tensor], Any],
    x: Tensor,
    target: Tensor,
    eps: float,
    *,
    step_size: float | None = None,
    bounds: tuple[float, float] | None = None,
    loss_fn: LossFn | None = None,
    generator: torch.Generator | None = None,
) -> Tensor:
    """Fast AT's attack: a step of 1.25 eps from a uniform start in the eps ball, projected back (Wong et al. 2020).

    ``step_size`` overrides 1.25 eps; the rest as in :func:`fgsm`. The noise comes from ``generator``.
    """
    return _single_step(SINGLE_STEP["rs-fgsm"], model, x, target, eps, step_size, bounds, loss_fn, generator)


def n_fgsm(
    model: Callable[[Tensor], Any],
    x: Tensor,
    target: Tensor,
    eps: float,
    *,
    step_size: float | None = None,
    bounds: tuple[float, float] | None = None,
    loss_fn: LossFn | None = None,
    generator: torch.Generator | None = None,
) -> Tensor:
    """A step of eps from a uniform start in the 2 eps ball, not projected (N-FGSM, de Jorge et al. 2022).

    The result lies within ``2 eps + step_size`` of x. Arguments as in :func:`rs_fgsm`.
    """
    return _single_step(SINGLE_STEP["n-fgsm"], model, x, target, eps, step_size, bounds, loss_fn, generator)


def zero_grad(
    model: Callable[[Tensor], Any],
    x: Tensor,
    target: Tensor,
    eps: float,
    *,
    quantile: float = 0.35,
    step_size: float | None = None,
    bounds: tuple[float, float] | None = None,
    loss_fn: LossFn | None = None,
    generator: torch.Generator | None = None,
) -> Tensor:
    """RS-FGSM with a step of 2 eps without the gradient's smallest entries (ZeroGrad, Golgooni et al. 2023).

    Entries below the sample's ``quantile``, in ``[0, 1]``, of absolute values count as 0. Arguments as in
    :func:`rs_fgsm`.
    """
    checks.real("quantile", quantile, low=0, high=1)
    default = SINGLE_STEP["zero-grad"]
    step = SingleStep(default.start, default.step_size, default.project, quantile)
    return _single_step(step, model, x, target, eps, step_size, bounds, loss_fn, generator)


def pgd(
    model: Callable[[Tensor], Any],
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
        model, x, target, eps, bounds, loss_fn: as in :func:`fgsm`.
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
    model: Callable[[Tensor], Any],
    x: Tensor,
    target: Tensor,
    loss_fn: LossFn | None = None,
    label_smoothing: float = 0.0,
) -> Tensor:
    """Gradient of the summed per-sample losses with respect to x, and to nothing else.

    Summed, not averaged, so that in float16 the gradient does not underflow as the batch grows.
    """
    return losses_and_gradient(model, x, target, loss_fn, label_smoothing, create_graph=False)[1]


def losses_and_gradient(
    model: Callable[[Tensor], Any],
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
    expected = f"loss_fn: expected a floating-point tensor of per-sample losses [{rows}] (reduction='none')"
    if not isinstance(losses, Tensor) or not losses.is_floating_point():
        raise TypeError(f"{expected}, got {checks.describe(losses)}")
    if losses.shape != (rows,):
        raise ValueError(f"{expected}, got {checks.describe(losses)}")
    return widen(losses)


def check_batch(x: Tensor, target: Any, loss_fn: LossFn | None) -> None:
    """Check a batch before the model sees it."""
    checks.inputs("x", x)
    if loss_fn is not None and not callable(loss_fn):
        raise TypeError(f"loss_fn: expected None or a callable, got {checks.describe(loss_fn)}")
    if loss_fn is None:
        checks.target(target, x.shape[0], x.device)


def zero_below_quantile(grad: Tensor, quantile: float) -> Tensor:
    """Set the entries below each sample's quantile of absolute values to 0."""
    dropped = int(quantile * (grad.numel() // grad.shape[0]))
    if dropped == 0:  # as in the attacks without a quantile
        return grad
    size = grad.abs().reshape(grad.shape[0], -1)
    threshold = size.kthvalue(min(dropped + 1, size.shape[1]), dim=1, keepdim=True).values
    return torch.where((size < threshold).view(grad.shape), torch.zeros_like(grad), grad)


def _single_step(
    attack: SingleStep,
    model: Callable[[Tensor], Any],
    x: Tensor,
    target: Tensor,
    eps: float,
    step_size: float | None,
    bounds: tuple[float, float] | None,
    loss_fn: LossFn | None,
    generator: torch.Generator | None,
) -> Tensor:
    eps = checks.real("eps", eps, low=0)
    step_size = attack.step_size * eps if step_size is None else checks.real("step_size", step_size, low=0)
    check_batch(x, target, loss_fn)
    # Without a random start nothing is drawn, and torch's generator stays where it is.
    seed = draw_seed(x.device, generator) if attack.start else torch.zeros((), dtype=torch.int64, device=x.device)
    start = random_start(x, eps, seed=seed, start=attack.start, bounds=bounds)
    grad = zero_below_quantile(input_gradient(model, start, target, loss_fn), attack.quantile)
    x_adv, _ = pack_points(
        x,
        grad,
        eps,
        seed=seed,
        step_size=step_size,
        start=attack.start,
        project=attack.project,
        bounds=bounds,
        triplets=0,
    )
    return x_adv
