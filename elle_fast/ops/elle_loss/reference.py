"""elle_loss and the update of lam in plain torch: the oracle of the other backends, differentiable through and through.

Arithmetic is in float32 (float64 for float64 logits) whatever the logits' dtype. Arguments arrive checked
(validation.py).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from elle_fast.ops import layout
from elle_fast.ops.elle_loss.validation import LamRule, Linearity

# F.cross_entropy skips rows whose index equals this; no label can, so -100 is an error here and not a silent zero.
_NO_IGNORED_INDEX = -(2**62)


def elle_loss(logits: Tensor, target: Tensor, alpha: Tensor, options: Linearity) -> tuple[Tensor, Tensor]:
    """``ce``, the mean cross-entropy over the rows of x_adv, and ``e_lin``, both 0-dim."""
    batch = target.shape[0]
    if options.of == "loss":
        values = row_losses(logits, expand_target(target, alpha, options), options.label_smoothing)
        return values[:batch].mean(), linearity_error(values, alpha, batch, options)
    ce = row_losses(logits[:batch], target, options.label_smoothing).mean()
    return ce, linearity_error(widen(logits), alpha, batch, options)


def weighted_sum(ce: Tensor, e_lin: Tensor, lam: float | Tensor) -> Tensor:
    """``ce + lam * e_lin``, in their dtype."""
    return ce + (lam.to(e_lin.dtype) if isinstance(lam, Tensor) else lam) * e_lin


def local_linearity(logits: Tensor, target: Tensor, alpha: Tensor, options: Linearity) -> Tensor:
    """``e_lin`` alone, 0-dim. The logits begin with the rows of x_adv for ELLE-2p only, whose x_b they are."""
    values = widen(logits)
    if options.of == "loss":
        values = row_losses(logits, expand_target(target, alpha, options), options.label_smoothing)
    return linearity_error(values, alpha, options.adv_rows(target), options)


def row_losses(logits: Tensor, target: Tensor, label_smoothing: float = 0.0, reduction: str = "none") -> Tensor:
    """Cross-entropy of each row, ``[N]``, or ``reduction`` of it; target int64 ``[N]`` or probabilities ``[N, C]``."""
    if target.is_floating_point():
        target = target.to(widen(logits).dtype)
    try:
        return F.cross_entropy(
            widen(logits),
            target,
            reduction=reduction,
            label_smoothing=label_smoothing,
            ignore_index=_NO_IGNORED_INDEX,
        )
    except IndexError as error:  # on the CPU; a CUDA kernel ends in a device-side assertion
        raise ValueError(f"target: expected class indices in [0, {logits.shape[1]}), got {error}") from error


def smoothing_excess(logits: Tensor, target: Tensor, label_smoothing: float) -> Tensor:
    """What label smoothing adds to the cross-entropy of each row, ``[N]``.

    For the target's probabilities q, ``s (<q, z> - mean z + (1 - sum q) logsumexp z)``.
    """
    z = widen(logits)
    if not target.is_floating_point():
        excess = z.gather(1, target[:, None])[:, 0] - z.mean(dim=1)
    else:
        q = target.to(z.dtype)
        excess = (q * z).sum(dim=1) - z.mean(dim=1) + (1 - q.sum(dim=1)) * z.logsumexp(dim=1)
    return label_smoothing * excess


def expand_target(target: Tensor, alpha: Tensor, options: Linearity) -> Tensor:
    """The target of each packed row, in the order of :mod:`elle_fast.ops.layout`."""
    part = target[: alpha.numel() // options.triplets]
    return torch.cat(([target] if options.adv else []) + [part] * (options.blocks * options.triplets))


def linearity_error(values: Tensor, alpha: Tensor, adv_rows: int, options: Linearity) -> Tensor:
    """E_lin of packed ``values``: losses ``[N]``, or logits ``[N, C]``; the mean penalty over all residuals.

    With ``r = h(x_c) - (1 - alpha) h(x_a) - alpha h(x_b)`` (paper, Definition 1 and Algorithm 1): the penalty is a
    function of ``|r|``, for logits of ``||r||_2``: its square, itself, or smooth-L1 with beta = 1.
    """
    r = _residual(values, alpha.to(values.dtype), adv_rows, options)
    if options.penalty == "squared":
        return (r.square() if r.dim() == 1 else r.square().sum(dim=1)).mean()
    size = r.abs() if r.dim() == 1 else torch.linalg.vector_norm(r, dim=1)
    if options.penalty == "abs":
        return size.mean()
    return F.smooth_l1_loss(size, torch.zeros_like(size))


@torch.no_grad()
def relative_of_logits(logits: Tensor, target: Tensor, alpha: Tensor, options: Linearity) -> Tensor:
    """:func:`relative_of_losses` of the cross-entropy, from the logits of a packed batch."""
    losses = row_losses(logits, expand_target(target, alpha, options), options.label_smoothing)
    return relative_of_losses(losses, alpha, options.adv_rows(target), options)


@torch.no_grad()
def relative_of_losses(losses: Tensor, alpha: Tensor, adv_rows: int, options: Linearity) -> Tensor:
    """Numerator and denominator ``[2]`` of relative E_lin, from packed losses ``[N]``; of ``points="elle"``.

    ``sum r^2`` over ``sum r^2 + (L(x_b) - L(x_a))^2 + 1e-12 (1 + L(x_c)^2)``: the part that is not linear of how the
    loss changes along the segment from x_a to x_b. It has no scale, but for that of float32's rounding: a loss that
    changes by less than a millionth of itself, or of 1, counts as linear. Two sums, as those of several ranks add up.
    """
    r = _residual(losses, alpha.to(losses.dtype), adv_rows, options)
    blocks = losses[adv_rows:].unflatten(0, (options.triplets, options.blocks, -1))
    at_a, at_b, at_c = blocks.unbind(1)
    squares = r.square().sum()
    others = (at_b - at_a).square() + 1e-12 * (1 + at_c.square())
    return torch.stack([squares, squares + others.sum()])


def _residual(values: Tensor, alpha: Tensor, adv_rows: int, options: Linearity) -> Tensor:
    """``[triplets * Bt]`` for losses, ``[triplets * Bt, C]`` for logits."""
    blocks = values[adv_rows:].unflatten(0, (options.triplets, options.blocks, -1)).unbind(1)
    if options.points == "five-point":
        weighted = (w * h for w, h in zip(layout.FIVE_POINT_WEIGHTS, blocks, strict=True))
        return sum(weighted, torch.zeros_like(blocks[0])).flatten(0, 1)
    a = alpha.view(*blocks[0].shape[:2], *[1] * (values.dim() - 1))
    if options.points == "elle":
        h_a, h_b, h_c = blocks
    else:
        (h_a, h_c), h_b = blocks, values[: blocks[0].shape[1]]
    r: Tensor = h_c - (1.0 - a) * h_a - a * h_b
    return r.flatten(0, 1)


def update_lam(
    value: Tensor,
    state: Sequence[Tensor],
    rule: LamRule,
    ramp: int | None = None,
    weight: Callable[[Tensor], Tensor] | None = None,
) -> Tensor:
    """Takes in this step's E_lin and returns the new lam, a copy (paper, Algorithm 1, lines 9 to 11).

    ``state`` is changed in place: lam, count, skipped, and mean and sum of squared deviations (Welford) or a ring of
    the last values. A value that is not finite changes nothing but ``skipped``. While count is at most ``ramp``,
    lam_max is that part of itself, and nothing decays (the authors' ImageNet code). ``weight``, of the detector's
    threshold, replaces the rule's lam_max.

    With a rate, ``value`` is relative E_lin, the state its weighted mean beside lam, count and skipped, and a detection
    is a mean, with this step's value, above the rule's threshold. The first steps count evenly.
    """
    lam, count, skipped = state[:3]
    value = value.detach().to(state[3].dtype)
    finite = value.isfinite()
    if rule.relative:
        _average(value, finite, state, rule)
        detected = state[3] > rule.threshold
    else:
        detected = value > _threshold(state, rule)
    detected &= count >= rule.min_history
    most: float | Tensor = rule.lam_max if weight is None else weight(_threshold(state, rule))
    decayed = rule.gamma * lam
    if ramp is not None:
        most = most * (count.to(lam.dtype) / ramp).clamp(max=1)
        decayed = torch.where(count > ramp, decayed, lam)
    lam.copy_(torch.where(finite, torch.where(detected, most, decayed), lam))
    if not rule.relative:
        _remember(value, finite, state)
    count.add_(finite)
    skipped.add_(~finite)
    return lam.clone()


def _threshold(state: Sequence[Tensor], rule: LamRule) -> Tensor:
    mean, std = moments(state)
    return mean + rule.sensitivity * std


def _remember(value: Tensor, finite: Tensor, state: Sequence[Tensor]) -> None:
    """The value joins the history."""
    count = state[1]
    if len(state) == 5:
        mean, deviations = state[3:]
        delta = torch.where(finite, value - mean, 0)
        step = delta / (count + 1)
        # Through a view: torch.compile (2.13) drops what is written to a 0-dim float64 tensor of the CPU itself.
        deviations[None].add_(delta * (delta - step))
        mean[None].add_(step)
    else:
        history = state[3]
        slot = torch.arange(history.numel(), device=history.device) == count % history.numel()
        history.copy_(torch.where(slot & finite, value, history))


def _average(value: Tensor, finite: Tensor, state: Sequence[Tensor], rule: LamRule) -> None:
    """The value joins the weighted mean, of which it is the rule's part, or of the first ones an even part."""
    count, mean = state[1], state[3]
    part = (1 / (count + 1).to(mean.dtype)).clamp(min=rule.rate)
    mean[None].add_(torch.where(finite, part * (value - mean), 0))


def moments(state: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
    """Mean and population standard deviation of the history, 0-dim, in the state's dtype; both 0 while it is empty."""
    count = state[1].clamp(min=1)
    if len(state) == 5:
        mean, deviations = state[3:]
        return mean.clone(), (deviations / count).sqrt()
    history = state[3]
    count = count.clamp(max=history.numel())
    held = torch.arange(history.numel(), device=history.device) < count
    mean = torch.where(held, history, 0).sum() / count
    return mean, (torch.where(held, history - mean, 0).square().sum() / count).sqrt()


def widen(logits: Tensor) -> Tensor:
    """float32, or float64 for float64."""
    return logits if logits.dtype == torch.float64 else logits.float()
