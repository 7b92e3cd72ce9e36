"""What an evaluation is of: the model of a checkpoint, or one of another origin with weights from a file."""

from __future__ import annotations

import sys
from collections.abc import Collection, Iterable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from torch import nn

from elle_fast import data
from elle_fast._core import checks
from elle_fast._core.digests import digest_of
from elle_fast.evaluation import radius
from elle_fast.recipes import beginning, checkpoint, foreign, models, user_code, weights
from elle_fast.recipes.eval_options import EvalOptions

_LIBRARIES = ("timm", "torchvision", "transformers")  # which the user's own code may build on


@dataclass(frozen=True, eq=False)
class Subject:
    """A model in eval mode on the CPU, which takes pixels in [0, 1], its data, and the ball around them.

    ``name`` is what a report calls it, ``origin`` what a result begins with, ``about`` what tells its outcomes from
    those of another model or other data, and ``run`` what is known of its training.
    """

    model: nn.Module
    dataset: data.Dataset
    name: str
    origin: dict[str, Any]
    about: dict[str, Any]
    run: dict[str, Any]
    eps: float
    norm: str
    remarks: list[str]
    foreign: bool


def read(options: EvalOptions, dataset: data.Dataset | None, given: Collection[str] | None) -> Subject:
    """The model and the data that the options ask for; arguments and errors as those of ``evaluate_checkpoint``."""
    if given is None:
        given = options.source_options()
        if options.checkpoint is None and (options.weights is not None or options.pretrained):
            given = {*given, "model"}  # also the one by default: a caller from Python need not have typed it
    if options.checkpoint is not None:
        return _of_checkpoint(options, options.checkpoint, dataset, given)
    return _of_weights(options, dataset, given)


def _of_checkpoint(options: EvalOptions, path: Path, dataset: data.Dataset | None, given: Collection[str]) -> Subject:
    model, config, saved = checkpoint.load_model(path, model=options.model if "model" in given else None)
    moved = replace(config, **options.of_checkpoint(config, given))
    dataset = _checked(moved.read_data() if dataset is None else dataset)
    if dataset.name != config.data:
        raise ValueError(f"data: expected the name of the training of {str(path)!r}, {config.data}, got {dataset.name}")
    digest = dataset.digest()
    checkpoint.check_same_data(saved, dataset, digest, path, options.allow_other_data)
    of_data = {"name": dataset.name, "digest": digest}
    if digest != saved["data"]:
        of_data["digest_of_training"] = saved["data"]
    norm = config.norm if options.norm is None else options.norm
    return Subject(
        model,
        dataset,
        f"{config.model}, {config.method}",
        {"checkpoint": str(path)},
        {"checkpoint_digest": digest_of(path.read_bytes()), "data": of_data, **_code(config.model)},
        {"method": config.method, "weights": saved["weights"], "step": saved["step"]},
        radius(config.eps if options.eps is None else options.eps, norm),
        norm,
        [],
        foreign=False,
    )


def _of_weights(options: EvalOptions, dataset: data.Dataset | None, given: Collection[str]) -> Subject:
    if "model" not in given:
        if options.weights is not None:
            raise ValueError(f"model: expected the name of the network whose weights {options.weights!r} are, got none")
        raise ValueError("checkpoint: expected a file, or a model with weights, got neither")
    options.check_model()
    own_code = options.model not in models.NAMES and not foreign.from_library(options.model)
    if options.weights is None and not options.pretrained and not own_code:
        raise ValueError(f"weights: expected a file, or pretrained, with model {options.model!r}, got neither")
    if options.new_head:
        raise ValueError("new_head: a fresh last layer has nothing to evaluate, so this option does not apply")
    if options.eps is None:
        raise ValueError("eps: expected a radius such as 8/255, as there is no training to take it from, got None")
    norm = "linf" if options.norm is None else options.norm
    eps = radius(options.eps, norm)
    if not options.normalize and options.statistics() != (None, None):
        raise ValueError("mean, std: expected none without normalize, got some")
    found = None if options.weights is None else weights.read(checks.path("weights", options.weights))
    dataset = _checked(options.read_data() if dataset is None else dataset)
    in_shape, classes = dataset.test.in_shape, len(dataset.classes)
    built: dict[str, Any] = {"width": options.width, "args": options.model_args, "small_images": options.small_images}
    net = models.build(options.model, in_shape=in_shape, classes=classes, pretrained=options.pretrained, **built)
    if found is not None:
        weights.load_state(net, found.state, str(options.weights), classes=classes, new_head="none")
    mean, std, source = _statistics(options, net, in_shape[0], found)
    model = models.normalized(net, in_shape, mean, std).eval()
    remarks = [] if source is None else [beginning.normalises(mean, std, source)]
    about = {
        "model": {"name": options.model, **_of_network(options), "mean": mean, "std": std},
        "weights_digest": _digest(model),
        "data": {"name": dataset.name, "digest": dataset.digest()},
        **_code(options.model),
    }
    origin = {"checkpoint": None, "weights_file": options.weights}
    name = options.model if options.weights is None else f"{options.model} with {Path(options.weights).name}"
    return Subject(model, dataset, name, origin, about, {}, eps, norm, remarks, foreign=True)


def _statistics(
    options: EvalOptions, net: nn.Module, channels: int, found: weights.Weights | None
) -> tuple[beginning.Numbers, beginning.Numbers, str | None]:
    """Mean and std to normalize with in front of the network, if any, and who says so."""
    mean, std = options.statistics()
    if mean is not None or std is not None:
        return mean or [0.0] * channels, std or [1.0] * channels, "--mean and --std"
    if not options.normalize:
        beginning.check_contradiction(options, net, channels, found)
        return None, None, None
    return beginning.statistics(options, net, channels, found)


def _of_network(options: EvalOptions) -> dict[str, Any]:
    """What of the options decides how the network is built, but for its name."""
    return {name: value for name in ("width", "model_args", "small_images") if (value := getattr(options, name))}


def _code(name: str) -> dict[str, Any]:
    """What tells the code of a network that is none of ours from another version of it, which may compute otherwise."""
    if name in models.NAMES:
        return {}
    if foreign.from_library(name):
        return {"code": _versions([name.partition(":")[0]])}
    return {"code": {"digest": user_code.source_digest(name), **_versions(_LIBRARIES)}}


def _versions(libraries: Iterable[str]) -> dict[str, str]:
    """Of those that are loaded."""
    return {each: str(getattr(sys.modules[each], "__version__", None)) for each in libraries if each in sys.modules}


def _checked(dataset: Any) -> data.Dataset:
    if not isinstance(dataset, data.Dataset):
        raise TypeError(f"dataset: expected None or a Dataset, got {checks.describe(dataset)}")
    return dataset


def _digest(model: nn.Module) -> str:
    """Of all weights and buffers, with their names: whatever the file is that they come from."""
    parts: list[Any] = []
    for name, value in model.state_dict().items():
        parts += [f"{name} {value.dtype} {list(value.shape)}".encode(), value]
    return digest_of(*parts)
