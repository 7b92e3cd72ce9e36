"""Bad options are refused when a criterion is built, by an error that names the argument and what was got."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from elle_fast import AdaptiveLambda, ELLELoss, LocalLinearity, attacks, methods, presets
from elle_fast.functional import elle_loss, pack_points, random_start
from tests.errors.cases import ATTACKS, MODEL, B, C, refused, x_and_y
from tests.helpers import labels, seed_of

SEED = seed_of(0)
NUMBERS = [
    (-0.5, ValueError, "-0.5"),
    (math.nan, ValueError, "nan"),
    (math.inf, ValueError, "inf"),
    (10**400, ValueError, "1000"),
    pytest.param(10**5000, ValueError, "an integer of more digits", id="huge"),
    (1e39, ValueError, "1e+39"),
    ("8/255", TypeError, "'8/255' (str)"),
    (True, TypeError, "True (bool)"),
    (None, TypeError, "None (NoneType)"),
    (1j, TypeError, "1j (complex)"),
    ([0.1], TypeError, "[0.1] (list)"),
    (torch.tensor(0.1), TypeError, "a tensor of shape [], torch.float32, on cpu"),
]


@pytest.mark.parametrize("value, error, got", NUMBERS, ids=str)
def test_eps(value, error, got):
    x, y = x_and_y()
    refused(error, "eps", got, ELLELoss, value)
    refused(error, "eps", got, LocalLinearity, value)
    refused(error, "eps", got, ELLELoss.preset, "cifar10", value)
    refused(error, "eps", got, pack_points, x, None, value, seed=seed_of(0))
    refused(error, "eps", got, random_start, x, value, seed=seed_of(0))
    for attack in ATTACKS:
        refused(error, "eps", got, attack, MODEL, x, y, value)


@pytest.mark.parametrize("value, error, got", NUMBERS, ids=str)
def test_lam(value, error, got):
    refused(error, "lam", got, AdaptiveLambda, value)
    of_a_criterion = (ValueError, "lam", "'8/255'") if isinstance(value, str) else (error, "lam", got)  # "auto" is one
    refused(*of_a_criterion, ELLELoss, 0.1, lam=value)
    refused(*of_a_criterion, ELLELoss, 0.1, lam=value, adaptive=True)
    refused(*of_a_criterion, ELLELoss.preset, "cifar10", 0.1, lam=value)
    if not isinstance(value, Tensor):
        logits, alpha = torch.zeros(4 * B, C), torch.zeros(B)
        refused(error, "lam", got, elle_loss, logits, labels(B, C), alpha, value)


@pytest.mark.parametrize(
    "name, value, error, got",
    [
        ("gamma", 1.5, ValueError, "1.5"),
        ("gamma", -0.1, ValueError, "-0.1"),
        ("gamma", "0.9", TypeError, "0.9"),
        ("sensitivity", -1.0, ValueError, "-1.0"),
        ("sensitivity", math.nan, ValueError, "nan"),
        ("min_history", 0, ValueError, "0"),
        ("min_history", 2.0, TypeError, "2.0 (float)"),
        ("min_history", True, TypeError, "True (bool)"),
        ("sensitivity", 1e39, ValueError, "1e+39"),
        ("min_history", 10**30, ValueError, "1000"),
        ("window", 10**12, ValueError, "1000000000000"),
        ("window", 2, ValueError, "2"),
        ("window", 5.5, TypeError, "5.5 (float)"),
        ("start", -1.0, ValueError, "-1.0"),
        ("start", "lam_max", TypeError, "'lam_max' (str)"),
        ("ramp", 0, ValueError, "0"),
        ("ramp", 2.5, TypeError, "2.5 (float)"),
    ],
)
def test_options_of_the_controller(name, value, error, got):
    refused(error, name, got, AdaptiveLambda, 1.0, **{name: value})


def test_a_ramp_starts_at_zero():
    refused(ValueError, "start", "2.0", AdaptiveLambda, 4.0, start=2.0, ramp=10)


SHARED_OPTIONS: list[tuple[str, Any, type[Exception], str]] = [
    ("bounds", (1.0, 0.0), ValueError, "(1.0, 0.0)"),
    ("bounds", (0.0, 0.0), ValueError, "(0.0, 0.0)"),
    ("bounds", (0.0, 0.5, 1.0), ValueError, "(0.0, 0.5, 1.0)"),
    ("bounds", (0.0, math.nan), ValueError, "(0.0, nan)"),
    ("bounds", (0.0, 1e39), ValueError, "(0.0, 1e+39)"),
    ("bounds", (-1e39, 1.0), ValueError, "(-1e+39, 1.0)"),
    ("bounds", (0, 10**400), ValueError, "1000"),
    ("bounds", (0, True), TypeError, "(0, True) (tuple)"),
    ("bounds", 1.0, TypeError, "1.0 (float)"),
    ("bounds", ("0", "1"), TypeError, "('0', '1') (tuple)"),
    ("norm", "l1", ValueError, "'l1'"),
    ("norm", 2, TypeError, "2 (int)"),
    ("points", "elle-3p", ValueError, "'elle-3p'"),
    ("points", None, TypeError, "None (NoneType)"),
    ("triplets", 0, ValueError, "0"),
    ("triplets", -1, ValueError, "-1"),
    ("triplets", 1.0, TypeError, "1.0 (float)"),
    ("triplets", 1 << 24, ValueError, "16777216"),
    ("alpha", "third", ValueError, "'third'"),
    ("alpha", 0.5, TypeError, "0.5 (float)"),
    ("penalty", "cubed", ValueError, "'cubed'"),
    ("of", "features", ValueError, "'features'"),
    ("label_smoothing", 1.5, ValueError, "1.5"),
    ("label_smoothing", "0.1", TypeError, "'0.1' (str)"),
    ("triplet_fraction", 0, ValueError, "0"),
    ("triplet_fraction", 0.0, ValueError, "0.0"),
    ("triplet_fraction", 1.01, ValueError, "1.01"),
    ("triplet_fraction", None, TypeError, "None (NoneType)"),
    ("logits", "logits", TypeError, "'logits' (str)"),
    ("loss_fn", 3, TypeError, "3 (int)"),
    ("dtype", torch.int32, TypeError, "torch.int32"),
    ("dtype", "float16", TypeError, "'float16' (str)"),
    ("memory_format", "channels_last", TypeError, "'channels_last' (str)"),
    ("generator", 3, TypeError, "3 (int)"),
    ("backend", "tpu", ValueError, "'tpu'"),
    ("backend", None, TypeError, "None (NoneType)"),
]


@pytest.mark.parametrize("name, value, error, got", SHARED_OPTIONS)
def test_options_of_the_triplets(name, value, error, got):
    refused(error, name, got, ELLELoss, 0.1, **{name: value})
    refused(error, name, got, LocalLinearity, 0.1, **{name: value})


@pytest.mark.parametrize(
    "name, value, error, got",
    [
        ("adaptive", 1, TypeError, "1 (int)"),
        ("adaptive", None, TypeError, "None (NoneType)"),
        ("lagged", "yes", TypeError, "'yes' (str)"),
        ("attack", "pgd", ValueError, "'pgd'"),
        ("attack", None, TypeError, "None (NoneType)"),
        ("forward", "both", ValueError, "'both'"),
        ("forward", True, TypeError, "True (bool)"),
        ("step_size", -1.0, ValueError, "-1.0"),
        ("step_size", "1", TypeError, "'1' (str)"),
    ],
)
def test_options_of_the_whole_loss(name, value, error, got):
    refused(error, name, got, ELLELoss, 0.1, **{name: value})


def test_radii_beyond_float32():
    x, y = x_and_y()
    refused(ValueError, "step_size", "1e+39", ELLELoss, 0.1, step_size=1e39)
    for name, start in (("start", 1e39), ("start * eps", 4.0)):
        refused(ValueError, name, "e+39", random_start, x, 3e38, seed=SEED, start=start)
        refused(ValueError, name, "e+39", pack_points, x, x, 3e38, seed=SEED, start=start)
    refused(ValueError, "step_size", "3.75e+38", ELLELoss, 3e38, attack="rs-fgsm")  # 1.25 eps
    refused(ValueError, "start * eps", "6e+38", ELLELoss, 3e38, attack="n-fgsm")
    refused(ValueError, "start * eps", "6e+38", attacks.n_fgsm, MODEL, x, y, 3e38)


def test_options_that_do_not_go_together():
    for name, value in (("lagged", True), ("skip_below", 0.1)):
        with pytest.raises(ValueError, match=f"^{name}: only ELLE-A moves lam; pass adaptive=True"):
            ELLELoss(0.1, **dict[str, Any]({name: value}))
    with pytest.raises(
        TypeError, match=r"^ELLELoss: .* those of ELLE-A with lam=AdaptiveLambda\(\.\.\.\), got window$"
    ):
        ELLELoss(0.1, window=9)
    with pytest.raises(TypeError, match=r"^ELLELoss: expected options of its own or of LocalLinearity, got tripletz$"):
        ELLELoss(0.1, tripletz=2)
    refused(ValueError, "step_size", "0.1", ELLELoss, 0.1, attack="none", step_size=0.1)
    refused(ValueError, "step_size", "0.1", ELLELoss, 0.1, attack=lambda m, x, y: x, step_size=0.1)
    refused(ValueError, "alpha", "'half'", ELLELoss, 0.1, points="five-point", alpha="half")
    refused(ValueError, "alpha", "'argmax'", ELLELoss, 0.1, points="five-point", alpha="argmax")
    refused(ValueError, "loss_fn", "'logits'", ELLELoss, 0.1, loss_fn=lambda o, t: o, of="logits")
    refused(ValueError, "loss_fn", "0.1", ELLELoss, 0.1, loss_fn=lambda o, t: o, label_smoothing=0.1)
    for cls in (ELLELoss, LocalLinearity):
        refused(ValueError, "mean", "3 and 2", cls, 0.1, mean=[0.1, 0.2, 0.3], std=[1, 1])
        refused(ValueError, "mean", "0 and 0", cls, 0.1, mean=[], std=[])
        refused(TypeError, "std", "None (NoneType)", cls, 0.1, mean=[0.1])
        refused(TypeError, "mean", "None (NoneType)", cls, 0.1, std=[0.1])
        refused(TypeError, "mean", "0.5 (float)", cls, 0.1, mean=0.5, std=0.5)
        refused(ValueError, "std", "(1.0, 0.0)", cls, 0.1, mean=(0.5, 0.5), std=(1.0, 0.0))
        refused(ValueError, "std", "(-1.0,)", cls, 0.1, mean=(0.5,), std=(-1.0,))
        refused(ValueError, "mean", "(nan,)", cls, 0.1, mean=(math.nan,), std=(1.0,))
        refused(ValueError, "mean", "(1e+39,)", cls, 0.1, mean=(1e39,), std=(1.0,))
        refused(ValueError, "std", "(1e+39,)", cls, 0.1, mean=(0.5,), std=(1e39,))
        refused(ValueError, "std", "(1e-39,)", cls, 0.1, mean=(0.5,), std=(1e-39,))  # 1 / std is beyond float32
        refused(ValueError, "std", "1000", cls, 0.1, mean=(0.5,), std=(10**400,))
        refused(TypeError, "std", "(True,) (tuple)", cls, 0.1, mean=(0.5,), std=(True,))


@pytest.mark.parametrize(
    "name, options, error, got",
    [
        ("mnist", {}, ValueError, "'mnist'"),
        ("mnist", {"lam": 1.0}, ValueError, "'mnist'"),
        (None, {}, TypeError, "None (NoneType)"),
    ],
)
def test_unknown_preset(name, options, error, got):
    refused(error, "name", got, ELLELoss.preset, name, 0.1, **options)


@pytest.mark.parametrize(
    "name, options",
    [
        ("imagenet", {}),
        ("svhn-long", {"adaptive": True, "attack": "n-fgsm"}),
    ],
)
def test_methods_that_the_paper_does_not_have(name, options):
    with pytest.raises(ValueError, match=f"^name: preset '{name}' has no .*; pass lam="):
        ELLELoss.preset(name, 0.1, **options)


def test_preset_passes_bad_overrides_on():
    refused(TypeError, "adaptive", "1 (int)", ELLELoss.preset, "cifar10", 0.1, adaptive=1)
    refused(ValueError, "attack", "'pgd'", ELLELoss.preset, "cifar10", 0.1, attack="pgd")


@pytest.mark.parametrize("method", ["fgsm", "nuat", "elle", "gradalign", "gat+elle-a"])
@pytest.mark.parametrize(
    "name, value, error, got",
    [
        ("eps", None, TypeError, "None (NoneType)"),
        ("eps", "8/255", TypeError, "'8/255' (str)"),
        ("eps", torch.zeros(2), TypeError, "shape [2]"),
        ("eps", -1, ValueError, "-1"),
        pytest.param("lam", 10**5000, ValueError, "an integer of more digits", id="huge lam"),
        ("bounds", (0, True), TypeError, "(0, True) (tuple)"),
        ("steps", 0, ValueError, "0"),
        ("steps", "many", TypeError, "'many' (str)"),
        ("layers", [3], TypeError, "[3] (list)"),
        pytest.param("forward", 10**5000, TypeError, "an integer of more digits", id="huge forward"),
    ],
)
def test_options_of_a_method(method, name, value, error, got):
    """Also of those that take no such option."""
    if name == "forward" and method != "elle":
        error = ValueError
    refused(error, name, got, methods.build, method, **{"eps": 0.1, name: value})


def test_options_of_a_default_weight():
    for name, value, error in (
        ("eps", "0.1", TypeError),
        ("eps", 1e39, ValueError),
        ("schedule", "longer", ValueError),
    ):
        refused(error, name, repr(value), presets.weight, "elle", **{name: value})
