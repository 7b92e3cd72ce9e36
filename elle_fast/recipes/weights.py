"""Weights from a file: safetensors, a state dict, or a checkpoint of ``elle-fast train``."""

from __future__ import annotations

import io
import pickle
from collections.abc import Mapping
from importlib import import_module
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from elle_fast._core import checks
from elle_fast._core.digests import digest_of
from elle_fast._core.files import naming

_ENTRIES = ("state_dict", "model_state_dict", "model")
_PREFIXES = ("module.", "_orig_mod.")  # of DistributedDataParallel, and of torch.compile
_NORMALIZE, _NET = "normalize.", "net."  # what models.normalized puts in front, and the network behind it
_MODEL = "model."  # within foreign.Logits
_STATISTICS = (f"{_NORMALIZE}mean", f"{_NORMALIZE}std")
_FLOATING = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
_NAMED = 3  # names of weights in a message

State = dict[str, Tensor]
Statistics = tuple[list[float] | None, list[float] | None]


class Weights(NamedTuple):
    """The weights of a network without its normalisation, and what else the file says.

    ``statistics`` are, of a checkpoint of ``elle-fast train``, the mean and std of its normalisation, or ``None`` twice
    if it has none; ``None`` of any other file, of which :func:`statistics` tells. ``digest`` is that of the file.
    """

    state: State
    digest: str
    statistics: Statistics | None


def read(path: Path) -> Weights:
    """Read a file's weights onto the CPU.

    Safetensors are known by the ending ``.safetensors``. All other files are read by :func:`torch.load` with
    ``weights_only=True``, so that no code in them runs; the weights are the file's mapping, or its entry
    ``state_dict``, ``model_state_dict`` or ``model``. The prefixes ``module.`` and ``_orig_mod.`` are taken off.

    Raises:
        FileNotFoundError, ImportError, OSError: if the file is not there or cannot be read, or safetensors is missing.
        ValueError: naming the file, if it is damaged or holds anything else, numbers that are not finite, or of another
            floating type than float16, bfloat16, float32 and float64.
    """
    if not path.is_file():
        raise FileNotFoundError(f"weights: expected a file, got {str(path)!r}, where there is none")
    with naming(path):
        content = path.read_bytes()
    found = _safetensors(content, path) if path.suffix == ".safetensors" else _torch_file(content, path)
    statistics = None
    if {"format", "config", "shape", "model"} <= found.keys():
        from elle_fast.recipes import checkpoint  # it needs models, and models this file

        saved = checkpoint.load(path)  # which checks its digest
        found, statistics = saved["model"], (saved["shape"]["mean"], saved["shape"]["std"])
    for entry in _ENTRIES:
        if isinstance(found.get(entry), Mapping):
            found = found[entry]
            break
    if not found or not all(isinstance(name, str) and isinstance(value, Tensor) for name, value in found.items()):
        other = next((name for name, value in found.items() if not isinstance(value, Tensor)), None)
        got = "an empty one" if other is None else f"{checks.describe(found[other])} as {checks.shown(other)}"
        raise ValueError(f"weights: expected tensors by name in {str(path)!r}, got {got}")
    state = _without_prefixes(dict(found))
    for name, value in state.items():
        if value.is_floating_point() and value.dtype not in _FLOATING:
            kinds = ", ".join(str(each).removeprefix("torch.") for each in _FLOATING)
            raise ValueError(
                f"weights: expected one of {kinds} in {str(path)!r}, got {value.dtype} in {name}; convert it first"
            )
    if bad := [name for name, value in state.items() if value.is_floating_point() and not value.isfinite().all()]:
        raise ValueError(f"weights: expected finite numbers in {str(path)!r}, got others in {listed(bad)}")
    return Weights(state, digest_of(content), statistics)


def load_weights(model: nn.Module, file: str | Path, *, classes: int | None = None, new_head: bool = False) -> str:
    """Copy a file's weights, as :func:`read` finds them, into ``model``; returns the file's digest.

    Args:
        model: as :func:`elle_fast.recipes.models.build` made it, or any module with weights of these names.
        file: safetensors, a state dict, or a checkpoint of ``elle-fast train``.
        classes: of the model, so that an error can tell a head for others.
        new_head: keep the fresh weights of the last layer.

    Raises:
        FileNotFoundError, ImportError, OSError, ValueError: as :func:`read`, and for weights of another network, naming
            the file and the first of them that are missing, unexpected or of another shape.
    """
    path = checks.path("weights", file)
    found = read(path)
    load_state(model, found.state, str(path), classes=classes, new_head="all" if new_head else "none")
    return found.digest


def load_state(model: nn.Module, state: State, source: str, *, classes: int | None, new_head: str) -> list[str]:
    """Copy a state dict into the network inside ``model``; returns the names that keep their fresh weights.

    Args:
        model: behind a normalisation or not. That of the state, if any, replaces it, and is left out if there is none.
        state: with the names of the network's own, or of ``model``'s.
        source: for the message.
        classes: of the model.
        new_head: ``"none"``, ``"all"``: the last layer is left fresh, ``"other"``: only if it has other shapes.

    Raises:
        ValueError: for weights of another network, naming ``source``.
    """
    net, given = network_of(model), dict(state)
    own = net.state_dict()
    normalisation = {name: given.pop(name) for name in _STATISTICS if name in given and name not in own}
    state = given
    for prefix in (_NET, _MODEL):  # what is around the network in a checkpoint, where the network has no such names
        if all(name.startswith(prefix) for name in state) and not any(name.startswith(prefix) for name in own):
            state = {name.removeprefix(prefix): value for name, value in state.items()}
    differing = [name for name in own if name in state and own[name].shape != state[name].shape]
    head = _head(net, own, classes)
    # A head for other classes: the same shape but for the first dimension. Some networks have two.
    sized = [name for name in differing if own[name].shape[:1] == (classes,)]
    heads = {name for name in sized if own[name].shape[1:] == state[name].shape[1:] and state[name].dim()}
    if new_head == "all" and not heads | head:
        raise ValueError(
            f"new_head: expected a linear layer or a convolution with {classes} outputs, got a network without"
        )
    if new_head == "all" or (new_head == "other" and heads):
        left = [name for name in own if name in heads | head]
        state = {name: value for name, value in state.items() if name not in left}
    else:
        left = []
    missing = [name for name in own if name not in state and name not in left]
    missing = [name for name in missing if not name.endswith("num_batches_tracked")]  # often left out
    unexpected = [name for name in state if name not in own]
    differing = [name for name in differing if name in state]
    kinds = [
        f"{name} {state[name].dtype} in place of {value.dtype}"
        for name, value in own.items()
        if name in state and value.is_floating_point() and not state[name].is_floating_point()
    ]
    if differing and not missing and not unexpected and set(differing) <= heads:
        count = state[differing[0]].shape[0]
        raise ValueError(
            f"weights: expected a head of {classes} classes, got {source} with {differing[0]} for {count}; new_head "
            "(--new-head) begins with a fresh one"
        )
    if missing or unexpected or differing or kinds:
        shapes = [f"{name} {list(state[name].shape)} in place of {list(own[name].shape)}" for name in differing]
        parts = {"missing": missing, "unexpected": unexpected, "of another shape": shapes, "of another type": kinds}
        said = "; ".join(f"{kind}: {listed(names)}" for kind, names in parts.items() if names)
        raise ValueError(f"weights: expected those of this network, got {source} with {said}")
    before = model.state_dict()
    fitting = {name: value for name, value in normalisation.items() if net is not model and name in before}
    if fitting:
        mean, std = _statistics(normalisation, before[_STATISTICS[0]].numel(), source)
        fitting = {
            name: torch.tensor(values, dtype=torch.float32, device="cpu").view_as(before[name])
            for name, values in zip(_STATISTICS, (mean, std), strict=True)
        }
    net.load_state_dict(state, strict=False)
    model.load_state_dict(fitting, strict=False)
    return left


def statistics(found: Weights, net: nn.Module, channels: int, source: str) -> Statistics | None:
    """Mean and std that a file's weights were trained behind: its checkpoint's, or its ``normalize.mean`` and ``.std``.

    ``None``: it does not say. Names that ``net`` has itself are weights of its own. ``source`` is for messages.

    Raises:
        ValueError: for one without the other, numbers that cannot be a mean and a std, or not one for each channel.
    """
    if found.statistics is not None:
        return found.statistics
    own = network_of(net).state_dict()
    given = {name: found.state[name] for name in _STATISTICS if name in found.state and name not in own}
    return _statistics(given, channels, source) if given else None


def _statistics(given: State, channels: int, source: str) -> tuple[list[float], list[float]]:
    expected = f"weights: expected {' and '.join(_STATISTICS)} of {channels} numbers each, one per channel, in {source}"
    if given.keys() != set(_STATISTICS) or any(value.numel() != channels for value in given.values()):
        got = ", ".join(f"{name} {list(value.shape)}" for name, value in given.items())
        raise ValueError(f"{expected}, got {got}")
    mean, std = (given[name].flatten().tolist() for name in _STATISTICS)
    try:
        checks.statistics(mean, std)
    except (TypeError, ValueError) as error:
        raise ValueError(f"{expected}: {error}") from error
    return mean, std


def network_of(model: nn.Module) -> nn.Module:
    """The network behind the normalisation and the choice of logits that the recipes put around it."""
    from elle_fast.recipes.foreign import Logits  # it needs this file

    net: Any = model
    if isinstance(net, nn.Sequential) and [name for name, _ in net.named_children()] == ["normalize", "net"]:
        net = net[1]
    found: nn.Module = net.model if isinstance(net, Logits) else net
    return found


def _head(net: nn.Module, own: Mapping[str, Tensor], classes: int | None) -> set[str]:
    """The names of the last linear layer or convolution that has as many outputs as there are classes."""
    found: set[str] = set()
    for name, module in net.named_modules():
        if isinstance(module, (nn.Linear, nn.Conv2d)) and module.weight.shape[0] == classes:
            found = {each for each in (f"{name}.weight", f"{name}.bias") if each in own}
    return found


def _safetensors(content: bytes, path: Path) -> dict[str, Any]:
    try:
        library = import_module("safetensors.torch")
    except ImportError as error:
        raise ImportError("safetensors is missing: pip install 'elle-fast[models]'") from error
    try:
        return dict(library.load(content))
    except Exception as error:  # its own kinds, of a compiled module
        raise ValueError(f"weights: expected safetensors, got {str(path)!r}: {error}") from error


def _torch_file(content: bytes, path: Path) -> dict[str, Any]:
    expected = "weights: expected a state dict as torch.save writes it"
    try:
        found = torch.load(io.BytesIO(content), map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:  # torch's own text ends in advice to load it all the same
        why = "which holds other things than tensors and plain containers, or is no such file"
        raise ValueError(f"{expected}, got {str(path)!r}, {why}; a pickle is not loaded") from error
    except Exception as error:
        reason = checks.first_line(error)
        raise ValueError(f"{expected}, got {str(path)!r}: {reason}") from error
    if not isinstance(found, Mapping):
        raise ValueError(f"{expected}, got {str(path)!r} with {checks.describe(found)}")
    return dict(found)


def _without_prefixes(state: State) -> State:
    while prefix := next((each for each in _PREFIXES if all(name.startswith(each) for name in state)), None):
        state = {name.removeprefix(prefix): value for name, value in state.items()}
    return state


def listed(names: list[str]) -> str:
    """The first few names, and how many more there are."""
    more = f" and {len(names) - _NAMED} more" if len(names) > _NAMED else ""
    return ", ".join(names[:_NAMED]) + more
