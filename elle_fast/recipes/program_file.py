"""Exported programs (.pt2): saving them, and reading them without unpickling or evaluating anything of theirs.

``torch.export.load`` (as read in torch 2.13) falls back to ``torch.load(weights_only=False)`` for sample inputs,
unpickles weights and constants that say so, evaluates the text of each symbolic size, finds operators by any name below
``torch``, and compiles a program's names into Python. So all of this is checked before torch sees the file.
"""

from __future__ import annotations

import ast
import io
import json
import re
import zipfile
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from elle_fast._core.files import naming

_RECORDS = re.compile(
    r"archive_format|archive_version|byteorder|\.data/(version|serialization_id)|models/model\.json|extra/[\w.]+"
    r"|data/sample_inputs/model\.pt|data/(weights|constants)/(weight_\d+|tensor_\d+|model_(weights|constants)_config\.json)"
)
_TARGET = re.compile(
    r"torch\.ops\.aten\.\w+\.\w+|_operator\.(getitem|add|sub|mul|floordiv|truediv|mod|neg|eq|ne|lt|le|gt|ge)"
)
# They map a file of any name into memory, and make it if asked, or write one.
_NO_TARGETS = re.compile(r"torch\.ops\.aten\.(from_file|save|_print|_assert_async|_import.*)\..*")
_PLAIN = re.compile(r"[\w.+\-]*", re.ASCII)
_NAME = re.compile(r"[A-Za-z_]\w*", re.ASCII)
# Words that operators take, of padding and rounding, and einsum's equations; none of them is a path.
_WORDS = re.compile(r"[A-Za-z_, .>\-]*", re.ASCII)
_TREES = {None, "builtins.tuple", "builtins.list", "builtins.dict"}
# The syntax of a size, and what it may call. No powers, which a few characters make as large as the memory.
_SIZES: tuple[type[ast.AST], ...] = (
    *(ast.Expression, ast.Call, ast.keyword, ast.Name, ast.Load, ast.Constant, ast.BinOp, ast.UnaryOp),
    *(ast.Add, ast.Sub, ast.Mult, ast.Div, ast.FloorDiv, ast.Mod, ast.USub),
)
_CALLED = {
    "Symbol",
    "Integer",
    "Rational",
    "Float",
    "Add",
    "Mul",
    "Max",
    "Min",
    "Mod",
    "PythonMod",
    "FloorDiv",
    "CeilDiv",
}
_CALLED |= {"IntTrueDiv", "CleanDiv", "TruncToInt", "ToFloat"}
# What makes a value code, or of a kind that no network of tensors has.
_REFUSED = {"as_operator", "as_custom_obj", "as_graph", "guards_code", "treespec_namedtuple_fields", "source_fn_stack"}
_REFUSED |= {"from_node", "custom", "custom_obj_values"}
_UNREAD = {"stack_trace", "nn_module_stack", "torch_fn"}  # text that is kept as text


class Program(nn.Module):
    """The module of an exported program, fixed in eval mode: x float32 [B, *in_shape] in [0, 1] -> logits [B, classes].

    It is differentiable, in x too, so that it can be attacked.
    """

    def __init__(self, program: Any) -> None:
        super().__init__()
        self.program = program.module()
        for module in self.modules():
            module.training = False  # torch's own eval() refuses to

    def forward(self, x: Tensor) -> Tensor:
        """X [B, *in_shape] -> logits [B, classes]."""
        logits: Tensor = self.program(x)
        return logits

    def train(self, mode: bool = True) -> Program:
        """Nothing for ``mode=False``; a ValueError for True, as the program holds no operators of training."""
        if mode:
            raise ValueError("mode: an exported program is fixed in eval mode; train the model it was made from")
        return self


def save_program(program: Any, path: Path, about: dict[str, Any]) -> None:
    """Write a program with what is known of it."""
    buffer = io.BytesIO()
    torch.export.save(program, buffer, extra_files={"elle_fast.json": json.dumps(about)})
    with naming(path):
        path.write_bytes(buffer.getvalue())


def load_program(path: Path, device: torch.device | None = None) -> Program:
    """The module of a ``.pt2`` file.

    Nothing in it is unpickled with ``weights_only=False``, imported or evaluated: a file with anything but plain
    tensors, ATen operators, simple names and sizes is refused.

    Raises:
        ValueError: naming the file, for one that is damaged or refused.
        ImportError: if this torch cannot read such files.
    """
    try:
        from torch.export.passes import move_to_device_pass
        from torch.export.pt2_archive._package import PT2ArchiveReader, load_pt2
    except ImportError as error:
        raise ImportError(f"{path}: reading a .pt2 file needs a newer torch than {torch.__version__}") from error
    with naming(path):
        content = path.read_bytes()
    try:
        with zipfile.ZipFile(io.BytesIO(content)) as archive:  # torch reads weights past their checksums
            if (broken := archive.testzip()) is not None:
                raise ValueError(f"a damaged record {broken!r}")
        with PT2ArchiveReader(io.BytesIO(content)) as reader:
            _check({name: reader.read_bytes(name) for name in reader.get_file_names() if not _is_payload(name)}, reader)
        # Not torch.export.load, which tries an older format where this one fails.
        program = load_pt2(io.BytesIO(content)).exported_programs["model"]
        if device is not None and device.type != "cpu":
            program = move_to_device_pass(program, device)
        return Program(program)
    except Exception as error:  # torch and its zip reader raise a dozen types for a broken file
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise ValueError(f"{path}: expected a whole exported program (.pt2) of plain tensors, got: {reason}") from error


def _is_payload(name: str) -> bool:
    return re.fullmatch(r"data/(weights/weight|constants/tensor)_\d+", name) is not None


def _check(records: dict[str, bytes], reader: Any) -> None:
    """Raise a ValueError for what torch would unpickle, evaluate or look up."""
    for name in reader.get_file_names():
        if _RECORDS.fullmatch(name) is None:
            raise ValueError(f"record {name!r}, which a program of tensors does not have")
    for kind in ("weights", "constants"):
        payloads = json.loads(records[f"data/{kind}/model_{kind}_config.json"])["config"]
        for name, payload in payloads.items():
            if payload["use_pickle"] is not False or not _is_payload(f"data/{kind}/{payload['path_name']}"):
                raise ValueError(f"{kind} {name!r} as a pickle")
            _walk(payload, "")
    inputs = records["data/sample_inputs/model.pt"]
    if inputs:
        torch.load(io.BytesIO(inputs), weights_only=True)
    _walk(json.loads(records["models/model.json"]), "")


def _walk(value: Any, key: str) -> None:
    if key in _REFUSED and value not in (None, [], {}):
        raise ValueError(f"{key} in the program")
    if isinstance(value, dict):
        for name, item in value.items():
            if _PLAIN.fullmatch(name) is None:
                raise ValueError(f"the name {name!r}")
            _walk(item, name)
    elif isinstance(value, list):
        for item in value:
            _walk(item, key)
    elif isinstance(value, str) and not _is_plain(key, value):
        raise ValueError(f"{key} {value[:80]!r} in the program")


def _is_plain(key: str, value: str) -> bool:
    if key in _UNREAD:
        return True
    if key == "target":
        return _TARGET.fullmatch(value) is not None and _NO_TARGETS.fullmatch(value) is None
    if key == "expr_str":
        return _is_size(value)
    if key in ("in_spec", "out_spec"):
        return _is_tree(json.loads(value))
    if key in ("as_string", "as_strings"):
        return _WORDS.fullmatch(value) is not None
    if key in ("name", "as_name", "forward_arg_names"):
        return value == "" or _NAME.fullmatch(value) is not None
    return _PLAIN.fullmatch(value) is not None


def _is_size(text: str) -> bool:
    """Whether it is arithmetic on symbols and numbers alone."""
    try:
        nodes = list(ast.walk(ast.parse(text, mode="eval")))
    except (SyntaxError, ValueError, RecursionError):
        return False
    for node in nodes:
        if not isinstance(node, _SIZES):
            return False
        if isinstance(node, ast.Call) and not (isinstance(node.func, ast.Name) and node.func.id in _CALLED):
            return False
        if isinstance(node, ast.Constant) and isinstance(node.value, str) and not _NAME.fullmatch(node.value):
            return False
        if isinstance(node, ast.Name) and node.id not in _CALLED and not re.fullmatch(r"[su]\d+", node.id):
            return False
    return True


def _is_tree(value: Any) -> bool:
    if isinstance(value, list):
        return all(_is_tree(item) for item in value)
    if isinstance(value, dict):
        return value.get("type") in _TREES and _is_tree(value.get("children_spec", []))
    return isinstance(value, int)
