"""Arguments of the model that are not perturbed: each goes with its sample's points, in every forward pass."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from elle_fast import ELLELoss, LocalLinearity, TrainingStep, methods
from elle_fast.linearity import FORWARDS
from elle_fast.methods import NAMES
from tests.helpers import about, built, grads_of, labels, random, rng

B, D, C, EPS = 6, 5, 3, 0.1


class Masked(nn.Module):
    """It notes whether each row of the points came with its sample's mask."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.last = nn.Linear(D, 8).double(), nn.Linear(8, C).double()
        self.seen: list[tuple[Tensor, Tensor]] = []
        self.scales: set[float] = set()

    def forward(self, x: Tensor, *, mask: Tensor, weight: Tensor, scale: float = 1.0) -> Any:
        self.seen.append((x.detach().clone(), mask))
        self.scales.add(scale)
        assert weight.shape == (2 * B,)
        return self.last(torch.tanh(scale * self.first(x * mask)))


def batch() -> tuple[Tensor, Tensor, dict[str, Any]]:
    """Samples apart by more than any attack moves a point, so that each point says which one it is of."""
    x = random(B, D, seed=1, dtype=torch.float64) * 0.1 + torch.arange(B)[:, None] * 10
    mask = (torch.arange(B)[:, None] + torch.arange(D)) % 2 + 0.01 * torch.arange(B)[:, None].double()
    return x, labels(B, C), {"mask": mask, "weight": torch.ones(2 * B), "scale": 0.5}


def each_with_its_own(model: Masked, mask: Tensor) -> bool:
    return all(torch.equal(given, mask[(points[:, 0] / 10).round().long()]) for points, given in model.seen)


@pytest.mark.parametrize("forward", FORWARDS)
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"triplets": 2, "triplet_fraction": 0.5},
        {"points": "elle-2p"},
        {"points": "five-point"},
        {"alpha": "argmax", "attack": "none"},
        {"attack": "n-fgsm", "adaptive": True, "skip_below": 1.0},
        {"attack": lambda model, x, y: x + EPS * model(x).sum().sign().detach()},
        {"loss_fn": lambda output, y: nn.functional.cross_entropy(output, y, reduction="none")},
    ],
    ids=lambda options: "-".join(options) or "fgsm",
)
def test_each_point_comes_with_its_samples_own(forward, options):
    (x, y, kwargs), model = batch(), Masked()
    criterion = ELLELoss(EPS, 10.0, forward=forward, generator=rng(2), **options)
    criterion(model, x, y, model_kwargs=kwargs).backward()
    assert each_with_its_own(model, kwargs["mask"])
    assert sum(len(points) for points, _ in model.seen) > 2 * B
    assert model.scales == {0.5}
    assert model.first.weight.grad is not None


@pytest.mark.parametrize("forward", FORWARDS)
def test_the_loss_is_that_of_a_model_with_its_mask_inside(forward):
    (x, y, kwargs), model = batch(), Masked()
    mask = kwargs["mask"]

    def inside(points: Tensor) -> Any:
        rows = mask[(points[:, 0] / 10).round().long()]
        return model(points, mask=rows, weight=kwargs["weight"], scale=0.5)

    results = []
    for given, options in ((model, {"model_kwargs": kwargs}), (inside, {})):
        criterion = ELLELoss(EPS, 10.0, forward=forward, generator=rng(2))
        loss = criterion(given, x, y, **options)
        results.append((loss.item(), grads_of(loss, model)))
    (one, one_grads), (other, other_grads) = results
    assert one == other
    assert all(map(torch.equal, one_grads, other_grads))


def test_local_linearity_takes_them_too():
    (x, y, kwargs), model = batch(), Masked()
    LocalLinearity(EPS, triplet_fraction=0.5)(model, x, y, model_kwargs=kwargs).backward()
    assert each_with_its_own(model, kwargs["mask"])
    assert len(model.seen) == 1


@pytest.mark.parametrize("name", NAMES)
def test_every_method_takes_them(name):
    (x, y, kwargs), model = batch(), Masked()
    criterion = built(name, eps=EPS, lam=10.0 if "lam" in methods.TABLE[name].takes else None)
    criterion(model, x, y, model_kwargs=kwargs, **about(criterion, x)).backward()
    assert each_with_its_own(model, kwargs["mask"])


def test_a_step_hands_them_on():
    (x, y, kwargs), model = batch(), Masked()
    step = TrainingStep(ELLELoss(EPS, 10.0), model, torch.optim.SGD(model.parameters(), lr=0.1))
    before = copy.deepcopy(model.first.weight)
    step(x, y, model_kwargs=kwargs)
    assert each_with_its_own(model, kwargs["mask"])
    assert not torch.equal(model.first.weight, before)


@pytest.mark.parametrize("wrong", [3, "mask", [("mask", 1)], {1: torch.ones(B)}])
@pytest.mark.parametrize(
    "make", [lambda: ELLELoss(EPS), lambda: LocalLinearity(EPS), lambda: methods.build("fgsm", eps=EPS)]
)
def test_what_is_no_dictionary_by_name(make, wrong):
    x, y, _ = batch()
    with pytest.raises(TypeError, match=r"^model_kwargs: expected None or a dictionary by name, got "):
        make()(Masked(), x, y, model_kwargs=wrong)


@pytest.mark.parametrize("forward", FORWARDS)
def test_a_function_takes_them_in_every_forward_mode(forward):
    (x, y, kwargs), model = batch(), Masked()
    results = []
    for called in (model, lambda points, **given: model(points, **given), model.forward):
        loss = ELLELoss(EPS, 10.0, forward=forward, generator=rng(2))(called, x, y, model_kwargs=kwargs)
        results.append([loss.detach(), *grads_of(loss, model)])
    assert all(map(torch.equal, results[0], results[1]))
    assert all(map(torch.equal, results[0], results[2]))


@pytest.mark.parametrize("name", ["points", "model", "logits", "kwargs", "own"])
@pytest.mark.parametrize("options", [{}, {"forward": "checkpoint"}, {"alpha": "argmax"}], ids=str)
def test_an_argument_of_any_name(name, options):
    (x, y, _), layer = batch(), Masked().first
    given = []

    def model(z: Tensor, /, **kwargs: Any) -> Any:
        given.append(kwargs[name])
        return layer(z)[:, :C]

    ELLELoss(EPS, 10.0, **options)(model, x, y, model_kwargs={name: 3}).backward()
    assert set(given) == {3}


@pytest.mark.parametrize("forward", FORWARDS)
def test_a_model_that_changes_them_in_place(forward):
    (x, y, kwargs), model = batch(), Masked()
    before = kwargs["mask"].clone()

    def changing(points: Tensor, mask: Tensor, **given: Any) -> Any:
        return model(points, mask=mask.mul_(0.5), **given)

    def keeping(points: Tensor, mask: Tensor, **given: Any) -> Any:
        return model(points, mask=mask * 0.5, **given)

    results = []
    for called in (changing, keeping):
        loss = ELLELoss(EPS, 10.0, forward=forward, generator=rng(2))(called, x, y, model_kwargs=kwargs)
        results.append([loss.detach(), *grads_of(loss, model)])
        assert torch.equal(kwargs["mask"], before)
    assert all(map(torch.equal, *results))


@pytest.mark.filterwarnings("ignore:model. in eval mode")
@pytest.mark.parametrize("name", ["gat+elle-a", "free-at", "nuat", "llr"])
def test_a_function_of_a_model_in_eval_mode_moves_no_state(name):
    (x, y, kwargs), model = batch(), Masked()
    criterion = methods.build(name, eps=EPS)
    model.eval()
    with torch.enable_grad():
        criterion(model.forward, x, y, model_kwargs=kwargs)
        before = {key: value.clone() for key, value in criterion.state_dict().items()}
        criterion(model.forward, x, y, model_kwargs=kwargs)
    assert all(torch.equal(value, before[key]) for key, value in criterion.state_dict().items())
    assert all(not value.any() for key, value in before.items() if "count" in key)


def test_slat_finds_its_layers_inside():
    (x, y, kwargs), model = batch(), Masked()
    only: Any = lambda model: [model.first]  # noqa: E731
    plain = methods.build("slat", eps=EPS, layers=only)(model, x, y, model_kwargs=kwargs)
    without = methods.build("slat", eps=EPS, layers=lambda model: [])(model, x, y, model_kwargs=kwargs)
    assert plain != without
