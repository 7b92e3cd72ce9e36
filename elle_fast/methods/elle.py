"""ELLE's own methods, and E_lin added to the loss of another one."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

from torch import Tensor

from elle_fast._core import checks, ddp
from elle_fast._core.unwrapping import Model, unwrapped
from elle_fast._core.without_trace import without_trace
from elle_fast.loss import ELLELoss
from elle_fast.methods.base import Criterion, Method, OfBase
from elle_fast.passes import NO_KWARGS, ModelKwargs
from elle_fast.weighing import LinearityLoss
from elle_fast.weighted_sum import weighted_sum

OF_CONTROLLER = ("window", "rule", "ramp")
OF_ELLE_A = ("skip_below", "lagged", *OF_CONTROLLER)  # they are of its lam that moves
LEVERS = (
    *("forward", "skip_below", "triplet_fraction", "lagged", "points", "triplets", "alpha", "max_ratio"),
    *("penalty", *OF_CONTROLLER, "norm", "triplet_precision"),
)
PACKED_ONLY = ("forward", "max_ratio", "norm")  # they are of x_adv too


class PlusELLE(OfBase, LinearityLoss):
    """``base + lam * E_lin`` (the ELLE paper, section 4.5 and appendix B.13): ELLE on top of GAT or TRADES.

    The triplets have a forward pass of their own. ``stats["ce"]`` and ``output`` are the base's.

    Args:
        base: the criterion that E_lin is added to; it makes the attack.
        eps, lam, options: those of :class:`~elle_fast.ELLELoss`, without what concerns x_adv; ``bounds`` are the
            triplets'.
    """

    def __init__(self, base: Criterion, eps: float, lam: float, **options: Any) -> None:
        if options.pop("max_ratio", None) is not None:
            raise ValueError(
                "max_ratio: E_lin on top of another loss has no rows of the cross-entropy to be measured against, so "
                "this option does not apply"
            )
        super().__init__(eps, lam, **options)
        self.base = base

    @property
    def eps(self) -> float:
        """The radius, of both; it may be set."""
        return self.linearity.eps

    @eps.setter
    def eps(self, value: float) -> None:
        self.linearity.eps = self.base.eps = checks.real("eps", value, low=0)

    def compute(
        self,
        model: Model,
        x: Tensor,
        target: Tensor,
        x_adv: Tensor | None = None,
        kwargs: ModelKwargs = NO_KWARGS,
        *,
        kind: str = "full",
        samples: Any = None,
    ) -> Tensor:
        """The loss of a checked batch in a step of one kind."""
        if x_adv is not None:
            raise ValueError("x_adv: expected None, as the base makes its own attack, got points")
        base: Tensor = self.base(model, x, target, samples=samples, model_kwargs=kwargs.with_values(kwargs.values))
        with without_trace(model, kind == "light"):
            packing = self.in_batch(self.packing, x.shape[0], model)
            rows, alpha = self.linearity.triplets(unwrapped(model), x, target, packing, None, kwargs)
            e_lin = self.linearity.error(rows, target, alpha)
        updates = self.updates(model)
        lam = self.weight(e_lin.device, updates)
        relative = self.relative(rows, target, alpha, self.linearity.options.alone) if updates else None
        loss = weighted_sum(base, e_lin, lam, self.linearity.backend, relative)
        ce = self.base.stats.get("ce", base.detach())
        self.record(loss, ce, e_lin, lam, self.base.output, updates, relative)
        return ddp.with_all_passes(model, loss)


_PACKED = ("5F 1G 4B", 14)


def _row(about: str, make: Callable[..., Any], cost: tuple[str, float], *without: str, why: str) -> Method:
    levers = tuple(name for name in LEVERS if name not in without)
    refuses: Mapping[str, str] = {"elle": why}
    return Method(about, "2401.11618", *cost, make, ("lam",), "none", levers, refuses=refuses)


_HAS_IT = "it has E_lin already"
_NOT_OF_2P = ("points", "triplet_precision", *OF_ELLE_A)
_2P = partial(ELLELoss, points="elle-2p")
ROWS = {
    "elle": _row("FGSM + lam E_lin", ELLELoss, _PACKED, *OF_ELLE_A, why=_HAS_IT),
    "elle-a": _row("FGSM + lam E_lin, lam adaptive", partial(ELLELoss, adaptive=True), _PACKED, why=_HAS_IT),
    "elle-2p": _row("FGSM + lam r^2 with x_fgsm as x_b", _2P, ("4F 1G 3B", 11), *_NOT_OF_2P, why=_HAS_IT),
}
