"""The public functional face of the two ops: check, choose a backend, call it."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from elle_fast import backends
from elle_fast._core import checks
from elle_fast.adaptive import AdaptiveLambda, weighted_loss
from elle_fast.ops import layout
from elle_fast.ops.elle_loss import autograd
from elle_fast.ops.elle_loss import reference as loss_reference
from elle_fast.ops.elle_loss import validation as loss_validation
from elle_fast.ops.elle_loss.validation import FIXED
from elle_fast.ops.pack_points import reference as pack_reference
from elle_fast.ops.pack_points import schema as pack_schema
from elle_fast.ops.pack_points import validation as pack_validation

__all__ = ["draw_seed", "elle_loss", "local_linearity", "pack_points", "random_start"]


def draw_seed(device: torch.device, generator: torch.Generator | None = None) -> Tensor:
    """A fresh 0-dim int64 seed on ``device``, in ``[0, 2**63)``, drawn from torch's generator without a host sync.

    Args:
        device: where the seed, and the op that reads it, live.
        generator: a generator on the same device; ``None`` takes the device's default one, so that
            ``torch.manual_seed`` and a saved RNG state decide the noise.

    Raises:
        TypeError, ValueError: if it is no generator, or one on another kind of device.
    """
    if generator is not None and not isinstance(generator, torch.Generator):
        raise TypeError(f"generator: expected None or a torch.Generator, got {checks.describe(generator)}")
    if generator is not None and generator.device.type != device.type:
        raise ValueError(f"generator: expected one on {device}, where the inputs are, got one on {generator.device}")
    return torch.empty((), dtype=torch.int64, device=device).random_(generator=generator)


def pack_points(
    x: Tensor,
    grad: Tensor | None,
    eps: float,
    *,
    seed: Tensor,
    x_adv: Tensor | None = None,
    step_size: float | None = None,
    start: float = 0.0,
    project: bool = False,
    bounds: tuple[float, float] | None = None,
    mean: Sequence[float] | None = None,
    std: Sequence[float] | None = None,
    norm: str = "linf",
    points: str = "elle",
    triplets: int = 1,
    alpha: str | Tensor = "uniform",
    fraction: float = 1.0,
    dtype: torch.dtype | None = None,
    memory_format: torch.memory_format = torch.preserve_format,
    sample_offset: int = 0,
    out: tuple[Tensor, Tensor] | None = None,
    backend: str = "auto",
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
            first ``B`` rows are ``x_adv``, or are left out if that is ``None`` too (the regulariser alone).
        eps: radius of the ball, ``>= 0``, in units of x.
        seed: 0-dim int64 tensor on x's device, see :func:`draw_seed`.
        x_adv: points of an attack made elsewhere, shaped as x; excludes ``grad``. Taken as it is.
        step_size: length of the attack's step in units of x; ``None`` is ``eps``.
        start: radius of the attack's random start in units of eps (0 FGSM, 1 RS-FGSM, 2 N-FGSM), drawn again here
            exactly as :func:`random_start` drew it.
        project: whether x_adv is projected to the eps ball around x.
        bounds: ``(low, high)`` to which x_adv, x_a and x_b are clamped; ``None`` clamps nothing.
        mean, std: per-channel statistics (dimension 1); every point leaves as ``(point - mean) / std``.
        norm: ``"linf"``, or ``"l2"``: the step goes along grad / ||grad||_2, noise is uniform in the l2 ball.
        points: ``"elle"``, ``"elle-2p"`` (x_b is x_adv) or ``"five-point"`` (paper, B.11 and Definition 3).
        triplets: number of independent triplets; 0 packs x_adv alone.
        alpha: ``"uniform"``, ``"half"`` (0.5), or a tensor ``[triplets * Bt]``.
        fraction: the triplets cover the first ``Bt = ceil(fraction * B)`` samples, in ``(0, 1]``.
        dtype: dtype of the points; ``None`` keeps x's. Arithmetic is in float32 (float64 for float64 x).
        memory_format: of the points; ``torch.preserve_format`` keeps x's.
        sample_offset: index of x's first sample in the whole batch, for a batch that is packed in parts.
        out: points and alpha of an earlier call, or tensors like them, to write to and return. On the CPU new memory
            for a large batch takes longer than the op itself, as the system has to clear it. They must share no memory
            with each other or an input, which torch.compile cannot check.
        backend: ``"auto"`` or a name from :data:`elle_fast.backends.BACKENDS`.

    Returns:
        points ``[B + 3 B, ...]`` and alpha ``[B]`` (float32, or float64 for float64 x).

    Raises:
        TypeError, ValueError: naming the argument, what was expected and what was got.
        RuntimeError: if the backend cannot run here.
    """
    given = alpha if isinstance(alpha, Tensor) else None
    packing = pack_validation.packing_options(
        eps=eps,
        step_size=step_size,
        start=start,
        project=project,
        bounds=bounds,
        mean=tuple(mean) if isinstance(mean, list) else mean,
        std=tuple(std) if isinstance(std, list) else std,
        norm=norm,
        points=points,
        triplets=triplets,
        alpha="given" if isinstance(alpha, Tensor) else checks.choice("alpha", alpha, layout.ALPHAS),
        fraction=fraction,
        dtype=dtype,
        memory_format=memory_format,
        sample_offset=sample_offset,
    )
    call = pack_validation.checked(x, grad, x_adv, given, seed, packing)
    first, wrapped = x_adv if grad is None else grad, call.wrapped
    if out is not None:
        pack_validation.check_out(out, x, first, given, seed, call)
        wrapped = wrapped or checks.wrapped(*out)
    name = backends.choose(backend, x.device, ("x", "grad or x_adv", "dtype"), call.dtypes, True, wrapped)
    if name == "reference":
        with torch.no_grad():
            packed = pack_reference.pack_points(x, grad, x_adv, given, seed, packing)
            return packed if out is None else (out[0].copy_(packed[0]), out[1].copy_(packed[1]))
    return pack_schema.pack_points(x, grad, x_adv, given, seed, call, name, out)


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
        A tensor of x's shape and dtype.

    Raises:
        TypeError, ValueError, RuntimeError: as :func:`pack_points`.
    """
    packing = pack_validation.packing_options(
        eps=eps, start=start, bounds=bounds, norm=norm, sample_offset=sample_offset
    )
    call = pack_validation.checked_start(x, seed, packing)
    name = backends.choose(backend, x.device, ("x",), call.dtypes, True, call.wrapped)
    if name == "reference":
        with torch.no_grad():
            return pack_reference.random_start(x, seed, packing)
    return pack_schema.random_start(x, seed, call, name)


def elle_loss(
    logits: Tensor,
    target: Tensor,
    alpha: Tensor,
    lam: float | Tensor | AdaptiveLambda,
    *,
    points: str = "elle",
    triplets: int = 1,
    of: str = "loss",
    penalty: str = "squared",
    label_smoothing: float = 0.0,
    backend: str = "auto",
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
        points, triplets: the layout, as given to :func:`pack_points`.
        of: ``"loss"``, or ``"logits"``: r is taken of the logits, and penalised through its 2-norm over classes.
        penalty: ``"squared"``, ``"abs"`` (paper, Eq. 6) or ``"smooth_l1"`` (beta 1), applied to the residual.
        label_smoothing: as in :func:`torch.nn.functional.cross_entropy`.
        backend: as in :func:`pack_points`. A kernel's gradient is that of the logits alone, and cannot be
            differentiated again; with ``"auto"``, target, alpha or lam that require grad take the reference. A class
            index out of range is an error on the CPU; on a GPU a kernel's loss and its gradient are then NaN.

    Returns:
        loss, ce and e_lin, 0-dim, differentiable with respect to the logits.

    Raises:
        TypeError, ValueError: naming the argument, what was expected and what was got.
        RuntimeError: if the backend cannot run here; from a second derivative of a kernel's loss.
    """
    call = loss_validation.checked(logits, target, alpha, points, triplets, of, penalty, label_smoothing, first=True)
    constant = not (target.requires_grad or alpha.requires_grad)
    # The type first: as in most steps lam is a float, and isinstance(_, Tensor) takes the host four times as long.
    if type(lam) is not float and isinstance(lam, Tensor):
        constant = constant and not lam.requires_grad
    if not isinstance(lam, AdaptiveLambda):
        loss_validation.check_lam(lam, logits.device)
    name = backends.choose(backend, logits.device, ("logits",), call.dtypes, constant, call.wrapped)
    if name == "reference":
        ce, e_lin = loss_reference.elle_loss(logits, target, alpha, call.options)
        return weighted_loss(ce, e_lin, lam, name), ce, e_lin
    if not isinstance(lam, AdaptiveLambda):
        return autograd.elle_loss(logits, target, alpha, lam, [], FIXED, call, name)
    if lam.ranks() == 1:
        return autograd.elle_loss(logits, target, alpha, 0.0, lam.state(logits.device), lam.rule, call, name)
    # E_lin has to be averaged over the ranks before lam is known.
    _, ce, e_lin = autograd.elle_loss(logits, target, alpha, 0.0, [], FIXED, call, name)
    return weighted_loss(ce, e_lin, lam, name), ce, e_lin


def local_linearity(
    logits: Tensor,
    target: Tensor,
    alpha: Tensor,
    *,
    points: str = "elle",
    triplets: int = 1,
    of: str = "loss",
    penalty: str = "squared",
    label_smoothing: float = 0.0,
    backend: str = "auto",
) -> Tensor:
    """E_lin alone, from the logits ``[3 B, C]`` of triplets packed without x_adv (with it for ``"elle-2p"``).

    Arguments and errors as in :func:`elle_loss`.

    Returns:
        e_lin, 0-dim, differentiable with respect to the logits.
    """
    first = points == "elle-2p"
    call = loss_validation.checked(logits, target, alpha, points, triplets, of, penalty, label_smoothing, first=first)
    constant = not (target.requires_grad or alpha.requires_grad)
    name = backends.choose(backend, logits.device, ("logits",), call.dtypes, constant, call.wrapped)
    if name == "reference":
        return loss_reference.local_linearity(logits, target, alpha, call.options)
    return autograd.elle_loss(logits, target, alpha, 0.0, [], FIXED, call, name)[2]
