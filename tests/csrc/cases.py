"""Shared by the tests of the extension: plans, guarded memory, and direct calls into it."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from elle_fast.backends import extension
from elle_fast.ops.layout import BLOCKS
from tests.helpers import WHERES, Where, seed_of, use_threads

_C: Any = extension.load()
if _C is None:
    pytest.skip("the extension is not built", allow_module_level=True)

CPP = [where for where in WHERES if where.backend == "cpp"]
everywhere = pytest.mark.parametrize("where", CPP, ids=lambda where: where.name)
DTYPES = [torch.float32, torch.float16, torch.bfloat16]

PACK: dict[str, Any] = {
    **{"batch": 2, "part": 2, "channels": 3, "plane": 5, "triplets": 1, "sample_offset": 0},
    **{"eps": 0.1, "step_size": 0.1, "radius": 0.1, "clamp": False, "low": 0.0, "high": 1.0},
    **{"norm": 0, "adv": 1, "points": 0, "alpha": 0, "start": False, "project": False, "normalize": False},
    **{"x_last": False, "given_last": False, "points_last": False, "x_type": 0, "given_type": 0, "points_type": 0},
}
LOSS: dict[str, Any] = {
    **{"losses": 8, "residuals": 2, "adv_rows": 2, "part": 2, "triplets": 1, "classes": 5, "stride": 5},
    **{"target_stride": -1, "label_smoothing": 0.0, "points": 0, "penalty": 0, "of_logits": False, "type": 0},
    **{"lam_max": 1.0, "gamma": 0.9, "sensitivity": 2.0, "min_history": 3, "window": -1},
    **{"threshold": 0.0, "rate": 0.0},
}
LAM = {name: LOSS[name] for name in ("lam_max", "gamma", "sensitivity", "min_history", "threshold", "rate")} | {
    "window": 0
}
MAKERS = {"Pack": PACK, "Loss": LOSS, "Lam": LAM}


MEMORY = np.zeros(4096, dtype=np.float64)  # more than any call below reads or writes
HERE = MEMORY.ctypes.data

# Addresses that each call needs, and those that may be 0 with the plan.
CALLS: dict[str, tuple[str, dict[str, Any], list[Any], set[str]]] = {
    "pack": ("pack", {}, ["x", "given", "alpha_in", "seed", "statistics", "points", "alpha"],
             {"alpha_in", "statistics"}),
    "pack, alpha and statistics": (
        "pack", {"alpha": 2, "normalize": True},
        ["x", "given", "alpha_in", "seed", "statistics", "points", "alpha"], set()),
    "pack, no first point": (
        "pack", {"adv": 0}, ["x", "given", "alpha_in", "seed", "statistics", "points", "alpha"],
        {"given", "alpha_in", "statistics"}),
    "pack, no triplets": (
        "pack", {"triplets": 0, "alpha": 2}, ["x", "given", "alpha_in", "seed", "statistics", "points", "alpha"],
        {"alpha_in", "statistics", "alpha"}),
    "pack, the start alone": (
        "pack", {"adv": 3, "triplets": 0}, ["x", "given", "alpha_in", "seed", "statistics", "points", "alpha"],
        {"given", "alpha_in", "statistics", "alpha"}),
    "forward": (
        "forward", {},
        ["logits", "target", "alpha", "saved", "lam", None, "lam_state", "count", "skipped", "mean", "spread", "loss",
         "ce", "e_lin"], {"lam", "lam_state", "count", "skipped", "mean", "spread"}),
    "forward, adaptive": (
        "forward", {"window": 0},
        ["logits", "target", "alpha", "saved", "lam", None, "lam_state", "count", "skipped", "mean", "spread", "loss",
         "ce", "e_lin"], {"lam"}),
    "forward, window": (
        "forward", {"window": 4},
        ["logits", "target", "alpha", "saved", "lam", None, "lam_state", "count", "skipped", "mean", "spread", "loss",
         "ce", "e_lin"], {"lam", "mean"}),
    "backward": (
        "backward", {}, ["logits", "target", "alpha", "saved", "grad_loss", "grad_ce", "grad_e_lin", "grad"],
        {"grad_loss", "grad_ce", "grad_e_lin"}),
    "lam": ("update", {}, ["value", False, "lam_state", "count", "skipped", "mean", "spread", "used"], set()),
    "lam, relative": (
        "update", {"rate": 0.5}, ["value", True, "lam_state", "count", "skipped", "mean", "spread", "used"],
        {"spread"}),
    "lam, window": (
        "update", {"window": 4}, ["value", True, "lam_state", "count", "skipped", "mean", "spread", "used"], {"mean"}),
}  # fmt: skip
called = pytest.mark.parametrize("call", CALLS)


def prepared(call: str) -> tuple[partial[None], list[Any], list[str | None]]:
    """A method, arguments that it takes, and their names."""
    method, options, names, _ = CALLS[call]
    maker = {"pack": "Pack", "update": "Lam"}.get(method, "Loss")
    function = partial(getattr(getattr(_C, maker)(**{**MAKERS[maker], **options}), method), "cpu")
    addresses = [
        HERE + 1024 * place if isinstance(name, str) else 0.5 if name is None else name
        for place, name in enumerate(names)
    ]
    named = [name if isinstance(name, str) else None for name in names]
    return function, [*addresses, 1], [*named, None]


@contextmanager
def used(where: Where, threads: int = 1) -> Iterator[None]:
    """Direct calls go to that instruction set."""
    before = _C.isa()
    _C.use_isa(where.isa)
    try:
        with use_threads(threads):
            yield
    finally:
        _C.use_isa(before)


GUARD, SENTINEL = 256, 0xA5  # bytes


class Guarded:
    """Room for a tensor's numbers, `shift` of them off an aligned address, between bytes that have to stay."""

    def __init__(self, numbers: int, dtype: torch.dtype, shift: int = 0) -> None:
        self.dtype, self.bytes = dtype, numbers * dtype.itemsize
        self.memory = torch.full((self.bytes + 2 * GUARD + 64 + shift * dtype.itemsize,), SENTINEL, dtype=torch.uint8)
        # Aligned by hand: torch's allocator promises 64 bytes, others 16.
        self.begin = GUARD + -(self.memory.data_ptr() + GUARD) % 64 + shift * dtype.itemsize
        self.address = self.memory.data_ptr() + self.begin

    def values(self) -> Tensor:
        """What was written, once the bytes around it have been seen to be as they were."""
        outside = torch.cat((self.memory[: self.begin], self.memory[self.begin + self.bytes :]))
        assert (outside == SENTINEL).all(), "written out of bounds"
        return self.memory[self.begin : self.begin + self.bytes].clone().view(self.dtype)


# The codes of csrc/common/plans.h.
CODE: dict[Any, int] = {torch.float32: 0, torch.float16: 1, torch.bfloat16: 2, "linf": 0, "l2": 1}
CODE |= {"elle": 0, "elle-2p": 1, "five-point": 2, "squared": 0, "abs": 1, "smooth_l1": 2}


def channels_last(tensor: Tensor) -> bool:
    return not tensor.is_contiguous()


def packed_directly(
    x: Tensor,
    given: Tensor,
    shift: int,
    *,
    eps: float,
    dtype: torch.dtype,
    memory_format: torch.memory_format,
    points: str = "elle",
    triplets: int = 1,
    norm: str = "linf",
    start: float = 0.0,
    project: bool = False,
    bounds: tuple[float, float] | None = None,
    mean: Any = (),
    std: Any = (),
    fraction: float = 1.0,
    sample_offset: int = 0,
) -> tuple[Tensor, Tensor]:
    """pack_points into guarded memory: the points as they lie there, and alpha."""
    batch, channels = x.shape[:2]
    part = math.ceil(fraction * batch)
    low, high = bounds or (0.0, 0.0)
    plan = _C.Pack(
        batch=batch, part=part, channels=channels, plane=x[0, 0].numel(), triplets=triplets,
        sample_offset=sample_offset, eps=eps, step_size=eps, radius=start * eps, clamp=bounds is not None, low=low,
        high=high, norm=CODE[norm], adv=1, points=CODE[points], alpha=1 if points == "five-point" else 0,
        start=start != 0, project=project, normalize=bool(mean), x_last=channels_last(x),
        given_last=channels_last(given), points_last=memory_format != torch.contiguous_format, x_type=CODE[x.dtype],
        given_type=CODE[given.dtype], points_type=CODE[dtype],
    )  # fmt: skip
    rows = batch + BLOCKS[points] * triplets * part
    made, alpha = Guarded(rows * x[0].numel(), dtype, shift), Guarded(triplets * part, torch.float32, shift)
    statistics, seed = torch.tensor([*mean, *(1 / s for s in std)], dtype=torch.float32), seed_of(5)
    plan.pack("cpu", x.data_ptr(), given.data_ptr(), 0, seed.data_ptr(), statistics.data_ptr() if mean else 0,
                  made.address, alpha.address, 1)  # fmt: skip
    return made.values(), alpha.values()


def in_memory_order(t: Tensor) -> Tensor:
    """A dense tensor's numbers as they lie."""
    return t.as_strided((t.numel(),), (1,))
