"""One forward pass: from points to what a loss takes, whatever the model's output is."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from elle_fast import attacks
from elle_fast._core import checks
from elle_fast._core.unwrapping import Model
from elle_fast.criterion import in_train_mode
from elle_fast.ops.elle_loss.reference import widen
from elle_fast.ops.pack_points.reference import normalize
from elle_fast.ops.pack_points.validation import Packing


class ModelKwargs(NamedTuple):
    """A model's arguments beside the points.

    Attributes:
        shared: those that are the same for every row.
        names, values: those with a row for each sample, ``[B, ...]``, which go with the sample's points.
    """

    shared: Mapping[str, Any]
    names: tuple[str, ...]
    values: tuple[Tensor, ...]

    @classmethod
    def of(cls, given: Mapping[str, Any] | None, batch: int) -> ModelKwargs:
        """Tensors whose dimension 0 is ``batch`` belong to the samples.

        Raises:
            TypeError: for what is no dictionary with names, naming it.
        """
        if given is None:
            return NO_KWARGS
        if not isinstance(given, Mapping) or not all(isinstance(name, str) for name in given):
            raise TypeError(f"model_kwargs: expected None or a dictionary by name, got {checks.describe(given)}")
        own = {name: value for name, value in given.items() if _rows(value) == batch}
        shared = {name: value for name, value in given.items() if name not in own}
        return cls(shared, tuple(own), tuple(own.values()))

    def with_values(self, values: tuple[Tensor, ...]) -> dict[str, Any]:
        """All of them, with other rows of those that belong to the samples."""
        return {**self.shared, **dict(zip(self.names, values, strict=True))}

    def to(self, device: torch.device) -> ModelKwargs:
        """Them with their tensors on a device."""
        shared = {name: value.to(device) if isinstance(value, Tensor) else value for name, value in self.shared.items()}
        return self._replace(shared=shared, values=tuple(value.to(device) for value in self.values))

    def given_to(self, model: Model, *, detached: bool = False) -> Model:
        """The model of points alone, one of each sample. It stays a module, or a function.

        ``detached``: for an attack, which takes no gradient of the arguments.
        """
        if not self.shared and not self.names:
            return model
        values = tuple(value.detach() for value in self.values) if detached else self.values
        whole = WithKwargs(model, self.with_values(values), self.names)
        return whole if isinstance(model, nn.Module) else whole.forward


NO_KWARGS = ModelKwargs({}, (), ())


def _rows(value: Any) -> int | None:
    return value.shape[0] if isinstance(value, Tensor) and value.dim() else None


class WithKwargs(nn.Module):
    """A model with some of its arguments, with the parameters and the mode of the model inside.

    Each pass gets copies of ``own``, the arguments of the samples: it may change them in place.
    """

    def __init__(self, model: Model, kwargs: Mapping[str, Any], own: Collection[str]) -> None:
        super().__init__()
        self.model, self.kwargs, self.own = model, kwargs, own
        self.training = in_train_mode(model)

    def forward(self, points: Tensor) -> Any:
        """The model's output."""
        return self.model(points, **{**self.kwargs, **{name: self.kwargs[name].clone() for name in self.own}})


def parts_of(model: Model) -> tuple[Model, Mapping[str, Any]]:
    """The model, and the arguments that it was given with :class:`WithKwargs`."""
    whole = getattr(model, "__self__", model)
    return (whole.model, whole.kwargs) if isinstance(whole, WithKwargs) else (model, {})


class OnPixels(nn.Module):
    """A model of pixels, with the parameters, mode and device of the model inside."""

    def __init__(self, model: Model, packing: Packing, logits: Callable[[Any], Any] | None) -> None:
        super().__init__()
        self.model, self.packing, self.logits = model, packing, logits
        self.training = in_train_mode(model)

    def forward(self, pixels: Tensor) -> Any:
        """What the loss takes out of the model."""
        packing = self.packing
        points = normalize(widen(pixels), packing.mean, packing.std).to(packing.dtype or pixels.dtype)
        return output_of(self.model, self.logits, points)


def output_of(model: Model, logits: Callable[[Any], Any] | None, points: Tensor, /, **kwargs: Any) -> Any:
    """The model's output, or the logits picked out of it."""
    output = model(points, **kwargs)
    return output if logits is None else logits(output)


def rows_of(
    kwargs: ModelKwargs,
    model: Model,
    logits: Callable[[Any], Any] | None,
    loss_fn: attacks.LossFn | None,
    points: Tensor,
    target: Tensor | None,
    *values: Tensor,
) -> Tensor:
    """Logits ``[N, C]``, or losses ``[N]`` of the user's own loss, which alone looks at the target.

    ``values`` are the rows of those ``kwargs`` that belong to the samples.
    """
    output, rows = output_of(model, logits, points, **kwargs.with_values(values)), points.shape[0]
    if loss_fn is None:
        return checks.logits(output, rows, attacks.MODEL_OUTPUT)
    return attacks.sample_losses(output, target, loss_fn, rows)
