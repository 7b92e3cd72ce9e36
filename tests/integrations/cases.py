"""Small pictures, a small model, and the plain loop that each adapter is compared with."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from elle_fast import AdaptiveLambda, CollapseGuard, ELLELoss
from tests.helpers import labels, random

EPS, B, CLASSES = 0.05, 8, 3
MEAN, STD = (0.4,), (0.25,)
# Of a guard: numbers of three steps, read in the fourth, are above 0. It goes back to step 1, its only snapshot, and
# adds E_lin in steps 5 to 7; the next alarm would be in step 10.
ALARM: dict[str, Any] = {"every": 1, "horizon": 3, "threshold": 0.0, "margin": 3, "rescue_steps": 3}
# Looks, keeps and probes in every other step, and finds nothing.
CALM: dict[str, Any] = {"every": 2, "threshold": 1.0, "probe_every": 2, "margin": 2, "snapshot_every": 2}


def net(seed: int = 0) -> nn.Sequential:
    """With batch norm, whose statistics a pass too many would change, and with dropout, which draws."""
    torch.manual_seed(seed)
    return nn.Sequential(
        nn.Flatten(), nn.Linear(36, 16), nn.BatchNorm1d(16), nn.ReLU(), nn.Dropout(0.2), nn.Linear(16, CLASSES)
    )


def data(batches: int, size: int = B) -> TensorDataset:
    n = batches * size
    return TensorDataset(random(n, 1, 6, 6, seed=3), labels(n, CLASSES, seed=4))


def loader(batches: int, size: int = B) -> DataLoader[Any]:
    """In order. Its own generator: a loader's iterator draws a number from torch's otherwise."""
    return DataLoader(data(batches, size), batch_size=size, generator=torch.Generator())


def criterion(**options: Any) -> ELLELoss:
    """ELLE-A whose lam is above 0 from the first step on, and decays or jumps."""
    return ELLELoss(EPS, AdaptiveLambda(10.0, min_history=1, sensitivity=0.1, start=5.0), **options)


def sgd(parameters: Iterable[nn.Parameter]) -> torch.optim.SGD:
    return torch.optim.SGD(parameters, lr=0.1, momentum=0.9)


class Noted:
    """What a criterion reports of each call, by a hook."""

    def __init__(self, loss: nn.Module) -> None:
        self.losses: list[Tensor] = []
        self.lams: list[Tensor] = []
        loss.register_forward_hook(self._note)

    def _note(self, module: Any, inputs: Any, output: Tensor) -> None:
        self.losses.append(output.detach().clone())
        self.lams.append(module.stats.get("lam", torch.zeros(())))


def plain(
    model: nn.Module,
    loss_of: Any,
    batches: Iterable[Any],
    *,
    parts: int = 1,
    autocast: torch.dtype | None = None,
    optimizer: torch.optim.Optimizer | None = None,
    clip: float | None = None,
    guard: CollapseGuard | None = None,
) -> list[Tensor]:
    """The losses of the loop that a user writes by hand."""
    optimizer = optimizer or sgd(model.parameters())
    losses = []
    for i, (x, y) in enumerate(batches):
        with loss_of.frozen(i % parts > 0), torch.autocast("cpu", autocast, enabled=autocast is not None):
            loss = loss_of(model, x, y)
            losses.append(loss.detach().clone())
            if guard is not None:
                loss = loss + guard.penalty(x, y)
        (loss / parts).backward()
        if (i + 1) % parts == 0:
            if clip is not None:
                nn.utils.clip_grad_norm_(model.parameters(), clip)
            optimizer.step()
            if guard is not None:
                guard.step(x, y)
            optimizer.zero_grad()
    return losses


def guarded(model: nn.Module, loss_of: Any, batches: Iterable[Any], **options: Any) -> tuple[list[Tensor], Any]:
    """The plain loop with a guard that raises an alarm, and the guard."""
    optimizer = options.pop("optimizer", None) or sgd(model.parameters())
    guard = CollapseGuard(model, optimizer, eps=EPS, bounds=None, lam=loss_of.lam, also=[loss_of], **ALARM)
    return plain(model, loss_of, batches, optimizer=optimizer, guard=guard, **options), guard


def held_out() -> tuple[Tensor, Tensor]:
    return random(12, 1, 6, 6, seed=5), labels(12, CLASSES, seed=6)


def same(one: Iterable[Tensor], other: Iterable[Tensor]) -> bool:
    one, other = list(one), list(other)
    return len(one) == len(other) > 0 and all(map(torch.equal, one, other))


def state(module: nn.Module) -> list[Tensor]:
    return [value.clone() for value in module.state_dict().values()]
