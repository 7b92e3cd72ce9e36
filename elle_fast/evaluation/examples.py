"""What attacks do to a few samples: the points they end at, and what the model says of them."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from elle_fast._core import checks
from elle_fast._core.seeds import derived_seed
from elle_fast._core.unwrapping import output_at
from elle_fast.evaluation.accuracy import MAX_SEED, Outcome, starts
from elle_fast.evaluation.names import Attack, Ball, parse_attacks, radius
from elle_fast.evaluation.samples import check_labels, classes_of, numbered
from elle_fast.evaluation.undisturbed import undisturbed

COUNT = 4


@dataclass(frozen=True, eq=False)
class Seen:
    """A point ``x``, floating ``[...]`` on the CPU, the class that the model gives it, and with what probability."""

    x: Tensor
    prediction: int
    probability: float


@dataclass(frozen=True, eq=False)
class Example:
    """A sample of class ``label`` as it was, and where each attack ended: the point that turned it, or the last."""

    index: int
    label: int
    clean: Seen
    attacked: dict[str, Seen]


def pick(labels: Tensor, predicted: Tensor, found: dict[str, Outcome], count: int = COUNT) -> Tensor:
    """Which samples to show, int64 ``[<= count]``, ascending: right ones of different classes, one that withstands all.

    The first that fit: samples that an attack turns, but for one that withstands each attack, if there is one. What is
    lacking is filled up with whatever comes first. The arguments are those of
    :func:`~elle_fast.evaluation.predictions.by_class`.
    """
    labels, right = labels.cpu(), predicted == labels.cpu()
    withstands = torch.stack([right, *(outcome.robust[-1] for outcome in found.values())]).all(dim=0)
    chosen = withstands.nonzero().flatten()[:1].tolist() if count > 1 else []
    seen = set(labels[chosen].tolist())
    turned = (right & ~withstands).nonzero().flatten().tolist()
    for index in turned:
        if len(chosen) < count and labels[index].item() not in seen:
            chosen.append(index)
            seen.add(labels[index].item())
    for index in [*turned, *range(len(labels))]:
        if len(chosen) < count and index not in chosen:
            chosen.append(index)
    return torch.tensor(sorted(chosen))


def attacked_examples(
    model: nn.Module,
    x: Tensor,
    y: Tensor,
    attacks: str | Iterable[Attack],
    *,
    eps: float,
    norm: str = "linf",
    seed: int = 0,
    index: Tensor | None = None,
) -> list[Example]:
    """Attack some samples and keep the points, of each attack but ``clean``.

    The random starts are not those of an evaluation in other batches, so a sample may fall here and stand there.

    Args:
        model, attacks, eps, norm, seed: as in :func:`~elle_fast.evaluation.outcomes`.
        x, y: the samples, a batch of them.
        index: of the samples in their data set, int64 ``[B]``; by default 0, 1, ...

    Raises:
        TypeError, ValueError, RuntimeError: as :func:`~elle_fast.evaluation.outcomes`.
    """
    ball = Ball(radius(eps, norm), norm)
    checks.integer("seed", seed, low=0, high=MAX_SEED)
    chosen = [attack for attack in parse_attacks(attacks) if attack.kind != "clean"]
    with undisturbed(model):
        ((_, x, y),) = numbered(model, [(x, y)])
        check_labels(y, classes_of(model, x))
        with torch.no_grad():
            clean = _seen(x, output_at(model, x))
        ends: dict[str, list[Seen]] = {}
        for attack in chosen:
            seen = list(clean)
            for _, left, points, logits, _ in starts(model, x, y, attack, ball, derived_seed(seed, 0)):
                for place, each in zip(left.tolist(), _seen(points, logits), strict=True):
                    seen[place] = each
            ends[attack.name] = seen
    numbers = range(len(y)) if index is None else index.tolist()
    return [
        Example(number, label, clean[i], {name: seen[i] for name, seen in ends.items()})
        for i, (number, label) in enumerate(zip(numbers, y.tolist(), strict=True))
    ]


def _seen(x: Tensor, logits: Tensor) -> list[Seen]:
    probability, prediction = checks.logits(logits, len(x), "model(x)").float().softmax(dim=1).max(dim=1)
    rows = zip(x.detach().float().cpu(), prediction.tolist(), probability.tolist(), strict=True)
    return [Seen(*row) for row in rows]
