"""An attack's gradient in a compiled model."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._dynamo.backends.common import aot_autograd
from torch._functorch.aot_autograd import make_boxed_func  # type: ignore[attr-defined]

from elle_fast import ELLELoss, attacks
from elle_fast._core.compiled import is_compiled, without_weights
from elle_fast.passes import WithKwargs
from tests.helpers import labels, random

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")
X, Y = random(4, 6, seed=1), labels(4, 3)


def network() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, 3))


def counted(graphs: list[int]) -> Any:
    """A compiler that notes the matrix products of each backward graph."""

    def backward(graph: torch.fx.GraphModule, _: Any) -> Any:
        products = (torch.ops.aten.mm.default, torch.ops.aten.addmm.default)
        graphs.append(sum(node.target in products for node in graph.graph.nodes))
        return make_boxed_func(graph)

    return aot_autograd(fw_compiler=lambda graph, _: make_boxed_func(graph), bw_compiler=backward)


@pytest.mark.parametrize("wrapped", [False, True], ids=["the model", "with arguments"])
def test_the_attack_computes_no_gradient_of_the_weights(wrapped):
    torch.compiler.reset()
    graphs: list[int] = []
    model = network()
    compiled = torch.compile(model, backend=counted(graphs))
    found = attacks.input_gradient(WithKwargs(compiled, {}, ()) if wrapped else compiled, X, Y)
    torch.testing.assert_close(found, attacks.input_gradient(model, X, Y), rtol=1e-5, atol=1e-7)
    assert graphs == [2]  # one for the input of each layer; with the weights' there would be two more
    assert all(each.requires_grad and each.grad is None for each in model.parameters())
    # The training pass has them all.
    nn.functional.cross_entropy(compiled(X), Y).backward()
    assert graphs == [2, 3]
    assert all(each.grad is not None for each in model.parameters())


def test_frozen_weights_stay_frozen_whatever_happens():
    model = network()
    frozen, *others = model.parameters()
    frozen.requires_grad_(False)

    def fails() -> None:
        compiled: Any = torch.compile(model, backend="eager")
        with without_weights(compiled):
            assert not any(each.requires_grad for each in others)
            raise KeyError

    with pytest.raises(KeyError):
        fails()
    assert not frozen.requires_grad
    assert all(each.requires_grad for each in others)


def test_an_eager_model_is_left_alone():
    model = network()
    with without_weights(model), without_weights(None):
        assert all(each.requires_grad for each in model.parameters())


def test_which_models_are_compiled():
    whole: Any = torch.compile(network())
    inside, in_place = nn.Sequential(whole), network()
    in_place[0].compile()

    @torch.compile
    def function(x: Tensor) -> Tensor:
        return x

    assert all(map(is_compiled, (whole, inside, in_place, function)))
    assert not any(map(is_compiled, (network(), lambda x: x)))


def test_steps_are_those_of_the_eager_model():
    torch.compiler.reset()
    results = []
    for compiles in (False, True):
        model = network()
        step: Any = torch.compile(model, backend="aot_eager") if compiles else model
        criterion = ELLELoss(0.1, 50.0, adaptive=True)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        torch.manual_seed(3)
        for _ in range(4):
            optimizer.zero_grad()
            criterion(step, X, Y).backward()
            optimizer.step()
        results.append([each.detach() for each in model.parameters()])
    for found, expected in zip(*results, strict=True):
        assert torch.equal(found, expected)
