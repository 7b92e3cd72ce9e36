"""When a model counts as robust, and when as collapsed."""

from __future__ import annotations

import pytest

from elle_fast._core.collapse import is_robust, least


@pytest.mark.parametrize("classes, chance", [(10, 0.1), (100, 0.01), (2, 0.5)])
def test_robust_is_above_one_and_a_half_times_chance(classes, chance):
    assert is_robust(1.6 * chance, classes)
    assert not is_robust(1.4 * chance, classes)


def test_half_of_the_best_has_to_be_lost():
    assert least(0.6, 10_000, 10) == 0.3
    assert least(0.16, 10_000, 10) == 0.08


def test_few_samples_have_to_lose_more():
    # Of 9 samples a half has a standard deviation of a sixth, so that three are all there is to lose.
    assert least(0.5, 9, 10) == pytest.approx(0.0)
    assert least(0.5, 16, 10) == pytest.approx(0.5 - 3 / 8)
    assert least(0.5, 4, 10) < 0
    # It is the half from n = 36 (1 - b) / b on, where 3 sqrt(b (1 - b) / n) = b / 2.
    assert least(0.2, 145, 10) == 0.1 > least(0.2, 143, 10)


def test_who_never_was_robust_has_nothing_to_lose():
    assert least(0.15, 10_000, 10) == 0.0
    assert least(0.0, 1, 10) == 0.0
