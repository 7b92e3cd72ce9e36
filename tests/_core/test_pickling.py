"""Criteria are pickled with functions that have a name; one that has none is refused by the name of its argument."""

from __future__ import annotations

import copy
import io
import pickle
from collections.abc import Callable
from functools import partial
from operator import attrgetter, itemgetter
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from elle_fast import ELLELoss, LocalLinearity, methods
from elle_fast.methods.adversarial import AdversarialLoss
from tests.helpers import Smooth, labels, random, rng

EPS = 0.1


class Dict(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.net = Smooth(5, 3)

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        return {"logits": self.net(x)}


def losses(output: Any, target: Tensor) -> Tensor:
    return F.cross_entropy(output["logits"], target, reduction="none")


def attack(model: Any, x: Tensor, target: Tensor, *_: Any, sign: float = 1.0, **__: Any) -> Tensor:
    return x + EPS * sign


def reloaded(value: Any) -> Any:
    file = io.BytesIO()
    torch.save(value, file)
    file.seek(0)
    assert type(pickle.loads(pickle.dumps(value))) is type(value)
    return torch.load(file, weights_only=False)


GOOD: dict[str, Callable[[], Any]] = {
    "itemgetter": lambda: ELLELoss(EPS, logits=itemgetter("logits"), adaptive=True),
    "loss_fn": lambda: ELLELoss(EPS, loss_fn=losses),
    "attack": lambda: ELLELoss(EPS, attack=partial(attack, sign=-1.0), logits=itemgetter("logits")),
    "linearity": lambda: LocalLinearity(EPS, logits=itemgetter("logits")),
}


@pytest.mark.parametrize("name", GOOD)
def test_a_function_with_a_name_is_pickled(name):
    x, y = random(4, 5, seed=1), labels(4, 3)
    criterion, model = GOOD[name](), Dict()
    found = []
    for each in (criterion, reloaded(criterion), copy.deepcopy(criterion), copy.copy(criterion)):
        torch.manual_seed(1)
        found.append(each(model, x, y).item())
    assert len(set(found)) == 1


BAD: list[tuple[str, Callable[[Any], Any]]] = [
    ("logits", lambda f: ELLELoss(EPS, logits=f)),
    ("logits", lambda f: LocalLinearity(EPS, logits=f)),
    ("logits", lambda f: ELLELoss(EPS, logits=partial(f, key=1))),
    ("loss_fn", lambda f: ELLELoss(EPS, loss_fn=f)),
    ("attack", lambda f: ELLELoss(EPS, attack=f)),
    ("attack", lambda f: AdversarialLoss(f, EPS)),
    ("layers", lambda f: methods.build("slat", eps=EPS, layers=f)),
]


@pytest.mark.parametrize("name, make", BAD)
def test_a_function_without_a_name_is_named_by_its_argument(name, make):
    def inner(*args: Any, key: int = 0) -> Any:
        return args

    for function, got in ((lambda *args: args, "<lambda>"), (inner, "inner")):
        criterion = make(function)
        for dump in (pickle.dumps, partial(torch.save, f=io.BytesIO())):
            with pytest.raises(pickle.PicklingError, match=rf"^{name}: expected .* pickled, got .*{got}.*itemgetter"):
                dump(criterion)
        # A copy is not pickled.
        for other in (copy.deepcopy(criterion), copy.copy(criterion)):
            kept = getattr(getattr(other, "linearity", other), name, None) or getattr(other, name)
            assert getattr(kept, "func", kept) is function


def test_ways_without_a_lambda():
    """As the message has them."""
    x, y = random(4, 5, seed=1), labels(4, 3)
    losses = [
        ELLELoss(EPS, logits=pick, generator=rng(1))(Dict(), x, y).item()
        for pick in (itemgetter("logits"), lambda out: out["logits"])
    ]
    assert losses[0] == losses[1]
    assert attrgetter("real")(1) == 1
