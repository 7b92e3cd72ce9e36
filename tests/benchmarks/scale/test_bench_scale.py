"""bench_scale.py: points, slopes, where memory is full, and results in which a point is missing."""

from __future__ import annotations

import json
import math
from argparse import Namespace

import pytest
import torch

from benchmarks.scale import bench_scale, growth, points
from benchmarks.scale import worker as worker_program
from benchmarks.scale.points import METHODS, OPS, QUICK, QUICK_AXES, Point, along

OPTIONS = Namespace(device="cpu", threads=1, rounds=2, timeout=240.0)


def test_each_axis_changes_one_size_and_has_the_common_point():
    for common, axes in ((QUICK, QUICK_AXES), *zip(points.COMMON.values(), points.AXES.values(), strict=True)):
        for axis, values in along(common, axes).items():
            assert common in values.values()
            for value, point in values.items():
                assert getattr(point, axis) == value
                assert {name for name in vars(point) if getattr(point, name) != getattr(common, name)} <= {axis}


def test_the_slope_is_that_of_a_power_of_the_largest_sizes():
    assert growth.slope({2**k: 5.0 * 2 ** (1.5 * k) for k in range(3, 6)}) == pytest.approx(1.5)
    assert growth.slope({1: 99.0, 2: 1.0, 4: 2.0, 8: 4.0}) == pytest.approx(1.0)
    assert growth.slope({1: 3.0}) is None


def row(least, peak=None):
    return {"ms": {"least": least}} | ({} if peak is None else {"peak_bytes": peak})


def test_memory_is_full_where_its_line_says():
    batches = {str(size): {"fgsm": row(1, 100 + 10 * size), "elle-a": row(1, 100 + 40 * size)} for size in (4, 8, 16)}
    found = growth.breaking(batches, 4100)
    assert (found["at"]["fgsm"], found["at"]["elle-a"], found["first"]) == (400, 100, "elle-a")
    assert found["at"]["elle-a-checkpoint"] is None
    # The side counts squared; what does not grow breaks nowhere.
    sides = {str(side): {"fgsm": row(1, 5000 + side**2), "elle-a": row(1, 70)} for side in (128, 224)}
    found = growth.breaking(sides, 5000 + 1000**2)
    assert found == {"at": {**dict.fromkeys(METHODS), "fgsm": 1000}, "first": "fgsm"}


def test_shares_are_of_a_packed_step():
    assert growth.shares({"32": {"elle-a": row(200), "pack": row(1), "loss": row(3)}, "64": {}}) == {
        "32": {"pack": 0.005, "loss": 0.015}
    }


@pytest.mark.parametrize("what", ["times", "memory"])
def test_a_worker_measures_each_method(what, capsys):
    point = json.dumps({**vars(QUICK)})
    assert worker_program.main([point, f"--what={what}", "--rounds=2"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert set(found) == {*METHODS, *(OPS if what == "times" else ())}
    for value in found.values():
        if what == "memory":
            assert value is None or value > 0
        else:
            assert 0 < value["least"] <= value["q1"] <= value["median"] <= value["q3"]


def test_two_ranks_take_their_steps_together():
    found = bench_scale.worker(Point(**{**vars(QUICK), "ranks": 2}), "times", OPTIONS)
    assert set(found) == set(METHODS)
    assert all(math.isfinite(times["median"]) for times in found.values())


def test_a_process_that_fails_says_why():
    with pytest.raises(RuntimeError, match=r"batch=0 .*: memory: (RuntimeError|ValueError): "):
        bench_scale.worker(Point(**{**vars(QUICK), "batch": 0}), "memory", OPTIONS)


def test_one_that_takes_too_long_is_ended():
    with pytest.raises(RuntimeError, match=r"times took more than 0\.1 s"):
        bench_scale.worker(QUICK, "times", Namespace(**{**vars(OPTIONS), "timeout": 0.1}))


def pretended(point, what, options):
    """Times and memory that follow a law, and a point that does not fit."""
    if point.classes == 9:
        raise RuntimeError(f"{point.name()}: {what}: killed by signal 9: without a word")
    work = point.batch * point.side**2 * point.width * point.ranks
    names = (*METHODS, *(OPS if what == "times" and point.ranks == 1 else ()))
    if what == "memory":
        return dict.fromkeys(names, 100 * work)
    return {name: dict.fromkeys(("least", "q1", "median", "q3"), 0.01 * work) for name in names}


def test_a_run_keeps_what_it_has_when_a_point_fails(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(bench_scale, "worker", pretended)
    out = tmp_path / "scale.json"
    assert bench_scale.main(["--quick", "--memory", "1", "--out", str(out)]) == 1
    content = json.loads(out.read_text())
    assert list(content["failures"]) == ["batch=2 side=8 classes=9 width=16 ranks=1"]
    assert list(content["axes"]["classes"]) == ["3"]
    assert list(content["axes"]["batch"]) == ["2", "4"]
    for axis, slope in (("batch", 1.0), ("side", 2.0), ("width", 1.0), ("ranks", 1.0)):
        assert content["slopes"][axis]["elle-a"] == {"time": slope, "memory": slope}
    assert content["breaking"]["batch"]["at"]["fgsm"] == pytest.approx(2**30 / (100 * 64 * 16), rel=1e-3)
    assert content["note"] is not None
    assert content["command"].endswith(f"bench_scale --quick --memory=1.0 --out={out.name}")
    said = capsys.readouterr()
    assert "failed: batch=2 side=8 classes=9" in said.out
    assert "| elle-a | 1.00 / 1.00 | 2.00 / 2.00 |" in said.out
    assert out.with_suffix(".svg").read_bytes().startswith(b"<?xml")
    # Each point once, though the common one is on every axis.
    assert said.err.count("batch=2 side=8 classes=3 width=16 ranks=1") == 1


def test_a_device_that_is_not_there(capsys, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(SystemExit):
        bench_scale.main(["--device", "cuda"])
    assert "torch sees no CUDA device" in capsys.readouterr().err
