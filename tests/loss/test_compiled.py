"""What `torch.compile(fullgraph=True)` follows of a step with a criterion: to the bit what eager mode does."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._dynamo import config as dynamo

from elle_fast import AdaptiveLambda, ELLELoss, LocalLinearity
from elle_fast.functional import draw_seed
from tests.helpers import labels, random

EPS = 8 / 255
X, Y = random(6, 3, 4, 4, seed=1), labels(6, 5)
# torch's compiler warns of its own doings.
pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")
follows_a_step = pytest.mark.skipif(
    not hasattr(dynamo, "trace_autograd_ops"), reason="an older torch.compile, which cannot follow a step"
)
Step = Callable[[nn.Module, Tensor, Tensor], Tensor]


def network() -> nn.Module:
    torch.manual_seed(2)
    # Batch norm: what the attack's pass changes of the model has to be changed in the graph as well.
    return nn.Sequential(nn.Flatten(), nn.Linear(48, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Linear(8, 5))


def trained(make: Callable[[], Step], **how: Any) -> list[Tensor]:
    """Losses, weights, running statistics and torch's generator after three steps."""
    model, step = network(), make()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    run = torch.compile(step, **how) if how else step
    torch.manual_seed(3)
    losses = []
    for _ in range(3):
        optimizer.zero_grad()
        loss = run(model, X, Y)
        loss.backward()
        optimizer.step()
        losses.append(loss.detach())
    return [*losses, *model.state_dict().values(), torch.get_rng_state()]


def same_compiled(make: Callable[[], Step], **how: Any) -> None:
    torch.compiler.reset()
    eager = trained(make)
    for found, expected in zip(trained(make, backend="aot_eager", **{"fullgraph": True, **how}), eager, strict=True):
        assert torch.equal(found, expected)


def elle(x_adv: bool, **options: Any) -> Callable[[], Step]:
    def make() -> Step:
        criterion = ELLELoss(EPS, **{"lam": 50.0, **copy.deepcopy(options)})
        return lambda model, x, y: criterion(model, x, y, x_adv=x + 0.01 if x_adv else None)

    return make


@pytest.mark.slow
def test_the_seed_is_drawn_in_the_graph_as_outside_it():
    torch.compiler.reset()
    # By Inductor too, which draws random numbers of its own.
    compiled = torch.compile(lambda: draw_seed(torch.device("cpu")), fullgraph=True)
    torch.manual_seed(3)
    expected = [draw_seed(torch.device("cpu")) for _ in range(3)]
    torch.manual_seed(3)
    assert [compiled() for _ in range(3)] == expected


@follows_a_step
def test_local_linearity_in_one_graph():
    def make() -> Step:
        regulariser = LocalLinearity(EPS, triplets=2, bounds=(0, 1))
        return lambda model, x, y: F.cross_entropy(model(x), y) + 50 * regulariser(model, x, y)

    same_compiled(make)


@follows_a_step
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"adaptive": True, "lagged": True, "forward": "split"},
        {"lam": AdaptiveLambda(50.0, window=4)},
        {"lam": AdaptiveLambda(50.0, ramp=2)},
        {"lam": AdaptiveLambda(50.0, rule="relative", threshold=1e-3)},
        {"lam": AdaptiveLambda(50.0, rule="relative", threshold=1e-3), "backend": "reference"},
        {"triplet_precision": "bf16"},
        pytest.param({"adaptive": True, "backend": "reference"}, marks=pytest.mark.slow),
    ],
    ids=["elle", "lagged", "window", "ramp", "relative", "relative, plain", "precision", "reference"],
)
def test_points_made_elsewhere_in_one_graph(options):
    same_compiled(elle(True, **options))


@follows_a_step
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"attack": "n-fgsm", "mean": [0.5] * 3, "std": [0.2] * 3},
        pytest.param({"attack": "none", "alpha": "argmax"}, marks=pytest.mark.slow),
    ],
    ids=["fgsm", "n-fgsm", "argmax"],
)
def test_the_attack_in_one_graph(options):
    with dynamo.patch(trace_autograd_ops=True):
        same_compiled(elle(False, adaptive=True, **options))


@follows_a_step
@pytest.mark.slow
# Where it goes on after the cut it looks at the .grad of a tensor that is no leaf.
@pytest.mark.filterwarnings("ignore:The .grad attribute:UserWarning")
def test_the_attack_in_several_graphs():
    """Without that option of torch the graph is cut at the gradient, and at a generator of one's own."""
    same_compiled(elle(False, generator=torch.Generator()), fullgraph=False)
