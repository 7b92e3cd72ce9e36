import re

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from elle_fast.recipes import models
from elle_fast.recipes.models import NAMES, build

SMALL = [
    ("preact", (1, 8, 8)),
    ("preact", (3, 32, 32)),
    ("preact", (3, 9, 13)),
    ("preactresnet18", (1, 8, 8)),
    ("preactresnet18", (3, 32, 32)),
    ("wideresnet28-10", (1, 8, 8)),
    ("wideresnet28-10", (3, 16, 16)),
    ("resnet50", (1, 8, 8)),
    ("resnet50", (3, 37, 64)),
    ("cnn", (1, 8, 8)),
    ("cnn", (3, 32, 32)),
    ("cnn", (2, 11, 7)),
    ("mlp", (1, 8, 8)),
    ("mlp", (30,)),
]


def narrow(name: str, in_shape: tuple[int, ...], **options) -> nn.Module:
    # Every architecture with few channels: the shapes and wiring are the full network's, the time is not.
    return build(name, in_shape=in_shape, classes=7, width=1 if name == "wideresnet28-10" else 4, **options)


def parameters(model: nn.Module) -> int:
    return sum(parameter.numel() for parameter in model.parameters())


@pytest.mark.parametrize("name, in_shape", SMALL)
def test_logits_shape_and_gradient_to_every_input_pixel_and_parameter(name, in_shape):
    torch.manual_seed(0)
    # With running statistics: in train mode, batch norm cancels part of a gradient that is alike for the whole batch.
    model = narrow(name, in_shape).eval()
    x = torch.rand(3, *in_shape, requires_grad=True)
    logits = model(x)
    assert logits.shape == (3, 7)
    logits.square().sum().backward()
    assert x.grad is not None
    assert torch.isfinite(x.grad).all()
    assert (x.grad != 0).float().mean() > 0.5
    for key, parameter in model.named_parameters():
        assert parameter.grad is not None, key
        assert parameter.grad.abs().sum() > 0, key


def test_the_cases_above_cover_every_name():
    assert {name for name, _ in SMALL} == set(NAMES)


def test_preactresnet18_parameter_count():
    # Stem 27 * 64 = 1,728. A block holds 2 a + 9 a b + 2 b + 9 b b (+ a b where the shape changes) for a -> b channels:
    #   64 -> 64       73,984, twice                     147,968
    #   64 -> 128     229,760, 128 -> 128    295,424     525,184
    #   128 -> 256    918,272, 256 -> 256  1,180,672   2,098,944
    #   256 -> 512  3,671,552, 512 -> 512  4,720,640   8,392,192
    # Final batch norm 1,024, linear 512 * 10 + 10 = 5,130. (Versions without that batch norm have 11,171,146.)
    model = build("preactresnet18", in_shape=(3, 32, 32), classes=10)
    assert parameters(model) == 1_728 + 147_968 + 525_184 + 2_098_944 + 8_392_192 + 1_024 + 5_130 == 11_172_170


def test_wideresnet28_10_parameter_count_and_depth():
    # 36.5M in table 4 of Zagoruyko and Komodakis 2016.
    model = build("wideresnet28-10", in_shape=(3, 32, 32), classes=10)
    assert parameters(model) == 36_479_194
    # The paper's depth counts the convolutions: 1 + 3 * 4 * 2 of 3x3, and one 1x1 shortcut in each of the three stages.
    assert sum(isinstance(module, nn.Conv2d) for module in model.modules()) == 28


def test_resnet50_parameter_count_and_depth():
    # That of the common libraries' ResNet-50 for ImageNet.
    model = build("resnet50", in_shape=(3, 224, 224), classes=1000)
    assert parameters(model) == 25_557_032
    # The paper's depth: the stem, 3 in each of 16 blocks, the linear layer; shortcuts are not counted, and are 4.
    assert sum(isinstance(module, nn.Conv2d) for module in model.modules()) == 1 + 3 * 16 + 4


@pytest.mark.parametrize("in_channels, stride", [(16, 1), (16, 2), (3, 1)])
def test_bottleneck_is_the_formula_of_deep_residual_learning(in_channels, stride):
    torch.manual_seed(0)
    block = models.Bottleneck(in_channels, 4, stride)
    for module in block.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.uniform_(module.weight, 0.5, 2.0)
            nn.init.uniform_(module.bias, -1.0, 1.0)
    p = dict(block.named_parameters())
    x = torch.randn(5, in_channels, 7, 6)

    def scaled(h: Tensor, norm: str) -> Tensor:
        mean, var = h.mean((0, 2, 3), keepdim=True), h.var((0, 2, 3), correction=0, keepdim=True)
        return (h - mean) / (var + 1e-5).sqrt() * p[f"{norm}.weight"].view(-1, 1, 1) + p[f"{norm}.bias"].view(-1, 1, 1)

    h = scaled(F.conv2d(x, p["conv1.weight"]), "bn1").clamp_min(0)
    h = scaled(F.conv2d(h, p["conv2.weight"], stride=stride, padding=1), "bn2").clamp_min(0)
    h = scaled(F.conv2d(h, p["conv3.weight"]), "bn3")
    changes = (in_channels, stride) != (16, 1)
    skip = scaled(F.conv2d(x, p["shortcut.0.weight"], stride=stride), "shortcut.1") if changes else x
    torch.testing.assert_close(block(x), (h + skip).clamp_min(0))


def test_resnet50_sees_images_at_a_quarter_of_their_resolution():
    sizes: list[torch.Size] = []
    model = build("resnet50", in_shape=(3, 64, 64), classes=10, width=2)
    assert isinstance(model, models.ResNet)
    for part in (model.stem, *model.stages):
        part.register_forward_hook(lambda _module, _inputs, output: sizes.append(output.shape[1:]))
    model.eval()(torch.rand(1, 3, 64, 64))
    assert sizes == [(2, 16, 16), (8, 16, 16), (16, 8, 8), (32, 4, 4), (64, 2, 2)]


@pytest.mark.parametrize(
    "name, in_shape, count",
    [
        # 16 * 9; 16 -> 16 with a shortcut: 4,928; 16 -> 32: 14,432; 32 -> 64: 57,536; batch norm 128; linear 650.
        ("preact", (1, 8, 8), 144 + 4_928 + 14_432 + 57_536 + 128 + 650),
        # 32 * 27; 64 * 32 * 9; 128 * 64 * 9; twice the channels for each batch norm; 128 * 8 * 8 outputs to 10 classes.
        ("cnn", (3, 32, 32), 864 + 64 + 18_432 + 128 + 73_728 + 256 + (128 * 8 * 8 + 1) * 10),
        # 64 * 256 + 256; 256 * 256 + 256; 256 * 10 + 10.
        ("mlp", (1, 8, 8), 16_640 + 65_792 + 2_570),
    ],
)
def test_default_width_of_the_small_networks(name, in_shape, count):
    assert parameters(build(name, in_shape=in_shape, classes=10)) == count


@pytest.mark.parametrize("name", NAMES)
def test_width_one_is_the_narrowest_network(name):
    assert build(name, in_shape=(1, 8, 8), classes=1, width=1).eval()(torch.rand(2, 1, 8, 8)).shape == (2, 1)


@pytest.mark.parametrize("in_channels, stride", [(4, 1), (4, 2), (3, 1)])
def test_block_is_the_formula_of_identity_mappings(in_channels, stride):
    torch.manual_seed(0)
    block = models.PreActBlock(in_channels, 4, stride)
    for norm in (block.bn1, block.bn2):
        nn.init.uniform_(norm.weight, 0.5, 2.0)
        nn.init.uniform_(norm.bias, -1.0, 1.0)
    p = dict(block.named_parameters())
    x = torch.randn(5, in_channels, 7, 6)

    def activated(h: Tensor, norm: str) -> Tensor:
        mean, var = h.mean((0, 2, 3), keepdim=True), h.var((0, 2, 3), correction=0, keepdim=True)
        scaled = (h - mean) / (var + 1e-5).sqrt()
        return (scaled * p[f"{norm}.weight"].view(-1, 1, 1) + p[f"{norm}.bias"].view(-1, 1, 1)).clamp_min(0)

    h = activated(x, "bn1")
    # A change of shape is taken from the activated input; a plain shortcut leaves the input as it is.
    skip = F.conv2d(h, p["shortcut.weight"], stride=stride) if (in_channels, stride) != (4, 1) else x
    h = F.conv2d(h, p["conv1.weight"], stride=stride, padding=1)
    h = F.conv2d(activated(h, "bn2"), p["conv2.weight"], padding=1)
    torch.testing.assert_close(block(x), h + skip)


def test_resolution_halves_from_the_second_stage_on():
    sizes: list[torch.Size] = []
    model = build("preactresnet18", in_shape=(3, 32, 32), classes=10, width=2)
    assert isinstance(model, models.PreActResNet)
    for stage in model.stages:
        stage.register_forward_hook(lambda _module, _inputs, output: sizes.append(output.shape[1:]))
    model.eval()(torch.rand(1, 3, 32, 32))
    assert sizes == [(2, 32, 32), (4, 16, 16), (8, 8, 8), (16, 4, 4)]


def test_convolutions_start_with_fan_out_variance():
    torch.manual_seed(0)
    model = build("preactresnet18", in_shape=(3, 32, 32), classes=10, width=32)
    assert isinstance(model, models.PreActResNet)
    # 64 channels out, not the 32 in, and a 3x3 kernel: std = sqrt(2 / (64 * 9)); 18,432 draws estimate it to 0.5 %.
    weight = model.get_parameter("stages.1.0.conv1.weight")
    assert weight.shape == (64, 32, 3, 3)
    assert weight.std().item() == pytest.approx((2 / (64 * 9)) ** 0.5, rel=0.02)


@pytest.mark.parametrize(
    "name, in_shape", [("preact", (3, 8, 8)), ("cnn", (3, 8, 8)), ("mlp", (3, 8, 8)), ("mlp", (3,))]
)
def test_normalisation_is_per_channel_and_comes_first(name, in_shape):
    mean, std = (0.4, 0.5, 0.6), (0.2, 0.3, 0.25)
    torch.manual_seed(0)
    plain = narrow(name, in_shape).eval()
    torch.manual_seed(0)
    model = narrow(name, in_shape, mean=mean, std=std).eval()
    x = torch.rand(4, *in_shape)
    columns = [(x[:, c] - mean[c]) / std[c] for c in range(3)]
    torch.testing.assert_close(model(x), plain(torch.stack(columns, 1)))


def test_mean_or_std_alone():
    x = torch.rand(2, 2)
    shift, scale = models.Normalize((0.1, 0.2), (1, 1), 1), models.Normalize((0, 0), (0.5, 0.25), 1)
    torch.manual_seed(0)
    plain = narrow("mlp", (2,))
    torch.manual_seed(0)
    torch.testing.assert_close(narrow("mlp", (2,), mean=(0.1, 0.2))(x), plain(shift(x)))
    torch.manual_seed(0)
    torch.testing.assert_close(narrow("mlp", (2,), std=(0.5, 0.25))(x), plain(scale(x)))


def test_no_normalisation_layer_unless_asked_for():
    assert not any(isinstance(m, models.Normalize) for m in narrow("cnn", (1, 8, 8)).modules())


def test_normalisation_keeps_channels_last():
    x = torch.rand(2, 3, 8, 8).contiguous(memory_format=torch.channels_last)
    y = models.Normalize((0.5, 0.5, 0.5), (0.2, 0.2, 0.2))(x)
    assert y.is_contiguous(memory_format=torch.channels_last)


def test_mlp_treats_each_sample_alone():
    torch.manual_seed(0)
    model = narrow("mlp", (1, 8, 8)).train()
    x = torch.rand(4, 1, 8, 8)
    torch.testing.assert_close(model(x)[:1], model(x[:1]))


@pytest.mark.parametrize("name", NAMES)
def test_state_dict_round_trip(name):
    torch.manual_seed(0)
    source = narrow(name, (3, 8, 8), mean=(0.4, 0.5, 0.6), std=(0.2, 0.3, 0.25))
    x = torch.rand(4, 3, 8, 8)
    source(x)  # moves the running statistics of batch norm away from where every model starts
    copy = narrow(name, (3, 8, 8), mean=(0, 0, 0), std=(1, 1, 1))
    assert not torch.equal(copy.eval()(x), source.eval()(x))
    copy.load_state_dict(source.state_dict())
    assert torch.equal(copy.eval()(x), source.eval()(x))


@pytest.mark.parametrize(
    "change, message",
    [
        ({"name": "resnet51"}, f"model: expected one of {', '.join(map(repr, NAMES))}, or timm:NAME, torchvision:NAME"),
        ({"args": {"depth": 2}}, "args: 'cnn' has no such option"),
        ({"pretrained": True}, "pretrained: 'cnn' has no such option"),
        ({"small_images": True}, "small_images: 'cnn' has no such option"),
        ({"in_shape": (30,)}, "in_shape: expected (C, H, W) with sizes of at least 1 for 'cnn', got (30,)"),
        ({"name": "mlp", "in_shape": (3, 4)}, "in_shape: expected (C, H, W) or (D,)"),
        ({"name": "mlp", "in_shape": ()}, "in_shape: expected (C, H, W) or (D,)"),
        ({"in_shape": (3, 0, 8)}, "got (3, 0, 8)"),
        ({"in_shape": None}, "in_shape: expected (C, H, W) with sizes of at least 1 for 'cnn', got None (NoneType)"),
        ({"in_shape": 3}, "in_shape: expected (C, H, W) with sizes of at least 1 for 'cnn', got 3 (int)"),
        ({"in_shape": (3, 8, 8.0)}, "in_shape: expected (C, H, W) with sizes of at least 1 for 'cnn', got (3, 8, 8.0)"),
        ({"in_shape": "abc"}, "in_shape: expected (C, H, W) with sizes of at least 1 for 'cnn', got 'abc' (str)"),
        ({"classes": 0}, "classes: expected an integer >= 1, got 0"),
        ({"width": 10**12}, "width: expected a network that fits into memory, got 1000000000000 for 10 classes"),
        ({"classes": 10**18}, "width: expected a network that fits into memory, got 32 for 1000000000000"),
        ({"classes": 10**30}, "classes: expected an integer >= 1 and <= 9223372036854775807, got 1000000000000"),
        ({"width": 0}, "width: expected an integer >= 1, got 0"),
        ({"mean": (0.5,)}, "mean, std: expected the same number of channels, got 1 and 3"),
        ({"std": (0.5, 0.5)}, "mean, std: expected the same number of channels, got 3 and 2"),
        ({"mean": (0.5,), "std": (0.5,)}, "mean, std: expected 3 numbers, one per channel of (3, 8, 8), got 1"),
        ({"std": (0.5, 0.0, 0.5)}, "std: expected numbers in [1.17549e-38, 3.40282e+38], got (0.5, 0.0, 0.5)"),
    ],
)
def test_errors_name_the_argument(change, message):
    options = {"name": "cnn", "in_shape": (3, 8, 8), "classes": 10, **change}
    with pytest.raises((TypeError, ValueError), match=re.escape(message)):
        build(**options)
