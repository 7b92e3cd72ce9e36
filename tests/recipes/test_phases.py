"""Trainings in phases: batches of another size, a history that begins anew, a rate between points."""

from __future__ import annotations

import re
from dataclasses import replace

import numpy as np
import pytest
import torch

from elle_fast.recipes import recipe, schedules
from elle_fast.recipes.config import TrainConfig
from elle_fast.recipes.course import Course
from elle_fast.recipes.distributed import Ranks
from elle_fast.recipes.phases import Phase, Plan, of_run, parse
from elle_fast.recipes.run import Run
from elle_fast.recipes.train import InterruptedRunError, train
from tests.data.stand_in import write_scenes
from tests.recipes.test_train import CONFIG, dataset, quiet

PHASES = (Phase(2, 16, 8), Phase(1, 32, 8), Phase(3, 8, 8))
LENGTHS = {16: 4, 32: 2, 8: 8}
# The dataset of test_train has 8x8 pictures.
RUN = replace(CONFIG, epochs=None, batch_size=None, phases="1:8:16,1:8:32,1:8:16", method="elle-a")


def plan():
    return Plan(PHASES, LENGTHS.__getitem__)


def test_each_step_has_the_epoch_and_the_phase_that_counting_gives():
    expected = []
    epoch = 0
    for phase in PHASES:
        for _ in range(phase.epochs):
            expected += [(phase, epoch, within) for within in range(LENGTHS[phase.batch_size])]
            epoch += 1
    found = plan()
    assert (found.steps, found.epochs) == (len(expected), epoch) == (8 + 2 + 24, 6)
    for step, (phase, of_epoch, within) in enumerate(expected):
        assert found.phase(step) is phase
        assert found.place(step) == (of_epoch, within)
        assert found.epoch_steps(step) == LENGTHS[phase.batch_size]
        assert found.position(step) == of_epoch + within / LENGTHS[phase.batch_size]
        assert found.begins_phase(step) == (step > 0 and expected[step - 1][0] is not phase)
    assert found.place(found.steps) == (6, 0)  # over
    assert found.position(found.steps) == 6


@pytest.mark.parametrize("text", ["", "6:128", "6:128:512,", "6:128:0", "6:-1:4", "a:b:c", "1.5:8:8"])
def test_phases_of_another_form_are_refused(text):
    with pytest.raises(ValueError, match=rf"^phases: expected EPOCHS:SIDE:BATCH.*, got {re.escape(repr(text))}$"):
        parse(text)


def test_the_rate_between_knots_is_numpys():
    epochs, parts = [0, 1, 6, 12, 15], [0, 1, 0.1, 0.01, 0.001]
    knots = list(zip(epochs, parts, strict=True))
    for epoch in np.linspace(0, 16, 65):
        assert schedules.between(knots, float(epoch)) == pytest.approx(np.interp(epoch, epochs, parts), abs=1e-15)


@pytest.mark.parametrize(
    "options, message",
    [
        ({"schedule": "linear"}, "knots: schedule 'linear' needs them, such as .*, got None"),
        ({"knots": "0:0,3:1"}, "knots: schedule 'short' has none, so this option does not apply .*linear takes it"),
        ({"schedule": "linear", "knots": "0:0,2:1"}, r"knots: .* from 0 to the run's 3, .*got '0:0,2:1'"),
        ({"schedule": "linear", "knots": "0:0,2:1,1:1,3:0"}, "knots: .*epochs that rise"),
        ({"schedule": "linear", "knots": "0:0,3:1.5"}, r"knots: .*in \[0, 1\]"),
        ({"schedule": "linear", "knots": "0,3"}, "knots: expected EPOCH:PART"),
        ({"schedule": "linear", "knots": "0:0,3:1", "warmup": 1.0}, "knots: .*contradicts warmup 1"),
        ({"schedule": "linear", "knots": "0:0,3:1", "rate_per": "epoch"}, "knots: .*contradicts rate_per 'epoch'"),
        ({"epochs": 4}, "epochs: contradicts phases, '1:8:16,1:8:32,1:8:16', got 4"),
        ({"batch_size": 32}, "batch_size: contradicts phases, .*, got 32"),
        ({"method": "free-at"}, "phases: method 'free-at' counts the steps of an epoch"),
        ({"method": "pco", "phases": "1:8:16,1:16:16"}, "phases: method 'pco' keeps something for each training image"),
        ({"method": "nuat"}, "phases: method 'nuat' counts the steps of an epoch"),
    ],
)
def test_options_that_do_not_go_together_are_refused(options, message):
    with pytest.raises(ValueError, match=f"^{message}"):
        replace(RUN, **options).resolved()


@pytest.mark.parametrize(
    "name, advice", [("digits", ""), ("image-folder", "; --stream always reads pictures in any side")]
)
def test_another_side_than_that_in_memory_is_refused(name, advice, tmp_path):
    config = replace(RUN, data=name, root=str(tmp_path), phases="1:8:16,1:16:32").resolved()
    said = f"phases: expected the side of the images, got 16 for images of 8x8 that are in memory{advice}"
    with pytest.raises(ValueError, match=f"^{said}$"):
        Run(config, dataset(), tmp_path / "checkpoint.pt", Ranks(1.0))


def test_a_run_in_phases_has_their_batches_and_a_history_for_each(tmp_path):
    ranks = Ranks(1.0)
    run = Run(RUN.resolved(), dataset(), tmp_path / "checkpoint.pt", ranks)
    lengths = [len(run.train_split) // size for size in (16, 32, 16)]
    assert run.steps == sum(lengths)
    sizes, counts = [], []
    for x, y in run.upcoming(run.steps):
        run.take_step(x, y)
        run.step += 1
        sizes.append(len(y))
        counts.append(int(run.criterion.state_dict()["controller.count"]))
    assert sizes == [size for size, length in zip((16, 32, 16), lengths, strict=True) for _ in range(length)]
    assert counts == [step for length in lengths for step in range(1, length + 1)]


def test_a_run_that_is_stopped_in_any_phase_ends_with_the_same_bits(tmp_path, monkeypatch):
    config = replace(RUN, checkpoint_every=1, schedule="linear", knots="0:0,1:1,3:0", learning_rate=0.1)
    whole = train(config, tmp_path / "whole", dataset=dataset(), console=quiet())
    lengths = [
        len(Run(config.resolved(), dataset(), tmp_path / "x", Ranks(1.0)).train_split) // size for size in (16, 32)
    ]
    for stop_after in (lengths[0], lengths[0] + 1, sum(lengths)):
        folder = tmp_path / str(stop_after)
        taken: list[None] = []
        take_step = Run.take_step

        def stopping(self, x, y, *, taken=taken, stop_after=stop_after, take_step=take_step):
            if len(taken) == stop_after:
                raise InterruptedRunError
            taken.append(None)
            take_step(self, x, y)

        with monkeypatch.context() as patch:
            patch.setattr(Run, "take_step", stopping)
            with pytest.raises(InterruptedRunError):
                train(config, folder, dataset=dataset(), console=quiet())
        resumed = train(config, folder, dataset=dataset(), console=quiet(), resume=True)
        assert resumed["accuracy"] == whole["accuracy"]
        weights = [
            torch.load(path / "checkpoint.pt", weights_only=True)["model"] for path in (tmp_path / "whole", folder)
        ]
        assert all(torch.equal(one, other) for one, other in zip(*(each.values() for each in weights), strict=True))


def test_imagenet_has_the_numbers_of_the_public_codes():
    asked = TrainConfig(data="image-folder", root=".", method="n-fgsm+elle-a", eps=4 / 255, device="cpu")
    run = replace(asked, **recipe.options("imagenet", asked)).resolved()
    assert of_run(run) == (Phase(6, 512, 128), Phase(6, 224, 224), Phase(3, 128, 288))
    assert (run.epochs, run.model, run.image_size, run.weight_decay, run.decay) == (
        15,
        "resnet50",
        224,
        1e-4,
        "weights",
    )
    assert (run.lam, run.penalty, run.window, run.ramp, run.clamp) == (20_000, "smooth_l1", 500, 2_500, "all")
    lengths = {512: 25, 224: 57, 128: 100}
    course = Course(run, Plan(of_run(run), lengths.__getitem__))
    step = 0
    for epoch in range(15):
        length = lengths[512 if epoch < 6 else 224 if epoch < 12 else 128]
        moments = [[0, 1, 6], [6, 12], [12, 15]][(epoch >= 6) + (epoch >= 12)]
        rates = [[0, 0.4, 0.04], [0.04, 0.004], [0.004, 0.0004]][(epoch >= 6) + (epoch >= 12)]
        for i in range(length):
            expected = np.interp(epoch + (i + 1) / length, moments, rates)
            ((rate, momentum),) = course.rates(step)
            assert rate == pytest.approx(expected)
            assert momentum == 0.9
            step += 1
    plain = replace(asked, method="elle-a")
    plain = replace(plain, **recipe.options("imagenet", plain)).resolved()
    assert (plain.ramp, plain.window) == (None, 500)
    fgsm = replace(asked, method="n-fgsm")
    fgsm = replace(fgsm, **recipe.options("imagenet", fgsm)).resolved()
    assert (fgsm.penalty, fgsm.window, fgsm.ramp) == ("squared", None, None)
    relative = replace(asked, rule="relative")
    relative = replace(relative, **recipe.options("imagenet", relative)).resolved()
    assert (relative.rule, relative.window, relative.ramp) == ("relative", None, None)


def test_a_side_that_the_network_cannot_take_is_refused_before_the_first_step(tmp_path):
    root = write_scenes(tmp_path / "scenes", train=12, test=2)
    config = replace(RUN, phases="1:8:8,1:12:8", data="image-folder", root=str(root), image_size=8, crop="pad")
    config = replace(config, stream="always", workers=0, model="cnn", augment=False)
    message = r"^phases: expected sides that the model takes, got 12 for 'cnn', which fails on them with .*shapes"
    with pytest.raises(ValueError, match=message):
        train(config, tmp_path / "run", console=quiet())
    assert not (tmp_path / "run" / "checkpoint.pt").exists()
