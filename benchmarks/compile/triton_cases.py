"""The calls whose kernels static_report.py compiles: of the host functions, with tensors that have no data.

Each value of each option, with the others at their defaults, and every pair of dtypes for FGSM.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from elle_fast.ops.elle_loss.validation import LamRule, Linearity
from elle_fast.ops.pack_points.validation import Packing

DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}
SMALL, LARGE = (128, 3, 32, 32), (128, 3, 224, 224)
CIFAR = {"mean": (0.49, 0.48, 0.45), "std": (0.2, 0.2, 0.2)}

# Options of pack_points beside the attack's defaults, one at a time. "x_adv" gives the points, "none" no x_adv.
PACK_OPTIONS: dict[str, dict[str, Any]] = {
    "default": {},
    "start": {"start": 1.0},
    "start, project, bounds": {"start": 1.0, "project": True, "bounds": (0.0, 1.0)},
    "project": {"project": True},
    "bounds": {"bounds": (0.0, 1.0)},
    "normalized": CIFAR,
    "elle-2p": {"points": "elle-2p"},
    "five-point": {"points": "five-point"},
    "3 triplets": {"triplets": 3},
    "0 triplets": {"triplets": 0},
    "half the batch": {"fraction": 0.5},
    "alpha half": {"alpha": "half"},
    "alpha given": {"alpha": "given"},
    "x_adv given": {"attack": "x_adv"},
    "no attack": {"attack": "none"},
    "batch of 1": {"shape": (1, 3, 32, 32)},
    "batch of 100": {"shape": (100, 3, 32, 32)},
    "sample_offset 5": {"sample_offset": 5},
    "3x423": {"shape": (128, 3, 423)},
    "features 129": {"shape": (128, 129)},
    "x unaligned": {"unaligned": True},
    "WIDE": {"shape": (1, 3, 1 << 15, 1 << 15)},
    "x channels_last, output contiguous": {"last": (True, False, False)},
    "x contiguous, grad and output channels_last": {"last": (False, True, True)},
    "x and output contiguous, grad channels_last": {"last": (False, True, False)},
}


def pack_cases() -> Iterator[tuple[str, Callable[[], object]]]:
    for shape in (SMALL, LARGE):
        size = f"{shape[1]}x{shape[2]}x{shape[3]}"
        for layout, last in (("contiguous", False), ("channels_last", True)):
            for x_name in DTYPES:
                for grad_name in dict.fromkeys((x_name, "fp32")):
                    for out_name in DTYPES:
                        name = f"pack linf {size} {layout} x {x_name}, grad {grad_name}, output {out_name}"
                        dtypes = (x_name, grad_name, out_name)
                        yield name, _pack("linf", {"shape": shape, "last": (last, last, last)}, dtypes)
                yield (
                    f"start linf {size} {layout} x {x_name}",
                    _start("linf", {"shape": shape, "last": (last, last, last)}, x_name),
                )
    for norm in ("linf", "l2"):
        for option, values in PACK_OPTIONS.items():
            yield f"pack {norm} fp32, {option}", _pack(norm, values, ("fp32",) * 3)
            if option in ("bounds", "3x423", "WIDE", "x unaligned"):
                yield f"start {norm} fp32, {option}", _start(norm, values, "fp32")
        # The layouts and the options whose code depends on them, where elements are narrow.
        for option in ("default", "start, project, bounds", "normalized", "3 triplets", "3x423", "WIDE"):
            yield f"pack {norm} bf16, {option}", _pack(norm, PACK_OPTIONS[option], ("bf16",) * 3)
            if "shape" not in PACK_OPTIONS[option]:
                values = {**PACK_OPTIONS[option], "last": (True, True, True)}
                yield f"pack {norm} bf16 channels_last, {option}", _pack(norm, values, ("bf16",) * 3)
    for dtypes in (
        ("fp16", "fp16", "fp16"),
        ("bf16", "fp32", "bf16"),
        ("fp32", "fp32", "bf16"),
        ("bf16", "bf16", "fp32"),
    ):
        x_name, grad_name, out_name = dtypes
        yield f"pack l2 x {x_name}, grad {grad_name}, output {out_name}", _pack("l2", {}, dtypes)
    yield "pack l2 3x224x224 bf16", _pack("l2", {"shape": LARGE}, ("bf16",) * 3)
    for x_name in DTYPES:
        for layout, last in (("contiguous", False), ("channels_last", True)):
            yield f"start l2 {layout} x {x_name}", _start("l2", {"last": (last, last, last)}, x_name)


def _tensor(shape: Sequence[int], dtype: torch.dtype, last: bool = False, unaligned: bool = False) -> Tensor:
    """A tensor without data."""
    if unaligned:
        return torch.empty(math.prod(shape) + 1, dtype=dtype, device="meta")[1:].view(*shape)
    form = torch.channels_last if last else torch.contiguous_format
    return torch.empty(tuple(shape), dtype=dtype, device="meta", memory_format=form)


def _seed() -> Tensor:
    return torch.empty((), dtype=torch.int64, device="meta")


def _pack(norm: str, values: dict[str, Any], dtypes: Sequence[str]) -> Callable[[], object]:
    """A call of pack_points: some ``values`` describe its tensors, the others are options."""
    options = dict(values)
    shape = options.pop("shape", SMALL)
    x_last, grad_last, out_last = options.pop("last", (False, False, False))
    attack, unaligned = options.pop("attack", "grad"), options.pop("unaligned", False)
    x_type, grad_type, out_type = (DTYPES[name] for name in dtypes)
    form = torch.preserve_format
    if x_last or grad_last or out_last:
        form = torch.channels_last if out_last else torch.contiguous_format
    alpha_given = options.get("alpha") == "given"
    if alpha_given:
        del options["alpha"]
    packing = Packing.checked(8 / 255, norm=norm, dtype=out_type, memory_format=form, **options)

    def call() -> object:
        from elle_fast.ops.pack_points import triton as host

        x = _tensor(shape, x_type, x_last, unaligned)
        given = None if attack == "none" else _tensor(shape, grad_type, grad_last)
        alpha = _tensor((shape[0] * packing.triplets,), torch.float32) if alpha_given else None
        grad, x_adv = (given, None) if attack == "grad" else (None, given)
        statistics = _tensor((2 * shape[1],), torch.float32) if packing.mean is not None else None
        return host.pack_points(x, grad, x_adv, alpha, _seed(), statistics, packing)

    return call


def _start(norm: str, values: dict[str, Any], dtype: str) -> Callable[[], object]:
    """A call of random_start."""
    last = values.get("last", (False,))[0]
    packing = Packing.checked(8 / 255, norm=norm, start=1.0, bounds=values.get("bounds"))

    def call() -> object:
        from elle_fast.ops.pack_points import triton as host

        x = _tensor(values.get("shape", SMALL), DTYPES[dtype], last, values.get("unaligned", False))
        return host.random_start(x, _seed(), packing)

    return call


CLASSES = (1, 10, 100, 1000, 32000)
RULE = LamRule(lam_max=4000.0, gamma=0.99, sensitivity=2.0, min_history=0)
RELATIVE = RULE._replace(threshold=0.2, rate=0.125)

LOSS_OPTIONS: dict[str, dict[str, Any]] = {
    "label smoothing": {"label_smoothing": 0.1},
    "soft targets": {"soft": True},
    "soft targets, label smoothing": {"soft": True, "label_smoothing": 0.1},
    "elle-2p": {"points": "elle-2p"},
    "five-point": {"points": "five-point"},
    "abs": {"penalty": "abs"},
    "smooth_l1": {"penalty": "smooth_l1"},
    "3 triplets": {"triplets": 3},
    "of logits": {"of": "logits"},
    "of logits, elle-2p": {"of": "logits", "points": "elle-2p"},
    "of logits, five-point": {"of": "logits", "points": "five-point"},
    "of logits, abs": {"of": "logits", "penalty": "abs"},
    "of logits, smooth_l1": {"of": "logits", "penalty": "smooth_l1"},
    "of logits, 3 triplets": {"of": "logits", "triplets": 3},
    "of logits, soft targets, label smoothing": {"of": "logits", "soft": True, "label_smoothing": 0.1},
    "no x_adv": {"adv": False},
    "no x_adv, of logits": {"adv": False, "of": "logits"},
    "lam a tensor": {"lam": "tensor"},
    "lam adaptive": {"lam": "adaptive"},
    "lam adaptive, window": {"lam": "window"},
    "lam adaptive, relative": {"lam": "relative"},
    "only loss has a gradient": {"upstream": (True, False, False)},
    "only ce has a gradient": {"upstream": (False, True, False)},
    "only e_lin has a gradient": {"upstream": (False, False, True)},
    "batch of 1": {"batch": 1},
    "batch of 100": {"batch": 100},
    "batch of 256": {"batch": 256},
    "batch of 512": {"batch": 512},
    "batch of 1024": {"batch": 1024},
    "batch of 1024, lam adaptive, window": {"batch": 1024, "lam": "window"},
    "batch of 1024, elle-2p, 3 triplets": {"batch": 1024, "points": "elle-2p", "triplets": 3},
    "batch of 1024, of logits, abs": {"batch": 1024, "of": "logits", "penalty": "abs"},
    "rows apart": {"stride": 1008},
    "unaligned": {"unaligned": True},
}


def loss_cases() -> Iterator[tuple[str, Callable[[], object]]]:
    for dtype in DTYPES:
        for classes in CLASSES:
            yield f"loss {dtype} C {classes}", _loss(dtype, classes, {})
    for option, values in LOSS_OPTIONS.items():
        yield f"loss fp32 C 1000, {option}", _loss("fp32", 1000, values)
    for option in ("soft targets, label smoothing", "of logits", "of logits, five-point"):
        for dtype, classes in (("bf16", 1000), ("fp32", 10), ("bf16", 32000)):
            yield f"loss {dtype} C {classes}, {option}", _loss(dtype, classes, LOSS_OPTIONS[option])
    yield "update_lam", _update("adaptive")
    yield "update_lam, window", _update("window")
    yield "update_lam, relative", _update("relative")


def _state(kind: str) -> list[Tensor]:
    """lam, count, skipped, and mean and deviations, the window or relative E_lin: as elle_fast.adaptive has them."""
    lam = torch.empty((), dtype=torch.float32, device="meta")
    mean, spread = (torch.empty((), dtype=torch.float64, device="meta") for _ in range(2))
    count, skipped = (torch.empty((), dtype=torch.int64, device="meta") for _ in range(2))
    if kind == "window":
        return [lam, count, skipped, torch.empty(500, dtype=torch.float64, device="meta")]
    return [lam, count, skipped, mean, *([] if kind == "relative" else [spread])]


def _loss(dtype: str, classes: int, values: dict[str, Any]) -> Callable[[], object]:
    """A call of elle_loss and one of its backward."""
    names = ("points", "triplets", "of", "penalty", "label_smoothing")
    options = Linearity.checked(**{name: value for name, value in values.items() if name in names})
    batch, lam_kind = values.get("batch", 128), values.get("lam", "number")
    if not values.get("adv", True):
        options = options.alone

    def call() -> object:
        from elle_fast.ops.elle_loss import triton as host

        rows = (batch if options.adv else 0) + options.blocks * batch * options.triplets
        logits = _tensor((rows, values.get("stride", classes)), DTYPES[dtype], unaligned=values.get("unaligned", False))
        logits = logits[:, :classes]
        target = torch.empty((batch,), dtype=torch.int64, device="meta")
        if values.get("soft"):
            target = torch.empty((batch, classes), device="meta")
        alpha = torch.empty(batch * options.triplets, device="meta")
        lam: float | Tensor = torch.empty((), device="meta") if lam_kind == "tensor" else 5000.0
        state = _state(lam_kind) if lam_kind in ("adaptive", "window", "relative") else []
        rule = RELATIVE if lam_kind == "relative" else RULE
        *_, saved = host.elle_loss(logits, target, alpha, lam, state, rule, options)
        loss, ce, e_lin = (
            torch.empty((), device="meta") if given else None for given in values.get("upstream", (True,) * 3)
        )
        return host.elle_loss_backward(logits, target, alpha, saved, loss, ce, e_lin, options)

    return call


def _update(kind: str) -> Callable[[], object]:
    def call() -> object:
        from elle_fast.ops.elle_loss import triton as host

        rule = RELATIVE if kind == "relative" else RULE
        return host.update_lam(torch.empty((), device="meta"), _state(kind), rule)

    return call
