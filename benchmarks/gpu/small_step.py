"""The part of gpu_report.py that times a step of ELLE-A, and checks that nothing in it waits for the device."""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor, nn

from benchmarks.gpu.run import Run, add_ratios, add_timings, copy_rate, eager_backends, recorded
from benchmarks.ops.sizes import EPS
from elle_fast import ELLELoss


def part_step(run: Run) -> None:
    """One forward and backward of ELLE-A around a small network: times, launches, and that nothing waits."""
    device, batch, width = run.device.device, *((4, 4) if run.device.dry else (128, 32))
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(3, width, 3, padding=1, bias=False),
        nn.BatchNorm2d(width),
        nn.ReLU(),
        nn.Conv2d(width, 2 * width, 3, stride=2, padding=1, bias=False),
        nn.BatchNorm2d(2 * width),
        nn.ReLU(),
        nn.AdaptiveAvgPool2d(4),
        nn.Flatten(),
        nn.Linear(32 * width, 10),
    ).to(device)
    size = 8 if run.device.dry else 32
    x, y = torch.rand(batch, 3, size, size, device=device), torch.randint(10, (batch,), device=device)
    parameters = list(model.parameters())
    run.record.update(batch=batch, shape=[3, size, size], timings={"step": {}}, launches={}, without_sync={})

    def step(criterion: ELLELoss) -> tuple[Tensor, ...]:
        loss = criterion(model, x, y)
        return loss, *torch.autograd.grad(loss, parameters)

    losses = {}
    for name, backend in eager_backends().items():
        torch.manual_seed(1)
        losses[name] = step(ELLELoss(EPS, lam=10.0, bounds=(0.0, 1.0), backend=backend))[0].detach()
    # The points differ by a rounding, and so a convolution by several, to which E_lin is sensitive.
    for loss in losses.values():
        torch.testing.assert_close(loss, losses["eager"], rtol=1e-3, atol=1e-5)
    sides = {}
    for name, backend in eager_backends().items():
        criterion = ELLELoss(EPS, lam=10.0, bounds=(0.0, 1.0), adaptive=True, backend=backend).to(device)
        sides[name] = [partial(step, criterion)] * 2
        with recorded(run.record, f"error in sync, {name}"):
            run.record["without_sync"][name] = False
            run.device.without_sync(sides[name][0])
            run.record["without_sync"][name] = True
        with recorded(run.record, f"error in launches, {name}"):
            run.record["launches"][name] = run.device.launches(sides[name][0])
        run.save()
    add_timings(run, run.record, "step", sides, replay=True, repeatable=False)
    rate = copy_rate(run)
    add_ratios(run.record, "step", 0, rate)
