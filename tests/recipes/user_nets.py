"""Networks as a user's own code builds them, by ``tests.recipes.user_nets:NAME``."""

from typing import Any, NamedTuple

import torch
from torch import Tensor, nn


def norms(num_classes: int, in_shape: tuple[int, ...], depth: int = 1, drop: float = 0.0) -> nn.Module:
    """With group norm and layer norm, and none over the batch."""
    layers: list[nn.Module] = [nn.Conv2d(in_shape[0], 8, 3, stride=2, padding=1)]
    for _ in range(depth):
        layers += [nn.GroupNorm(2, 8), nn.ReLU(), nn.Conv2d(8, 8, 3, padding=1)]
    return nn.Sequential(
        *layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.LayerNorm(8), nn.Dropout(drop), nn.Linear(8, num_classes)
    )


def batch_norms(classes: int) -> nn.Module:
    """With batch norm, for pictures of one channel."""
    return nn.Sequential(
        *[nn.Conv2d(1, 4, 3, padding=1), nn.BatchNorm2d(4), nn.ReLU()],
        *[nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, classes)],
    )


def hugging_face(num_classes: int, in_shape: tuple[int, ...], dropout: float = 0.0) -> nn.Module:
    """A tiny ViT whose output has the logits in an attribute."""
    from transformers import ViTConfig, ViTForImageClassification

    sizes: dict[str, Any] = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "patch_size": 4}
    sizes |= {"image_size": in_shape[1], "num_channels": in_shape[0], "intermediate_size": 32}
    net: nn.Module = ViTForImageClassification(ViTConfig(**sizes, num_labels=num_classes, hidden_dropout_prob=dropout))
    return net


class Output(NamedTuple):
    """What networks of Hugging Face return, in the one respect that matters."""

    logits: Tensor


def with_logits(num_classes: int, blocks: int = 2) -> nn.Module:
    """For 64 pixels, with blocks in a list inside of a module, and an output that has the logits in an attribute."""

    class Encoder(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first = nn.Linear(64, 4)
            self.layer = nn.ModuleList(nn.Sequential(nn.LayerNorm(4), nn.Linear(4, 4)) for _ in range(blocks))

        def forward(self, x: Tensor) -> Tensor:
            h: Tensor = self.first(x.flatten(1))
            for block in self.layer:
                h = h + block(h)
            return h

    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.encoder, self.classifier = Encoder(), nn.Linear(4, num_classes)

        def forward(self, x: Tensor) -> Output:
            return Output(self.classifier(self.encoder(x)))

    return Net()


def with_leftovers(classes: int, in_shape: tuple[int, ...]) -> nn.Module:
    """With weights that no logit depends on."""

    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.unused = nn.Parameter(torch.ones(3))
            self.used = nn.Linear(in_shape[0] * in_shape[1] * in_shape[2], classes)

        def forward(self, x: Tensor) -> Tensor:
            logits: Tensor = self.used(x.flatten(1))
            return logits

    return Net()


def of_seven() -> nn.Module:
    """A network that does not take the number of classes."""
    return nn.Sequential(nn.Flatten(), nn.Linear(64, 7))


def cut(classes: int) -> nn.Module:
    """A network through which no gradient comes to the input."""

    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.last = nn.Linear(64, classes)

        def forward(self, x: Tensor) -> Tensor:
            logits: Tensor = self.last(x.detach().flatten(1))
            return logits

    return Net()


def a_dict(classes: int) -> nn.Module:
    """A network whose output is a dictionary."""

    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.last = nn.Linear(64, classes)

        def forward(self, x: Tensor) -> dict[str, Tensor]:
            return {"scores": self.last(x.flatten(1))}

    return Net()


def nothing() -> None:
    """A builder that forgets to return its network."""


def unlucky() -> nn.Module:
    """A builder that fails."""
    raise RuntimeError("no luck\nin more than one line")


number = 5
