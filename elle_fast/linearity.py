"""What ELLELoss and LocalLinearity share: the options of the triplets, their packing, the call of the model."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from elle_fast import attacks, backends, functional
from elle_fast._core import checks
from elle_fast.ops import layout
from elle_fast.ops.elle_loss import reference as elle_loss_reference
from elle_fast.ops.elle_loss.validation import linearity_options
from elle_fast.ops.pack_points.reference import between
from elle_fast.ops.pack_points.validation import check_form, packing_options
from elle_fast.recompute import checkpointed

Model = Callable[[Tensor], Any]

# Projected ascent on alpha (paper, B.3: PGD-10 with a step of 0.1).
_ASCENT_STEPS, _ASCENT_STEP_SIZE = 10, 0.1


def unwrapped(model: Model) -> Model:
    """The module inside DistributedDataParallel, for all forward passes of a step but one.

    Each forward pass through the wrapper copies rank 0's buffers over the others' in place, which a second one would do
    to buffers that the first one's graph needs; and the wrapper does not support ``torch.autograd.grad``. Gradients are
    reduced all the same, once, when all passes through the parameters have added to them.
    """
    inner = getattr(model, "_orig_mod", model)  # torch.compile's
    return inner.module if isinstance(inner, DistributedDataParallel) else model


class Triplets(nn.Module):
    """Base class: takes and checks the options of the triplets, packs the points, runs the model on them."""

    def __init__(
        self,
        eps: float,
        *,
        bounds: tuple[float, float] | None = None,
        mean: Sequence[float] | None = None,
        std: Sequence[float] | None = None,
        norm: str = "linf",
        points: str = "elle",
        triplets: int = 1,
        alpha: str = "uniform",
        penalty: str = "squared",
        of: str = "loss",
        label_smoothing: float = 0.0,
        triplet_fraction: float = 1.0,
        logits: Callable[[Any], Any] | None = None,
        loss_fn: attacks.LossFn | None = None,
        dtype: torch.dtype | None = None,
        memory_format: torch.memory_format = torch.preserve_format,
        generator: torch.Generator | None = None,
        backend: str = "auto",
    ) -> None:
        super().__init__()
        checks.choice("alpha", alpha, (*layout.ALPHAS, "argmax"))
        if points == "five-point" and alpha != "uniform":
            raise ValueError(f"alpha: expected the default 'uniform' with points='five-point', got {alpha!r}")
        checks.real("triplet_fraction", triplet_fraction, low=0, low_allowed=False, high=1)
        for name, value in (("logits", logits), ("loss_fn", loss_fn)):
            if value is not None and not callable(value):
                raise TypeError(f"{name}: expected None or a callable, got {checks.describe(value)}")
        if loss_fn is not None and (of != "loss" or label_smoothing != 0):
            raise ValueError(
                "loss_fn: expected of='loss' and label_smoothing=0 beside a loss of your own, "
                f"got of={of!r} and label_smoothing={label_smoothing!r}"
            )
        if generator is not None and not isinstance(generator, torch.Generator):
            raise TypeError(f"generator: expected None or a torch.Generator, got {checks.describe(generator)}")
        self._linearity: dict[str, Any] = {"points": points, "triplets": triplets, "of": of, "penalty": penalty}
        self._linearity["label_smoothing"] = label_smoothing
        self._options = linearity_options(**self._linearity)
        self._packing: dict[str, Any] = {
            "bounds": bounds,
            "mean": mean,
            "std": std,
            "norm": norm,
            "points": points,
            "triplets": triplets,
            "fraction": triplet_fraction,
            "dtype": dtype,
            "memory_format": memory_format,
        }
        self._checked = packing_options(eps=eps, **self._packing)
        self.eps = self._checked.eps
        self.alpha = alpha
        self.logits = logits
        self.loss_fn = loss_fn
        self.generator = generator
        self.backend = backends.check(backend)

    def __getstate__(self) -> dict[str, Any]:
        # torch.save pickles with a protocol that cannot take a torch.memory_format; its name can be taken.
        state = dict(self.__dict__)
        del state["_checked"]
        state["_packing"] = {**self._packing, "memory_format": str(self._packing["memory_format"])}
        return state

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)  # type: ignore[no-untyped-call]
        name = self._packing["memory_format"].removeprefix("torch.")
        self._packing = {**self._packing, "memory_format": getattr(torch, name)}
        self._checked = packing_options(eps=self.eps, **self._packing)

    def check(self, x: Tensor, target: Any) -> None:
        """Raise TypeError or ValueError for a batch that cannot be packed."""
        attacks.check_batch(x, target, self.loss_fn)
        check_form(x, self._checked)
        # A user's own loss may take any tensor, as long as it can be cut and repeated along the batch.
        if not isinstance(target, Tensor) or target.shape[:1] != x.shape[:1]:
            raise ValueError(
                f"target: expected a tensor whose dimension 0 is B = {x.shape[0]}, got {checks.describe(target)}"
            )

    def _pack(
        self, model: Model, x: Tensor, target: Tensor, grad: Tensor | None, x_adv: Tensor | None, **step: Any
    ) -> tuple[Tensor, Tensor]:
        """The packed, normalised batch and alpha."""
        options = {**self._packing, **step, "x_adv": x_adv, "backend": self.backend}
        if self.alpha != "argmax":
            return functional.pack_points(x, grad, self.eps, alpha=self.alpha, **options)
        points, alpha = functional.pack_points(x, grad, self.eps, **options)
        first = 0 if grad is None and x_adv is None else x.shape[0]
        alpha = self._ascend(model, points, alpha, target, first)
        # The same seed packs the same x_a and x_b again, now with the x_c of the alpha found.
        return functional.pack_points(x, grad, self.eps, alpha=alpha, **options)

    def _ascend(self, model: Model, points: Tensor, alpha: Tensor, target: Tensor, first: int) -> Tensor:
        """The alpha in [0, 1] that maximises r^2 (paper, B.3), by ten projected sign steps from a uniform start."""
        triplets = self._options.triplets
        blocks = points[first:].unflatten(0, (triplets, layout.BLOCKS[self._options.points], -1))
        part = blocks.shape[2]
        x_a = blocks[:, 0].flatten(0, 1)
        x_b = blocks[:, 1].flatten(0, 1) if self._options.points == "elle" else torch.cat([points[:part]] * triplets)
        targets = torch.cat([target[:part]] * triplets)
        with torch.no_grad():
            h_a, h_b = self._values(model, x_a, targets), self._values(model, x_b, targets)
        # Older torch (pytorch/pytorch#158232): autocast would hand the weights that it has just cast without a graph to
        # the forward pass that needs one.
        torch.clear_autocast_cache()
        for _ in range(_ASCENT_STEPS):
            with torch.enable_grad():
                a = alpha.detach().requires_grad_()
                h_c = self._values(model, between(x_a, x_b, a).to(points.dtype), targets)
                (grad,) = torch.autograd.grad((h_c - between(h_a, h_b, a)).square().sum(), a)
            alpha = (alpha + _ASCENT_STEP_SIZE * grad.sign()).clamp(0, 1)
        return alpha

    def _values(self, model: Model, points: Tensor, target: Tensor) -> Tensor:
        """The function whose linearity is enforced: losses ``[N]`` or logits ``[N, C]``."""
        output = self._output(model, points)
        if self._options.of == "logits":
            return elle_loss_reference.widen(checks.logits(output, points.shape[0], attacks.MODEL_OUTPUT))
        return attacks.sample_losses(output, target, self.loss_fn, points.shape[0], self._options.label_smoothing)

    def _output(self, model: Model, points: Tensor) -> Any:
        return _output(model, self.logits, points)

    def _forward(
        self,
        model: Model,
        points: Tensor,
        target: Tensor,
        alpha: Tensor,
        parts: Sequence[int],
        *,
        recompute: bool = False,
        light: bool = False,
    ) -> Tensor:
        """Logits ``[N, C]`` of the packed batch, or losses ``[N]`` of the user's own loss; a forward pass per part.

        Args:
            model, points, target, alpha: the model and the packed batch.
            parts: rows of each part; the first alone goes through DistributedDataParallel.
            recompute: keep no activations of a part, but make them again in the backward pass.
            light: no part but the first carries a graph.
        """
        targets: Sequence[Tensor | None] = [None] * len(parts)
        if self.loss_fn is not None:
            first = points.shape[0] - layout.BLOCKS[self._options.points] * alpha.numel()
            expanded = elle_loss_reference.expand_target(target, alpha, self._options, first=first > 0)
            targets = expanded.split(list(parts))
        callees, again = [(each, self.logits, self.loss_fn) for each in (model, unwrapped(model))]
        rows: list[Tensor] = []
        for inputs in zip(points.split(list(parts)), targets, strict=True):
            if light and rows:
                with torch.no_grad():
                    rows.append(_rows(*callees, *inputs))
            elif recompute and not light:
                rows.append(checkpointed(_rows, callees, again, *inputs))
            else:
                rows.append(_rows(*callees, *inputs))
            callees = again
        return rows[0] if len(rows) == 1 else torch.cat(rows)

    def extra_repr(self) -> str:
        """The options, as ``repr`` shows them."""
        fraction = self._packing["fraction"]
        options = {"eps": self.eps, "alpha": self.alpha, **self._linearity, "triplet_fraction": fraction}
        return ", ".join(f"{name}={value!r}" for name, value in options.items())


def _output(model: Model, logits: Callable[[Any], Any] | None, points: Tensor) -> Any:
    output = model(points)
    return output if logits is None else logits(output)


def _rows(
    model: Model,
    logits: Callable[[Any], Any] | None,
    loss_fn: attacks.LossFn | None,
    points: Tensor,
    target: Tensor | None,
) -> Tensor:
    """Logits ``[N, C]``, or losses ``[N]`` of the user's own loss, which alone looks at the target."""
    output, rows = _output(model, logits, points), points.shape[0]
    if loss_fn is None:
        return checks.logits(output, rows, attacks.MODEL_OUTPUT)
    return attacks.sample_losses(output, target, loss_fn, rows)
