"""The precisions that a forward pass can be asked to have, by name."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import nn

from elle_fast._core import checks
from elle_fast._core.unwrapping import module_of

# What autocast casts to; None: nothing is cast, and float32 is tf32 where torch is told so.
DTYPES: dict[str, torch.dtype | None] = {"fp32": None, "fp16": torch.float16, "bf16": torch.bfloat16}


def check(name: str, value: Any) -> str | None:
    """One of :data:`DTYPES`, or None."""
    return None if value is None else checks.choice(name, value, DTYPES)


def around(precision: str | None, device: torch.device) -> AbstractContextManager[Any]:
    """A forward pass inside it has this precision, also inside another autocast; None changes nothing.

    Nothing that is cast is kept: torch would hand out the weights that the autocast around has cast to its own dtype.
    """
    if precision is None:
        return nullcontext()
    dtype = DTYPES[precision]
    return torch.autocast(device.type, dtype=dtype, enabled=dtype is not None, cache_enabled=False)


def check_points(name: str, precision: str | None, dtype: torch.dtype | None) -> None:
    """Refuse points that are rounded before a forward pass of this precision sees them."""
    if precision is not None and dtype in (torch.float16, torch.bfloat16) and dtype != DTYPES[precision]:
        raise ValueError(f"{name}: expected float32 points for a forward pass in {precision}, got {dtype}")


def check_weights(precision: str | None, model: Any) -> None:
    """Refuse a model whose weights have been cast to less than the forward pass is to have.

    The first one tells, as a model is cast as a whole.
    """
    module = module_of(model)
    if precision is None or not isinstance(module, nn.Module):
        return
    weight = next((each for each in module.parameters() if each.is_floating_point()), None)
    if weight is not None and weight.dtype.itemsize < 4 and weight.dtype != DTYPES[precision]:
        raise ValueError(
            f"model: expected weights in float32 for a forward pass in {precision}, got {weight.dtype}; keep them in "
            "float32 and run the step under torch.autocast"
        )
