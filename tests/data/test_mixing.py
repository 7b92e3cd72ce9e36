"""Mixup and cutmix: torchvision's, from draws of a seed."""

import pytest
import torch

from elle_fast.data.mixing import Mixing
from tests.optional import import_torchvision


@pytest.fixture(scope="module")
def v2():
    import_torchvision()
    from torchvision.transforms import v2

    return v2


def batch(b=6, size=9):
    draws = torch.Generator().manual_seed(1)
    return torch.rand(b, 3, size, size + 2, generator=draws), torch.randint(4, (b,), generator=draws)


@pytest.mark.parametrize("kind,alpha", [("mixup", 0.2), ("mixup", 1.0), ("cutmix", 1.0), ("cutmix", 0.3)])
def test_it_is_torchvisions(kind, alpha, v2):
    x, y = batch()
    oracle = {"mixup": v2.MixUp, "cutmix": v2.CutMix}[kind](alpha=alpha, num_classes=4)
    changed = 0
    for seed in range(25):
        torch.manual_seed(seed)
        expected = oracle(x, y)
        state = torch.get_rng_state()
        found = Mixing(4, **{kind: alpha})(x, y, seed)
        # lam is drawn with another call, so in another order of roundings: 2^-24 of 1 apart, times values up to 1.
        for a, b in zip(found, expected, strict=True):
            torch.testing.assert_close(a, b, rtol=0, atol=4 * 2**-24)
        assert torch.equal(torch.get_rng_state(), state)
        changed += not torch.equal(found[0], x)
    assert changed > 15


def test_both_are_each_taken_half_of_the_time():
    x, y = batch()
    both = Mixing(4, mixup=1.0, cutmix=1.0)
    pasted = 0
    for seed in range(200):
        mixed, target = both(x, y, seed)
        assert torch.allclose(target.sum(1), torch.ones(len(y)))
        # Cutmix leaves each pixel that of one of the two.
        pasted += bool(((mixed == x) | (mixed == x.roll(1, 0))).all())
    assert abs(pasted - 100) < 6 * 50**0.5  # six deviations of a coin


def test_the_same_seed_mixes_alike_and_the_input_stays():
    x, y = batch()
    kept = x.clone()
    mixing = Mixing(4, mixup=0.4)
    assert torch.equal(mixing(x, y, 3)[0], mixing(x, y, 3)[0])
    assert not torch.equal(mixing(x, y, 3)[0], mixing(x, y, 4)[0])
    assert torch.equal(x, kept)
    assert mixing(x.to(memory_format=torch.channels_last), y, 3)[0].is_contiguous(memory_format=torch.channels_last)


def test_without_either_nothing_is_changed():
    x, y = batch()
    none = Mixing(4)
    assert not none
    assert none(x, y, 0)[0] is x
    assert none(x, y, 0)[1] is y


@pytest.mark.parametrize("options", [{"mixup": -1.0}, {"cutmix": float("nan")}, {"mixup": float("inf")}])
def test_options_out_of_range(options):
    with pytest.raises(ValueError, match=r"(mixup|cutmix): expected"):
        Mixing(4, **options)
