"""ELLELoss, the whole training loss of ELLE and ELLE-A."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from elle_fast import attacks
from elle_fast._core import checks, ddp
from elle_fast._core.unwrapping import Model, unwrapped
from elle_fast.adaptive import AdaptiveLambda
from elle_fast.functional import draw_seed
from elle_fast.gradient_bound import bounded
from elle_fast.linearity import FORWARDS, Attack
from elle_fast.ops.elle_loss.reference import linearity_error, smoothing_excess
from elle_fast.ops.pack_points.validation import Packing
from elle_fast.passes import NO_KWARGS, ModelKwargs
from elle_fast.presets import preset_options
from elle_fast.ranges import ANY, check_range
from elle_fast.weighing import CLAMPS, LinearityLoss
from elle_fast.weighted_sum import weighted_loss, weighted_sum

__all__ = ["ELLELoss"]


class ELLELoss(LinearityLoss):
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

    With ``triplet_precision`` call ``backward()`` outside of the autocast, which would round the gradient of E_lin too.
    A step that is compiled as a whole, with a named attack and an autocast, needs
    ``torch._functorch.config.backward_pass_autocast = "off"`` for that; a compiled model does not.

    Example::

        criterion = ELLELoss(eps=8/255, lam=4000.0, adaptive=True)   # ELLE-A
        loss = criterion(model, x, y)
        loss.backward()

    Args:
        eps: radius of the ball, ``>= 0``, in units of x.
        lam: weight of E_lin, ``>= 0``; or, for ELLE-A, an :class:`~elle_fast.AdaptiveLambda` with options of its own
            (``window=500``, ...). The paper's guideline is 4,000 to 20,000. ``"auto"`` is ELLE-A with a weight that
            needs no tuning, ``AutoLambda()``: see :class:`~elle_fast.AutoLambda` for what is known of it.
        adaptive: ELLE-A: short for ``lam=AdaptiveLambda(lam)``. Attribute ``controller`` holds it, or ``None``.
        lagged: use the lam that the step before computed (the authors' CIFAR code); ELLE-A only.
        attack: a name of :data:`elle_fast.attacks.SINGLE_STEP`, ``"none"`` (the clean x, paper B.10), or a callable
            ``(model, x, target) -> x_adv``; the model it is given includes normalization and ``logits``. It may call
            ``loss.backward()``: the parameters' gradients are afterwards what they were before.
        step_size: of a named attack, in units of x; ``None`` is that attack's own.
        clamp: what ``bounds`` are for: ``"all"`` points (the authors' ImageNet code), those of a named ``"attack"``,
            ``"triplets"`` (x_a and x_b), or ``"none"`` (Algorithm 1, the authors' CIFAR code).
        label_smoothing: as in :func:`torch.nn.functional.cross_entropy`, in ``[0, 1]``.
        smoothed: ``"cross-entropy"``: that of x_adv alone, as other trainers do; ``"all"``: E_lin's losses and the
            attack's too.
        forward: ``"packed"``: one forward pass over all points; ``"split"``: x_adv and the triplets apart, so that
            batch norm does not mix them (the authors' CIFAR code); ``"checkpoint"``: x_adv, x_a, x_b and x_c each
            apart, and forwarded again in the backward pass, so that only one point's activations are held at a time,
            for one more forward pass over each. A forward pass is repeated with its dropout masks and its autocast, and
            leaves buffers such as running statistics alone. If the model's output differs when it is repeated, the
            backward pass raises RuntimeError on the CPU, and gives NaN gradients elsewhere.
        skip_below: ELLE-A only, in ``[0, 1]``. If lam <= skip_below * lam_max at the start of a training step (with
            ``lam="auto"``, that part of what a detection would set now), the step is light: the triplets run apart
            from x_adv, without a graph and without batch norm's running statistics, so E_lin still feeds the detector
            but changes nothing: with lam at 0 a light step is one of the attack alone. (Norms inside of a model that is
            a function, and other buffers that a pass changes, such as spectral norm's, see the triplets.) The value of
            the loss holds ``lam * E_lin`` as always. Without ``lagged`` a detection on a light step thus takes effect
            one step later than in Algorithm 1, with ``gamma`` times the weight. With ``lagged`` and 0 the weights do
            not change, as light steps are those whose weight is 0. The host reads the lam that the step before computed
            and copied; it does not wait for anything later. ``None``: no step is light.
        max_ratio: ``> 0``: the gradient of ``lam * E_lin`` in the triplets' logits (losses, with ``loss_fn``) is scaled
            down to this many times the 2-norm of the cross-entropy's in those of x_adv, each over the batch of this
            process (:func:`elle_fast.gradient_bound.bounded`). The loss' value stays. 100 is what kept large lam
            from NaN, and less can be too little: benchmarks/results/gradient_bound_mnist.json. ``None``: no bound.
        linearity: further options are those of :class:`~elle_fast.LocalLinearity`, which attribute ``linearity``
            holds: ``bounds``, ``mean``, ``std``, ``norm``, ``points``, ``triplets``, ``alpha``, ``penalty``, ``of``,
            ``triplet_fraction``, ``triplet_precision``, ``logits``, ``loss_fn``, ``dtype``, ``memory_format``,
            ``generator``, ``backend``. ``bounds`` and ``norm`` are those of a named attack too. Without ``bounds``,
            ``mean`` and ``std`` a warning says once if pictures are not in [0, 1], as those of a loader that
            normalizes: eps would be in other units. If they are as they should be, say so with ``bounds="any"``, which
            clamps nothing.

    Raises:
        TypeError, ValueError: naming the argument, what was expected and what was got.
        RuntimeError: if the backend cannot run here.
    """

    _fixed = ("attack", "packing", "forward_mode")
    _elsewhere = {"clamp": "build another one"}  # noqa: RUF012

    def __init__(
        self,
        eps: float,
        lam: float | str | AdaptiveLambda = 4000.0,
        *,
        adaptive: bool = False,
        lagged: bool = False,
        attack: Attack = "fgsm",
        step_size: float | None = None,
        clamp: str = "all",
        label_smoothing: float = 0.0,
        smoothed: str = "cross-entropy",
        forward: str = "packed",
        skip_below: float | None = None,
        max_ratio: float | None = None,
        **linearity: Any,
    ) -> None:
        checks.real("label_smoothing", label_smoothing, low=0, high=1)
        if checks.choice("smoothed", smoothed, ("cross-entropy", "all")) == "all":
            linearity["label_smoothing"] = label_smoothing
        elif label_smoothing and linearity.get("loss_fn") is not None:
            raise ValueError(f"loss_fn: expected label_smoothing=0 with a loss of your own, got {label_smoothing!r}")
        bounds = linearity.get("bounds")
        if checks.choice("clamp", clamp, CLAMPS) in ("attack", "none"):
            linearity["bounds"] = None if bounds is None else ANY  # it is known what x is
        super().__init__(eps, lam, adaptive=adaptive, lagged=lagged, skip_below=skip_below, **linearity)
        self.smoothed, self._label_smoothing = smoothed, label_smoothing
        self.max_ratio = None if max_ratio is None else checks.real("max_ratio", max_ratio, low=0, low_allowed=False)
        if not callable(attack) or isinstance(attack, type):
            checks.choice("attack", attack, (*attacks.SINGLE_STEP, "none"))
        self.attack: Attack = attack
        self.step_size = step_size
        self._attack_bounds = checks.bounds(bounds) if clamp in ("all", "attack") else None
        self._packing = self._with_attack()
        self.forward_mode = checks.choice("forward", forward, FORWARDS)

    @property
    def eps(self) -> float:
        """The radius, which may be set, as in a warm-up; a ``step_size`` that was given stays."""
        return self._packing.eps

    @eps.setter
    def eps(self, value: float) -> None:
        self.linearity.eps = value
        self._packing = self._with_attack()

    @property
    def label_smoothing(self) -> float:
        """Of the cross-entropy; it may be set, unless ``smoothed`` is ``"all"``."""
        return self._label_smoothing

    @label_smoothing.setter
    def label_smoothing(self, value: float) -> None:
        if self.smoothed == "all":
            self._refuse("label_smoothing", value, "build another one")
        value = checks.real("label_smoothing", value, low=0, high=1)
        if value and self.linearity.loss_fn is not None:
            raise ValueError(f"label_smoothing: expected 0 with a loss of your own, got {value!r}")
        self._label_smoothing = value

    @property
    def packing(self) -> Packing:
        """The options of the points: the triplets', with the step of a named attack."""
        return self._packing

    def _with_attack(self) -> Packing:
        packing = self.linearity.packing
        if callable(self.attack) or self.attack == "none":
            if self.step_size is not None:
                got = checks.shown(self.step_size)
                raise ValueError(f"step_size: expected None with attack={self.attack!r}, got {got}")
            return packing
        return attacks.SINGLE_STEP[self.attack].options(packing, self.step_size)

    @classmethod
    def preset(cls, name: str, eps: float, **overrides: Any) -> ELLELoss:
        """The paper's hyper-parameters for a data set: ``ELLELoss.preset("cifar10", eps=8/255, adaptive=True)``.

        ``ELLELoss.preset("fast", eps=8/255)`` is ELLE-A at close to the price of FGSM training: CIFAR-10's lam_max with
        ``skip_below=0.01`` and ``triplet_fraction=0.125``, which ``elle_fast.presets.FAST`` holds for other presets.
        ``"imagenet"`` is more than a weight, see :mod:`elle_fast.presets`.

        Args:
            name: ``"cifar10"``, ``"cifar10-long"``, ``"cifar100"``, ``"svhn"``, ``"svhn-long"``, ``"imagenet"`` or
                ``"fast"``.
            eps: radius of the ball.
            overrides: options of :class:`ELLELoss`. ``adaptive`` and ``attack`` choose among the paper's values.

        Raises:
            TypeError, ValueError: for an unknown name or a method that the paper does not have for it.
        """
        return cls(eps, **preset_options(name, eps, overrides))

    def check(self, x: Tensor, target: Any, x_adv: Tensor | None = None) -> None:
        """Check a batch before the model sees it."""
        super().check(x, target, x_adv)
        if self._attack_bounds != self.linearity.packing.bounds:
            check_range(x, self._attack_bounds)

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
        """The loss of a checked batch in a step of one kind. All of it is work for the device."""
        linearity, batch, light = self.linearity, x.shape[0], kind == "light"
        options = linearity.options
        inner = unwrapped(model)
        seed = draw_seed(x.device, linearity.generator)
        packing = self.in_batch(self.packing, batch, model)
        grad = None
        if x_adv is None:
            attacked = kwargs.given_to(inner, detached=True)
            grad, x_adv = linearity.attacked(self.attack, attacked, x, target, packing, self._attack_bounds, seed)
        points, alpha = linearity.pack(inner, x, target, packing, kwargs, seed=seed, grad=grad, x_adv=x_adv)

        rows = linearity.rows(model, points, target, alpha, kwargs, self.forward_mode, light=light)
        if self.max_ratio is not None and not light:
            rows, options = bounded(rows, batch, options, self.max_ratio)
        updates = self.updates(model)
        lam = self.weight(rows.device, updates)
        relative = None  # weighted_loss finds it by itself
        if updates and (self.lagged or linearity.loss_fn is not None):
            relative = self.relative(rows, target, alpha, options)
        if linearity.loss_fn is None:
            loss, ce, e_lin = weighted_loss(rows, target, alpha, lam, options, linearity.backend)
            # A copy: a view would keep the logits of all points in memory until the next step.
            output: Tensor | None = rows[:batch].detach().clone()
        else:
            ce, e_lin, output = rows[:batch].mean(), linearity_error(rows, alpha, batch, options), None
            loss = weighted_sum(ce, e_lin, lam, linearity.backend, relative)
        if light and options.points == "elle-2p":
            # x_b is x_adv, whose rows have a graph: no part of E_lin's gradient is to come through them alone.
            loss = loss.detach() + (ce - ce.detach())
        if self._label_smoothing and self.smoothed != "all":
            excess = smoothing_excess(rows[:batch], target, self._label_smoothing).mean()
            loss, ce = loss + excess, ce + excess
        loss = self.with_terms(loss, rows[:batch])
        self.record(loss, ce, e_lin, lam, output, updates, relative)
        return ddp.with_all_passes(model, loss)

    def extra_repr(self) -> str:
        """The options, as ``repr`` shows them."""
        attack = self.attack if isinstance(self.attack, str) else "custom"
        return (
            f"lam={self.lam:g}, adaptive={self.adaptive}, attack={attack!r}, forward={self.forward_mode!r}, "
            f"skip_below={self.skip_below}, label_smoothing={self.label_smoothing}"
        )
