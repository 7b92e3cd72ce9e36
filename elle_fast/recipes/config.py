"""The configuration of one training run."""

from __future__ import annotations

from dataclasses import asdict, dataclass, replace
from typing import Any

from elle_fast import data, methods
from elle_fast._core import checks
from elle_fast.evaluation.accuracy import parse_attacks
from elle_fast.recipes import models
from elle_fast.recipes.schedules import SCHEDULES


@dataclass(frozen=True)
class TrainConfig:
    """One run. ``None`` takes the schedule's, the model's or the data set's own value.

    ``eps`` is in units of pixels in [0, 1]. ``normalize``: whether the model's first layer subtracts the training
    images' per-channel mean and divides by their standard deviation. ``method``: one of
    :data:`elle_fast.methods.NAMES`, and ``lam`` the weight of its regulariser: lam of ELLE, lam_max of ELLE-A,
    also where they are added to another method, and else that method's own. ``clamp``: whether training points are
    clamped to [0, 1]. ``forward``, ``skip_below``, ``triplet_fraction``, ``lagged``, ``points`` (``"elle"`` or
    ``"five-point"``), ``triplets`` and ``alpha`` (``"uniform"`` or ``"half"``) are those of
    :class:`~elle_fast.ELLELoss`, for methods with E_lin. An epoch is as many optimiser steps as the training images
    have batches, for every method: of Free AT, which takes 8 on each batch in a row, the images are gone through once
    in 8 epochs.
    ``batch_size`` is of all processes together, and ``sync_batchnorm`` makes batch norm take its statistics over all
    their shares, which torch can on GPUs only. After each epoch ``watch`` test samples are attacked for the curves;
    after the last one ``eval_samples`` (``None``: all) by ``eval_attacks`` for the result.
    """

    data: str = "digits"
    root: str | None = None
    limit: int | None = None
    test_limit: int | None = None
    image_size: int | None = None
    model: str = "cnn"
    width: int | None = None
    normalize: bool = True
    method: str = "elle-a"
    eps: float = 8 / 255
    lam: float | None = None
    clamp: bool | None = None
    forward: str = "packed"
    skip_below: float | None = None
    triplet_fraction: float = 1.0
    lagged: bool = False
    points: str = "elle"
    triplets: int = 1
    alpha: str = "uniform"
    augment: bool | None = None
    schedule: str = "short"
    epochs: int | None = None
    learning_rate: float | None = None
    batch_size: int | None = None
    momentum: float = 0.9
    weight_decay: float = 5e-4
    seed: int = 0
    sync_batchnorm: bool = False
    device: str = "cpu"
    watch: int = 512
    eval_attacks: str = "clean,fgsm,pgd-20"
    eval_samples: int | None = None
    log_every: int = 10
    checkpoint_every: int = 200

    def resolved(self) -> TrainConfig:
        """The same run with every default filled in.

        Raises:
            TypeError, ValueError: naming the setting, what was expected and what was got.
        """
        checks.choice("data", self.data, data.NAMES)
        checks.choice("model", self.model, models.NAMES)
        method = methods.find(self.method)
        schedule = SCHEDULES[checks.choice("schedule", self.schedule, SCHEDULES)]
        checks.real("eps", self.eps, low=0)
        checks.real("momentum", self.momentum, low=0, high=1)
        checks.real("weight_decay", self.weight_decay, low=0)
        checks.integer("seed", self.seed, low=0, high=2**63 - 1)
        for name in ("watch", "log_every", "checkpoint_every"):
            checks.integer(name, getattr(self, name), low=1)
        for name in ("limit", "test_limit", "image_size", "width", "eval_samples"):
            if getattr(self, name) is not None:
                checks.integer(name, getattr(self, name), low=1)
        for name in ("normalize", "sync_batchnorm"):
            checks.flag(name, getattr(self, name))
        for name in ("clamp", "augment"):
            if getattr(self, name) is not None:
                checks.flag(name, getattr(self, name))
        parse_attacks(self.eval_attacks)
        lam = self.lam
        if lam is None and method.weight is not None:
            lam = method.weight(self.data, self.model, self.eps)
        # The criterion knows which of its options are right, and go together.
        methods.build(self.method, eps=self.eps, lam=lam, bounds=None, **self.levers())
        return replace(
            self,
            clamp=method.clamped if self.clamp is None else self.clamp,
            lam=lam,
            epochs=checks.integer("epochs", _or(self.epochs, schedule.epochs), low=1),
            batch_size=checks.integer("batch_size", _or(self.batch_size, schedule.batch_size), low=1),
            learning_rate=checks.real("learning_rate", _or(self.learning_rate, schedule.learning_rate), low=0),
        )

    def levers(self) -> dict[str, Any]:
        """The options of ELLELoss that were chosen here, without those that are its defaults anyway."""
        default = TrainConfig()
        given = {name: getattr(self, name) for name in methods.LEVERS}
        return {name: value for name, value in given.items() if value != getattr(default, name)}

    def identity(self) -> dict[str, Any]:
        """What must agree between a checkpoint and the run that resumes it: all but where the files and tensors are."""
        return {name: value for name, value in asdict(self).items() if name not in ("root", "device")}


def _or(value: float | None, default: float) -> float:
    return default if value is None else value
