"""Which data a run takes, its own, or others if asked for; and that torch's default device is nothing to it."""

from dataclasses import replace

import pytest
import torch

from elle_fast.data import Split
from elle_fast.recipes import checkpoint, cli
from elle_fast.recipes import train as training
from elle_fast.recipes.eval_options import EvalOptions
from elle_fast.recipes.evaluate import evaluate_checkpoint
from elle_fast.recipes.train import CHECKPOINT, RESULT, train
from tests.recipes.test_train import CONFIG, dataset, quiet

SHORT = replace(CONFIG, epochs=2, method="rs-fgsm")


def one_level_off(made):
    """What another decoder of JPEG makes of the same files."""
    images = made.train.images.clone()
    images[::7, :, ::2] ^= 1
    assert not torch.equal(images, made.train.images)
    return replace(made, train=Split(images, made.train.labels))


def first_epoch(folder, monkeypatch):
    """A run that was stopped after its first epoch, and the digest of its data."""
    with monkeypatch.context() as patched:
        patched.setattr(training._Loop, "_check_finite", lambda loop, *found, **late: loop.run.step < 12 or 1 / 0)
        with pytest.raises(ZeroDivisionError):
            train(SHORT, folder, dataset=dataset(), console=quiet())
    return checkpoint.load(folder / CHECKPOINT)["data"]


def test_other_data_resume_if_asked_for_with_a_warning(monkeypatch, tmp_path):
    before, other = first_epoch(tmp_path, monkeypatch), one_level_off(dataset())
    with pytest.raises(ValueError, match=rf"data: .*{before}.*{other.digest()}.*--allow-other-data"):
        train(SHORT, tmp_path, resume=True, dataset=other, console=quiet())
    with pytest.warns(UserWarning, match=rf"data: expected .*digest {before}, got .*digest {other.digest()}") as said:
        result = train(SHORT, tmp_path, resume=True, allow_other_data=True, dataset=other, console=quiet())
    assert [warning.filename for warning in said] == [__file__]
    assert (tmp_path / RESULT).exists()
    assert result["accuracy"]["clean"]["accuracy"] > 0.5
    # From then on it is a run on these data.
    assert checkpoint.load(tmp_path / CHECKPOINT)["data"] == other.digest()
    train(SHORT, tmp_path, resume=True, dataset=other, console=quiet())


def test_the_same_data_resume_without_a_warning(monkeypatch, tmp_path):
    first_epoch(tmp_path, monkeypatch)
    train(SHORT, tmp_path, resume=True, allow_other_data=True, dataset=dataset(), console=quiet())


def test_data_of_another_shape_do_not_resume(monkeypatch, tmp_path):
    first_epoch(tmp_path, monkeypatch)
    made = dataset()
    more = replace(made, classes=(*made.classes, "more"))
    smaller = [Split(split.images[..., :4].contiguous(), split.labels) for split in (made.train, made.test)]
    smaller = replace(made, train=smaller[0], test=smaller[1])
    for other, message in ((more, "number of classes"), (smaller, "input shape")):
        with pytest.raises(ValueError, match=rf"data: expected the {message} of .*checkpoint\.pt"):
            train(SHORT, tmp_path, resume=True, allow_other_data=True, dataset=other, console=quiet())


def test_allow_other_data_is_a_flag(tmp_path):
    with pytest.raises(TypeError, match="allow_other_data: expected True or False, got 'yes'"):
        train(SHORT, tmp_path, allow_other_data="yes", dataset=dataset(), console=quiet())  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="allow_other_data: expected False without resume"):
        train(SHORT, tmp_path, allow_other_data=True, dataset=dataset(), console=quiet())


def test_other_data_are_evaluated_if_asked_for_with_a_warning(tmp_path):
    made = replace(dataset(), name="digits")
    other = one_level_off(made)
    train(replace(SHORT, epochs=1), tmp_path, dataset=made, console=quiet())
    options = EvalOptions(tmp_path / CHECKPOINT, "clean", json=tmp_path / "eval.json")
    with pytest.raises(ValueError, match=r"data: expected .*--allow-other-data"):
        evaluate_checkpoint(options, dataset=other, console=quiet())
    options = replace(options, allow_other_data=True)
    with pytest.warns(UserWarning, match=f"data: expected .*digest {made.digest()}, got .*digest {other.digest()}"):
        result = evaluate_checkpoint(options, dataset=other, console=quiet())
    assert result["data"] == {"name": "digits", "digest": other.digest(), "digest_of_training": made.digest()}
    # The test images are the same ones, and the model normalises as it did in training.
    same = evaluate_checkpoint(options, dataset=made, console=quiet())
    assert same["data"] == {"name": "digits", "digest": made.digest()}
    assert same["accuracy"] == result["accuracy"]
    with pytest.raises(TypeError, match="dataset: expected None or a Dataset, got 'digits'"):
        evaluate_checkpoint(options, dataset="digits", console=quiet())  # type: ignore[arg-type]
    shape = replace(made, classes=made.classes[:2])
    with pytest.raises(ValueError, match="data: expected the number of classes"):
        evaluate_checkpoint(options, dataset=shape, console=quiet())


def test_the_commands_pass_it_on(monkeypatch, tmp_path, capsys):
    given = []
    monkeypatch.setattr(training, "train", lambda *args, **options: given.append(options) or 1 / 0)  # type: ignore[func-returns-value]
    with pytest.raises(ZeroDivisionError):
        cli.main(["train", "--resume", "--allow-other-data", "--out", str(tmp_path)])
    assert given[0]["allow_other_data"] is True
    assert cli.read_options("eval", ["c.pt", "--allow-other-data"]).allow_other_data is True
    assert cli.read_options("eval", ["c.pt"]).allow_other_data is False


def test_the_folder_of_a_run_may_be_a_string(tmp_path):
    train(replace(SHORT, epochs=1), str(tmp_path / "run"), dataset=dataset(), console=quiet())
    assert (tmp_path / "run" / RESULT).exists()


@pytest.mark.parametrize("folder", [None, 5, b"run"])
def test_a_folder_that_is_no_path(folder):
    with pytest.raises(TypeError, match="folder: expected a path, got "):
        train(SHORT, folder, dataset=dataset(), console=quiet())


@pytest.mark.parametrize("given", ["digits", 5])
def test_a_data_set_that_is_none(given, tmp_path):
    with pytest.raises(TypeError, match="dataset: expected None or a Dataset, got "):
        train(SHORT, tmp_path, dataset=given, console=quiet())
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("method", ["rs-fgsm", "elle-a", "free-at"])
def test_another_default_device_changes_nothing(method, tmp_path):
    config = replace(SHORT, method=method, epochs=1)
    expected = train(config, tmp_path / "cpu", dataset=dataset(), console=quiet())
    made = replace(dataset(), name="digits")
    with torch.device("meta"):
        result = train(config, tmp_path / "meta", dataset=made, console=quiet())
        evaluated = evaluate_checkpoint(
            EvalOptions(tmp_path / "meta" / CHECKPOINT, config.eval_attacks, device="cpu"),
            dataset=made,
            console=quiet(),
        )
        train(config, tmp_path / "meta", resume=True, dataset=made, console=quiet())
    assert result["accuracy"] == evaluated["accuracy"] == expected["accuracy"]
    weights = [checkpoint.load(tmp_path / where / CHECKPOINT)["model"] for where in ("cpu", "meta")]
    assert all(torch.equal(weights[0][name], weights[1][name]) for name in weights[0])


def test_too_little_memory_is_one_line(monkeypatch, capsys):
    def fail(*args, **options):
        raise MemoryError

    monkeypatch.setattr(training, "train", fail)
    assert cli.main(["train"]) == 2
    assert capsys.readouterr().err == "elle-fast train: not enough memory\n"
