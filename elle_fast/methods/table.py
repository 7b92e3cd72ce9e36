"""The table of training methods: what each is, costs and takes, and how its criterion is built."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

from elle_fast import ELLELoss, attacks, regularizers
from elle_fast._core import checks
from elle_fast.methods import double_backward
from elle_fast.methods.base import AdversarialLoss, Attack, Bounds, Criterion
from elle_fast.methods.combined import PlusELLE
from elle_fast.methods.fast_bat import FastBAT
from elle_fast.methods.free import REPLAYS, FreeAT
from elle_fast.methods.guided import Guided
from elle_fast.methods.logit_change import AdvLC
from elle_fast.methods.mixup import AdvMixUpSingle
from elle_fast.methods.slat import SLAT
from elle_fast.methods.trades import TradesSingle
from elle_fast.presets import PRESETS, Preset


@dataclass(frozen=True)
class Given:
    """What a criterion is built from: see :func:`build`."""

    eps: float
    lam: float | None
    bounds: Bounds
    steps: int | None
    levers: dict[str, Any]

    @property
    def weight(self) -> float:
        """``lam`` of a method that has one."""
        return checks.real("lam", self.lam, low=0)

    @property
    def base(self) -> tuple[float, Bounds]:
        """What every method takes."""
        return checks.real("eps", self.eps, low=0), checks.bounds(self.bounds)


# By data set, model and eps.
Weight = Callable[[str, str, float], float]
LEVERS = ("forward", "skip_below", "triplet_fraction", "lagged", "points", "triplets", "alpha")


@dataclass(frozen=True)
class Method:
    """A row of the table.

    Attributes:
        about: what it is, in a few words.
        source: arXiv number, or where it was published.
        passes: of one optimiser step over B samples: F forward passes, G gradients with respect to inputs, B backward
            passes to the weights; "D" if one of them is through the graph of a gradient (double backpropagation).
        units: the same, 1 for a forward pass, a data gradient or a weight gradient over B samples.
        make: builds the criterion.
        weight: ``lam`` if none is given; ``None`` for a method without one.
        clamped: whether its points stay in the image range by definition. FGSM and Algorithm 1 of the ELLE paper do not
            clamp, nor does the authors' code for CIFAR.
        clean_start: whether the first forward pass of a step is at the clean inputs.
        adv_pass: which forward pass of a step begins with the rows of the points trained on.
        levers: the options of :class:`~elle_fast.ELLELoss` it takes; none for a method without E_lin.
        logged: the numbers of ``stats`` beside the loss that are worth a column.
        replays: optimiser steps that are taken on each batch in a row.
    """

    about: str
    source: str
    passes: str
    units: float
    make: Callable[[Given], Criterion | ELLELoss]
    weight: Weight | None = None
    clamped: bool = False
    clean_start: bool = True
    adv_pass: int = 1
    levers: tuple[str, ...] = ()
    logged: tuple[str, ...] = ()
    replays: int = 1


def _all_but(lever: str) -> tuple[str, ...]:
    return tuple(name for name in LEVERS if name != lever)


# ---- Weights

# The paper has no values for digits and MNIST. Tried at eps 0.3, on seeds that are in no table: for ELLE on digits, of
# 20 to 1,000, 300 held best under PGD-20. On MNIST, of 30 to 5,000, 1,000 did (5,000 stalls it); ELLE-A overfitted with
# 300 and 1,000, and ended in NaN with 2,000.
DIGITS_LAM, _MNIST_LAM = 300.0, 1_000.0
# Of 10, 20, 60 and 1,000 for ELLE-2p, the first; of 20, 60 and 1,000 for LLR likewise. 1,000 end in NaN.
_DIGITS_LAM_2P, _DIGITS_LAM_LLR = 10.0, 20.0


def _always(value: float, digits: float | None = None, wide: float | None = None) -> Weight:
    """One value; another one on digits, where losses are larger functions of eps, or for WideResNet-28-10."""

    def weight(data: str, model: str, eps: float) -> float:
        if data == "digits" and digits is not None:
            return digits
        return wide if model == "wideresnet28-10" and wide is not None else value

    return weight


def _of_preset(choose: Callable[[Preset], float | None]) -> Weight:
    """The paper's value of ELLE for the data set; where it has none and nothing was tried, CIFAR-10's."""

    def weight(data: str, model: str, eps: float) -> float:
        if data in ("digits", "mnist"):
            return DIGITS_LAM if data == "digits" else _MNIST_LAM
        value = choose(PRESETS.get(data, PRESETS["cifar10"]))
        assert value is not None
        return value

    return weight


def _gradalign_weight(data: str, model: str, eps: float) -> float:
    """Its authors' 0.2 at 8/255 and 2.0 at 16/255; between and below geometric, as theirs, and 2.0 above."""
    return float(0.2 * 10 ** min(1.0, (255 * eps - 8) / 8))


# ---- Builders


def _attack(attack: Callable[..., Any]) -> Callable[[Given], Criterion]:
    def make(given: Given) -> Criterion:
        eps, bounds = given.base
        made: Attack = partial(attack, eps=eps, bounds=bounds)
        return AdversarialLoss(made)

    return make


def _elle(**options: Any) -> Callable[[Given], ELLELoss]:
    return lambda given: ELLELoss(given.eps, given.weight, bounds=given.bounds, **options, **given.levers)


def _plain(criterion: Callable[..., Criterion]) -> Callable[[Given], Criterion]:
    return lambda given: criterion(given.eps, bounds=given.bounds)


def _weighted(criterion: Callable[..., Criterion]) -> Callable[[Given], Criterion]:
    return lambda given: criterion(given.eps, given.weight, bounds=given.bounds)


def _guided(regularizer: Callable[[], Any], *, ramped: bool, weight: float | None = None) -> Callable[[Given], Guided]:
    def make(given: Given) -> Guided:
        ramp = max(1, round(_RAMP * given.steps)) if ramped and given.steps is not None else None
        lam = given.weight if weight is None else weight
        return Guided(regularizer(), given.eps, lam, ramp=ramp, bounds=given.bounds)

    return make


def _plus_elle(base: Callable[[Given], Criterion], adaptive: bool) -> Callable[[Given], ELLELoss]:
    def make(given: Given) -> ELLELoss:
        return PlusELLE(base(given), given.eps, given.weight, adaptive=adaptive, bounds=given.bounds, **given.levers)

    return make


def _mixup_elle(adaptive: bool) -> Callable[[Given], Criterion]:
    return lambda given: AdvMixUpSingle(given.eps, given.bounds, _elle(adaptive=adaptive)(given))


def _trades(given: Given) -> TradesSingle:
    return TradesSingle(given.eps, _BETA, bounds=given.bounds)


_GAT_WEIGHT, _NUAT_WEIGHT, _BETA = 10.0, 4.5, 6.0
# NuAT's weight has grown to its highest at this part of the run, that of its authors' code at epoch 90 of 100.
_RAMP = 0.9
_ELLE = "2401.11618"
_ELLE_LOG, _PENALTY_LOG = ("e_lin", "lam"), ("ce", "penalty")
_SINGLE, _PACKED = "2F 1G 1B", "5F 1G 4B"


def _elle_rows(base: str, about: str, make: Callable[[bool], Callable[[Given], Any]], **row: Any) -> dict[str, Method]:
    """``base+elle`` and ``base+elle-a``."""
    row = {"logged": _ELLE_LOG, "levers": LEVERS, "clamped": True, **row}
    constant = Method(f"{about} + lam E_lin", make=make(False), **row)
    adaptive = Method(f"{about} + lam E_lin, lam of ELLE-A", make=make(True), **row)
    return {f"{base}+elle": constant, f"{base}+elle-a": adaptive}


METHODS: dict[str, Method] = {
    "fgsm": Method("one step of eps from x", "1412.6572", _SINGLE, 5, _attack(attacks.fgsm)),
    "rs-fgsm": Method(
        "Fast AT: 1.25 eps from a uniform start, projected",
        "2001.03994",
        _SINGLE,
        5,
        _attack(attacks.rs_fgsm),
        clamped=True,
        clean_start=False,
    ),
    "n-fgsm": Method(
        "eps from a uniform start in 2 eps, not projected",
        "2202.01181",
        _SINGLE,
        5,
        _attack(attacks.n_fgsm),
        clamped=True,
        clean_start=False,
    ),
    "zero-grad": Method(
        "RS-FGSM with 2 eps, without the smallest gradients",
        "2103.15476",
        _SINGLE,
        5,
        _attack(attacks.zero_grad),
        clamped=True,
        clean_start=False,
    ),
    "free-at": Method(
        f"{REPLAYS} steps on each batch, of weights and delta at once",
        "1904.12843",
        "1F 1B",
        3,
        _plain(FreeAT),
        clamped=True,
        clean_start=False,
        adv_pass=0,
        replays=REPLAYS,
    ),
    "pgd-at": Method(
        "10 steps of eps / 4 from a uniform start",
        "1706.06083",
        "11F 10G 1B",
        23,
        _attack(attacks.pgd),
        clamped=True,
        clean_start=False,
        adv_pass=-1,
    ),
    "fast-bat": Method(
        "bi-level step, its lower level linearised",
        "2112.12376",
        "3F 3G 1B D",
        12,
        _weighted(FastBAT),
        weight=_always(10.0),
        clamped=True,
        clean_start=False,
        adv_pass=-1,
    ),
    "slat": Method("FGSM on the input and on hidden layers", "2104.01575", _SINGLE, 5, _plain(SLAT), clamped=True),
    "gat": Method(
        "clean loss + lam |softmax's change|^2, guided attack",
        "2011.14969",
        "3F 1G 2B",
        8,
        _guided(regularizers.GAT, ramped=False),
        weight=_always(_GAT_WEIGHT),
        clamped=True,
        adv_pass=2,
        logged=_PENALTY_LOG,
    ),
    "nuat": Method(
        "clean loss + lam nuclear norm of the logits' change",
        "NeurIPS 2021",
        "3F 1G 2B",
        8,
        _guided(regularizers.NuAT, ramped=True),
        weight=_always(_NUAT_WEIGHT),
        clamped=True,
        adv_pass=2,
        logged=_PENALTY_LOG,
    ),
    "trades-single": Method(
        "clean loss + lam KL(f(x) || f(x_adv))",
        "1901.08573",
        "3F 1G 2B",
        8,
        _weighted(TradesSingle),
        weight=_always(_BETA),
        clamped=True,
        adv_pass=2,
        logged=_PENALTY_LOG,
    ),
    "advmixup-single": Method(
        "soft-label mixture of x and x + 2 delta",
        "2003.02484",
        _SINGLE,
        5,
        _plain(AdvMixUpSingle),
        clamped=True,
        clean_start=False,
    ),
    "advlc": Method(
        "FGSM + lam largest tenth of the changes of logits",
        "2212.04985",
        "2F 1G 2B",
        7,
        _weighted(AdvLC),
        weight=_always(0.3),
        clamped=True,
        logged=_PENALTY_LOG,
    ),
    "gradalign": Method(
        "FGSM + lam misalignment of the gradients at two points",
        "2007.02617",
        "3F 2G 1B D",
        11,
        _weighted(double_backward.GradAlign),
        weight=_gradalign_weight,
        logged=_PENALTY_LOG,
    ),
    "cure": Method(
        "FGSM + lam change of the gradient between x and x_fgsm",
        "1811.09716",
        "2F 2G D",
        12,
        _weighted(double_backward.CURE),
        weight=_always(4.0),
        logged=_PENALTY_LOG,
    ),
    "llr": Method(
        "FGSM + lam squared error of the first-order expansion",
        "1907.02610",
        "3F 1G 2B D",
        12,
        _weighted(double_backward.LLR),
        # Of the 200 to 5,000 that the ELLE paper tries at each eps.
        weight=_always(1000.0, digits=_DIGITS_LAM_LLR),
        logged=_PENALTY_LOG,
    ),
    "elle": Method(
        "FGSM + lam E_lin",
        _ELLE,
        _PACKED,
        14,
        _elle(),
        weight=_of_preset(lambda preset: preset.elle),
        levers=LEVERS,
        logged=_ELLE_LOG,
    ),
    "elle-a": Method(
        "FGSM + lam E_lin, lam adaptive",
        _ELLE,
        _PACKED,
        14,
        _elle(adaptive=True),
        weight=_of_preset(lambda preset: preset.elle_a),
        levers=LEVERS,
        logged=_ELLE_LOG,
    ),
    "elle-2p": Method(
        "FGSM + lam |r| with x_fgsm as x_b",
        _ELLE,
        "4F 1G 3B",
        11,
        _elle(points="elle-2p", penalty="abs"),
        weight=_always(1000.0, digits=_DIGITS_LAM_2P),
        levers=_all_but("points"),
        logged=_ELLE_LOG,
    ),
    **_elle_rows(
        "n-fgsm",
        "N-FGSM",
        lambda adaptive: _elle(adaptive=adaptive, attack="n-fgsm"),
        source=_ELLE,
        passes=_PACKED,
        units=14,
        clean_start=False,
        weight=_of_preset(lambda preset: preset.n_fgsm_elle_a),
    ),
    **_elle_rows(
        "gat",
        "GAT",
        lambda adaptive: _plus_elle(_guided(regularizers.GAT, ramped=False, weight=_GAT_WEIGHT), adaptive),
        source=_ELLE,
        passes="6F 1G 5B",
        units=17,
        adv_pass=2,
        levers=_all_but("forward"),
        weight=_always(10_000.0, digits=DIGITS_LAM, wide=50_000.0),
    ),
    **_elle_rows(
        "trades-single",
        "TRADES-single",
        lambda adaptive: _plus_elle(_trades, adaptive),
        source=_ELLE,
        passes="6F 1G 5B",
        units=17,
        adv_pass=2,
        levers=_all_but("forward"),
        weight=_always(10_000.0, digits=DIGITS_LAM),
    ),
    **_elle_rows(
        "advmixup-single",
        "AdvMixUp-single",
        _mixup_elle,
        source=_ELLE,
        passes=_PACKED,
        units=14,
        clean_start=False,
        weight=_always(5_000.0, digits=DIGITS_LAM),
    ),
}
NAMES = tuple(METHODS)
# What runs and checkpoints called it before.
ALIASES = {"pgd": "pgd-at"}
_COMBINED = [name.removesuffix("+elle") for name in NAMES if name.endswith("+elle")]
_WHY_NOT_COMBINED = {
    "fgsm": "FGSM with E_lin is 'elle' or 'elle-a'",
    **dict.fromkeys(["elle", "elle-a", "elle-2p"], "it has E_lin already"),
    **dict.fromkeys(["gradalign", "cure", "llr"], "it is a regulariser of local linearity itself"),
    **dict.fromkeys(["pgd-at", "free-at"], "E_lin is against the overfitting to single-step attacks"),
}


def find(name: str) -> Method:
    """The row of a method.

    Raises:
        TypeError, ValueError: for an unknown one; of a combination the message says why there is none.
    """
    if isinstance(name, str):
        name = ALIASES.get(name, name)
        base, plus, added = name.partition("+")
        base = ALIASES.get(base, base)
        if plus and name not in METHODS and base in METHODS and added in METHODS:
            why = "the paper combines it with no other method"
            if added in ("elle", "elle-a"):
                why = _WHY_NOT_COMBINED.get(base, f"the paper combines ELLE with {', '.join(_COMBINED)} only")
            elif added != "elle-2p":
                why = "only ELLE is added to other methods"
            raise ValueError(f"method: expected one of {', '.join(map(repr, NAMES))}, got {name!r}: {why}")
    return METHODS[checks.choice("method", name, NAMES)]


def build(
    method: str, *, eps: float, lam: float | None, bounds: Bounds, steps: int | None = None, **levers: Any
) -> Criterion | ELLELoss:
    """The criterion of a method.

    Args:
        method: one of :data:`NAMES`.
        eps: radius of the linf ball, in units of the inputs.
        lam: weight of the method's regulariser (lam_max if ELLE-A's is there); ``None`` for a method without one.
        bounds: range of the inputs, to which every point is clamped; ``None`` clamps nothing.
        steps: optimiser steps of the whole run, over which NuAT's weight grows; ``None``: it is constant.
        levers: further options of :class:`~elle_fast.ELLELoss`, for the methods that take them.

    Raises:
        TypeError, ValueError: naming the argument, what was expected and what was got.
    """
    row = find(method)
    if row.weight is None and lam is not None:
        raise ValueError(f"lam: expected None beside method {method!r}, which has none, got {lam!r}")
    # ELLE-2p is a method, and the passes of alpha="argmax" would be taken for those of the points trained on.
    for name, known in (("points", ("elle", "five-point")), ("alpha", ("uniform", "half"))):
        if name in levers:
            checks.choice(name, levers[name], known)
    for name, value in levers.items():
        if name not in row.levers:
            why = f"which takes {', '.join(row.levers)} only" if row.levers else "which has no E_lin"
            raise ValueError(f"{name}: expected its default beside method {method!r}, {why}, got {value!r}")
    return row.make(Given(eps, lam, bounds, steps, levers))
