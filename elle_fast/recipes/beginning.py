"""The model that a run begins with: network, normalisation, first weights, and what is to be said of them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import nn

from elle_fast.recipes import foreign, models, random_layers, weights
from elle_fast.recipes.model_options import ModelOptions

Numbers = Sequence[float] | None


class Beginning(NamedTuple):
    """A model on the CPU, in train mode.

    Attributes:
        model: with the weights to begin with; those of a run that is resumed are fresh, for its checkpoint to replace.
        shape: what :func:`models.build` takes beside the options: in_shape, classes, mean and std.
        weights: the digest of the file of weights, or ``""``.
        notes, remarks: lines for the log; the latter are warnings.
    """

    model: nn.Module
    shape: dict[str, Any]
    weights: str
    notes: list[str]
    remarks: list[str]


def begin(
    options: ModelOptions,
    seed: int,
    in_shape: Sequence[int],
    classes: int,
    of_data: Callable[[], tuple[Sequence[float], Sequence[float]]],
    saved: dict[str, Any] | None,
) -> Beginning:
    """Build it, with weights from ``options`` unless the run is resumed.

    Args:
        options: checked together.
        seed: of torch's generator, for fresh weights.
        in_shape, classes: of the data.
        of_data: gives the training images' mean and std, which are not always needed.
        saved: the checkpoint to resume from. Then neither a file of weights nor a library's are looked for.

    Raises:
        ImportError, OSError, TypeError, ValueError: as :func:`models.build` and :func:`weights.load_weights`, for
            weights with a normalisation beside ``normalize=False``, and for a network that cannot be trained.
    """
    torch.manual_seed(seed)
    own = options.model in models.NAMES
    first = None
    if options.weights is not None and saved is None:
        first = weights.read(Path(options.weights))
    net = models.build(
        options.model,
        in_shape=tuple(in_shape),
        classes=classes,
        width=options.width,
        args=options.model_args,
        small_images=options.small_images,
        pretrained=options.pretrained and saved is None,
    )
    shape: dict[str, Any] = {"in_shape": list(in_shape), "classes": classes, "mean": None, "std": None}
    notes, remarks = [], []
    if saved is not None and (saved["shape"]["in_shape"], saved["shape"]["classes"]) == (list(in_shape), classes):
        shape = saved["shape"]
        if not own and shape["mean"] is not None:
            notes.append(normalises(shape["mean"], shape["std"], "the run so far"))
    elif not options.normalize:
        check_contradiction(options, net, in_shape[0], first)
    else:
        mean, std, source = statistics(options, net, in_shape[0], first)
        if source is None:
            mean, std = of_data()
            source = "the training images"
        shape |= {"mean": None if mean is None else list(mean), "std": None if std is None else list(std)}
        if not own or first is not None:
            notes.append(normalises(mean, std, source))
    model = models.normalized(net, tuple(in_shape), shape["mean"], shape["std"])
    if first is not None:
        head = "all" if options.new_head else "none"
        fresh = weights.load_state(model, first.state, str(options.weights), classes=classes, new_head=head)
        notes.append(f"begins with the weights in {options.weights}, digest {first.digest}")
        if fresh:
            notes[-1] += f", but for {', '.join(fresh)}, which are fresh"
    if options.pretrained and saved is None:
        changed = "; its first layers are changed for small pictures" * options.small_images
        notes.append(f"begins with the pretrained weights of {options.model}{changed}")
    if not own:
        if unreached := foreign.unreached(model, in_shape):
            # Else AdamW would keep no state of them, and DistributedDataParallel wait for their gradients.
            for name in unreached:
                model.get_parameter(name).requires_grad_(False)
            remarks.append(f"no logit depends on {weights.listed(unreached)}, so these weights stay as they are")
        if remark := random_layers.remark(model, options.model):
            remarks.append(remark)
    if not any(each.requires_grad for each in model.parameters()):
        raise ValueError("model: expected weights to train, got none that requires a gradient")
    return Beginning(model, shape, "" if first is None else first.digest, notes, remarks)


def statistics(
    options: ModelOptions, net: nn.Module, channels: int, first: weights.Weights | None
) -> tuple[Numbers, Numbers, str | None]:
    """Mean and std that the first weights were trained behind, and who says so; nobody where that is not known."""
    of_file = None if first is None else weights.statistics(first, net, channels, str(options.weights))
    if of_file is not None:
        return *of_file, str(options.weights)
    if options.model in models.NAMES or (first is None and not options.pretrained):
        return None, None, None
    found = foreign.configured_statistics(options.model, weights.network_of(net))
    if found is None:
        return None, None, None
    (mean, std), source = found
    if len(mean) != channels:
        mean, std = [sum(mean) / len(mean)] * channels, [sum(std) / len(std)] * channels
        source = f"{source}, averaged over its channels"
    return mean, std, source


def check_contradiction(options: ModelOptions, net: nn.Module, channels: int, first: weights.Weights | None) -> None:
    """Raise ValueError if ``normalize`` is off, but the file of weights holds a normalisation."""
    found = None if first is None else weights.statistics(first, net, channels, str(options.weights))
    if found is not None and found != (None, None):
        raise ValueError(
            f"normalize: expected True (no --no-normalize), as the weights in {options.weights} were trained behind a "
            "normalisation that the file holds, got False"
        )


def normalises(mean: Numbers, std: Numbers, source: str) -> str:
    """A line for the log."""
    if mean is None or std is None:
        return f"does not normalise, as {source}"
    numbers = [", ".join(f"{each:.4g}" for each in values) for values in (mean, std)]
    return f"normalises with mean {numbers[0]}, std {numbers[1]} of {source}"
