"""The recipe imagenet on a stand-in of ImageNet's form: its phases, by two processes, and the odd kinds of pictures."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from elle_fast import data
from elle_fast.recipes import cli
from tests.data import imagenet_stand_in
from tests.optional import import_torchvision

# Two steps each: 16 images to train on, and 2 held out. Width 2 is not for this network: oneDNN's backward pass of a
# 1x1 convolution of so few channels reads beyond its memory (torch 2.13 on AVX-512).
PHASES = "1:128:8,1:224:6,1:288:6"
OPTIONS = ["--recipe", "imagenet", "--data", "image-folder", "--method", "n-fgsm+elle-a", "--eps", "4/255"]
SMALL = ["--phases", PHASES, "--knots", "0:0,1:1,3:0", "--width", "16", "--limit", "18", "--test-limit", "2"]
SMALL += ["--validation", "2", "--workers", "0", "--device", "cpu", "--eval-attacks", "clean", "--log-every", "1"]
CHILD = """
import os
import sys
from tests.optional import import_torchvision
import_torchvision()
import torch
from elle_fast.recipes import cli
from elle_fast.recipes.run import Run
seen, original = [], Run.upcoming
def upcoming(run, steps):
    for x, y in original(run, steps):
        history = run.criterion.state_dict()["controller.count"].item()
        seen.append((list(x.shape), x.min().item(), x.max().item(), history))
        yield x, y
Run.upcoming = upcoming
status = cli.main(sys.argv[2:])
torch.save(seen, sys.argv[1] + os.environ["RANK"])
sys.exit(status)
"""


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return imagenet_stand_in.write(tmp_path_factory.mktemp("imagenet"))


@pytest.fixture(autouse=True, scope="module")
def torchvision() -> None:
    import_torchvision()


@pytest.mark.long
def test_two_processes_take_two_steps_of_each_phase(root, tmp_path):
    (tmp_path / "child.py").write_text(CHILD)
    words = ["-m", "torch.distributed.run", "--nproc_per_node", "2", "--master_port", "0", "--standalone"]
    given = ["train", *OPTIONS, *SMALL, "--root", str(root), "--out", str(tmp_path / "run")]
    command = [sys.executable, *words, str(tmp_path / "child.py"), str(tmp_path / "seen"), *given]
    env = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, check=False, timeout=300, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    shapes = [[4, 3, 128, 128]] * 2 + [[3, 3, 224, 224]] * 2 + [[3, 3, 288, 288]] * 2
    for rank in (0, 1):
        seen = torch.load(tmp_path / f"seen{rank}")
        assert [shape for shape, *_ in seen] == shapes
        assert all(0 <= low < high <= 1 for _, low, high, _ in seen)
        # How many E_lin the history holds before each step: it begins anew with a phase.
        assert [count for *_, count in seen] == [0, 1, 2, 1, 2, 1]
    result = json.loads((tmp_path / "run/result.json").read_text())
    assert result["processes"] == 2
    assert result["config"]["lam"] == 20_000
    assert result["epochs"] == 3
    assert result["accuracy"]["clean"]["samples"] == 2


def test_odd_kinds_are_read_upright_and_in_colour(root):
    dataset = data.load("image-folder", root, image_size=64, stream="always", workers=0)
    assert len(dataset.classes) == imagenet_stand_in.CLASSES
    assert (len(dataset.train), len(dataset.test)) == (100, 100)
    (x, y), *_ = data.in_order(dataset.train, 100)
    assert x.shape == (100, 3, 64, 64)
    assert y.tolist() == list(range(100))
    for label, kind in ((4, "grey"), (8, "CMYK"), (12, "16 bits"), (16, "rotated"), (1, "RGB")):
        expected = imagenet_stand_in.picture(label)
        if kind == "rotated":
            expected = expected.rotate(-90, expand=True)
        expected = expected.convert("L").convert("RGB") if kind in ("grey", "16 bits") else expected
        side = min(expected.size)
        left, top = (expected.width - side) // 2, (expected.height - side) // 2
        square = expected.crop((left, top, left + side, top + side)).resize((64, 64), Image.Resampling.BILINEAR)
        difference = np.abs(np.asarray(square).transpose(2, 0, 1) / 255.0 - x[label].numpy())
        # JPEG, other resampling, and CMYK's round trip; a picture that is not turned differs by 0.2 or more.
        assert difference.mean() < 0.04, kind


def test_data_in_memory_are_refused(capsys, tmp_path):
    given = ["--data", "digits", "--method", "elle-a", "--device", "cpu", "--out", str(tmp_path / "run")]
    assert cli.main(["train", "--recipe", "imagenet", *given]) == 2
    said = capsys.readouterr().err
    assert said.count("\n") == 1
    assert "crop: only image-folder, webdataset" in said
