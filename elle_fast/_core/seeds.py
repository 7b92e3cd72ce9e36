"""Seeds made of other numbers."""

from __future__ import annotations

import hashlib


def derived_seed(*numbers: int) -> int:
    """A seed in ``[0, 2**32)`` that two different tuples, such as (seed, epoch), share by accident only.

    Hashed to 32 bits, because torch's CPU generator drops the rest of its seed: packing the numbers into 64 bits would
    lose one of them.
    """
    text = ",".join(map(str, numbers))
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=4).digest(), "little")
