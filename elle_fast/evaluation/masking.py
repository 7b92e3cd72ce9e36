"""Looks for masked gradients: attacks that should not be clearly stronger than white-box PGD must not beat it.

Carlini et al. 2019, "On Evaluating Adversarial Robustness": where gradients are masked, accuracy keeps falling with
more steps, and attacks without gradients find what those with gradients miss.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from elle_fast._core import checks
from elle_fast.evaluation.accuracy import outcomes
from elle_fast.evaluation.chunks import Chunks
from elle_fast.evaluation.samples import Batches

WHITE_BOX, MORE_STEPS, BLACK_BOX, NOISE = ATTACKS = ("pgd-20", "pgd-200", "square-1000", "noise-100")
AUTOATTACK = "autoattack"
SAMPLES = 256
LEVEL = 0.01


def masking_check(
    model: nn.Module,
    batches: Batches,
    *,
    eps: float,
    norm: str = "linf",
    seed: int = 0,
    advance: Callable[[int], None] | None = None,
    chunks: Chunks | None = None,
    autoattack: Tensor | None = None,
) -> dict[str, Any]:
    """Compares PGD-20 with ten times its steps, 1,000 queries of Square, and 100 uniform draws.

    They are slow; :data:`SAMPLES` samples are enough, if they are the same for each model. An attack that beats PGD-20
    is suspicious if its p-value is below ``LEVEL`` divided by the number of attacks compared:

    - more steps and AutoAttack gain a little on every model. Fisher's exact test (one-sided) asks whether the gain
      exceeds the binomial noise of the two accuracies;
    - attacks without gradients are weaker on an honest model. The exact sign test takes the samples that only one of
      the two attacks turns; under its null hypothesis that is either one with probability 1/2.

    Args:
        model, batches, eps, norm, seed, advance, chunks: as in :func:`~elle_fast.evaluation.outcomes`.
        autoattack: which samples withstand AutoAttack, bool ``[N]``, if known.

    Returns:
        ``verdict`` ("ok", "suspicious", or "undecided": so few samples withstand PGD-20 that no attack could have been
        suspicious), ``samples``, ``level``, ``white_box`` (``attack``, ``accuracy``), and ``attacks``: for each
        ``accuracy``, ``turned_alone``, ``turned_by_white_box_alone`` (samples), ``p_value``, ``suspicious``,
        ``decidable``.

    Raises:
        ImportError: without pyautoattack. Else as :func:`~elle_fast.evaluation.outcomes`.
    """
    checks.optional("autoattack", autoattack, Tensor, "a bool tensor")
    ball: dict[str, Any] = {"eps": eps, "norm": norm}
    found = outcomes(model, batches, ",".join(ATTACKS), **ball, seed=seed, advance=advance, chunks=chunks)
    white_box = found[WHITE_BOX].robust[-1]
    others = {name: found[name].robust[-1] for name in ATTACKS[1:]}
    if autoattack is not None:
        if autoattack.dtype != torch.bool or autoattack.shape != white_box.shape:
            raise ValueError(f"autoattack: expected bool {list(white_box.shape)}, got {checks.describe(autoattack)}")
        others[AUTOATTACK] = autoattack.cpu()
    compared = {name: _compare(name, white_box, other) for name, other in others.items()}
    for name, row in compared.items():
        level = LEVEL / len(compared)
        row["suspicious"] = row["p_value"] < level
        # Could an attack that turns every sample be suspicious? If no sample withstands PGD-20, nothing can beat it.
        least = _compare(name, white_box, white_box & False)["p_value"]
        row["decidable"] = least < level or not white_box.any().item()
    verdict = "ok" if all(each["decidable"] for each in compared.values()) else "undecided"
    return {
        "verdict": "suspicious" if any(each["suspicious"] for each in compared.values()) else verdict,
        "samples": len(white_box),
        "level": LEVEL,
        "white_box": {"attack": WHITE_BOX, "accuracy": white_box.double().mean().item()},
        "attacks": compared,
    }


def _compare(name: str, white_box: Tensor, other: Tensor) -> dict[str, Any]:
    from scipy import stats

    alone, by_white_box = int((white_box & ~other).sum()), int((other & ~white_box).sum())
    if name in (MORE_STEPS, AUTOATTACK):
        table = [[int(each.sum()), int((~each).sum())] for each in (white_box, other)]
        p_value = float(stats.fisher_exact(table, alternative="greater").pvalue)
    elif alone + by_white_box == 0:
        p_value = 1.0
    else:
        p_value = float(stats.binomtest(alone, alone + by_white_box, alternative="greater").pvalue)
    return {
        "accuracy": other.double().mean().item(),
        "turned_alone": alone,
        "turned_by_white_box_alone": by_white_box,
        "p_value": p_value,
    }
