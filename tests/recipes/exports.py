"""A trained run, and a network of another library in its place."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import nn

from elle_fast.recipes import result as ending
from elle_fast.recipes.train import train
from tests.recipes.test_train import CONFIG, dataset, quiet

CLASSES = 3  # of the data set of test_train
TINY = replace(CONFIG, width=2, epochs=1, validation=8, eval_attacks="clean,fgsm", average=0.9)


def trained_run(folder, config=TINY):
    """A finished run's folder."""
    with pytest.MonkeyPatch.context() as context:
        context.setattr(ending, "plot_curves", lambda *args, **options: None)
        train(config, folder, dataset=dataset(), console=quiet())
    return folder


def pixels(batch=3):
    """Pictures of the run's shape."""
    return torch.rand(batch, 1, 8, 8, generator=torch.Generator().manual_seed(7))


class Foreign(nn.Module):
    """Layer norm, attention, dropout, tied weights, and a buffer that is not saved."""

    def __init__(self):
        super().__init__()
        self.inward = nn.Linear(8, 8)
        self.outward = nn.Linear(8, 8)
        self.outward.weight = self.inward.weight
        self.norm = nn.LayerNorm(8)
        self.attention = nn.MultiheadAttention(8, 2, batch_first=True)
        self.dropout = nn.Dropout(0.5)
        self.head = nn.Linear(8, CLASSES)
        self.register_buffer("scale", torch.tensor(0.5), persistent=False)

    def forward(self, images):
        rows = self.norm(self.inward(images[:, 0] * self.scale))
        rows = rows + self.dropout(self.attention(rows, rows, rows, need_weights=False)[0])
        return self.head(torch.einsum("brc,r->bc", self.outward(rows), torch.full((8,), 1 / 8)))


def attention(classes: int) -> nn.Module:
    """As ``tests.recipes.exports:attention``, a network that none of our names stands for."""
    assert classes == CLASSES
    return Foreign()
