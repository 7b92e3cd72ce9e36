"""`elle_fast.load`: a module from each kind of file, and files that would run code."""

from __future__ import annotations

import io
import json
import os
import pickle
import zipfile
from contextlib import suppress
from dataclasses import replace

import pytest
import safetensors.torch
import torch

import elle_fast
from elle_fast.recipes import checkpoint, program_file
from elle_fast.recipes.export import export
from elle_fast.recipes.export_options import ExportOptions
from tests.recipes.exports import TINY, pixels, trained_run


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A run with its exports beside best.pt."""
    folder = trained_run(tmp_path_factory.mktemp("run"), replace(TINY, average=None))
    for form in ("safetensors", "torch-export"):
        export(ExportOptions(folder, to=form))
    return folder


@pytest.mark.parametrize("name", ["", "best.pt", "best.safetensors", "best.pt2"])
def test_every_file_gives_the_same_module(name, run):
    model = elle_fast.load(run / name)
    expected = checkpoint.load_model(run / "best.pt")[0]
    assert not model.training
    assert not any(module.training for module in model.modules())
    assert torch.equal(model(pixels()), expected(pixels()))
    assert elle_fast.load(str(run / name)).eval() is not model

    x, other = (pixels().requires_grad_() for _ in range(2))
    model(x).logsumexp(dim=1).sum().backward()
    expected(other).logsumexp(dim=1).sum().backward()
    assert torch.equal(x.grad, other.grad)


def test_a_folder_gives_its_best_weights(run):
    assert torch.equal(elle_fast.load(run)(pixels()), elle_fast.load(run / "best.pt")(pixels()))


def test_a_program_stays_in_eval_mode(run):
    model = elle_fast.load(run / "best.pt2")
    assert model.eval() is model
    with pytest.raises(ValueError, match="mode: an exported program is fixed in eval mode"):
        model.train()
    assert not model.training


def test_arguments_out_of_range(run, tmp_path):
    (tmp_path / "empty").mkdir()
    (tmp_path / "x.onnx").touch()
    (tmp_path / "x.txt").touch()
    with pytest.raises(
        FileNotFoundError, match="path: expected a run's folder, a checkpoint or an export, got nothing"
    ):
        elle_fast.load(tmp_path / "nowhere.pt")
    with pytest.raises(
        FileNotFoundError, match=r"expected a run's folder with a checkpoint\.pt, got a folder without one"
    ):
        elle_fast.load(tmp_path / "empty")
    with pytest.raises(ValueError, match=r"got .*x\.onnx; onnxruntime runs it"):
        elle_fast.load(tmp_path / "x.onnx")
    with pytest.raises(ValueError, match=r"or an export \(\.safetensors, \.pt2\), got .*x\.txt$"):
        elle_fast.load(tmp_path / "x.txt")
    with pytest.raises(ValueError, match="device: expected one that torch can use here, got 'abacus'"):
        elle_fast.load(run, device="abacus")
    with pytest.raises(TypeError, match="path: expected a path, got 3"):
        elle_fast.load(3)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="model: expected None or the name of a network, got 1"):
        elle_fast.load(run, model=1)  # type: ignore[arg-type]


@pytest.mark.parametrize("name", ["best.pt", "best.safetensors", "best.pt2"])
def test_damaged_files_are_named(name, run, tmp_path):
    content = (run / name).read_bytes()
    path = tmp_path / name
    for kept in (0, 1, 100, len(content) // 2, len(content) - 1):
        path.write_bytes(content[:kept])
        with pytest.raises(ValueError, match=f"{name}"):
            elle_fast.load(path)
    # One bit of a weight.
    weight = checkpoint.load_model(run / "best.pt")[0].state_dict()["net.0.weight"].numpy().tobytes()
    assert content.count(weight) == 1
    changed = bytearray(content)
    changed[content.index(weight)] ^= 1
    path.write_bytes(changed)
    with pytest.raises(ValueError, match=f"{name}"):
        elle_fast.load(path)


# ---- safetensors


def rewritten(run, path, **change):
    """The export with another header."""
    with safetensors.safe_open(run / "best.safetensors", framework="pt") as file:
        about = json.loads(file.metadata()["elle_fast"])
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    safetensors.torch.save_file(tensors, path, {"elle_fast": json.dumps({**about, **change})})
    return about


@pytest.mark.parametrize(
    "change, message",
    [
        ({"format": 99}, "with format 99, which another version of elle-fast wrote"),
        ({"weights_digest": "0" * 32}, "with other weights than its digest was made of: it is damaged"),
        ({"model": {"model": "cnn", "depth": 3}}, "with options that this version does not know: depth"),
        ({"model": {"model": "cnn", "width": 3}}, "expected the weights of this model"),
        ({"model": 3}, "expected one that elle-fast export wrote"),
        ({"shape": {"in_shape": [1, 8, 8]}}, "x.safetensors"),
    ],
)
def test_headers_that_do_not_fit(change, message, run, tmp_path):
    rewritten(run, tmp_path / "x.safetensors", **change)
    with pytest.raises(ValueError, match=message):
        elle_fast.load(tmp_path / "x.safetensors")


def test_a_safetensors_file_of_another_program(tmp_path):
    safetensors.torch.save_file({"weight": torch.zeros(2)}, tmp_path / "x.safetensors")
    with pytest.raises(
        ValueError, match="its header does not say which network this is; build it and give the file to"
    ):
        elle_fast.load(tmp_path / "x.safetensors")


def test_no_file_imports_a_function_unasked(run, tmp_path):
    rewritten(run, tmp_path / "x.safetensors", model={"model": "os:abort"})
    with pytest.raises(ValueError, match=r"is to be built by the function 'os:abort'"):
        elle_fast.load(tmp_path / "x.safetensors")


# ---- Programs that would run code


class Touch:
    """Unpickled, it makes a file."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


def repacked(run, path, change):
    """The exported program with some records changed: name -> bytes -> bytes, or None to add one."""
    with zipfile.ZipFile(run / "best.pt2") as archive:
        root = archive.namelist()[0].split("/")[0]
        records = {name.partition("/")[2]: archive.read(name) for name in archive.namelist()}
    for name, edit in change.items():
        records[name] = edit(records.get(name, b""))
    with zipfile.ZipFile(path, "w") as archive:
        for name, content in records.items():
            archive.writestr(f"{root}/{name}", content)


def saved(value):
    buffer = io.BytesIO()
    torch.save(value, buffer)
    return buffer.getvalue()


def edited(edit):
    """A change of a JSON record."""

    def change(content):
        value = json.loads(content)
        edit(value)
        return json.dumps(value).encode()

    return change


MODEL, WEIGHTS = "models/model.json", "data/weights/model_weights_config.json"
CONSTANTS, INPUTS = "data/constants/model_constants_config.json", "data/sample_inputs/model.pt"


def first_node(program):
    return program["graph_module"]["graph"]["nodes"][0]


def with_size(text):
    def edit(program):
        size = program["graph_module"]["graph"]["tensor_values"]["x"]["sizes"][0]
        size["as_expr"]["expr_str"] = text

    return edited(edit)


def pickled_weight(config):
    next(iter(config["config"].values()))["use_pickle"] = True


def custom_constant(config):
    config["config"]["c"] = {"path_name": "opaque_obj_0", "is_param": False, "use_pickle": True, "tensor_meta": None}


def attacks(place):
    """By name, records of a program that runs code of its author in torch.export.load or in its first call."""
    bomb = saved((Touch(place),))
    call = f"__import__('os').mkdir('{place}')"
    return {
        "sample inputs": {INPUTS: lambda _: bomb},
        "a weight": {WEIGHTS: edited(pickled_weight), "data/weights/weight_0": lambda _: bomb},
        "a constant": {
            CONSTANTS: edited(custom_constant),
            "data/constants/opaque_obj_0": lambda _: pickle.dumps(Touch(place)),
        },
        "old weights": {"data/weights/model.pt": lambda _: bomb},
        "compiled code": {"data/aotinductor/model/x.so": lambda _: b"code"},
        "a size": {MODEL: with_size(call)},
        "an attribute of a size": {MODEL: with_size("Symbol('s1').__class__.mro()")},
        "a size as large as the memory": {MODEL: with_size("9**9**9**9")},
        "an operator": {MODEL: edited(lambda program: first_node(program).update(target="torch.hub.load"))},
        "a file": {
            MODEL: edited(lambda program: first_node(program).update(target="torch.ops.aten.from_file.default"))
        },
        "a name": {MODEL: lambda content: content.replace(b'"name": "x"', f'"name": "x={call}"'.encode())},
        "guards": {MODEL: edited(lambda program: program.update(guards_code=[call]))},
        "an argument": {
            MODEL: edited(
                lambda program: first_node(program)["inputs"][0].update(arg={"as_operator": "torch.hub.load"})
            )
        },
        "a tree": {MODEL: lambda content: content.replace(b"builtins.tuple", b"collections.defaultdict")},
    }


@pytest.mark.parametrize("name", attacks("x"))
def test_a_program_runs_no_code_of_its_author(name, run, tmp_path):
    place, path = tmp_path / "made", tmp_path / "x.pt2"
    repacked(run, path, attacks(place)[name])
    with pytest.raises(
        ValueError, match=r"x\.pt2: expected a whole exported program \(\.pt2\) of plain tensors, got: "
    ):
        elle_fast.load(path)
    assert not place.exists()


@pytest.mark.parametrize("name", ["save", "from_file", "_print"])
def test_operators_that_reach_beyond_tensors_are_refused_by_name(name):
    # Whatever else is wrong with a program that has them.
    with pytest.raises(ValueError, match=rf"target 'torch\.ops\.aten\.{name}\.default' in the program"):
        program_file._walk({"target": f"torch.ops.aten.{name}.default"}, "")
    program_file._walk({"target": "torch.ops.aten.relu.default"}, "")


@pytest.mark.parametrize("name", ["sample inputs", "a weight", "a constant", "a size"])
def test_torch_itself_would_run_it(name, run, tmp_path):
    # So that the test above is of files that do what they are made for.
    place, path = tmp_path / "made", tmp_path / "x.pt2"
    repacked(run, path, attacks(place)[name])
    with suppress(Exception):  # whatever comes of what it has done
        torch.export.load(path)
    assert place.exists()


def test_the_program_as_it_was_written_is_read_when_repacked(run, tmp_path):
    repacked(run, tmp_path / "x.pt2", {})
    assert torch.equal(elle_fast.load(tmp_path / "x.pt2")(pixels()), elle_fast.load(run)(pixels()))
