"""What is read off pytest's output."""

from __future__ import annotations

import pytest

from benchmarks.gpu.first_tests import failures, outcomes


@pytest.mark.parametrize(
    "output",
    [
        "tests/a.py::x PASSED   [ 10%]\ntests/a.py::y[a b-c] FAILED [ 20%]\ntests/a.py::z SKIPPED (no GPU) [ 30%]",
        "[gw0] [ 1%] PASSED tests/a.py::x\n[gw11] [ 2%] FAILED tests/a.py::y[a b-c] \n[gw0] [ 3%] SKIPPED t/a.py::z ",
    ],
    ids=["one process", "several"],
)
def test_outcomes_are_counted_also_in_a_log_that_was_cut_off(output):
    summary = "\nFAILED tests/a.py::y[a b-c] - assert 1 == 2\nSKIPPED [3] tests/a.py:4: no GPU\n"
    for text in (output, output + summary):
        assert outcomes(text) == {"passed": 1, "failed": 1, "skipped": 1}
    assert failures(output) == ["FAILED tests/a.py::y[a b-c]"]
    assert failures(output + summary) == ["FAILED tests/a.py::y[a b-c] - assert 1 == 2"]
