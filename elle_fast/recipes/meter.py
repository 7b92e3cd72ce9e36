"""The numbers of a run's steps: measured and summed on the device, where no step waits for them."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor

from elle_fast._core import devices
from elle_fast.criterion import TrainingLoss


class Meter:
    """What the last step measured, and the sums over an epoch's steps, in this process' shares of their batches.

    Attributes:
        names: of what is measured: the criterion's ``stats``, and ``correct``, how many points it classified right.
        last: ``[len(names)]`` on the device, of the last step: in float64, or in float32 where the device has none, so
            that counts are exact up to 2^24 at least.
        sums: ``[len(names)]``, since :meth:`clear`; ``None`` before the first step.
        steps, samples: that the sums are over.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.dtype = torch.float64 if devices.has_float64(device) else torch.float32
        self.names: tuple[str, ...] = ()
        self.last = torch.empty(0)
        self.clear()

    def clear(self) -> None:
        """Begin a new epoch."""
        self.sums: Tensor | None = None
        self.steps = self.samples = 0

    def measure(self, criterion: TrainingLoss, target: Tensor) -> Tensor:
        """What a step measures once the criterion has been called; each step of a run has the same names."""
        assert criterion.output is not None
        # ``skipped``, ``full_steps`` and ``light_steps`` count over the whole run.
        stats = {name: value for name, value in criterion.stats.items() if name != "skipped" and name[-6:] != "_steps"}
        self.names = (*stats, "correct")
        classes = target if target.dim() == 1 else target.argmax(dim=1)  # of mixed labels, the one with most
        correct = (criterion.output.argmax(dim=1) == classes).sum()
        return torch.stack([value.to(self.dtype) for value in (*stats.values(), correct)])

    def add(self, measured: Tensor, samples: int) -> None:
        """Take in what a step measured on a batch of that many samples."""
        self.last = measured
        self.sums = measured.clone() if self.sums is None else self.sums.add_(measured)
        self.steps, self.samples = self.steps + 1, self.samples + samples

    def state(self) -> dict[str, Tensor]:
        """The sums by name, and what they are over, 0-dim on the CPU; empty before an epoch's first step."""
        if self.sums is None:
            return {}
        counts = {"samples": torch.tensor(self.samples), "steps": torch.tensor(self.steps)}
        return {**dict(zip(self.names, self.sums.cpu().unbind(), strict=True)), **counts}

    def restore(self, state: dict[str, Tensor]) -> None:
        """Go on from such a state."""
        self.clear()
        if state:
            sums = {name: value for name, value in state.items() if name not in ("samples", "steps")}
            self.names, self.sums = tuple(sums), torch.stack([*sums.values()]).to(self.device, self.dtype)
            self.samples, self.steps = int(state["samples"]), int(state["steps"])


def averages(names: tuple[str, ...], sums: list[float], steps: int, samples: int) -> dict[str, float]:
    """Means over that many steps and samples; ``train_adv`` is the accuracy at the points trained on."""
    total = dict(zip(names, sums, strict=True))
    train_adv = total.pop("correct") / samples
    return {**{name: value / steps for name, value in total.items()}, "train_adv": train_adv}


def ruined(values: Iterable[Tensor], dtype: torch.dtype) -> Tensor:
    """``[1]`` on their device: 0 if all numbers in them are finite, else 1."""
    kept = [value for value in values if value.is_floating_point() and value.numel()]
    # The largest number, as squares of large ones would not be finite.
    largest = torch.stack(torch._foreach_norm(kept, torch.inf))
    return largest.isfinite().all().logical_not().to(dtype).view(1)
