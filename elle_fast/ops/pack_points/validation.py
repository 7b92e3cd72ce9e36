"""What pack_points and random_start accept. Everything is checked here, once; inside, code trusts its arguments."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from elle_fast.ops import checks, layout


@dataclass(frozen=True)
class Packing:
    """The checked options of one call; lengths are in units of x, except ``start``, in units of eps."""

    eps: float
    step_size: float
    start: float
    project: bool
    bounds: tuple[float, float] | None
    statistics: tuple[tuple[float, ...], tuple[float, ...]] | None
    norm: str
    points: str
    triplets: int
    alpha: str
    fraction: float
    dtype: torch.dtype | None
    memory_format: torch.memory_format
    sample_offset: int


def packing_options(
    *,
    eps: float,
    step_size: float | None = None,
    start: float = 0.0,
    project: bool = False,
    bounds: tuple[float, float] | None = None,
    mean: tuple[float, ...] | None = None,
    std: tuple[float, ...] | None = None,
    norm: str = "linf",
    points: str = "elle",
    triplets: int = 1,
    alpha: str | Tensor = "uniform",
    fraction: float = 1.0,
    dtype: torch.dtype | None = None,
    memory_format: torch.memory_format = torch.preserve_format,
    sample_offset: int = 0,
) -> Packing:
    """Check every option that is not a tensor."""
    eps = checks.real("eps", eps, low=0)
    points = checks.choice("points", points, layout.BLOCKS)
    if not isinstance(alpha, Tensor):
        checks.choice("alpha", alpha, layout.ALPHAS)
    if points == "five-point" and not (isinstance(alpha, str) and alpha == "uniform"):
        raise ValueError(
            f"alpha: expected the default 'uniform' with points='five-point', whose five places are fixed, "
            f"got {checks.describe(alpha)}"
        )
    if dtype is not None and not (isinstance(dtype, torch.dtype) and dtype.is_floating_point):
        raise TypeError(f"dtype: expected None or a floating-point torch.dtype, got {checks.describe(dtype)}")
    if not isinstance(memory_format, torch.memory_format):
        raise TypeError(f"memory_format: expected a torch.memory_format, got {checks.describe(memory_format)}")
    return Packing(
        eps=eps,
        step_size=eps if step_size is None else checks.real("step_size", step_size, low=0),
        start=checks.real("start", start, low=0),
        project=checks.flag("project", project),
        bounds=checks.bounds(bounds),
        statistics=checks.statistics(mean, std),
        norm=checks.choice("norm", norm, layout.NORMS),
        points=points,
        triplets=checks.integer("triplets", triplets, low=0, high=checks.MAX_TRIPLETS),
        alpha=alpha if isinstance(alpha, str) else "given",
        fraction=checks.real("fraction", fraction, low=0, low_allowed=False, high=1),
        dtype=dtype,
        memory_format=memory_format,
        # A sample's index is one 32-bit word of the counter.
        sample_offset=checks.integer("sample_offset", sample_offset, low=0, high=(1 << 31) - 1),
    )


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
        expected = packing.triplets * layout.triplet_rows(x.shape[0], packing.fraction)
        if not alpha.is_floating_point() or alpha.shape != (expected,) or alpha.device != x.device:
            raise ValueError(
                f"alpha: expected a name or a floating-point tensor of shape [{expected}] on {x.device}, "
                f"got {checks.describe(alpha)}"
            )
    check_form(x, packing)


def check_form(x: Tensor, packing: Packing) -> None:
    """Check x's dimensions against the options."""
    if packing.statistics is not None and (x.dim() < 2 or x.shape[1] != len(packing.statistics[0])):
        raise ValueError(
            f"mean, std: expected one number per channel of x (its dimension 1), x has shape {list(x.shape)}, "
            f"got {len(packing.statistics[0])} numbers"
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
