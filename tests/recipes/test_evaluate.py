import pytest
import torch
from torch import nn

from elle_fast.recipes.data import Split
from elle_fast.recipes.evaluate import evaluate, measure_e_lin, parse_attacks


class Threshold(nn.Module):
    """Two classes, split at the pixel 0.5: PGD within eps turns exactly the samples nearer to it than eps."""

    def __init__(self):
        super().__init__()
        self.scale = nn.Parameter(torch.tensor(3.0))
        self.norm = nn.BatchNorm1d(2)  # untouched by an evaluation, so the identity up to its eps
        self.drop = nn.Dropout(0.9)

    def forward(self, x):
        margin = self.scale * (x.flatten(1) - 0.5)
        return self.drop(self.norm(torch.cat((-margin, margin), dim=1)))


def pixels(values):
    images = torch.tensor(values, dtype=torch.uint8).view(-1, 1, 1, 1)
    return Split(images, (images.flatten() > 127).long())


@pytest.fixture
def model():
    model = Threshold()
    model.train()
    model.drop.eval()  # modes need not agree with the parent's
    return model


def test_accuracy_of_a_model_whose_margin_is_known(model):
    split = pixels([0, 60, 100, 120, 126, 129, 135, 160, 200, 255])
    found = evaluate(model, split, parse_attacks("clean,fgsm,pgd-20"), eps=20 / 255, batch_size=3)
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

    evaluate(Spy(), pixels([0, 3, 250, 255]), parse_attacks("fgsm,pgd-3"), eps=0.5)
    assert min(low for low, _ in seen) >= 0.0
    assert max(high for _, high in seen) <= 1.0


def test_restarts_report_the_worst_case_so_far():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Flatten(), nn.Linear(64, 64), nn.Tanh(), nn.Linear(64, 4))
    for parameter in model.parameters():
        parameter.data *= 4  # rough enough that starts differ
    split = Split(torch.randint(0, 256, (200, 1, 8, 8), dtype=torch.uint8), torch.zeros(200, dtype=torch.int64))
    with torch.no_grad():
        split = Split(split.images, model(split.images / 255).argmax(1))
    found = evaluate(model, split, parse_attacks("pgd-3-6"), eps=0.03)["pgd-3-6"]
    assert len(found["per_restart"]) == 6
    assert found["per_restart"] == sorted(found["per_restart"], reverse=True)
    assert found["per_restart"][-1] < found["per_restart"][0]
    assert found["accuracy"] == found["per_restart"][-1]


def test_same_seed_same_result_and_torchs_generator_is_not_moved(model):
    split = pixels(range(100, 156))
    torch.manual_seed(5)
    before = torch.get_rng_state()
    first = evaluate(model, split, parse_attacks("pgd-1-2"), eps=10 / 255, seed=3)
    assert torch.equal(torch.get_rng_state(), before)
    torch.manual_seed(6)
    assert evaluate(model, split, parse_attacks("pgd-1-2"), eps=10 / 255, seed=3) == first


def test_nothing_is_left_on_the_model(model):
    state = {name: value.clone() for name, value in model.state_dict().items()}
    split = pixels([10, 130, 250])
    evaluate(model, split, parse_attacks("clean,fgsm,pgd-2"), eps=0.1)
    measure_e_lin(model, split, eps=0.1)
    assert model.training
    assert model.norm.training
    assert not model.drop.training
    assert all(parameter.grad is None for parameter in model.parameters())
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())


def test_modes_are_restored_when_the_model_fails(model):
    model.forward = lambda x: 1 / 0
    with pytest.raises(ZeroDivisionError):
        evaluate(model, pixels([1, 2]), parse_attacks("clean"), eps=0.1)
    assert model.training


def test_e_lin_is_zero_for_a_linear_loss_and_weighs_samples_equally():
    class Linear(nn.Module):
        """Logits (0, -big) make the loss of class 1 linear in the pixel, to rounding."""

        def forward(self, x):
            z = 50 + 10 * x.flatten(1)
            return torch.cat((torch.zeros_like(z), -z), dim=1)

    split = Split(torch.full((5, 1, 1, 1), 128, dtype=torch.uint8), torch.ones(5, dtype=torch.int64))
    # Losses near 55 are rounded to 2**-19, and the residual adds three of them.
    assert measure_e_lin(Linear(), split, eps=0.1) <= (4 * 2**-18) ** 2
    split = pixels(range(100, 107))
    torch.testing.assert_close(
        measure_e_lin(Threshold(), split, eps=0.3, batch_size=7),
        measure_e_lin(Threshold(), split, eps=0.3, batch_size=8),
    )


def test_logits_that_are_not_finite_are_wrong():
    class Broken(Threshold):
        def forward(self, x):
            return super().forward(x) * torch.nan

    found = evaluate(Broken(), pixels([0, 10, 20]), parse_attacks("clean,pgd-2"), eps=0.1)
    assert found["clean"]["accuracy"] == found["pgd-2"]["accuracy"] == 0.0


@pytest.mark.parametrize("text", ["", "pgd", "pgd-0", "pgd-10-0", "PGD-10", "autoattack", "clean,,fgsm", "pgd-10-2-3"])
def test_unknown_attacks(text):
    with pytest.raises(ValueError, match="attacks: expected names among"):
        parse_attacks(text)


def test_progress_counts_every_sample_of_every_attack(model):
    done: list[int] = []
    evaluate(model, pixels(range(10)), parse_attacks("clean,pgd-2"), eps=0.1, batch_size=4, advance=done.append)
    assert done == [4, 4, 2, 4, 4, 2]
