"""ELLE's own methods, and E_lin added to the loss of another one."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from functools import partial
from typing import Any

import torch
from torch import Tensor

from elle_fast import presets
from elle_fast._core import ddp
from elle_fast._core.unwrapping import Model, unwrapped
from elle_fast.adaptive import weighted_sum
from elle_fast.loss import ELLELoss
from elle_fast.methods import guided, trades
from elle_fast.methods.base import Bounds, Criterion, Method
from elle_fast.methods.mixup import AdvMixUpSingle
from elle_fast.passes import NO_KWARGS, ModelKwargs

_OF_ELLE_A = ("skip_below", "lagged")  # they need its history
LEVERS = ("forward", "skip_below", "triplet_fraction", "lagged", "points", "triplets", "alpha", "max_ratio")


class PlusELLE(ELLELoss):
    """``base + lam * E_lin`` (the ELLE paper, section 4.5 and appendix B.13): ELLE on top of GAT or TRADES.

    The triplets have a forward pass of their own. ``stats["ce"]`` and ``output`` are the base's.

    Args:
        base: the criterion that E_lin is added to; it makes the attack.
        eps, lam, options: those of :class:`~elle_fast.ELLELoss`, except ``attack``, ``forward`` and ``max_ratio``.
    """

    def __init__(self, base: Criterion, eps: float, lam: float, **options: Any) -> None:
        if options.get("max_ratio") is not None:
            raise ValueError(
                "max_ratio: E_lin on top of another loss has no rows of the cross-entropy to be measured against, so "
                f"this option does not apply (got {options['max_ratio']!r})"
            )
        super().__init__(eps, lam, attack="none", **options)
        self.base = base

    def compute(
        self,
        model: Model,
        x: Tensor,
        target: Tensor,
        x_adv: Tensor | None = None,
        kwargs: ModelKwargs = NO_KWARGS,
        *,
        kind: str = "full",
    ) -> Tensor:
        """The loss of a checked batch in a step of one kind."""
        if x_adv is not None:
            raise ValueError("x_adv: expected None, as the base makes its own attack, got points")
        base: Tensor = self.base(model, x, target, model_kwargs=kwargs.with_values(kwargs.values))
        with torch.no_grad() if kind == "light" else nullcontext():
            packing = self.in_batch(x.shape[0], model)
            e_lin = self.linearity.e_lin(unwrapped(model), x, target, packing, None, kwargs)
        updates = self.updates(model)
        lam = self.weight(e_lin.device, updates)
        loss = weighted_sum(base, e_lin, lam, self.linearity.backend)
        self.record(loss, self.base.stats["ce"], e_lin, lam, self.base.output, updates)
        return ddp.with_all_passes(model, loss)


_BASES = {**guided.ROWS, **trades.ROWS}


def _on_top(
    name: str, *, eps: float, lam: float, bounds: Bounds, epoch_steps: int | None = None, **options: Any
) -> PlusELLE:
    """The base has its own default weight."""
    row = _BASES[name]
    taken = {"epoch_steps": epoch_steps} if "epoch_steps" in row.takes else {}
    base = row.make(eps=eps, bounds=bounds, lam=presets.weight(name), **taken)
    return PlusELLE(base, eps, lam, bounds=bounds, **options)


def _mixup(*, eps: float, lam: float, bounds: Bounds, **options: Any) -> AdvMixUpSingle:
    return AdvMixUpSingle(eps, bounds, ELLELoss(eps, lam, bounds=bounds, **options))


_PACKED, _ON_TOP = ("5F 1G 4B", 14), ("6F 1G 5B", 17)


def _row(about: str, make: Callable[..., Any], passes: str, units: float, *without: str, **row: Any) -> Method:
    levers = tuple(name for name in LEVERS if name not in without)
    return Method(about, "2401.11618", passes, units, make, levers=levers, **{"takes": ("lam",), **row})


def _pair(base: str, about: str, make: Callable[..., Any], *cells: Any, **row: Any) -> dict[str, Method]:
    adaptive = partial(make, adaptive=True)
    return {
        f"{base}+elle": _row(f"{about} + lam E_lin", make, *cells, *_OF_ELLE_A, **row),
        f"{base}+elle-a": _row(f"{about} + lam E_lin, lam of ELLE-A", adaptive, *cells, **row),
    }


_2P = partial(ELLELoss, points="elle-2p")
ROWS = {
    "elle": _row("FGSM + lam E_lin", ELLELoss, *_PACKED, *_OF_ELLE_A, clamped=False),
    "elle-a": _row("FGSM + lam E_lin, lam adaptive", partial(ELLELoss, adaptive=True), *_PACKED, clamped=False),
    "elle-2p": _row("FGSM + lam r^2 with x_fgsm as x_b", _2P, "4F 1G 3B", 11, "points", *_OF_ELLE_A, clamped=False),
    **_pair("n-fgsm", "N-FGSM", partial(ELLELoss, attack="n-fgsm"), *_PACKED),
    **_pair("gat", "GAT", partial(_on_top, "gat"), *_ON_TOP, "forward", "max_ratio", takes=("lam", "epoch_steps")),
    **_pair("gat-fgsm", "GAT at x_adv", partial(_on_top, "gat-fgsm"), *_ON_TOP, "forward", "max_ratio"),
    **_pair("trades-single", "TRADES-single", partial(_on_top, "trades-single"), *_ON_TOP, "forward", "max_ratio"),
    **_pair("advmixup-single", "AdvMixUp-single", _mixup, *_PACKED),
}
