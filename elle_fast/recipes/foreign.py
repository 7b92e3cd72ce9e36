"""Networks from elsewhere: ``timm:NAME``, ``torchvision:NAME``, and ``package.module:callable`` of the user's own."""

from __future__ import annotations

import inspect
import logging
import re
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from difflib import get_close_matches
from importlib import import_module
from types import ModuleType
from typing import Any

import torch
from torch import Tensor, nn

from elle_fast._core import checks
from elle_fast._core.eval_mode import in_eval_mode
from elle_fast.recipes import small_images, user_code, weights

LIBRARIES = ("timm", "torchvision")
FORMS = "timm:NAME, torchvision:NAME or package.module:callable"
Statistics = tuple[list[float], list[float]]

# What the recipes say themselves, or what would read a file or the network unasked.
_TAKEN = {"num_classes", "in_chans", "pretrained", "weights", "weights_backbone", "checkpoint_path", "progress"}
_TAKEN |= {"pretrained_cfg", "pretrained_cfg_overlay", "cache_dir", "features_only"}


def is_foreign(name: str) -> bool:
    """Whether a model's name has the form of one of :data:`FORMS`; nothing is imported to see whether it exists."""
    source, colon, rest = name.partition(":")
    if not colon:
        return False
    if source in LIBRARIES:
        return re.fullmatch(r"[\w.\-]+", rest) is not None
    return re.fullmatch(r"\w+(\.\w+)*", source) is not None and rest.isidentifier()


def from_library(name: str) -> bool:
    """Whether it is timm's or torchvision's."""
    return name.partition(":")[0] in LIBRARIES and is_foreign(name)


def build(
    name: str,
    in_shape: tuple[int, ...],
    classes: int,
    args: Mapping[str, Any],
    *,
    small: bool = False,
    pretrained: bool = False,
) -> nn.Module:
    """A network that maps [B, *in_shape] to logits [B, classes], in train mode and without a normalisation.

    It is called once, in eval mode, on two grey pictures: its output has to be logits of this width, or to have them in
    its attribute ``logits``, as those of Hugging Face's classifiers do.

    Raises:
        ImportError: if the library or the module is missing.
        OSError: if pretrained weights cannot be had.
        TypeError, ValueError: for another name, an option that it does not take, a builder that raises or returns no
            module, and a network that does not take such pictures or has not as many classes.
    """
    source, _, rest = name.partition(":")
    if source in LIBRARIES:
        make = _timm if source == "timm" else _torchvision
        if taken := sorted(_TAKEN & set(args)):
            raise ValueError(f"model_args: expected options of the network alone, got {', '.join(taken)}")
        net = make(rest, in_shape, classes, dict(args), small, pretrained)
    else:
        if small:
            raise ValueError(
                f"small_images: nothing is known of the first layers of {name!r}, so this option does not apply; "
                "let the callable build them for small pictures, with an option by model_args if need be"
            )
        net = user_code.call(name, in_shape, classes, dict(args))
    return _checked(net, name, in_shape, classes, small)


class Logits(nn.Module):
    """A network whose output has the logits [B, classes] in its attribute ``logits``; they alone are returned."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, x: Tensor) -> Tensor:
        """x [B, C, H, W] -> logits [B, classes]."""
        logits: Tensor = self.model(x).logits
        return logits


def library(name: str) -> ModuleType:
    """Timm or torchvision; ImportError says how to install it, or why it cannot be imported."""
    try:
        return import_module(name)
    except ModuleNotFoundError as error:
        if error.name != name:
            raise ImportError(f"{name}: cannot be imported: {error}") from error
        raise ImportError(f"{name} is missing: pip install 'elle-fast[models]'") from error
    except (ImportError, RuntimeError) as error:  # such as a torchvision that was built for another torch
        raise ImportError(f"{name}: cannot be imported: {checks.first_line(error)}") from error


def configured_statistics(name: str, net: nn.Module) -> tuple[Statistics, str] | None:
    """Mean and std per channel of the pictures that pretrained weights of ``name`` were trained on, and who says so.

    timm's and torchvision's are in their configurations of the weights. A user's own network may have an attribute
    ``pretrained_cfg``, a mapping with ``mean`` and ``std``, as timm's do. ``None`` where neither is there.
    """
    source, _, rest = name.partition(":")
    if source == "torchvision":
        chosen = import_module("torchvision").models.get_model_weights(rest)
        if not len(chosen):
            return None
        transforms = chosen.DEFAULT.transforms()
        return (list(transforms.mean), list(transforms.std)), f"torchvision's {chosen.DEFAULT}"
    found = getattr(net, "pretrained_cfg", None)
    if not isinstance(found, Mapping) or found.get("mean") is None or found.get("std") is None:
        return None
    says = f"timm's configuration of {rest}" if source == "timm" else f"pretrained_cfg of {name}"
    return (list(found["mean"]), list(found["std"])), says


def _timm(
    name: str, in_shape: tuple[int, ...], classes: int, args: dict[str, Any], small: bool, pretrained: bool
) -> nn.Module:
    timm = library("timm")
    if not timm.is_model(name):
        raise ValueError(f"model: timm has no {name!r}{_near(name, timm.list_models())}")
    _, height, breadth = _picture(in_shape, f"timm:{name}")
    maker = timm.model_entrypoint(name)
    options = {"num_classes": classes, "in_chans": in_shape[0], **args}
    if small:
        if pretrained and maker.__module__.endswith(".convnext"):
            why = "the pretrained weights are of patches of 4 pixels"
            raise ValueError(f"small_images, pretrained: expected at most one of them for timm:{name}, as {why}")
        options = {**small_images.timm_options(maker.__module__, name, in_shape), **options}

    def create(**sized: Any) -> nn.Module:
        net: nn.Module = timm.create_model(name, pretrained=pretrained, **options, **sized)
        return net

    with _naming(f"timm:{name}", sys.modules[maker.__module__], pretrained):
        # Networks for one size alone are told which; the others do not take the option, and fail before they draw.
        state = torch.get_rng_state()
        try:
            net = create(**{} if "img_size" in args else {"img_size": height if height == breadth else in_shape[1:]})
        except TypeError as error:
            if _unknown_option(error) != "img_size" or "img_size" in args:
                raise
            torch.set_rng_state(state)
            net = create()
    if small:
        small_images.change(net, f"timm:{name}", in_shape)
    return net


def _torchvision(
    name: str, in_shape: tuple[int, ...], classes: int, args: dict[str, Any], small: bool, pretrained: bool
) -> nn.Module:
    models = library("torchvision").models
    names = models.list_models(module=models)
    if name not in names:
        raise ValueError(f"model: torchvision has no classifier {name!r}{_near(name, names)}")
    _, height, breadth = _picture(in_shape, f"torchvision:{name}")
    options = {"num_classes": classes, "weights": None, **args}
    with _naming(f"torchvision:{name}", sys.modules[models.get_model_builder(name).__module__], False):
        state = torch.get_rng_state()
        try:
            sized = {} if "image_size" in args or height != breadth else {"image_size": height}
            net: nn.Module = models.get_model(name, **options, **sized)
        except TypeError as error:
            if _unknown_option(error) != "image_size" or "image_size" in args:
                raise
            torch.set_rng_state(state)
            net = models.get_model(name, **options)
    if getattr(net, "aux_logits", False):
        raise ValueError(
            f"model: torchvision:{name} has further outputs for the training; --model-args '{{aux_logits: false, "
            "init_weights: true}' leaves them out"
        )
    if pretrained:
        chosen = models.get_model_weights(name)
        if not len(chosen):
            raise ValueError(f"pretrained: torchvision has no weights of {name!r}")
        with _downloading(f"torchvision:{name}"):
            # Not its own default, which would load any pickle.
            found = chosen.DEFAULT.get_state_dict(progress=False, check_hash=True, weights_only=True)
        weights.load_state(net, found, f"torchvision's {chosen.DEFAULT}", classes=classes, new_head="other")
    if small:
        small_images.change(net, f"torchvision:{name}", in_shape)
    return net


def _picture(in_shape: tuple[int, ...], name: str) -> tuple[int, ...]:
    if len(in_shape) != 3:
        raise ValueError(f"in_shape: expected (C, H, W) for {name!r}, got {in_shape}")
    return in_shape


def _checked(net: nn.Module, name: str, in_shape: tuple[int, ...], classes: int, small: bool) -> nn.Module:
    """The network, behind :class:`Logits` if its output is no tensor."""
    net.eval()
    try:
        with torch.no_grad(), torch.random.fork_rng(devices=[]):
            output = net(torch.full((2, *in_shape), 0.5))
    except MemoryError:
        raise
    except Exception as error:
        advice = "; --small-images changes the first layers of ResNets, ConvNeXts and timm's ViTs"
        advice *= name.partition(":")[0] in LIBRARIES and not small and min(in_shape[1:]) <= small_images.SMALL
        raise ValueError(
            f"model: expected a network for pictures of shape {in_shape}, got {name!r}, which fails on them with "
            f"{type(error).__name__}: {checks.first_line(error)}{advice}"
        ) from error
    net.train()
    if not isinstance(output, Tensor) and isinstance(getattr(output, "logits", None), Tensor):
        net, output = Logits(net), output.logits
    if not isinstance(output, Tensor):
        expected = f"model: expected {name!r} to return logits, or an output with an attribute logits"
        raise TypeError(f"{expected}, got {checks.describe(output)}")
    if output.shape != (2, classes) or not output.is_floating_point():
        cause = "" if from_library(name) else "; does it pass the classes on? They come as num_classes, or classes"
        raise ValueError(
            f"model: expected {name!r} to return logits of shape {[2, classes]} for 2 pictures, as the data have "
            f"{classes} classes, got {checks.describe(output)}{cause}"
        )
    return net


def check_sides(model: nn.Module, name: str, channels: int, sides: Iterable[int | None]) -> None:
    """Raise ValueError unless the model takes pictures of each side, which is else seen hours later.

    One forward pass in eval mode for each, which leaves no trace.
    """
    for side in sorted({side for side in sides if side is not None}):
        try:
            with in_eval_mode(model), torch.no_grad(), torch.random.fork_rng(devices=[]):
                model(torch.full((2, channels, side, side), 0.5))
        except MemoryError:
            raise
        except Exception as error:  # of a ViT an AssertionError
            got = f"got {side} for {name!r}, which fails on them with {checks.first_line(error)}"
            raise ValueError(f"phases: expected sides that the model takes, {got}") from error


def unreached(model: nn.Module, in_shape: Sequence[int]) -> list[str]:
    """The trainable parameters of which no logit is a function, by name, found by a backward pass in eval mode.

    Raises:
        ValueError: if no gradient reaches the input, without which there is no attack.
    """
    named = [(name, each) for name, each in model.named_parameters() if each.requires_grad]
    try:
        with in_eval_mode(model), torch.random.fork_rng(devices=[]):
            x = torch.full((2, *in_shape), 0.5, requires_grad=True)
            found = torch.autograd.grad(model(x).sum(), [x, *(each for _, each in named)], allow_unused=True)
    except RuntimeError as error:
        expected = "model: expected a network that can be differentiated, for its attack and its training"
        raise ValueError(f"{expected}; got RuntimeError: {checks.first_line(error)}") from error
    if found[0] is None:
        raise ValueError("model: expected logits with a gradient to the pictures, got none: is it cut by detach()?")
    return [name for (name, _), grad in zip(named, found[1:], strict=True) if grad is None]


@contextmanager
def _naming(name: str, module: ModuleType, pretrained: bool) -> Iterator[None]:
    """What a library raises while it builds a network, in one line that names the option."""
    quiet = logging.getLogger("huggingface_hub")
    level = quiet.level
    try:
        if pretrained:
            quiet.setLevel(logging.ERROR)  # it warns of each attempt
            with _downloading(name):
                yield
        else:
            yield
    except (MemoryError, OSError):
        raise
    except TypeError as error:
        option, taken = _unknown_option(error), _parameters(str(error), module)
        if option is None:
            raise ValueError(f"model_args: {name} cannot be built: {checks.first_line(error)}") from error
        if option == "in_chans":
            raise ValueError(f"model: {name} takes pictures of 3 channels alone") from error
        raise ValueError(f"model_args: {name} takes no option {option!r}{_near(option, taken)}") from error
    except Exception as error:
        raise ValueError(
            f"model: {name} cannot be built: {type(error).__name__}: {checks.first_line(error)}"
        ) from error
    finally:
        quiet.setLevel(level)


@contextmanager
def _downloading(name: str) -> Iterator[None]:
    try:
        yield
    except (MemoryError, TypeError):
        raise
    except Exception as error:
        raise OSError(
            f"pretrained: expected weights of {name} in the library's cache or from the network, got "
            f"{type(error).__name__}: {checks.first_line(error)}"
        ) from error


def _unknown_option(error: TypeError) -> str | None:
    found = re.search(r"unexpected keyword argument '(\w+)'", str(error))
    return None if found is None else found[1]


def _parameters(message: str, module: ModuleType) -> list[str]:
    """The names of the options of the class or function that a TypeError's message is about."""
    called = message.partition("(")[0].removesuffix(".__init__")
    made: Callable[..., Any] | None = getattr(module, called, None)
    return [] if made is None else [each for each in inspect.signature(made).parameters if each != "kwargs"]


def _near(name: str, known: Sequence[str]) -> str:
    found = get_close_matches(name, known, 3)
    return f"; did you mean {' or '.join(found)}?" if found else ""
