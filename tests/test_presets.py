"""The presets: the paper's weights by data set, schedule and eps."""

from __future__ import annotations

import pytest

from elle_fast import AdaptiveLambda, ELLELoss
from elle_fast.presets import FAST, NAMES

EIGHT = 8 / 255
PRESET_LAMS = [
    # name, eps, options, lam (PAPER, section 4)
    ("cifar10", EIGHT, {}, 5_000),
    ("cifar10", EIGHT, {"adaptive": True}, 4_000),
    ("cifar10", EIGHT, {"adaptive": True, "attack": "n-fgsm"}, 4_000),
    ("cifar10-long", EIGHT, {}, 10_000),
    ("cifar10-long", EIGHT, {"adaptive": True}, 10_000),
    ("cifar10-long", EIGHT, {"adaptive": True, "attack": "n-fgsm"}, 4_000),
    ("cifar100", EIGHT, {}, 5_000),
    ("cifar100", EIGHT, {"adaptive": True}, 4_000),
    ("cifar100", EIGHT, {"adaptive": True, "attack": "n-fgsm"}, 4_000),
    ("svhn", EIGHT, {}, 20_000),
    ("svhn", EIGHT, {"adaptive": True}, 20_000),
    ("svhn", EIGHT, {"adaptive": True, "attack": "n-fgsm"}, 5_000),
    ("svhn-long", EIGHT, {}, 20_000),
    ("svhn-long", EIGHT, {"adaptive": True}, 20_000),
    ("imagenet", 2 / 255, {"adaptive": True}, 10_000),
    ("imagenet", 2 / 255, {"adaptive": True, "attack": "n-fgsm"}, 20_000),
    ("imagenet", 16 / 255, {"adaptive": True, "attack": "n-fgsm"}, 100_000),
    ("imagenet", 16 / 255, {"adaptive": True}, 10_000),
    ("fast", EIGHT, {"adaptive": True}, 4_000),
    ("fast", EIGHT, {"adaptive": True, "attack": "n-fgsm"}, 4_000),
]


@pytest.mark.parametrize("name, eps, options, lam", PRESET_LAMS)
def test_presets(name, eps, options, lam):
    criterion = ELLELoss.preset(name, eps, **options)
    assert criterion.lam == lam
    assert criterion.packing.eps == eps
    assert criterion.adaptive == options.get("adaptive", False)
    assert criterion.attack == options.get("attack", "fgsm")
    assert criterion.controller is None or criterion.controller.lam_max == lam


def test_every_preset_is_tested():
    assert {name for name, *_ in PRESET_LAMS} == set(NAMES)


def test_the_fast_preset_is_elle_a_with_its_levers():
    criterion = ELLELoss.preset("fast", EIGHT)
    assert (criterion.lam, criterion.adaptive, criterion.skip_below) == (4_000, True, 0.01)
    assert criterion.packing.fraction == 0.125
    assert ELLELoss.preset("fast", EIGHT, lam=7.0, triplet_fraction=0.5).packing.fraction == 0.5
    assert ELLELoss.preset("fast", EIGHT, lam=7.0).skip_below == 0.01
    svhn = ELLELoss.preset("svhn", EIGHT, adaptive=True, **FAST)
    assert (svhn.lam, svhn.skip_below) == (20_000, 0.01)
    with pytest.raises(ValueError, match=r"^name: preset 'fast' has no ELLE with a constant lam, as its options are"):
        ELLELoss.preset("fast", EIGHT, adaptive=False)


def test_presets_take_overrides():
    criterion = ELLELoss.preset("cifar10", EIGHT, lam=AdaptiveLambda(7.0, gamma=0.5), bounds=(0.0, 1.0))
    assert criterion.lam == 7.0
    assert criterion.controller is not None
    assert (criterion.controller.gamma, criterion.controller.lam_max) == (0.5, 7.0)
    assert ELLELoss.preset("imagenet", EIGHT, lam=9.0).lam == 9.0
