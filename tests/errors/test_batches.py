"""A bad batch is refused before the model runs, by an error that names the argument and what was got."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from elle_fast import ELLELoss, LocalLinearity, attacks
from elle_fast.functional import elle_loss, local_linearity, pack_points, random_start
from tests.errors.cases import ATTACKS, MODEL, B, C, D, inference_free, refused, x_and_y
from tests.helpers import Smooth, labels, probabilities, random, seed_of


def each_call(x: Any, y: Any, **options: Any) -> list[Callable[[], Any]]:
    """Everything that takes a model and a batch."""
    model = options.pop("model", MODEL)
    calls: list[Callable[[], Any]] = []
    for criterion_options in ({}, {"attack": "n-fgsm"}, {"attack": "none"}, {"adaptive": True}, {"norm": "l2"}):
        calls.append(lambda o=criterion_options: ELLELoss(0.1, **o)(model, x, y))  # type: ignore[misc]
    calls.append(lambda: LocalLinearity(0.1)(model, x, y))
    calls.append(lambda: LocalLinearity(0.1, alpha="argmax")(model, x, y))
    for attack in ATTACKS:
        calls.append(lambda a=attack: a(model, x, y, 0.1))  # type: ignore[misc]
    return calls


BAD_X: list[tuple[Any, type[Exception], str]] = [
    (torch.zeros(B, D, dtype=torch.int64), TypeError, "a tensor of shape [4, 5], torch.int64, on cpu"),
    (torch.zeros(B, D, dtype=torch.uint8), TypeError, "torch.uint8"),
    (torch.zeros(B, D, dtype=torch.complex64), TypeError, "torch.complex64"),
    ([[0.0] * D] * B, TypeError, "(list)"),
    (None, TypeError, "None (NoneType)"),
    (torch.zeros(B, D).to_sparse(), ValueError, "shape [4, 5], torch.float32, torch.sparse_coo, on cpu"),
    (torch.zeros(0, D), ValueError, "shape [0, 5]"),
    (torch.zeros(()), ValueError, "shape []"),
    (torch.zeros(B, 0), ValueError, "shape [4, 0]"),
    (torch.zeros(B, 3, 0, 2), ValueError, "shape [4, 3, 0, 2]"),
    (inference_free(B, D), ValueError, "not require grad; pass x.detach()"),
]


@pytest.mark.parametrize("x, error, got", BAD_X)
def test_x(x, error, got):
    _, y = x_and_y()
    for call in each_call(x, y):
        refused(error, "x", got, call)
    refused(error, "x", got, pack_points, x, None, 0.1, seed=seed_of(0))
    refused(error, "x", got, random_start, x, 0.1, seed=seed_of(0))


BAD_TARGETS: list[tuple[Any, type[Exception], str]] = [
    (torch.zeros(B), TypeError, "a tensor of shape [4], torch.float32, on cpu"),
    (torch.zeros(B, dtype=torch.int32), TypeError, "torch.int32"),
    (torch.zeros(B, dtype=torch.bool), TypeError, "torch.bool"),
    (torch.zeros(B, C, dtype=torch.int64), TypeError, "shape [4, 3], torch.int64"),
    ([0] * B, TypeError, "[0, 0, 0, 0] (list)"),
    (None, TypeError, "None (NoneType)"),
    (torch.zeros(B + 1, dtype=torch.int64), ValueError, "shape [5]"),
    (torch.zeros(B - 1, C), ValueError, "shape [3, 3]"),
    (torch.zeros((), dtype=torch.int64), ValueError, "shape []"),
    (torch.zeros(B, C, 2), ValueError, "shape [4, 3, 2]"),
    (torch.zeros(B, dtype=torch.int64, device="meta"), ValueError, "on meta"),
    (torch.zeros(B, C, device="meta"), ValueError, "on meta"),
]


@pytest.mark.parametrize("target, error, got", BAD_TARGETS)
def test_target(target, error, got):
    x, _ = x_and_y()
    for call in each_call(x, target):
        refused(error, "target", got, call)
    logits, alpha = torch.zeros(4 * B, C), torch.zeros(B)
    if isinstance(target, Tensor) and target.dim() and target.shape[0] != B and target.device.type == "cpu":
        return  # elle_loss learns B from the target; see test_shapes_of_elle_loss
    refused(error, "target", got, elle_loss, logits, target, alpha, 1.0)
    refused(error, "target", got, local_linearity, logits[B:], target, alpha)


def test_target_with_a_loss_of_ones_own():
    x, _ = x_and_y()

    def loss_fn(output: Any, target: Any) -> Any:
        raise AssertionError("called before the target was checked")

    for cls in (ELLELoss, LocalLinearity):
        for target, got in (([1] * B, "[1, 1, 1, 1] (list)"), (torch.zeros(B + 1), "[5]"), (torch.zeros(()), "[]")):
            refused(ValueError, "target", got, cls(0.1, loss_fn=loss_fn), MODEL, x, target)


@pytest.mark.parametrize("label", [C, C + 7, -1, -100])
@pytest.mark.parametrize("label_smoothing", [0.0, 0.1])
def test_labels_out_of_range(label, label_smoothing):
    x, y = x_and_y()
    y[1] = label
    model = Smooth(D, C)
    for call in each_call(x, y, model=model):
        refused(ValueError, "target", str(label), call)
    options: dict[str, Any] = {"label_smoothing": label_smoothing}
    refused(ValueError, "target", str(label), ELLELoss(0.1, **options), model, x, y)
    logits, alpha = torch.zeros(4 * B, C), torch.zeros(B)
    refused(ValueError, "target", str(label), elle_loss, logits, y, alpha, 1.0, **options)
    refused(ValueError, "target", str(label), local_linearity, logits[B:], y, alpha, **options)


def test_probabilities_of_another_number_of_classes():
    x, _ = x_and_y()
    for call in each_call(x, probabilities(B, C + 1, dtype=torch.float32), model=Smooth(D, C)):
        refused(ValueError, "target", "shape [4, 4]", call)


def test_input_on_another_device():
    x, y = x_and_y()
    for call in each_call(x.to("meta"), y):
        refused(ValueError, "target", "on cpu", call)
    refused(ValueError, "seed", "on cpu", pack_points, x.to("meta"), None, 0.1, seed=seed_of(0))
    refused(ValueError, "grad", "on meta", pack_points, x, x.to("meta"), 0.1, seed=seed_of(0))


@pytest.mark.parametrize(
    "x_adv, error, got",
    [
        (torch.zeros(B, D + 1), ValueError, "shape [4, 6]"),
        (torch.zeros(B + 1, D), ValueError, "shape [5, 5]"),
        (torch.zeros(B, D, device="meta"), ValueError, "on meta"),
        (torch.zeros(B, D, dtype=torch.int64), TypeError, "torch.int64"),
        (inference_free(B, D), ValueError, "not require grad; pass x_adv.detach()"),
        (3.0, TypeError, "3.0 (float)"),
    ],
)
def test_x_adv(x_adv, error, got):
    x, y = x_and_y()
    refused(error, "x_adv", got, ELLELoss(0.1), MODEL, x, y, x_adv)
    refused(error, "x_adv", got, LocalLinearity(0.1, points="elle-2p"), MODEL, x, y, x_adv)
    refused(error, "x_adv", got, pack_points, x, None, 0.1, seed=seed_of(0), x_adv=x_adv)


def test_missing_x_adv():
    x, y = x_and_y()
    refused(ValueError, "x_adv", "None", LocalLinearity(0.1, points="elle-2p"), MODEL, x, y)
    refused(ValueError, "x_adv", "neither", pack_points, x, None, 0.1, seed=seed_of(0), points="elle-2p")


@pytest.mark.parametrize("made, error, got", [(None, TypeError, "None"), (torch.zeros(B, 2), ValueError, "[4, 2]")])
def test_what_an_attack_of_ones_own_returns(made, error, got):
    x, y = x_and_y()
    refused(error, "attack's x_adv", got, ELLELoss(0.1, attack=lambda m, x, y: made), MODEL, x, y)


def test_channels_and_memory_format():
    x, y = random(B, 4, 2, 2, seed=3), labels(B, C)
    for cls in (ELLELoss, LocalLinearity):
        refused(ValueError, "mean", "3 numbers", cls(0.1, mean=[0.5] * 3, std=[1.0] * 3), MODEL, x, y)
        # One channel broadcasts to three, silently.
        refused(ValueError, "std", "3 numbers", cls(0.1, mean=[0.5] * 3, std=[1.0] * 3), MODEL, x[:, :1], y)
        refused(ValueError, "mean", "1 numbers", cls(0.1, mean=[0.5], std=[1.0]), MODEL, x[:, 0, 0, 0], y)
        flat = x.flatten(1)
        refused(ValueError, "memory_format", "[4, 16]", cls(0.1, memory_format=torch.channels_last), MODEL, flat, y)
        refused(
            ValueError, "memory_format", "[4, 4, 2, 2]", cls(0.1, memory_format=torch.channels_last_3d), MODEL, x, y
        )


@pytest.mark.parametrize(
    "attack, name, value, error, got",
    [
        (attacks.rs_fgsm, "step_size", -1.0, ValueError, "-1.0"),
        (attacks.n_fgsm, "step_size", "big", TypeError, "'big' (str)"),
        (attacks.zero_grad, "step_size", math.nan, ValueError, "nan"),
        (attacks.zero_grad, "quantile", 1.5, ValueError, "1.5"),
        (attacks.zero_grad, "quantile", "0.3", TypeError, "'0.3' (str)"),
        (attacks.pgd, "step_size", -1.0, ValueError, "-1.0"),
        (attacks.pgd, "steps", 0, ValueError, "0"),
        (attacks.pgd, "steps", 1.0, TypeError, "1.0 (float)"),
        (attacks.pgd, "restarts", 0, ValueError, "0"),
        (attacks.pgd, "restarts", True, TypeError, "True (bool)"),
        (attacks.fgsm, "bounds", (1, 0), ValueError, "(1, 0)"),
        (attacks.pgd, "bounds", 1, TypeError, "1 (int)"),
        (attacks.rs_fgsm, "generator", 7, TypeError, "7 (int)"),
        (attacks.pgd, "generator", "cpu", TypeError, "'cpu' (str)"),
        (attacks.pgd, "loss_fn", 7, TypeError, "7 (int)"),
        (attacks.fgsm, "loss_fn", "ce", TypeError, "'ce' (str)"),
    ],
)
def test_options_of_the_attacks(attack, name, value, error, got):
    x, y = x_and_y()
    refused(error, name, got, attack, MODEL, x, y, 0.1, **{name: value})


def test_x_adv_that_is_not_looked_at():
    x, y = x_and_y()
    refused(TypeError, "x_adv", "3 (int)", LocalLinearity(0.1), MODEL, x, y, 3)


def test_layouts_that_are_not_dense():
    x, y = x_and_y()
    soft = probabilities(B, C, dtype=torch.float32).to_sparse()
    refused(ValueError, "target", "torch.sparse_coo, on cpu", ELLELoss(0.1), MODEL, x, soft)
    refused(
        ValueError,
        "logits",
        "torch.sparse_coo, on cpu",
        elle_loss,
        torch.ones(4 * B, C).to_sparse(),
        y,
        torch.ones(B),
        1,
    )
    refused(ValueError, "grad", "torch.sparse_coo, on cpu", pack_points, x, x.to_sparse(), 0.1, seed=seed_of(0))


class Unprintable:
    def __repr__(self) -> str:
        raise OSError("no")


def test_a_value_that_cannot_be_printed():
    refused(TypeError, "eps", "something that cannot be printed (Unprintable)", ELLELoss, Unprintable())
