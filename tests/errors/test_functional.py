"""Bad arguments of the functional face, and backends that cannot run here."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from elle_fast import AdaptiveLambda, ELLELoss, backends
from elle_fast.functional import draw_seed, elle_loss, local_linearity, pack_points, random_start
from tests.errors.cases import MODEL, B, C, D, inference_free, refused, x_and_y
from tests.helpers import labels, rng, seed_of


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


def test_a_backend_that_is_no_string():
    """Compared with a name, an array is compared element by element."""
    logits, alpha = torch.zeros(4 * B, C), torch.zeros(B)
    for value, got in ((np.array(["auto", "cpp"]), "ndarray"), (np.array("auto"), "ndarray"), (Path("cpp"), "cpp")):
        refused(TypeError, "backend", got, pack_points, torch.zeros(1, 1), None, 0.1, seed=seed_of(0), backend=value)
        refused(TypeError, "backend", got, elle_loss, logits, labels(B, C), alpha, 1.0, backend=value)
        refused(TypeError, "backend", got, AdaptiveLambda(1.0).update, torch.tensor(1.0), value)


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


def test_unknown_options_of_a_function():
    x, y = x_and_y()
    logits, alpha = torch.zeros(4 * B, C), torch.zeros(B)
    for name, call in (
        ("pack_points", lambda **options: pack_points(x, None, 0.1, seed=seed_of(0), **options)),
        ("elle_loss", lambda **options: elle_loss(logits, y, alpha, 1.0, **options)),
        ("local_linearity", lambda **options: local_linearity(logits, y, alpha, **options)),
    ):
        for unknown in ("foo", "adv"):
            with pytest.raises(TypeError, match=rf"^{name}: expected options among .*points, .*got {unknown}$"):
                call(**{unknown: 1})


@pytest.mark.parametrize("value", [None, 0, torch.zeros(1)])
def test_the_device_of_a_seed(value):
    with pytest.raises(TypeError, match=r"^device: expected a torch.device or its name, got "):
        draw_seed(value)
