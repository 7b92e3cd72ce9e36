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
from torch.compiler import is_compiling

from elle_fast._core import checks, compiled
from elle_fast._core.unwrapping import Model, module_of, output_at, unwrapped
from elle_fast.functional import draw_seed, random_start
from elle_fast.ops import layout
from elle_fast.ops.elle_loss.reference import row_losses, widen
from elle_fast.ops.pack_points import op as pack_op
from elle_fast.ops.pack_points.reference import lengths, unit
from elle_fast.ops.pack_points.validation import Packing
from elle_fast.ranges import check_pixels, check_range

__all__ = [
    "SINGLE_STEP",
    "SingleStep",
    "fgsm",
    "input_gradient",
    "losses_and_gradient",
    "n_fgsm",
    "pgd",
    "rs_fgsm",
    "rs_fgsm_unprojected",
    "zero_grad",
]

LossFn = Callable[[Any, Tensor], Tensor]

# Steps and restarts of PGD: more have no use, and would seem to hang.
_MOST = 1_000_000

MODEL_OUTPUT = "model's output (ELLELoss picks it out of another type with logits=)"


@dataclass(frozen=True)
class SingleStep:
    r"""A single-step attack, called as ``attack(model, x, target, eps)``.

    .. math::
        x_{adv} = \Pi(x_0 + step \cdot sign(\nabla L(x_0))), \qquad x_0 = x + start \cdot U[-eps, eps]^d

    That is in the linf ball. In l2 the step is along the gradient over its 2-norm, and the start uniform in that ball.

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
        norm: str = "linf",
        step_size: float | None = None,
        quantile: float | None = None,
        bounds: tuple[float, float] | str | None = None,
        loss_fn: LossFn | None = None,
        generator: torch.Generator | None = None,
    ) -> Tensor:
        """The attack's points.

        Args:
            model: maps ``[B, ...]`` to logits ``[B, C]`` (to anything ``loss_fn`` takes, if given).
            x: floating ``[B, ...]``.
            target: int64 ``[B]`` or probabilities ``[B, C]`` (anything ``loss_fn`` takes, if given).
            eps: radius of the ball.
            norm: ``"linf"`` or ``"l2"``.
            step_size: in units of x; ``None`` is the attack's own.
            quantile: in ``[0, 1]``; ``None`` is the attack's own.
            bounds: ``(low, high)``, in which x is, and to which start and result are clamped. ``"any"`` clamps nothing,
                as does ``None``, with a warning once for pictures outside of [0, 1]. See
                :func:`elle_fast.ranges.check_range` for an x outside of it.
            loss_fn: ``(output, target) -> losses [B]``; ``None`` is cross-entropy.
            generator: source of the start, on x's device; ``None`` is torch's default one.

        Returns:
            x_adv, of x's shape and dtype.

        Raises:
            TypeError, ValueError: naming the argument, what was expected and what was got.
        """
        model = unwrapped(model)
        packing = self.options(Packing.checked(eps, norm=norm, bounds=bounds, triplets=0), step_size)
        attack = self if quantile is None else replace(self, quantile=checks.real("quantile", quantile, low=0, high=1))
        check_batch(x, target, loss_fn, bounds=packing.bounds, told=bounds is not None)
        checks.generator(generator)
        # Without a random start nothing is drawn, and torch's generator stays where it is.
        seed = draw_seed(x.device, generator) if self.start else torch.zeros((), dtype=torch.int64, device=x.device)
        grad = attack.gradient(lambda start: input_gradient(model, start, target, loss_fn), x, packing, seed)
        return pack_op.pack_points(x, grad, packing, seed=seed)[0]

    def options(self, packing: Packing, step_size: float | None) -> Packing:
        """``packing`` with this attack's step, or with one of ``step_size``."""
        step = checks.real("step_size", self.step_size * packing.eps if step_size is None else step_size, low=0)
        return packing.starting(self.start)._replace(step_size=step, project=self.project)

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
# As FastAT Benchmark's code attacks for ELLE: its result is within 2.25 eps of x.
rs_fgsm_unprojected = SingleStep(start=1.0, step_size=1.25, project=False)
# N-FGSM (de Jorge et al. 2022), whose result is within 3 eps of x.
n_fgsm = SingleStep(start=2.0, step_size=1.0, project=False)
# ZeroGrad (Golgooni et al. 2023).
zero_grad = SingleStep(start=1.0, step_size=2.0, project=True, quantile=0.35)

SINGLE_STEP = {"fgsm": fgsm, "rs-fgsm": rs_fgsm, "rs-fgsm-unprojected": rs_fgsm_unprojected}
SINGLE_STEP |= {"n-fgsm": n_fgsm, "zero-grad": zero_grad}


def pgd(
    model: Model,
    x: Tensor,
    target: Tensor,
    eps: float,
    *,
    norm: str = "linf",
    step_size: float | None = None,
    steps: int = 10,
    restarts: int = 1,
    bounds: tuple[float, float] | str | None = (0.0, 1.0),
    loss_fn: LossFn | None = None,
    generator: torch.Generator | None = None,
) -> Tensor:
    """Projected gradient ascent from uniform random starts (Madry et al. 2018).

    A step is along the gradient's sign, in l2 along the gradient over its 2-norm.

    Args:
        model, x, target, eps, norm, bounds, loss_fn: as in :meth:`SingleStep.__call__`.
        step_size: ``None`` is eps / 4.
        steps: ascent steps, from 1 to a million.
        restarts: random starts, as many; of several, each sample keeps the one with the highest loss.
        generator: source of the starts, on x's device; ``None`` is torch's default one.

    Returns:
        x_adv, of x's shape and dtype, within eps of x and within ``bounds``.

    Raises:
        TypeError, ValueError: naming the argument, what was expected and what was got.
    """
    model = unwrapped(model)
    eps, in_l2 = checks.real("eps", eps, low=0), checks.choice("norm", norm, layout.NORMS) == "l2"
    step = eps / 4 if step_size is None else checks.real("step_size", step_size, low=0)
    steps = checks.integer("steps", steps, low=1, high=_MOST)
    restarts = checks.integer("restarts", restarts, low=1, high=_MOST)
    box = checks.bounds(bounds)
    check_batch(x, target, loss_fn, bounds=box)
    lowest, highest = x - eps, x + eps
    if box is not None:
        lowest, highest = lowest.clamp(*box), highest.clamp(*box)

    def projected(point: Tensor) -> Tensor:
        if in_l2:
            offset = point - x
            length = lengths(offset)
            point = torch.where(length > eps, x + offset * (eps / length), point)
        return point.clamp(lowest, highest)  # the box around the l2 ball changes nothing inside

    best, best_loss = x, widen(x.new_full((x.shape[0],), -torch.inf))
    for _ in range(restarts):
        x_adv = random_start(x, eps, norm=norm, seed=draw_seed(x.device, generator), bounds=box)
        for _ in range(steps):
            grad = input_gradient(model, x_adv, target, loss_fn)
            x_adv = projected(x_adv + step * (unit(grad) if in_l2 else grad.sign()))
        if restarts == 1:
            return x_adv
        with torch.no_grad():
            loss = sample_losses(output_at(model, x_adv), target, loss_fn, x.shape[0]).to(best_loss.dtype)
        # A NaN loss is a success of the attack, and no comparison would say so.
        better = (loss > best_loss) | loss.isnan()
        best = torch.where(better.view(-1, *[1] * (x.dim() - 1)), x_adv, best)
        best_loss = torch.where(better, loss, best_loss)
    return best


def input_gradient(
    model: Model,
    x: Tensor,
    target: Tensor,
    loss_fn: LossFn | None = None,
    label_smoothing: float = 0.0,
    *,
    logits: Callable[[Any], Any] | None = None,
) -> Tensor:
    """Gradient of the summed per-sample losses with respect to x, and to nothing else.

    Summed, not averaged, so that in float16 the gradient does not underflow as the batch grows. ``logits`` picks what
    the loss takes out of the model's output.
    """
    options: dict[str, Any] = {"logits": logits, "create_graph": False}
    inner = unwrapped(model)
    with compiled.without_weights(module_of(inner)):
        return losses_and_gradient(inner, x, target, loss_fn, label_smoothing, **options)[1]


def losses_and_gradient(
    model: Model,
    x: Tensor,
    target: Tensor,
    loss_fn: LossFn | None = None,
    label_smoothing: float = 0.0,
    *,
    logits: Callable[[Any], Any] | None = None,
    create_graph: bool = True,
) -> tuple[Tensor, Tensor]:
    """Per-sample losses ``[B]`` and the gradient of their sum with respect to x, shaped as x, both with a graph.

    For a training step that shares them: the attack takes the gradient's sign, a regulariser the rest.

    Raises:
        TypeError, ValueError: naming the argument, what was expected and what was got.
        RuntimeError: if the model's output does not depend on x.
    """
    model = unwrapped(model, ddp=True)
    check_batch(x.detach() if isinstance(x, Tensor) else x, target, loss_fn)
    checks.function("logits", logits)
    checks.flag("create_graph", create_graph)
    label_smoothing = checks.real("label_smoothing", label_smoothing, low=0, high=1)
    with torch.enable_grad():
        point = leaf(x)
        output = output_at(model, point)
        output = output if logits is None else logits(output)
        losses = sample_losses(output, target, loss_fn, x.shape[0], label_smoothing)
        (grad,) = torch.autograd.grad(differentiable(losses.sum()), point, create_graph=create_graph)
    return losses, grad


def differentiable(loss: Tensor) -> Tensor:
    """A loss with a graph.

    Raises:
        RuntimeError: naming the model, if there is none.
    """
    if not loss.requires_grad:
        raise RuntimeError("model: expected an output that depends differentiably on x, got one without a graph")
    return loss


def leaf(x: Tensor) -> Tensor:
    """x as a point to take a gradient at, by which the model has to be called with :func:`output_at`.

    Raises:
        RuntimeError: inside ``torch.inference_mode``, naming it.
    """
    check_gradients_can_be_taken()
    if is_compiling() and _gradients_are_traced():
        # In one graph nothing may depend on requires_grad_(). A product with 1 keeps every bit.
        return x.detach() * x.new_ones((), requires_grad=True)
    return (x.clone() if not is_compiling() and x.is_inference() else x.detach()).requires_grad_()


def check_gradients_can_be_taken() -> None:
    """Raise a RuntimeError inside ``torch.inference_mode``, naming it."""
    if not is_compiling() and torch.is_inference_mode_enabled():
        raise RuntimeError(
            "torch.inference_mode: expected to be outside of it, as an attack takes a gradient, got a call inside; "
            "torch.no_grad does no harm"
        )


def _gradients_are_traced() -> bool:
    """Whether torch.compile is to follow torch.autograd.grad, which older releases cannot."""
    return bool(getattr(torch._dynamo.config, "trace_autograd_ops", False))


_gradients_are_traced._dynamo_marked_constant = True  # type: ignore[attr-defined]


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


def check_batch(
    x: Tensor,
    target: Any,
    loss_fn: LossFn | None = None,
    x_adv: Tensor | None = None,
    bounds: tuple[float, float] | None = None,
    told: bool = True,
) -> None:
    """Check a batch before the model sees it. ``told``: whether a user has said what x is; else it should be pixels."""
    checks.inputs("x", x)
    if x_adv is not None:
        checks.like("x_adv", x_adv, x)
    checks.function("loss_fn", loss_fn)
    if loss_fn is None:
        checks.target(target, x.shape[0], x.device)
    check_range(x, bounds)
    if not told:
        check_pixels(x)


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
