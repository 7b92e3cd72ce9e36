"""What devices can do."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache

import torch

# Instructions for products of matrices or vectors, as torch names them.
_PRODUCTS = {
    torch.bfloat16: ("avx512_bf16", "amx_bf16", "bf16", "sve_bf16"),
    torch.float16: ("avx512_fp16", "amx_fp16", "fp16_arith"),
}
_CUDA_PRODUCTS = {torch.bfloat16: (8, 0), torch.float16: (7, 0)}


def has_float64(device: torch.device) -> bool:
    """Whether tensors of float64 can live on the device, which those of MPS cannot."""
    return device.type in ("cpu", "cuda", "meta") or _takes_float64(device)


@cache
def _takes_float64(device: torch.device) -> bool:
    try:
        torch.zeros((), dtype=torch.float64, device=device)
    except (TypeError, RuntimeError):
        return False
    return True


def has_products(device: torch.device, dtype: torch.dtype) -> bool | None:
    """Whether the device multiplies in bfloat16 or float16 by instructions of its own; None if torch does not say.

    Without them it converts each number, which takes longer than float32.
    """
    if device.type == "cuda":
        return torch.cuda.get_device_capability(device) >= _CUDA_PRODUCTS[dtype]
    capabilities = getattr(torch.cpu, "get_capabilities", None)  # not in older torch
    if device.type != "cpu" or capabilities is None:
        return None
    has = capabilities()
    return any(has.get(name, False) for name in _PRODUCTS[dtype])


@contextmanager
def fastest_convolutions() -> Iterator[None]:
    """Inside, cuDNN's first call of each size of a convolution finds the fastest algorithm; for sizes that recur."""
    before, torch.backends.cudnn.benchmark = torch.backends.cudnn.benchmark, True
    try:
        yield
    finally:
        torch.backends.cudnn.benchmark = before
