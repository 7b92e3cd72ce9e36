"""Shared by the tests of the levers: batches, layouts, and comparisons."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tests.helpers import labels, random

EPS, BATCH = 0.1, 4
IMAGES = (BATCH, 3, 8, 8)

# Layouts and options that decide how the batch is cut into forward passes.
LAYOUTS: list[dict[str, Any]] = [
    {},
    {"points": "elle-2p", "triplets": 2, "triplet_fraction": 0.5},
    {"points": "five-point", "attack": "n-fgsm"},
    {"triplets": 2, "alpha": "argmax", "triplet_fraction": 0.3},
]


def data(shape: tuple[int, ...] = IMAGES, seed: int = 1) -> tuple[Tensor, Tensor]:
    return random(*shape, seed=seed), labels(shape[0], 4, seed=seed)


def buffers_of(model: nn.Module) -> list[Tensor]:
    return [buffer.clone() for buffer in model.buffers()]


def same(one: list[Tensor], other: list[Tensor]) -> bool:
    return len(one) == len(other) and all(map(torch.equal, one, other))


def losses_of(output: Any, target: Tensor) -> Tensor:
    return F.cross_entropy(output, target, reduction="none")
