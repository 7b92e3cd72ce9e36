"""The presets: the paper's weights by data set, schedule, eps and penalty; ImageNet against its authors' rules."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from elle_fast import AdaptiveLambda, ELLELoss, presets
from elle_fast.functional import draw_seed, random_start
from elle_fast.presets import FAST, NAMES
from tests.errors.cases import refused
from tests.helpers import grads_of, labels, random, rng
from tests.loss.cases import F64, bent, ce_rows, fgsm_by_hand, noise_of
from tests.test_phases import by_the_authors

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
    ("imagenet", 2 / 255, {"adaptive": True}, 20_000),
    ("imagenet", 2 / 255, {"adaptive": True, "attack": "n-fgsm"}, 20_000),
    ("imagenet", 16 / 255, {"adaptive": True, "attack": "n-fgsm"}, 100_000),
    ("imagenet", 16 / 255, {"adaptive": True}, 20_000),
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


# ---- ImageNet, whose code is a trainer of its own


@pytest.mark.parametrize(
    "eps, options, start, ramp",
    [
        (2 / 255, {}, 0.0, None),
        (8 / 255, {"attack": "n-fgsm"}, 0.0, 2500),
        (16 / 255, {}, 20_000.0, None),
        (16 / 255, {"attack": "n-fgsm"}, 0.0, 2500),
        (16 / 255, {"lam": 7.0}, 7.0, None),
    ],
)
def test_imagenet_is_more_than_a_weight(eps, options, start, ramp):
    criterion = ELLELoss.preset("imagenet", eps, adaptive=True, **options)
    controller, linearity = criterion.controller, criterion.linearity
    assert controller is not None
    assert (controller.window, controller.start, controller.ramp) == (500, start, ramp)
    assert controller.lam.item() == start
    assert (linearity.options.penalty, linearity.packing.bounds) == ("smooth_l1", (0.0, 1.0))


def test_overrides_of_imagenet():
    mine = AdaptiveLambda(3.0)
    assert ELLELoss.preset("imagenet", 16 / 255, lam=mine).controller is mine
    constant = ELLELoss.preset("imagenet", 16 / 255, lam=3.0)
    assert (constant.controller, constant.linearity.options.penalty) == (None, "smooth_l1")
    squared = ELLELoss.preset("imagenet", 2 / 255, adaptive=True, penalty="squared", bounds=(-1.0, 1.0))
    assert (squared.lam, squared.packing.bounds) == (10_000, (-1.0, 1.0))


@pytest.mark.parametrize(
    "eps, attack, lam",
    [(2 / 255, "fgsm", 20_000), (16 / 255, "fgsm", 20_000), (8 / 255, "n-fgsm", 20_000), (16 / 255, "n-fgsm", 100_000)],
)
def test_steps_of_imagenet_over_two_phases(eps, attack, lam):
    """Points, smooth-L1, lam and gradients, written out in plain torch from the code's rules, in float64."""
    steps, model = 40, bent()
    criterion = ELLELoss.preset("imagenet", eps, adaptive=True, attack=attack, generator=rng(3))
    assert criterion.controller is not None
    source, found, e_lins, clamped = rng(3), list[tuple[Tensor, list[Tensor]]](), list[float](), 0
    parts = list[tuple[Tensor, list[Tensor], Tensor, list[Tensor]]]()
    for step in range(2 * steps):
        if step == steps:
            criterion.controller.restart()
        # Pixels at 0 and at 1, and now and then a batch on which the model is less linear.
        x = (2 * random(5, 6, seed=step, dtype=F64) - 0.5).clamp(0, 1)
        y = labels(5, 4, seed=step)
        gain = 3.0 if step % 8 == 5 else 1.0

        def scaled(points: Tensor, gain: float = gain) -> Tensor:
            logits: Tensor = gain * model(points)
            return logits

        loss = criterion(scaled, x, y)
        found.append((loss.detach(), grads_of(loss, model)))

        seed = draw_seed(x.device, source)
        begun = random_start(x, 2 * eps, seed=seed, bounds=(0.0, 1.0)) if attack == "n-fgsm" else x
        x_adv = fgsm_by_hand(scaled, begun, y, eps).clamp(0, 1)
        x_a, x_b, alpha = noise_of(x, eps, seed)
        clamped += int((x_a != x_a.clamp(0, 1)).sum())
        x_a, x_b = x_a.clamp(0, 1), x_b.clamp(0, 1)
        a = alpha[:, None]
        of_a, of_b, of_c = (ce_rows(scaled, point, y) for point in (x_a, x_b, (1 - a) * x_a + a * x_b))
        ce, e_lin = ce_rows(scaled, x_adv, y).mean(), F.smooth_l1_loss(of_c, (1 - alpha) * of_a + alpha * of_b)
        e_lins.append(e_lin.item())
        parts.append((ce.detach(), grads_of(ce, model), e_lin.detach(), grads_of(e_lin, model)))

    start, ramp = (0.0, 2500) if attack == "n-fgsm" else (float(lam) if eps == 16 / 255 else 0.0, None)
    rule: dict[str, Any] = {"window": 500, "start": start, "ramp": ramp}
    weights = list(by_the_authors([e_lins[:steps], e_lins[steps:]], lam, **rule))
    for (loss, grads), (ce, of_ce, e_lin, of_e_lin), (weight, _) in zip(found, parts, weights, strict=True):
        # lam is in float32, with two roundings a step; E_lin is known to some 1e-9 of itself (tests/loss/cases.py).
        torch.testing.assert_close(loss, ce + weight * e_lin, rtol=1e-5, atol=0)
        for one, first, second in zip(grads, of_ce, of_e_lin, strict=True):
            assert (one - (first + weight * second)).abs().max() <= 1e-5 * (first.abs() + weight * second.abs()).max()
    for phase in (weights[:steps], weights[steps:]):
        assert phase[0][0] == 0.99 * start
        assert sum(detected for _, detected in phase) >= 2
    assert clamped > steps


# ---- Weights by penalty and by size


def test_smooth_l1_has_twice_the_weight_of_the_square():
    """Of a small residual both then are the same regulariser."""
    r = random(50, seed=1, dtype=F64) * 1e-3
    for method, data in (("elle", "cifar10"), ("elle-a", "svhn"), ("n-fgsm+elle-a", "imagenet"), ("elle-2p", "digits")):
        lams = [presets.weight(method, data, penalty=penalty) for penalty in ("squared", "smooth_l1")]
        assert lams[0] is not None
        assert lams[1] is not None
        assert lams[0] * r.square().mean().item() == pytest.approx(
            lams[1] * F.smooth_l1_loss(r, torch.zeros_like(r)).item(), rel=1e-12
        )
    assert presets.weight("fgsm", penalty="abs") is None
    assert ELLELoss.preset("cifar10", EIGHT, penalty="smooth_l1").lam == 10_000
    assert ELLELoss.preset("cifar10", EIGHT, penalty="abs", lam=2.0).lam == 2
    for call in (lambda: presets.weight("elle-2p", penalty="abs"), lambda: ELLELoss.preset("svhn", 0.1, penalty="abs")):
        with pytest.raises(
            ValueError, match=r"^lam: expected a number with penalty='abs', which has no default.*1 to 10"
        ):
            call()
    refused(ValueError, "penalty", "'cubed'", presets.weight, "elle", penalty="cubed")


@pytest.mark.parametrize(
    "method, eps, sizes",
    [
        ("elle-a", EIGHT, {None: 4_000, 32: 4_000, 64: 4_000, 127: 4_000, 128: 10_000, 224: 10_000}),
        ("n-fgsm+elle-a", EIGHT, {64: 4_000, 224: 10_000}),
        ("n-fgsm+elle-a", 16 / 255, {64: 4_000, 224: 50_000}),
        ("elle", EIGHT, {64: 5_000, 224: 5_000}),
        ("gat+elle-a", EIGHT, {64: 10_000, 224: 10_000}),
        ("fgsm", EIGHT, {224: None}),
    ],
)
def test_an_image_folder_has_the_weight_of_its_size(method, eps, sizes):
    for size, lam in sizes.items():
        assert presets.weight(method, "image-folder", eps=eps, image_size=size) == lam
    assert presets.weight("elle-a", "cifar10", image_size=224) == 4_000
    refused(TypeError, "image_size", "64.0", presets.weight, "elle-a", "image-folder", image_size=64.0)
