"""Validation images, the best checkpoint, averaged weights and early stopping in a run."""

from __future__ import annotations

import json
from dataclasses import asdict, replace
from typing import Any

import pytest
import torch

from elle_fast import data
from elle_fast.evaluation import evaluate
from elle_fast.recipes import checkpoint, folder, progress
from elle_fast.recipes import result as ending
from elle_fast.recipes import train as training
from elle_fast.recipes.config import TrainConfig
from elle_fast.recipes.eval_options import EvalOptions
from elle_fast.recipes.evaluate import evaluate_checkpoint
from elle_fast.recipes.folder import BEST, LAST
from elle_fast.recipes.run import Run
from elle_fast.recipes.train import CHECKPOINT, PICTURE, RESULT, train
from tests.recipes.test_train import CONFIG, STEPS_PER_EPOCH, assert_same_run, dataset, quiet, rows

AVERAGED = replace(CONFIG, average=0.9, method="rs-fgsm", epochs=4)


def scripted(monkeypatch, trained, averaged=()):
    """PGD-10 accuracies on the validation images by epoch; those on the test images are left as they are."""
    script = {"clean,fgsm,pgd-10": iter(trained), "clean,pgd-10": iter(averaged)}

    def watched(model, batches, attacks, **options):
        found = evaluate(model, batches, attacks, **options)
        if attacks in script:
            found["pgd-10"] = {**found["pgd-10"], "accuracy": next(script[attacks])}
        return found

    monkeypatch.setattr(ending, "evaluate", watched)


def weights_by_epoch(monkeypatch):
    """The trained and the averaged weights after each epoch of the next run."""
    original, found = training._Loop._end_epoch, []

    def end_epoch(loop):
        average = None if loop.run.average is None else loop.run.average.module
        states = [None if each is None else each.state_dict() for each in (loop.run.model, average)]
        found.append([state and {name: value.clone() for name, value in state.items()} for state in states])
        return original(loop)

    monkeypatch.setattr(training._Loop, "_end_epoch", end_epoch)
    return found


def same(one, two):
    return one.keys() == two.keys() and all(torch.equal(value, two[name]) for name, value in one.items())


def test_only_held_out_images_are_watched_and_no_test_image_before_the_end(monkeypatch, tmp_path):
    made, seen, trained = dataset(), [], []
    held_out = made.train.held_out(CONFIG.validation)[1].images / 255
    take = training._Loop._step

    def step(loop, x, y):
        trained.append(x)
        return take(loop, x, y)

    def recorded(model, batches, attacks, **options):
        batches = list(batches)
        seen.append((torch.cat([x for x, _ in batches]), len(trained)))
        return evaluate(model, iter(batches), attacks, **options)

    def measure(model, split, eps):
        seen.append((split.images / 255, len(trained)))
        return {"novel": 0.5}

    monkeypatch.setattr(training._Loop, "_step", step)
    monkeypatch.setattr(ending, "evaluate", recorded)
    config = replace(CONFIG, augment=False, method="rs-fgsm", epochs=2)
    result = train(config, tmp_path, dataset=made, console=quiet(), measure=measure)
    total = 2 * STEPS_PER_EPOCH
    watched = [x for x, steps in seen if len(x) == len(held_out)]
    assert len(watched) == 4  # after each epoch: the attacks, and measure
    assert all(torch.equal(x, held_out) for x in watched)
    assert all(steps == total and torch.equal(x, made.test.images / 255) for x, steps in seen if len(x) == 40)
    assert len(seen) == 5 + (result["models"]["best"]["epoch"] != 2)
    drawn = {tuple(x.flatten().tolist()) for batch in trained for x in batch}
    assert len(drawn) == STEPS_PER_EPOCH * 16
    assert not drawn & {tuple(x.flatten().tolist()) for x in held_out}
    assert {row["novel"] for row in rows(tmp_path / "epochs.csv")} == {"0.5"}


def test_statistics_are_of_what_is_trained_on_and_the_digest_of_all(tmp_path):
    made = dataset()
    train(replace(CONFIG, epochs=1), tmp_path, dataset=made, console=quiet())
    saved = checkpoint.load(tmp_path / CHECKPOINT)
    rest = made.train.held_out(CONFIG.validation)[0].images.double() / 255
    assert saved["shape"]["mean"] == pytest.approx([rest.mean().item()], rel=1e-12)
    assert saved["shape"]["std"] == pytest.approx([rest.std(correction=0).item()], rel=1e-12)
    assert saved["shape"]["mean"] != list(made.mean)
    assert saved["data"] == made.digest()


def test_the_first_of_the_best_epochs_is_kept_of_each_kind_of_weights(monkeypatch, tmp_path):
    scripted(monkeypatch, [0.3, 0.5, 0.5, 0.1], [0.2, 0.3, 0.4, 0.35])
    states = weights_by_epoch(monkeypatch)
    result = train(AVERAGED, tmp_path, dataset=dataset(), console=quiet())
    assert result == json.loads((tmp_path / RESULT).read_text())
    files = {"last": CHECKPOINT, "best": "best.pt", "averaged": "averaged.pt", "best averaged": "best_averaged.pt"}
    assert {name: model["file"] for name, model in result["models"].items()} == files
    epochs = {"last": 4, "best": 2, "averaged": 4, "best averaged": 3}
    assert {name: model["epoch"] for name, model in result["models"].items()} == epochs
    assert result["accuracy"] == result["models"]["last"]["accuracy"]
    for name, file in files.items():
        model, config, saved = checkpoint.load_model(tmp_path / file)
        averaged = "averaged" in name
        assert same(saved["model"], states[epochs[name] - 1][averaged]), name
        assert saved["weights"] == ("averaged" if averaged else "trained")
        assert config == AVERAGED.resolved()
        assert saved["step"] == epochs[name] * STEPS_PER_EPOCH
        found = evaluate(model, data.in_order(dataset().test), "clean,pgd-2", eps=0.1)
        assert found == result["models"][name]["accuracy"]
    assert not same(states[1][0], states[1][1])
    assert [float(row["val_pgd_averaged"]) for row in rows(tmp_path / "epochs.csv")] == [0.2, 0.3, 0.4, 0.35]


def test_every_file_can_be_evaluated_and_says_what_it_holds(tmp_path):
    made = replace(dataset(), name="digits")
    result = train(AVERAGED, tmp_path, dataset=made, console=quiet())
    for name, model in result["models"].items():
        found = evaluate_checkpoint(EvalOptions(tmp_path / model["file"], "clean,pgd-2"), dataset=made, console=quiet())
        assert found["accuracy"] == model["accuracy"]
        assert found["weights"] == ("averaged" if "averaged" in name else "trained")
        assert found["step"] == STEPS_PER_EPOCH * model["epoch"]


def test_one_epoch_is_the_best_one_and_is_not_evaluated_twice(monkeypatch, tmp_path):
    calls = []

    def counted(model, batches, attacks, **options):
        calls.append(attacks)
        return evaluate(model, batches, attacks, **options)

    monkeypatch.setattr(ending, "evaluate", counted)
    result = train(replace(AVERAGED, epochs=1), tmp_path, dataset=dataset(), console=quiet())
    assert calls == ["clean,fgsm,pgd-10", "clean,pgd-10", "clean,pgd-2", "clean,pgd-2"]
    assert result["models"]["best"]["accuracy"] == result["models"]["last"]["accuracy"]


@pytest.mark.parametrize("where", ["save_weights", "save", "_step"])
def test_a_run_killed_anywhere_and_resumed_has_the_same_bits_in_every_file(where, monkeypatch, tmp_path):
    """Between the checkpoint and the best one, before both, and within an epoch."""
    script = [0.1, 0.4, 0.3, 0.5], [0.1, 0.2, 0.3, 0.1]
    scripted(monkeypatch, *script)
    train(AVERAGED, tmp_path / "whole", dataset=dataset(), console=quiet())
    owner: Any = training._Loop if where == "_step" else Run
    original = getattr(owner, where)

    def killed(self, *args):
        run = self.run if where == "_step" else self
        if run.step == (29 if where == "_step" else 32):
            raise KeyboardInterrupt
        return original(self, *args)

    scripted(monkeypatch, *script)
    with monkeypatch.context() as patched:
        patched.setattr(owner, where, killed)
        with pytest.raises(KeyboardInterrupt):
            train(AVERAGED, tmp_path / "resumed", dataset=dataset(), console=quiet())
    reached = {"save_weights": 32, "save": 30, "_step": 25}[where]
    assert checkpoint.load(tmp_path / "resumed" / CHECKPOINT)["step"] == reached
    assert checkpoint.load(tmp_path / "resumed" / "best.pt")["step"] == 16
    scripted(monkeypatch, script[0][3:], script[1][3:])
    train(AVERAGED, tmp_path / "resumed", resume=True, dataset=dataset(), console=quiet())
    assert_same_run(tmp_path / "whole", tmp_path / "resumed")
    for file in {*BEST.values(), *LAST.values()}:
        one, other = (checkpoint.load(tmp_path / name / file) for name in ("whole", "resumed"))
        assert same(one["model"], other["model"]), file
        assert one["step"] == other["step"]


SCRIPT = [0.3, 0.5, 0.4, 0.1], [0.2, 0.3, 0.2, 0.1]  # both kinds are best in epoch 2


def test_a_run_whose_best_checkpoint_is_gone_does_not_resume(monkeypatch, tmp_path):
    scripted(monkeypatch, *SCRIPT)
    train(AVERAGED, tmp_path, dataset=dataset(), console=quiet())
    (tmp_path / "best_averaged.pt").unlink()
    before = (tmp_path / CHECKPOINT).read_bytes()
    message = r"checkpoint: expected '.*best_averaged\.pt' with the averaged weights of epoch 2, .*; there is no such"
    with pytest.raises(FileNotFoundError, match=message):
        train(AVERAGED, tmp_path, resume=True, dataset=dataset(), console=quiet())
    assert (tmp_path / CHECKPOINT).read_bytes() == before


def other_data():
    made = dataset()
    made.train.images[0, 0, 0, 0] ^= 1
    return made


@pytest.mark.parametrize("at_the_end", [False, True], ids=["resumed", "ending"])
@pytest.mark.parametrize(
    "file, change, made, last, message",
    [
        (
            "best_averaged.pt",
            {"seed": 2},
            dataset,
            2,
            r"expected one of the same run, got .* with other seed = 1 \(checkpoint: 2\)",
        ),
        (
            "best.pt",
            {},
            other_data,
            2,
            "expected the trained weights of epoch 2, .*, got .* with the trained weights of epoch 2 of ano",
        ),
        (
            "best.pt",
            {},
            dataset,
            4,
            "expected the trained weights of epoch 2, .*, got .* with the trained weights of epoch 4 of ano",
        ),
    ],
    ids=["config", "data", "epoch"],
)
def test_a_best_checkpoint_of_another_run_is_refused(
    file, change, made, last, message, at_the_end, monkeypatch, tmp_path
):
    scripted(monkeypatch, *([0.5 if epoch == last else 0.1 for epoch in range(1, 5)] for _ in range(2)))
    train(replace(AVERAGED, **change), tmp_path / "other", dataset=made(), console=quiet())
    mine, epochs = tmp_path / "mine", list[int]()

    def swap():
        (mine / file).write_bytes((tmp_path / "other" / file).read_bytes())

    def measure(model, split, eps):
        epochs.append(len(epochs))
        if at_the_end and len(epochs) == 4:
            swap()
        return {}

    def run(**options):
        train(AVERAGED, mine, dataset=dataset(), console=quiet(), **options)

    message = f"checkpoint: {message}".replace("got .*", f"got '{mine / file}'")
    scripted(monkeypatch, *SCRIPT)
    if not at_the_end:
        run()
        swap()
        (mine / RESULT).unlink()
    with pytest.raises(ValueError, match=message):
        run(**({"measure": measure} if at_the_end else {"resume": True}))
    assert not (mine / RESULT).exists()
    assert checkpoint.load(mine / CHECKPOINT)["step"] == 4 * STEPS_PER_EPOCH


def test_another_epoch_or_kind_of_weights_of_the_same_run_is_refused(monkeypatch, tmp_path):
    scripted(monkeypatch, *SCRIPT)
    train(AVERAGED, tmp_path, dataset=dataset(), console=quiet())
    best, kept = tmp_path / "best.pt", (tmp_path / "best.pt").read_bytes()
    for file, got in (
        ("averaged.pt", "averaged weights of epoch 4"),
        ("best_averaged.pt", "averaged weights of epoch 2"),
    ):
        best.write_bytes((tmp_path / file).read_bytes())
        with pytest.raises(ValueError, match=rf"trained weights of epoch 2, .*got '.*best\.pt' with the {got}$"):
            train(AVERAGED, tmp_path, resume=True, dataset=dataset(), console=quiet())
    best.write_bytes(kept)
    train(AVERAGED, tmp_path, resume=True, dataset=dataset(), console=quiet())


def test_a_best_checkpoint_cannot_be_resumed(tmp_path):
    train(AVERAGED, tmp_path, dataset=dataset(), console=quiet())
    (tmp_path / "best.pt").replace(tmp_path / CHECKPOINT)
    (tmp_path / "best.pt").touch()
    with pytest.raises(ValueError, match=r"checkpoint: expected .*checkpoint\.pt'"):
        train(AVERAGED, tmp_path, resume=True, dataset=dataset(), console=quiet())


def test_another_average_is_another_run(tmp_path):
    train(replace(AVERAGED, epochs=1), tmp_path, dataset=dataset(), console=quiet())
    for other in (0.5, None):
        with pytest.raises(ValueError, match=rf"with other average = {other} \(checkpoint: 0.9\)"):
            train(replace(AVERAGED, epochs=1, average=other), tmp_path, resume=True, dataset=dataset(), console=quiet())


@pytest.mark.parametrize(
    "trained, averaged, last",
    [
        ([0.3, 0.2, 0.3, 0.9], [0.1, 0.1, 0.1, 0.1], 3),  # an equal one is not better
        ([0.3, 0.2, 0.1, 0.2, 0.1], [0.1, 0.1, 0.2, 0.1, 0.1], 5),  # the average was better in epoch 3
        ([0.1, 0.2, 0.3, 0.4, 0.5, 0.6], [0.1] * 6, 6),
    ],
)
def test_patience_ends_a_run_and_leaves_its_schedule(trained, averaged, last, monkeypatch, tmp_path):
    config = replace(AVERAGED, epochs=6, patience=2)
    scripted(monkeypatch, trained, averaged)
    console = quiet()
    result = train(config, tmp_path / "patient", dataset=dataset(), console=console)
    assert result["epochs"] == len(rows(tmp_path / "patient" / "epochs.csv")) == last
    said = f"stopped after epoch {last}: no better PGD-10 accuracy on the validation images in 2 epochs\n"
    assert (said in console.file.getvalue()) == (last < 6)
    # The rates of a run that does not stop.
    scripted(monkeypatch, [0.1] * 6, [0.1] * 6)
    train(replace(config, patience=None), tmp_path / "whole", dataset=dataset(), console=quiet())
    steps = rows(tmp_path / "whole" / "steps.csv")[: last * STEPS_PER_EPOCH]
    assert rows(tmp_path / "patient" / "steps.csv") == steps
    # It stays where it stopped.
    assert (
        train(config, tmp_path / "patient", resume=True, dataset=dataset(), console=quiet())["models"]
        == result["models"]
    )


@pytest.mark.parametrize("eps_warmup, last", [(0, 3), (1.5, 4), (2.0, 4), (2.5, 5)])
def test_patience_is_counted_from_the_end_of_the_warm_up_of_eps(eps_warmup, last, monkeypatch, tmp_path):
    scripted(monkeypatch, [0.3, 0.2, 0.1, 0.1, 0.1, 0.1])
    config = replace(CONFIG, method="fgsm", epochs=6, patience=2, eps_warmup=eps_warmup)
    result = train(config, tmp_path, dataset=dataset(), console=quiet())
    assert (result["epochs"], result["models"]["best"]["epoch"]) == (last, 1)


def test_without_validation_images_nothing_is_watched_or_chosen(pictures, tmp_path):
    config = replace(AVERAGED, validation=0, epochs=2)
    console = quiet()
    result = train(config, tmp_path, dataset=dataset(), console=console)
    assert "warning" not in console.file.getvalue()
    assert list(result["models"]) == ["last", "averaged"]
    assert [result[name] for name in ("e_lin", "collapsed", "never_robust", "collapsed_in_epoch")] == [None] * 4
    assert not any(name.startswith("val_") or name == "collapsed" for name in rows(tmp_path / "epochs.csv")[0])
    assert (tmp_path / PICTURE).exists()
    assert not any((tmp_path / name).exists() for name in BEST.values())
    assert checkpoint.load(tmp_path / CHECKPOINT)["step"] == 2 * (STEPS_PER_EPOCH + 1)  # the 16 images are one batch
    train(config, tmp_path, resume=True, dataset=dataset(), console=quiet())


@pytest.mark.parametrize(
    "change, options, error",
    [
        ({"validation": 144}, {}, "validation: expected fewer than the 144 training images, .*, got 144"),
        ({"validation": 10**6}, {}, "validation: expected fewer than the 144 training images, .*, got 1000000"),
        ({"validation": 0, "patience": 3}, {}, "patience: expected None without validation images, got 3"),
        ({"validation": 0}, {"measure": lambda *given: {}}, "measure: expected None without validation images"),
        (
            {"validation": None},
            {},
            "validation: expected fewer than the 144 training images, .*, got 180",
        ),  # that of digits
    ],
)
def test_what_cannot_be_held_out_or_waited_for_is_refused_before_anything_is_written(change, options, error, tmp_path):
    with pytest.raises(ValueError, match=error):
        train(replace(CONFIG, **change), tmp_path / "run", dataset=dataset(), console=quiet(), **options)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    "options, expected",
    [({}, 180), ({"data": "cifar10"}, 1024), ({"limit": 64}, 8), ({"data": "svhn", "limit": 4_000}, 500)],
)
def test_the_number_of_images_held_out_by_default(options, expected):
    assert TrainConfig(**options).resolved().validation == expected
    assert asdict(TrainConfig(**options, validation=7).resolved())["validation"] == 7


@pytest.mark.parametrize(
    "change, error",
    [
        ({"validation": -1}, ValueError),
        ({"validation": 8.0}, TypeError),
        ({"patience": 0}, ValueError),
        ({"average": 1.0}, ValueError),
        ({"average": 0}, ValueError),
        ({"average": "0.9"}, TypeError),
    ],
)
def test_bad_values_name_their_option(change, error):
    (name,) = change
    with pytest.raises(error, match=f"^{name}: expected "):
        TrainConfig(**change)


def test_an_earlier_runs_best_checkpoints_are_not_taken_for_the_new_ones(monkeypatch, tmp_path):
    train(replace(AVERAGED, epochs=1), tmp_path, dataset=dataset(), console=quiet())
    assert {*BEST.values(), *LAST.values()} <= {path.name for path in tmp_path.iterdir()}
    folder.clear(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == [CHECKPOINT]


def test_a_line_says_each_model_and_its_epoch():
    found = {"clean": {"accuracy": 0.5, "samples": 8}, "pgd-2": {"accuracy": 0.25, "samples": 8}}
    models = {name: {"epoch": epoch, "accuracy": found} for name, epoch in (("last", 4), ("best averaged", 3))}
    assert progress.describe_result({"accuracy": found, "models": models}) == [
        "clean         50.00%  of 8 test images",
        "pgd-2         25.00%  of 8 test images",
        "best averaged   epoch 3: clean 50.00%  pgd-2 25.00%",
    ]
