"""Networks of timm, of torchvision and of the user's own code: what is built, and what is refused."""

import re
import sys

import pytest
import torch
from torch import nn

from elle_fast.recipes import foreign, models
from tests.optional import import_torchvision

USER = "tests.recipes.user_nets"
SHAPE = (1, 8, 8)
VIT = {"depth": 1, "embed_dim": 8, "num_heads": 2}


@pytest.fixture(scope="module", autouse=True)
def torchvision():
    import_torchvision()


def build(name, in_shape=SHAPE, classes=3, **options):
    torch.manual_seed(0)
    return models.build(name, in_shape=in_shape, classes=classes, **options)


@pytest.mark.parametrize(
    "name, in_shape, options",
    [
        ("timm:resnet18", (1, 32, 32), {"args": {"channels": [4, 4, 8, 8]}}),
        ("timm:convnext_atto", (2, 32, 32), {"args": {"depths": [1, 1, 1, 1], "dims": [8, 8, 8, 8]}}),
        ("timm:vit_tiny_patch16_224", (3, 32, 32), {"args": VIT}),
        ("timm:vit_tiny_patch16_224", (1, 16, 32), {"args": VIT}),
        ("torchvision:squeezenet1_1", (3, 32, 32), {}),
        (f"{USER}:norms", SHAPE, {"args": {"depth": 2}}),
        (f"{USER}:hugging_face", SHAPE, {}),
    ],
)
def test_logits_of_pixels_behind_a_normalisation(name, in_shape, options):
    channels = in_shape[0]
    model = build(name, in_shape, mean=[0.5] * channels, std=[0.25] * channels, **options)
    assert model.training
    assert isinstance(model, nn.Sequential)
    assert isinstance(model[0], models.Normalize)
    x = torch.rand(2, *in_shape, requires_grad=True)
    logits = model.eval()(x)
    assert logits.shape == (2, 3)
    torch.testing.assert_close(logits, model[1]((x - 0.5) / 0.25))
    logits.sum().backward()
    assert x.grad is not None


def test_the_same_seed_gives_the_same_weights():
    for name, args in (("timm:vit_tiny_patch16_224", VIT), (f"{USER}:hugging_face", {})):
        one, two = (build(name, (1, 16, 16), args=args).state_dict() for _ in range(2))
        assert all(torch.equal(value, two[key]) for key, value in one.items())


def test_a_library_s_network_is_the_one_that_the_library_builds():
    import timm

    mine = build("timm:resnet18", (3, 32, 32), args={"channels": [4, 4, 8, 8]})
    torch.manual_seed(0)
    other = timm.create_model("resnet18", num_classes=3, channels=(4, 4, 8, 8))
    assert all(torch.equal(value, other.state_dict()[key]) for key, value in mine.state_dict().items())


@pytest.mark.parametrize(
    "name, in_shape, options, sizes",
    [
        # 16 pixels stay 16 in the stem and are halved three times; without it they are quartered in the stem.
        ("timm:resnet18", (2, 16, 16), {"args": {"channels": [4, 4, 8, 8]}}, (16, 2)),
        ("torchvision:resnet18", (1, 16, 16), {}, (16, 2)),
    ],
)
def test_small_resnets_have_a_stem_that_keeps_the_resolution(name, in_shape, options, sizes):
    net = build(name, in_shape, small_images=True, **options)
    found = []
    for part in ("conv1", "layer4"):
        net.get_submodule(part).register_forward_hook(lambda _module, _inputs, output: found.append(output.shape[-1]))
    net.eval()(torch.rand(1, *in_shape))
    assert tuple(found) == sizes
    # He et al.'s variance of a 3x3 kernel: 2 / (9 * channels); 576 draws or more estimate its root to 10 %.
    weight = net.get_parameter("conv1.weight")
    if weight.numel() > 500:
        assert weight.std().item() == pytest.approx((2 / (9 * weight.shape[0])) ** 0.5, rel=0.1)


@pytest.mark.parametrize(
    "name, in_shape, options, weight, shape",
    [
        ("timm:convnext_atto", (1, 32, 32), {"args": {"depths": [1] * 4, "dims": [8] * 4}}, "stem.0", [8, 1, 1, 1]),
        ("timm:convnext_atto", (1, 64, 64), {"args": {"depths": [1] * 4, "dims": [8] * 4}}, "stem.0", [8, 1, 2, 2]),
        ("torchvision:convnext_tiny", (1, 16, 16), {}, "features.0.0", [96, 1, 1, 1]),
        ("timm:vit_tiny_patch16_224", (3, 32, 32), {"args": VIT}, "patch_embed.proj", [8, 3, 4, 4]),
        ("timm:vit_tiny_patch16_224", (1, 8, 8), {"args": VIT}, "patch_embed.proj", [8, 1, 1, 1]),
        ("timm:vit_tiny_patch16_224", (3, 28, 28), {"args": VIT}, "patch_embed.proj", [8, 3, 2, 2]),
    ],
)
def test_small_patches(name, in_shape, options, weight, shape):
    net = build(name, in_shape, small_images=True, **options)
    assert list(net.get_parameter(f"{weight}.weight").shape) == shape


def test_our_resnet50_has_a_small_stem_too():
    net = build("resnet50", (3, 32, 32), width=2, small_images=True)
    assert net.get_submodule("stem")(torch.rand(1, 3, 32, 32)).shape == (1, 2, 32, 32)


@pytest.mark.parametrize(
    "name, options, message",
    [
        ("timm:resnet188", {}, "model: timm has no 'resnet188'; did you mean resnet18"),
        (
            "timm:resnet18.foo",
            {},
            "model: timm:resnet18.foo cannot be built: RuntimeError: Invalid pretrained tag (foo)",
        ),
        ("timm:hf-hub:some/one", {}, "model: expected one of 'preact'"),
        ("timm:resnet18", {"in_shape": (30,)}, "in_shape: expected (C, H, W) for 'timm:resnet18', got (30,)"),
        ("timm:resnet18", {"width": 3}, "width: 'timm:resnet18' has no such option (got 3)"),
        ("timm:resnet18", {"args": {"drop_rat": 0}}, "takes no option 'drop_rat'; did you mean drop_rate"),
        ("timm:resnet18", {"args": {"pretrained": True}}, "model_args: expected options of the network alone"),
        ("timm:resnet18", {"args": {"checkpoint_path": "x"}}, "of the network alone, got checkpoint_path"),
        (
            "timm:vit_tiny_patch16_224",
            {"args": VIT},
            "model: expected a network for pictures of shape (1, 8, 8), got 'timm:vit_tiny_patch16_224', which fails "
            "on them with RuntimeError: Calculated padded input size per channel: (8 x 8). Kernel size: (16 x 16)",
        ),
        (
            "timm:convnext_atto",
            {"small_images": True, "pretrained": True},
            "small_images, pretrained: expected at most one of them for timm:convnext_atto",
        ),
        ("timm:mobilenetv3_small_050", {"small_images": True}, "small_images: nothing is known of the first layers"),
        ("torchvision:mobilenet_v2", {"small_images": True}, "small_images: nothing is known of the first layers"),
        ("torchvision:resnet188", {}, "model: torchvision has no classifier 'resnet188'; did you mean resnet18"),
        ("torchvision:squeezenet1_1", {}, "expected input[2, 1, 8, 8] to have 3 channels, but got 1"),
        (
            "torchvision:resnet18",
            {"args": {"layers": 1}},
            "model_args: torchvision:resnet18 cannot be built: _resnet()",
        ),
        (f"{USER}:of_seven", {}, "to return logits of shape [2, 3] for 2 pictures, as the data have 3 classes, got a "),
        (f"{USER}:a_dict", {}, "to return logits, or an output with an attribute logits, got 1 items"),
        (f"{USER}:nothing", {}, f"model: expected '{USER}:nothing' to return a torch.nn.Module, got None"),
        (f"{USER}:unlucky", {}, f"model: '{USER}:unlucky' raised RuntimeError: no luck"),
        (f"{USER}:number", {}, f"model: expected a callable in '{USER}:number', got 5 (int)"),
        (f"{USER}:nroms", {}, f"model: '{USER}' has no 'nroms'; did you mean norms?"),
        (f"{USER}:norms", {"args": {"dpeth": 1}}, f"model_args: '{USER}:norms' takes no option 'dpeth'; did you mean"),
        (f"{USER}:norms", {"small_images": True}, "small_images: nothing is known of the first layers"),
        ("no_such.module:build", {}, "got 'no_such', which is neither in the current folder"),
        ("builtins:eval", {}, "model_args: 'builtins:eval' needs source"),
    ],
)
def test_what_cannot_be_built_is_said_in_one_line(name, options, message):
    with pytest.raises((TypeError, ValueError), match=re.escape(message)) as caught:
        build(name, **options)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "text, message",
    [
        ("import nothing_such", "the import of 'own' failed with ModuleNotFoundError: No module named 'nothing_such'"),
        ("1 / 0", "the import of 'own' failed with ZeroDivisionError: division by zero"),
        ("def build(classes, depth): ...", "model_args: 'own:build' needs depth"),
    ],
)
def test_a_module_of_the_current_folder_that_is_wrong(text, message, tmp_path, monkeypatch):
    (tmp_path / "own.py").write_text(text)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [*sys.path])
    monkeypatch.delitem(sys.modules, "own", raising=False)
    with pytest.raises(ValueError, match=re.escape(message)):
        build("own:build")
    sys.modules.pop("own", None)


def test_a_module_of_the_current_folder_is_found_as_with_python_m(tmp_path, monkeypatch):
    (tmp_path / "own.py").write_text(
        "from torch import nn\n"
        "def build(classes, in_shape=(), **more):\n"
        "    assert in_shape == (1, 8, 8) and more == {'depth': 2}\n"
        "    return nn.Sequential(nn.Flatten(), nn.Linear(64, classes))\n"
    )
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [*sys.path])
    monkeypatch.delitem(sys.modules, "own", raising=False)
    assert isinstance(build("own:build", args={"depth": 2}), nn.Sequential)
    assert sys.path[-1] == str(tmp_path)  # for imports within its functions; first for its own import alone
    sys.modules.pop("own", None)


def test_pretrained_weights_of_timm_come_by_timm_s_loader(monkeypatch):
    import timm

    torch.manual_seed(1)
    args = {"channels": [4, 4, 8, 8]}
    source = timm.create_model("resnet18", **args).state_dict()
    asked = []

    def load(*given, **options):
        asked.append(options)
        return dict(source)

    monkeypatch.setattr("timm.models._builder.load_state_dict_from_hf", load)
    net = build("timm:resnet18", (3, 32, 32), pretrained=True, args=args)
    assert asked[0]["weights_only"] is True
    same = [key for key, value in net.state_dict().items() if torch.equal(value, source[key])]
    assert set(source) - set(same) == {"fc.weight", "fc.bias"}


def test_weights_that_no_logit_depends_on_are_found():
    net = build(f"{USER}:with_leftovers")
    assert foreign.unreached(net, SHAPE) == ["unused"]
    assert net.training
    assert foreign.unreached(build(f"{USER}:norms"), SHAPE) == []


def test_a_network_without_a_gradient_to_its_input_is_refused():
    with pytest.raises(ValueError, match="expected logits with a gradient to the pictures, got none"):
        foreign.unreached(build(f"{USER}:cut"), SHAPE)


def test_a_missing_library_is_named_with_its_extra(monkeypatch):
    monkeypatch.setitem(sys.modules, "timm", None)
    with pytest.raises(ImportError, match=r"^timm is missing: pip install 'elle-fast\[models\]'"):
        build("timm:resnet18")


def test_what_a_library_would_download_is_one_line_without_a_network(monkeypatch):
    from urllib.error import URLError

    def offline(*args, **options):
        raise URLError("no route")

    monkeypatch.setattr("torchvision.models._api.load_state_dict_from_url", offline)
    with pytest.raises(OSError, match=r"^pretrained: expected weights of torchvision:squeezenet1_1 in the .* URLError"):
        build("torchvision:squeezenet1_1", (3, 32, 32), pretrained=True)


def test_pretrained_weights_are_read_without_pickle_and_get_a_head_for_other_classes(monkeypatch):
    from torchvision.models import get_model

    torch.manual_seed(1)
    source, asked = get_model("squeezenet1_1").state_dict(), []

    def load(*args, **options):
        asked.append(options)
        return source

    monkeypatch.setattr("torchvision.models._api.load_state_dict_from_url", load)
    net = build("torchvision:squeezenet1_1", (3, 32, 32), pretrained=True)
    assert asked[0]["weights_only"] is True
    same = [key for key, value in net.state_dict().items() if torch.equal(value, source[key])]
    assert set(source) - set(same) == {"classifier.1.weight", "classifier.1.bias"}
    assert net.get_parameter("classifier.1.weight").shape[0] == 3


def test_slat_perturbs_the_stem_and_the_first_stage_of_a_foreign_resnet():
    net = build("timm:resnet18", (1, 32, 32), args={"channels": [4, 4, 8, 8]})
    assert models.hidden_layers(net) == [net.get_submodule("conv1"), net.get_submodule("layer1")]
    kinds = {type(each) for each in models.hidden_layers(build(f"{USER}:norms"))}
    assert kinds == {nn.Conv2d}
