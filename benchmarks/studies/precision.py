"""The smallest E_lin visible in low precision: the noise that bf16, fp16 and tf32 forward passes add to it.

    python -m benchmarks.studies.precision --run RUN_FOLDER --root cifar10-jpeg.tar.xz --out precision.json

For trained models (folders that ``elle-fast train`` wrote) and batches of their test images, the residual r of each
sample is computed in float64, and from a forward pass in each precision on the same points. The floor is the mean of
(r - exact r)^2: the E_lin that would be measured if it were 0. ELLE-A's rule is E_lin > mean + 2 std of the history, so
it misses a rise by less than 2 std of the measured E_lin (unseen_below). floor_unseen_below is 2 std of the floor: what
the noise alone hides, however small the true E_lin. Both are taken over ``batches`` batches.
"""

from __future__ import annotations

import argparse
import copy
import statistics
import sys
from collections.abc import Sequence
from itertools import islice
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.harness.device import tf32
from benchmarks.harness.program import command, parser
from benchmarks.harness.tables import terminal
from elle_fast import data, functional
from elle_fast._core.files import write_json
from elle_fast.recipes import checkpoint
from elle_fast.recipes.provenance import provenance
from elle_fast.recipes.train import CHECKPOINT

SENSITIVITY = 2.0  # of AdaptiveLambda, in standard deviations
_COLUMNS = ("e_lin", "measured", "floor", "unseen_below", "floor_unseen_below")


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure, write the JSON file, print the table."""
    options_of = _parser()
    options = options_of.parse_args(arguments)
    if options.batches < 2 or options.batch < 1:
        # A standard deviation needs two.
        options_of.error(f"expected --batches >= 2 and --batch >= 1, got {options.batches} and {options.batch}")
    device = torch.device(options.device)
    root = None if options.root is None else str(options.root)
    sizes = {"batches": options.batches, "batch": options.batch}
    rows = [row for folder in options.run for row in measure(folder, root, device, **sizes)]
    about = " ".join((__doc__ or "").split("\n\n")[-1].split())
    content = {"about": about, "device": device.type, "rows": rows, **provenance(command(options_of, options))}
    write_json(options.out, content)
    print(table(rows))
    return 0


def precisions(device: torch.device) -> dict[str, Any]:
    """By name, the context of a forward pass; the last one packs its points in bf16 too."""

    def autocast(dtype: torch.dtype) -> Any:
        return lambda: torch.autocast(device.type, dtype=dtype)

    found = {"float32": lambda: tf32(False)}
    if device.type == "cuda" and torch.cuda.get_device_capability(device) >= (8, 0):
        found["tf32"] = lambda: tf32(True)
    found |= {"float16 autocast": autocast(torch.float16), "bfloat16 autocast": autocast(torch.bfloat16)}
    return {**found, "bfloat16 autocast and points": autocast(torch.bfloat16)}


def measure(folder: Path, root: str | None, device: torch.device, *, batches: int, batch: int) -> list[dict[str, Any]]:
    """A row for each precision, of a run's model on its own test images at its own eps; they must make two batches."""
    model, config, _ = checkpoint.load_model(folder / CHECKPOINT)
    split = config.read_data(root).test.to(device)
    batches = min(batches, len(split) // batch)
    if batches < 2:
        raise ValueError(
            f"batch: expected at most half of the {len(split)} test images, as a std needs two batches, got {batch}"
        )
    model = model.to(device)
    exact_model = copy.deepcopy(model).double()
    ways = precisions(device)
    errors: dict[str, list[float]] = {name: [] for name in ways}
    measured: dict[str, list[float]] = {name: [] for name in ways}
    true: list[float] = []
    for i, (x, y) in islice(enumerate(data.in_order(split, batch)), batches):
        seed = torch.tensor(i, device=device)
        points, alpha = functional.pack_points(x, None, config.eps, seed=seed)
        rounded, _ = functional.pack_points(x, None, config.eps, seed=seed, dtype=torch.bfloat16)
        # The exact residual belongs to points that nothing has rounded.
        with torch.no_grad():
            exact = _residuals(exact_model(points.double()), y, alpha)
        for name, around in ways.items():
            with torch.no_grad(), around():
                logits = model(rounded if name.endswith("points") else points)
            found = _residuals(logits.double(), y, alpha)
            errors[name].append((found - exact).square().mean().item())
            measured[name].append(found.square().mean().item())
        true.append(exact.square().mean().item())
    return [
        {
            "run": f"{config.method}, eps {255 * config.eps:.3g}/255, seed {config.seed}",
            "data": config.data,
            "model": f"{config.model}, width {config.width}",
            "precision": name,
            "batches": batches,
            "samples": batch * batches,
            "e_lin": statistics.mean(true),
            "measured": statistics.mean(measured[name]),
            "floor": statistics.mean(errors[name]),
            "unseen_below": SENSITIVITY * statistics.pstdev(measured[name]),
            "floor_unseen_below": SENSITIVITY * statistics.pstdev(errors[name]),
        }
        for name in errors
    ]


def _residuals(logits: Tensor, y: Tensor, alpha: Tensor) -> Tensor:
    """r of each sample, in the logits' precision: here float64."""
    l_a, l_b, l_c = F.cross_entropy(logits, y.repeat(3), reduction="none").chunk(3)
    return l_c - torch.lerp(l_a, l_b, alpha.to(logits.dtype))


def table(rows: list[dict[str, Any]]) -> str:
    """As text."""
    head = ("run", "precision", "true E_lin", "measured", "floor", "unseen below", "by the floor")
    groups: dict[str, list[tuple[str, ...]]] = {}
    for row in rows:
        numbers = (f"{row[key]:.1e}" for key in _COLUMNS)
        groups.setdefault(row["run"], []).append((row["run"], row["precision"], *numbers))
    return terminal("E_lin, and the noise of the forward pass in it", head, groups.values(), words=2)


def _parser() -> argparse.ArgumentParser:
    options_of = parser("benchmarks.studies.precision", __doc__)
    options_of.add_argument("--run", type=Path, action="append", required=True, help="a run's folder; may be repeated")
    options_of.add_argument("--root", type=Path, help="files of the data set; digits need none")
    options_of.add_argument("--out", type=Path, required=True, help="the JSON file")
    options_of.add_argument("--device", default="cpu")
    options_of.add_argument("--batches", type=int, default=7)
    options_of.add_argument("--batch", type=int, default=128)
    return options_of


if __name__ == "__main__":
    sys.exit(main())
