"""The random words of :mod:`elle_fast.ops.philox` in Triton: the same counters, the same bits.

The rounds are written with 32 x 32 -> 64 bit products, one instruction on the hardware; ``tl.philox`` asks for the high
and the low half apart, which costs two (SASS for sm_90: 145 IMAD.WIDE against 143 IMAD.HI and 161 IMAD for 8 calls).
"""

from __future__ import annotations

import triton
import triton.language as tl

from elle_fast.ops import philox

STREAM_PAIR = tl.constexpr(philox.STREAM_PAIR)
STREAM_SAMPLE = tl.constexpr(philox.STREAM_SAMPLE)
STREAM_START = tl.constexpr(philox.STREAM_START)


@triton.jit
def philox4x32(k0, k1, c0, c1, c2, c3):
    """Ten rounds of Philox4x32; arguments and results are uint32."""
    for _ in tl.static_range(10):
        p0 = c0.to(tl.uint64) * 0xD2511F53
        p1 = c2.to(tl.uint64) * 0xCD9E8D57
        c0 = (p1 >> 32).to(tl.uint32) ^ c1 ^ k0
        c2 = (p0 >> 32).to(tl.uint32) ^ c3 ^ k1
        c1 = p1.to(tl.uint32)
        c3 = p0.to(tl.uint32)
        k0 = tl.add(k0, 0x9E3779B9, sanitize_overflow=False)
        k1 = tl.add(k1, 0xBB67AE85, sanitize_overflow=False)
    return c0, c1, c2, c3


@triton.jit
def load_key(seed_ptr):
    """The two key words of the 64-bit seed."""
    seed = tl.load(seed_ptr)
    return seed.to(tl.uint32), (seed >> 32).to(tl.uint32)


@triton.jit
def block_words(key, block, sample, stream, triplet):
    """The four words of a block of one stream; ``block`` int32 or int64, any shape."""
    low = block.to(tl.uint32)
    high = (block.to(tl.int64) >> 32).to(tl.uint32)
    place = (sample * 0 + (stream + 256 * triplet)).to(tl.uint32)  # a tensor also where both are constants
    return philox4x32(key[0], key[1], low, high, sample.to(tl.uint32), place)


@triton.jit
def sample_words(key, sample, triplet):
    """Words of a sample as a whole: alpha, l2 radius of x_a, of x_b, of the attack's start."""
    return block_words(key, sample * 0, sample, STREAM_SAMPLE, triplet)


@triton.jit
def pair_words(key, element, sample, triplet):
    """Words of x_a and x_b at ``element``, any shape: one call for each element, half of whose words are not used."""
    a0, b0, a1, b1 = block_words(key, element // 2, sample, STREAM_PAIR, triplet)
    odd = element % 2 == 1
    return tl.where(odd, a1, a0), tl.where(odd, b1, b0)


@triton.jit
def start_words(key, element, sample):
    """Words of the attack's start at ``element``, any shape: one call for each element."""
    w0, w1, w2, w3 = block_words(key, element // 4, sample, STREAM_START, 0)
    place = element % 4
    return tl.where(place < 2, tl.where(place == 0, w0, w1), tl.where(place == 2, w2, w3))


@triton.jit
def pair_words_grouped(key, group, sample, triplet, VEC: tl.constexpr):
    """Words of x_a and x_b of the elements ``VEC * group + (0 .. VEC - 1)``: ``[G]`` -> ``[G, VEC]``, none wasted."""
    block = group * (VEC // 2)
    a0, b0, a1, b1 = block_words(key, block, sample, STREAM_PAIR, triplet)
    a2, b2, a3, b3 = block_words(key, block + 1, sample, STREAM_PAIR, triplet)
    if VEC == 4:
        return _in_order4(a0, a1, a2, a3), _in_order4(b0, b1, b2, b3)
    else:  # What follows a return is compiled even so, and would have other shapes.
        a4, b4, a5, b5 = block_words(key, block + 2, sample, STREAM_PAIR, triplet)
        a6, b6, a7, b7 = block_words(key, block + 3, sample, STREAM_PAIR, triplet)
        return _in_order8(a0, a1, a2, a3, a4, a5, a6, a7), _in_order8(b0, b1, b2, b3, b4, b5, b6, b7)


@triton.jit
def start_words_grouped(key, group, sample, VEC: tl.constexpr):
    """Words of the attack's start of the elements ``VEC * group + (0 .. VEC - 1)``: ``[G]`` -> ``[G, VEC]``."""
    block = group * (VEC // 4)
    w0, w1, w2, w3 = block_words(key, block, sample, STREAM_START, 0)
    if VEC == 4:
        return _in_order4(w0, w1, w2, w3)
    else:
        w4, w5, w6, w7 = block_words(key, block + 1, sample, STREAM_START, 0)
        return _in_order8(w0, w1, w2, w3, w4, w5, w6, w7)


@triton.jit
def _in_order4(w0, w1, w2, w3):
    # The compiler keeps what is joined this way in one thread's registers, next to each other.
    return tl.interleave(tl.join(w0, w2), tl.join(w1, w3))


@triton.jit
def _in_order8(w0, w1, w2, w3, w4, w5, w6, w7):
    even = tl.interleave(tl.join(w0, w4), tl.join(w2, w6))
    return tl.interleave(even, tl.interleave(tl.join(w1, w5), tl.join(w3, w7)))


@triton.jit
def uniform(word):
    """``u = (word >> 8) * 2**-24``, in ``[0, 1)``, exact."""
    return (word >> 8).to(tl.float32) * 5.9604644775390625e-08


@triton.jit
def symmetric(word):
    """``2 u - 1``, in ``[-1, 1)``, exact: so a fused multiply-add gives the same bits as its two operations."""
    return tl.fma((word >> 8).to(tl.float32), 1.1920928955078125e-07, -1.0)
