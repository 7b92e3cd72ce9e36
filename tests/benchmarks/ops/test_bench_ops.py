"""benchmarks/ops/bench_ops.py on tiny sizes, and what it makes of numbers."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from benchmarks.harness.timing import NOT_MEASURED, Samples
from benchmarks.ops import floor, ops_tables, sides
from benchmarks.ops.ops_tables import COMPILED, EAGER, Report, Target, judge
from benchmarks.ops.pack_cases import FLOORS
from elle_fast.backends import extension

ROOT = Path(ops_tables.__file__).parents[2]


@pytest.mark.long
def test_a_dry_run_goes_through_every_case_and_writes_json_and_a_plot(tmp_path):
    # Kernels of Triton are timed on GPUs alone.
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    out = tmp_path / "results" / "bench_ops.json"
    command = [sys.executable, "-m", "benchmarks.ops.bench_ops", "--dry-run"]
    done = subprocess.run(
        [*command, "--out", str(out)],
        cwd=ROOT,
        env={**environment, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=400,
    )
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr
    assert "no number in it is a measurement" in done.stdout
    report = json.loads(out.read_text())
    assert (report["dry_run"], report["note"]) == (True, NOT_MEASURED)
    assert report["problems"] == []
    assert report["command"] == "python -m benchmarks.ops.bench_ops --out=bench_ops.json --dry-run"
    assert str(tmp_path) not in out.read_text()
    assert {"machine", "versions", "commit", "about", "load_before", "seconds", "extension"} <= report.keys()
    assert out.with_suffix(".svg").read_bytes().startswith(b"<?xml")

    timed = {"median_us", "low_us", "high_us", "samples", "calls_per_sample", "page_faults"}
    for case in report["cases"].values():
        assert all(timings.keys() == timed for timings in case["timings"].values())
    sides = [set(case["timings"]) for name, case in report["cases"].items() if case["plotted"] and "pack_" in name]
    isas = () if (module := extension.load()) is None else [f"cpp-{isa}" for isa in module.isas()]
    assert any({*EAGER, *COMPILED, *isas} <= each for each in sides)
    assert len(report["targets"]) == len(ops_tables.targets())
    for row in report["targets"]:
        assert row["measured"] is None
        assert row["met"] is None


def measured(**microseconds: float) -> dict[str, object]:
    return {"timings": {name.replace("_", "-"): {"median_us": value} for name, value in microseconds.items()}}


def test_a_target_is_judged_against_the_fastest_rival():
    cases = {"case": measured(cpp=10.0, eager_plain=110.0, eager_reference=500.0)}
    row = judge(Target("case", "cpp", EAGER, 12), cases, dry=False)
    assert row["against"] == "eager-plain"
    assert (row["side_us"], row["against_us"], row["measured"], row["met"]) == (10.0, 110.0, 11.0, False)
    assert row["all_against_us"] == {"eager-plain": 110.0, "eager-reference": 500.0}
    assert judge(Target("case", "cpp", EAGER, 11), cases, dry=False)["met"] is True
    assert judge(Target("case", "cpp", EAGER, 11), cases, dry=True)["met"] is None
    assert judge(Target("case", "cpp", COMPILED, 11), cases, dry=False)["met"] is None
    assert judge(Target("another", "cpp", EAGER, 11), cases, dry=False)["met"] is None


def test_the_floor_is_the_faster_of_the_two_and_another_side_is_told_beside():
    cases = {"case": measured(cpp=90.0, cpp_avx2_out=55.0, floor_streamed=50.0, floor_stored=70.0)}
    row = judge(Target("case", "cpp-avx2-out", FLOORS, 1.25, at_most=True, beside="cpp"), cases, dry=False)
    assert (row["measured"], row["met"]) == (1.1, True)
    assert row["beside"] == {"side": "cpp", "side_us": 90.0, "measured": 1.8}
    assert judge(Target("case", "cpp-avx2-out", FLOORS, 1.09, at_most=True), cases, dry=False)["met"] is False
    fixed = judge(Target("case", "cpp", (), 15, at_most=True), cases, dry=False)
    assert (fixed["measured"], fixed["met"], fixed["against"]) == (90.0, False, None)


def test_the_floor_reads_both_arrays_and_writes_all_four():
    if isinstance(reason := floor.compiled(), str):
        pytest.skip(reason)
    # Chunks of 128 KiB, and a part of one.
    x, grad = torch.rand(70_000 // 16 * 16), torch.rand(70_000 // 16 * 16)
    for streamed in (True, False):
        points = torch.zeros(4, x.numel())
        call = floor.floor(x, grad, points, streamed=streamed)
        assert not isinstance(call, str), call
        call()
        assert points.equal(torch.stack([x, grad, x, grad]))
    assert "multiples of 64" in str(floor.floor(x[1:17], grad[:16], points[:, :16], streamed=True))


def test_the_report_has_a_floor_and_its_rate():
    report = Report(dry=False, command=["command"])
    case = sides.Case("case", dict, bytes=1_000_000)
    report.add(case, {"floor-streamed": Samples(1, [1e-3], [0.0]), "floor-stored": Samples(1, [2e-3], [0.0])}, {})
    assert report.cases["case"]["floor_us"] == 1000.0
    assert report.cases["case"]["floor_gb_per_s"] == 1.0


def test_the_first_kernel_of_the_cpu_is_the_one_that_auto_takes():
    module = extension.load()
    if module is None:
        pytest.skip("the extension is not built")
    assert sides.kernels()[0] == f"cpp-{module.isas()[0]}"
