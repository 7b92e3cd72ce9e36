"""What pytest adds to benchmarks/ops/bench_ops.py: its options, its report, and the tables at the end."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from benchmarks.ops.ops_tables import Report, tables

ROOT = Path(__file__).resolve().parents[2]
_REPORT = pytest.StashKey[Report]()


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("bench_ops")
    group.addoption("--out", type=Path, default=ROOT / "runs" / "bench_ops.json", help="JSON file, a plot beside it")
    group.addoption("--dry-run", action="store_true", help="tiny sizes, each call once: measures nothing")


def pytest_configure(config: pytest.Config) -> None:
    arguments = [Path(each).name if Path(each).is_absolute() else each for each in config.invocation_params.args]
    config.stash[_REPORT] = Report(config.getoption("dry_run"), ["python", "-m", "pytest", *arguments])


@pytest.fixture(scope="session")
def bench_report(pytestconfig: pytest.Config) -> Report:
    return pytestconfig.stash[_REPORT]


@pytest.hookimpl(hookwrapper=True)
def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter, config: pytest.Config) -> Iterator[None]:
    # After pytest-benchmark's own tables.
    yield
    report = config.stash[_REPORT]
    if not report.cases and not report.problems:
        return
    out: Path = config.getoption("out")
    content = report.write(out)
    terminalreporter.write_line("")
    terminalreporter.write(tables(content))
    terminalreporter.write_line(f"written: {out}, {out.with_suffix('.png').name}")
