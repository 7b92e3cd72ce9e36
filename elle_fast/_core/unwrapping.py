"""What a model is to the rest of the package, and the module inside wrappers of it."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from types import MethodType
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from torch.compiler import is_compiling
from torch.nn.parallel import DistributedDataParallel
from torch.optim.swa_utils import AveragedModel

from elle_fast._core import checks, compiled

Model = Callable[[Tensor], Any]

# A module that torch.compile has not seen is compiled, so what is inside a compiled one is made once.
# Whether modules change their inputs in place, in train mode and in eval mode.
_CHANGE_INPUTS: WeakKeyDictionary[nn.Module, dict[bool, bool]] = WeakKeyDictionary()
_COMPILED: WeakKeyDictionary[nn.Module, dict[bool, nn.Module]] = WeakKeyDictionary()


def unwrapped(model: Model, *, ddp: bool = False) -> Model:
    """The model without DistributedDataParallel, for all forward passes of a step but one.

    Each forward pass through the wrapper copies rank 0's buffers over the others' in place, which a second one would do
    to buffers that the graph of the previous one needs; and the wrapper does not support ``torch.autograd.grad``.
    Gradients are reduced all the same, once, when all passes through the parameters have added to them.

    Wrappers may be nested in any order. From each kind comes, with what is inside unwrapped in the same way:

    ===========================  ======================================================================================
    DistributedDataParallel      what is inside
    ``torch.compile(model)``     what is inside, compiled with the same options
    Lightning Fabric's           what is inside in Fabric's precision, without the demand for ``fabric.backward``, which
                                 an attack's gradient cannot meet; known by its attributes
    AveragedModel (EMA, SWA)     what is inside
    FSDP, FSDP2, DataParallel    itself: each forward pass gathers the weights, or splits the batch
    anything else                itself: ``nn.Sequential(normalize, ddp)`` too, and a DistributedDataParallel that was
                                 compiled in place (``ddp.compile()``) leaves its module uncompiled
    ===========================  ======================================================================================

    A wrapper in which there is nothing to take out stays as it is.

    Args:
        model: what a criterion or an attack was given.
        ddp: keep DistributedDataParallel, for the one pass of a step that goes through it, if its gradient is taken.

    Raises:
        TypeError: for what is no model, naming it.
    """
    if not isinstance(model, nn.Module):
        return _checked(model)
    if isinstance(model, DistributedDataParallel):
        return model if ddp else unwrapped(model.module)
    if isinstance(model, AveragedModel):
        inner = unwrapped(model.module, ddp=ddp)
        return model if inner is model.module else inner
    # By their attributes: to import torch._dynamo takes a second, and Lightning may not be installed.
    if (original := model._modules.get("_orig_mod")) is not None:
        found = _COMPILED.setdefault(model, {})
        if ddp not in found:
            inner = unwrapped(original, ddp=ddp)
            if inner is original:
                return model
            found[ddp] = type(model)(inner, vars(model)["dynamo_ctx"])
        return found[ddp]
    if (forward := model._modules.get("_forward_module")) is not None and "_strategy" in vars(model):
        return _InPrecision(unwrapped(forward, ddp=ddp), vars(model)["_strategy"].precision)
    return model


def output_at(model: Model, points: Tensor) -> Any:
    """``model(points)`` of points that are used again, which a model that changes its input in place gets a copy of.

    So does one of which that is not known yet: its first call in each mode tells. If the points require grad, a model
    that is compiled by this call can be differentiated with :func:`elle_fast._core.compiled.kept_gradient`.

    Raises:
        RuntimeError: if a module changes its input in place that did not before.
    """
    if points.requires_grad:
        with compiled.keeping():
            return _output_at(model, points)
    return _output_at(model, points)


def _output_at(model: Model, points: Tensor) -> Any:
    versions = not (is_compiling() or torch.is_inference_mode_enabled() or points.is_inference())
    if not versions or not isinstance(model, nn.Module) or type(model).__hash__ is None:
        return _checked(model)(points.clone())
    known, mode = _CHANGE_INPUTS.setdefault(model, {}), model.training
    changes = known.get(mode, True)
    given = points.clone() if changes else points
    before = given._version
    output = model(given)
    changed = given._version != before
    known.setdefault(mode, changed)
    if changed and not changes:
        raise RuntimeError(
            "model: expected one that leaves its input alone, as in its first call, got one that changed it"
        )
    return output


def module_of(model: Any) -> nn.Module | None:
    """The model, or the module of which it is a method or a partial call; ``None`` of another function."""
    while isinstance(model, partial | MethodType):
        model = model.func if isinstance(model, partial) else model.__self__
    return model if isinstance(model, nn.Module) else None


def _checked(model: Model) -> Model:
    if callable(model) and not isinstance(model, type):
        return model
    raise TypeError(f"model: expected a torch.nn.Module or a function of the inputs, got {checks.describe(model)}")


class _InPrecision(nn.Module):
    """Fabric's forward pass of a module, whose parameters and mode are its own."""

    def __init__(self, inner: Model, precision: Any) -> None:
        super().__init__()
        self.inner, self.precision = inner, precision

    @property
    def training(self) -> bool:
        """The mode of what is inside, which ``train()`` and ``eval()`` change too."""
        return getattr(self.inner, "training", True)

    @training.setter
    def training(self, mode: bool) -> None:
        pass

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        args, kwargs = self.precision.convert_input((args, kwargs))
        with self.precision.forward_context():
            output = self.inner(*args, **kwargs)
        return self.precision.convert_output(output)
