"""Are the inputs within ``bounds``, and pixels where nothing says what they are? No answer waits for a GPU."""

from __future__ import annotations

from collections.abc import Callable
from weakref import ref

import torch
from torch import Tensor

from elle_fast._core import checks
from elle_fast._core.host_copy import HostCopy
from elle_fast._core.user_line import warn
from elle_fast.ops import dispatch

__all__ = ["ANY", "check_pixels", "check_range"]

# As bounds: x has values of any range, none is clamped, and nobody needs a warning.
ANY = "any"

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


def check_pixels(x: Tensor) -> None:
    """Warn once of pictures with values outside of [0, 1], for callers who were not told what x is.

    Most loaders hand out normalized pictures: an eps of 8/255 is then 1.8/255 of CIFAR's. A picture is ``[B, 1, H, W]``
    or ``[B, 3, H, W]``; other inputs, as rows and embeddings, have no range that could be expected. The first batch and
    every hundredth is looked at: on the CPU at once, on a GPU as in :func:`check_range`, and where that does not look
    neither does this.
    """
    if x.dim() != 4 or not checks.have_memory(x) or x.shape[1] not in (1, 3) or not dispatch.eager(x):
        return
    if x.device.type == "cpu" or (x.is_cuda and not torch.cuda.is_current_stream_capturing()):
        _pixel_watch.look(x, (0.0, 1.0))


class _Watch:
    """Looks at a batch now and then, until it has warned."""

    def __init__(self, say: Callable[[Tensor, tuple[float, float]], str | None] | None = None) -> None:
        self.say = say or _outside
        self.calls, self.warned = 0, False
        self.sent: HostCopy | None = None  # the lowest and highest value of a batch
        self.bounds = (0.0, 0.0)  # of that batch

    def look(self, x: Tensor, bounds: tuple[float, float]) -> None:
        if self.warned:
            return
        if self.sent is not None and self.sent.arrived():
            sent, self.sent = self.sent, None
            self._warn(self.say(sent.copy, self.bounds))
        if self.sent is None and self.calls % _PERIOD == 0:
            found = torch.stack(torch.aminmax(x.detach()))
            self.sent, self.bounds = HostCopy.start(found), bounds
            if self.sent is None and not found.is_cuda:
                self._warn(self.say(found, bounds))
        self.calls += 1

    def _warn(self, said: str | None) -> None:
        if said:
            self.warned = True
            warn(f"{said} (looked at now and then, and said once)")


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


def _not_pixels(values: Tensor, bounds: tuple[float, float]) -> str | None:
    low, high = values.tolist()
    slack = 4 * torch.finfo(values.dtype).eps
    if not (low < bounds[0] - slack or high > bounds[1] + slack):  # NaN is another matter
        return None
    return (
        f"x: expected pictures in [0, 1], as eps is in units of x, got values from {low:.4g} to {high:.4g}. Are they "
        "normalized? Then pass pixels, and the normalization as mean= and std= to ELLELoss or in the model. Else say "
        "what they are: bounds=(low, high), or bounds='any'"
    )


_watch = _Watch()
_pixel_watch = _Watch(_not_pixels)
