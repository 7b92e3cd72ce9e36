"""benchmarks/guard/trainings.py with tiny runs."""

from __future__ import annotations

import json
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks.guard import trainings, watched
from benchmarks.guard.judged import SAME
from benchmarks.harness.rows import alone_in
from elle_fast import data
from elle_fast.evaluation import evaluate
from elle_fast.guard import CollapseGuard
from elle_fast.recipes import checkpoint, guarding, run
from elle_fast.recipes.config import TrainConfig
from elle_fast.recipes.train import train

TINY = replace(
    trainings.CONFIG,
    **{"data": "digits", "limit": 336, "validation": 80, "test_limit": 32, "width": 2, "batch_size": 32},
    **{"eval_attacks": "clean,pgd-2,pgd-50-10", "augment": False, "learning_rate": 0.05, "precision": "fp32"},
)
NAME = "n-fgsm-eps16-seed1"  # 8 batches an epoch, 3 epochs
STEPS = 24


class Said(dict[str, torch.Tensor]):
    """The state dicts of the final models, by whether there was a guard."""


@pytest.fixture
def arguments(tmp_path, monkeypatch):
    monkeypatch.setattr(trainings, "CONFIG", TINY)
    monkeypatch.setattr(watched, "EVERY", 5)
    monkeypatch.setattr(TrainConfig, "read_data", lambda config: data.load("digits", limit=336, test_limit=32))
    own = [f"--root={tmp_path / 'unused'}", f"--work={tmp_path / 'runs'}", f"--out={tmp_path / 'out.json'}"]
    return [*own, "--epochs=3", f"--only={NAME}"]


@pytest.fixture
def alarming(monkeypatch):
    """A guard whose first alarm is in the 12th step, and the only one."""
    options = {"every": 4, "threshold": 0.0, "horizon": 1, "margin": 11, "rescue_steps": 3}

    class Once(CollapseGuard):
        def _read(self) -> None:
            if self._step == 12 and not self.alarms:
                super()._read()
            else:
                self._sent.clear()

    monkeypatch.setattr(guarding, "CollapseGuard", partial(Once, **options))


def read(arguments: list[str]) -> dict[str, Any]:
    return json.loads(Path(arguments[2].partition("=")[2]).read_text())["rows"]


def plain(folder: Path, **options: Any) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
    """The weights and the result of the command line's own training."""
    config = replace(TINY, method="n-fgsm", eps=16 / 255, seed=1, epochs=3, device="cpu", **options)
    result = train(config, folder, dataset=config.read_data())
    return checkpoint.load(folder / "checkpoint.pt")["model"], result


@pytest.fixture
def ends(monkeypatch):
    """The weights of each watched run at its end."""
    found: list[dict[str, torch.Tensor]] = []
    real = watched.accuracy_of

    def noting(model, *rest):
        found.append({name: value.clone() for name, value in model.state_dict().items()})
        return real(model, *rest)

    monkeypatch.setattr(watched, "accuracy_of", noting)
    return found


def same(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(value, other[name]) for name, value in one.items())


def test_a_training_without_an_alarm_stands_for_both(arguments, ends, tmp_path, capsys):
    assert trainings.main(arguments) == 0
    (row,) = read(arguments).values()
    assert row["alone"] == SAME
    assert row["guarded"]["alarms"] == []
    assert [probe[0] for probe in row["guarded"]["probes"]] == [5, 10, 15, 20, STEPS]
    (weights,) = ends
    # The economy: without a guard, and without probes, elle-fast train comes to the same bits.
    without, result = plain(tmp_path / "without")
    assert same(weights, without)
    with_it, _ = plain(tmp_path / "with", guard=True)
    assert same(weights, with_it)
    assert row["guarded"]["accuracy"] == {name: each["accuracy"] for name, each in result["accuracy"].items()}
    assert not list((tmp_path / "runs" / NAME).glob("*.pt"))
    assert "| 16/255 | n-fgsm | 1 |" in capsys.readouterr().out


def test_after_an_alarm_the_other_run_begins_at_the_last_state_before_it(arguments, alarming, ends, tmp_path):
    assert trainings.main(arguments) == 0
    (row,) = read(arguments).values()
    (alarm,) = row["guarded"]["alarms"]
    assert (alarm["step"], alarm["signal"], alarm["back_to"]) == (12, "linearity", 1)
    guarded, alone = row["guarded"], row["alone"]
    assert guarded["probes"][:2] == alone["probes"][:2]
    assert guarded["probes"][2:] != alone["probes"][2:]
    assert [probe[0] for probe in alone["probes"]] == [probe[0] for probe in guarded["probes"]]
    without, result = plain(tmp_path / "without")
    assert same(ends[1], without)
    assert alone["accuracy"] == {name: each["accuracy"] for name, each in result["accuracy"].items()}
    with_it, result = plain(tmp_path / "with", guard=True)
    assert same(ends[0], with_it)
    assert not same(with_it, without)
    assert guarded["alarms"] == result["alarms"]
    assert (alone["alarms"], alone["config"]["guard"], guarded["config"]["guard"]) == ([], False, True)
    assert alone["seconds"] > guarded["probes"][0][0] * 0  # of the shared steps too
    assert row["judged"]["alarms"] == 1


def test_probes_are_pgd_10_on_images_that_the_guard_does_not_see(arguments, tmp_path, monkeypatch):
    kept = {}
    real = watched.checkpoint.save if hasattr(watched.checkpoint, "save") else None
    assert real is not None

    def saving(path, state):
        real(path, state)
        kept[state["step"]] = {name: value.clone() for name, value in state["model"].items()}

    monkeypatch.setattr(run.checkpoint, "save", saving)
    assert trainings.main(arguments) == 0
    (row,) = read(arguments).values()
    config = replace(TINY, method="n-fgsm", eps=16 / 255, seed=1, epochs=3, device="cpu").resolved()
    assert config.validation == 80
    _, validation = config.read_data().train.held_out(80)
    plain(tmp_path / "model")
    model, _, _ = checkpoint.load_model(tmp_path / "model" / "checkpoint.pt")
    for step, clean, robust, train_adv in row["guarded"]["probes"]:
        model.load_state_dict(kept[step])
        found = evaluate(model, data.in_order(validation[64:]), "clean,pgd-10", eps=16 / 255)
        assert [clean, robust] == [each["accuracy"] for each in found.values()]
        assert 0 <= train_adv <= 1
    assert len({probe[3] for probe in row["guarded"]["probes"]}) > 1


def test_what_is_stopped_goes_on_and_ends_with_the_same_row(arguments, alarming, monkeypatch, tmp_path, capsys):
    assert trainings.main(arguments) == 0
    whole = read(arguments)
    again = [each.replace("runs", "again").replace("out.json", "again.json") for each in arguments]
    # Stopped at each probe of either run, but the last, where it is over.
    asked: list[int] = []
    monkeypatch.setattr(watched.Watched, "__post_init__", lambda self: None, raising=False)
    real = watched.Watched._probe

    def probe(self, run_, seconds):
        self.stop_asked = lambda: True
        asked.append(run_.step)
        real(self, run_, seconds)

    monkeypatch.setattr(watched.Watched, "_probe", probe)
    stops = 0
    while trainings.main(again) == 130:
        stops += 1
        assert "the same command goes on" in capsys.readouterr().err
    # The run without the guard has the probes of steps 5 and 10 already.
    assert asked == [5, 10, 15, 20, STEPS, 15, 20, STEPS]
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
    with pytest.warns(UserWarning, match="CollapseGuard"):
        assert trainings.main(arguments) == 0
    (row,) = read(arguments).values()
    assert row["alone"]["ended"] == "nan"
    assert row["judged"]["fallen_alone"]
    assert row["alone"]["probes"][-1][:3] == [5, 0.0, 0.0]


def test_another_setting_is_refused_and_a_cell_that_is_taken_left_alone(arguments, monkeypatch, tmp_path, capsys):
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
    assert [cell.name for cell in every[:7]] == [
        *(f"{name}-eps16-seed0" for name in trainings.METHODS),
        "fgsm-eps16-seed1",
    ]
    assert [cell.eps for cell in every[::12]] == [16, 26, 8]
    for cell in every:
        config = cell.config(guard=True)
        assert (config.guard, config.epochs, config.limit, config.augment) == (True, 5, None, True)
        assert (config.model, config.width, config.precision) == ("preact", 16, "bf16")
        assert config.validation >= guarding.HELD_OUT + watched.SAMPLES
