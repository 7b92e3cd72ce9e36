"""elle_fast.testing: what it forbids and counts, on tensors of which that is known."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

from elle_fast.backends import extension
from elle_fast.functional import draw_seed, pack_points
from elle_fast.ops import dispatch
from elle_fast.testing import HostSyncError, OpCounter, call_counter, differentiable_inputs, no_host_sync

X = torch.arange(4.0)
READS: dict[str, Callable[[], Any]] = {
    "item": X.sum().item,
    "cpu": X.cpu,
    "tolist": X.tolist,
    "bool": lambda: bool(X.any()),
    "float": lambda: float(X.sum()),
    "nonzero": X.nonzero,
    "mask": lambda: X[X > 0.5],
    "assigned mask": lambda: X.clone().index_put_((X > 0.5,), torch.zeros(())),
    "equal": lambda: torch.equal(X, X),
    "unique": X.unique,
}


@pytest.mark.parametrize("name", READS)
def test_what_waits_is_refused(name):
    READS[name]()
    with no_host_sync(), pytest.raises(HostSyncError, match="waits for the device"):
        READS[name]()
    READS[name]()


def test_what_does_not_wait_is_left_alone():
    with no_host_sync():
        assert (X[torch.tensor([1])] + X.double().sum()).shape == (1,)
        points, _ = pack_points(torch.rand(2, 3), None, 0.1, seed=draw_seed(X.device), x_adv=torch.rand(2, 3))
    assert points.shape == (8, 3)


@pytest.mark.skipif(extension.load() is None, reason="the extension is not built")
def test_a_backend_that_waits_inside_an_operator_is_refused(monkeypatch):
    monkeypatch.setattr(dispatch.Op, "kernel", lambda op, backend: lambda *args: X.sum().item())
    mine = dispatch.Op.kernel
    with no_host_sync(), pytest.raises(HostSyncError):
        pack_points(torch.rand(2, 3), None, 0.1, seed=draw_seed(X.device), x_adv=torch.rand(2, 3), backend="cpp")
    assert dispatch.Op.kernel is mine


def test_flops_operators_and_rows():
    layer = nn.Linear(5, 7, bias=False)
    model, rows = call_counter(layer)
    x = torch.rand(3, 5)
    with OpCounter(x.device) as forward, torch.no_grad():
        model(x)
    with OpCounter(x.device) as both:
        model(x).sum().backward()
    with OpCounter(x.device) as whole, differentiable_inputs(layer):
        model(x).sum().backward()
    assert rows == [3, 3, 3]
    assert forward.flops == 2 * 3 * 5 * 7
    assert both.flops == 2 * forward.flops  # no data gradient in the first layer
    assert whole.flops == 3 * forward.flops
    assert forward.operators == 1
    with OpCounter(x.device) as nothing:
        torch.empty_like(x).view(-1)
    assert nothing.operators == nothing.host_syncs == 0


def test_host_syncs_are_seen():
    x = torch.rand(4)
    calls = (x.sum().item, lambda: bool(x.any()), x.nonzero, lambda: x[x > 0.5], lambda: torch.equal(x, x))
    for call in calls:
        counter = OpCounter(x.device)
        with counter:
            call()
        assert counter.host_syncs == 1
    with counter:
        x[torch.tensor([1])] + x.to(torch.float64).sum()
    assert counter.host_syncs == 1


def test_copies_from_the_host_are_host_syncs():
    # The meta device stands in for one that is not the host.
    x = torch.rand(4)
    there = x.to("meta")
    calls = (lambda: x.to("meta"), lambda: there.copy_(x), lambda: there.copy_(x, non_blocking=True))
    # lift_fresh is all that torch.tensor(1.0, device=...) dispatches.
    for call in (*calls, lambda: torch.ops.aten.lift_fresh(there), lambda: there[torch.tensor([1])]):
        counter = OpCounter(there.device)
        with counter:
            call()
        assert counter.host_syncs == 1
    with counter:
        there.copy_(there.to(torch.float64)) + torch.zeros(4, device="meta")
        x.to(torch.float64)
    assert counter.host_syncs == 1  # no more than before
