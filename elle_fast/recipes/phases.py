"""A training in phases: epochs, batch size and image side of each, and where among them a step is."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from itertools import accumulate
from typing import TYPE_CHECKING

from elle_fast import data
from elle_fast._core import checks

if TYPE_CHECKING:
    from elle_fast.methods import Method
    from elle_fast.recipes.config import TrainConfig

_EXPECTED = "phases: expected EPOCHS:SIDE:BATCH, separated by commas, such as 6:128:512,6:224:224,3:288:128"


@dataclass(frozen=True)
class Phase:
    """Epochs with one batch size and one image side; ``image_size=None``: that of the data."""

    epochs: int
    batch_size: int
    image_size: int | None = None


def parse(text: str) -> tuple[Phase, ...]:
    """``"6:128:512,3:288:128"`` as phases.

    Raises:
        TypeError, ValueError: for another form, or a number below 1.
    """
    if not isinstance(text, str):
        raise TypeError(f"{_EXPECTED}, got {checks.describe(text)}")
    found = []
    for part in text.split(","):
        numbers = part.strip().split(":")
        if len(numbers) != 3 or not all(number.isdecimal() and int(number) > 0 for number in numbers):
            raise ValueError(f"{_EXPECTED}, got {text!r}")
        epochs, side, batch_size = map(int, numbers)
        found.append(Phase(epochs, batch_size, side))
    return tuple(found)


def own(config: TrainConfig, method: Method) -> dict[str, int]:
    """The epochs and the batch size, of the first phase, that a run with phases has; nothing of one without.

    Raises:
        TypeError, ValueError: for phases of another form, other epochs or another batch size beside them, or a method
            that counts the steps of an epoch.
    """
    if config.phases is None:
        return {}
    found = parse(config.phases)
    numbers = {"epochs": sum(phase.epochs for phase in found), "batch_size": found[0].batch_size}
    for name, number in numbers.items():
        if getattr(config, name) not in (None, number):
            raise ValueError(f"{name}: contradicts phases, {config.phases!r}, got {getattr(config, name)}")
    if method.replays > 1 or "epoch_steps" in method.takes:
        why = "counts the steps of an epoch, of which each phase has others"
        raise ValueError(f"phases: method {config.method!r} {why}, so this option does not apply")
    if "samples" in method.takes and len({phase.image_size for phase in found}) > 1:
        why = "keeps something for each training image, of one size"
        raise ValueError(f"phases: method {config.method!r} {why}, so its sides must be alike, got {config.phases!r}")
    return numbers


def of_run(config: TrainConfig) -> tuple[Phase, ...]:
    """The phases of a resolved run; without any, it is one."""
    assert config.epochs is not None
    assert config.batch_size is not None
    return (Phase(config.epochs, config.batch_size),) if config.phases is None else parse(config.phases)


def check_sides(config: TrainConfig, dataset: data.Dataset) -> None:
    """Raise ValueError, naming ``phases``, for another side than that of images that are in memory."""
    if config.phases is None or dataset.streamed:
        return
    height, width = dataset.train.in_shape[1:]
    for phase in of_run(config):
        if (phase.image_size, phase.image_size) != (height, width):
            advice = "; --stream always reads pictures in any side" * data.of_pictures(config.data)
            got = f"got {phase.image_size} for images of {height}x{width} that are in memory"
            raise ValueError(f"phases: expected the side of the images, {got}{advice}")


class Plan:
    """Which epoch and phase each step of a run belongs to.

    Args:
        phases: in order, at least one.
        epoch_steps: the steps of an epoch with a batch size.

    Attributes:
        epochs, steps: of the whole run.
    """

    def __init__(self, phases: tuple[Phase, ...], epoch_steps: Callable[[int], int]) -> None:
        self.phases = phases
        self._epoch_steps = [epoch_steps(phase.batch_size) for phase in phases]
        self._epochs = [0, *accumulate(phase.epochs for phase in phases)]  # before each phase
        lengths = [phase.epochs * steps for phase, steps in zip(phases, self._epoch_steps, strict=True)]
        self._steps = [0, *accumulate(lengths)]
        self.epochs, self.steps = self._epochs[-1], self._steps[-1]

    def _phase_of(self, step: int) -> int:
        """The index of the phase of ``step``; that of the last one behind the end."""
        return max(index for index in range(len(self.phases)) if self._steps[index] <= step)

    def phase(self, step: int) -> Phase:
        """The phase of ``step``, from 0."""
        return self.phases[self._phase_of(step)]

    def place(self, step: int) -> tuple[int, int]:
        """The epoch of ``step``, and the step's number in it, both from 0."""
        index = self._phase_of(step)
        epoch, within = divmod(step - self._steps[index], self._epoch_steps[index])
        return self._epochs[index] + epoch, within

    def epoch_steps(self, step: int) -> int:
        """The steps of the epoch of ``step``."""
        return self._epoch_steps[self._phase_of(step)]

    def position(self, step: float) -> float:
        """The epochs that are over after ``step`` steps, with the part of the one under way."""
        index = self._phase_of(int(step))
        return self._epochs[index] + (step - self._steps[index]) / self._epoch_steps[index]

    def begins_phase(self, step: int) -> bool:
        """Whether ``step`` is the first of a phase, but for the first phase."""
        return step in self._steps[1:-1]
