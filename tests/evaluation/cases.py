"""Models whose robust accuracy has a closed form, and samples for them."""

import importlib.util

import pytest
import torch
from torch import nn

needs_autoattack = pytest.mark.skipif(importlib.util.find_spec("pyautoattack") is None, reason="needs pyautoattack")


needs_foolbox = pytest.mark.skipif(importlib.util.find_spec("foolbox") is None, reason="needs foolbox")


FOREIGN = [
    pytest.param("autoattack", marks=needs_autoattack),
    pytest.param("square-50", marks=needs_autoattack),
    pytest.param("foolbox-pgd-3-2", marks=needs_foolbox),
]


class Threshold(nn.Module):
    """Two classes, split at the pixel 0.5: PGD within eps turns exactly the samples nearer to it than eps."""

    def __init__(self):
        super().__init__()
        self.scale = nn.Parameter(torch.tensor(3.0))
        self.norm = nn.BatchNorm1d(2)  # untouched by an evaluation, so the identity up to its eps
        self.drop = nn.Dropout(0.9)

    def forward(self, x):
        margin = self.scale * (x.flatten(1) - 0.5)
        return self.drop(self.norm(torch.cat((-margin, margin), dim=1)))


def batched(x, y, size=256):
    """A list of batches, as a loader would yield them."""
    return list(zip(x.split(size), y.split(size), strict=True))


def pixels(values, size=256):
    """Batches of images of one pixel, of values 0 .. 255, labelled as :class:`Threshold` says."""
    values = torch.tensor(values)
    return batched(values.view(-1, 1, 1, 1) / 255, (values > 127).long(), size)


class Linear(nn.Module):
    """Logits ``W x + b``: how far a sample is from being turned has a closed form."""

    def __init__(self, classes, pixels, scale=1.0):
        super().__init__()
        generator = torch.Generator().manual_seed(classes)
        if classes == 2:
            weight = torch.randn(1, pixels, generator=generator) * torch.tensor([[-1.0], [1.0]])
        else:
            weight = torch.randn(classes, pixels, generator=generator)
        self.weight = nn.Parameter(weight)
        self.bias = nn.Parameter(-0.5 * weight.sum(1))
        self.scale = scale

    def forward(self, x):
        return self.scale * (x.flatten(1) @ self.weight.T + self.bias)

    def radius(self, x, y, norm="linf"):
        """The smallest eps that turns each sample: ``min_j (z_y - z_j) / ||w_y - w_j||_1``, float64 [N]; j is not y.

        In l2 with the 2-norm. True while no pixel of the ball leaves [0, 1].
        """
        weight, bias = self.weight.detach().double(), self.bias.detach().double()
        z = x.double().flatten(1) @ weight.T + bias
        apart = torch.linalg.vector_norm(weight[y][:, None] - weight[None], 1 if norm == "linf" else 2, dim=2)
        radii = (z.gather(1, y[:, None]) - z) / apart
        return radii.scatter(1, y[:, None], torch.inf).min(1).values


EPS = 6 / 255
BALLS = {"linf": (EPS, 3), "l2": (0.06, 5)}  # eps, and pixels a side: Square takes no fewer in l2


def around(model, n=60, size=None, norm="linf"):
    """Images with pixels in 64 .. 192, labelled as the model says, but for every seventh; none near a change."""
    eps, least = BALLS[norm]
    size = size or least
    generator = torch.Generator().manual_seed(n)
    x = torch.randint(64, 193, (4 * n, 1, size, size), generator=generator) / 255
    with torch.no_grad():
        y = model(x).argmax(1)
    # FAB oversteps the boundary by 5 % and counts only inside the ball. Pixels, sums and eps are rounded to 1e-6.
    clear = ((model.radius(x, y, norm) - eps).abs() > 0.06 * eps).nonzero().flatten()[:n]
    assert len(clear) == n
    x, y = x[clear], y[clear]
    y[::7] = (y[::7] + 1) % len(model.bias)
    return x, y
