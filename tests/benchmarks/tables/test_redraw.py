"""The committed figures: each is listed, small, and drawn from its JSON file again to the same bytes."""

from __future__ import annotations

import matplotlib
import pytest

from benchmarks.tables.redraw import FIGURES, redraw
from benchmarks.tables.registry import RESULTS


def test_every_figure_is_listed_there_and_small():
    listed = [f"{name}.svg" for _, names in FIGURES.values() for name in names]
    assert sorted(listed) == sorted(path.name for path in RESULTS.glob("*.svg"))
    for name in listed:
        text = (RESULTS / name).read_text()
        assert len(text) < 300_000
        assert "<dc:date>" not in text


@pytest.mark.parametrize("name", ["bench_train.json", "cifar10-ablations.json"])
def test_a_figure_is_that_of_its_file(name, tmp_path):
    for path in redraw(name, tmp_path):
        committed = (RESULTS / path.name).read_text()
        if f"Matplotlib v{matplotlib.__version__}," not in committed:
            pytest.skip("drawn by another version of matplotlib")
        assert path.read_text() == committed, "run make figures"
    assert sorted(tmp_path.glob("*")) == sorted(tmp_path.glob("*.svg"))


def test_a_file_without_figures_is_named(tmp_path):
    with pytest.raises(ValueError, match=r"^file: expected one of 'bench_ops\.json', .*, got 'overhead\.json'$"):
        redraw("overhead.json", tmp_path)
