"""Methods that use a forward pass for the attack and for the loss, on compiled models."""

import pytest
import torch
from torch import nn

from elle_fast import ELLELoss
from tests.helpers import about, labels, random
from tests.methods.cases import CLASSES, EPS, FEATURES, build

# Those with a first pass of another kind are among them; `argmax` differentiates E_lin's pass in its points.
NAMES = ["pgi", "uap", "liet", "advlc", "elle with argmax before uap"]


def net():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(FEATURES, 16), nn.Tanh(), nn.Linear(16, CLASSES))


@pytest.fixture(autouse=True)
def nothing_compiled_before():
    torch.compiler.reset()
    yield
    torch.compiler.reset()


@pytest.mark.parametrize("name", NAMES)
def test_batches_of_another_size(name):
    """For those torch compiles the forward and the backward pass at once, and would let the latter take the memory."""
    found = []
    for compiles in (False, True):
        model = net()
        called = torch.compile(model, backend="aot_eager") if compiles else model
        criteria = [build(name.split()[-1])]
        if "argmax" in name:
            criteria.insert(0, ELLELoss(EPS, 1.0, alpha="argmax", backend="reference"))
        for i, size in enumerate((8, 8, 5, 5, 8)):
            x, y = random(size, FEATURES, seed=i), labels(size, CLASSES)
            torch.manual_seed(i)
            for criterion in criteria:
                criterion(called, x, y, **about(criterion, x)).backward()
        found.append([parameter.grad for parameter in model.parameters()])
    for one, other in zip(*found, strict=True):
        torch.testing.assert_close(one, other)


def test_a_model_that_was_compiled_for_one_backward_pass_is_refused():
    config = pytest.importorskip("torch._functorch.config")
    if not hasattr(config, "donated_buffer"):
        pytest.skip("this torch keeps what backward passes read")
    for kept in (True, False):
        torch.compiler.reset()
        model = torch.compile(net(), backend="aot_eager")
        with config.patch(donated_buffer=kept):
            for size in (8, 5):
                x = random(size, FEATURES, seed=0).requires_grad_()
                model(x).logsumexp(dim=1).sum().backward()
        x, y = random(5, FEATURES, seed=1), labels(5, CLASSES)
        if kept:
            with pytest.raises(RuntimeError, match=r"^model: expected a compiled model whose backward pass can be"):
                build("uap")(model, x, y)
        else:
            build("uap")(model, x, y).backward()
