"""The ops on every backend that this machine can run, beside plain torch, torch.compile and the floor: one run.

    make bench
    make bench ARGS="-k matmul"
    make bench ARGS="--out benchmarks/results/bench_ops.json"

A pytest-benchmark suite: each side of a case is a benchmark. All sides of a case are timed in turns when the first of
them is asked for; pytest-benchmark is then given the samples. JSON with provenance goes to ``--out``, a plot beside it;
without ``--out`` to runs/bench_ops.json, which git ignores, so that committed results are replaced only when asked for.

A wrong result is a failed test; a case is timed once its results are right. A missed target is in the tables and no
failure.
"""

from __future__ import annotations

import gc
from collections.abc import Mapping
from typing import Any

import pytest
import torch

from benchmarks.harness.turns import DRY, Case, Pace, Replay, Samples, Side, interleave, threads
from benchmarks.ops import loss_cases, pack_cases
from benchmarks.ops.ops_tables import Report
from benchmarks.ops.sides import Setting, devices

CLOCK = Replay()


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    settings = [Setting(device, metafunc.config.getoption("dry_run")) for device in devices()]
    cases = [case for setting in settings for case in (*pack_cases.cases(setting), *loss_cases.cases(setting))]
    sides = [pytest.param(case, side, id=f"{case.name}-{side}") for case in cases for side in case.sides]
    metafunc.parametrize("case,side", sides)


class Measured:
    """Measures a case when the first of its sides is asked for."""

    def __init__(self, report: Report) -> None:
        self._report = report
        self._found: dict[str, dict[str, Samples]] = {}
        self._skipped: dict[str, dict[str, str]] = {}

    def samples(self, case: Case, side: str) -> Samples:
        """Those of one side; skips the test of a side that is left out."""
        if case.name not in self._found:
            self._found[case.name], self._skipped[case.name] = {}, {}
            try:
                self._measure(case)
            except Exception as error:
                self._report.problems.append(f"{case.name}: {type(error).__name__}: {str(error).splitlines()[0]}")
                raise
            finally:
                gc.collect()
        if side in self._skipped[case.name]:
            pytest.skip(self._skipped[case.name][side])
        if side not in self._found[case.name]:
            pytest.fail(f"{case.name}: not measured, see the first of its sides")
        return self._found[case.name][side]

    def _measure(self, case: Case) -> None:
        # Without what was compiled before, a code object's number of shapes does not reach its limit.
        torch._dynamo.reset()
        with threads(case.threads):
            sides: Mapping[str, Side | str] = case.prepare()
            present = {name: side for name, side in sides.items() if isinstance(side, Side)}
            self._skipped[case.name] = {name: side for name, side in sides.items() if isinstance(side, str)}
            self._found[case.name] = interleave(present, DRY if self._report.dry else Pace(), case.device)
        self._report.add(case, self._found[case.name], self._skipped[case.name])


@pytest.fixture(scope="session")
def measured(bench_report: Report) -> Measured:
    return Measured(bench_report)


# torch.compile warns of what it is about to change in itself.
@pytest.mark.filterwarnings("default")
@pytest.mark.benchmark(timer=CLOCK.read)
def test_time(case: Case, side: str, measured: Measured, benchmark: Any) -> None:
    samples = measured.samples(case, side)
    benchmark.group = case.name
    benchmark.extra_info["calls_per_sample"] = samples.calls
    CLOCK.play(benchmark, samples.seconds)
