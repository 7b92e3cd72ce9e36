"""Models that are evaluated in low precision."""

import pytest
import torch
from torch import nn

from elle_fast.data import Split, at_a_time
from elle_fast.evaluation import evaluate, in_precision


def net():
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(1, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(144, 3))


@pytest.mark.parametrize("name, dtype", [("bf16", torch.bfloat16), ("fp16", torch.float16)])
def test_attacks_and_accuracies_go_through_autocast(name, dtype):
    model, seen, grads = net(), set(), set()
    model[0].register_forward_hook(lambda module, given, out: seen.add(out.dtype))
    model[3].register_full_backward_hook(lambda module, given, out: grads.add(out[0].dtype))
    x, y = torch.rand(6, 1, 8, 8), torch.arange(6) % 3
    found = evaluate(in_precision(model, name), [(x, y)], "clean,pgd-2", eps=0.1)
    assert seen == grads == {dtype}
    assert {weight.dtype for weight in model.parameters()} == {torch.float32}
    assert model.training
    with torch.autocast("cpu", dtype):
        right = (model(x).argmax(dim=1) == y).double().mean().item()
    assert found["clean"]["accuracy"] == right
    assert in_precision(model, name)(x).dtype == torch.float32


def test_fp32_is_the_model_itself_and_other_names_are_refused():
    model = net()
    assert in_precision(model, "fp32") is model
    with pytest.raises(ValueError, match="precision: expected one of 'fp32', 'fp16', 'bf16', got 'fp8'"):
        in_precision(model, "fp8")


@pytest.mark.parametrize("side, count", [(8, 4096), (32, 1024), (64, 256), (224, 64)])
def test_batches_fill_the_device(side, count):
    images, labels = torch.zeros(2, 3, side, side, dtype=torch.uint8), torch.zeros(2, dtype=torch.int64)
    assert at_a_time(Split(images, labels)) == 256
    assert at_a_time(Split(images, labels).to("meta")) == count
