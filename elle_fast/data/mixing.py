"""Mixup and cutmix of a batch, with targets that are probabilities."""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.nn.functional import one_hot

from elle_fast._core import checks


class Mixing:
    """Mixes each image of a batch, and its label, with those of the image before it.

    Mixup (arXiv 1710.09412): lam x + (1 - lam) x', with lam from Beta(mixup, mixup). Cutmix (arXiv 1905.04899): a
    rectangle of x', of 1 - lam of the area and cut off at the image's edges, in x. The targets have the same shares.
    There is one lam for a batch; with both, a batch has mixup or cutmix with probability 1/2 each. The formulas, and
    the order of the draws, are those of torchvision.transforms.v2.

    What is drawn follows from ``seed`` alone, on the host, so that nothing waits for the device, and no state of torch
    is read or written. Processes that share a batch have one lam and one rectangle; each mixes its own share.

    Args:
        classes: C, >= 1.
        mixup, cutmix: parameters of the Beta distributions, >= 0; 0 for none.
    """

    def __init__(self, classes: int, *, mixup: float = 0.0, cutmix: float = 0.0) -> None:
        self.classes = checks.integer("classes", classes, low=1)
        self.mixup, self.cutmix = checks.real("mixup", mixup, low=0), checks.real("cutmix", cutmix, low=0)

    def __bool__(self) -> bool:
        return self.mixup > 0 or self.cutmix > 0

    def __call__(self, x: Tensor, y: Tensor, seed: int) -> tuple[Tensor, Tensor]:
        """Images float [B, C, H, W] and probabilities [B, classes] of y int64 [B]; as they are if nothing is mixed."""
        if not self:
            return x, y
        draws = torch.Generator("cpu").manual_seed(seed)
        cut = self.cutmix > 0
        if self.mixup and self.cutmix:
            cut = bool(torch.rand((), generator=draws, device="cpu") < 0.5)
        lam = _beta(self.cutmix if cut else self.mixup, draws)
        if cut:
            height, width = x.shape[2:]
            column, row = (int(torch.randint(n, (1,), generator=draws, device="cpu")) for n in (width, height))
            half = 0.5 * math.sqrt(1 - lam)
            across, down = int(half * width), int(half * height)
            left, right = max(column - across, 0), min(column + across, width)
            top, bottom = max(row - down, 0), min(row + down, height)
            mixed = x.clone()
            mixed[..., top:bottom, left:right] = x.roll(1, 0)[..., top:bottom, left:right]
            lam = 1 - (right - left) * (bottom - top) / (width * height)
        else:
            mixed = x.roll(1, 0).mul_(1 - lam).add_(x, alpha=lam)
        target = one_hot(y, self.classes).to(x.dtype)
        return mixed, target.roll(1, 0).mul_(1 - lam).add_(target, alpha=lam)


def _beta(a: float, draws: torch.Generator) -> float:
    """A draw from Beta(a, a), in [0, 1]."""
    # As torch.distributions does, which takes no generator.
    shares = torch._sample_dirichlet(torch.full((1, 2), a, dtype=torch.float32, device="cpu"), generator=draws)
    return float(shares[0, 0])
