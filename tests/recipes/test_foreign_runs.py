"""Networks from elsewhere, trained from the command line with ELLE-A, stopped in the middle and resumed."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from PIL import Image

from elle_fast.recipes import checkpoint, cli
from tests.optional import import_torchvision
from tests.recipes import test_beginning
from tests.recipes.test_beginning import run, same, weights_of

USER = "tests.recipes.user_nets"
one_thread = test_beginning.one_thread

# Narrow where the library has an option for it. Two epochs of three steps; pictures of 3 x 16 x 16.
RUNS: dict[str, list[str]] = {
    "timm:resnet18": ["--small-images", "--model-args", "{channels: [4, 4, 8, 8], layers: [1, 1, 1, 1]}"],
    "timm:convnext_atto": ["--small-images", "--model-args", "{depths: [1, 1, 1, 1], dims: [4, 4, 8, 8]}"],
    "timm:vit_tiny_patch16_224": ["--small-images", "--model-args", "{depth: 1, embed_dim: 8, num_heads: 2}"],
    "torchvision:shufflenet_v2_x0_5": [],
    "torchvision:resnet18": ["--checkpoint-every", "0"],  # whose 90 MB take their time to be written
    f"{USER}:norms": ["--model-args", "{depth: 2, drop: 0.1}"],
    f"{USER}:hugging_face": [],
}


@pytest.fixture(scope="module", autouse=True)
def torchvision():
    import_torchvision()


@pytest.fixture(scope="module")
def pictures(tmp_path_factory) -> Path:
    folder: Path = tmp_path_factory.mktemp("pictures")
    generator = torch.Generator().manual_seed(0)
    for split, count in (("train", 12), ("test", 4)):
        for label, name in enumerate(("dark", "light")):
            (folder / split / name).mkdir(parents=True)
            for index in range(count):
                pixels = torch.randint(0, 100, (16, 16, 3), generator=generator) + 120 * label
                Image.fromarray(pixels.to(torch.uint8).numpy()).save(folder / split / name / f"{index}.png")
    return folder


def of_pictures(folder, model, *more):
    return ["--data", "image-folder", "--root", folder, "--model", model, "--learning-rate", "0.01", *more]


_SLOW = ("torchvision:resnet18",)


@pytest.mark.parametrize("model", [pytest.param(name, marks=[pytest.mark.slow] * (name in _SLOW)) for name in RUNS])
def test_a_resumed_run_ends_with_the_same_bits(model, pictures, tmp_path, capsys):
    given = of_pictures(pictures, model, *RUNS[model])
    said = run(capsys, *given, "--out", tmp_path / "whole")
    assert said.count("of the training images") == 1  # the normalisation's line
    run(capsys, *given, "--out", tmp_path / "cut", stop=4)  # in the middle of the second epoch
    run(capsys, *given, "--out", tmp_path / "cut", "--resume")
    whole, cut = weights_of(tmp_path / "whole"), weights_of(tmp_path / "cut")
    assert same(whole, cut)
    assert all(value.isfinite().all() for value in whole.values())
    loaded, config, saved = checkpoint.load_model(tmp_path / "cut" / "checkpoint.pt", model=model)
    assert config.model == model
    assert loaded(torch.rand(2, *saved["shape"]["in_shape"])).shape == (2, 2)


@pytest.mark.parametrize(
    "model, options",
    [
        ("timm:vit_tiny_patch16_224", ["--average", "0.9", "--optimizer", "adamw", "--layer-decay", "0.5"]),
        ("timm:convnext_atto", ["--precision", "bf16", "--decay", "weights", "--forward", "checkpoint"]),
        ("timm:resnet18", ["--method", "slat", "--precision", "fp16"]),
        (f"{USER}:norms", ["--method", "slat"]),
        (f"{USER}:hugging_face", ["--capture", "--skip-below", "0.1", "--average", "0.9"]),
        ("timm:vit_tiny_patch16_224", ["--method", "slat+elle-a"]),
        ("timm:resnet18", ["--method", "fgsm+awp"]),
    ],
)
def test_what_else_a_run_may_have(model, options, pictures, tmp_path, capsys):
    given = of_pictures(pictures, model, *RUNS[model], *options)
    run(capsys, *given, "--out", tmp_path / "a")
    assert all(value.isfinite().all() for value in weights_of(tmp_path / "a").values())


def test_an_evaluation_of_a_foreign_checkpoint(pictures, tmp_path, capsys, monkeypatch):
    model = f"{USER}:norms"
    run(capsys, *of_pictures(pictures, model, *RUNS[model]), "--out", tmp_path / "a")
    monkeypatch.chdir(Path(__file__).parents[2])
    words = ["eval", str(tmp_path / "a" / "checkpoint.pt"), "--attacks", "clean,fgsm", "--device", "cpu"]
    assert cli.main(words) == 2
    assert f"is to be built by the function '{model}'" in capsys.readouterr().err
    assert cli.main([*words, "--model", model]) == 0
    assert "clean" in capsys.readouterr().out


@pytest.mark.slow
def test_compiled(pictures, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("elle_fast.recipes.compiling.BACKEND", "eager")
    model = "timm:convnext_atto"
    run(capsys, *of_pictures(pictures, model, *RUNS[model], "--compile"), "--out", tmp_path / "a")
    run(capsys, *of_pictures(pictures, model, *RUNS[model]), "--out", tmp_path / "b")
    one, two = weights_of(tmp_path / "a"), weights_of(tmp_path / "b")
    for name, value in one.items():
        torch.testing.assert_close(value, two[name], msg=name)
