"""The trainings of the GPU report: their order, their time, and processes that die."""

from __future__ import annotations

import importlib.util
import json
import time
from argparse import Namespace
from pathlib import Path
from typing import Any

import pytest

from benchmarks.gpu import processes, trainings
from benchmarks.gpu.gpu_report import _parser
from benchmarks.gpu.gpu_tables import problems_of
from benchmarks.gpu.run import Run
from benchmarks.gpu.trainings import FASTEST, TINY_ATTACKS, TRAININGS, part_trainings
from benchmarks.harness.device import Device
from elle_fast.recipes.train import train


class Dataset:
    """Read, and not looked at."""


@pytest.fixture
def made(monkeypatch, tmp_path):
    """A run of the part, whose trainings and attacks do nothing; what they were; the clock."""
    pytest.importorskip("pyautoattack")
    done: list[tuple[str, str, Any]] = []

    class Config:
        data = "digits"

        def read_data(self) -> Dataset:
            return Dataset()

    monkeypatch.setattr(trainings, "_config", lambda run, own: Config())
    for name in ("train_one", "attack"):
        monkeypatch.setattr(
            trainings, name, lambda run, job, dataset: done.append((job["kind"], job["name"], job.get("capture")))
        )
    options = _parser().parse_args(["--dry-run", "--out", str(tmp_path), "--part-seconds", "1000"])
    return Run(Device(dry=True), tmp_path / "part-trainings.json", options), done


def test_the_most_telling_first_and_autoattack_after_all_trainings(made):
    run, done = made
    part_trainings(run)
    first, strongest = TINY_ATTACKS
    assert [kind for kind, _, _ in done] == ["train", first] * 4 + [strongest] * 4
    names = list(TRAININGS)
    assert [name for _, name, _ in done] == [name for name in names for _ in range(2)] + names
    assert names[:2] == [FASTEST, "FGSM"]
    assert problems_of({"status": "done", **run.record}) == []


@pytest.mark.parametrize(
    "seconds,trained,attacked",
    # 84 s a training, 6 its first attack, 16 its second.
    [
        (59, 0, (0, 0)),
        (60, 1, (0, 0)),
        (98, 1, (0, 0)),
        (99, 1, (1, 0)),
        (130, 1, (1, 1)),
        (180, 2, (2, 0)),
        (999, 4, (4, 4)),
    ],
)
def test_what_does_not_fit_into_the_rest_is_not_begun(made, monkeypatch, seconds, trained, attacked):
    run, done = made
    now = [0.0]

    def work(takes: dict[str, float]) -> Any:
        def does(run: Run, job: dict[str, Any], dataset: Any) -> None:
            now[0] += takes[job["kind"]]
            done.append((job["kind"], job["name"], None))

        return does

    # Until it is known what they take.
    first, strongest = TINY_ATTACKS
    monkeypatch.setattr(trainings, "FIRST", {"train": 60.0, first: 15.0, strongest: 40.0})
    monkeypatch.setattr(time, "monotonic", lambda: now[0])
    monkeypatch.setattr(run, "seconds", lambda: seconds - now[0])
    monkeypatch.setattr(trainings, "train_one", work({"train": 84.0}))
    monkeypatch.setattr(trainings, "attack", work({first: 6.0, strongest: 16.0}))
    part_trainings(run)
    kinds = [kind for kind, *_ in done]
    assert (kinds.count("train"), (kinds.count(first), kinds.count(strongest))) == (trained, attacked)
    skipped = [job["skipped"] for job in run.record["jobs"] if job["status"] == "skipped"]
    assert len(skipped) == 12 - len(done)
    assert sum(why == "as there is no trained model" for why in skipped) == 2 * (4 - trained)


def test_a_training_that_fails_is_tried_again_without_a_graph(made, monkeypatch):
    run, done = made

    def fails(run: Run, job: dict[str, Any], dataset: Any) -> None:
        done.append((job["kind"], job["name"], job["capture"]))
        if job["capture"]:
            raise RuntimeError("no graph")

    monkeypatch.setattr(trainings, "train_one", fails)
    for _ in TRAININGS:  # each in a process of its own, as a capture that fails may break the one it is in
        with pytest.raises(RuntimeError, match="another process goes on"):
            part_trainings(run)
    part_trainings(run)
    trained = [(name, captured) for kind, name, captured in done if kind == "train"]
    assert trained == [(name, captured) for name in TRAININGS for captured in (True, False)]
    assert len(problems_of({"status": "done", **run.record})) == 4


def test_a_training_that_is_cut_off_leaves_its_epochs(tmp_path, monkeypatch):
    options = _parser().parse_args(["--dry-run", "--out", str(tmp_path)])
    options.folder = tmp_path
    run = Run(Device(dry=True), tmp_path / "part-trainings.json", options)
    job = {"kind": "train", "name": "FGSM", "capture": False}
    run.record["jobs"] = [job]

    def cut(*given: Any, **more: Any) -> None:
        train(*given, **more)
        raise KeyboardInterrupt

    monkeypatch.setattr(trainings, "train", cut)
    with pytest.raises(KeyboardInterrupt):
        trainings.train_one(run, job, trainings._config(run, {}).read_data())
    (found,) = json.loads((tmp_path / "part-trainings.json").read_text())["jobs"]
    assert [row["epoch"] for row in found["epochs"]] == [1]
    assert 0 <= found["epochs"][0]["val_clean"] <= 1
    assert "error in the checkpoint" not in found


def test_without_pyautoattack_it_is_a_problem(made, monkeypatch):
    run, done = made
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    part_trainings(run)
    assert [kind for kind, *_ in done].count(TINY_ATTACKS[1]) == 0
    (problem,) = problems_of({"status": "done", **run.record})
    assert "there is no pyautoattack" in problem


def test_another_process_goes_on_behind_what_one_died_of(tmp_path, monkeypatch):
    options = _parser().parse_args(["--dry-run", "--out", str(tmp_path)])
    path = tmp_path / "part-trainings.json"
    calls: list[list[str]] = []

    def child(options: Namespace, name: str, command: list[str], seconds: float, **more: Any) -> tuple[int, str]:
        calls.append(command)
        record = json.loads(path.read_text()) if path.exists() else {"jobs": trainings.jobs_of(*TINY_ATTACKS)}
        assert "error" not in record
        assert not any(job["status"] == "running" for job in record["jobs"])
        job = trainings.next_of(record["jobs"])
        assert job is not None
        job["status"] = "running"
        if len(calls) < 3:
            path.write_text(json.dumps({**record, "error": "CUDA error"}))
            return -11, "Segmentation fault"
        for job in record["jobs"]:
            if job["status"] in ("pending", "running"):
                job["status"] = "done"
        path.write_text(json.dumps(record))
        return 0, ""

    monkeypatch.setattr(processes, "child", child)
    found = processes.trainings(options, 1000.0)
    assert len(calls) == 3
    assert [(job["name"], job["capture"], job["status"]) for job in found["jobs"] if job["kind"] == "train"] == [
        (FASTEST, True, "failed"),
        (FASTEST, False, "failed"),
        *[(name, True, "done") for name in list(TRAININGS)[1:]],
    ]
    assert "ended with status -11: Segmentation fault" in found["jobs"][0]["error"]
    assert not path.exists()
    # What was trained in is gone, and was the same for all.
    folders = {command[command.index("--folder") + 1] for command in calls}
    assert len(folders) == 1
    assert not Path(*folders).exists()


def test_a_process_that_dies_at_once_is_not_started_again(tmp_path, monkeypatch):
    options = _parser().parse_args(["--dry-run", "--out", str(tmp_path)])
    calls = []

    def child(*given: Any, **more: Any) -> tuple[int, str]:
        calls.append(given)
        return 1, "ImportError"

    monkeypatch.setattr(processes, "child", child)
    found = processes.trainings(options, 1000.0)
    assert len(calls) == 1
    assert found == {"error": "ended with status 1: ImportError"}


def test_without_data_nothing_is_trained(tmp_path):
    options = _parser().parse_args(["--out", str(tmp_path)])
    found = processes.trainings(options, 1000.0)
    assert found == {"status": "skipped, there is no --root"}
    assert problems_of(found) == []


@pytest.mark.parametrize("name", TRAININGS)
def test_the_configuration_for_a_gpu_is_a_run_of_the_papers_short_setting(name, tmp_path):
    options = _parser().parse_args(["--out", str(tmp_path), "--root", str(tmp_path), "--data", "cifar10"])
    run = Run(Device(dry=True), tmp_path / "part-trainings.json", options)
    run.device.dry = False
    config = trainings._config(run, TRAININGS[name])
    assert (config.model, config.batch_size, config.epochs, config.precision) == ("preactresnet18", 128, 30, "bf16")
    found = config.resolved()
    assert (found.learning_rate, found.momentum, found.weight_decay) == (0.2, 0.9, 5e-4)
    assert 255 * found.eps == pytest.approx(16 if "16/255" in name else 8)
    # Small E_lin is computed in fp32 all the same.
    assert found.triplet_precision == (None if name == "FGSM" else "fp32")
    assert (found.skip_below == 0.01) is (name != "FGSM")
