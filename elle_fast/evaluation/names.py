"""The attacks of an evaluation by name, and the packages that some of them need."""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass, replace
from importlib import metadata
from importlib.util import find_spec
from typing import Any, NamedTuple

from torch import Tensor

from elle_fast._core import checks
from elle_fast.ops import layout

BOUNDS = (0.0, 1.0)  # of a model's inputs; its first layer normalizes
DEFAULT_ATTACKS = "clean,fgsm,pgd-20"
FORMS = (
    "clean, fgsm, pgd-K, pgd-K-RESTARTS, pgd-K-eps/8, noise-K, square, square-QUERIES, autoattack, "
    "foolbox-pgd-K-RESTARTS"
)

# For each kind: how many numbers must follow its name, the values of those that may be left out, and the package.
_KINDS: dict[str, tuple[int, tuple[int, ...], str | None]] = {
    "clean": (0, (), None),
    "fgsm": (0, (), None),
    "pgd": (1, (20, 1), None),
    "noise": (1, (1,), None),
    "square": (0, (5000,), "pyautoattack"),
    "autoattack": (0, (), "pyautoattack"),
    "foolbox-pgd": (0, (20, 1), "foolbox"),
}
# Steps, queries or restarts of an attack; more is a typing error that would take for ever.
MOST = 1_000_000


def radius(eps: Any, norm: str = "linf") -> float:
    """The eps of a ball: of one in linf at most 1, as more is likely meant in 256ths.

    Raises:
        TypeError, ValueError: if it is no number, or out of range.
    """
    number = checks.real("eps", eps, low=0)
    if checks.choice("norm", norm, layout.NORMS) == "linf" and number > BOUNDS[1]:
        meant = f"; for {number:g} of 255 levels, {number:g}/255" if number <= 255 else ""
        raise ValueError(f"eps: expected a radius in [0, 1], where pixels are, got {number:g}{meant}")
    return number


class Ball(NamedTuple):
    """Where the points of an attack may be."""

    eps: float
    norm: str

    def __str__(self) -> str:
        return f"eps = {self.eps}" + f" ({self.norm})" * (self.norm != "linf")


@dataclass(frozen=True)
class Attack:
    """An attack in the linf or l2 ball, on inputs in [0, 1].

    ``kind`` is one of

    - ``clean``: none;
    - ``fgsm``: one step of eps without a random start, in l2 along the gradient itself;
    - ``pgd``: ``steps`` of eps / ``divisor`` from ``restarts`` uniform starts; ``foolbox-pgd`` is the same by foolbox;
    - ``noise``: ``restarts`` uniform draws from the ball, no gradient;
    - ``square``: the first ``steps`` queries of AutoAttack's Square Attack, no gradient (Andriushchenko et al. 2020);
    - ``autoattack``: the standard version (Croce & Hein 2020): APGD-CE, APGD-T, FAB-T, Square with 5,000 queries. With
      fewer than 10 classes, all wrong ones are targets; with fewer than 4, APGD-T has no loss and is left out.
    """

    name: str
    kind: str
    steps: int = 1
    restarts: int = 1
    divisor: int = 4

    def __post_init__(self) -> None:
        if not isinstance(self.name, str):
            raise TypeError(f"name: expected a string, got {checks.describe(self.name)}")
        checks.choice("kind", self.kind, _KINDS)
        for number in ("steps", "restarts", "divisor"):
            checks.integer(number, getattr(self, number), low=1, high=MOST)

    @property
    def package(self) -> str | None:
        """The package that makes the attack, if it is not this one."""
        return _KINDS[self.kind][2]

    @property
    def version(self) -> str | None:
        """That package's version."""
        return None if self.package is None else metadata.version(self.package)


def parse_attacks(attacks: str | Iterable[Attack]) -> list[Attack]:
    """``"clean,fgsm,pgd-20,pgd-50-10,autoattack"`` as a list; a list of attacks stays what it is.

    Raises:
        TypeError: for anything else.
        ValueError: for a name that :class:`Attack` does not explain, one that is there twice, or no attack at all.
        ImportError: if a package that an attack needs is not installed.
    """
    named = attacks.split(",") if isinstance(attacks, str) else attacks
    if not isinstance(named, Iterable) or isinstance(named, Tensor):
        raise TypeError(f"attacks: expected names with commas between them, got {checks.describe(attacks)}")
    parsed: list[Attack] = []
    for part in named:
        attack = part if isinstance(part, Attack) else _parse(part)
        if attack in parsed:
            raise ValueError(f"attacks: expected each name once, got {attack.name!r} twice")
        parsed.append(attack)
    if not parsed:
        raise ValueError(f"attacks: expected names among {FORMS}, got none")
    return parsed


def _parse(name: str) -> Attack:
    if not isinstance(name, str):
        raise TypeError(f"attacks: expected names among {FORMS}, got {checks.describe(name)}")
    name = name.strip()
    match = re.fullmatch(r"([a-z]+(?:-[a-z]+)*)((?:-[1-9]\d*)*)(-eps/[1-9]\d*)?", name)
    kind, numbers = (match[1], [int(each) for each in match[2].split("-")[1:]]) if match else ("", [])
    divisor = int(match[3].rpartition("/")[2]) if match and match[3] else 4
    least, defaults, package = _KINDS.get(kind, (0, (), None))
    known = kind in _KINDS and (divisor == 4 or kind.endswith("pgd"))
    if not known or not least <= len(numbers) <= len(defaults):
        raise ValueError(f"attacks: expected names among {FORMS}, got {name!r}")
    if max([*numbers, divisor]) > MOST:
        raise ValueError(f"attacks: expected numbers <= {MOST}, got {name!r}")
    if package is not None and find_spec(package) is None:
        raise ImportError(f"attacks: {name!r} needs the package {package}: pip install 'elle-fast[eval]'")
    values = (*numbers, *defaults[len(numbers) :])
    if kind == "noise":
        return Attack(name, kind, restarts=values[0])
    return replace(Attack(name, kind, *values), divisor=divisor)
