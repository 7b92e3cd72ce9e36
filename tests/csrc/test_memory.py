"""Memory that the compiled extension must not touch."""

from __future__ import annotations

import itertools
import subprocess
import sys
from typing import Any

import pytest
import torch

from elle_fast import functional
from elle_fast.backends import extension
from tests.csrc.cases import _C, CODE, DTYPES, LOSS, PACK, Guarded, everywhere, in_memory_order, packed_directly, used
from tests.helpers import labels, random, rng, seed_of

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
