"""The state of ELLE-A: lam, and what it knows of E_lin so far, on the device."""

from __future__ import annotations

import math
from collections.abc import Callable
from copy import deepcopy
from ctypes import c_float
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from elle_fast._core import checks, devices
from elle_fast._core.host_copy import HostCopy
from elle_fast._core.options import Options
from elle_fast.ops.elle_loss import op, reference
from elle_fast.ops.elle_loss.validation import LamRule, Linearity, check_relative

_KEPT = ("mean", "deviations", "history", "relative_mean")  # what may be known of E_lin
_RANGES = dict.fromkeys(("mean", "history"), (-math.inf, math.inf, "finite numbers"))
_RANGES["relative_mean"] = (0.0, 1.0, "a number in [0, 1]")
_DTYPES = {
    "lam": torch.float32,
    "count": torch.int64,
    "skipped": torch.int64,
    **dict.fromkeys(_KEPT, torch.float64),
}
# The options of a rule, with their defaults.
RULES: dict[str, dict[str, Any]] = {
    "paper": {"gamma": 0.99, "sensitivity": 2.0, "window": None},
    "relative": {"gamma": 0.9, "threshold": 0.2, "horizon": 8},
}

_OF_A_RULE = frozenset(name for own in RULES.values() for name in own)
_LONGEST_WINDOW = 2**27  # a GiB

_DISTRIBUTED = dist.is_available()


def _dtype(name: str, *on: torch.device) -> torch.dtype:
    """A buffer's dtype on such devices."""
    dtype = _DTYPES[name]
    return dtype if dtype != torch.float64 or all(map(devices.has_float64, on)) else torch.float32


def _group(name: str, value: Any) -> Any:
    if value is not None and not (_DISTRIBUTED and isinstance(value, dist.ProcessGroup)):
        raise TypeError(
            f"process_group: expected None or a torch.distributed.ProcessGroup, got {checks.describe(value)}"
        )
    return value


def _check_values(name: str, value: Tensor) -> None:
    """In their range: one NaN would end the regularisation for ever."""
    if not checks.have_memory(value) or value.numel() == 0:
        return
    least, most, interval = _RANGES.get(name, (0.0, math.inf, "a finite number >= 0"))
    for number in (value.min().item(), value.max().item()):
        if not math.isfinite(number) or not least <= number <= most:
            raise ValueError(f"{name}: expected {interval}, as it is ELLE-A's state, got {number}")


def _state(name: str, value: Any) -> Tensor:
    if not isinstance(value, Tensor):
        expected = f"{name}: expected a tensor, as it is ELLE-A's state (lam_max is the option)"
        raise TypeError(f"{expected}, got {checks.describe(value)}")
    if value.dim() != (name == "history"):
        shape = "[window]" if name == "history" else "[]"
        raise ValueError(f"{name}: expected a tensor of shape {shape}, got {checks.describe(value)}")
    _check_values(name, value)
    return value.to(_dtype(name, value.device)).contiguous()


class AdaptiveLambda(Options, nn.Module):
    r"""The regularisation weight of ELLE-A, which is high after a detection and decays.

    lam starts at ``start``. With ``rule="paper"`` (Algorithm 1, lines 9 to 11) each :meth:`update` with this step's
    E_lin does

    .. math::
        lam \leftarrow \begin{cases} lam_{max} & E_{lin} > mean(h) + sensitivity \cdot std(h) \\
        gamma \cdot lam & \text{otherwise} \end{cases}, \qquad h \leftarrow h + [E_{lin}]

    with the population standard deviation. With ``rule="relative"`` it takes in relative E_lin, the part that is not
    linear of how the loss changes from x_a to x_b, and compares its exponentially weighted mean m with a number:

    .. math::
        e = \frac{\sum_i r_i^2}{\sum_i r_i^2 + (L(x_b) - L(x_a))^2 + 10^{-12} (1 + L(x_c)^2)}, \qquad
        m \leftarrow m + \max(1 / horizon, 1 / k) (e - m), \qquad
        lam \leftarrow \begin{cases} lam_{max} & m > threshold \\ gamma \cdot lam & \text{otherwise} \end{cases}

    in step k = 1, 2, ... E_lin of a healthy model moves over orders of magnitude as it learns, and is lowered by the
    regulariser; e has no scale, and there is no history that either could mislead (how often each rule is wrong:
    benchmarks/results/detector_curves.json). It is of ``points="elle"`` and of losses, on 16 samples or more over all
    ranks. Rounding in bf16 or fp16 looks like a collapse: there pass ``triplet_precision="fp32"`` to the criterion.

    Time and memory per step do not grow: count, mean and sum of squared deviations are kept in float64 (Welford), or
    the last ``window`` values, or m; in float32 on a device without float64, such as MPS. All state is in buffers on
    the device of E_lin; nothing waits for the device. A non-finite E_lin changes neither lam nor what is known; it is
    counted in ``skipped``. In a criterion a call is one update unless it is frozen (:meth:`ELLELoss.frozen
    <elle_fast.ELLELoss.frozen>`) or the model is in eval mode. Under ``torch.distributed`` each step's E_lin is that of
    all ranks, so that each has the same lam: a wrapper's ``join()`` is refused.

    A training in phases, each with images of another size, calls :meth:`restart` before each: E_lin of one phase says
    nothing of the next (the authors' ImageNet code). There, at eps 16/255 ``start`` is lam_max, and with N-FGSM
    ``ramp`` is 2,500: lam_max grows from 0, and lam does not decay meanwhile.

    Args:
        lam: lam_max, ``>= 0``.
        gamma: decay per step, in ``[0, 1]``; by default 0.99, with ``rule="relative"`` 0.9.
        sensitivity: standard deviations above the mean that count as a detection, ``>= 0``; by default 2. Of
            ``rule="paper"``, as ``window``.
        min_history: steps that must have been seen before a detection is possible, ``>= 1``.
        window: detect against the last ``window`` values only (``>= min_history``); ``None``: against all.
        process_group: ranks to average over; ``None`` is the default group, if there is one.
        start: lam before the first step, and after :meth:`restart`, ``>= 0``.
        ramp: ``n >= 1``: while the history holds ``k <= n`` values, a detection sets lam to ``lam_max * k / n``, and
            lam does not decay; ``start`` is then 0. Non-finite E_lin do not count. The update is some twenty small
            operations of torch's on any backend, in place of one launch. ``None``: lam_max from the first step on.
        rule: ``"paper"`` or ``"relative"``.
        threshold: of m, in ``[0, 1]``. Of ``rule="relative"``, as ``horizon``.
        horizon: steps over which relative E_lin is averaged, ``>= 1``.

    Raises:
        TypeError, ValueError: naming the argument, what was expected and what was got.
    """

    _changeable = {  # noqa: RUF012
        **dict.fromkeys(("lam_max", "sensitivity"), partial(checks.real, low=0)),
        **dict.fromkeys(("gamma", "threshold"), partial(checks.real, low=0, high=1)),
        "horizon": partial(checks.integer, low=1),
        "process_group": _group,
        **dict.fromkeys(_DTYPES, _state),
    }

    lam: Tensor
    count: Tensor
    skipped: Tensor
    mean: Tensor
    deviations: Tensor
    history: Tensor
    relative_mean: Tensor
    gamma: float
    sensitivity: float
    window: int | None
    threshold: float
    horizon: int

    def __init__(
        self,
        lam: float,
        gamma: float | None = None,
        sensitivity: float | None = None,
        min_history: int = 3,
        window: int | None = None,
        process_group: dist.ProcessGroup | None = None,
        start: float = 0.0,
        ramp: int | None = None,
        rule: str = "paper",
        threshold: float | None = None,
        horizon: int | None = None,
    ) -> None:
        super().__init__()
        self.lam_max = checks.real("lam", lam, low=0)
        self.process_group = process_group
        self.min_history = least = checks.integer("min_history", min_history, low=1)
        if window is not None:
            checks.integer("window", window, low=least, high=_LONGEST_WINDOW)
        self.rule = checks.choice("rule", rule, RULES)
        given: dict[str, Any] = {"gamma": gamma, "sensitivity": sensitivity, "window": window}
        given |= {"threshold": threshold, "horizon": horizon}
        for name, value in given.items():
            if name in RULES[rule]:
                setattr(self, name, RULES[rule][name] if value is None else value)
            elif value is not None:
                raise ValueError(f"{name}: expected None with rule={rule!r}, which has none, got {checks.shown(value)}")
        self.start = checks.real("start", start, low=0)
        self.ramp = None if ramp is None else checks.integer("ramp", ramp, low=1)
        if self.ramp is not None and self.start > 0:
            raise ValueError(f"start: expected 0 with ramp={ramp}, by which lam grows from 0, got {start}")
        for name in ("lam", "count", "skipped", *self._kept):
            shape = (window,) if window is not None and name == "history" else ()
            self.register_buffer(name, torch.zeros(shape, dtype=_DTYPES[name], device="cpu"))
        self.restart()
        self._sent: HostCopy | None = None

    def __setattr__(self, name: str, value: Any) -> None:
        if name in _OF_A_RULE and name not in RULES[self.rule]:
            self._refuse(name, value, f"it is no option of rule={self.rule!r}")
        super().__setattr__(name, value)

    @property
    def _kept(self) -> tuple[str, ...]:
        """The buffers of what is known of E_lin."""
        if self.rule == "relative":
            return ("relative_mean",)
        return ("mean", "deviations") if self.window is None else ("history",)

    def check_options(self, options: Linearity) -> None:
        """Raise a ValueError if the rule cannot look at such an E_lin."""
        if self.rule == "relative":
            check_relative(options)

    @torch.no_grad()
    def restart(self) -> None:
        """Begin a new phase: lam is ``start``, the history empty, the ramp at its beginning; ``skipped`` counts on.

        In place, so that a captured step goes on; nothing waits for the device. Under ``torch.distributed`` every
        process has to call it.
        """
        for name, buffer in self.named_buffers(recurse=False):
            if name != "skipped":
                buffer.zero_()
        self.lam.fill_(self.start)

    @torch.no_grad()
    def update(self, e_lin: Tensor, backend: str = "auto") -> Tensor:
        """Take in this step's E_lin and return the new lam.

        Args:
            e_lin: 0-dim floating tensor; no gradient flows through it. With ``rule="relative"`` relative E_lin
                (:func:`elle_fast.functional.relative_linearity`).
            backend: ``"auto"`` or a name from :data:`elle_fast.backends.BACKENDS`.

        Returns:
            lam, 0-dim float32 on e_lin's device, a copy that later updates leave alone.
        """
        floating = isinstance(e_lin, Tensor) and e_lin.is_floating_point()
        if not floating or e_lin.dim() != 0:
            raise checks.refusal("e_lin: expected a 0-dim floating-point tensor", e_lin, floating)
        return self.take_in(e_lin, None, backend)

    @torch.no_grad()
    def take_in(self, e_lin: Tensor, relative: Tensor | None, backend: str) -> Tensor:
        """:meth:`update`; relative E_lin may be given as the numerator and the denominator ``[2]`` of this process."""
        state, ranks = self.state(e_lin.device), self.ranks()
        value = e_lin if relative is None else relative
        if ranks > 1:
            value = value.to(state[3].dtype, copy=True)
            dist.all_reduce(value, group=self.process_group)
            value = value / ranks
        if relative is not None:
            value = value[0] / value[1]
        return self._moved(value, state, backend)

    def _moved(self, e_lin: Tensor, state: list[Tensor], backend: str) -> Tensor:
        return op.update_lam(e_lin, state, self.numbers, backend, self.ramp)

    @property
    def fused(self) -> bool:
        """Whether the kernels of elle_loss can update lam: E_lin is this process' own, and there is no ramp."""
        return self.ramp is None and self.ranks() == 1

    def send_to_host(self) -> None:
        """Start copying lam to the host, so that :meth:`on_host` does not wait for work launched later."""
        self._sent = HostCopy.start(self.lam)

    def on_host(self) -> float:
        """lam as a number: from the copy that :meth:`send_to_host` started, or from lam itself if it changed since."""
        sent = self._sent
        return self.lam.item() if sent is None or not sent.holds(self.lam) else sent.item()

    def at_most(self, part: float) -> bool:
        """Whether lam, as on the host, is at most this part of the highest."""
        return self.on_host() <= c_float(self.lam_max * part).value  # rounded as lam is, so that 1 takes in lam_max

    def moments(self) -> tuple[Tensor, Tensor]:
        """Mean and population standard deviation of the history, 0-dim, in its dtype; both 0 while it is empty.

        RuntimeError with ``rule="relative"``, which has none.
        """
        if self.rule == "relative":
            raise RuntimeError("rule: expected 'paper', which has a history, got 'relative'")
        return reference.moments(self.state(self.lam.device))

    @property
    def numbers(self) -> LamRule:
        """The options that an update needs."""
        if self.rule == "paper":
            return LamRule(self.lam_max, self.gamma, self.sensitivity, self.min_history)
        return LamRule(self.lam_max, self.gamma, 0.0, self.min_history, self.threshold, 1 / self.horizon)

    def state(self, device: torch.device) -> list[Tensor]:
        """The buffers on ``device``: lam, count, skipped, and mean and deviations, the history or relative E_lin."""
        # From the dictionary itself, in a hot path: each attribute of a module costs a search.
        buffers: dict[str, Any] = self._buffers
        if buffers["lam"].device != device:
            self.to(device)
        return [*buffers.values()]

    def ranks(self) -> int:
        """Processes whose E_lin is averaged."""
        if not _DISTRIBUTED or not dist.is_initialized():
            return 1
        return dist.get_world_size(self.process_group)

    def _load_from_state_dict(self, state_dict: Any, prefix: str, *args: Any, **kwargs: Any) -> None:
        names = [name for name in _KEPT if prefix + name in state_dict]
        if names and ("relative_mean" in names) is not (self.rule == "relative"):
            got = f"got one with {', '.join(names)}"
            raise ValueError(
                f"state_dict: expected the state of rule={self.rule!r}, with {', '.join(self._kept)}, {got}"
            )
        for name, _ in self.named_buffers(recurse=False):  # before any of them is taken
            if isinstance(value := state_dict.get(prefix + name), Tensor):
                _check_values(name, value)
        super()._load_from_state_dict(state_dict, prefix, *args, **kwargs)
        # With assign=True they are the checkpoint's own tensors, of whatever dtype and layout.
        for name, buffer in self.named_buffers(recurse=False):
            setattr(self, name, buffer)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> AdaptiveLambda:
        # model.half() and .to(dtype) cast every floating buffer; a history in float16 would be worthless.
        # They are cast before they go to a device without float64, and after they come from one.
        device, buffers = fn(self.count).device, self._buffers
        kept = {name: buffer.to(_dtype(name, device, buffer.device)) for name, buffer in self.named_buffers()}
        buffers.update(kept)
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        for name, before in kept.items():
            dtype = _dtype(name, device)
            if self.get_buffer(name).dtype != dtype:
                buffers[name] = before.to(device).to(dtype)
        return self

    def __getstate__(self) -> dict[str, Any]:
        # A copy of lam under way belongs to this object alone, and an event cannot be pickled.
        return {**self.__dict__, "_sent": None}

    def __deepcopy__(self, memo: dict[int, Any]) -> AdaptiveLambda:
        copied = memo[id(self)] = self.__class__.__new__(self.__class__)
        memo[id(self.process_group)] = self.process_group  # the processes are the same
        copied.__dict__.update(deepcopy(self.__getstate__(), memo))
        return copied

    @property
    def options(self) -> dict[str, Any]:
        """The constructor's numbers, as they are now."""
        of_rule = {"paper": "sensitivity min_history window", "relative": "min_history rule threshold horizon"}
        own = {name: getattr(self, name) for name in ("gamma", *of_rule[self.rule].split())}
        first = {name: value for name, value in (("start", self.start), ("ramp", self.ramp)) if value}
        return {"lam": self.lam_max, **own, **first}

    def extra_repr(self) -> str:
        """The options, as ``repr`` shows them."""
        return ", ".join(f"{name}={value!r}" for name, value in self.options.items())
