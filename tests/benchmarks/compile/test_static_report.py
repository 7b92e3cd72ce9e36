"""The compiled kernels, without a GPU: benchmarks/compile/static_report.py, whose bounds are asserted again here.

A compilation takes half a second to two, the whole report twelve minutes on one core. Compiled here on sm_90: every
option of the linf kernels and of the loss, and every pair of dtypes at 3x32x32 contiguous, but of the l2 kernels only
the longest; on the other targets a variant or two of each kernel. All variants on all targets are in the committed
benchmarks/results/static_report.json: its names have to be those of the code, and its numbers within the bounds.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks.compile import bounds, machine_code, static_report
from benchmarks.compile.compiling import TARGETS

ROOT = Path(__file__).resolve().parents[3]
RESULT = ROOT / "benchmarks" / "results" / "static_report.json"

ON_SM_90 = (
    "linf 3x32x32 contiguous",
    "linf 3x32x32 channels_last x bf16, grad bf16, output bf16",
    "pack linf fp32, start, project, bounds",
    "start linf fp32, bounds",
    "pack linf fp32, normalized",
    "pack linf fp32, five-point",
    "pack linf fp32, x unaligned",
    "pack linf fp32, WIDE",
    "l2 fp32, default",
    "l2 fp32, start",
    "l2 fp32, normalized",
    "l2 bf16 channels_last, start, project, bounds",
    "start l2 contiguous x fp32",
    "loss fp32 C 1000 |",
    "loss fp32 C 1000, soft targets, label smoothing |",
    "loss fp32 C 1000, five-point |",
    "loss fp32 C 1000, of logits |",
    "loss fp32 C 1000, of logits, five-point |",
    "loss fp32 C 1000, lam adaptive, window |",
    "loss fp32 C 1000, batch of 1024 |",
    "loss fp32 C 1000, unaligned |",
    "update_lam",
)
KERNELS = (
    *("pack_cube", "start_cube", "pack_ball", "start_ball"),
    *("rows_forward", "reduce_forward", "rows_backward", "update_lam"),
)
OTHER_TARGETS = ("sm_80", "sm_100", "gfx942")
ON_OTHER_TARGETS = (
    "linf 3x32x32 contiguous x fp32, grad fp32, output fp32",
    "start linf 3x32x32 contiguous x fp32",
    "pack l2 fp32, default",
    "start l2 contiguous x fp32",
    "loss bf16 C 32000 |",
    "loss fp32 C 1000 |",
    "update_lam |",
)


def run(*arguments, **variables):
    """The command, as it is typed: outside the interpreter, which the other tests may be in."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [sys.executable, "-m", "benchmarks.compile.static_report", *map(str, arguments)]
    return subprocess.run(command, cwd=ROOT, env=environment | variables, capture_output=True, text=True)


def check_bounds(report):
    """The bounds, from the numbers of the file."""
    assert report["columns"] == list(static_report.COLUMNS)
    for name, on in report["variants"].items():
        for target, row in on.items():
            registers, spills, *accesses = row
            assert registers <= 128, (name, target)
            assert spills == 0, (name, target)
            for got, least, narrower, most in (accesses[:4], accesses[4:]) if accesses else ():
                assert got >= least, (name, target, row)
                assert narrower <= most, (name, target, row)


def check_summary(report, targets):
    """Of every kernel on every target there are variants whose accesses have a bound, or that would hold of nothing."""
    assert set(report["summary"]) == {f"{target} {kernel}" for kernel in KERNELS for target in targets}
    for group, row in report["summary"].items():
        rows = [
            on[target]
            for name, on in report["variants"].items()
            for target in targets
            if group == f"{target} {name.rsplit(' | ', 1)[1]}"
        ]
        assert row["variants"] == len(rows) > 0
        assert row["registers"] == max(each[0] for each in rows)
        assert row["fast path"] == sum(len(each) > 2 for each in rows)
        assert (row["fast path"] > 0) == (not group.endswith(("reduce_forward", "update_lam")))


@pytest.mark.long
@pytest.mark.parametrize(
    "targets,parts", [(("sm_90",), ON_SM_90), (OTHER_TARGETS, ON_OTHER_TARGETS)], ids=["sm_90", "other targets"]
)
def test_every_kernel_compiles_within_its_bounds(targets, parts, tmp_path):
    out = tmp_path / "report.json"
    only = [f"--only={part}" for part in parts]
    done = run(f"--targets={','.join(targets)}", *only, "--jobs=1", f"--out={out}")
    assert done.returncode == 0, done.stderr[-4000:]
    report = json.loads(out.read_text())
    assert all(tuple(on) == targets for on in report["variants"].values())
    check_bounds(report)
    check_summary(report, targets)


def test_the_committed_report_has_the_variants_of_the_code():
    listed = run("--list")
    assert listed.returncode == 0, listed.stderr
    report = json.loads(RESULT.read_text())
    assert list(report["variants"]) == listed.stdout.splitlines(), (
        "write it anew: python -m benchmarks.compile.static_report"
    )
    assert {"machine", "versions", "commit", "command"} <= report.keys()
    assert all(list(on) == list(TARGETS) for on in report["variants"].values())
    check_bounds(report)
    check_summary(report, list(TARGETS))
    # The README: bound by memory on an A100 and an H100, by instructions and bytes.
    for target in ("sm_80", "sm_90"):
        assert report["summary"][f"{target} pack_cube"]["bound"]["memory"] > 0


def test_it_refuses_to_run_in_the_interpreter():
    done = run("--only", "update_lam", TRITON_INTERPRET="1")
    assert done.returncode == 2
    assert "TRITON_INTERPRET=1 is set" in done.stderr


def test_an_unknown_variant_is_named():
    done = run("--only", "no such thing")
    assert done.returncode == 2
    assert "'no such thing'" in done.stderr


SASS = """Function:some
--:-:0:-:1\tLDC R1, c[0x0][0x28];
--:-:2:-:1\tLDG.E.128 R4, desc[UR4][R2.64];
LBB0:
--:-:2:-:1\t@!P0 LDG.E.EF.128.CONSTANT R8, desc[UR4][R2.64];
--:-:2:-:1\tFFMA R8, R8, R9, R10;
--:-:2:-:1\t@P1 IMAD.WIDE.U32 R8, R8, 0x3, R10;
--:-:2:-:1\t@P0 BRA LBB0;
--:-:2:-:1\tSTG.E.128 desc[UR4][R2.64], R4;
--:-:2:-:1\tSTG.E desc[UR4][R2.64], R4;
--:-:2:-:1\tEXIT;
LBB1:
--:-:2:-:1\tBRA LBB1;
--:-:2:-:1\tNOP;
"""


def found_in(sass, registers=40, stack=0):
    steps = machine_code.read_sass(sass)
    return {
        **machine_code.read_resources(
            f" Function some:\n  REG:{registers} STACK:{stack} SHARED:0 LOCAL:0 CONSTANT[0]:4"
        ),
        "spill_instructions": sum(step.kind == "local" for step in steps),
        **machine_code.accesses(steps),
    }


def broken(sass, **resources):
    data = bounds.Data("", loads=2, stores=1, narrow_loads=0, narrow_stores=1)
    return bounds.broken_bounds(found_in(sass, **resources), data)


def test_machine_code_is_read():
    steps = machine_code.read_sass(SASS)
    assert [step.opcode for step in steps][-1] == "EXIT"  # what pads the end is left out
    assert [step.kind for step in steps] == [
        *("other", "load", "load", "float", "integer", "other", "store", "store", "other")
    ]
    assert [step.width for step in steps if step.width] == [128, 128, 128, 32]
    assert [len(step.loops) for step in steps] == [0, 0, 1, 1, 1, 1, 0, 0, 0]


def test_each_bound_can_be_broken():
    assert broken(SASS) == []
    narrow = SASS.replace("STG.E.128", "STG.E")
    assert broken(narrow) == [
        "stores: expected 1 of 128 bits, got 0 and 2 narrower",
        "stores: expected at most 1 narrower than 128 bits, got 2",
    ]
    assert broken(SASS.replace("LDG.E.128", "LDG.E.U16"))[0] == "loads: expected 2 of 128 bits, got 1 and 1 narrower"
    spilled = SASS.replace("EXIT", "STL [R1+0x8], R22;\n--:-:2:-:1\tLDL.LU R20, [R1+0x8];\n--:-:2:-:1\tEXIT")
    assert broken(spilled, stack=16) == ["stack: expected 0, got 16", "spill_instructions: expected 0, got 2"]
    assert broken(SASS, registers=136) == ["registers: expected at most 128, got 136"]


AMDGCN = """
some:
	s_load_dwordx2 s[0:1], s[4:5], 0x0
	global_load_dwordx4 v[2:5], v1, s[0:1]
	buffer_load_dwordx4 v[6:9], v6, s[20:23], 0 offen
	v_add_f32_e32 v2, v2, v6
	global_store_dwordx4 v1, v[2:5], s[2:3]
	global_store_short v1, v2, s[2:3]
    .private_segment_fixed_size: 0
    .sgpr_count:     20
    .sgpr_spill_count: 0
    .vgpr_count:     30
    .vgpr_spill_count: 0
"""


def test_amd_assembly_is_read_and_can_break_bounds():
    steps = machine_code.read_amdgcn(AMDGCN)
    assert [(step.kind, step.width) for step in steps if step.width] == [
        *(("load", 128), ("load", 128), ("store", 128), ("store", 16))
    ]
    data = bounds.Data("", loads=2, stores=1, narrow_stores=1)
    accesses = {"loads": {128: 2}, "stores": {128: 1, 16: 1}}
    assert bounds.broken_bounds({**machine_code.read_amd_resources(AMDGCN), **accesses}, data) == []
    spilled = AMDGCN.replace("vgpr_spill_count: 0", "vgpr_spill_count: 3").replace("fixed_size: 0", "fixed_size: 12")
    spilled = spilled.replace("v_add_f32_e32", "scratch_load_dword v1, off, s0\n\tv_add_f32_e32")
    assert bounds.broken_bounds({**machine_code.read_amd_resources(spilled), **accesses}, data) == [
        "local: expected 0, got 12",
        "vector_spills: expected 0, got 3",
        "spill_instructions: expected 0, got 1",
    ]
