"""Layouts in memory; what is written, and what is left alone."""

from __future__ import annotations

import math
import weakref
from typing import Any

import torch

from elle_fast.functional import pack_points
from elle_fast.ops.pack_points import reference
from tests.helpers import (
    let_kernels_write_nothing,
    matrix,
    random,
    seed_of,
    unit_roundoff,
)
from tests.ops.pack_points.cases import DTYPES, EPS, SEED, VIEWS, check_packing, unusual_views


@matrix(share=0.1, dtype=DTYPES, norm=["linf", "l2"], x_view=VIEWS, grad_view=VIEWS)
def test_views(where, dtype, norm, x_view, grad_view):
    x, grad = random(2, 3, 7, 5, seed=12, dtype=dtype), (random(2, 3, 7, 5, seed=13) - 0.5).to(dtype)
    plain = check_packing(where, x, grad=grad, norm=norm)
    views = unusual_views(x)[x_view], unusual_views(grad)[grad_view]
    packed, _ = where.pack_points(*views, EPS, seed=seed_of(SEED), norm=norm)
    assert packed.is_contiguous(memory_format=torch.channels_last) == (x_view == "channels_last")
    assert packed.is_contiguous() == (x_view != "channels_last")
    if norm == "linf":
        assert torch.equal(packed, plain)
    else:
        # Another order of summation in the lengths: d = 105 roundings at most, then one of the output's.
        bound = 105 * unit_roundoff(torch.float32) * EPS + 2 * unit_roundoff(dtype) * 1.1
        assert (packed - plain).abs().max().item() <= bound


@matrix()
def test_stride_zero(where):
    x = torch.tensor([[[0.2]], [[0.6]]]).expand(2, 3, 5)
    grad = torch.tensor([1.0]).expand(2, 3, 5)
    packed = check_packing(where, x, grad=grad)
    assert torch.equal(packed, check_packing(where, x.contiguous(), grad=grad.contiguous()))
    whole_batch = torch.tensor([[0.2, 0.5, 0.7]]).expand(4, 3)
    packed = check_packing(where, whole_batch, grad=torch.zeros(1, 1).expand(4, 3))
    assert len({tuple(row) for row in packed[4:8].tolist()}) == 4  # the same x, but a noise for each sample


FORMATS = [
    (torch.channels_last, (2, 3, 7, 5)),
    (torch.contiguous_format, (2, 3, 7, 5)),
    (torch.channels_last_3d, (2, 3, 4, 5, 6)),
    (torch.contiguous_format, (2, 3, 4, 5, 6)),
]


@matrix(share=0.3, norm=["linf", "l2"], form=FORMATS, x_last=[False, True], grad_last=[False, True])
def test_memory_format_asked_for(where, norm, form, x_last, grad_last):
    asked, shape = form
    last = torch.channels_last if len(shape) == 4 else torch.channels_last_3d
    x = random(*shape, seed=14)
    source = x.contiguous(memory_format=last) if x_last else x
    grad = (x - 0.5).contiguous(memory_format=last) if grad_last else x - 0.5
    packed = check_packing(where, source, grad=grad, memory_format=asked, norm=norm, start=1.0)
    assert packed.is_contiguous(memory_format=asked)
    if norm == "linf":
        assert torch.equal(packed, check_packing(where, x, grad=x - 0.5, start=1.0))


@matrix(shape=[(2, 1, 4, 4), (2, 5, 1, 1), (1, 1, 1, 1), (2, 1, 2, 3, 2)])
def test_formats_that_coincide(where, shape):
    """With one channel or one pixel a tensor is contiguous and channels-last at once."""
    last = torch.channels_last if len(shape) == 4 else torch.channels_last_3d
    x, channels = random(*shape, seed=31), shape[1]
    options: dict[str, Any] = {"mean": [0.5] * channels, "std": [i + 1.0 for i in range(channels)], "start": 1.0}
    for source in (x, x.contiguous(memory_format=last)):
        for asked in (torch.preserve_format, last):
            packed = check_packing(where, source, grad=x - 0.5, memory_format=asked, **options)
            assert packed.is_contiguous()
            assert packed.is_contiguous(memory_format=last)


@matrix()
def test_channels_last_3d_is_kept(where):
    x = random(2, 3, 4, 5, 6, seed=15).contiguous(memory_format=torch.channels_last_3d)
    assert check_packing(where, x).is_contiguous(memory_format=torch.channels_last_3d)


@matrix(norm=["linf", "l2"])
def test_inputs_are_left_alone(where, norm):
    """``Where.call`` compares them before and after; here with every option that might be applied in place."""
    x, grad = random(2, 3, 4, 4, seed=24), random(2, 3, 4, 4, seed=25) - 0.5
    seed, alpha = seed_of(3), random(2, seed=26)
    options: dict[str, Any] = {"seed": seed, "norm": norm, "mean": [0.5] * 3, "std": [2.0] * 3, "bounds": (0.4, 0.6)}
    where.pack_points(x, grad, EPS, alpha=alpha, start=1.0, project=True, **options)
    where.pack_points(x, None, EPS, x_adv=grad, **options)
    where.random_start(x, EPS, seed=seed, bounds=(0.4, 0.6), norm=norm)


@matrix(dtype=DTYPES, channels_last=[False, True])
def test_out_is_written_and_returned(where, dtype, channels_last):
    form = torch.channels_last if channels_last else torch.contiguous_format
    x, grad = (random(3, 3, 5, 7, seed=s).to(dtype).to(memory_format=form) for s in (51, 52))
    options: dict[str, Any] = {"seed": seed_of(SEED), "fraction": 0.5, "triplets": 2}
    expected = where.pack_points(x, grad, EPS, **options)
    out = tuple(torch.full_like(tensor, math.nan, device=where.device) for tensor in expected)
    result = where.pack_points(x, grad, EPS, out=out, **options)
    for kept, got, right in zip(out, result, expected, strict=True):
        assert kept.data_ptr() == got.data_ptr() or where.device != "cpu"
        assert torch.equal(kept.cpu(), right)
        assert torch.equal(got, right)
        assert kept._version > 0  # so that autograd refuses a graph that saved what was there
    assert result[0].is_contiguous(memory_format=form)


def test_the_fixture_poisons_what_no_kernel_writes(monkeypatch):
    """Without their kernels every result is NaN, so the comparisons above see whatever is not written."""
    where = let_kernels_write_nothing(monkeypatch)
    x = random(2, 3, seed=37)
    points, alpha = where.pack_points(x, x, EPS, seed=seed_of(1))
    start = where.random_start(x, EPS, seed=seed_of(1))
    assert all(t.isnan().all() for t in (points, alpha, start))


def test_the_statistics_that_are_kept_are_bounded():
    """As many of them as a process may train with in turn; a thousand of a thousand channels took 74 MiB."""
    x = random(2, 3, seed=1)
    reference._cached_constant.cache_clear()
    for i in range(200):
        pack_points(x, x, 0.1, seed=seed_of(0), mean=(0.0, 0.1, i / 200), std=(1.0, 1.0, 1.0), backend="reference")
    info = reference._cached_constant.cache_info()
    assert info.misses >= 400  # all of them had been made
    assert info.currsize == info.maxsize == 32


def test_what_a_graph_captures_is_kept(monkeypatch):
    """A replay reads its address, whatever came after."""
    monkeypatch.setattr(reference, "_cached_constant", lambda values, dtype, device: torch.tensor(values, dtype=dtype))
    monkeypatch.setattr(reference, "_CAPTURED", {})
    cuda = torch.device("cuda")
    capturing: list[bool] = []
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: bool(capturing))
    reference.constant((1.0,), torch.float32, cuda)
    assert not reference._CAPTURED
    capturing.append(True)
    found = weakref.ref(reference.constant((2.0,), torch.float32, cuda))
    capturing.clear()
    assert found() is not None
