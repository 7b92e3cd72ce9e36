"""Evaluations of models that are no checkpoints of this project: their weights, how they normalize, what is refused."""

import csv
import importlib
import io
import json
import sys
import types
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console
from torch import nn

from elle_fast import data
from elle_fast.evaluation import Chunks
from elle_fast.recipes import checkpoint, cli, models, subject, weights
from elle_fast.recipes.config import TrainConfig
from elle_fast.recipes.eval_options import EvalOptions
from elle_fast.recipes.evaluate import evaluate_checkpoint
from elle_fast.recipes.train import CHECKPOINT, train

CONFIG = TrainConfig(width=4, eps=0.1, epochs=4, batch_size=32, limit=640, validation=8, method="fgsm", device="cpu")
KEPT: dict[str, Any] = {"width": 4, "data": "digits", "limit": 640, "test_limit": 60}
ATTACKS = "clean,pgd-2"


def quiet():
    return Console(file=io.StringIO(), width=1000)


@pytest.fixture(scope="module")
def digits():
    return data.load("digits", limit=CONFIG.limit, test_limit=60)


@pytest.fixture(scope="module")
def path(tmp_path_factory, digits):
    """A checkpoint, trained to about 80 %, that normalizes."""
    folder = tmp_path_factory.mktemp("run")
    train(replace(CONFIG, test_limit=60, eval_attacks="clean"), folder, dataset=digits, console=quiet())
    return folder / CHECKPOINT


@pytest.fixture(scope="module")
def bare(path, tmp_path_factory):
    """The weights of its network alone, without the normalization in front: as another library would save them."""
    file = tmp_path_factory.mktemp("weights") / "net.pt"
    net = weights.network_of(checkpoint.load_model(path)[0])
    torch.save({"state_dict": {f"module.{name}": value for name, value in net.state_dict().items()}}, file)
    return file


@pytest.fixture(scope="module")
def expected(path, digits):
    return evaluate_checkpoint(EvalOptions(path, ATTACKS, eps=0.05), dataset=digits, console=quiet())


def of(file, console=None, **options):
    options = {"attacks": ATTACKS, "eps": 0.05, "model": "cnn", **KEPT, "device": "cpu", **options}
    named = None if file is None else str(file)
    return evaluate_checkpoint(EvalOptions(weights=named, **options), console=console or quiet(), given=options)


def numbers(values):
    return ",".join(map(repr, values))


def test_a_checkpoint_as_weights_brings_its_normalization(path, digits, expected):
    found = of(path)
    assert found["accuracy"] == expected["accuracy"]
    assert found["accuracy"]["clean"]["accuracy"] > 0.5
    assert found["model"]["mean"] == pytest.approx(digits.mean, abs=0.05)
    assert "warnings" not in found
    assert found["data"] == expected["data"]


def test_bare_weights_are_suspicious_until_mean_and_std_are_given(path, bare, expected):
    said = quiet()
    found = of(bare, said)
    (warning,) = found["warnings"]
    assert "the model seems to take normalized inputs" in warning
    assert f"warning: {warning}" in said.file.getvalue()
    assert found["model"]["mean"] is None
    assert found["accuracy"]["clean"]["accuracy"] < expected["accuracy"]["clean"]["accuracy"]
    # What the warning proposes is about as good as the numbers of the training, with which all is as in the training.
    mean, std = warning.partition("--mean ")[2].partition(",")[0].split(" --std ")
    proposed = of(bare, mean=mean, std=std)
    assert proposed["accuracy"]["clean"]["accuracy"] >= expected["accuracy"]["clean"]["accuracy"] - 0.1
    shape = checkpoint.load(path)["shape"]
    said = quiet()
    exact = of(bare, said, mean=numbers(shape["mean"]), std=numbers(shape["std"]))
    assert exact["accuracy"] == expected["accuracy"]
    assert "warnings" not in proposed | exact
    assert "std" in said.file.getvalue()
    # Another normalization in front is suspicious, too.
    (warning,) = of(bare, mean="0", std="20")["warnings"]
    assert "seems to take normalized inputs" in warning or "chance" in warning


def test_exported_weights_hold_their_normalization(path, expected, tmp_path):
    torch.save(checkpoint.load_model(path)[0].state_dict(), tmp_path / "all.pt")
    assert of(tmp_path / "all.pt")["accuracy"] == expected["accuracy"]
    with pytest.raises(ValueError, match=r"normalize: expected True .* the weights in .*all\.pt were trained behind"):
        of(tmp_path / "all.pt", normalize=False)


def test_a_model_of_the_users_own_with_weights_of_its_own(bare, expected, path):
    shape = checkpoint.load(path)["shape"]
    options = {"model": f"{__name__}:built", "width": None, "model_args": {"channels": 4}}
    given = {"mean": numbers(shape["mean"]), "std": numbers(shape["std"])}
    found = of(bare, **options, **given)
    assert found["accuracy"] == expected["accuracy"]
    # Without a file the callable has to bring the weights; at chance it is a warning.
    (warning,) = of(None, **options)["warnings"]
    assert "chance for 10 classes" in warning


def built(classes, channels):
    return models.build("cnn", in_shape=(1, 8, 8), classes=classes, width=channels)


def test_killed_and_resumed_is_the_same_file_and_other_weights_reuse_nothing(bare, tmp_path, monkeypatch):
    file = tmp_path / "a.json"
    of(bare, json=file, batch_size=16)
    whole = json.loads(file.read_text())
    file.unlink()
    original, saved = Chunks.save, []

    def save(chunks):
        original(chunks)
        saved.append(1)
        if len(saved) == 3:
            raise KeyboardInterrupt

    monkeypatch.setattr(Chunks, "save", save)
    with pytest.raises(KeyboardInterrupt):
        of(bare, json=file, batch_size=16)
    other = torch.load(bare, weights_only=True)["state_dict"]
    bias = list(other)[-1]
    torch.save({**other, bias: other[bias] + torch.eye(10)[3] * 1e3}, tmp_path / "three.pt")
    before = len(saved)
    of(tmp_path / "three.pt", json=tmp_path / "a.json", batch_size=16)
    assert len(saved) == before + 8 + 1  # two attacks on four batches, and what is left after them
    assert of(bare, json=file, batch_size=16) == whole
    assert len(saved) == before + 8 + 1 + 5  # of eight batches three were finished
    assert not (tmp_path / "a.json.partial").exists()


def test_the_report_and_the_table_beside_the_result(path, digits, tmp_path):
    files = {"report": tmp_path / "out" / "a.html", "per_sample": tmp_path / "out" / "a.csv"}
    options = EvalOptions(path, ATTACKS, samples=30, eps_curve="0,0.1", **files)
    found = evaluate_checkpoint(options, dataset=digits, console=quiet())
    assert sorted(each.name for each in (tmp_path / "out").iterdir()) == ["a.csv", "a.html"]
    assert [point["eps"] for point in found["curve"]["points"]] == [0, 0.1]
    text = files["report"].read_text()
    assert f"{found['worst_case']['accuracy']:.2%}" in text
    assert text.count("<img") == 4 * 3
    with files["per_sample"].open(newline="") as file:
        rows = list(csv.DictReader(file))
    kept = data.choose(60, 30)
    assert [int(row["index"]) for row in rows] == kept.tolist()
    assert [int(row["label"]) for row in rows] == digits.test.labels[kept].tolist()
    for name in ("clean", "pgd-2"):
        assert sum(row[name] == "1" for row in rows) == round(30 * found["accuracy"][name]["accuracy"])
    assert all((row["prediction"] == row["label"]) == (row["clean"] == "1") for row in rows)
    assert sum(row["samples"] for row in found["by_class"]) == 30


@pytest.mark.parametrize("name", ["report", "per_sample", "json"])
def test_files_that_cannot_be_written_are_refused_before_the_work(name, tmp_path):
    (tmp_path / "file").write_text("")
    for place, error in ((tmp_path, IsADirectoryError), (tmp_path / "file" / "a", OSError)):
        with pytest.raises(error, match=name if place == tmp_path else "file/a"):
            evaluate_checkpoint(EvalOptions(tmp_path / "none.pt", **{name: place}), console=quiet())
    with pytest.raises(ValueError, match=r"expected a file for each, got '.*/a' twice"):
        evaluate_checkpoint(
            EvalOptions(tmp_path / "none.pt", report=tmp_path / "a", json=tmp_path / "a"), console=quiet()
        )
    assert [each.name for each in tmp_path.iterdir()] == ["file"]


@pytest.mark.parametrize(
    "words, message",
    [
        (["--data", "mnist"], "data: expected that of the checkpoint '{}', 'digits', got 'mnist'; beside a checkpoint"),
        (["--model", "mlp"], "model: expected that of the checkpoint '{}', 'cnn', got 'mlp'"),
        (["--width=5"], "width: expected that of the checkpoint '{}', 4, got 5"),
        (["--no-normalize"], "normalize: expected that of the checkpoint '{}', True, got False"),
        (["--weights", "a.pt"], "weights: expected that of the checkpoint '{}', None, got 'a.pt'"),
        (["--mean", "0.5"], "mean: a checkpoint has its own, so this option does not apply (got '0.5')"),
        (["--root", "there"], "root: expected None, as digits come with scikit-learn, got there"),
        (["--report", "{}/a.html"], "{}/a.html"),
        (["--eps-curve", "0,8"], "eps: expected a radius in [0, 1]"),
        (["--eps-curve", "0;8"], "eps_curve: expected numbers with commas between them, got '0;8'"),
    ],
)
def test_beside_a_checkpoint_no_option_may_contradict_it(words, message, path, capsys):
    assert cli.main(["eval", str(path), "--attacks", "clean", *(word.format(path) for word in words)]) == 2
    said = capsys.readouterr().err
    assert message.format(path) in said
    assert said.count("\n") == 1


def test_the_same_as_the_checkpoint_is_no_contradiction_but_a_default_can_be_one(path, capsys):
    words = ["--attacks", "clean", "--samples", "5", "--data", "digits", "--width", "4", "--limit", "640"]
    assert cli.main(["eval", str(path), *words]) == 0
    assert "of 5 test images" in capsys.readouterr().out
    saved = checkpoint.load(path)
    saved["config"]["model"] = "mlp"
    other = path.with_name("mlp.pt")
    checkpoint.save(other, saved)
    # "cnn" is the default, and is what was asked for.
    with pytest.raises(ValueError, match="expected the weights of this model"):
        evaluate_checkpoint(EvalOptions(other), console=quiet())
    config = replace(CONFIG, model="mlp")
    with pytest.raises(ValueError, match=r"model: .* the checkpoint 'a.pt', 'mlp', got 'cnn'"):
        EvalOptions(Path("a.pt")).of_checkpoint(config, {"model"})
    assert EvalOptions(Path("a.pt"), root="here").of_checkpoint(config, {"root"}) == {"root": "here"}


@pytest.mark.parametrize(
    "options, message",
    [
        ({"eps": None}, "eps: expected a radius such as 8/255, as there is no training to take it from, got None"),
        ({"eps": 8.0}, r"eps: expected a radius in \[0, 1\]"),
        ({"norm": "l1"}, "norm: expected one of 'linf', 'l2', got 'l1'"),
        ({"file": None}, "weights: expected a file, or pretrained, with model 'cnn', got neither"),
        ({"file": "none.pt"}, "weights: expected a file, got '.*none.pt', where there is none"),
        ({"model": "ccn"}, "model: expected one of "),
        ({"new_head": True}, "new_head: a fresh last layer has nothing to evaluate"),
        ({"mean": "0.5,0.5", "std": "1,1"}, "mean, std: expected 1 numbers, one per channel"),
        ({"mean": "0.5", "std": "0"}, "std"),
        ({"mean": "half"}, "mean: expected numbers with commas between them, got 'half'"),
        ({"mean": "0.5", "normalize": False}, "mean, std: expected none without normalize"),
        ({"width": 5}, r"weights: expected those of this network, got .*net.pt with of another shape: "),
        ({"model": "mlp", "width": None}, r"weights: expected those of this network, got .*net.pt with missing: "),
        ({"model": "tests.recipes.test_subject:no_logits", "width": None, "file": None}, "model: expected .* logits"),
        ({"model": "tests.recipes.test_subject:absent", "width": None, "file": None}, "absent"),
        ({"data": "mnist", "root": "there"}, "there"),
    ],
)
def test_what_does_not_fit_together_is_refused(options, message, bare):
    given = {"file": bare, **options}
    with pytest.raises((ValueError, OSError, TypeError, ImportError, AttributeError), match=message):
        of(given.pop("file"), **given)


def no_logits(classes):
    return nn.Flatten()


def test_neither_checkpoint_nor_model(capsys):
    assert cli.main(["eval"]) == 2
    said = capsys.readouterr().err
    assert said == "elle-fast eval: checkpoint: expected a file, or a model with weights, got neither\n"


def test_labels_beyond_the_classes_of_the_model(digits, bare):
    labels = digits.test.labels.clone()
    labels[7] = 10
    dataset = replace(digits, test=data.Split(digits.test.images, labels))
    options = EvalOptions(weights=str(bare), model="cnn", width=4, eps=0.05, device="cpu")
    with pytest.raises(ValueError, match="batches: expected labels from 0 to 9, as the model has 10 classes"):
        evaluate_checkpoint(options, dataset=dataset, console=quiet(), given={"model"})


def test_the_default_network_may_be_named_from_python_and_has_to_be_on_the_command_line(bare, capsys):
    options = EvalOptions(model="cnn", weights=str(bare), eps=0.05, attacks="clean", device="cpu", **KEPT)
    assert evaluate_checkpoint(options, console=quiet())["model"]["name"] == "cnn"
    assert cli.main(["eval", "--weights", str(bare), "--eps", "0.05"]) == 2
    assert "model: expected the name of the network whose weights" in capsys.readouterr().err


NET = """
import torch
from torch import nn
def build(classes):
    torch.manual_seed(0)
    return nn.Sequential(nn.Flatten(), nn.Linear(64, classes), {last})
"""


def test_other_code_of_the_same_name_and_weights_reuses_nothing(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    options = {"model": "a_net_of_this_test:build", "width": None, "batch_size": 20}

    def evaluated(last, json):
        (tmp_path / "a_net_of_this_test.py").write_text(NET.format(last=last))
        monkeypatch.delitem(sys.modules, "a_net_of_this_test", raising=False)
        importlib.invalidate_caches()
        return of(None, **options, json=json)

    original, saved = Chunks.save, []

    def save(chunks):
        original(chunks)
        saved.append(1)
        if len(saved) == 3:
            raise KeyboardInterrupt

    monkeypatch.setattr(sys, "dont_write_bytecode", True)
    with monkeypatch.context() as context:
        context.setattr(Chunks, "save", save)
        with pytest.raises(KeyboardInterrupt):
            evaluated("nn.Identity()", tmp_path / "a.json")
    partial = (tmp_path / "a.json.partial").read_text()
    found = evaluated("nn.Hardtanh(-1e-9, 0.1)", tmp_path / "a.json")
    fresh = evaluated("nn.Hardtanh(-1e-9, 0.1)", tmp_path / "b.json")
    assert found["accuracy"] == fresh["accuracy"]
    assert (tmp_path / "a.json.partial").read_text() == partial
    assert found["code"]["digest"] == fresh["code"]["digest"] not in partial


def test_a_result_has_the_version_of_the_library_whose_network_it_is_of(monkeypatch, bare):
    assert "code" not in of(bare)
    library = types.ModuleType("timm")
    library.__version__ = "1.2.3"  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "timm", library)
    monkeypatch.delitem(sys.modules, "torchvision", raising=False)
    monkeypatch.delitem(sys.modules, "transformers", raising=False)
    assert subject._code("timm:resnet18") == {"code": {"timm": "1.2.3"}}
    assert subject._code(f"{__name__}:built")["code"].keys() == {"digest", "timm"}


def test_of_a_checkpoint_it_has_the_digest_of_the_code_that_builds_it(path, digits, expected, tmp_path, monkeypatch):
    assert "code" not in expected
    name = f"{__name__}:built"
    config = replace(CONFIG, model=name, width=None, model_args={"channels": 4}, epochs=1, eval_attacks="clean")
    train(config, tmp_path, dataset=digits, console=quiet())
    options = EvalOptions(tmp_path / CHECKPOINT, "clean", model=name)
    assert evaluate_checkpoint(options, dataset=digits, console=quiet())["code"] == subject._code(name)["code"]
