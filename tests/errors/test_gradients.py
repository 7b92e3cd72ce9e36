"""Bad arguments of the public functions around an attack, and inference mode, are named."""

from __future__ import annotations

from functools import partial
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from elle_fast import ELLELoss, LocalLinearity, attacks, methods, regularizers
from elle_fast.functional import draw_seed, random_start
from tests.errors.cases import ATTACKS, MODEL, B, C, D, refused, x_and_y
from tests.helpers import Called, Smooth, built, probabilities, seed_of

GRADIENTS = [attacks.input_gradient, attacks.losses_and_gradient]
HUGE = 10**400


@pytest.mark.parametrize("call", GRADIENTS)
@pytest.mark.parametrize(
    "name, value, error, got",
    [
        ("x", None, TypeError, "None (NoneType)"),
        ("x", "x", TypeError, "'x' (str)"),
        ("x", torch.zeros(B, D, dtype=torch.int64), TypeError, "torch.int64"),
        ("target", None, TypeError, "None (NoneType)"),
        ("target", torch.zeros(B + 1, dtype=torch.int64), ValueError, "[5]"),
        ("model", None, TypeError, "None (NoneType)"),
        ("model", nn.Linear, TypeError, "Linear"),
        ("loss_fn", 7, TypeError, "7 (int)"),
        ("loss_fn", nn.CrossEntropyLoss, TypeError, "CrossEntropyLoss"),
        ("logits", "logits", TypeError, "'logits' (str)"),
        ("label_smoothing", 1.5, ValueError, "1.5"),
        ("label_smoothing", HUGE, ValueError, "1000"),
        ("label_smoothing", None, TypeError, "None (NoneType)"),
    ],
)
def test_gradients(call, name, value, error, got):
    x, y = x_and_y()
    refused(error, name, got, partial(call, **{"model": MODEL, "x": x, "target": y, name: value}))


def test_whether_a_graph_is_made():
    x, y = x_and_y()
    refused(TypeError, "create_graph", "None (NoneType)", attacks.losses_and_gradient, MODEL, x, y, create_graph=None)


@pytest.mark.parametrize("device, error", [(5, TypeError), (None, TypeError), ("gpu", ValueError), ("", ValueError)])
def test_the_device_of_a_seed(device, error):
    refused(error, "device", repr(device), draw_seed, device)


def test_a_device_by_its_name():
    assert draw_seed("cpu").device == torch.device("cpu")
    refused(TypeError, "generator", "7 (int)", draw_seed, "cpu", 7)
    refused(ValueError, "generator", "cpu", draw_seed, "meta", torch.Generator())


@pytest.mark.parametrize("attack", ATTACKS)
def test_attacks(attack):
    x, y = x_and_y()
    refused(TypeError, "generator", "7 (int)", attack, MODEL, x, y, 0.1, generator=7)
    refused(TypeError, "loss_fn", "CrossEntropyLoss", attack, MODEL, x, y, 0.1, loss_fn=nn.CrossEntropyLoss)
    refused(TypeError, "eps", "'0.1' (str)", attack, MODEL, x, y, "0.1")
    refused(ValueError, "eps", "1000", attack, MODEL, x, y, HUGE)


@pytest.mark.parametrize("name", ["steps", "restarts"])
def test_pgd_ends(name):
    x, y = x_and_y()
    for huge in (1_000_001, HUGE):
        refused(ValueError, name, "1000", attacks.pgd, MODEL, x, y, 0.1, **{name: huge})


def test_sparse_inputs():
    x, y = x_and_y()
    sparse = x.to_sparse()
    calls: list[Any] = [*(partial(each, eps=0.1) for each in ATTACKS), ELLELoss(0.1), LocalLinearity(0.1), *GRADIENTS]
    for call in calls:
        refused(ValueError, "x", "a tensor of shape [4, 5]", call, MODEL, sparse, y)
    refused(ValueError, "x", "a tensor of shape [4, 5]", random_start, sparse, 0.1, seed=seed_of(0))


def test_classes_that_are_no_functions():
    given: Any = nn.Linear
    refused(TypeError, "loss_fn", "Linear", ELLELoss, 0.1, loss_fn=given)
    refused(TypeError, "logits", "Linear", LocalLinearity, 0.1, logits=given)
    refused(TypeError, "layers", "Linear", methods.build, "slat", eps=0.1, layers=given)


@pytest.mark.parametrize("name", methods.NAMES)
def test_outputs_and_targets_of_methods(name):
    x, y = x_and_y()
    criterion = Called(built(name, eps=0.1))
    if not name.startswith("advmixup"):
        refused(ValueError, "target", "shape [4, 4]", criterion, Smooth(D, C), x, probabilities(B, C + 1).float())
    refused(TypeError, "model", "None (NoneType)", criterion, None, x, y)
    if name not in ("slat", "fuap"):
        with pytest.raises(TypeError, match=r"^model's output .*expected a floating-point tensor .*got"):
            criterion(lambda p: {"logits": p}, x, y)


@pytest.mark.parametrize("name", ["GAT", "NuAT", "AdvLC", "GradAlign", "CURE", "LLR"])
def test_models_of_regularizers(name):
    x, y = x_and_y()
    kind: Any = getattr(regularizers, name)
    regularizer = kind(0.1) if name in ("GradAlign", "LLR") else kind()
    refused(TypeError, "model", "None (NoneType)", regularizer, None, x, y, x)


# ---- Inference mode

NEED_GRADIENTS: dict[str, Any] = {
    **{f"attack-{i}": partial(attack, eps=0.1) for i, attack in enumerate(ATTACKS)},
    "ELLELoss": ELLELoss(0.1),
    "own attack": ELLELoss(0.1, attack=lambda model, x, y: x),
    "argmax": LocalLinearity(0.1, alpha="argmax"),
    **{
        name: methods.build(name, eps=0.1)
        for name in ("guided", "gat", "advlc", "slat", "cure")
        if name in methods.NAMES
    },
    "GradAlign": regularizers.GradAlign(0.1),
}


@pytest.mark.parametrize("name", NEED_GRADIENTS)
def test_inference_mode_is_named(name):
    x, y = x_and_y()
    with torch.inference_mode(), pytest.raises(RuntimeError, match=r"^torch\.inference_mode: expected to be outside"):
        NEED_GRADIENTS[name](Smooth(D, C), x, y)


def test_inference_mode_where_no_gradient_is_needed():
    x, y = x_and_y()
    with torch.inference_mode():
        assert LocalLinearity(0.1)(Smooth(D, C), x, y).isfinite()
        assert ELLELoss(0.1, attack="none")(Smooth(D, C), x, y).isfinite()


@pytest.mark.parametrize("name", NEED_GRADIENTS)
def test_a_batch_that_was_made_in_inference_mode(name):
    """Its tensors are plain values: they can be trained on, outside."""

    def run(x: Tensor, y: Tensor) -> Any:
        torch.manual_seed(1)
        result = NEED_GRADIENTS[name](Smooth(D, C), x, y)
        return result.detach()

    with torch.inference_mode():
        x, y = x_and_y()
    assert x.is_inference()
    # Class indices are saved for the backward pass, which torch refuses of such a tensor.
    assert torch.equal(run(x, y.clone()), run(x.clone(), y.clone()))
    assert F.one_hot(y.clone(), C).shape == (B, C)
