"""The compiled extension called directly: nonsense, memory it must not touch, threads, forks, and huge sizes."""

from __future__ import annotations

import ctypes
import itertools
import math
import mmap
import os
import shutil
import subprocess
import sys
import threading
from collections import OrderedDict
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from elle_fast import functional
from elle_fast.backends import extension
from elle_fast.ops import dispatch
from elle_fast.ops.layout import BLOCKS
from elle_fast.ops.pack_points.schema import PACK_POINTS
from tests.helpers import WHERES, Where, labels, probabilities, random, rng, seed_of, start_word, unit, use_threads

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
}
LAM = {name: LOSS[name] for name in ("lam_max", "gamma", "sensitivity", "min_history")} | {"window": 0}
MAKERS = {"Pack": PACK, "Loss": LOSS, "Lam": LAM}

# The first value that is too small, the first that is too large, and far ones; None: there is no such bound.
CODES = {"norm": 2, "adv": 4, "points": 3, "alpha": 3, "penalty": 3, "type": 3}
CODES |= {"x_type": 3, "given_type": 3, "points_type": 3}
LOWEST = {"batch": 1, "part": 1, "channels": 1, "plane": 1, "residuals": 1, "classes": 1}
LOWEST |= {"triplets": 0, "sample_offset": 0, "losses": 0, "stride": 0, "target_stride": -1}
LOWEST |= {"min_history": 0, "window": -1}
WRONG: list[tuple[str, str, Any]] = [
    *[("Pack", "batch", 2**32), ("Pack", "part", 3), ("Pack", "channels", 2**56), ("Pack", "plane", 2**62)],
    *[("Pack", "triplets", 2**24), ("Pack", "sample_offset", 2**32 - 1), ("Pack", "sample_offset", 2**63 - 1)],
    *[("Loss", "losses", 7), ("Loss", "losses", 9), ("Loss", "residuals", 3), ("Loss", "residuals", 2**62)],
    *[("Loss", "adv_rows", 1), ("Loss", "adv_rows", -1), ("Loss", "adv_rows", 2**63 - 1), ("Loss", "part", 1)],
    *[("Loss", "triplets", 0), ("Loss", "triplets", 2), ("Loss", "classes", 2**60), ("Loss", "stride", 2**62)],
    *[("Loss", "target_stride", 2**62), ("Loss", "part", 2**63 - 1), ("Loss", "triplets", 2**63 - 1)],
    ("Lam", "window", -1),
]
for maker, arguments in MAKERS.items():
    for name in arguments:
        far = [-(2**63)] if name in LOWEST or name in CODES else []
        WRONG += [(maker, name, LOWEST[name] - 1)] if name in LOWEST else []
        WRONG += [(maker, name, value) for value in (-1, CODES.get(name), 2**31 - 1) if name in CODES]
        WRONG += [(maker, name, value) for value in far if name not in CODES]


@pytest.mark.parametrize("maker, name, value", WRONG)
def test_plans_refuse_wrong_values(maker, name, value):
    getattr(_C, maker)(**MAKERS[maker])
    with pytest.raises(ValueError, match=r"^\w+: expected "):
        getattr(_C, maker)(**{**MAKERS[maker], name: value})


@pytest.mark.parametrize("maker, name", [(maker, name) for maker, given in MAKERS.items() for name in given])
def test_plans_refuse_wrong_types(maker, name):
    make, given = getattr(_C, maker), MAKERS[maker]
    integer = not isinstance(given[name], (float, bool))
    expected = rf"^{name}: expected {'an integer of 64 bits' if integer else 'a number'}, got "
    for value in ("1", [1], object()):
        with pytest.raises(TypeError, match=expected + type(value).__name__):
            make(**{**given, name: value})
    if integer:
        for value in (1.5, None, 2**63, -(2**63) - 1, 2**200):
            with pytest.raises(TypeError, match=expected):
                make(**{**given, name: value})
    with pytest.raises(TypeError, match=f"^{name}: missing from the plan$"):
        make(**{other: value for other, value in given.items() if other != name})
    with pytest.raises(TypeError, match=r"^another: not a field of the plan$"):
        make(**given, another=1)
    with pytest.raises(TypeError, match="incompatible constructor arguments"):
        make(*given.values())


@pytest.mark.parametrize(
    "maker, sizes",
    [
        ("Pack", {"channels": 2**31, "plane": 2**31}),
        ("Pack", {"batch": 2**31, "part": 2**31, "triplets": 2**24 - 1, "points": 2}),
        ("Pack", {"channels": 2**62, "plane": 2**62}),
        ("Pack", {"adv": 0, "points": 1}),  # its x_b is x_adv
        # Sums that overflow, not products.
        ("Loss", {"of_logits": True, "adv_rows": 2**63 - 1, "losses": 2**63 - 1}),
        ("Loss", {"of_logits": True, "adv_rows": 2**63 - 1, "losses": 2**63 - 1, "residuals": (2**63 - 2) // 3,
                  "part": (2**63 - 2) // 3, "classes": 1, "stride": 1}),
        ("Loss", {"residuals": 2**62, "part": 2**31, "triplets": 2**31, "losses": 0, "adv_rows": 0}),
        ("Loss", {"losses": 2**61, "classes": 1, "residuals": 2**61 - 2, "part": 2**61 - 2}),
        ("Loss", {"points": 1, "adv_rows": 0, "losses": 4}),  # the rows of x_adv are its x_b
    ],
)  # fmt: skip
def test_plans_refuse_sizes_that_overflow(maker, sizes):
    with pytest.raises(ValueError, match=r"^\w+: expected "):
        getattr(_C, maker)(**{**MAKERS[maker], **sizes})


# ---- Calls

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
    "lam": ("update", {}, ["e_lin", False, "lam_state", "count", "skipped", "mean", "spread", "used"], set()),
    "lam, window": (
        "update", {"window": 4}, ["e_lin", True, "lam_state", "count", "skipped", "mean", "spread", "used"], {"mean"}),
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


@everywhere
@called
def test_calls_refuse_null(where, call):
    function, arguments, names = prepared(call)
    optional = CALLS[call][3]
    with used(where):
        function(*arguments)
        for place, name in enumerate(names):
            changed = [*arguments[:place], 0, *arguments[place + 1 :]]
            if name in optional:
                function(*changed)
            elif name is not None:
                with pytest.raises(ValueError, match=rf"^{name}: expected the address of a tensor, got 0$"):
                    function(*changed)


@called
def test_calls_refuse_wrong_types(call):
    function, arguments, names = prepared(call)
    for place, name in enumerate(names):
        is_address = name is not None
        for value in ("1", object(), *([-1, None, 1.5, 2**64] if is_address else [])):
            with pytest.raises(TypeError, match="incompatible function arguments"):
                function(*arguments[:place], value, *arguments[place + 1 :])
    for wrong in (arguments[:-1], [*arguments, 1], []):
        with pytest.raises(TypeError, match="incompatible function arguments"):
            function(*wrong)


@called
def test_calls_refuse_wrong_thread_counts(call):
    function, arguments, _ = prepared(call)
    for threads in (0, -1, -(2**31)):
        with pytest.raises(ValueError, match=rf"^threads: expected an integer >= 1, got {threads}$"):
            function(*arguments[:-1], threads)
    with pytest.raises(ValueError, match=rf"^threads: expected fewer than 2\*\*31, got {2**31}$"):
        function(*arguments[:-1], 2**31)
    for wrong in (2**63, None, 1.5):
        with pytest.raises(TypeError, match="incompatible function arguments"):
            function(*arguments[:-1], wrong)
    function(*arguments[:-1], 2**31 - 1)  # as many as there are tasks


@called
def test_calls_refuse_other_devices(call):
    function, arguments, _ = prepared(call)
    devices = "'cpu' or 'cuda'" if _C.cuda_built() else "'cpu'"
    for device in ("", "CPU", "xpu", *([] if _C.cuda_built() else ["cuda"])):
        with pytest.raises(ValueError, match=rf"^device: expected {devices}, got '{device}'$"):
            function.func(device, *arguments)


def test_use_isa_refuses_what_it_does_not_know():
    before = _C.isa()
    assert before in _C.isas()
    assert set(_C.isas()) <= set(_C.facts()["isas"].split())
    for name in ("", "sse", "AVX2", "avx512\0", "baseline ", "é", "x" * 10_000):
        with pytest.raises(ValueError, match=r"^isa: expected one of .*baseline"):
            _C.use_isa(name)
    for value in (None, 1, ["baseline"]):
        with pytest.raises(TypeError):
            _C.use_isa(value)
    assert _C.isa() == before


@pytest.mark.parametrize("number", [math.nan, math.inf, -math.inf, -1.0, 1e300, 5e-324])
@pytest.mark.parametrize("norm", [0, 1])
def test_any_float_is_survived(number, norm):
    """Python lets none of these through; the kernels have nothing that would crash of them."""
    for name in ("eps", "step_size", "radius", "low", "high"):
        plan = _C.Pack(**{**PACK, "norm": norm, "start": True, "project": True, "clamp": True, name: number})
        plan.pack("cpu", *[HERE + 1024 * place for place in range(7)], 1)
    for name in ("label_smoothing", "lam_max", "gamma", "sensitivity"):
        plan = _C.Loss(**{**LOSS, "window": 0, name: number})
        plan.forward("cpu", *[HERE + 1024 * place for place in range(5)], number, *[HERE + 6144] * 5,
                         *[HERE + 1024 * place for place in (7, 8, 9)], 1)  # fmt: skip


@pytest.mark.skipif("libasan" in os.environ.get("LD_PRELOAD", ""), reason="AddressSanitizer ends the process instead")
def test_a_sample_too_large_for_memory():
    """The l2 ball keeps a sample's numbers; nothing is read or written before they have a place."""
    for adv in (1, 3):  # a step; the start alone
        plan = _C.Pack(**{**PACK, "adv": adv, "norm": 1, "batch": 1, "part": 1, "channels": 1, "plane": 2**50})
        with pytest.raises(MemoryError):
            plan.pack("cpu", *[HERE + 1024 * place for place in range(7)], 1)


# ---- Memory


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


SIZES = [1, 2, 3, 5, 7, 8, 15, 16, 17, 31, 33, 63, 65, 127, 129, 767, 769, 1537, 4099]
OPTIONS: dict[str, dict[str, Any]] = {
    "defaults": {},
    "bounds": {"bounds": (0.2, 0.6), "start": 1.0, "project": True},
    "normalised": {"mean": (0.1, 0.2, 0.3), "std": (0.5, 2.0, 3.0), "points": "elle-2p", "triplets": 2},
    "l2": {"norm": "l2", "start": 1.0, "fraction": 0.5},
    "five-point": {"points": "five-point"},
}


@everywhere
@pytest.mark.parametrize("name", OPTIONS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_nothing_is_written_outside_the_points(where, name, dtype):
    """Points at any address that their type allows, of sizes around those of vectors and tiles."""
    options = {"eps": 0.1, "dtype": dtype, **OPTIONS[name]}
    for place, size in enumerate(SIZES):
        last = place % 3 == 1  # channels last in memory
        x, given = random(2, 3, size, 1, seed=size), random(2, 3, size, 1, seed=size + 1) - 0.5
        memory_format = torch.channels_last if last else torch.contiguous_format
        options["memory_format"] = memory_format
        with used(where):
            for shift in (0, 1, 3):
                found, found_alpha = packed_directly(x, given, shift, **options)
                if shift == 0:
                    expected, alpha = functional.pack_points(x, given, seed=seed_of(5), backend="cpp", **options)
                assert torch.equal(found, in_memory_order(expected))
                assert torch.equal(found_alpha, alpha)


@everywhere
@pytest.mark.parametrize("x_dtype, given_dtype, dtype", [*itertools.product(DTYPES[::2], repeat=3)], ids=str)
def test_samples_of_several_tiles(where, x_dtype, given_dtype, dtype):
    """Tiles are larger where no number passes through a buffer."""
    x, given = random(2, 3, 1367, seed=1, dtype=x_dtype), (random(2, 3, 1367, seed=2) - 0.5).to(given_dtype)
    for options in ({}, {"start": 1.0}, {"points": "elle-2p"}, {"points": "five-point"}):
        runs = []
        for backend in ("reference", "cpp"):
            calls: dict[str, Any] = {"dtype": dtype, "seed": seed_of(5), "backend": backend, **options}
            with used(where):
                runs.append([*functional.pack_points(x, given, 0.1, **calls),
                             *functional.pack_points(x, None, 0.1, x_adv=given, **calls)])  # fmt: skip
        assert all(torch.equal(one, other) for one, other in zip(*runs, strict=True))


@everywhere
@pytest.mark.parametrize("channels", [1, 2, 4, 63, 64, 65, 130])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_blocks_of_channels_stay_in_their_bounds(where, channels, dtype):
    """A tile has at most 64 channels where they lie last."""
    for size, shift in itertools.product((1, 3, 12, 13, 47), (0, 1)):
        x, given = random(2, channels, size, 1, seed=size), random(2, channels, size, 1, seed=size + 1) - 0.5
        given = given.contiguous(memory_format=torch.channels_last)
        for memory_format in (torch.channels_last, torch.contiguous_format):
            options: dict[str, Any] = {"eps": 0.1, "dtype": dtype, "memory_format": memory_format}
            with used(where):
                found, _ = packed_directly(x, given, shift, **options)
                expected, _ = functional.pack_points(x, given, seed=seed_of(5), backend="reference", **options)
            assert torch.equal(found, in_memory_order(expected))


@everywhere
@pytest.mark.parametrize("name", OPTIONS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(
    "plane, memory_format",
    [(2**16, torch.contiguous_format), (2**16 + 1, torch.contiguous_format), (2**16 + 1, torch.channels_last)],
    ids=["whole vectors", "odd", "odd, channels last"],
)
def test_large_results_are_those_of_small_ones(where, name, dtype, plane, memory_format):
    """From 4 MB on points are written past the cache, unless a vector of them would not lie as it should."""
    x, given = random(5, 3, plane, 1, seed=1), random(5, 3, plane, 1, seed=2) - 0.5
    options: dict[str, Any] = {"eps": 0.1, "dtype": dtype, "memory_format": memory_format, **OPTIONS[name]}
    with used(where):
        whole, alpha = packed_directly(x, given, shift=0, **options)
        assert whole.numel() * whole.element_size() >= 2**22
        apart, _ = packed_directly(x, given, shift=1, **options)
        assert torch.equal(whole, apart)
        # The rows of one sample by itself: less than 4 MB, but for five points of float32.
        options["fraction"], part = 1.0, alpha.shape[0] // options.get("triplets", 1)
        rows, sample = whole.view(-1, 3 * plane), part - 1
        one = slice(sample, part)
        few, _ = packed_directly(x[one], given[one], 0, **options, sample_offset=sample)
        assert torch.equal(torch.cat((rows[one], rows[5 + sample :: part])), few.view(-1, 3 * plane))


@everywhere
@pytest.mark.parametrize("of", ["loss", "logits"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_nothing_is_written_outside_the_results_of_the_loss(where, of, dtype):
    for batch, classes in itertools.product((1, 2, 5), (1, 2, 7, 16, 33, 63, 64, 65, 129, 1001)):
        logits = torch.randn(4 * batch, classes, generator=rng(classes)).to(dtype)
        target, alpha = labels(batch, classes), random(batch, seed=3)
        plan = _C.Loss(**{**LOSS, "losses": batch if of == "logits" else 4 * batch, "residuals": batch,
                          "adv_rows": batch, "part": batch, "classes": classes, "stride": classes,
                          "label_smoothing": 0.1, "of_logits": of == "logits", "type": CODE[dtype]})  # fmt: skip
        numbers = 5 * batch + 1 if of == "logits" else 20 * batch + 1
        for shift in (0, 1):
            saved, grad = Guarded(numbers, torch.float32, shift), Guarded(logits.numel(), dtype, shift)
            scalars = [Guarded(1, torch.float32, shift) for _ in range(3)]
            one = torch.ones(())
            tensors = [logits.data_ptr(), target.data_ptr(), alpha.data_ptr(), saved.address]
            with used(where):
                plan.forward("cpu", *tensors, 0, 2.0, 0, 0, 0, 0, 0, *(guarded.address for guarded in scalars), 1)
                plan.backward("cpu", *tensors, one.data_ptr(), 0, 0, grad.address, 1)
                leaf = logits.clone().requires_grad_()
                expected = functional.elle_loss(leaf, target, alpha, 2.0, backend="cpp", of=of, label_smoothing=0.1)
                (expected_grad,) = torch.autograd.grad(expected[0], leaf)
            saved.values()
            assert [guarded.values().item() for guarded in scalars] == [value.item() for value in expected]
            assert torch.equal(grad.values(), expected_grad.flatten())


# Without torch, so that it starts at once; and in a process of its own, which a stray access ends.
AT_THE_EDGE = """
import ctypes, importlib.util, itertools, mmap, sys
spec = importlib.util.spec_from_file_location("elle_fast._C", sys.argv[1])
module = importlib.util.module_from_spec(spec)
spec.loader.exec_module(module)
pack, loss = eval(sys.argv[2]), eval(sys.argv[3])
libc, page = ctypes.CDLL(None, use_errno=True), mmap.PAGESIZE
libc.mmap.restype = ctypes.c_void_p
libc.mmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int, ctypes.c_int, ctypes.c_int, ctypes.c_long]
libc.mprotect.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
READ, WRITE = mmap.PROT_READ, mmap.PROT_READ | mmap.PROT_WRITE

class Region:  # between two pages that nobody may touch
    def __init__(self, pages):
        self.size = pages * page
        self.start = libc.mmap(None, self.size + 2 * page, 0, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS, -1, 0) + page
        assert libc.mprotect(self.start, self.size, WRITE) == 0
    def place(self, size, at_end):
        assert size <= self.size
        return self.start + (self.size - size if at_end else 0)

regions = [Region(80) for _ in range(8)]
x, given, alpha_in, seed, statistics, points, alpha, more = regions
WIDTH = (4, 2, 2)
calls = 0
planes = [*range(1, 36), 63, 64, 65, 127, 129, 255, 257, 767, 768, 769]
for isa in module.isas():
    module.use_isa(isa)
    for i, (plane, channels, at_end) in enumerate(itertools.product(planes, (1, 2, 3, 5, 64, 67), (False, True))):
        if plane * channels > 4000:
            continue
        types = i % 3, i // 3 % 3, i // 9 % 3
        forms = [bool(i * 5 >> k & 1) for k in (1, 2, 3)]
        batch = 1 + i % 2
        for norm, kind, normalize in itertools.product((0, 1), (0, 1, 2), (False, True)):
            options = {**pack, "batch": batch, "part": batch, "channels": channels, "plane": plane,
                "norm": norm, "points": kind, "normalize": normalize, "alpha": 2, "start": bool(i % 2),
                "project": bool(i // 2 % 2), "clamp": bool(i // 4 % 2), "x_type": types[0], "given_type": types[1],
                "points_type": types[2], "x_last": forms[0], "given_last": forms[1], "points_last": forms[2]}
            start = {**options, "adv": 3, "triplets": 0, "points": 0, "normalize": False}
            n, rows = batch * channels * plane, 1 + (3, 2, 5)[kind]
            arguments = [x.place(n * WIDTH[types[0]], at_end), given.place(n * WIDTH[types[1]], at_end),
                alpha_in.place(4 * batch, at_end), seed.place(8, at_end), statistics.place(8 * channels, at_end),
                points.place(rows * n * WIDTH[types[2]], at_end), alpha.place(4 * batch, at_end)]
            module.Pack(**options).pack("cpu", *arguments, 1)
            to = points.place(n * WIDTH[types[2]], at_end)
            module.Pack(**start).pack("cpu", arguments[0], 0, 0, arguments[3], 0, to, 0, 1)
            calls += 2
    for i, (classes, part, at_end) in enumerate(itertools.product(planes, (1, 2, 5, 9), (False, True))):
        for type_, soft, of_logits in itertools.product((0, 1, 2), (False, True), (False, True)):
            kind = i % 3
            adv_rows = part + i % 2
            rows = adv_rows + (3, 2, 5)[kind] * part
            losses = adv_rows if of_logits else rows
            stride = classes + (i // 3 % 2) * 3
            plan = module.Loss(**{**loss, "losses": losses, "residuals": part, "adv_rows": adv_rows, "part": part,
                "classes": classes, "stride": stride, "target_stride": classes if soft else -1, "points": kind,
                "of_logits": of_logits, "type": type_, "label_smoothing": 0.1 * (i // 2 % 2)})
            size = ((rows - 1) * stride + classes) * WIDTH[type_]
            saved = 4 * losses + (part if of_logits else losses) + 1
            arguments = [x.place(size, at_end), given.place(adv_rows * (4 * classes if soft else 8), at_end),
                alpha.place(4 * part, at_end), points.place(4 * saved, at_end)]
            scalars = [more.place(4, at_end)] * 3
            plan.forward("cpu", *arguments, 0, 1.0, 0, 0, 0, 0, 0, *scalars, 1)
            upstream = [seed.place(4, at_end)] * 3
            plan.backward("cpu", *arguments, *upstream, more.place(rows * classes * WIDTH[type_], at_end), 1)
            calls += 2
print(calls)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="mprotect")
def test_tensors_may_lie_at_the_edge_of_memory():
    """Not one byte before or after any tensor is read: the pages there cannot be."""
    file = extension._file()
    arguments = [sys.executable, "-c", AT_THE_EDGE, str(file), repr(PACK), repr(LOSS)]
    done = subprocess.run(arguments, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    assert int(done.stdout) > 10_000


# ---- The reference's bits, signs of zeros among them


def bits(points: Tensor) -> Tensor:
    return torch.where(points.isnan(), math.nan, points).view(torch.int32)


def cycled(values: list[float], *shape: int) -> Tensor:
    return torch.tensor(values).repeat(-(-math.prod(shape) // len(values)))[: math.prod(shape)].view(shape)


def check_bits(where: Where, x: Tensor, grad: Tensor | None, eps: float, **options: Any) -> None:
    runs = [
        [*functional.pack_points(x, grad, eps, seed=seed_of(3), backend=backend, **options)]
        for backend in ("reference", "cpp")
    ]
    if options.get("start"):
        kept = {name: options[name] for name in ("start", "bounds") if name in options}
        for run, backend in zip(runs, ("reference", "cpp"), strict=True):
            run.append(functional.random_start(x, eps, seed=seed_of(3), backend=backend, **kept))
    assert all(torch.equal(bits(one), bits(other)) for one, other in zip(*runs, strict=True))


# Around 2**-90 from where on radii are scaled, around 2**-95 from where on that is exact, and where they overflow.
NEAR = [math.nextafter(2.0**-90, 0), 2.0**-90, 2.0**-90 * (1 + 2.0**-23), 1.3 * 2.0**-96, 2.0**-126]
RADII = [0.0, 1e-45, 1e-40, 1e-38, 1e-30, 1e-10, 1e-3, 8 / 255, 1.0, 3e38, *NEAR]


@everywhere
@pytest.mark.parametrize("eps", RADII)
@pytest.mark.parametrize(
    "options",
    [{}, {"start": 1.0}, {"start": 2.0, "project": True}, {"bounds": (-0.5, 0.5)}, {"points": "elle-2p"}],
    ids=str,
)
def test_points_have_the_references_bits_for_every_radius(where, eps, options):
    x = cycled([0.0, -0.0, 1e-45, -1e-40, 0.25, -1.0, eps, -eps, 2 * eps, 1e-30, -1e30], 2, 3, 40, 31)
    grad = random(2, 3, 40, 31, seed=2) - 0.5
    with used(where):
        check_bits(where, x, grad, eps, step_size=0.1, **options)
        check_bits(where, x, None, eps, **{**options, "points": "elle"})


@contextmanager
def flushing(denormals: bool) -> Iterator[None]:
    if denormals and not torch.set_flush_denormal(True):
        pytest.skip("this processor cannot")
    try:
        yield
    finally:
        torch.set_flush_denormal(False)


@everywhere
@pytest.mark.parametrize("step_size", [0.0, 1e-45, 1e-40, 1e-3, 1.0, 3e38])
@pytest.mark.parametrize("flush", [False, True], ids=["denormals", "flushed"])
def test_steps_have_the_references_bits_for_every_gradient(where, step_size, flush):
    """Each x, zeros of both signs among them, beside each kind of gradient, with both kinds of NaN."""
    numbers = [0.0, 1e-45, 1e-40, 2.0**-126, 0.5, 1.0, 1.5, 3e38, math.inf]
    words = [0x7F800001, 0x7FC00000, 0xFF800001 - 2**32, 0xFFC00000 - 2**32]
    nans = torch.tensor(words, dtype=torch.int32).view(torch.float32)
    grad = torch.cat((torch.tensor(numbers), -torch.tensor(numbers), nans)).repeat(13 * 9).view(1, -1)
    x = cycled(
        [0.0, -0.0, 1e-45, -1e-45, 1e-40, step_size, -step_size, 0.3, -1.0, 1e-3, 2.0**-126, 0.7, -0.1], *grad.shape
    )
    with used(where), flushing(flush):
        for options in ({}, {"start": 1.0}, {"project": True}, {"bounds": (0.0, 0.5)}, {"triplets": 0}):
            check_bits(where, x, grad, 0.1, step_size=step_size, **options)


# ---- Threads


def everything(x: Tensor, grad: Tensor, logits: Tensor, many: Tensor) -> list[Tensor]:
    """Results of all functions on some large tensors."""
    results = [
        *functional.pack_points(x, grad, 0.1, seed=seed_of(1), backend="cpp"),
        *functional.pack_points(x, grad, 0.1, seed=seed_of(2), start=1.0, dtype=torch.float16, points="five-point",
                                memory_format=torch.channels_last, mean=[0.5] * 3, std=[2.0] * 3,
                                backend="cpp"),
        *functional.pack_points(x, grad, 0.1, seed=seed_of(3), norm="l2", start=1.0, project=True, backend="cpp"),
        functional.random_start(x, 0.1, seed=seed_of(4), bounds=(0.0, 1.0), backend="cpp"),
        functional.random_start(x, 0.1, seed=seed_of(4), norm="l2", backend="cpp"),
    ]  # fmt: skip
    for z, of in itertools.product((logits, many), ("loss", "logits")):
        leaf, samples = z.clone().requires_grad_(), z.shape[0] // 4
        target = (
            labels(samples, z.shape[1]) if of == "loss" else probabilities(samples, z.shape[1], dtype=torch.float32)
        )
        values = functional.elle_loss(leaf, target, random(samples, seed=6), 2.0, of=of, backend="cpp")
        results += [*(value.detach() for value in values), *torch.autograd.grad(values[0], leaf)]
    return results


def large_inputs() -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Images of 200,704 elements, logits of few and of many classes: work for several threads each."""
    logits = torch.randn(4096, 10, generator=rng(3)), torch.randn(256, 1000, generator=rng(4))
    return random(16, 3, 64, 66, seed=1), random(16, 3, 64, 66, seed=2) - 0.5, *logits


@everywhere
def test_any_number_of_threads_gives_the_same(where):
    inputs = large_inputs()
    with used(where):
        alone = everything(*inputs)
    for threads in (2, 3, 8):
        with used(where, threads):
            assert all(torch.equal(one, other) for one, other in zip(everything(*inputs), alone, strict=True))


@everywhere
def test_eight_threads_call_at_once(where):
    """Each with inputs of its own, some with threads below them."""
    cases = [tuple(t.roll(turn, 0) for t in large_inputs()) for turn in range(8)]
    with used(where):
        expected = [everything(*case) for case in cases]
        together = threading.Barrier(8)

        def call(turn: int) -> bool:
            together.wait()
            for _ in range(2):
                torch.set_num_threads(1 + turn % 2)
                found = everything(*cases[turn])
                if not all(torch.equal(one, other) for one, other in zip(found, expected[turn], strict=True)):
                    return False
            return True

        with ThreadPoolExecutor(8) as pool:
            assert list(pool.map(call, range(8))) == [True] * 8


@pytest.mark.parametrize("name", ["pack", "forward", "backward"])
def test_others_run_during_a_call(name):
    """Python by itself would switch threads after the interval, which is too long here: a call has to let others in."""
    x, seed = random(2, 40_000, seed=1), seed_of(1)
    target, ones = labels(2, 10_000), torch.ones(16)
    memory = [torch.zeros(10 * x.numel()) for _ in range(2)]
    places = {
        "x": x, "given": x, "seed": seed, "points": memory[0], "alpha": ones,
        "logits": x, "target": target, "saved": memory[0], "grad": memory[1], "loss": ones, "ce": ones, "e_lin": ones,
    }  # fmt: skip
    pack = _C.Pack(**{**PACK, "channels": 1, "plane": 40_000})
    loss = _C.Loss(**{**LOSS, "classes": 10_000, "stride": 10_000})
    names = next(names for method, _, names, _ in CALLS.values() if method == name)
    arguments = [places[n].data_ptr() if n in places else 0.5 if n is None else 0 for n in names]
    function = partial(getattr(pack if name == "pack" else loss, name), "cpu")
    events: list[str] = []
    started = threading.Event()

    def call() -> None:
        started.set()
        for _ in range(2000):
            function(*arguments, 1)
            if "met" in events:
                return
        events.append("never met")

    interval = sys.getswitchinterval()
    sys.setswitchinterval(1000.0)
    try:
        thread = threading.Thread(target=call)
        thread.start()
        started.wait()
        events.append("met")
        thread.join()
    finally:
        sys.setswitchinterval(interval)
    assert events == ["met"]


FORKS = """
import multiprocessing, os, sys
import torch
from torch.utils.data import DataLoader, Dataset
from elle_fast import functional

x, grad = torch.rand(4, 3, 100, 100), torch.randn(4, 3, 100, 100)
logits, target, alpha = torch.randn(4096, 10), torch.randint(10, (1024,)), torch.rand(1024)

torch.set_num_threads(2)
torch.ones(1 << 20).exp().sum()  # torch's own threads are at work
expected = [functional.pack_points(x, grad, 0.1, seed=torch.tensor(seed), backend="cpp")[0] for seed in range(6)]
loss = functional.elle_loss(logits, target, alpha, 2.0, backend="cpp")[0]

def same(seed):
    torch.set_num_threads(2)
    points = functional.pack_points(x, grad, 0.1, seed=torch.tensor(seed), backend="cpp")[0]
    again = functional.elle_loss(logits, target, alpha, 2.0, backend="cpp")[0]
    # Not torch's comparison: its own threads did not come along.
    return points.numpy().tobytes() == expected[seed].numpy().tobytes() and again.item() == loss.item()

child = os.fork()
if child == 0:
    os._exit(0 if same(0) and same(1) else 1)
assert os.waitpid(child, 0)[1] == 0
with multiprocessing.get_context("fork").Pool(2) as pool:
    assert pool.map(same, range(6)) == [True] * 6

class Points(Dataset):
    def __len__(self):
        return 6
    def __getitem__(self, seed):
        torch.set_num_threads(2)
        return functional.pack_points(x, grad, 0.1, seed=torch.tensor(seed), backend="cpp")[0]

loader = DataLoader(Points(), batch_size=None, num_workers=2, multiprocessing_context="fork")
assert all(torch.equal(points, wanted) for points, wanted in zip(loader, expected, strict=True))
assert same(5)  # and the parent goes on
print("done")
"""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="there is no fork here")
def test_children_of_a_process_that_has_used_threads():
    """By fork, in a pool, and as a DataLoader's workers: they have none of the parent's threads to wait for."""
    arguments = [sys.executable, "-W", "ignore::DeprecationWarning", "-c", FORKS]
    done = subprocess.run(arguments, capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stdout) == (0, "done\n"), done.stderr[-2000:]


LOADED_IN_THE_CHILD = """
import os, torch
from elle_fast import functional
torch.set_num_threads(2)
x = torch.rand(4, 3, 100, 100)
torch.ones(1 << 20).exp().sum()  # torch's own threads are at work, and the extension is not loaded
child = os.fork()
if child == 0:
    torch.set_num_threads(2)
    functional.pack_points(x, x, 0.1, seed=torch.tensor(1), backend="cpp")
    os._exit(0)
assert os.waitpid(child, 0)[1] == 0
"""


def test_a_child_that_loads_the_extension_itself():
    arguments = [sys.executable, "-W", "ignore::DeprecationWarning", "-c", LOADED_IN_THE_CHILD]
    subprocess.run(arguments, check=True, capture_output=True, timeout=60)


def test_plans_made_by_many_threads(monkeypatch):
    monkeypatch.setattr(dispatch, "MOST_PLANS", 4)
    monkeypatch.setattr(PACK_POINTS, "_plans", OrderedDict())
    before = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    try:
        with ThreadPoolExecutor(8) as pool:
            plans = list(pool.map(lambda i: PACK_POINTS.plan(str, i % 37), range(20_000)))
    finally:
        sys.setswitchinterval(before)
    assert plans == [str(i % 37) for i in range(20_000)]
    assert len(PACK_POINTS._plans) <= 4 + 8  # each thread may be about to forget one


# ---- Sizes past 2**31

FLAGS = {
    "avx512": "-mavx512f -mavx512bw -mavx512vl -mavx512dq -mfma -mf16c -mprefer-vector-width=512",
    "avx2": "-mavx2 -mfma -mf16c",
}
COMPILER = shutil.which(os.environ.get("CXX", "g++"))


@everywhere
@pytest.mark.skipif(COMPILER is None, reason="there is no compiler")
def test_draws_where_the_number_of_a_block_passes_2_32(where, tmp_path):
    """In samples of 2**33 elements and more, which no memory here holds: the headers alone, by a program in C++."""
    assert COMPILER is not None
    folder, program = Path(__file__).parent, tmp_path / "draws"
    command = [COMPILER, "-std=c++17", "-O1", "-ffp-contract=off", f"-I{folder.parents[1] / 'csrc'}"]
    command += [f"-DELLE_ISA={where.isa}", *FLAGS.get(where.isa, "").split()]
    subprocess.run([*command, str(folder / "draws_near_2_32.cpp"), "-o", str(program)], check=True)
    done = subprocess.run([str(program)], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout
    assert int(done.stdout) > 50_000


class Repeated:
    """An address space of any size whose memory is the same few pages over and over: what is written last is read."""

    def __init__(self, size: int, period: int) -> None:
        libc = ctypes.CDLL(None, use_errno=True)
        libc.mmap.restype = ctypes.c_void_p
        libc.mmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t, *[ctypes.c_int] * 3, ctypes.c_long]
        libc.munmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t]
        self.libc, self.size = libc, -(-size // period) * period
        file = os.memfd_create("elle_fast")
        os.ftruncate(file, period)
        self.memory = mmap.mmap(file, period)  # the same pages once, to look at
        nothing, fixed, no_reserve = 0, 0x10, 0x4000
        private = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | no_reserve
        self.address = libc.mmap(None, self.size, nothing, private, -1, 0)
        assert self.address not in (None, ctypes.c_void_p(-1).value)
        access = mmap.PROT_READ | mmap.PROT_WRITE
        for begin in range(self.address, self.address + self.size, period):
            assert libc.mmap(begin, period, access, mmap.MAP_SHARED | fixed, file, 0) == begin
        os.close(file)

    def numbers(self, dtype: Any) -> Any:
        return np.frombuffer(self.memory, dtype=dtype)

    def close(self) -> None:
        self.libc.munmap(self.address, self.size)


PERIOD = 16381 * mmap.PAGESIZE  # 64 MB, and no power of two: an index that was cut to 32 bits finds another number
linux = pytest.mark.skipif(sys.platform != "linux", reason="memfd_create")


@pytest.fixture
def repeated():
    made: list[Repeated] = []

    def make(size: int) -> Repeated:
        made.append(Repeated(size, PERIOD))
        return made[-1]

    yield make
    for region in made:
        region.close()


@linux
@pytest.mark.slow
@pytest.mark.parametrize("last", [False, True], ids=["contiguous", "channels last"])
def test_more_than_2_31_elements_of_a_batch(repeated, last):
    """Rows of x_adv copied to the points: each number lies where it lay, whatever the number of its element."""
    channels, plane = (3, 2**27 + 5) if last else (1, 3 * (2**27 + 5))
    bytes_ = 6 * channels * plane * 2
    assert bytes_ // 2 > 2**31
    given, points = repeated(bytes_), repeated(bytes_)
    given.numbers(np.uint16)[:] = np.random.default_rng(1).integers(0, 0x7F80, PERIOD // 2)  # finite
    plan = _C.Pack(**{**PACK, "batch": 6, "part": 6, "channels": channels, "plane": plane, "triplets": 0, "adv": 2,
                      "x_type": 2, "given_type": 2, "points_type": 2,
                      "x_last": last, "given_last": last, "points_last": last})  # fmt: skip
    seed = seed_of(1)
    plan.pack("cpu", given.address, given.address, 0, seed.data_ptr(), 0, points.address, 0, 2)
    assert (points.numbers(np.uint16) == given.numbers(np.uint16)).all()


@linux
@pytest.mark.slow
def test_more_than_2_31_elements_of_a_sample(repeated):
    """The noise of the last elements, which is all that the memory still holds afterwards."""
    elements, number = 2**31 + 1000, -(2**60) - 9
    x, start, seed = repeated(2 * elements), repeated(2 * elements), seed_of(number)
    x.numbers(np.uint16)[:] = random(PERIOD // 2, seed=3, dtype=torch.bfloat16).view(torch.int16).numpy()
    plan = _C.Pack(**{**PACK, "batch": 1, "part": 1, "channels": 1, "plane": elements, "sample_offset": 7,
                      "triplets": 0, "adv": 3, "radius": 0.125, "x_type": 2, "points_type": 2})  # fmt: skip
    plan.pack("cpu", x.address, 0, 0, seed.data_ptr(), 0, start.address, 0, 1)
    for element in (2**31 - 1001, 2**31 - 2, 2**31 - 1, 2**31, 2**31 + 1, *range(elements - 20, elements)):
        place = element % (PERIOD // 2)
        point, found = (
            torch.tensor(int(region.numbers(np.int16)[place]), dtype=torch.int16).view(torch.bfloat16)
            for region in (x, start)
        )
        # 2 u - 1 is exact, and so is its product with a power of two.
        noise = 0.125 * (2 * unit(start_word(number, 7, element)) - 1)
        assert found == (point.float() + noise).to(torch.bfloat16)


@linux
@everywhere
@pytest.mark.parametrize("of", ["loss", "logits"])
@pytest.mark.parametrize("classes", [10, 100])
def test_rows_of_logits_further_apart_than_2_31_elements(where, of, classes):
    """In memory that is committed where it is written alone."""
    stride, batch = 2**28 + 3, 4
    memory = mmap.mmap(-1, 2 * 4 * batch * stride, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | 0x4000)
    logits = torch.frombuffer(memory, dtype=torch.bfloat16).as_strided((4 * batch, classes), (stride, 1))
    assert (4 * batch - 1) * stride > 2**31
    logits.copy_(torch.randn(4 * batch, classes, generator=rng(1)))
    results = []
    for z in (logits, logits.contiguous()):
        leaf = z.detach().requires_grad_()
        with used(where):
            values = functional.elle_loss(
                leaf, labels(batch, classes), random(batch, seed=2), 2.0, of=of, backend="cpp"
            )
        results.append([*values, *torch.autograd.grad(values[0], leaf)])
    assert all(torch.equal(one, other) for one, other in zip(*results, strict=True))
