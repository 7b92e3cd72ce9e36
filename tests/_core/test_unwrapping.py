"""Wrappers in any nesting: one forward pass of a step goes through them, the others around DistributedDataParallel."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.nn.parallel import DataParallel, DistributedDataParallel
from torch.optim.swa_utils import AveragedModel

from elle_fast import ELLELoss, LocalLinearity, attacks, methods
from elle_fast._core.unwrapping import unwrapped
from tests.helpers import Called, Smooth, built, labels, random, rng

pytestmark = [
    pytest.mark.skipif(not dist.is_available(), reason="torch was built without torch.distributed"),
    # elle_fast.recompute finds the modules inside DistributedDataParallel by a hook.
    pytest.mark.filterwarnings("ignore:Using `torch.compile.module.` when there are global hooks:UserWarning"),
]
EPS = 0.05
ATTACKS: list[Callable[..., Tensor]] = [*attacks.SINGLE_STEP.values(), attacks.pgd]


class Precision:
    """bf16-mixed, as lightning_fabric.plugins.precision.MixedPrecision does it."""

    def forward_context(self) -> AbstractContextManager[Any]:
        return torch.autocast("cpu", dtype=torch.bfloat16)

    def convert_input(self, data: Any) -> Any:
        (x,), kwargs = data
        return (x.bfloat16(),), kwargs

    def convert_output(self, data: Tensor) -> Tensor:
        return data.float()


class Strategy:
    precision = Precision()


class FabricModule(nn.Module):
    """As lightning_fabric.wrappers._FabricModule, which wants fabric.backward(loss) for the loss' backward pass."""

    in_backward = False

    def __init__(self, forward_module: nn.Module, original_module: nn.Module) -> None:
        super().__init__()
        self._forward_module, self._original_module, self._strategy = forward_module, original_module, Strategy()

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        precision = self._strategy.precision
        args, kwargs = precision.convert_input((args, kwargs))
        with precision.forward_context():
            output = self._forward_module(*args, **kwargs)
        output = precision.convert_output(output)
        if output.requires_grad:
            output.register_hook(self._hook)
        return output

    def _hook(self, _: Tensor) -> None:
        if not FabricModule.in_backward:
            raise RuntimeError("call fabric.backward(loss) instead of loss.backward()")


def backward(loss: Tensor) -> None:
    FabricModule.in_backward = True
    try:
        loss.backward()
    finally:
        FabricModule.in_backward = False


compiled_calls: list[int] = []


def counting(graph: torch.fx.GraphModule, inputs: Any) -> Callable[..., Any]:
    """A compiler that counts the calls of what it has compiled."""

    def call(*args: Any) -> Any:
        result = graph.forward(*args)
        compiled_calls.append(result[0].shape[0])
        return result

    return call


WRAP: dict[str, Callable[..., Any]] = {
    "ddp": DistributedDataParallel,
    "compile": partial(torch.compile, backend=counting, dynamic=False),
    "fabric": lambda inner: FabricModule(inner, inner),
    "ema": AveragedModel,
    "data-parallel": DataParallel,
}
WITH_DDP = ["ddp", "compile ddp", "ddp compile", "fabric ddp", "fabric compile ddp", "compile fabric ddp"]
WITH_DDP += ["ema ddp", "fabric ema compile ddp"]
ALL = [*WITH_DDP, "", "compile", "fabric", "ema", "data-parallel", "fabric ema", "ema compile", "fabric data-parallel"]


@pytest.fixture(autouse=True)
def process_group(tmp_path: Path) -> Iterator[None]:
    store = dist.FileStore(str(tmp_path / "store"), 1)  # type: ignore[attr-defined]
    dist.init_process_group("gloo", store=store, rank=0, world_size=1)
    compiled_calls.clear()
    torch._dynamo.reset()
    try:
        yield
    finally:
        dist.destroy_process_group()


def wrapped(nesting: str) -> nn.Module:
    """The outermost wrapper is named first."""
    model: nn.Module = Smooth(5, 3)
    for name in reversed(nesting.split()):
        model = WRAP[name](model)
    return model


def batch() -> tuple[Tensor, Tensor]:
    return random(4, 5, seed=1), labels(4, 3)


def passes(model: nn.Module) -> list[int]:
    """Gets the rows of each forward pass through DistributedDataParallel."""
    found: list[int] = []
    for module in model.modules():
        if isinstance(module, DistributedDataParallel):
            module.register_forward_pre_hook(lambda module, args: found.append(args[0].shape[0]))
    return found


@pytest.mark.parametrize("nesting", ALL)
def test_what_is_inside_computes_the_same_and_has_an_input_gradient(nesting):
    model, (x, y) = wrapped(nesting), batch()
    inner = unwrapped(model)
    assert isinstance(inner, nn.Module)
    assert not any(isinstance(module, DistributedDataParallel) for module in inner.modules())
    assert torch.equal(inner(x), model(x))
    plain = Smooth(5, 3)
    grad, expected = attacks.input_gradient(inner, x, y), attacks.input_gradient(plain, x, y)
    # In bfloat16: a few roundings of 2^-8 each of terms that sum up to the gradient's size.
    torch.testing.assert_close(grad, expected, rtol=0.05, atol=0.02 * expected.abs().max().item())
    assert inner.training
    assert not unwrapped(model.eval()).training  # type: ignore[attr-defined]


@pytest.mark.parametrize("nesting", [name for name in ALL if "ddp" not in name and "fabric" not in name])
def test_a_model_that_nothing_has_to_be_taken_out_of_is_itself(nesting):
    model = wrapped(nesting)
    assert unwrapped(model) is model


def test_sharded_models_and_functions_are_themselves():
    """FSDP's hooks gather the weights: each forward pass goes through it."""
    model = Smooth(5, 3)
    fully_shard(model)
    assert isinstance(model, FSDPModule)
    assert unwrapped(model) is model
    function = lambda points: points  # noqa: E731
    assert unwrapped(function) is function


@pytest.mark.parametrize("nesting", WITH_DDP)
@pytest.mark.parametrize("forward", ["packed", "split", "checkpoint"])
def test_one_pass_of_a_step_goes_through_ddp(nesting, forward):
    model, (x, y) = wrapped(nesting), batch()
    found = passes(model)
    criterion = ELLELoss(EPS, 10.0, forward=forward, generator=rng(1))
    backward(criterion(model, x, y))
    assert found == [16 if forward == "packed" else 4]
    assert all(p.grad is not None for p in model.parameters() if p.requires_grad)


@pytest.mark.parametrize("nesting", ["ddp", "fabric ddp"])
@pytest.mark.parametrize("name", [name for name in methods.NAMES if name != "slat"])
def test_one_pass_of_a_step_of_each_method_goes_through_ddp(nesting, name):
    model, (x, y) = wrapped(nesting), batch()
    found = passes(model)
    backward(Called(built(name, eps=EPS))(model, x, y))
    assert len(found) == 1


@pytest.mark.parametrize("nesting", ["ddp", "compile ddp", "fabric ddp", "ema ddp", "data-parallel"])
def test_attacks_and_e_lin_go_around_ddp(nesting):
    """Each pass through it would bring the first process' buffers, which an evaluation by one process waits for."""
    model, (x, y) = wrapped(nesting), batch()
    found = passes(model)
    for attack in (attacks.fgsm, attacks.rs_fgsm, partial(attacks.pgd, restarts=2, steps=2)):
        attack(model, x, y, EPS)
    attacks.input_gradient(model, x, y)
    LocalLinearity(EPS)(model, x, y)
    assert found == []


def test_what_is_inside_is_compiled_with_the_same_options():
    model, (x, y) = wrapped("compile ddp"), batch()
    criterion = ELLELoss(EPS, 10.0, forward="split")
    criterion(model, x, y).backward()
    assert compiled_calls == [4, 4, 12]  # the attack, x_adv, the triplets
    first = unwrapped(model)
    assert unwrapped(model) is first  # a new one each time would be compiled each time


@pytest.mark.parametrize("nesting", ["fabric", "fabric ddp"])
def test_the_precision_of_fabric_is_that_of_each_pass(nesting):
    model, (x, y) = wrapped(nesting), batch()
    seen: list[torch.dtype] = []
    inside = next(module for module in model.modules() if isinstance(module, Smooth))
    inside.last.register_forward_hook(lambda module, args, output: seen.append(output.dtype))
    criterion = ELLELoss(EPS, 10.0, forward="split")
    with pytest.raises(RuntimeError, match=r"call fabric\.backward"):
        criterion(model, x, y).backward()  # the loss is still Fabric's
    assert seen == [torch.bfloat16] * 3
    assert criterion.output is not None
    assert criterion.output.dtype == torch.float32


@pytest.mark.parametrize("bad, got", [(None, r"None \(NoneType\)"), ("net", r"'net' \(str\)"), (nn.Linear, "Linear")])
def test_what_is_no_model(bad, got):
    x, y = batch()
    calls: list[Any] = [ELLELoss(EPS), LocalLinearity(EPS)]
    calls += [partial(each, eps=EPS) for each in ATTACKS]
    calls += [attacks.input_gradient, attacks.losses_and_gradient, methods.build("trades-single", eps=EPS)]
    for call in calls:
        with pytest.raises(TypeError, match=f"^model: expected .*got .*{got}"):
            call(bad, x, y)
