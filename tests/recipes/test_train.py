import csv
import io
import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import asdict, replace
from functools import partial
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from matplotlib.text import Annotation
from rich.console import Console

from elle_fast import data, methods
from elle_fast.backends import extension
from elle_fast.data import Dataset, Split, in_order
from elle_fast.evaluation import evaluate
from elle_fast.recipes import checkpoint, meter, plot
from elle_fast.recipes import result as ending
from elle_fast.recipes import train as training
from elle_fast.recipes.config import TrainConfig
from elle_fast.recipes.demo import METHODS, SETTING
from elle_fast.recipes.eval_options import EvalOptions
from elle_fast.recipes.evaluate import evaluate_checkpoint
from elle_fast.recipes.logs import RunLog
from elle_fast.recipes.train import CHECKPOINT, PICTURE, RESULT, train

STEPS_PER_EPOCH = 8
CONFIG = TrainConfig(
    model="cnn",
    width=4,
    method="elle-a",
    eps=0.1,
    epochs=3,
    batch_size=16,
    seed=1,
    device="cpu",
    validation=16,
    eval_attacks="clean,pgd-2",
    log_every=1,
    checkpoint_every=5,
)

# A child process that trains on the same data, and at the start of its 13th step, in the middle of the second epoch,
# kills itself. Its last checkpoint is that of step 10.
CHILD = """
import os, pathlib, signal, sys
import torch
torch.set_num_threads(1)
from tests.recipes.test_train import CONFIG, dataset
from elle_fast.recipes import train as training
steps, original = 0, training._Loop._step
def step(loop, *args):
    global steps
    steps += 1
    if steps == 13:
        os.kill(os.getpid(), signal.SIGKILL)
    return original(loop, *args)
training._Loop._step = step
training.train(CONFIG, pathlib.Path(sys.argv[1]), dataset=dataset())
"""


def dataset():
    """Three classes of 8x8 images, told apart by their brightness: 8 batches of 16, 16 to hold out, and 40 to test."""
    generator = torch.Generator().manual_seed(0)

    def split(count):
        labels = torch.arange(count) % 3
        noise = torch.randint(0, 60, (count, 1, 8, 8), generator=generator)
        return Split((noise + 80 * labels.view(-1, 1, 1, 1)).to(torch.uint8), labels)

    return Dataset(
        name="bright", train=split(STEPS_PER_EPOCH * 16 + 16), test=split(40), classes=("a", "b", "c"), augment=True
    )


def quiet():
    return Console(file=io.StringIO())


def rows(path):
    return list(csv.DictReader(path.read_text().splitlines()))


@pytest.fixture(autouse=True)
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def whole_run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("whole")
    torch.set_num_threads(1)
    return folder, train(CONFIG, folder, dataset=dataset(), console=quiet())


def assert_same_run(folder, other):
    """Weights, optimiser, lam, history and generator agree to the bit; so do the logs, but for the seconds."""
    first, second = checkpoint.load(folder / CHECKPOINT), checkpoint.load(other / CHECKPOINT)
    for part in ("model", "average", "criterion"):
        assert first[part].keys() == second[part].keys()
        assert all(torch.equal(value, second[part][name]) for name, value in first[part].items())
    for index, state in first["optimizer"]["state"].items():
        assert state
        assert all(torch.equal(value, second["optimizer"]["state"][index][name]) for name, value in state.items())
    assert torch.equal(first["rng"]["cpu"], second["rng"]["cpu"])
    assert first["scaler"] == second["scaler"]
    assert first["step"] == second["step"]
    assert rows(folder / "steps.csv") == rows(other / "steps.csv")
    for one, two in zip(first["history"]["epochs"], second["history"]["epochs"], strict=True):
        assert {**one, "seconds": 0} == {**two, "seconds": 0}


@pytest.fixture
def no_signal_gets_through():
    """One that nobody caught fails the test; the process goes on."""
    numbers = (signal.SIGINT, signal.SIGTERM)
    before = [signal.signal(number, lambda *args: pytest.fail("nobody caught the signal")) for number in numbers]
    yield
    for number, handler in zip(numbers, before, strict=True):
        signal.signal(number, handler)


def test_a_run_leaves_everything_it_promises(whole_run):
    folder, result = whole_run
    assert json.loads((folder / RESULT).read_text()) == result
    assert (folder / PICTURE).read_bytes().startswith(b"\x89PNG")
    assert list((folder / "tensorboard").iterdir())
    assert len(rows(folder / "steps.csv")) == 3 * STEPS_PER_EPOCH
    assert [row["epoch"] for row in rows(folder / "epochs.csv")] == ["1", "2", "3"]
    assert result["config"]["lam"] == 300.0
    assert result["accuracy"]["clean"]["samples"] == 40
    assert {"machine", "versions", "commit", "command"} <= result.keys()
    assert not [path for path in folder.iterdir() if path.name.startswith(".")]


def test_training_learns(whole_run):
    _, result = whole_run
    assert result["accuracy"]["clean"]["accuracy"] > 0.6  # chance is a third


def test_epoch_rows_are_the_means_of_their_step_rows(whole_run):
    folder, _ = whole_run
    steps, epochs = rows(folder / "steps.csv"), rows(folder / "epochs.csv")
    for name in ("loss", "ce", "e_lin", "lam", "train_adv"):
        for epoch in (1, 2, 3):
            part = [float(row[name]) for row in steps if row["epoch"] == str(epoch)]
            assert float(epochs[epoch - 1][name]) == pytest.approx(sum(part) / STEPS_PER_EPOCH, rel=1e-9)


def test_same_configuration_same_bits(whole_run, tmp_path):
    train(CONFIG, tmp_path, dataset=dataset(), console=quiet())
    assert_same_run(whole_run[0], tmp_path)


def test_another_seed_gives_another_run(whole_run, tmp_path):
    train(replace(CONFIG, seed=2), tmp_path, dataset=dataset(), console=quiet())
    assert rows(tmp_path / "steps.csv") != rows(whole_run[0] / "steps.csv")


def test_resume_after_sigkill_in_the_middle_of_an_epoch_gives_the_same_bits(whole_run, tmp_path):
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join([".", *sys.path])}
    command = [sys.executable, "-c", CHILD, str(tmp_path)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == -signal.SIGKILL, done.stderr
    assert checkpoint.load(tmp_path / CHECKPOINT)["step"] == 10
    assert not (tmp_path / RESULT).exists()
    train(CONFIG, tmp_path, resume=True, dataset=dataset(), console=quiet())
    assert_same_run(whole_run[0], tmp_path)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_an_interrupt_finishes_the_step_and_leaves_a_checkpoint(
    whole_run, tmp_path, monkeypatch, no_signal_gets_through, number
):
    """And no time is lost or counted twice: a step takes a second of the clock here."""
    seconds, original = 100.0, training._Loop._step

    def step(loop, *args):
        nonlocal seconds
        seconds += 1
        if seconds == 113:
            os.kill(os.getpid(), number)
        return original(loop, *args)

    monkeypatch.setattr(training._Loop, "_step", step)
    monkeypatch.setattr(training, "time", SimpleNamespace(perf_counter=lambda: seconds))
    with pytest.raises(training.InterruptedRunError, match="stopped after step 13 of 24"):
        train(CONFIG, tmp_path, dataset=dataset(), console=quiet())
    assert checkpoint.load(tmp_path / CHECKPOINT)["step"] == 13
    seconds = 1000.0
    train(CONFIG, tmp_path, resume=True, dataset=dataset(), console=quiet())
    assert_same_run(whole_run[0], tmp_path)
    assert [float(row["seconds"]) for row in rows(tmp_path / "epochs.csv")] == 3 * [STEPS_PER_EPOCH]


def test_an_interrupt_after_the_last_step_is_not_lost(tmp_path, monkeypatch, no_signal_gets_through):
    writes, original = 0, RunLog.write

    def write(log):
        nonlocal writes
        original(log)
        writes += bool(log.history["epochs"])
        if writes == 2:  # the one after the loop
            os.kill(os.getpid(), signal.SIGTERM)

    monkeypatch.setattr(RunLog, "write", write)
    config = replace(CONFIG, epochs=1)
    with pytest.raises(training.InterruptedRunError, match="stopped after step 8 of 8"):
        train(config, tmp_path, dataset=dataset(), console=quiet())
    assert not (tmp_path / RESULT).exists()
    assert train(config, tmp_path, resume=True, dataset=dataset(), console=quiet())["accuracy"]


@pytest.mark.gpu
def test_the_clock_waits_for_the_steps_that_a_gpu_has_yet_to_do():
    device, done = torch.device("cuda"), torch.cuda.Event()
    loop: Any = SimpleNamespace(run=SimpleNamespace(device=device), began=time.perf_counter())
    torch.cuda._sleep(500_000_000)  # cycles: a quarter of a second
    done.record()
    assert not done.query()
    training._Loop._read_clock(loop)
    assert done.query()
    assert loop.run.seconds > 0.05


def test_resuming_a_finished_run_changes_nothing(whole_run, tmp_path):
    train(CONFIG, tmp_path, dataset=dataset(), console=quiet())
    train(CONFIG, tmp_path, resume=True, dataset=dataset(), console=quiet())
    assert_same_run(whole_run[0], tmp_path)


@pytest.mark.parametrize("method", methods.NAMES)
def test_every_method_trains_on_points_that_are_clamped_where_it_says_so(method, monkeypatch, tmp_path):
    lowest = []
    original = training._Loop._step

    def step(loop, x, y):
        hook = loop.run.model.register_forward_pre_hook(lambda module, args: lowest.append(args[0].min().item()))
        try:
            return original(loop, x, y)
        finally:
            hook.remove()

    monkeypatch.setattr(training._Loop, "_step", step)
    result = train(replace(CONFIG, method=method, epochs=1), tmp_path, dataset=dataset(), console=quiet())
    found, row = rows(tmp_path / "steps.csv")[-1], methods.TABLE[method]
    adaptive = method in ("cure-fgsm", "llr")
    assert ("lam" in found) == ("elle" in method or adaptive)
    penalized = "lam" in row.takes and not row.levers and method != "fast-bat"
    assert ("penalty" in found) == penalized
    assert {"loss", "train_adv"} <= found.keys()
    assert not {"skipped", "train_clean"} & found.keys()
    assert 0 <= result["accuracy"]["pgd-2"]["accuracy"] <= result["accuracy"]["clean"]["accuracy"] <= 1
    # The noise of TRADES and MART is on the way to the points that are trained on.
    within = row.clamp == "all" or method == "plain"
    assert min(lowest) >= (-0.01 if method.startswith(("trades", "mart")) else 0) if within else min(lowest) < -0.02


def test_free_at_replays_each_batch_and_resumes_within_one_to_the_bit(monkeypatch, tmp_path):
    config, original, batches, stop = replace(CONFIG, method="free-at"), training._Loop._step, [], 0

    def step(loop, x, y):
        batches.append(y)
        if len(batches) == stop:
            os.kill(os.getpid(), signal.SIGTERM)
        return original(loop, x, y)

    monkeypatch.setattr(training._Loop, "_step", step)
    train(config, tmp_path / "whole", dataset=dataset(), console=quiet())
    changes = [place for place in range(1, len(batches)) if not torch.equal(batches[place - 1], batches[place])]
    assert changes == [8, 16]
    assert len(batches) == 3 * STEPS_PER_EPOCH
    whole, stop = batches.copy(), 13
    batches.clear()
    with pytest.raises(training.InterruptedRunError):
        train(config, tmp_path / "resumed", dataset=dataset(), console=quiet())
    stop = 0
    train(config, tmp_path / "resumed", resume=True, dataset=dataset(), console=quiet())
    assert all(torch.equal(one, other) for one, other in zip(whole, batches, strict=True))
    assert_same_run(tmp_path / "whole", tmp_path / "resumed")
    assert checkpoint.load(tmp_path / "whole" / CHECKPOINT)["criterion"]["_extra_state"].abs().max() == pytest.approx(
        0.1
    )


@pytest.mark.parametrize("method", ["cuap", "fuap", "liet"])
def test_perturbations_that_are_kept_are_part_of_a_resume(method, monkeypatch, tmp_path):
    config, original, steps = replace(CONFIG, method=method), training._Loop._step, []

    def step(loop, x, y):
        steps.append(y)
        if len(steps) == 13:
            os.kill(os.getpid(), signal.SIGTERM)
        return original(loop, x, y)

    train(config, tmp_path / "whole", dataset=dataset(), console=quiet())
    monkeypatch.setattr(training._Loop, "_step", step)
    with pytest.raises(training.InterruptedRunError):
        train(config, tmp_path / "resumed", dataset=dataset(), console=quiet())
    train(config, tmp_path / "resumed", resume=True, dataset=dataset(), console=quiet())
    assert_same_run(tmp_path / "whole", tmp_path / "resumed")
    (kept,) = (
        value
        for value in checkpoint.load(tmp_path / "whole" / CHECKPOINT)["criterion"].values()
        if value.dtype == torch.int8
    )
    assert kept.unique().tolist() in ([-1, 1], [-1, 0, 1])


def watched(monkeypatch, pgd_of_epochs):
    """Runs see these accuracies under PGD-10 after their epochs, then 0.7; and 1 under the training attack."""
    original = evaluate

    def broken(*args, **options):
        found = original(*args, **options)
        if "pgd-10" not in found:
            return found
        calls.append(1)
        pgd = (*pgd_of_epochs, 0.7)[len(calls) - 1]
        return {name: {**numbers, "accuracy": pgd if "pgd" in name else 1.0} for name, numbers in found.items()}

    calls: list[int] = []
    monkeypatch.setattr(ending, "evaluate", broken)
    monkeypatch.setattr(training, "averages", lambda *args: {**meter.averages(*args), "train_adv": 1.0})


@pytest.mark.parametrize(
    "pgd_of_epochs, said_first, said_then, first",
    [
        ((0.7, 0.0, 0.7), "COLLAPSE in epoch 2: 0.0% of the", "recovered in epoch 3: 70.0%", 2),
        ((0.0, 0.0, 0.7), "NOT ROBUST in epoch 1: 100.0% of the", "robust in epoch 3: 70.0%", None),
    ],
)
def test_a_collapse_is_said_the_moment_it_is_found_and_so_is_a_recovery(
    pgd_of_epochs, said_first, said_then, first, monkeypatch, tmp_path
):
    watched(monkeypatch, pgd_of_epochs)
    console = quiet()
    result = train(CONFIG, tmp_path, dataset=dataset(), console=console)
    said = console.file.getvalue()
    assert said.count(said_first) == said.count("COLLAPSE") + said.count("NOT ROBUST") == 1
    assert said.index(said_first) < said.index("epoch 3/3")
    assert said.count("recovered") == said_then.count("recovered")
    assert said.count(f"\n{said_then}") == 1
    assert result["collapsed_in_epoch"] == first
    assert (result["collapsed"], result["never_robust"]) == (False, False)


def test_a_resumed_run_remembers_what_it_withstood(monkeypatch, tmp_path):
    original = training._Loop._step

    def step(loop, x, y):
        if loop.run.step == STEPS_PER_EPOCH + 2:
            os.kill(os.getpid(), signal.SIGTERM)
        return original(loop, x, y)

    with monkeypatch.context() as first:
        watched(first, (0.7,))
        first.setattr(training._Loop, "_step", step)
        with pytest.raises(training.InterruptedRunError):
            train(CONFIG, tmp_path, dataset=dataset(), console=quiet())
    watched(monkeypatch, (0.0, 0.0))
    console = quiet()
    result = train(CONFIG, tmp_path, resume=True, dataset=dataset(), console=console)
    said = "COLLAPSE in epoch 2: 0.0% of the validation images withstand PGD-10, after 70.0% in epoch 1, while 100.0%"
    assert said in console.file.getvalue()
    assert (result["collapsed"], result["never_robust"], result["collapsed_in_epoch"]) == (True, False, 2)


def test_the_picture_says_whether_a_run_was_ever_robust(tmp_path, monkeypatch):
    numbers = {"train_adv": 0.9, "val_clean": 0.9, "val_pgd": 0.0, "val_e_lin": 1e-3}
    texts: list[str] = []
    monkeypatch.setattr(plot, "write_figure", lambda figure, path: texts.extend(map(str, figure.findobj(Annotation))))
    for collapsed in (False, True):
        state = {"collapsed": collapsed, "never_robust": not collapsed}
        epochs = [{**numbers, **state, "step": 8 * n, "epoch": n} for n in (1, 2)]
        plot.plot_curves({"fgsm": {"steps": [], "epochs": epochs}}, tmp_path / "x.png", title="")
    assert ["was never robust" in text for text in texts if "fgsm" in text] == [True, False]
    assert ["has collapsed" in text for text in texts if "fgsm" in text] == [False, True]


def test_a_loss_that_is_not_finite_stops_the_run_and_keeps_the_last_good_checkpoint(monkeypatch, tmp_path):
    original = training._Loop._step

    def step(loop, x, y):
        return original(loop, x * torch.nan if loop.run.step == 12 else x, y)

    monkeypatch.setattr(training._Loop, "_step", step)
    with pytest.raises(RuntimeError, match=r"loss: expected finite numbers and weights, got nan at or before step 13"):
        train(CONFIG, tmp_path, dataset=dataset(), console=quiet())
    saved = checkpoint.load(tmp_path / CHECKPOINT)
    assert saved["step"] == 10
    assert all(value.isfinite().all() for value in saved["model"].values())
    assert all(value.isfinite().all() for value in saved["criterion"].values())
    assert not (tmp_path / RESULT).exists()


def test_a_nan_between_two_rows_of_the_log_is_found_before_the_next_checkpoint(monkeypatch, tmp_path):
    original = training._Loop._step

    def step(loop, x, y):
        original(loop, x, y)
        if loop.run.step == 11:
            loop.run.meter.sums += torch.nan

    monkeypatch.setattr(training._Loop, "_step", step)
    with pytest.raises(RuntimeError, match="loss: expected finite numbers and weights"):
        train(replace(CONFIG, log_every=1000), tmp_path, dataset=dataset(), console=quiet())
    assert checkpoint.load(tmp_path / CHECKPOINT)["step"] == 10


def test_a_folder_with_a_run_is_not_overwritten_unasked(whole_run, tmp_path):
    with pytest.raises(FileExistsError, match=r"out: .* holds a run"):
        train(CONFIG, whole_run[0], dataset=dataset(), console=quiet())
    train(replace(CONFIG, epochs=1), tmp_path, dataset=dataset(), console=quiet())
    train(replace(CONFIG, epochs=1, seed=9), tmp_path, overwrite=True, dataset=dataset(), console=quiet())
    assert checkpoint.load(tmp_path / CHECKPOINT)["config"]["seed"] == 9


def test_other_images_are_not_resumed(whole_run):
    other = dataset()
    other = replace(other, train=Split(255 - other.train.images, other.train.labels))
    with pytest.raises(ValueError, match=r"data: expected those of the training of .*digest .*, got others, digest "):
        train(CONFIG, whole_run[0], resume=True, dataset=other, console=quiet())


def test_a_new_run_removes_what_the_old_one_left(monkeypatch, tmp_path):
    train(replace(CONFIG, epochs=1), tmp_path, dataset=dataset(), console=quiet())
    monkeypatch.setattr(training, "_Loop", lambda *args: pytest.fail("stopped here"))
    with pytest.raises(pytest.fail.Exception):
        train(CONFIG, tmp_path, overwrite=True, dataset=dataset(), console=quiet())
    assert [path.name for path in tmp_path.iterdir()] == [CHECKPOINT]


def second_moment(run):
    return next(iter(run.optimizer.state.values()))["exp_avg_sq"]


@pytest.mark.parametrize(
    "ruined_part",
    [
        lambda run: next(run.model.parameters()).data,
        second_moment,
        lambda run: next(value for value in run.criterion.state_dict().values() if value.is_floating_point()),
    ],
    ids=["weights", "optimizer", "criterion"],
)
@pytest.mark.parametrize("ruined_in, last", [(24, 20), (20, 16)], ids=str)
def test_an_update_that_ruins_what_a_checkpoint_holds_is_not_saved(ruined_part, ruined_in, last, monkeypatch, tmp_path):
    original = training._Loop._step

    def step(loop, x, y):
        original(loop, x, y)
        if loop.run.step == ruined_in - 1:
            ruined_part(loop.run).fill_(torch.inf)

    monkeypatch.setattr(training._Loop, "_step", step)
    config = replace(CONFIG, optimizer="adamw", learning_rate=1e-3, log_every=1000)
    with pytest.raises(RuntimeError, match=r"expected finite numbers and weights, got .* at or before step"):
        train(config, tmp_path, dataset=dataset(), console=quiet())
    assert not (tmp_path / RESULT).exists()
    assert checkpoint.load(tmp_path / CHECKPOINT)["step"] == last


def test_resume_and_overwrite_exclude_each_other(tmp_path):
    with pytest.raises(ValueError, match="resume, overwrite: expected at most one"):
        train(CONFIG, tmp_path, resume=True, overwrite=True, dataset=dataset(), console=quiet())


def test_nothing_to_resume(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"checkpoint: expected a file, got .* where there is none"):
        train(CONFIG, tmp_path, resume=True, dataset=dataset(), console=quiet())
    assert not list(tmp_path.iterdir())


def test_a_checkpoint_of_another_run_is_refused(whole_run):
    with pytest.raises(ValueError, match=r"checkpoint: .*eps = 0.2 \(checkpoint: 0.1\).*seed = 3 \(checkpoint: 1\)"):
        train(replace(CONFIG, eps=0.2, seed=3), whole_run[0], resume=True, dataset=dataset(), console=quiet())


@pytest.mark.parametrize(
    "change, message",
    [
        ({"data": "imagenet"}, "data: expected one of 'digits'"),
        ({"model": "resnet51"}, "model: expected one of 'preact'"),
        ({"method": "trades"}, "method: expected one of 'plain'"),
        ({"schedule": "cyclic"}, "schedule: expected one of"),
        ({"eps": -0.1}, "eps: expected a finite number"),
        ({"eps": float("nan")}, "eps: expected a finite number"),
        ({"lam": -1.0}, "lam: expected a finite number"),
        ({"method": "fgsm", "lam": 1.0}, "lam: method 'fgsm' has no weight"),
        ({"epochs": 0}, "epochs: expected an integer >= 1, got 0"),
        ({"batch_size": 0}, "batch_size: expected an integer >= 1, got 0"),
        ({"learning_rate": float("inf")}, "learning_rate: expected a finite number"),
        ({"validation": -1}, "validation: expected an integer >= 0"),
        ({"limit": 0}, "limit: expected an integer >= 1"),
        ({"eval_attacks": "cw"}, "attacks: expected names among"),
        ({"forward": "fused"}, "forward: expected one of 'packed', 'split', 'checkpoint'"),
        ({"skip_below": 1.5}, "skip_below: expected"),
        ({"method": "elle", "skip_below": 0.1}, "skip_below: method 'elle' takes .*; method 'elle-a' takes it"),
        ({"method": "elle", "lagged": True}, "lagged: method 'elle' takes .*; method 'elle-a' takes it"),
        ({"triplet_fraction": 0.0}, "triplet_fraction: expected"),
        ({"points": "elle-2p"}, "points: expected one of 'elle', 'five-point', got 'elle-2p'"),
        ({"alpha": "third"}, "alpha: expected one of 'uniform', 'half', 'argmax', got 'third'"),
        ({"penalty": "cubed"}, "penalty: expected one of 'squared', "),
        ({"penalty": "abs"}, "lam: expected a number with penalty='abs', which has no default"),
        ({"method": "nuat", "penalty": "abs"}, "penalty: method 'nuat' has no E_lin term"),
        ({"window": 2}, "window: expected an integer >= 3 and <= .*, got 2"),
        ({"method": "elle", "window": 5}, "window: method 'elle' takes .*; method 'elle-a' takes it"),
        ({"method": "pgd-at", "norm": "l2"}, "norm: method 'pgd-at' has no E_lin"),
        ({"method": "gat+elle-a", "norm": "l2"}, "norm: method 'gat\\+elle-a' takes .* only"),
        ({"method": "advmixup-single+elle", "norm": "l2"}, "norm: method 'advmixup-single\\+elle' attacks in linf"),
        ({"points": "five-point", "alpha": "half"}, "alpha: expected 'uniform' with points='five-point'"),
        ({"triplets": 0}, "triplets: expected an integer"),
        ({"method": "pgd-at", "forward": "split"}, "forward: method 'pgd-at' has no E_lin"),
    ],
)
def test_bad_settings_are_refused_before_anything_is_written(change, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        train(replace(CONFIG, **change), tmp_path / "run", dataset=dataset(), console=quiet())
    assert not (tmp_path / "run").exists()


def test_defaults_follow_the_schedule_the_method_and_the_data_set():
    assert TrainConfig(data="cifar10", method="elle").resolved().lam == 5000
    assert TrainConfig(data="svhn", method="n-fgsm+elle-a").resolved().lam == 5000
    folder = TrainConfig(data="image-folder", method="elle-a")
    for size, lam in ((None, 4000), (64, 4000), (224, 10000)):
        assert replace(folder, image_size=size).resolved().lam == lam
    assert TrainConfig(data="mnist", method="elle").resolved().lam == 1000
    assert TrainConfig(method="fgsm").resolved().lam is None
    long_cos = TrainConfig(schedule="long-cos").resolved()
    assert (long_cos.epochs, long_cos.batch_size) == (200, 256)
    assert asdict(long_cos.resolved()) == asdict(long_cos)


@pytest.mark.parametrize(
    "levers",
    [
        {"forward": "split", "lagged": True},
        {"forward": "checkpoint"},
        {"triplet_fraction": 0.5},
        {"points": "five-point"},
        {"triplets": 2, "alpha": "half"},
        {"alpha": "argmax", "penalty": "smooth_l1"},
        {"norm": "l2"},
    ],
)
def test_levers_reach_the_criterion(levers, monkeypatch, tmp_path):
    built, row = [], methods.TABLE[CONFIG.method]

    def make(**options):
        built.append(options)
        return row.make(**options)

    monkeypatch.setitem(methods.TABLE, CONFIG.method, replace(row, make=make))
    result = train(replace(CONFIG, epochs=1, **levers), tmp_path, dataset=dataset(), console=quiet())
    assert built
    assert all(levers.items() <= options.items() for options in built)
    assert levers.items() <= result["config"].items()
    assert "full_steps" not in result


def test_the_window_of_elle_a_survives_a_resume(monkeypatch, tmp_path):
    config, step = replace(CONFIG, window=4, epochs=2, lam=50.0), training._Loop._step
    train(config, tmp_path / "whole", dataset=dataset(), console=quiet())

    def interrupted(loop, *args):
        if loop.run.step == 11:
            os.kill(os.getpid(), signal.SIGTERM)
        return step(loop, *args)

    monkeypatch.setattr(training._Loop, "_step", interrupted)
    with pytest.raises(training.InterruptedRunError):
        train(config, tmp_path / "resumed", dataset=dataset(), console=quiet())
    monkeypatch.setattr(training._Loop, "_step", step)
    train(config, tmp_path / "resumed", resume=True, dataset=dataset(), console=quiet())
    assert_same_run(tmp_path / "whole", tmp_path / "resumed")
    state = checkpoint.load(tmp_path / "resumed" / CHECKPOINT)["criterion"]
    assert (state["controller.history"].shape, state["controller.count"].item()) == ((4,), 2 * STEPS_PER_EPOCH)


def test_a_run_in_l2_is_attacked_in_l2(tmp_path):
    """Training, the watched curve and the result; ``eval`` takes the norm of the training, or another."""
    digits = replace(dataset(), name="digits")
    config = replace(CONFIG, norm="l2", eps=2.0, epochs=1, lam=5.0)
    result = train(config, tmp_path, dataset=digits, console=quiet())
    model, read, _ = checkpoint.load_model(tmp_path / CHECKPOINT)
    assert (read.norm, read.eps) == ("l2", 2.0)
    test = digits.test
    assert result["accuracy"] == evaluate(model, in_order(test), "clean,pgd-2", eps=2.0, norm="l2")
    for norm, eps in ((None, None), ("l2", 2.0), ("linf", 0.5)):
        options = EvalOptions(tmp_path / CHECKPOINT, "fgsm,pgd-2", eps=eps, norm=norm, device="cpu", batch_size=16)
        found = evaluate_checkpoint(options, dataset=digits, console=quiet())
        expected = evaluate(model, in_order(test, 16), "fgsm,pgd-2", eps=eps or 2.0, norm=norm or "l2")
        assert (found["norm"], found["accuracy"]) == (norm or "l2", expected)
    with pytest.raises(ValueError, match=r"^eps: expected a radius in \[0, 1\], where pixels are, got 2"):
        evaluate_checkpoint(EvalOptions(tmp_path / CHECKPOINT, norm="linf"), dataset=digits, console=quiet())
    with pytest.raises(ValueError, match=r"^norm: expected one of 'linf', 'l2', got 'l1'"):
        replace(CONFIG, norm="l1")


def test_train_adv_counts_the_rows_of_x_adv_in_every_mode(tmp_path):
    """E_lin weighs nothing, so that every mode trains alike, on a model without batch norm: the rows have to agree."""
    config = replace(CONFIG, model="mlp", width=8, lam=0.0, epochs=1)
    modes: list[dict[str, Any]] = [{}, {"forward": "split"}, {"forward": "checkpoint"}, {"skip_below": 1.0}]
    modes += [{"points": "five-point"}, {"triplets": 2}]
    found = []
    for i, levers in enumerate(modes):
        train(replace(config, **levers), tmp_path / str(i), dataset=dataset(), console=quiet())
        found.append([float(row["train_adv"]) for row in rows(tmp_path / str(i) / "steps.csv")])
    for other in found[1:]:
        # At most one sample of 16 whose logits are a rounding apart.
        assert other == pytest.approx(found[0], abs=1 / 16)


def test_steps_with_and_without_the_gradient_of_e_lin_are_counted(tmp_path):
    config = replace(CONFIG, skip_below=0.9)
    result = train(config, tmp_path, dataset=dataset(), console=quiet())
    assert result["full_steps"] + result["light_steps"] == 3 * STEPS_PER_EPOCH
    assert result["light_steps"] >= 3  # lam is 0 until there is a history
    for row in rows(tmp_path / "steps.csv"):
        assert int(row["full_steps"]) + int(row["light_steps"]) == int(row["step"])
    assert int(rows(tmp_path / "epochs.csv")[-1]["light_steps"]) == result["light_steps"]


def test_the_data_set_is_read_when_none_is_given(tmp_path):
    config = replace(CONFIG, data="digits", limit=64, test_limit=32, epochs=1)
    assert train(config, tmp_path, console=quiet())["accuracy"]["clean"]["samples"] == 32
    assert data.load("digits", limit=64).train.images.shape == (64, 1, 8, 8)


@pytest.mark.parametrize(
    "kernels",
    ["triton", pytest.param("cpp", marks=pytest.mark.skipif(extension.load() is None, reason="it is not built"))],
)
def test_the_demo_trains_alike_on_the_kernels(monkeypatch, tmp_path, kernels):
    """Four steps of it, compiled or interpreted: the same points and noise, so the same losses up to roundings."""
    setting = replace(SETTING, **METHODS["elle-a"], width=4, log_every=1)
    setting = replace(setting, limit=80, validation=16, test_limit=16, epochs=2, batch_size=32)
    curves, row = [], methods.TABLE["elle-a"]
    for backend in ("reference", kernels):
        monkeypatch.setitem(methods.TABLE, "elle-a", replace(row, make=partial(row.make, backend=backend)))
        train(replace(setting, eval_attacks="clean"), tmp_path / backend, console=quiet())
        curves.append(checkpoint.load(tmp_path / backend / CHECKPOINT)["history"]["steps"])
    assert len(curves[0]) == len(curves[1]) == 4
    for one, other in zip(*curves, strict=True):
        for name in ("loss", "e_lin", "lam"):
            # A step's roundings, some 1e-6 of the weights, grow with the steps, until they switch a ReLU, after which
            # the reference itself is as far off; E_lin is a square of small differences of the losses.
            assert other[name] == pytest.approx(one[name], rel=1e-3 if name == "e_lin" else 1e-4, abs=1e-7), name
    assert curves[0][-1]["loss"] != curves[0][0]["loss"]
