"""What changes from step to step of a run: learning rate, momentum and eps, as functions of the step alone."""

from __future__ import annotations

from itertools import pairwise
from typing import TYPE_CHECKING

from elle_fast._core import checks
from elle_fast.recipes import optimizers, schedules
from elle_fast.recipes.checked import parse_number
from elle_fast.recipes.phases import Plan

if TYPE_CHECKING:
    from elle_fast.recipes.config import TrainConfig

PER = ("step", "epoch")


class Course:
    """The course of a run whose epochs and steps are those of ``plan``; ``config`` is resolved.

    With ``steps_per_batch = n`` a step is n optimiser steps on one gradient. Short's rate is that of n moments from the
    beginning of the step to its end, so that it is torch's CyclicLR if the scheduler moves after the first of two. The
    other schedules have one rate a step.
    """

    def __init__(self, config: TrainConfig, plan: Plan) -> None:
        self.config, self.plan = config, plan
        self.by_epoch = config.rate_per == "epoch"
        self.length = plan.epochs if self.by_epoch else plan.steps
        # With phases the rate warms up over that many epochs of the first one's length.
        self.warmup = config.warmup if self.by_epoch else config.warmup * plan.epoch_steps(0)
        self.milestones = schedules.MILESTONES if config.milestones is None else milestones(config.milestones)
        self.knots = None if config.knots is None else knots(config.knots, plan.epochs)

    def rates(self, step: int) -> list[tuple[float, float]]:
        """Learning rate and momentum (AdamW's first beta) of each optimiser step of ``step``, from 0."""
        n = self.config.steps_per_batch
        if self.knots is not None:
            assert self.config.learning_rate is not None
            part = schedules.between(self.knots, self.plan.position(step + 1))
            return [(self.config.learning_rate * part, self.config.momentum)] * n
        moment = self.plan.place(step)[0] if self.by_epoch else step
        return [self._at(moment, each / (n - 1) if n > 1 else 0.5) for each in range(n)]

    def _at(self, moment: int, within: float) -> tuple[float, float]:
        config = self.config
        assert config.learning_rate is not None
        part, height = schedules.at(
            config.schedule,
            moment,
            self.length,
            peak=config.peak,
            milestones=self.milestones,
            warmup=self.warmup,
            within=within,
        )
        return config.learning_rate * part, config.momentum - config.momentum_cycle * height

    def eps(self, step: int) -> float:
        """The radius that ``step`` trains with: linear from 0 to ``config.eps`` in the first ``eps_warmup`` epochs."""
        warmup, epoch = self.config.eps_warmup, self.plan.position(step)
        if not warmup:
            return self.config.eps
        return self.config.eps * min(1.0, (epoch // 1 if self.config.eps_per == "epoch" else epoch) / warmup)


def milestones(text: str) -> list[float]:
    """``"1/2,3/4"`` as numbers.

    Raises:
        ValueError: unless they rise from above 0 to below 1.
    """
    expected = "milestones: expected rising parts of the run between 0 and 1, such as 1/2,3/4"
    try:
        found = [parse_number(part) for part in text.split(",")]
    except ValueError:
        raise ValueError(f"{expected}, got {text!r}") from None
    if any(later <= earlier for earlier, later in zip([0.0, *found], [*found, 1.0], strict=True)):
        raise ValueError(f"{expected}, got {text!r}")
    return found


def knots(text: str, epochs: int) -> list[tuple[float, float]]:
    """``"0:0,1:1,6:0.1"`` as epochs and the parts of the highest rate that are reached there.

    Raises:
        ValueError: unless the epochs rise from 0 to ``epochs``, and the parts are in [0, 1].
    """
    expected = "knots: expected EPOCH:PART, separated by commas, such as 0:0,1:1,15:0.001: epochs that rise"
    expected += f" from 0 to the run's {epochs}, parts of the highest rate in [0, 1]"
    try:
        found = [(parse_number(epoch), parse_number(part)) for epoch, part in (at.split(":") for at in text.split(","))]
    except ValueError:
        raise ValueError(f"{expected}, got {text!r}") from None
    moments, parts = zip(*found, strict=True)
    rising = all(later > earlier for earlier, later in pairwise(moments))
    if not rising or moments[0] != 0 or moments[-1] != epochs or not all(0 <= part <= 1 for part in parts):
        raise ValueError(f"{expected}, got {text!r}")
    return found


def check(config: TrainConfig) -> None:
    """Check the options of a resolved run's course, alone and together.

    Raises:
        TypeError, ValueError: naming the option.
    """
    checks.choice("optimizer", config.optimizer, optimizers.NAMES)
    checks.choice("decay", config.decay, optimizers.DECAYS)
    for name in ("rate_per", "eps_per"):
        checks.choice(name, getattr(config, name), PER)
    schedule = f"schedule {config.schedule!r}"
    cycles = schedules.SCHEDULES[config.schedule].peak is not None
    if config.peak is not None:
        if not cycles:
            raise ValueError(f"peak: {schedule} does not rise, so this option does not apply (got {config.peak:g})")
        if not 0 < config.peak < 1:
            raise ValueError(f"peak: expected a part of the run between 0 and 1, got {config.peak:g}")
    if config.milestones is not None:
        milestones(config.milestones)  # its own errors
        if config.schedule != "piecewise":
            why = f"{schedule} has none of its own to choose"
            raise ValueError(
                f"milestones: {why}, so this option does not apply (got {config.milestones!r}); piecewise takes it"
            )
    if (config.knots is None) == (config.schedule == "linear"):
        if config.knots is None:
            raise ValueError("knots: schedule 'linear' needs them, such as 0:0,1:1,15:0.001, got None")
        raise ValueError(
            f"knots: {schedule} has none, so this option does not apply (got {config.knots!r}); linear takes it"
        )
    if config.knots is not None:
        assert config.epochs is not None
        knots(config.knots, config.epochs)  # its own errors
        if config.warmup or config.rate_per != "step":
            named = f"warmup {config.warmup:g}" if config.warmup else f"rate_per {config.rate_per!r}"
            raise ValueError(f"knots: they say how the rate moves in each step, which contradicts {named}")
    if config.warmup and cycles:
        raise ValueError(f"warmup: {schedule} rises by itself, so this option does not apply (got {config.warmup:g})")
    if cycle := config.momentum_cycle:
        if not cycles:
            raise ValueError(f"momentum_cycle: {schedule} has no cycle, so this option does not apply (got {cycle:g})")
        if cycle >= config.momentum:
            raise ValueError(f"momentum_cycle: expected less than the momentum, {config.momentum:g}, got {cycle:g}")
    if config.eps_per == "epoch" and not config.eps_warmup:
        raise ValueError("eps_per: there is no eps_warmup, so this option does not apply (got 'epoch')")
    if config.optimizer == "adamw" and config.momentum >= 1:
        raise ValueError(f"momentum: expected AdamW's first beta below 1, got {config.momentum:g}")
    for name in ("warmup", "eps_warmup"):
        epochs = getattr(config, name)
        if epochs and epochs >= config.epochs:
            raise ValueError(f"{name}: expected less than the run's {config.epochs} epochs, got {epochs:g}")
