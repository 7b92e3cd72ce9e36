"""The one command for a GPU, as far as it goes without one."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from argparse import Namespace
from typing import Any

import pytest
import torch

from benchmarks.gpu import gpu_report, gpu_tables
from benchmarks.gpu.processes import child, outcomes
from benchmarks.gpu.run import add_ratios
from benchmarks.harness.program import ROOT
from benchmarks.harness.timing import NOT_MEASURED
from benchmarks.ops import sizes


def run(*arguments: str) -> subprocess.CompletedProcess[str]:
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    return subprocess.run(
        [sys.executable, "-m", "benchmarks.gpu.gpu_report", *arguments],
        cwd=ROOT,
        env={**environment, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=400,
    )


@pytest.mark.slow
def test_a_dry_run_goes_through_every_part_and_measures_nothing(tmp_path):
    pytest.importorskip("triton")
    done = run("--dry-run", "--out", str(tmp_path / "report"))
    report = json.loads((tmp_path / "report" / "gpu_report.json").read_text())
    assert report["problems"] == []
    assert done.returncode == 0, done.stdout + done.stderr
    assert report["dry_run"] is True
    assert report["note"] == NOT_MEASURED
    assert report["device"] is None
    assert report["command"] == "python -m benchmarks.gpu.gpu_report --out=report --dry-run"
    assert {"machine", "versions", "commit", "sources_sha256"} <= report.keys()
    assert str(tmp_path) not in json.dumps(report)

    parts = report["parts"]
    assert list(parts) == ["tests", *gpu_report.PARTS]
    assert all(part["status"] == "done" for part in parts.values())
    assert parts["tests"]["outcomes"]["skipped"] > 50
    assert "not run" in parts["kernels"]["memcheck"]
    assert parts["kernels"]["calls_checked"] > 20
    packed = parts["pack_points"]["cases"]
    assert {name for case in packed for name in case["timings"]["pack"]} == set(sizes.BACKENDS) - {"cuda"}
    for case in packed:
        assert case["check"]["largest_error"] <= case["check"]["allowed"]
        assert case["timings"]["pack"]["triton"].keys() == {"events", "replay", "host"}
    for case in parts["elle_loss"]["cases"]:
        assert case["timings"].keys() == {"both", "forward", "backward"}
        assert all(timings.keys() == set(sizes.BACKENDS) - {"cuda"} for timings in case["timings"].values())
    assert parts["step"]["without_sync"] == {"triton": True, "eager": True}
    assert len({row["op"] for row in parts["sweep"]["rows"]}) == 2
    assert all(row["measured"] is None and row["met"] is None for row in report["targets"])
    assert (tmp_path / "report" / "gpu_report.png").read_bytes().startswith(b"\x89PNG")

    # The plan names what a GPU would run; the table is short enough for a terminal, and the last there is.
    assert "256x3x224x224 bf16 channels-last" in done.stdout
    table = done.stdout.split("sweep: done", 1)[1].splitlines()[1:]
    assert max(map(len, table)) <= 100
    assert table[-1] == "DRY RUN: no number above is a measurement"


def test_a_folder_is_needed_and_a_gpu(tmp_path, capsys, monkeypatch):
    file = tmp_path / "file"
    file.write_text("")
    with pytest.raises(SystemExit) as ended:
        gpu_report.main(["--dry-run", "--out", str(file)])
    assert ended.value.code == 2
    assert f"--out: expected a folder, got the file '{file}'" in capsys.readouterr().err
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(SystemExit) as ended:
        gpu_report.main(["--out", str(tmp_path / "folder")])
    assert ended.value.code == 2
    assert "torch sees no CUDA" in capsys.readouterr().err
    assert not (tmp_path / "folder").exists()


def timing(median: float) -> dict[str, Any]:
    return {"events": {"median_us": median}, "replay": {"median_us": median / 2}}


def test_ratios_and_targets():
    result: dict[str, Any] = {"case": sizes.PACK_CASES[0].name}
    result["timings"] = {"pack": {"triton": timing(10.0), "eager": timing(90.0), "compiled": {}}}
    add_ratios(result, "pack", moved=4_000_000, rate=5e11)
    assert result["ratios"]["pack"] == {"of_copy_rate": 0.8, "events_eager": 9.0, "replay_eager": 9.0}
    loss = next(case for case in sizes.LOSS_CASES if case.target and not case.launch_bound)
    slow = {"case": loss.name, "ratios": {"both": {"of_copy_rate": 0.8}}}
    parts = {"pack_points": {"cases": [result]}, "elle_loss": {"cases": [slow]}}
    rows = gpu_tables.targets(parts, dry=False)
    assert [gpu_tables.verdict(row) for row in rows if row["met"] is not None] == ["MISSED by 6 %", "met"]
    assert rows[-1]["measured"] == 1.25
    assert len(rows) == 2 + 2 * 2 + 2 * 4 + 1
    assert all(row["met"] is None for row in gpu_tables.targets(parts, dry=True))


def test_bytes_are_those_that_have_to_be_moved():
    cases = {case.name: case for case in sizes.PACK_CASES}
    elements = 256 * 3 * 224 * 224
    assert cases["256x3x224x224 fp32 fgsm"].bytes == 24 * elements
    assert cases["256x3x224x224 bf16 fgsm"].bytes == 12 * elements
    assert cases["256x3x224x224 fp32 normalised to bf16"].bytes == 16 * elements
    loss = sizes.LossCase(4, 10, sizes.BF16)
    assert [loss.bytes(what) for what in ("forward", "backward", "both")] == [80, 160, 160]


@pytest.mark.parametrize(
    "output",
    [
        "tests/a.py::x PASSED   [ 10%]\ntests/a.py::y[a b-c] FAILED [ 20%]\ntests/a.py::z SKIPPED (no GPU) [ 30%]",
        "[gw0] [ 10%] PASSED tests/a.py::x\n[gw11] [ 20%] FAILED tests/a.py::y \n[gw0] [ 30%] SKIPPED tests/a.py::z ",
    ],
    ids=["one process", "several"],
)
def test_outcomes_are_counted_also_in_a_log_that_was_cut_off(output):
    summary = "\nFAILED tests/a.py::test_y[a b-c] - assert 1 == 2\nSKIPPED [3] tests/a.py:4: no GPU\n"
    for text in (output, output + summary):
        assert outcomes(text) == {"passed": 1, "failed": 1, "skipped": 1}


def test_a_part_that_fails_is_recorded_and_the_rest_goes_on(tmp_path):
    options = gpu_report._parser().parse_args(["--dry-run", "--out", str(tmp_path)])
    report = gpu_report.Report(options, [])

    def broken(options: Namespace, seconds: float) -> dict[str, Any]:
        (tmp_path / "part-step.json").write_text(json.dumps({"launches": {"triton": 3}}))
        raise RuntimeError("it broke")

    report.run("kernels", broken)
    report.run("step", lambda report, seconds: {"launches": {"triton": 3}})
    found = json.loads((tmp_path / "gpu_report.json").read_text())
    assert found["parts"]["kernels"]["status"] == "failed"
    assert found["parts"]["step"]["status"] == "done"
    assert found["problems"] == ["kernels: error: RuntimeError: it broke"]

    # Cut off in the middle, what a part has written is kept.
    def interrupted(options: Namespace, seconds: float) -> dict[str, Any]:
        (tmp_path / "part-sweep.json").write_text(json.dumps({"rows": [1]}))
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        report.run("sweep", interrupted)
    found = json.loads((tmp_path / "gpu_report.json").read_text())
    assert found["parts"]["sweep"]["rows"] == [1]
    assert found["problems"][-1] == "sweep: interrupted"


def test_a_process_that_hangs_is_ended(tmp_path):
    options = gpu_report._parser().parse_args(["--dry-run", "--out", str(tmp_path)])
    command = [sys.executable, "-c", "import time; print('begun', flush=True); time.sleep(100)"]
    status, output = child(options, "step", command, 2.0, interpreted=True, log="log")
    assert status is None
    assert output == "begun\n"
