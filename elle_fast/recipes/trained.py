"""A trained model as `elle-fast export` and `elle_fast.load` find it: in a run's folder or a checkpoint."""

from __future__ import annotations

import json
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from torch import nn

from elle_fast._core import checks
from elle_fast._core.digests import digest_of
from elle_fast.recipes import checkpoint
from elle_fast.recipes.config import TrainConfig
from elle_fast.recipes.folder import BEST, CHECKPOINT, LAST, RESULT
from elle_fast.recipes.loading import FORMAT
from elle_fast.recipes.model_options import ModelOptions
from elle_fast.recipes.provenance import commit, versions

# By name of the option, the file of a run's folder, and what result.json calls it.
WEIGHTS = {
    "last": (LAST["trained"], "last"),
    "best": (BEST["trained"], "best"),
    "averaged": (LAST["averaged"], "averaged"),
    "best_averaged": (BEST["averaged"], "best averaged"),
}
# Where the first weights came from, and how they were trained: of no use to whoever loads the trained ones.
_ORIGINS = {"weights", "pretrained", "new_head", "freeze_norm", "layer_decay"}
# What of a run tells how a model was trained; its paths stay at home.
_TRAINING = ("data", "method", "eps", "norm", "lam", "epochs", "batch_size", "seed")


@dataclass(frozen=True)
class Trained:
    """A model in eval mode on the CPU, and what is known of it."""

    model: nn.Module
    config: TrainConfig
    saved: dict[str, Any]
    path: Path
    """Of the checkpoint."""
    weights: str
    """A name of :data:`WEIGHTS`; the file's name without its ending where it is none of theirs."""
    accuracy: dict[str, dict[str, Any]] | None = None
    """By attack, on test images."""
    attacked_at: tuple[float, str] | None = None
    """Radius and norm of the attacks."""
    test_images: int | None = None
    """How many images the whole test set has; ``None``: it is not known, or the data are a part of it."""

    def about(self) -> dict[str, Any]:
        """All that an export says of the model, as JSON types, without a path of this machine."""
        config, saved = self.config, self.saved
        options = [field.name for field in fields(ModelOptions) if field.name not in _ORIGINS]
        training = {name: getattr(config, name) for name in _TRAINING}
        epochs = saved["history"]["epochs"]
        return {
            "format": FORMAT,
            "model": {name: getattr(config, name) for name in options},
            "shape": saved["shape"],
            "class_names": saved.get("class_names"),
            "input": "float32 [B, *in_shape], pixels in [0, 1]; the normalisation is inside",
            "output": "logits [B, classes]",
            "weights": self.weights,
            "epoch": epochs[-1]["epoch"] if epochs else 0,
            "step": saved["step"],
            "training": training,
            "accuracy": self.accuracy,
            "attacked_at": None
            if self.attacked_at is None
            else dict(zip(("eps", "norm"), self.attacked_at, strict=True)),
            "exported_by": {**versions(), "commit": commit()},
        }


def find(source: Path, weights: str | None = None, evaluation: Path | None = None, model: str | None = None) -> Trained:
    """The model of a run's folder or of a checkpoint.

    Args:
        source: a folder, of which ``weights`` chooses the checkpoint, or a checkpoint.
        weights: a name of :data:`WEIGHTS`; ``None``: ``best`` if there is one, else ``last``.
        evaluation: the JSON file of an evaluation of this checkpoint, which tells more than the run's result.
        model: the network's name, if it is code of another folder.

    Raises:
        FileNotFoundError: if nothing is there, the folder holds no run, or not those weights.
        ValueError: for an unknown name, weights chosen of a single checkpoint, a run without a finished epoch, a
            damaged file, or an evaluation of another checkpoint.
    """
    path = chosen(source, weights)
    built, config, saved = checkpoint.load_model(path, model=model)
    if source.is_dir():
        check_begun(saved, source, path)
    names = {file: name for name, (file, _) in WEIGHTS.items()}
    name = names.get(path.name, path.stem)
    accuracy: dict[str, Any] | None
    if evaluation is not None:
        accuracy, test_images, at = _of_evaluation(evaluation, path)
    else:
        (accuracy, test_images), at = _of_result(path, name, saved), (config.eps, config.norm)
    whole = None if config.test_limit is not None else test_images
    return Trained(built, config, saved, path, name, accuracy, None if accuracy is None else at, whole)


def chosen(source: Path, weights: str | None = None) -> Path:
    """The checkpoint that :func:`find` reads, not yet opened."""
    if weights is not None:
        checks.choice("weights", weights, list(WEIGHTS))
    if not source.is_dir():
        if not source.exists():
            raise FileNotFoundError(f"{source}: expected a run's folder or a checkpoint, got nothing there")
        if weights is not None:
            raise ValueError(f"weights: only a run's folder holds several, and {source} is a file (got {weights!r})")
        return source
    if not (source / CHECKPOINT).is_file():
        raise FileNotFoundError(f"{source}: expected a run's folder with a {CHECKPOINT}, got a folder without one")
    there = [name for name, (file, _) in WEIGHTS.items() if (source / file).is_file()]
    name = weights or ("best" if "best" in there else "last")
    if name not in there:
        raise FileNotFoundError(f"weights: {source} holds {', '.join(there)}, but not {name}")
    return source / WEIGHTS[name][0]


def check_begun(saved: dict[str, Any], folder: Path, path: Path) -> None:
    """Raise a ValueError for a run without a finished epoch."""
    if not saved["history"]["epochs"]:
        raise ValueError(
            f"{folder}: expected a run that has finished an epoch, got one at step {saved['step']} of its first; "
            f"{path} itself can be given"
        )


def _of_result(path: Path, name: str, saved: dict[str, Any]) -> tuple[dict[str, Any] | None, Any]:
    """What ``result.json`` beside a checkpoint says of it, if it does, and of how many test images there are."""
    result = path.with_name(RESULT)
    if name not in WEIGHTS or not result.is_file():
        return None, None
    content = _object(result)
    found = content.get("models", {}).get(WEIGHTS[name][1], {})
    epochs = saved["history"]["epochs"]
    # The run may have gone on, or begun anew, since its result was written.
    if not epochs or found.get("epoch") != epochs[-1]["epoch"]:
        return None, None
    return found.get("accuracy"), content.get("test_images")


def _of_evaluation(evaluation: Path, path: Path) -> tuple[dict[str, Any], Any, tuple[float, str]]:
    found = _object(evaluation)
    if missing := {"accuracy", "eps", "norm", "checkpoint_digest"} - found.keys():
        raise ValueError(
            f"evaluation: expected the JSON file of elle-fast eval on a checkpoint, got {evaluation} without "
            f"{', '.join(sorted(missing))}"
        )
    if (digest := digest_of(path.read_bytes())) != found["checkpoint_digest"]:
        raise ValueError(
            f"evaluation: expected one of {path}, digest {digest}, got {evaluation} of digest "
            f"{checks.shown(found['checkpoint_digest'])}"
        )
    return found["accuracy"], found.get("test_images"), (found["eps"], found["norm"])


def _object(path: Path) -> dict[str, Any]:
    try:
        value = json.loads(path.read_text())
    except ValueError as error:
        raise ValueError(f"{path}: not valid JSON: {error}") from error
    if not isinstance(value, dict):
        raise ValueError(f"{path}: expected a JSON object, got {checks.describe(value)}")
    return value
