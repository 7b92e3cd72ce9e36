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

BLOCKS = {"elle": 3, "elle-2p": 2, "five-point": 5}
POINTS_CODE = {"elle": 0, "elle-2p": 1, "five-point": 2}  # as kernels know them
ALPHAS = ("uniform", "half")
NORMS = ("linf", "l2")
PENALTIES = ("squared", "abs", "smooth_l1")
TARGETS_OF_PENALTY = ("loss", "logits")

# Definition 3 of the paper: a fourth-order finite difference of the second derivative.
FIVE_POINT_WEIGHTS = (-1 / 12, 4 / 3, -5 / 2, 4 / 3, -1 / 12)


def triplet_rows(batch: int, fraction: float) -> int:
    """``Bt = ceil(fraction * B)``, the samples of the batch that the regulariser looks at."""
    if fraction == 1:
        return batch
    # A product that should be whole may round up (0.07 * 100 = 7.000000000000001); the factor takes that back.
    return min(batch, math.ceil(fraction * batch * (1 - 2.0**-50)))
