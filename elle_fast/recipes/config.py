"""The options of a run and of `elle-fast train`: their names, types, defaults, ranges and help."""

from __future__ import annotations

import os
from contextlib import suppress
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import Any, Literal

import yaml

from elle_fast import data, methods, presets
from elle_fast._core import checks, precision
from elle_fast.evaluation import DEFAULT_ATTACKS, parse_attacks
from elle_fast.ops.layout import triplet_rows
from elle_fast.recipes import course, optimizers, phases, schedules
from elle_fast.recipes.checked import number_text, parse_number, read_yaml, refuse_unknown
from elle_fast.recipes.data_options import TrainingDataOptions
from elle_fast.recipes.distributed import local_device
from elle_fast.recipes.model_options import ModelOptions

# The fewest with which the rule "relative" was measured (benchmarks/results/detector_curves.json).
_RELATIVE_SAMPLES = 16
# What a resume may have otherwise, as it changes no number of a run. Of the file of weights the digest has to be the
# same, if it is still there; whether pictures are streamed follows from the memory, and the digest of the data tells.
OF_THE_MACHINE = ("root", "test_list", "device", "capture", "weights", "workers", "stream", "skip_corrupt")


@dataclass(frozen=True)
class TrainConfig(ModelOptions, TrainingDataOptions):
    """The options of a run. A default of None means the schedule's, model's, method's or data set's own value.

    Raises:
        TypeError, ValueError: naming the option, what was expected and what was got.
    """

    method: str = "elle-a"
    """Training method; elle-fast methods lists all."""
    eps: float = 8 / 255
    """Radius in pixels of [0, 1]: 8/255 or 0.1; in linf at most 1."""
    norm: str = "linf"
    """Ball of attack, triplets and evaluation: linf or, with ELLE around an attack, l2; lam's defaults are linf's."""
    lam: float | Literal["auto"] | None = None
    """Weight >= 0 of the regulariser: lam of ELLE, lam_max of ELLE-A (also on top of another method), else the
    method's own. auto: ELLE-A's follows from the history of E_lin, which begins anew after an eps warm-up."""
    base_lam: float | None = None
    """Where lam is the weight of what is added, as in gat+elle-a or gat+advlc: that of the method itself, >= 0."""
    clamp: str | None = None
    """Training points that are clamped to [0, 1]: all, attack (x_adv alone), triplets (x_a and x_b) or none; by default
    as in the method's source."""
    label_smoothing: float | None = field(default=None, metadata={"high": 1, "high_allowed": False})
    """Of the cross-entropy that is trained on, in [0, 1); attacks and regularisers have none; by default 0, but for
    liet."""
    forward: str = "packed"
    """Speed against memory in ELLE's pass: packed (one forward), split (two) or checkpoint (recomputed in backward)."""
    skip_below: float | None = None
    """ELLE-A: no gradient of E_lin while lam is at most this part of lam_max, in [0, 1]."""
    triplet_fraction: float = 1.0
    """Part of the batch on which E_lin is estimated, in (0, 1]."""
    triplet_precision: str | None = None
    """Of the forward pass over E_lin's points: fp32, fp16, bf16 or same (as --precision). By default fp32 where
    --precision is another: rounding in bf16 makes an E_lin of 2.5 to 17 times a healthy model's."""
    lagged: bool = False
    """ELLE-A: a step's lam takes effect in the next step."""
    points: str = "elle"
    """Points of E_lin: elle (three on a line) or five-point (the paper's Definition 3)."""
    triplets: int = 1
    """Independent triplets over which E_lin is averaged, >= 1."""
    alpha: str = "uniform"
    """Where x_c is between x_a and x_b: uniform (at random), half, or argmax (worst, for 12 more passes)."""
    penalty: str = "squared"
    """Of E_lin's residual: squared, smooth_l1 (of which lam's default is twice as large) or abs (which has none)."""
    window: int | None = None
    """ELLE-A: the last E_lin that the next is compared with, >= 3; by default all."""
    rule: str = "paper"
    """ELLE-A: what raises lam: paper (E_lin above its history) or relative (its part in the loss' change)."""
    ramp: int | None = None
    """ELLE-A: steps over which lam_max grows from 0, >= 1, in each of --phases anew; by default it does not."""
    max_ratio: float | None = None
    """Scale E_lin's gradient in the logits down to at most this many times the cross-entropy's, > 0."""
    schedule: str = "short"
    """Learning rate over time: short, long, long-cos, onecycle, cosine, piecewise, constant or linear."""
    peak: float | None = None
    """Part of the run after which the rate of short, long-cos and onecycle is highest, between 0 and 1."""
    milestones: str | None = None
    """Parts of the run at which piecewise divides the rate by 10; by default 1/2,3/4."""
    knots: str | None = None
    """What linear goes between: epochs and the parts of the highest rate, such as 0:0,1:1,6:0.1,12:0.01,15:0.001."""
    warmup: float = 0.0
    """Epochs in which the rate of long, cosine, piecewise and constant rises from 0, >= 0."""
    rate_per: str = "step"
    """How often the rate changes: each step or each epoch."""
    epochs: int | None = None
    """Epochs, >= 1. Every method takes as many steps per epoch as the images have batches; free-at repeats each batch
    8 times, so it sees each image once in 8 epochs."""
    learning_rate: float | None = None
    """Highest learning rate, >= 0."""
    batch_size: int | None = None
    """Images per step, >= 1, over all processes together."""
    phases: str | None = None
    """In place of epochs and batch size: parts of the run with their own, EPOCHS:SIDE:BATCH, such as
    6:128:512,6:224:224,3:288:128. Training images have that many pixels a side; ELLE-A's history begins anew."""
    drop_last: bool = True
    """Leave out an epoch's last batch if it is not full."""
    optimizer: str = "sgd"
    """sgd or adamw."""
    momentum: float = field(default=0.9, metadata={"high": 1})
    """Of SGD, in [0, 1]; of AdamW, its first beta."""
    momentum_cycle: float = field(default=0.0, metadata={"high": 1})
    """With short, long-cos and onecycle: how much lower the momentum is where the rate is highest. torch's CyclicLR and
    OneCycleLR have 0.1, below 0.9 and 0.95."""
    weight_decay: float | None = None
    """>= 0; by default 5e-4 with sgd and 0.01 with adamw."""
    decay: str = "all"
    """What decays: all parameters, or weights alone, without biases, norms and others of one dimension."""
    steps_per_batch: int = 1
    """Optimizer steps on each batch's gradient, >= 1."""
    clean_forward: bool = False
    """One more forward pass over the clean images in each step, which only moves batch norm's statistics."""
    eps_warmup: float | None = None
    """Epochs in which eps grows from 0, >= 0; by default 5 on SVHN with short (a third of a shorter run), else 0."""
    eps_per: str = "step"
    """With a warm-up, how often eps grows: each step or each epoch; the first epoch of the latter has eps 0."""
    precision: str = "fp32"
    """Of the training's passes: fp32, or bf16 or fp16, through autocast. Weights are in fp32; fp16 has a GradScaler."""
    compile: bool = False
    """Train through torch.compile, which takes a minute or more of the first steps; no methods that differentiate
    a gradient or read hidden layers."""
    capture: bool | None = None
    """Replay steps as CUDA graphs; by default on CUDA, where method and options allow it. On the CPU the steps are the
    same without."""
    guard: bool = False
    """Watch for a collapse, by any method: then go back to an earlier step, and add E_lin to the loss for a while. What
    a method keeps for each training image stays. A loss that is not finite ends the run only if it remains so until the
    next epoch ends. Checkpoints hold two earlier states as well."""
    seed: int = field(default=0, metadata={"low": 0, "high": 2**63 - 1})
    """Of weights, order and noise, >= 0."""
    sync_batchnorm: bool = False
    """Under torchrun, on GPUs: batch norm over the whole batch, not over each process's share."""
    device: str = "auto"
    """cpu, cuda, cuda:1, ..., or auto: cuda if there is one, else cpu."""
    validation: int | None = field(default=None, metadata={"low": 0})
    """Training images held out, and attacked after each epoch for the curves and the best checkpoint; 0: none. By
    default 1024, for digits 180, and at most an eighth of --limit."""
    average: float | None = None
    """Average the weights over the steps: the part of the average that a step keeps, in (0, 1), such as 0.999."""
    patience: int | None = None
    """Stop after this many epochs without a better PGD-10 accuracy on the validation images, >= 1, counted from the end
    of eps' warm-up; by default never. The schedule stays that of all epochs."""
    eval_attacks: str = DEFAULT_ATTACKS
    """Attacks of the final result, separated by commas; elle-fast eval --help lists them."""
    eval_samples: int | None = None
    """Test images for the final result, >= 1; by default all."""
    eval_precision: str = "fp32"
    """Of the passes of attacks on validation and test images, and of their gradients: fp32, bf16 or fp16; E_lin's are
    in fp32."""
    log_every: int = 10
    """Steps between rows of steps.csv, >= 1."""
    checkpoint_every: int | None = field(default=None, metadata={"low": 0})
    """Steps between checkpoints within an epoch, beside that at its end; 0: none. By default 200, and none for methods
    that keep something for each training sample, as that is in each checkpoint."""

    def resolved(self) -> TrainConfig:
        """The same run with every default filled in.

        Raises:
            TypeError, ValueError: naming the option, what was expected and what was got.
        """
        given = asdict(self)
        data.check_name("data", self.data)
        self.check_model()
        method = methods.find(self.method)
        self.check_mixing(self.method, method)
        parse_attacks(self.eval_attacks)
        precision.check("eval_precision", self.eval_precision)
        if self.device == "auto":
            given["device"] = local_device("auto")
        own = {**asdict(schedules.find(self.schedule, self.data)), "clamp": method.clamp}
        own |= phases.own(self, method)
        epochs = own["epochs"] if self.epochs is None else self.epochs
        own["eps_warmup"] = min(own["eps_warmup"], epochs / 3)
        if self.triplet_precision is not None:
            checks.choice("triplet_precision", self.triplet_precision, (*precision.DTYPES, "same"))
        if precision.check("precision", self.precision) != "fp32" and "triplet_precision" in method.levers:
            own["triplet_precision"] = "fp32"
        if self.precision == "fp16" and self.steps_per_batch > 1:
            why = "as its GradScaler takes one step with a gradient"
            raise ValueError(f"steps_per_batch: expected 1 with precision 'fp16', {why}, got {self.steps_per_batch}")
        double = "differentiates a gradient, which torch.compile cannot" if "D" in method.passes.split() else ""
        if self.compile and (obstacle := method.refuses.get("compile", double)):
            raise ValueError(f"compile: method {self.method!r} {obstacle}, so this option does not apply (got True)")
        own["weight_decay"] = optimizers.WEIGHT_DECAYS[checks.choice("optimizer", self.optimizer, optimizers.NAMES)]
        if self.optimizer == "adamw":
            own["learning_rate"] = optimizers.ADAMW_RATE
        length = schedules.find(self.schedule, self.data).length
        own["label_smoothing"] = presets.smoothing(self.method, self.data, eps=self.eps)
        own["checkpoint_every"] = 0 if "samples" in method.takes else 200
        own["validation"] = _validation(self.data, self.limit)
        of_run: dict[str, Any] = {"model": self.model, "eps": self.eps, "image_size": self.image_size}
        if "penalty" in method.levers:
            of_run["penalty"] = self.penalty
        own["lam"] = presets.weight(self.method, self.data, schedule=length, **of_run)
        if "base_lam" in method.takes:
            base = self.method.partition("+")[0]
            of_base = {name: value for name, value in of_run.items() if name != "penalty"}
            own["base_lam"] = presets.weight(base, self.data, schedule=length, **of_base)
        run = replace(self, **given | {name: value for name, value in own.items() if given[name] is None})
        course.check(run)
        if run.patience is not None and run.validation == 0:
            raise ValueError(f"patience: expected None without validation images, got {run.patience}")
        _check_samples(run)
        # The criterion checks its own options and their combinations.
        counts: dict[str, Any] = dict.fromkeys(("steps", "epoch_steps", "samples", "classes"), 1)
        weights: dict[str, Any] = {"lam": run.lam, "base_lam": run.base_lam}
        methods.build(run.method, eps=run.eps, clamp=str(run.clamp), **weights, **counts, **run.levers())
        return run

    def doubt_of_lam(self, side: int) -> str | None:
        """Of a resolved run: what to say if its pictures, of that many pixels a side, would have another default."""
        if not data.of_pictures(self.data) or self.image_size is not None or side < presets.LARGE:
            return None
        small, large = (replace(self, lam=None, image_size=size).resolved().lam for size in (None, side))
        if self.lam != small or small == large:
            return None
        advice = f"--image-size {side} brings {large:g}, or give --lam"
        return f"lam {small:g} is the default of small pictures, and these are of {side} pixels: {advice}"

    def levers(self) -> dict[str, Any]:
        """The options of ELLELoss that differ from its defaults, and a precision that is to be that of the rest."""
        given = {name: getattr(self, name) for name in methods.LEVERS}
        given = {name: value for name, value in given.items() if value != getattr(TrainConfig, name)}
        if self.triplet_precision == "same" and "triplet_precision" in methods.find(self.method).levers:
            given["triplet_precision"] = None
        return given

    def identity(self) -> dict[str, Any]:
        """The options that a checkpoint shares with a run that resumes it: all but those of the machine."""
        return {name: value for name, value in asdict(self).items() if name not in OF_THE_MACHINE}

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
        return cls.from_options(read_yaml(path), str(path))

    @classmethod
    def from_options(cls, given: dict[str, Any], source: str) -> TrainConfig:
        """The run of options as YAML has them, where a number may be the text ``8/255``.

        Raises:
            TypeError, ValueError: as :meth:`from_yaml`, naming ``source`` in place of the file.
        """
        options, given = {option.name: option for option in fields(cls)}, dict(given)
        refuse_unknown(given, options, source, "an option of a run")
        for name, value in given.items():
            if isinstance(value, str) and str(options[name].type).startswith("float"):
                with suppress(ValueError):  # the check below names the option too
                    given[name] = parse_number(value)
        try:
            return cls(**given)
        except (TypeError, ValueError) as error:
            raise type(error)(f"{source}: {error}") from error


@dataclass(frozen=True)
class TrainOptions:
    """Train a model.

    The folder --out then holds result.json, curves.png, steps.csv, epochs.csv, tensorboard/, and for elle-fast eval
    checkpoint.pt (the last weights), best.pt (best under PGD-10 on the validation images), with --average also
    averaged.pt and best_averaged.pt.
    Under torchrun the processes share each batch: torchrun --nproc_per_node 2 -m elle_fast train ...
    """

    run: TrainConfig = field(default_factory=TrainConfig)
    config: Path | None = None
    """Read the run from this YAML file; options beside it win over the file."""
    print_config: bool = False
    """Print the run as YAML for --config instead of training."""
    recipe: str | None = None
    """Preset: paper (the ELLE paper's setting), fastat (FastAT Benchmark's), imagenet (ResNet50 in 15 epochs) or
    authors (the ELLE authors' trainer to the letter, in any --precision and compiled if asked; no other option may
    contradict it); it wins over --config, options beside it win."""
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


def _check_samples(run: TrainConfig) -> None:
    """Refuse relative E_lin on fewer samples than it was measured with."""
    if run.rule != "relative" or "rule" not in methods.find(run.method).levers:
        return
    smallest = min(phase.batch_size for phase in phases.of_run(run))
    if (samples := triplet_rows(smallest, run.triplet_fraction)) < _RELATIVE_SAMPLES:
        got = f"{samples} of a batch of {smallest} with triplet_fraction {run.triplet_fraction:g}"
        raise ValueError(f"rule: 'relative' needs E_lin on {_RELATIVE_SAMPLES} samples or more, got {got}")


def _validation(name: str, limit: int | None) -> int:
    """The images held out by default: the field's 1,024, fewer where that would be much of the data."""
    usual = 180 if name == "digits" else 1024
    return usual if limit is None else min(usual, limit // 8)
