"""Default weights by method, data set, schedule, model and eps, each with its source; and the presets of ELLELoss.

The guideline of the ELLE paper is lam in [4,000, 20,000]. lam = 1 is no regulariser at all.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from elle_fast._core import checks

# The cheapest options of ELLE-A with which the mean over three seeds under PGD-20 stayed within the range of those of
# Algorithm 1, at 8/255 and 16/255: benchmarks/results/cifar10-jpeg-levers.json.
FAST: dict[str, Any] = {"skip_below": 1e-2, "triplet_fraction": 0.125}


@dataclass(frozen=True)
class Row:
    """A default of lam (lam_max of ELLE-A).

    Attributes:
        methods: names of the methods that it is for.
        lam: the value, or a function of eps.
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


def _llr(eps: float) -> float:
    """200 up to 8/255, then by the nearest even eps in 255ths: there is no order in the authors' values."""
    values = {10: 500, 12: 500, 14: 1_000, 16: 500, 18: 1_000, 20: 500, 22: 2_000, 24: 5_000, 26: 2_000}
    return float(200 if 255 * eps < 9 else values[min(values, key=lambda known: abs(known - 255 * eps))])


_N_FGSM = ("n-fgsm+elle", "n-fgsm+elle-a")
_GAT = ("gat+elle", "gat+elle-a", "gat-fgsm+elle", "gat-fgsm+elle-a")
_TRADES = ("trades-single+elle", "trades-single+elle-a")
_MIXUP = ("advmixup-single+elle", "advmixup-single+elle-a")
_PAPER = "ELLE paper, section 4 and appendix B.2"

# The first row that fits counts.
TABLE = (
    # The paper has no values for digits and MNIST. Those here were tried at eps 0.3, on seeds that are in no table.
    Row(("elle", "elle-a", *_N_FGSM, *_GAT, *_TRADES, *_MIXUP), 300, "tried here: of 20 to 1,000 for ELLE", "digits"),
    Row(("elle-2p",), 100, "tried here: of 30 to 1,000, two seeds", "digits"),
    Row(("llr",), 20, "tried here: of 20, 60 and 200, which ends in NaN", "digits"),
    Row(("cure-fgsm",), 1_000, "tried here: of 1,000, 5,000 and 50,000, which ends in NaN", "digits"),
    # 5,000 stalls ELLE. ELLE-A overfitted with 300 and 1,000, and ended in NaN with 2,000.
    Row(("elle", "elle-a", *_N_FGSM), 1_000, "tried here: of 30 to 5,000 for ELLE", "mnist"),
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
    Row(_N_FGSM, 100_000, _PAPER, "imagenet", "short", eps_from=16 / 255),
    Row(_N_FGSM, 20_000, _PAPER, "imagenet", "short"),
    Row(("elle-2p",), 1_000, "ELLE paper, appendix B.11: of 100, 1,000 and 5,000"),
    Row(_GAT, 50_000, "ELLE paper, section 4.5", model="wideresnet28-10"),
    Row(_GAT, 10_000, "ELLE paper, section 4.5"),
    Row(_TRADES, 10_000, "ELLE paper, appendix B.13"),
    Row(_MIXUP, 5_000, "ELLE paper, appendix B.13"),
    Row(("nuat+elle", "nuat+elle-a"), 10_000, "as on GAT, whose loss has the same form"),
    Row(("fast-bat",), 10, "its authors' value, arXiv 2112.12376"),
    Row(("gat", "gat-fgsm"), 10, "its authors' value, arXiv 2011.14969"),
    Row(("nuat",), 4.5, "its authors' code: the highest"),
    Row(("pgi", "pgi-ep"), 10, "its authors' code, arXiv 2207.08859"),
    Row(("pco",), 10, "its authors' code, arXiv 2407.12443"),
    Row(("rs-cs", "mep-cs"), 1, "their authors' code, arXiv 2308.12857"),
    Row(("trades-single",), 6, "its authors' value, arXiv 1901.08573"),
    Row(("advlc",), 0.3, "its authors' value, arXiv 2212.04985"),
    Row(("gradalign",), _gradalign_svhn, "its authors' code, arXiv 2007.02617", "svhn"),
    Row(("gradalign",), _gradalign, "its authors' code, arXiv 2007.02617"),
    Row(("cure",), 4, "its authors' value, arXiv 1811.09716"),
    Row(("cure-fgsm",), 50_000, "the ELLE authors' scripts: at 16/255", eps_from=16 / 255),
    Row(("cure-fgsm",), 1_000, "the ELLE authors' scripts: at 8/255"),
    Row(("llr",), _llr, "the ELLE authors' scripts: the best of 200 to 5,000 at each eps"),
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
    method: str, data: str = "cifar10", *, schedule: str = "short", model: str | None = None, eps: float = 8 / 255
) -> float | None:
    """The default of lam (lam_max of ELLE-A), by :data:`TABLE`; ``None`` for a method without one.

    Args:
        method: one of :data:`elle_fast.methods.NAMES`, or one put together (:func:`elle_fast.methods.find`), whose
            weight is that of E_lin if it is there.
        data: the data set. One for which the table has nothing gets the weight for CIFAR-10.
        schedule: ``"short"`` or ``"long"``; Long-cos has Long's weights.
        model: the model's name, as the recipes have it.
        eps: radius of the linf ball, for inputs in [0, 1].
    """
    eps = checks.real("eps", eps, low=0)
    checks.choice("schedule", schedule, ("short", "long"))
    for name in _names(method):
        for of in (data, "cifar10"):
            if (found := _find(name, of, schedule, model, eps)) is not None:
                return found
    return None


def _names(method: str) -> list[str]:
    """A method, and those whose weight one that is put together has if it has none of its own."""
    base, *added = method.split("+")
    own = [part for part in added if part.startswith("elle")]
    if own:  # lam is E_lin's
        return [method, f"{base}+{own[0]}", own[0]]
    if base.startswith("elle"):
        return [method, base]
    return [method, added[-1]] if added else [method]


def preset_options(name: str, eps: float, overrides: dict[str, Any]) -> dict[str, Any]:
    """Options of ELLELoss for a preset, with ``overrides``, of which ``adaptive`` and ``attack`` choose lam.

    Raises:
        TypeError, ValueError: for an unknown name, or a combination that the paper does not have.
    """
    fast = checks.choice("name", name, NAMES) == "fast"
    given = {"adaptive": True, **FAST, **overrides} if fast else overrides
    if "lam" in given:
        return given
    eps = checks.real("eps", eps, low=0)
    if not checks.flag("adaptive", given.get("adaptive", False)):
        method, about = "elle", "ELLE with a constant lam"
    elif given.get("attack") == "n-fgsm":
        method, about = "n-fgsm+elle-a", "N-FGSM + ELLE-A"
    else:
        method, about = "elle-a", "ELLE-A"
    data, _, schedule = ("cifar10" if fast else name).partition("-")
    lam = None if fast and method == "elle" else _find(method, data, schedule or "short", None, eps)
    if lam is None:
        reason = "its options are those of ELLE-A" if fast else "the paper has none; pass lam= to choose one"
        raise ValueError(f"name: preset {name!r} has no {about}, as {reason}")
    return {"lam": lam, **given}
