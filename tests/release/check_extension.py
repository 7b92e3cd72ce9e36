"""Whether the installed extension computes what it should on this machine, without torch and without numpy.

Run by cibuildwheel on every wheel: ``python tests/release/check_extension.py [FILE]``, where FILE is a ``_C``
to look at instead of the installed one. For each instruction set that the machine has:

- the points of the linf ball have the bits of the reference (recorded here as digests; tests/release/test_extension.py
  compares these with the reference itself), whatever the instruction set, the processor and the number of threads;
- loss, cross-entropy and E_lin agree with the formulas in Python's float64.
"""

from __future__ import annotations

import ctypes
import hashlib
import importlib.metadata
import importlib.util
import math
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

BATCH, CHANNELS, PLANE = 5, 3, 35  # 105 numbers a sample: whole vectors and a rest on every instruction set
SEED = 20240106
PACK: dict[str, Any] = {
    **{"batch": BATCH, "part": BATCH, "channels": CHANNELS, "plane": PLANE, "triplets": 1, "sample_offset": 0},
    **{"eps": 8 / 255, "step_size": 8 / 255, "radius": 0.0, "clamp": False, "low": 0.0, "high": 1.0},
    **{"norm": 0, "adv": 1, "points": 0, "alpha": 0, "start": False, "project": False, "normalize": False},
    **{"x_last": False, "given_last": False, "points_last": False, "x_type": 0, "given_type": 0, "points_type": 0},
}
# Options of a plan, the codes of csrc/common/plans.h; and the first 16 digits of the digest of points and alpha.
CASES: dict[str, tuple[dict[str, Any], str]] = {
    "fgsm": ({}, "70db7d5d529c2023"),
    "clamped": ({"clamp": True}, "a4062dfabe5357de"),
    "n-fgsm": ({"start": True, "radius": 16 / 255}, "46de48027c91b7da"),
    "rs-fgsm": ({"start": True, "radius": 8 / 255, "project": True, "clamp": True}, "5ad4b43faff8ca6e"),
    "elle-2p": ({"points": 1}, "b9c842ed85d77f72"),
    "two triplets": ({"triplets": 2, "sample_offset": 1000}, "40e1d529d1c4be16"),
    "half": ({"part": 3, "points_type": 1}, "ad0fcff14cc32f07"),
    "bfloat16": ({"points_type": 2}, "86dc6ee30c97e3fb"),
    "normalized": ({"normalize": True, "points_last": True, "clamp": True}, "b9e8e6c52946fcb0"),
}
BLOCKS, CLASSES = (3, 2, 5), 10
LOSS: dict[str, Any] = {
    **{"losses": 4 * BATCH, "residuals": BATCH, "adv_rows": BATCH, "part": BATCH, "triplets": 1, "classes": CLASSES},
    **{"stride": CLASSES, "target_stride": -1, "label_smoothing": 0.0, "points": 0, "penalty": 0, "of_logits": False},
    **{"type": 0, "lam_max": 1.0, "gamma": 0.9, "sensitivity": 2.0, "min_history": 3, "window": -1},
    **{"threshold": 0.0, "rate": 0.0},
}
LAM = 0.5


def pixels() -> list[float]:
    """x: the numbers of [0, 1] by a rule that rounds nowhere, so that they are the same everywhere."""
    return [(i * 37 % 256) / 256 for i in range(BATCH * CHANNELS * PLANE)]


def gradient() -> list[float]:
    return [(i * 29 % 127 - 63) / 64 for i in range(BATCH * CHANNELS * PLANE)]


def logits() -> list[float]:
    return [(i * 53 % 257 - 128) / 32 for i in range(4 * BATCH * CLASSES)]


def address(memory: ctypes.Array[Any]) -> int:
    return ctypes.addressof(memory)


def floats(values: list[float]) -> ctypes.Array[ctypes.c_float]:
    return (ctypes.c_float * len(values))(*values)


def points(extension: Any, options: dict[str, Any], threads: int = 1) -> str:
    """The digest of the points of a plan, and of alpha, as they lie in memory (little endian)."""
    plan = {**PACK, **options}
    rows = plan["batch"] + BLOCKS[plan["points"]] * plan["triplets"] * plan["part"]
    made = (ctypes.c_char * (rows * CHANNELS * PLANE * (2 if plan["points_type"] else 4)))()
    alpha = (ctypes.c_float * (plan["triplets"] * plan["part"]))()
    x, grad, seed = floats(pixels()), floats(gradient()), ctypes.c_int64(SEED)
    statistics = floats([0.5, 0.25, 0.125, 2.0, 4.0, 8.0])  # mean, and 1 / std
    addresses = (address(x), address(grad), 0, ctypes.addressof(seed), address(statistics), address(made))
    extension.Pack(**plan).pack("cpu", *addresses, address(alpha), threads)
    return hashlib.sha256(bytes(made) + bytes(alpha)).hexdigest()[:16]


def losses(extension: Any, threads: int = 1) -> tuple[float, float, float]:
    """``loss``, ``ce`` and ``e_lin`` of the extension."""
    given, saved = floats(logits()), floats([math.nan] * 1000)
    target, alpha = (ctypes.c_int64 * BATCH)(*range(BATCH)), floats([(i + 1) / 8 for i in range(BATCH)])
    loss, ce, e_lin = floats([math.nan]), floats([math.nan]), floats([math.nan])
    tensors = (address(given), address(target), address(alpha), address(saved))
    out = (address(loss), address(ce), address(e_lin))
    extension.Loss(**LOSS).forward("cpu", *tensors, 0, LAM, 0, 0, 0, 0, 0, *out, threads)
    return loss[0], ce[0], e_lin[0]


def expected_losses() -> tuple[float, float, float]:
    """The paper's equation 4 in float64: rows of x_adv, then x_a, x_b, x_c."""
    rows = [logits()[CLASSES * row : CLASSES * (row + 1)] for row in range(4 * BATCH)]
    each = [math.log(sum(map(math.exp, row))) - row[i % BATCH] for i, row in enumerate(rows)]
    adv, a, b, c = (each[BATCH * block : BATCH * (block + 1)] for block in range(4))
    ce = sum(adv) / BATCH
    alpha = [(i + 1) / 8 for i in range(BATCH)]
    # x_c = (1 - alpha) x_a + alpha x_b
    residuals = [c[i] - (1 - alpha[i]) * a[i] - alpha[i] * b[i] for i in range(BATCH)]
    e_lin = sum(residual**2 for residual in residuals) / BATCH
    return ce + LAM * e_lin, ce, e_lin


def load(file: Path) -> ModuleType:
    """The extension alone: the package would import torch."""
    spec = importlib.util.spec_from_file_location("elle_fast._C", file)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def installed() -> Path:
    """Where the installed wheel has its extension; SystemExit if there is none."""
    files = importlib.metadata.files("elle-fast") or []
    found = [
        Path(str(file.locate())) for file in files if file.name.startswith("_C.") and file.suffix in (".so", ".pyd")
    ]
    if len(found) != 1:
        sys.exit(f"elle_fast: expected one extension in the wheel, got {len(found)}")
    return found[0]


def check(extension: Any) -> list[str]:
    """What is wrong; nothing if all is well."""
    wrong = []
    before = extension.isa()
    for isa in extension.isas():
        extension.use_isa(isa)
        for threads in (1, 3):
            for name, (options, digest) in CASES.items():
                got = points(extension, options, threads)
                if got != digest:
                    wrong.append(f"{isa}, {threads} threads, points of {name}: expected {digest}, got {got}")
            # Some 50 roundings of float32 in sums of losses of at most 10; a square doubles a relative error.
            results = losses(extension, threads)
            for name, number, true in zip(("loss", "ce", "e_lin"), results, expected_losses(), strict=True):
                if not math.isclose(number, true, rel_tol=100 * 2**-24):
                    wrong.append(f"{isa}, {threads} threads, {name}: expected {true}, got {number}")
    extension.use_isa(before)
    return wrong


def main(arguments: list[str]) -> None:
    file = Path(arguments[0]).resolve() if arguments else installed()
    extension: Any = load(file)
    if not arguments and extension.version != importlib.metadata.version("elle-fast"):
        sys.exit(f"the extension is of version {extension.version}, the wheel of another")
    if wrong := check(extension):
        sys.exit("\n".join(wrong))
    compiler, isas = extension.facts()["compiler"], ", ".join(extension.isas())
    print(f"elle_fast {extension.version}, {compiler}: {isas} compute as they should")


if __name__ == "__main__":
    main(sys.argv[1:])
