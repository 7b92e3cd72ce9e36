"""Whether a white-box number can be believed: attacks that ought to be weaker, or hardly stronger, must not beat it.

Carlini et al. 2019, "On Evaluating Adversarial Robustness": where gradients are masked, more steps go on gaining, and
attacks without gradients find what those with gradients do not.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor, nn

from elle_fast.data import Split
from elle_fast.data.memory import choose
from elle_fast.evaluation.accuracy import outcomes, parse_attacks
from elle_fast.evaluation.chunks import Chunks

WHITE_BOX, MORE_STEPS, BLACK_BOX, NOISE = ATTACKS = ("pgd-20", "pgd-200", "square-1000", "noise-100")
AUTOATTACK = "autoattack"
SAMPLES = 256
LEVEL = 0.01


def masking_check(
    model: nn.Module,
    split: Split,
    *,
    eps: float,
    batch_size: int = 256,
    seed: int = 0,
    advance: Callable[[int], None] | None = None,
    chunks: Chunks | None = None,
    autoattack: Tensor | None = None,
) -> dict[str, Any]:
    """PGD-20 against ten times its steps, 1,000 queries of Square, and 100 uniform draws, on at most 256 samples.

    The probability of what is seen, were the white-box attack as strong as the other one, decides: below ``LEVEL``
    over the number of attacks that are looked at it is suspicious. That probability is

    - for more steps and AutoAttack, which gain a little on every model: the one that, of the k_w + k_o samples that
      withstand the white-box attack or the other on two independent draws of n samples, k_w or more are the white-box
      attack's (Fisher's exact test): the gain is more than the binomial noise of the two accuracies;
    - for attacks without gradients, which are weaker on an honest model: the one that, of the samples that only one of
      the two attacks turns, as many or more are the other's, where each is equally likely either's (the exact sign
      test on pairs).

    Args:
        model, split, eps, batch_size, seed, advance, chunks: as in :func:`~elle_fast.evaluation.accuracy.outcomes`.
        autoattack: which samples of ``split`` withstand AutoAttack, bool ``[N]``, if that is known.

    Returns:
        ``verdict`` ("ok", "suspicious", or "undecided": too few samples withstand the white-box attack for one of the
        others to be found suspicious at all), ``samples``, ``level``, ``white_box`` (``attack``, ``accuracy``), and
        ``attacks``: for each ``accuracy``, ``turned_alone``, ``turned_by_white_box_alone`` (samples), ``p_value``,
        ``suspicious``, ``decidable``.

    Raises:
        ImportError: without pyautoattack. Else as :func:`~elle_fast.evaluation.accuracy.outcomes`.
    """
    kept = choose(len(split), SAMPLES if len(split) > SAMPLES else None)
    chosen = Split(*(tensor[kept.to(tensor.device)] for tensor in (split.images, split.labels)))
    attacks = parse_attacks(",".join(ATTACKS))
    found = outcomes(model, chosen, attacks, eps=eps, batch_size=batch_size, seed=seed, advance=advance, chunks=chunks)
    white_box = found[WHITE_BOX].robust[-1]
    others = {name: found[name].robust[-1] for name in ATTACKS[1:]}
    if autoattack is not None:
        others[AUTOATTACK] = autoattack[kept]
    compared = {name: _compare(name, white_box, other) for name, other in others.items()}
    for name, row in compared.items():
        level = LEVEL / len(compared)
        row["suspicious"] = row["p_value"] < level
        # By an attack that turns every sample. Where none withstands the white-box attack, nothing can beat it.
        least = _compare(name, white_box, white_box & False)["p_value"]
        row["decidable"] = least < level or not white_box.any().item()
    verdict = "ok" if all(each["decidable"] for each in compared.values()) else "undecided"
    return {
        "verdict": "suspicious" if any(each["suspicious"] for each in compared.values()) else verdict,
        "samples": len(chosen),
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
