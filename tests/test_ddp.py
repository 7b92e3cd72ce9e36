"""DistributedDataParallel with parameters that a pass does not use, and with uneven inputs; one process is enough."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from elle_fast import AdaptiveLambda, ELLELoss, TrainingStep, capture, methods
from elle_fast.linearity import FORWARDS
from elle_fast.methods.awp import AWP
from tests.helpers import Called, built, labels, random, rng

pytestmark = pytest.mark.skipif(not dist.is_available(), reason="torch was built without torch.distributed")

B, C, D, STEPS = 6, 3, 5, 8


@pytest.fixture(scope="module", autouse=True)
def group() -> Iterator[None]:
    from torch._C._distributed_c10d import HashStore

    dist.init_process_group("gloo", store=HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


class LayerDrop(nn.Module):
    """Each pass in which gradients are recorded drops one of the layers, another one each time."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList([nn.Linear(D, D) for _ in range(2)])
        self.last = nn.Linear(D, C)
        self.dropped = rng(0)

    def forward(self, x: Tensor) -> Tensor:
        # By the input, so that a recomputation drops the same one.
        kept = int(x.detach().sum() * 1e4) % 2
        out: Tensor = self.last(torch.tanh(self.layers[kept](x)))
        return out


def trained(criterion: Any, wrap: bool, run: Any = None) -> list[Tensor]:
    torch.manual_seed(0)
    net = LayerDrop()
    model = DistributedDataParallel(net, find_unused_parameters=True) if wrap else net
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1, fused=True)
    step = (run or TrainingStep)(criterion, model, optimizer)
    for i in range(STEPS):
        step(random(B, D, seed=i), labels(B, C, seed=i))
    return [parameter.detach() for parameter in net.parameters()]


def same_with_the_wrapper(criterion: Any, run: Any = None) -> None:
    expected = trained(copy.deepcopy(criterion), wrap=False, run=run)
    found = trained(criterion, wrap=True, run=run)
    assert all(map(torch.equal, expected, found))


@pytest.mark.parametrize("skip_below", [None, 1.0], ids=["full", "light"])
@pytest.mark.parametrize("forward", FORWARDS)
def test_a_layer_that_one_pass_drops_is_trained_by_another(forward, skip_below):
    lam = AdaptiveLambda(10.0, min_history=1, sensitivity=0.0)
    same_with_the_wrapper(ELLELoss(0.1, lam, forward=forward, skip_below=skip_below))


def test_a_layer_that_one_pass_drops_is_trained_by_another_in_a_precision_of_its_own():
    same_with_the_wrapper(ELLELoss(0.1, 10.0, triplet_precision="bf16"))


@pytest.mark.parametrize("name", methods.NAMES)
def test_a_layer_that_one_pass_drops_is_trained_by_another_in_every_method(name):
    same_with_the_wrapper(Called(built(name, eps=0.1, lam=2.0 if "lam" in methods.TABLE[name].takes else None)))


@pytest.mark.parametrize("name", ["n-fgsm", "trades-single", "elle-a", "gradalign", "advlc"])
def test_a_layer_that_one_pass_drops_is_trained_by_another_at_moved_weights(name):
    same_with_the_wrapper(AWP(methods.build(name, eps=0.1)))


def test_join_is_refused_by_awp():
    model = DistributedDataParallel(LayerDrop(), find_unused_parameters=True)
    with (
        pytest.raises(RuntimeError, match=r"^model: expected no join\(\) around AWP, .*drop_last=True.*"),
        model.join(),
    ):
        AWP(methods.build("fgsm", eps=0.1))(model, random(B, D, seed=1), labels(B, C))


def test_a_step_of_capture():
    def run(criterion: Any, model: nn.Module, optimizer: torch.optim.Optimizer) -> Any:
        return capture(criterion, model, optimizer, random(B, D, seed=0), labels(B, C))

    same_with_the_wrapper(ELLELoss(0.1, 10.0, forward="split"), run)


@pytest.mark.parametrize("name", ["elle-a", "gat+elle-a", "advmixup-single+elle-a"])
@pytest.mark.parametrize("compiled", [False, True], ids=["plain", "compiled"])
def test_join_is_refused_by_elle_a(name, compiled):
    """The rank that has no batch left would not take part in the mean of E_lin, and the other one abort."""
    model: Any = DistributedDataParallel(LayerDrop(), find_unused_parameters=True)
    wrapped = torch.compile(model, backend="eager") if compiled else model
    criterion = methods.build(name, eps=0.1)
    with (
        pytest.raises(RuntimeError, match=r"^model: expected no join\(\) around ELLE-A, .*drop_last=True.*"),
        model.join(),
    ):
        criterion(wrapped, random(B, D, seed=1), labels(B, C))
    with model.join():
        ELLELoss(0.1, 10.0)(model, random(B, D, seed=1), labels(B, C)).backward()
    with model.join(throw_on_early_termination=True):  # which comes before any E_lin
        criterion(wrapped, random(B, D, seed=1), labels(B, C)).backward()


def test_a_copy_has_the_same_process_group():
    own = dist.new_group([0])
    criterion = ELLELoss(0.1, AdaptiveLambda(10.0, process_group=own))
    controller = criterion.controller
    assert controller is not None
    controller.update(torch.tensor(1.0))
    copied = copy.deepcopy(criterion).controller
    assert copied is not None
    assert copied.process_group is own
    assert copied.count is not controller.count
    assert torch.equal(copied.count, controller.count)
    pair = copy.deepcopy([controller, controller])
    assert pair[0] is pair[1]
    assert pair[0].ranks() == 1
    for wrong in ("gloo", 0, [0]):
        with pytest.raises(TypeError, match=r"^process_group: expected None or a torch.distributed.ProcessGroup, got "):
            AdaptiveLambda(10.0, process_group=wrong)  # type: ignore[arg-type]
