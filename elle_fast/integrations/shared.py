"""What the adapters share: a library's version, what a batch is, accumulated gradients, losses of tokens."""

from __future__ import annotations

import re
from collections.abc import Mapping
from contextlib import AbstractContextManager
from importlib import metadata
from typing import Any

import torch.nn.functional as F
from torch import Tensor

from elle_fast._core import checks
from elle_fast.criterion import TrainingLoss
from elle_fast.ops.pack_points.reference import constant


def require(library: str, least: str) -> None:
    """Raise ImportError if a library is missing or older than ``least``; the extra that brings it has its name."""
    try:
        found = metadata.version(library)
    except metadata.PackageNotFoundError:
        raise ImportError(f"{library} is missing: pip install 'elle-fast[{library}]'") from None
    if _numbers(found) < _numbers(least):
        raise ImportError(
            f"{library}: expected version {least} or newer, got {found}: pip install --upgrade 'elle-fast[{library}]'"
        )


def _numbers(version: str) -> list[int]:
    return [int(number) for number in re.findall(r"\d+", version)[:3]]


def checked(criterion: Any) -> TrainingLoss:
    """The criterion, if it is one of this package's.

    Raises:
        TypeError: naming it. A loss of the model's output never sees the model, so it cannot attack it.
    """
    if isinstance(criterion, TrainingLoss):
        return criterion
    raise TypeError(
        "criterion: expected ELLELoss or a criterion of elle_fast.methods, which call the model themselves, "
        f"got {checks.describe(criterion)}"
    )


def x_and_target(batch: Any) -> tuple[Tensor, Any]:
    """The two of a batch ``(x, target)``, or of a dictionary as loaders of Hugging Face make it.

    Raises:
        TypeError: for another one, naming what was expected and got.
    """
    expected = "batch: expected (x, target), or a dictionary with pixel_values and labels"
    say = "say what they are: parts=lambda batch: (x, target), or a module with that method"
    if isinstance(batch, Mapping):
        if "pixel_values" in batch and "labels" in batch:
            return batch["pixel_values"], batch["labels"]
        raise TypeError(f"{expected}, got one with {', '.join(map(str, batch)) or 'nothing'}; {say}")
    if not isinstance(batch, (tuple, list)) or len(batch) != 2:
        of = f" of {len(batch)}" if isinstance(batch, (tuple, list)) else ""
        raise TypeError(f"{expected}, got a {type(batch).__name__}{of}; {say}")
    x, target = batch
    return x, target


def check_normalized(criterion: TrainingLoss, normalized: Any) -> bool:
    """``normalized``, if the criterion has the statistics to undo a loader's normalization.

    Raises:
        TypeError, ValueError: naming the argument, what was expected and what was got.
    """
    if checks.flag("normalized", normalized) and _packing(criterion).mean is None:
        raise ValueError(
            "normalized: expected a criterion with the loader's mean and std, as ELLELoss(eps, mean=..., std=...), "
            f"got {type(criterion).__name__} without them; other methods need a loader that does not normalize"
        )
    return normalized  # type: ignore[no-any-return]


def pixels(x: Tensor, criterion: TrainingLoss) -> Tensor:
    """x in pixels, ``x * std + mean``, of a batch that was normalized with the criterion's statistics.

    Exact but for rounding, within what ``bounds`` allows. eps is then in pixels too, as the criterion normalizes its
    points itself.
    """
    packing = _packing(criterion)
    mean, std = (
        constant(values, x.dtype, x.device).view(-1, *[1] * (x.dim() - 2)) for values in (packing.mean, packing.std)
    )
    return x * std + mean


def _packing(criterion: TrainingLoss) -> Any:
    linearity = getattr(criterion, "linearity", None)
    return getattr(linearity, "packing", None) or _NO_STATISTICS


class _NoStatistics:
    mean = std = None


_NO_STATISTICS = _NoStatistics()


def part_of_step(criterion: TrainingLoss, first: bool) -> AbstractContextManager[None]:
    """Around a call for one of the batches whose gradients are accumulated: lam follows the first.

    A method that keeps something for each sample takes each of its batches as it comes.
    """
    return criterion.frozen(not first and not criterion.per_sample)


def token_losses(output: Tensor, target: Tensor) -> Tensor:
    """Cross-entropy of each sample, averaged over its tokens: a ``loss_fn`` for classifiers of tokens.

    Args:
        output: logits ``[N, T, C]``.
        target: int64 ``[N, T]``; -100 for a token that does not count. A sample in which none does has loss 0.

    Returns:
        Losses ``[N]``.
    """
    losses = F.cross_entropy(output.transpose(1, 2), target, reduction="none")
    counted = (target != -100).sum(dim=1)
    return losses.sum(dim=1) / counted.clamp(min=1)
