"""Methods put together: ``BASE+elle``, ``BASE+elle-a``, ``BASE+advlc``, ``BASE+awp``, and so on, by rule."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import replace
from functools import partial
from typing import Any

from torch import Tensor

from elle_fast import presets
from elle_fast._core import checks, ddp
from elle_fast._core.unwrapping import Model, output_at, unwrapped
from elle_fast.criterion import Record, TrainingLoss
from elle_fast.methods.awp import AWP
from elle_fast.methods.base import Around, Bounds, Method
from elle_fast.methods.elle import LEVERS, OF_ELLE_A, PACKED_ONLY, PlusELLE
from elle_fast.passes import ModelKwargs
from elle_fast.ranges import ANY
from elle_fast.regularizers import AdvLC

# What can be added, in the order in which a name has them.
ADDED = ("elle", "elle-a", "advlc", "awp")
_SHARE = 0.3  # its authors' weight
_OF_LINEARITY = frozenset({"elle", "elle-a"})
# AWP's size and its epochs of warm-up: the authors', and theirs for TRADES.
_AWP, _AWP_TRADES = (0.01, 0), (0.005, 9)
# What AWP does not repeat of a step with double backpropagation: forward passes and gradients of the attack alone.
_PLAYED_BACK = {"cure": (0, 0), "fast-bat": (1, 2)}


class PlusAdvLC(Around):
    r"""``base + lam * AdvLC`` (Li and Spratling 2023, arXiv 2212.04985), with the base's logits at its own points.

    The logits at x are one forward pass more. ``stats`` and ``output`` are the base's, with the term as ``advlc``.

    Args:
        base: the criterion that makes the attack.
        lam: weight of the term, ``>= 0``.
    """

    _changeable = {"lam": partial(checks.real, low=0)}  # noqa: RUF012
    _fixed = ("regularizer",)

    def __init__(self, base: TrainingLoss, lam: float) -> None:
        super().__init__(base)
        self.lam, self.regularizer = lam, AdvLC()

    @property
    def stats(self) -> dict[str, Tensor]:
        """The base's, with the whole ``loss``, and the term as ``advlc``."""
        return {**self.base.stats, **self.last.stats}

    def forward(
        self,
        model: Model,
        x: Tensor,
        target: Tensor,
        *,
        model_kwargs: Mapping[str, Any] | None = None,
        **options: Any,
    ) -> Tensor:
        """As the base's."""
        penalty: list[Tensor] = []

        def term(logits: Tensor) -> Tensor:
            inner = ModelKwargs.of(model_kwargs, x.shape[0]).given_to(unwrapped(model))
            penalty.append(self.regularizer.from_logits(output_at(inner, x), logits))
            return self.lam * penalty[0]

        with self.adding(term):
            loss: Tensor = self.base(model, x, target, model_kwargs=model_kwargs, **options)
        self.last = Record({"loss": loss.detach().clone(), "advlc": penalty[0].detach()}, None)
        return ddp.with_all_passes(model, loss)


def find(name: str, table: Mapping[str, Method]) -> Method:
    """The row of a name of the form ``BASE+ADDED...``, by rule.

    Raises:
        ValueError: if there is none; the message says why.
    """
    base, *added = name.split("+")
    if base not in table:
        raise ValueError(_refused(name, table, f"{base!r} is no method"))
    for each in added:
        if each not in ADDED:
            raise ValueError(_refused(name, table, f"{each!r} cannot be added; what can be is {', '.join(ADDED)}"))
    if sorted(set(added), key=ADDED.index) != added or _OF_LINEARITY.issubset(added):
        why = f"each can be added once, in the order {', '.join(ADDED)}; of ELLE and ELLE-A one"
        raise ValueError(_refused(name, table, why))
    row = table[base]
    for each in added:
        if why := row.refuses.get("elle" if each in _OF_LINEARITY else each, ""):
            raise ValueError(_refused(name, table, why))
        if each in _OF_LINEARITY:
            row = _with_elle(base, row, adaptive=each == "elle-a")
        else:
            row = {"advlc": _with_advlc, "awp": _with_awp}[each](base, row)
        base = f"{base}+{each}"
        row = table.get(base, row)
    return row


def _refused(name: str, table: Mapping[str, Method], why: str) -> str:
    return f"method: expected one of {', '.join(map(repr, table))}, got {name!r}: {why}"


def _with_elle(name: str, row: Method, *, adaptive: bool) -> Method:
    without = (*(() if adaptive else OF_ELLE_A), *(() if row.with_elle else PACKED_ONLY), *row.refuses)
    make = row.with_elle or partial(_on_top, name, row)
    return replace(
        row,
        about=f"{name} + lam E_lin" + ", lam of ELLE-A" * adaptive,
        **_cost(row, forward=3, backward=3),
        make=partial(make, adaptive=True) if adaptive else make,
        takes=_takes(row),
        # The triplets are Algorithm 1's, which does not clamp.
        clamp="attack" if row.clamp == "all" else row.clamp,
        levers=tuple(each for each in LEVERS if each not in without),
        refuses={**row.refuses, "elle": "it has E_lin already"},
    )


def _on_top(
    name: str, row: Method, *, eps: float, lam: float, bounds: Bounds, clamp: str = "all", **given: Any
) -> PlusELLE:
    attacks_bounds, triplets_bounds = (
        bounds if bounds is None or clamp in ("all", of) else ANY for of in ("attack", "triplets")
    )
    base = row.make(eps=eps, bounds=attacks_bounds, **_own(name, row, eps, given))
    return PlusELLE(base, eps, lam, bounds=triplets_bounds, **given)


def _own(name: str, row: Method, eps: float, given: dict[str, Any]) -> dict[str, Any]:
    """What a base is built from, taken out of ``given``, with its own weight."""
    own = {each: given.pop(each) for each in row.takes if each in given}
    weight = given.pop("base_lam", None)
    return own | ({"lam": presets.weight(name, eps=eps) if weight is None else weight} if "lam" in row.takes else {})


def _takes(row: Method) -> tuple[str, ...]:
    """What a method that something weighted is added to is built from."""
    others = tuple(each for each in row.takes if each not in ("lam", "base_lam"))
    return ("lam", "base_lam", *others) if "lam" in row.takes else ("lam", *others)


def _with_advlc(name: str, row: Method) -> Method:
    return replace(
        row,
        about=f"{name} + lam AdvLC" if not row.levers else f"{row.about} + {_SHARE} AdvLC",
        **_cost(row, forward=1, backward=1),
        make=partial(_plus_advlc, name, row),
        takes=row.takes if row.levers else _takes(row),
        refuses={**row.refuses, "elle": "E_lin is added before it", "advlc": "it has it already"},
    )


def _plus_advlc(name: str, row: Method, *, eps: float, lam: float, **given: Any) -> PlusAdvLC:
    """lam is that of E_lin, if it is there."""
    if row.levers:
        return PlusAdvLC(row.make(eps=eps, lam=lam, **given), _SHARE)
    bounds = given.pop("bounds")
    return PlusAdvLC(row.make(eps=eps, bounds=bounds, **_own(name, row, eps, given)), lam)


def _with_awp(name: str, row: Method) -> Method:
    counts = {kind: int(count) for count, kind in re.findall(r"(\d+)([FGB])", row.passes)}
    double, backward = row.passes.endswith("D"), counts.get("B", 0)
    ahead = counts["F"] - backward, counts.get("G", 0)
    forward, gradients = _PLAYED_BACK.get(name.split("+")[0], (1, 1)) if double else ahead
    more = {"F": counts["F"] - forward, "G": counts.get("G", 0) - gradients, "B": backward}
    passes = " ".join(f"{count + more[kind]}{kind}" for kind, count in counts.items()) + " D" * double
    takes = row.takes if "epoch_steps" in row.takes else (*row.takes, "epoch_steps")
    return replace(
        row,
        about=f"{name}, the weights perturbed against it",
        passes=passes,
        units=2 * row.units - forward - gradients,
        make=partial(_perturbed, name, row),
        takes=takes,
    )


def _perturbed(name: str, row: Method, *, epoch_steps: int | None = None, **given: Any) -> AWP:
    gamma, epochs = _AWP_TRADES if name.startswith("trades") else _AWP
    own = {"epoch_steps": epoch_steps} if "epoch_steps" in row.takes else {}
    return AWP(row.make(**given, **own), gamma, epochs * (epoch_steps or 0))


def _cost(row: Method, *, forward: int, backward: int) -> dict[str, Any]:
    """The passes and units of a row with some more over B samples."""
    more = {"F": forward, "B": backward}
    passes = re.sub(r"(\d+)([FB])", lambda found: f"{int(found[1]) + more[found[2]]}{found[2]}", row.passes)
    return {"passes": passes, "units": row.units + forward + 2 * backward}
