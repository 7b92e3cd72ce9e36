"""``alpha="argmax"``: the place of x_c on the line at which the residual is largest."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from elle_fast import attacks
from elle_fast._core import compiled
from elle_fast._core.unwrapping import Model
from elle_fast.draws import Draws, RandomLayers
from elle_fast.ops.elle_loss.validation import Linearity
from elle_fast.ops.pack_points.reference import between

# Projected ascent (paper, B.3: PGD-10 with a step of 0.1).
_STEPS, _STEP_SIZE = 10, 0.1


def best_alpha(
    function: Callable[..., Tensor],
    random_layers: RandomLayers,
    options: Linearity,
    model: Model,
    points: Tensor,
    alpha: Tensor,
    of_samples: Sequence[Tensor],
    adv_rows: int,
) -> Tensor:
    """The alpha in [0, 1] that maximises r^2 (paper, B.3), by ten projected sign steps from a uniform start.

    Args:
        function: ``(model, points, *rows) -> values``, whose linearity is enforced.
        random_layers: make the passes draw alike.
        options, points, alpha: the packed batch, of which the first ``adv_rows`` rows are x_adv.
        of_samples: what goes with each sample, the target first, ``[B, ...]``; the function gets rows of them.
    """
    triplets = options.triplets
    blocks = points[adv_rows:].unflatten(0, (triplets, options.blocks, -1))
    part = blocks.shape[2]
    x_a = blocks[:, 0].flatten(0, 1)
    x_b = blocks[:, 1].flatten(0, 1) if options.points == "elle" else torch.cat([points[:part]] * triplets)
    rows = [torch.cat([each[:part]] * triplets) for each in of_samples]

    def step(draws: Draws, model: Model) -> Tensor:
        def values(points: Tensor) -> Tensor:
            passes = draws.passes(function, [part] * triplets, [len(points)], points, *rows)
            found = [run(model, *inputs) for run, inputs in passes]
            return found[0] if len(found) == 1 else torch.cat(found)

        with torch.no_grad():
            h_a, h_b = values(x_a.clone()), values(x_b.clone())  # it may write to them
        # Older torch (pytorch/pytorch#158232): autocast would hand the weights that it has just cast without a graph
        # to the forward pass that needs one.
        torch.clear_autocast_cache()
        ascended = alpha
        for _ in range(_STEPS):
            with torch.enable_grad(), compiled.keeping():
                a = attacks.leaf(ascended)
                h_c = values(between(x_a, x_b, a).to(points.dtype))
                (grad,) = torch.autograd.grad((h_c - between(h_a, h_b, a)).square().sum(), a)
            ascended = (ascended + _STEP_SIZE * grad.sign()).clamp(0, 1)
        return ascended

    return random_layers.run(step, model, points, of_samples[0].shape[0], rewind=True)
