"""The state of ELLE-A: lam and the history of E_lin, on the device."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from elle_fast._core import checks
from elle_fast._core.host_copy import HostCopy
from elle_fast.ops.elle_loss import op, reference
from elle_fast.ops.elle_loss.validation import LamRule, Linearity

_DTYPES = {
    "lam": torch.float32,
    "count": torch.int64,
    "skipped": torch.int64,
    "mean": torch.float64,
    "deviations": torch.float64,
    "history": torch.float64,
}

_DISTRIBUTED = dist.is_available()


class AdaptiveLambda(nn.Module):
    r"""The regularisation weight of ELLE-A (paper, Algorithm 1, lines 9 to 11).

    lam starts at 0. Each :meth:`update` with this step's E_lin does

    .. math::
        lam \leftarrow \begin{cases} lam_{max} & E_{lin} > mean(h) + sensitivity \cdot std(h) \\
        gamma \cdot lam & \text{otherwise} \end{cases}, \qquad h \leftarrow h + [E_{lin}]

    with the population standard deviation. Time and memory per step do not grow with the history: count, mean and sum
    of squared deviations are kept in float64 (Welford), or the last ``window`` values. All state is in buffers on the
    device of E_lin; nothing waits for the device. A non-finite E_lin changes neither lam nor the history; it is
    counted in ``skipped``. In a criterion a call is one update unless it is frozen
    (:meth:`ELLELoss.frozen <elle_fast.ELLELoss.frozen>`) or the model is in eval mode. Under ``torch.distributed``
    E_lin is averaged over the ranks, so that each has the same lam.

    Args:
        lam: lam_max, ``>= 0``.
        gamma: decay per step, in ``[0, 1]``.
        sensitivity: standard deviations above the mean that count as a detection, ``>= 0``.
        min_history: values that the history must hold before a detection is possible, ``>= 1``.
        window: detect against the last ``window`` values only (``>= min_history``); ``None``: against all.
        process_group: ranks to average over; ``None`` is the default group, if there is one.

    Raises:
        TypeError, ValueError: naming the argument, what was expected and what was got.
    """

    lam: Tensor
    count: Tensor
    skipped: Tensor
    mean: Tensor
    deviations: Tensor
    history: Tensor

    def __init__(
        self,
        lam: float,
        gamma: float = 0.99,
        sensitivity: float = 2.0,
        min_history: int = 3,
        window: int | None = None,
        process_group: dist.ProcessGroup | None = None,
    ) -> None:
        super().__init__()
        self.lam_max = checks.real("lam", lam, low=0)
        self.gamma = checks.real("gamma", gamma, low=0, high=1)
        self.sensitivity = checks.real("sensitivity", sensitivity, low=0)
        self.min_history = checks.integer("min_history", min_history, low=1)
        self.window = None if window is None else checks.integer("window", window, low=self.min_history)
        self.process_group = process_group
        kept = ("mean", "deviations") if self.window is None else ("history",)
        for name in ("lam", "count", "skipped", *kept):
            shape = (self.window,) if self.window is not None and name == "history" else ()
            self.register_buffer(name, torch.zeros(shape, dtype=_DTYPES[name]))
        self._sent: HostCopy | None = None

    @torch.no_grad()
    def update(self, e_lin: Tensor, backend: str = "auto") -> Tensor:
        """Take in this step's E_lin and return the new lam.

        Args:
            e_lin: 0-dim floating tensor; no gradient flows through it.
            backend: ``"auto"`` or a name from :data:`elle_fast.backends.BACKENDS`.

        Returns:
            lam, 0-dim float32 on e_lin's device, a copy that later updates leave alone.
        """
        floating = isinstance(e_lin, Tensor) and e_lin.is_floating_point()
        if not floating or e_lin.dim() != 0:
            raise checks.refusal("e_lin: expected a 0-dim floating-point tensor", e_lin, floating)
        state = self.state(e_lin.device)
        ranks = self.ranks()
        if ranks > 1:
            e_lin = e_lin.to(torch.float64, copy=True)
            dist.all_reduce(e_lin, group=self.process_group)
            e_lin = e_lin / ranks
        return op.update_lam(e_lin, state, self.rule, backend)

    def send_to_host(self) -> None:
        """Start copying lam to the host, so that :meth:`on_host` does not wait for work launched later."""
        self._sent = HostCopy.start(self.lam)

    def on_host(self) -> float:
        """lam as a number: from the copy that :meth:`send_to_host` started, or from lam itself if it changed since."""
        sent = self._sent
        return self.lam.item() if sent is None or not sent.holds(self.lam) else sent.item()

    def moments(self) -> tuple[Tensor, Tensor]:
        """Mean and population standard deviation of the history, 0-dim float64; both 0 while it is empty."""
        return reference.moments(self.state(self.lam.device))

    @property
    def rule(self) -> LamRule:
        """The options that an update needs."""
        return LamRule(self.lam_max, self.gamma, self.sensitivity, self.min_history)

    def state(self, device: torch.device) -> list[Tensor]:
        """The buffers on ``device``: lam, count, skipped, and mean and deviations or the history."""
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

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        super()._load_from_state_dict(*args, **kwargs)
        # With assign=True they are the checkpoint's own tensors, of whatever dtype and layout.
        for name, buffer in self.named_buffers(recurse=False):
            dtype = _DTYPES[name]
            if buffer.dtype != dtype or not buffer.is_contiguous():
                setattr(self, name, buffer.to(dtype).contiguous())

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> AdaptiveLambda:
        # model.half() and .to(dtype) cast every floating buffer; a history in float16 would be worthless.
        kept = dict(self.named_buffers())
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        for name, before in kept.items():
            after = self.get_buffer(name)
            if after.dtype != before.dtype:
                setattr(self, name, before.to(after.device))
        return self

    def __getstate__(self) -> dict[str, Any]:
        # A copy of lam under way belongs to this object alone, and an event cannot be pickled.
        return {**self.__dict__, "_sent": None}

    def extra_repr(self) -> str:
        """The options, as ``repr`` shows them."""
        options = {"lam": self.lam_max, **self.rule._asdict(), "window": self.window}
        del options["lam_max"]
        return ", ".join(f"{name}={value}" for name, value in options.items())


def weighted_loss(
    logits: Tensor,
    target: Tensor,
    alpha: Tensor,
    lam: float | Tensor | AdaptiveLambda,
    options: Linearity,
    backend: str = "auto",
) -> tuple[Tensor, Tensor, Tensor]:
    """As :func:`elle_fast.functional.elle_loss`, with its options as a :class:`Linearity`."""
    if not isinstance(lam, AdaptiveLambda):
        return op.elle_loss(logits, target, alpha, lam, options, backend)
    if lam.ranks() == 1:
        return op.elle_loss(logits, target, alpha, 0.0, options, backend, lam.state(logits.device), lam.rule)
    # E_lin has to be averaged over the ranks before lam is known.
    _, ce, e_lin = op.elle_loss(logits, target, alpha, 0.0, options, backend)
    return weighted_sum(ce, e_lin, lam, backend), ce, e_lin


def weighted_sum(ce: Tensor, e_lin: Tensor, lam: float | Tensor | AdaptiveLambda, backend: str = "auto") -> Tensor:
    """``ce + lam * e_lin``; an :class:`AdaptiveLambda` takes in e_lin first (paper, Algorithm 1, lines 9 to 12)."""
    return reference.weighted_sum(ce, e_lin, lam.update(e_lin, backend) if isinstance(lam, AdaptiveLambda) else lam)
