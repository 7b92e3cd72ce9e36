"""What the folder of a run tells of it: its options, a row for each epoch, its verdict and its final numbers."""

from __future__ import annotations

import csv
import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

from elle_fast._core import checks
from elle_fast._core.files import naming
from elle_fast.recipes import checkpoint
from elle_fast.recipes.folder import CHECKPOINT, EPOCHS, RESULT

_NEEDED = {"data", "method", "eps", "norm", "seed", "epochs"}  # of the options
_OF_AN_EPOCH = {"step", "epoch", "seconds"}
_RESULT: dict[str, type | tuple[type, ...]] = {"config": dict, "models": dict, "training_seconds": (int, float)}
# Of the origin of a result, what may differ between runs.
_ORIGIN = ("machine", "versions", "commit", "processes")


@dataclass(frozen=True)
class Record:
    """One run.

    Attributes:
        name: that of its folder, or its path where another run's folder has the same name.
        config: its options by name.
        epochs: the rows of ``epochs.csv``.
        step: the optimiser steps it has taken.
        seconds: of training.
        alarms: of its guard.
        models: what ``result.json`` has of each kind of weights; empty if the run is not finished.
        origin: machine, versions and commit, as one level of names; empty if the run is not finished.
    """

    name: str
    config: dict[str, Any]
    epochs: list[dict[str, Any]]
    step: int
    seconds: float
    alarms: list[dict[str, Any]]
    models: dict[str, dict[str, Any]]
    origin: dict[str, Any]

    def epoch_of(self, step: float) -> float:
        """How many epochs had passed after so many steps, by the steps at which epochs ended."""
        ends = [(0, 0), *((row["step"], row["epoch"]) for row in self.epochs)]
        for (before, epoch), (after, following) in pairwise(ends):
            if before <= step < after:
                return float(epoch + (following - epoch) * (step - before) / (after - before))
        return float(ends[-1][1])


def of_result(name: str, result: dict[str, Any], epochs: list[dict[str, Any]]) -> Record:
    """A finished run, from what :func:`~elle_fast.recipes.train.train` returns and its rows."""
    origin: dict[str, Any] = {}
    for key in _ORIGIN:
        value = result.get(key)
        origin |= value if isinstance(value, dict) else {key: value}
    return Record(
        name,
        result["config"],
        epochs,
        step=int(epochs[-1]["step"]) if epochs else 0,
        seconds=result["training_seconds"],
        alarms=result.get("alarms", []),
        models=result["models"],
        origin=origin,
    )


def read_all(folders: Sequence[Path]) -> list[Record]:
    """The runs in these folders, in their order.

    Raises:
        FileNotFoundError, ValueError: naming what is no folder of a run, a folder that is there twice, or a damaged
            file.
        OSError: for a file that cannot be read.
    """
    if not folders:
        raise ValueError("runs: expected the folder of at least one run, got none")
    places = [folder.resolve() for folder in folders]
    for number, (folder, place) in enumerate(zip(folders, places, strict=True)):
        if place in places[:number]:
            raise ValueError(f"runs: expected each run once, got {str(folder)!r} twice")
    names = [place.name for place in places]
    return [
        _read(folder, place.name if names.count(place.name) == 1 else str(folder))
        for folder, place in zip(folders, places, strict=True)
    ]


def _read(folder: Path, name: str) -> Record:
    expected = f"runs: expected the folder of a run of elle-fast train, got {str(folder)!r}"
    if not folder.exists():
        raise FileNotFoundError(f"{expected}, which does not exist")
    if not folder.is_dir():
        raise ValueError(f"{expected}, a file; elle-fast eval makes the page of an evaluation, with --report")
    if (folder / RESULT).exists():
        return of_result(name, _read_result(folder / RESULT), _read_rows(folder / EPOCHS))
    if not (folder / CHECKPOINT).exists():
        inside = sorted(path.parent.name for path in folder.glob(f"*/{CHECKPOINT}"))
        near = f"; there are runs in it: {', '.join(inside[:3])}" if inside else ""
        raise FileNotFoundError(f"{expected}, with neither {RESULT} nor {CHECKPOINT}{near}")
    saved = checkpoint.load(folder / CHECKPOINT)
    rows = saved["history"]["epochs"]
    return Record(
        name,
        saved["config"],
        rows,
        step=saved["step"],
        seconds=saved["seconds"] + sum(row["seconds"] for row in rows),
        alarms=saved["guard"].get("alarms", []),
        models={},
        origin={},
    )


def _read_result(path: Path) -> dict[str, Any]:
    """A run's ``result.json``, with all that is read of it."""
    expected = f"runs: expected the result of a run, got {str(path)!r}"
    with naming(path):
        content = path.read_bytes()
    try:
        found = json.loads(content)
    except ValueError as error:
        raise ValueError(f"{expected}, which is no JSON: {error}") from error
    try:
        for name, kind in _RESULT.items():
            if not isinstance(found[name], kind):
                raise TypeError(f"{name} is {checks.describe(found[name])}")
        if missing := _NEEDED - found["config"].keys():
            raise KeyError(f"config: {sorted(missing)[0]}")
        checks.real("eps", found["config"]["eps"], low=0)
        for model in found["models"].values():
            for numbers in model["accuracy"].values():
                checks.real("accuracy", numbers["accuracy"], low=0, high=1)
        for alarm in found.get("alarms", []):
            checks.integer("alarms: step", alarm["step"], low=0)
            if not isinstance(alarm["signal"], str):
                raise TypeError(f"alarms: signal is {checks.describe(alarm['signal'])}")
    except KeyError as error:
        raise ValueError(f"{expected} without {error.args[0]!r}") from error
    except (AttributeError, TypeError, ValueError) as error:
        raise ValueError(f"{expected}, which does not fit: {error}") from error
    return dict(found)


def _read_rows(path: Path) -> list[dict[str, Any]]:
    """The rows of a run's ``epochs.csv``."""
    expected = f"runs: expected a row for each epoch, got {str(path)!r}"
    with naming(path):
        text = path.read_bytes().decode(errors="replace")
    rows = []
    for line, row in enumerate(csv.DictReader(text.splitlines()), 2):
        try:
            rows.append({name: _number(value) for name, value in row.items() if value})
            if missing := _OF_AN_EPOCH - rows[-1].keys():
                raise ValueError(f"no {sorted(missing)[0]}")
            for name in _OF_AN_EPOCH:
                checks.real(name, rows[-1][name], low=0)
        except (TypeError, ValueError) as error:
            raise ValueError(f"{expected} with another line {line}: {error}") from error
    if not rows:
        raise ValueError(f"{expected} without any")
    return rows


def _number(text: str) -> float | bool:
    return {"True": True, "False": False}[text] if text in ("True", "False") else float(text)


def finite(row: dict[str, Any], name: str) -> float | None:
    """A number of a row, if it is there and finite."""
    value = row.get(name)
    return float(value) if value is not None and math.isfinite(value) else None
