"""Batch norms that keep their statistics, for fine-tuning, and those that share them over processes."""

from __future__ import annotations

from functools import cache
from importlib import import_module
from typing import Any, cast

from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm


class Frozen:
    """A batch norm that is in eval mode whatever mode its model is put into."""

    def train(self, mode: bool = True) -> Any:
        """Stay in eval mode."""
        return super().train(False)  # type: ignore[misc]


def freeze(model: nn.Module) -> int:
    """Freeze each batch norm of a model in place, and return how many there are.

    They normalise with their running mean and variance, which do not move any more. Their scales and shifts are trained
    like all other weights. Names of weights and buffers stay, so that the state fits the model without this.
    """
    norms = [module for module in model.modules() if isinstance(module, _BatchNorm)]
    for norm in norms:
        if not isinstance(norm, Frozen):
            # By its class, which copies of the module have too; a method of the instance would stay with the first.
            norm.__class__ = _frozen(cast(Any, type(norm)))
        norm.train()
    return len(norms)


def synced(model: nn.Module) -> nn.Module:
    """The model with torch's SyncBatchNorm in place of each batch norm.

    timm has norms with an activation inside, which torch's own conversion would lose; they become timm's.

    Raises:
        ValueError: for a batch norm of another class, of which nobody knows what it does besides.
    """
    kinds = {type(each) for each in model.modules() if isinstance(each, _BatchNorm)}
    others = [kind for kind in kinds if not kind.__module__.startswith("torch.nn.")]
    if unknown := sorted(kind.__name__ for kind in others if not kind.__module__.startswith("timm.")):
        raise ValueError(f"sync_batchnorm: expected batch norms of torch or timm, got {', '.join(unknown)}")
    convert = import_module("timm.layers").convert_sync_batchnorm if others else nn.SyncBatchNorm.convert_sync_batchnorm
    converted: nn.Module = convert(model)
    return converted


@cache
def _frozen(kind: type) -> Any:
    return type(f"Frozen{kind.__name__}", (Frozen, kind), {})
