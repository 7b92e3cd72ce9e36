"""No attack leaves a trace on the model, the generators or the standard output."""

import logging
import random
import sys

import numpy as np
import pytest
import torch
from torch import nn

from elle_fast.evaluation import evaluate, measure_e_lin, points
from tests.evaluation.cases import FOREIGN, Threshold, pixels


def test_nothing_is_left_on_the_model(model):
    state = {name: value.clone() for name, value in model.state_dict().items()}
    batches = pixels([10, 130, 250])
    evaluate(model, batches, "clean,fgsm,pgd-2", eps=0.1)
    measure_e_lin(model, batches, eps=0.1)
    assert model.training
    assert model.norm.training
    assert not model.drop.training
    assert all(parameter.grad is None for parameter in model.parameters())
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())


def test_modes_are_restored_when_the_model_fails(model):
    model.forward = lambda x: 1 / 0
    with pytest.raises(ZeroDivisionError):
        evaluate(model, pixels([1, 2]), "clean", eps=0.1)
    assert model.training


class Normed(nn.Module):
    """With a dropout and a batch norm whose state is not its first one, and logits that need the gradient's chain."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(3)
        self.body = nn.Sequential(nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Dropout(0.5))
        self.head = nn.Linear(16, 4)
        self.body(torch.rand(8, 1, 4, 4))

    def forward(self, x):
        return self.head(self.body(x))


def few_queries(monkeypatch):
    """50 queries of AutoAttack's Square in place of 5,000, which take seconds."""
    from pyautoattack.square import SquareAttack

    def run(attack, x, y):
        attack.n_queries = 50
        return original(attack, x, y)

    original = SquareAttack.attack_single_run
    monkeypatch.setattr(SquareAttack, "attack_single_run", run)


@pytest.mark.parametrize("name", ["pgd-3-2", "noise-2", *FOREIGN])
def test_no_attack_leaves_a_trace(name, capsys, monkeypatch):
    if name == "autoattack":
        few_queries(monkeypatch)
    model = Normed().train()
    model.body[4].eval()
    model.head.bias.requires_grad_(False)
    model.head.weight.grad = torch.ones_like(model.head.weight)
    flags = [parameter.requires_grad for parameter in model.parameters()]
    state = {key: value.clone() for key, value in model.state_dict().items()}
    x = torch.randint(0, 256, (6, 1, 4, 4), generator=torch.Generator().manual_seed(0)) / 255
    with torch.no_grad():
        batches = [(x, model.eval()(x).argmax(1))]
    model.train()
    model.body[4].eval()

    def generators():
        numpy_state = np.random.get_state(legacy=True)  # noqa: NPY002
        return (
            torch.get_rng_state().tolist(),
            str([each.tolist() if isinstance(each, np.ndarray) else each for each in numpy_state]),
            random.getstate(),
        )

    def trace(*arguments):
        return None

    before, tracing = generators(), sys.gettrace()
    sys.settrace(trace)
    try:
        first = evaluate(model, batches, name, eps=0.05, seed=4)
        assert sys.gettrace() is trace
    finally:
        sys.settrace(tracing)
    assert generators() == before
    assert capsys.readouterr().out == ""
    assert [module.training for module in model.body] == [True, True, True, True, False]
    assert [parameter.requires_grad for parameter in model.parameters()] == flags
    assert torch.equal(model.head.weight.grad, torch.ones_like(model.head.weight))
    assert all(parameter.grad is None for parameter in model.body.parameters())
    assert all(torch.equal(value, state[key]) for key, value in model.state_dict().items())
    # Nor does it depend on what the generators are at.
    torch.manual_seed(99)
    np.random.seed(99)  # noqa: NPY002
    random.seed(99)
    assert evaluate(model, batches, name, eps=0.05, seed=4) == first


def test_a_model_whose_buffers_change_is_an_error_and_they_are_restored(model):
    class Counting(Threshold):
        def forward(self, x):
            self.norm.get_buffer("running_mean").add_(1)
            return super().forward(x)

    counting = Counting()
    with pytest.raises(RuntimeError, match=r"model: expected buffers that .* got changes of norm\.running_mean;"):
        evaluate(counting, pixels([1, 2]), "clean", eps=0.1)
    assert not counting.norm.get_buffer("running_mean").any()
    # A model that has diverged is not one that changes.
    model.norm.get_buffer("running_mean").fill_(torch.nan)
    assert evaluate(model, pixels([1, 2]), "clean", eps=0.1)["clean"]["accuracy"] == 0


def test_what_an_attack_of_another_package_prints_and_logs_is_not_on_the_standard_output(model, monkeypatch, capsys):
    logger = logging.getLogger("auto-attack")

    def noisy(model, x, y, ball, attack, seed):
        print("progress")
        logger.info("nothing of note")
        logger.warning(f"there are {len(x)} points with zero gradient!")
        return x

    monkeypatch.setitem(points.FOREIGN, "noise", noisy)
    monkeypatch.delitem(points.OWN, "noise")
    found = evaluate(model, pixels(range(5), size=3), "noise-2", eps=0.1)["noise-2"]
    assert found["notes"] == {"there are N points with zero gradient!": 4}
    said = capsys.readouterr()
    assert (said.out, said.err) == ("", "progress\n" * 4)
    assert logger.propagate
    assert not logger.handlers


@pytest.mark.parametrize("attack", ["clean", "fgsm", "pgd-2-2", "noise-2", *FOREIGN[1:]])  # AutoAttack takes seconds
def test_another_default_device_changes_nothing(attack):
    made, generator = Normed().eval(), torch.Generator().manual_seed(7)
    x = torch.rand(6, 1, 4, 4, generator=generator)
    batches = [(x[:4], made(x[:4]).argmax(1)), (x[4:], made(x[4:]).argmax(1))]
    expected = evaluate(made, batches, attack, eps=0.1), measure_e_lin(made, batches, eps=0.1)
    with torch.device("meta"):
        assert (evaluate(made, batches, attack, eps=0.1), measure_e_lin(made, batches, eps=0.1)) == expected
