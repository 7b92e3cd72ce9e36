"""Fingerprints of files and tensors."""

from __future__ import annotations

import hashlib

import torch
from torch import Tensor


def digest_of(*parts: bytes | Tensor) -> str:
    """32 hexadecimal digits for bytes and for tensors' elements in logical order, whatever their layout and device.

    Shapes and dtypes do not count; pass them as bytes where they matter.
    """
    digest = hashlib.blake2b(digest_size=16)
    for part in parts:
        digest.update(part if isinstance(part, bytes) else part.detach().cpu().flatten().view(torch.uint8).numpy().data)
    return digest.hexdigest()
