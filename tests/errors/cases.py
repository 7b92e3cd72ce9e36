"""Shared by the tests of bad input: a batch, and the form of a message."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import pytest
from torch import Tensor

from elle_fast import attacks
from tests.helpers import MustNotBeCalled, labels, random

B, C, D = 4, 3, 5
MODEL = MustNotBeCalled()
ATTACKS: list[Callable[..., Tensor]] = [
    attacks.fgsm,
    attacks.rs_fgsm,
    attacks.n_fgsm,
    attacks.zero_grad,
    attacks.pgd,
]


def x_and_y() -> tuple[Tensor, Tensor]:
    return random(B, D, seed=1), labels(B, C)


def refused(error: type[Exception], name: str, got: str, call: Callable[..., Any], *args: Any, **kwargs: Any) -> None:
    """The message begins with the argument's name, says what was expected or must be, and what was got."""
    with pytest.raises(error) as caught:
        call(*args, **kwargs)
    assert type(caught.value) is error
    message = str(caught.value)
    head, said = message.split(": ", 1)
    assert name in head.split(", ") or head == name, message
    forms = rf".*expected .*got .*{re.escape(got)}|must {re.escape(got)}|.*\(got .*{re.escape(got)}"
    assert re.match(forms, said, flags=re.DOTALL), message


def inference_free(*shape: int) -> Tensor:
    return random(*shape, seed=2).requires_grad_()
