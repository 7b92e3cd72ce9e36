"""The table of training methods, and how a criterion is built from its name."""

from __future__ import annotations

from typing import Any

from elle_fast import presets
from elle_fast._core import checks
from elle_fast.loss import ELLELoss
from elle_fast.methods import aaer, adversarial, elle, fast_bat, fgsm_penalties, free, guided, mixup, slat, trades
from elle_fast.methods.base import Bounds, Criterion, Method
from elle_fast.methods.slat import Layers

_MODULES = (adversarial, aaer, free, fast_bat, slat, guided, trades, mixup, fgsm_penalties, elle)
TABLE: dict[str, Method] = {name: row for module in _MODULES for name, row in module.ROWS.items()}
NAMES = tuple(TABLE)

_COMBINED = [name.removesuffix("+elle") for name in NAMES if name.endswith("+elle")]
_WHY_NOT_COMBINED = {
    "fgsm": "FGSM with E_lin is 'elle' or 'elle-a'",
    **dict.fromkeys(["elle", "elle-a", "elle-2p"], "it has E_lin already"),
    **dict.fromkeys(["gradalign", "cure", "cure-fgsm", "llr"], "it is a regulariser of local linearity itself"),
    **dict.fromkeys(["pgd-at", "free-at"], "E_lin is against the overfitting to single-step attacks"),
}


def find(name: str) -> Method:
    """The row of a method.

    Raises:
        TypeError, ValueError: for an unknown name; for an unknown combination the message says why there is none.
    """
    if isinstance(name, str) and name not in TABLE:
        base, _, added = name.partition("+")
        if base in TABLE and added in TABLE:
            why = "the paper combines it with no other method"
            if added in ("elle", "elle-a"):
                why = _WHY_NOT_COMBINED.get(base, f"the paper combines ELLE with {', '.join(_COMBINED)} only")
            elif added != "elle-2p":
                why = "only ELLE is added to other methods"
            raise ValueError(f"method: expected one of {', '.join(map(repr, NAMES))}, got {name!r}: {why}")
    return TABLE[checks.choice("method", name, NAMES)]


def build(
    method: str,
    *,
    eps: float,
    lam: float | None = None,
    bounds: Bounds = None,
    steps: int | None = None,
    epoch_steps: int | None = None,
    layers: Layers | None = None,
    **levers: Any,
) -> Criterion | ELLELoss:
    """The criterion of a method.

    Args:
        method: one of :data:`NAMES`.
        eps: radius of the linf ball, in units of the inputs.
        lam: weight of the method's regulariser (lam_max if ELLE-A's is there); ``None`` is the default for CIFAR-10,
            see :func:`elle_fast.presets.weight`. A method without a regulariser takes ``None`` only.
        bounds: range of the inputs, to which every point is clamped; ``None`` clamps nothing.
        steps: optimiser steps of the whole run, over which NuAT's weight grows; ``None``: it is constant.
        epoch_steps: optimiser steps of an epoch, in which GAT and NuAT count odd and even steps anew; ``None``: they
            are counted through.
        layers: maps the model to the hidden layers that SLAT perturbs; ``None``: all convolution and linear layers but
            the last.
        levers: further options of :class:`~elle_fast.ELLELoss`, for the methods that take them.

    Raises:
        TypeError, ValueError: naming the argument, what was expected and what was got.
    """
    row = find(method)
    if steps is not None:
        checks.integer("steps", steps, low=1)
    if layers is not None and not callable(layers):
        raise TypeError(f"layers: expected None or a callable, got {checks.describe(layers)}")
    if "lam" not in row.takes and lam is not None:
        raise ValueError(
            f"lam: method {method!r} has no weight, so this option does not apply (got {checks.shown(lam)})"
        )
    # points="elle-2p" is a method of its own. alpha="argmax" takes 12 more passes, which are for studies.
    for name, known in (("points", ("elle", "five-point")), ("alpha", ("uniform", "half"))):
        if name in levers:
            checks.choice(name, levers[name], known)
    for name, value in levers.items():
        if name not in row.levers:
            why = f"takes {', '.join(row.levers)} only" if row.levers else "has no E_lin term"
            other = f"{method}-a"  # ELLE-A, whose history some options need
            hint = f"; method {other!r} takes it" if other in TABLE and name in TABLE[other].levers else ""
            got = checks.shown(value)
            raise ValueError(f"{name}: method {method!r} {why}, so this option does not apply (got {got}){hint}")
    for name, count in (("steps", steps), ("epoch_steps", epoch_steps)):
        if count is not None:
            checks.integer(name, count, low=1)
    given = {"lam": presets.weight(method, eps=eps) if lam is None else lam, "layers": layers}
    given |= {"steps": steps, "epoch_steps": epoch_steps}
    taken = {name: given[name] for name in row.takes}
    criterion: Criterion | ELLELoss = row.make(eps=eps, bounds=bounds, **taken, **levers)
    return criterion
