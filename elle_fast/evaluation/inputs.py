"""Whether a model seems to take other inputs than pixels in [0, 1], in which the radius of an attack is given."""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor, nn

from elle_fast._core.unwrapping import output_at
from elle_fast.evaluation.samples import Batches, are_right, check_labels, classes_of, laid_out, numbered
from elle_fast.evaluation.undisturbed import undisturbed

SAMPLES = 256
LEVEL = 1e-3  # so rarely is a model suspected by chance
IMAGENET = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


class Suspicion(NamedTuple):
    """What to say of a model, and the ``mean`` and ``std``, a number each channel, that it seems to need, if any."""

    message: str
    mean: tuple[float, ...] | None = None
    std: tuple[float, ...] | None = None


def check_inputs(model: nn.Module, x: Tensor, y: Tensor) -> Suspicion | None:
    """Compare the clean accuracy on x with that on normalized x; None if nothing is amiss, or memory is too short.

    A model that takes normalized inputs is more accurate on them; one that normalizes in its first layer is less. The
    check asks on the first 256 samples, in at most two passes beside that over x: with the mean and std of these
    samples, and with ImageNet's if they have three channels. The exact sign test on the samples that are right in one
    of the two ways alone decides. Where no normalization helps, accuracy at chance is suspicious too: weights of
    another training, or classes in another order.

    Args:
        model: maps ``[B, C, ...]`` in [0, 1] to logits. Left as it was.
        x: floating ``[B, C, ...]`` in [0, 1]; of several classes, so not the beginning of sorted samples.
        y: int64 ``[B]``.

    Raises:
        TypeError, ValueError: as :func:`~elle_fast.evaluation.outcomes`.
    """
    try:
        return _checked(model, x[:SAMPLES], y[:SAMPLES])
    except torch.cuda.OutOfMemoryError:  # the attacks can take smaller batches
        return None


def _checked(model: nn.Module, x: Tensor, y: Tensor) -> Suspicion | None:
    with undisturbed(model), torch.no_grad():
        ((_, x, y),) = numbered(model, [(x, y)])
        classes = classes_of(model, x)
        check_labels(y, classes)
        plain = are_right(output_at(model, x), y)
        found: list[tuple[int, tuple[float, ...], tuple[float, ...]]] = []
        for mean, std in _candidates(x):
            shape = (1, -1, *[1] * (x.dim() - 2))
            moved = (x - x.new_tensor(mean).view(shape)) / x.new_tensor(std).view(shape)
            try:
                right = are_right(model(laid_out(moved)), y)
            except (AssertionError, RuntimeError, ValueError):  # it checks its inputs, and these are none of it
                continue
            gained, lost = int((right & ~plain).sum()), int((plain & ~right).sum())
            if _tail(gained, gained + lost, 0.5) < LEVEL:
                found.append((int(right.sum()), mean, std))
    count, right_now = len(y), int(plain.sum())
    share = f"{right_now / count:.1%} of {count} samples in [0, 1] are classified right"
    if found:
        most, mean, std = max(found)
        numbers = " and ".join(f"{name} {listed(each)}" for name, each in (("mean", mean), ("std", std)))
        return Suspicion(
            f"the model seems to take normalized inputs: {share}, and {most / count:.1%} once they are normalized by "
            f"{numbers}; put (x - mean) / std in front of it, so that eps is in pixels",
            mean,
            std,
        )
    if len(set(y.tolist())) > 1 and _tail(right_now, count, 1 / classes) > 0.01:
        why = "the weights may be those of another model or data set, or the classes in another order"
        return Suspicion(f"{share}, which is chance for {classes} classes: {why}")
    return None


def watched(model: nn.Module, batches: Batches) -> Iterator[tuple[Tensor, Tensor]]:
    """The batches; a warning at the first, if the model seems to take normalized inputs."""
    for number, batch in enumerate(batches):
        pair = isinstance(batch, (tuple, list)) and [isinstance(each, Tensor) for each in batch] == [True, True]
        if number == 0 and pair:  # what is no pair is refused by who gets it
            suspicion = check_inputs(model, *batch)
            if suspicion is not None and suspicion.mean is not None:
                warnings.warn(suspicion.message, stacklevel=2)
        yield batch


def listed(numbers: tuple[float, ...]) -> str:
    """``0.485,0.456,0.406``, as options take them."""
    return ",".join(f"{number:.4g}" for number in numbers)


def _candidates(x: Tensor) -> list[tuple[tuple[float, ...], tuple[float, ...]]]:
    if x.dim() < 2:
        return []
    channels = x.transpose(0, 1).flatten(1).double()
    mean, std = channels.mean(dim=1), channels.std(dim=1, correction=0).clamp_min(1e-3)
    found = [(tuple(mean.tolist()), tuple(std.tolist()))]
    return [*found, IMAGENET] if x.dim() == 4 and x.shape[1] == 3 else found


def _tail(least: int, trials: int, chance: float) -> float:
    """The probability of at least so many successes."""
    return sum(
        math.comb(trials, count) * chance**count * (1 - chance) ** (trials - count)
        for count in range(least, trials + 1)
    )
