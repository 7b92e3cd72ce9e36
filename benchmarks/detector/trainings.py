"""The trainings that are recorded: images as `elle-fast train` has them, and tokens as in beyond_images.py."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor, nn

from benchmarks.detector.recorder import Bind, as_it_is
from benchmarks.paper.settings import SETTINGS, SMALL_DIGITS
from benchmarks.studies import beyond_images
from elle_fast import TrainingStep, attacks, data
from elle_fast.evaluation import BOUNDS, outcomes
from elle_fast.presets import FAST
from elle_fast.recipes import checkpoint
from elle_fast.recipes.config import TrainConfig
from elle_fast.recipes.distributed import Ranks
from elle_fast.recipes.run import Run

PROBED = 256  # samples held out of the training


class Training(Protocol):
    """One training as the recorder drives it, a step at a time."""

    model: nn.Module
    eps: float
    seed: int
    bounds: tuple[float, float] | None
    bind: Bind
    steps_per_epoch: int
    steps: int

    @property
    def step(self) -> int:
        """Steps taken."""

    def upcoming(self, steps: int) -> Iterator[tuple[Tensor, Tensor]]:
        """The batch of each of the next steps, of one epoch."""

    def take_step(self, x: Tensor, y: Tensor) -> None:
        """The step that comes next, which is then counted."""

    def lam(self) -> float:
        """Of the last step; 0 without ELLE."""

    def probe(self) -> tuple[float, float]:
        """Accuracy in eval mode, clean and under PGD-10, on the same held-out samples and from the same starts."""

    def save(self) -> None:
        """Keep what a stopped training goes on from; at the end of an epoch."""

    def discard(self) -> None:
        """Remove what was kept: the training is over."""

    def close(self) -> None:
        """Let go of processes and files."""


class ImageTraining:
    """A :class:`~elle_fast.recipes.run.Run` on the CPU, which goes on from its checkpoint if ``resumed``."""

    bounds: tuple[float, float] | None = BOUNDS

    def __init__(self, config: TrainConfig, dataset: data.Dataset, saved: Path, *, resumed: bool) -> None:
        self._saved, self._ranks = saved, Ranks(120.0)
        self._run = Run(replace(config, device="cpu").resolved(), dataset, saved, self._ranks)
        if resumed and saved.exists():
            self._run.restore(checkpoint.load(saved))
        assert self._run.validation is not None
        self._probed = self._run.validation[: min(PROBED, len(self._run.validation))]
        self.model, self.eps, self.seed = self._run.model, config.eps, config.seed
        self.bind: Bind = as_it_is
        self.steps_per_epoch, self.steps = self._run.plan.epoch_steps(0), self._run.steps

    @property
    def step(self) -> int:
        """Steps taken."""
        return self._run.step

    def upcoming(self, steps: int) -> Iterator[tuple[Tensor, Tensor]]:
        """The batch of each of the next steps."""
        self.model.train()
        return self._run.upcoming(steps)

    def take_step(self, x: Tensor, y: Tensor) -> None:
        """The step that comes next."""
        self._run.take_step(x, y)
        self._run.step += 1

    def lam(self) -> float:
        """Of the last step."""
        return float(self._run.criterion.stats.get("lam", 0.0))

    def probe(self) -> tuple[float, float]:
        """Accuracy clean and under PGD-10."""
        found = outcomes(self.model, data.in_order(self._probed), attacks="clean,pgd-10", eps=self.eps)
        clean, robust = (each.robust[-1].double().mean().item() for each in found.values())
        return clean, robust

    def save(self) -> None:
        """Write the checkpoint."""
        # A checkpoint has a row for each epoch that is over, and the meter's sums are of the one under way.
        self._run.meter.clear()
        row = {"step": self.step, "epoch": self.step // self.steps_per_epoch, "seconds": 0.0, "collapsed": False}
        unmeasured = dict.fromkeys(("train_adv", "val_clean", "val_pgd", "val_e_lin"), math.nan)
        self._run.history["epochs"].append({**row, **unmeasured})
        self._run.save()

    def discard(self) -> None:
        """Remove the checkpoint."""
        self._saved.unlink(missing_ok=True)

    def close(self) -> None:
        """End the group of one process."""
        self._ranks.close()


class TokenTraining:
    """The tokens of beyond_images.py, trained as there; of seconds, so it never goes on from anywhere."""

    bounds: tuple[float, float] | None = None
    step = 0

    def __init__(self, method: str, seed: int, epochs: int) -> None:
        example = replace(next(each for each in beyond_images.EXAMPLES if each.name == "tokens"), epochs=epochs)
        self._train, held_out = example.load(seed)
        self._probed = beyond_images.Data(*(part[:PROBED] for part in held_out))
        torch.manual_seed(seed)
        self.model, self.eps, self.seed = example.build(), example.eps, seed
        self.bind: Bind = beyond_images.bind
        self._criterion = beyond_images.METHODS[method](example.eps)
        self._batch = example.batch_size
        self.steps_per_epoch = len(self._train.x) // self._batch
        self.steps = epochs * self.steps_per_epoch
        optimizer = torch.optim.Adam(self.model.parameters(), example.learning_rate)
        self._schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, example.learning_rate, total_steps=self.steps)
        self._shuffle = torch.Generator().manual_seed(seed)
        self._step = TrainingStep(
            lambda model, x, y: self._criterion(*beyond_images.bind(model, x), y), self.model, optimizer
        )

    def upcoming(self, steps: int) -> Iterator[tuple[Tensor, Tensor]]:
        """The batches of an epoch, from its beginning."""
        self.model.train()
        order = torch.randperm(len(self._train.x), generator=self._shuffle)
        for rows in order[: steps * self._batch].split(self._batch):
            yield self._train.x[rows], self._train.y[rows]

    def take_step(self, x: Tensor, y: Tensor) -> None:
        """The step that comes next."""
        self._step(x, y)
        self._schedule.step()
        self.step += 1

    def lam(self) -> float:
        """Of the last step."""
        return float(getattr(self._criterion, "stats", {}).get("lam", 0.0))

    def probe(self) -> tuple[float, float]:
        """Accuracy clean and under PGD-10."""
        self.model.eval()
        bound, offset = beyond_images.bind(self.model, self._probed.x)
        generator = torch.Generator().manual_seed(0)
        x_adv = attacks.pgd(bound, offset, self._probed.y, self.eps, bounds=None, steps=10, generator=generator)
        with torch.no_grad():
            right = [(bound(each).argmax(1) == self._probed.y).double().mean().item() for each in (offset, x_adv)]
        self.model.train()
        return right[0], right[1]

    def save(self) -> None:
        """Nothing: it takes seconds to do again."""

    def discard(self) -> None:
        """Nothing was kept."""

    def close(self) -> None:
        """Nothing is open."""


@dataclass(frozen=True)
class Cell:
    """One training to record.

    Attributes:
        name: of its files: data, method, eps, epochs and seed.
        start: builds the training, from its own folder and whether it may go on from the checkpoint there.
        every: steps between probes.
        after: steps that are recorded after a collapse is certain; ``None``: to the end.
    """

    name: str
    start: Callable[[Path, bool], Training]
    every: int
    after: int | None = 200


Data = Callable[[TrainConfig], data.Dataset]


def cells(read: Data) -> list[Cell]:
    """All, the most valuable first; ``read`` is called when a cell starts."""
    base = replace(SETTINGS["cifar10-medium"].config, average=None, checkpoint_every=0)

    def cifar(method: str, eps: int, epochs: int = 15, seed: int = 0, every: int = 25) -> Cell:
        fast = FAST if "elle-a" in method else {}
        config = replace(base, method=method, eps=eps / 255, epochs=epochs, seed=seed, **fast)
        return of_images(config, read, every)

    found = [
        cifar("fgsm", 16),
        cifar("n-fgsm", 16, 30, every=100),
        cifar("fgsm", 16, seed=1),
        cifar("fgsm", 8),
        cifar("elle-a", 16, 30, every=100),
        cifar("rs-fgsm", 16),
        cifar("n-fgsm", 26, every=50),
        cifar("fgsm", 16, seed=2),
        cifar("fgsm", 26),
        cifar("n-fgsm", 8, every=100),
        cifar("zero-grad", 16),
        cifar("elle", 16, every=100),
        *(cifar(method, eps, seed=seed) for method in ("rs-fgsm", "fgsm") for eps in (8, 26) for seed in (0, 1, 2)),
        *(cifar(method, 16, seed=seed) for method in ("rs-fgsm", "zero-grad") for seed in (1, 2)),
        cifar("n-fgsm", 16, 30, seed=1, every=100),
        cifar("n-fgsm", 26, seed=1, every=50),
    ]
    small = [SMALL_DIGITS, replace(SETTINGS["mnist-small"].config, epochs=8)]
    names = ("fgsm", "n-fgsm", "elle-a")
    for config in small:
        for method in names:
            for seed in (0, 1, 2):
                found.append(of_images(replace(config, method=method, seed=seed, checkpoint_every=0), read, 25, None))
    found += [of_tokens(method, seed, epochs=60) for method in names for seed in (0, 1, 2)]
    return list({cell.name: cell for cell in found}.values())


def of_images(config: TrainConfig, read: Data, every: int, after: int | None = 200) -> Cell:
    """The cell of a configuration."""
    fast = "-fast" if config.skip_below is not None else ""
    kind = "cifar10" if config.data == "image-folder" else config.data
    name = f"{kind}-{config.method}{fast}-eps{255 * config.eps:g}-epochs{config.epochs}-seed{config.seed}"

    def start(folder: Path, resumed: bool) -> Training:
        return ImageTraining(config, read(config), folder / "checkpoint.pt", resumed=resumed)

    return Cell(name, start, every, after)


def of_tokens(method: str, seed: int, epochs: int) -> Cell:
    """That of the tokens, whose eps is in standard deviations of an embedding."""
    start = partial(TokenTraining, method, seed, epochs)
    return Cell(f"tokens-{method}-eps0.5-epochs{epochs}-seed{seed}", lambda folder, resumed: start(), 10, None)
