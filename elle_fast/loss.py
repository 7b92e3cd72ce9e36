"""ELLELoss, the whole training loss of ELLE and ELLE-A, and LocalLinearity, its regulariser alone."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from elle_fast import attacks, functional
from elle_fast._core import checks
from elle_fast.adaptive import AdaptiveLambda, weighted_loss
from elle_fast.linearity import Model, Triplets, unwrapped
from elle_fast.ops import layout
from elle_fast.ops.elle_loss import reference as elle_loss_reference
from elle_fast.ops.pack_points.reference import constant, normalise
from elle_fast.presets import preset_options

__all__ = ["ELLELoss", "LocalLinearity", "Record"]

Attack = str | Callable[[Model, Tensor, Any], Tensor]

FORWARDS = ("packed", "split", "checkpoint")

# What of the options a captured step holds as a constant.
_CONSTANTS = (
    *("training", "eps", "lam", "lagged", "skip_below", "attack", "step_size", "alpha", "forward_mode", "backend"),
    *("logits", "loss_fn", "generator", "process_group", "_packing", "_linearity"),
)


class Record(NamedTuple):
    """What a step leaves behind: the numbers of ``stats``, and the logits at x_adv (``None`` with ``loss_fn``)."""

    stats: dict[str, Tensor]
    output: Tensor | None


class ELLELoss(Triplets):
    r"""Single-step adversarial training with ELLE or ELLE-A (arXiv 2401.11618, Algorithm 1).

    .. math::
        loss = mean_i\, L(f(x_{adv}), y) + lam \cdot E_{lin}, \qquad
        E_{lin} = mean_i\, [L(f(x_c)) - (1 - \alpha) L(f(x_a)) - \alpha L(f(x_b))]^2

    A call makes the attack (one forward, one input gradient), packs x_adv, x_a, x_b and x_c into one batch, and runs
    one forward pass over it. The backward is one ordinary ``loss.backward()``: there is no double backpropagation. No
    step waits for the device (see ``skip_below`` for the exception). In eval mode (``criterion.eval()``) lam and its
    history stay as they are.

    Of a model in DistributedDataParallel one forward pass a step goes through the wrapper, the others through its
    module. Processes whose generators have the same seed draw together what one process would for the whole batch.
    Dropout draws a mask for each row, which E_lin counts as curvature: use little or none of it.

    Example::

        criterion = ELLELoss(eps=8/255, lam=4000.0, adaptive=True)   # ELLE-A
        loss = criterion(model, x, y)
        loss.backward()

    Args:
        eps: radius of the ball, ``>= 0``, in units of x.
        lam: weight of E_lin (lam_max if adaptive), ``>= 0``. The paper's guideline is 4,000 to 20,000.
        adaptive: ELLE-A: lam follows :class:`~elle_fast.AdaptiveLambda` (attribute ``controller``).
        gamma, sensitivity, min_history, window, process_group: of the :class:`~elle_fast.AdaptiveLambda`.
        lagged: use the lam that the step before computed (the authors' CIFAR code); needs ``adaptive``.
        attack: ``"fgsm"``, ``"rs-fgsm"``, ``"n-fgsm"``, ``"zero-grad"``, ``"none"`` (the clean x, paper B.10), or a
            callable ``(model, x, target) -> x_adv``; the model it is given includes normalisation and ``logits``.
        step_size: of a named attack, in units of x; ``None`` is that attack's own.
        bounds: ``(low, high)`` to which x_a, x_b and a named attack's points are clamped; ``None`` clamps nothing.
        mean, std: per-channel statistics; the model sees ``(point - mean) / std``, x and eps stay in pixels.
        norm: ``"linf"`` or ``"l2"``, the ball of the attack and of the triplets.
        points: ``"elle"``, ``"elle-2p"`` (x_b is x_adv, three points; paper B.11, with ``penalty="abs"``) or
            ``"five-point"`` (paper, Definition 3).
        triplets: independent triplets over which E_lin is averaged (paper, B.3).
        alpha: ``"uniform"``, ``"half"`` (0.5) or ``"argmax"``, which costs twelve more forward passes
            over the triplets' points and ten gradients with respect to alpha.
        penalty: ``"squared"``, ``"abs"`` or ``"smooth_l1"``, of the residual.
        of: ``"loss"``, or ``"logits"``: local linearity of the logits, in the 2-norm over classes.
        label_smoothing: as in :func:`torch.nn.functional.cross_entropy`.
        forward: ``"packed"``: one forward pass over all points; ``"split"``: x_adv and the triplets apart, so that
            batch norm does not mix them (the authors' CIFAR code); ``"checkpoint"``: x_adv, x_a, x_b and x_c each
            apart, and forwarded again in the backward pass, so that only one point's activations are held at a time,
            for one more forward pass over each. A forward pass is repeated with its dropout masks and its autocast, and
            leaves buffers such as running statistics alone. A model whose output is another when it is repeated ends
            in a RuntimeError in the backward pass on the CPU, and in NaN gradients elsewhere.
        skip_below: ELLE-A only, in ``[0, 1]``: a training step that begins with lam at most ``skip_below * lam_max`` is
            light: no graph is made of the triplets' forward pass, which is then apart from that of x_adv, and E_lin is
            for the detector alone. The value of the loss holds ``lam * E_lin`` as always, its gradient does not.
            Without ``lagged`` a detection on a light step thus takes effect one step later than in Algorithm 1, with
            ``gamma`` times the weight. With ``lagged`` and 0 nothing changes, as light steps are those whose weight
            is 0. The host reads the lam that the step before computed and copied; it does not wait for anything later.
            ``None``: no step is light.
        triplet_fraction: the part of the batch, its first samples, on which E_lin is estimated, in ``(0, 1]``; at least
            one sample. The estimate is unbiased if the batch is shuffled: of a sorted one it sees some classes only.
        logits: picks the logits out of the model's output, ``output -> [N, C]``.
        loss_fn: ``(output, target) -> losses [N]`` instead of cross-entropy.
        dtype, memory_format: of the points the model sees; by default x's.
        generator: source of the noise, on x's device; ``None`` is torch's default generator.
        backend: ``"auto"`` or a name from :data:`elle_fast.backends.BACKENDS`.

    Raises:
        TypeError, ValueError: naming the argument, what was expected and what was got.
        RuntimeError: if the backend cannot run here.
    """

    def __init__(
        self,
        eps: float,
        lam: float = 4000.0,
        *,
        adaptive: bool = False,
        gamma: float = 0.99,
        sensitivity: float = 2.0,
        min_history: int = 3,
        window: int | None = None,
        lagged: bool = False,
        attack: Attack = "fgsm",
        step_size: float | None = None,
        bounds: tuple[float, float] | None = None,
        mean: Sequence[float] | None = None,
        std: Sequence[float] | None = None,
        norm: str = "linf",
        points: str = "elle",
        triplets: int = 1,
        alpha: str = "uniform",
        penalty: str = "squared",
        of: str = "loss",
        label_smoothing: float = 0.0,
        forward: str = "packed",
        skip_below: float | None = None,
        triplet_fraction: float = 1.0,
        logits: Callable[[Any], Any] | None = None,
        loss_fn: attacks.LossFn | None = None,
        dtype: torch.dtype | None = None,
        memory_format: torch.memory_format = torch.preserve_format,
        generator: torch.Generator | None = None,
        process_group: dist.ProcessGroup | None = None,
        backend: str = "auto",
    ) -> None:
        super().__init__(
            eps,
            bounds=bounds,
            mean=mean,
            std=std,
            norm=norm,
            points=points,
            triplets=triplets,
            alpha=alpha,
            penalty=penalty,
            of=of,
            label_smoothing=label_smoothing,
            triplet_fraction=triplet_fraction,
            logits=logits,
            loss_fn=loss_fn,
            dtype=dtype,
            memory_format=memory_format,
            generator=generator,
            backend=backend,
        )
        self.lam = checks.real("lam", lam, low=0)
        self.adaptive = checks.flag("adaptive", adaptive)
        self.lagged = checks.flag("lagged", lagged)
        self.skip_below = None if skip_below is None else checks.real("skip_below", skip_below, low=0, high=1)
        for name, given in (("lagged", lagged), ("window", window is not None), ("skip_below", skip_below is not None)):
            if given and not adaptive:
                raise ValueError(f"{name}: expected adaptive=True beside it, as only ELLE-A has a history")
        # Made in any case, so that its options are checked in any case.
        controller = AdaptiveLambda(lam, gamma, sensitivity, min_history, window, process_group)
        self.controller: AdaptiveLambda | None = controller if adaptive else None
        self.process_group = process_group
        if not callable(attack):
            checks.choice("attack", attack, (*attacks.SINGLE_STEP, "none"))
        self.attack: Attack = attack
        if step_size is not None:
            checks.real("step_size", step_size, low=0)
            if callable(attack) or attack == "none":
                raise ValueError(f"step_size: expected None beside attack={attack!r}, got {step_size!r}")
        self.step_size = step_size
        self.forward_mode = checks.choice("forward", forward, FORWARDS)
        # Rounded as lam itself is, so that 1 takes in lam_max.
        self._light_lam = torch.tensor(self.lam * (self.skip_below or 0.0), dtype=torch.float32).item()
        self._steps = {"full": 0, "light": 0}
        self.last = Record({}, None)

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
        kind = self.next_kind()
        loss = self.compute(model, x, target, x_adv, kind=kind)
        self.finished(kind)
        return loss

    def check(self, x: Tensor, target: Tensor, x_adv: Tensor | None = None) -> None:
        """Raise TypeError or ValueError for a batch that :meth:`forward` does not take."""
        super().check(x, target)
        if x_adv is not None:
            checks.like("x_adv", x_adv, x)

    @property
    def kinds(self) -> tuple[str, ...]:
        """The kinds of steps: ``"full"``, and with ``skip_below`` also ``"light"``."""
        return ("full",) if self.skip_below is None else ("light", "full")

    def next_kind(self) -> str:
        """The kind of the next step: the one decision of a step that the host takes."""
        if self.skip_below is None or self.controller is None or not self.training:
            return "full"
        return "light" if self.controller.on_host() <= self._light_lam else "full"

    def finished(self, kind: str) -> None:
        """What the host does when a step of this kind has been launched."""
        if self.skip_below is None or self.controller is None or not self.training:
            return
        self._steps[kind] += 1
        self.controller.send_to_host()

    def constants(self) -> dict[str, Any]:
        """The options that a captured step holds as constants, by name."""
        options = {name: getattr(self, name) for name in _CONSTANTS}
        if self.controller is not None:
            options["controller"] = (*self.controller.rule, self.controller.window)
        return options

    def compute(
        self, model: Model, x: Tensor, target: Tensor, x_adv: Tensor | None = None, *, kind: str = "full"
    ) -> Tensor:
        """The loss of a checked batch in a step of one kind. All of it is work for the device."""
        light = kind == "light"
        inner = unwrapped(model)
        seed = functional.draw_seed(x.device, self.generator)
        batch = x.shape[0]
        offset = self._first_sample(batch)
        grad, x_adv, step = self._run_attack(inner, x, target, x_adv, seed, offset)
        points, alpha = self._pack(inner, x, target, grad, x_adv, seed=seed, sample_offset=offset, **step)

        parts = self._parts(points.shape[0], batch, alpha.numel(), light)
        recompute = self.forward_mode == "checkpoint"
        output = self._forward(model, points, target, alpha, parts, recompute=recompute, light=light)
        lam = self._weight(output.device)
        if self.loss_fn is None:
            loss, ce, e_lin = functional.elle_loss(output, target, alpha, lam, **self._linearity, backend=self.backend)
        else:
            ce, e_lin = output[:batch].mean(), elle_loss_reference.linearity_error(output, alpha, batch, self._options)
            loss = weighted_loss(ce, e_lin, lam, self.backend)
        if self.controller is not None and self.lagged and self.training:
            self.controller.update(e_lin, self.backend)
        self._record(loss, ce, e_lin, lam, output[:batch].detach() if self.loss_fn is None else None)
        if light and self._options.points == "elle-2p":
            # x_b is x_adv, whose rows have a graph: no part of E_lin's gradient is to come through them alone.
            loss = loss.detach() + (ce - ce.detach())
        return loss

    def _first_sample(self, batch: int) -> int:
        """Index of this process' first sample in the whole batch: with one seed all draw what one process would."""
        if not (dist.is_available() and dist.is_initialized()):
            return 0
        return max(0, dist.get_rank(self.process_group)) * batch

    def _parts(self, rows: int, batch: int, residuals: int, light: bool) -> list[int]:
        """Rows of each forward pass."""
        if self.forward_mode == "checkpoint":
            triplets = self._options.triplets
            return [batch] + [residuals // triplets] * (triplets * layout.BLOCKS[self._options.points])
        if self.forward_mode == "split" or light:
            return [batch, rows - batch]
        return [rows]

    @property
    def stats(self) -> dict[str, Tensor]:
        """The last step's ``loss``, ``ce``, ``e_lin`` and the ``lam`` that weighed it: detached 0-dim device tensors.

        With ``adaptive`` also ``skipped``, the number of non-finite E_lin so far. With ``skip_below`` also
        ``full_steps`` and ``light_steps``, int64 on the CPU: the training steps of each kind that this object took, no
        part of its ``state_dict``. Empty before the first step. Nothing is synchronised until a value is read.
        """
        if not self.last.stats or self.skip_below is None:
            return dict(self.last.stats)
        return {**self.last.stats, **{f"{kind}_steps": torch.tensor(count) for kind, count in self._steps.items()}}

    @property
    def output(self) -> Tensor | None:
        """The last step's logits at x_adv, ``[B, C]``, detached; ``None`` before it, and with ``loss_fn``."""
        return self.last.output

    def _run_attack(
        self, model: Model, x: Tensor, target: Tensor, x_adv: Tensor | None, seed: Tensor, offset: int
    ) -> tuple[Tensor | None, Tensor | None, dict[str, Any]]:
        """Either the gradient and the step that pack_points takes along it, or the finished points."""
        if x_adv is not None:
            return None, x_adv, {}
        if self.attack == "none":
            return None, x, {}
        if not isinstance(self.attack, str):
            made = self.attack(self.on_pixels(model), x, target)
            return None, checks.like("attack's x_adv", made.detach() if isinstance(made, Tensor) else made, x), {}
        attack = attacks.SINGLE_STEP[self.attack]
        start = x
        if attack.start:
            start = functional.random_start(
                x,
                self.eps,
                seed=seed,
                sample_offset=offset,
                start=attack.start,
                bounds=self._checked.bounds,
                norm=self._checked.norm,
                backend=self.backend,
            )
        grad = self._input_gradient(model, start, target, seed, as_is=attack.quantile > 0)
        step_size = attack.step_size * self.eps if self.step_size is None else self.step_size
        step = {"step_size": step_size, "start": attack.start, "project": attack.project}
        return attacks.zero_below_quantile(grad, attack.quantile), None, step

    def _input_gradient(self, model: Model, start: Tensor, target: Tensor, seed: Tensor, *, as_is: bool) -> Tensor:
        """The gradient with respect to what the model sees of ``start``, which one launch writes as the model wants it.

        With respect to the pixels it is that over std. That has the same sign, so it is divided by std only where
        lengths matter: in the l2 norm, and ``as_is``.
        """
        options, checked = {**self._packing, "triplets": 0}, self._checked
        layout_wanted = checked.memory_format
        kept = layout_wanted == torch.preserve_format or start.is_contiguous(memory_format=layout_wanted)
        points = start
        if not (kept and checked.mean is None and checked.dtype in (None, start.dtype)):
            points, _ = functional.pack_points(
                start, None, self.eps, seed=seed, x_adv=start, backend=self.backend, **options
            )
        grad = attacks.input_gradient(
            partial(self._output, model), points, target, self.loss_fn, self._options.label_smoothing
        )
        if checked.std is None or (checked.norm == "linf" and not as_is):
            return grad
        std = constant(checked.std, elle_loss_reference.widen(start).dtype, grad.device)
        return grad / std.view(-1, *[1] * (grad.dim() - 2))

    def on_pixels(self, model: Model) -> Model:
        """The model as an attack of the user's own sees it: pixels in, what the loss takes out."""
        dtype, mean, std = self._checked.dtype, self._checked.mean, self._checked.std
        if dtype is None and mean is None and self.logits is None:
            return model

        def seen(pixels: Tensor) -> Any:
            points = normalise(elle_loss_reference.widen(pixels), mean, std).to(dtype or pixels.dtype)
            return self._output(model, points)

        return seen

    def _weight(self, device: torch.device) -> float | Tensor | AdaptiveLambda:
        """This step's lam, before E_lin is known."""
        if self.controller is None:
            return self.lam
        if not self.lagged and self.training:
            return self.controller
        return self.controller.lam.to(device, copy=True)

    def _record(
        self, loss: Tensor, ce: Tensor, e_lin: Tensor, lam: float | Tensor | AdaptiveLambda, output: Tensor | None
    ) -> None:
        if isinstance(lam, AdaptiveLambda):
            lam = lam.lam.clone()
        elif not isinstance(lam, Tensor):
            lam = torch.full((), lam, device=loss.device)
        # A copy of the loss, as `loss /= n` for gradient accumulation is common and would change what is reported.
        stats = {"loss": loss.detach().clone(), "ce": ce.detach(), "e_lin": e_lin.detach(), "lam": lam}
        if self.controller is not None:
            stats["skipped"] = self.controller.skipped.clone()
        self.last = Record(stats, output)

    def extra_repr(self) -> str:
        """The options, as ``repr`` shows them."""
        attack = self.attack if isinstance(self.attack, str) else "custom"
        options = f"lam={self.lam:g}, adaptive={self.adaptive}, attack={attack!r}, forward={self.forward_mode!r}"
        return f"{super().extra_repr()}, {options}, skip_below={self.skip_below}"


class LocalLinearity(Triplets):
    """E_lin alone, a differentiable regulariser to add to any training loss (arXiv 2401.11618, Definition 1).

    One forward pass over the packed x_a, x_b, x_c::

        regulariser = LocalLinearity(eps=8/255)
        loss = my_loss(model(x), y) + 4000.0 * regulariser(model, x, y)

    Of a model in DistributedDataParallel whose own ``model(x)`` is in the same step pass ``model.module`` here: the
    wrapper's forward pass should run once a step.

    Args: those of :class:`ELLELoss` that concern the triplets.

    Raises:
        TypeError, ValueError: naming the argument, what was expected and what was got.
        RuntimeError: if the backend cannot run here.
    """

    def forward(self, model: Model, x: Tensor, target: Tensor, x_adv: Tensor | None = None) -> Tensor:
        """E_lin of one batch, 0-dim, differentiable with respect to the model's parameters.

        Args:
            model, x, target: as in :meth:`ELLELoss.forward`.
            x_adv: the x_b of ``points="elle-2p"``, which needs it; the other layouts do not look at it.
        """
        self.check(x, target)
        if self._options.points != "elle-2p":
            x_adv = None
        elif x_adv is None:
            raise ValueError("x_adv: expected adversarial points, as they are the x_b of points='elle-2p', got None")
        seed = functional.draw_seed(x.device, self.generator)
        points, alpha = self._pack(unwrapped(model), x, target, None, x_adv, seed=seed)
        output = self._forward(model, points, target, alpha, [points.shape[0]])
        if self.loss_fn is None:
            return functional.local_linearity(output, target, alpha, **self._linearity, backend=self.backend)
        first = 0 if x_adv is None else x.shape[0]
        return elle_loss_reference.linearity_error(output, alpha, first, self._options)
