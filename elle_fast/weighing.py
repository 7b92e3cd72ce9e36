"""E_lin and its weight in a training loss: lam, ELLE-A's light steps, and what a step leaves to be looked at."""

from __future__ import annotations

import inspect
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.compiler import is_compiling

from elle_fast._core import checks, ddp
from elle_fast._core.unwrapping import Model
from elle_fast.adaptive import AdaptiveLambda
from elle_fast.attacks import LossFn
from elle_fast.auto import controller_of
from elle_fast.criterion import Record, WeightedLoss
from elle_fast.linearity import LocalLinearity
from elle_fast.ops.elle_loss.reference import relative_of_logits, relative_of_losses
from elle_fast.ops.elle_loss.validation import Linearity
from elle_fast.ops.pack_points.validation import Packing
from elle_fast.passes import NO_KWARGS, ModelKwargs

# Which points are clamped to the bounds.
CLAMPS = ("all", "attack", "triplets", "none")
Weight = float | Tensor | AdaptiveLambda

LINEARITY_OPTIONS = inspect.signature(LocalLinearity).parameters.keys() - {"eps"}
_LAM_OPTIONS = frozenset(inspect.signature(AdaptiveLambda).parameters)


def relative_parts(loss_fn: LossFn | None, rows: Tensor, target: Tensor, alpha: Tensor, options: Linearity) -> Tensor:
    """Numerator and denominator of relative E_lin ``[2]``, from rows of logits, or of losses with ``loss_fn``."""
    if loss_fn is None:
        return relative_of_logits(rows, target, alpha, options)
    return relative_of_losses(rows, alpha, options.adv_rows(target), options)


class LinearityLoss(WeightedLoss):
    """Base class of ``... + lam * E_lin``; subclasses implement :meth:`compute`.

    Args:
        eps, lam, adaptive, lagged, skip_below, linearity: see :class:`~elle_fast.ELLELoss`.
    """

    _fixed = ("linearity", "controller", "packing")
    _elsewhere = dict.fromkeys(LINEARITY_OPTIONS, "build another one") | {
        name: f"set controller.{name}" if name in AdaptiveLambda._changeable else "build another one"
        for name in ("lam_max", *_LAM_OPTIONS - {"lam"})
    }

    def __init__(
        self,
        eps: float,
        lam: float | str | AdaptiveLambda = 4000.0,
        *,
        adaptive: bool = False,
        lagged: bool = False,
        skip_below: float | None = None,
        **linearity: Any,
    ) -> None:
        super().__init__()
        if unknown := sorted(linearity.keys() - LINEARITY_OPTIONS):
            hint = ", those of ELLE-A with lam=AdaptiveLambda(...)" if _LAM_OPTIONS.issuperset(unknown) else ""
            raise TypeError(
                f"{type(self).__name__}: expected options of its own or of LocalLinearity{hint}, "
                f"got {', '.join(unknown)}"
            )
        self.linearity = LocalLinearity(eps, **linearity)
        self.controller = controller_of(lam, checks.flag("adaptive", adaptive), self.linearity.options.penalty)
        if self.controller is None:
            self.lam = lam  # type: ignore[assignment]  # a number
        else:
            self.controller.check_options(self.linearity.options)
        self.lagged = checks.flag("lagged", lagged)
        self.skip_below = None if skip_below is None else checks.real("skip_below", skip_below, low=0, high=1)
        for name, given in (("lagged", lagged), ("skip_below", skip_below is not None)):
            if given and not self.adaptive:
                raise ValueError(f"{name}: only ELLE-A moves lam; pass adaptive=True or an AdaptiveLambda as lam")
        self._steps = {"full": 0, "light": 0}
        self._kind: str | None = None
        self._rounded = False  # has been said

    @property
    def adaptive(self) -> bool:
        """Whether this is ELLE-A."""
        return self.controller is not None

    @property
    def eps(self) -> float:
        """The radius, which may be set, as in a warm-up; a ``step_size`` that was given stays."""
        return self.packing.eps

    @eps.setter
    def eps(self, value: float) -> None:
        self.linearity.eps = value

    @property
    def packing(self) -> Packing:
        """The options of the points."""
        return self.linearity.packing

    def forward(
        self,
        model: Model,
        x: Tensor,
        target: Tensor,
        x_adv: Tensor | None = None,
        *,
        model_kwargs: Mapping[str, Any] | None = None,
        **options: Any,
    ) -> Tensor:
        """The training loss of one batch.

        Args:
            model: maps ``[N, ...]`` to logits ``[N, C]`` (or see ``logits`` and ``loss_fn``). Called in its own mode.
            x: clean inputs, floating ``[B, ...]``, ``B >= 1``, not requiring grad.
            target: int64 ``[B]`` in ``[0, C)``, or probabilities ``[B, C]``; with ``loss_fn`` any tensor ``[B, ...]``.
            x_adv: adversarial points made elsewhere, shaped as x; replaces the attack.
            model_kwargs: further arguments of the model, which are not perturbed: ``model(points, **model_kwargs)``.
                Tensors whose dimension 0 is B (an attention mask, token types) go with their sample's points.
            options: what else :meth:`compute` takes.

        Returns:
            loss, 0-dim, differentiable with respect to the model's parameters.

        Raises:
            TypeError, ValueError: naming the argument, what was expected and what was got.
        """
        self.check(x, target, x_adv)
        kind = self._kind or self.next_kind(model)
        kwargs = ModelKwargs.of(model_kwargs, x.shape[0])
        loss = self.compute(model, x, target, x_adv, kwargs, kind=kind, **options)
        if self._kind is None:
            self.finished(kind, model)
        return loss

    @property
    def stats(self) -> dict[str, Tensor]:
        """The last step's ``loss``, ``ce``, ``e_lin`` and the ``lam`` that weighed it: detached 0-dim device tensors.

        With ELLE-A also ``skipped``, the number of non-finite E_lin so far, and with ``rule="relative"``
        ``relative_mean``, which is compared with the threshold. With ``skip_below`` also ``full_steps`` and
        ``light_steps``, int64 on the CPU: the training steps of each kind that this object took, no part of its
        ``state_dict``. Empty before the first step. Nothing is synchronised until a value is read.
        """
        if not self.last.stats or self.skip_below is None:
            return dict(self.last.stats)
        counts = {f"{kind}_steps": torch.tensor(count, device="cpu") for kind, count in self._steps.items()}
        return {**self.last.stats, **counts}

    # ---- A step in its parts, for what runs one by itself (elle_fast.step)

    @property
    def kinds(self) -> tuple[str, ...]:
        """The kinds of steps there are: ``"full"``, and with ``skip_below`` ``"light"``."""
        return ("full",) if self.skip_below is None else ("light", "full")

    @contextmanager
    def of_kind(self, kind: str) -> Iterator[None]:
        """Inside, calls are steps of this kind, and :meth:`finished` is the caller's to call."""
        self._kind = kind
        try:
            yield
        finally:
            self._kind = None

    def check(self, x: Tensor, target: Any, x_adv: Tensor | None = None) -> None:
        """Check a batch before the model sees it. Warns once if rounding would look like a collapse."""
        self.linearity.check(x, target, x_adv)
        if self._rounded or self.controller is None or self.controller.rule != "relative" or is_compiling():
            return
        coarse = torch.is_autocast_enabled(x.device.type) or (self.packing.dtype or x.dtype).itemsize < 4
        if coarse and self.linearity.triplet_precision is None:
            self._rounded = True
            warnings.warn(
                "triplet_precision: expected 'fp32' with rule='relative' in low precision, whose rounding looks like a "
                "collapse at a small eps, got None",
                stacklevel=3,
            )

    def next_kind(self, model: Model) -> str:
        """The kind of the next step: the one decision of a step that the host takes. A frozen call has one too."""
        if self.skip_below is None or self.controller is None or not self.trains(model):
            return "full"
        return "light" if self.controller.at_most(self.skip_below) else "full"

    def finished(self, kind: str, model: Model) -> None:
        """What the host does when a step of this kind has been launched."""
        if self.skip_below is None or self.controller is None or not self.updates(model):
            return
        self._steps[kind] += 1
        self.controller.send_to_host()

    def compute(
        self,
        model: Model,
        x: Tensor,
        target: Tensor,
        x_adv: Tensor | None = None,
        kwargs: ModelKwargs = NO_KWARGS,
        *,
        kind: str = "full",
        samples: Any = None,
    ) -> Tensor:
        """The loss of a checked batch in a step of one kind. All of it is work for the device.

        ``samples`` is for a base that keeps something for each; others do not look at it.
        """
        raise NotImplementedError

    def in_batch(self, packing: Packing, batch: int, model: Model) -> Packing:
        """``packing`` for this process' share of a batch: with one seed all draw what one process would."""
        if not (dist.is_available() and dist.is_initialized()):
            return packing
        if self.controller is not None and self.updates(model):
            ddp.refuse_join(model, "ELLE-A, which averages E_lin")
        group = None if self.controller is None else self.controller.process_group
        return packing._replace(sample_offset=max(0, dist.get_rank(group)) * batch)

    def weight(self, device: torch.device, updates: bool) -> Weight:
        """This step's lam, before E_lin is known."""
        if self.controller is None:
            return self._lam
        if not self.lagged and updates:
            return self.controller
        return self.controller.lam.to(device, copy=True)

    def relative(self, rows: Tensor, target: Tensor, alpha: Tensor, options: Linearity) -> Tensor | None:
        """Relative E_lin of the rows of a step, as its numerator and denominator, if that is what moves lam."""
        if self.controller is None or self.controller.rule != "relative":
            return None
        return relative_parts(self.linearity.loss_fn, rows, target, alpha, options)

    def record(
        self,
        loss: Tensor,
        ce: Tensor,
        e_lin: Tensor,
        lam: Weight,
        output: Tensor | None,
        updates: bool,
        relative: Tensor | None,
    ) -> None:
        """Keep a step's numbers; with ``lagged`` its E_lin, or ``relative``, moves lam for the next step."""
        if self.controller is not None and self.lagged and updates:
            self.controller.take_in(e_lin, relative, self.linearity.backend)
        if isinstance(lam, AdaptiveLambda):
            lam = lam.lam.clone()
        elif not isinstance(lam, Tensor):
            lam = torch.full((), lam, dtype=torch.float32, device=loss.device)
        # A copy of the loss, as `loss /= n` for gradient accumulation is common and would change what is reported.
        stats = {"loss": loss.detach().clone(), "ce": ce.detach(), "e_lin": e_lin.detach(), "lam": lam}
        if self.controller is not None:
            stats["skipped"] = self.controller.skipped.clone()
            if self.controller.rule == "relative":
                stats["relative_mean"] = self.controller.relative_mean.clone()
        self.last = Record(stats, output)
