import json
from dataclasses import replace

import pytest

from benchmarks.paper.settings import SETTINGS, Setting
from benchmarks.step import full_run
from elle_fast.presets import FAST
from elle_fast.recipes.config import TrainConfig
from elle_fast.recipes.train import train

TINY = Setting(
    config=TrainConfig(width=2, epochs=2, limit=80, test_limit=16, batch_size=32),
    variants={"fgsm": {"method": "fgsm"}, "elle-a": {"method": "elle-a"}, "fast": {"method": "elle-a", **FAST}},
    seeds=(0,),
    note="a note that belongs to every table",
)


def run(tmp_path, monkeypatch, *more):
    monkeypatch.setitem(SETTINGS, "cifar10-jpeg-levers", TINY)
    out = tmp_path / "out.json"
    assert full_run.main(["--out", str(out), "--threads", "1", *more]) == 0
    return json.loads(out.read_text())


def test_every_variant_has_a_step_on_every_batch(tmp_path, monkeypatch, capsys):
    seen = []
    step = full_run._Trainer.step

    def record(self, x, y):
        seen.append((self.config.method, self.run.step, self.run.steps, x.sum().item()))
        step(self, x, y)

    monkeypatch.setattr(full_run._Trainer, "step", record)
    content = run(tmp_path, monkeypatch, "--eps", "8/255")
    assert [(method, number, steps) for method, number, steps, _ in seen] == [
        (method, number, 4) for number in range(4) for method in ("fgsm", "elle-a")
    ]
    assert all(one[3] == other[3] for one, other in zip(seen[::2], seen[1::2], strict=True))
    fgsm, fast = content["runs"]
    assert (fgsm["variant"], fgsm["ratio"], fgsm["full_share"]) == ("fgsm", 1.0, None)
    assert fast["variant"] == "fast"
    assert fast["ratio"] == pytest.approx(fast["seconds"] / fgsm["seconds"], rel=1e-3)
    assert (fast["wanted"], fast["met"]) == (1.25, fast["ratio"] <= 1.25)
    assert 0 <= fast["full_share"] <= 1
    assert str(tmp_path) not in json.dumps(content)
    assert "at most 1.25x" in capsys.readouterr().out


def test_each_eps_and_the_variants_chosen(tmp_path, monkeypatch):
    content = run(tmp_path, monkeypatch, "--epochs", "1", "--variants", "fgsm,elle-a,fast")
    assert [(run["variant"], round(255 * run["eps"])) for run in content["runs"]] == [
        (name, eps) for eps in (8, 16) for name in ("fgsm", "elle-a", "fast")
    ]
    assert [run.get("wanted") for run in content["runs"]] == [None, None, 1.25, None, None, 1.4]


def test_the_weights_are_those_of_the_trainer(tmp_path, monkeypatch):
    """A run by turns is the run of ``elle-fast train``: the same accuracy, to the last image."""
    content = run(tmp_path, monkeypatch, "--eps", "8/255", "--variants", "fgsm")
    config = replace(TINY.config, eps=8 / 255, method="fgsm", eval_attacks="clean,pgd-20")
    result = train(config, tmp_path / "run")
    assert content["runs"][0]["accuracy"] == {name: numbers["accuracy"] for name, numbers in result["accuracy"].items()}


@pytest.mark.parametrize("variants", ["fast", "fgsm,fgsm", "fgsm,slow"])
def test_variants_that_cannot_be_compared(variants, tmp_path, monkeypatch):
    with pytest.raises(ValueError, match=r"^variants: expected"):
        run(tmp_path, monkeypatch, "--variants", variants)
