"""Philox4x32-10, and how elle_fast numbers its random draws.

Every random number is a pure function of (seed, sample index in the batch, element index within the sample in logical
order, stream). So the noise does not depend on the backend, the memory format, the dtype, or how a batch is split.

The counter of one call, four unsigned 32-bit words (the key is the 64-bit seed, low word first):

    c0  block index, low word          c2  sample index
    c1  block index, high word         c3  stream + 256 * triplet

==========  =========================  ===============================================================
stream      block                      its four output words
==========  =========================  ===============================================================
PAIR        element // 2               x_a even, x_b even, x_a odd, x_b odd element
SAMPLE      0                          alpha, l2 radius of x_a, of x_b, of the attack's start
START       element // 4               the attack's start, elements 4k .. 4k+3
==========  =========================  ===============================================================

Source of the generator: Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", SC 2011.
"""

from __future__ import annotations

import torch
from torch import Tensor

STREAM_PAIR, STREAM_SAMPLE, STREAM_START = 0, 1, 2

MAX_TRIPLETS = (1 << 24) - 1  # a counter holds the triplet in the 24 bits above the stream
MAX_SAMPLE = (1 << 31) - 1  # and the sample in one 32-bit word

_MASK = 0xFFFFFFFF
_MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
_WEYL = (0x9E3779B9, 0xBB67AE85)
_ROUNDS = 10


def philox4x32(counter: Tensor, key: Tensor) -> Tensor:
    """Ten rounds of Philox4x32.

    Args:
        counter: int64 ``[..., 4]``, each value an unsigned 32-bit word in ``[0, 2**32)``.
        key: int64 ``[..., 2]`` of the same range; broadcasts against ``counter`` without its last dimension.

    Returns:
        int64 ``[..., 4]``, each value an unsigned 32-bit word.
    """
    c0, c1, c2, c3 = counter.unbind(-1)
    k0, k1 = key.unbind(-1)
    for _ in range(_ROUNDS):
        # The 64-bit product may wrap to a negative int64; its bits are right, and the mask after the
        # arithmetic shift drops the copies of the sign.
        p0, p1 = c0 * _MULTIPLIERS[0], c2 * _MULTIPLIERS[1]
        c0, c1, c2, c3 = (
            ((p1 >> 32) & _MASK) ^ c1 ^ k0,
            p1 & _MASK,
            ((p0 >> 32) & _MASK) ^ c3 ^ k1,
            p0 & _MASK,
        )
        k0, k1 = (k0 + _WEYL[0]) & _MASK, (k1 + _WEYL[1]) & _MASK
    return torch.stack(torch.broadcast_tensors(c0, c1, c2, c3), dim=-1)


def pair_words(seed: Tensor, samples: Tensor, elements: int, triplet: int) -> tuple[Tensor, Tensor]:
    """Words of x_a and x_b: two int64 ``[B, elements]`` for the sample indices ``samples`` (int64 ``[B]``)."""
    words = _words(seed, samples, -(-elements // 2), STREAM_PAIR, triplet)
    pairs = words.unflatten(-1, (2, 2)).flatten(1, 2)[:, :elements]
    return pairs[..., 0], pairs[..., 1]


def sample_words(seed: Tensor, samples: Tensor, triplet: int) -> Tensor:
    """The four words that belong to a sample as a whole: int64 ``[B, 4]``, see the table above."""
    return _words(seed, samples, 1, STREAM_SAMPLE, triplet)[:, 0]


def start_words(seed: Tensor, samples: Tensor, elements: int) -> Tensor:
    """Words of the attack's random start: int64 ``[B, elements]``."""
    return _words(seed, samples, -(-elements // 4), STREAM_START, 0).flatten(1)[:, :elements]


def uniform(words: Tensor, dtype: torch.dtype) -> Tensor:
    """``u = (word >> 8) * 2**-24``, in ``[0, 1)``; exact in float32 and float64."""
    return (words >> 8).to(dtype) * 2.0**-24


def _words(seed: Tensor, samples: Tensor, blocks: int, stream: int, triplet: int) -> Tensor:
    """One call per (sample, block): int64 ``[B, blocks, 4]``."""
    block = torch.arange(blocks, device=seed.device)
    shape = (samples.numel(), blocks)
    counter = torch.stack(
        (
            (block & _MASK).expand(shape),
            (block >> 32).expand(shape),
            samples[:, None].expand(shape),
            torch.full((), stream + 256 * triplet, device=seed.device).expand(shape),
        ),
        dim=-1,
    )
    key = torch.stack((seed & _MASK, (seed >> 32) & _MASK))
    return philox4x32(counter, key)
