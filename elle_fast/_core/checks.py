"""Checks of single arguments, shared by every public function.

Each raises an error that names the argument, what was expected and what was got. None looks at a tensor's values, so
none waits for a device.
"""

from __future__ import annotations

import math
import os
from collections.abc import Collection
from numbers import Integral, Real
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.compiler import is_compiling

_PLAIN = frozenset([Tensor, torch.nn.Parameter, type(None)])

# Kernels take numbers in float32, and their reciprocals.
_LARGEST, _SMALLEST = torch.finfo(torch.float32).max, torch.finfo(torch.float32).tiny

_LONGEST = 300  # characters of a value in a message


def wrapped(*tensors: Tensor | None) -> bool:
    """True if one of them is a subclass that wraps other tensors, such as DTensor: its address is not its data's."""
    if not is_compiling() and _PLAIN.issuperset(map(type, tensors)):
        return False
    return any(type(tensor) not in _PLAIN and hasattr(tensor, "__tensor_flatten__") for tensor in tensors)


def have_memory(*tensors: Tensor) -> bool:
    """True if all of them are plain tensors with memory of their own: none is fake or inside a transform."""
    if is_compiling() or torch._C._are_functorch_transforms_active():
        return False
    return _PLAIN.issuperset(map(type, tensors)) and not any(tensor.is_meta for tensor in tensors)


def describe(value: object) -> str:
    """A short description of ``value`` for the "got" part of a message."""
    if isinstance(value, Tensor):
        layout = "" if value.layout == torch.strided else f"{value.layout}, "
        return f"a tensor of shape {list(value.shape)}, {value.dtype}, {layout}on {value.device}"
    kind = type(value).__name__
    if isinstance(value, (dict, list, tuple)):
        # Not its repr: that could hold tensors, print them whole and wait for their device.
        items = value.values() if isinstance(value, dict) else value
        if any(isinstance(item, Tensor) for item in items):
            return f"{len(value)} items, tensors among them ({kind})"
    return f"{shown(value)} ({kind})"


def shown(value: object) -> str:
    """``repr(value)`` for a message, which no value can break or fill."""
    try:
        text = repr(value)
    except Exception:
        integer = isinstance(value, int)
        text = "an integer of more digits than Python writes" if integer else "something that cannot be printed"
    return text if len(text) <= _LONGEST else f"{text[:_LONGEST]}..."


def refusal(expected: str, value: object, of_the_kind: bool) -> Exception:
    """A ValueError for a value of the right kind, else a TypeError, with what was got."""
    got = shown(value) if of_the_kind and not isinstance(value, Tensor) else describe(value)
    return (ValueError if of_the_kind else TypeError)(f"{expected}, got {got}")


def real(
    name: str,
    value: Any,
    *,
    low: float,
    low_allowed: bool = True,
    high: float = _LARGEST,
    high_allowed: bool = True,
) -> float:
    """A real number in ``[low, high]``, without the ends that are not allowed; at most float32's largest."""
    numeric = type(value) is float or (isinstance(value, Real) and not isinstance(value, bool))
    if numeric:
        try:
            number = float(value)
        except OverflowError:  # an integer or a fraction beyond the floats
            number = math.inf
        # Comparisons alone, which a compiler can follow for a number it does not know; NaN fails each.
        if low <= number <= high and (low_allowed or number != low) and (high_allowed or number != high):
            return number
    interval = f"{'[' if low_allowed else '('}{low:g}, {high:g}{']' if high_allowed else ')'}"
    raise refusal(f"{name}: expected a finite number in {interval}", value, numeric)


def integer(name: str, value: Any, *, low: int, high: int = 2**63 - 1) -> int:
    """An integer of at least ``low`` and at most ``high``."""
    whole = isinstance(value, Integral) and not isinstance(value, bool)
    if whole and low <= int(value) <= high:
        return int(value)
    # The largest int64 is worth a word only to who went beyond it.
    most = "" if high == 2**63 - 1 and not (whole and int(value) > high) else f" and <= {high}"
    raise refusal(f"{name}: expected an integer >= {low}{most}", value, whole)


def choice(name: str, value: Any, allowed: Collection[str]) -> str:
    """One of a few names."""
    if isinstance(value, str) and value in allowed:
        return value
    raise refusal(f"{name}: expected one of {', '.join(map(repr, allowed))}", value, isinstance(value, str))


def flag(name: str, value: Any) -> bool:
    """True or False."""
    if not isinstance(value, bool):
        raise TypeError(f"{name}: expected True or False, got {describe(value)}")
    return value


def known(function: str, given: Collection[str], allowed: Collection[str]) -> None:
    """Names of options that a function takes on for another."""
    if unknown := sorted(set(given).difference(allowed)):
        raise TypeError(f"{function}: expected options among {', '.join(allowed)}, got {', '.join(unknown)}")


def optional(name: str, value: Any, kind: Any, what: str) -> None:
    """``None``, or an instance of a class."""
    if value is not None and not isinstance(value, kind):
        raise TypeError(f"{name}: expected None or {what}, got {describe(value)}")


def path(name: str, value: Any) -> Path:
    """A string or a path, as a path."""
    if not isinstance(value, (str, os.PathLike)):
        raise TypeError(f"{name}: expected a path, got {describe(value)}")
    return Path(value)


def function(name: str, value: Any) -> Any:
    """``None`` or a callable; not a class, such as a loss' that was meant to be made first."""
    if value is not None and (not callable(value) or isinstance(value, type)):
        raise TypeError(f"{name}: expected None or a callable, got {describe(value)}")
    return value


def generator(value: Any) -> torch.Generator | None:
    """``None``, or a source of random numbers."""
    if value is not None and not isinstance(value, torch.Generator):
        raise TypeError(f"generator: expected None or a torch.Generator, got {describe(value)}")
    return value


def device(value: Any) -> torch.device:
    """A device, or the name of one."""
    if isinstance(value, torch.device):
        return value
    try:
        if isinstance(value, str):
            return torch.device(value)
    except RuntimeError:  # no device of torch's
        pass
    raise refusal("device: expected a torch.device or its name", value, isinstance(value, str))


def bounds(value: Any) -> tuple[float, float] | None:
    """(Lowest, highest) value of the inputs; ``None`` for ``None``, and for ``"any"``: they have none."""
    if value is None or (isinstance(value, str) and value == "any"):
        return None
    numbers = _numbers(value)
    if numbers and len(value) == 2 and -_LARGEST <= value[0] < value[1] <= _LARGEST:
        return float(value[0]), float(value[1])
    raise refusal(
        "bounds: expected None, 'any' or two finite float32 numbers (low, high) with low < high", value, numbers
    )


def _numbers(value: Any) -> bool:
    return isinstance(value, (tuple, list)) and all(isinstance(v, Real) and not isinstance(v, bool) for v in value)


def statistics(mean: Any, std: Any) -> tuple[tuple[float, ...], tuple[float, ...]] | None:
    """Per-channel mean and standard deviation: both ``None``, or two sequences of equal length."""
    if mean is None and std is None:
        return None
    for name, value in (("mean", mean), ("std", std)):
        if not _numbers(value):
            together = "a sequence of one number per channel, as mean and std go together"
            raise TypeError(f"{name}: expected {together}, got {describe(value)}")
    if len(mean) != len(std) or not mean:
        raise ValueError(f"mean, std: expected the same number of channels, got {len(mean)} and {len(std)}")
    for name, value, low in (("mean", mean, -_LARGEST), ("std", std, _SMALLEST)):
        if not all(low <= v <= _LARGEST for v in value):
            raise ValueError(f"{name}: expected numbers in [{low:g}, {_LARGEST:g}], got {shown(value)}")
    return tuple(map(float, mean)), tuple(map(float, std))


def dense(name: str, value: Tensor) -> None:
    """Not sparse."""
    if value.layout != torch.strided:
        raise ValueError(f"{name}: expected a dense tensor, got {describe(value)}")


def inputs(name: str, x: Tensor) -> Tensor:
    """A floating tensor ``[B, ...]`` with ``B >= 1``, not empty, that requires no gradient."""
    if isinstance(x, Tensor) and x.is_nested:  # its shape cannot even be asked for
        raise ValueError(f"{name}: expected a dense tensor, got a nested one")
    floating = isinstance(x, Tensor) and x.is_floating_point()
    if not floating or x.dim() == 0 or x.numel() == 0:
        expected = f"{name}: expected a floating-point tensor [B, ...] with B >= 1 and at least one element a sample"
        raise refusal(expected, x, floating)
    if x.requires_grad:
        raise ValueError(f"{name}: must not require grad; pass {name}.detach()")
    dense(name, x)
    return x


def like(name: str, value: Tensor, x: Tensor) -> Tensor:
    """A floating tensor with ``x``'s shape and device that requires no gradient."""
    inputs(name, value)
    if value.shape != x.shape or value.device != x.device:
        raise ValueError(f"{name}: expected the shape and device of x, {describe(x)}, got {describe(value)}")
    return value


def target(value: Tensor, batch: int, device: torch.device) -> Tensor:
    """Class indices, int64 ``[B]``, or class probabilities, floating ``[B, C]``."""
    rank = value.dim() if isinstance(value, Tensor) else None
    indices = rank == 1 and value.dtype == torch.int64
    probabilities = rank == 2 and value.is_floating_point()
    if (indices or probabilities) and value.shape[0] == batch and value.device == device:
        dense("target", value)
        return value
    expected = f"target: expected int64 class indices [{batch}] or floating probabilities [{batch}, C] on {device}"
    wrong_type = rank is None or (rank in (1, 2) and not (indices or probabilities))
    raise refusal(expected, value, not wrong_type)


def classes(target: Tensor, logits: Tensor) -> None:
    """Probabilities have one column for each class of the logits."""
    if target.dim() == 2 and target.shape[1] != logits.shape[1]:
        raise ValueError(
            f"target: expected probabilities [{target.shape[0]}, {logits.shape[1]}], one for each class of the logits, "
            f"got {describe(target)}"
        )


def logits(value: Tensor, rows: int | None, name: str = "logits") -> Tensor:
    """A floating tensor ``[rows, C]`` with ``C >= 1``."""
    floating = isinstance(value, Tensor) and value.is_floating_point()
    if not floating or value.dim() != 2 or value.shape[1] == 0 or (rows is not None and value.shape[0] != rows):
        expected = f"{name}: expected a floating-point tensor of shape [{'N' if rows is None else rows}, C]"
        raise refusal(expected, value, floating)
    dense(name, value)
    return value


def first_line(error: BaseException) -> str:
    """What an error says in its first line, or what it is, for a message of one line."""
    return (str(error).strip() or type(error).__name__).splitlines()[0]
