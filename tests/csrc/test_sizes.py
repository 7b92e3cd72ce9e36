"""Sizes past 2**31."""

from __future__ import annotations

import ctypes
import mmap
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import setup
from elle_fast import functional
from tests.csrc.cases import _C, PACK, everywhere, used
from tests.helpers import labels, random, rng, seed_of, start_word, unit

FLAGS = {**setup.X86, "baseline": ""}
COMPILER = shutil.which(os.environ.get("CXX", "g++"))


@everywhere
@pytest.mark.skipif(COMPILER is None, reason="there is no compiler")
def test_draws_where_the_number_of_a_block_passes_2_32(where, tmp_path):
    """In samples of 2**33 elements and more, which no memory here holds: the headers alone, by a program in C++."""
    assert COMPILER is not None
    folder, program = Path(__file__).parent, tmp_path / "draws"
    command = [COMPILER, "-std=c++17", "-O1", "-ffp-contract=off", f"-I{folder.parents[1] / 'csrc'}"]
    command += [f"-DELLE_ISA={where.isa}", *FLAGS[where.isa].split()]
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
