"""The stage of gpu_report.py that times a training step: captured, in bfloat16, beside FGSM's and the ELLE authors'."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch

from benchmarks.gpu.run import Run, recorded
from benchmarks.harness.tables import rounded
from benchmarks.harness.timing import Samples
from benchmarks.step.authors import AuthorsList, AuthorsStep
from benchmarks.step.compared import (
    AUTHORS_HISTORY,
    EPS,
    LAM,
    METHODS,
    Setting,
    Step,
    Trainer,
    elle_a,
    nothing,
)
from elle_fast import capture, methods
from elle_fast._core.devices import fastest_convolutions
from elle_fast.presets import FAST

# The sum of ELLE-A's model passes, FGSM's step, and the authors'.
PASSES, FGSM, AUTHORS = "model passes of elle-a", "fgsm", "authors, fp32"


@fastest_convolutions()
def part_steps(run: Run) -> None:
    """A captured step of PreActResNet18 in bfloat16 beside FGSM's, its own model passes, and the ELLE authors' step."""
    dry, device = run.device.dry, run.device.device
    model: dict[str, Any] = {"model": "preact", "width": 2, "batch": 4} if dry else FULL
    ours = Trainer(Setting(**model, dtype="bf16", device=device, channels_last=True))
    theirs = Trainer(Setting(**model, dtype="bf16", device=device, channels_last=False))
    rows: dict[str, dict[str, Any]] = {}
    run.record.update(**model, dtype="bf16", rows=rows)
    steps: dict[str, Step] = {}
    for name, make in ROWS.items():
        rows[name] = {}
        with recorded(rows[name]):
            made = make(theirs if name.startswith("authors") else ours)
            # Twice: a light step may need the lam of the step before it.
            losses = [float(made.call()) for _ in range(2)]
            assert torch.tensor(losses).isfinite().all(), f"expected finite losses, got {losses}"
            rows[name].update(launches=run.device.launches(made.call), waits=run.device.waits(made.call))
            steps[name] = made  # one that fails is not timed beside the others
        run.save()
    found: dict[str, Samples] = {}
    with recorded(run.record):
        found = run.device.events({name: step.call for name, step in steps.items()})
    for name, step in steps.items() if found else ():
        with recorded(rows[name]):
            rate = rounded(model["batch"] / found[name].median)
            rows[name].update(found[name].microseconds(), images_per_second=rate)
            step.check()
    for name, base in (("passes", PASSES), ("fgsm", FGSM), ("authors", AUTHORS)):
        for row in rows.values():
            if "median_us" in row and "median_us" in rows[base]:
                row[f"of_{name}"] = rounded(row["median_us"] / rows[base]["median_us"])


def _fgsm(trainer: Trainer) -> Step:
    """FGSM's step as a CUDA graph."""
    criterion = methods.build("fgsm", eps=EPS, bounds=(0.0, 1.0), clamp=methods.find("fgsm").clamp)
    step = capture(criterion, trainer.model, trainer.fused(), trainer.x, trainer.y, autocast=trainer.autocast_dtype)
    return Step(partial(step, trainer.x, trainer.y), nothing)


def _authors(trainer: Trainer, autocast: torch.dtype | None = None) -> Step:
    step = AuthorsStep(trainer.model, trainer.optimizer, eps=EPS, lam=LAM, autocast=autocast)
    step.loss.rule = AuthorsList(LAM, AUTHORS_HISTORY)
    return Step(partial(step, trainer.x, trainer.y), nothing)


FULL = {"model": "preactresnet18", "width": None, "batch": 128}
ROWS: dict[str, Callable[[Trainer], Step]] = {
    PASSES: METHODS["passes-captured"].make,
    FGSM: _fgsm,
    "elle-a": METHODS["elle-a-captured"].make,
    "elle-a fast, full step": METHODS["elle-a-fast-full-captured"].make,
    "elle-a fast, light step": METHODS["elle-a-fast-light-captured"].make,
    "elle-a fast, full step, fp32 triplets": elle_a(captured=True, triplet_precision="fp32", **FAST),
    "fgsm, eager": METHODS["fgsm"].make,
    # fp32 as torch has it by default: convolutions round their inputs to tf32.
    AUTHORS: _authors,
    "authors, bf16": partial(_authors, autocast=torch.bfloat16),
}
