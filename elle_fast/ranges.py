"""Are the inputs within ``bounds``? On the CPU an error if not; on a GPU a warning, once, without a wait."""

from __future__ import annotations

import warnings
from weakref import ref

import torch
from torch import Tensor

from elle_fast._core import checks
from elle_fast._core.host_copy import HostCopy
from elle_fast.ops import dispatch

__all__ = ["check_range"]

Bounds = tuple[float, float] | None

# On a GPU the first of so many calls is looked at: min and max of a batch are some five launches.
_PERIOD = 100

# The tensor looked at last on the CPU, its version then, and the bounds.
_last: tuple[ref[Tensor], tuple[int, Bounds] | None] | None = None


def check_range(x: Tensor, bounds: Bounds) -> None:
    """Refuse inputs outside of ``bounds``, as every point is clamped to these: x_adv would be far from x.

    What the host can read without waiting is looked at in each call, one pass over x. Of tensors on a GPU the first and
    every hundredth batch is; the result is read in a later call, when it is there, and what is outside is a warning.
    Nothing is looked at where tensors have no values (compiling, fake tensors, transforms) or where a dispatch mode
    watches; in a CUDA graph; and on other devices.

    Values may be outside by 4 roundings of x's dtype, as those of inputs that were normalized and put back. NaN is
    outside. On the CPU the tensor looked at last is not looked at again until torch counts a change of it: methods and
    their attacks both ask.

    Raises:
        ValueError: naming the argument, the bounds and x's lowest and highest value.
    """
    if bounds is None or not checks.have_memory(x) or not dispatch.eager(x):
        return
    if x.device.type == "cpu":
        global _last
        now = None if x.is_inference() else (x._version, bounds)  # torch counts no versions there
        if now is not None and _last is not None and _last[0]() is x and _last[1] == now:
            return
        if said := _outside(torch.stack(torch.aminmax(x)), bounds):
            raise ValueError(said)
        _last = ref(x), now
    elif x.is_cuda and not torch.cuda.is_current_stream_capturing():
        _watch.look(x, bounds)


class _Watch:
    """Looks at a batch now and then, until it has warned."""

    def __init__(self) -> None:
        self.calls, self.warned = 0, False
        self.sent: HostCopy | None = None  # the lowest and highest value of a batch
        self.bounds = (0.0, 0.0)  # of that batch

    def look(self, x: Tensor, bounds: tuple[float, float]) -> None:
        if self.warned:
            return
        if self.sent is not None and self.sent.arrived():
            said = _outside(self.sent.copy, self.bounds)
            self.sent = None
            if said:
                self.warned = True
                warnings.warn(f"{said} (looked at now and then, and said once)", stacklevel=2)
        if self.sent is None and self.calls % _PERIOD == 0:
            self.sent, self.bounds = HostCopy.start(torch.stack(torch.aminmax(x))), bounds
        self.calls += 1


def _outside(values: Tensor, bounds: tuple[float, float]) -> str | None:
    """What to say of the lowest and highest value, or ``None`` if they are in the bounds."""
    low, high = values.tolist()
    slack = 4 * torch.finfo(values.dtype).eps * max(map(abs, bounds))
    if bounds[0] - slack <= low and high <= bounds[1] + slack:  # false for NaN, too
        return None
    return (
        f"x: expected values within bounds={bounds}, got some from {low:.4g} to {high:.4g}; pass the range that x has, "
        "or x in that range (normalization belongs into the model, or into mean= and std=)"
    )


_watch = _Watch()
