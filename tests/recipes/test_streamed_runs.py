"""Runs on streamed pictures: those in memory to the bit, resumed within an epoch, with any workers, by two ranks."""

import io
import itertools
import os
import re
import subprocess
import sys
from dataclasses import replace
from typing import Any

import pytest
import torch
from rich.console import Console

from elle_fast import data
from elle_fast.data.streaming import Stream
from elle_fast.recipes import checkpoint, cli
from elle_fast.recipes import train as training
from elle_fast.recipes.config import TrainConfig
from elle_fast.recipes.distributed import Ranks
from elle_fast.recipes.eval_options import EvalOptions
from elle_fast.recipes.evaluate import evaluate_checkpoint
from elle_fast.recipes.run import Run
from elle_fast.recipes.train import CHECKPOINT, RESULT, InterruptedRunError, train
from tests.data.stand_in import write_scenes

CONFIG = TrainConfig(
    data="image-folder",
    image_size=12,
    model="cnn",
    width=2,
    method="elle-a",
    eps=0.02,
    epochs=2,
    batch_size=8,
    seed=1,
    device="cpu",
    validation=8,
    eval_attacks="clean",
    checkpoint_every=2,
    stream="always",
    workers=0,
)


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    return write_scenes(tmp_path_factory.mktemp("scenes"), train=16, test=3)


def run(config, folder, **options):
    """A whole run: its checkpoint, its result, and what it said."""
    said = io.StringIO()
    result = train(config, folder, console=Console(file=said, width=1000), **options)
    return checkpoint.load(folder / CHECKPOINT), result, said.getvalue()


def started(config, path):
    resolved = config.resolved()
    return Run(resolved, resolved.read_data(), path, Ranks(120))


def stepped(made, steps):
    """The run, further by so many steps; without its evaluations, plots and logs, which take most of the time."""
    made.model.train()
    for x, y in made.upcoming(steps):
        made.take_step(x, y)
        made.step += 1
    return made


def states(made):
    return {
        **made.model.state_dict(),
        **{f"criterion.{name}": value for name, value in made.criterion.state_dict().items()},
    }


def assert_same(left, right):
    left, right = states(left), states(right)
    assert left.keys() == right.keys()
    assert all(torch.equal(left[name], right[name]) for name in left)


def test_a_streamed_run_has_the_bits_of_one_in_memory(root, tmp_path):
    config = replace(CONFIG, root=str(root))
    # One after the other, as noise is drawn from torch's own generator, which each seeds.
    streamed, memory = (stepped(started(replace(config, stream=how), tmp_path), 7) for how in ("always", "never"))
    assert isinstance(streamed.train_split, Stream)
    assert not isinstance(memory.train_split, Stream)
    assert streamed.shape == memory.shape
    assert streamed.validation is not None
    assert torch.equal(streamed.validation.labels, memory.validation.labels)
    assert_same(streamed, memory)


def test_a_whole_run_and_its_evaluation(root, tmp_path):
    saved, result, said = run(replace(CONFIG, root=str(root), epochs=1), tmp_path)
    assert f"training data: 40 pictures of {root} as 12x12 pixels, read while they are needed by this process" in said
    assert saved["config"]["stream"] == "always"
    assert "unreadable" not in result
    evaluated = evaluate_checkpoint(EvalOptions(tmp_path / CHECKPOINT, "clean"))
    assert evaluated["accuracy"] == result["accuracy"]


OPTIONS: dict[str, Any] = {"crop": "resized", "mixup": 0.2, "cutmix": 1.0}


@pytest.mark.parametrize("before,after", [(0, 2), (2, 0)])
def test_a_resume_within_an_epoch_has_the_bits_of_a_run_that_was_not_stopped(root, tmp_path, before, after):
    config, path = replace(CONFIG, root=str(root), **OPTIONS), tmp_path / CHECKPOINT
    assert started(config, path).plan.epoch_steps(0) == 5
    whole = stepped(started(config, path), 5)
    stepped(started(replace(config, workers=before), path), 3).save()
    resumed = started(replace(config, workers=after), path)
    resumed.restore(checkpoint.load(path))
    assert resumed.step == 3
    assert_same(stepped(resumed, 2), whole)


def test_a_run_is_resumed_as_it_was_read(root, tmp_path, monkeypatch):
    # auto would read these into memory; the run began on a machine with less of it.
    config = replace(CONFIG, root=str(root), epochs=1)
    monkeypatch.setattr(training._Loop, "_step", lambda *given: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        run(config, tmp_path)
    said = "the pictures of the training were read while they were needed, which --stream decides"
    with pytest.raises(ValueError, match=said):
        run(replace(config, stream="never"), tmp_path, resume=True)
    with pytest.raises(ZeroDivisionError):  # which is as far as it was
        run(replace(config, stream="auto"), tmp_path, resume=True)


# A run whose worker is killed in its fourth step. The last checkpoint is that of step 2.
CHILD = """
import multiprocessing, os, pathlib, signal, sys
from elle_fast.recipes import cli, train as training
original = training._Loop._step
def step(loop, *args):
    if loop.run.step == 3:
        [worker] = multiprocessing.active_children()
        print("killed", worker.pid, flush=True)
        os.kill(worker.pid, signal.SIGKILL)
    return original(loop, *args)
training._Loop._step = step
sys.exit(cli.main(sys.argv[1:]))
"""


@pytest.mark.slow
def test_a_worker_that_dies_ends_the_run_in_bounded_time_and_it_can_be_resumed(root, tmp_path):
    config = replace(CONFIG, root=str(root), workers=1, epochs=1)
    (tmp_path / "run.yaml").write_text(config.to_yaml())
    words = ["train", "--config", str(tmp_path / "run.yaml"), "--out", str(tmp_path / "run")]
    done = subprocess.run(
        [sys.executable, "-c", CHILD, *words], capture_output=True, text=True, timeout=120, check=False
    )
    killed = re.fullmatch(r"killed (\d+)\n", done.stdout)
    assert killed is not None, done.stderr
    assert done.returncode == 1
    # Torch has two ways of finding it out.
    found = re.search(r"worker \(pid(?:\(s\))? (\d+)\) (?:is killed by signal|exited unexpectedly)", done.stderr)
    assert found is not None, done.stderr
    assert found[1] == killed[1]
    assert "Traceback" not in done.stderr
    # Two batches were waiting when it died: the run may have come to its next checkpoint with them.
    assert checkpoint.load(tmp_path / "run" / CHECKPOINT)["step"] in (2, 4)
    resumed, _, _ = run(config, tmp_path / "run", resume=True)
    assert resumed["step"] == 5


@pytest.mark.long
def test_two_ranks_read_each_sample_once(root, tmp_path):
    """Each rank writes down what it read; together they have what one process has, in the order of its batches."""
    script = """
import sys, torch
from elle_fast.recipes import cli
from elle_fast.recipes.run import Run
taken, original = [], Run.upcoming
def upcoming(run, steps):
    for x, y in original(run, steps):
        taken.append((x, y))
        yield x, y
Run.upcoming = upcoming
status = cli.main(sys.argv[2:])
import os
torch.save(taken, sys.argv[1] + os.environ.get("RANK", "alone"))
sys.exit(status)
"""
    (tmp_path / "taken.py").write_text(script)
    config = replace(CONFIG, root=str(root), crop="resized", epochs=1, validation=0, workers=1)
    (tmp_path / "run.yaml").write_text(config.to_yaml())
    launch = ["-m", "torch.distributed.run", "--nproc_per_node", "2", "--standalone"]
    for name, words in {"two": launch, "one": []}.items():
        given = ["train", "--config", str(tmp_path / "run.yaml"), "--out", str(tmp_path / name)]
        env = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path), "OMP_NUM_THREADS": "1"}
        command = [sys.executable, *words, str(tmp_path / "taken.py"), str(tmp_path / "taken"), *given]
        subprocess.run(command, check=True, timeout=240, env=env, capture_output=True)
    ranks = [torch.load(tmp_path / f"taken{rank}") for rank in (0, 1)]
    alone = torch.load(tmp_path / "takenalone")
    assert len(alone) == 6
    for both, one in zip(zip(*ranks, strict=True), alone, strict=True):
        assert all(
            torch.equal(torch.cat(parts), whole) for parts, whole in zip(zip(*both, strict=True), one, strict=True)
        )


# Pictures that cannot be read


def test_a_run_goes_past_corrupt_pictures_and_names_them(root, tmp_path):
    broken = write_scenes(tmp_path / "broken", train=16, test=3)
    (broken / "train/bee/004.png").write_bytes(b"no picture")
    (broken / "test/cat/001.png").write_bytes(b"")
    config = replace(CONFIG, root=str(broken), epochs=1, validation=0, normalize=False)
    with pytest.raises(ValueError, match=r"train/bee/004\.png \(10 bytes\): truncated, corrupt"):
        run(config, tmp_path / "run")
    # What is let pass may be changed in a resume.
    _, result, said = run(replace(config, skip_corrupt=2), tmp_path / "run", resume=True)
    assert [re.sub(r".*: (.*)", r"\1", name) for name in result["unreadable"]] == [
        "train/bee/004.png",
        "test/cat/001.png",
    ]
    assert said.count("warning: skipped a picture that cannot be read") == 2
    assert (tmp_path / "run" / RESULT).exists()


# Methods


def test_what_a_method_keeps_for_each_sample_is_put_back_under_a_padded_crop(root, tmp_path):
    config = replace(CONFIG, root=str(root), method="pgi")
    assert_same(*(stepped(started(replace(config, stream=how), tmp_path), 7) for how in ("always", "never")))


@pytest.mark.parametrize(
    "options,message",
    [
        (
            {"method": "pgi", "crop": "resized"},
            "crop: method 'pgi' keeps something for each .* cannot",
        ),
        ({"method": "pgi", "auto_augment": "trivialaugment"}, "auto_augment: method 'pgi' keeps something"),
        ({"method": "pgi", "mixup": 0.2}, "mixup: method 'pgi' keeps something for each training image"),
        ({"method": "mart", "cutmix": 1.0}, "cutmix: method 'mart' takes class indices, no probabilities"),
        ({"method": "advmixup-single+elle-a", "mixup": 1.0}, "mixup: method .* takes class indices, no probabilities"),
        ({"mixup": -1.0}, "mixup: expected"),
        ({"min_area": 0.0}, "min_area: expected"),
        (
            {"data": "torchvision:CIFAR10"},
            "data: expected torchvision: and one of .* got 'torchvision:CIFAR10': .*--data cifar10",
        ),
        ({"data": "imagenet"}, "data: expected one of .* got 'imagenet'"),
    ],
)
def test_what_does_not_go_together(options, message):
    with pytest.raises(ValueError, match=message):
        replace(CONFIG, **options).resolved()


def test_a_method_per_sample_takes_any_crop_without_augmentation():
    replace(CONFIG, method="pgi", crop="resized", augment=False).resolved()


def test_mixed_labels_train_in_memory_too(root, tmp_path):
    config = replace(CONFIG, root=str(root), mixup=0.4, cutmix=0.4)
    streamed, memory = (stepped(started(replace(config, stream=how), tmp_path), 3) for how in ("always", "never"))
    assert_same(streamed, memory)
    plain = stepped(started(replace(config, mixup=0.0, cutmix=0.0), tmp_path), 3)
    assert not all(torch.equal(a, b) for a, b in zip(states(memory).values(), states(plain).values(), strict=True))
    # The meter counts the class with the larger share.
    [(_, y)] = memory.upcoming(1)
    assert y.shape == (8, 3)
    assert torch.allclose(y.sum(1), torch.ones(8))
    assert 0 <= memory.meter.state()["correct"] <= 8 * 3


def test_each_batch_of_an_epoch_is_mixed_with_a_share_of_its_own(root, tmp_path):
    config = replace(CONFIG, root=str(root))
    plain, mixed = ([x for x, _ in started(replace(config, mixup=mixup), tmp_path).upcoming(4)] for mixup in (0.0, 1.0))
    shares = []
    for x, found in zip(plain, mixed, strict=True):
        apart = x - x.roll(1, 0)  # found is x.roll(1, 0) + share * apart
        shares.append(float(((found - x.roll(1, 0)) * apart).sum() / apart.square().sum()))
    assert all(abs(one - other) > 1e-3 for one, other in itertools.combinations(shares, 2))


def test_a_batch_that_the_data_cannot_fill_over_all_ranks(root):
    split = data.load("image-folder", root, image_size=12, stream="always", workers=0).train
    with pytest.raises(
        ValueError, match="batch_size: expected batches that 5 processes can share equally, got 48 samples"
    ):
        data.identified_batches(split, 100, seed=0, epoch=0, ranks=5)


def test_the_flags(capsys):
    options = cli.read_options(
        "train", ["--data", "image-folder", "--stream", "always", "--workers", "3", "--crop", "resized"]
    )
    assert (options.run.stream, options.run.workers, options.run.crop) == ("always", 3, "resized")
    config = replace(CONFIG, workers=5, stream="never", skip_corrupt=3)
    assert config.identity() == CONFIG.identity()
    assert replace(CONFIG, crop="resized").identity() != CONFIG.identity()


def test_an_interrupted_run_leaves_no_worker(root, tmp_path, monkeypatch):
    import multiprocessing

    monkeypatch.setattr(training, "stop_requests", lambda: __import__("contextlib").nullcontext(lambda: True))
    with pytest.raises(InterruptedRunError):
        run(replace(CONFIG, root=str(root), workers=2), tmp_path)
    assert multiprocessing.active_children() == []
