"""Accuracy as the radius grows."""

import pytest

from elle_fast.evaluation import Chunks, accuracy_curve, default_radii
from tests.evaluation.cases import Threshold, pixels

VALUES = [0, 100, 120, 130, 140, 255]


def test_each_radius_turns_the_samples_nearer_than_it(model):
    found = accuracy_curve(model, lambda: pixels(VALUES), [0, 5 / 255, 10 / 255, 0.6])
    assert (found["attack"], found["samples"]) == ("pgd-20", 6)
    # 130 is 2.5 from the boundary at 127.5, 120 is 7.5, and the ends are as far as the whole range.
    assert [point["accuracy"] for point in found["points"]] == pytest.approx([1, 5 / 6, 4 / 6, 0])
    assert [point["eps"] for point in found["points"]] == [0, 5 / 255, 10 / 255, 0.6]


def test_finished_radii_are_not_attacked_again(tmp_path):
    model = Threshold()
    path = tmp_path / "partial"
    advanced: list[int] = []
    first = accuracy_curve(model, lambda: pixels(VALUES), [0, 0.1], chunks=Chunks(path, {}), advance=advanced.append)
    assert advanced == [6, 6]
    chunks, passes = Chunks(path, {}), []
    model.register_forward_pre_hook(lambda module, args: passes.append(1))
    assert accuracy_curve(model, lambda: pixels(VALUES), [0, 0.1], chunks=chunks) == first
    assert passes == []


def test_the_default_radii_reach_from_0_to_four_times_eps():
    assert [round(255 * eps, 6) for eps in default_radii(8 / 255)] == [0, 2, 4, 6, 8, 12, 16, 32]
    assert default_radii(0.5)[-1] == 1  # pixels are in [0, 1]
    assert default_radii(0.5, "l2")[-1] == 2
    assert len(default_radii(0)) == 8


@pytest.mark.parametrize(
    "batches, radii, error, message",
    [
        ([], [0.1], TypeError, "batches: expected a function that gives batches, got"),
        (lambda: [], [], ValueError, "radii: expected at least one, got none"),
        (lambda: [], [0.1, 8], ValueError, r"eps: expected a radius in \[0, 1\], where pixels are, got 8"),
        (lambda: [], [0.1], ValueError, "batches: expected at least one, got none"),
    ],
)
def test_bad_radii_and_batches(batches, radii, error, message, model):
    with pytest.raises(error, match=message):
        accuracy_curve(model, batches, radii)
