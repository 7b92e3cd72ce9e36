"""What elle_loss and local_linearity accept. Everything is checked here, once; inside, code trusts its arguments."""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.compiler import is_compiling

from elle_fast._core import checks
from elle_fast.ops import layout


class Linearity(NamedTuple):
    """The checked options of one call, in the order of the op's schema."""

    points: str
    triplets: int
    of: str
    penalty: str
    label_smoothing: float


class LamRule(NamedTuple):
    """How ELLE-A moves lam (paper, Algorithm 1, lines 9 to 11)."""

    lam_max: float
    gamma: float
    sensitivity: float
    min_history: int


FIXED = LamRule(0.0, 0.0, 0.0, 0)  # without ELLE-A


class Sizes(NamedTuple):
    """The sizes of one call."""

    losses: int  # rows whose cross-entropy is needed
    residuals: int
    first: int  # rows of x_adv that the logits begin with
    part: int  # samples that the regulariser looks at
    saved: int  # numbers that the forward leaves to the backward: see triton.py, csrc/common/plans.h


class Call(NamedTuple):
    """What the checks have found of a call; the same object for all calls that are alike."""

    options: Linearity
    sizes: Sizes
    first: bool  # whether the logits begin with the rows of x_adv
    dtypes: tuple[torch.dtype]  # of the logits
    wrapped: bool  # whether a tensor wraps others
    kept: dict[Any, Any]  # what a backend makes once for such calls


def sizes_of(logits: Tensor, target: Tensor, alpha: Tensor, options: Linearity, *, first: bool) -> Sizes:
    """The sizes of a call with such tensors; ``first`` as in :func:`check_tensors`."""
    first_rows, residuals = target.shape[0] if first else 0, alpha.shape[0]
    of_logits = options.of == "logits"
    losses = first_rows if of_logits else logits.shape[0]
    saved = 4 * losses + (residuals if of_logits else losses) + 1
    return Sizes(losses, residuals, first_rows, residuals // options.triplets, saved)


def linearity_options(
    *,
    points: str = "elle",
    triplets: int = 1,
    of: str = "loss",
    penalty: str = "squared",
    label_smoothing: float = 0.0,
) -> Linearity:
    """Check every option that is not a tensor."""
    return Linearity(
        points=checks.choice("points", points, layout.BLOCKS),
        triplets=checks.integer("triplets", triplets, low=1, high=checks.MAX_TRIPLETS),
        of=checks.choice("of", of, layout.TARGETS_OF_PENALTY),
        penalty=checks.choice("penalty", penalty, layout.PENALTIES),
        label_smoothing=checks.real("label_smoothing", label_smoothing, low=0, high=1),
    )


_SEEN: checks.Seen[Call] = checks.Seen()


def checked(
    logits: Tensor,
    target: Tensor,
    alpha: Tensor,
    points: str,
    triplets: int,
    of: str,
    penalty: str,
    label_smoothing: float,
    *,
    first: bool,
) -> Call:
    """The call, checked once for all that are alike. ``first`` as in :func:`check_tensors`."""
    key: Any = None
    if not is_compiling():
        # Flat, and without shape[0] and the like: each look at a tensor costs the host. With types, as True equals 1.
        # fmt: off
        try:
            key = (
                logits.shape, logits.stride(), logits.dtype, logits.device, type(logits),
                target.shape, target.stride(), target.dtype, target.device, type(target),
                alpha.shape, alpha.stride(), alpha.dtype, alpha.device, type(alpha),
                points, triplets, type(triplets), of, penalty, label_smoothing, type(label_smoothing), first,
            )
            if (found := _SEEN.get(key)) is not None:
                return found
        except (AttributeError, TypeError, RuntimeError):
            pass  # not tensors, which the checks say, or a tracer's, or without strides
        # fmt: on
    options = linearity_options(
        points=points, triplets=triplets, of=of, penalty=penalty, label_smoothing=label_smoothing
    )
    check_tensors(logits, target, alpha, options, first=first)
    sizes = sizes_of(logits, target, alpha, options, first=first)
    wrapped = checks.wrapped(logits, target, alpha)
    call = Call(options, sizes, first, (logits.dtype,), wrapped, {})
    return call if key is None else _SEEN.put(key, call)


def check_tensors(logits: Tensor, target: Tensor, alpha: Tensor, options: Linearity, *, first: bool) -> None:
    """Check shapes, dtypes and devices against each other.

    ``first``: whether the logits begin with the ``B`` rows of x_adv.
    """
    checks.logits(logits, None)
    batch = target.shape[0] if isinstance(target, Tensor) and target.dim() else 0
    checks.target(target, batch, logits.device)
    if batch == 0:
        raise ValueError(f"target: expected at least one sample, got {checks.describe(target)}")
    checks.classes(target, logits)
    if not isinstance(alpha, Tensor) or not alpha.is_floating_point():
        raise TypeError(f"alpha: expected a floating-point tensor [triplets * Bt], got {checks.describe(alpha)}")
    residuals = alpha.numel()
    rows_per_block = residuals // options.triplets
    whole = rows_per_block * options.triplets == residuals
    if alpha.dim() != 1 or not whole or not 1 <= rows_per_block <= batch or alpha.device != logits.device:
        raise ValueError(
            f"alpha: expected shape [triplets * Bt] with triplets = {options.triplets} and 1 <= Bt <= {batch} "
            f"on {logits.device}, got {checks.describe(alpha)}"
        )
    rows = (batch if first else 0) + layout.BLOCKS[options.points] * residuals
    if logits.shape[0] != rows:
        parts = f"{batch} (x_adv) + " if first else ""
        raise ValueError(
            f"logits: expected {parts}{layout.BLOCKS[options.points]} * {residuals} = {rows} rows for "
            f"points={options.points!r}, triplets={options.triplets}, got {checks.describe(logits)}"
        )


def check_lam(lam: float | Tensor, device: torch.device) -> None:
    """A number >= 0, or a 0-dim floating tensor on the logits' device (whose value is not looked at)."""
    if type(lam) is float and 0.0 <= lam < math.inf:  # as in most steps
        return
    if isinstance(lam, Tensor):
        if lam.dim() != 0 or not lam.is_floating_point() or lam.device != device:
            raise ValueError(
                f"lam: expected a number >= 0 or a 0-dim floating-point tensor on {device}, got {checks.describe(lam)}"
            )
    else:
        checks.real("lam", lam, low=0)
