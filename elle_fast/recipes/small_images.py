"""First layers for small pictures: networks made for 224 pixels a side divide theirs by 4 or 16 before they begin."""

from __future__ import annotations

from typing import Any

from torch import nn

SMALL = 96  # pixels a side up to which an error speaks of --small-images

# Built with smaller patches by timm_options.
_BUILT_SO = {f"timm.models.{family}" for family in ("convnext", "vision_transformer", "deit")}
_KNOWN = "ResNets (3x3 stem of stride 1, no max-pool), ConvNeXts and timm's ViTs (smaller patches)"


def timm_options(module: str, name: str, in_shape: tuple[int, ...]) -> dict[str, Any]:
    """The options with which timm builds the network for small pictures; ResNets are changed afterwards.

    Args:
        module: where timm defines it.
        name: what timm calls it, for the message.
        in_shape: (C, H, W).

    Raises:
        ValueError: for a network of which nothing is known.
    """
    family = module.rpartition(".")[2]
    if family == "resnet":
        return {}
    if family == "convnext":
        return {"patch_size": convnext_patch(in_shape)}
    if family in ("vision_transformer", "deit"):
        return {"patch_size": vit_patch(in_shape)}
    raise _unknown(f"timm:{name}")


def convnext_patch(in_shape: tuple[int, ...]) -> int:
    """1 up to 32 pixels a side, else 2: the network divides by 8 more."""
    return 1 if min(in_shape[1:]) <= 32 else 2


def vit_patch(in_shape: tuple[int, ...]) -> int:
    """The largest patch, of at most 16, that gives at least 8 x 8 of them and divides both sides; 4 of 32 pixels."""
    _, height, breadth = in_shape
    return max(
        each
        for each in range(1, 17)
        if each == 1 or (not height % each and not breadth % each and each * 8 <= min(height, breadth))
    )


def change(net: nn.Module, name: str, in_shape: tuple[int, ...]) -> None:
    """Change the first layers of a network in place, which then have fresh weights.

    Of a ResNet the 7x7 convolution of stride 2 becomes a 3x3 one of stride 1 (the first of a stem of three loses its
    stride), and there is no max-pool; of a torchvision ConvNeXt the 4x4 patches become smaller.

    Raises:
        ValueError: for a network of which nothing is known.
    """
    kinds = {(each.__module__, each.__name__) for each in type(net).__mro__}
    if kinds & {("timm.models.resnet", "ResNet"), ("torchvision.models.resnet", "ResNet")}:
        _change_resnet(net, in_shape[0])
    elif ("torchvision.models.convnext", "ConvNeXt") in kinds:
        stem: Any = net.get_submodule("features.0")
        patch = convnext_patch(in_shape)
        stem[0] = nn.Conv2d(in_shape[0], stem[0].out_channels, patch, patch)
        nn.init.trunc_normal_(stem[0].weight, std=0.02)
        nn.init.zeros_(stem[0].bias)
    elif not {module for module, _ in kinds} & _BUILT_SO:
        raise _unknown(name)


def _change_resnet(net: Any, channels: int) -> None:
    if isinstance(net.conv1, nn.Conv2d):
        net.conv1 = nn.Conv2d(channels, net.conv1.out_channels, 3, padding=1, bias=False)
        nn.init.kaiming_normal_(net.conv1.weight, mode="fan_out", nonlinearity="relu")
    else:
        net.conv1[0].stride = (1, 1)
    net.maxpool = nn.Identity()


def _unknown(name: str) -> ValueError:
    return ValueError(f"small_images: nothing is known of the first layers of {name!r}, only of {_KNOWN}")
