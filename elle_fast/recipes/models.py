"""Networks of the recipes: PreActResNet18, its one-block-per-stage sibling, WideResNet-28-10, a small CNN and an MLP.

All map a batch [B, *in_shape] with values in [0, 1] to logits [B, classes]; the normalisation is a layer of the model,
so that attacks and their radii are stated in pixels.

Sources: He et al. 2016b, "Identity Mappings in Deep Residual Networks"; Zagoruyko and Komodakis 2016, "Wide Residual
Networks".
"""

from collections import OrderedDict
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from elle_fast.methods.slat import weighted_layers

NAMES = ("preact", "preactresnet18", "wideresnet28-10", "cnn", "mlp")

_DEFAULT_WIDTH = {"preact": 16, "preactresnet18": 64, "wideresnet28-10": 10, "cnn": 32, "mlp": 256}


def build(
    name: str,
    *,
    in_shape: tuple[int, ...],
    classes: int,
    width: int | None = None,
    mean: Sequence[float] | None = None,
    std: Sequence[float] | None = None,
) -> nn.Module:
    """Build a network with fresh weights.

    Args:
        name: One of NAMES.
        in_shape: Shape of one sample: (C, H, W), or for "mlp" also (D,). The residual networks take other H and W
            as well.
        classes: Number of logits, at least 1.
        width: Base width, at least 1. Channels of the first stage (preact: 16, preactresnet18: 64, cnn: 32), units of a
            hidden layer (mlp: 256), or the widening factor (wideresnet28-10: 10).
        mean: One number per channel (per column for rows) to subtract from the input; zeros if only `std` is given.
        std: One positive number per channel to divide by; ones if only `mean` is given. With neither there is no such
            layer.

    Returns:
        A module that maps [B, *in_shape] to logits [B, classes].

    Raises:
        ValueError: An argument is outside the ranges above.
    """
    if name not in NAMES:
        raise ValueError(f"name: expected one of {', '.join(NAMES)}, got {name!r}")
    ranks = (1, 3) if name == "mlp" else (3,)
    if len(in_shape) not in ranks or min(in_shape) < 1:
        expected = "(C, H, W) or (D,)" if name == "mlp" else "(C, H, W)"
        raise ValueError(f"in_shape: expected {expected} with sizes of at least 1 for {name!r}, got {tuple(in_shape)}")
    if classes < 1:
        raise ValueError(f"classes: expected at least 1, got {classes}")
    if width is None:
        width = _DEFAULT_WIDTH[name]
    if width < 1:
        raise ValueError(f"width: expected at least 1, got {width}")
    normalize = None if mean is None and std is None else _normalize(mean, std, in_shape)

    net: nn.Module
    channels = in_shape[0]
    if name == "preact":
        # The first stage's stride makes an epoch less than half as dear, so that two CPU cores suffice.
        widths = (width, 2 * width, 4 * width)
        net = PreActResNet(channels, classes, stem=width, widths=widths, blocks=1, first_stride=2)
    elif name == "preactresnet18":
        net = PreActResNet(channels, classes, stem=width, widths=(width, 2 * width, 4 * width, 8 * width), blocks=2)
    elif name == "wideresnet28-10":
        # 28 convolutions: the stem, two in each of three times four blocks, and one in each stage's first shortcut.
        net = PreActResNet(channels, classes, stem=16, widths=(16 * width, 32 * width, 64 * width), blocks=4)
    elif name == "cnn":
        net = CNN(in_shape, classes, width)
    else:
        net = MLP(in_shape, classes, width)
    if normalize is None:
        return net
    return nn.Sequential(OrderedDict([("normalize", normalize), ("net", net)]))


class Normalize(nn.Module):
    """(x - mean) / std per channel; x [B, C, ...].

    Args:
        mean: C numbers.
        std: C positive numbers.
        ndim: Dimensions of one sample: 3 for [C, H, W], 1 for [D].
    """

    mean: Tensor
    std: Tensor

    def __init__(self, mean: Sequence[float], std: Sequence[float], ndim: int = 3) -> None:
        super().__init__()
        # Buffers, so that they follow .to() and are saved with the weights that were trained behind them.
        shape = (-1,) + (1,) * (ndim - 1)
        self.register_buffer("mean", torch.tensor(mean, dtype=torch.float32).view(shape))
        self.register_buffer("std", torch.tensor(std, dtype=torch.float32).view(shape))

    def forward(self, x: Tensor) -> Tensor:
        """Normalise x [B, C, ...]."""
        return (x - self.mean) / self.std


class PreActBlock(nn.Module):
    """Two 3x3 convolutions, each behind batch norm and ReLU, around a shortcut (He et al. 2016b, figure 1b).

    x [B, in_channels, H, W] -> [B, out_channels, H / stride, W / stride], rounded up. Where the shape changes, the
    shortcut is a 1x1 convolution of the activated input.
    """

    def __init__(self, in_channels: int, out_channels: int, stride: int) -> None:
        super().__init__()
        self.bn1 = nn.BatchNorm2d(in_channels)
        self.conv1 = _conv(in_channels, out_channels, 3, stride)
        self.bn2 = nn.BatchNorm2d(out_channels)
        self.conv2 = _conv(out_channels, out_channels, 3)
        reshapes = stride != 1 or in_channels != out_channels
        self.shortcut = _conv(in_channels, out_channels, 1, stride) if reshapes else None

    def forward(self, x: Tensor) -> Tensor:
        """x [B, in_channels, H, W] -> [B, out_channels, ceil(H / stride), ceil(W / stride)]."""
        h = F.relu(self.bn1(x))
        skip: Tensor = x if self.shortcut is None else self.shortcut(h)
        h = self.conv1(h)
        residual: Tensor = self.conv2(F.relu(self.bn2(h)))
        return skip + residual


class PreActResNet(nn.Module):
    """3x3 stem, stages of pre-activation blocks, batch norm and ReLU, global average pooling, linear layer.

    x [B, in_channels, H, W] -> logits [B, classes]. The stem keeps the resolution; each stage divides it by its stride.

    Args:
        in_channels: Channels of the input.
        classes: Number of logits.
        stem: Channels of the stem.
        widths: Channels of each stage.
        blocks: Blocks in each stage.
        first_stride: Stride of the first stage; that of the others is 2.
    """

    def __init__(
        self,
        in_channels: int,
        classes: int,
        *,
        stem: int,
        widths: Sequence[int],
        blocks: int,
        first_stride: int = 1,
    ) -> None:
        super().__init__()
        # No batch norm and no ReLU: the first block begins with them.
        self.stem = _conv(in_channels, stem, 3)
        stages = []
        channels = stem
        for index, stage_width in enumerate(widths):
            layers = []
            for block in range(blocks):
                stride = 1 if block > 0 else 2 if index > 0 else first_stride
                layers.append(PreActBlock(channels, stage_width, stride))
                channels = stage_width
            stages.append(nn.Sequential(*layers))
        self.stages = nn.Sequential(*stages)
        self.bn = nn.BatchNorm2d(channels)
        self.fc = nn.Linear(channels, classes)

    def forward(self, x: Tensor) -> Tensor:
        """x [B, in_channels, H, W] -> logits [B, classes]."""
        h = F.relu(self.bn(self.stages(self.stem(x))))
        logits: Tensor = self.fc(_pool(h))
        return logits


class CNN(nn.Module):
    """Three 3x3 convolutions with batch norm and ReLU, then one linear layer over all their outputs.

    x [B, *in_shape] -> logits [B, classes]. The convolutions have strides 1, 2, 2 and `width` times 1, 2, 4 channels,
    and torch's default initialisation.
    """

    def __init__(self, in_shape: tuple[int, ...], classes: int, width: int) -> None:
        super().__init__()
        channels, height, breadth = in_shape
        self.conv1 = nn.Conv2d(channels, width, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.conv2 = nn.Conv2d(width, 2 * width, 3, stride=2, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(2 * width)
        self.conv3 = nn.Conv2d(2 * width, 4 * width, 3, stride=2, padding=1, bias=False)
        self.bn3 = nn.BatchNorm2d(4 * width)
        self.fc = nn.Linear(4 * width * -(-height // 4) * -(-breadth // 4), classes)

    def forward(self, x: Tensor) -> Tensor:
        """x [B, *in_shape] -> logits [B, classes]."""
        h = F.relu(self.bn1(self.conv1(x)))
        h = F.relu(self.bn2(self.conv2(h)))
        h = F.relu(self.bn3(self.conv3(h)))
        logits: Tensor = self.fc(h.flatten(1))
        return logits


class MLP(nn.Sequential):
    """Flatten, two hidden ReLU layers of `width` units, linear layer: x [B, *in_shape] -> logits [B, classes]."""

    def __init__(self, in_shape: tuple[int, ...], classes: int, width: int) -> None:
        features = 1
        for size in in_shape:
            features *= size
        super().__init__(
            nn.Flatten(),
            nn.Linear(features, width),
            nn.ReLU(),
            nn.Linear(width, width),
            nn.ReLU(),
            nn.Linear(width, classes),
        )


def hidden_layers(model: nn.Module) -> Sequence[nn.Module]:
    """The layers that SLAT perturbs: of a residual network the stem and all stages but the last."""
    for module in model.modules():
        if isinstance(module, PreActResNet):
            return [module.stem, *list(module.stages)[:-1]]
    return weighted_layers(model)


def _conv(in_channels: int, out_channels: int, kernel: int, stride: int = 1) -> nn.Conv2d:
    """A padded convolution without bias, with He et al.'s normal initialisation (fan out, ReLU)."""
    conv = nn.Conv2d(in_channels, out_channels, kernel, stride, padding=kernel // 2, bias=False)
    nn.init.kaiming_normal_(conv.weight, mode="fan_out", nonlinearity="relu")
    return conv


def _pool(h: Tensor) -> Tensor:
    """[B, C, H, W] -> [B, C], the mean over the image whatever its size."""
    return F.adaptive_avg_pool2d(h, 1).flatten(1)


def _normalize(mean: Sequence[float] | None, std: Sequence[float] | None, in_shape: tuple[int, ...]) -> Normalize:
    """Check mean and std and make the layer."""
    channels = in_shape[0]
    mean = [0.0] * channels if mean is None else mean
    std = [1.0] * channels if std is None else std
    if len(mean) != channels:
        raise ValueError(f"mean: expected {channels} numbers, one per channel of in_shape {in_shape}, got {len(mean)}")
    if len(std) != channels or not all(value > 0 for value in std):
        raise ValueError(
            f"std: expected {channels} positive numbers, one per channel of in_shape {in_shape}, got {list(std)}"
        )
    return Normalize(mean, std, ndim=len(in_shape))
