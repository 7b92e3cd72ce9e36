"""What pack_points and random_start accept. Everything is checked here, once; inside, code trusts its arguments."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from elle_fast.ops import checks, layout

_FIVE_PLACES = "alpha: expected the default 'uniform' with points='five-point', whose five places are fixed"


class Packing(NamedTuple):
    """The checked options of one call, in the order of the op's schema; lengths in units of x, ``start`` in eps."""

    eps: float
    step_size: float
    start: float
    project: bool
    bounds: tuple[float, float] | None
    mean: tuple[float, ...] | None
    std: tuple[float, ...] | None
    norm: str
    points: str
    triplets: int
    alpha: str
    fraction: float
    dtype: torch.dtype | None
    memory_format: torch.memory_format
    sample_offset: int


@checks.cached
def packing_options(
    *,
    eps: float,
    step_size: float | None = None,
    start: float = 0.0,
    project: bool = False,
    bounds: tuple[float, float] | None = None,
    mean: Sequence[float] | None = None,
    std: Sequence[float] | None = None,
    norm: str = "linf",
    points: str = "elle",
    triplets: int = 1,
    alpha: str = "uniform",
    fraction: float = 1.0,
    dtype: torch.dtype | None = None,
    memory_format: torch.memory_format = torch.preserve_format,
    sample_offset: int = 0,
) -> Packing:
    """Check every option that is not a tensor; ``alpha="given"`` stands for one that is."""
    eps = checks.real("eps", eps, low=0)
    points = checks.choice("points", points, layout.BLOCKS)
    if points == "five-point" and alpha not in ("uniform", "given"):
        raise ValueError(f"{_FIVE_PLACES}, got {alpha!r}")
    if dtype is not None and not (isinstance(dtype, torch.dtype) and dtype.is_floating_point):
        raise TypeError(f"dtype: expected None or a floating-point torch.dtype, got {checks.describe(dtype)}")
    if not isinstance(memory_format, torch.memory_format):
        raise TypeError(f"memory_format: expected a torch.memory_format, got {checks.describe(memory_format)}")
    means, deviations = checks.statistics(mean, std) or (None, None)
    return Packing(
        eps=eps,
        step_size=eps if step_size is None else checks.real("step_size", step_size, low=0),
        start=checks.real("start", start, low=0),
        project=checks.flag("project", project),
        bounds=checks.bounds(bounds),
        mean=means,
        std=deviations,
        norm=checks.choice("norm", norm, layout.NORMS),
        points=points,
        triplets=checks.integer("triplets", triplets, low=0, high=checks.MAX_TRIPLETS),
        alpha=alpha,
        fraction=checks.real("fraction", fraction, low=0, low_allowed=False, high=1),
        dtype=dtype,
        memory_format=memory_format,
        # A sample's index is one 32-bit word of the counter.
        sample_offset=checks.integer("sample_offset", sample_offset, low=0, high=(1 << 31) - 1),
    )


_SEEN: checks.Seen[bool] = checks.Seen()


def check_call(
    x: Tensor, grad: Tensor | None, x_adv: Tensor | None, alpha: Tensor | None, seed: Tensor, packing: Packing
) -> None:
    """:func:`check_tensors` once for tensors of a kind."""
    others = None if x_adv is None and alpha is None else (checks.kind_of(x_adv), checks.kind_of(alpha))
    key = (checks.kind_of(x), checks.kind_of(grad), checks.kind_of(seed), grad is None, x_adv is None, others, packing)
    if not _SEEN.get(key):
        check_tensors(x, grad, x_adv, alpha, seed, packing)
        _SEEN.put(key, True)


def check_start(x: Tensor, seed: Tensor) -> None:
    """The same for random_start."""
    key = (checks.kind_of(x), checks.kind_of(seed))
    if not _SEEN.get(key):
        checks.inputs("x", x)
        check_seed(seed, x)
        _SEEN.put(key, True)


def check_tensors(
    x: Tensor, grad: Tensor | None, x_adv: Tensor | None, alpha: Tensor | None, seed: Tensor, packing: Packing
) -> None:
    """Check the tensors of one call against each other and against the options."""
    checks.inputs("x", x)
    check_seed(seed, x)
    if grad is not None and x_adv is not None:
        raise ValueError("grad, x_adv: expected at most one of them, as each gives the first B points, got both")
    if grad is not None:
        checks.like("grad", grad, x)
    if x_adv is not None:
        checks.like("x_adv", x_adv, x)
    if packing.points == "elle-2p" and packing.triplets and grad is None and x_adv is None:
        raise ValueError("grad, x_adv: expected one of them with points='elle-2p', whose x_b is x_adv, got neither")
    if packing.triplets == 0 and grad is None and x_adv is None:
        raise ValueError("triplets: expected at least 1 when neither grad nor x_adv is given, got 0")
    if alpha is not None:
        if packing.points == "five-point":
            raise ValueError(f"{_FIVE_PLACES}, got {checks.describe(alpha)}")
        expected = packing.triplets * layout.triplet_rows(x.shape[0], packing.fraction)
        wrong = not alpha.is_floating_point() or alpha.shape != (expected,) or alpha.device != x.device
        if wrong or alpha.requires_grad:
            raise ValueError(
                f"alpha: expected a name or a floating-point tensor of shape [{expected}] on {x.device} without grad, "
                f"got {checks.describe(alpha)}"
            )
    check_form(x, packing)


def check_out(
    out: tuple[Tensor, Tensor], x: Tensor, first: Tensor | None, alpha: Tensor | None, seed: Tensor, packing: Packing
) -> None:
    """Check the tensors that a call is to write to. ``first``: grad or x_adv."""
    rows, residuals = packed_rows(x.shape[0], first is not None, packing)
    dtype, work = packing.dtype or x.dtype, torch.float64 if x.dtype == torch.float64 else torch.float32
    memory_format = output_format(x, packing)
    expected = (
        f"out: expected None or a tuple of points, {dtype} {[rows, *x.shape[1:]]} in {memory_format}, "
        f"and alpha, {work} [{residuals}], on {x.device}, that require no grad"
    )
    if not isinstance(out, (tuple, list)) or len(out) != 2 or not all(isinstance(tensor, Tensor) for tensor in out):
        raise TypeError(f"{expected}, got {checks.describe(out)}")
    points, alphas = out
    fits = (points.shape, points.dtype) == ((rows, *x.shape[1:]), dtype) and points.device == x.device
    fits &= (alphas.shape, alphas.dtype) == ((residuals,), work) and alphas.device == x.device
    if not (fits and points.is_contiguous(memory_format=memory_format) and alphas.is_contiguous()):
        strides = f"strides {list(points.stride())} and {list(alphas.stride())}"
        raise ValueError(f"{expected}, got {checks.describe(points)} and {checks.describe(alphas)} with {strides}")
    if any(tensor.requires_grad for tensor in out):
        raise ValueError(f"{expected}, got one that requires grad")
    inputs = [tensor for tensor in (x, first, alpha, seed) if tensor is not None]
    if not checks.have_memory(*inputs, *out):
        return
    if any(tensor.is_neg() for tensor in out):
        raise ValueError(f"{expected}, got a negated view")
    if any(tensor.is_inference() for tensor in out) and not torch.is_inference_mode_enabled():
        raise ValueError(f"{expected}, got one made in inference mode, outside of it")
    read = [tensor.untyped_storage().data_ptr() for tensor in inputs]
    written = [tensor.untyped_storage().data_ptr() for tensor in out if tensor.numel()]
    if len({*read, *written}) < len(set(read)) + len(written):
        raise ValueError("out: expected tensors that share no storage with each other or an input, got some that do")


def check_form(x: Tensor, packing: Packing) -> None:
    """Check x's dimensions against the options."""
    if packing.mean is not None and (x.dim() < 2 or x.shape[1] != len(packing.mean)):
        raise ValueError(
            f"mean, std: expected one number per channel of x (its dimension 1), x has shape {list(x.shape)}, "
            f"got {len(packing.mean)} numbers"
        )
    needed = {torch.channels_last: 4, torch.channels_last_3d: 5}.get(packing.memory_format)
    if needed is not None and x.dim() != needed:
        raise ValueError(
            f"memory_format: expected x of {needed} dimensions beside {packing.memory_format}, got {checks.describe(x)}"
        )


def check_seed(seed: Tensor, x: Tensor) -> None:
    """A 0-dim int64 tensor on x's device."""
    if not isinstance(seed, Tensor) or seed.dtype != torch.int64 or seed.dim() != 0 or seed.device != x.device:
        error = ValueError if isinstance(seed, Tensor) else TypeError
        raise error(f"seed: expected a 0-dim int64 tensor on {x.device}, got {checks.describe(seed)}")


def packed_rows(batch: int, first: bool, packing: Packing) -> tuple[int, int]:
    """Rows of the packed batch (``first``: whether it begins with x_adv), and residuals, one alpha each."""
    residuals = packing.triplets * layout.triplet_rows(batch, packing.fraction)
    return (batch if first else 0) + layout.BLOCKS[packing.points] * residuals, residuals


def output_format(x: Tensor, packing: Packing) -> torch.memory_format:
    """The memory format asked for; or else x's own, channels-last where it is that and not contiguous as well."""
    if packing.memory_format != torch.preserve_format:
        return packing.memory_format
    if not x.is_contiguous():
        if x.dim() == 4 and x.is_contiguous(memory_format=torch.channels_last):
            return torch.channels_last
        if x.dim() == 5 and x.is_contiguous(memory_format=torch.channels_last_3d):
            return torch.channels_last_3d
    return torch.contiguous_format
