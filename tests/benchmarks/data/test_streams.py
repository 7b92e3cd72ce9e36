"""The measurement of streams, at a tiny size."""

import json

import pytest

from benchmarks.data import streams


@pytest.fixture(autouse=True)
def small(monkeypatch):
    monkeypatch.setattr(streams, "jpeg", lambda seed: small_jpeg(seed, 60, 40, 2))


small_jpeg = streams.jpeg


def test_a_picture_has_the_size_that_is_asked_for():
    assert len(small_jpeg(0, 250, 190, 25)) == pytest.approx(25_000, rel=0.1)


@pytest.mark.parametrize("kind,samples", [("image-folder", 40), ("webdataset", 2000)])
def test_a_stand_in_of_links_is_read_as_that_many_samples(kind, samples, tmp_path, monkeypatch):
    monkeypatch.setattr(streams, "_MOST_LINKS", 15)
    root = streams.stand_in(tmp_path / kind, kind, samples)
    size = sum(file.stat().st_size for file in {file.stat().st_ino: file for file in root.rglob("*")}.values())
    assert size < 5_000_000
    assert len(streams.streamed(root, workers=0, kind=kind)) == samples
    assert streams.stand_in(root, kind, samples) == root  # as it is there


def test_the_loaders_part_of_the_decoders_rate_is_written(tmp_path, capsys):
    out = tmp_path / "streams.json"
    given = ["--work", str(tmp_path), "--out", str(out), "--only", "loader", "--pictures", "4", "--repetitions", "1"]
    assert streams.main(given) == 0
    found = json.loads(out.read_text())["loader"]
    times = found["milliseconds"]
    assert found["part of the decoder's rate"] == times["decoder alone"] / times["worker"]
    assert found["worker cores for a rate of pictures"]["1000"] == pytest.approx(times["worker"])
    assert {"commit", "command", "load"} <= found.keys()
    assert json.loads(capsys.readouterr().out)["loader"]["milliseconds"] == times
