import json

import pytest

from benchmarks.step import kept_memory
from elle_fast._core.kept_memory import _VARIABLES


@pytest.fixture(autouse=True)
def _own_malloc(monkeypatch):
    for name in _VARIABLES:
        monkeypatch.delenv(name, raising=False)


def test_a_dry_run(tmp_path, capsys):
    out = tmp_path / "out.json"
    options = ["--quick", "--rounds", "2", "--steps", "3", "--cases", "fgsm fp32"]
    assert kept_memory.main([*options, "--out", str(out)]) == 0
    content = json.loads(out.read_text())
    assert "dry run" in content["note"]
    row = content["rows"]["fgsm fp32"]
    assert row["ratio"] == pytest.approx(row["given back"]["step_ms"] / row["kept"]["step_ms"], abs=1e-2)
    assert row["kept"]["step_ms"] > 0
    assert "| fgsm fp32 |" in capsys.readouterr().out


def test_a_process_that_ends_is_named(monkeypatch):
    monkeypatch.setenv("MALLOC_MMAP_MAX_", "0")  # so nothing is done there
    with pytest.raises(RuntimeError, match=r"^fgsm fp32, kept: expected a process that trains, got one that ended"):
        kept_memory.compared("fgsm fp32", 1, 1, quick=True)
