"""AWP: the loss of any method at weights that are perturbed against it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.func import functional_call

from elle_fast._core import checks, ddp, rng_states
from elle_fast._core.unwrapping import Model, unwrapped
from elle_fast.attacks import MODEL_OUTPUT, differentiable
from elle_fast.criterion import TrainingLoss, in_train_mode
from elle_fast.methods.base import Around, Criterion
from elle_fast.methods.counting import CountsSteps, ahead
from elle_fast.methods.free import FreeAT
from elle_fast.methods.slat import SLAT
from elle_fast.methods.uap import FUAP
from elle_fast.ops.elle_loss.reference import widen

_TINY = 1e-20  # in the denominator, as in the authors' code
_NOT_AROUND = {
    SLAT: "which reads hidden layers",
    FUAP: "which reads the model's features",
    FreeAT: "whose attack is the backward pass of its loss",
}


class AWP(Around, CountsSteps):
    r"""Adversarial weight perturbation around another criterion (Wu et al. 2020, arXiv 2004.05884, section 3.2).

    With L(w) the base's loss of this batch as a function of the weights, the points of its attack held fixed,

    .. math::
        L(w + v), \qquad v_k = gamma \, \|w_k\|_2 \, \nabla_k L(w) / \|\nabla_k L(w)\|_2

    for each parameter k of two or more dimensions with "weight" in its name; v is 0 for the others, so for batch norm
    and biases. The gradient is that of L at w + v. The attack is made once, at w; a step costs the base's and once more
    its passes with a backward pass.

    As in the authors' code, whose second network finds v: batch norm's running statistics are changed by the passes at
    w + v and those of the attack, and v is that of the whole batch (under DistributedDataParallel the ranks sum their
    gradients). Departure: there the weights are moved to w + v, the optimiser takes its step from there, and v is taken
    off again, so that weight decay acts on w + v. Here the weights stay where they are, and it acts on w.

    Passes without a graph are at w (FUAP's choice of a pattern, the triplets of ELLE-A's light steps). At w + v as a
    whole are passes whose gradient in the input is part of the loss (GradAlign, CURE, LLR, Fast-BAT), what follows
    from it, and points that the loss moves (PCO's mixture, whose pass changes the running statistics at w). Dropout
    draws the same masks at w and at w + v. Where the weight follows the penalty, as ELLE-A's lam, v is found with the
    weight before the step, and the loss at w + v has the one that the step sets.

    In the warm-up, without gradients, and in the criterion's eval mode the loss is L(w). ``stats``, ``output`` and all
    state but the count of warm-up steps are the base's.

    Args:
        base: a criterion. Not SLAT, FUAP or Free AT, whose attacks cannot be held fixed.
        gamma: size of v relative to w, ``>= 0``. The authors' is 0.01, and 0.005 for TRADES.
        warmup: training steps before v is added, ``>= 0``. The authors' is 0, and 9 epochs for TRADES.

    Raises:
        TypeError, ValueError: naming the argument, what was expected and what was got.
    """

    _changeable = {"gamma": partial(checks.real, low=0)}  # noqa: RUF012
    _uncapturable = "draws its attack's random numbers twice"

    def __init__(self, base: TrainingLoss, gamma: float = 0.01, warmup: int = 0) -> None:
        super().__init__(base)
        for kind, why in _NOT_AROUND.items():
            if any(isinstance(module, kind) for module in base.modules()):
                raise ValueError(f"base: expected an attack that AWP can hold fixed, got {kind.__name__}, {why}")
        self.gamma = gamma
        self.warmup = checks.integer("warmup", warmup, low=0)

    @property
    def stats(self) -> dict[str, Tensor]:
        """The base's, of the loss at w + v."""
        return self.base.stats

    def forward(self, model: Model, x: Tensor, target: Tensor, **options: Any) -> Tensor:
        """The training loss of one batch; arguments and errors are those of the base.

        Raises:
            TypeError: for a model that is no module.
            ValueError: for one without parameters to perturb, or with sharded ones.
        """
        loss_of = partial(self.base, x=x, target=target, **options)
        if not self._perturbs(model, x):
            loss: Tensor = loss_of(model)
            return loss
        if not isinstance(model, nn.Module) or isinstance(model, nn.DataParallel):
            expected = "a torch.nn.Module for AWP, and no DataParallel, whose weights cannot be replaced"
            raise TypeError(f"model: expected {expected}, got {checks.describe(model)}")
        ddp.refuse_join(model, "AWP, which adds up gradients")
        weights, wrapper = _weights(model), ddp.wrapper_of(model)
        record = _Recorded(model)
        unsynced = nullcontext() if wrapper is None else wrapper.no_sync()
        with _drawn_again(x.device, self.base), unsynced:
            for each in self.base.modules():
                if isinstance(each, Criterion):
                    each.prepare(model, x)
            with ahead(self.base):
                # Summed, not averaged, for float16. v does not depend on the scale.
                gradients = record.gradients(x.shape[0] * loss_of(record), weights)
        if wrapper is not None:
            for gradient in gradients:
                dist.all_reduce(gradient, group=wrapper.process_group)
        moved = {
            weight: weight + self._v(weight, gradient) for weight, gradient in zip(weights, gradients, strict=True)
        }
        loss = loss_of(_Perturbed(model, moved, record.passes))
        return loss

    def _v(self, weight: Tensor, gradient: Tensor) -> Tensor:
        # The factor is too large for float16 where the gradient is 0.
        v: Tensor = self.gamma * _norm(weight) / (_norm(gradient) + _TINY) * widen(gradient)
        return v.to(weight.dtype)

    def _perturbs(self, model: Model, x: Tensor) -> bool:
        """Whether this call has a v. A call in training is a step of the warm-up."""
        # One more than the warm-up is counted, as calls of the first step after it may be frozen.
        warm = self.warmup == 0 or self._done > self.warmup or self._count(model, x) >= self.warmup
        return warm and self.gamma > 0 and self.training and torch.is_grad_enabled()

    def extra_repr(self) -> str:
        """The options, as ``repr`` shows them."""
        return f"gamma={self.gamma:g}, warmup={self.warmup}"


def _weights(model: nn.Module) -> list[Tensor]:
    """What is perturbed."""
    named = [each for name, each in model.named_parameters() if "weight" in name and each.requires_grad]
    weights: list[Tensor] = [weight for weight in named if weight.dim() > 1]
    sharded = any(hasattr(weight, "device_mesh") for weight in weights)
    if sharded or not weights:
        got = "sharded ones (FSDP)" if sharded else f"none in a {type(model).__name__}"
        raise ValueError(
            "model: expected whole parameters of two or more dimensions, with 'weight' in their names, for AWP to "
            f"perturb, got {got}"
        )
    return weights


def _norm(tensor: Tensor) -> Tensor:
    norm: Tensor = torch.linalg.vector_norm(widen(tensor.detach()))
    return norm


@contextmanager
def _drawn_again(device: torch.device, base: nn.Module) -> Iterator[None]:
    """What is drawn inside will be drawn again afterwards."""
    held: list[Any] = [getattr(each, "generator", None) for each in base.modules()]
    generators = [each for each in held if each is not None]
    own, states = [generator.get_state() for generator in generators], rng_states.read(device)
    try:
        yield
    finally:
        rng_states.write(device, states)
        for generator, state in zip(generators, own, strict=True):
            generator.set_state(state)


class _Pass:
    """A forward pass at w.

    Attributes:
        output: what the model gave.
        shape: of the points.
        attacked: whether a gradient in the points may have been asked for.
        gradient: the one without a graph, if it was.
        whole: whether one with a graph was, so that the pass cannot be divided into attack and loss.
        played_back: whether the gradient is all that the pass was for.
        drawn: the generators' states after it, so that what follows draws the same when it is played back.
    """

    def __init__(self, points: Tensor) -> None:
        self.shape, self.attacked = points.shape, points.requires_grad and torch.is_grad_enabled()
        self.output: Tensor | None = None
        self.gradient: Tensor | None = None
        self.whole, self.played_back = False, False
        self.drawn: list[Tensor] = []

    def take(self, gradient: Tensor) -> None:
        """Called with a gradient in the points."""
        self.whole |= gradient.requires_grad
        self.gradient = gradient.detach().clone()


class _Standing(nn.Module):
    """Stands for a model, with its parameters and its mode. DistributedDataParallel is found by the name ``module``."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.module = model
        self.training = in_train_mode(model)
        self.passes: list[_Pass] = []


class _Recorded(_Standing):
    """The model at w. Passes without a gradient in their points are the loss', and change copies of the buffers."""

    over = False

    def forward(self, points: Tensor, /, *args: Any, **kwargs: Any) -> Any:
        """The model's output."""
        inner: Any = unwrapped(self.module)
        seen = _Pass(points)
        if seen.attacked:
            points = points.view_as(points)
            points.register_hook(partial(self._take, seen))
        output = functional_call(inner, {} if seen.attacked else _copies(inner), (points, *args), kwargs)
        if not self.over:  # else the backward pass repeats a pass of forward="checkpoint"
            seen.output = checks.logits(output, points.shape[0], MODEL_OUTPUT)
            seen.drawn = rng_states.read(points.device)
            self.passes.append(seen)
        return output

    def _take(self, seen: _Pass, gradient: Tensor) -> None:
        if not self.over:  # else it is on its way to the weights, as through PCO's mixture
            seen.take(gradient)

    def gradients(self, loss: Tensor, weights: Sequence[Tensor]) -> list[Tensor]:
        """The loss' gradients; 0 for a weight that has no part in it."""
        self.over = True
        differentiated = [seen for seen in self.passes if seen.gradient is not None and not seen.whole]
        outputs = [seen.output for seen in differentiated if seen.output is not None]
        # As a step's own backward pass: outside of the autocast, which would round what has a precision of its own.
        with torch.autocast(loss.device.type, enabled=False):
            found = torch.autograd.grad(differentiable(loss), [*weights, *outputs], allow_unused=True)
        for seen, gradient in zip(differentiated, found[len(weights) :], strict=True):
            seen.played_back = gradient is None
        for seen in self.passes:
            seen.output = seen.output.detach() if seen.played_back and seen.output is not None else None
        pairs = zip(weights, found, strict=False)
        return [torch.zeros_like(weight) if gradient is None else gradient for weight, gradient in pairs]


class _Perturbed(_Standing):
    """The model at w + v where there is a graph; gradients in the points are those at w, and not taken again.

    The first pass with a graph goes through DistributedDataParallel.
    """

    def __init__(self, model: nn.Module, moved: Mapping[Tensor, Tensor], passes: Sequence[_Pass]) -> None:
        super().__init__(model)
        self.moved, self.left = moved, iter(passes)
        self.through: Any = unwrapped(model, ddp=True)

    def forward(self, points: Tensor, /, *args: Any, **kwargs: Any) -> Any:
        """The model's output."""
        now = _Pass(points)
        seen = next(self.left, now)  # after the last one it is the backward pass that repeats one
        if (seen.shape, seen.attacked) != (now.shape, now.attacked):
            seen = now  # dropout was met for the first time, and each pass of ELLE taken again
        if seen.played_back:
            rng_states.write(points.device, seen.drawn)
            return _played(points, seen.output, seen.gradient)
        called: Any = unwrapped(self.module)
        if not torch.is_grad_enabled():
            return called(points, *args, **kwargs)
        if self.through is not None:
            called, self.through = self.through, None
        tensors = {name: self.moved[each] for name, each in called.named_parameters() if each in self.moved}
        if seen.attacked:
            tensors |= _copies(called)  # the first time it changed the buffers themselves
        shared = seen.gradient is not None and not seen.whole
        output = functional_call(called, tensors, (points.detach() if shared else points, *args), kwargs)
        return _played(points, output, seen.gradient) if shared else output


def _copies(module: nn.Module) -> dict[str, Tensor]:
    return {name: buffer.clone() for name, buffer in module.named_buffers()}


class _Played(torch.autograd.Function):
    """The output as it is, with a given gradient in the points."""

    @staticmethod
    def forward(ctx: Any, points: Tensor, output: Tensor, gradient: Tensor) -> Tensor:
        ctx.save_for_backward(gradient)
        return output.clone()

    @staticmethod
    def backward(ctx: Any, of_output: Tensor) -> tuple[Tensor, Tensor, None]:
        (gradient,) = ctx.saved_tensors
        return gradient, of_output, None


_played: Any = _Played.apply
