"""`elle-fast export`: each form read back, what it says of the model, and what goes wrong."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from importlib import import_module

import onnx
import onnxruntime
import pytest
import safetensors
import torch
from torch import nn

import elle_fast
from elle_fast._core.digests import digest_of
from elle_fast.recipes import checkpoint, cli, export, loading, robustbench, to_onnx
from elle_fast.recipes.export import FORMS
from elle_fast.recipes.export_options import ExportOptions
from elle_fast.recipes.train import train
from tests._core.test_files import full_disk
from tests.recipes.exports import CLASSES, TINY, pixels, trained_run
from tests.recipes.test_train import dataset, quiet


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    return trained_run(tmp_path_factory.mktemp("run"))


@pytest.fixture(scope="module")
def foreign(tmp_path_factory):
    """The checkpoint of a network that is none of ours."""
    config = replace(TINY, model="tests.recipes.exports:attention", width=None, average=None)
    return trained_run(tmp_path_factory.mktemp("foreign"), config) / "checkpoint.pt"


FUNCTION = "tests.recipes.exports:attention"


def exported(source, out, **options):
    return export.export(ExportOptions(source, out=out, **options))


def about(path):
    with safetensors.safe_open(path, framework="pt") as file:
        return json.loads(file.metadata()["elle_fast"])


def onnx_logits(path, x):
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    return torch.from_numpy(session.run(["logits"], {"x": x.numpy()})[0])


@pytest.mark.parametrize("form", FORMS)
def test_the_command_writes_each_form_beside_the_checkpoint(form, run, capsys):
    assert cli.main(["export", str(run), "--to", form]) == 0
    written = run / f"best{FORMS[form]}"
    said = capsys.readouterr()
    assert said.err == ""
    assert f"weights      best ({run / 'best.pt'})" in said.out
    assert f"written      {written}" in said.out
    assert [path.name for path in run.iterdir() if path.name.startswith(".")] == []

    expected = elle_fast.load(run / "best.pt")(pixels())
    if form == "onnx":
        # Between torch and onnxruntime there are at most the two distances that the export allows.
        bound = 2 * to_onnx.FACTOR * torch.finfo(torch.float32).eps * 10
        torch.testing.assert_close(onnx_logits(written, pixels()), expected, rtol=0, atol=bound)
    elif form == "robustbench":
        assert torch.equal(robustbench.build(written)(pixels()), expected)
    else:
        assert torch.equal(elle_fast.load(written)(pixels()), expected)
    # What is published tells nothing of the machine.
    for path in [written, *written.rglob("*")]:
        if path.is_file():
            content = path.read_bytes()
            assert not [word for word in (str(run), "site-packages", __file__) if word.encode() in content]

    assert cli.main(["export", str(run), "--to", form]) == 2
    assert "is there already; --overwrite replaces it" in capsys.readouterr().err
    assert cli.main(["export", str(run), "--to", form, "--overwrite"]) == 0


def test_weights_are_chosen_by_name(run, tmp_path):
    files = {"last": "checkpoint.pt", "best": "best.pt", "averaged": "averaged.pt", "best_averaged": "best_averaged.pt"}
    for name, file in files.items():
        done = exported(run, tmp_path / f"{name}.safetensors", weights=name)
        assert (done["weights"], done["checkpoint"]) == (name, run / file)
        assert torch.equal(elle_fast.load(done["file"])(pixels()), checkpoint.load_model(run / file)[0](pixels()))
    averaged, last = (elle_fast.load(tmp_path / f"{name}.safetensors")(pixels()) for name in ("averaged", "last"))
    assert not torch.equal(averaged, last)


def test_a_run_without_best_weights_gives_its_last(run, tmp_path):
    shutil.copy(run / "checkpoint.pt", tmp_path)
    assert exported(tmp_path, tmp_path / "x.safetensors")["weights"] == "last"
    with pytest.raises(FileNotFoundError, match=r"weights: .* holds last, but not averaged"):
        exported(tmp_path, tmp_path / "y.safetensors", weights="averaged")


def test_the_header_says_what_the_model_is(run, tmp_path):
    exported(run, tmp_path / "x.safetensors", weights="last")
    found = about(tmp_path / "x.safetensors")
    result = json.loads((run / "result.json").read_text())
    assert found["accuracy"] == result["accuracy"]
    assert found["attacked_at"] == {"eps": TINY.eps, "norm": "linf"}
    assert found["class_names"] == list(dataset().classes)
    assert found["shape"]["in_shape"] == [1, 8, 8]
    assert found["model"]["width"] == TINY.width
    assert found["training"]["method"] == "elle-a"
    assert (found["weights"], found["epoch"]) == ("last", 1)
    assert found["exported_by"]["torch"] == torch.__version__


def test_a_result_of_another_epoch_is_not_taken(run, tmp_path):
    shutil.copy(run / "checkpoint.pt", tmp_path)
    result = json.loads((run / "result.json").read_text())
    result["models"]["last"]["epoch"] = 5
    (tmp_path / "result.json").write_text(json.dumps(result))
    exported(tmp_path, tmp_path / "x.safetensors")
    assert about(tmp_path / "x.safetensors")["accuracy"] is None


def evaluated(run, path, **change):
    found = {"eps": 8 / 255, "norm": "l2", "checkpoint_digest": digest_of((run / "best.pt").read_bytes())}
    found["test_images"] = 10
    rows = {"clean": {"accuracy": 0.5, "samples": 10}, "pgd-20": {"accuracy": 0.125, "samples": 10}}
    path.write_text(json.dumps({**found, "accuracy": rows, **change}))
    return path


def test_a_submission_has_the_card_the_entry_and_the_issue(run, tmp_path):
    folder = tmp_path / "entry"
    exported(run, folder, to="robustbench", evaluation=evaluated(run, tmp_path / "eval.json"))
    card = json.loads((folder / robustbench.CARD).read_text())
    assert card == {
        **{"link": "", "name": "", "authors": "", "venue": ""},
        **{"additional_data": False, "number_forward_passes": 1, "unreliable": False},
        **{"dataset": "digits", "architecture": "cnn", "eps": "8/255", "clean_acc": "50.00"},
        **{"reported": None, "autoattack_acc": None},  # PGD is no AutoAttack
    }
    issue = (folder / robustbench.ISSUE).read_text()
    for line in ("**Threat Model**: L2", "**eps**: 8/255", "**Clean accuracy**: 50.00% on 10 test images\n"):
        assert line in issue
    assert "**Robust accuracy**: 12.50% on 10 test images\n" in issue
    assert "RobustBench has no leaderboard of it" in issue
    assert sorted(path.name for path in folder.iterdir()) == sorted(
        [robustbench.WEIGHTS, robustbench.ENTRY, robustbench.CARD, robustbench.ISSUE]
    )

    attacks = {
        name: {"accuracy": accuracy, "samples": 10}
        for name, accuracy in {"clean": 0.5, "pgd-20": 0.1, "autoattack": 0.25}.items()
    }
    evaluation = evaluated(run, tmp_path / "eval.json", accuracy=attacks)
    exported(run, folder, to="robustbench", evaluation=evaluation, overwrite=True)
    card = json.loads((folder / robustbench.CARD).read_text())
    assert (card["reported"], card["autoattack_acc"]) == ("25.00", "25.00")
    assert "**Evaluation method**: autoattack" in (folder / robustbench.ISSUE).read_text()


@pytest.mark.parametrize("whole", [{"test_images": 11}, {"test_images": None}, {}])
def test_accuracies_on_a_part_of_the_test_images_are_no_claim(whole, run, tmp_path):
    attacks = {name: {"accuracy": 0.25, "samples": 10} for name in ("clean", "autoattack")}
    evaluation = evaluated(run, tmp_path / "eval.json", accuracy=attacks, **whole)
    if not whole:  # a data set that was cut itself
        saved = checkpoint.load(run / "best.pt")
        saved["config"]["test_limit"] = 10
        checkpoint.save(tmp_path / "best.pt", saved)
        digest = digest_of((tmp_path / "best.pt").read_bytes())
        evaluation = evaluated(run, tmp_path / "eval.json", accuracy=attacks, checkpoint_digest=digest)
    folder = tmp_path / "entry"
    exported(run / "best.pt" if whole else tmp_path / "best.pt", folder, to="robustbench", evaluation=evaluation)
    card = json.loads((folder / robustbench.CARD).read_text())
    assert card["clean_acc"] is card["reported"] is card["autoattack_acc"] is None
    issue = (folder / robustbench.ISSUE).read_text()
    assert issue.count("25.00% on 10 test images") == 2


def test_a_run_says_how_many_test_images_there_are(run, tmp_path):
    exported(run, tmp_path / "entry", to="robustbench")
    card = json.loads((tmp_path / "entry" / robustbench.CARD).read_text())
    row = json.loads((run / "result.json").read_text())["models"]["best"]["accuracy"]["clean"]
    assert row["samples"] == len(dataset().test)
    assert card["clean_acc"] == f"{100 * row['accuracy']:.2f}"


def test_code_of_the_users_own_may_have_begun_with_any_weights(foreign, tmp_path):
    asked = {"to": "robustbench", "model": "tests.recipes.exports:attention"}
    exported(foreign, tmp_path / "entry", **asked)
    assert json.loads((tmp_path / "entry" / robustbench.CARD).read_text())["additional_data"] is None
    assert "**Additional data**: (to be filled in" in (tmp_path / "entry" / robustbench.ISSUE).read_text()


@pytest.mark.parametrize(
    "change, message",
    [
        ({"checkpoint_digest": "0" * 32}, "evaluation: expected one of .*best.pt, digest .*, got .* of digest '0000"),
        ({"checkpoint_digest": None, "eps": None, "accuracy": None}, "got .* of digest None"),
    ],
)
def test_an_evaluation_of_another_checkpoint_is_refused(change, message, run, tmp_path):
    with pytest.raises(ValueError, match=message):
        exported(run, tmp_path / "x.safetensors", evaluation=evaluated(run, tmp_path / "eval.json", **change))


@pytest.mark.parametrize(
    "content, message", [("[1]", "expected a JSON object"), ("{", "not valid JSON"), ("{}", "without")]
)
def test_an_evaluation_that_is_none(content, message, run, tmp_path):
    (tmp_path / "eval.json").write_text(content)
    with pytest.raises(ValueError, match=message):
        exported(run, tmp_path / "x.safetensors", evaluation=tmp_path / "eval.json")


def test_an_onnx_file_takes_any_batch_and_states_its_opset(run, tmp_path):
    path = tmp_path / "x.onnx"
    exported(run, path, to="onnx")
    model = onnx.load(path)
    assert [(each.domain, each.version) for each in model.opset_import if each.domain == ""] == [("", to_onnx.OPSET)]
    sizes = [size.dim_param or size.dim_value for size in model.graph.input[0].type.tensor_type.shape.dim]
    assert sizes == ["batch", 1, 8, 8]
    assert json.loads({each.key: each.value for each in model.metadata_props}["elle_fast"])["weights"] == "best"
    for batch in (1, 17):
        assert onnx_logits(path, pixels(batch)).shape == (batch, CLASSES)


@pytest.mark.parametrize("form", FORMS)
def test_a_network_of_another_library(form, foreign, tmp_path):
    path = tmp_path / f"x{FORMS[form]}"
    exported(foreign, path, to=form, model=FUNCTION)
    expected = checkpoint.load_model(foreign, model=FUNCTION)[0](pixels())
    if form == "onnx":
        bound = 2 * to_onnx.FACTOR * torch.finfo(torch.float32).eps * 10
        torch.testing.assert_close(onnx_logits(path, pixels()), expected, rtol=0, atol=bound)
    elif form == "robustbench":
        assert f"model='{FUNCTION}'" in (path / robustbench.ENTRY).read_text()
        assert torch.equal(robustbench.build(path)(pixels()), expected)
    else:
        with torch.enable_grad():  # without, torch's attention takes another way here
            trusted = None if form == "torch-export" else FUNCTION  # a program is built by no code
            network = checkpoint.load_model(foreign, model=FUNCTION)[0]
            assert torch.equal(elle_fast.load(path, model=trusted)(pixels()), network(pixels()))


class Branches(nn.Module):
    """Looks at its values, which no trace can."""

    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(64, CLASSES)

    def forward(self, x):
        return self.linear(x.flatten(1)) if x.sum() > 0 else self.linear(-x.flatten(1))


class OneSize(Branches):
    """Knows its batch."""

    def forward(self, x):
        return self.linear(x.flatten(1)) + torch.zeros([1, 2, 3, 5][[1, 2, 3, 5].index(x.shape[0])], CLASSES)


class Draws(Branches):
    """Draws numbers in eval mode too."""

    def forward(self, x):
        return self.linear(x.flatten(1) + torch.rand_like(x.flatten(1)))


class Pairs(Branches):
    """Returns two tensors."""

    def forward(self, x):
        return self.linear(x.flatten(1)), x


class Infinite(Branches):
    """Its logits are not finite."""

    def forward(self, x):
        return self.linear(x.flatten(1)) / 0


@pytest.mark.parametrize(
    "make, form, message",
    [
        (Branches, "torch-export", "model: torch.export cannot trace it for batches of any size: "),
        (Branches, "onnx", "model: torch.export cannot trace it for batches of any size: "),
        (OneSize, "torch-export", "model: torch.export cannot trace it for batches of any size: "),
        (Draws, "safetensors", "model: expected the same logits for the same input, got others: it draws numbers"),
        (Pairs, "safetensors", r"model: expected logits of shape \[2, 3\], got 2 items, tensors among them"),
        (Infinite, "onnx", "model: expected finite logits of pixels"),
    ],
)
def test_a_model_that_cannot_be_exported(make, form, message, tmp_path, monkeypatch):
    model = make()
    monkeypatch.setattr(export, "find", lambda *given: Unfit(model, tmp_path))
    before = list(tmp_path.iterdir())
    with pytest.raises(ValueError, match=f"^{message}[^\n]*$"):
        exported(tmp_path, tmp_path / f"x{FORMS[form]}", to=form)
    assert list(tmp_path.iterdir()) == before


class Unfit:
    """As much of a trained model as is looked at before it is written."""

    def __init__(self, model, folder):
        self.model, self.path = model.eval(), folder / "checkpoint.pt"
        self.saved = {"shape": {"in_shape": [1, 8, 8], "classes": CLASSES}}

    def about(self):
        return {}


@pytest.mark.parametrize("form", ["safetensors", "onnx", "robustbench"])
def test_a_full_disk_leaves_nothing(form, run, tmp_path):
    out = tmp_path / f"x{FORMS[form]}"
    with full_disk(1024), pytest.raises(OSError, match=r"\[Errno 27\] File too large: '.*x(\.|-robustbench).*'"):
        exported(run, out, to=form)
    assert list(tmp_path.iterdir()) == []
    if form == "onnx":
        return
    exported(run, out, to=form)
    before = sorted(path.name for path in tmp_path.rglob("*"))
    with full_disk(1024), pytest.raises(OSError, match="File too large"):
        exported(run, out, to=form, overwrite=True)
    assert sorted(path.name for path in tmp_path.rglob("*")) == before


def test_what_does_not_come_back_as_it_was_is_not_kept(run, tmp_path, monkeypatch):
    class Other(nn.Module):
        def __init__(self):
            super().__init__()
            self.model = checkpoint.load_model(run / "best.pt")[0]

        def forward(self, x):
            return self.model(x) + 1e-4

    monkeypatch.setattr(export, "load", lambda *args, **options: Other())
    with pytest.raises(
        RuntimeError, match=r"safetensors: expected the model's logits to the bit, got others, 0\.0001 away"
    ):
        exported(run, tmp_path / "x.safetensors")
    monkeypatch.setattr(export, "load_program", lambda *args, **options: Other())
    with pytest.raises(RuntimeError, match="torch-export: expected the model's logits to the bit"):
        exported(run, tmp_path / "x.pt2", to="torch-export")
    monkeypatch.setattr(export, "traced", lambda model, x, original=export.traced: original(Other(), x))
    with pytest.raises(RuntimeError, match="onnx: expected logits at most 8 times as far from float64 as torch's"):
        exported(run, tmp_path / "x.onnx", to="onnx")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    "form, missing",
    [("safetensors", "safetensors"), ("onnx", "onnxruntime"), ("onnx", "onnxscript"), ("robustbench", "safetensors")],
)
def test_a_missing_library_names_its_extra(form, missing, run, tmp_path, monkeypatch, capsys):
    def without(name):
        if name == missing:
            raise ModuleNotFoundError(f"No module named {name!r}")
        return import_module(name)

    monkeypatch.setattr(loading, "import_module", without)
    assert cli.main(["export", str(run), "--to", form, "--out", str(tmp_path / f"x{FORMS[form]}")]) == 2
    assert capsys.readouterr().err == f"elle-fast export: {missing} is missing: pip install 'elle-fast[export]'\n"
    assert list(tmp_path.iterdir()) == []


def fails(capsys, *arguments):
    assert cli.main(["export", *map(str, arguments)]) == 2
    said = capsys.readouterr()
    assert said.out == ""
    assert said.err.count("\n") == 1
    return said.err


def test_bad_input_is_one_line(run, tmp_path, capsys):
    (tmp_path / "empty").mkdir()
    (tmp_path / "text.pt").write_text("hello")
    damaged = bytearray((run / "best.pt").read_bytes())
    damaged[len(damaged) // 2] ^= 1
    (tmp_path / "damaged.pt").write_bytes(damaged)
    assert "got a folder without one" in fails(capsys, tmp_path / "empty")
    assert "got nothing there" in fails(capsys, tmp_path / "nowhere")
    assert "expected a whole checkpoint" in fails(capsys, tmp_path / "text.pt")
    assert "damaged: its digest does not fit" in fails(capsys, tmp_path / "damaged.pt")
    assert "to: expected one of 'safetensors', 'torch-export'" in fails(capsys, run, "--to", "pickle")
    assert "weights: expected one of 'last'" in fails(capsys, run, "--weights", "worst")
    assert "weights: only a run's folder holds several" in fails(capsys, run / "best.pt", "--weights", "best")
    assert "expected a name that ends in .onnx" in fails(capsys, run, "--to", "onnx", "--out", tmp_path / "x.pt")
    assert "which is a folder" in fails(capsys, run, "--out", tmp_path / "empty")
    (tmp_path / "empty" / "mine.txt").touch()
    asked = [run, "--to", "robustbench", "--out", tmp_path / "empty", "--overwrite"]
    assert "no folder of an earlier export" in fails(capsys, *asked)
    assert (tmp_path / "empty" / "mine.txt").exists()
    assert "which is no folder" in fails(capsys, run, "--to", "robustbench", "--out", tmp_path / "text.pt")
    assert "--overwite: not an option; did you mean --overwrite?" in fails(capsys, run, "--overwite")


def test_a_run_without_a_finished_epoch(tmp_path, monkeypatch, capsys):
    from elle_fast.recipes import train as training

    monkeypatch.setattr(training._Loop, "_epoch", lambda *args: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        train(TINY, tmp_path, dataset=dataset(), console=quiet())
    said = fails(capsys, tmp_path)
    assert "expected a run that has finished an epoch, got one at step 0 of its first" in said
    with pytest.raises(ValueError, match="expected a run that has finished an epoch"):
        elle_fast.load(tmp_path)
    # The file itself is what was asked for.
    assert not elle_fast.load(tmp_path / "checkpoint.pt").training


def test_options_of_another_type():
    with pytest.raises(TypeError, match="options: expected ExportOptions, got 1"):
        export.export(1)  # type: ignore[arg-type]
