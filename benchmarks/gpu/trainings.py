"""The stage of gpu_report.py that trains: whole Short schedules, captured and in bfloat16, attacked afterwards."""

from __future__ import annotations

import importlib.util
import sys
import time
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from benchmarks.gpu.run import Run, recorded
from benchmarks.harness.tables import rounded
from elle_fast.data import Dataset
from elle_fast.presets import FAST
from elle_fast.recipes.checkpoint import load_model
from elle_fast.recipes.config import TrainConfig
from elle_fast.recipes.eval_options import EvalOptions
from elle_fast.recipes.evaluate import evaluate_checkpoint
from elle_fast.recipes.train import train

# The paper's Short setting for CIFAR-10. 256 validation images show a collapse; more would cost minutes over 30 epochs.
SHORT: dict[str, Any] = {
    "model": "preactresnet18",
    "eps": 8 / 255,
    "schedule": "short",
    "epochs": 30,
    "batch_size": 128,
    "augment": True,
    "validation": 256,
    "eval_samples": 1000,
}
TINY: dict[str, Any] = {
    **SHORT,
    "data": "digits",
    "model": "cnn",
    "width": 2,
    "epochs": 1,
    "batch_size": 32,
    "limit": 80,
    "validation": 16,
    "test_limit": 16,
    "eval_samples": 16,
}
# By name, the most telling first; with its target, the seconds of training without evaluation.
FASTEST = "ELLE-A fast"
TRAININGS: dict[str, dict[str, Any]] = {
    FASTEST: {"method": "elle-a", **FAST},
    "FGSM": {"method": "fgsm"},
    "N-FGSM+ELLE-A fast": {"method": "n-fgsm+elle-a", **FAST},
    "ELLE-A fast, 16/255": {"method": "elle-a", "eps": 16 / 255, **FAST},
}
# On each the first attack right after its training, the other one once everything is trained; on tiny models.
ATTACKS, TINY_ATTACKS = ("pgd-50-10", "autoattack"), ("pgd-2-2", "square-5")
# Seconds that the first job of a kind is taken to need, until one has been measured.
FIRST = {"train": 60.0, "pgd-50-10": 15.0, "autoattack": 40.0}
KEPT = ("e_lin", "train_adv", "collapsed_in_epoch", "full_steps", "light_steps")
CURVES = ("train_adv", "val_clean", "val_pgd", "val_e_lin", "lam", "seconds")


def part_trainings(run: Run) -> None:
    """Whole trainings of PreActResNet18 in bfloat16, captured, and attacks on them, as many as there is time for."""
    config = _config(run, {})
    first, *later = TINY_ATTACKS if run.device.dry else ATTACKS
    if importlib.util.find_spec("pyautoattack") is None:
        run.record["error in autoattack"] = "not run: there is no pyautoattack; carry its wheel"
        later = []
    jobs: list[dict[str, Any]] = run.record.setdefault("jobs", jobs_of(first, *later))
    begin = time.monotonic()
    dataset = config.read_data()
    run.record.update(data=config.data, data_seconds=round(time.monotonic() - begin, 1), setting=_setting(run))
    while (job := next_of(jobs)) is not None:
        if (why := _obstacle(job, jobs, run.seconds())) is not None:
            job.update(status="skipped", skipped=why)
            run.save()
            continue
        job["status"] = "running"
        run.save()
        begin = time.monotonic()
        with recorded(job):
            (train_one if job["kind"] == "train" else attack)(run, job, dataset)
        job.update(status="failed" if "error" in job else "done", seconds=round(time.monotonic() - begin, 1))
        run.save()
        run.device.free()  # raises if the device is broken: another process then goes on
        if job["status"] == "failed" and job.get("capture"):
            # A capture that fails may break what comes after it in its process.
            raise RuntimeError(f"the captured training of {job['name']} failed; another process goes on")


def jobs_of(first: str, *later: str) -> list[dict[str, Any]]:
    """All that is to be done, in its order."""
    jobs: list[dict[str, Any]] = []
    for name in TRAININGS:
        jobs += [{"kind": "train", "name": name, "capture": True}, {"kind": first, "name": name}]
    jobs += [{"kind": kind, "name": name} for kind in later for name in TRAININGS]
    return [{**job, "status": "pending"} for job in jobs]


def next_of(jobs: list[dict[str, Any]]) -> dict[str, Any] | None:
    """The next job; a training that failed is tried once more, without a CUDA graph."""
    for place, job in enumerate(jobs):
        if job["status"] == "pending":
            return job
        if job["status"] == "failed" and job.get("capture") and not job.get("again"):
            job["again"] = True
            jobs.insert(place + 1, {"kind": "train", "name": job["name"], "capture": False, "status": "pending"})
            return jobs[place + 1]
    return None


def _obstacle(job: dict[str, Any], jobs: list[dict[str, Any]], left: float) -> str | None:
    """Why a job is not begun: in the seconds that are left it might not end, as far as those before it tell."""
    trained = [each["name"] for each in jobs if each["kind"] == "train" and each["status"] == "done"]
    if job["kind"] != "train" and job["name"] not in trained:
        return "as there is no trained model"
    took = [each["seconds"] for each in jobs if each["kind"] == job["kind"] and "seconds" in each]
    needed = max(took, default=FIRST.get(job["kind"], 0.0))
    return None if left >= needed else f"{left:.0f} s were left, and it may take {needed:.0f}"


def _setting(run: Run) -> dict[str, Any]:
    return {**(TINY if run.device.dry else SHORT), "precision": "bf16"}


def _config(run: Run, own: dict[str, Any]) -> TrainConfig:
    data = {} if run.device.dry else {"data": run.options.data, "root": str(run.options.root)}
    # No checkpoint but at an epoch's end, which is not timed.
    fixed = {"eval_attacks": "clean", "checkpoint_every": 0, "log_every": 100, "device": str(run.device.device)}
    return TrainConfig(**{**_setting(run), **data, **fixed, **own})


def _folder(run: Run, job: dict[str, Any]) -> Path:
    folder: Path = run.options.folder / str(list(TRAININGS).index(job["name"]))
    return folder


def train_one(run: Run, job: dict[str, Any], dataset: Dataset) -> None:
    """Train, and note what it took and found."""
    config = _config(run, {**TRAININGS[job["name"]], "capture": job["capture"]})
    folder, console = _folder(run, job), Console(file=sys.stdout, width=120)
    if not run.device.dry:
        torch.cuda.reset_peak_memory_stats()
    try:
        result = train(config, folder, overwrite=True, dataset=dataset, console=console)
    finally:
        with recorded(job, "error in the checkpoint"):  # also of a training that is cut off
            steps = _epochs_into(job, folder / "checkpoint.pt")
        run.save()
    job.update(
        eps=config.eps,
        training_seconds=round(result["training_seconds"], 2),
        images_per_second=rounded(steps * result["config"]["batch_size"] / result["training_seconds"]),
        peak_bytes=None if run.device.dry else torch.cuda.max_memory_allocated(),
        accuracy={name: found["accuracy"] for name, found in result["accuracy"].items()},
        **{name: result[name] for name in KEPT if name in result},
    )
    # Of the data only the name: the rest of the path is this machine's.
    root = None if config.root is None else Path(config.root).name
    job.update(config={**result["config"], "root": root})


def _epochs_into(job: dict[str, Any], path: Path) -> int:
    """What a training has found so far, epoch by epoch; the number of its steps."""
    if not path.exists():
        return 0
    _, _, saved = load_model(path)
    epochs = saved["history"]["epochs"]
    job["epochs"] = [
        {"epoch": row["epoch"], **{name: rounded(row[name]) for name in CURVES if name in row}} for row in epochs
    ]
    return int(saved["step"])


def attack(run: Run, job: dict[str, Any], dataset: Dataset) -> None:
    """The accuracy of a trained model under an attack."""
    samples = int(_setting(run)["eval_samples"])
    options = EvalOptions(
        checkpoint=_folder(run, job) / "checkpoint.pt",
        attacks=job["kind"],
        samples=samples,
        batch_size=min(500, samples),
        device=str(run.device.device),
        masking_check=False,
    )
    found = evaluate_checkpoint(options, dataset=dataset, console=Console(file=sys.stdout, width=120))["accuracy"]
    job["accuracy"] = {name: numbers["accuracy"] for name, numbers in found.items()}
