"""The kernels' Philox: the published vectors, and the numbering of the draws where pack_points cannot reach it."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from elle_fast.ops import philox
from tests.helpers import WHERES, block_words, rng, seed_of
from tests.ops.test_philox import KNOWN_ANSWERS, SEEDS, words_of

pytest.importorskip("triton")

import triton
import triton.language as tl

from elle_fast.ops import philox_triton

WHERE = next(w for w in WHERES if w.backend == "triton")
pytestmark = WHERE.marks


@triton.jit
def philox_kernel(counter_ptr, key_ptr, out_ptr, N: tl.constexpr):
    place = tl.arange(0, N)
    words = philox_triton.philox4x32(
        tl.load(key_ptr + 2 * place).to(tl.uint32),
        tl.load(key_ptr + 2 * place + 1).to(tl.uint32),
        tl.load(counter_ptr + 4 * place).to(tl.uint32),
        tl.load(counter_ptr + 4 * place + 1).to(tl.uint32),
        tl.load(counter_ptr + 4 * place + 2).to(tl.uint32),
        tl.load(counter_ptr + 4 * place + 3).to(tl.uint32),
    )
    for word in tl.static_range(4):
        tl.store(out_ptr + 4 * place + word, words[word].to(tl.int64))


@triton.jit
def block_kernel(seed_ptr, block_ptr, sample_ptr, triplet, out_ptr, STREAM: tl.constexpr, N: tl.constexpr):
    key = philox_triton.load_key(seed_ptr)
    place = tl.arange(0, N)
    block, sample = tl.load(block_ptr + place), tl.load(sample_ptr + place)
    words = philox_triton.block_words(key, block, sample, STREAM, triplet)
    for word in tl.static_range(4):
        tl.store(out_ptr + 4 * place + word, words[word].to(tl.int64))


@triton.jit
def uniform_kernel(word_ptr, unit_ptr, symmetric_ptr, N: tl.constexpr):
    place = tl.arange(0, N)
    word = tl.load(word_ptr + place).to(tl.uint32)
    tl.store(unit_ptr + place, philox_triton.uniform(word))
    tl.store(symmetric_ptr + place, philox_triton.symmetric(word))


def words_of_kernel(counters: torch.Tensor, keys: torch.Tensor) -> Any:
    out = torch.empty_like(counters, device=WHERE.device)
    philox_kernel[(1,)](counters.to(WHERE.device), keys.to(WHERE.device), out, N=len(counters))
    return out.tolist()


def test_known_answers():
    cases = [*KNOWN_ANSWERS, KNOWN_ANSWERS[0]]  # a power of two
    words = words_of_kernel(
        torch.tensor([words_of(counter) for counter, _, _ in cases]),
        torch.tensor([words_of(key) for _, key, _ in cases]),
    )
    assert words == [words_of(expected) for _, _, expected in cases]


def test_agrees_with_the_reference():
    counters, keys = torch.randint(2**32, (512, 4), generator=rng(1)), torch.randint(2**32, (512, 2), generator=rng(2))
    assert words_of_kernel(counters, keys) == philox.philox4x32(counters, keys).tolist()


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("stream", [philox.STREAM_PAIR, philox.STREAM_SAMPLE, philox.STREAM_START])
@pytest.mark.parametrize("triplet", [0, 1, 2**24 - 1])
def test_numbering_of_the_draws(seed, stream, triplet):
    """Blocks beyond 2**32 belong to samples of more than 2**33 elements, numbers beyond 2**31 to huge batches."""
    blocks, samples = [0, 1, 2**31, 2**32 - 1, 2**32, 2**33 + 7, 5, 6], [0, 2**31 - 1, 2, 3, 4, 5, 2**32 - 1, 77]
    out = torch.empty(8, 4, dtype=torch.int64, device=WHERE.device)
    numbers = (torch.tensor(values, device=WHERE.device) for values in (blocks, samples))
    block_kernel[(1,)](seed_of(seed).to(WHERE.device), *numbers, triplet, out, STREAM=stream, N=8)
    assert out.tolist() == [
        list(block_words(seed, s, b, stream, triplet)) for b, s in zip(blocks, samples, strict=True)
    ]


def test_uniform_is_exact():
    words = torch.tensor([0, 255, 256, 0x7FFFFFFF, 0x80000000, 0x80000100, 0xFFFFFF00, 0xFFFFFFFF])
    unit, symmetric = (torch.empty(8, device=WHERE.device) for _ in range(2))
    uniform_kernel[(1,)](words.to(WHERE.device), unit, symmetric, N=8)
    expected = philox.uniform(words, torch.float64)
    assert unit.tolist() == expected.tolist()
    assert symmetric.tolist() == (2 * expected - 1).tolist()
