"""The points of one attack from one start, checked against the ball and the image range."""

from __future__ import annotations

import logging
import math
import warnings
from collections.abc import Callable

import torch
from torch import Tensor, nn

from elle_fast import attacks
from elle_fast._core.unwrapping import output_at
from elle_fast.evaluation.names import BOUNDS, Attack, Ball
from elle_fast.evaluation.samples import laid_out
from elle_fast.evaluation.undisturbed import foreign_code
from elle_fast.functional import draw_seed, random_start

_Own = Callable[[nn.Module, Tensor, Tensor, Ball, Attack, torch.Generator], Tensor]
_Foreign = Callable[[nn.Module, Tensor, Tensor, Ball, Attack, int], Tensor]
_IN_AUTOATTACK, _SMALLEST_SQUARE = {"linf": "Linf", "l2": "L2"}, 5


def attack_points(
    model: nn.Module, x: Tensor, y: Tensor, ball: Ball, attack: Attack, seed: int
) -> tuple[Tensor, list[str]]:
    """Points ``[B, ...]`` of one start of the attack, and its warnings.

    The model is in eval mode with frozen parameters, x floating ``[B, ...]`` in [0, 1], y int64 ``[B]``, and the seed
    of the random start in ``[0, 2**32)``. Raises RuntimeError if a point is outside the ball or [0, 1], or the
    model is no longer in eval mode.
    """
    notes: list[str] = []
    if ball.norm == "l2" and attack.kind in ("square", "autoattack") and min(x.shape[2:], default=0) < _SMALLEST_SQUARE:
        least = f"images of at least {_SMALLEST_SQUARE} pixels a side, which Square's start in l2 is made of"
        raise ValueError(f"attack {attack.name!r}: expected {least}, got x of shape {list(x.shape)}")
    if attack.kind in OWN:
        generator = torch.Generator(x.device).manual_seed(seed)
        points = OWN[attack.kind](model, x, y, ball, attack, generator)
    else:
        with foreign_code(seed) as notes:
            # They call view() on images and gradients, which needs the contiguous layout.
            points = FOREIGN[attack.kind](_Logits(model).eval(), x.contiguous(), y, ball, attack, seed)
    _check(attack, model, x, points, ball)
    return laid_out(points.detach()), notes


def _check(attack: Attack, model: nn.Module, x: Tensor, points: Tensor, ball: Ball) -> None:
    who = f"attack {attack.name!r}"
    if points.shape != x.shape or points.dtype != x.dtype:
        raise RuntimeError(f"{who}: expected points {x.dtype} {list(x.shape)}, got {points.dtype} {list(points.shape)}")
    if any(module.training for module in model.modules()):
        raise RuntimeError(f"{who}: expected a model in eval mode after it, got modules in train mode")
    low, high = points.min().item(), points.max().item()
    if not (BOUNDS[0] <= low and high <= BOUNDS[1]):  # clamping is exact; a NaN is outside, too
        raise RuntimeError(f"{who}: expected pixels in {list(BOUNDS)}, got some from {low} to {high}")
    # With unit roundoff u (2**-24 in float32), four roundings: of eps (eps u), of a distance from x (eps u), of x plus
    # or minus eps (u / 2 below 1; above 1 it is clamped), and of the distance here (eps u), as some devices have no
    # float64. In l2 the third is one of each pixel, and lengths are sums: eight roundings more.
    wide, roundoff = torch.promote_types(x.dtype, torch.float32), torch.finfo(x.dtype).eps / 2
    offset = (points.to(wide) - x.to(wide)).flatten(1)
    if ball.norm == "linf":
        distance, allowed = offset.abs().max().item(), ball.eps + (0.5 + 3 * ball.eps) * roundoff
    else:
        distance = torch.linalg.vector_norm(offset, dim=1).max().item()
        allowed = ball.eps + (0.5 * math.sqrt(offset.shape[1]) + 11 * ball.eps) * roundoff
    if distance > allowed:
        raise RuntimeError(f"{who}: expected points within {ball} of the images, got one at {distance}")


class _Logits(nn.Module):
    """The model with float32 logits that may be written to (Square does), for images of any layout."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, x: Tensor) -> Tensor:
        logits: Tensor = output_at(self.model, laid_out(x))
        return logits.float().clone()


def _square(model: nn.Module, x: Tensor, y: Tensor, ball: Ball, attack: Attack, seed: int) -> Tensor:
    from pyautoattack.square import SquareAttack

    options = {
        "norm": _IN_AUTOATTACK[ball.norm],
        "eps": ball.eps,
        "seed": seed,
        "device": x.device,
        "n_queries": attack.steps,
    }
    square = SquareAttack(model, p_init=0.8, n_restarts=1, resc_schedule=False, **options)
    points: Tensor = square.perturb(x, y)
    return points


def _autoattack(model: nn.Module, x: Tensor, y: Tensor, ball: Ball, attack: Attack, seed: int) -> Tensor:
    from pyautoattack import AutoAttack

    with torch.no_grad():
        classes = model(x[:1]).shape[1]
    options = {"norm": _IN_AUTOATTACK[ball.norm], "eps": ball.eps, "seed": seed, "device": x.device}
    if classes >= 4:
        auto = AutoAttack(model, version="standard", **options)
    else:
        logging.getLogger("auto-attack").warning("APGD-T is left out: its loss needs 4 classes")
        auto = AutoAttack(model, version="custom", attacks=["apgd-ce", "fab-t", "square"], **options)
        auto.apgd.n_restarts = auto.fab.n_restarts = 1  # as in the standard version
    auto.apgd_targeted.n_target_classes = auto.fab.n_target_classes = min(9, classes - 1)
    points: Tensor = auto.run_standard_evaluation(x, y, batch_size=len(x))[0]
    return points


def _foolbox_pgd(model: nn.Module, x: Tensor, y: Tensor, ball: Ball, attack: Attack, seed: int) -> Tensor:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # it imports from a namespace that SciPy 2 will not have
        from foolbox.attacks import projected_gradient_descent as descents
        from foolbox.criteria import Misclassification
        from foolbox.models.pytorch import PyTorchModel

    in_norm = {"linf": descents.LinfProjectedGradientDescentAttack, "l2": descents.L2ProjectedGradientDescentAttack}
    pgd = in_norm[ball.norm](abs_stepsize=ball.eps / attack.divisor, steps=attack.steps, random_start=True)
    # Its points before it clips them once more, so that the attack itself is judged.
    points: Tensor
    points, _, _ = pgd(PyTorchModel(model, bounds=BOUNDS, device=x.device), x, Misclassification(y), epsilons=ball.eps)
    return points


OWN: dict[str, _Own] = {
    "clean": lambda model, x, y, ball, attack, generator: x,
    "fgsm": lambda model, x, y, ball, attack, generator: attacks.fgsm(
        model, x, y, ball.eps, norm=ball.norm, bounds=BOUNDS
    ),
    "pgd": lambda model, x, y, ball, attack, generator: attacks.pgd(
        model,
        x,
        y,
        ball.eps,
        norm=ball.norm,
        steps=attack.steps,
        step_size=ball.eps / attack.divisor,
        bounds=BOUNDS,
        generator=generator,
    ),
    "noise": lambda model, x, y, ball, attack, generator: random_start(
        x, ball.eps, norm=ball.norm, seed=draw_seed(x.device, generator), bounds=BOUNDS
    ),
}
FOREIGN: dict[str, _Foreign] = {"square": _square, "autoattack": _autoattack, "foolbox-pgd": _foolbox_pgd}
