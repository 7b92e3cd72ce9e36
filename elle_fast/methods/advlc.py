"""AdvLC in its authors' setting: PGD, and the change of the logits along it."""

from __future__ import annotations

from functools import partial

from torch import Tensor

from elle_fast import functional, regularizers
from elle_fast._core import checks
from elle_fast._core.unwrapping import Model
from elle_fast.methods.base import NOT_SINGLE_STEP, Bounds, Method, Penalized, logits_and_gradient
from elle_fast.methods.counting import CountsSteps

_STEPS = 10


class AdvLC(CountsSteps, Penalized):
    r"""Adversarial training with :class:`elle_fast.regularizers.AdvLC` (Li and Spratling 2023, arXiv 2212.04985).

    .. math::
        mean_i\, L(f(x_{adv,i}), y_i) + w \cdot AdvLC(f(x_0), f(x_{adv}))

    x_adv comes from 10 steps of ``eps / 4`` (2/255 at 8/255) from x_0, within eps of it and within ``bounds``. x_0 is
    x, or with ``noise`` x plus ``U[-eps, eps]``, so that x_adv may be 2 eps from x. One pass gives f(x_0) and the first
    step's gradient. w grows from epoch to epoch, up to ``lam`` in the last one (an option of the authors' code).

    Departure: their code adds the mean loss' gradient itself, which is tiny, to x_0 and takes the 10 steps from there,
    as an argument is in the place of another. Single-step AdvLC is ``fgsm+advlc``.

    Args:
        lam: the highest w, ``>= 0``. The authors' is 0.3, and 0.4 with weight averaging.
        steps: training steps of the whole run, over which w grows linearly; ``None``: it is ``lam`` throughout.
        epoch_steps: training steps of an epoch, in which w stays as it is; ``None``: it grows in each step.
        noise: whether x_0 is drawn.
    """

    _fixed = ("regularizer",)

    def __init__(
        self,
        eps: float,
        lam: float,
        bounds: Bounds = None,
        steps: int | None = None,
        epoch_steps: int | None = None,
        *,
        noise: bool = False,
    ) -> None:
        super().__init__(eps, lam, bounds)
        self.steps = None if steps is None else checks.integer("steps", steps, low=1)
        self.epoch_steps = 1 if epoch_steps is None else checks.integer("epoch_steps", epoch_steps, low=1)
        self.noise = checks.flag("noise", noise)
        self.regularizer = regularizers.AdvLC()

    def _step(self, model: Model, inner: Model, x: Tensor, target: Tensor) -> Tensor:
        done, weight = self._count(model, x), self.lam
        if self.steps is not None:
            weight *= min(1.0, (done // self.epoch_steps + 1) * self.epoch_steps / self.steps)
        start = x
        if self.noise:
            start = functional.random_start(x, self.eps, seed=functional.draw_seed(x.device, None), bounds=self.bounds)
        logits, grad = logits_and_gradient(model, start, target)
        step_size = self.eps / 4
        first = self._projected(start + step_size * grad.sign(), start)
        x_adv = self._climbed(inner, first, start, target, steps=_STEPS - 1, step_size=step_size)
        logits_adv = inner(x_adv)
        ce, penalty = self._ce(logits_adv, target), self.regularizer.from_logits(logits, logits_adv)
        return self._record(ce + weight * penalty, logits_adv, ce=ce, penalty=penalty)


def _row(about: str, *, noise: bool) -> Method:
    about = f"PGD-10{about} + lam largest changes of logits"
    make = partial(AdvLC, noise=noise)
    refuses = {"elle": NOT_SINGLE_STEP, "advlc": "it has it already"}
    return Method(about, "2212.04985", "11F 10G 2B", 25, make, takes=("lam", "steps", "epoch_steps"), refuses=refuses)


ROWS = {"advlc": _row("", noise=False), "advlc-noise": _row(" from noise", noise=True)}
