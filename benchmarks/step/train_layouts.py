"""Forward and backward alone, in each layout and precision, eager and compiled: what each of them adds."""

from __future__ import annotations

from collections.abc import Callable
from itertools import product

import torch
import torch.nn.functional as F

from benchmarks.harness.tables import rounded
from benchmarks.harness.timing import Pace, Side, WallClock, in_turns
from benchmarks.step.train_rows import CLASSES, Net
from elle_fast.recipes import compiling

ABOUT = {
    "layouts": "milliseconds of the network's forward and backward pass in train mode over a batch, medians, by turns; "
    "bf16 is autocast; compiled by torch.compile with static shapes",
}
_LAYOUTS = {"contiguous": torch.contiguous_format, "channels_last": torch.channels_last}
_DTYPES = {"fp32": None, "bf16": torch.bfloat16}


def times(net: Net, device: torch.device, rounds: int) -> dict[str, float | None]:
    """By precision, layout and whether it is compiled."""
    sides = {
        f"{dtype} {layout}{' compiled' * compiled}": Side(_passes(net, device, dtype, layout, compiled=compiled))
        for dtype, layout, compiled in product(_DTYPES, _LAYOUTS, (False, True))
    }
    pace = Pace(sample=0.0, side=0.0, fewest=rounds, most=rounds)
    found = in_turns(sides, pace, WallClock(device.type))
    return {name: rounded(1e3 * samples.median) for name, samples in found.items()}


def _passes(net: Net, device: torch.device, dtype: str, layout: str, *, compiled: bool) -> Callable[[], None]:
    model = net.built(device).train().to(memory_format=_LAYOUTS[layout])  # type: ignore[call-overload]
    x = torch.rand(net.batch, 3, net.pixels, net.pixels).to(device, memory_format=_LAYOUTS[layout])
    y = torch.randint(CLASSES, (net.batch,)).to(device)
    called = compiling.compiled(model, device) if compiled else model

    def passes() -> None:
        model.zero_grad(set_to_none=True)
        with torch.autocast(device.type, _DTYPES[dtype], enabled=_DTYPES[dtype] is not None):
            loss = F.cross_entropy(called(x), y)
        loss.backward()

    return passes
