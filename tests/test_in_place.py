"""A model that changes its input in place is trained, attacked and evaluated as one that does not."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from elle_fast import ELLELoss, LocalLinearity, attacks, evaluation, methods, regularizers
from elle_fast.linearity import FORWARDS
from tests.helpers import Called, Smooth, built, labels, random, rng, shown

EPS = 0.1


class Net(nn.Module):
    """Centres its input, adds a weight to it and rectifies it, and rectifies a hidden layer: in place or not."""

    def __init__(self, inplace: bool) -> None:
        super().__init__()
        with torch.random.fork_rng():
            torch.manual_seed(1)
            self.shift = nn.Parameter(torch.tensor(0.1))
            self.first, self.rest = nn.Linear(6, 7), Smooth(7, 4)
        self.inplace = inplace

    def forward(self, x: Tensor) -> Tensor:
        if self.inplace:
            x -= 0.4
            x += self.shift
            F.relu_(x)
        else:
            x = F.relu(x - 0.4 + self.shift)
        out: Tensor = self.rest(F.relu(self.first(x.flatten(1)), inplace=self.inplace))
        return out


def batch() -> tuple[Tensor, Tensor]:
    return random(5, 6, seed=1), labels(5, 4)


def same(run: Callable[[nn.Module, Tensor, Tensor], Any]) -> None:
    """Results, gradients and what is left of x, which is x, are the same to the bit."""
    found = []
    for inplace in (True, False):
        torch.manual_seed(3)
        net, (x, y) = Net(inplace), batch()
        result = run(net, x, y)
        if isinstance(result, Tensor) and result.requires_grad:
            result.backward()
        assert torch.equal(x, batch()[0])
        assert torch.equal(y, batch()[1])
        found.append([result, *(p.grad for p in net.parameters())])
    for one, other in zip(*found, strict=True):
        if isinstance(one, Tensor):
            assert torch.equal(one, other)
        else:
            assert one == other


@pytest.mark.parametrize("name", [*attacks.SINGLE_STEP, "pgd", "pgd-restarts"])
def test_attacks(name):
    options: dict[str, Any] = {"restarts": 3} if name == "pgd-restarts" else {}
    attack: Any = attacks.SINGLE_STEP.get(name, attacks.pgd)
    same(lambda net, x, y: attack(net, x, y, EPS, **options))


def test_gradients():
    same(lambda net, x, y: attacks.input_gradient(net, x, y))
    same(lambda net, x, y: sum(part.square().sum() for part in attacks.losses_and_gradient(net, x, y)))


def own(model: Any, x: Tensor, y: Tensor) -> Tensor:
    """Its own clean pass is at the x that it is given, too."""
    with torch.no_grad():
        model(x.clone())
    point = x.clone().requires_grad_()
    F.cross_entropy(model(point * 1), y).backward()
    assert point.grad is not None
    return x + EPS * point.grad.sign()


@pytest.mark.parametrize("forward", FORWARDS)
@pytest.mark.parametrize("attack", ["fgsm", "n-fgsm", "none", own], ids=shown)
@pytest.mark.parametrize("alpha", ["uniform", "argmax"])
def test_elle(forward, attack, alpha):
    same(ELLELoss(EPS, 50.0, forward=forward, attack=attack, alpha=alpha))


MORE: dict[str, dict[str, Any]] = {
    "2p": {"points": "elle-2p", "penalty": "abs"},
    "2p-argmax": {"points": "elle-2p", "alpha": "argmax", "triplets": 2},
    "five": {"points": "five-point", "forward": "split"},
    "triplets": {"triplets": 3, "alpha": "argmax", "forward": "checkpoint"},
    "fraction": {"triplet_fraction": 0.4, "alpha": "argmax"},
    "light": {"adaptive": True, "skip_below": 1.0},
    "logits-of-a-loss": {"loss_fn": lambda out, y: F.cross_entropy(out, y, reduction="none")},
    "float64": {"dtype": torch.float32, "bounds": (0, 1)},
}


@pytest.mark.parametrize("options", MORE.values(), ids=MORE)
def test_options_of_elle(options):
    same(lambda net, x, y: ELLELoss(EPS, 50.0, **options)(net, x, y))


def test_points_made_elsewhere():
    same(lambda net, x, y: ELLELoss(EPS, 50.0, alpha="argmax")(net, x, y, x))
    points = random(5, 6, seed=9)
    same(lambda net, x, y: ELLELoss(EPS, 50.0, alpha="argmax", points="elle-2p")(net, x, y, points))
    assert torch.equal(points, random(5, 6, seed=9))


@pytest.mark.parametrize("alpha", ["uniform", "argmax"])
@pytest.mark.parametrize("of", ["loss", "logits"])
def test_local_linearity(alpha, of):
    same(lambda net, x, y: LocalLinearity(EPS, alpha=alpha, of=of)(net, x, y))


def test_a_graph_that_is_kept_is_recomputed_twice():
    def twice(net: nn.Module, x: Tensor, y: Tensor) -> Tensor:
        loss: Tensor = ELLELoss(EPS, 50.0, forward="checkpoint")(net, x, y)
        loss.backward(retain_graph=True)
        return loss

    same(twice)


@pytest.mark.parametrize("name", methods.NAMES)
def test_methods(name):
    """SLAT perturbs a hidden layer's output, which the next layer overwrites."""
    same(lambda net, x, y: Called(built(name, eps=EPS))(net, x, y))


def test_free_at_keeps_its_perturbation():
    def replays(net: nn.Module, x: Tensor, y: Tensor) -> Tensor:
        criterion: Any = methods.build("free-at", eps=EPS)
        for _ in range(3):
            criterion(net, x, y).backward()
        perturbation: Tensor = criterion.perturbation
        return perturbation

    same(replays)


@pytest.mark.parametrize("name", regularizers.__all__)
@pytest.mark.parametrize("given", [True, False])
def test_regularizers(name, given):
    if name == "losses_and_gradient" or (not given and name in ("GAT", "NuAT", "AdvLC")):
        pytest.skip("has no such form")
    kind: Any = getattr(regularizers, name)
    points = random(5, 6, seed=9)
    regularizer = kind(EPS) if name in ("GradAlign", "LLR") else kind()
    same(lambda net, x, y: regularizer(net, x, y, points if given else None))
    assert torch.equal(points, random(5, 6, seed=9))


def test_evaluation():
    names = "clean,fgsm,pgd-3,pgd-2-3,noise-3"
    same(lambda net, x, y: evaluation.evaluate(net, [(x, y)], names, eps=EPS))
    same(lambda net, x, y: evaluation.measure_e_lin(net, [(x, y)], eps=EPS))
    same(lambda net, x, y: evaluation.predictions(net, [(x, y)]))

    def shown(net: Any, x: Tensor, y: Tensor) -> Tensor:
        found = evaluation.attacked_examples(net, x, y, names, eps=EPS)
        return torch.stack([seen.x for each in found for seen in (each.clean, *each.attacked.values())])

    same(shown)


def test_evaluation_by_other_packages():
    pytest.importorskip("pyautoattack")
    images = (5, 1, 2, 3)
    same(lambda net, x, y: evaluation.evaluate(net, [(x.view(images), y)], "square-20", eps=EPS))


def test_a_model_that_is_known_to_change_nothing_is_given_no_copy():
    x, y = batch()
    for inplace in (True, False):
        net = Net(inplace)
        given: list[Tensor] = []
        net.register_forward_pre_hook(lambda module, args, given=given: given.append(args[0]))
        for _ in range(3):
            attacks.input_gradient(net, x, y)
            regularizers.GAT()(net, x, y, x)
        assert [points.data_ptr() == x.data_ptr() for points in given] == [False] + [not inplace] * 8


@pytest.mark.parametrize("mode", ["train", "eval"])
def test_a_model_that_begins_to_change_its_input(mode):
    """In silence x would be another one after the call."""
    net, (x, y) = Net(False), batch()
    regularizers.GAT()(net, x, y, x)
    net.inplace = True
    if mode == "eval":  # of which nothing is known yet
        net.eval()
        regularizers.GAT()(net, x, y, x)
        assert torch.equal(x, batch()[0])
    else:
        with pytest.raises(RuntimeError, match=r"^model: expected one that leaves its input alone, .* got one that"):
            regularizers.GAT()(net, x, y, x)


def test_a_compiled_model():
    generator = [rng(3), rng(3)]
    found = []
    for inplace in (True, False):
        net: Any = Net(inplace)
        net = torch.compile(net, backend="eager") if inplace else net
        x, y = batch()
        loss = ELLELoss(EPS, 50.0, alpha="argmax", generator=generator.pop())(net, x, y)
        found.append([loss, *torch.autograd.grad(loss, list(net.parameters()))])
        assert torch.equal(x, batch()[0])
    for one, other in zip(*found, strict=True):
        torch.testing.assert_close(one, other)
