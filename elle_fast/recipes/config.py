"""The options of a run and of the commands: the one place for their names, types, defaults, ranges and help."""

from __future__ import annotations

import math
import os
from contextlib import suppress
from dataclasses import Field, asdict, dataclass, field, fields, replace
from difflib import get_close_matches
from pathlib import Path
from typing import Any

import yaml

from elle_fast import data, methods, presets
from elle_fast._core import checks
from elle_fast.data import Dataset
from elle_fast.evaluation import DEFAULT_ATTACKS, parse_attacks, radius
from elle_fast.recipes import models, schedules
from elle_fast.recipes.distributed import local_device


class _Checked:
    """Options whose types and ranges are checked when they are made, by hand, from a file or from a checkpoint."""

    def __post_init__(self) -> None:
        for option in fields(self):  # type: ignore[arg-type]  # the subclasses are dataclasses
            object.__setattr__(self, option.name, _checked(option, getattr(self, option.name)))


@dataclass(frozen=True)
class TrainConfig(_Checked):
    """A default of None means the schedule's, model's, method's or data set's own value.

    Raises:
        TypeError, ValueError: naming the option, what was expected and what was got.
    """

    data: str = "digits"
    """digits, cifar10, cifar100, svhn, mnist or image-folder."""
    root: str | None = None
    """Folder or archive of the data set; digits need none."""
    limit: int | None = None
    """Train on this many images, >= 1."""
    test_limit: int | None = None
    """Keep this many test images, >= 1."""
    image_size: int | None = None
    """Crop an image folder's pictures to their central squares, of this many pixels a side, >= 1."""
    model: str = "cnn"
    """preact, preactresnet18, wideresnet28-10, cnn or mlp."""
    width: int | None = None
    """Channels of the model's first stage, >= 1."""
    normalize: bool = True
    """The model's first layer subtracts the training images' mean and divides by their std, per channel."""
    method: str = "elle-a"
    """Training method; elle-fast methods lists all."""
    eps: float = 8 / 255
    """Radius in pixels of [0, 1]: 8/255 or 0.1, at most 1."""
    lam: float | None = None
    """Weight >= 0 of the regulariser: lam of ELLE, lam_max of ELLE-A (also on top of another method), else the
    method's own."""
    clamp: str | None = None
    """Training points that are clamped to [0, 1]: all, attack (x_adv alone), triplets (x_a and x_b) or none; by default
    as in the method's source."""
    label_smoothing: float = field(default=0.0, metadata={"high": 1})
    """Of the cross-entropy that is trained on, in [0, 1]; attacks and regularisers have none."""
    forward: str = "packed"
    """Speed against memory in ELLE's pass: packed (one forward), split (two) or checkpoint (recomputed in backward)."""
    skip_below: float | None = None
    """ELLE-A: no gradient of E_lin while lam is at most this part of lam_max, in [0, 1]."""
    triplet_fraction: float = 1.0
    """Part of the batch on which E_lin is estimated, in (0, 1]."""
    lagged: bool = False
    """ELLE-A: a step's lam takes effect in the next step."""
    points: str = "elle"
    """Points of E_lin: elle (three on a line) or five-point (the paper's Definition 3)."""
    triplets: int = 1
    """Independent triplets over which E_lin is averaged, >= 1."""
    alpha: str = "uniform"
    """Where x_c is between x_a and x_b: uniform (at random) or half."""
    max_ratio: float | None = None
    """Scale E_lin's gradient in the logits down to at most this many times the cross-entropy's, > 0."""
    augment: bool | None = None
    """Random crop and flip; by default as usual for the data set."""
    schedule: str = "short"
    """Learning rate over time: short, long, long-cos or constant."""
    epochs: int | None = None
    """Epochs, >= 1. Every method takes as many steps per epoch as the images have batches; free-at repeats each batch
    8 times, so it sees each image once in 8 epochs."""
    learning_rate: float | None = None
    """Highest learning rate, >= 0."""
    batch_size: int | None = None
    """Images per step, >= 1, over all processes together."""
    momentum: float = field(default=0.9, metadata={"high": 1})
    """Of SGD, in [0, 1]."""
    weight_decay: float = 5e-4
    """Of SGD, >= 0."""
    seed: int = field(default=0, metadata={"low": 0, "high": 2**63 - 1})
    """Of weights, order and noise, >= 0."""
    sync_batchnorm: bool = False
    """Under torchrun, on GPUs: batch norm over the whole batch, not over each process's share."""
    device: str = "auto"
    """cpu, cuda, cuda:1, ..., or auto: cuda if there is one, else cpu."""
    watch: int = 512
    """Test images attacked after each epoch, for the curves, >= 1."""
    eval_attacks: str = DEFAULT_ATTACKS
    """Attacks of the final result, separated by commas; elle-fast eval --help lists them."""
    eval_samples: int | None = None
    """Test images for the final result, >= 1; by default all."""
    log_every: int = 10
    """Steps between rows of steps.csv, >= 1."""
    checkpoint_every: int = 200
    """Steps between checkpoints within an epoch, >= 1."""

    def resolved(self) -> TrainConfig:
        """The same run with every default filled in.

        Raises:
            TypeError, ValueError: naming the option, what was expected and what was got.
        """
        given = asdict(self)
        checks.choice("data", self.data, data.NAMES)
        checks.choice("model", self.model, models.NAMES)
        method = methods.find(self.method)
        parse_attacks(self.eval_attacks)
        if self.device == "auto":
            given["device"] = local_device("auto")
        own = {**asdict(schedules.find(self.schedule, self.data)), "clamp": method.clamp}
        del own["peak"]  # no option
        length = "short" if self.schedule == "constant" else self.schedule.partition("-")[0]
        own["lam"] = presets.weight(self.method, self.data, schedule=length, model=self.model, eps=self.eps)
        run = replace(self, **given | {name: value for name, value in own.items() if given[name] is None})
        # The criterion checks its own options and their combinations.
        counts: dict[str, Any] = dict.fromkeys(("steps", "epoch_steps", "samples", "classes"), 1)
        methods.build(run.method, eps=run.eps, lam=run.lam, clamp=str(run.clamp), **counts, **run.levers())
        return run

    def read_data(self, root: str | None = None) -> Dataset:
        """The run's data set, from ``root`` if its files have moved."""
        sizes = {"limit": self.limit, "test_limit": self.test_limit, "image_size": self.image_size}
        return data.load(self.data, self.root if root is None else root, **sizes)

    def levers(self) -> dict[str, Any]:
        """The options of ELLELoss that differ from its defaults."""
        given = {name: getattr(self, name) for name in methods.LEVERS}
        return {name: value for name, value in given.items() if value != getattr(TrainConfig, name)}

    def identity(self) -> dict[str, Any]:
        """The options that a checkpoint shares with a run that resumes it: all but ``root`` and ``device``."""
        return {name: value for name, value in asdict(self).items() if name not in ("root", "device")}

    def to_yaml(self) -> str:
        """Every option as YAML that :meth:`from_yaml` reads back."""
        values = asdict(self)
        if "/" in (eps := number_text(self.eps)):
            values["eps"] = eps
        return str(yaml.safe_dump(values, sort_keys=False))

    @classmethod
    def from_yaml(cls, path: str | os.PathLike[str]) -> TrainConfig:
        """The run in a YAML file, a mapping from options to values; options left out have their defaults.

        Raises:
            OSError: if the file cannot be read.
            TypeError, ValueError: naming file and option, for one that is unknown or there twice, a wrong type or a
                value out of range.
        """
        path = checks.path("path", path)
        try:
            with path.open("rb") as file:
                given = yaml.load(file, _UniqueKeys)
        except (yaml.YAMLError, ValueError) as error:  # the latter of a date or a tagged number that is none
            raise ValueError(f"{path}: not valid YAML: {' '.join(str(error).split())}") from error
        if not isinstance(given, dict):
            raise ValueError(f"{path}: expected lines of the form 'option: value', got {checks.describe(given)}")
        options = {option.name: option for option in fields(cls)}
        for name, value in given.items():
            if name not in options:
                near = "".join(f"; did you mean {match}?" for match in get_close_matches(str(name), options, 1))
                raise ValueError(f"{path}: {name}: not an option of a run{near}")
            if isinstance(value, str) and str(options[name].type).startswith("float"):
                with suppress(ValueError):  # the check below names the option too
                    value = parse_number(value)
            given[name] = value
        try:
            return cls(**given)
        except (TypeError, ValueError) as error:
            raise type(error)(f"{path}: {error}") from error


@dataclass(frozen=True)
class TrainOptions:
    """Train a model.

    The folder --out then holds checkpoint.pt, result.json, curves.png, steps.csv, epochs.csv and tensorboard/.
    Under torchrun the processes share each batch: torchrun --nproc_per_node 2 -m elle_fast train ...
    """

    run: TrainConfig = field(default_factory=TrainConfig)
    config: Path | None = None
    """Read the run from this YAML file; options beside it win over the file."""
    print_config: bool = False
    """Print the run as YAML for --config instead of training."""
    fast: bool = False
    """Preset for elle-a: --skip-below 0.01 --triplet-fraction 0.125; it wins over --config, options beside it win."""
    out: Path | None = None
    """Folder of the run; by default runs/DATA-METHOD-epsEPS-seedSEED."""
    resume: bool = False
    """Continue the run in --out from its checkpoint."""
    overwrite: bool = False
    """Begin anew even if --out holds a run."""
    allow_other_data: bool = False
    """With --resume: go on, with a warning, where the images or labels are not those the run began with."""
    timeout: float = 120.0
    """Under torchrun: seconds to wait for another process, > 0."""


@dataclass(frozen=True)
class EvalOptions(_Checked):
    """Accuracy of a checkpoint, clean and under attack."""

    checkpoint: Path
    """checkpoint.pt of a run."""
    attacks: str = DEFAULT_ATTACKS
    """Separated by commas: clean, fgsm, pgd-K, pgd-K-RESTARTS, noise-K, and with elle-fast[eval] autoattack, square,
    square-QUERIES, foolbox-pgd-K, foolbox-pgd-K-RESTARTS."""
    eps: float | None = None
    """Radius in pixels of [0, 1], at most 1; by default that of training."""
    root: str | None = None
    """The data set's files; by default those of training."""
    allow_other_data: bool = False
    """Only warn where images or labels are not those of training: another Pillow may decode a JPEG one level off."""
    samples: int | None = None
    """Test images, >= 1; by default all."""
    batch_size: int = 256
    """Images at a time, >= 1."""
    seed: int = field(default=0, metadata={"low": 0, "high": 2**63 - 1})
    """Of the random starts, >= 0."""
    device: str = "auto"
    """cpu, cuda, cuda:1, ..., or auto: cuda if there is one, else cpu."""
    masking_check: bool | None = None
    """Look for masked gradients: PGD-200, Square and noise against PGD-20, on 256 images; by default beside
    autoattack."""
    json: Path | None = None
    """Write the result to this file; if cut off, the same command continues where it was."""


class _UniqueKeys(yaml.SafeLoader):  # type: ignore[misc]  # it has no types
    """Refuses a key that is there twice; YAML forbids it, and PyYAML would take the last one in silence."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        found: dict[Any, Any] = super().construct_mapping(node, deep)
        names = [self.construct_object(key, deep) for key, _ in node.value]
        if twice := [name for name in found if names.count(name) > 1]:
            raise yaml.constructor.ConstructorError(None, None, f"{twice[0]}: given twice", node.start_mark)
        return found


def parse_number(text: str) -> float:
    """``8/255`` or ``0.1``."""
    if not isinstance(text, str):
        raise TypeError(f"text: expected a string, got {checks.describe(text)}")
    numerator, slash, denominator = text.partition("/")
    try:
        value = float(numerator) / float(denominator if slash else 1)
    except (ValueError, ZeroDivisionError):
        raise ValueError(f"expected a number or a fraction such as 8/255, got {text!r}") from None
    if not math.isfinite(value):
        raise ValueError(f"expected a finite number, got {text!r}")
    return value


def number_text(value: float) -> str:
    """The shorter of ``0.1`` and ``8/255`` that :func:`parse_number` reads back to the same bits."""
    if not math.isfinite(255 * value):
        return repr(value)
    fraction = f"{round(value * 255)}/255"
    return min(repr(value), fraction, key=len) if parse_number(fraction) == value else repr(value)


def _checked(option: Field[Any], value: Any) -> Any:
    """The value, if it has the option's type and range; by default integers are >= 1 and numbers >= 0."""
    kind, _, optional = str(option.type).partition(" | ")
    if value is None and optional:
        return None
    if kind == "bool":
        return checks.flag(option.name, value)
    if kind == "int":
        return checks.integer(option.name, value, **{"low": 1, **option.metadata})
    if option.name == "eps":
        return radius(value)
    if kind == "float":
        return checks.real(option.name, value, **{"low": 0, **option.metadata})
    if kind == "Path":
        return checks.path(option.name, value)
    if not isinstance(value, str):
        raise TypeError(f"{option.name}: expected a string, got {checks.describe(value)}")
    return value
