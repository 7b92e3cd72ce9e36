"""Where the Triton kernels can run, and what their launches share. Imports no Triton by itself."""

from __future__ import annotations

import os
from functools import lru_cache
from typing import Any, NamedTuple

import torch

MINIMUM = (3, 6)  # the oldest that the kernels were compiled with
DEVICES = ("cuda", "xpu")  # ROCm's devices are called cuda too


# Inside a kernel a field of ``options`` or ``tile`` is a plain number to Triton 3.6, so tl.zeros and tl.static_range do
# not take it (tl.full and a jit function's constexpr parameter do), and no function may return None.
class Launch(NamedTuple):
    """All of a launch but its tensors, which come first; what belongs together is one NamedTuple argument."""

    kernel: Any
    grid: tuple[int, ...]
    sizes: tuple[Any, ...]  # numbers that the kernel reads
    options: Any  # compiled in: what it does
    tile: Any  # compiled in: how much of it at a time
    warps: int
    contract: bool  # whether the compiler may contract a product and a sum to a fused multiply-add

    def __call__(self, *tensors: Any) -> None:
        """Launch the kernel on tensors of the kind that it was planned for."""
        arguments = (*tensors, *self.sizes, self.options, self.tile)
        self.kernel[self.grid](*arguments, num_warps=self.warps, enable_fp_fusion=self.contract)


def interpreted() -> bool:
    """Whether kernels run in Triton's interpreter: on the CPU, slowly, for tests.

    Triton reads the variable when a kernel is defined, so set it before this backend is first used.
    """
    return os.environ.get("TRITON_INTERPRET") == "1"


def serves(device: str) -> bool:
    """Whether the kernels take tensors on such a device."""
    return device in DEVICES or (device == "cpu" and interpreted())


def why_not() -> str | None:
    """``None`` if the kernels can run on this machine, else what is missing and how to get it."""
    return _reason()


# A constant to torch.compile, which could not trace an import. torch.compiler.assume_constant_result does the same, but
# imports the whole compiler.
why_not._dynamo_marked_constant = True  # type: ignore[attr-defined]


@lru_cache(maxsize=1)
def _reason() -> str | None:
    try:
        import triton
    except (ImportError, OSError, RuntimeError) as error:
        return f"Triton cannot be imported ({error}); GPU builds of torch bring it, or: pip install triton"
    version = getattr(triton, "__version__", "0.0")  # a folder of that name may be anything
    if tuple(int(part) for part in version.split(".")[:2]) < MINIMUM:
        wanted = ".".join(map(str, MINIMUM))
        return f"Triton {wanted} or newer is needed, got {version}; a newer torch brings one"
    if not interpreted() and not torch.cuda.is_available() and not torch.xpu.is_available():
        return (
            "torch sees no CUDA, ROCm or XPU device "
            "(TRITON_INTERPRET=1 in the environment runs the kernels on the CPU, slowly, for tests)"
        )
    return None


def next_power_of_2(number: int) -> int:
    """The smallest power of two that is at least ``number``."""
    return 1 << (number - 1).bit_length()
