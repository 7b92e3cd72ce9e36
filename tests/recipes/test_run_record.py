"""What is read of the folders of runs, and the command that makes their page."""

from __future__ import annotations

import json
import shutil
from io import StringIO
from pathlib import Path

import pytest
from rich.console import Console

from elle_fast.recipes import checkpoint, cli, result
from elle_fast.recipes import train as training
from elle_fast.recipes.folder import clear
from elle_fast.recipes.run_record import read_all
from elle_fast.recipes.train import CHECKPOINT, PAGE, RESULT, train
from tests.recipes.records import NASTY
from tests.recipes.test_train import CONFIG, dataset


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """The folder of a finished run."""
    folder = tmp_path_factory.mktemp("runs") / "finished"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(result, "plot_curves", lambda *args, **options: None)
        train(CONFIG, folder, dataset=dataset(), console=Console(file=StringIO()))
    return folder


@pytest.fixture
def unfinished(tmp_path, monkeypatch):
    """The folder of a run that stopped after 13 of 24 steps, whose last checkpoint is that of step 10."""
    original = training._Loop._step

    def step(loop, *args):
        if loop.run.step == 13:
            raise KeyboardInterrupt
        original(loop, *args)

    monkeypatch.setattr(training._Loop, "_step", step)
    with pytest.raises(KeyboardInterrupt):
        train(CONFIG, tmp_path / "unfinished", dataset=dataset(), console=Console(file=StringIO()))
    return tmp_path / "unfinished"


def test_a_finished_run_is_its_result_and_its_rows(run):
    (found,) = read_all([run])
    written = json.loads((run / RESULT).read_text())
    assert (found.name, found.step, found.config) == ("finished", 24, written["config"])
    assert found.models == written["models"]
    assert found.seconds == written["training_seconds"]
    assert found.origin["torch"] == written["versions"]["torch"]
    assert found.origin["processes"] == 1
    # The rows as the checkpoint has them, to the bit.
    saved = checkpoint.load(run / CHECKPOINT)
    assert found.epochs == saved["history"]["epochs"]
    assert {type(row["collapsed"]) for row in found.epochs} == {bool}


def test_a_run_without_its_weights_is_a_run(run, tmp_path):
    for name in (RESULT, "epochs.csv"):
        shutil.copy(run / name, tmp_path)
    (found,) = read_all([tmp_path])
    assert found.epochs == read_all([run])[0].epochs


def test_an_unfinished_run_is_its_checkpoint(run, unfinished, tmp_path):
    finished, found = read_all([run, unfinished])
    assert (found.step, len(found.epochs), found.models, found.origin) == (10, 1, {}, {})
    assert found.config == finished.config
    assert 0 < found.epochs[0]["seconds"] < found.seconds
    assert cli.main(["report", str(run), str(unfinished), "--out", str(tmp_path / "page.html")]) == 0
    assert "unfinished: epoch 1 of 3, step 10" in (tmp_path / "page.html").read_text()


def test_the_alarms_of_a_guard_are_those_of_the_result_or_of_the_checkpoint(run, tmp_path):
    alarm = {"step": 3, "signal": "probe", "value": 0.1, "limit": 0.2, "back_to": None}
    shutil.copytree(run, tmp_path / "guarded")
    written = json.loads((run / RESULT).read_text())
    (tmp_path / "guarded" / RESULT).write_text(json.dumps({**written, "alarms": [alarm]}))
    assert read_all([tmp_path / "guarded"])[0].alarms == [alarm]
    saved = checkpoint.load(run / CHECKPOINT)
    saved["guard"] = {"alarms": [alarm]}
    checkpoint.save(tmp_path / "guarded" / CHECKPOINT, saved)
    (tmp_path / "guarded" / RESULT).unlink()
    assert read_all([tmp_path / "guarded"])[0].alarms == [alarm]


def test_train_leaves_the_page_of_its_run_and_says_where(tmp_path, capsys):
    folder = tmp_path / NASTY.replace("/", "")
    options = "--model cnn --width 2 --eps 0.1 --epochs 1 --batch-size 32 --limit 80 --validation 16 --test-limit 16"
    assert cli.main(["train", *options.split(), "--device", "cpu", "--out", str(folder)]) == 0
    said = capsys.readouterr()
    assert said.err.startswith(f"run: {folder}\n")
    assert f"report       {folder / PAGE}\n" in said.out
    text = (folder / PAGE).read_text()
    assert "&lt;script&gt;alert(&quot;x&quot;)" in text
    assert "<figcaption>lam, mean of each epoch</figcaption>" in text
    # The same page as the command makes.
    assert cli.main(["report", str(folder), "--out", str(tmp_path / "page.html")]) == 0
    assert (tmp_path / "page.html").read_text() == text
    # One that begins anew has none until it ends.
    clear(folder)
    assert not (folder / PAGE).exists()


def test_a_page_that_cannot_be_written_is_a_warning(tmp_path, monkeypatch):
    def fail(*args):
        raise OSError("disk full")

    monkeypatch.setattr(result, "write_document", fail)
    said = StringIO()
    train(CONFIG, tmp_path, dataset=dataset(), console=Console(file=said))
    assert "warning: no report: OSError: disk full" in said.getvalue()
    assert (tmp_path / RESULT).exists()


def test_runs_of_one_name_have_their_paths(run, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for parent in ("a", "b"):
        shutil.copytree(run, tmp_path / parent / "seed0")
    shutil.copytree(run, tmp_path / "seed1")
    a, b, one = (Path(name) for name in ("a/seed0", "b/seed0", "seed1"))
    assert [found.name for found in read_all([a, b, one])] == ["a/seed0", "b/seed0", "seed1"]
    assert [found.name for found in read_all([b, one])] == ["seed0", "seed1"]
    monkeypatch.chdir(tmp_path / "seed1")
    assert read_all([Path()])[0].name == "seed1"


def damaged(run, folder, **changes):
    """A copy of the run whose result has other entries; ``None`` takes one away."""
    shutil.copytree(run, folder)
    found = {**json.loads((folder / RESULT).read_text()), **changes}
    (folder / RESULT).write_text(json.dumps({name: value for name, value in found.items() if value is not None}))
    return folder


def refused(capsys, *arguments):
    """The one line that says why, of a command that writes nothing."""
    assert cli.main(["report", *map(str, arguments)]) == 2
    said = capsys.readouterr()
    assert said.out == ""
    assert said.err.count("\n") == 1
    return said.err.removeprefix("elle-fast report: ").rstrip("\n")


def test_what_is_no_run_is_refused(run, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "empty").mkdir()
    (tmp_path / "eval.json").write_text('{"accuracy": {}}')
    expected = "runs: expected the folder of a run of elle-fast train, got "
    assert refused(capsys) == "runs: expected the folder of at least one run, got none"
    assert refused(capsys, "none") == f"{expected}'none', which does not exist"
    assert refused(capsys, "empty") == f"{expected}'empty', with neither result.json nor checkpoint.pt"
    assert refused(capsys, run.parent).endswith("nor checkpoint.pt; there are runs in it: finished")
    said = f"{expected}'eval.json', a file; elle-fast eval makes the page of an evaluation, with --report"
    assert refused(capsys, "eval.json") == said
    again = run.parent / "." / ".." / run.parent.name / run.name
    assert refused(capsys, run, again) == f"runs: expected each run once, got {str(again)!r} twice"
    assert refused(capsys, run, "--ouut", "x") == "--ouut: not an option; did you mean --out?"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["empty", "eval.json"]


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"config": None}, "without 'config'"),
        ({"config": {"method": "fgsm"}}, "without 'config: data'"),
        ({"models": None}, "without 'models'"),
        ({"models": []}, "which does not fit: models is [] (list)"),
        (
            {"models": {"last": {"accuracy": {"clean": {"accuracy": 3}}}}},
            "accuracy: expected a finite number in [0, 1]",
        ),
        ({"models": {"last": {"accuracy": {"clean": {}}}}}, "without 'accuracy'"),
        ({"models": {"last": {"accuracy": 3}}}, "which does not fit: "),
        ({"training_seconds": "long"}, "training_seconds is 'long' (str)"),
        ({"alarms": [{"step": -1}]}, "alarms: step: expected an integer >= 0"),
        ({"alarms": [{"step": 1, "signal": 2}]}, "alarms: signal is 2"),
    ],
)
def test_a_result_that_does_not_fit_is_named(run, tmp_path, changes, message, capsys):
    folder = damaged(run, tmp_path / "run", **changes)
    said = refused(capsys, folder, "--out", tmp_path / "page.html")
    assert said.startswith(f"runs: expected the result of a run, got {str(folder / RESULT)!r}")
    assert message in said
    assert not (tmp_path / "page.html").exists()


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b"3", b"\xff\xfe"])
def test_a_result_that_is_broken_is_named(run, tmp_path, content, capsys):
    folder = damaged(run, tmp_path / "run")
    (folder / RESULT).write_bytes(content)
    assert refused(capsys, folder).startswith(f"runs: expected the result of a run, got {str(folder / RESULT)!r}")


@pytest.mark.parametrize(
    "content, message",
    [
        ("", "without any"),
        ("step,epoch,seconds\n", "without any"),
        ("step,epoch,seconds\n8,1,0.5\n16,two,0.5\n", "with another line 3: could not convert string to float: 'two'"),
        ("step,epoch\n8,1\n", "with another line 2: no seconds"),
        ("step,epoch,seconds\n8,nan,1\n", "with another line 2: epoch: expected a finite number"),
        ("step,epoch,seconds\n8,1,1,1\n", "with another line 2: "),
    ],
)
def test_rows_that_are_broken_are_named(run, tmp_path, content, message, capsys):
    folder = damaged(run, tmp_path / "run")
    (folder / "epochs.csv").write_text(content)
    said = refused(capsys, folder)
    assert said.startswith(f"runs: expected a row for each epoch, got {str(folder / 'epochs.csv')!r}")
    assert message in said


def test_files_that_are_missing_or_damaged_are_named(run, tmp_path, capsys):
    folder = damaged(run, tmp_path / "run")
    (folder / "epochs.csv").unlink()
    assert str(folder / "epochs.csv") in refused(capsys, folder)
    (folder / RESULT).unlink()
    (folder / CHECKPOINT).write_bytes(b"PK")
    assert refused(capsys, folder).startswith("checkpoint: expected a whole checkpoint, got ")
