"""The samples of an evaluation: batches from any source, checked."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import TypeVar

import torch
from torch import Tensor, nn

from elle_fast._core import checks
from elle_fast._core.checks import describe
from elle_fast._core.unwrapping import output_at
from elle_fast.evaluation.names import BOUNDS

Batches = Iterable[tuple[Tensor, Tensor]]
Found = TypeVar("Found")


def numbered(model: nn.Module, batches: Batches) -> Iterator[tuple[int, Tensor, Tensor]]:
    """Yields the index of each batch's first sample, its inputs in the layout of :func:`laid_out`, and its labels.

    Raises:
        TypeError, ValueError: if a batch is not x floating ``[B, ...]`` in [0, 1] and y int64 ``[B]`` on a device of
            the model, or if there is none.
    """
    if not isinstance(batches, Iterable) or isinstance(batches, Tensor):
        raise TypeError(f"batches: expected an iterable of pairs (x, y), got {describe(batches)}")
    devices = {str(parameter.device) for parameter in model.parameters()}
    first = 0
    for batch in batches:
        if not isinstance(batch, (tuple, list)) or [isinstance(each, Tensor) for each in batch] != [True, True]:
            raise TypeError(f"batches: expected pairs (x, y) of tensors, got {describe(batch)}")
        x, y = batch[0].detach(), batch[1]
        if not x.is_floating_point() or x.dim() == 0 or x.numel() == 0:
            raise ValueError(f"batches: expected x floating [B, ...] with B >= 1, got {describe(x)}")
        if y.dtype != torch.int64 or y.shape != x.shape[:1] or y.device != x.device:
            raise ValueError(f"batches: expected y int64 [{len(x)}] on {x.device}, got {describe(y)}")
        if devices and str(x.device) not in devices:
            raise ValueError(f"batches: expected tensors on the model's device, {min(devices)}, got {x.device}")
        low, high = x.min().item(), x.max().item()
        if not BOUNDS[0] <= low <= high <= BOUNDS[1]:  # false for NaN, too
            raise ValueError(
                f"batches: expected x in {list(BOUNDS)}, got values from {low} to {high}{_advice(low, high)}"
            )
        yield first, laid_out(x), y
        first += len(y)
    if first == 0:
        raise ValueError("batches: expected at least one, got none; an iterator can be gone through only once")


def classes_of(model: nn.Module, x: Tensor) -> int:
    """The number of logits, by a pass over the first sample; raises TypeError or ValueError if there are none."""
    with torch.no_grad():
        return checks.logits(output_at(model, laid_out(x[:1])), 1, "model(x)").shape[1]


def are_right(logits: Tensor, y: Tensor) -> Tensor:
    """Which samples are classified right, bool ``[B]``: none whose logits are not finite, as argmax of NaNs is 0."""
    return (logits.argmax(dim=1) == y) & logits.isfinite().all(dim=1)


def check_labels(y: Tensor, classes: int) -> None:
    """Raise a ValueError for a label beyond the logits: an index that on CUDA would end the process, not the call."""
    least, most = y.min().item(), y.max().item()
    if not 0 <= least <= most < classes:
        expected = f"labels from 0 to {classes - 1}, as the model has {classes} classes"
        raise ValueError(f"batches: expected {expected}, got some from {least} to {most}")


def _advice(low: float, high: float) -> str:
    """What to do with inputs that are another program's: normalized, or bytes."""
    if low >= 0 and 1 < high <= 255:
        return "; they look like bytes: divide them by 255"
    if low < 0:
        inside = "give the model (x - mean) / std as its first layer"
        return f"; they look normalized: undo it, x * std + mean, and {inside}, so that eps is in pixels"
    return ""


def laid_out(x: Tensor) -> Tensor:
    """Images in channels_last, the layout in which convolutions are fast; other inputs contiguous."""
    return x.contiguous(memory_format=torch.channels_last if x.dim() == 4 else torch.contiguous_format)


def as_fits(call: Callable[[int, Tensor, Tensor], Found], first: int, x: Tensor, y: Tensor) -> list[Found]:
    """``[call(first, x, y)]``, or where the device is out of memory for that, what it gives of each half, and so on.

    Raises:
        torch.OutOfMemoryError: if there is none for a single sample.
    """
    try:
        return [call(first, x, y)]
    except torch.cuda.OutOfMemoryError:  # every device's; the name is that of torch 2.4
        if len(y) == 1:
            raise
    # Outside of the handler, whose exception holds the tensors of the pass that failed.
    half = len(y) // 2
    return as_fits(call, first, x[:half], y[:half]) + as_fits(call, first + half, x[half:], y[half:])
