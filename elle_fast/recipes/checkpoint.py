"""Checkpoints: written atomically, read with ``weights_only=True``, refused with a clear error if they do not fit.

A file is what :func:`torch.save` writes, followed by a digest of it, so that no damaged bit is ever used.
"""

from __future__ import annotations

import io
import os
import pickle
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import fields
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from elle_fast._core import checks
from elle_fast._core.digests import digest_of
from elle_fast._core.files import naming, write_atomically
from elle_fast.data import Dataset
from elle_fast.data.memory import STREAMED
from elle_fast.recipes import foreign, models
from elle_fast.recipes.config import TrainConfig
from elle_fast.recipes.progress import CHOSEN_BY

FORMAT = 5
StrPath = str | os.PathLike[str]

# What each process has of its own; a checkpoint holds that of process 0, and in other_ranks that of the others.
_OWN = {"rng": dict, "sums": dict, "criterion": dict}
_ENTRIES = {
    **{"config": dict, "shape": dict, "data": str, "step": int, "step_counts": dict, "seconds": float},
    **{"weights": str, "model": dict, "average": dict, "optimizer": dict, "scaler": dict, "guard": dict},
    **{"history": dict, **_OWN, "other_ranks": list},
}
_KEYS = {"format", *_ENTRIES}
# Empty in a file of weights that cannot be resumed.
OF_A_RUN = ("average", "optimizer", "scaler", "guard", *_OWN)
# What a run, its picture and its result read of the rows of the history.
_ROWS = {
    "steps": {"step"},
    "epochs": {"step", "epoch", "train_adv", "seconds"},
}
_WATCHED = {"val_clean", "val_pgd", "val_e_lin", "collapsed"}  # and these of the epochs, with validation images
_SUMS = {"loss", "correct", "samples", "steps"}
_MARK, _DIGITS = b"\nelle-fast, digest of all before this line: ", 32


def save(path: StrPath, state: dict[str, Any]) -> None:
    """Write a training state of plain containers, numbers, strings and tensors; raises OSError, naming the file."""
    if not isinstance(state, dict):
        raise TypeError(f"state: expected a dictionary, got {checks.describe(state)}")
    # In memory first: torch hides the cause when a disk is full.
    buffer = io.BytesIO()
    torch.save({"format": FORMAT, **state}, buffer)
    content = buffer.getvalue()
    write_atomically(
        checks.path("path", path), lambda file: file.writelines([content, _MARK, digest_of(content).encode()])
    )


def load(path: StrPath) -> dict[str, Any]:
    """Read a training state onto the CPU.

    Raises:
        FileNotFoundError: if there is no such file.
        ValueError: if it is cut off or damaged, no checkpoint of this project, of another format, or holds what no run
            could have written, such as weights that are not finite. The message names the file.
    """
    path = checks.path("path", path)
    got = f"got {str(path)!r}"
    another = "read it with the version of elle-fast that wrote it"
    if not path.is_file():
        raise FileNotFoundError(f"checkpoint: expected a file, {got}, where there is none")
    with naming(path), path.open("rb") as file:
        content = file.read(max(0, path.stat().st_size - len(_MARK) - _DIGITS))
        end = file.read()
    if not end.startswith(_MARK):
        why = "it was cut off, or another version or program wrote it"
        raise ValueError(f"checkpoint: expected a whole checkpoint, {got} without a digest at its end: {why}")
    if end != _MARK + digest_of(content).encode():
        raise ValueError(f"checkpoint: expected a whole checkpoint, {got}, which is damaged: its digest does not fit")
    with fitting(path):
        state = torch.load(io.BytesIO(content), map_location="cpu", weights_only=True)
        if not isinstance(state, dict) or "format" not in state:
            raise ValueError(f"checkpoint: expected one written by elle-fast, {got} without a format number")
        if state["format"] != FORMAT:
            raise ValueError(f"checkpoint: expected format {FORMAT}, got {state['format']} in {str(path)!r}; {another}")
        if missing := _KEYS - state.keys():
            raise ValueError(f"checkpoint: expected the entries {sorted(_KEYS)}, {got} without {sorted(missing)}")
        if unknown := {*state["config"]} - {field.name for field in fields(TrainConfig)}:
            expected = "expected settings that this version knows"
            raise ValueError(f"checkpoint: {expected}, {got} with {sorted(unknown)}; {another}")
        _check_content(state)
    return state


@contextmanager
def fitting(path: Path) -> Iterator[None]:
    """Whatever a checkpoint's content raises inside is a ValueError that names the file."""
    try:
        yield
    except (ArithmeticError, AssertionError, AttributeError, EOFError, LookupError, RuntimeError, TypeError) as error:
        raise _unfit(path, f"{type(error).__name__}: {error}") from error
    except pickle.UnpicklingError as error:  # torch's own text ends in advice to load it all the same
        raise _unfit(path, "not a file of tensors and plain containers") from error
    except ValueError as error:
        if str(error).startswith("checkpoint: "):
            raise
        raise _unfit(path, str(error)) from error


def _unfit(path: Path, reason: str) -> ValueError:
    first = (reason.splitlines() or [""])[0]
    return ValueError(f"checkpoint: expected a whole checkpoint, got {str(path)!r}: {first}")


def _check_content(state: dict[str, Any]) -> None:
    """Raise for containers of another type, numbers out of range, and rows that lack what is read of them."""
    places: list[tuple[Any, Any]] = [(state, _ENTRIES), *((own, _OWN) for own in state["other_ranks"])]
    for place, entries in places:
        for name, kind in entries.items():
            if not isinstance(place[name], kind):
                raise TypeError(f"{name}: expected a {kind.__name__}, got {checks.describe(place[name])}")
        if missing := _SUMS - place["sums"].keys() if place["sums"] else ():
            raise ValueError(f"sums: expected none or all, got them without {sorted(missing)}")
        for name, value in place["sums"].items():
            if not isinstance(value, Tensor) or value.dim() != 0:
                raise TypeError(f"sums: expected 0-dim tensors, got {name} as {checks.describe(value)}")
    config = TrainConfig(**state["config"])
    rows = _ROWS if config.validation == 0 else _ROWS | {"epochs": _ROWS["epochs"] | _WATCHED}
    checks.choice("weights", state["weights"], list(CHOSEN_BY))
    checks.integer("step", state["step"], low=0)
    checks.real("seconds", state["seconds"], low=0)
    for name, count in state["step_counts"].items():
        checks.integer(f"step_counts: {name}", count, low=0)
    for name, value in state["scaler"].items():
        checks.real(f"scaler: {name}", value, low=0)
    if state["shape"].keys() != {"in_shape", "classes", "mean", "std"}:
        raise ValueError(f"shape: expected in_shape, classes, mean and std, got {sorted(state['shape'])}")
    if not isinstance(state.get("initial_weights", ""), str):  # files of before have none
        raise TypeError(f"initial_weights: expected a digest, got {checks.describe(state['initial_weights'])}")
    sizes = state["shape"]["in_shape"]
    if not isinstance(sizes, list) or not all(type(size) is int and size > 0 for size in sizes):
        raise ValueError(f"shape: expected in_shape as a list of sizes, got {checks.describe(sizes)}")
    for group, needed in rows.items():
        for row in _list(f"history: {group}", state["history"][group]):
            if missing := needed - row.keys():
                raise ValueError(
                    f"history: expected rows of {group} with {sorted(needed)}, got one without {sorted(missing)}"
                )
            for name, value in row.items():
                if not isinstance(value, (int, float)):
                    raise TypeError(f"history: {name}: expected numbers, got {checks.describe(value)}")
    for name in ("model", "average", "optimizer", "criterion", "guard", "other_ranks"):
        _check_finite(name, [own["criterion"] for own in state[name]] if name == "other_ranks" else state[name])


def _list(name: str, value: Any) -> list[Any]:
    if not isinstance(value, list):
        raise TypeError(f"{name}: expected a list, got {checks.describe(value)}")
    return value


def _check_finite(name: str, value: Any) -> None:
    """Raise a ValueError for a tensor in nested containers that has an infinite number or a NaN."""
    if isinstance(value, (dict, list)):
        for key, item in value.items() if isinstance(value, dict) else enumerate(value):
            _check_finite(f"{name}.{key}", item)
    elif isinstance(value, Tensor) and not value.isfinite().all():
        raise ValueError(f"{name}: expected finite numbers, got others")


def check_same_run(saved: dict[str, Any], asked: dict[str, Any], path: StrPath) -> None:
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
        ("input shape", list(shape["in_shape"]), list(dataset.train.in_shape)),
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
        if dataset.streamed != saved["data"].startswith(STREAMED):
            how = "in memory" if dataset.streamed else "while they were needed"
            why = f"the pictures of the training were read {how}, which --stream decides"
        raise ValueError(f"{differ}; {why}: --allow-other-data (allow_other_data=True) takes them all the same")
    warnings.warn(differ, stacklevel=4)  # at the caller of `train` or `evaluate_checkpoint`, behind its decorator


def check_same_weights(saved: dict[str, Any], weights: str | None, path: StrPath) -> None:
    """Raise a ValueError if a run that resumes names a file of weights other than the one that its checkpoint's did.

    The file is not needed any more, so one that is gone is not looked at.
    """
    began = saved.get("initial_weights", "")
    file = None if weights is None else Path(weights)
    if file is not None and began and not file.exists():
        return
    got = digest_of(file.read_bytes()) if file is not None and file.is_file() else ""
    if got != began:
        expected, got = (f"weights of digest {each}" if each else "fresh weights" for each in (began, got))
        raise ValueError(f"weights: expected what {str(path)!r} began with, {expected}, got {got} ({weights})")


def load_model(path: StrPath, *, model: str | None = None) -> tuple[nn.Module, TrainConfig, dict[str, Any]]:
    """The model of a checkpoint, on the CPU and in eval mode, its configuration, and all that :func:`load` read.

    Neither the weights that it began with nor a network are needed. A model of ``package.module:callable`` is built by
    that code, which has to be there. It is called only if the
    caller names it too, as ``model``, since a checkpoint from somebody else could name any function.

    Raises:
        FileNotFoundError, ImportError, TypeError, ValueError: as :func:`load` and :func:`models.build`.
    """
    saved, path = load(path), checks.path("path", path)
    return model_of(saved, path, model=model), TrainConfig(**saved["config"]), saved


def model_of(saved: dict[str, Any], path: Path, *, model: str | None = None) -> nn.Module:
    """The model of what :func:`load` read, on the CPU and in eval mode; raises as :func:`load_model`."""
    config = TrainConfig(**saved["config"])
    name, own = models.check_name(config.model), config.model in models.NAMES
    code = not own and not foreign.from_library(name)
    if code and model != name:
        raise ValueError(
            f"model: {str(path)!r} is to be built by the function {name!r}; a file from somebody else could name "
            f"any, so to trust it name it too: --model {name}, or model={name!r}"
        )
    options: dict[str, Any] = {"width": config.width, "args": config.model_args, "small_images": config.small_images}
    # What another library or the user's code says of its own is no fault of the file.
    with fitting(path) if own else nullcontext(), torch.device("cpu"):
        built = models.build(name, **options, **saved["shape"])
    load_weights(built, saved, path)
    return built.eval()


def load_weights(model: nn.Module, saved: dict[str, Any], path: StrPath) -> None:
    """Copy a checkpoint's weights into ``model``; raises ValueError if they do not fit."""
    with fitting(checks.path("path", path)):
        try:
            model.load_state_dict(saved["model"])
        except RuntimeError as error:
            expected = "expected the weights of this model"
            raise ValueError(f"checkpoint: {expected}, got {str(path)!r} with others: {error}") from error
