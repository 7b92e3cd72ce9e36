"""A model as an ONNX file, and the comparison of what onnxruntime makes of it."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from elle_fast._core.files import naming

LIBRARIES = ["onnx", "onnxscript", "onnxruntime"]
# What torch's exporter writes by itself; other versions are conversions of this one.
OPSET = 18
_LARGEST = 2**31 - 2**20  # bytes of a protobuf message, less a megabyte for the graph
# Another order of sums has another rounding error, of the same size: with n roundings of one sign in the worst case and
# sqrt(n) of them as a rule, a factor of 8 covers two orders of the sums of some thousand terms.
FACTOR = 8.0


def write(program: Any, path: Path, about: dict[str, Any]) -> None:
    """Write an exported program as ONNX: input ``x`` [batch, ...], output ``logits`` [batch, classes].

    Raises:
        ValueError: if torch cannot translate it, or it is larger than such a file may be.
    """
    size = sum(value.nbytes for value in program.state_dict.values())
    if size > _LARGEST:
        raise ValueError(f"to: an ONNX file holds at most 2 GiB, and the weights have {size / 2**30:.1f}")
    try:
        made = torch.onnx.export(
            program,
            dynamo=True,
            opset_version=OPSET,
            input_names=["x"],
            output_names=["logits"],
            dynamic_shapes=({0: "batch"},),
            verbose=False,
            external_data=False,
        )
        assert made is not None
        made.model.metadata_props["elle_fast"] = json.dumps(about)
        content = made.model_proto.SerializeToString()
    except Exception as error:  # onnxscript's and torch's own types
        lines = [line.strip() for line in str(error).splitlines() if line.strip()]
        reason = lines[0] if lines else type(error).__name__
        raise ValueError(f"model: torch.onnx cannot translate it to opset {OPSET}: {reason}") from error
    with naming(path):
        path.write_bytes(content)


def compare(path: Path, model: nn.Module, inputs: list[Tensor], expected: list[Tensor]) -> str:
    """Check the file, run it, and compare its logits with the model's.

    The yardstick is the model in float64: onnxruntime may be at most ``FACTOR`` times as far from it as torch in
    float32 is, or as a rounding of the largest logit.

    Raises:
        RuntimeError: if it is further away, or cannot be run.
    """
    import onnx
    import onnxruntime

    onnx.checker.check_model(onnx.load(path), full_check=True)
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    options.intra_op_num_threads = torch.get_num_threads()
    try:
        session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
        found = [torch.from_numpy(session.run(None, {"x": x.numpy()})[0]) for x in inputs]
    except Exception as error:  # its errors have a module of their own, which is no public name
        raise RuntimeError(f"onnx: onnxruntime cannot run the file: {str(error).splitlines()[0]}") from error
    exact = _in_float64(model, inputs)
    own = max(_distance(logits, each) for logits, each in zip(expected, exact, strict=True))
    away = max(_distance(logits, each) for logits, each in zip(found, exact, strict=True))
    rounding = torch.finfo(torch.float32).eps * max(float(each.abs().max()) for each in exact)
    if not away <= FACTOR * max(own, rounding):
        raise RuntimeError(
            f"onnx: expected logits at most {FACTOR:g} times as far from float64 as torch's in float32 "
            f"({max(own, rounding):.2g}), got {away:.2g}"
        )
    return f"opset {OPSET}, run by onnxruntime: {away:.1e} from float64, torch's float32 {own:.1e}"


def _in_float64(model: nn.Module, inputs: list[Tensor]) -> list[Tensor]:
    usual = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)  # of constants that the model makes as it runs
    try:
        with torch.no_grad():
            double = copy.deepcopy(model).double()
            return [double(x.double()) for x in inputs]
    except RuntimeError as error:
        reason = str(error).splitlines()[0]
        raise RuntimeError(f"onnx: the model has no float64 form to compare with: {reason}") from error
    finally:
        torch.set_default_dtype(usual)


def _distance(logits: Tensor, exact: Tensor) -> float:
    return float((logits.double() - exact).abs().max())
