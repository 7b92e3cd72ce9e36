"""Any batches serve, and those of another form are refused."""

from typing import Any

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from elle_fast import LocalLinearity
from elle_fast.evaluation import (
    Outcome,
    accuracy,
    evaluate,
    masking,
    masking_check,
    measure_e_lin,
    outcomes,
    worst_case,
)
from tests.evaluation.cases import EPS, Linear, around, batched


def test_a_shuffled_loader_is_gone_through_once_and_samples_stay_together():
    model = Linear(2, 9)
    x, y = around(model, n=50)
    loader = DataLoader(TensorDataset(x, y), batch_size=20, shuffle=True, generator=torch.Generator().manual_seed(1))
    order = torch.cat([labels for _, labels in loader])
    loader.generator = torch.Generator().manual_seed(1)
    found = outcomes(model, loader, "clean,fgsm,noise-2", eps=2 * EPS)
    expected = outcomes(model, [(x, y)], "clean,fgsm", eps=2 * EPS)
    with torch.no_grad():
        right = model(x).argmax(1) == y
    # A sample that is wrong without an attack withstands none, in whichever order: so that all attacks saw the same.
    assert not torch.equal(order, y)
    assert not (found["fgsm"].robust[-1] & ~found["clean"].robust[-1]).any()
    assert found["clean"].robust.sum() == right.sum() < 50
    assert found["fgsm"].robust.sum() == expected["fgsm"].robust.sum() < right.sum()
    batches = batched(x, y, 20)
    again = outcomes(model, iter(batches), "clean,noise-2", eps=2 * EPS)  # an iterator serves, too
    listed = outcomes(model, batches, "clean,noise-2", eps=2 * EPS)
    assert all(torch.equal(again[name].robust, listed[name].robust) for name in listed)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_inputs_of_another_shape_and_dtype(dtype):
    model = Linear(3, 5).to(dtype)
    x = torch.rand(20, 5, dtype=dtype, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        y = model(x).argmax(1)
    found = evaluate(model, [(x, y)], "clean,fgsm,pgd-5-2,noise-2", eps=0.3)
    assert found["clean"]["accuracy"] == 1 > found["fgsm"]["accuracy"] >= found["pgd-5-2"]["accuracy"]
    assert measure_e_lin(model, [(x, y)], eps=0.3) > 0  # the loss is not linear


class Small(Linear):
    """Out of memory for more than ``rows`` samples."""

    rows, failed = 1000, 0

    def forward(self, x):
        if len(x) > self.rows:
            self.failed += 1
            raise torch.cuda.OutOfMemoryError("CUDA out of memory. Tried to allocate 17.60 GiB.")
        return super().forward(x)


def test_a_batch_that_does_not_fit_into_memory_is_attacked_in_halves():
    model = Small(2, 9)
    x, y = around(model, n=50)
    halves = [(each, labels) for each, labels in zip(x.split([12, 13, 12, 13]), y.split([12, 13, 12, 13]), strict=True)]
    attacks = "clean,pgd-3-2,noise-3"
    expected = outcomes(model, halves, attacks, eps=2 * EPS, seed=3)
    whole = outcomes(model, [(x, y)], attacks, eps=2 * EPS, seed=3)
    assert any(not torch.equal(whole[name].robust, expected[name].robust) for name in expected)  # starts differ
    model.rows = 13
    found = outcomes(model, [(x, y)], attacks, eps=2 * EPS, seed=3)
    assert model.failed == 3 * 3  # by each attack, of the whole and of both halves
    for name, outcome in found.items():
        assert torch.equal(outcome.robust, expected[name].robust)
        assert outcome.notes == ["out of memory for 50 samples at a time"]
    assert all(parameter.requires_grad for parameter in model.parameters())


def test_e_lin_of_a_batch_that_does_not_fit_into_memory():
    model = Small(3, 9)
    x, y = torch.rand(7, 9), torch.arange(7) % 3
    # As measured by hand on the halves, after the noise that the attempts on 7 and on 4 samples drew.
    regularizer = LocalLinearity(0.3, bounds=(0.0, 1.0), generator=torch.Generator().manual_seed(5))
    with torch.no_grad():
        regularizer(model, x, y)
        first = regularizer(model, x[:3], y[:3]).item()
        regularizer(model, x[3:], y[3:])
        others = [regularizer(model, x[3:5], y[3:5]).item(), regularizer(model, x[5:], y[5:]).item()]
    model.rows = 9  # of three points for each of 3 samples
    found = measure_e_lin(model, [(x, y)], eps=0.3, seed=5)
    assert found == pytest.approx((3 * first + 2 * sum(others)) / 7, rel=1e-6)
    assert model.failed == 2


def test_no_memory_for_a_single_sample_and_other_errors_are_errors():
    model = Small(2, 9)
    x, y = around(model, n=4)
    model.rows = 0
    with pytest.raises(torch.cuda.OutOfMemoryError, match=r"17\.60 GiB"):
        evaluate(model, [(x, y)], "fgsm", eps=EPS, check=False)
    assert model.failed == 1  # the pass over one sample that counts the classes
    model.rows, model.failed = 1, 0

    def two(model, x):
        model.rows = 0
        return 2

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(accuracy, "classes_of", two)
        with pytest.raises(torch.cuda.OutOfMemoryError, match=r"17\.60 GiB"):
            evaluate(model, [(x, y)], "fgsm", eps=EPS, check=False)
    assert model.failed == 3  # with 4, 2 and 1
    model.forward = lambda x: 1 / 0  # type: ignore[method-assign]
    with pytest.raises(ZeroDivisionError):
        evaluate(model, [(x, y)], "fgsm", eps=EPS, check=False)


X, Y = torch.full((2, 1, 1, 1), 0.5), torch.tensor([0, 1])


@pytest.mark.parametrize(
    "batches, error, message",
    [
        (X[0, 0, 0, 0], TypeError, r"expected an iterable of pairs \(x, y\), got a tensor of shape \[\]"),
        (7, TypeError, r"expected an iterable of pairs \(x, y\), got 7 \(int\)"),
        ([X], TypeError, r"expected pairs \(x, y\) of tensors, got a tensor of shape"),
        ([(X, Y, Y)], TypeError, r"expected pairs \(x, y\) of tensors, got 3 items"),
        ([(X, [0, 1])], TypeError, r"expected pairs \(x, y\) of tensors, got 2 items"),
        ([(X.byte(), Y)], ValueError, r"expected x floating \[B, \.\.\.\] with B >= 1, got .*torch.uint8"),
        ([(X[:0], Y[:0])], ValueError, r"expected x floating \[B, \.\.\.\] with B >= 1, got .*\[0, 1, 1, 1\]"),
        ([(X, Y[:1])], ValueError, r"expected y int64 \[2\] on cpu, got .*\[1\]"),
        ([(X, Y.float())], ValueError, r"expected y int64 \[2\] on cpu, got .*torch.float32"),
        ([(X, Y.to("meta"))], ValueError, r"expected y int64 \[2\] on cpu, got .*meta"),
        ([(X.to("meta"), Y.to("meta"))], ValueError, "expected tensors on the model's device, cpu, got meta"),
        ([(X, Y), (X + 0.6, Y)], ValueError, r"expected x in \[0.0, 1.0\], got values from 1.1"),
        ([(X * torch.nan, Y)], ValueError, r"expected x in \[0.0, 1.0\], got values from nan"),
        ([], ValueError, "expected at least one, got none"),
    ],
)
def test_other_batches_are_refused(batches, error, message, model):
    with pytest.raises(error, match="batches: " + message):
        evaluate(model, batches, "clean", eps=0.1)
    with pytest.raises(error, match="batches: " + message):
        measure_e_lin(model, batches, eps=0.1)
    assert model.training


@pytest.mark.parametrize(
    "changes, error, message",
    [
        ({"model": lambda x: x}, TypeError, r"model: expected a torch\.nn\.Module, got .*function"),
        ({"model": nn.Identity()}, ValueError, r"model\(x\): expected a floating-point tensor of shape \[1, C\], got"),
        ({"batches": [(X, Y), (X, Y + 1)]}, ValueError, "expected labels from 0 to 1, as the .* got some from 1 to 2"),
        ({"batches": [(X, Y - 1)]}, ValueError, "expected labels from 0 to 1, .* got some from -1 to 0"),
        ({"attacks": 3}, TypeError, r"attacks: expected names with commas between them, got 3"),
        ({"attacks": [3]}, TypeError, r"attacks: expected names among .* got 3"),
        ({"attacks": []}, ValueError, r"attacks: expected names among .* got none"),
        ({"eps": -0.1}, ValueError, "eps: expected a finite number"),
        ({"eps": 8}, ValueError, r"eps: expected a radius in \[0, 1\], where pixels are, got 8; .* 8/255"),
        ({"seed": -1}, ValueError, "seed: expected an integer >= 0"),
        ({"seed": "a"}, TypeError, "seed: expected an integer >= 0"),
        ({"model": []}, TypeError, r"model: expected a torch\.nn\.Module, got \[\]"),
        ({"model": None}, TypeError, r"model: expected a torch\.nn\.Module, got None"),
        ({"batches": None}, TypeError, "batches: expected an iterable of pairs"),
        ({"attacks": X}, TypeError, "attacks: expected names with commas between them, got a tensor"),
        ({"attacks": None}, TypeError, "attacks: expected names with commas between them, got None"),
        ({"advance": 5}, TypeError, "advance: expected None or a function of a number, got 5"),
        ({"chunks": {}}, TypeError, r"chunks: expected None or Chunks, got \{\}"),
    ],
)
def test_other_models_attacks_and_settings_are_refused(changes, error, message, model):
    options: dict[str, Any] = {"model": model, "batches": [(X, Y)], "attacks": "clean", "eps": 0.1, **changes}
    with pytest.raises(error, match=message):
        evaluate(**options)


@pytest.mark.parametrize("eps", [8, "a", None, -1.0])
def test_e_lin_of_another_eps_is_refused(eps, model):
    with pytest.raises((TypeError, ValueError), match="eps: expected a"):
        measure_e_lin(model, [(X, Y)], eps=eps)


@pytest.mark.parametrize("found", [{}, None, 5, {"clean": 3}, []])
def test_the_worst_case_of_no_outcomes(found):
    with pytest.raises(TypeError, match="found: expected the outcomes of at least one attack by name, got"):
        worst_case(found)


def test_the_worst_case_over_other_samples(model):
    found = [outcomes(model, [(X[:count], Y[:count])], "clean", eps=0.1)["clean"] for count in (1, 2)]
    with pytest.raises(ValueError, match=r"found: expected outcomes of the same samples, got \[1, 2\] of them"):
        worst_case(dict(zip("ab", found, strict=True)))
    for robust in (None, [[True]], X > 0, torch.ones(1, 3)):
        with pytest.raises(TypeError, match=r"robust: expected a bool tensor \[restarts, N\], got"):
            Outcome(robust, [])  # type: ignore[arg-type]


@pytest.mark.parametrize("known", ["a", 5, X > 0])
def test_what_withstands_autoattack_is_checked_before_the_work(known, model, monkeypatch):
    monkeypatch.setattr(masking, "ATTACKS", ("pgd-20", "pgd-200", "noise-1"))
    with pytest.raises((TypeError, ValueError), match="autoattack: expected "):
        masking_check(model, [(X, Y)], eps=0.1, autoattack=known)
