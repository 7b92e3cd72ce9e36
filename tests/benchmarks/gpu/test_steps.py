"""The step of the GPU report: a row that fails."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from benchmarks.gpu import steps
from benchmarks.gpu.gpu_report import _parser
from benchmarks.gpu.run import Run
from benchmarks.harness.device import Device
from benchmarks.step.compared import Step, nothing


def test_a_row_that_fails_takes_no_other_with_it(tmp_path, monkeypatch):
    def row(call: Callable[[], Tensor]) -> Callable[..., Step]:
        return lambda trainer: Step(call, nothing)

    def fails() -> Tensor:
        raise RuntimeError("this row alone")

    good = [steps.PASSES, steps.FGSM, steps.AUTHORS, "last"]
    rows = {name: row(lambda: torch.ones(())) for name in good}
    monkeypatch.setattr(steps, "ROWS", {"bad": row(fails), **rows})
    options = _parser().parse_args(["--dry-run", "--out", str(tmp_path)])
    run = Run(Device(dry=True), tmp_path / "part-steps.json", options)
    steps.part_steps(run)
    found = run.record["rows"]
    assert "this row alone" in found["bad"]["error"]
    assert "median_us" not in found["bad"]
    assert all(found[name]["median_us"] > 0 for name in good)
    assert all("error" not in found[name] for name in good)
