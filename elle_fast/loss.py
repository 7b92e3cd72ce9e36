"""ELLELoss, the whole training loss of ELLE and ELLE-A."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from elle_fast import attacks
from elle_fast._core import checks
from elle_fast._core.unwrapping import Model, unwrapped
from elle_fast.adaptive import AdaptiveLambda, weighted_loss, weighted_sum
from elle_fast.criterion import TrainingLoss
from elle_fast.functional import draw_seed
from elle_fast.gradient_bound import bounded
from elle_fast.linearity import LocalLinearity
from elle_fast.ops.elle_loss.reference import linearity_error
from elle_fast.ops.pack_points.validation import Packing
from elle_fast.presets import preset_options

__all__ = ["ELLELoss"]

Attack = str | Callable[[Model, Tensor, Any], Tensor]
Weight = float | Tensor | AdaptiveLambda

FORWARDS = ("packed", "split", "checkpoint")

_LINEARITY_OPTIONS = inspect.signature(LocalLinearity).parameters.keys() - {"eps"}
_LAM_OPTIONS = frozenset(inspect.signature(AdaptiveLambda).parameters)


class Record(NamedTuple):
    """What a step leaves to be looked at: see :attr:`ELLELoss.stats` and :attr:`ELLELoss.output`."""

    stats: dict[str, Tensor]
    output: Tensor | None


class ELLELoss(TrainingLoss):
    r"""Single-step adversarial training with ELLE or ELLE-A (arXiv 2401.11618, Algorithm 1).

    .. math::
        loss = mean_i\, L(f(x_{adv}), y) + lam \cdot E_{lin}, \qquad
        E_{lin} = mean_i\, [L(f(x_c)) - (1 - \alpha) L(f(x_a)) - \alpha L(f(x_b))]^2

    A call makes the attack (one forward, one input gradient), packs x_adv, x_a, x_b and x_c into one batch, and runs
    one forward pass over it. The backward is one ordinary ``loss.backward()``: there is no double backpropagation. No
    step waits for the device (see ``skip_below`` for the exception). A call while ``criterion`` and ``model`` are in
    train mode is one step of lam and its history; see :meth:`frozen` where an optimiser step takes more than one call.

    Under DistributedDataParallel, one forward pass per step goes through the wrapper; the others call the inner module.
    If the generators of all processes have the same seed, together they draw what one process would for the whole
    batch. Dropout draws a mask for each row, which E_lin counts as curvature: use little or none of it.

    Example::

        criterion = ELLELoss(eps=8/255, lam=4000.0, adaptive=True)   # ELLE-A
        loss = criterion(model, x, y)
        loss.backward()

    Args:
        eps: radius of the ball, ``>= 0``, in units of x.
        lam: weight of E_lin, ``>= 0``; or, for ELLE-A, an :class:`~elle_fast.AdaptiveLambda` with options of its own
            (``window=500``, ...). The paper's guideline is 4,000 to 20,000.
        adaptive: ELLE-A: short for ``lam=AdaptiveLambda(lam)``. Attribute ``controller`` holds it, or ``None``.
        lagged: use the lam that the step before computed (the authors' CIFAR code); ELLE-A only.
        attack: ``"fgsm"``, ``"rs-fgsm"``, ``"n-fgsm"``, ``"zero-grad"``, ``"none"`` (the clean x, paper B.10), or a
            callable ``(model, x, target) -> x_adv``; the model it is given includes normalization and ``logits``.
        step_size: of a named attack, in units of x; ``None`` is that attack's own.
        forward: ``"packed"``: one forward pass over all points; ``"split"``: x_adv and the triplets apart, so that
            batch norm does not mix them (the authors' CIFAR code); ``"checkpoint"``: x_adv, x_a, x_b and x_c each
            apart, and forwarded again in the backward pass, so that only one point's activations are held at a time,
            for one more forward pass over each. A forward pass is repeated with its dropout masks and its autocast, and
            leaves buffers such as running statistics alone. If the model's output differs when it is repeated, the
            backward pass raises RuntimeError on the CPU, and gives NaN gradients elsewhere.
        skip_below: ELLE-A only, in ``[0, 1]``. If lam <= skip_below * lam_max at the start of a training step, the step
            is light: the triplets run under no_grad, apart from x_adv, so E_lin still feeds the detector but
            contributes no gradient. The value of the loss holds ``lam * E_lin`` as always. Without ``lagged`` a
            detection on a light step thus takes effect one step later than in Algorithm 1, with ``gamma`` times the
            weight. With ``lagged`` and 0 nothing changes, as light steps are those whose weight is 0. The host reads
            the lam that the step before computed and copied; it does not wait for anything later. ``None``: no step is
            light.
        max_ratio: ``> 0``: the gradient of ``lam * E_lin`` in the triplets' logits (losses, with ``loss_fn``) is scaled
            down to this many times the 2-norm of the cross-entropy's in those of x_adv, each over the batch of this
            process (:func:`elle_fast.gradient_bound.bounded`). The loss' value stays. 100 is what kept large lam
            from NaN, and less can be too little: benchmarks/results/gradient_bound_mnist.json. ``None``: no bound.
        linearity: further options are those of :class:`~elle_fast.LocalLinearity`, which attribute ``linearity``
            holds: ``bounds``, ``mean``, ``std``, ``norm``, ``points``, ``triplets``, ``alpha``, ``penalty``, ``of``,
            ``label_smoothing``, ``triplet_fraction``, ``logits``, ``loss_fn``, ``dtype``, ``memory_format``,
            ``generator``, ``backend``. ``bounds`` and ``norm`` are those of a named attack too.

    Raises:
        TypeError, ValueError: naming the argument, what was expected and what was got.
        RuntimeError: if the backend cannot run here.
    """

    def __init__(
        self,
        eps: float,
        lam: float | AdaptiveLambda = 4000.0,
        *,
        adaptive: bool = False,
        lagged: bool = False,
        attack: Attack = "fgsm",
        step_size: float | None = None,
        forward: str = "packed",
        skip_below: float | None = None,
        max_ratio: float | None = None,
        **linearity: Any,
    ) -> None:
        super().__init__()
        if unknown := sorted(linearity.keys() - _LINEARITY_OPTIONS):
            hint = ", those of ELLE-A with lam=AdaptiveLambda(...)" if _LAM_OPTIONS.issuperset(unknown) else ""
            raise TypeError(
                f"ELLELoss: expected options of its own or of LocalLinearity{hint}, got {', '.join(unknown)}"
            )
        self.linearity = LocalLinearity(eps, **linearity)
        adaptive = checks.flag("adaptive", adaptive) or isinstance(lam, AdaptiveLambda)
        if not isinstance(lam, AdaptiveLambda):
            lam = checks.real("lam", lam, low=0)
            controller = AdaptiveLambda(lam) if adaptive else None
        else:
            controller, lam = lam, lam.lam_max
        self.lam = lam
        self.controller: AdaptiveLambda | None = controller
        self.lagged = checks.flag("lagged", lagged)
        self.skip_below = None if skip_below is None else checks.real("skip_below", skip_below, low=0, high=1)
        self.max_ratio = None if max_ratio is None else checks.real("max_ratio", max_ratio, low=0, low_allowed=False)
        for name, given in (("lagged", lagged), ("skip_below", skip_below is not None)):
            if given and not adaptive:
                raise ValueError(f"{name}: only ELLE-A has a history; pass adaptive=True or an AdaptiveLambda as lam")
        if not callable(attack):
            checks.choice("attack", attack, (*attacks.SINGLE_STEP, "none"))
        self.attack: Attack = attack
        self.packing = self._packing(step_size)
        self.forward_mode = checks.choice("forward", forward, FORWARDS)
        # Rounded as lam itself is, so that 1 takes in lam_max.
        self._light_lam = torch.tensor(self.lam * (self.skip_below or 0.0), dtype=torch.float32).item()
        self._steps = {"full": 0, "light": 0}
        self.last = Record({}, None)

    @property
    def adaptive(self) -> bool:
        """Whether this is ELLE-A."""
        return self.controller is not None

    def _packing(self, step_size: float | None) -> Packing:
        """The triplets' options, with the step of a named attack."""
        packing = self.linearity.packing
        if callable(self.attack) or self.attack == "none":
            if step_size is not None:
                raise ValueError(f"step_size: attack={self.attack!r} takes no step of its own (got {step_size!r})")
            return packing
        return attacks.SINGLE_STEP[self.attack].options(packing, step_size)

    @classmethod
    def preset(cls, name: str, eps: float, **overrides: Any) -> ELLELoss:
        """The paper's hyper-parameters for a data set: ``ELLELoss.preset("cifar10", eps=8/255, adaptive=True)``.

        ``ELLELoss.preset("fast", eps=8/255)`` is ELLE-A at close to the price of FGSM training: CIFAR-10's lam_max with
        ``skip_below=0.01`` and ``triplet_fraction=0.125``, which ``elle_fast.presets.FAST`` holds for other presets.

        Args:
            name: ``"cifar10"``, ``"cifar10-long"``, ``"cifar100"``, ``"svhn"``, ``"svhn-long"``, ``"imagenet"`` or
                ``"fast"``.
            eps: radius of the ball.
            overrides: options of :class:`ELLELoss`. ``adaptive`` and ``attack`` choose among the paper's values.

        Raises:
            TypeError, ValueError: for an unknown name or a method that the paper does not have for it.
        """
        return cls(eps, **preset_options(name, eps, overrides))

    def forward(self, model: Model, x: Tensor, target: Tensor, x_adv: Tensor | None = None) -> Tensor:
        """The training loss of one batch.

        Args:
            model: maps ``[N, ...]`` to logits ``[N, C]`` (or see ``logits`` and ``loss_fn``). Called in its own mode.
            x: clean inputs, floating ``[B, ...]``, ``B >= 1``, not requiring grad.
            target: int64 ``[B]`` in ``[0, C)``, or probabilities ``[B, C]``; with ``loss_fn`` any tensor ``[B, ...]``.
            x_adv: adversarial points made elsewhere, shaped as x; replaces the attack.

        Returns:
            loss, 0-dim, differentiable with respect to the model's parameters.

        Raises:
            TypeError, ValueError: naming the argument, what was expected and what was got.
        """
        self.check(x, target, x_adv)
        kind = self.next_kind(model)
        loss = self.compute(model, x, target, x_adv, kind=kind)
        self.finished(kind, model)
        return loss

    @property
    def stats(self) -> dict[str, Tensor]:  # type: ignore[override]
        """The last step's ``loss``, ``ce``, ``e_lin`` and the ``lam`` that weighed it: detached 0-dim device tensors.

        With ELLE-A also ``skipped``, the number of non-finite E_lin so far. With ``skip_below`` also ``full_steps`` and
        ``light_steps``, int64 on the CPU: the training steps of each kind that this object took, no part of its
        ``state_dict``. Empty before the first step. Nothing is synchronised until a value is read.
        """
        if not self.last.stats or self.skip_below is None:
            return dict(self.last.stats)
        return {**self.last.stats, **{f"{kind}_steps": torch.tensor(count) for kind, count in self._steps.items()}}

    @property
    def output(self) -> Tensor | None:
        """The last step's logits at x_adv, ``[B, C]``, detached; ``None`` before it, and with ``loss_fn``."""
        return self.last.output

    # ---- A step in its parts, for what runs one by itself (elle_fast.step)

    @property
    def kinds(self) -> tuple[str, ...]:
        """The kinds of steps there are: ``"full"``, and with ``skip_below`` ``"light"``."""
        return ("full",) if self.skip_below is None else ("light", "full")

    def check(self, x: Tensor, target: Any, x_adv: Tensor | None = None) -> None:
        """Check a batch before the model sees it."""
        self.linearity.check(x, target, x_adv)

    def next_kind(self, model: Model) -> str:
        """The kind of the next step: the one decision of a step that the host takes. A frozen call has one too."""
        if self.skip_below is None or self.controller is None or not self.trains(model):
            return "full"
        return "light" if self.controller.on_host() <= self._light_lam else "full"

    def finished(self, kind: str, model: Model) -> None:
        """What the host does when a step of this kind has been launched."""
        if self.skip_below is None or self.controller is None or not self.updates(model):
            return
        self._steps[kind] += 1
        self.controller.send_to_host()

    def compute(
        self, model: Model, x: Tensor, target: Tensor, x_adv: Tensor | None = None, *, kind: str = "full"
    ) -> Tensor:
        """The loss of a checked batch in a step of one kind. All of it is work for the device."""
        linearity, batch, light = self.linearity, x.shape[0], kind == "light"
        options = linearity.options
        inner = unwrapped(model)
        seed = draw_seed(x.device, linearity.generator)
        packing = self.in_batch(batch)
        grad = None
        if x_adv is None:
            grad, x_adv = self._run_attack(inner, x, target, packing, seed)
        points, alpha = linearity.pack(inner, x, target, packing, seed=seed, grad=grad, x_adv=x_adv)

        parts = self._parts(points.shape[0], batch, alpha.numel(), light)
        recompute = self.forward_mode == "checkpoint"
        rows = linearity.rows(model, points, target, alpha, parts, recompute=recompute, light=light)
        if self.max_ratio is not None and not light:
            rows, options = bounded(rows, batch, options, self.max_ratio)
        updates = self.updates(model)
        lam = self.weight(rows.device, updates)
        if linearity.loss_fn is None:
            loss, ce, e_lin = weighted_loss(rows, target, alpha, lam, options, linearity.backend)
            # A copy: a view would keep the logits of all points in memory until the next step.
            output: Tensor | None = rows[:batch].detach().clone()
        else:
            ce, e_lin, output = rows[:batch].mean(), linearity_error(rows, alpha, batch, options), None
            loss = weighted_sum(ce, e_lin, lam, linearity.backend)
        self.record(loss, ce, e_lin, lam, output, updates)
        if light and options.points == "elle-2p":
            # x_b is x_adv, whose rows have a graph: no part of E_lin's gradient is to come through them alone.
            loss = loss.detach() + (ce - ce.detach())
        return loss

    def constants(self) -> dict[str, Any]:
        """What a captured step depends on and cannot follow if it changes, by name."""
        linearity, controller = self.linearity, self.controller
        names = ["training", "lam", "lagged", "skip_below", "max_ratio", "attack", "packing", "forward_mode"]
        found: dict[str, Any] = {"frozen": bool(self._frozen), **{name: getattr(self, name) for name in names}}
        names = ["packing", "options", "ascends", "logits", "loss_fn", "generator", "backend"]
        found |= {f"linearity.{name}": getattr(linearity, name) for name in names}
        if controller is not None:
            found["controller"] = (*controller.rule, controller.window, controller.process_group)
        return found

    def in_batch(self, batch: int) -> Packing:
        """``packing`` for this process' share of a batch: with one seed all draw what one process would."""
        if not (dist.is_available() and dist.is_initialized()):
            return self.packing
        group = None if self.controller is None else self.controller.process_group
        return self.packing._replace(sample_offset=max(0, dist.get_rank(group)) * batch)

    def weight(self, device: torch.device, updates: bool) -> Weight:
        """This step's lam, before E_lin is known."""
        if self.controller is None:
            return self.lam
        if not self.lagged and updates:
            return self.controller
        return self.controller.lam.to(device, copy=True)

    def record(
        self, loss: Tensor, ce: Tensor, e_lin: Tensor, lam: Weight, output: Tensor | None, updates: bool
    ) -> None:
        """Keep a step's numbers; with ``lagged`` its E_lin moves lam for the next step."""
        if self.controller is not None and self.lagged and updates:
            self.controller.update(e_lin, self.linearity.backend)
        if isinstance(lam, AdaptiveLambda):
            lam = lam.lam.clone()
        elif not isinstance(lam, Tensor):
            lam = torch.full((), lam, device=loss.device)
        # A copy of the loss, as `loss /= n` for gradient accumulation is common and would change what is reported.
        stats = {"loss": loss.detach().clone(), "ce": ce.detach(), "e_lin": e_lin.detach(), "lam": lam}
        if self.controller is not None:
            stats["skipped"] = self.controller.skipped.clone()
        self.last = Record(stats, output)

    def _parts(self, rows: int, batch: int, residuals: int, light: bool) -> list[int]:
        """Rows of each forward pass."""
        options = self.linearity.options
        if self.forward_mode == "checkpoint":
            return [batch] + [residuals // options.triplets] * (options.triplets * options.blocks)
        if self.forward_mode == "split" or light:
            return [batch, rows - batch]
        return [rows]

    def _run_attack(
        self, model: Model, x: Tensor, target: Tensor, packing: Packing, seed: Tensor
    ) -> tuple[Tensor | None, Tensor | None]:
        """Either the gradient that pack_points takes a step along, or the finished points."""
        attack, linearity = self.attack, self.linearity
        if attack == "none":
            return None, x
        if not isinstance(attack, str):
            made = attack(linearity.on_pixels(model), x, target)
            return None, checks.like("attack's x_adv", made.detach() if isinstance(made, Tensor) else made, x)
        step = attacks.SINGLE_STEP[attack]
        of = partial(linearity.input_gradient, model, target, seed, lengths_matter=step.quantile > 0)
        return step.gradient(of, x, packing, seed, linearity.backend), None

    def extra_repr(self) -> str:
        """The options, as ``repr`` shows them."""
        attack = self.attack if isinstance(self.attack, str) else "custom"
        return (
            f"lam={self.lam:g}, adaptive={self.adaptive}, attack={attack!r}, forward={self.forward_mode!r}, "
            f"skip_below={self.skip_below}"
        )
