"""LocalLinearity: the options of the triplets, their packing, their forward pass, and E_lin."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from elle_fast import attacks, backends
from elle_fast._core import checks, precision
from elle_fast._core.options import Options
from elle_fast._core.pickling import Picklable
from elle_fast._core.unwrapping import Model, unwrapped
from elle_fast._core.without_trace import without_trace
from elle_fast.ascent import best_alpha
from elle_fast.draws import Draws, RandomLayers
from elle_fast.functional import draw_seed
from elle_fast.ops import layout
from elle_fast.ops.elle_loss import op as loss_op
from elle_fast.ops.elle_loss.reference import expand_target, linearity_error, widen
from elle_fast.ops.elle_loss.validation import Linearity
from elle_fast.ops.pack_points import op as pack_op
from elle_fast.ops.pack_points.reference import constant
from elle_fast.ops.pack_points.validation import Packing
from elle_fast.own_attack import own_points
from elle_fast.passes import ModelKwargs, OnPixels, output_of, rows_of
from elle_fast.recompute import checkpointed

__all__ = ["LocalLinearity"]

Attack = str | Callable[[Model, Tensor, Any], Tensor]
FORWARDS = ("packed", "split", "checkpoint")


class LocalLinearity(Options, Picklable):
    """E_lin alone, a differentiable regulariser to add to any training loss (arXiv 2401.11618, Definition 1).

    One forward pass over the packed x_a, x_b, x_c::

        regulariser = LocalLinearity(eps=8/255)
        loss = my_loss(model(x), y) + 4000.0 * regulariser(model, x, y)

    If the model is wrapped in DistributedDataParallel and the step also calls ``model(x)``, pass ``model.module`` here:
    the wrapper's forward pass should run once per step. Random layers draw the same at all points of a sample, as in
    :class:`~elle_fast.ELLELoss`.

    Args:
        eps: radius of the ball, ``>= 0``, in units of x.
        bounds, mean, std, norm, points, triplets, dtype, memory_format: see
            :class:`~elle_fast.ops.pack_points.validation.Packing`. x and eps stay in pixels, the model sees normalized
            points. E_lin is averaged over the triplets. For ``"elle-2p"`` the paper prints ``penalty="abs"``, but
            its weights fit the square: at ELLE's working point ``abs`` has some 400 times the slope. x outside
            ``bounds``, or NaN, is an error on the CPU; on a GPU it is a warning, once, of a batch now and then.
        alpha: ``"uniform"``, ``"half"`` (0.5) or ``"argmax"``, the alpha with the largest r^2, which costs twelve more
            forward passes over the triplets' points and ten gradients with respect to alpha.
        of, penalty, label_smoothing: see :class:`~elle_fast.ops.elle_loss.validation.Linearity`.
        triplet_precision: of the forward pass over x_a, x_b and x_c, apart from x_adv's, whatever autocast is around:
            ``"fp32"`` (tf32 where torch is told so), ``"fp16"``, ``"bf16"``, or ``None``: as the rest. Rounding in bf16
            makes an E_lin of 2.5 to 17 times a healthy model's (results/precision.json). Weights and x are float32.
        triplet_fraction: the part of the batch, its first samples, on which E_lin is estimated, in ``(0, 1]``; at least
            one sample. The estimate is unbiased if the batch is shuffled: of a sorted one it sees some classes only.
        logits: picks the logits out of the model's output, ``output -> [N, C]``. A lambda cannot be pickled,
            ``operator.itemgetter("logits")`` can.
        loss_fn: ``(output, target) -> losses [N]`` instead of cross-entropy.
        generator: source of the noise, on x's device; ``None`` is torch's default generator.
        backend: ``"auto"`` or a name from :data:`elle_fast.backends.BACKENDS`.

    Raises:
        TypeError, ValueError: naming the argument, what was expected and what was got.
        RuntimeError: if the backend cannot run here.
    """

    _changeable = {  # noqa: RUF012
        "generator": lambda _, value: checks.generator(value),
        "backend": lambda _, value: backends.check(value),
    }
    _fixed = ("options", "packing", "ascends", "random_layers", "triplet_precision")
    _elsewhere = dict.fromkeys((*Packing._fields, *Linearity._fields, "triplet_fraction"), "build another one")

    def __init__(
        self,
        eps: float,
        *,
        bounds: tuple[float, float] | str | None = None,
        mean: Sequence[float] | None = None,
        std: Sequence[float] | None = None,
        norm: str = "linf",
        points: str = "elle",
        triplets: int = 1,
        alpha: str = "uniform",
        penalty: str = "squared",
        of: str = "loss",
        label_smoothing: float = 0.0,
        triplet_fraction: float = 1.0,
        triplet_precision: str | None = None,
        logits: Callable[[Any], Any] | None = None,
        loss_fn: attacks.LossFn | None = None,
        dtype: torch.dtype | None = None,
        memory_format: torch.memory_format = torch.preserve_format,
        generator: torch.Generator | None = None,
        backend: str = "auto",
    ) -> None:
        super().__init__()
        checks.choice("points", points, layout.BLOCKS)
        checks.choice("alpha", alpha, (*layout.ALPHAS, "argmax"))
        if points == "five-point" and alpha != "uniform":
            raise ValueError(f"alpha: expected 'uniform' with points='five-point', got {checks.shown(alpha)}")
        checks.real("triplet_fraction", triplet_fraction, low=0, low_allowed=False, high=1)
        for name, value in (("logits", logits), ("loss_fn", loss_fn)):
            checks.function(name, value)
        if loss_fn is not None and (of != "loss" or label_smoothing != 0):
            raise ValueError(
                "loss_fn: expected of='loss' and label_smoothing=0 with a loss of your own, "
                f"got of={checks.shown(of)} and label_smoothing={checks.shown(label_smoothing)}"
            )
        self.options = Linearity.checked(
            points=points, triplets=triplets, of=of, penalty=penalty, label_smoothing=label_smoothing
        )
        self.packing = Packing.checked(
            eps,
            bounds=bounds,
            mean=mean,
            std=std,
            norm=norm,
            points=points,
            triplets=triplets,
            alpha="uniform" if alpha == "argmax" else alpha,
            fraction=triplet_fraction,
            dtype=dtype,
            memory_format=memory_format,
        )
        self._told = bounds is not None or mean is not None  # what x is
        self.triplet_precision = precision.check("triplet_precision", triplet_precision)
        if points == "elle-2p" and triplet_precision is not None:
            expected = "expected None with points='elle-2p', whose x_b is x_adv, in the precision of the rest"
            raise ValueError(f"triplet_precision: {expected}, got {triplet_precision!r}")
        precision.check_points("dtype", triplet_precision, dtype)
        self.ascends = alpha == "argmax"
        self.random_layers = RandomLayers()
        self.logits = logits
        self.loss_fn = loss_fn
        self.generator = generator
        self.backend = backend

    def forward(
        self,
        model: Model,
        x: Tensor,
        target: Tensor,
        x_adv: Tensor | None = None,
        *,
        model_kwargs: Mapping[str, Any] | None = None,
    ) -> Tensor:
        """E_lin of one batch, 0-dim, differentiable with respect to the model's parameters.

        Args:
            model, x, target, model_kwargs: as in :meth:`ELLELoss.forward <elle_fast.ELLELoss.forward>`.
            x_adv: the x_b of ``points="elle-2p"``, which needs it; the other layouts do not look at it.
        """
        self.check(x, target, x_adv)
        if self.options.points != "elle-2p":
            x_adv = None
        elif x_adv is None:
            raise ValueError("x_adv: expected adversarial points, as they are the x_b of points='elle-2p', got None")
        kwargs = ModelKwargs.of(model_kwargs, x.shape[0])
        rows, alpha = self.triplets(unwrapped(model), x, target, self.packing, x_adv, kwargs)
        return self.error(rows, target, alpha)

    @property
    def eps(self) -> float:
        """The radius, which may be set, as in a warm-up."""
        return self.packing.eps

    @eps.setter
    def eps(self, value: float) -> None:
        vars(self)["packing"] = self.packing._replace(eps=checks.real("eps", value, low=0))

    def check(self, x: Tensor, target: Any, x_adv: Tensor | None = None) -> None:
        """Check a batch before the model sees it."""
        attacks.check_batch(x, target, self.loss_fn, x_adv, self.packing.bounds, self._told)
        self.packing.check_form(x)
        precision.check_points("x", self.triplet_precision, x.dtype)
        # A user's own loss may take any tensor, as long as it can be cut and repeated along the batch.
        if not isinstance(target, Tensor) or target.shape[:1] != x.shape[:1]:
            raise ValueError(
                f"target: expected a tensor whose dimension 0 is B = {x.shape[0]}, got {checks.describe(target)}"
            )

    def triplets(
        self, model: Model, x: Tensor, target: Tensor, packing: Packing, x_adv: Tensor | None, kwargs: ModelKwargs
    ) -> tuple[Tensor, Tensor]:
        """Rows, as :meth:`rows`, and alpha of a checked batch without x_adv, unless it is an x_b: of new noise."""
        seed = draw_seed(x.device, self.generator)
        points, alpha = self.pack(model, x, target, packing, kwargs, seed=seed, x_adv=x_adv)
        return self.rows(model, points, target, alpha, kwargs), alpha

    def error(self, rows: Tensor, target: Tensor, alpha: Tensor) -> Tensor:
        """E_lin of :meth:`triplets`."""
        if self.loss_fn is not None:
            return linearity_error(rows, alpha, self.options.alone.adv_rows(target), self.options)
        return loss_op.local_linearity(rows, target, alpha, self.options, self.backend)

    def pack(
        self,
        model: Model,
        x: Tensor,
        target: Tensor,
        packing: Packing,
        kwargs: ModelKwargs,
        *,
        seed: Tensor,
        grad: Tensor | None = None,
        x_adv: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        """The packed, normalized batch and alpha. ``packing``: this object's own, perhaps with an attack's step."""
        points, alpha = pack_op.pack_points(x, grad, packing, seed=seed, x_adv=x_adv, backend=self.backend)
        if not self.ascends:
            return points, alpha
        adv_rows = 0 if grad is None and x_adv is None else x.shape[0]
        function, of_samples = partial(self._values, kwargs), (target, *kwargs.values)
        with precision.around(self.triplet_precision, x.device):
            alpha = best_alpha(function, self.random_layers, self.options, model, points, alpha, of_samples, adv_rows)
        # The same seed packs the same x_a and x_b again, now with the x_c of the alpha found.
        return pack_op.pack_points(x, grad, packing, seed=seed, x_adv=x_adv, alpha=alpha, backend=self.backend)

    def rows(
        self,
        model: Model,
        points: Tensor,
        target: Tensor,
        alpha: Tensor,
        kwargs: ModelKwargs,
        forward: str = "packed",
        *,
        light: bool = False,
    ) -> Tensor:
        """Logits ``[N, C]`` of the packed batch, or losses ``[N]`` of the user's own loss.

        Args:
            model, points, target, alpha, kwargs: the model, the packed batch, and what else the model takes.
            forward: of :data:`FORWARDS`; with ``triplet_precision``, ``"packed"`` is ``"split"``. The first forward
                pass goes through DistributedDataParallel, no other does.
            light: x_adv apart from the triplets, whose pass leaves no trace: no graph, no batch norm statistics.
        """
        chosen = self.triplet_precision
        precision.check_weights(chosen, unwrapped(model))
        part = alpha.numel() // self.options.triplets
        blocks = [part] * (self.options.triplets * self.options.blocks)
        if adv := points.shape[0] - sum(blocks):
            blocks = [adv, *blocks]
        parts, recompute = [sum(blocks)], forward == "checkpoint"
        if recompute:
            parts = blocks
        elif adv and (forward == "split" or light or chosen is not None):
            parts = [adv, sum(blocks) - adv]
        layout = self.options._replace(adv=adv > 0)
        targets = None if self.loss_fn is None else expand_target(target, alpha, layout)
        values = [expand_target(value, alpha, layout) for value in kwargs.values]
        one_pass = partial(rows_of, kwargs)

        def step(draws: Draws, model: Model) -> Tensor:
            callees, again = [(each, self.logits, self.loss_fn) for each in (model, unwrapped(model))]
            alike = self.options.points == "elle-2p"  # else x_adv may draw what it likes
            rows: list[Tensor] = []
            for run, inputs in draws.passes(one_pass, blocks, parts, points, targets, *values, alike=alike):
                with precision.around(chosen if rows or not adv else None, points.device):
                    if recompute and not light:
                        rows.append(checkpointed(run, callees, again, *inputs))
                    else:
                        with without_trace(model, light and len(rows) > 0):
                            rows.append(run(*callees, *inputs))
                callees = again
            # torch does not put together what two autocasts have rounded.
            return rows[0] if len(rows) == 1 else torch.cat(rows if chosen is None else [*map(widen, rows)])

        return self.random_layers.run(step, model, points, target.shape[0])

    def output(self, model: Model, points: Tensor) -> Any:
        """What the loss takes: the model's output, or the logits picked out of it."""
        return output_of(model, self.logits, points)

    def attacked(
        self,
        attack: Attack,
        model: Model,
        x: Tensor,
        target: Tensor,
        packing: Packing,
        bounds: tuple[float, float] | None,
        seed: Tensor,
    ) -> tuple[Tensor | None, Tensor | None]:
        """Either the gradient that pack_points takes a step along, or the finished points, within ``bounds``."""
        if attack == "none":
            return None, x
        if not isinstance(attack, str):
            return None, own_points(attack, self.on_pixels(model), x, target)
        step = attacks.SINGLE_STEP[attack]
        of = partial(self.input_gradient, model, target, seed, lengths_matter=step.quantile > 0)
        apart = packing._replace(bounds=bounds)
        grad = step.gradient(of, x, apart, seed, self.backend)
        if bounds == packing.bounds:
            return grad, None
        return None, pack_op.pack_points(x, grad, apart.attack_alone, seed=seed, backend=self.backend)[0]

    def on_pixels(self, model: Model) -> Model:
        """The model as a user's own attack sees it: pixels in, what the loss takes out. It stays a module."""
        packing = self.packing
        if packing.dtype is None and packing.mean is None and self.logits is None:
            return model
        whole = OnPixels(model, packing, self.logits)
        return whole if isinstance(model, nn.Module) else whole.forward

    def input_gradient(
        self, model: Model, target: Tensor, seed: Tensor, start: Tensor, *, lengths_matter: bool
    ) -> Tensor:
        """The loss' gradient with respect to what the model sees of ``start``, which one launch writes.

        With respect to the pixels it is that over std. That has the same sign, so it is divided by std only where
        lengths matter: in the l2 norm, and if the attack says so.
        """
        packing, points, wanted = self.packing._replace(triplets=0), start, self.packing.memory_format
        kept = wanted == torch.preserve_format or start.is_contiguous(memory_format=wanted)
        if not (kept and packing.mean is None and packing.dtype in (None, start.dtype)):
            points, _ = pack_op.pack_points(start, None, packing, seed=seed, x_adv=start, backend=self.backend)
        smoothing = self.options.label_smoothing
        grad = attacks.input_gradient(model, points, target, self.loss_fn, smoothing, logits=self.logits)
        if packing.std is None or (packing.norm == "linf" and not lengths_matter):
            return grad
        std = constant(packing.std, widen(start).dtype, grad.device)
        return grad / std.view(-1, *[1] * (grad.dim() - 2))

    def _values(self, kwargs: ModelKwargs, model: Model, points: Tensor, target: Tensor, *values: Tensor) -> Tensor:
        """The function whose linearity is enforced: losses ``[N]`` or logits ``[N, C]``."""
        output = output_of(model, self.logits, points, **kwargs.with_values(values))
        if self.options.of == "logits":
            return widen(checks.logits(output, points.shape[0], attacks.MODEL_OUTPUT))
        return attacks.sample_losses(output, target, self.loss_fn, points.shape[0], self.options.label_smoothing)

    def extra_repr(self) -> str:
        """The options, as ``repr`` shows them."""
        packing, options = self.packing, self.options
        return (
            f"eps={packing.eps!r}, alpha={'argmax' if self.ascends else packing.alpha!r}, points={options.points!r}, "
            f"triplets={options.triplets}, of={options.of!r}, penalty={options.penalty!r}, "
            f"label_smoothing={options.label_smoothing}, triplet_fraction={packing.fraction!r}, "
            f"triplet_precision={self.triplet_precision!r}"
        )
