"""What the training methods share: the form of a criterion, and of its row in the table."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import Any, ClassVar

import torch
from torch import Tensor

from elle_fast import attacks
from elle_fast._core import checks, compiled, ddp
from elle_fast._core.unwrapping import Model, output_at, unwrapped
from elle_fast.adaptive import AdaptiveLambda
from elle_fast.criterion import Record, TrainingLoss, WeightedLoss
from elle_fast.ops.elle_loss.reference import row_losses
from elle_fast.passes import NO_KWARGS, ModelKwargs
from elle_fast.weighted_sum import weighted_sum

Bounds = tuple[float, float] | str | None

# Of criteria without a regulariser: what is set there would have no effect.
WITHOUT_WEIGHT = {"lam": "its loss has no weight"}
# Why a method refuses mixed labels.
TAKES_CLASSES = "takes class indices, no probabilities"
# Why E_lin is not added to a method of several attack steps.
NOT_SINGLE_STEP = "E_lin is against the overfitting to single-step attacks"


@dataclass(frozen=True)
class Method:
    """A row of the table of methods.

    Attributes:
        about: what it is, in a few words.
        source: arXiv number, or where it was published.
        passes: of one optimiser step over B samples: F forward passes, G gradients with respect to inputs, B backward
            passes to the weights; "D" if one of them is through the graph of a gradient (double backpropagation).
        units: the same, 1 for a forward pass, a data gradient or a weight gradient over B samples.
        make: builds the criterion from the keywords ``eps``, ``bounds``, those of ``takes``, and the chosen levers.
        takes: which of ``lam``, ``steps``, ``epoch_steps``, ``layers``, ``samples`` and ``classes`` it is built from;
            see :func:`elle_fast.methods.build`.
        clamp: of :data:`~elle_fast.weighing.CLAMPS`: which of its points stay in the image range by definition. FGSM
            and Algorithm 1 of the ELLE paper do not clamp, nor does the authors' code for CIFAR.
        levers: the options of :class:`~elle_fast.ELLELoss` that it takes; none for a method without E_lin.
        replays: optimiser steps that are taken on each batch in a row.
        refuses: what cannot be added to it (``"elle"``, which is for ELLE-A too, ``"advlc"``, ``"awp"``), or which of
            the levers it does not take once E_lin is, and why; ``"compile"``, if its model cannot be a compiled one;
            ``"soft_targets"``, if targets cannot be probabilities.
        with_elle: builds it with E_lin in one packed forward pass, from the options of :class:`~elle_fast.ELLELoss`;
            ``None``: E_lin gets a forward pass of its own.
    """

    about: str
    source: str
    passes: str
    units: float
    make: Callable[..., Any]
    takes: tuple[str, ...] = ()
    clamp: str = "all"
    levers: tuple[str, ...] = ()
    replays: int = 1
    refuses: Mapping[str, str] = field(default_factory=dict)
    with_elle: Callable[..., Any] | None = None


class Criterion(TrainingLoss):
    """Base class: ``criterion(model, x, target) -> loss``. Methods implement :meth:`_step`.

    Under DistributedDataParallel, the first forward pass with a graph goes through the wrapper, which then reduces the
    gradients of all passes. The others call the inner module; see :func:`elle_fast._core.unwrapping.unwrapped`.

    Args:
        eps: radius of the linf ball, in units of x, ``>= 0``.
        bounds: range of x, to which every point is clamped. ``"any"`` clamps nothing, as does ``None``, with a warning
            once for pictures outside of [0, 1].

    Attributes:
        label_smoothing: of the cross-entropy that is trained on, in ``[0, 1]``, 0 at first; may be set.
    """

    _samples: Any = None  # inside a step
    _changeable = {"label_smoothing": partial(checks.real, low=0, high=1)}  # noqa: RUF012

    def __init__(self, eps: float, bounds: Bounds = None) -> None:
        super().__init__()
        self.eps = eps
        self.label_smoothing = 0.0
        self.bounds = checks.bounds(bounds)
        self._told = bounds is not None  # what x is

    @property
    def eps(self) -> float:
        """The radius, which may be set, as in a warm-up."""
        return self._eps

    @eps.setter
    def eps(self, value: float) -> None:
        self._eps = checks.real("eps", value, low=0)
        for part in self.children():
            if hasattr(part, "eps"):
                setattr(part, "eps", self._eps)  # noqa: B010  # mypy takes it for a tensor

    def forward(
        self,
        model: Model,
        x: Tensor,
        target: Tensor,
        *,
        samples: Any = None,
        model_kwargs: Mapping[str, Any] | None = None,
    ) -> Tensor:
        """The training loss of one batch, 0-dim, differentiable with respect to the model's parameters.

        Args:
            model: maps ``[B, ...]`` to logits ``[B, C]``. Called in its own mode.
            x: clean inputs, floating ``[B, ...]``, ``B >= 1``, not requiring grad.
            target: int64 ``[B]`` in ``[0, C)``, or probabilities ``[B, C]``.
            samples: which training samples these are, for a method that keeps something for each (``per_sample``);
                other methods do not look at it.
            model_kwargs: further arguments of the model, as those of :meth:`elle_fast.ELLELoss.forward`.

        Raises:
            TypeError, ValueError: naming the argument, what was expected and what was got.
        """
        self.check(x, target)
        kwargs, inner, outer = ModelKwargs.of(model_kwargs, x.shape[0]), unwrapped(model), model
        if kwargs is not NO_KWARGS:
            inner, outer = kwargs.given_to(inner), kwargs.given_to(unwrapped(model, ddp=True))
        self._samples = samples if self.per_sample else None
        try:
            return ddp.with_all_passes(model, self._step(outer, inner, x, target))
        finally:
            self._samples = None

    def check(self, x: Tensor, target: Any) -> None:
        """Check a batch before the model sees it, as each call does."""
        attacks.check_batch(x, target, bounds=self.bounds, told=self._told)

    def prepare(self, model: Model, x: Tensor) -> None:
        """Change the state as the next step does before its attack, and as if for the first time if called again.

        Steps do so themselves. AWP does so before its frozen call, which precedes the step and has to see what it sees.
        The batch need not be a valid one. What is drawn here is the first that the step draws.
        """

    def _step(self, model: Model, inner: Model, x: Tensor, target: Tensor) -> Tensor:
        """The loss of a checked batch; ``inner`` is the module inside DistributedDataParallel."""
        raise NotImplementedError

    def _logits(self, output: Any, target: Tensor) -> Tensor:
        """The model's output, checked, from a method's first forward pass."""
        logits = checks.logits(output, target.shape[0], attacks.MODEL_OUTPUT)
        checks.classes(target, logits)
        return logits

    def _ce(self, output: Any, target: Tensor) -> Tensor:
        """The mean cross-entropy that is trained on, with ``label_smoothing``; that of an attack has none."""
        return cross_entropy(output, target, self.label_smoothing)

    def _record(self, loss: Tensor, output: Tensor, **parts: Tensor) -> Tensor:
        """The loss with what is added to it. ``output``: the logits at the points trained on, with their graph."""
        loss = self.with_terms(loss, output)
        # A copy of the loss: `loss /= n` for gradient accumulation is common and would change what is reported.
        stats = {"loss": loss.detach().clone(), **{name: value.detach() for name, value in parts.items()}}
        self.last = Record(stats, output.detach())
        return loss

    def _within(self, point: Tensor) -> Tensor:
        return point if self.bounds is None else point.clamp(*self.bounds)

    def _ascended(self, point: Tensor, grad: Tensor) -> Tensor:
        """One step of eps along the gradient's sign, within ``bounds``."""
        return self._within(point + self.eps * grad.detach().sign())

    def _climbed(
        self, model: Model, point: Tensor, x: Tensor, target: Tensor, *, steps: int, step_size: float
    ) -> Tensor:
        """The point after steps along the sign of the cross-entropy's gradient, each projected to x's ball."""
        for _ in range(steps):
            grad = attacks.input_gradient(model, point, target)
            point = self._projected(point + step_size * grad.sign(), x)
        return point

    def _projected(self, point: Tensor, x: Tensor) -> Tensor:
        """The nearest point of the linf ball around x that is within ``bounds``."""
        return self._within(point.clamp(x - self.eps, x + self.eps))


class OfBase(TrainingLoss):
    """What a criterion with another one inside, ``base``, has from that one, which makes the attack."""

    base: TrainingLoss

    @property
    def core(self) -> TrainingLoss:
        """The base's."""
        return self.base.core

    @property
    def per_sample(self) -> bool:  # type: ignore[override]
        """Whether the base needs ``samples``."""
        return self.base.per_sample

    @property
    def label_smoothing(self) -> float:
        """The base's, which may be set."""
        return float(self.core.label_smoothing)

    @label_smoothing.setter
    def label_smoothing(self, value: float) -> None:
        self.core.label_smoothing = value


class Around(OfBase):
    """Base class of criteria around another one, which has all their state but what they add."""

    _fixed: ClassVar[Collection[str]] = ("base",)
    _elsewhere = dict.fromkeys(("controller", "skip_below", "max_ratio"), "set that of the base")

    def __init__(self, base: TrainingLoss) -> None:
        super().__init__()
        if not isinstance(base, TrainingLoss):
            raise TypeError(f"base: expected a criterion, got {checks.describe(base)}")
        self.base = base

    @property
    def eps(self) -> float:
        """The base's radius, which may be set."""
        return float(self.base.eps)

    @eps.setter
    def eps(self, value: float) -> None:
        self.base.eps = value

    @property
    def output(self) -> Tensor | None:
        """The base's logits at the points trained on."""
        return self.base.output

    def check(self, x: Tensor, target: Any) -> None:
        """As the base does."""
        self.base.check(x, target)


def _summed(output: Any, target: Tensor) -> Tensor:
    return attacks.sample_losses(output, target, None, target.shape[0]).sum()


def cross_entropy(output: Any, target: Tensor, label_smoothing: float = 0.0) -> Tensor:
    """The mean cross-entropy of a model's output, which a method's first look at it checks."""
    logits = checks.logits(output, target.shape[0], attacks.MODEL_OUTPUT)
    checks.classes(target, logits)
    return row_losses(logits, target, label_smoothing, "mean")


def logits_and_gradient(
    model: Model, start: Tensor, target: Tensor, loss_of: Callable[[Any, Tensor], Tensor] = _summed
) -> tuple[Tensor, Tensor]:
    """The logits at ``start``, with their graph, and the gradient of the summed loss there, without one.

    This is the pass of the step that goes through DistributedDataParallel.
    """
    with torch.enable_grad():
        point = attacks.leaf(start)
        logits = output_at(unwrapped(model, ddp=True), point)
        grad = compiled.kept_gradient(attacks.differentiable(loss_of(logits, target)), point)
    return logits, grad


class Penalized(WeightedLoss, Criterion):
    """Base class of methods whose loss is ``ce + lam * penalty``; both parts are in ``stats``.

    Args:
        lam: weight of the penalty, ``>= 0``.
        adaptive: the weight follows ELLE-A's rule, with the penalty in place of E_lin and ``lam`` as lam_max.
    """

    _fixed: ClassVar[Collection[str]] = ("controller",)
    _elsewhere = {"adaptive": "build another one"}  # noqa: RUF012

    def __init__(self, eps: float, lam: float, bounds: Bounds = None, *, adaptive: bool = False) -> None:
        super().__init__(eps, bounds)
        self.controller = AdaptiveLambda(lam) if adaptive else None
        if not adaptive:
            self.lam = lam

    def _sum(self, model: Model, ce: Tensor, penalty: Tensor, output: Tensor) -> Tensor:
        controller = self.controller
        if controller is None:
            return self._record(ce + self.lam * penalty, output, ce=ce, penalty=penalty)
        loss = weighted_sum(ce, penalty, controller if self.updates(model) else controller.lam.to(ce.device, copy=True))
        stats = {"lam": controller.lam.clone(), "skipped": controller.skipped.clone()}
        return self._record(loss, output, ce=ce, penalty=penalty, **stats)
