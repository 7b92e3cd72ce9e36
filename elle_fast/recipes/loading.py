"""`elle_fast.load`: a trained model, from whatever file holds it."""

from __future__ import annotations

import json
from dataclasses import fields
from importlib import import_module
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import Tensor, nn

from elle_fast._core import checks
from elle_fast._core.digests import digest_of
from elle_fast.recipes.program_file import load_program

FORMAT = 1  # of the header


def load(path: Any, *, device: Any = "cpu", model: str | None = None) -> nn.Module:
    """See :func:`elle_fast.load`."""
    path = checks.path("path", path)
    checks.optional("model", model, str, "the name of a network")
    if not path.exists():
        raise FileNotFoundError(f"path: expected a run's folder, a checkpoint or an export, got nothing at {path}")
    place = _device(device)
    suffix = path.suffix.lower()
    if path.is_dir() or suffix == ".pt":
        return _of_run(path, model).to(place)
    if suffix == ".safetensors":
        return _of_safetensors(path, model).to(place)
    if suffix == ".pt2":
        return load_program(path, place)
    other = "; onnxruntime runs it" if suffix == ".onnx" else ""
    raise ValueError(
        f"path: expected a run's folder, a checkpoint (.pt), or an export (.safetensors, .pt2), got {path}{other}"
    )


def needed(module: str, extra: str) -> ModuleType:
    """An optional library; ImportError says how to install it."""
    try:
        return import_module(module)
    except ImportError as error:
        raise ImportError(f"{module} is missing: pip install 'elle-fast[{extra}]'") from error


def weights_digest(tensors: dict[str, Tensor]) -> str:
    """Of names, shapes, dtypes and elements."""
    parts: list[bytes | Tensor] = []
    for name in sorted(tensors):
        parts += [f"{name} {tensors[name].dtype} {list(tensors[name].shape)}\n".encode(), tensors[name]]
    return digest_of(*parts)


def _device(device: Any) -> torch.device:
    try:
        place = torch.device(device)
        torch.empty(0, device=place)
    except (TypeError, RuntimeError, AssertionError) as error:  # the last of a torch without CUDA
        raise ValueError(f"device: expected one that torch can use here, got {checks.shown(device)}") from error
    return place


def _of_run(path: Path, model: str | None) -> nn.Module:
    for module in ("yaml", "rich"):
        needed(module, "recipes")
    from elle_fast.recipes import checkpoint, trained

    chosen = trained.chosen(path)
    saved = checkpoint.load(chosen)
    if path.is_dir():
        trained.check_begun(saved, path, chosen)
    return checkpoint.model_of(saved, chosen, model=model)


def _of_safetensors(path: Path, model: str | None) -> nn.Module:
    for module in ("yaml", "rich"):
        needed(module, "recipes")
    safetensors = needed("safetensors", "export")
    from elle_fast.recipes import checkpoint
    from elle_fast.recipes.model_options import ModelOptions

    got = f"got {str(path)!r}"
    try:
        with safetensors.safe_open(path, framework="pt", device="cpu") as file:
            header = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118  # it is no dictionary
    except safetensors.SafetensorError as error:
        raise ValueError(f"path: expected a whole safetensors file, {got}: {error}") from error
    if "elle_fast" not in header:
        why = "its header does not say which network this is; build it and give the file to load_state_dict"
        raise ValueError(f"path: expected one that elle-fast export wrote, {got}: {why}")
    try:
        about = json.loads(header["elle_fast"])
        if about["format"] != FORMAT:
            raise ValueError(f"format {about['format']}, which another version of elle-fast wrote")
        if about["weights_digest"] != weights_digest(tensors):
            raise ValueError("other weights than its digest was made of: it is damaged")
        if unknown := about["model"].keys() - {field.name for field in fields(ModelOptions)}:
            raise ValueError(f"options that this version does not know: {', '.join(sorted(unknown))}")
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise ValueError(f"path: expected one that elle-fast export wrote, {got} with {error}") from error
    saved = {"config": about["model"], "shape": about["shape"], "model": tensors}
    return checkpoint.model_of(saved, path, model=model)
