"""The options of a run are checked where they are made: in Python, on the command line and in a file."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from elle_fast.recipes import cli
from elle_fast.recipes.config import TrainConfig
from elle_fast.recipes.eval_options import EvalOptions


def fails(capsys, *arguments):
    assert cli.main(list(arguments)) == 2
    said = capsys.readouterr().err
    assert said.count("\n") == 1
    return said


@pytest.mark.parametrize(
    "options, message",
    [
        ({"eval_attacks": 5}, r"eval_attacks: expected a string, got 5 \(int\)"),
        ({"eps": "8/255"}, r"eps: expected a finite number in \[0, 3.40282e\+38\], got '8/255' \(str\)"),
        ({"epochs": 0}, "epochs: expected an integer >= 1, got 0"),
        ({"seed": 2**63}, "seed: expected an integer >= 0 and <= 9223372036854775807, got"),
        ({"device": None}, "device: expected a string, got None"),
    ],
)
def test_a_run_with_a_bad_value_is_not_made(options, message):
    with pytest.raises((TypeError, ValueError), match=message):
        TrainConfig(**options)


@pytest.mark.parametrize(
    "options, message",
    [
        ({"checkpoint": 5}, r"checkpoint: expected a path, got 5 \(int\)"),
        ({"attacks": None}, "attacks: expected a string, got None"),
        ({"samples": 0}, "samples: expected an integer >= 1, got 0"),
        ({"batch_size": -1}, "batch_size: expected an integer >= 1, got -1"),
        ({"seed": "a"}, "seed: expected an integer >= 0"),
        ({"seed": -1}, "seed: expected an integer >= 0"),
        ({"masking_check": 1}, "masking_check: expected True or False"),
        ({"json": 3}, "json: expected a path, got 3"),
        ({"root": Path("here")}, "root: expected a string, got PosixPath"),
    ],
)
def test_an_evaluation_with_a_bad_value_is_not_made(options, message):
    with pytest.raises((TypeError, ValueError), match=message):
        EvalOptions(**{"checkpoint": "c.pt", **options})
    assert EvalOptions("c.pt", json="a.json").json == Path("a.json")  # type: ignore[arg-type]  # strings serve too


@pytest.mark.parametrize("eps, meant", [("8", "; for 8 of 255 levels, 8/255"), ("1.01", ".*1.01/255"), ("300", "$")])
def test_eps_above_one_asks_for_pixels_of_0_to_1(eps, meant, tmp_path, capsys):
    file = tmp_path / "run.yaml"
    file.write_text(f"eps: {eps}")
    with pytest.raises(ValueError, match=rf"^eps: expected a radius in \[0, 1\], where pixels are, got {eps}{meant}"):
        TrainConfig(eps=float(eps))
    of_eval = ["eval", "c.pt", "--eps", eps, "--norm", "linf"]  # else the checkpoint has the norm
    for given in (["train", "--eps", eps], of_eval, ["train", "--config", str(file)]):
        assert f"eps: expected a radius in [0, 1], where pixels are, got {eps}" in fails(capsys, *given)


def test_a_key_that_is_twice_in_a_file_is_refused(tmp_path, capsys):
    file = tmp_path / "run.yaml"
    file.write_text("eps: 0.1\nseed: 3\neps: 0.2\n")
    assert "not valid YAML: eps: given twice" in fails(capsys, "train", "--config", str(file))
    file.write_text("eps: 0.1\n")
    assert TrainConfig.from_yaml(str(file)).eps == 0.1


@pytest.mark.parametrize("flag", [["--lagged"], ["--skip-below", "0.1"]])
@pytest.mark.parametrize("method", ["elle", "n-fgsm+elle", "gat+elle", "elle-2p"])
def test_what_needs_the_history_of_elle_a_is_refused_in_terms_of_methods(flag, method, capsys):
    said = fails(capsys, "train", "--method", method, *flag)
    assert f"method {method!r} takes " in said
    assert "adaptive" not in said
    assert (f"method {method + '-a'!r} takes it" in said) == (method != "elle-2p")


def test_relative_e_lin_on_few_samples_is_refused():
    run = TrainConfig(method="elle-a", rule="relative", batch_size=64, triplet_fraction=0.125, device="cpu")
    message = (
        r"^rule: 'relative' needs E_lin on 16 samples or more, got 8 of a batch of 64 with triplet_fraction 0.125$"
    )
    with pytest.raises(ValueError, match=message):
        run.resolved()
    with pytest.raises(ValueError, match="got 15 of a batch of 15"):
        replace(run, phases="1:8:64,1:8:15", batch_size=None, triplet_fraction=1.0).resolved()
    enough: list[dict[str, Any]] = [{"batch_size": 128}, {"triplet_fraction": 0.25}, {"rule": "paper"}]
    for fits in enough:
        replace(run, **fits).resolved()
