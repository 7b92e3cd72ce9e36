"""What pack_points and random_start accept. Everything is checked here, once; inside, code trusts its arguments."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import suppress
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.compiler import is_compiling

from elle_fast._core import checks
from elle_fast.ops import layout

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


class Call(NamedTuple):
    """What the checks have found of a call; the same object for all calls that are alike."""

    packing: Packing
    dtypes: tuple[torch.dtype | None, ...]  # of x, of grad or x_adv, of the points if it is given
    wrapped: bool  # whether a tensor wraps others
    kept: dict[Any, Any]  # what a backend makes once for such calls


_SEEN: checks.Seen[Call] = checks.Seen()


def checked(
    x: Tensor, grad: Tensor | None, x_adv: Tensor | None, alpha: Tensor | None, seed: Tensor, packing: Packing
) -> Call:
    """The call of pack_points, checked once for all that are alike."""
    key: Any = None
    if not is_compiling():
        # Flat: each look at a tensor costs the host.
        # fmt: off
        try:
            key = (
                packing, x.shape, x.stride(), x.dtype, x.device, type(x), x.requires_grad,
                None if grad is None else (grad.shape, grad.stride(), grad.dtype, grad.device, type(grad)),
                None if grad is None else grad.requires_grad, seed.shape, seed.dtype, seed.device,
                None if x_adv is None else kind_of(x_adv), None if alpha is None else kind_of(alpha),
            )
            if (found := _SEEN.get(key)) is not None:
                return found
        except (AttributeError, TypeError, RuntimeError):
            pass  # not tensors, which the checks say, or a tracer's, or without strides
        # fmt: on
    check_tensors(x, grad, x_adv, alpha, seed, packing)
    first = x_adv if grad is None else grad
    dtypes = x.dtype, None if first is None else first.dtype, packing.dtype
    call = Call(packing, dtypes, checks.wrapped(x, first, alpha), {})
    return call if key is None else _SEEN.put(key, call)


def checked_start(x: Tensor, seed: Tensor, packing: Packing) -> Call:
    """The same for random_start."""
    key: Any = None
    if not is_compiling():
        try:
            key = (packing, kind_of(x), seed.shape, seed.dtype, seed.device)
            if (found := _SEEN.get(key)) is not None:
                return found
        except (AttributeError, TypeError, RuntimeError):
            pass
    checks.inputs("x", x)
    check_seed(seed, x)
    call = Call(packing, (x.dtype,), checks.wrapped(x), {})
    return call if key is None else _SEEN.put(key, call)


def kind_of(tensor: Tensor) -> tuple[Any, ...]:
    """What the checks and a plan look at."""
    return tensor.shape, tensor.stride(), tensor.dtype, tensor.device, type(tensor), tensor.requires_grad


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
    out: tuple[Tensor, Tensor], x: Tensor, first: Tensor | None, alpha: Tensor | None, seed: Tensor, call: Call
) -> None:
    """Check the tensors that a call is to write to. ``first``: grad or x_adv."""
    key: Any = None
    if not is_compiling():
        with suppress(AttributeError, TypeError, RuntimeError):  # as in checked()
            key = ("out", type(out), *map(kind_of, out))
    if key is None or key not in call.kept:
        check_form_of_out(out, x, first, call.packing)
        if key is not None and len(call.kept) < checks.MOST_KEPT:
            call.kept[key] = True
    inputs = [tensor for tensor in (x, first, alpha, seed) if tensor is not None]
    if not checks.have_memory(*inputs, *out):
        return
    if out[0].is_neg() or out[1].is_neg():
        raise ValueError(f"{expected_out(x, first, call.packing)}, got a negated view")
    if (out[0].is_inference() or out[1].is_inference()) and not torch.is_inference_mode_enabled():
        raise ValueError(f"{expected_out(x, first, call.packing)}, got one made in inference mode, outside of it")
    read = {tensor.untyped_storage().data_ptr() for tensor in inputs}
    written = [tensor.untyped_storage().data_ptr() for tensor in out if tensor.numel()]
    if len({*read, *written}) < len(read) + len(written):
        raise ValueError("out: expected tensors that share no storage with each other or an input, got some that do")


def check_form_of_out(out: tuple[Tensor, Tensor], x: Tensor, first: Tensor | None, packing: Packing) -> None:
    """Check their number, shapes, dtypes, devices and strides, which are the same for all calls that are alike."""
    if not isinstance(out, (tuple, list)) or len(out) != 2 or not all(isinstance(tensor, Tensor) for tensor in out):
        raise TypeError(f"{expected_out(x, first, packing)}, got {checks.describe(out)}")
    rows, residuals = packed_rows(x.shape[0], first is not None, packing)
    dtype, memory_format = packing.dtype or x.dtype, output_format(x, packing)
    points, alphas = out
    fits = (points.shape, points.dtype) == ((rows, *x.shape[1:]), dtype) and points.device == x.device
    fits &= (alphas.shape, alphas.dtype) == ((residuals,), _work(x)) and alphas.device == x.device
    if not (fits and points.is_contiguous(memory_format=memory_format) and alphas.is_contiguous()):
        got = f"{checks.describe(points)} and {checks.describe(alphas)}"
        strides = f"strides {list(points.stride())} and {list(alphas.stride())}"
        raise ValueError(f"{expected_out(x, first, packing)}, got {got} with {strides}")
    if any(tensor.requires_grad for tensor in out):
        raise ValueError(f"{expected_out(x, first, packing)}, got one that requires grad")


def expected_out(x: Tensor, first: Tensor | None, packing: Packing) -> str:
    """What is to be written to, for messages."""
    rows, residuals = packed_rows(x.shape[0], first is not None, packing)
    return (
        f"out: expected None or a tuple of points, {packing.dtype or x.dtype} {[rows, *x.shape[1:]]} in "
        f"{output_format(x, packing)}, and alpha, {_work(x)} [{residuals}], on {x.device}, that require no grad"
    )


def _work(x: Tensor) -> torch.dtype:
    """The dtype of the arithmetic, and of alpha."""
    return torch.float64 if x.dtype == torch.float64 else torch.float32


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
