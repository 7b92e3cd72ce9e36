"""What elle_loss and local_linearity accept. Everything is checked here, once; inside, code trusts its arguments."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from elle_fast._core import checks
from elle_fast.ops import layout, philox


class Linearity(NamedTuple):
    """Every option of E_lin that is not a tensor. :meth:`checked` makes one; it travels as it is.

    Attributes:
        points, triplets: the layout, as given to :func:`elle_fast.functional.pack_points`.
        of: ``"loss"``, or ``"logits"``: r is taken of the logits, and penalised through its 2-norm over classes.
        penalty: ``"squared"``, ``"abs"`` (paper, Eq. 6) or ``"smooth_l1"`` (beta 1), applied to the residual.
        label_smoothing: as in :func:`torch.nn.functional.cross_entropy`, in ``[0, 1]``.
        adv: whether the logits begin with the rows of x_adv; no option of a call.
    """

    points: str = "elle"
    triplets: int = 1
    of: str = "loss"
    penalty: str = "squared"
    label_smoothing: float = 0.0
    adv: bool = True

    @classmethod
    def checked(cls, **options: Any) -> Linearity:
        """The options of one or many calls, for logits that begin with x_adv.

        Raises:
            TypeError, ValueError: naming the argument, what was expected and what was got.
        """
        given = cls(**options, adv=True)
        checks.choice("points", given.points, layout.BLOCKS)
        checks.choice("of", given.of, layout.TARGETS_OF_PENALTY)
        checks.choice("penalty", given.penalty, layout.PENALTIES)
        return given._replace(
            triplets=checks.integer("triplets", given.triplets, low=1, high=philox.MAX_TRIPLETS),
            label_smoothing=checks.real("label_smoothing", given.label_smoothing, low=0, high=1),
        )

    @property
    def alone(self) -> Linearity:
        """The same for the logits of triplets alone; those of ELLE-2p still begin with x_adv, which is their x_b."""
        return self._replace(adv=self.points == "elle-2p")

    @property
    def blocks(self) -> int:
        """Blocks of rows in each triplet."""
        return layout.BLOCKS[self.points]

    def adv_rows(self, target: Tensor) -> int:
        """Rows of x_adv that the logits begin with."""
        return target.shape[0] if self.adv else 0


class LamRule(NamedTuple):
    """How lam of ELLE-A moves: by Algorithm 1, lines 9 to 11, or with a ``rate`` above 0 by relative E_lin."""

    lam_max: float
    gamma: float
    sensitivity: float  # the paper's rule
    min_history: int
    threshold: float = 0.0  # of the mean of relative E_lin
    rate: float = 0.0  # the part of that mean that a step has

    @property
    def relative(self) -> bool:
        """Whether it is relative E_lin that an update takes in, and not E_lin."""
        return self.rate > 0


FIXED = LamRule(0.0, 0.0, 0.0, 0)  # without ELLE-A


class Sizes(NamedTuple):
    """The sizes of one call."""

    losses: int  # rows whose cross-entropy is needed
    residuals: int
    adv_rows: int  # rows of x_adv that the logits begin with
    part: int  # samples that the regulariser looks at
    saved: int  # numbers that the forward leaves to the backward: see triton.py, csrc/common/plans.h


def sizes_of(logits: Tensor, target: Tensor, alpha: Tensor, options: Linearity) -> Sizes:
    """The sizes of a call with such tensors."""
    adv_rows, residuals = options.adv_rows(target), alpha.shape[0]
    of_logits = options.of == "logits"
    losses = adv_rows if of_logits else logits.shape[0]
    saved = 4 * losses + (residuals if of_logits else losses) + 1
    return Sizes(losses, residuals, adv_rows, residuals // options.triplets, saved)


def check_tensors(logits: Tensor, target: Tensor, alpha: Tensor, options: Linearity) -> None:
    """Check shapes, dtypes and devices against each other."""
    checks.logits(logits, None)
    batch = target.shape[0] if isinstance(target, Tensor) and target.dim() else 0
    checks.target(target, batch, logits.device)
    if batch == 0:
        raise ValueError(f"target: expected at least one sample, got {checks.describe(target)}")
    checks.classes(target, logits)
    if not isinstance(alpha, Tensor) or not alpha.is_floating_point():
        raise TypeError(f"alpha: expected a floating-point tensor [triplets * Bt], got {checks.describe(alpha)}")
    residuals = alpha.numel()
    part = residuals // options.triplets
    whole = part * options.triplets == residuals
    if alpha.dim() != 1 or not whole or not 1 <= part <= batch or alpha.device != logits.device:
        raise ValueError(
            f"alpha: expected shape [triplets * Bt] with triplets = {options.triplets} and 1 <= Bt <= {batch} "
            f"on {logits.device}, got {checks.describe(alpha)}"
        )
    rows = options.adv_rows(target) + options.blocks * residuals
    if logits.shape[0] != rows:
        parts = f"{batch} (x_adv) + " if options.adv else ""
        raise ValueError(
            f"logits: expected {parts}{options.blocks} * {residuals} = {rows} rows for "
            f"points={options.points!r}, triplets={options.triplets}, got {checks.describe(logits)}"
        )


def check_relative(options: Linearity) -> None:
    """Relative E_lin is of three points on a line and of losses."""
    for name, expected in (("points", "elle"), ("of", "loss")):
        if (got := getattr(options, name)) != expected:
            raise ValueError(f"{name}: expected {expected!r} with relative E_lin (rule='relative'), got {got!r}")


def check_lam(lam: float | Tensor, device: torch.device) -> None:
    """A number >= 0, or a 0-dim floating tensor on the logits' device (whose value is not looked at)."""
    if isinstance(lam, Tensor):
        if lam.dim() != 0 or not lam.is_floating_point() or lam.device != device:
            raise ValueError(
                f"lam: expected a number >= 0 or a 0-dim floating-point tensor on {device}, got {checks.describe(lam)}"
            )
    else:
        checks.real("lam", lam, low=0)
