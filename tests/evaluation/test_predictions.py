"""What a model says of each sample; intervals, accuracies by class, and the table of all samples."""

import csv

import pytest
import torch
from scipy import stats

from elle_fast.evaluation import Outcome, by_class, interval, outcomes, predictions, worst_case, write_per_sample
from tests.evaluation.cases import EPS, Linear, Threshold, around, batched, pixels


def test_predictions_are_those_of_the_model_in_eval_mode(model):
    x, y = around(linear := Linear(3, 9), n=50)
    with torch.no_grad():
        expected = linear(x).argmax(1)
    assert torch.equal(predictions(linear, batched(x, y, 7)), expected)
    assert predictions(model, pixels([0, 100, 200])).tolist() == [0, 0, 1]
    assert model.training


def test_logits_that_are_not_finite_are_no_prediction():
    model = Threshold()
    model.scale.data.fill_(torch.inf)
    assert predictions(model, pixels([0, 200])).tolist() == [-1, -1]


@pytest.mark.parametrize("right, samples", [(0, 10), (10, 10), (1, 3), (37, 100), (5000, 10_000)])
def test_intervals_are_those_of_wilson(right, samples):
    low, high = interval(right, samples)
    expected = stats.binomtest(right, samples).proportion_ci(method="wilson")
    assert (low, high) == pytest.approx((expected.low, expected.high), abs=1e-6)
    assert low <= right / samples <= high


def test_an_interval_of_no_samples_is_refused():
    with pytest.raises(ValueError, match="samples: expected an integer >= 1, got 0"):
        interval(0, 0)
    with pytest.raises(ValueError, match="right: expected an integer >= 0 and <= 2, got 3"):
        interval(3, 2)


FOUND = {
    "clean": Outcome(torch.tensor([[True, True, False, True]]), []),
    "pgd-1-2": Outcome(torch.tensor([[True, False, False, True], [True, False, False, False]]), []),
}
LABELS, PREDICTED = torch.tensor([2, 2, 0, 2]), torch.tensor([2, 2, 1, 2])


def test_accuracy_by_class_leaves_out_classes_without_samples():
    assert by_class(LABELS, PREDICTED, FOUND, ["a", "b", "<b>"]) == [
        {"class": "a", "samples": 1, "clean": 0.0, "worst_case": 0.0},
        {"class": "<b>", "samples": 3, "clean": 1.0, "worst_case": pytest.approx(1 / 3)},
    ]
    # A class that the data have no name for has its number.
    assert [row["class"] for row in by_class(LABELS, PREDICTED, FOUND, ["a"])] == ["a", "2"]


def test_classes_together_are_the_worst_case():
    model = Linear(4, 9)
    x, y = around(model, n=80)
    found = outcomes(model, [(x, y)], "clean,fgsm,pgd-3", eps=EPS)
    rows = by_class(y, predictions(model, [(x, y)]), found, "abcd")
    for name, expected in (
        ("worst_case", worst_case(found)["accuracy"]),
        ("clean", found["clean"].robust.double().mean()),
    ):
        assert sum(row["samples"] * row[name] for row in rows) / 80 == pytest.approx(float(expected))


def test_without_clean_the_worst_case_is_that_of_the_attacks_alone():
    # The first sample is wrong undisturbed, and no attack leaves it wrong: it withstands them.
    labels, predicted = torch.tensor([0, 0, 1]), torch.tensor([1, 0, 1])
    found = {
        "fgsm": Outcome(torch.tensor([[True, True, False]]), []),
        "pgd-1": Outcome(torch.tensor([[True, True, True]]), []),
    }
    for attacked, expected in (
        (found, [1.0, 0.0]),
        (found | {"clean": Outcome((predicted == labels)[None], [])}, [0.5, 0.0]),
    ):
        rows = by_class(labels, predicted, attacked, "ab")
        assert [row["clean"] for row in rows] == [0.5, 1.0]
        assert [row["worst_case"] for row in rows] == expected
        assert (2 * expected[0] + expected[1]) / 3 == pytest.approx(worst_case(attacked)["accuracy"])


def test_the_table_has_a_row_for_each_sample(tmp_path):
    path = tmp_path / "new" / "samples.csv"
    write_per_sample(path, torch.tensor([3, 1, 9, 4]), LABELS, PREDICTED, FOUND)
    with path.open(newline="") as file:
        rows = list(csv.reader(file))
    assert rows[0] == ["index", "label", "prediction", "clean", "pgd-1-2"]
    assert rows[1:] == [[*"32211"], [*"12210"], [*"90100"], [*"42210"]]
    assert [each.name for each in path.parent.iterdir()] == ["samples.csv"]


def test_results_of_other_samples_are_refused(tmp_path):
    with pytest.raises(ValueError, match=r"predicted: expected \[4\], one for each label, got \[3\]"):
        by_class(LABELS, PREDICTED[:3], FOUND, "abc")
    with pytest.raises(ValueError, match=r"clean: expected \[3\], one for each label, got \[4\]"):
        by_class(LABELS[:3], PREDICTED[:3], FOUND, "abc")
    with pytest.raises(ValueError, match=r"index: expected int64 \[4\], one for each label, got"):
        write_per_sample(tmp_path / "a.csv", torch.arange(3), LABELS, PREDICTED, FOUND)
    assert list(tmp_path.iterdir()) == []
