"""Networks of the recipes: PreActResNet18, its one-block-per-stage sibling, WideResNet-28-10, ResNet50, a CNN, an MLP.

All map a batch [B, *in_shape] with values in [0, 1] to logits [B, classes]. They normalize in their first layer, so
that attacks and their radii are stated in pixels. So do those of timm, of torchvision and of the user's own code, which
come from :mod:`elle_fast.recipes.foreign`.

Sources: He et al. 2016a, "Deep Residual Learning for Image Recognition"; He et al. 2016b, "Identity Mappings in Deep
Residual Networks"; Zagoruyko and Komodakis 2016, "Wide Residual Networks".
"""

import math
from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from elle_fast._core import checks
from elle_fast.methods.slat import weighted_layers
from elle_fast.recipes import foreign
from elle_fast.recipes.weights import load_weights as load_weights

# The default width of each network, and what builds it from the shape of a sample, the classes and the width.
_NETWORKS: dict[str, tuple[int, Callable[[tuple[int, ...], int, int], nn.Module]]] = {
    # The first stage's stride more than halves the cost of an epoch, so that two CPU cores suffice.
    "preact": (16, lambda shape, classes, w: PreActResNet(shape[0], classes, w, (w, 2 * w, 4 * w), 1, first_stride=2)),
    "preactresnet18": (64, lambda shape, classes, w: PreActResNet(shape[0], classes, w, (w, 2 * w, 4 * w, 8 * w), 2)),
    # 28 convolutions: the stem, two in each of three times four blocks, and one in each stage's first shortcut.
    "wideresnet28-10": (10, lambda shape, classes, w: PreActResNet(shape[0], classes, 16, (16 * w, 32 * w, 64 * w), 4)),
    "resnet50": (64, lambda shape, classes, w: ResNet(shape[0], classes, (w, 2 * w, 4 * w, 8 * w), (3, 4, 6, 3))),
    "cnn": (32, lambda shape, classes, width: _cnn(shape, classes, width)),
    "mlp": (256, lambda shape, classes, width: _mlp(shape, classes, width)),
}
NAMES = tuple(_NETWORKS)


def check_name(name: Any) -> str:
    """One of :data:`NAMES`, or the form of another library's network or of a callable.

    Raises:
        TypeError, ValueError: for anything else; whether the library or the module has it is seen when it is built.
    """
    if isinstance(name, str) and (name in NAMES or foreign.is_foreign(name)):
        return name
    known = ", ".join(map(repr, NAMES))
    raise checks.refusal(f"model: expected one of {known}, or {foreign.FORMS}", name, isinstance(name, str))


def build(
    name: str,
    *,
    in_shape: tuple[int, ...],
    classes: int,
    width: int | None = None,
    mean: Sequence[float] | None = None,
    std: Sequence[float] | None = None,
    args: Mapping[str, Any] | None = None,
    small_images: bool = False,
    pretrained: bool = False,
) -> nn.Module:
    """A network with fresh weights, in train mode.

    Args:
        name: one of NAMES, ``timm:NAME``, ``torchvision:NAME``, or ``package.module:callable``.
        in_shape: shape of one sample, (C, H, W), or for "mlp" and a callable also (D,).
        classes: number of logits, >= 1.
        width: of ours, >= 1: channels of the first stage (preact: 16, preactresnet18: 64, cnn: 32), units of a hidden
            layer (mlp: 256), the widening factor (wideresnet28-10: 10), or channels within the first stage's blocks,
            whose outputs have four times as many (resnet50: 64).
        mean: one number per channel (per column for rows) to subtract from the input; zeros if only ``std`` is given.
        std: one positive number per channel to divide by; ones if only ``mean`` is given. With neither there is no
            such layer.
        args: keyword options for the library's builder or the callable. timm is also given ``num_classes`` and
            ``in_chans``, and ``img_size`` where the network takes it; torchvision ``num_classes``, and ``image_size``;
            a callable what :func:`elle_fast.recipes.user_code.call` says.
        small_images: first layers for small pictures (:mod:`elle_fast.recipes.small_images`).
        pretrained: with the weights that timm or torchvision has or gets for that name, and a fresh head if the classes
            are not as many; the only option with which anything is downloaded.

    Raises:
        ImportError, OSError, TypeError, ValueError: for an argument outside these ranges, and as
            :func:`elle_fast.recipes.foreign.build`.
    """
    check_name(name)
    own = name in NAMES
    shapes = {3: "(C, H, W)"} if own and name != "mlp" else {3: "(C, H, W)", 1: "(D,)"}
    sizes = isinstance(in_shape, (tuple, list)) and all(type(size) is int for size in in_shape)
    if not sizes or len(in_shape) not in shapes or min(in_shape) < 1:
        expected = " or ".join(shapes.values())
        expected = f"in_shape: expected {expected} with sizes of at least 1 for {name!r}"
        raise checks.refusal(expected, tuple(in_shape) if sizes else in_shape, sizes)
    checks.integer("classes", classes, low=1)
    if own:
        if args or pretrained or (small_images and name != "resnet50"):
            option = "args" if args else "pretrained" if pretrained else "small_images"
            raise ValueError(f"{option}: {name!r} has no such option")
        net = _own(name, tuple(in_shape), classes, width, small_images)
    else:
        if width is not None:
            raise ValueError(f"width: {name!r} has no such option (got {width}); args has those of its builder")
        options: dict[str, Any] = {"small": small_images, "pretrained": pretrained}
        net = foreign.build(name, tuple(in_shape), classes, args or {}, **options)
    return normalized(net, tuple(in_shape), mean, std)


def normalized(
    net: nn.Module, in_shape: tuple[int, ...], mean: Sequence[float] | None, std: Sequence[float] | None
) -> nn.Module:
    """The network behind a layer that normalises samples of ``in_shape``; itself with neither mean nor std.

    Raises:
        TypeError, ValueError: unless there is one number per channel.
    """
    if mean is None and std is None:
        return net
    channels = in_shape[0]
    mean = [0.0] * channels if mean is None else mean
    std = [1.0] * channels if std is None else std
    checks.statistics(mean, std)
    if len(mean) != channels:
        raise ValueError(f"mean, std: expected {channels} numbers, one per channel of {in_shape}, got {len(mean)}")
    return nn.Sequential(OrderedDict([("normalize", Normalize(mean, std, len(in_shape))), ("net", net)]))


def _own(name: str, in_shape: tuple[int, ...], classes: int, width: int | None, small: bool) -> nn.Module:
    default, make = _NETWORKS[name]
    width = default if width is None else checks.integer("width", width, low=1)
    try:
        net = make(in_shape, classes, width)
    except (OverflowError, RuntimeError, TypeError) as error:  # torch's, of sizes beyond the memory or int64
        raise ValueError(
            f"width: expected a network that fits into memory, got {width} for {classes} classes"
        ) from error
    if small:
        assert isinstance(net, ResNet)
        net.stem = nn.Sequential(_conv(in_shape[0], width, 3), nn.BatchNorm2d(width), nn.ReLU())
    return net


class Normalize(nn.Module):
    """(x - mean) / std per channel, for x [B, C, ...] whose samples have ``ndim`` dimensions."""

    mean: Tensor
    std: Tensor

    def __init__(self, mean: Sequence[float], std: Sequence[float], ndim: int = 3) -> None:
        super().__init__()
        # Buffers, so that they follow .to() and are saved with the weights that were trained behind them.
        shape = (-1,) + (1,) * (ndim - 1)
        self.register_buffer("mean", torch.tensor(mean, dtype=torch.float32).view(shape))
        self.register_buffer("std", torch.tensor(std, dtype=torch.float32).view(shape))

    def forward(self, x: Tensor) -> Tensor:
        """Normalize x [B, C, ...]."""
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
        in_channels, classes: of the input and the logits.
        stem: channels of the stem.
        widths: channels of each stage.
        blocks: in each stage.
        first_stride: of the first stage; that of the others is 2.
    """

    def __init__(
        self, in_channels: int, classes: int, stem: int, widths: Sequence[int], blocks: int, first_stride: int = 1
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
        logits: Tensor = self.fc(F.adaptive_avg_pool2d(h, 1).flatten(1))
        return logits


class Bottleneck(nn.Module):
    """A 1x1, a 3x3 and a 1x1 convolution, each before batch norm, around a shortcut (He et al. 2016a, figure 5).

    x [B, in_channels, H, W] -> [B, 4 * width, H / stride, W / stride], rounded up. ReLU follows the first two and the
    sum. Where the shape changes, the shortcut is a 1x1 convolution and batch norm. The 3x3 convolution has the stride,
    as in today's libraries; in the paper the first one has.
    """

    def __init__(self, in_channels: int, width: int, stride: int) -> None:
        super().__init__()
        out_channels = 4 * width
        self.conv1, self.bn1 = _conv(in_channels, width, 1), nn.BatchNorm2d(width)
        self.conv2, self.bn2 = _conv(width, width, 3, stride), nn.BatchNorm2d(width)
        self.conv3, self.bn3 = _conv(width, out_channels, 1), nn.BatchNorm2d(out_channels)
        self.shortcut: nn.Module | None = None
        if stride != 1 or in_channels != out_channels:
            self.shortcut = nn.Sequential(_conv(in_channels, out_channels, 1, stride), nn.BatchNorm2d(out_channels))

    def forward(self, x: Tensor) -> Tensor:
        """x [B, in_channels, H, W] -> [B, 4 * width, ceil(H / stride), ceil(W / stride)]."""
        h = F.relu(self.bn1(self.conv1(x)))
        h = F.relu(self.bn2(self.conv2(h)))
        skip = x if self.shortcut is None else self.shortcut(x)
        return F.relu(skip + self.bn3(self.conv3(h)))


class ResNet(nn.Module):
    """7x7 stem with batch norm, ReLU and max pooling, stages of bottlenecks, global average pooling, linear layer.

    x [B, in_channels, H, W] -> logits [B, classes]. The stem divides the resolution by 4, later stages by 2 each.

    Args:
        in_channels, classes: of the input and the logits.
        widths: channels within the blocks of each stage; their outputs have four times as many.
        blocks: in each stage.
    """

    def __init__(self, in_channels: int, classes: int, widths: Sequence[int], blocks: Sequence[int]) -> None:
        super().__init__()
        channels = widths[0]
        self.stem = nn.Sequential(
            _conv(in_channels, channels, 7, 2), nn.BatchNorm2d(channels), nn.ReLU(), nn.MaxPool2d(3, 2, padding=1)
        )
        stages = []
        for index, (width, count) in enumerate(zip(widths, blocks, strict=True)):
            layers = []
            for block in range(count):
                layers.append(Bottleneck(channels, width, 2 if index > 0 and block == 0 else 1))
                channels = 4 * width
            stages.append(nn.Sequential(*layers))
        self.stages = nn.Sequential(*stages)
        self.fc = nn.Linear(channels, classes)

    def forward(self, x: Tensor) -> Tensor:
        """x [B, in_channels, H, W] -> logits [B, classes]."""
        h = self.stages(self.stem(x))
        logits: Tensor = self.fc(F.adaptive_avg_pool2d(h, 1).flatten(1))
        return logits


def _cnn(in_shape: tuple[int, ...], classes: int, width: int) -> nn.Sequential:
    """Three 3x3 convolutions with batch norm and ReLU, then one linear layer over all their outputs.

    The convolutions have strides 1, 2, 2 and ``width`` times 1, 2, 4 channels, and torch's default initialisation.
    """
    channels, height, breadth = in_shape
    layers: list[nn.Module] = []
    for stride, wider in ((1, width), (2, 2 * width), (2, 4 * width)):
        convolution = nn.Conv2d(channels, wider, 3, stride, padding=1, bias=False)
        layers += [convolution, nn.BatchNorm2d(wider), nn.ReLU()]
        channels = wider
    features = channels * -(-height // 4) * -(-breadth // 4)
    return nn.Sequential(*layers, nn.Flatten(), nn.Linear(features, classes))


def _mlp(in_shape: tuple[int, ...], classes: int, width: int) -> nn.Sequential:
    """Two hidden ReLU layers of ``width`` units and a linear layer, on flattened samples."""
    hidden = [nn.Linear(math.prod(in_shape), width), nn.ReLU(), nn.Linear(width, width), nn.ReLU()]
    return nn.Sequential(nn.Flatten(), *hidden, nn.Linear(width, classes))


def hidden_layers(model: nn.Module) -> Sequence[nn.Module]:
    """The layers that SLAT perturbs: of a residual network the stem and the first stage, as in its authors' code.

    Of timm's and torchvision's ResNets these are ``conv1`` and ``layer1``; of other networks, every convolution and
    linear layer but the last.
    """
    for module in model.modules():
        if isinstance(module, PreActResNet | ResNet):
            return [module.stem, module.stages[0]]
        parts = dict(module.named_children())
        if {"conv1", "layer1", "layer4"} <= parts.keys():
            return [parts["conv1"], parts["layer1"]]
    return weighted_layers(model)


def _conv(in_channels: int, out_channels: int, kernel: int, stride: int = 1) -> nn.Conv2d:
    """A padded convolution without bias, with He et al.'s normal initialisation (fan out, ReLU)."""
    conv = nn.Conv2d(in_channels, out_channels, kernel, stride, padding=kernel // 2, bias=False)
    nn.init.kaiming_normal_(conv.weight, mode="fan_out", nonlinearity="relu")
    return conv
