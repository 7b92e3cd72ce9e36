"""What decides whether a call goes through the operator: every tensor of it, whichever argument that is."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from elle_fast import AdaptiveLambda
from elle_fast.functional import elle_loss, pack_points
from elle_fast.ops import dispatch
from tests.helpers import labels, random, seed_of

B, C, D = 4, 3, 5


def fake(tensor: Tensor) -> Tensor:
    made: Tensor = FakeTensorMode().from_tensor(tensor)
    return made


def loss_call(**changed: Any) -> Any:
    arguments = {"logits": random(4 * B, C, seed=0), "target": labels(B, C), "alpha": random(B, seed=1)}
    return elle_loss(**{**arguments, "lam": torch.tensor(4.0), **changed}, backend="cpp")


def pack_call(**changed: Any) -> Any:
    x = random(B, D, seed=0)
    return pack_points(**{"x": x, "grad": x, "eps": 0.1, "seed": seed_of(0), **changed}, backend="cpp")


@pytest.mark.parametrize(
    "call, name, value",
    [
        (loss_call, "logits", random(4 * B, C, seed=0)),
        (loss_call, "target", labels(B, C)),
        (loss_call, "alpha", random(B, seed=1)),
        (loss_call, "lam", torch.tensor(4.0)),
        (pack_call, "x", random(B, D, seed=0)),
        (pack_call, "grad", random(B, D, seed=0)),
        (pack_call, "seed", seed_of(0)),
        (pack_call, "alpha", random(B, seed=1)),
    ],
)
def test_a_fake_tensor_is_not_read(call, name, value):
    """It has no memory: a kernel would read address 0, or take it for an argument that is not there."""
    call(**{name: value})
    with pytest.raises(Exception, match=r"[Ff]ake"):
        call(**{name: fake(value)})


def test_a_fake_state_or_out_is_not_written():
    controller = AdaptiveLambda(4.0)
    state = controller.state(torch.device("cpu"))
    assert dispatch.eager(seed_of(0), "cpp", state, controller.numbers)
    assert not dispatch.eager(seed_of(0), "cpp", [*state[:-1], fake(state[-1])], controller.numbers)
    controller.mean = fake(controller.mean)
    with pytest.raises(Exception, match=r"[Ff]ake"):
        loss_call(lam=controller)
    with pytest.raises(Exception, match=r"[Ff]ake"):
        pack_call(out=(torch.empty(4 * B, D), fake(torch.empty(B))))
