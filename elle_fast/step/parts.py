"""What a captured step takes from a criterion: its kinds of steps, its generators, and what a step leaves in it."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from elle_fast.criterion import Record, TrainingLoss
from elle_fast.weighing import LinearityLoss


class Parts:
    """A criterion and those inside it.

    Attributes:
        elle: the one with E_lin, which alone has steps of several kinds: the criterion itself, or inside it.
        losses: ``(model, x, target) -> loss`` of each kind of step.
        generators: sources of noise, other than torch's default ones.
    """

    def __init__(self, criterion: TrainingLoss) -> None:
        modules = list(criterion.modules())
        self._all = [module for module in modules if isinstance(module, TrainingLoss)]
        self.elle = next((module for module in self._all if isinstance(module, LinearityLoss)), None)
        kinds = ("full",) if self.elle is None else self.elle.kinds
        self.losses: dict[str, Callable[..., Tensor]] = {kind: partial(self._loss, criterion, kind) for kind in kinds}
        held = dict.fromkeys(getattr(module, "generator", None) for module in modules)
        self.generators = [each for each in held if isinstance(each, torch.Generator)]

    def _loss(self, criterion: TrainingLoss, kind: str, *batch: Any) -> Tensor:
        if self.elle is None:
            loss: Tensor = criterion(*batch)
            return loss
        with self.elle.of_kind(kind):
            loss = criterion(*batch)
        return loss

    def next_kind(self, model: nn.Module) -> str:
        """The kind of the next step: the one decision of a step that the host takes."""
        return "full" if self.elle is None else self.elle.next_kind(model)

    def finished(self, kind: str, model: nn.Module) -> None:
        """What the host does when a step of this kind has been launched."""
        if self.elle is not None:
            self.elle.finished(kind, model)

    @property
    def records(self) -> list[Record]:
        """What the last step left in each."""
        return [part.last for part in self._all]

    @records.setter
    def records(self, values: Iterable[Record]) -> None:
        for part, record in zip(self._all, values, strict=True):
            part.last = record


class Results(NamedTuple):
    """What a step gives."""

    loss: Tensor
    records: list[Record]
    measured: Tensor | None

    def copied(self) -> Results:
        """The same numbers in tensors of their own; one launch for all tensors of a dtype."""
        found = [self.loss, self.measured, *(record.output for record in self.records)]
        found += [each for record in self.records for each in record.stats.values()]
        tensors = {id(each): each for each in found if each is not None}  # E_lin on top has its base's logits, too
        copies = {key: torch.empty_like(each) for key, each in tensors.items()}
        for dtype in {each.dtype for each in tensors.values()}:
            alike = [key for key, each in tensors.items() if each.dtype == dtype]
            torch._foreach_copy_([copies[key] for key in alike], [tensors[key] for key in alike])
        records = [
            Record({name: copies[id(each)] for name, each in stats.items()}, copies.get(id(output)))
            for stats, output in self.records
        ]
        return Results(copies[id(self.loss)], records, copies.get(id(self.measured)))
