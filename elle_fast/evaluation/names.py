"""The attacks of an evaluation by name, and the packages that some of them need."""

from __future__ import annotations

import re
from dataclasses import dataclass
from importlib import metadata
from importlib.util import find_spec

BOUNDS = (0.0, 1.0)  # of the pixels that a model is given; its first layer normalises

FORMS = "clean, fgsm, pgd-K, pgd-K-RESTARTS, noise-K, square, square-QUERIES, autoattack, foolbox-pgd-K-RESTARTS"

# What may follow an attack's name: how often each number stands there at least and at most, and what it is otherwise.
_NUMBERS: dict[str, tuple[int, tuple[int, ...]]] = {
    "clean": (0, ()),
    "fgsm": (0, ()),
    "pgd": (1, (20, 1)),
    "noise": (1, (1,)),
    "square": (0, (5000,)),
    "autoattack": (0, ()),
    "foolbox-pgd": (0, (20, 1)),
}
_PACKAGES = {"square": "pyautoattack", "autoattack": "pyautoattack", "foolbox-pgd": "foolbox"}


@dataclass(frozen=True)
class Attack:
    """An attack in the linf ball, on pixels in [0, 1].

    ``kind`` is one of

    - ``clean``: none;
    - ``fgsm``: one step of eps without a random start;
    - ``pgd``: ``steps`` of eps / 4 from ``restarts`` uniform starts; ``foolbox-pgd`` is the same by foolbox;
    - ``noise``: ``restarts`` uniform draws from the ball, no gradient;
    - ``square``: the first ``steps`` queries of AutoAttack's Square Attack, no gradient (Andriushchenko et al. 2020);
    - ``autoattack``: the standard version (Croce & Hein 2020): APGD-CE, APGD-T, FAB-T, Square with 5,000 queries. With
      fewer than 10 classes, all wrong ones are targets; with fewer than 4, APGD-T has no loss and is left out.
    """

    name: str
    kind: str
    steps: int = 1
    restarts: int = 1

    @property
    def package(self) -> str | None:
        """The package that makes the attack, if it is not this one."""
        return _PACKAGES.get(self.kind)

    @property
    def version(self) -> str | None:
        """That package's version."""
        return None if self.package is None else metadata.version(self.package)


def parse_attacks(text: str) -> list[Attack]:
    """``"clean,fgsm,pgd-20,pgd-50-10,autoattack"`` as a list.

    Raises:
        ValueError: for any other name than those of :class:`Attack`, or one that stands there twice.
        ImportError: if a package that an attack needs is not installed.
    """
    parsed: list[Attack] = []
    for part in text.split(","):
        attack = _parse(part.strip())
        if attack in parsed:
            raise ValueError(f"attacks: expected each name once, got {attack.name!r} twice")
        parsed.append(attack)
    return parsed


def _parse(name: str) -> Attack:
    match = re.fullmatch(r"([a-z]+(?:-[a-z]+)*)((?:-[1-9]\d*)*)", name)
    kind, numbers = (match[1], [int(each) for each in match[2].split("-")[1:]]) if match else ("", [])
    least, defaults = _NUMBERS.get(kind, (0, ()))
    if kind not in _NUMBERS or not least <= len(numbers) <= len(defaults):
        raise ValueError(f"attacks: expected names among {FORMS}, got {name!r}")
    values = (*numbers, *defaults[len(numbers) :])
    attack = Attack(name, kind, restarts=values[0]) if kind == "noise" else Attack(name, kind, *values)
    if attack.package is not None and find_spec(attack.package) is None:
        raise ImportError(f"attacks: {name!r} needs the package {attack.package}: pip install 'elle-fast[eval]'")
    return attack
