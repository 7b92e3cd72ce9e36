"""What changes from step to step of a run, and which options of it do not go together."""

import re
from dataclasses import replace
from pathlib import Path

import pytest

from elle_fast import methods
from elle_fast.evaluation import evaluate
from elle_fast.recipes import result as ending
from elle_fast.recipes import train as training
from elle_fast.recipes.config import TrainConfig
from elle_fast.recipes.course import Course
from elle_fast.recipes.distributed import Ranks
from elle_fast.recipes.phases import Plan, of_run
from elle_fast.recipes.run import Run
from elle_fast.recipes.schedules import at
from tests.recipes.test_train import CONFIG, STEPS_PER_EPOCH, dataset, quiet, rows

RUN = TrainConfig(epochs=4, learning_rate=0.2, device="cpu")


def course(epoch_steps=5, **options):
    run = replace(RUN, **options).resolved()
    return Course(run, Plan(of_run(run), lambda batch_size: epoch_steps))


def test_a_step_has_the_rate_of_its_middle_and_two_steps_those_of_its_ends():
    one, two = course(), course(steps_per_batch=2, momentum_cycle=0.1)
    assert one.rates(0) == [(0.2 * 0.05, 0.9)]
    assert [two.rates(step) for step in (0, 5, 10)] == [
        [(0.0, 0.9), (pytest.approx(0.02), pytest.approx(0.89))],
        [(pytest.approx(0.1), pytest.approx(0.85)), (pytest.approx(0.12), pytest.approx(0.84))],
        [(pytest.approx(0.2), pytest.approx(0.8)), (pytest.approx(0.18), pytest.approx(0.81))],
    ]
    three = [rate for rate, _ in course(steps_per_batch=3).rates(0)]
    assert three == pytest.approx([0.0, 0.01, 0.02])
    assert course(schedule="cosine", steps_per_batch=2).rates(3) == 2 * course(schedule="cosine").rates(3)


def test_a_rate_per_epoch_is_the_schedules_over_epochs():
    found = course(schedule="onecycle", rate_per="epoch", momentum=0.95, momentum_cycle=0.1)
    parts = [at("onecycle", epoch, 4) for epoch in range(4)]
    for step in range(20):
        part, height = parts[step // 5]
        assert found.rates(step) == [(0.2 * part, 0.95 - 0.1 * height)]


def test_a_warm_up_is_in_epochs_whatever_the_rate_changes_with():
    by_step = course(schedule="constant", warmup=2)
    assert [rate for step in (0, 4, 9, 10) for rate, _ in by_step.rates(step)] == pytest.approx([0.02, 0.1, 0.2, 0.2])
    by_epoch = course(schedule="constant", warmup=2, rate_per="epoch")
    assert [rate for step in (0, 4, 5, 9, 10) for rate, _ in by_epoch.rates(step)] == [0.1, 0.1, 0.2, 0.2, 0.2]


def test_eps_grows_by_the_step_or_as_in_the_authors_trainer_by_the_epoch():
    assert course().eps(0) == RUN.eps
    assert [course(eps_warmup=2).eps(step) for step in (0, 1, 5, 9, 10, 19)] == pytest.approx(
        [RUN.eps * part for part in (0, 0.1, 0.5, 0.9, 1, 1)]
    )
    stairs = course(epoch_steps=3, epochs=15, eps_warmup=5, eps_per="epoch")
    expected = [RUN.eps * min(epoch / 5, 1) for epoch in range(15) for _ in range(3)]
    assert [stairs.eps(step) for step in range(45)] == pytest.approx(expected)
    assert stairs.eps(44) == RUN.eps


def test_the_warm_up_of_eps_is_the_paper_authors_on_svhn_alone():
    def warmup(**options):
        return TrainConfig(data="svhn", **options).resolved().eps_warmup

    assert warmup() == 5
    assert warmup(epochs=6) == 2
    assert warmup(schedule="long") == 0
    assert warmup(eps_warmup=0) == 0
    assert TrainConfig(data="cifar10").resolved().eps_warmup == 0


@pytest.mark.parametrize("method", ["fgsm", "elle-a", "n-fgsm+elle-a", "nuat+elle", "free-at", "pgd-at"])
def test_a_step_trains_with_its_own_eps_and_the_evaluation_with_the_whole(method, tmp_path, monkeypatch):
    reached, radii = [], []
    original = training._Loop._step

    def step(loop, x, y):
        passes = []
        hook = loop.run.model.register_forward_pre_hook(lambda module, args: passes.append(args[0].detach()))
        numbers = original(loop, x, y)
        hook.remove()
        assert loop.run.criterion.eps == loop.run.course.eps(loop.run.step)
        trained = passes[0 if method == "free-at" else 1]  # the others' second pass begins with x_adv
        reached.append((trained[: len(x)] - x).abs().max().item())
        return numbers

    def evaluated(*args, eps, **options):
        radii.append(eps)
        return evaluate(*args, eps=eps, **options)

    monkeypatch.setattr(training._Loop, "_step", step)
    monkeypatch.setattr(ending, "evaluate", evaluated)
    config = replace(CONFIG, method=method, eps_warmup=1.5, clamp="none", epochs=2)
    training.train(config, tmp_path, dataset=dataset(), console=quiet())
    warmup = [0.1 * min(each / 12, 1) for each in range(16)]
    assert [float(row["eps"]) for row in rows(tmp_path / "steps.csv")] == pytest.approx(warmup)
    assert [float(row["eps"]) for row in rows(tmp_path / "epochs.csv")] == pytest.approx([warmup[7], warmup[15]])
    assert set(radii) == {0.1}
    most = {"n-fgsm+elle-a": 3.0}.get(method, 1.0)
    if method == "free-at":  # what the step before has left
        warmup = [0.0, *warmup[:-1]]
    if method.startswith("nuat"):
        return  # its start is a point of its own
    for step_eps, distance in zip(warmup, reached, strict=True):
        assert 0.9 * step_eps - 1e-6 <= distance <= most * step_eps + 1e-6


def test_adamw_has_torchs_defaults_and_a_resolved_run_stays_as_it_is():
    for options in ({"optimizer": "adamw"}, {"schedule": "onecycle"}, {"data": "svhn"}):
        resolved = TrainConfig(**options).resolved()  # type: ignore[arg-type]
        assert resolved.resolved() == resolved
        expected = (1e-3, 0.01) if "optimizer" in options else (resolved.learning_rate, 5e-4)
        assert (resolved.learning_rate, resolved.weight_decay) == expected
    assert TrainConfig(optimizer="adamw", learning_rate=0.1, weight_decay=0).resolved().learning_rate == 0.1


@pytest.mark.parametrize(
    "options, message",
    [
        ({"optimizer": "adam"}, "optimizer: expected one of 'sgd', 'adamw', got 'adam'"),
        ({"decay": "none"}, "decay: expected one of 'all', 'weights', got 'none'"),
        ({"rate_per": "batch"}, "rate_per: expected one of 'step', 'epoch', got 'batch'"),
        ({"eps_per": "batch"}, "eps_per: expected one of 'step', 'epoch', got 'batch'"),
        ({"peak": 1.0}, "peak: expected a part of the run between 0 and 1, got 1"),
        ({"peak": 0.0}, "peak: expected a part of the run between 0 and 1, got 0"),
        ({"schedule": "cosine", "peak": 0.5}, "peak: schedule 'cosine' does not rise"),
        (
            {"schedule": "piecewise", "milestones": "1/2,1/4"},
            "milestones: expected rising parts of the run between 0 and",
        ),
        (
            {"schedule": "piecewise", "milestones": "1/2,1"},
            "milestones: expected rising parts of the run between 0 and",
        ),
        ({"schedule": "piecewise", "milestones": ""}, "milestones: expected rising parts of the run between 0 and 1"),
        ({"schedule": "piecewise", "milestones": "100,150"}, "milestones: .*, got '100,150'"),
        ({"schedule": "long", "milestones": "1/3,2/3"}, "milestones: schedule 'long' has none of its own to choose"),
        ({"schedule": "long", "milestones": "1/2,3/4"}, "milestones: schedule 'long' has none of its own to choose"),
        ({"milestones": "1/2,3/4"}, "milestones: schedule 'short' has none of its own to choose"),
        ({"eps_per": "epoch"}, "eps_per: there is no eps_warmup, so this option does not apply .got 'epoch'.$"),
        ({"label_smoothing": 1}, r"label_smoothing: expected a finite number in \[0, 1\), got 1"),
        ({"label_smoothing": -0.1}, r"label_smoothing: expected a finite number in \[0, 1\), got -0.1"),
        ({"schedule": "short", "warmup": 1.0}, "warmup: schedule 'short' rises by itself"),
        ({"schedule": "onecycle", "warmup": 1.0}, "warmup: schedule 'onecycle' rises by itself"),
        ({"schedule": "cosine", "warmup": 4.0}, "warmup: expected less than the run's 4 epochs, got 4"),
        ({"eps_warmup": 5.0}, "eps_warmup: expected less than the run's 4 epochs, got 5"),
        ({"schedule": "cosine", "momentum_cycle": 0.1}, "momentum_cycle: schedule 'cosine' has no cycle"),
        ({"momentum_cycle": 0.9}, "momentum_cycle: expected less than the momentum, 0.9, got 0.9"),
        ({"optimizer": "adamw", "momentum": 1.0}, "momentum: expected AdamW's first beta below 1, got 1"),
        ({"steps_per_batch": 0}, "steps_per_batch: expected an integer >= 1, got 0"),
        ({"drop_last": 1}, "drop_last: expected True or False"),
    ],
)
def test_what_makes_no_sense_is_refused_by_name(options, message):
    with pytest.raises((TypeError, ValueError), match=re.compile(message)):
        replace(RUN, **options).resolved()


@pytest.mark.parametrize("method", methods.NAMES)
def test_every_method_can_begin_with_an_eps_of_0(method):
    config = replace(CONFIG, method=method, eps_warmup=1.0).resolved()
    run = Run(config, dataset(), Path(), Ranks(timeout=1.0))
    run.model.train()
    for x, y in run.upcoming(3):
        run.take_step(x, y)
        run.step += 1
        assert run.criterion.stats["loss"].isfinite(), run.step
        assert all(parameter.isfinite().all() for parameter in run.model.parameters())
    assert run.criterion.eps == pytest.approx(0.1 * 2 / STEPS_PER_EPOCH)
