"""Measured after each epoch of a paper grid, besides E_lin: gradient misalignment, and E_lin in other forms."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from elle_fast import LocalLinearity, regularizers
from elle_fast.data import Split, in_order
from elle_fast.evaluation import BOUNDS
from elle_fast.evaluation.undisturbed import undisturbed

# The paper's appendix B.3 and Definition 3, as options of LocalLinearity.
FORMS: dict[str, dict[str, Any]] = {
    "one triplet": {},
    "two triplets": {"triplets": 2},
    "alpha = 1/2": {"alpha": "half"},
    "alpha = argmax": {"alpha": "argmax"},
    "five points": {"points": "five-point"},
}
FORM = "E_lin, "  # prefix of the forms' names in an epoch's row


def misalignment(model: nn.Module, split: Split, eps: float) -> dict[str, float]:
    """``misalignment``: the paper's Eq. 5, 1 - mean cos of the gradients at x and x + U[-eps, eps]^d, in [0, 2].

    In eval mode, in one batch, with the same noise for the same eps. x + eta is not clamped, as in the paper.
    """
    x, y = _batch(split)
    penalty = regularizers.GradAlign(eps, generator=_generator(x))
    with undisturbed(model):
        return {"misalignment": float(penalty(model, x, y).detach())}


def forms_of_e_lin(model: nn.Module, split: Split, eps: float) -> dict[str, float]:
    """:func:`misalignment`, and E_lin in each of :data:`FORMS` with the same noise (the paper's Fig. 18a)."""
    x, y = _batch(split)
    found = misalignment(model, split, eps)
    with undisturbed(model), torch.no_grad():
        for name, options in FORMS.items():
            regulariser = LocalLinearity(eps, bounds=BOUNDS, generator=_generator(x), **options)
            found[FORM + name] = float(regulariser(model, x, y))
    return found


def _batch(split: Split) -> tuple[torch.Tensor, torch.Tensor]:
    x, y = next(in_order(split, len(split)))
    return x.contiguous(memory_format=torch.channels_last), y


def _generator(x: torch.Tensor) -> torch.Generator:
    return torch.Generator(x.device).manual_seed(0)
