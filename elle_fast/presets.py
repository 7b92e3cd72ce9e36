"""Default weights by method, data set, schedule, model and eps, each with its source; and the presets of ELLELoss.

The guideline of the ELLE paper is lam in [4,000, 20,000]. lam = 1 is no regulariser at all.

``ELLELoss.preset("imagenet", eps, adaptive=True)`` is the setting of the ELLE authors' ImageNet code, for x in [0, 1]:
smooth-L1 with lam_max 20,000 (100,000 with N-FGSM from eps 16/255 on), a history of 500 steps, points clamped to
[0, 1], and lam that starts at lam_max from eps 16/255 on; with N-FGSM lam_max grows over 2,500 steps instead. Their
training has three phases, which begin at epochs 0, 6 and 12 and crop to 128, 224 and 288 pixels: call
``criterion.controller.restart()`` before each. Two things of theirs are left out: without a random start, their attack
begins at the perturbation that the batch before ended with; and N-FGSM's step begins at the start before it is clamped.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from elle_fast._core import checks
from elle_fast.adaptive import AdaptiveLambda

# The cheapest options of ELLE-A with which the mean over three seeds under PGD-20 stayed within the range of those of
# Algorithm 1, at 8/255 and 16/255: benchmarks/results/cifar10-jpeg-levers.json.
FAST: dict[str, Any] = {"skip_below": 1e-2, "triplet_fraction": 0.125}

# The preset imagenet: options of ELLELoss, and of AdaptiveLambda.
_IMAGENET: dict[str, Any] = {"penalty": "smooth_l1", "bounds": (0.0, 1.0)}
_WINDOW, _RAMP, _STARTS_HIGH_FROM = 500, 2_500, 16 / 255
# What counts as ImageNet among image folders: the smallest crop that its authors train on. CIFAR-10 and CIFAR-100 have
# the same weights, so it is not the number of classes that tells the data sets of the paper apart, but the size.
LARGE = 128
# Weights are for the square; of small residuals smooth-L1 is half of that. (The paper prints 10,000 for ELLE-A on
# ImageNet, the authors' scripts give smooth-L1 20,000.) A weight of |r| has no fixed ratio to them.
_OF_PENALTY = {"squared": 1.0, "smooth_l1": 2.0}


@dataclass(frozen=True)
class Row:
    """A default of lam (lam_max of ELLE-A).

    Attributes:
        methods: names of the methods that it is for.
        lam: the value for ``penalty="squared"``, or a function of eps.
        source: where the value comes from.
        data, schedule, model: the only one that it is for; ``None`` is any.
        eps_from: the smallest eps that it is for.
    """

    methods: tuple[str, ...]
    lam: float | Callable[[float], float]
    source: str
    data: str | None = None
    schedule: str | None = None
    model: str | None = None
    eps_from: float = 0.0


def _gradalign(eps: float) -> float:
    """0.2 at 8/255 and 2.0 at 16/255; geometric between and below, as in its authors' code, and 2.0 above."""
    return float(0.2 * 10 ** min(1.0, (255 * eps - 8) / 8))


def _gradalign_svhn(eps: float) -> float:
    """Geometric from 1.66 at 1/255 to 3.16 at 12/255: 2.5 at 8/255."""
    return float(1.66 * (3.16 / 1.66) ** ((255 * eps - 1) / 11))


def _nearest(values: Mapping[int, float]) -> Callable[[float], float]:
    """The value for the nearest eps, in 255ths, of those that the authors have."""
    return lambda eps: float(values[min(values, key=lambda known: abs(known - 255 * eps))])


# There is no order in these.
_LLR = {8: 200, 10: 500, 12: 500, 14: 1_000, 16: 500, 18: 1_000, 20: 500, 22: 2_000, 24: 5_000, 26: 2_000}
_N_FGSM = ("n-fgsm+elle", "n-fgsm+elle-a")
_GAT = ("gat+elle", "gat+elle-a", "gat-fgsm+elle", "gat-fgsm+elle-a")
_NUAT = ("nuat+elle", "nuat+elle-a")
_TRADES = ("trades-single+elle", "trades-single+elle-a")
_MIXUP = ("advmixup-single+elle", "advmixup-single+elle-a")
_PAPER = "ELLE paper, section 4 and appendix B.2"
_AAER = "its authors' code, arXiv 2404.08154: lamda3"

# The first row that fits counts.
TABLE = (
    # The paper has no values for digits and MNIST. Those here were tried at eps 0.3, on seeds that are in no table.
    Row(("elle", "elle-a", *_N_FGSM, *_GAT, *_TRADES, *_MIXUP), 300, "tried here: of 20 to 1,000 for ELLE", "digits"),
    Row(_NUAT, 300, "as on GAT, whose loss has the same form", "digits"),
    Row(("elle-2p",), 100, "tried here: of 30 to 1,000, two seeds", "digits"),
    Row(("llr",), 20, "tried here: of 20, 60 and 200, which ends in NaN", "digits"),
    Row(("cure-fgsm",), 1_000, "tried here: of 1,000, 5,000 and 50,000, which ends in NaN", "digits"),
    # 5,000 stalls ELLE. ELLE-A overfitted with 300 and 1,000, and ended in NaN with 2,000.
    Row(("elle", "elle-a", *_N_FGSM), 1_000, "tried here: of 30 to 5,000 for ELLE", "mnist"),
    Row((*_GAT, *_NUAT, *_TRADES, *_MIXUP), 1_000, "that of ELLE; not tried", "mnist"),
    # The authors' scripts for CIFAR take lam 1,000 up to eps 8/255 and 10,000 from eps 22/255.
    Row(("elle",), 5_000, _PAPER, "cifar10", "short"),
    Row(("elle-a", *_N_FGSM), 4_000, _PAPER, "cifar10", "short"),
    Row(("elle", "elle-a"), 10_000, _PAPER, "cifar10", "long"),
    Row(_N_FGSM, 4_000, _PAPER, "cifar10"),
    Row(("elle",), 5_000, _PAPER, "cifar100", "short"),
    Row(("elle-a", *_N_FGSM), 4_000, _PAPER, "cifar100", "short"),
    Row(("elle", "elle-a"), 20_000, _PAPER, "svhn"),
    Row(_N_FGSM, 5_000, _PAPER, "svhn", "short"),
    Row(("elle-a",), 10_000, _PAPER, "imagenet", "short"),
    # 100,000 and 20,000 in print. There is no script to show it, but their code weighs smooth-L1: half for the square.
    Row(_N_FGSM, 50_000, _PAPER, "imagenet", "short", eps_from=16 / 255),
    Row(_N_FGSM, 10_000, _PAPER, "imagenet", "short"),
    Row(("elle-2p",), 1_000, "ELLE paper, appendix B.11: of 100, 1,000 and 5,000"),
    Row(_GAT, 50_000, "ELLE paper, section 4.5", model="wideresnet28-10"),
    Row(_GAT, 10_000, "ELLE paper, section 4.5"),
    Row(_TRADES, 10_000, "ELLE paper, appendix B.13"),
    Row(_MIXUP, 5_000, "ELLE paper, appendix B.13"),
    Row(_NUAT, 10_000, "as on GAT, whose loss has the same form"),
    Row(("fast-bat",), 10, "its authors' value, arXiv 2112.12376"),
    Row(("gat", "gat-fgsm"), 10, "its authors' value, arXiv 2011.14969"),
    Row(("nuat",), 4.5, "its authors' code: the highest"),
    Row(("uap", "cuap", "fuap"), 10, "its authors' code, arXiv 2604.22853 too"),
    Row(("liet",), 20, "its authors' code: at 12/255 and 16/255", eps_from=math.nextafter(8 / 255, 1)),
    Row(("liet",), 200, "its authors' code", "cifar100"),
    Row(("liet",), 100, "its authors' code, arXiv 2604.22853 too"),
    Row(("pgi", "pgi-ep"), 10, "its authors' code, arXiv 2207.08859"),
    Row(("pco",), 10, "its authors' code, arXiv 2407.12443"),
    Row(("rs-cs", "mep-cs"), 1, "their authors' code, arXiv 2308.12857"),
    Row(("trades-single",), 6, "its authors' value, arXiv 1901.08573"),
    Row(("mart",), 6, "its authors' code (ICLR 2020): for a WideResNet", model="wideresnet28-10"),
    Row(("mart",), 5, "its authors' code (ICLR 2020): for ResNet18"),
    Row(("advlc", "advlc-noise"), 0.3, "its authors' value, arXiv 2212.04985"),
    Row(("rs-aaer",), _nearest({8: 1.5, 12: 2.75, 16: 2.25, 32: 0.75}), _AAER, "cifar100"),
    Row(("rs-aaer",), _nearest({8: 1.5, 12: 2.75, 16: 3.25, 32: 1.5}), _AAER),
    Row(("n-aaer",), _nearest({8: 0.15, 12: 0.3, 16: 0.5, 32: 0.5}), _AAER, "cifar100"),
    Row(("n-aaer",), _nearest({8: 0.15, 12: 0.55, 16: 1.5, 32: 0.75}), _AAER),
    Row(("gradalign",), _gradalign_svhn, "its authors' code, arXiv 2007.02617", "svhn"),
    Row(("gradalign",), _gradalign, "its authors' code, arXiv 2007.02617"),
    Row(("cure",), 4, "its authors' value, arXiv 1811.09716"),
    Row(("cure-fgsm",), 50_000, "the ELLE authors' scripts: at 16/255", eps_from=16 / 255),
    Row(("cure-fgsm",), 1_000, "the ELLE authors' scripts: at 8/255"),
    Row(("llr",), _nearest(_LLR), "the ELLE authors' scripts: the best of 200 to 5,000 at each eps"),
)
# The presets of ELLELoss: a data set is of the Short schedule, a data set and "-long" of the Long one.
NAMES = ("cifar10", "cifar10-long", "cifar100", "svhn", "svhn-long", "imagenet", "fast")


def _find(method: str, data: str, schedule: str, model: str | None, eps: float) -> float | None:
    for row in TABLE:
        fits = row.data in (None, data) and row.schedule in (None, schedule) and row.model in (None, model)
        if method in row.methods and fits and eps >= row.eps_from:
            return row.lam(eps) if callable(row.lam) else float(row.lam)
    return None


def weight(
    method: str,
    data: str = "cifar10",
    *,
    schedule: str = "short",
    model: str | None = None,
    eps: float = 8 / 255,
    penalty: str = "squared",
    image_size: int | None = None,
) -> float | None:
    """The default of lam (lam_max of ELLE-A), by :data:`TABLE`; ``None`` for a method without one.

    Args:
        method: one of :data:`elle_fast.methods.NAMES`, or one put together (:func:`elle_fast.methods.find`), whose
            weight is that of E_lin if it is there.
        data: the data set. One for which the table has nothing gets the weight for CIFAR-10; others with an
            ``image_size`` of at least 128 get ImageNet's where there is one.
        schedule: ``"short"`` or ``"long"``; Long-cos has Long's weights.
        model: the model's name, as the recipes have it.
        eps: radius of the linf ball, for inputs in [0, 1].
        penalty: of E_lin, as in :class:`~elle_fast.LocalLinearity`. For ``"smooth_l1"`` it is twice the square's; for
            ``"abs"`` there is none.
        image_size: pixels a side, if known.

    Raises:
        TypeError, ValueError: for an argument out of range, and for ``penalty="abs"`` with a method that has a weight.
    """
    eps = checks.real("eps", eps, low=0)
    checks.choice("schedule", schedule, ("short", "long"))
    large = image_size is not None and checks.integer("image_size", image_size, low=1) >= LARGE
    if large and data not in {row.data for row in TABLE}:
        data = "imagenet"
    for name in _names(method):
        for of in (data, "cifar10"):
            if (found := _find(name, of, schedule, model, eps)) is not None:
                return _of_penalty(found, penalty) if "elle" in method else found
    return None


def smoothing(method: str, data: str = "cifar10", *, eps: float = 8 / 255) -> float:
    """The label smoothing that belongs to a method: LIET's, as in its authors' code; of the others 0.

    Args:
        method, data, eps: as for :func:`weight`.
    """
    if method.split("+")[0] != "liet":
        return 0.0
    if checks.real("eps", eps, low=0) > 8 / 255:
        return 0.4
    return 0.8 if data == "cifar100" else 0.6


def _names(method: str) -> list[str]:
    """A method, and those whose weight one that is put together has if it has none of its own."""
    base, *added = method.removesuffix("+awp").split("+")
    own = [part for part in added if part.startswith("elle")]
    if own:  # lam is E_lin's
        return [method, f"{base}+{own[0]}", own[0]]
    return [method, base if base.startswith("elle") or not added else added[-1]]


def _of_penalty(lam: float, penalty: str) -> float:
    if penalty == "abs":
        raise ValueError(
            "lam: expected a number with penalty='abs', which has no default: its slope does not vanish with the "
            f"residual, so that a lam for the square ({lam:g}) leaves nothing of the training; begin with 1 to 10"
        )
    return lam * _OF_PENALTY[checks.choice("penalty", penalty, _OF_PENALTY)]


def preset_options(name: str, eps: float, overrides: dict[str, Any]) -> dict[str, Any]:
    """Options of ELLELoss for a preset, with ``overrides``, of which ``adaptive`` and ``attack`` choose lam.

    Raises:
        TypeError, ValueError: for an unknown name, or a combination that the paper does not have.
    """
    fast = checks.choice("name", name, NAMES) == "fast"
    own = {"adaptive": True, **FAST} if fast else _IMAGENET if name == "imagenet" else {}
    given, eps = {**own, **overrides}, checks.real("eps", eps, low=0)
    n_fgsm = given.get("attack") == "n-fgsm"
    if not (adaptive := checks.flag("adaptive", given.get("adaptive", False))):
        method, about = "elle", "ELLE with a constant lam"
    elif n_fgsm:
        method, about = "n-fgsm+elle-a", "N-FGSM + ELLE-A"
    else:
        method, about = "elle-a", "ELLE-A"
    if "lam" not in given:
        data, _, schedule = ("cifar10" if fast else name).partition("-")
        lam = None if fast and method == "elle" else _find(method, data, schedule or "short", None, eps)
        if lam is None:
            reason = "its options are those of ELLE-A" if fast else "the paper has none; pass lam= to choose one"
            raise ValueError(f"name: preset {name!r} has no {about}, as {reason}")
        given["lam"] = _of_penalty(lam, given.get("penalty", "squared"))
    if name == "imagenet" and adaptive and not isinstance(given["lam"], AdaptiveLambda):
        first = {"ramp": _RAMP} if n_fgsm else {"start": given["lam"]} if eps >= _STARTS_HIGH_FROM else {}
        given["lam"] = AdaptiveLambda(given["lam"], window=_WINDOW, **first)
    return given
