"""The one command for a GPU, as far as it goes without one."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from argparse import Namespace
from typing import Any

import pytest
import torch

from benchmarks.gpu import gpu_report, gpu_tables, processes
from benchmarks.gpu.gpu_report import PLAN, Part
from benchmarks.gpu.processes import child
from benchmarks.gpu.run import add_ratios
from benchmarks.gpu.steps import ROWS
from benchmarks.gpu.trainings import TINY_ATTACKS, TRAININGS
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


def parsed(*arguments: str) -> Namespace:
    return gpu_report._parser().parse_args(arguments)


@pytest.mark.slow
def test_a_dry_run_goes_through_every_stage_and_measures_nothing(tmp_path):
    pytest.importorskip("triton")
    pytest.importorskip("pyautoattack")
    folder = tmp_path / "report"
    done = run("--dry-run", "--out", str(folder))
    names = {f"stage-{stage}.json" for stage in gpu_report.STAGES} | {"gpu_report.svg", "gpu_report.log"}
    assert {path.name for path in folder.iterdir()} == names, done.stdout + done.stderr
    assert len(names) <= 8
    stages = [json.loads((folder / f"stage-{stage}.json").read_text()) for stage in gpu_report.STAGES]
    assert [report["problems"] for report in stages] == [[]] * len(stages)
    assert done.returncode == 0, done.stdout + done.stderr
    for report in stages:
        assert report["dry_run"] is True
        assert report["note"] == NOT_MEASURED
        assert report["device"] is None
        assert report["command"] == "python -m benchmarks.gpu.gpu_report --out=report --dry-run"
        assert {"machine", "versions", "commit", "sources_sha256"} <= report.keys()
        assert str(tmp_path) not in json.dumps(report)
        assert all(row["measured"] is None and row["met"] is None for row in report["targets"])
        assert all(part["status"] == "done" for part in report["parts"].values())
    assert sum(len(report["targets"]) for report in stages) == 4

    parts = {name: part for report in stages for name, part in report["parts"].items()}
    assert list(parts) == [part.name for part in PLAN]
    # That each was found by its name: pytest ends with an error otherwise.
    assert parts["tests"]["outcomes"]["skipped"] > 50
    packed = parts["pack_points"]["cases"]
    assert {name for case in packed for name in case["timings"]["pack"]} == set(sizes.BACKENDS) - {"cuda"}
    for case in packed:
        assert case["check"]["largest_error"] <= case["check"]["allowed"]
        assert case["timings"]["pack"]["triton"].keys() == {"events", "replay", "host"}
    for case in parts["elle_loss"]["cases"]:
        assert case["timings"].keys() == {"both", "forward", "backward"}
        assert all(timings.keys() == set(sizes.BACKENDS) - {"cuda"} for timings in case["timings"].values())
    assert parts["steps"]["rows"].keys() == ROWS.keys()
    for row in parts["steps"]["rows"].values():
        assert {"median_us", "images_per_second", "of_passes", "of_fgsm", "of_authors"} <= row.keys()
    jobs = parts["trainings"]["jobs"]
    assert len(jobs) == 3 * len(TRAININGS)
    assert {job["status"] for job in jobs} == {"done"}
    trained = [job for job in jobs if job["kind"] == "train"]
    assert [job["name"] for job in trained] == list(TRAININGS)
    for job in trained:
        assert job["training_seconds"] > 0
        assert (job["config"]["precision"], job["config"]["capture"]) == ("bf16", True)
        assert [row["epoch"] for row in job["epochs"]] == [1]
    for attack in TINY_ATTACKS:
        assert [job["name"] for job in jobs if job["kind"] == attack and attack in job["accuracy"]] == list(TRAININGS)
    assert (folder / "gpu_report.svg").read_bytes().startswith(b"<?xml")

    # The table is short enough for a terminal, and the last there is.
    table = done.stdout.split("trainings: done", 1)[1].splitlines()[1:]
    assert max(map(len, table)) <= 100
    assert table[-1] == "DRY RUN: no number above is a measurement"


def test_a_folder_is_needed_and_data_and_a_gpu(tmp_path, capsys, monkeypatch):
    def refused(*arguments: str) -> str:
        with pytest.raises(SystemExit) as ended:
            gpu_report.main(arguments)
        assert ended.value.code == 2
        return str(capsys.readouterr().err)

    file = tmp_path / "file"
    file.write_text("")
    assert f"--out: expected a folder, got the file '{file}'" in refused("--dry-run", "--out", str(file))
    there = refused("--dry-run", "--root", str(tmp_path / "gone"))
    assert f"--root: expected the files of a data set, got '{tmp_path / 'gone'}', which is not there" in there
    assert "expected some of 0,1,2,3,4, got '7'" in refused("--dry-run", "--stages", "1,7")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert "torch sees no CUDA" in refused("--out", str(tmp_path / "folder"))
    assert not (tmp_path / "folder").exists()


def timing(median: float) -> dict[str, Any]:
    return {"events": {"median_us": median}, "replay": {"median_us": median / 2}}


def test_ratios_and_targets():
    result: dict[str, Any] = {"case": sizes.PACK_CASES[0].name}
    result["timings"] = {"pack": {"triton": timing(10.0), "eager": timing(90.0), "compiled": {}}}
    add_ratios(result, "pack", moved=4_000_000, rate=5e11)
    assert result["ratios"]["pack"] == {"of_copy_rate": 0.8, "events_eager": 9.0, "replay_eager": 9.0}
    job = {"kind": "train", "name": "ELLE-A fast", "training_seconds": 60.0}
    parts: dict[str, dict[str, Any]] = {
        "pack_points": {"cases": [result]},
        "steps": {"rows": {"elle-a": {"of_passes": 1.04}}},
        "trainings": {"jobs": [{**job, "name": "FGSM", "training_seconds": 1.0}, job]},
    }
    rows = gpu_tables.targets(parts, dry=False)
    assert [gpu_tables.verdict(row) for row in rows] == ["MISSED by 6 %", "not measured", "met", "met"]
    assert rows[-1]["measured"] == 60.0
    assert all(row["met"] is None for row in gpu_tables.targets(parts, dry=True))
    # Of what was not chosen, or skipped for want of data, there is no target.
    assert gpu_tables.targets({"trainings": {"status": "skipped, there is no --root"}}, dry=False) == []


def test_bytes_are_those_that_have_to_be_moved():
    cases = {case.name: case for case in sizes.PACK_CASES}
    elements = 256 * 3 * 224 * 224
    assert cases["256x3x224x224 fp32 fgsm"].bytes == 24 * elements
    assert cases["256x3x224x224 bf16 fgsm"].bytes == 12 * elements
    assert cases["256x3x224x224 fp32 normalised to bf16"].bytes == 16 * elements
    loss = sizes.LossCase(4, 10, sizes.BF16)
    assert [loss.bytes(what) for what in ("forward", "backward", "both")] == [80, 160, 160]


# ---- Time


def test_all_stages_fit_into_a_quarter_of_an_hour_with_two_starts():
    assert sum(part.seconds for part in PLAN) <= 15 * 60 - 2 * 90
    # The two calls of at most ten minutes.
    for stages in ("0,1,2,3", "4"):
        plan = gpu_report.planned(parsed("--stages", stages))
        assert sum(part.seconds for part in plan) <= 10 * 60


def test_what_a_part_leaves_goes_to_those_after_it(tmp_path, monkeypatch):
    now = [0.0]
    monkeypatch.setattr(time, "monotonic", lambda: now[0])
    monkeypatch.setattr(gpu_report, "device_facts", dict)
    plan = gpu_report.planned(parsed("--stages", "1,2", "--seconds", "300"))
    named = {part.name: part.seconds for part in plan}
    assert named == {"tests": 90.0, "pack_points": 65.0, "elle_loss": 145.0}
    report = gpu_report.Report(parsed("--out", str(tmp_path)), plan, [])
    assert report.seconds_for(plan[0]) == 90
    now[0] = 30.0
    assert report.seconds_for(plan[1]) == 125
    now[0] = 200.0  # it took too long, at the cost of the next
    assert report.seconds_for(plan[2]) == 100
    report.options.dry_run = True
    assert report.seconds_for(plan[2]) == float("inf")


def test_all_tests_and_the_memory_checker_on_request():
    plan = gpu_report.planned(parsed("--all-tests", "--sanitize"))
    assert [part.name for part in plan] == [*(part.name for part in PLAN), "kernels"]
    assert plan[1].seconds > PLAN[1].seconds


# ---- Failures


def test_a_part_that_fails_is_recorded_and_the_rest_goes_on(tmp_path):
    options = parsed("--dry-run", "--out", str(tmp_path))

    def broken(options: Namespace, seconds: float) -> dict[str, Any]:
        raise RuntimeError("it broke")

    def interrupted(options: Namespace, seconds: float) -> dict[str, Any]:
        (tmp_path / "part-third.json").write_text(json.dumps({"rows": {"a": {"launches": 1}}}))
        raise KeyboardInterrupt

    first, second = Part("first", 1, 1.0, broken), Part("second", 1, 1.0, lambda options, seconds: {"launches": 3})
    third = Part("third", 2, 1.0, interrupted)
    report = gpu_report.Report(options, [first, second, third], [])
    report.run(first)
    report.run(second)
    found = json.loads((tmp_path / "stage-1.json").read_text())
    assert found["parts"]["first"]["status"] == "failed"
    assert found["parts"]["second"] | {"seconds": 0} == {
        "status": "done",
        "seconds_given": None,
        "launches": 3,
        "seconds": 0,
    }
    assert found["problems"] == ["first: error: RuntimeError: it broke"]

    # Cut off in the middle, what a part has written is kept.
    with pytest.raises(KeyboardInterrupt):
        report.run(third)
    found = json.loads((tmp_path / "stage-2.json").read_text())
    assert list(found["parts"]) == ["third"]
    assert found["parts"]["third"]["rows"] == {"a": {"launches": 1}}
    assert found["problems"] == ["third: interrupted"]


def test_a_process_that_hangs_is_ended_after_it_was_asked_where_it_is(tmp_path):
    options = parsed("--dry-run", "--out", str(tmp_path))
    text = "import signal, time; signal.signal(signal.SIGINT, signal.default_int_handler); print('begun', flush=True)"
    command = [sys.executable, "-c", f"{text}; time.sleep(100)"]
    status, output = child(options, "step", command, 8.0, interpreted=True)
    assert status is None
    assert output.startswith("begun\n")
    assert output.endswith("KeyboardInterrupt\n")


def test_a_log_is_cut_to_what_may_be_carried(tmp_path, monkeypatch):
    monkeypatch.setattr(processes, "LONGEST_LOG", 100)
    options = parsed("--dry-run", "--out", str(tmp_path))
    _, output = child(options, "step", [sys.executable, "-c", "print('a' * 1000)"], 60.0, interpreted=True)
    assert output == "a" * 1000 + "\n"
    assert (tmp_path / "gpu_report.log").read_text() == "a" * 99 + "\n"
