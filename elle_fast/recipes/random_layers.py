"""What is said of a model that draws random numbers: dropout, drop path, stochastic depth."""

from __future__ import annotations

from torch import nn

# By name, as each library has a class of its own; and where each keeps its probability.
_NAMES = ("droppath", "stochasticdepth", "dropblock", "patchdropout", "dropout")
_PROBABILITIES = ("p", "drop_prob", "prob", "dropout", "dropout_p")
# Where other modules keep that of a dropout which is a function.
_FUNCTIONS = ("drop_rate", "drop_prob", "dropout_prob", "attention_dropout")
_ADVICE = {
    "timm": "'{drop_rate: 0, drop_path_rate: 0}'",
    "torchvision": "'{dropout: 0}' or '{stochastic_depth_prob: 0}', whichever the network takes,",
}


def found(model: nn.Module) -> dict[str, list[float]]:
    """The probabilities above 0 of layers that draw, by the name of their class."""
    kinds: dict[str, list[float]] = {}
    for module in model.modules():
        kind = type(module).__name__
        plain = kind.lower().replace("_", "")
        draws = plain.startswith(_NAMES) or plain.endswith(_NAMES)
        draws = draws or isinstance(module, (nn.MultiheadAttention, nn.RNNBase))
        values = [getattr(module, name, None) for name in (_PROBABILITIES if draws else _FUNCTIONS)]
        number = next((value for value in values if isinstance(value, (int, float))), 0.0)
        if number > 0:
            kinds.setdefault(kind, []).append(float(number))
    return kinds


def remark(model: nn.Module, name: str) -> str | None:
    """A line that says what is done with them, and how to do without; ``None`` of a model that has none."""
    kinds = found(model)
    if not kinds:
        return None
    listed = ", ".join(f"{len(values)} {kind} of up to {max(values):g}" for kind, values in kinds.items())
    args = _ADVICE.get(name.partition(":")[0])
    advice = "an option of its builder may turn them off" if args is None else f"--model-args {args} trains without"
    return (
        f"the model draws at random ({listed}): all points of a sample share a draw, as E_lin would count another one "
        f"as curvature, and what is trained and attacked are thinned networks; {advice}"
    )
