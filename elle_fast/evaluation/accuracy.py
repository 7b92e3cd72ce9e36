"""Accuracy of a model, clean and under attack, and its E_lin: in eval mode, seeded, leaving no trace on the model."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from elle_fast import LocalLinearity
from elle_fast._core import checks
from elle_fast._core.seeds import derived_seed
from elle_fast.data import Split
from elle_fast.evaluation.chunks import Chunks
from elle_fast.evaluation.names import BOUNDS, Attack, parse_attacks
from elle_fast.evaluation.points import attack_points
from elle_fast.evaluation.undisturbed import undisturbed

__all__ = ["BOUNDS", "Attack", "Outcome", "evaluate", "measure_e_lin", "outcomes", "parse_attacks", "worst_case"]


@dataclass(frozen=True, eq=False)
class Outcome:
    """What an attack did to each sample: ``robust`` is bool ``[restarts, N]``, right after the first 1, 2, ... starts.

    ``notes`` is what the attack itself warned of, as AutoAttack does of gradients that are zero.
    """

    robust: Tensor
    notes: list[str]

    def summary(self) -> dict[str, Any]:
        """``accuracy``, ``samples``, ``per_restart``, and ``notes`` with how often each came, if there are any."""
        per_restart = self.robust.double().mean(dim=1).tolist()
        found = {"accuracy": per_restart[-1], "samples": self.robust.shape[1], "per_restart": per_restart}
        # Notes that differ in their numbers alone are one.
        counted = Counter(re.sub(r"\d+(\.\d+)?%?", "N", note) for note in self.notes)
        return {**found, "notes": dict(counted)} if counted else found


def evaluate(
    model: nn.Module,
    split: Split,
    attack_list: Sequence[Attack],
    *,
    eps: float,
    batch_size: int = 256,
    seed: int = 0,
    advance: Callable[[int], None] | None = None,
    chunks: Chunks | None = None,
) -> dict[str, dict[str, Any]]:
    """Accuracy in [0, 1] under each attack: :func:`outcomes`, summed up.

    Returns:
        For each attack ``accuracy``, ``samples``, and ``per_restart``: the worst case over the first 1, 2, ... starts;
        ``notes`` if the attack warned of something.

    Raises:
        As :func:`outcomes`.
    """
    found = outcomes(
        model, split, attack_list, eps=eps, batch_size=batch_size, seed=seed, advance=advance, chunks=chunks
    )
    return {name: outcome.summary() for name, outcome in found.items()}


def outcomes(
    model: nn.Module,
    split: Split,
    attack_list: Sequence[Attack],
    *,
    eps: float,
    batch_size: int = 256,
    seed: int = 0,
    advance: Callable[[int], None] | None = None,
    chunks: Chunks | None = None,
) -> dict[str, Outcome]:
    """Which samples withstand each attack. A start attacks those that withstood the starts before it.

    Args:
        model: maps ``[B, C, H, W]`` in [0, 1] to logits. Its modes, buffers, gradients and ``requires_grad`` are
            afterwards what they were.
        split: the samples, on the model's device.
        attack_list: from :func:`parse_attacks`.
        eps: radius of the linf ball, in units of pixels in [0, 1].
        batch_size: samples at a time. The random starts depend on it.
        seed: of the random starts; torch's, NumPy's and Python's own generators are neither read nor moved.
        advance: called with the number of samples done, after each batch of each attack.
        chunks: finished batches, which are taken from it, and to which those that are done now are added.

    Raises:
        TypeError, ValueError: for a setting out of range.
        RuntimeError: if an attack leaves the eps ball or the image range, or changes the model.
    """
    eps = checks.real("eps", eps, low=0)
    checks.integer("batch_size", batch_size, low=1)
    results: dict[str, Outcome] = {}
    same = None if chunks is None else {"eps": eps, "seed": seed, "batch_size": batch_size, "samples": split.digest()}
    with undisturbed(model):
        for attack in attack_list:
            done: dict[str, Any] = {}
            if chunks is not None and same is not None:
                done = chunks.of(attack=attack.name, version=attack.version, **same)
            for first, x, y in _batches(split, batch_size):
                if str(first) not in done:
                    robust, notes = _attack_batch(model, x, y, attack, eps, derived_seed(seed, first))
                    done[str(first)] = {"robust": [_as_text(row) for row in robust], "notes": notes}
                    if chunks is not None:
                        chunks.save()
                if advance is not None:
                    advance(len(y))
            parts = [done[str(first)] for first in range(0, len(split), batch_size)]
            rows = ["".join(part["robust"][i] for part in parts) for i in range(attack.restarts)]
            robust = torch.tensor([[mark == "1" for mark in row] for row in rows])
            results[attack.name] = Outcome(robust, [note for part in parts for note in part["notes"]])
    return results


def worst_case(found: dict[str, Outcome]) -> dict[str, Any]:
    """``accuracy`` over the samples that withstand every attack, their number ``samples``, and the ``attacks``."""
    robust = torch.stack([outcome.robust[-1] for outcome in found.values()]).all(dim=0)
    return {"accuracy": robust.double().mean().item(), "samples": len(robust), "attacks": list(found)}


def measure_e_lin(model: nn.Module, split: Split, *, eps: float, batch_size: int = 256, seed: int = 0) -> float:
    """E_lin of the cross-entropy over a split, in eval mode; the same noise for the same seed."""
    generator = torch.Generator(split.images.device).manual_seed(seed)
    regulariser = LocalLinearity(eps, bounds=BOUNDS, generator=generator)
    total = torch.zeros((), dtype=torch.float64, device=split.images.device)
    with undisturbed(model), torch.no_grad():
        for _, x, y in _batches(split, batch_size):
            total += regulariser(model, x, y).double() * len(y)
    return float(total / len(split))


def _attack_batch(
    model: nn.Module, x: Tensor, y: Tensor, attack: Attack, eps: float, seed: int
) -> tuple[Tensor, list[str]]:
    """Which samples withstand the first 1, 2, ... restarts, bool ``[restarts, B]``, and the attack's notes."""
    robust = torch.zeros(attack.restarts, len(y), dtype=torch.bool, device=y.device)
    left = torch.arange(len(y), device=y.device)
    notes: list[str] = []
    for restart in range(attack.restarts):
        if len(left) == 0:
            break
        clean = x[left].contiguous(memory_format=torch.channels_last)
        points, said = attack_points(model, clean, y[left], eps, attack, derived_seed(seed, restart))
        notes += said
        with torch.no_grad():
            logits = model(points)
            # The largest of NaNs is the first, which would count as right wherever that is the label.
            finite = logits.isfinite().all(dim=1)
            right = (logits.argmax(dim=1) == y[left]) & finite
        if not finite.all():
            notes.append("logits that are not finite count as wrong")
        left = left[right]
        robust[restart, left] = True
    return robust, notes


def _batches(split: Split, batch_size: int) -> Iterator[tuple[int, Tensor, Tensor]]:
    """The number of the first sample, pixels float32 in [0, 1], and labels."""
    for first in range(0, len(split), batch_size):
        part = slice(first, first + batch_size)
        pixels = (split.images[part].float() / 255).contiguous(memory_format=torch.channels_last)
        yield first, pixels, split.labels[part]


def _as_text(row: Tensor) -> str:
    return "".join("1" if each else "0" for each in row.tolist())
