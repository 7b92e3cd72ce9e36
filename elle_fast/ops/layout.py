"""How the rows of a packed batch are ordered; pack_points writes this order, elle_loss reads it.

The first ``B`` rows are the attack's points x_adv (left out when only the regulariser is wanted). Then, for each
triplet in turn, come blocks of ``Bt`` rows, where ``Bt <= B`` is the part of the batch that the regulariser looks at:

==============  ==============================================================================
points          blocks of one triplet
==============  ==============================================================================
``elle``        x_a, x_b, x_c                                            (paper, Algorithm 1)
``elle-2p``     x_a, x_c; x_b is x_adv, so x_adv is never left out       (paper, B.11)
``five-point``  x_a, (3 x_a + x_b)/4, (x_a + x_b)/2, (x_a + 3 x_b)/4, x_b    (paper, Definition 3)
==============  ==============================================================================

``alpha`` has one value per residual, ``[triplets * Bt]``, triplet by triplet.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

BLOCKS = {"elle": 3, "elle-2p": 2, "five-point": 5}
POINTS_CODE = {"elle": 0, "elle-2p": 1, "five-point": 2}  # as kernels know them
ALPHAS = ("uniform", "half")
NORMS = ("linf", "l2")
PENALTIES = ("squared", "abs", "smooth_l1")
TARGETS_OF_PENALTY = ("loss", "logits")

_CHANNELS_LAST = {4: torch.channels_last, 5: torch.channels_last_3d}

# Definition 3 of the paper: a fourth-order finite difference of the second derivative.
FIVE_POINT_WEIGHTS = (-1 / 12, 4 / 3, -5 / 2, 4 / 3, -1 / 12)


def triplet_rows(batch: int, fraction: float) -> int:
    """``Bt = ceil(fraction * B)``, the samples of the batch that the regulariser looks at."""
    if fraction == 1:
        return batch
    # A product that should be whole may round up (0.07 * 100 = 7.000000000000001); the factor takes that back.
    return min(batch, math.ceil(fraction * batch * (1 - 2.0**-50)))


def is_channels_last(tensor: Tensor) -> bool:
    """Whether the channels lie last in memory, and not first as well."""
    last = _CHANNELS_LAST.get(tensor.dim())
    return last is not None and not tensor.is_contiguous() and tensor.is_contiguous(memory_format=last)


def dense(tensor: Tensor, memory_format: torch.memory_format) -> tuple[Tensor, bool]:
    """The tensor as kernels read it, and whether its channels lie last in memory.

    A view with a flipped sign is resolved, and what is neither contiguous nor channels-last is copied to
    ``memory_format``.
    """
    if tensor.is_neg():
        tensor = tensor.resolve_neg()
    if tensor.is_contiguous():
        return tensor, False
    if is_channels_last(tensor):
        return tensor, True
    return dense(tensor.contiguous(memory_format=memory_format), memory_format)
