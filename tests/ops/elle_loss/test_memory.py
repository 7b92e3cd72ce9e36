"""Layouts in memory."""

from __future__ import annotations

import torch
from torch import Tensor

from tests.helpers import (
    labels,
    let_kernels_write_nothing,
    matrix,
    probabilities,
    unit_roundoff,
)
from tests.ops.elle_loss.cases import DTYPES, LAM, OFS, POINTS, check, check_gradients, packed_logits


def unusual_views(tensor: Tensor) -> dict[str, Tensor]:
    unaligned = torch.empty(tensor.numel() + 1, dtype=tensor.dtype)
    unaligned[1:] = tensor.flatten()
    wide = torch.cat((tensor, tensor + 1, tensor[:, :1]), dim=1)
    return {
        "rows apart": wide[:, : tensor.shape[1]],
        "columns apart": torch.stack((tensor, tensor + 1), dim=-1)[..., 0],
        "transposed": tensor.T.contiguous().T,
        "unaligned": unaligned[1:].view_as(tensor),
        "one row": tensor[:1].expand_as(tensor),
        "one column": tensor[:, :1].expand_as(tensor),
    }


VIEWS = list(unusual_views(torch.zeros(2, 2)))


@matrix(share=0.2, points=POINTS, of=OFS, dtype=[torch.float64, torch.float32, torch.float16], view=VIEWS)
def test_views(where, points, of, dtype, view):
    """The layout of an argument changes neither values nor gradients: the formula is that of the same numbers."""
    logits, alpha = packed_logits(4, 6, points)
    target, strided = labels(4, 6), torch.stack((alpha, alpha + 1), 1)[:, 0]
    check_gradients(where, unusual_views(logits.to(dtype))[view], target, strided, each=False, points=points, of=of)
    check(where, logits.to(dtype), torch.stack((target, target), dim=1)[:, 0], alpha, points=points, of=of)
    check(where, logits.to(dtype), target[:1].expand(4), alpha[:1].expand(4), points=points, of=of)
    soft = unusual_views(probabilities(4, 6))[view]
    check_gradients(where, logits.to(dtype), soft, alpha, each=False, points=points, of=of)


@matrix(dtype=DTYPES, classes=[1, 8, 16, 17])
def test_rows_that_are_and_are_not_aligned(where, dtype, classes):
    """Whole rows of 16 bytes and others, at distances that are and are not multiples of that."""
    logits, alpha = packed_logits(3, 48, seed=11)
    soft = probabilities(3, 48)
    for start in (0, 1, 16):
        cut = slice(start, start + classes)
        check_gradients(where, logits.to(dtype)[:, cut], labels(3, classes), alpha, each=False)
        check_gradients(where, logits.to(dtype)[:, cut], soft[:, cut], alpha, each=False)


@matrix(of=OFS)
def test_one_row_for_all_gathers_their_gradients(where, of):
    logits, alpha = packed_logits(4, 6)
    row = logits[:1].to(where.exact).requires_grad_()
    spread = row.detach().repeat(16, 1).requires_grad_()
    target = labels(4, 6)
    grads = []
    for leaf, packed in ((row, row.expand(16, 6)), (spread, spread)):
        loss, _, _ = where.elle_loss(packed, target, alpha, LAM, of=of)
        grads += torch.autograd.grad(loss, leaf)
    # A sum of 16 entries.
    error = 16 * unit_roundoff(where.exact) * grads[1].abs().sum(dim=0)
    assert ((grads[0][0] - grads[1].sum(dim=0)).abs() <= error).all()


def test_the_fixture_poisons_what_no_kernel_writes(monkeypatch):
    """Without their kernels every result is NaN, so the comparisons above see whatever is not written."""
    where = let_kernels_write_nothing(monkeypatch)
    logits, alpha = packed_logits(2, 3)
    logits = logits.float().requires_grad_()
    values = where.elle_loss(logits, labels(2, 3), alpha, 1.0)
    (grad,) = torch.autograd.grad(values[0], logits)
    assert all(t.isnan().all() for t in (*values, grad))
