"""Philox4x32-10: the published vectors, an independent implementation, and the numbering of the draws."""

from __future__ import annotations

import math

import pytest
import torch

from elle_fast.ops import philox
from tests.helpers import block_words, pair_word, philox_ints, rng, sample_word, seed_of, start_word, unit

# kat_vectors of Random123, philox4x32 with 10 rounds.
KNOWN_ANSWERS = [
    ("00000000 00000000 00000000 00000000", "00000000 00000000", "6627e8d5 e169c58d bc57ac4c 9b00dbd8"),
    ("ffffffff ffffffff ffffffff ffffffff", "ffffffff ffffffff", "408f276d 41c83b0e a20bc7c6 6d5451fd"),
    ("243f6a88 85a308d3 13198a2e 03707344", "a4093822 299f31d0", "d16cfe09 94fdcceb 5001e420 24126ea1"),
]
SEEDS = [0, 1, 2**31, 2**32, 2**63 - 1, -1, -(2**63), 0x0123456789ABCDEF]


def words_of(text: str) -> list[int]:
    return [int(word, 16) for word in text.split()]


@pytest.mark.parametrize("counter, key, expected", KNOWN_ANSWERS)
def test_known_answers(counter, key, expected):
    words = philox.philox4x32(torch.tensor(words_of(counter)), torch.tensor(words_of(key)))
    assert words.tolist() == words_of(expected)
    assert philox_ints(tuple(words_of(counter)), tuple(words_of(key))) == tuple(words_of(expected))


def test_known_answers_as_one_batch():
    counters = torch.tensor([words_of(c) for c, _, _ in KNOWN_ANSWERS])
    keys = torch.tensor([words_of(k) for _, k, _ in KNOWN_ANSWERS])
    assert philox.philox4x32(counters, keys).tolist() == [words_of(e) for _, _, e in KNOWN_ANSWERS]


def test_agrees_with_python_integers():
    counters = torch.randint(2**32, (500, 4), generator=rng(1))
    keys = torch.randint(2**32, (500, 2), generator=rng(2))
    words = philox.philox4x32(counters, keys)
    assert words.dtype == torch.int64
    expected = [philox_ints(tuple(c), tuple(k)) for c, k in zip(counters.tolist(), keys.tolist(), strict=True)]
    assert words.tolist() == [list(e) for e in expected]


def test_one_key_broadcasts():
    counters = torch.randint(2**32, (3, 5, 4), generator=rng(3))
    key = torch.tensor([123, 456])
    words = philox.philox4x32(counters, key)
    assert words.shape == (3, 5, 4)
    assert words[2, 4].tolist() == list(philox_ints(tuple(counters[2, 4].tolist()), (123, 456)))


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("elements", [1, 2, 5, 8])
@pytest.mark.parametrize("triplet", [0, 1, 2**24 - 1])
def test_numbering_of_the_draws(seed, elements, triplet):
    samples = torch.tensor([0, 1, 77, 2**32 - 1])
    words_a, words_b = philox.pair_words(seed_of(seed), samples, elements, triplet)
    start = philox.start_words(seed_of(seed), samples, elements)
    whole = philox.sample_words(seed_of(seed), samples, triplet)
    for i, sample in enumerate(samples.tolist()):
        for which, words in enumerate((words_a, words_b)):
            assert words[i].tolist() == [pair_word(seed, sample, e, triplet, which) for e in range(elements)]
        assert start[i].tolist() == [start_word(seed, sample, e) for e in range(elements)]
        assert whole[i].tolist() == [sample_word(seed, sample, triplet, place) for place in range(4)]


def test_every_coordinate_changes_the_words():
    base = {"seed": 5, "sample": 3, "block": 2, "stream": 0, "triplet": 0}
    changes = [{}, {"seed": 6}, {"seed": 5 + 2**32}, {"seed": -6}, {"sample": 4}, {"block": 3}, {"block": 2**32 + 2}]
    changes += [{"stream": 1}, {"stream": 2}, {"triplet": 1}, {"triplet": 2**24 - 1}]
    words = {block_words(**{**base, **change}) for change in changes}
    assert len(words) == len(changes)
    flat = [word for four in words for word in four]
    assert len(set(flat)) == len(flat)


def test_the_package_keeps_streams_triplets_samples_and_seeds_apart():
    draws: list[torch.Tensor] = []
    for seed in (1, 2):
        samples = torch.arange(3)
        for triplet in (0, 1):
            draws += philox.pair_words(seed_of(seed), samples, 8, triplet)
            draws.append(philox.sample_words(seed_of(seed), samples, triplet))
        draws.append(philox.start_words(seed_of(seed), samples, 8))
    flat = torch.cat([d.flatten() for d in draws]).tolist()
    # 240 words of 32 bits: a chance collision has probability 240**2 / 2**33 < 1e-5.
    assert len(set(flat)) == len(flat)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_uniform_is_exact(dtype):
    words = torch.tensor([0, 255, 256, 0x80000000, 0xFFFFFF00, 0xFFFFFFFF])
    u = philox.uniform(words, dtype)
    assert u.dtype == dtype
    assert u.tolist() == [0.0, 0.0, 2.0**-24, 0.5, 1 - 2.0**-24, 1 - 2.0**-24]
    random_words = torch.randint(2**32, (1000,), generator=rng(4))
    assert philox.uniform(random_words, dtype).tolist() == [unit(w) for w in random_words.tolist()]


def test_uniform_moments():
    n = 1 << 18
    words_a, words_b = philox.pair_words(seed_of(2024), torch.arange(4), n // 8, 0)
    u = philox.uniform(torch.stack((words_a, words_b)), torch.float64)
    # Five standard errors of U(0, 1): Var = 1/12; Var of (u - 1/2)^2 is 1/80 - 1/144 = 1/180.
    assert abs(u.mean().item() - 0.5) < 5 * math.sqrt(1 / 12 / n)
    assert abs((u - 0.5).square().mean().item() - 1 / 12) < 5 * math.sqrt(1 / 180 / n)
    # x_a and x_b, and neighbours: the mean of n products of independent centred pairs has standard error 1/12/sqrt(n).
    centred = u - 0.5
    for product in (centred[0] * centred[1], centred[..., 1:] * centred[..., :-1]):
        assert abs(product.mean().item()) < 5 / 12 / math.sqrt(product.numel())
    # Each of 16 bins holds n/16 up to five standard deviations of a binomial.
    counts = torch.histc(u, bins=16, min=0, max=1)
    assert (counts - n / 16).abs().max().item() < 5 * math.sqrt(n / 16 * 15 / 16)
