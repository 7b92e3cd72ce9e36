"""Accuracies and E_lin are those of models whose closed form is known."""

import pytest
import torch
from torch import nn

from elle_fast import LocalLinearity
from elle_fast.evaluation import evaluate, measure_e_lin, outcomes, parse_attacks, points, worst_case
from tests.evaluation.cases import (
    BALLS,
    EPS,
    Linear,
    Threshold,
    around,
    batched,
    needs_autoattack,
    needs_foolbox,
    pixels,
)


def test_accuracy_of_a_model_whose_margin_is_known(model):
    batches = pixels([0, 60, 100, 120, 126, 129, 135, 160, 200, 255], size=3)
    found = evaluate(model, batches, eps=20 / 255)
    assert found["clean"]["accuracy"] == 1.0
    # Within 20/255 of the threshold 127.5/255: 120, 126, 129 and 135.
    assert found["fgsm"]["accuracy"] == pytest.approx(0.6)
    assert found["pgd-20"]["accuracy"] == pytest.approx(0.6)
    assert found["pgd-20"]["samples"] == 10


def test_attacked_pixels_stay_in_the_image_range():
    seen = []

    class Spy(Threshold):
        def forward(self, x):
            seen.append((x.min().item(), x.max().item()))
            return super().forward(x)

    evaluate(Spy(), pixels([0, 3, 250, 255]), "fgsm,pgd-3", eps=0.5, check=False)
    assert min(low for low, _ in seen) >= 0.0
    assert max(high for _, high in seen) <= 1.0


def test_restarts_report_the_worst_case_so_far():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Flatten(), nn.Linear(64, 64), nn.Tanh(), nn.Linear(64, 4))
    for parameter in model.parameters():
        parameter.data *= 4  # rough enough that starts differ
    x = torch.randint(0, 256, (200, 1, 8, 8)) / 255
    with torch.no_grad():
        y = model(x).argmax(1)
    found = evaluate(model, [(x, y)], "pgd-3-6", eps=0.03)["pgd-3-6"]
    assert len(found["per_restart"]) == 6
    assert found["per_restart"] == sorted(found["per_restart"], reverse=True)
    assert found["per_restart"][-1] < found["per_restart"][0]
    assert found["accuracy"] == found["per_restart"][-1]


def test_same_seed_same_result_and_torchs_generator_is_not_moved(model):
    batches = pixels(range(100, 156))
    torch.manual_seed(5)
    before = torch.get_rng_state()
    first = evaluate(model, batches, "pgd-1-2", eps=10 / 255, seed=3)
    assert torch.equal(torch.get_rng_state(), before)
    torch.manual_seed(6)
    assert evaluate(model, batches, "pgd-1-2", eps=10 / 255, seed=3) == first


def test_e_lin_is_zero_for_a_linear_loss_and_weighs_samples_equally():
    class Linear(nn.Module):
        """Logits (0, -big) make the loss of class 1 linear in the pixel, to rounding."""

        def forward(self, x):
            z = 50 + 10 * x.flatten(1)
            return torch.cat((torch.zeros_like(z), -z), dim=1)

    x, y = torch.full((5, 1, 1, 1), 128 / 255), torch.ones(5, dtype=torch.int64)
    # Losses near 55 are rounded to 2**-19, and the residual adds three of them.
    assert measure_e_lin(Linear(), [(x, y)], eps=0.1) <= (4 * 2**-18) ** 2
    # A batch of 4 and one of 1: the mean of their means would weigh the last sample as much as the other four.
    found = measure_e_lin(Threshold(), pixels(range(100, 105), size=4), eps=0.3)
    generator = torch.Generator().manual_seed(0)
    regularizer = LocalLinearity(0.3, bounds=(0, 1), generator=generator)
    model = Threshold().eval()
    with torch.no_grad():
        each = [regularizer(model, x, y).item() for x, y in pixels(range(100, 105), size=4)]
    assert found == pytest.approx((4 * each[0] + each[1]) / 5, rel=1e-12)
    assert found != pytest.approx(sum(each) / 2, rel=1e-3)


def test_logits_that_are_not_finite_are_wrong():
    class Broken(Threshold):
        def forward(self, x):
            return super().forward(x) * torch.nan

    found = evaluate(Broken(), pixels([0, 10, 20]), "clean,pgd-2", eps=0.1)
    for each in (found["clean"], found["pgd-2"]):
        assert each["accuracy"] == 0.0
        assert each["notes"] == {"logits that are not finite count as wrong": 1}


def test_progress_counts_every_sample_of_every_attack(model):
    done: list[int] = []
    evaluate(model, pixels(range(10), size=4), "clean,pgd-2", eps=0.1, advance=done.append)
    assert done == [4, 4, 4, 4, 2, 2]


@pytest.mark.parametrize(
    "name",
    [
        *("fgsm", "pgd-10"),
        pytest.param("foolbox-pgd-10", marks=needs_foolbox),
        pytest.param("autoattack", marks=needs_autoattack),
    ],
)
@pytest.mark.parametrize("norm", BALLS)
def test_on_a_linear_binary_model_each_attack_finds_the_closed_form_for_each_sample(name, norm):
    eps, side = BALLS[norm]
    model = Linear(2, side**2)
    x, y = around(model, norm=norm)
    expected = model.radius(x, y, norm) > eps
    assert 0.2 < expected.double().mean() < 0.8
    found = outcomes(model, [(x, y)], name, eps=eps, norm=norm)[name]
    assert torch.equal(found.robust[-1], expected)
    assert any("APGD-T is left out" in note for note in found.notes) == (name == "autoattack")


@needs_autoattack
@pytest.mark.parametrize("norm", BALLS)
def test_autoattack_finds_the_closed_form_of_a_linear_model_with_five_classes(norm):
    eps, side = BALLS[norm]
    model = Linear(5, side**2)
    x, y = around(model, n=40, norm=norm)
    expected = model.radius(x, y, norm) > eps
    assert 0.2 < expected.double().mean() < 0.8
    found = outcomes(model, [(x, y)], "clean,noise-5,autoattack", eps=eps, norm=norm)
    assert torch.equal(found["autoattack"].robust[-1], expected)
    # The three are nested, so the worst case is the strongest.
    assert worst_case(found)["accuracy"] == found["autoattack"].summary()["accuracy"]
    assert found["clean"].robust.sum() >= found["noise-5"].robust[-1].sum() > expected.sum()


def test_the_worst_case_is_that_of_each_sample():
    model, attacks = Threshold(), parse_attacks("clean,fgsm")
    found = outcomes(model, pixels([0, 100, 200]), attacks, eps=0.01)
    found["clean"].robust[0] = torch.tensor([True, False, True])
    found["fgsm"].robust[0] = torch.tensor([False, True, True])
    assert worst_case(found) == {"accuracy": 1 / 3, "samples": 3, "attacks": ["clean", "fgsm"]}


def test_a_start_attacks_those_that_withstood_the_earlier_ones(model):
    sizes = []
    hook = model.register_forward_pre_hook(lambda module, args: sizes.append(len(args[0])))
    found = evaluate(model, pixels([120, 126, 129, 255]), "pgd-1-3", eps=20 / 255, check=False)
    hook.remove()
    assert found["pgd-1-3"]["per_restart"][-1] == 0.25
    assert sizes[:3] == [1, 4, 4]  # the first counts the classes
    assert sizes[-2:] == [1, 1]


@pytest.mark.parametrize("name", ["noise-2", pytest.param("foolbox-pgd-1-2", marks=needs_foolbox)])
def test_each_start_and_each_batch_has_noise_of_its_own(name, monkeypatch):
    monkeypatch.setattr(Threshold, "forward", lambda self, x: x.flatten(1) @ torch.tensor([[0.0, 1e-6]]) + self.scale)
    seen = []
    model = Threshold()
    model.register_forward_pre_hook(lambda module, args: seen.append(args[0].detach().clone()))
    batches = batched(torch.full((4, 1, 1, 1), 128 / 255), torch.ones(4, dtype=torch.int64), 2)
    monkeypatch.setitem(points.FOREIGN, "foolbox-pgd", foolbox_start)
    assert evaluate(model, batches, name, eps=0.1, check=False)[name]["accuracy"] == 1
    _, *seen = seen  # which counted the classes
    assert len(seen) == 4  # two batches from two starts, all samples withstood the first
    assert len(torch.cat(seen).unique()) == 8


def foolbox_start(model, x, y, ball, attack, seed):
    return (x + ball.eps * (2 * torch.rand_like(x) - 1)).clamp(0, 1)


@pytest.mark.parametrize("name", ["noise-1", pytest.param("foolbox-pgd-1", marks=needs_foolbox)])
def test_another_seed_draws_another_start(name):
    model = Linear(2, 9)
    x, y = around(model)
    by_seed = [outcomes(model, [(x, y)], name, eps=2 * EPS, seed=s)[name].robust for s in range(4)]
    assert any(not torch.equal(by_seed[0], other) for other in by_seed[1:])
