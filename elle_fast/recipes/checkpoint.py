"""Checkpoints: written atomically, read with ``weights_only=True``, refused with a clear error if they do not fit."""

from __future__ import annotations

import pickle
import warnings
from dataclasses import fields
from pathlib import Path
from typing import Any

import torch
from torch import nn

from elle_fast._core.files import write_atomically
from elle_fast.data import Dataset
from elle_fast.recipes import models
from elle_fast.recipes.config import TrainConfig

FORMAT = 1
_KEYS = {"format", "config", "shape", "data", "step", "step_counts", "seconds", "model", "optimizer", "history"}
# The first three are those of process 0; other_ranks has the same of each of the others.
_KEYS |= {"rng", "sums", "criterion", "other_ranks"}


def save(path: Path, state: dict[str, Any]) -> None:
    """Write a training state of plain containers, numbers, strings and tensors."""
    write_atomically(path, lambda file: torch.save({"format": FORMAT, **state}, file))


def load(path: Path) -> dict[str, Any]:
    """Read a training state onto the CPU.

    Raises:
        FileNotFoundError: if there is no such file.
        ValueError: if it is truncated, no checkpoint of this project, or of a newer format.
    """
    got = f"got {str(path)!r}"
    another = "read it with the version of elle-fast that wrote it"
    if not path.is_file():
        raise FileNotFoundError(f"checkpoint: expected a file, {got}, where there is none")
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    # What torch.load raises depends on where the damage is: the zip directory, the pickle, or the storage.
    except (RuntimeError, EOFError, ValueError, OSError, KeyError, pickle.UnpicklingError) as error:
        # Torch's own text for an unsafe pickle ends in advice to load it all the same.
        unsafe = isinstance(error, pickle.UnpicklingError)
        reason = "not a file of tensors and plain containers" if unsafe else f"{type(error).__name__}: {error}"
        raise ValueError(f"checkpoint: expected a whole checkpoint, {got}: {reason.splitlines()[0]}") from error
    if not isinstance(state, dict) or "format" not in state:
        raise ValueError(f"checkpoint: expected one written by elle-fast, {got} without a format number")
    if state["format"] != FORMAT:
        raise ValueError(f"checkpoint: expected format {FORMAT}, got {state['format']} in {str(path)!r}; {another}")
    if missing := _KEYS - state.keys():
        raise ValueError(f"checkpoint: expected the entries {sorted(_KEYS)}, {got} without {sorted(missing)}")
    if unknown := state["config"].keys() - {field.name for field in fields(TrainConfig)}:
        expected = "expected settings that this version knows"
        raise ValueError(f"checkpoint: {expected}, {got} with {sorted(unknown)}; {another}")
    return state


def check_same_run(saved: dict[str, Any], asked: dict[str, Any], path: Path) -> None:
    """Raise a ValueError that lists every setting in which a checkpoint differs from the run that resumes it."""
    differing = [
        f"{name} = {asked.get(name)!r} (checkpoint: {saved.get(name)!r})"
        for name in sorted(saved.keys() | asked.keys())
        if saved.get(name) != asked.get(name)
    ]
    if differing:
        listed = "; ".join(differing)
        raise ValueError(f"checkpoint: expected one of the same run, got {str(path)!r} with other {listed}")


def check_same_data(saved: dict[str, Any], dataset: Dataset, digest: str, path: Path, allow_other: bool) -> None:
    """Raise a ValueError unless ``dataset``, of ``digest``, is that of the run.

    ``allow_other`` makes it a warning, if the images have the same shape and there are as many classes.
    """
    shape = saved["shape"]
    for name, expected, got in (
        ("input shape", list(shape["in_shape"]), list(dataset.train.images.shape[1:])),
        ("number of classes", shape["classes"], len(dataset.classes)),
    ):
        if expected != got:
            raise ValueError(f"data: expected the {name} of the training of {str(path)!r}, {expected}, got {got}")
    if digest == saved["data"]:
        return
    differ = (
        f"data: expected those of the training of {str(path)!r}, digest {saved['data']}, got others, digest {digest}"
    )
    if not allow_other:
        why = "another version of Pillow may decode a JPEG one level off"
        raise ValueError(f"{differ}; {why}: --allow-other-data (allow_other_data=True) takes them all the same")
    warnings.warn(differ, stacklevel=4)  # at the caller of `train` or `evaluate_checkpoint`, behind its decorator


def load_model(path: Path) -> tuple[nn.Module, TrainConfig, dict[str, Any]]:
    """The model of a checkpoint, on the CPU and in eval mode, its configuration, and all that :func:`load` read."""
    saved = load(path)
    config = TrainConfig(**saved["config"])
    model = models.build(config.model, width=config.width, **saved["shape"])
    load_weights(model, saved, path)
    return model.eval(), config, saved


def load_weights(model: nn.Module, saved: dict[str, Any], path: Path) -> None:
    """Copy a checkpoint's weights into ``model``; raises ValueError if they do not fit."""
    try:
        model.load_state_dict(saved["model"])
    except RuntimeError as error:
        expected = "expected the weights of this model"
        raise ValueError(f"checkpoint: {expected}, got {str(path)!r} with others: {error}") from error
