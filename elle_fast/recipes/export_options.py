"""The options of `elle-fast export`."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from elle_fast.recipes.checked import Checked


@dataclass(frozen=True)
class ExportOptions(Checked):
    """A trained model as a file for others: it takes pixels in [0, 1], with the normalisation inside."""

    source: Path
    """A run's folder, or one of its checkpoints (checkpoint.pt, best.pt, averaged.pt, best_averaged.pt)."""
    to: str = "safetensors"
    """safetensors, torch-export (a .pt2 file), onnx, or robustbench (a folder with all that a submission needs)."""
    out: Path | None = None
    """The file, or the folder of robustbench; by default beside the checkpoint, named after it."""
    weights: str | None = None
    """Of a run's folder: last, best, averaged or best_averaged; by default best if there is one, else last."""
    model: str | None = None
    """The network's name, needed where it is package.module:callable: a file alone may not say which code to call."""
    evaluation: Path | None = None
    """JSON file of elle-fast eval on the same checkpoint, whose accuracies go into the export."""
    overwrite: bool = False
    """Replace what is there."""
