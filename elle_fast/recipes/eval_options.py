"""The options of `elle-fast eval`."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Annotated, Any

from tyro.conf import Positional

from elle_fast.evaluation import DEFAULT_ATTACKS
from elle_fast.recipes.checked import parse_number
from elle_fast.recipes.config import TrainConfig
from elle_fast.recipes.data_options import DataOptions
from elle_fast.recipes.model_options import ModelOptions

# With a checkpoint, what says where and how its data are read, and not which they are.
MAY_DIFFER = {"root", "test_list", "workers", "stream", "skip_corrupt"}


@dataclass(frozen=True)
class EvalOptions(ModelOptions, DataOptions):
    """Accuracy of a model, clean and under attack.

    Of a checkpoint of elle-fast train: elle-fast eval runs/mine/best.pt. It says which network and which data it is of,
    so that their options are not needed beside it.
    Of any other model: elle-fast eval --model timm:resnet18 --weights FILE --data image-folder --root DIR --eps 8/255.
    """

    checkpoint: Annotated[Path | None, Positional] = None
    """checkpoint.pt, best.pt, averaged.pt or best_averaged.pt of a run."""
    attacks: str = DEFAULT_ATTACKS
    """Separated by commas: clean, fgsm, pgd-K, pgd-K-RESTARTS, pgd-K-eps/8 (a step of eps/8 instead of eps/4), noise-K,
    and with elle-fast[eval] autoattack, square, square-QUERIES, foolbox-pgd-K, foolbox-pgd-K-RESTARTS."""
    eps: float | None = None
    """Radius in pixels of [0, 1], in linf at most 1; by default that of training, and needed with --model."""
    norm: str | None = None
    """Of the ball, linf or l2; by default that of training, else linf."""
    mean: str | None = None
    """With --weights: subtracted in front of the model, a number for each channel: 0.485,0.456,0.406. By default what
    the file or the library's configuration of the model says, else nothing."""
    std: str | None = None
    """With --weights: what is divided by after that, likewise: 0.229,0.224,0.225."""
    allow_other_data: bool = False
    """Only warn where images or labels are not those of training: another Pillow may decode a JPEG one level off."""
    samples: int | None = None
    """Test images, >= 1; by default all."""
    batch_size: int | None = None
    """Images at a time, >= 1; by default 256, on a GPU 1024 of 32x32 pixels; halved where memory is short."""
    precision: str = "fp32"
    """Of the model's passes and of the attacks' gradients: fp32, bf16 or fp16, through autocast."""
    seed: int = field(default=0, metadata={"low": 0, "high": 2**63 - 1})
    """Of the random starts, >= 0."""
    device: str = "auto"
    """cpu, cuda, cuda:1, ..., or auto: cuda if there is one, else cpu."""
    masking_check: bool | None = None
    """Look for masked gradients: PGD-200, Square and noise against PGD-20, on 256 images; by default beside
    autoattack."""
    eps_curve: str | None = None
    """Radii for the accuracy under PGD-20 against the radius, on at most 1000 images: 0,1/255,2/255,4/255; by default,
    with --report, eight from 0 to four times eps."""
    json: Path | None = None
    """Write the result to this file; if cut off, the same command continues where it was. So it does with --report or
    --per-sample alone."""
    report: Path | None = None
    """Write an HTML page to this file, with curves, accuracies by class, and pictures of what the attacks did."""
    per_sample: Path | None = None
    """Write a CSV file with a row for each test image: index, label, prediction, and by attack 1 if it withstands."""

    def statistics(self) -> tuple[list[float] | None, list[float] | None]:
        """The numbers of mean and std; raises ValueError, naming the option, for what is none."""
        return tuple(_numbers(name, getattr(self, name)) for name in ("mean", "std"))  # type: ignore[return-value]

    def radii(self) -> list[float] | None:
        """The numbers of eps_curve; raises ValueError for what is none."""
        return _numbers("eps_curve", self.eps_curve)

    def files(self) -> dict[str, Path]:
        """The files that are asked for, by option."""
        asked = {"json": self.json, "report": self.report, "per_sample": self.per_sample}
        return {name: path for name, path in asked.items() if path is not None}

    def source_options(self) -> set[str]:
        """The names of the options of model and data that are not as they are by default."""
        return {each.name for each in fields(self) if each.name in SOURCE and getattr(self, each.name) != each.default}

    def of_checkpoint(self, config: TrainConfig, given: Collection[str]) -> dict[str, Any]:
        """Which of the options that are given say where a checkpoint's data are to be read.

        Raises:
            ValueError: for one that contradicts the configuration of the checkpoint.
        """
        for name in sorted(SOURCE.intersection(given) - MAY_DIFFER):
            if (got := getattr(self, name)) != (expected := getattr(config, name)):
                of = f"that of the checkpoint {str(self.checkpoint)!r}, {expected!r}"
                raise ValueError(f"{name}: expected {of}, got {got!r}; beside a checkpoint it can be left out")
        for name in ("mean", "std"):
            if (got := getattr(self, name)) is not None:
                raise ValueError(f"{name}: a checkpoint has its own, so this option does not apply (got {got!r})")
        return {name: getattr(self, name) for name in MAY_DIFFER.intersection(given)}


SOURCE = {each.name for kind in (ModelOptions, DataOptions) for each in fields(kind)}


def _numbers(name: str, text: str | None) -> list[float] | None:
    if text is None:
        return None
    try:
        return [parse_number(each) for each in text.split(",")]
    except ValueError as error:
        raise ValueError(f"{name}: expected numbers with commas between them, got {text!r}: {error}") from None
