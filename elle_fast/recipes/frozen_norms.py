"""Batch norms that keep the running statistics they have, for fine-tuning."""

from __future__ import annotations

from functools import cache
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


@cache
def _frozen(kind: type) -> Any:
    return type(f"Frozen{kind.__name__}", (Frozen, kind), {})
