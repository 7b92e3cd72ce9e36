"""Models that seem to take normalized inputs, and models at chance."""

import math
import warnings

import pytest
import torch
from scipy import stats
from torch import Tensor, nn

from elle_fast.evaluation import check_inputs, evaluate
from elle_fast.evaluation.inputs import IMAGENET, SAMPLES, _tail
from tests.helpers import random

MEAN, STD = torch.tensor([0.6, 0.5, 0.4]), torch.tensor([0.2, 0.1, 0.3])


class Nearest(nn.Module):
    """The class whose pattern is nearest to the normalized picture: right at nothing but normalized pictures."""

    patterns: Tensor

    def __init__(self, classes=5, mean=MEAN, std=STD):
        super().__init__()
        patterns = random(classes, 3, 4, 4, seed=3) - 0.5
        self.register_buffer("patterns", (patterns - patterns.mean((2, 3), keepdim=True)).sign())
        self.mean, self.std = mean.view(3, 1, 1), std.view(3, 1, 1)
        self.passes = []

    def pictures(self, count):
        """Pixels in [0, 1] of each class in turn, which normalized are a pattern and noise."""
        y = torch.arange(count) % len(self.patterns)
        noise = 0.5 * (random(count, 3, 4, 4, seed=4) - 0.5)
        return ((self.patterns[y] + noise) * self.std + self.mean).clamp(0, 1), y

    def forward(self, x):
        self.passes.append(len(x))
        return (
            -(x.unsqueeze(1) - self.patterns).square().flatten(2).sum(2) - 30 * x.flatten(1).mean(1, keepdim=True).abs()
        )


class Biased(Nearest):
    """Far from normalized pictures one class wins."""

    def forward(self, x):
        logits = super().forward(x)
        return logits + 40 * x.flatten(1).mean(1, keepdim=True).abs() * torch.arange(len(self.patterns))


@pytest.mark.parametrize("statistics", [(MEAN, STD), tuple(torch.tensor(each) for each in IMAGENET)])
def test_a_model_of_normalized_inputs_is_found_and_what_it_needs(statistics):
    model = Biased(mean=statistics[0], std=statistics[1])
    x, y = model.pictures(300)
    with torch.no_grad():
        assert (model(x).argmax(1) == y).float().mean() < 0.3
        shape = (1, 3, 1, 1)
        assert (model((x - statistics[0].view(shape)) / statistics[1].view(shape)).argmax(1) == y).all()
    model.passes = []
    found = check_inputs(model, x, y)
    assert found is not None
    assert found.mean == pytest.approx(statistics[0].tolist(), abs=0.05)
    assert found.std == pytest.approx(statistics[1].tolist(), rel=0.3)
    assert "of 256 samples in [0, 1] are classified right, and 100.0% once they are normalized by mean" in found.message
    # One sample to count the classes, and three passes over 256.
    assert model.passes == [1, SAMPLES, SAMPLES, SAMPLES]


def test_with_the_normalization_in_front_nothing_is_amiss():
    class Inside(Biased):
        def forward(self, x):
            return super().forward((x - self.mean) / self.std)

    model = Inside()
    assert check_inputs(model, *model.pictures(100)) is None


def test_a_model_that_refuses_other_pixels_takes_no_normalized_ones():
    class Strict(Biased):
        def forward(self, x):
            if x.min() < 0 or x.max() > 1:
                raise ValueError("pixels: expected them in [0, 1]")
            return super().forward((x - self.mean) / self.std)

    model = Strict()
    assert check_inputs(model, *model.pictures(100)) is None
    assert evaluate(model, [model.pictures(100)], "clean", eps=0.01)["clean"]["accuracy"] == 1


def test_a_model_at_chance_is_suspicious_for_another_reason():
    class Constant(Nearest):
        def forward(self, x):
            return x.flatten(1) @ torch.zeros(48, 5) + torch.tensor([1.0, 0, 0, 0, 0])

    model = Constant()
    found = check_inputs(model, *model.pictures(100))
    assert found is not None
    assert found.mean is found.std is None
    assert found.message.startswith(
        "20.0% of 100 samples in [0, 1] are classified right, which is chance for 5 classes"
    )
    # Samples of one class cannot tell.
    x, y = model.pictures(100)
    assert check_inputs(model, x[y == 1], y[y == 1]) is None


def test_an_evaluation_in_memory_warns_once_and_finds_the_same():
    model = Biased()
    x, y = model.pictures(60)
    batches = [(x[:40], y[:40]), (x[40:], y[40:])]
    with pytest.warns(UserWarning, match="seems to take normalized inputs") as said:
        found = evaluate(model, batches, "clean,noise-1", eps=0.01)
    assert len(said) == 1
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert evaluate(model, iter(batches), "clean,noise-1", eps=0.01, check=False) == found
    with pytest.raises(TypeError, match="check: expected True or False, got 1"):
        evaluate(model, batches, "clean", eps=0.01, check=1)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    "x, advice",
    [
        (torch.tensor([[-1.5, 2.0]]), r"values from -1.5 to 2.0; they look normalized: undo it, x \* std \+ mean"),
        (torch.tensor([[0.0, 255.0]]), "values from 0.0 to 255.0; they look like bytes: divide them by 255"),
        (torch.tensor([[0.0, 300.0]]), "values from 0.0 to 300.0$"),
    ],
)
def test_inputs_outside_of_the_pixels_range_come_with_advice(x, advice):
    with pytest.raises(ValueError, match=advice):
        evaluate(nn.Linear(2, 2), [(x, torch.tensor([0]))], "clean", eps=0.1)


@pytest.mark.parametrize("least, trials, chance", [(0, 5, 0.2), (3, 5, 0.2), (200, 256, 0.5), (256, 256, 0.001)])
def test_tails_are_those_of_the_binomial_distribution(least, trials, chance):
    expected = stats.binom.sf(least - 1, trials, chance)
    assert math.isclose(_tail(least, trials, chance), expected, rel_tol=1e-9, abs_tol=1e-300)
