"""What the guard saw, and what came of it."""

from __future__ import annotations

from dataclasses import dataclass

ACTIONS = ("elle", "rollback", "stop", "alarm")


class CollapsedError(RuntimeError):
    """The guard was asked to stop at an alarm; weights and optimiser are those of the last healthy snapshot."""


@dataclass(frozen=True)
class Alarm:
    """What the guard saw and did: in ``step`` it noticed that ``signal`` has ``value`` beyond ``limit``.

    ``back_to`` is the step of the snapshot that weights and optimiser are of now; ``None``: as they were.
    """

    step: int
    signal: str
    value: float
    limit: float
    back_to: int | None

    def line(self, action: str) -> str:
        """It, and what a guard with this ``action`` did, in a line."""
        seen = f"guard: {self.signal} is {self.value:.3g}, beyond {self.limit:.3g}, in step {self.step}"
        if action == "alarm":
            return seen
        went = "the weights stay as they are" if self.back_to is None else f"back to step {self.back_to}"
        then = {"elle": ", and E_lin in the loss for a while", "rollback": "", "stop": ", and stop"}[action]
        return f"{seen}; {went}{then}"
