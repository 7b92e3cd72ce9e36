"""The machine code of csrc/cuda, without a GPU: cuda_objects.py, whose bounds are asserted again here.

Compiled here for sm_90 alone, 20 s on one core; all architectures take three minutes, and are in the committed
benchmarks/results/cuda_objects.json.
"""

import json
from pathlib import Path

import pytest

import setup
from benchmarks.compile import cuda_objects
from benchmarks.compile.machine_code import read_sass

RESULT = Path(__file__).resolve().parents[3] / "benchmarks" / "results" / "cuda_objects.json"

BOOLEANS = ("false", "true")
PACK_KERNELS = {
    *(f"pack_cube<{size}, {last}, {wide}>" for size in (2, 4) for last in BOOLEANS for wide in BOOLEANS),
    *(f"pack_ball<{size}, {last}>" for size in (2, 4) for last in BOOLEANS),
}
LOSS_KERNELS = {"rows_forward", "rows_backward", "reduce_forward", "next_lam_alone"}


def check(kernels):
    """The bounds, from the numbers of one architecture."""
    names = {cuda_objects.parts(kernel)[0] for kernel in kernels}
    assert {kernel for kernel in kernels if kernel.startswith("pack")} == PACK_KERNELS
    assert names == {"pack_cube", "pack_ball", *LOSS_KERNELS}
    for kernel, found in kernels.items():
        assert found["broken"] == [], kernel
        assert (found["stack"], found["local"], found["spill_instructions"]) == (0, 0, 0), kernel
        assert found["registers"] <= 128, kernel
    # Neither is empty, or the bound on it would hold of nothing.
    stores = {kernel: {int(width): count for width, count in kernels[kernel]["stores"].items()} for kernel in kernels}
    loads = {kernel: {int(width): count for width, count in kernels[kernel]["loads"].items()} for kernel in kernels}
    for size, words in (("4", 1), ("2", 2)):
        wide, narrow = f"pack_cube<{size}, false, true>", f"pack_cube<{size}, false, false>"
        assert stores[wide] == {32: 1, 128: 14 * words}  # alpha, and seven places for each of two groups
        assert loads[wide][128] == (16 if size == "2" else 4)
        assert 128 not in stores[narrow]
        assert 128 not in loads[narrow]
    for name in ("rows_forward", "rows_backward"):
        assert any(loads[kernel].get(128) for kernel in kernels if kernel.startswith(name))


def tools():
    nvcc, tool = setup.find_nvcc(), cuda_objects.cuobjdump()
    if nvcc is None or tool is None:
        pytest.skip("needs nvcc and cuobjdump")
    return nvcc, tool


@pytest.mark.long
def test_every_kernel_is_within_its_bounds():
    nvcc, tool = tools()
    kernels = {}
    for source in cuda_objects.SOURCES:
        kernels.update(cuda_objects.inspect(source, "9.0", nvcc, tool))
    check(kernels)


def test_the_committed_report_is_within_the_bounds():
    report = json.loads(RESULT.read_text())
    assert {"machine", "versions", "commit", "command", "compiler"} <= report.keys()
    assert list(report["results"]) == setup.ARCHITECTURES.split()
    for kernels in report["results"].values():
        check(kernels)


def found(**changes):
    zeros = dict.fromkeys(("stack", "local", "spill_instructions"), 0)
    return {**zeros, "registers": 40, "loads": {128: 4}, "stores": {32: 1, 128: 14}, **changes}


def test_each_bound_can_be_broken():
    accesses = cuda_objects.expected("pack_cube<4, false, true>")
    assert tuple(accesses) == (4, 14, 1)
    assert cuda_objects.broken_bounds(found(), accesses) == []
    assert cuda_objects.broken_bounds(found(stack=8, spill_instructions=2), accesses) == [
        "stack: expected 0, got 8",
        "spill_instructions: expected 0, got 2",
    ]
    assert cuda_objects.broken_bounds(found(registers=129), accesses) == ["registers: expected at most 128, got 129"]
    assert cuda_objects.broken_bounds(found(loads={64: 8}), accesses) == ["loads: expected 4 of 128 bits, got {64: 8}"]
    # As the compiler once split them.
    assert cuda_objects.broken_bounds(found(stores={32: 57}), accesses) == [
        "stores: expected 14 of 128 bits, got {32: 57}",
        "stores: expected at most 1 narrower than 128 bits, got 57",
    ]


def test_cuobjdumps_listing_is_read():
    code = """
        /*0000*/                   LDG.E.128 R4, desc[UR4][R2.64] ;  /* 0x000000040204c981 */
                                                                     /* 0x000fea0003800000 */
        /*0010*/              @!P0 STG.E.128 desc[UR4][R2.64], R4 ;  /* 0x000000040204c981 */
        /*0020*/                   STL [R1+0x8], R22 ;               /* 0x000000040204c981 */
        /*0030*/                   EXIT ;                            /* 0x000000000000794d */
        /*0040*/                   BRA 0x40;                         /* 0xfffffffc00fc7947 */
        /*0050*/                   NOP;                              /* 0x0000000000007918 */
"""
    steps = read_sass(cuda_objects._as_listing(code))
    assert [(step.opcode, step.kind, step.width) for step in steps] == [
        ("LDG.E.128", "load", 128),
        ("STG.E.128", "store", 128),
        ("STL", "local", 0),
        ("EXIT", "other", 0),
    ]
