"""The options that say which network a run trains."""

from __future__ import annotations

from collections.abc import MutableMapping
from dataclasses import dataclass, field
from typing import Any

from elle_fast.recipes import foreign, models
from elle_fast.recipes.checked import Checked


@dataclass(frozen=True, kw_only=True)
class ModelOptions(Checked):
    """A network and what is in front of it."""

    model: str = "cnn"
    """preact, preactresnet18, wideresnet28-10, resnet50, cnn or mlp; timm:NAME or torchvision:NAME; or
    package.module:callable, which returns a torch.nn.Module and is looked for in the current folder first."""
    width: int | None = None
    """Channels of the model's first stage, >= 1; of the networks without a colon."""
    model_args: MutableMapping[str, Any] | None = None  # tyro would take a dict apart, into an option for each name
    """Options for the builder of a model with a colon, as YAML: '{depth: 4, drop_rate: 0}'. timm is also given
    num_classes, in_chans and, where the network takes it, img_size; torchvision num_classes and image_size; a callable
    num_classes, classes and in_shape, each if its signature names it."""
    weights: str | None = None
    """Begin with the weights in this file: safetensors, a state dict (no pickle is loaded), or a checkpoint of a run. A
    resume and an evaluation do not need it."""
    pretrained: bool = False
    """Begin with the weights that timm or torchvision has for the model, downloaded if need be; the last layer is fresh
    if the classes are not as many."""
    new_head: bool = False
    """With --weights: leave the last layer fresh, for other classes."""
    normalize: bool = True
    """The model's first layer subtracts a mean and divides by a std, per channel: those of the pretrained weights where
    they are known (a file's own, timm's and torchvision's configuration), else the training images'."""
    small_images: bool = False
    """First layers for small pictures: ResNets get a 3x3 stem without max-pool, ConvNeXts patches of 1 (up to 32
    pixels) or 2, timm's ViTs at least 8 x 8 patches."""
    freeze_norm: bool = False
    """Batch norms keep the statistics of the weights they begin with; their scales and shifts are trained."""
    layer_decay: float | None = field(default=None, metadata={"low_allowed": False, "high": 1})
    """Layer-wise learning rates: that of each layer is this times the next one's, in (0, 1]; the last one's is the
    run's."""

    def check_model(self) -> None:
        """Check these options together.

        Raises:
            TypeError, ValueError: naming the option.
        """
        name, own = models.check_name(self.model), self.model in models.NAMES
        of_a_callable = not own and not foreign.from_library(name)
        for option, refused in (("width", not own), ("model_args", own), ("pretrained", own or of_a_callable)):
            if refused and (got := getattr(self, option)):
                instead = {"width": "model_args has the options of its builder"}
                instead["pretrained"] = "give the file by weights" + ", or load them in the callable" * of_a_callable
                advice = instead.get(option, f"it takes width, and {foreign.FORMS} take this one")
                raise ValueError(f"{option}: model {name!r} has no such option (got {got!r}); {advice}")
        if self.small_images and own and name != "resnet50":
            raise ValueError(f"small_images: model {name!r} is made for small pictures, so this option does not apply")
        if self.pretrained and self.weights is not None:
            raise ValueError(f"weights, pretrained: expected at most one of them, got both (weights {self.weights!r})")
        if self.new_head and self.weights is None:
            raise ValueError("new_head: there is no file of weights, so this option does not apply (got True)")
        if self.freeze_norm and self.weights is None and not self.pretrained and not of_a_callable:
            why = "without weights to begin with its batch norms would keep a mean of 0 and a variance of 1"
            raise ValueError(f"freeze_norm: {why}; give weights or pretrained")
