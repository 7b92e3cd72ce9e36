"""What auto_lam.py trains on: data sets of images, and the table and the tokens of beyond_images.py."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.studies import beyond_images
from elle_fast import ELLELoss, TrainingStep
from elle_fast.data import Dataset, in_order, load
from elle_fast.evaluation import evaluate, measure_e_lin
from elle_fast.recipes import models
from elle_fast.recipes.schedules import learning_rate

_TEST, _STRONG = 500, 200
Cell = Any  # an Images or a Vectors: they have the same methods


@dataclass(frozen=True)
class Images:
    """A data set of images, its model, and how it is trained: SGD under the Short schedule."""

    name: str
    data: str
    eps: float
    lam: float  # lam_max of ELLE-A, tuned
    seeds: tuple[int, ...]
    model: str
    width: int
    epochs: int
    learning_rate: float
    batch_size: int = 128
    weight_decay: float = 5e-4
    root: str | None = None  # a file in the data's folder
    limit: int | None = None

    def load(self, folder: Path | None, seed: int) -> Dataset:
        """The images, the same for all seeds; of the digits all."""
        root = None if self.root is None or folder is None else folder / self.root
        return _read(self.data, root, self.limit, None if self.root is None else _TEST)

    def build(self, dataset: Dataset, seed: int) -> nn.Module:
        """Fresh weights."""
        torch.manual_seed(seed)
        shape, classes = tuple(dataset.train.images.shape[1:]), len(dataset.classes)
        given: dict[str, Any] = {"mean": dataset.mean, "std": dataset.std, "width": self.width}
        return models.build(self.model, in_shape=shape, classes=classes, **given)

    def steps(self, criterion: ELLELoss, model: nn.Module, dataset: Dataset, seed: int) -> Iterator[None]:
        """Train, a step at a time."""
        split = dataset.train
        optimizer = torch.optim.SGD(model.parameters(), 0.0, momentum=0.9, weight_decay=self.weight_decay)
        step, total = TrainingStep(criterion, model, optimizer), self.epochs * (len(split) // self.batch_size)
        for at, rows in enumerate(_batches(len(split), self.batch_size, self.epochs, seed)):
            optimizer.param_groups[0]["lr"] = learning_rate("short", self.learning_rate, at, total)
            step(split.images[rows].float() / 255, split.labels[rows])
            yield

    def test(self, model: nn.Module, dataset: Dataset) -> dict[str, float]:
        """Accuracies in [0, 1], and E_lin."""
        found = evaluate(model, in_order(dataset.test), "clean,fgsm,pgd-20", eps=self.eps)
        e_lin = measure_e_lin(model, in_order(dataset.test), eps=self.eps)
        return {**{name: numbers["accuracy"] for name, numbers in found.items()}, "e_lin": e_lin}

    def strong(self, model: nn.Module, dataset: Dataset) -> float:
        """Accuracy under PGD-50-10 on the first samples."""
        found = evaluate(model, in_order(dataset.test[:_STRONG]), "pgd-50-10", eps=self.eps)
        return float(found["pgd-50-10"]["accuracy"])


@dataclass(frozen=True)
class Vectors:
    """A table or tokens: an example of benchmarks/studies/beyond_images.py, trained as there."""

    example: beyond_images.Example
    lam: float = 4_000.0
    seeds: tuple[int, ...] = tuple(range(8))  # so many, as they differ a lot and cost little

    @property
    def name(self) -> str:
        """The example's."""
        return self.example.name

    @property
    def eps(self) -> float:
        """The example's."""
        return self.example.eps

    def load(self, folder: Path | None, seed: int) -> tuple[beyond_images.Data, beyond_images.Data]:
        """The split of a seed."""
        return self.example.load(seed)

    def build(self, dataset: Any, seed: int) -> nn.Module:
        """Fresh weights."""
        torch.manual_seed(seed)
        return self.example.build()

    def steps(self, criterion: ELLELoss, model: nn.Module, dataset: Any, seed: int) -> Iterator[None]:
        """Train, a step at a time."""
        example, (train, _) = self.example, dataset
        optimizer = torch.optim.Adam(model.parameters(), example.learning_rate)
        total = example.epochs * (len(train.x) // example.batch_size)
        schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, example.learning_rate, total_steps=total)
        step = TrainingStep(lambda model, x, y: criterion(*beyond_images.bind(model, x), y), model, optimizer)
        for rows in _batches(len(train.x), example.batch_size, example.epochs, seed):
            step(train.x[rows], train.y[rows])
            schedule.step()
            yield

    def test(self, model: nn.Module, dataset: Any) -> dict[str, float]:
        """Accuracies in [0, 1], and E_lin."""
        found = beyond_images.evaluate(replace(self.example, pgd_steps=20, pgd_restarts=1), model, dataset[1])
        return {"pgd-20" if name == "pgd" else name: value for name, value in found.items()}

    def strong(self, model: nn.Module, dataset: Any) -> float:
        """Accuracy under PGD-50-10 on the first samples."""
        test = beyond_images.Data(*(part[:_STRONG] for part in dataset[1]))
        return beyond_images.evaluate(replace(self.example, pgd_steps=50, pgd_restarts=10), model, test)["pgd"]


_read = cache(lambda name, root, limit, test_limit: load(name, root, limit=limit, test_limit=test_limit))


def _batches(samples: int, size: int, epochs: int, seed: int) -> Iterator[Tensor]:
    shuffle = torch.Generator().manual_seed(seed)
    for _ in range(epochs):
        yield from torch.randperm(samples, generator=shuffle)[: samples // size * size].split(size)
