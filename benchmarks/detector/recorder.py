"""What one step of a training shows of E_lin and of its attack, beside what the step computes.

The step itself is left as it is: the recorder's own pass makes no graph, leaves batch norm's statistics alone, and
draws its points from a generator of its own.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from elle_fast import attacks
from elle_fast._core.seeds import derived_seed
from elle_fast.functional import draw_seed, local_linearity, pack_points

GROUP, GROUPS = 16, 8  # of the batch's first samples
COLUMNS = (
    *(f"group_{i}" for i in range(GROUPS)),  # mean r^2 of 16 samples each, of one pass over all; NaN beyond the batch
    "own_pass",  # mean r^2 of the first 16 samples, in a pass of their own, as `fast` estimates E_lin
    "r1",  # mean r
    "r4",  # mean r^4
    "rise",  # mean (L(x_b) - L(x_a))^2
    "start",  # mean loss where the attack takes its gradient
    "adv",  # mean loss at x_adv
    "falls",  # share of samples whose loss at x_adv is below that at the start
    "predicted",  # mean rise of the loss along the attack's step, by its gradient
    "ce_norm",  # 2-norm of the gradient of the loss in the logits at x_adv
    "e_lin_norm",  # of E_lin in the logits of the triplets
    "lam",  # 0 without ELLE
)

Bind = Callable[[nn.Module, Tensor], tuple[Callable[[Tensor], Tensor], Tensor]]


def as_it_is(model: nn.Module, x: Tensor) -> tuple[Callable[[Tensor], Tensor], Tensor]:
    """A model of points, and the points: images."""
    return model, x


class Recorder:
    """Records the columns of one step after another; :meth:`close` takes its hook off the model.

    Args:
        model: in train mode when a step is taken. Its last positional argument is what is perturbed.
        eps: radius of the triplets' ball.
        seed: of the points, with the number of the step.
        bounds: of the points; ``None``: none.
        bind: what is perturbed, and the model of it: ``benchmarks.studies.beyond_images.bind`` for tokens.
    """

    def __init__(
        self, model: nn.Module, eps: float, seed: int, bounds: tuple[float, float] | None, bind: Bind = as_it_is
    ) -> None:
        self.model, self.eps, self.seed, self.bounds, self.bind = model, eps, seed, bounds, bind
        self._passes: list[tuple[Tensor, Tensor]] = []
        self._grad: Tensor | None = None
        self._watching = False
        self._handle = model.register_forward_hook(self._keep)

    def close(self) -> None:
        """Take the hook off the model."""
        self._handle.remove()

    def _keep(self, _: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        if not self._watching:
            return
        points = inputs[-1]
        if not self._passes and points.requires_grad:
            points.register_hook(self._keep_grad)
        self._passes.append((points.detach(), output.detach()))

    def _keep_grad(self, grad: Tensor) -> None:
        self._grad = grad.detach()

    @contextmanager
    def step(self) -> Iterator[None]:
        """Around the step itself, whose first pass is the attack's, and whose second begins with x_adv."""
        self._passes, self._grad, self._watching = [], None, True
        try:
            yield
        finally:
            self._watching = False

    @torch.no_grad()
    def of_triplets(self, x: Tensor, y: Tensor, step: int) -> dict[str, float]:
        """The columns of E_lin. To be called before the step, which moves the weights."""
        generator = torch.Generator().manual_seed(derived_seed(self.seed, step))
        batch, small = len(y), min(GROUP, len(y))
        bound, perturbed = self.bind(self.model, x)
        seed = draw_seed(perturbed.device, generator)
        points, alpha = pack_points(perturbed, None, self.eps, seed=seed, bounds=self.bounds)
        with _statistics_left_alone(self.model):
            logits = bound(points)
            part = torch.cat([block[:small] for block in points.split(batch)])
            alone, _ = residuals(self.bind(self.model, x[:small])[0](part), y[:small], alpha[:small])
        r, rises = residuals(logits, y, alpha)
        with torch.enable_grad():
            leaf = logits.detach().requires_grad_()
            (grad,) = torch.autograd.grad(local_linearity(leaf, y, alpha), leaf)
        groups = [each.square().mean() for each in r.split(GROUP)[:GROUPS]]
        groups += [r.new_tensor(math.nan)] * (GROUPS - len(groups))
        found = [*groups, alone.square().mean(), r.mean(), r.pow(4).mean(), rises.square().mean(), grad.norm()]
        names = (*COLUMNS[:GROUPS], "own_pass", "r1", "r4", "rise", "e_lin_norm")
        return dict(zip(names, torch.stack(found).tolist(), strict=True))

    @torch.no_grad()
    def of_attack(self, y: Tensor) -> dict[str, float]:
        """The columns of the attack, after the step."""
        (start, at_start), (trained, at_trained), *_ = self._passes
        batch = len(y)
        x_adv, logits = trained[:batch], at_trained[:batch]
        before, after = (attacks.sample_losses(each, y, None, batch) for each in (at_start, logits))
        grad = torch.zeros_like(start) if self._grad is None else self._grad
        predicted = (grad * (x_adv - start)).sum() / batch
        of_loss = (logits.softmax(1) - nn.functional.one_hot(y, logits.shape[1])) / batch
        found = [before.mean(), after.mean(), (after < before).float().mean(), predicted, of_loss.norm()]
        names = ("start", "adv", "falls", "predicted", "ce_norm")
        return dict(zip(names, torch.stack(found).tolist(), strict=True))


def residuals(logits: Tensor, y: Tensor, alpha: Tensor) -> tuple[Tensor, Tensor]:
    """r and L(x_b) - L(x_a) of each sample, from the logits at x_a, x_b and x_c, ``[3 B, C]``."""
    at_a, at_b, at_c = (attacks.sample_losses(each, y, None, len(y)) for each in logits.split(len(y)))
    return at_c - (1 - alpha) * at_a - alpha * at_b, at_b - at_a


@contextmanager
def _statistics_left_alone(model: nn.Module) -> Iterator[None]:
    """Batch norm normalises by the batch, as in training, but its running statistics stay."""
    norms = [module for module in model.modules() if isinstance(module, _BatchNorm) and module.track_running_stats]
    for norm in norms:
        norm.track_running_stats = False
    try:
        yield
    finally:
        for norm in norms:
            norm.track_running_stats = True
