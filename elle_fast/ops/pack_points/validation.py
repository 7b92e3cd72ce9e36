"""What pack_points and random_start accept. Everything is checked here, once; inside, code trusts its arguments."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from elle_fast._core import checks
from elle_fast.ops import layout, philox

_FIVE_PLACES = "alpha: expected the default 'uniform' with points='five-point', whose five places are fixed"


class Packing(NamedTuple):
    """Every option of the points that is not a tensor. :meth:`checked` makes one; it travels as it is.

    Attributes:
        eps: radius of the ball, ``>= 0``, in units of x.
        step_size: length of the attack's step in units of x; by default ``eps``.
        start: radius of the attack's random start in units of eps (0 FGSM, 1 RS-FGSM, 2 N-FGSM).
        project: whether x_adv is projected to the eps ball around x.
        bounds: ``(low, high)`` to which x_adv, x_a and x_b are clamped; ``None`` clamps nothing.
        mean, std: per-channel statistics (dimension 1); every point leaves as ``(point - mean) / std``.
        norm: ``"linf"``, or ``"l2"``: the step goes along grad / ||grad||_2, noise is uniform in the l2 ball.
        points: ``"elle"``, ``"elle-2p"`` (x_b is x_adv; paper, B.11) or ``"five-point"`` (paper, Definition 3).
        triplets: independent triplets (paper, B.3); 0 packs x_adv alone.
        alpha: ``"uniform"``, or ``"half"`` for 0.5.
        fraction: the triplets cover the first ``Bt = ceil(fraction * B)`` samples, in ``(0, 1]``.
        dtype: dtype of the points; ``None`` keeps x's. Arithmetic is in float32 (float64 for float64 x).
        memory_format: of the points; ``torch.preserve_format`` keeps x's.
        sample_offset: index of x's first sample in the whole batch, for a batch that is packed in parts.
    """

    eps: float
    step_size: float
    start: float = 0.0
    project: bool = False
    bounds: tuple[float, float] | None = None
    mean: tuple[float, ...] | None = None
    std: tuple[float, ...] | None = None
    norm: str = "linf"
    points: str = "elle"
    triplets: int = 1
    alpha: str = "uniform"
    fraction: float = 1.0
    dtype: torch.dtype | None = None
    memory_format: torch.memory_format = torch.preserve_format
    sample_offset: int = 0

    @classmethod
    def checked(cls, eps: float, step_size: float | None = None, **options: Any) -> Packing:
        """The options of one or many calls; mean and std may be any sequences.

        Raises:
            TypeError, ValueError: naming the argument, what was expected and what was got.
        """
        eps = checks.real("eps", eps, low=0)
        step_size = eps if step_size is None else checks.real("step_size", step_size, low=0)
        given = cls(eps, step_size, **options)
        checks.choice("points", given.points, layout.BLOCKS)
        checks.choice("alpha", given.alpha, layout.ALPHAS)
        if given.points == "five-point" and given.alpha != "uniform":
            raise ValueError(f"{_FIVE_PLACES}, got {given.alpha!r}")
        dtype = given.dtype
        if dtype is not None and not (isinstance(dtype, torch.dtype) and dtype.is_floating_point):
            raise TypeError(f"dtype: expected None or a floating-point torch.dtype, got {checks.describe(dtype)}")
        if not isinstance(given.memory_format, torch.memory_format):
            got = checks.describe(given.memory_format)
            raise TypeError(f"memory_format: expected a torch.memory_format, got {got}")
        mean, std = checks.statistics(given.mean, given.std) or (None, None)
        return given.starting(checks.real("start", given.start, low=0))._replace(
            project=checks.flag("project", given.project),
            bounds=checks.bounds(given.bounds),
            mean=mean,
            std=std,
            norm=checks.choice("norm", given.norm, layout.NORMS),
            triplets=checks.integer("triplets", given.triplets, low=0, high=philox.MAX_TRIPLETS),
            fraction=checks.real("fraction", given.fraction, low=0, low_allowed=False, high=1),
            sample_offset=checks.integer("sample_offset", given.sample_offset, low=0, high=philox.MAX_SAMPLE),
        )

    def starting(self, start: float) -> Packing:
        """The same from a random start, whose radius is a float32 number as well."""
        checks.real("start * eps", start * self.eps, low=0)
        return self._replace(start=start)

    @property
    def attack_alone(self) -> Packing:
        """The same for x_adv by itself, in x's own form."""
        return self._replace(triplets=0, mean=None, std=None, dtype=None, memory_format=torch.preserve_format)

    def __reduce__(self) -> tuple[Any, ...]:
        # torch.save pickles with a protocol that cannot take a torch.memory_format; its name it can.
        return _unpickled, (tuple(str(value) if isinstance(value, torch.memory_format) else value for value in self),)

    def part(self, batch: int) -> int:
        """Samples of a batch that have triplets, the first ones."""
        return layout.triplet_rows(batch, self.fraction)

    def residuals(self, batch: int) -> int:
        """Residuals of a batch, one alpha each."""
        return self.triplets * self.part(batch)

    def rows(self, batch: int, *, adv: bool) -> int:
        """Rows of the packed batch; ``adv``: whether it begins with x_adv."""
        return (batch if adv else 0) + layout.BLOCKS[self.points] * self.residuals(batch)

    def output_format(self, x: Tensor) -> torch.memory_format:
        """The memory format asked for; else x's own, channels-last where it is that and not contiguous as well."""
        if self.memory_format != torch.preserve_format:
            return self.memory_format
        if not layout.is_channels_last(x):
            return torch.contiguous_format
        return torch.channels_last if x.dim() == 4 else torch.channels_last_3d

    def check_form(self, x: Tensor) -> None:
        """Check x's dimensions against the options."""
        if self.mean is not None and (x.dim() < 2 or x.shape[1] != len(self.mean)):
            raise ValueError(
                f"mean, std: expected one number per channel of x (its dimension 1), x has shape {list(x.shape)}, "
                f"got {len(self.mean)} numbers"
            )
        needed = {torch.channels_last: 4, torch.channels_last_3d: 5}.get(self.memory_format)
        if needed is not None and x.dim() != needed:
            raise ValueError(
                f"memory_format: expected x of {needed} dimensions for {self.memory_format}, got {checks.describe(x)}"
            )


def _unpickled(values: tuple[Any, ...]) -> Packing:
    packing = Packing(*values)
    return packing._replace(memory_format=getattr(torch, str(packing.memory_format).removeprefix("torch.")))


def check_tensors(
    x: Tensor, grad: Tensor | None, x_adv: Tensor | None, alpha: Tensor | None, seed: Tensor, packing: Packing
) -> None:
    """Check the tensors of one call against each other and against the options."""
    check_start(x, seed)
    if grad is not None and x_adv is not None:
        raise ValueError("grad, x_adv: expected at most one of them, as each gives the rows of x_adv, got both")
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
        expected = packing.residuals(x.shape[0])
        wrong = not alpha.is_floating_point() or alpha.shape != (expected,) or alpha.device != x.device
        if wrong or alpha.requires_grad:
            raise ValueError(
                f"alpha: expected a name or a floating-point tensor of shape [{expected}] on {x.device} without grad, "
                f"got {checks.describe(alpha)}"
            )
    packing.check_form(x)


def check_start(x: Tensor, seed: Tensor) -> None:
    """x, and a 0-dim int64 seed on its device."""
    checks.inputs("x", x)
    if not isinstance(seed, Tensor) or seed.dtype != torch.int64 or seed.dim() != 0 or seed.device != x.device:
        raise checks.refusal(f"seed: expected a 0-dim int64 tensor on {x.device}", seed, isinstance(seed, Tensor))


def check_out(
    out: tuple[Tensor, Tensor], x: Tensor, given: Tensor | None, alpha: Tensor | None, seed: Tensor, packing: Packing
) -> None:
    """Check the tensors that a call is to write to. ``given``: grad or x_adv."""
    rows, residuals = packing.rows(x.shape[0], adv=given is not None), packing.residuals(x.shape[0])
    dtype, memory_format = packing.dtype or x.dtype, packing.output_format(x)
    work = torch.float64 if x.dtype == torch.float64 else torch.float32
    expected = (
        f"out: expected None or a tuple of points, {dtype} {[rows, *x.shape[1:]]} in {memory_format}, and alpha, "
        f"{work} [{residuals}], on {x.device}, that require no grad"
    )
    if not isinstance(out, (tuple, list)) or len(out) != 2 or not all(isinstance(tensor, Tensor) for tensor in out):
        raise TypeError(f"{expected}, got {checks.describe(out)}")
    points, alphas = out
    fits = (points.shape, points.dtype) == ((rows, *x.shape[1:]), dtype) and points.device == x.device
    fits &= (alphas.shape, alphas.dtype) == ((residuals,), work) and alphas.device == x.device
    if not (fits and points.is_contiguous(memory_format=memory_format) and alphas.is_contiguous()):
        got = f"{checks.describe(points)} and {checks.describe(alphas)}"
        raise ValueError(f"{expected}, got {got} with strides {list(points.stride())} and {list(alphas.stride())}")
    if any(tensor.requires_grad for tensor in out):
        raise ValueError(f"{expected}, got one that requires grad")
    inputs = [tensor for tensor in (x, given, alpha, seed) if tensor is not None]
    if not checks.have_memory(*inputs, *out):
        return
    if points.is_neg() or alphas.is_neg():
        raise ValueError(f"{expected}, got a negated view")
    if (points.is_inference() or alphas.is_inference()) and not torch.is_inference_mode_enabled():
        raise ValueError(f"{expected}, got one made in inference mode, outside of it")
    read = {tensor.untyped_storage().data_ptr() for tensor in inputs}
    written = [tensor.untyped_storage().data_ptr() for tensor in out if tensor.numel()]
    if len({*read, *written}) < len(read) + len(written):
        raise ValueError("out: expected tensors that share no storage with each other or an input, got some that do")
