"""The settings of paper.py: data, model, schedule, and which variants run at which eps with which seeds.

What ``cifar10-small`` costs, with one thread on each of two cores and the milliseconds of a step there (narrow
PreActResNet, batch 128: FGSM 122, PGD-10 600, GradAlign 340, ELLE and ELLE-A 390, the others 24 for each unit of
:class:`~elle_fast.methods.Method`):

- one step of each of the 27 methods and of ``elle-a fast``: 7.6 s, one of each of the six main variants: 1.75 s;
- six at 3 eps with 3 seeds, the others once: 7.6 + 8 * 1.75 = 21.7 s. With 4,608 images to train on (36 batches) and 8
  epochs, 288 steps: 104 minutes of one core. 10,000 images and 12 epochs would be 338;
- 76 cells, PGD-20 on 1,000 images each, 15 s: 19 minutes. 8 epochs that are watched, 0.8 s each: 8 minutes;
- PGD-50-10, AutoAttack and the masking check on 200 images, about 2.4 minutes, for 15 cells: 36 minutes;
- starting, checkpoints, pictures: 6 minutes.

Together 173 minutes of one core, 87 of two. In the committed run GradAlign took 590 ms a step.

What a cell of ``cifar10-medium`` costs, computed with half of the same 24 ms a unit, as it trains in bf16, and one
thread: 382 steps of FGSM (5 units) take 24 s, 15 epochs 6 minutes; those of ELLE (14 units) 17. Watching the trained
and the averaged weights, 10 s an epoch: 2.5 minutes. Clean and PGD-20 of four models: 1 minute. PGD-50-10 and
AutoAttack on 1,000 images: some 8. The variants are in the order in which they are most worth having.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from benchmarks.paper.cells import Cell, Strong
from benchmarks.paper.metrics import forms_of_e_lin, misalignment
from elle_fast import methods
from elle_fast.presets import FAST
from elle_fast.recipes import demo
from elle_fast.recipes.config import TrainConfig
from elle_fast.recipes.train import Measure

Variants = dict[str, dict[str, Any]]  # by name, what of the configuration differs
NamedConfig = tuple[str, TrainConfig]


@dataclass(frozen=True)
class Setting:
    """One data set, model and schedule, and the variants compared on it.

    Attributes:
        config: of every cell, but for what follows.
        variants: run at every eps with every seed.
        seeds: the first one is that of the curves.
        note: stands in every picture.
        eps: the configuration's own if empty.
        others: run at the configuration's own eps with the first seed alone.
        strong: variants attacked by ``strong_attacks`` after training, with the first seed, at every eps.
        strong_every_seed: with every seed.
        strong_once: at the configuration's own eps alone.
        strong_attacks: names, with commas between.
        strong_samples: how many test images they get; ``None``: all.
        masking: whether those attacked by AutoAttack are looked at for masked gradients too.
        strong_models: variants whose best, averaged and best averaged weights are attacked too, by PGD-50-10; of other
            variants those have the attacks of the configuration alone.
        measure: measured after each epoch beside what every run measures.
    """

    config: TrainConfig
    variants: Variants
    seeds: tuple[int, ...]
    note: str
    eps: tuple[float, ...] = ()
    others: Variants = field(default_factory=dict)
    strong: tuple[str, ...] = ()
    strong_once: tuple[str, ...] = ()
    strong_every_seed: bool = False
    strong_attacks: str = "pgd-50-10,autoattack"
    strong_samples: int | None = None
    strong_models: tuple[str, ...] = ()
    masking: bool = True
    measure: Measure | None = None

    @property
    def names(self) -> list[str]:
        """Of all variants."""
        return [*self.variants, *self.others]

    def cells(self, root: str | None, device: str = "cpu") -> list[NamedConfig]:
        """Name and configuration of each cell, seed by seed."""
        base = replace(self.config, root=root, device=device)
        cells = []
        for seed in self.seeds:
            for eps in self.eps or (base.eps,):
                once = self.others if seed == self.seeds[0] and eps == base.eps else {}
                for name, options in {**self.variants, **once}.items():
                    cells.append((name, replace(base, **{"eps": eps, "seed": seed, **options})))
        return cells

    def is_strong(self, name: str, config: TrainConfig) -> bool:
        """Whether the cell is attacked by ``strong_attacks`` too."""
        chosen = name in self.strong or (name in self.strong_once and config.eps == self.config.eps)
        return chosen and (self.strong_every_seed or config.seed == self.seeds[0])

    def cell(self, work: Path, code: str | None, name: str, config: TrainConfig) -> Cell:
        """The cell of a name and a configuration, whose folder is in ``work``; ``code`` as :class:`Cell`."""
        strong = Strong(self.strong_attacks, self.strong_samples, self.masking, name in self.strong_models)
        return Cell(work, code, name, config, strong if self.is_strong(name, config) else None, self.measure)


def _methods(*names: str) -> Variants:
    return {name: {"method": name} for name in names}


def _all_but(variants: Variants) -> Variants:
    """All methods that are no variant yet."""
    return _methods(*(name for name in methods.NAMES if name not in variants))


def _lams(method: str, *lams: float) -> Variants:
    return {f"{method} lam {lam:g}": {"method": method, "lam": lam} for lam in lams}


def _levers(**options: dict[str, Any]) -> Variants:
    return {name.replace("_", " "): {"method": "elle-a", **levers} for name, levers in options.items()}


_MAIN = _methods("fgsm", "n-fgsm", "gradalign", "elle", "elle-a", "n-fgsm+elle-a")
_STRONG = ("fgsm", "n-fgsm", "elle-a", "n-fgsm+elle-a")
_STRONG_ONCE = ("gradalign", "elle", "pgd-at")
# Those of the paper's Fig. 3 and Fig. 1.
_PUBLISHED = {**_MAIN, **_methods("slat", "fast-bat", "llr", "cure-fgsm", "pgd-at")}
_FAST = {"elle-a fast": {"method": "elle-a", **FAST}}
_N_FAST = {"method": "n-fgsm+elle-a", **FAST}
# What a comparison with the sources left as it was, and one for FastAT's protocol alone: `medium` is for the others.
_UNCHANGED = (
    "rs-fgsm-unprojected",
    *("rs-fgsm", "pgd-at", "gradalign", "elle", "elle-a", "n-fgsm+elle-a", "trades-single", "trades-single+elle"),
    *("trades-single+elle-a", "advmixup-single", "advmixup-single+elle", "advmixup-single+elle-a"),
)
_SMALL_EPS = (8 / 255, 16 / 255, 26 / 255)

_CIFAR = TrainConfig(
    data="image-folder",
    limit=10_128,
    validation=128,
    test_limit=1_000,
    model="preact",
    width=16,
    eps=16 / 255,
    epochs=12,
    augment=False,
)
_JPEG = "JPEG-compressed CIFAR-10, not comparable with published numbers"
_EVALUATED: dict[str, Any] = {"eval_attacks": "clean,pgd-20"}
_SMALL = replace(_CIFAR, limit=4_736, epochs=8, **_EVALUATED)


def _medium() -> Setting:
    """All 50,000 images, augmented; every method that was changed or is new, and those to compare them with."""
    smoothed = {"label_smoothing": 0.4}
    averaged: dict[str, Any] = {"epochs": 15, "average": 0.999}
    first: Variants = {
        **_methods("fgsm", "n-fgsm"),
        **_FAST,
        "n-fgsm+elle-a fast": _N_FAST,
        # What the recipe gains, at 8/255: averaging and the best checkpoint are in each run.
        "n-fgsm+elle-a fast at 8": {**_N_FAST, "eps": 8 / 255},
        "n-fgsm+elle-a fast at 8 smoothed": {**_N_FAST, "eps": 8 / 255, **smoothed},
        **_methods("elle-2p", "nuat", "liet"),
        **{f"{base}+elle-a fast": {"method": f"{base}+elle-a", **FAST} for base in ("nuat", "liet")},
        **_methods("gat", "gat-fgsm", "slat", "n-aaer", "rs-aaer", "uap", "cuap", "fuap", "n-fgsm+awp", "fgsm+advlc"),
    }
    # ELLE-A with the levers stands for E_lin on top: a constant lam costs twice as much.
    with_elle = {f"{base}+elle-a fast": {"method": f"{base}+elle-a", **FAST} for base in ("gat", "gat-fgsm", "plain")}
    left = (name for name in _all_but(first) if name not in _UNCHANGED and "+" not in name)
    others = {**with_elle, **_methods(*left)}
    return Setting(
        # 48,976 images to train on are 382 batches, 5,730 steps. Until step 8,990 the average's decay grows, whatever
        # tau above 0.998: its weights' mean age is a tenth of the steps so far. FastAT's 0.9995 is for 39,000 steps.
        # bf16 takes half of fp32's time where the processor has it; triplets and what evaluates stay in fp32.
        config=replace(_CIFAR, precision="bf16", validation=1_024, limit=None, augment=True, **averaged, **_EVALUATED),
        variants=first,
        others=others,
        seeds=(0,),
        note=f"{_JPEG}; all images, 15 epochs",
        strong=(*first, *others),
        strong_samples=1_000,
        masking=False,
        strong_models=("n-fgsm+elle-a fast at 8", "n-fgsm+elle-a fast at 8 smoothed"),
    )


def _paper(data: str, largest: int, **options: Any) -> Setting:
    """The published setting: PreActResNet18, Short schedule, even eps up to the largest, all test images."""
    return Setting(
        config=TrainConfig(data=data, model="preactresnet18", eps=8 / 255, eval_attacks="clean,pgd-20", **options),
        variants=_PUBLISHED,
        others=_all_but(_PUBLISHED),
        seeds=(0, 1, 2),
        eps=tuple(eps / 255 for eps in range(2, largest + 1, 2)),
        strong=tuple(_PUBLISHED),
        note=f"{data}, PreActResNet18, Short schedule",
        measure=misalignment,
    )


# What is neither the demo nor a comparison: small, and nothing is robust at this eps.
SMALL_DIGITS = TrainConfig(
    data="digits",
    model="cnn",
    normalize=False,
    eps=0.3,
    epochs=60,
    batch_size=64,
    learning_rate=0.1,
    weight_decay=0.0,
    validation=180,
)

SETTINGS = {
    "digits": Setting(
        config=demo.SETTING,
        variants=demo.METHODS,
        seeds=(0, 1, 2, 3, 4),
        note="scikit-learn's digits enlarged to 24x24, the setting of make demo",
        strong=tuple(demo.METHODS),
        strong_every_seed=True,
        strong_attacks="pgd-20,pgd-50-10,autoattack",
        strong_samples=100,
    ),
    "cifar10-jpeg-small": Setting(
        config=_CIFAR,
        variants=_methods("fgsm", "n-fgsm", "elle", "elle-a", "n-fgsm+elle-a"),
        seeds=(0, 1, 2),
        note=_JPEG,
    ),
    # The price in robustness of each option that makes ELLE-A cheaper.
    "cifar10-jpeg-levers": Setting(
        config=_CIFAR,
        variants={
            **_methods("fgsm", "elle-a"),
            **_levers(
                skip={"skip_below": 1e-2},
                eighth={"triplet_fraction": 0.125},
                fast=FAST,
                split={"forward": "split"},
                lagged={"lagged": True},
                checkpoint={"forward": "checkpoint"},
            ),
        },
        seeds=(0, 1, 2),
        note=_JPEG,
        eps=(8 / 255, 16 / 255),
    ),
    # Runs the whole path, with every method once; measures nothing.
    "digits-smoke": Setting(
        config=replace(SMALL_DIGITS, width=2, limit=80, validation=16, test_limit=16, epochs=2, log_every=1),
        variants=_methods("fgsm"),
        others={**_all_but(_methods("fgsm")), **_FAST},
        seeds=(0,),
        note="smoke: four steps on digits, of which no number means anything",
        strong=("fgsm",),
        strong_samples=2,
        measure=misalignment,
    ),
    # See the top of the file.
    "cifar10-small": Setting(
        config=_SMALL,
        variants=_MAIN,
        others={**_all_but(_MAIN), **_FAST},
        seeds=(0, 1, 2),
        note=_JPEG,
        eps=_SMALL_EPS,
        strong=_STRONG,
        strong_once=_STRONG_ONCE,
        strong_samples=200,
        measure=misalignment,
    ),
    "cifar10-medium": _medium(),
    # 0.3, the field's usual radius for MNIST, beside those of CIFAR-10.
    "mnist-small": Setting(
        config=replace(_SMALL, data="mnist", model="cnn", width=8, learning_rate=0.1, eps=0.3),
        variants=_MAIN,
        seeds=(0,),
        note="MNIST, small CNN, 4,608 images",
        eps=(*_SMALL_EPS, 0.3),
        strong=_STRONG,
        strong_samples=200,
        measure=misalignment,
    ),
    # The paper's Fig. 8 (lam of ELLE-A), Fig. 18a (other forms of E_lin while FGSM collapses) and Fig. 18b (ELLE-2p);
    # and training with the other forms, which the paper left out, as they differ by a constant only.
    "cifar10-ablations": Setting(
        config=_SMALL,
        variants={
            **_methods("fgsm"),
            **_lams("elle-a", 1_000.0, 4_000.0, 10_000.0, 100_000.0),
            **_lams("elle-2p", 100.0, 1_000.0, 5_000.0),
        },
        others=_levers(half={"alpha": "half"}, two_triplets={"triplets": 2}, five_point={"points": "five-point"}),
        seeds=(0,),
        note=_JPEG,
        eps=_SMALL_EPS,
        measure=forms_of_e_lin,
    ),
    "cifar10-paper": _paper("cifar10", 26),
    "cifar100-paper": _paper("cifar100", 26),
    "svhn-paper": _paper("svhn", 12, epochs=15),
}
SCALES = ("smoke", "small", "medium", "ablations", "paper")


def find(dataset: str | None, scale: str) -> str:
    """The name of the setting of a data set (``None``: the only one, or the first) at a scale.

    Raises:
        ValueError: if there is none; it lists those of that scale.
    """
    known = [name.removesuffix(f"-{scale}") for name in SETTINGS if name.endswith(f"-{scale}")]
    known = [name for name in known if "-" not in name]
    if dataset is None:
        return f"{known[0]}-{scale}"
    if dataset not in known:
        raise ValueError(f"dataset: expected one of {', '.join(map(repr, known))} at scale {scale!r}, got {dataset!r}")
    return f"{dataset}-{scale}"


def shares(cells: list[NamedConfig], shards: int) -> list[list[NamedConfig]]:
    """Deal the cells out in order, each to the share with the least work so far: units of the method times epochs."""
    dealt: list[list[NamedConfig]] = [[] for _ in range(shards)]
    loads = [0.0] * shards
    for name, config in cells:
        least = loads.index(min(loads))
        dealt[least].append((name, config))
        loads[least] += methods.find(config.method).units * (config.epochs or 1)
    return dealt
