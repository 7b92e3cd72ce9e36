"""Masked gradients are suspicious, honest ones are not."""

import pytest
import torch

from elle_fast.evaluation import Outcome, masking, masking_check
from tests.evaluation.cases import EPS, Linear, around, batched, needs_autoattack, pixels


@needs_autoattack
@pytest.mark.parametrize("kind", ["honest", "scaled", "quantised"])
def test_masked_gradients_are_suspicious_and_honest_ones_are_not(kind):
    model = Linear(2, 16, scale=1e4 if kind == "scaled" else 1.0)
    x, y = around(model, n=120, size=4)
    if kind == "quantised":
        model.register_forward_hook(lambda module, args, z: z.mul(100).round() / 100)
    found = masking_check(model, batched(x, y, 60), eps=EPS)
    square = found["attacks"]["square-1000"]
    assert found["samples"] == 120
    assert found["verdict"] == ("ok" if kind == "honest" else "suspicious")
    assert square["suspicious"] == (kind != "honest")
    assert (square["turned_alone"] > 10) == (kind != "honest")
    closed_form = (model.radius(x, y) > EPS).double().mean().item()
    white_box = found["white_box"]["accuracy"]
    assert white_box == closed_form if kind == "honest" else white_box > closed_form + 0.1


def marks(both, white_box_only, other_only, neither):
    rows = [[1, 1]] * both + [[1, 0]] * white_box_only + [[0, 1]] * other_only + [[0, 0]] * neither
    return tuple(torch.tensor(rows, dtype=torch.bool).T)


def test_pairs_decide_on_attacks_without_gradients():
    # Nine samples turned by Square alone: 2^-9 = 0.002 by chance; of three attacks, below 0.01 / 3 is suspicious.
    found = masking._compare("square-1000", *marks(50, 9, 0, 41))
    assert found["p_value"] == pytest.approx(2.0**-9)
    assert (found["turned_alone"], found["turned_by_white_box_alone"]) == (9, 0)
    # Three of twenty the other way: sum over k <= 3 of C(20, k) / 2^20.
    found = masking._compare("noise-100", *marks(50, 17, 3, 30))
    assert found["p_value"] == pytest.approx((1 + 20 + 190 + 1140) / 2**20)
    assert masking._compare("noise-100", *marks(50, 0, 0, 50))["p_value"] == 1.0
    assert masking._compare("noise-100", *marks(50, 0, 30, 20))["p_value"] == pytest.approx(1.0)


@pytest.mark.parametrize("name", ["pgd-200", "autoattack"])
def test_stronger_attacks_may_gain_what_is_within_the_noise_of_the_accuracies(name):
    assert masking._compare(name, *marks(50, 10, 0, 40))["p_value"] > 0.05  # 60 % to 50 %, of 100
    assert masking._compare(name, *marks(500, 100, 0, 400))["p_value"] < 1e-4  # the same of 1,000
    # Two of two against none of two: one of the C(4, 2) ways to place two robust samples.
    assert masking._compare(name, *marks(0, 2, 0, 0))["p_value"] == pytest.approx(1 / 6)


@needs_autoattack
@pytest.mark.parametrize("turned, suspicious", [(9, True), (8, False), (0, False)])
def test_the_level_is_shared_by_the_attacks_that_are_looked_at(turned, suspicious, model, monkeypatch):
    def fixed(model, batches, attacks, **options):
        white_box = torch.ones(1, 20, dtype=torch.bool)
        square = white_box.clone()
        square[0, :turned] = False
        return {name: Outcome(square if "square" in name else white_box, []) for name in attacks.split(",")}

    monkeypatch.setattr(masking, "outcomes", fixed)
    # 2^-8 = 0.0039, 2^-9 = 0.0020, and 0.01 / 3 lies between them.
    found = masking_check(model, pixels(range(20)), eps=0.1)
    assert [each["suspicious"] for each in found["attacks"].values()] == [False, suspicious, False]
    assert found["verdict"] == ("suspicious" if suspicious else "ok")


@needs_autoattack
@pytest.mark.parametrize("standing, verdict", [(0, "ok"), (1, "undecided"), (8, "undecided"), (9, "ok")])
def test_nothing_is_said_to_be_ok_that_could_not_have_been_suspicious(standing, verdict, model):
    """2^-8 is above the level of 0.01 / 3, 2^-9 below; Fisher's test of 9 of 9 samples is far below: 1 / C(18, 9)."""
    near, far = [126] * (12 - standing), [0] * standing  # turned by every attack but the weakest, and by none
    found = masking_check(model, pixels(near + far), eps=10 / 255)
    assert found["white_box"]["accuracy"] == standing / 12
    assert found["verdict"] == verdict


@needs_autoattack
def test_autoattack_is_compared_sample_by_sample(model, monkeypatch):
    monkeypatch.setattr(masking, "ATTACKS", ("pgd-20", "pgd-20-2", "square-5", "noise-2"))
    batches = pixels([120, *[0] * 9, *[255] * 10], size=7)
    withstood = torch.tensor([False] + [True] * 19)
    found = masking_check(model, batches, eps=10 / 255, autoattack=withstood)
    assert (found["samples"], found["verdict"]) == (20, "ok")
    row = found["attacks"]["autoattack"]
    assert (row["turned_alone"], row["turned_by_white_box_alone"], row["accuracy"]) == (0, 0, 0.95)
    row = masking_check(model, batches, eps=10 / 255, autoattack=withstood.flip(0))["attacks"]["autoattack"]
    assert (row["turned_alone"], row["turned_by_white_box_alone"], row["suspicious"]) == (1, 1, False)
    row = masking_check(model, batches, eps=10 / 255, autoattack=withstood & False)["attacks"]["autoattack"]
    assert (row["turned_alone"], row["accuracy"], row["suspicious"]) == (19, 0, True)
    with pytest.raises(ValueError, match=r"autoattack: expected bool \[20\], got a tensor of shape \[19\]"):
        masking_check(model, batches, eps=10 / 255, autoattack=withstood[1:])
