"""What a model or a loss returns is refused where it cannot be used."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from elle_fast import ELLELoss, LocalLinearity, attacks, methods
from tests.errors.cases import ATTACKS, B, C, D, refused, x_and_y
from tests.helpers import Called, built, probabilities


def returning(output: Callable[[Tensor], Any]) -> Callable[[Tensor], Any]:
    return output


BAD_OUTPUTS: list[tuple[Callable[[Tensor], Any], type[Exception], str]] = [
    (lambda p: p[:, :, None], ValueError, "shape [4, 5, 1]"),
    (lambda p: p.sum(dim=1), ValueError, "shape [4]"),
    (lambda p: p[:-1], ValueError, "shape [3, 5]"),
    (lambda p: p[:, :0], ValueError, "shape [4, 0]"),
    (lambda p: {"logits": p}, TypeError, "1 items, tensors among them (dict)"),
    (lambda p: (p, p), TypeError, "2 items, tensors among them (tuple)"),
    (lambda p: p.long(), TypeError, "torch.int64"),
]


@pytest.mark.parametrize("output, error, got", BAD_OUTPUTS)
def test_output_of_the_model(output, error, got):
    x, y = x_and_y()
    name = "model's output (ELLELoss picks it out of another type with logits=)"
    choices: list[dict[str, Any]] = [{}, {"attack": "n-fgsm"}]
    for options in choices:
        refused(error, name, got, ELLELoss(0.1, **options), output, x, y)
    for attack in ATTACKS:
        refused(error, name, got, attack, output, x, y, 0.1)
    # Without an attack the first call has the packed rows.
    more = got.replace("[4", "[16").replace("[3, 5]", "[15, 5]")
    refused(error, name, more, ELLELoss(0.1, attack="none"), output, x, y)
    more = got.replace("[4", "[12").replace("[3, 5]", "[11, 5]")
    refused(error, name, more, LocalLinearity(0.1), output, x, y)


@pytest.mark.parametrize(
    "loss_fn, error, got",
    [
        (lambda o, t: o.sum(), ValueError, "shape []"),
        (lambda o, t: o, ValueError, "5]"),
        (lambda o, t: o.sum(dim=1)[:-1], ValueError, "shape ["),
        (lambda o, t: o.sum(dim=1).long(), TypeError, "torch.int64"),
        (lambda o, t: 1.0, TypeError, "1.0 (float)"),
    ],
)
def test_output_of_a_loss_of_ones_own(loss_fn, error, got):
    x, y = x_and_y()
    choices: list[dict[str, Any]] = [{}, {"attack": "none"}]
    for options in choices:
        refused(error, "loss_fn", got, ELLELoss(0.1, loss_fn=loss_fn, **options), lambda p: p, x, y)
    refused(error, "loss_fn", got, LocalLinearity(0.1, loss_fn=loss_fn), lambda p: p, x, y)
    for attack in ATTACKS:
        refused(error, "loss_fn", got, attack, lambda p: p, x, y, 0.1, loss_fn=loss_fn)


def test_a_model_without_a_graph():
    x, y = x_and_y()
    for call in [lambda: ELLELoss(0.1)(lambda p: p.detach(), x, y), lambda: attacks.pgd(lambda p: p.detach(), x, y, 1)]:
        with pytest.raises(RuntimeError, match=r"^model: expected an output that depends differentiably on x, got one"):
            call()


@pytest.mark.parametrize("name", [name for name in methods.NAMES if "mixup" not in name])
def test_targets_that_do_not_fit_the_output_in_every_method(name):
    """Another number of classes, and labels out of range, of which torch would leave out -100 in silence."""
    x, y = x_and_y()
    model = nn.Sequential(nn.Linear(D, D), nn.Linear(D, C))
    refused(
        ValueError,
        "target",
        "[4, 5]",
        Called(built(name, eps=0.1)),
        model,
        x,
        probabilities(B, C + 2, dtype=torch.float32),
    )
    for label in (C, -1, -100):
        with pytest.raises(ValueError, match=rf"^target: expected class indices in \[0, {C}\), got .*{label}"):
            Called(built(name, eps=0.1))(model, x, torch.full_like(y, label))
    odd = nn.Sequential(model, nn.Unflatten(1, (1, C)))
    with pytest.raises(ValueError, match=r"^model's output .*: expected a floating-point tensor of shape "):
        Called(built(name, eps=0.1))(odd, x, y)
