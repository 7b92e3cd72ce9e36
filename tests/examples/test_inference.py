"""examples/inference.py on a tiny run."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import torch
from PIL import Image

import elle_fast
from elle_fast.recipes import cli

ROOT = Path(__file__).parents[2]
TINY = "train --model cnn --width 2 --eps 0.1 --epochs 1 --batch-size 32 --limit 80 --validation 16 --test-limit 16"


def test_the_example_classifies_pictures(tmp_path):
    run = tmp_path / "run"
    assert cli.main([*TINY.split(), "--eval-attacks", "clean", "--out", str(run)]) == 0
    pictures = np.random.default_rng(0).integers(0, 256, (2, 8, 8), dtype=np.uint8)
    paths = [str(tmp_path / f"{number}.png") for number in range(2)]
    for path, picture in zip(paths, pictures, strict=True):
        Image.fromarray(picture).save(path)
    done = subprocess.run(
        [sys.executable, "-W", "error", "examples/inference.py", str(run), *paths],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
    )
    assert (done.returncode, done.stderr) == (0, "")
    with torch.no_grad():
        expected = elle_fast.load(run)(torch.from_numpy(pictures[:, None] / np.float32(255))).softmax(dim=1)
    said = re.findall(r"(.*): class (\d+), probability (.*)%", done.stdout)
    assert [(path, int(found)) for path, found, _ in said] == list(
        zip(paths, expected.argmax(dim=1).tolist(), strict=True)
    )
    for (_, _, percent), row in zip(said, expected, strict=True):
        assert abs(float(percent) - 100 * float(row.max())) <= 0.05 + 1e-3  # printed to a tenth
