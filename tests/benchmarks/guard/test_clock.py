"""benchmarks/guard/clock.py: a dry run, and its numbers from times made up here."""

from __future__ import annotations

import json
from functools import partial

import pytest

from benchmarks.guard import clock
from elle_fast.guard import CollapseGuard
from elle_fast.recipes import guarding


def test_numbers_from_turns():
    alone, guarded = clock.Turns(), clock.Turns()
    for seconds in (0.4, 0.4, 0.4, 0.8):
        alone.add("", seconds)
    for kind, seconds in (("", 0.41), ("", 0.41), ("snapshot", 0.43), ("probe", 0.71)):
        guarded.add(kind, seconds)
    found = clock.summary(alone, guarded, every=4)
    assert found["step_ms"] == 125.0
    assert found["step_guarded_ms"] == 122.5
    assert found["added"] == pytest.approx(1.96 / 2.0 - 1)
    # The turn of 0.8 does not count: each is 0.4.
    assert found["added_typical"] == pytest.approx(1.96 / 1.6 - 1)
    assert (found["linearity_ms"], found["probe_ms"], found["snapshot_ms"]) == (10.0, 300.0, 20.0)
    row = dict(found, added_typical=0.03)
    assert clock.table({"fp32": row}).endswith("at most 3%: met |")
    assert clock.table({"fp32": dict(row, added_typical=0.0301)}).endswith("at most 3%: MISSED |")


def test_a_dry_run(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(guarding, "CollapseGuard", partial(CollapseGuard, probe_every=18, snapshot_every=60))
    out = tmp_path / "clock.json"
    assert clock.main(["--quick", "--cycles=5", "--precisions=fp32", f"--out={out}"]) == 0
    found = json.loads(out.read_text())
    assert found["note"].startswith("a dry run")
    # Turns of six steps: a probe every 18, and a snapshot in step 60.
    assert found["rows"]["fp32"]["turns"] == {"neither": 9, "probe": 5, "snapshot": 1}
    assert "| fp32 |" in capsys.readouterr().out
