"""The two ops as functions: check the options, then the call (:mod:`elle_fast.ops`)."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.compiler import is_compiling

from elle_fast._core import checks
from elle_fast.adaptive import AdaptiveLambda
from elle_fast.ops.elle_loss import op as loss_op
from elle_fast.ops.elle_loss import reference
from elle_fast.ops.elle_loss.validation import Linearity, check_relative, check_tensors
from elle_fast.ops.pack_points import op as pack_op
from elle_fast.ops.pack_points.validation import Packing
from elle_fast.weighted_sum import weighted_loss

__all__ = ["draw_seed", "elle_loss", "local_linearity", "pack_points", "random_start", "relative_linearity"]

_PACKING_OPTIONS = tuple(name for name in Packing._fields if name not in ("eps", "alpha"))
_LINEARITY_OPTIONS = tuple(name for name in Linearity._fields if name != "adv")


def draw_seed(device: torch.device | str, generator: torch.Generator | None = None) -> Tensor:
    """A fresh 0-dim int64 seed on ``device``, in ``[0, 2**63)``, drawn from torch's generator without a host sync.

    Args:
        device: where the seed, and the op that reads it, live.
        generator: a generator on the same device; ``None`` takes the device's default one, so that
            ``torch.manual_seed`` and a saved RNG state decide the noise.

    Raises:
        TypeError, ValueError: for what is no device or no generator, or one on another kind of device.
    """
    device = checks.device(device)
    checks.generator(generator)
    if generator is not None and generator.device.type != device.type:
        raise ValueError(f"generator: expected one on {device}, where the inputs are, got one on {generator.device}")
    seed = torch.empty((), dtype=torch.int64, device=device)
    # Tensor.random_ draws the same number, but torch.compile cannot follow it.
    return torch.ops.aten.random(seed) if is_compiling() and generator is None else seed.random_(generator=generator)


def pack_points(
    x: Tensor,
    grad: Tensor | None,
    eps: float,
    *,
    seed: Tensor,
    x_adv: Tensor | None = None,
    alpha: str | Tensor = "uniform",
    out: tuple[Tensor, Tensor] | None = None,
    backend: str = "auto",
    **options: Any,
) -> tuple[Tensor, Tensor]:
    r"""The attack's points and the triplets of ELLE, packed into one batch (paper, Algorithm 1, lines 5 to 7).

    .. math::
        x_{adv} = \Pi(x_{start} + step \cdot sign(grad)), \quad x_a, x_b = x + U[-eps, eps]^d, \quad
        x_c = (1 - \alpha) x_a + \alpha x_b, \quad \alpha \sim U[0, 1]

    Rows of the result: x_adv, x_a, x_b, x_c, each ``B`` rows (other layouts: :mod:`elle_fast.ops.layout`). No gradient
    flows through it. The noise is a pure function of (seed, sample, element): see :mod:`elle_fast.ops.philox`.

    Args:
        x: clean inputs, floating ``[B, ...]``, any number of further dimensions.
        grad: gradient of the loss with respect to the attack's start, shaped as x. ``None``: no step is taken; the
            rows of x_adv are ``x_adv``, or are left out if that is ``None`` too (the regulariser alone).
        eps: radius of the ball, ``>= 0``, in units of x.
        seed: 0-dim int64 tensor on x's device, see :func:`draw_seed`.
        x_adv: points of an attack made elsewhere, shaped as x; excludes ``grad``. Taken as it is.
        alpha: ``"uniform"``, ``"half"`` (0.5), or a tensor ``[triplets * Bt]``.
        out: points and alpha of an earlier call, or tensors like them, to write to and return. On the CPU new memory
            for a large batch takes longer than the op itself, as the system has to clear it. They must share no memory
            with each other or an input, which torch.compile cannot check.
        backend: ``"auto"`` or a name from :data:`elle_fast.backends.BACKENDS`.
        options: those of :class:`~elle_fast.ops.pack_points.validation.Packing`: ``step_size``, ``start``, ``bounds``
            and so on. The attack's random start is drawn as :func:`random_start` drew it with the same seed.

    Returns:
        points ``[B + 3 B, ...]`` and alpha ``[B]`` (float32, or float64 for float64 x).

    Raises:
        TypeError, ValueError: naming the argument, what was expected and what was got.
        RuntimeError: if the backend cannot run here.
    """
    checks.known("pack_points", options, _PACKING_OPTIONS)
    given = None
    if isinstance(alpha, Tensor):
        given, alpha = alpha, "uniform"
    packing = Packing.checked(eps, alpha=alpha, **options)
    return pack_op.pack_points(x, grad, packing, seed=seed, x_adv=x_adv, alpha=given, out=out, backend=backend)


def random_start(
    x: Tensor,
    eps: float,
    *,
    seed: Tensor,
    start: float = 1.0,
    bounds: tuple[float, float] | None = None,
    norm: str = "linf",
    sample_offset: int = 0,
    backend: str = "auto",
) -> Tensor:
    """The point from which an attack with a random start takes its gradient: x + noise, clamped to ``bounds``.

    The noise is uniform in the ball of radius ``start * eps``. :func:`pack_points` with the same seed draws it again.

    Returns:
        A tensor of x's shape, dtype and layout.

    Raises:
        TypeError, ValueError, RuntimeError: as :func:`pack_points`.
    """
    packing = Packing.checked(eps, start=start, bounds=bounds, norm=norm, sample_offset=sample_offset)
    return pack_op.random_start(x, packing, seed=seed, backend=backend)


def elle_loss(
    logits: Tensor,
    target: Tensor,
    alpha: Tensor,
    lam: float | Tensor | AdaptiveLambda,
    *,
    backend: str = "auto",
    **options: Any,
) -> tuple[Tensor, Tensor, Tensor]:
    r"""Loss of ELLE from the logits of a packed batch (paper, Algorithm 1, lines 8 to 12).

    .. math::
        r_i = L(x_c) - (1 - \alpha_i) L(x_a) - \alpha_i L(x_b), \quad
        e\_lin = mean_i\, r_i^2, \quad loss = mean_i\, L(x_{adv}) + lam \cdot e\_lin

    with L the cross-entropy of sample i, in float32 (float64 for float64 logits).

    Args:
        logits: floating ``[4 B, C]``, rows in the order of :func:`pack_points`.
        target: int64 class indices ``[B]`` in ``[0, C)``, or probabilities ``[B, C]``.
        alpha: floating ``[triplets * Bt]``, as :func:`pack_points` returned it.
        lam: weight of E_lin: a number >= 0, a 0-dim tensor on the logits' device, or an
            :class:`~elle_fast.AdaptiveLambda`, which is updated with this step's E_lin first.
        backend: as in :func:`pack_points`. A kernel's gradient is that of the logits alone, and cannot be
            differentiated again; with ``"auto"``, target, alpha or lam that require grad take the reference. A class
            index out of range is an error on the CPU; on a GPU a kernel's loss and its gradient are then NaN.
        options: those of :class:`~elle_fast.ops.elle_loss.validation.Linearity`: ``points``, ``triplets``, ``of``,
            ``penalty``, ``label_smoothing``.

    Returns:
        loss, ce and e_lin, 0-dim, differentiable with respect to the logits.

    Raises:
        TypeError, ValueError: naming the argument, what was expected and what was got.
        RuntimeError: if the backend cannot run here; from a second derivative of a kernel's loss.
    """
    checks.known("elle_loss", options, _LINEARITY_OPTIONS)
    return weighted_loss(logits, target, alpha, lam, Linearity.checked(**options), backend)


def local_linearity(logits: Tensor, target: Tensor, alpha: Tensor, *, backend: str = "auto", **options: Any) -> Tensor:
    """E_lin alone, from the logits ``[3 B, C]`` of triplets packed without x_adv (with it for ``"elle-2p"``).

    Arguments and errors as in :func:`elle_loss`.

    Returns:
        e_lin, 0-dim, differentiable with respect to the logits.
    """
    checks.known("local_linearity", options, _LINEARITY_OPTIONS)
    return loss_op.local_linearity(logits, target, alpha, Linearity.checked(**options), backend)


def relative_linearity(logits: Tensor, target: Tensor, alpha: Tensor, **options: Any) -> Tensor:
    r"""Relative E_lin, which ``AdaptiveLambda(rule="relative")`` looks at, from the logits ``[3 B, C]`` of triplets.

    .. math::
        \sum_i r_i^2 \;/\; \sum_i \Big(r_i^2 + (L(x_b) - L(x_a))^2 + 10^{-12} (1 + L(x_c)^2)\Big)

    The part that is not linear of how the loss changes along the segment from x_a to x_b: 0 of a linear loss, and 5/11
    if the losses at the three points are independent and alike. It has no scale, but that a loss which changes by less
    than a millionth of itself, float32's rounding, counts as linear; the coarser rounding of bf16 or fp16 does not.

    Arguments and errors as in :func:`local_linearity`, but that ``points`` is ``"elle"``, ``of`` is ``"loss"``, and it
    is plain torch on any backend: the kernels of :func:`elle_loss` need no such call.

    Returns:
        0-dim, in [0, 1], without a graph.
    """
    checks.known("relative_linearity", options, _LINEARITY_OPTIONS)
    checked = Linearity.checked(**options).alone
    check_relative(checked)
    check_tensors(logits, target, alpha, checked)
    numerator, denominator = reference.relative_of_logits(logits, target, alpha, checked).unbind()
    return numerator / denominator
