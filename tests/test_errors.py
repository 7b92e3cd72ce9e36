"""Bad input is refused at the call, before the model runs, by an error that names the argument and what was got."""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from elle_fast import AdaptiveLambda, ELLELoss, LocalLinearity, attacks, backends
from elle_fast.functional import draw_seed, elle_loss, local_linearity, pack_points, random_start
from tests.helpers import MustNotBeCalled, Smooth, labels, probabilities, random, rng, seed_of

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


# ---- Options

NUMBERS = [
    (-0.5, ValueError, "-0.5"),
    (math.nan, ValueError, "nan"),
    (math.inf, ValueError, "inf"),
    ("8/255", TypeError, "'8/255' (str)"),
    (True, TypeError, "True (bool)"),
    (None, TypeError, "None (NoneType)"),
    (1j, TypeError, "1j (complex)"),
    ([0.1], TypeError, "[0.1] (list)"),
    (torch.tensor(0.1), TypeError, "a tensor of shape [], torch.float32, on cpu"),
]


@pytest.mark.parametrize("value, error, got", NUMBERS, ids=str)
def test_eps(value, error, got):
    x, y = x_and_y()
    refused(error, "eps", got, ELLELoss, value)
    refused(error, "eps", got, LocalLinearity, value)
    refused(error, "eps", got, ELLELoss.preset, "cifar10", value)
    refused(error, "eps", got, pack_points, x, None, value, seed=seed_of(0))
    refused(error, "eps", got, random_start, x, value, seed=seed_of(0))
    for attack in ATTACKS:
        refused(error, "eps", got, attack, MODEL, x, y, value)


@pytest.mark.parametrize("value, error, got", NUMBERS, ids=str)
def test_lam(value, error, got):
    refused(error, "lam", got, ELLELoss, 0.1, lam=value)
    refused(error, "lam", got, ELLELoss, 0.1, lam=value, adaptive=True)
    refused(error, "lam", got, AdaptiveLambda, value)
    refused(error, "lam", got, ELLELoss.preset, "cifar10", 0.1, lam=value)
    if not isinstance(value, Tensor):
        logits, alpha = torch.zeros(4 * B, C), torch.zeros(B)
        refused(error, "lam", got, elle_loss, logits, labels(B, C), alpha, value)


@pytest.mark.parametrize(
    "name, value, error, got",
    [
        ("gamma", 1.5, ValueError, "1.5"),
        ("gamma", -0.1, ValueError, "-0.1"),
        ("gamma", None, TypeError, "None"),
        ("sensitivity", -1.0, ValueError, "-1.0"),
        ("sensitivity", math.nan, ValueError, "nan"),
        ("min_history", 0, ValueError, "0"),
        ("min_history", 2.0, TypeError, "2.0 (float)"),
        ("min_history", True, TypeError, "True (bool)"),
        ("window", 2, ValueError, "2"),
        ("window", 5.5, TypeError, "5.5 (float)"),
    ],
)
def test_options_of_the_controller(name, value, error, got):
    refused(error, name, got, AdaptiveLambda, 1.0, **{name: value})


SHARED_OPTIONS: list[tuple[str, Any, type[Exception], str]] = [
    ("bounds", (1.0, 0.0), ValueError, "(1.0, 0.0)"),
    ("bounds", (0.0, 0.0), ValueError, "(0.0, 0.0)"),
    ("bounds", (0.0, 0.5, 1.0), ValueError, "(0.0, 0.5, 1.0)"),
    ("bounds", (0.0, math.nan), ValueError, "(0.0, nan)"),
    ("bounds", 1.0, TypeError, "1.0 (float)"),
    ("bounds", ("0", "1"), TypeError, "('0', '1') (tuple)"),
    ("norm", "l1", ValueError, "'l1'"),
    ("norm", 2, TypeError, "2 (int)"),
    ("points", "elle-3p", ValueError, "'elle-3p'"),
    ("points", None, TypeError, "None (NoneType)"),
    ("triplets", 0, ValueError, "0"),
    ("triplets", -1, ValueError, "-1"),
    ("triplets", 1.0, TypeError, "1.0 (float)"),
    ("triplets", 1 << 24, ValueError, "16777216"),
    ("alpha", "third", ValueError, "'third'"),
    ("alpha", 0.5, TypeError, "0.5 (float)"),
    ("penalty", "cubed", ValueError, "'cubed'"),
    ("of", "features", ValueError, "'features'"),
    ("label_smoothing", 1.5, ValueError, "1.5"),
    ("label_smoothing", "0.1", TypeError, "'0.1' (str)"),
    ("triplet_fraction", 0, ValueError, "0"),
    ("triplet_fraction", 0.0, ValueError, "0.0"),
    ("triplet_fraction", 1.01, ValueError, "1.01"),
    ("triplet_fraction", None, TypeError, "None (NoneType)"),
    ("logits", "logits", TypeError, "'logits' (str)"),
    ("loss_fn", 3, TypeError, "3 (int)"),
    ("dtype", torch.int32, TypeError, "torch.int32"),
    ("dtype", "float16", TypeError, "'float16' (str)"),
    ("memory_format", "channels_last", TypeError, "'channels_last' (str)"),
    ("generator", 3, TypeError, "3 (int)"),
    ("backend", "tpu", ValueError, "'tpu'"),
    ("backend", None, TypeError, "None (NoneType)"),
]


@pytest.mark.parametrize("name, value, error, got", SHARED_OPTIONS)
def test_options_of_the_triplets(name, value, error, got):
    refused(error, name, got, ELLELoss, 0.1, **{name: value})
    refused(error, name, got, LocalLinearity, 0.1, **{name: value})


@pytest.mark.parametrize(
    "name, value, error, got",
    [
        ("adaptive", 1, TypeError, "1 (int)"),
        ("adaptive", None, TypeError, "None (NoneType)"),
        ("lagged", "yes", TypeError, "'yes' (str)"),
        ("attack", "pgd", ValueError, "'pgd'"),
        ("attack", None, TypeError, "None (NoneType)"),
        ("forward", "both", ValueError, "'both'"),
        ("forward", True, TypeError, "True (bool)"),
        ("step_size", -1.0, ValueError, "-1.0"),
        ("step_size", "1", TypeError, "'1' (str)"),
    ],
)
def test_options_of_the_whole_loss(name, value, error, got):
    refused(error, name, got, ELLELoss, 0.1, **{name: value})


def test_options_that_do_not_go_together():
    for name, value in (("lagged", True), ("skip_below", 0.1)):
        with pytest.raises(ValueError, match=f"^{name}: only ELLE-A has a history; pass adaptive=True"):
            ELLELoss(0.1, **dict[str, Any]({name: value}))
    with pytest.raises(
        TypeError, match=r"^ELLELoss: .* those of ELLE-A with lam=AdaptiveLambda\(\.\.\.\), got window$"
    ):
        ELLELoss(0.1, window=9)
    with pytest.raises(TypeError, match=r"^ELLELoss: expected options of its own or of LocalLinearity, got tripletz$"):
        ELLELoss(0.1, tripletz=2)
    refused(ValueError, "step_size", "0.1", ELLELoss, 0.1, attack="none", step_size=0.1)
    refused(ValueError, "step_size", "0.1", ELLELoss, 0.1, attack=lambda m, x, y: x, step_size=0.1)
    refused(ValueError, "alpha", "'half'", ELLELoss, 0.1, points="five-point", alpha="half")
    refused(ValueError, "alpha", "'argmax'", ELLELoss, 0.1, points="five-point", alpha="argmax")
    refused(ValueError, "loss_fn", "'logits'", ELLELoss, 0.1, loss_fn=lambda o, t: o, of="logits")
    refused(ValueError, "loss_fn", "0.1", ELLELoss, 0.1, loss_fn=lambda o, t: o, label_smoothing=0.1)
    for cls in (ELLELoss, LocalLinearity):
        refused(ValueError, "mean", "3 and 2", cls, 0.1, mean=[0.1, 0.2, 0.3], std=[1, 1])
        refused(ValueError, "mean", "0 and 0", cls, 0.1, mean=[], std=[])
        refused(TypeError, "std", "None (NoneType)", cls, 0.1, mean=[0.1])
        refused(TypeError, "mean", "None (NoneType)", cls, 0.1, std=[0.1])
        refused(TypeError, "mean", "0.5 (float)", cls, 0.1, mean=0.5, std=0.5)
        refused(ValueError, "std", "(1.0, 0.0)", cls, 0.1, mean=(0.5, 0.5), std=(1.0, 0.0))
        refused(ValueError, "std", "(-1.0,)", cls, 0.1, mean=(0.5,), std=(-1.0,))
        refused(ValueError, "mean", "(nan,)", cls, 0.1, mean=(math.nan,), std=(1.0,))


@pytest.mark.parametrize(
    "name, options, error, got",
    [
        ("mnist", {}, ValueError, "'mnist'"),
        ("mnist", {"lam": 1.0}, ValueError, "'mnist'"),
        (None, {}, TypeError, "None (NoneType)"),
    ],
)
def test_unknown_preset(name, options, error, got):
    refused(error, "name", got, ELLELoss.preset, name, 0.1, **options)


@pytest.mark.parametrize(
    "name, options",
    [
        ("imagenet", {}),
        ("cifar10-long", {"adaptive": True, "attack": "n-fgsm"}),
        ("svhn-long", {"adaptive": True, "attack": "n-fgsm"}),
    ],
)
def test_methods_that_the_paper_does_not_have(name, options):
    with pytest.raises(ValueError, match=f"^name: preset '{name}' has no .*; pass lam="):
        ELLELoss.preset(name, 0.1, **options)


def test_preset_passes_bad_overrides_on():
    refused(TypeError, "adaptive", "1 (int)", ELLELoss.preset, "cifar10", 0.1, adaptive=1)
    refused(ValueError, "attack", "'pgd'", ELLELoss.preset, "cifar10", 0.1, attack="pgd")


# ---- The batch: refused before the model is called


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


def inference_free(*shape: int) -> Tensor:
    return random(*shape, seed=2).requires_grad_()


BAD_X: list[tuple[Any, type[Exception], str]] = [
    (torch.zeros(B, D, dtype=torch.int64), TypeError, "a tensor of shape [4, 5], torch.int64, on cpu"),
    (torch.zeros(B, D, dtype=torch.uint8), TypeError, "torch.uint8"),
    (torch.zeros(B, D, dtype=torch.complex64), TypeError, "torch.complex64"),
    ([[0.0] * D] * B, TypeError, "(list)"),
    (None, TypeError, "None (NoneType)"),
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


# ---- What the model and the loss return


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


# ---- The functional face


@pytest.mark.parametrize(
    "grad, error, got",
    [
        (torch.zeros(B, D + 1), ValueError, "shape [4, 6]"),
        (torch.zeros(D), ValueError, "shape [5]"),
        (torch.zeros(B, D, dtype=torch.int32), TypeError, "torch.int32"),
        (inference_free(B, D), ValueError, "not require grad"),
        ("grad", TypeError, "'grad' (str)"),
    ],
)
def test_grad_of_pack_points(grad, error, got):
    x, _ = x_and_y()
    refused(error, "grad", got, pack_points, x, grad, 0.1, seed=seed_of(0))


@pytest.mark.parametrize(
    "name, value, error, got",
    [
        ("seed", 3, TypeError, "3 (int)"),
        ("seed", None, TypeError, "None (NoneType)"),
        ("seed", torch.tensor(3, dtype=torch.int32), ValueError, "torch.int32"),
        ("seed", torch.tensor(3.0), ValueError, "torch.float32"),
        ("seed", torch.tensor([3]), ValueError, "shape [1]"),
        ("seed", torch.tensor(3, device="meta"), ValueError, "on meta"),
        ("step_size", -1.0, ValueError, "-1.0"),
        ("start", -1.0, ValueError, "-1.0"),
        ("start", "1", TypeError, "'1' (str)"),
        ("project", 1, TypeError, "1 (int)"),
        ("fraction", 0.0, ValueError, "0.0"),
        ("fraction", 2, ValueError, "2"),
        ("triplets", -1, ValueError, "-1"),
        ("alpha", "argmax", ValueError, "'argmax'"),
        ("alpha", torch.zeros(B + 1), ValueError, "shape [5]"),
        ("alpha", torch.zeros(B, dtype=torch.int64), ValueError, "torch.int64"),
        ("alpha", torch.zeros(B, device="meta"), ValueError, "on meta"),
        ("sample_offset", -1, ValueError, "-1"),
        ("sample_offset", 1.0, TypeError, "1.0 (float)"),
        ("sample_offset", 1 << 32, ValueError, "4294967296"),
        ("points", "four", ValueError, "'four'"),
        ("norm", "l7", ValueError, "'l7'"),
        ("dtype", torch.int8, TypeError, "torch.int8"),
        ("memory_format", torch.channels_last, ValueError, "[4, 5]"),
        ("mean", [0.1], TypeError, "None (NoneType)"),
        ("bounds", [1, 0], ValueError, "[1, 0]"),
        ("backend", "cuda12", ValueError, "'cuda12'"),
    ],
)
def test_options_of_pack_points(name, value, error, got):
    x, _ = x_and_y()
    options = {"seed": seed_of(0), name: value}
    refused(error, "std" if name == "mean" else name, got, pack_points, x, x, 0.1, **options)


OUT = (torch.zeros(4 * B, D), torch.zeros(B))


@pytest.mark.parametrize(
    "out, error, got",
    [
        (OUT[0], TypeError, "a tensor of shape [16, 5]"),
        ((OUT[0],), TypeError, "1 items, tensors among them (tuple)"),
        ((OUT[0], None), TypeError, "2 items, tensors among them (tuple)"),
        ((OUT[0][:-1], OUT[1]), ValueError, "a tensor of shape [15, 5]"),
        ((OUT[0].double(), OUT[1]), ValueError, "a tensor of shape [16, 5], torch.float64"),
        ((OUT[0].to("meta"), OUT[1]), ValueError, "on meta"),
        ((torch.zeros(D, 4 * B).t(), OUT[1]), ValueError, "strides [1, 16] and [1]"),
        ((OUT[0], OUT[1].half()), ValueError, "a tensor of shape [4], torch.float16"),
        ((OUT[0], torch.zeros(B - 1)), ValueError, "a tensor of shape [3]"),
        ((OUT[0], torch.zeros(2 * B)[::2]), ValueError, "strides [5, 1] and [2]"),
        ((torch.zeros(4 * B, D, requires_grad=True), OUT[1]), ValueError, "one that requires grad"),
        ((torch.zeros(4 * B, D, dtype=torch.complex64).conj().imag, OUT[1]), ValueError, "strides"),
        ((torch._neg_view(OUT[0]), OUT[1]), ValueError, "a negated view"),
    ],
)
def test_out_of_pack_points(out, error, got):
    x, _ = x_and_y()
    refused(error, "out", got, pack_points, x, x, 0.1, seed=seed_of(0), out=out)


def test_out_must_share_no_storage():
    memory = torch.zeros(5 * B, D)
    x, points = memory[:B], memory[B:]
    refused(
        ValueError, "out", "some that do", pack_points, x, None, 0.1, seed=seed_of(0), x_adv=x, out=(points, OUT[1])
    )
    refused(
        ValueError,
        "out",
        "some that do",
        pack_points,
        OUT[1][:, None],
        None,
        0.1,
        seed=seed_of(0),
        out=(torch.zeros(3 * B, 1), OUT[1]),
    )
    x, _ = x_and_y()
    refused(ValueError, "out", "some that do", pack_points, x, x, 0.1, seed=seed_of(0), out=(memory[B:], memory[0, :B]))


def test_what_differs_from_a_call_before_in_one_thing_is_refused():
    """What the checks found is remembered by what tensors and options are like: these are alike but for one thing."""
    x, target = x_and_y()
    out = (torch.zeros(4 * B, D), torch.zeros(B))
    options: dict[str, Any] = {"seed": seed_of(0), "out": out}
    pack_points(x, x, 0.1, **options)
    refused(
        ValueError,
        "out",
        "a negated view",
        pack_points,
        x,
        x,
        0.1,
        **{**options, "out": (torch._neg_view(out[0]), out[1])},
    )
    same = out[0][:B]
    refused(ValueError, "out", "some that do", pack_points, same, x, 0.1, **options)
    refused(ValueError, "out", "some that do", pack_points, x, same, 0.1, **options)
    refused(TypeError, "triplets", "True (bool)", pack_points, x, x, 0.1, triplets=True, **options)
    refused(ValueError, "x", "not require grad", pack_points, x.clone().requires_grad_(), x, 0.1, **options)
    refused(ValueError, "grad", "not require grad", pack_points, x, x.clone().requires_grad_(), 0.1, **options)
    refused(
        ValueError,
        "out",
        "requires grad",
        pack_points,
        x,
        x,
        0.1,
        seed=seed_of(0),
        out=(out[0].requires_grad_(), out[1]),
    )
    logits, alpha = torch.randn(4 * B, D), torch.rand(B)
    elle_loss(logits, target, alpha, 1.0, triplets=1, label_smoothing=0)
    refused(
        TypeError, "triplets", "True (bool)", elle_loss, logits, target, alpha, 1.0, triplets=True, label_smoothing=0
    )
    refused(TypeError, "label_smoothing", "False", elle_loss, logits, target, alpha, 1.0, label_smoothing=False)
    refused(TypeError, "target", "torch.int32", elle_loss, logits, target.int(), alpha, 1.0)


def test_out_made_in_inference_mode():
    x, _ = x_and_y()
    with torch.inference_mode():
        out = pack_points(x, x, 0.1, seed=seed_of(0))
        pack_points(x, x, 0.1, seed=seed_of(0), out=out)
    refused(ValueError, "out", "made in inference mode", pack_points, x, x, 0.1, seed=seed_of(0), out=out)


def test_out_in_a_dispatch_mode_and_on_meta():
    memory = torch.zeros(5 * B, D)
    x, points = memory[:B], memory[B:]
    with FlopCounterMode(display=False):
        options = {"seed": seed_of(0), "x_adv": x, "out": (points, OUT[1])}
        refused(ValueError, "out", "some that do", pack_points, x, None, 0.1, **options)
    on_meta = torch.empty(B, D, device="meta")
    seed = seed_of(0).to("meta")
    out = pack_points(on_meta, on_meta, 0.1, seed=seed)
    assert pack_points(on_meta, on_meta, 0.1, seed=seed, out=out)[0] is out[0]


def test_what_pack_points_cannot_combine():
    x, _ = x_and_y()
    refused(ValueError, "x_adv", "both", pack_points, x, x, 0.1, seed=seed_of(0), x_adv=x)
    refused(ValueError, "triplets", "0", pack_points, x, None, 0.1, seed=seed_of(0), triplets=0)
    given = {"seed": seed_of(0), "points": "five-point", "alpha": torch.zeros(B)}
    refused(ValueError, "alpha", "a tensor of shape [4]", pack_points, x, x, 0.1, **given)
    refused(ValueError, "seed", "torch.int32", random_start, x, 0.1, seed=torch.tensor(1, dtype=torch.int32))


@pytest.mark.parametrize(
    "name, value, error, got",
    [
        ("logits", torch.zeros(4 * B, C, 1), ValueError, "shape [16, 3, 1]"),
        ("logits", torch.zeros(4 * B), ValueError, "shape [16]"),
        ("logits", torch.zeros(4 * B, 0), ValueError, "shape [16, 0]"),
        ("logits", torch.zeros(4 * B, C, dtype=torch.int64), TypeError, "torch.int64"),
        ("logits", torch.zeros(4 * B - 1, C), ValueError, "shape [15, 3]"),
        ("logits", torch.zeros(3 * B, C), ValueError, "shape [12, 3]"),
        ("logits", [[0.0]], TypeError, "[[0.0]] (list)"),
        ("target", torch.zeros(B, C + 1), ValueError, "shape [4, 4]"),
        ("target", torch.zeros(0, dtype=torch.int64), ValueError, "shape [0]"),
        ("alpha", torch.zeros(B + 1), ValueError, "shape [5]"),
        ("alpha", torch.zeros(0), ValueError, "shape [0]"),
        ("alpha", torch.zeros(B, 1), ValueError, "shape [4, 1]"),
        ("alpha", torch.zeros(B, device="meta"), ValueError, "on meta"),
        ("alpha", torch.zeros(B, dtype=torch.int64), TypeError, "torch.int64"),
        ("alpha", 0.5, TypeError, "0.5 (float)"),
        ("lam", torch.zeros(1), ValueError, "shape [1]"),
        ("lam", torch.tensor(1), ValueError, "torch.int64"),
        ("lam", torch.tensor(1.0, device="meta"), ValueError, "on meta"),
        ("points", "six", ValueError, "'six'"),
        ("triplets", 0, ValueError, "0"),
        ("of", "gradient", ValueError, "'gradient'"),
        ("penalty", "huber", ValueError, "'huber'"),
        ("label_smoothing", -0.1, ValueError, "-0.1"),
        ("backend", "mps", ValueError, "'mps'"),
    ],
)
def test_arguments_of_elle_loss(name, value, error, got):
    arguments = {"logits": torch.zeros(4 * B, C), "target": labels(B, C), "alpha": torch.zeros(B), "lam": 1.0}
    refused(error, name, got, elle_loss, **{**arguments, name: value})


def test_shapes_of_elle_loss():
    logits, target, alpha = torch.zeros(4 * B, C), labels(B, C), torch.zeros(B)
    refused(ValueError, "logits", "[16, 3]", elle_loss, logits, labels(B + 1, C), alpha, 1.0)
    refused(ValueError, "alpha", "[4]", elle_loss, logits, labels(B - 1, C), alpha, 1.0)
    refused(ValueError, "alpha", "[5]", elle_loss, logits, target, torch.zeros(5), 1.0, triplets=2)
    refused(ValueError, "logits", "[16, 3]", elle_loss, logits, target, alpha, 1.0, points="elle-2p")
    refused(ValueError, "logits", "[16, 3]", local_linearity, logits, target, alpha)
    refused(ValueError, "logits", "[8, 3]", local_linearity, logits[:8], target, alpha, points="elle-2p")


@pytest.mark.parametrize(
    "value, error, got",
    [
        (0.5, TypeError, "0.5 (float)"),
        (torch.tensor(1), TypeError, "torch.int64"),
        (None, TypeError, "None"),
        (torch.zeros(1), ValueError, "shape [1]"),
    ],
)
def test_e_lin_of_the_controller(value, error, got):
    controller = AdaptiveLambda(1.0)
    refused(error, "e_lin", got, controller.update, value)
    assert controller.count.item() == 0


def test_generator_on_another_device():
    generator = rng(0)
    refused(ValueError, "generator", "cpu", draw_seed, torch.device("cuda"), generator)


def test_a_backend_that_cannot_run_here(monkeypatch):
    missing = backends.Backend("nothing", lambda device: False, lambda: "no compiler was found; install one")
    monkeypatch.setitem(backends.BACKENDS, "imaginary", missing)
    for call in (
        lambda: ELLELoss(0.1, backend="imaginary"),
        lambda: pack_points(torch.zeros(1, 1), None, 0.1, seed=seed_of(0), backend="imaginary"),
    ):
        with pytest.raises(RuntimeError, match=r"^backend: 'imaginary' is not available: no compiler .* install one$"):
            call()


def test_a_refused_batch_changes_no_state():
    x, y = x_and_y()
    criterion = ELLELoss(0.1, adaptive=True)
    before = torch.get_rng_state()
    for bad in (torch.zeros(0, D), x.long()):
        with pytest.raises((TypeError, ValueError)):
            criterion(MODEL, bad, y)
    assert torch.equal(torch.get_rng_state(), before)
    assert criterion.controller is not None
    assert criterion.controller.count.item() == 0
    assert criterion.stats == {}
