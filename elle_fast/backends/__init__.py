"""The only place that chooses a backend.

A backend is a file: ``elle_fast/ops/<op>/<backend>.py`` holds the functions named after the op. Another backend joins
by an entry in :data:`BACKENDS` that says which devices it serves and, if it cannot run here, why not.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch.autograd import forward_ad
from torch.compiler import is_compiling

from elle_fast._core import checks
from elle_fast.backends import extension, triton_host

# What a kernel takes; anything else (float64) is the reference's. None stands for an argument that is absent.
KERNEL_DTYPES = frozenset([torch.float32, torch.float16, torch.bfloat16, None])


@dataclass(frozen=True)
class Backend:
    """One implementation of both ops."""

    runs_on: str
    serves: Callable[[str], bool]  # whether it takes tensors on such a device ("cpu", "cuda", ...)
    why_not: Callable[[], str | None]  # None if it can run on this machine, else what is missing and how to get it


BACKENDS: dict[str, Backend] = {
    "reference": Backend(runs_on="any device torch runs on", serves=lambda device: True, why_not=lambda: None),
    "cpp": Backend(runs_on="the CPU", serves=lambda device: device == "cpu", why_not=extension.cpp_why_not),
    "triton": Backend(runs_on="CUDA, ROCm and XPU devices", serves=triton_host.serves, why_not=triton_host.why_not),
    "cuda": Backend(runs_on="CUDA devices", serves=lambda device: device == "cuda", why_not=extension.cuda_why_not),
}

_FUNC_TRANSFORMS = torch._C._are_functorch_transforms_active

# What "auto" tries on each kind of device, the fastest first. The CPU: benchmarks/ops/bench_ops.py. Which of the two is
# faster on CUDA is not measured yet (benchmarks/gpu/gpu_report.py does both).
# The CPU as it is too: `device.type` makes a string, which takes the host 0.3 us.
_FASTEST: dict[str | torch.device, tuple[str, ...]] = {
    torch.device("cpu"): ("cpp",),
    "cpu": ("cpp",),
    "cuda": ("triton", "cuda"),
    "xpu": ("triton",),
}


def check(backend: str) -> str:
    """Return ``backend`` if it is ``"auto"`` or a backend that can run here.

    Raises:
        TypeError: if it is not a string.
        ValueError: if no backend has that name.
        RuntimeError: if it cannot run on this machine; the message says what is missing.
    """
    checks.choice("backend", backend, ("auto", *BACKENDS))
    if backend not in ("auto", "reference") and (reason := BACKENDS[backend].why_not()) is not None:
        raise RuntimeError(f"backend: {backend!r} is not available: {reason}")
    return backend


def choose(
    backend: str,
    device: torch.device,
    names: tuple[str, ...] = (),
    dtypes: tuple[torch.dtype | None, ...] = (),
    constant: bool = True,
    wrapped: bool = False,
) -> str:
    """The backend that runs an op: ``backend`` itself, or for ``"auto"`` the fastest that takes such arguments.

    Args:
        backend: ``"auto"`` or a name.
        device: where the tensors are.
        names, dtypes: of the arguments that a kernel reads or writes; ``None`` for one that is absent.
        constant: whether nothing but the logits requires grad.
        wrapped: whether a tensor is made of others, see :func:`elle_fast._core.checks.wrapped`.

    Raises:
        TypeError: if it is not a string, or the backend named does not take a dtype, or a tensor that wraps others.
        ValueError: if no backend has that name, or it does not serve that device.
        RuntimeError: if it cannot run on this machine, or not inside a transform of torch.func.
    """
    if type(backend) is not str:  # an array would be compared element by element
        check(backend)
    if backend == "reference":
        return backend
    # Transforms of torch.func and forward-mode differentiation; a compiler may not ask.
    transformed = not is_compiling() and (_FUNC_TRANSFORMS() or forward_ad._current_level >= 0)
    fitting = constant and not wrapped and not transformed and KERNEL_DTYPES.issuperset(dtypes)
    for name in _FASTEST.get(device) or _FASTEST.get(device.type, ()) if fitting else ():
        if backend in ("auto", name) and BACKENDS[name].why_not() is None:
            return name
    if backend == "auto":
        return "reference"
    named = BACKENDS.get(backend) if isinstance(backend, str) else None
    if fitting and named is not None and named.serves(device.type) and named.why_not() is None:
        return backend
    named = BACKENDS[check(backend)]
    if not named.serves(device.type):
        raise ValueError(
            f"backend: expected tensors on {named.runs_on} with backend={backend!r}, got {device}; "
            "backend='auto' takes what serves that device"
        )
    for name, dtype in zip(names, dtypes, strict=True):
        if dtype not in KERNEL_DTYPES:
            raise TypeError(
                f"{name}: expected float32, float16 or bfloat16 with backend={backend!r}, got {dtype}; "
                "backend='auto' and 'reference' take it"
            )
    if wrapped:
        raise TypeError(
            f"backend: expected plain tensors with backend={backend!r}, got one that wraps others, as a DTensor does; "
            "backend='auto' and 'reference' take what torch's own operators take"
        )
    if transformed:
        raise RuntimeError(
            f"backend: expected no torch.func transform and no forward-mode differentiation with backend={backend!r}, "
            "whose kernels have a gradient alone, got one; backend='auto' and 'reference' take it"
        )
    raise ValueError(
        f"target, alpha, lam: expected tensors that require no grad with backend={backend!r}, whose gradient is "
        "that of the logits alone, got one that does; backend='auto' and 'reference' take it"
    )
