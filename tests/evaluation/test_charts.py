"""Pictures in a page: PNG files without a library, and curves in their frame."""

import io
import re

import numpy as np
import pytest
import torch
from PIL import Image

from elle_fast.evaluation import charts
from tests.helpers import random


@pytest.mark.parametrize("channels", [1, 3])
def test_a_png_holds_the_pixels(channels):
    image = random(channels, 5, 7, seed=channels)
    found = np.asarray(Image.open(io.BytesIO(charts.png(image))))
    expected = (image * 255).round().byte().permute(1, 2, 0).squeeze(-1).numpy()
    assert np.array_equal(found, expected)
    outside = torch.tensor([[[-1.0, 0.5, 2.0]]])
    assert np.asarray(Image.open(io.BytesIO(charts.png(outside)))).tolist() == [[0, 128, 255]]


def test_what_is_a_picture():
    shapes = {(1, 4, 4): True, (3, 4, 4): True, (2, 4, 4): False, (9,): False, (4, 4): False, (3, 4, 4, 4): False}
    assert {shape: charts.is_picture(torch.zeros(shape)) for shape in shapes} == shapes


@pytest.mark.parametrize("radii", [[0.0], [0, 2, 4, 8, 32], [0.003, 0.1], [0, 255], [7.0, 3.0]])
def test_all_of_a_curve_is_within_its_frame(radii):
    drawn = charts.curve([(radius, 1 / (1 + radius)) for radius in radii], 20, radii[0], "radius, linf")
    numbers = [float(each) for each in re.findall(r' (?:x1|x2|cx|x)="([-\d.]+)"', drawn)]
    assert min(numbers) >= 0
    assert max(numbers) <= charts.WIDTH
    assert drawn.count("<circle") == len(radii)
    # Points are joined in the order of their radii.
    (line,) = re.findall(r'class="line" points="([^"]*)"', drawn)
    across = [float(pair.split(",")[0]) for pair in line.split()]
    assert across == sorted(across)


@pytest.mark.parametrize("most", [0.001, 0.03, 1, 3, 8, 32, 100, 255, 12_345])
def test_ticks_are_few_and_round(most):
    ticks = charts.ticks(most)
    assert 2 <= len(ticks) <= 8
    assert ticks[0] == 0
    assert ticks[-1] <= most
    assert all(len(f"{tick:g}") <= 6 for tick in ticks)
