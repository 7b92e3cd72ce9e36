"""What a model says of each sample, and what that is by class and as an interval."""

from __future__ import annotations

import math
import os
from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from elle_fast._core import checks
from elle_fast._core.files import write_csv
from elle_fast._core.unwrapping import output_at
from elle_fast.evaluation.accuracy import Outcome, withstanding
from elle_fast.evaluation.samples import Batches, as_fits, numbered
from elle_fast.evaluation.undisturbed import undisturbed

_Z = 1.959964  # the normal distribution's 97.5 % point


def predictions(model: nn.Module, batches: Batches) -> Tensor:
    """The class that the model gives each undisturbed sample, int64 ``[N]`` on the CPU; -1 where logits are not finite.

    Arguments and errors as :func:`~elle_fast.evaluation.outcomes`.
    """
    found: list[Tensor] = []
    with undisturbed(model), torch.no_grad():
        for _, x, y in numbered(model, batches):
            found += as_fits(partial(_predicted, model), 0, x, y)
    return torch.cat(found)


def _predicted(model: nn.Module, _: int, x: Tensor, y: Tensor) -> Tensor:
    logits = checks.logits(output_at(model, x), len(y), "model(x)")
    return torch.where(logits.isfinite().all(dim=1), logits.argmax(dim=1), -1).cpu()


def interval(right: int, samples: int) -> tuple[float, float]:
    """Wilson's 95 % interval of an accuracy: of the sampling of the test images, not of the attack's random starts.

    Raises TypeError or ValueError unless ``0 <= right <= samples`` and ``samples >= 1``.
    """
    checks.integer("right", right, low=0, high=checks.integer("samples", samples, low=1))
    share, z2 = right / samples, _Z * _Z
    centre = (share + z2 / (2 * samples)) / (1 + z2 / samples)
    half = _Z / (1 + z2 / samples) * math.sqrt(share * (1 - share) / samples + z2 / (4 * samples**2))
    # At 0 and at all samples an end is the share itself, which rounding need not give.
    return (0.0 if right == 0 else centre - half), (1.0 if right == samples else centre + half)


def by_class(
    labels: Tensor, predicted: Tensor, found: dict[str, Outcome], names: Sequence[str]
) -> list[dict[str, Any]]:
    """For each class that has samples ``class`` (its name), ``samples``, and the accuracies ``clean``, ``worst_case``.

    ``worst_case`` counts as :func:`~elle_fast.evaluation.worst_case` does: by the attacks of ``found`` alone.

    Args:
        labels: int64 ``[N]``.
        predicted: of :func:`predictions`, int64 ``[N]``.
        found: the outcomes of each attack on these samples.
        names: of the classes.
    """
    labels = _same_samples(labels, predicted, found)
    clean = predicted == labels
    withstands = withstanding(found)
    rows = []
    for label, count in enumerate(torch.bincount(labels, minlength=len(names)).tolist()):
        if count:
            of_it = labels == label
            accuracies = {"clean": clean[of_it], "worst_case": withstands[of_it]}
            name = names[label] if label < len(names) else str(label)
            rows.append(
                {"class": name, "samples": count, **{k: v.double().mean().item() for k, v in accuracies.items()}}
            )
    return rows


def write_per_sample(
    path: str | os.PathLike[str], index: Tensor, labels: Tensor, predicted: Tensor, found: dict[str, Outcome]
) -> None:
    """Write a CSV file with a row for each sample, atomically.

    Its columns are ``index``, ``label``, ``prediction`` (of the undisturbed sample; -1 where logits were not finite),
    and one for each attack: 1 if the sample withstands it, else 0.

    Args:
        path: the file.
        index: of the samples in their data set, int64 ``[N]``.
        labels, predicted, found: as in :func:`by_class`.

    Raises:
        OSError: naming the file, if it cannot be written.
    """
    labels = _same_samples(labels, predicted, found)
    if index.shape != labels.shape:
        raise ValueError(
            f"index: expected int64 {list(labels.shape)}, one for each label, got {checks.describe(index)}"
        )
    columns: dict[str, list[int]] = {
        **{"index": index.tolist(), "label": labels.tolist(), "prediction": predicted.tolist()},
        **{name: outcome.robust[-1].int().tolist() for name, outcome in found.items()},
    }
    write_csv(
        checks.path("path", path), [dict(zip(columns, row, strict=True)) for row in zip(*columns.values(), strict=True)]
    )


def _same_samples(labels: Tensor, predicted: Tensor, found: dict[str, Outcome]) -> Tensor:
    """The labels on the CPU, if there are as many of all."""
    sizes = {"predicted": predicted.shape, **{name: outcome.robust.shape[1:] for name, outcome in found.items()}}
    for name, shape in sizes.items():
        if shape != labels.shape:
            raise ValueError(f"{name}: expected {list(labels.shape)}, one for each label, got {list(shape)}")
    return labels.cpu()
