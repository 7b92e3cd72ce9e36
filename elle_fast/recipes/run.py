"""The state of a training run; a checkpoint holds everything in it that steps change."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from elle_fast import data, methods
from elle_fast._core import checks, devices
from elle_fast._core.precision import DTYPES
from elle_fast._core.seeds import derived_seed
from elle_fast.adaptive import AdaptiveLambda
from elle_fast.auto import AutoLambda
from elle_fast.data.mixing import Mixing
from elle_fast.data.streaming import Stream
from elle_fast.evaluation import BOUNDS
from elle_fast.recipes import checkpoint, compiling, foreign, models, norms, optimizers
from elle_fast.recipes.averaging import WeightAverage
from elle_fast.recipes.beginning import begin
from elle_fast.recipes.config import TrainConfig
from elle_fast.recipes.course import Course
from elle_fast.recipes.distributed import Ranks
from elle_fast.recipes.guarding import guard_of
from elle_fast.recipes.logs import History
from elle_fast.recipes.meter import Meter
from elle_fast.recipes.phases import Plan, check_sides, of_run
from elle_fast.recipes.stepping import Step

_MIXING = 2  # beside the numbers of a batch, what its seed is for


class Run:
    """Data, model, criterion and optimiser of one run, and how far it has come.

    ``config`` is resolved, ``path`` that of the checkpoint, and ``ranks`` are the processes that train together.
    ``saved`` is the checkpoint's content if the run is to be resumed; :meth:`restore` does so.
    The validation images are none of those trained on, which alone give the mean and std; the digest is of all data.
    """

    def __init__(
        self,
        config: TrainConfig,
        dataset: data.Dataset,
        path: Path,
        ranks: Ranks,
        saved: dict[str, Any] | None = None,
    ) -> None:
        assert config.validation is not None
        self.config, self.path, self.ranks = config, path, ranks
        self.device = torch.device(config.device)
        self.data_digest = dataset.digest()
        self.validation: data.Split | None = None
        if config.validation:
            if (count := len(dataset.train)) <= config.validation:
                raise ValueError(
                    f"validation: expected fewer than the {count} training images, of which some are to train on, "
                    f"got {config.validation}"
                )
            rest, held_out = dataset.train.held_out(config.validation)
            dataset, self.validation = replace(dataset, train=rest), held_out.to(self.device)
        self.train_split, self.test_split = dataset.train.to(self.device), dataset.test.to(self.device)
        augment = dataset.augment if config.augment is None else config.augment
        share: dict[str, Any] = {"seed": config.seed, "augment": augment, "rank": ranks.rank, "ranks": ranks.count}
        share["drop_last"] = config.drop_last
        self._batches = partial(data.identified_batches, self.train_split, **share)
        phases = of_run(config)
        check_sides(config, dataset)
        for phase in phases:  # refuses a batch that cannot be shared, before anything is written or read
            self._batches(batch_size=phase.batch_size, image_size=phase.image_size, epoch=0)
        self._mixing = Mixing(len(dataset.classes), mixup=config.mixup, cutmix=config.cutmix)
        per_epoch = partial(data.batches_per_epoch, self.train_split, drop_last=config.drop_last)
        self.plan = Plan(phases, per_epoch)
        self.steps = self.plan.steps
        self.course = Course(config, self.plan)
        beginning = begin(
            config,
            config.seed,
            dataset.train.in_shape,
            len(dataset.classes),
            lambda: (dataset.mean, dataset.std),
            saved,
        )
        self.shape, self.notes = beginning.shape, beginning.notes
        self.initial_weights = beginning.weights if saved is None else saved.get("initial_weights", "")
        self.class_names = list(dataset.classes)
        # channels_last: 1.4 times the speed of contiguous here (narrow PreActResNet, oneDNN, two cores).
        # Evaluated, averaged, saved and resumed as it is; trained compiled, and in DistributedDataParallel, as asked.
        model: Any = beginning.model
        foreign.check_sides(model, config.model, self.shape["in_shape"][0], {phase.image_size for phase in phases})
        self.model: nn.Module = model.to(self.device, memory_format=torch.channels_last)
        if ranks.count > 1 and config.sync_batchnorm:
            self.model = norms.synced(self.model)
        if config.freeze_norm and not norms.freeze(self.model):
            raise ValueError(f"freeze_norm: model {config.model!r} has no batch norm, so this option does not apply")
        trained = compiling.compiled(self.model, self.device) if config.compile else self.model
        if ranks.count > 1:
            trained = nn.parallel.DistributedDataParallel(
                trained, device_ids=None if self.device.type == "cpu" else [self.device]
            )
            # Each process draws noise of its own for its share of the batch.
            torch.manual_seed(derived_seed(config.seed, ranks.count, ranks.rank))
        self.average = None if config.average is None else WeightAverage(self.model, config.average)
        self.replays = methods.find(config.method).replays
        self.criterion = methods.build(
            config.method,
            eps=config.eps,
            lam=config.lam,
            base_lam=config.base_lam,
            bounds=BOUNDS,
            clamp=str(config.clamp),
            label_smoothing=config.label_smoothing,
            steps=self.steps,
            epoch_steps=self.plan.epoch_steps(0),
            samples=len(self.train_split),
            classes=self.shape["classes"],
            layers=models.hidden_layers,
            **config.levers(),
        )
        self.options: dict[str, Any] = {}  # of the criterion, beside the batch that was the last of `upcoming`
        assert config.weight_decay is not None
        self.optimizer = optimizers.build(
            config.optimizer,
            self.model,
            momentum=config.momentum,
            weight_decay=config.weight_decay,
            decay=config.decay,
            layer_decay=config.layer_decay,
        )
        self.meter = Meter(self.device)
        dtype, self._remarks = DTYPES[config.precision], beginning.remarks
        self.guard = guard_of(
            config, trained, self.optimizer, self.validation, self.average, self.criterion, ranks, self._remarks
        )
        self._stepping = Step(
            config, self.criterion, trained, self.optimizer, self.meter, self.device, ranks.count, self.guard
        )
        if dtype is not None and devices.has_products(self.device, dtype) is False:
            named = f"precision {config.precision}"
            self._remarks.append(f"{named} takes longer than fp32 on this device, which has no instructions for it")
        self.step = 0
        self.counted: dict[str, int] = {}  # the step counts of the runs before a resume
        self.seconds = 0.0  # of training in this epoch, when the clock was last read
        self.history: History = {"steps": [], "epochs": []}

    def doubts(self) -> Iterator[str]:
        """What may be wrong with its data or with lam."""
        splits = {"training": self.train_split, "validation": self.validation, "test": self.test_split}
        for name, split in splits.items():
            if split is not None and len(split.labels.unique()) == 1:
                always = "a model that always says so is 100 % right, under every attack"
                yield f"all {name} images are of one class: {always}"
        if doubt := self.config.doubt_of_lam(min(self.shape["in_shape"][1:], default=0)):
            yield doubt

    def remarks(self) -> list[str]:
        """What is to be said of how steps run, each once: some of it is known after the first steps only."""
        found = [*self._remarks, self._stepping.remark]
        self._remarks.clear()
        if isinstance(self.train_split, Stream):  # with which the others share it
            found += self.train_split.corrupt.news()
        self._stepping.remark = None
        return [each for each in found if each is not None]

    def unreadable(self) -> dict[str, Any]:
        """By name, with the reason, the pictures that this process could not read and went past, if there are any."""
        found = self.train_split.corrupt.found if isinstance(self.train_split, Stream) else {}
        return {"unreadable": found} if found else {}

    def take_step(self, x: Tensor, y: Tensor) -> None:
        """The step that comes next: the loss of a batch, and an optimiser step or more."""
        eps = self.course.eps(self.step)
        if self.config.eps_warmup:
            self.criterion.eps = eps
            if self.guard is not None:
                self.guard.eps = eps
            if eps == self.config.eps and self.step and self.course.eps(self.step - 1) < eps:
                # Its weight follows from E_lin, which grows like eps^4: the history so far is that of another one.
                for module in self.criterion.modules():
                    if isinstance(module, AutoLambda):
                        module.restart()
        if self.plan.begins_phase(self.step):
            self._stepping.begin_anew()  # batches of another size
            for module in self.criterion.modules():
                if isinstance(module, AdaptiveLambda):
                    module.restart()  # E_lin of one phase says nothing of the next
        first, *others = self.course.rates(self.step)
        optimizers.steer(self.optimizer, *first)
        self._stepping(x, y, settled=eps == self.config.eps, **self.options)
        for following in others:  # with the same gradient
            optimizers.steer(self.optimizer, *following)
            self.optimizer.step()
        if self.guard is not None:
            self.guard.step(x, y)

    def step_counts(self) -> dict[str, int]:
        """With ``skip_below``: the steps so far with all points in the graph, and those with x_adv alone."""
        stats = self.criterion.stats
        names = [name for name in ("full_steps", "light_steps") if name in stats]
        return {**self.counted, **{name: self.counted.get(name, 0) + int(stats[name]) for name in names}}

    def upcoming(self, steps: int) -> Iterator[tuple[Tensor, Tensor]]:
        """The batch of each of the next steps; methods that replay batches get each several times in a row.

        ``options`` are then what the criterion takes beside it.
        """
        while steps > 0:
            epoch, start = self.plan.place(self.step // self.replays)
            phase = self.plan.phase(self.step // self.replays)
            upcoming = self._batches(batch_size=phase.batch_size, image_size=phase.image_size, epoch=epoch, start=start)
            for number, (x, y, samples) in enumerate(upcoming, start):
                x, y = self._mixing(x, y, derived_seed(self.config.seed, epoch, number, _MIXING))
                self.options = {"samples": samples} if self.criterion.per_sample else {}
                for _ in range(min(steps, self.replays - self.step % self.replays)):
                    steps -= 1
                    yield x, y
                if steps == 0:
                    return

    def kept_beside_weights(self) -> list[Tensor]:
        """The optimiser's and the criterion's numbers: AdamW's moments may be infinite behind weights that are not."""
        states = (*self.optimizer.state.values(), self.criterion.state_dict())
        values = (value for state in states for value in state.values() if isinstance(value, Tensor))
        return [value for value in values if value.device.type == self.device.type]  # AdamW may count on the CPU

    def save(self) -> None:
        """Write the checkpoint; every process has to call it."""
        cuda = torch.cuda.get_rng_state(self.device) if self.device.type == "cuda" else None
        # Free AT keeps a state of this process' share; that of other criteria is the same in all processes, and what is
        # kept for each training sample too large to be saved for each of them.
        criterion = {} if self.criterion.per_sample and not self.ranks.is_main else self.criterion.state_dict()
        own = {
            "rng": {"cpu": torch.get_rng_state(), "cuda": cuda},
            "sums": self.meter.state(),
            "criterion": {name: value.cpu() for name, value in criterion.items()},
        }
        owns = self.ranks.gather(own)
        if not self.ranks.is_main:
            return
        average = {} if self.average is None else self.average.state_dict()
        scaler = {} if self._stepping.scaler is None else self._stepping.scaler.state_dict()
        guard = {} if self.guard is None else self.guard.state_dict()
        state = {"average": average, "optimizer": optimizers.saved(self.optimizer), "scaler": scaler, **own}
        state["guard"] = guard
        state["other_ranks"] = owns[1:]
        checkpoint.save(self.path, {**self._now("trained"), **state})

    def save_weights(self, weights: str, path: Path) -> None:
        """Write the ``trained`` or ``averaged`` weights as a checkpoint that can be evaluated but not resumed."""
        rest: dict[str, Any] = {name: {} for name in checkpoint.OF_A_RUN}
        checkpoint.save(path, {**self._now(weights), **rest, "other_ranks": []})

    def _now(self, weights: str) -> dict[str, Any]:
        """What every checkpoint has."""
        return {
            "config": asdict(self.config),
            "shape": self.shape,
            "class_names": self.class_names,
            "data": self.data_digest,
            "step": self.step,
            "step_counts": self.step_counts(),
            "seconds": self.seconds,
            "weights": weights,
            "initial_weights": self.initial_weights,
            "model": self.evaluated(weights).state_dict(),
            "history": self.history,
        }

    def evaluated(self, weights: str) -> nn.Module:
        """The model with its ``trained`` or ``averaged`` weights."""
        if weights == "trained":
            return self.model
        assert self.average is not None
        averaged: nn.Module = self.average.ready()
        return averaged

    def restore(self, saved: dict[str, Any]) -> None:
        """Continue from a checkpoint's state."""
        checkpoint.load_weights(self.model, saved, self.path)
        with checkpoint.fitting(self.path):
            self._restore(saved)

    def _restore(self, saved: dict[str, Any]) -> None:
        steps, epochs = saved["step"], saved["history"]["epochs"]
        own = [saved, *saved["other_ranks"]][self.ranks.rank]
        checks.integer("step", steps, low=0, high=self.steps)
        done, under_way = self.plan.place(steps)
        if len(epochs) != done or bool(own["sums"]) != bool(under_way):
            raise ValueError(f"history: expected that of {steps} steps, got {len(epochs)} epochs")
        optimizers.restore(self.optimizer, saved["optimizer"], begun=steps > 0, cycled=self.config.momentum_cycle > 0)
        if self._stepping.scaler is not None:
            self._stepping.scaler.load_state_dict(saved["scaler"])
        if self.average is not None:
            self.average.load_state_dict(saved["average"])
        if self.guard is not None:
            self.guard.load_state_dict(saved["guard"])
        self.step, self.history = steps, saved["history"]
        self.counted, self.seconds = saved["step_counts"], saved["seconds"]
        self.criterion.load_state_dict(saved["criterion"] if self.criterion.per_sample else own["criterion"])
        self.meter.restore(own["sums"])
        torch.set_rng_state(own["rng"]["cpu"])
        if self.device.type == "cuda" and own["rng"]["cuda"] is not None:
            torch.cuda.set_rng_state(own["rng"]["cuda"], self.device)
