"""The evaluation of a checkpoint: its file, what it goes on from, and the data it refuses."""

import csv
import importlib.util
import io
import json
import re
from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image
from rich.console import Console
from rich.progress import Progress
from torch import nn

from elle_fast import data
from elle_fast.data import Split
from elle_fast.evaluation import Chunks, masking, points
from elle_fast.recipes import checkpoint
from elle_fast.recipes import evaluate as report
from elle_fast.recipes.config import TrainConfig
from elle_fast.recipes.eval_options import EvalOptions
from elle_fast.recipes.evaluate import evaluate_checkpoint
from elle_fast.recipes.train import CHECKPOINT, train

needs_autoattack = pytest.mark.skipif(importlib.util.find_spec("pyautoattack") is None, reason="needs pyautoattack")
CONFIG = TrainConfig(
    width=2, eps=0.1, epochs=1, batch_size=32, limit=72, validation=8, test_limit=40, method="fgsm", device="cpu"
)


def quiet():
    return Console(file=io.StringIO())


@pytest.fixture(scope="module")
def digits():
    return data.load("digits", limit=CONFIG.limit, test_limit=CONFIG.test_limit)


@pytest.fixture(scope="module")
def path(tmp_path_factory, digits):
    folder = tmp_path_factory.mktemp("run")
    train(replace(CONFIG, eval_attacks="clean"), folder, dataset=digits, console=quiet())
    return folder / CHECKPOINT


def evaluated(path, attacks, *, dataset=None, **options):
    return evaluate_checkpoint(EvalOptions(path, attacks, **options), dataset=dataset, console=quiet())


def run(path, json_path, **options):
    return evaluated(path, "clean,pgd-2,noise-2", batch_size=16, samples=40, json=json_path, **options)


def test_the_file_holds_the_settings_and_what_was_found(path, tmp_path):
    found = run(path, tmp_path / "a.json", seed=3)
    assert json.loads((tmp_path / "a.json").read_text()) == found
    assert (found["eps"], found["seed"], found["batch_size"], found["device"]) == (0.1, 3, 16, "cpu")
    assert found["method"] == "fgsm"
    assert found["data"] == {"name": "digits", "digest": checkpoint.load(path)["data"]}
    assert re.fullmatch("[0-9a-f]{32}", found["checkpoint_digest"])
    assert list(found["accuracy"]) == found["worst_case"]["attacks"] == ["clean", "pgd-2", "noise-2"]
    assert found["worst_case"]["accuracy"] <= min(each["accuracy"] for each in found["accuracy"].values())
    assert found["packages"] == {}
    assert {"machine", "versions", "commit", "command"} <= found.keys()
    assert [each.name for each in tmp_path.iterdir()] == ["a.json"]


@pytest.mark.parametrize("calls", [1, 5, 9])
def test_killed_and_resumed_is_the_same_file(calls, path, digits, tmp_path, monkeypatch):
    file = tmp_path / "a.json"
    run(path, file)
    whole = file.read_bytes()
    file.unlink()
    original, saved = Chunks.save, []

    def save(chunks):
        original(chunks)
        saved.append(1)
        if len(saved) == calls:
            raise KeyboardInterrupt

    monkeypatch.setattr(Chunks, "save", save)
    with pytest.raises(KeyboardInterrupt):
        run(path, file)
    assert [each.name for each in tmp_path.iterdir()] == ["a.json.partial"]
    run(path, file, dataset=digits)
    assert file.read_bytes() == whole
    assert len(saved) == 9
    assert [each.name for each in tmp_path.iterdir()] == ["a.json"]


def test_weights_that_went_on_training_reuse_nothing(path, digits, tmp_path, monkeypatch):
    def stop(name, *arguments):
        raise RuntimeError(name)

    with monkeypatch.context() as context:
        context.setitem(points.OWN, "noise", stop)
        with pytest.raises(RuntimeError):
            run(path, tmp_path / "a.json")
    before = (tmp_path / "a.json.partial").read_text()
    saved = checkpoint.load(path)
    bias = list(saved["model"])[-1]
    saved["model"][bias][3] = 1e3  # a model that always says 3
    checkpoint.save(tmp_path / "other.pt", saved)
    found = run(tmp_path / "other.pt", tmp_path / "a.json")
    threes = (digits.test.labels == 3).double().mean().item()
    assert [each["accuracy"] for each in found["accuracy"].values()] == [threes] * 3
    # What the first one did is still there, for it.
    assert (tmp_path / "a.json.partial").read_text() == before


def other_labels(dataset):
    labels = dataset.test.labels.clone()
    labels[0] = (labels[0] + 1) % 10
    return replace(dataset, test=Split(dataset.test.images, labels))


def other_pixels(dataset):
    images = dataset.train.images.clone()
    images[0] = 255 - images[0]
    return replace(dataset, train=Split(images, dataset.train.labels))


def other_shape(dataset):
    halves = [Split(split.images[..., :4].contiguous(), split.labels) for split in (dataset.train, dataset.test)]
    return replace(dataset, train=halves[0], test=halves[1])


@pytest.mark.parametrize(
    "change, message",
    [
        (lambda dataset: replace(dataset, name="mnist"), r"expected the name .*, digits, got mnist"),
        (other_shape, r"expected the input shape .*, \[1, 8, 8\], got \[1, 8, 4\]"),
        (
            lambda dataset: replace(dataset, classes=dataset.classes[:9]),
            r"expected the number of classes .*, 10, got 9",
        ),
        (other_pixels, r"expected those of the training of .*checkpoint\.pt', digest \w+, got others, digest"),
        (other_labels, r"expected those of the training of .* got others"),
        (
            lambda dataset: replace(dataset, classes=(*dataset.classes[:9], "ten")),
            r"expected those of the training of .* got others",
        ),
    ],
)
def test_data_of_another_training_are_refused(change, message, path, digits, tmp_path):
    with pytest.raises(ValueError, match="data: " + message):
        run(path, tmp_path / "a.json", dataset=change(digits))
    assert list(tmp_path.iterdir()) == []


def test_more_samples_than_there_are_are_refused(path, digits):
    with pytest.raises(ValueError, match=rf"samples: expected an integer >= 1 and <= {len(digits.test)}, got 10000"):
        evaluated(path, "clean", samples=10_000, dataset=digits)


def test_a_folder_in_place_of_the_file_is_refused_before_the_work(tmp_path):
    with pytest.raises(IsADirectoryError, match="json: expected a file to write to, got the folder"):
        run(tmp_path / "none.pt", tmp_path)


@needs_autoattack
@pytest.mark.parametrize(
    "attacks, asked, made",
    [("clean", None, False), ("clean,autoattack", None, True), ("autoattack", False, False), ("clean", True, True)],
)
def test_the_masking_check_is_made_beside_autoattack_or_if_asked_for(attacks, asked, made, path, monkeypatch):
    monkeypatch.setitem(points.FOREIGN, "autoattack", lambda model, x, y, ball, attack, seed: x)
    given = []

    def check(model, batches, **options):
        given.append(options["autoattack"])
        return {"verdict": "ok"}

    monkeypatch.setattr(masking, "masking_check", check)
    found = evaluated(path, attacks, samples=4, masking_check=asked)
    assert ("masking" in found) == made == len(given)
    if made:
        assert (given[0] is None) == ("autoattack" not in attacks)
    assert ("pyautoattack" in found["packages"]) == (made or "autoattack" in attacks)


@needs_autoattack
def test_the_masking_check_gets_fixed_samples_and_what_autoattack_did_to_them(path, digits, tmp_path, monkeypatch):
    monkeypatch.setitem(points.FOREIGN, "autoattack", lambda model, x, y, ball, attack, seed: x)
    monkeypatch.setattr(masking, "SAMPLES", 20)
    given = []

    def check(model, batches, **options):
        given.extend([list(batches), options["autoattack"]])
        return {"verdict": "ok"}

    monkeypatch.setattr(masking, "masking_check", check)
    saved = checkpoint.load(path)
    saved["model"][list(saved["model"])[-1]][3] = 1e3  # a model that always says 3
    checkpoint.save(tmp_path / "three.pt", saved)
    evaluated(tmp_path / "three.pt", "autoattack", batch_size=16, dataset=digits)
    batches, autoattack = given
    x, y = (torch.cat(each) for each in zip(*batches, strict=True))
    assert [len(labels) for _, labels in batches] == [16, 4]
    assert torch.equal(x, digits.test.subset(20).images / 255)
    assert (y == 3).any()
    assert torch.equal(autoattack, y == 3)


@needs_autoattack
def test_the_masking_check_shares_the_chunks_of_the_same_samples(path, tmp_path):
    advanced = []

    class Bar(Progress):
        def advance(self, task_id, advance=1):
            advanced.append(advance)

    file = tmp_path / "a.json"
    with pytest.MonkeyPatch.context() as context:
        context.setattr(report, "Progress", Bar)
        context.setattr(masking, "ATTACKS", ("pgd-20", "pgd-200", "square-5", "noise-2"))
        context.setattr(Chunks, "forget", Chunks.save)
        found = evaluated(path, "pgd-20", samples=8, masking_check=True, json=file)
    assert advanced == [8] * 5  # the bar's total
    entries = json.loads((tmp_path / "a.json.partial").read_text())["entries"]
    assert [entry["settings"]["attack"] for entry in entries] == ["pgd-20", "pgd-200", "square-5", "noise-2"]
    assert found["masking"]["white_box"] == {"attack": "pgd-20", "accuracy": found["accuracy"]["pgd-20"]["accuracy"]}
    assert list(found["masking"]["attacks"]) == ["pgd-200", "square-5", "noise-2"]


class Levels(nn.Module):
    """Right for grey pictures of the levels 40, 120 and 200; under a small eps, too."""

    def __init__(self):
        super().__init__()
        self.levels = nn.Parameter(torch.tensor([40.0, 120.0, 200.0]) / 255)

    def forward(self, x):
        return -((x.mean((1, 2, 3))[:, None] - self.levels) ** 2)


@pytest.fixture
def broken(tmp_path):
    """Grey pictures, five of each class; among those of the test is one that is wrong, and two that are no pictures."""
    root = tmp_path / "pictures"
    for split in ("train", "test"):
        for label, name in enumerate("abc"):
            (root / split / name).mkdir(parents=True)
            for k in range(5):
                level = 200 if (split, name, k) == ("test", "a", 1) else 40 + 80 * label
                picture = Image.fromarray(np.full((8, 8, 3), level, dtype=np.uint8))
                picture.save(root / split / name / f"{k}.png")
    for name in ("a/0.png", "a/4.png"):
        (root / "test" / name).write_bytes(b"broken")
    return root


def of_levels(root, folder, console, **options):
    options |= {"model": f"{__name__}:Levels", "data": "image-folder", "root": str(root), "normalize": False}
    options |= {"eps": 1 / 255, "attacks": "clean,pgd-1", "image_size": 8, "workers": 0, "device": "cpu"}
    files = {"per_sample": folder / "a.csv", "report": folder / "a.html"}
    return evaluate_checkpoint(EvalOptions(**options, **files, eps_curve="0"), console=console)


@pytest.mark.filterwarnings("ignore:skipped a picture that cannot be read")
@pytest.mark.parametrize("stream", ["always", "never"])
def test_pictures_that_cannot_be_read_are_in_none_of_the_numbers(stream, broken, tmp_path):
    printed = io.StringIO()
    console = Console(file=printed, width=1000)
    found = of_levels(broken, tmp_path, console, stream=stream, skip_corrupt=2)
    for name in ("clean", "pgd-1"):
        assert (found["accuracy"][name]["samples"], found["accuracy"][name]["accuracy"]) == (13, 12 / 13)
    assert found["by_class"][0] == {"class": "a", "samples": 3, "clean": 2 / 3, "worst_case": 2 / 3}
    assert [row["samples"] for row in found["by_class"]] == [3, 5, 5]
    assert (found["curve"]["samples"], found["test_images"]) == (13, 15)
    assert [re.sub(r".*test/?", "", name) for name in found["unreadable"]] == ["a/0.png", "a/4.png"]
    assert all("a/" in reason for reason in found["unreadable"].values())
    said = "2 of 15 test pictures cannot be read; none of the numbers counts them"
    assert found["warnings"] == [said]
    assert f"warning: {said}" in printed.getvalue()
    assert said in (tmp_path / "a.html").read_text()
    assert printed.getvalue().count("skipped a picture") == (2 if stream == "always" else 0)
    with (tmp_path / "a.csv").open(newline="") as file:
        rows = list(csv.reader(file))[1:]
    labels = [0] * 5 + [1] * 5 + [2] * 5
    expected = [
        [place, labels[place], 2 if place == 1 else labels[place], *[int(place != 1)] * 2] for place in range(15)
    ]
    assert rows == [[str(value) for value in expected[place]] for place in range(15) if place not in (0, 4)]


@pytest.mark.filterwarnings("ignore:skipped a picture that cannot be read")
@pytest.mark.parametrize("stream", ["always", "never"])
def test_of_a_choice_of_pictures_only_those_are_left_out_that_are_in_it(stream, broken, tmp_path):
    chosen = data.choose(15, 9).tolist()
    left = [place for place in chosen if place not in (0, 4)]
    found = of_levels(broken, tmp_path, quiet(), stream=stream, skip_corrupt=2, samples=9)
    assert 0 < len(found.get("unreadable", {})) == 9 - len(left)
    assert found["accuracy"]["clean"]["samples"] == len(left)
    with (tmp_path / "a.csv").open(newline="") as file:
        assert [int(row["index"]) for row in csv.DictReader(file)] == left
    # The examples of the page have the numbers of the table.
    numbers = [int(number) for number in re.findall(r"<h3>image (\d+), ", (tmp_path / "a.html").read_text())]
    assert len(numbers) == 4
    assert set(numbers) <= set(left)


def test_one_unreadable_picture_too_many_and_none_that_can_be_read(broken, tmp_path):
    with pytest.raises(ValueError, match="2 pictures cannot be read, more than skip_corrupt 1"):
        of_levels(broken, tmp_path, quiet(), stream="always", skip_corrupt=1)
    for file in broken.glob("test/*/*.png"):
        file.write_bytes(b"broken")
    with pytest.raises(ValueError, match="expected a picture that can be read, got none"):
        of_levels(broken, tmp_path, quiet(), stream="always", skip_corrupt=15)


def test_examples_have_the_numbers_of_the_data_set(path, digits, tmp_path):
    kept = data.choose(40, 6)
    evaluated(path, "clean,fgsm", samples=6, dataset=digits, report=tmp_path / "a.html", eps_curve="0")
    shown = re.findall(r"<h3>image (\d+), class <bdi>(\d)</bdi>", (tmp_path / "a.html").read_text())
    assert len(shown) == 4
    assert {int(number) for number, _ in shown} <= set(kept.tolist())
    assert [digits.test.labels[int(number)].item() for number, _ in shown] == [int(label) for _, label in shown]
