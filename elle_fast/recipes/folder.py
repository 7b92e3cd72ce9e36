"""The files in a run's folder: their names, the state to resume from, and the removal of an earlier run's."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

from elle_fast.recipes import checkpoint, progress
from elle_fast.recipes.config import TrainConfig

CHECKPOINT, RESULT, PICTURE = "checkpoint.pt", "result.json", "curves.png"
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
    if (processes := 1 + len(saved["other_ranks"])) != ranks:
        raise ValueError(f"checkpoint: expected one of {ranks} processes, got {str(path)!r} of {processes}")
    return saved


def check_best(folder: Path, epochs: list[dict[str, Any]]) -> None:
    """Raise FileNotFoundError unless the best checkpoints that a history tells of are there."""
    for weights, name in BEST.items():
        best = progress.best_epoch(epochs, weights)
        if best is not None and not (folder / name).exists():
            raise FileNotFoundError(
                f"checkpoint: expected {str(folder / name)!r} with the {weights} weights of epoch {best}, the best so "
                "far of the run to be resumed; there is no such file"
            )


def clear(folder: Path) -> None:
    """Remove an earlier run's files, so that they are not taken for the new one's."""
    for name in (RESULT, PICTURE, "steps.csv", "epochs.csv", *BEST.values(), LAST["averaged"]):
        (folder / name).unlink(missing_ok=True)
    shutil.rmtree(folder / "tensorboard", ignore_errors=True)
