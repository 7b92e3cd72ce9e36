"""The compiled extension called directly with nonsense: refused, or survived."""

from __future__ import annotations

import math
import os
from typing import Any

import pytest

from tests.csrc.cases import _C, CALLS, HERE, LOSS, MAKERS, PACK, called, everywhere, prepared, used

# The first value that is too small, the first that is too large, and far ones; None: there is no such bound.
CODES = {"norm": 2, "adv": 4, "points": 3, "alpha": 3, "penalty": 3, "type": 3}
CODES |= {"x_type": 3, "given_type": 3, "points_type": 3}
LOWEST = {"batch": 1, "part": 1, "channels": 1, "plane": 1, "residuals": 1, "classes": 1}
LOWEST |= {"triplets": 0, "sample_offset": 0, "losses": 0, "stride": 0, "target_stride": -1}
LOWEST |= {"min_history": 0, "window": -1}
WRONG: list[tuple[str, str, Any]] = [
    *[("Pack", "batch", 2**32), ("Pack", "part", 3), ("Pack", "channels", 2**56), ("Pack", "plane", 2**62)],
    *[("Pack", "triplets", 2**24), ("Pack", "sample_offset", 2**32 - 1), ("Pack", "sample_offset", 2**63 - 1)],
    *[("Loss", "losses", 7), ("Loss", "losses", 9), ("Loss", "residuals", 3), ("Loss", "residuals", 2**62)],
    *[("Loss", "adv_rows", 1), ("Loss", "adv_rows", -1), ("Loss", "adv_rows", 2**63 - 1), ("Loss", "part", 1)],
    *[("Loss", "triplets", 0), ("Loss", "triplets", 2), ("Loss", "classes", 2**60), ("Loss", "stride", 2**62)],
    *[("Loss", "target_stride", 2**62), ("Loss", "part", 2**63 - 1), ("Loss", "triplets", 2**63 - 1)],
    ("Lam", "window", -1),
]
for maker, arguments in MAKERS.items():
    for name in arguments:
        far = [-(2**63)] if name in LOWEST or name in CODES else []
        WRONG += [(maker, name, LOWEST[name] - 1)] if name in LOWEST else []
        WRONG += [(maker, name, value) for value in (-1, CODES.get(name), 2**31 - 1) if name in CODES]
        WRONG += [(maker, name, value) for value in far if name not in CODES]


@pytest.mark.parametrize("maker, name, value", WRONG)
def test_plans_refuse_wrong_values(maker, name, value):
    getattr(_C, maker)(**MAKERS[maker])
    with pytest.raises(ValueError, match=r"^\w+: expected "):
        getattr(_C, maker)(**{**MAKERS[maker], name: value})


@pytest.mark.parametrize("maker, name", [(maker, name) for maker, given in MAKERS.items() for name in given])
def test_plans_refuse_wrong_types(maker, name):
    make, given = getattr(_C, maker), MAKERS[maker]
    integer = not isinstance(given[name], (float, bool))
    expected = rf"^{name}: expected {'an integer of 64 bits' if integer else 'a number'}, got "
    for value in ("1", [1], object()):
        with pytest.raises(TypeError, match=expected + type(value).__name__):
            make(**{**given, name: value})
    if integer:
        for value in (1.5, None, 2**63, -(2**63) - 1, 2**200):
            with pytest.raises(TypeError, match=expected):
                make(**{**given, name: value})
    with pytest.raises(TypeError, match=f"^{name}: missing from the plan$"):
        make(**{other: value for other, value in given.items() if other != name})
    with pytest.raises(TypeError, match=r"^another: not a field of the plan$"):
        make(**given, another=1)
    with pytest.raises(TypeError, match="incompatible constructor arguments"):
        make(*given.values())


@pytest.mark.parametrize(
    "maker, sizes",
    [
        ("Pack", {"channels": 2**31, "plane": 2**31}),
        ("Pack", {"batch": 2**31, "part": 2**31, "triplets": 2**24 - 1, "points": 2}),
        ("Pack", {"channels": 2**62, "plane": 2**62}),
        ("Pack", {"adv": 0, "points": 1}),  # its x_b is x_adv
        # Sums that overflow, not products.
        ("Loss", {"of_logits": True, "adv_rows": 2**63 - 1, "losses": 2**63 - 1}),
        ("Loss", {"of_logits": True, "adv_rows": 2**63 - 1, "losses": 2**63 - 1, "residuals": (2**63 - 2) // 3,
                  "part": (2**63 - 2) // 3, "classes": 1, "stride": 1}),
        ("Loss", {"residuals": 2**62, "part": 2**31, "triplets": 2**31, "losses": 0, "adv_rows": 0}),
        ("Loss", {"losses": 2**61, "classes": 1, "residuals": 2**61 - 2, "part": 2**61 - 2}),
        ("Loss", {"points": 1, "adv_rows": 0, "losses": 4}),  # the rows of x_adv are its x_b
    ],
)  # fmt: skip
def test_plans_refuse_sizes_that_overflow(maker, sizes):
    with pytest.raises(ValueError, match=r"^\w+: expected "):
        getattr(_C, maker)(**{**MAKERS[maker], **sizes})


@everywhere
@called
def test_calls_refuse_null(where, call):
    function, arguments, names = prepared(call)
    optional = CALLS[call][3]
    with used(where):
        function(*arguments)
        for place, name in enumerate(names):
            changed = [*arguments[:place], 0, *arguments[place + 1 :]]
            if name in optional:
                function(*changed)
            elif name is not None:
                with pytest.raises(ValueError, match=rf"^{name}: expected the address of a tensor, got 0$"):
                    function(*changed)


@called
def test_calls_refuse_wrong_types(call):
    function, arguments, names = prepared(call)
    for place, name in enumerate(names):
        is_address = name is not None
        for value in ("1", object(), *([-1, None, 1.5, 2**64] if is_address else [])):
            with pytest.raises(TypeError, match="incompatible function arguments"):
                function(*arguments[:place], value, *arguments[place + 1 :])
    for wrong in (arguments[:-1], [*arguments, 1], []):
        with pytest.raises(TypeError, match="incompatible function arguments"):
            function(*wrong)


@called
def test_calls_refuse_wrong_thread_counts(call):
    function, arguments, _ = prepared(call)
    for threads in (0, -1, -(2**31)):
        with pytest.raises(ValueError, match=rf"^threads: expected an integer >= 1, got {threads}$"):
            function(*arguments[:-1], threads)
    with pytest.raises(ValueError, match=rf"^threads: expected fewer than 2\*\*31, got {2**31}$"):
        function(*arguments[:-1], 2**31)
    for wrong in (2**63, None, 1.5):
        with pytest.raises(TypeError, match="incompatible function arguments"):
            function(*arguments[:-1], wrong)
    function(*arguments[:-1], 2**31 - 1)  # as many as there are tasks


@called
def test_calls_refuse_other_devices(call):
    function, arguments, _ = prepared(call)
    devices = "'cpu' or 'cuda'" if _C.cuda_built() else "'cpu'"
    for device in ("", "CPU", "xpu", *([] if _C.cuda_built() else ["cuda"])):
        with pytest.raises(ValueError, match=rf"^device: expected {devices}, got '{device}'$"):
            function.func(device, *arguments)


def test_use_isa_refuses_what_it_does_not_know():
    before = _C.isa()
    assert before in _C.isas()
    assert set(_C.isas()) <= set(_C.facts()["isas"].split())
    for name in ("", "sse", "AVX2", "avx512\0", "baseline ", "é", "x" * 10_000):
        with pytest.raises(ValueError, match=r"^isa: expected one of .*baseline"):
            _C.use_isa(name)
    for value in (None, 1, ["baseline"]):
        with pytest.raises(TypeError):
            _C.use_isa(value)
    assert _C.isa() == before


@pytest.mark.parametrize("maker", ["Loss", "Lam"])
def test_relative_e_lin_has_no_window(maker):
    plan = {**MAKERS[maker], "rate": 0.5}
    getattr(_C, maker)(**{**plan, "window": 0})
    with pytest.raises(ValueError, match=r"^window: expected none beside a rate, .*, got 4$"):
        getattr(_C, maker)(**{**plan, "window": 4})


@pytest.mark.parametrize("number", [math.nan, math.inf, -math.inf, -1.0, 1e300, 5e-324])
@pytest.mark.parametrize("norm", [0, 1])
def test_any_float_is_survived(number, norm):
    """Python lets none of these through; the kernels have nothing that would crash of them."""
    for name in ("eps", "step_size", "radius", "low", "high"):
        plan = _C.Pack(**{**PACK, "norm": norm, "start": True, "project": True, "clamp": True, name: number})
        plan.pack("cpu", *[HERE + 1024 * place for place in range(7)], 1)
    for name in ("label_smoothing", "lam_max", "gamma", "sensitivity"):
        plan = _C.Loss(**{**LOSS, "window": 0, name: number})
        plan.forward("cpu", *[HERE + 1024 * place for place in range(5)], number, *[HERE + 6144] * 5,
                         *[HERE + 1024 * place for place in (7, 8, 9)], 1)  # fmt: skip


@pytest.mark.skipif("libasan" in os.environ.get("LD_PRELOAD", ""), reason="AddressSanitizer ends the process instead")
def test_a_sample_too_large_for_memory():
    """The l2 ball keeps a sample's numbers; nothing is read or written before they have a place."""
    for adv in (1, 3):  # a step; the start alone
        plan = _C.Pack(**{**PACK, "adv": adv, "norm": 1, "batch": 1, "part": 1, "channels": 1, "plane": 2**50})
        with pytest.raises(MemoryError):
            plan.pack("cpu", *[HERE + 1024 * place for place in range(7)], 1)
