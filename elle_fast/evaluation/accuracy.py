"""Accuracy of a model, clean and under attack, and its E_lin: in eval mode, seeded, leaving no trace on the model."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from elle_fast import LocalLinearity
from elle_fast._core import checks
from elle_fast._core.digests import digest_of
from elle_fast._core.seeds import derived_seed
from elle_fast._core.unwrapping import output_at
from elle_fast.evaluation.chunks import Chunks
from elle_fast.evaluation.inputs import watched
from elle_fast.evaluation.names import BOUNDS, DEFAULT_ATTACKS, Attack, Ball, parse_attacks, radius
from elle_fast.evaluation.points import attack_points
from elle_fast.evaluation.samples import Batches, are_right, as_fits, check_labels, classes_of, laid_out, numbered
from elle_fast.evaluation.undisturbed import undisturbed

MAX_SEED = 2**63 - 1


@dataclass(frozen=True, eq=False)
class Outcome:
    """What an attack did: ``robust`` is bool ``[restarts, N]``, the samples still right after 1, 2, ... starts.

    ``notes`` holds the attack's own warnings, such as AutoAttack's about zero gradients.
    """

    robust: Tensor
    notes: list[str]

    def __post_init__(self) -> None:
        robust = self.robust
        if not isinstance(robust, Tensor) or robust.dtype != torch.bool or robust.dim() != 2 or 0 in robust.shape:
            raise TypeError(f"robust: expected a bool tensor [restarts, N], got {checks.describe(robust)}")

    def summary(self) -> dict[str, Any]:
        """``accuracy``, ``samples``, ``per_restart``, and ``notes`` with how often each came, if there are any."""
        samples = self.robust.shape[1]
        per_restart = [right / samples for right in self.robust.sum(dim=1).tolist()]
        found = {"accuracy": per_restart[-1], "samples": samples, "per_restart": per_restart}
        # Notes that differ only in their numbers count as one.
        counted = Counter(re.sub(r"\d+(\.\d+)?%?", "N", note) for note in self.notes)
        return {**found, "notes": dict(counted)} if counted else found


def evaluate(
    model: nn.Module,
    batches: Batches,
    attacks: str | Iterable[Attack] = DEFAULT_ATTACKS,
    *,
    eps: float,
    norm: str = "linf",
    seed: int = 0,
    advance: Callable[[int], None] | None = None,
    chunks: Chunks | None = None,
    check: bool = True,
) -> dict[str, dict[str, Any]]:
    """Accuracy under each attack, a summary of :func:`outcomes`, which explains the other arguments and errors.

    Args:
        check: warn (UserWarning) if the model seems to take normalized inputs, which
            :func:`~elle_fast.evaluation.check_inputs` asks on up to 256 samples of the first batch.

    Returns:
        For each attack ``accuracy`` in [0, 1], ``samples``, and ``per_restart``: the worst case over the first 1, 2,
        ... starts; ``notes`` if the attack warned of something.
    """
    if checks.flag("check", check) and isinstance(batches, Iterable) and not isinstance(batches, Tensor):
        batches = watched(model, batches)
    found = outcomes(model, batches, attacks, eps=eps, norm=norm, seed=seed, advance=advance, chunks=chunks)
    return {name: outcome.summary() for name, outcome in found.items()}


def outcomes(
    model: nn.Module,
    batches: Batches,
    attacks: str | Iterable[Attack] = DEFAULT_ATTACKS,
    *,
    eps: float,
    norm: str = "linf",
    seed: int = 0,
    advance: Callable[[int], None] | None = None,
    chunks: Chunks | None = None,
) -> dict[str, Outcome]:
    """Which samples withstand each attack. Each restart attacks those that withstood the starts before it.

    All attacks see a batch before the next one is read, so ``batches`` may be shuffled. Where the device is out of
    memory for a batch, an attack takes its halves, as if they were batches, and a note says so.

    Args:
        model: maps ``[B, ...]`` in [0, 1] to logits ``[B, C]``.
        batches: pairs (x, y) on the model's device, x floating ``[B, ...]`` in [0, 1], y int64 ``[B]``. The random
            starts depend on the sizes of the batches.
        attacks: names, or what :func:`parse_attacks` returns.
        eps: radius of the ball, in units of x; in linf at most 1.
        norm: ``"linf"`` or ``"l2"``.
        seed: of the random starts, in ``[0, 2**63)``.
        advance: called with the number of samples done, after each attack on each batch.
        chunks: holds finished batches, which are not attacked again; new ones are added.

    Raises:
        TypeError, ValueError: for a setting out of range, a batch of another form, a label that is no class of the
            model, or a model whose output is no tensor of logits.
        ImportError: if a package that an attack needs is not installed.
        RuntimeError: if an attack leaves the eps ball or the image range, or changes the model.
    """
    ball = Ball(radius(eps, norm), norm)
    checks.integer("seed", seed, low=0, high=MAX_SEED)
    checks.optional("advance", advance, Callable, "a function of a number")
    checks.optional("chunks", chunks, Chunks, "Chunks")
    chosen = parse_attacks(attacks)
    finished: dict[Attack, dict[str, Any]] = {
        each: {} if chunks is None else chunks.of(attack=each.name, version=each.version, **ball._asdict(), seed=seed)
        for each in chosen
    }
    parts: dict[Attack, list[dict[str, Any]]] = {each: [] for each in chosen}
    classes = 0
    with undisturbed(model):
        for first, x, y in numbered(model, batches):
            key = str(first)
            if chunks is not None:
                key += " " + digest_of(f"{x.dtype} {list(x.shape)}".encode(), x, y)
            for attack, done in finished.items():
                if not _fits(done.get(key), attack, y):
                    classes = classes or classes_of(model, x)
                    check_labels(y, classes)
                    done[key] = _attacked(model, first, x, y, attack, ball, seed)
                    if chunks is not None:
                        chunks.save()
                parts[attack].append(done[key])
                if advance is not None:
                    advance(len(y))
    return {attack.name: _joined(found) for attack, found in parts.items()}


def worst_case(found: dict[str, Outcome]) -> dict[str, Any]:
    """``accuracy`` over the samples that withstand every attack, their number ``samples``, and the ``attacks``.

    The undisturbed sample counts where ``clean`` is among the attacks.
    """
    robust = withstanding(found)
    return {"accuracy": robust.double().mean().item(), "samples": len(robust), "attacks": list(found)}


def withstanding(found: dict[str, Outcome]) -> Tensor:
    """The samples that withstand every attack, bool ``[N]`` on the CPU; TypeError or ValueError unless they fit."""
    if not isinstance(found, dict) or not found or not all(isinstance(each, Outcome) for each in found.values()):
        raise TypeError(f"found: expected the outcomes of at least one attack by name, got {checks.describe(found)}")
    if len(samples := {outcome.robust.shape[1] for outcome in found.values()}) > 1:
        raise ValueError(f"found: expected outcomes of the same samples, got {sorted(samples)} of them")
    return torch.stack([outcome.robust[-1] for outcome in found.values()]).all(dim=0)


def measure_e_lin(model: nn.Module, batches: Batches, *, eps: float, norm: str = "linf", seed: int = 0) -> float:
    """E_lin of the cross-entropy in eval mode, averaged over the samples; arguments and errors as :func:`outcomes`."""
    eps = radius(eps, norm)
    checks.integer("seed", seed, low=0, high=MAX_SEED)
    generator, total, count = None, 0.0, 0
    with undisturbed(model), torch.no_grad():
        for _, x, y in numbered(model, batches):
            if generator is None:
                generator = torch.Generator(x.device).manual_seed(seed)
                regularizer = LocalLinearity(eps, norm=norm, bounds=BOUNDS, generator=generator)
            total += sum(as_fits(partial(_summed, regularizer, model), 0, x, y))
            count += len(y)
    return total / count


def _summed(regularizer: LocalLinearity, model: nn.Module, _: int, x: Tensor, y: Tensor) -> float:
    """E_lin times the number of samples."""
    e_lin: float = regularizer(model, x, y).item()
    return e_lin * len(y)


def _attacked(
    model: nn.Module, first: int, x: Tensor, y: Tensor, attack: Attack, ball: Ball, seed: int
) -> dict[str, Any]:
    """A batch, as :func:`_attack_batch`, or its parts that fit into memory."""

    def attacked(first: int, x: Tensor, y: Tensor) -> dict[str, Any]:
        return _attack_batch(model, x, y, attack, ball, derived_seed(seed, first))

    parts = as_fits(attacked, first, x, y)
    notes = [f"out of memory for {len(y)} samples at a time"] if len(parts) > 1 else []
    return {
        "robust": ["".join(rows) for rows in zip(*(part["robust"] for part in parts), strict=True)],
        "notes": notes + [note for part in parts for note in part["notes"]],
    }


def starts(
    model: nn.Module, x: Tensor, y: Tensor, attack: Attack, ball: Ball, seed: int
) -> Iterator[tuple[int, Tensor, Tensor, Tensor, list[str]]]:
    """Yields for each start its number, which samples it attacks (int64), their points and logits, and notes.

    A start attacks the samples that are still right after those before it; the last one may be missing.
    """
    left = torch.arange(len(y), device=y.device)
    for restart in range(attack.restarts):
        if len(left) == 0:
            break
        points, notes = attack_points(model, laid_out(x[left]), y[left], ball, attack, derived_seed(seed, restart))
        with torch.no_grad():
            logits = checks.logits(output_at(model, points), len(left), "model(x)")
        yield restart, left, points, logits, notes
        left = left[are_right(logits, y[left])]


def _attack_batch(model: nn.Module, x: Tensor, y: Tensor, attack: Attack, ball: Ball, seed: int) -> dict[str, Any]:
    """JSON types: ``robust``, a text for 1, 2, ... starts, with a 1 for each sample that withstands them; ``notes``."""
    robust = torch.zeros(attack.restarts, len(y), dtype=torch.int64, device=y.device)
    notes: list[str] = []
    for restart, left, _, logits, said in starts(model, x, y, attack, ball, seed):
        notes += said
        if not logits.isfinite().all():
            notes.append("logits that are not finite count as wrong")
        robust[restart, left[are_right(logits, y[left])]] = 1
    return {"robust": ["".join(map(str, row)) for row in robust.tolist()], "notes": notes}


def _fits(part: Any, attack: Attack, y: Tensor) -> bool:
    """Whether a finished batch, which may come from a file, has the form that :func:`_attack_batch` gives it."""
    rows, notes = (part.get("robust"), part.get("notes")) if isinstance(part, dict) else (None, None)
    if not (isinstance(rows, list) and isinstance(notes, list) and all(isinstance(each, str) for each in rows + notes)):
        return False
    return len(rows) == attack.restarts and all(len(row) == len(y) and set(row) <= {"0", "1"} for row in rows)


def _joined(parts: list[dict[str, Any]]) -> Outcome:
    """The outcome of all batches."""
    rows = ["".join(texts) for texts in zip(*(part["robust"] for part in parts), strict=True)]
    robust = torch.tensor([[mark == "1" for mark in row] for row in rows], device="cpu")
    return Outcome(robust, [note for part in parts for note in part["notes"]])
