"""ELLELoss, the whole training loss of ELLE and ELLE-A."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from ctypes import c_float
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from elle_fast import attacks
from elle_fast._core import checks, ddp
from elle_fast._core.unwrapping import Model, unwrapped
from elle_fast.adaptive import AdaptiveLambda, weighted_loss, weighted_sum
from elle_fast.criterion import Record, WeightedLoss
from elle_fast.functional import draw_seed
from elle_fast.gradient_bound import bounded
from elle_fast.linearity import FORWARDS, Attack, LocalLinearity
from elle_fast.ops.elle_loss.reference import linearity_error
from elle_fast.ops.pack_points.validation import Packing
from elle_fast.passes import NO_KWARGS, ModelKwargs
from elle_fast.presets import preset_options

__all__ = ["ELLELoss"]

Weight = float | Tensor | AdaptiveLambda

_LINEARITY_OPTIONS = inspect.signature(LocalLinearity).parameters.keys() - {"eps"}
_LAM_OPTIONS = frozenset(inspect.signature(AdaptiveLambda).parameters)


class ELLELoss(WeightedLoss):
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
    batch.

    Dropout, stochastic depth and other random layers draw the same at x_adv, x_a, x_b and x_c of a sample, so that
    E_lin does not count their masks as curvature. This covers what is drawn from torch's default generators; other
    sources (NumPy, a generator of the model's own, cuDNN's dropout between recurrent layers) are not covered, nor is a
    step that ``torch.compile`` compiles as a whole. If random layers are compiled or checkpointed inside the model,
    each point gets a forward pass of its own, and a warning says so once. The first step of a model that draws makes
    one forward pass more, to find out.

    A step compiles with ``torch.compile`` (torch 2.13; 2.4 compiles the model alone), with the numbers of eager mode
    but for the compiler's own rounding. It is one graph (``fullgraph=True``) with ``x_adv`` given or ``attack="none"``;
    with a named attack, or ``alpha="argmax"``, if torch is told to follow gradients:
    ``torch._dynamo.config.trace_autograd_ops = True``, for models that are one graph themselves.
    ``forward="checkpoint"``, ``skip_below`` and ``generator`` cut the graph.

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
            callable ``(model, x, target) -> x_adv``; the model it is given includes normalization and ``logits``. It
            may call ``loss.backward()``: the parameters' gradients are afterwards what they were before.
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

    _fixed = ("linearity", "controller", "packing", "forward_mode")
    _elsewhere = dict.fromkeys((*_LINEARITY_OPTIONS, "eps", "step_size"), "build another one") | {
        name: f"set controller.{name}" for name in ("lam_max", *_LAM_OPTIONS - {"lam"})
    }

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
        if adaptive and not isinstance(lam, AdaptiveLambda):
            lam = AdaptiveLambda(lam)
        self.controller: AdaptiveLambda | None = lam if isinstance(lam, AdaptiveLambda) else None
        if not isinstance(lam, AdaptiveLambda):
            self.lam = lam
        self.lagged = checks.flag("lagged", lagged)
        self.skip_below = None if skip_below is None else checks.real("skip_below", skip_below, low=0, high=1)
        self.max_ratio = None if max_ratio is None else checks.real("max_ratio", max_ratio, low=0, low_allowed=False)
        for name, given in (("lagged", lagged), ("skip_below", skip_below is not None)):
            if given and not adaptive:
                raise ValueError(f"{name}: only ELLE-A has a history; pass adaptive=True or an AdaptiveLambda as lam")
        if not callable(attack) or isinstance(attack, type):
            checks.choice("attack", attack, (*attacks.SINGLE_STEP, "none"))
        self.attack: Attack = attack
        self.packing = self._packing(step_size)
        self.forward_mode = checks.choice("forward", forward, FORWARDS)
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
                raise ValueError(f"step_size: expected None with attack={self.attack!r}, got {checks.shown(step_size)}")
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

    def forward(
        self,
        model: Model,
        x: Tensor,
        target: Tensor,
        x_adv: Tensor | None = None,
        *,
        model_kwargs: Mapping[str, Any] | None = None,
    ) -> Tensor:
        """The training loss of one batch.

        Args:
            model: maps ``[N, ...]`` to logits ``[N, C]`` (or see ``logits`` and ``loss_fn``). Called in its own mode.
            x: clean inputs, floating ``[B, ...]``, ``B >= 1``, not requiring grad.
            target: int64 ``[B]`` in ``[0, C)``, or probabilities ``[B, C]``; with ``loss_fn`` any tensor ``[B, ...]``.
            x_adv: adversarial points made elsewhere, shaped as x; replaces the attack.
            model_kwargs: further arguments of the model, which are not perturbed: ``model(points, **model_kwargs)``.
                Tensors whose dimension 0 is B (an attention mask, token types) go with their sample's points.

        Returns:
            loss, 0-dim, differentiable with respect to the model's parameters.

        Raises:
            TypeError, ValueError: naming the argument, what was expected and what was got.
        """
        self.check(x, target, x_adv)
        kind = self.next_kind(model)
        loss = self.compute(model, x, target, x_adv, ModelKwargs.of(model_kwargs, x.shape[0]), kind=kind)
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
        counts = {f"{kind}_steps": torch.tensor(count, device="cpu") for kind, count in self._steps.items()}
        return {**self.last.stats, **counts}

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
        # Rounded as lam itself is, so that 1 takes in lam_max.
        most = c_float(self.lam * self.skip_below).value
        return "light" if self.controller.on_host() <= most else "full"

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
    ) -> Tensor:
        """The loss of a checked batch in a step of one kind. All of it is work for the device."""
        linearity, batch, light = self.linearity, x.shape[0], kind == "light"
        options = linearity.options
        inner = unwrapped(model)
        seed = draw_seed(x.device, linearity.generator)
        packing = self.in_batch(batch, model)
        grad = None
        if x_adv is None:
            attacked = kwargs.given_to(inner, detached=True)
            grad, x_adv = linearity.attacked(self.attack, attacked, x, target, packing, seed)
        points, alpha = linearity.pack(inner, x, target, packing, kwargs, seed=seed, grad=grad, x_adv=x_adv)

        rows = linearity.rows(model, points, target, alpha, kwargs, self.forward_mode, light=light)
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
        return ddp.with_all_passes(model, loss)

    def constants(self) -> dict[str, Any]:
        """What a captured step depends on, could change, and cannot follow, by name."""
        facts: dict[str, Any] = {
            f"linearity.{name}": getattr(self.linearity, name) for name in ("generator", "backend")
        }
        facts["controller"] = self.controller and (*self.controller.rule, self.controller.process_group)
        return {"training": self.training, "frozen": bool(self._frozen), "lam": self.lam, **facts}

    def in_batch(self, batch: int, model: Model) -> Packing:
        """``packing`` for this process' share of a batch: with one seed all draw what one process would."""
        if not (dist.is_available() and dist.is_initialized()):
            return self.packing
        if self.controller is not None and self.updates(model):
            ddp.refuse_join(model, "ELLE-A, which averages E_lin")
        group = None if self.controller is None else self.controller.process_group
        return self.packing._replace(sample_offset=max(0, dist.get_rank(group)) * batch)

    def weight(self, device: torch.device, updates: bool) -> Weight:
        """This step's lam, before E_lin is known."""
        if self.controller is None:
            return self._lam
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
            lam = torch.full((), lam, dtype=torch.float32, device=loss.device)
        # A copy of the loss, as `loss /= n` for gradient accumulation is common and would change what is reported.
        stats = {"loss": loss.detach().clone(), "ce": ce.detach(), "e_lin": e_lin.detach(), "lam": lam}
        if self.controller is not None:
            stats["skipped"] = self.controller.skipped.clone()
        self.last = Record(stats, output)

    def extra_repr(self) -> str:
        """The options, as ``repr`` shows them."""
        attack = self.attack if isinstance(self.attack, str) else "custom"
        return (
            f"lam={self.lam:g}, adaptive={self.adaptive}, attack={attack!r}, forward={self.forward_mode!r}, "
            f"skip_below={self.skip_below}"
        )
