"""The options of `elle-fast eval`."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

from elle_fast.evaluation import DEFAULT_ATTACKS
from elle_fast.recipes.checked import Checked


@dataclass(frozen=True)
class EvalOptions(Checked):
    """Accuracy of a checkpoint, clean and under attack."""

    checkpoint: Path
    """checkpoint.pt, best.pt, averaged.pt or best_averaged.pt of a run."""
    attacks: str = DEFAULT_ATTACKS
    """Separated by commas: clean, fgsm, pgd-K, pgd-K-RESTARTS, pgd-K-eps/8 (a step of eps/8 instead of eps/4), noise-K,
    and with elle-fast[eval] autoattack, square, square-QUERIES, foolbox-pgd-K, foolbox-pgd-K-RESTARTS."""
    eps: float | None = None
    """Radius in pixels of [0, 1], in linf at most 1; by default that of training."""
    norm: str | None = None
    """Of the ball, linf or l2; by default that of training."""
    root: str | None = None
    """The data set's files; by default those of training."""
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
    json: Path | None = None
    """Write the result to this file; if cut off, the same command continues where it was."""
