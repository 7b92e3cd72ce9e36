"""Models of timm, torchvision, Hugging Face and a user's own, trained with ELLE-A, stopped in the middle and resumed.

    python -m benchmarks.studies.foreign_models --out benchmarks/results/foreign_models.json

On scikit-learn's digits, so nothing is downloaded. Each model is trained for two epochs by the options of
``elle-fast train`` that its row names. The same run is stopped at the end of its last epoch, before that is saved, and
resumed from its last checkpoint, within the epoch. ``same_bits`` says whether weights, optimiser and lam are equal.
"""

from __future__ import annotations

import argparse
import io
import sys
import tempfile
from collections.abc import Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from torch import Tensor, nn

from benchmarks.harness.program import command, number, parser
from benchmarks.harness.tables import markdown
from elle_fast import data
from elle_fast._core.files import write_json
from elle_fast.recipes import checkpoint, cli
from elle_fast.recipes.config import TrainConfig
from elle_fast.recipes.provenance import provenance
from elle_fast.recipes.train import CHECKPOINT, train

HERE = "benchmarks.studies.foreign_models"
MODELS = {
    "timm:resnet18": ["--small-images"],
    "timm:convnext_atto": ["--small-images"],
    "timm:vit_tiny_patch16_224": ["--model-args", "{patch_size: 2}"],  # 16 patches; --small-images would make 64
    "torchvision:resnet18": ["--small-images"],
    f"{HERE}:own": [],
    f"{HERE}:hugging_face": [],
}
EPOCHS, BATCH = 2, 32
OPTIONS = ["--method", "elle-a", "--eps", "0.1", "--epochs", str(EPOCHS), "--batch-size", str(BATCH)]
OPTIONS += ["--optimizer", "adamw", "--schedule", "cosine", "--eval-attacks", "clean,pgd-10", "--device", "cpu"]
PACKAGES = ("timm", "torchvision", "transformers")


def own(num_classes: int, in_shape: tuple[int, ...], width: int = 32) -> nn.Module:
    """A user's own network: convolutions with group norm."""
    layers: list[nn.Module] = []
    for channels, wider in ((in_shape[0], width), (width, 2 * width)):
        layers += [nn.Conv2d(channels, wider, 3, padding=1), nn.GroupNorm(4, wider), nn.GELU()]
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(2 * width, num_classes))


def hugging_face(num_classes: int, in_shape: tuple[int, ...], hidden_size: int = 64) -> nn.Module:
    """A small ViT of transformers, with fresh weights."""
    from transformers import ViTConfig, ViTForImageClassification

    sizes: dict[str, Any] = {"hidden_size": hidden_size, "intermediate_size": 2 * hidden_size, "patch_size": 2}
    sizes |= {"image_size": in_shape[1], "num_channels": in_shape[0], "num_hidden_layers": 4, "num_attention_heads": 4}
    model: nn.Module = ViTForImageClassification(ViTConfig(**sizes, num_labels=num_classes))
    return model


class _StoppedError(Exception):
    pass


def study(name: str, words: list[str], dataset: data.Dataset, folder: Path) -> dict[str, Any]:
    """Train it in one go, and stopped and resumed; what became of it."""
    config: TrainConfig = cli.read_options("train", ["--model", name, *words, *OPTIONS]).run
    # One checkpoint in the middle of each epoch.
    held_out = len(dataset.train) // 8
    steps = (len(dataset.train) - held_out) // BATCH
    config = TrainConfig(**{**vars(config), "validation": held_out, "checkpoint_every": max(1, steps // 2)})
    calls = 0

    def stop(*_: Any) -> dict[str, float]:
        nonlocal calls
        calls += 1
        if calls == EPOCHS:
            raise _StoppedError
        return {}

    def quiet() -> Console:
        return Console(file=io.StringIO())

    result = train(config, folder / "whole", dataset=dataset, console=quiet())
    try:
        train(config, folder / "cut", dataset=dataset, console=quiet(), measure=stop)
    except _StoppedError:
        resumed_from = checkpoint.load(folder / "cut" / CHECKPOINT)["step"]
    train(config, folder / "cut", dataset=dataset, console=quiet(), resume=True)
    whole, cut = (checkpoint.load(folder / each / CHECKPOINT) for each in ("whole", "cut"))
    parts = ("model", "optimizer", "criterion")
    trained = checkpoint.model_of(whole, folder / "whole" / CHECKPOINT, model=name)
    return {
        "model": name,
        "options": words,
        "parameters": sum(each.numel() for each in trained.parameters()),
        "steps": whole["step"],
        "resumed_from_step": resumed_from,
        "same_bits": all(same(whole[part], cut[part]) for part in parts),
        "accuracy": {attack: numbers["accuracy"] for attack, numbers in result["accuracy"].items()},
    }


def same(one: Any, two: Any) -> bool:
    """Whether two nests of containers hold the same numbers, tensors to the bit."""
    if isinstance(one, Tensor):
        return isinstance(two, Tensor) and torch.equal(one, two)
    if isinstance(one, dict):
        return one.keys() == two.keys() and all(same(value, two[name]) for name, value in one.items())
    if isinstance(one, (list, tuple)):
        return len(one) == len(two) and all(same(*pair) for pair in zip(one, two, strict=True))
    return bool(one == two)


def table(rows: list[dict[str, Any]]) -> str:
    """Markdown of all models."""
    lines = [
        (
            row["model"].removeprefix(f"{HERE}:"),
            f"{row['parameters'] / 1e6:.2f} M",
            f"{row['resumed_from_step']} of {row['steps']}",
            "yes" if row["same_bits"] else "NO",
            *(f"{100 * accuracy:.1f}" for accuracy in row["accuracy"].values()),
        )
        for row in rows
    ]
    return markdown(["model", "weights", "resumed from step", "same bits", "clean", "PGD-10"], lines)


def main(arguments: Sequence[str] | None = None) -> int:
    """Train all, write the JSON file, print the table; 1 if a resumed run has other bits."""
    options_of = _parser()
    options = options_of.parse_args(arguments)
    torch.set_num_threads(1)
    sizes = {"limit": options.limit, "test_limit": options.test_limit}
    dataset, rows = data.load("digits", None, **sizes), []
    about = provenance(command(options_of, options))
    about["versions"] |= {package: metadata.version(package) for package in PACKAGES}
    about["settings"] = {
        "options": OPTIONS,
        "train_images": len(dataset.train),
        "test_images": len(dataset.test),
    }
    for name, words in MODELS.items():
        if options.only not in name:
            continue
        print(name, file=sys.stderr, flush=True)
        with tempfile.TemporaryDirectory() as folder:
            rows.append(study(name, words, dataset, Path(folder)))
        write_json(options.out, {**about, "runs": rows})  # so that the rows so far are there if it is stopped
    print(table(rows))
    return 0 if all(row["same_bits"] for row in rows) else 1


def _parser() -> argparse.ArgumentParser:
    options_of = parser(HERE, __doc__)
    options_of.add_argument("--out", type=Path, required=True, help="the JSON file")
    options_of.add_argument("--limit", type=number, default=None, help="training images")
    options_of.add_argument("--test-limit", type=number, default=None, help="test images")
    options_of.add_argument("--only", default="", help="models whose name has this in it")
    return options_of


if __name__ == "__main__":
    sys.exit(main())
