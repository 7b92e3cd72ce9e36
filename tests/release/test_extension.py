"""What every wheel is checked with: the recorded digests are the reference's, and a wrong extension is found out."""

from __future__ import annotations

import hashlib
from typing import Any

import pytest
import torch

from elle_fast import functional
from elle_fast.backends import extension
from tests.release import check_extension as checked

_C: Any = extension.load()
needs_extension = pytest.mark.skipif(_C is None, reason="the extension is not built")


def by_the_reference(options: dict[str, Any]) -> str:
    """The digest of what plain torch makes of a plan's options."""
    plan = {**checked.PACK, **options}
    shape = (checked.BATCH, checked.CHANNELS, 5, 7)
    x, grad = (torch.tensor(values).view(shape) for values in (checked.pixels(), checked.gradient()))
    mean, std = ((0.5, 0.25, 0.125), (0.5, 0.25, 0.125)) if plan["normalize"] else (None, None)
    points, alpha = functional.pack_points(
        x,
        grad,
        plan["eps"],
        seed=torch.tensor(checked.SEED),
        step_size=plan["step_size"],
        start=plan["radius"] / plan["eps"],
        project=plan["project"],
        bounds=(0.0, 1.0) if plan["clamp"] else None,
        points=("elle", "elle-2p")[plan["points"]],
        triplets=plan["triplets"],
        fraction=plan["part"] / plan["batch"],
        sample_offset=plan["sample_offset"],
        dtype=(torch.float32, torch.float16, torch.bfloat16)[plan["points_type"]],
        mean=mean,
        std=std,
        backend="reference",
    )
    if plan["points_last"]:
        points = points.permute(0, 2, 3, 1)
    as_bytes = [t.contiguous().view(torch.uint8).numpy().tobytes() for t in (points, alpha)]
    return hashlib.sha256(b"".join(as_bytes)).hexdigest()[:16]


@pytest.mark.parametrize("name", checked.CASES)
def test_the_recorded_digests_are_the_references(name):
    options, digest = checked.CASES[name]
    assert by_the_reference(options) == digest


@needs_extension
def test_this_extension_computes_what_it_should():
    assert checked.check(_C) == []


class Wrong:
    """An extension whose points or losses are another's."""

    def __init__(self, **replaced: Any) -> None:
        self.replaced = replaced

    def __getattr__(self, name: str) -> Any:
        return self.replaced.get(name) or getattr(_C, name)


@needs_extension
def test_a_wrong_extension_is_found_out():
    def pack(**plan: Any) -> Any:
        return _C.Pack(**{**plan, "eps": plan["eps"] * 1.1})

    def loss(**plan: Any) -> Any:
        return _C.Loss(**{**plan, "label_smoothing": 1e-3})

    isas, cases = len(_C.isas()), len(checked.CASES)
    assert len(checked.check(Wrong(Pack=pack))) == 2 * isas * cases
    wrong = checked.check(Wrong(Loss=loss))
    assert {line.split(", ")[2].split(":")[0] for line in wrong} == {"loss", "ce", "e_lin"}
