"""benchmarks/studies/foreign_models.py, on a few digits."""

import json

import pytest
import torch

from benchmarks.studies import foreign_models
from tests.optional import import_torchvision


@pytest.fixture(autouse=True)
def torchvision(monkeypatch):
    import_torchvision()
    monkeypatch.setattr("elle_fast.recipes.result.plot_curves", lambda *args, **more: None)


def test_smoke(tmp_path, capsys):
    out = tmp_path / "out.json"
    words = [f"--out={out}", "--limit=144", "--test-limit=20", "--only=:own"]
    assert foreign_models.main(words) == 0
    content = json.loads(out.read_text())
    assert {"machine", "versions", "commit", "settings"} <= content.keys()
    assert {"timm", "torchvision", "transformers"} <= content["versions"].keys()
    assert str(tmp_path) not in out.read_text()
    (run,) = content["runs"]
    # 126 images make 3 batches of 32 an epoch, with a checkpoint after each step but at an epoch's end.
    assert (run["steps"], run["resumed_from_step"], run["same_bits"]) == (6, 5, True)
    assert "| own | 0.02 M | 5 of 6 | yes |" in capsys.readouterr().out


def test_the_targets_are_all_there():
    assert [name.rpartition(".")[2] for name in foreign_models.MODELS] == [
        *("timm:resnet18", "timm:convnext_atto", "timm:vit_tiny_patch16_224", "torchvision:resnet18"),
        *("foreign_models:own", "foreign_models:hugging_face"),
    ]


def test_other_bits_are_seen():
    one = {"a": [torch.ones(2), 3], "b": {"c": torch.zeros(1)}}
    assert foreign_models.same(one, {"a": [torch.ones(2), 3], "b": {"c": torch.zeros(1)}})
    for other in (
        {"a": [torch.ones(2), 4], "b": {"c": torch.zeros(1)}},
        {"a": [torch.ones(2), 3], "b": {"c": torch.tensor([1e-45])}},
        {"a": [torch.ones(2)], "b": {"c": torch.zeros(1)}},
        {"a": [torch.ones(2), 3], "b": {}},
    ):
        assert not foreign_models.same(one, other)
