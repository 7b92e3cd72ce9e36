"""The table of training methods, and how a criterion is built from its name."""

from __future__ import annotations

import re
from dataclasses import replace
from typing import Any

from elle_fast import presets
from elle_fast._core import checks
from elle_fast.adaptive import RULES, AdaptiveLambda
from elle_fast.auto import AutoLambda
from elle_fast.criterion import TrainingLoss
from elle_fast.methods import (
    aaer,
    adversarial,
    advlc,
    compose,
    converge_smooth,
    elle,
    fast_bat,
    fgsm_penalties,
    free,
    guided,
    liet,
    mart,
    mixup,
    pco,
    prior_guided,
    slat,
    ssat,
    trades,
    uap,
)
from elle_fast.methods.base import Bounds, Method
from elle_fast.methods.slat import Layers
from elle_fast.ranges import ANY
from elle_fast.weighing import CLAMPS

_MODULES = (
    adversarial,
    ssat,
    aaer,
    advlc,
    free,
    fast_bat,
    slat,
    guided,
    uap,
    liet,
    trades,
    mart,
    mixup,
    prior_guided,
    converge_smooth,
    pco,
    fgsm_penalties,
    elle,
)
_BASES: dict[str, Method] = {name: row for module in _MODULES for name, row in module.ROWS.items()}
# Those of the paper: sections 4.4 and 4.5, appendices B.10 and B.13. Its authors' code for CIFAR clamps nothing.
_WITH_ELLE = ("n-fgsm", "plain", "gat", "gat-fgsm", "trades-single", "advmixup-single")


def _of_the_paper(name: str) -> Method:
    row = replace(compose.find(name, _BASES), source="2401.11618")
    return replace(row, clamp="none") if name.startswith("n-fgsm") else row


TABLE = _BASES | {name: _of_the_paper(name) for base in _WITH_ELLE for name in (f"{base}+elle", f"{base}+elle-a")}
"""The methods that are named in a paper; :func:`find` knows those that are put together by rule, too."""
NAMES = tuple(TABLE)


def find(name: str) -> Method:
    """The row of a method: of :data:`TABLE`, or a base and what is added: ``nuat+elle-a``, ``n-fgsm+elle-a+advlc+awp``.

    Raises:
        TypeError, ValueError: for an unknown name; of an unknown combination the message says why there is none.
    """
    if isinstance(name, str) and name not in TABLE and "+" in name:
        return compose.find(name, TABLE)
    return TABLE[checks.choice("method", name, NAMES)]


def build(
    method: str,
    *,
    eps: float,
    lam: float | str | None = None,
    base_lam: float | None = None,
    bounds: Bounds = None,
    clamp: str = "all",
    label_smoothing: float | None = None,
    steps: int | None = None,
    epoch_steps: int | None = None,
    samples: int | None = None,
    classes: int | None = None,
    layers: Layers | None = None,
    **levers: Any,
) -> TrainingLoss:
    """The criterion of a method.

    Args:
        method: one of :data:`NAMES`, or what :func:`find` puts together.
        eps: radius of the linf ball, in units of the inputs.
        lam: weight of the method's regulariser (lam_max if ELLE-A's is there); ``None`` is the default for CIFAR-10,
            see :func:`elle_fast.presets.weight`. A method without a regulariser takes ``None`` only. ``"auto"``: that
            of :class:`~elle_fast.AutoLambda`, for methods with ELLE-A.
        base_lam: where lam is the weight of what is added (``gat+elle``, ``gat+advlc``), that of the method itself;
            ``None`` is its default for CIFAR-10. AdvLC on top of E_lin has its authors' 0.3.
        bounds: range of the inputs, to which points are clamped. ``"any"`` clamps nothing, as does ``None``, with a
            warning once for pictures outside of [0, 1].
        clamp: ``"all"`` points, those of the ``"attack"``, the ``"triplets"`` of E_lin, or ``"none"``. What is usual
            for a method is ``find(method).clamp``.
        label_smoothing: of the cross-entropy that is trained on, in ``[0, 1]``. An attack's own loss, E_lin and other
            regularisers have none (Free AT's one loss has; LIET's attack has). ``None``: LIET's own, see
            :func:`elle_fast.presets.smoothing`; of the others 0.
        steps: optimiser steps of the whole run, over which the weights of NuAT, LIET and AdvLC grow; ``None``: they
            are constant.
        epoch_steps: optimiser steps of an epoch, in which GAT, NuAT and LIET count steps anew, and PGI begins anew
            every 40; ``None``: they do not. ConvergeSmooth needs it, to compare epochs; AWP around TRADES waits nine
            of them, without it none.
        samples: number of the training samples, for methods that keep something for each, such as PGI.
        classes: number of the classes, for methods that keep something for each; ``None``: CUAP and LIET count the
            model's logits in their first step.
        layers: maps the model to the hidden layers that SLAT perturbs; ``None``: all convolution and linear layers but
            the last.
        levers: further options of :class:`~elle_fast.ELLELoss`, and ``window`` and ``rule`` of
            :class:`~elle_fast.AdaptiveLambda`, for the methods that take them.

    Raises:
        TypeError, ValueError: naming the argument, what was expected and what was got.
    """
    row = find(method)
    if layers is not None and not callable(layers):
        raise TypeError(f"layers: expected None or a callable, got {checks.describe(layers)}")
    if "lam" not in row.takes and lam is not None:
        raise ValueError(
            f"lam: method {method!r} has no weight, so this option does not apply (got {checks.shown(lam)})"
        )
    if base_lam is not None and "base_lam" not in row.takes:
        raise ValueError(
            f"base_lam: method {method!r} has no second weight, so this option does not apply "
            f"(got {checks.shown(base_lam)})"
        )
    if "points" in levers:  # elle-2p is a method of its own
        checks.choice("points", levers["points"], ("elle", "five-point"))
    for name, value in levers.items():
        if name not in row.levers:
            why = "has no E_lin term"
            if row.levers:
                why = row.refuses.get(name, f"takes {', '.join(row.levers)} only")
            raise ValueError(_does_not_apply(method, name, name, why, value))
    if lam == "auto" and "skip_below" not in row.levers:
        raise ValueError(_does_not_apply(method, "lam", "skip_below", "is without the history of ELLE-A", lam))
    counts = {"steps": steps, "epoch_steps": epoch_steps, "samples": samples, "classes": classes}
    for name, count in counts.items():
        if count is not None:
            checks.integer(name, count, low=1)
    if samples is None and "samples" in row.takes:
        expected = "expected the number of training samples, an integer >= 1"
        raise TypeError(f"samples: method {method!r} keeps something for each training sample; {expected}, got None")
    if checks.choice("clamp", clamp, CLAMPS) in ("triplets", "none") and not row.levers and bounds is not None:
        bounds = ANY
    weight: Any = presets.weight(method, eps=eps, penalty=levers.get("penalty", "squared")) if lam is None else lam
    if moved := {name: levers.pop(name) for name in elle.OF_CONTROLLER if name in levers}:
        if weight == "auto" and checks.choice("rule", moved.pop("rule", "paper"), RULES) != "paper":
            raise ValueError("rule: expected 'paper' with lam='auto', whose weight follows from a history of E_lin")
        weight = AutoLambda(**moved) if weight == "auto" else AdaptiveLambda(weight, **moved)
    given = {"lam": weight, "base_lam": base_lam, "layers": layers, **counts}
    taken = {name: given[name] for name in row.takes} | ({"clamp": clamp} if row.levers else {})
    criterion: TrainingLoss = row.make(eps=eps, bounds=bounds, **taken, **levers)
    own = presets.smoothing(method, eps=eps)
    criterion.core.label_smoothing = own if label_smoothing is None else label_smoothing
    return criterion


def _does_not_apply(method: str, name: str, like: str, why: str, value: Any) -> str:
    """Of an option; ``like`` is the lever that goes with it."""
    other = re.sub(r"(?<![^+])elle(?=$|\+)", "elle-a", method)  # whose history some options need
    hint = f"; method {other!r} takes it" if other != method and like in find(other).levers else ""
    return f"{name}: method {method!r} {why}, so this option does not apply (got {checks.shown(value)}){hint}"
