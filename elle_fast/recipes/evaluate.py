"""Accuracy of a model, clean and under attack, and its E_lin: in eval mode, seeded, leaving no trace on the model."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from elle_fast import LocalLinearity, attacks
from elle_fast.ops import checks
from elle_fast.recipes.data import Split

BOUNDS = (0.0, 1.0)


@dataclass(frozen=True)
class Attack:
    """``clean`` has no steps, ``fgsm`` one without a random start, ``pgd-k-r`` k steps of eps / 4 from r starts."""

    name: str
    steps: int
    restarts: int


def parse_attacks(text: str) -> list[Attack]:
    """``"clean,fgsm,pgd-20,pgd-50-10"`` as a list.

    Raises:
        ValueError: for any other name.
    """
    parsed = []
    for name in text.split(","):
        match = re.fullmatch(r"pgd-([1-9]\d*)(?:-([1-9]\d*))?", name.strip())
        if match:
            parsed.append(Attack(name.strip(), int(match[1]), int(match[2] or 1)))
        elif name.strip() in ("clean", "fgsm"):
            parsed.append(Attack(name.strip(), 0 if name.strip() == "clean" else 1, 1))
        else:
            raise ValueError(f"attacks: expected names among clean, fgsm, pgd-K and pgd-K-RESTARTS, got {name!r}")
    return parsed


def evaluate(
    model: nn.Module,
    split: Split,
    attack_list: Sequence[Attack],
    *,
    eps: float,
    batch_size: int = 256,
    seed: int = 0,
    advance: Callable[[int], None] | None = None,
) -> dict[str, dict[str, Any]]:
    """Accuracy in [0, 1] under each attack.

    Args:
        model: maps ``[B, C, H, W]`` in [0, 1] to logits. Its modes are restored, its buffers and gradients untouched.
        split: the samples, on the model's device.
        attack_list: from :func:`parse_attacks`.
        eps: radius of the linf ball, in units of pixels in [0, 1].
        batch_size: samples at a time.
        seed: of the random starts; torch's own generators are neither read nor moved.
        advance: called with the number of samples done, after each batch of each attack.

    Returns:
        For each attack ``accuracy``, ``samples``, and ``per_restart``: the worst case over the first 1, 2, ... starts.
    """
    eps = checks.real("eps", eps, low=0)
    checks.integer("batch_size", batch_size, low=1)
    results: dict[str, dict[str, Any]] = {}
    with _eval_mode(model):
        for attack in attack_list:
            generator = torch.Generator(split.images.device).manual_seed(seed)
            correct = torch.zeros(attack.restarts, dtype=torch.int64, device=split.images.device)
            for x, y in _chunks(split, batch_size):
                correct += _robust_counts(model, x, y, attack, eps, generator)
                if advance is not None:
                    advance(len(y))
            per_restart = (correct.double() / len(split)).tolist()
            results[attack.name] = {
                "accuracy": per_restart[-1],
                "samples": len(split),
                "per_restart": per_restart,
            }
    return results


def measure_e_lin(model: nn.Module, split: Split, *, eps: float, batch_size: int = 256, seed: int = 0) -> float:
    """E_lin of the cross-entropy over a split, in eval mode; the same noise for the same seed."""
    generator = torch.Generator(split.images.device).manual_seed(seed)
    regulariser = LocalLinearity(eps, bounds=BOUNDS, generator=generator)
    total = torch.zeros((), dtype=torch.float64, device=split.images.device)
    with _eval_mode(model), torch.no_grad():
        for x, y in _chunks(split, batch_size):
            total += regulariser(model, x, y).double() * len(y)
    return float(total / len(split))


def _robust_counts(
    model: nn.Module, x: Tensor, y: Tensor, attack: Attack, eps: float, generator: torch.Generator
) -> Tensor:
    """How many samples withstand the first 1, 2, ... restarts, ``[restarts]``."""
    counts = []
    robust = torch.ones_like(y, dtype=torch.bool)
    for _ in range(attack.restarts):
        if attack.name == "clean":
            point = x
        elif attack.name == "fgsm":
            point = attacks.fgsm(model, x, y, eps, bounds=BOUNDS)
        else:
            point = attacks.pgd(model, x, y, eps, steps=attack.steps, bounds=BOUNDS, generator=generator)
        with torch.no_grad():
            logits = model(point)
            # The largest of NaNs is the first, which would count as right wherever that is the label.
            robust &= (logits.argmax(dim=1) == y) & logits.isfinite().all(dim=1)
        counts.append(robust.sum())
    return torch.stack(counts)


def _chunks(split: Split, batch_size: int) -> Iterator[tuple[Tensor, Tensor]]:
    for first in range(0, len(split), batch_size):
        part = slice(first, first + batch_size)
        pixels = (split.images[part].float() / 255).contiguous(memory_format=torch.channels_last)
        yield pixels, split.labels[part]


@contextmanager
def _eval_mode(model: nn.Module) -> Iterator[None]:
    """Eval mode inside; afterwards each module is back in the mode it was in, which need not be its parent's."""
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        yield
    finally:
        for module, training in modes:
            module.training = training
