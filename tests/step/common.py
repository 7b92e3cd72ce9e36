"""Shared by the tests of the steps: a small model, batches, and the training loop written by hand."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from elle_fast import AdaptiveLambda, ELLELoss
from tests.helpers import rng

EPS = 0.1


class Net(nn.Module):
    """Batch norm has buffers, dropout draws random numbers."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(6, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Dropout(0.2), nn.Linear(8, 3))

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.layers(x)
        return out


def parts(seed: int = 0, **options: Any) -> tuple[ELLELoss, nn.Module, torch.optim.Optimizer]:
    torch.manual_seed(seed)
    model = Net()
    lam = AdaptiveLambda(10.0, gamma=0.5, min_history=2, sensitivity=0.5)
    criterion = ELLELoss(EPS, lam if options.pop("adaptive", True) else 10.0, **options)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9, weight_decay=1e-3, fused=True)
    return criterion, model, optimizer


def batches(count: int, short: int | None = None) -> list[tuple[Tensor, Tensor]]:
    generator = rng(5)
    sizes = [8 if i != short else 5 for i in range(count)]
    return [(torch.rand(n, 6, generator=generator), torch.randint(3, (n,), generator=generator)) for n in sizes]


def everything(*parts: Any) -> list[Tensor]:
    criterion, model, optimizer = parts
    tensors = [*model.state_dict().values(), *criterion.state_dict().values()]
    tensors += [value for state in optimizer.state.values() for value in state.values() if isinstance(value, Tensor)]
    return [tensor.clone() for tensor in (*tensors, torch.get_rng_state())]


def by_hand(
    parts: tuple[Callable[..., Tensor], nn.Module, torch.optim.Optimizer],
    data: list[tuple[Tensor, Tensor]],
    rates: list[float],
    *,
    autocast: torch.dtype | None = None,
    scaler: Any = None,
    clip: float | None = None,
    outputs: list[Tensor] | None = None,
) -> list[float]:
    criterion, model, optimizer = parts
    losses = []
    for (x, y), rate in zip(data, rates, strict=True):
        for group in optimizer.param_groups:
            group["lr"] = rate
        optimizer.zero_grad()
        with torch.autocast("cpu", dtype=autocast, enabled=autocast is not None):
            loss = criterion(model, x, y)
        (loss if scaler is None else scaler.scale(loss)).backward()
        if clip is not None:
            if scaler is not None:
                scaler.unscale_(optimizer)
            nn.utils.clip_grad_norm_(model.parameters(), clip)
        if scaler is None:
            optimizer.step()
        else:
            scaler.step(optimizer)
            scaler.update()
        losses.append(loss.item())
        if outputs is not None:
            outputs.append(criterion.output)  # type: ignore[attr-defined]
    return losses


def same(one: list[Tensor], other: list[Tensor]) -> bool:
    return len(one) == len(other) and all(torch.equal(a, b) for a, b in zip(one, other, strict=True))


OPTIONS: dict[str, dict[str, Any]] = {
    "plain": {},
    "autocast": {"autocast": torch.bfloat16},
    "clipped": {"clip_grad_norm": 0.1},
}
RATES = [0.1, 0.2, 0.2, 0.05, 0.1, 0.3, 0.1, 0.0, 0.1, 0.1, 0.2, 0.1]
