"""The guard of a run, on its validation images."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict
from typing import Any

import torch
from torch import Tensor, nn

from elle_fast import data, presets
from elle_fast._core.seeds import derived_seed
from elle_fast.criterion import TrainingLoss
from elle_fast.data.streaming import Stream
from elle_fast.evaluation import BOUNDS
from elle_fast.guard import CollapseGuard
from elle_fast.recipes.config import TrainConfig
from elle_fast.recipes.distributed import Ranks

HELD_OUT = 64  # of the validation images, on which PGD-10 takes 21 passes


def guard_of(
    config: TrainConfig,
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    validation: data.Split | Stream | None,
    average: nn.Module | None,
    criterion: TrainingLoss,
    ranks: Ranks,
    remarks: list[str],
) -> CollapseGuard | None:
    """The guard that a resolved run asks for; an alarm adds a line to ``remarks``."""
    if not config.guard:
        return None
    held_out = None
    if validation is not None:
        ((x, y),) = data.in_order(validation[: min(HELD_OUT, len(validation))], HELD_OUT)
        held_out = x, y
    lam = presets.weight("elle-a", config.data, eps=config.eps, model=config.model, image_size=config.image_size)
    assert lam is not None

    return CollapseGuard(
        model,
        optimizer,
        eps=config.eps,
        bounds=BOUNDS,
        norm=config.norm,
        held_out=held_out,
        also=[each for each in (average, None if criterion.per_sample else criterion) if each is not None],
        lam=lam,
        seed=derived_seed(config.seed, ranks.count, ranks.rank) if ranks.count > 1 else config.seed,
        on_alarm=lambda alarm: remarks.append(alarm.line("elle")),
    )


def guarded(called: Callable[..., Tensor], guard: CollapseGuard | None) -> Callable[..., Tensor]:
    """The criterion, and after an alarm E_lin beside it."""
    if guard is None:
        return called

    def loss_of(model: nn.Module, x: Tensor, target: Tensor, **options: Any) -> Tensor:
        return called(model, x, target, **options) + guard.penalty(x, target)

    return loss_of


def alarms(guard: CollapseGuard | None) -> dict[str, Any]:
    """For the result of a run with a guard."""
    return {} if guard is None else {"alarms": [asdict(alarm) for alarm in guard.alarms]}
