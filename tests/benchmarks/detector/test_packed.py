"""benchmarks/detector/packed.py: the round trip, and its error."""

from __future__ import annotations

import math

import numpy as np
import pytest

from benchmarks.detector import packed
from benchmarks.detector.packed import STEPS, Recorded, decode, encode, pack, read, unpack
from benchmarks.detector.recorder import COLUMNS

ROUNDED = {32: 2 ** (1 / 64), 128: 2 ** (1 / 256)}


def made(name, steps=500, seed=0, **columns):
    draws = np.random.default_rng(seed)
    found = {column: 10 ** draws.uniform(-12, 3, steps) for column in STEPS}
    found["falls"] = draws.integers(0, 129, steps) / 128
    at = np.arange(0, steps, 25)
    probes = np.stack([at, *(draws.integers(0, 257, len(at)) / 256 for _ in range(2))], axis=1)
    return Recorded(name, found | columns, probes, "stands", "abc")


def test_every_number_comes_back_within_the_bound(tmp_path):
    traces = [made("a-b-eps8-epochs2-seed0"), made("a-b-eps8-epochs2-seed1", steps=77, seed=1)]
    pack(traces, tmp_path / "all.npz")
    found = unpack(tmp_path / "all.npz")
    assert [*found] == [trace.name for trace in traces]
    for trace in traces:
        again = found[trace.name]
        assert (again.ended, again.commit, again.steps) == ("stands", "abc", trace.steps)
        np.testing.assert_array_equal(again.probes, trace.probes)
        for name, steps in STEPS.items():
            if steps is None:
                np.testing.assert_array_equal(again.columns[name], trace.columns[name])
                continue
            ratio = again.columns[name] / trace.columns[name]
            bound = ROUNDED[steps] * (1 + 1e-12)
            assert ratio.max() <= bound
            assert ratio.min() >= 1 / bound
            assert ratio.max() > 1 + 0.9 * (bound - 1), "the bound is that of the quantisation, not a loose one"


@pytest.mark.parametrize("steps", [32, 128])
def test_zeros_and_what_is_not_finite(steps):
    values = np.array([0.0, math.nan, 1.0, math.inf, -math.inf, 0.0, -0.25, float(np.float32(1e-45)), 3e38])
    found = decode(encode(values, steps), steps)
    assert found[[0, 2, 5, 6]].tolist() == [0, 1, 0, 0]
    assert np.isnan(found[[1, 3, 4]]).all()
    # The ends of float32: none of them is cut off.
    np.testing.assert_allclose(found[7:], values[7:], rtol=ROUNDED[steps] - 1)


def test_a_share():
    values = np.array([0, 1, 0.5, 1 / 3, math.nan])
    found = decode(encode(values, None), None)
    assert found[:3].tolist() == [0, 1, 0.5]
    assert found[3] == pytest.approx(1 / 3, abs=2**-11)
    assert math.isnan(found[4])


def test_jumps_between_the_ends_of_the_codes_survive(tmp_path):
    values = np.array([0.0, math.nan] * 20)
    trace = made("x", steps=40, rise=values, falls=np.array([1.0, math.nan] * 20))
    pack([trace], tmp_path / "x.npz")
    found = unpack(tmp_path / "x.npz")["x"].columns
    np.testing.assert_array_equal(found["rise"], values)
    np.testing.assert_array_equal(found["falls"], trace.columns["falls"])


def raw(path, steps=30, batch_groups=8, columns=COLUMNS, **about):
    rows = np.random.default_rng(3).uniform(0.1, 1, (steps, len(COLUMNS))).astype(np.float32)
    rows[:, batch_groups:8] = np.nan
    probes = np.array([(0, 0.5, 0.25), (25, 0.5, 0.125)])
    np.savez(path, rows=rows, probes=probes, columns=np.array(columns), **about)
    return rows.astype(np.float64)


def test_the_first_samples_of_a_raw_trace(tmp_path):
    rows = raw(tmp_path / "cell.npz", ended="collapsed", commit="abc")
    trace = read(tmp_path / "cell.npz")
    assert (trace.name, trace.ended, trace.steps) == ("cell", "collapsed", 30)
    for count, groups in ((16, 1), (32, 2), (64, 4), (128, 8)):
        np.testing.assert_allclose(trace.columns[f"first_{count}"], rows[:, :groups].mean(1), rtol=1e-12)
    for name in ("own_pass", "r4", "rise", "falls", "lam"):
        np.testing.assert_array_equal(trace.columns[name], rows[:, COLUMNS.index(name)])


def test_a_batch_of_64_has_no_more_samples(tmp_path):
    rows = raw(tmp_path / "cell.npz", batch_groups=4)
    columns = read(tmp_path / "cell.npz").columns
    np.testing.assert_allclose(columns["first_128"], rows[:, :4].mean(1), rtol=1e-12)
    np.testing.assert_allclose(columns["first_32"], rows[:, :2].mean(1), rtol=1e-12)


def test_the_program_takes_finished_traces_alone(tmp_path, capsys):
    work, out = tmp_path / "work", tmp_path / "all.npz"
    work.mkdir()
    assert packed.main(["--work", str(work), "--out", str(out)]) == 1
    assert "no finished trace" in capsys.readouterr().err
    raw(work / "one.npz", ended="stands", commit="abc")
    (work / "two").mkdir()
    raw(work / "two" / "running.npz")
    assert packed.main(["--work", str(work), "--out", str(out)]) == 0
    assert [*unpack(out)] == ["one"]
    first = out.read_bytes()
    assert packed.main(["--work", str(work), "--out", str(out)]) == 0
    assert out.read_bytes() == first, "the same traces make the same file"
    assert packed.main(["--work", str(work), "--out", str(out), "--unfinished"]) == 0
    assert {name: trace.ended for name, trace in unpack(out).items()} == {"one": "stands", "two": "unfinished"}


def test_other_columns_are_refused(tmp_path):
    raw(tmp_path / "cell.npz", columns=[*COLUMNS[1:], "else"])
    with pytest.raises(ValueError, match=r"^cell.npz: expected the columns group_0, .*, got \['group_1'"):
        read(tmp_path / "cell.npz")
    np.savez(tmp_path / "all.npz", columns=np.array(["rise"]))
    with pytest.raises(ValueError, match=r"^all.npz: expected the columns own_pass, .*, got \['rise'\]"):
        unpack(tmp_path / "all.npz")


def test_foreign_files_are_refused(tmp_path):
    np.savez(tmp_path / "other.npz", weights=np.zeros(3))
    with pytest.raises(ValueError, match=r"^other.npz: expected the columns own_pass, .*, got the arrays weights$"):
        unpack(tmp_path / "other.npz")
    np.save(tmp_path / "array.npy", np.zeros((2, 3)))
    with pytest.raises(ValueError, match=r"^array.npy: .* got a single array \[2, 3\]$"):
        unpack(tmp_path / "array.npy")
    for content in (b"", b"text", b"PK\x03\x04 cut off"):
        (tmp_path / "cut.npz").write_bytes(content)
        with pytest.raises(ValueError, match=r"^cut.npz: expected the columns group_0, .* got no .npz of arrays: "):
            read(tmp_path / "cut.npz")
