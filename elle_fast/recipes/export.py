"""`elle-fast export`: a trained model as a file for others, read back and compared before it is there.

Whatever the form, the module takes pixels in [0, 1] with the normalisation inside, in eval mode, and gives logits.
"""

from __future__ import annotations

import json
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from elle_fast._core import checks
from elle_fast._core.default_device import host_by_default
from elle_fast._core.files import naming, replacing
from elle_fast.recipes import robustbench, to_onnx
from elle_fast.recipes.export_options import ExportOptions
from elle_fast.recipes.loading import load, needed, weights_digest
from elle_fast.recipes.program_file import load_program, save_program
from elle_fast.recipes.trained import Trained, find

# By form: the ending of its default name.
FORMS = {"safetensors": ".safetensors", "torch-export": ".pt2", "onnx": ".onnx", "robustbench": "-robustbench"}
_BATCHES = (2, 1, 5)  # of the comparison; a program must take any


@host_by_default()
def export(options: ExportOptions) -> dict[str, Any]:
    """Write a trained model in another form, after reading it back and comparing it on random inputs.

    ``safetensors`` and ``torch-export`` (logits and input gradients) must agree to the bit. ``onnx`` must be as close
    to the model in float64 as torch's own float32 is, up to a small factor.

    Returns:
        ``file``, ``checkpoint``, ``weights``, and ``compared``: what the comparison found, in a line.

    Raises:
        FileExistsError: if the file is there, and ``overwrite`` is not set.
        FileNotFoundError, ValueError: for a source that is no trained model, or an option that does not fit.
        ImportError: naming the extra, if a library of the form is missing.
        ValueError: if the form cannot hold the model; the reason is in the message.
        RuntimeError: if what was read back is not what was written.
        OSError: naming the file that cannot be written, and why; nothing is left of it.
    """
    if not isinstance(options, ExportOptions):
        raise TypeError(f"options: expected ExportOptions, got {checks.describe(options)}")
    form = checks.choice("to", options.to, list(FORMS))
    for module in {"safetensors": ["safetensors"], "onnx": to_onnx.LIBRARIES, "robustbench": ["safetensors"]}.get(
        form, []
    ):
        needed(module, "export")  # said now, not after the model is built
    trained = find(options.source, options.weights, options.evaluation, options.model)
    out = trained.path.with_name(trained.path.stem + FORMS[form]) if options.out is None else options.out
    _check_place(out, form, options.overwrite)
    inputs = _inputs(trained.saved["shape"]["in_shape"])
    with replacing(out) as made, _one_attention():
        expected = _outputs(trained.model, inputs, trained.saved["shape"]["classes"])
        compared = _WRITERS[form](trained, inputs, expected, made)
    return {"file": out, "checkpoint": trained.path, "weights": trained.weights, "compared": compared}


def _check_place(out: Path, form: str, overwrite: bool) -> None:
    folder = form == "robustbench"
    if out.exists() and out.is_dir() != folder:
        what = "a folder" if folder else "a file"
        raise ValueError(
            f"out: expected {what} to write to, got {str(out)!r}, which is {'no' if folder else 'a'} folder"
        )
    if not folder and out.suffix != FORMS[form]:  # `load` and others tell forms apart by it
        raise ValueError(f"out: expected a name that ends in {FORMS[form]}, got {str(out)!r}")
    if out.exists() and not overwrite:
        raise FileExistsError(f"out: {str(out)!r} is there already; --overwrite replaces it")
    if folder and out.exists() and not robustbench.is_entry(out):
        raise FileExistsError(f"out: {str(out)!r} is no folder of an earlier export, so it is not replaced")


def _inputs(in_shape: list[int]) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [torch.rand(batch, *in_shape, generator=generator) for batch in _BATCHES]


def _outputs(model: nn.Module, inputs: list[Tensor], classes: int) -> list[Tensor]:
    """The logits to compare with; ValueError for a model of which no form could be checked."""
    found = []
    with torch.no_grad():
        for x in inputs:
            logits = model(x)
            if not isinstance(logits, Tensor) or logits.shape != (len(x), classes):
                expected = f"model: expected logits of shape [{len(x)}, {classes}]"
                raise ValueError(f"{expected}, got {checks.describe(logits)}")
            if not logits.isfinite().all():
                raise ValueError("model: expected finite logits of pixels in [0, 1], got others")
            if not torch.equal(model(x), logits):
                raise ValueError("model: expected the same logits for the same input, got others: it draws numbers")
            found.append(logits)
    return found


def _same_bits(other: nn.Module, inputs: list[Tensor], expected: list[Tensor], what: str) -> str:
    with torch.no_grad():
        for x, logits in zip(inputs, expected, strict=True):
            if not torch.equal(got := other(x), logits):
                away = float((got - logits).abs().max())
                raise RuntimeError(f"{what}: expected the model's logits to the bit, got others, {away:.2g} away")
    return f"read back: the same logits to the bit, in batches of {', '.join(str(len(x)) for x in inputs)}"


# ---- safetensors


def _to_safetensors(trained: Trained, inputs: list[Tensor], expected: list[Tensor], path: Path) -> str:
    from safetensors.torch import save

    # Copies: safetensors refuses tied weights, which share memory.
    tensors = {name: value.detach().clone().contiguous() for name, value in trained.model.state_dict().items()}
    about = {**trained.about(), "weights_digest": weights_digest(tensors)}
    content = save(tensors, {"format": "pt", "elle_fast": json.dumps(about)})
    with naming(path):
        path.write_bytes(content)
    again = load(path, model=trained.config.model)  # which built it a moment ago
    return _same_bits(again, inputs, expected, "safetensors")


# ---- torch.export


class _Pixels(nn.Module):
    """Gives every program the same signature, whatever the network calls its input."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, x: Tensor) -> Tensor:
        """X [B, *in_shape] -> logits [B, classes]."""
        logits: Tensor = self.model(x)
        return logits


def traced(model: nn.Module, x: Tensor) -> Any:
    """The model as a ``torch.export.ExportedProgram`` for batches of any size, without a line of this machine's files.

    Raises:
        ValueError: with the reason, in one line, if torch cannot trace it.
    """
    with _quiet():
        try:
            program = torch.export.export(
                _Pixels(model).eval(), (x,), dynamic_shapes=({0: torch.export.Dim("batch")},), strict=False
            )
        except Exception as error:  # whatever the model's forward pass raises, and a dozen types of torch's own
            lines = [line.strip() for line in str(error).splitlines() if line.strip()]
            reason = lines[0] if lines else type(error).__name__
            raise ValueError(f"model: torch.export cannot trace it for batches of any size: {reason}") from error
    for node in program.graph.nodes:
        for name in ("stack_trace", "nn_module_stack", "torch_fn", "source_fn_stack", "from_node"):
            node.meta.pop(name, None)
    return program


def _to_program(trained: Trained, inputs: list[Tensor], expected: list[Tensor], path: Path) -> str:
    program = traced(trained.model, inputs[0])
    with _quiet():
        save_program(program, path, trained.about())
        again = load_program(path)
        said = _same_bits(again, inputs, expected, "torch-export")
        for x in inputs:
            ours, others = (_gradient(model, x) for model in (trained.model, again))
            if not torch.equal(ours, others):
                raise RuntimeError("torch-export: expected the model's input gradients to the bit, got others")
    return f"{said}; the same input gradients"


def _gradient(model: nn.Module, x: Tensor) -> Tensor:
    x = x.clone().requires_grad_()
    (gradient,) = torch.autograd.grad(model(x).logsumexp(dim=1).sum(), x)
    return gradient


@contextmanager
def _one_attention() -> Iterator[None]:
    # Without gradients, nn.MultiheadAttention takes another way, which rounds otherwise and is in no program.
    before = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        yield
    finally:
        torch.backends.mha.set_fastpath_enabled(before)


@contextmanager
def _quiet() -> Iterator[None]:
    # torch's exporters warn of what they themselves call.
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


# ---- The others


def _to_onnx(trained: Trained, inputs: list[Tensor], expected: list[Tensor], path: Path) -> str:
    with _quiet():
        to_onnx.write(traced(trained.model, inputs[0]), path, trained.about())
        return to_onnx.compare(path, trained.model, inputs, expected)


def _to_robustbench(trained: Trained, inputs: list[Tensor], expected: list[Tensor], folder: Path) -> str:
    with naming(folder):
        folder.mkdir()
    _to_safetensors(trained, inputs, expected, folder / robustbench.WEIGHTS)
    robustbench.write(trained, folder)
    return _same_bits(robustbench.build(folder), inputs, expected, "robustbench")


_WRITERS: dict[str, Callable[[Trained, list[Tensor], list[Tensor], Path], str]] = {
    "safetensors": _to_safetensors,
    "torch-export": _to_program,
    "onnx": _to_onnx,
    "robustbench": _to_robustbench,
}
