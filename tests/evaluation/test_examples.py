"""What attacks did to a few samples."""

import pytest
import torch

from elle_fast.evaluation import Outcome, attacked_examples, outcomes, pick, predictions
from tests.evaluation.cases import EPS, Linear, Threshold, around, pixels

ALL = {"pgd-1": Outcome(torch.tensor([[False, True, False, False, True, False]]), [])}
LABELS = torch.tensor([0, 1, 0, 2, 1, 1])


def test_samples_of_different_classes_that_fall_and_one_that_stands():
    # 1 stands, 0 and 3 fall and are of other classes; 2 is of a class that is there; 4 is wrong already.
    predicted = torch.tensor([0, 1, 0, 2, 0, 1])
    assert pick(LABELS, predicted, ALL, 3).tolist() == [0, 1, 3]
    assert pick(LABELS, predicted, ALL, 4).tolist() == [0, 1, 2, 3]
    assert pick(LABELS, predicted, ALL, 1).tolist() == [0]
    assert pick(LABELS, predicted, ALL, 100).tolist() == [0, 1, 2, 3, 4, 5]
    assert pick(LABELS[:1], predicted[:1] + 1, {"a": Outcome(torch.tensor([[False]]), [])}).tolist() == [0]


def test_the_points_are_in_the_ball_and_say_what_the_model_says_of_them():
    model = Linear(3, 9)
    x, y = around(model, n=40)
    attacks = "clean,fgsm,pgd-3-2,noise-2"
    found = attacked_examples(model, x, y, attacks, eps=EPS, seed=5, index=torch.arange(100, 140))
    assert [example.index for example in found] == list(range(100, 140))
    assert [example.label for example in found] == y.tolist()
    # In one batch the starts are those of an evaluation.
    expected = outcomes(model, [(x, y)], attacks, eps=EPS, seed=5)
    assert [example.clean.prediction for example in found] == predictions(model, [(x, y)]).tolist()
    for name in ("fgsm", "pgd-3-2", "noise-2"):
        stands = [example.attacked[name].prediction == example.label for example in found]
        assert stands == expected[name].robust[-1].tolist()
    turned = 0
    for example, picture in zip(found, x, strict=True):
        assert list(example.attacked) == ["fgsm", "pgd-3-2", "noise-2"]
        assert torch.equal(example.clean.x, picture)
        for seen in example.attacked.values():
            assert (seen.x - picture).abs().max() <= EPS + 1e-6
            with torch.no_grad():
                probabilities = model(seen.x[None])[0].softmax(0)
            assert seen.prediction == probabilities.argmax()
            assert seen.probability == pytest.approx(probabilities.max().item(), rel=1e-5)
            turned += seen.prediction != example.label
    assert 0 < turned < 3 * 40


def test_the_model_is_left_as_it_was_and_bad_labels_are_refused(model):
    ((x, y),) = pixels([0, 255])
    attacked_examples(model, x, y, "fgsm", eps=0.1)
    assert model.training
    assert model.scale.requires_grad
    with pytest.raises(ValueError, match="batches: expected labels from 0 to 1"):
        attacked_examples(Threshold(), x, y + 1, "fgsm", eps=0.1)
    with pytest.raises(ValueError, match="eps: expected a radius"):
        attacked_examples(model, x, y, "fgsm", eps=3)
