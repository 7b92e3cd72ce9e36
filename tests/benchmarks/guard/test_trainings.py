"""benchmarks/guard/trainings.py with tiny runs."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from benchmarks.guard import trainings, watched
from benchmarks.guard.judged import SAME
from benchmarks.harness.rows import alone_in
from elle_fast import data
from elle_fast.evaluation import evaluate
from elle_fast.guard import CollapseGuard
from elle_fast.recipes import checkpoint, guarding, result
from elle_fast.recipes.config import TrainConfig
from elle_fast.recipes.train import train

TINY = replace(
    trainings.CONFIG,
    data="digits",
    limit=336,
    validation=80,
    test_limit=8,
    width=2,
    batch_size=32,
    eval_attacks="clean,pgd-2,pgd-50-10",
    augment=False,
    learning_rate=0.05,
    precision="fp32",
)
NAME = "n-fgsm-eps16-seed1"
STEPS = 24  # 8 batches an epoch, 3 epochs
Weights = dict[str, torch.Tensor]


def read_data(config: TrainConfig) -> data.Dataset:
    return data.load("digits", limit=336, test_limit=8)


def config_of(*, guard: bool) -> TrainConfig:
    return replace(TINY, method="n-fgsm", eps=16 / 255, seed=1, epochs=3, device="cpu", guard=guard)


def plain(folder: Path, *, guard: bool) -> tuple[Weights, dict[str, Any]]:
    """The weights and the result of the command line's own training."""
    config = config_of(guard=guard)
    found = train(config, folder, dataset=read_data(config))
    return checkpoint.load(folder / "checkpoint.pt")["model"], found


@pytest.fixture(scope="module")
def without(tmp_path_factory):
    """Without a guard, and without probes."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(result, "plot_curves", lambda *args, **options: None)
        return plain(tmp_path_factory.mktemp("without") / "run", guard=False)


@pytest.fixture
def arguments(tmp_path, monkeypatch):
    monkeypatch.setattr(trainings, "CONFIG", TINY)
    monkeypatch.setattr(watched, "EVERY", 5)
    monkeypatch.setattr(TrainConfig, "read_data", read_data)
    own = [f"--root={tmp_path / 'unused'}", f"--work={tmp_path / 'runs'}", f"--out={tmp_path / 'out.json'}"]
    return [*own, "--epochs=3", f"--only={NAME}"]


class Once(CollapseGuard):
    """Its first alarm is in the 12th step, and the only one."""

    def __init__(self, model: nn.Module, optimizer: torch.optim.Optimizer, **options: Any) -> None:
        own = {"every": 4, "threshold": 0.0, "horizon": 1, "margin": 11, "rescue_steps": 3}
        super().__init__(model, optimizer, **{**options, **own})

    def _read(self) -> None:
        if self._step == 12 and not self.alarms:
            super()._read()
        else:
            self._sent.clear()


@pytest.fixture
def alarming(monkeypatch):
    monkeypatch.setattr(guarding, "CollapseGuard", Once)


@pytest.fixture
def ends(monkeypatch):
    """The weights of each watched run at its end."""
    found: list[Weights] = []

    def noting(model: nn.Module, *rest: Any) -> Any:
        found.append({name: value.clone() for name, value in model.state_dict().items()})
        return result.accuracy_of(model, *rest)

    monkeypatch.setattr(watched, "accuracy_of", noting)
    return found


def read(arguments: list[str]) -> dict[str, Any]:
    rows: dict[str, Any] = json.loads(Path(arguments[2].partition("=")[2]).read_text())["rows"]
    return rows


def same(one: Weights, other: Weights) -> bool:
    return one.keys() == other.keys() and all(torch.equal(value, other[name]) for name, value in one.items())


def test_a_training_without_an_alarm_stands_for_both(arguments, ends, without, tmp_path, monkeypatch, capsys):
    kept: dict[int, Weights] = {}
    save = checkpoint.save

    def saving(path: Path, state: dict[str, Any]) -> None:
        save(path, state)
        kept[state["step"]] = state["model"]

    monkeypatch.setattr(checkpoint, "save", saving)
    assert trainings.main(arguments) == 0
    (row,) = read(arguments).values()
    guarded = row["guarded"]
    assert (row["alone"], guarded["alarms"]) == (SAME, [])
    # The economy: the weights, their attacks, and so what is said of the run without the guard, are those of a run that
    # has neither guard nor probes.
    (weights,) = ends
    assert same(weights, without[0])
    assert guarded["accuracy"] == {name: each["accuracy"] for name, each in without[1]["accuracy"].items()}
    assert row["judged"]["fallen"] is row["judged"]["fallen_alone"]
    assert not list((tmp_path / "runs" / NAME).glob("*.pt"))
    assert "| 16/255 | n-fgsm | 1 |" in capsys.readouterr().out
    # Probes are PGD-10 on the images that the guard, which has 64, does not see.
    assert [probe[0] for probe in guarded["probes"]] == [5, 10, 15, 20, STEPS]
    _, validation = read_data(TINY).train.held_out(80)
    saved = {"model": kept[STEPS], "shape": _shape(), "config": {**guarded["config"], "root": None}}
    model = checkpoint.model_of(saved, tmp_path)
    (clean, robust) = evaluate(model, data.in_order(validation[64:]), "clean,pgd-10", eps=16 / 255).values()
    assert guarded["probes"][-1][1:3] == [clean["accuracy"], robust["accuracy"]]
    assert len({probe[3] for probe in guarded["probes"]}) > 1
    assert guarded["linearity"][0] is None  # a mean of three at least, each of 6 steps
    assert 0 < guarded["linearity"][-1] < 1


def _shape() -> dict[str, Any]:
    split = read_data(TINY).train.held_out(80)[0]
    mean, std = (each.tolist() for each in _mean_and_std(split))
    return {"in_shape": list(split.in_shape), "classes": 10, "mean": mean, "std": std}


def _mean_and_std(split: data.Split) -> tuple[torch.Tensor, torch.Tensor]:
    pixels = split.images.double() / 255
    return pixels.mean((0, 2, 3)), pixels.std((0, 2, 3), correction=0)


def test_after_an_alarm_the_other_run_begins_at_the_last_state_before_it(arguments, alarming, ends, without, tmp_path):
    assert trainings.main(arguments) == 0
    (row,) = read(arguments).values()
    guarded, alone = row["guarded"], row["alone"]
    (alarm,) = guarded["alarms"]
    assert (alarm["step"], alarm["signal"], alarm["back_to"]) == (12, "linearity", 1)
    assert guarded["probes"][:2] == alone["probes"][:2]
    assert guarded["probes"][2:] != alone["probes"][2:]
    assert [probe[0] for probe in guarded["probes"]] == [probe[0] for probe in alone["probes"]]
    assert same(ends[1], without[0])
    assert alone["accuracy"] == {name: each["accuracy"] for name, each in without[1]["accuracy"].items()}
    weights, found = plain(tmp_path / "with", guard=True)
    assert same(ends[0], weights)
    assert not same(weights, without[0])
    assert guarded["alarms"] == found["alarms"]
    assert (alone["alarms"], alone["config"]["guard"], guarded["config"]["guard"]) == ([], False, True)
    assert row["judged"]["alarms"] == 1


def test_what_is_stopped_goes_on_and_ends_with_the_same_row(arguments, alarming, monkeypatch, capsys):
    assert trainings.main(arguments) == 0
    whole = read(arguments)
    again = [each.replace("runs", "again").replace("out.json", "again.json") for each in arguments]
    at: list[int] = []
    probe: Callable[..., None] = watched.Watched._probe

    def stopping(self: watched.Watched, run: Any, seconds: float) -> None:
        at.append(run.step)
        self.stop_asked = lambda: True
        probe(self, run, seconds)

    monkeypatch.setattr(watched.Watched, "_probe", stopping)
    stops = 0
    while trainings.main(again) == 130:
        stops += 1
        assert "the same command goes on" in capsys.readouterr().err
    # The run without the guard has the probes of steps 5 and 10 already; after the last one there is nothing to stop.
    assert at == [5, 10, 15, 20, STEPS, 15, 20, STEPS]
    assert stops == 6
    assert _timeless(read(again)) == _timeless(whole)
    done = Path(again[2].partition("=")[2]).read_bytes()
    monkeypatch.setattr(watched.Watched, "result", None)  # is not called
    assert trainings.main(again) == 0
    assert Path(again[2].partition("=")[2]).read_bytes() == done


def _timeless(rows: dict[str, Any]) -> dict[str, Any]:
    for row in rows.values():
        for name in ("guarded", "alone"):
            row[name]["seconds"] = 0
    return rows


def test_weights_that_are_not_finite_end_the_run_without_the_guard(arguments, monkeypatch):
    monkeypatch.setattr(trainings, "CONFIG", replace(TINY, learning_rate=1e30))
    with pytest.warns(UserWarning, match=r"^CollapseGuard: linearity is nan"):
        assert trainings.main(arguments) == 0
    (row,) = read(arguments).values()
    assert row["alone"]["ended"] == "nan"
    assert row["alone"]["probes"][-1][:3] == [5, 0.0, 0.0]
    assert row["alone"]["accuracy"] == {}
    assert row["judged"]["fallen_alone"]


def test_another_setting_is_refused_and_a_cell_that_is_taken_left_alone(arguments, alarming, tmp_path, capsys):
    folder = tmp_path / "runs" / NAME
    folder.mkdir(parents=True)
    with alone_in(folder):
        assert trainings.main(arguments) == 0
    assert f"{NAME}: another process is at it" in capsys.readouterr().err
    assert not list(folder.iterdir())
    assert trainings.main(arguments) == 0
    with pytest.raises(ValueError, match=r"of another: epochs = 3 \(now: 2\)"):
        trainings.main([*arguments, "--epochs=2"])
    with pytest.raises(SystemExit, match="2"):
        trainings.main([*arguments[:-1], "--only=fgsm"])
    assert "only: expected names of cells or patterns that fit some, got 'fgsm'" in capsys.readouterr().err


def test_the_order_of_worth():
    every = trainings.cells(Path("work"), None, 5)
    assert len({cell.name for cell in every}) == len(every) == 36
    names = [*(f"{name}-eps16-seed0" for name in trainings.METHODS), "fgsm-eps16-seed1"]
    assert [cell.name for cell in every[:7]] == names
    assert [cell.eps for cell in every[::12]] == [16, 26, 8]
    for cell in every:
        config = cell.config(guard=True)
        assert (config.guard, config.epochs, config.limit, config.augment) == (True, 5, None, True)
        assert (config.model, config.width, config.precision) == ("preact", 16, "bf16")
        assert (config.validation or 0) >= guarding.HELD_OUT + watched.SAMPLES
