"""Recipes: presets of the options of a run, as published."""

from __future__ import annotations

from dataclasses import fields, replace
from typing import Any

from elle_fast import methods
from elle_fast._core import checks
from elle_fast.recipes.config import TrainConfig

NAMES = ("paper", "fastat", "authors", "imagenet")

# What a recipe is about; where it has nothing of its own, it has the default of elle-fast train.
_OF_A_RECIPE = (
    *("normalize", "augment", "sync_batchnorm", "clamp", "label_smoothing", "forward", "lagged", "schedule", "peak"),
    *("milestones", "knots", "warmup", "rate_per", "epochs", "learning_rate", "batch_size", "phases", "drop_last"),
    *("optimizer", "momentum", "momentum_cycle", "weight_decay", "decay", "steps_per_batch", "clean_forward"),
    *("eps_warmup", "eps_per", "validation", "average", "patience"),
)
_DEFAULTS = {option.name: option.default for option in fields(TrainConfig)}
# Options of the authors' trainer, or of no concern to it, that may be others beside --recipe authors.
_FREE = {"model", "lam", "epochs", "learning_rate", "batch_size", "weight_decay", "eval_attacks", "triplet_precision"}
# What their one training loss covers: with clean_forward, and without clamping. GAT, SLAT and Fast-BAT are apart.
_ONE_LOSS = {"fgsm", "n-fgsm", "elle", "elle-a", "elle-2p", "pgd-at", "gradalign", "cure-fgsm", "llr"}


def options(name: str, run: TrainConfig) -> dict[str, Any]:
    """The options of a recipe for the data set and method of ``run``.

    - ``paper``: the ELLE paper (arXiv 2401.11618, section 4): its schedule for the data set, SGD, the last weights.
      The paper does not say whether inputs are normalised; here they are.
    - ``fastat``: FastAT Benchmark (arXiv 2604.22853 and its code): 100 epochs (Free AT 200) of OneCycleLR up to 0.1,
      moved each epoch with its momentum from 0.95 to 0.85 and back, label smoothing 0.4, the average of the weights
      with tau 0.9995, 1,000 validation images, the last batch kept, no normalisation. Their network is a ResNet-18,
      not a PreActResNet-18, and their average has its tau from the first step on. LIET keeps its own label smoothing.
      ELLE is not as they have it (lam 1, points up to 2.25 eps away), but FGSM from x, x_adv clamped and triplets not,
      passes apart, lam of the table.
    - ``authors``: the ELLE authors' CIFAR and SVHN trainer (its public code) with ``--scheduler GradAlign``: Short, two
      optimiser steps on each gradient, the rate moved between them, momentum from 0.9 to 0.8 and back, no
      normalisation, nothing clamped, passes apart, lam lagged by a step, the last batch kept, one more forward pass
      over the clean images, eps on SVHN in steps of a fifth over 5 epochs, PGD-20 with steps of eps/8 (which also
      chooses their best weights; here PGD-10 does), and the lam of their scripts for ELLE on CIFAR-10. Precision,
      compilation and capture are the run's own.

    - ``imagenet``: the trainings of ResNet50 in 15 epochs by Wong et al. (arXiv 2001.03994) and by the ELLE authors
      (their public code): crops of 128, 224 and 288 pixels with batches of 512, 224 and 128, a rate that rises to 0.4
      in the first epoch and falls by the epoch's part to 0.04, 0.004 and 0.0004 at epochs 6, 12 and 15, weight decay
      1e-4 on weights (theirs is on the last layer's bias too), every point clamped to [0, 1]. ELLE has a smooth-L1
      penalty, ELLE-A a history of 500 steps that begins anew with each phase; with N-FGSM lam_max grows over 2,500
      steps of each. Tests are on central crops of 224 pixels. Theirs was fp16; ``precision`` is the run's own.

    Raises:
        TypeError, ValueError: for an unknown recipe or method.
    """
    checks.choice("recipe", name, NAMES)
    levers, base = methods.find(run.method).levers, run.method.partition("+")[0]
    own: dict[str, Any] = {each: _DEFAULTS[each] for each in _OF_A_RECIPE} | {"label_smoothing": 0.0}
    if name == "imagenet":
        return own | _imagenet(base, levers, run.rule)
    if run.data in ("cifar10", "cifar100", "svhn"):
        own["model"] = "preactresnet18"
    if name == "paper":
        return own | {"eval_attacks": "clean,pgd-20,pgd-50-10"}
    own |= {"normalize": False, "drop_last": False, "momentum_cycle": 0.1}
    if "forward" in levers:
        own["forward"] = "split"
    if name == "fastat":
        own |= {"schedule": "onecycle", "rate_per": "epoch", "momentum": 0.95, "average": 0.9995, "validation": 1_000}
        own["label_smoothing"] = None if base == "liet" else 0.4  # LIET's own is in their files too
        own |= {"epochs": 200} if run.method == "free-at" else {}
        own |= {"clamp": "attack"} if levers else {}
        return own | {"eval_attacks": "clean,pgd-10,pgd-20,pgd-50"}
    own |= {"steps_per_batch": 2, "eps_per": "epoch" if run.data == "svhn" else "step", "lagged": "lagged" in levers}
    if base in _ONE_LOSS:
        own |= {"clamp": "none", "clean_forward": True}
    if (run.method, run.data) == ("elle", "cifar10") and not 9 <= (levels := round(255 * run.eps)) <= 20:
        own["lam"] = 1_000.0 if levels < 9 else 10_000.0  # their scripts; in between it is the paper's
    own = {each: _DEFAULTS[each] for each in methods.LEVERS} | own
    return own | {"eval_attacks": "clean,pgd-20-eps/8"}


def _imagenet(base: str, levers: tuple[str, ...], rule: str) -> dict[str, Any]:
    own: dict[str, Any] = {
        "model": "resnet50",
        "image_size": 224,
        "crop": "resized",
        "clamp": "all",
        "eval_attacks": "clean,pgd-50",
    }
    own |= {"schedule": "linear", "knots": "0:0,1:1,6:0.1,12:0.01,15:0.001", "learning_rate": 0.4}
    own |= {"phases": "6:128:512,6:224:224,3:288:128", "weight_decay": 1e-4, "decay": "weights"}
    if "penalty" in levers:
        own |= {"penalty": "smooth_l1"}
    if "window" in levers and rule == "paper":
        own |= {"window": 500, "ramp": 2_500 if base == "n-fgsm" else None}
    return own


def check(name: str, run: TrainConfig, preset: dict[str, Any]) -> None:
    """Refuse a run that has other options than ``authors``; beside other recipes, any option may be another.

    Raises:
        ValueError: naming the option.
    """
    if name != "authors":
        return
    fixed = {option: value for option, value in preset.items() if option not in _FREE}
    resolved = replace(run, **fixed).resolved()
    for option, value in fixed.items():
        given, has = getattr(run, option), getattr(resolved, option)
        if given not in (value, has):
            shown = "its default" if has is None else repr(has)
            raise ValueError(
                f"{option}: contradicts --recipe authors, which has {shown} (got {given!r}); "
                "to change a part of it, edit what --print-config writes and pass it with --config"
            )
