"""The rows of bench_train.py: trainings that take an epoch at a time, data and all."""

from __future__ import annotations

import io
import tempfile
import time
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from torch import Tensor, nn

from benchmarks.step.authors import AuthorsTrainer, loader
from elle_fast import ELLELoss
from elle_fast.data import Dataset, Split
from elle_fast.presets import FAST
from elle_fast.recipes import models
from elle_fast.recipes.config import TrainConfig
from elle_fast.recipes.distributed import Ranks
from elle_fast.recipes.run import Run
from elle_fast.recipes.train import _Loop

EPS, LAM = 8 / 255, 4000.0
# A small one keeps the weights near their start; it costs what any other does.
RATE = 1e-3
CLASSES = 10
# More than any benchmark takes, so that no schedule ends.
EPOCHS = 1000


@dataclass(frozen=True)
class Net:
    """A network, the pictures it sees, and how many batches an epoch of the benchmark has."""

    model: str
    width: int
    pixels: int
    batch: int
    batches: int

    def pictures(self) -> Dataset:
        """An epoch of random ones. What they show costs nothing; the size of the set costs nothing either."""
        generator = torch.Generator().manual_seed(0)
        count, shape = self.batch * self.batches, (3, self.pixels, self.pixels)
        images = torch.randint(256, (count, *shape), dtype=torch.uint8, generator=generator)
        split = Split(images, torch.randint(CLASSES, (count,), generator=generator))
        names = tuple(map(str, range(CLASSES)))
        return Dataset(name="random pictures", train=split, test=split, classes=names, augment=True)

    def built(self, device: torch.device) -> nn.Module:
        """The network as a plain loop has it: contiguous, without a layer that normalizes."""
        torch.manual_seed(0)
        shape = (3, self.pixels, self.pixels)
        return models.build(self.model, in_shape=shape, classes=CLASSES, width=self.width).to(device)


NETS = {
    "preact": Net("preact", 16, 32, 128, 8),
    "preactresnet18": Net("preactresnet18", 32, 32, 128, 2),
    "resnet50": Net("resnet50", 64, 64, 32, 2),
}
TINY = {name: Net(net.model, 2, 16, 4, 2) for name, net in NETS.items()}


@dataclass
class Training:
    """One row's training.

    Attributes:
        model, optimizer: what it holds in memory.
        epoch: trains for one epoch.
        recipe: what it is, of ``elle-fast train``.
    """

    model: nn.Module
    optimizer: torch.optim.Optimizer
    epoch: Callable[[], Any]
    recipe: Recipe | None = None


class Place(ExitStack):
    """Where trainings run, and what they hold until it is left.

    Args:
        device: of the models.
        workers: processes of torch's DataLoader.
    """

    def __init__(self, device: torch.device, workers: int = 0) -> None:
        super().__init__()
        self.device, self.workers = device, workers


@dataclass(frozen=True)
class Row:
    """A row of the table: what it is, and the training of a net; ``kinds`` of steps it has, timed apart.

    ``options``: of a :class:`Recipe`.
    """

    about: str
    make: Callable[[Net, Place], Training]
    kinds: tuple[str, ...] = ()
    options: dict[str, Any] = field(default_factory=dict)

    @property
    def compiled(self) -> bool:
        """Whether it is."""
        return bool(self.options.get("compile"))


def authors(net: Net, place: Place) -> Training:
    """The authors' trainer."""
    trainer = AuthorsTrainer(
        net.built(place.device),
        net.pictures().train,
        eps=EPS,
        lam=LAM,
        epochs=EPOCHS,
        batch_size=net.batch,
        rate=RATE,
        workers=place.workers,
    )
    return Training(trainer.model, trainer.optimizer, trainer.epoch)


def plain(net: Net, place: Place) -> Training:
    """A loop around ELLELoss as its users write it, with the authors' loader."""
    model, criterion = net.built(place.device), ELLELoss(EPS, LAM, adaptive=True)
    optimizer = torch.optim.SGD(model.parameters(), lr=RATE, momentum=0.9, weight_decay=5e-4)
    batches = loader(net.pictures().train, net.batch, workers=place.workers)

    def epoch() -> dict[str, float]:
        model.train()
        for x, y in batches:
            optimizer.zero_grad(set_to_none=True)
            loss = criterion(model, x.to(place.device), y.to(place.device))
            loss.backward()
            optimizer.step()
        return {name: value.item() for name, value in criterion.stats.items()}

    return Training(model, optimizer, epoch)


class _Timed:
    """A run's step, and the seconds within it so far."""

    def __init__(self, step: Callable[..., Any]) -> None:
        self.step, self.seconds = step, 0.0

    def __call__(self, *batch: Tensor, **options: Any) -> Any:
        began = time.perf_counter()
        found = self.step(*batch, **options)
        self.seconds += time.perf_counter() - began
        return found

    def __getattr__(self, name: str) -> Any:
        return getattr(self.step, name)


class Recipe:
    """``elle-fast train``: its loop, log and all, but for validation and checkpoints.

    ``after_steps``: seconds at the ends of epochs so far.
    """

    def __init__(self, net: Net, place: Place, **options: Any) -> None:
        config = TrainConfig(
            data="cifar10",
            model=net.model,
            width=net.width,
            batch_size=net.batch,
            eps=EPS,
            epochs=EPOCHS,
            learning_rate=RATE,
            validation=0,
            checkpoint_every=0,
            device=str(place.device),
            **options,
        )
        folder = Path(place.enter_context(tempfile.TemporaryDirectory()))
        self.run = Run(config.resolved(), net.pictures(), folder / "checkpoint.pt", Ranks(timeout=1.0))
        self.run.save = self._unsaved  # type: ignore[method-assign]
        self.loop = _Loop(self.run, folder, Console(file=io.StringIO()), None)
        place.enter_context(self.loop.log)
        self._steps, self._end, self.after_steps = _Timed(self.run._stepping), self.loop._end_epoch, 0.0
        self.run._stepping = self._steps  # type: ignore[assignment]
        self.loop._end_epoch = self._ended  # type: ignore[method-assign]

    @property
    def in_steps(self) -> float:
        """Seconds within its steps so far, as the host sees them."""
        return self._steps.seconds

    def epoch(self) -> None:
        """The loop's next epoch."""
        self.loop._epoch(lambda: False)

    def hold(self, kind: str) -> None:
        """The next steps are ``full`` or ``light``: lam is lam_max or 0, and no E_lin is a detection."""
        controller: Any = self.run.criterion.controller
        for name, value in {"lam": LAM if kind == "full" else 0.0, "count": 1e6, "mean": 1e6}.items():
            getattr(controller, name).fill_(value)

    def _ended(self) -> None:
        if self.run.device.type == "cuda":
            torch.cuda.synchronize()
        began = time.perf_counter()
        self._end()
        self.after_steps += time.perf_counter() - began

    def _unsaved(self) -> None:
        pass


def _recipe(about: str, *, kinds: tuple[str, ...] = (), **options: Any) -> Row:
    def make(net: Net, place: Place) -> Training:
        recipe = Recipe(net, place, **options)
        return Training(recipe.run.model, recipe.run.optimizer, recipe.epoch, recipe)

    return Row(about, make, kinds, options)


# The forms of `elle-fast train` that are compared, by what stands behind a row's name. In bf16 the triplets' pass is in
# fp32 by default.
FORMS: dict[str, tuple[str, dict[str, Any]]] = {
    "": ("", {}),
    " compiled": (", compiled", {"compile": True}),
    " bf16": (" in bf16", {"precision": "bf16"}),
    " bf16 compiled": (" in bf16, compiled", {"precision": "bf16", "compile": True}),
}
SAME = {" bf16 same": (" in bf16, the triplets too", {"precision": "bf16", "triplet_precision": "same"})}
KINDS = ("light", "full")

ROWS = {
    "authors": Row("the ELLE authors' CIFAR trainer of ELLE-A, restated: fp32, contiguous", authors),
    "plain": Row("a plain loop with ELLELoss (ELLE-A), torch's DataLoader: fp32, contiguous", plain),
    "elle-a": _recipe("elle-fast train, ELLE-A as Algorithm 1", method="elle-a"),
    **{
        f"fgsm{form}": _recipe(f"elle-fast train, FGSM{words}", method="fgsm", **options)
        for form, (words, options) in FORMS.items()
    },
    **{
        f"fast{form}": _recipe(f"elle-fast train, --fast{words}", kinds=KINDS, method="elle-a", **FAST, **options)
        for form, (words, options) in (FORMS | SAME).items()
    },
}
