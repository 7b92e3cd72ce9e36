"""The files in a run's folder: names, the state to resume from, the best weights, the removal of an earlier run's."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

from torch import nn

from elle_fast.recipes import checkpoint, progress
from elle_fast.recipes.config import TrainConfig
from elle_fast.recipes.run import Run

CHECKPOINT, RESULT, PICTURE, PAGE = "checkpoint.pt", "result.json", "curves.png", "report.html"
EPOCHS = "epochs.csv"
# By kind of weights, the checkpoint of the last ones and that of the best.
LAST = {"trained": CHECKPOINT, "averaged": "averaged.pt"}
BEST = {"trained": "best.pt", "averaged": "best_averaged.pt"}


def saved_state(config: TrainConfig, path: Path, resume: bool, overwrite: bool, ranks: int) -> dict[str, Any] | None:
    """The state to begin with, if the run is to be resumed."""
    if path.exists() and not (resume or overwrite):
        ways = "resume it, overwrite it, or choose another folder"
        raise FileExistsError(f"out: {str(path.parent)!r} holds a run; {ways}")
    if not resume:
        return None
    saved = checkpoint.load(path)
    with checkpoint.fitting(path):
        checkpoint.check_same_run(TrainConfig(**saved["config"]).identity(), config.identity(), path)
    checkpoint.check_same_weights(saved, config.weights, path)
    if (processes := 1 + len(saved["other_ranks"])) != ranks:
        raise ValueError(f"checkpoint: expected one of {ranks} processes, got {str(path)!r} of {processes}")
    return saved


def keep_best(folder: Path, run: Run) -> None:
    """Write the checkpoint of each kind of weights of which the epoch that has just ended is the best.

    Behind the run's own checkpoint: a run that is killed in between writes it when it is resumed.
    """
    for weights, name in BEST.items():
        if progress.best_epoch(run.history["epochs"], weights) == run.history["epochs"][-1]["epoch"]:
            run.save_weights(weights, folder / name)


def check_best(folder: Path, run: Run) -> None:
    """Raise as :func:`read_best` unless the best checkpoints that a resumed run's history tells of are there."""
    epochs = run.history["epochs"]
    if epochs and epochs[-1]["step"] == run.step:
        keep_best(folder, run)
    for weights in BEST:
        if progress.best_epoch(epochs, weights) is not None:
            _best_state(folder, run, weights)


def read_best(folder: Path, run: Run, weights: str) -> nn.Module:
    """The best model that a run's history tells of, on the CPU and in eval mode.

    Raises:
        FileNotFoundError: if there is no such file.
        ValueError: if it is damaged, or not of this run and that epoch.
    """
    return checkpoint.model_of(_best_state(folder, run, weights), folder / BEST[weights], model=run.config.model)


def _best_state(folder: Path, run: Run, weights: str) -> dict[str, Any]:
    path, epochs = folder / BEST[weights], run.history["epochs"]
    best = progress.best_epoch(epochs, weights)
    expected = f"the {weights} weights of epoch {best}, the best so far of this run"
    if not path.exists():
        raise FileNotFoundError(f"checkpoint: expected {str(path)!r} with {expected}; there is no such file")
    saved = checkpoint.load(path)
    checkpoint.check_same_run(TrainConfig(**saved["config"]).identity(), run.config.identity(), path)
    found = saved["history"]["epochs"]
    if saved["weights"] != weights or _told(found) != _told(epochs[:best]):
        other = "" if _told(found) == _told(epochs[: len(found)]) else " of another run"
        got = f"the {saved['weights']} weights of epoch {len(found)}{other}"
        raise ValueError(f"checkpoint: expected {expected}, got {str(path)!r} with {got}")
    return saved


def _told(epochs: list[dict[str, Any]]) -> list[Any]:
    # Times to the bit: no other run has these, on the same data or on others. As text, in which NaN is equal to itself.
    names = ("step", "train_adv", "seconds", *progress.CHOSEN_BY.values())
    return [[repr(row.get(name)) for name in names] for row in epochs]


def clear(folder: Path) -> None:
    """Remove an earlier run's files, so that they are not taken for the new one's."""
    for name in (RESULT, PICTURE, PAGE, "steps.csv", EPOCHS, *BEST.values(), LAST["averaged"]):
        (folder / name).unlink(missing_ok=True)
    shutil.rmtree(folder / "tensorboard", ignore_errors=True)
