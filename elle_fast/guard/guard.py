"""The guard: it looks at the model after a step, and goes back if the judge finds a collapse."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from elle_fast._core import checks, ddp, user_line
from elle_fast._core.host_copy import HostCopy
from elle_fast._core.unwrapping import unwrapped
from elle_fast._core.without_trace import without_trace
from elle_fast.guard.alarm import ACTIONS, Alarm, CollapsedError
from elle_fast.guard.judge import Finding, Judge
from elle_fast.guard.looking import in_precision, looking
from elle_fast.guard.probe import HeldOut, Probe
from elle_fast.guard.snapshots import Snapshots
from elle_fast.linearity import LocalLinearity
from elle_fast.ops.elle_loss.validation import check_relative
from elle_fast.passes import ModelKwargs
from elle_fast.weighing import relative_parts

SAMPLES = 16  # of a batch, for relative E_lin
_RETURNS = 3  # to one snapshot: what did not hold so often will not
_OPTIONS = {"logits", "loss_fn", "mean", "std", "triplet_precision", "backend"}


class CollapseGuard:
    r"""Watches any single-step adversarial training, and takes it back when it collapses.

    ::

        guard = CollapseGuard(model, optimizer, eps=8 / 255, held_out=(x_val, y_val))
        for x, y in loader:
            loss = my_loss(model, x, y) + guard.penalty(x, y)  # 0 but after an alarm
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            guard.step(x, y)

    Signals, each on or off:

    - *linearity*: relative E_lin (:func:`~elle_fast.functional.relative_linearity`) of the first 16 samples of the
      batch, every ``every`` steps, averaged over ``horizon`` of these, is above ``threshold``. Costs 48 rows' forward
      passes each time: at a batch of 128, every 6 steps, 0.06 forward passes a step. The default threshold was
      chosen by trainings at 16/255 and tried at 8 and 26/255 (docs/guides/guard.md).
    - *probe*: with ``held_out``, the accuracy under PGD-10 every ``probe_every`` steps has fallen below half of the
      best so far, by more than three standard deviations, where that best was above 1.5 times chance: a model that
      never was robust has not collapsed. Costs 21 passes over the held-out samples each time.
    - *falls*: with ``losses=`` of :meth:`step`, which a loop has anyway, the share of samples whose loss fell along the
      attack's step, averaged over 10 steps, is above ``falls``.

    At an alarm, after which there is no other one for ``margin`` steps, ``action`` is ``"elle"``: go back to the last
    healthy snapshot and add ``lam`` E_lin to the loss for ``rescue_steps`` steps (:meth:`penalty`); ``"rollback"``: go
    back, and leave the rest to the loop, which can take a smaller attack step while :attr:`rescuing` is true;
    ``"stop"``: go back and raise :class:`CollapsedError`; ``"alarm"``: nothing but ``on_alarm``.

    Two snapshots are kept, at least ``snapshot_every`` and ``margin`` steps apart, each of weights, buffers, optimiser,
    and what is in ``also``; the newest of finite weights that is at least ``margin`` steps old is gone back to. The
    learning rates stay, and so do torch's generators: the batches that follow are others too. The first snapshot is of
    the first step, so a collapse in the first steps goes back to there. Within ``margin`` steps there is nothing to go
    back to, and it goes back to one snapshot three times in a row at most; then the weights stay, and a warning says
    so.

    The guard draws from a generator of its own, and its passes leave no trace on the model: a training without an alarm
    is the training without the guard, to the bit. Three numbers of a signal in a row that are not finite are an alarm
    too. Numbers are read ``every`` steps after they were made or later, so that nothing waits for the device. Under
    torch.distributed all ranks see the sums over all of them, and decide alike.

    Args:
        model: as it is trained.
        optimizer: that moves it.
        eps: radius of the ball, in units of x.
        bounds: range of x, for triplets and PGD; ``None``: none; ``"any"``: none, and no warning if pictures are not in
            [0, 1].
        norm: ``"linf"`` or ``"l2"``.
        held_out: x and y of samples that are not trained on, for the probe, y int64 ``[B]`` or probabilities
            ``[B, C]``, and perhaps the model's other arguments for them, as ``model_kwargs`` of :meth:`step`; ``None``:
            no probe. They go to the dtype and device of the batches. Under torch.distributed each process may have
            others.
        also: what else goes back: an averaged model, a GradScaler, a criterion. Objects with ``state_dict``.
        linearity: whether that signal is on.
        every, horizon, threshold, probe_every, falls, margin, snapshot_every, rescue_steps: as above; integers >= 1,
            ``threshold`` and ``falls`` in [0, 1].
        lam: weight of E_lin after an alarm, >= 0.
        action: one of :data:`ACTIONS`.
        on_alarm: called with an :class:`Alarm`.
        on_host: keep the snapshots in the host's memory rather than on the model's device.
        seed: of the guard's own draws.
        options: of :class:`~elle_fast.LocalLinearity`: ``logits``, ``loss_fn``, ``mean`` and ``std`` (for a model that
            takes normalised inputs; x is not), ``triplet_precision`` (of the probe too; where the weights are float32
            and nothing is given, ``"fp32"``: rounding looks like curvature), ``backend``.

    Raises:
        TypeError, ValueError: naming the argument, what was expected and what was got.
    """

    def __init__(
        self,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        *,
        eps: float,
        bounds: tuple[float, float] | str | None = (0.0, 1.0),
        norm: str = "linf",
        held_out: HeldOut | None = None,
        also: Iterable[Any] = (),
        linearity: bool = True,
        every: int = 6,
        horizon: int = 6,
        threshold: float = 0.35,
        probe_every: int = 300,
        falls: float = 0.05,
        margin: int = 50,
        snapshot_every: int = 100,
        rescue_steps: int = 400,
        lam: float = 4000.0,
        action: str = "elle",
        on_alarm: Callable[[Alarm], None] | None = None,
        on_host: bool = False,
        seed: int = 0,
        **options: Any,
    ) -> None:
        if not isinstance(model, nn.Module):
            raise TypeError(f"model: expected a torch.nn.Module, got {checks.describe(model)}")
        if not isinstance(optimizer, torch.optim.Optimizer):
            raise TypeError(f"optimizer: expected a torch.optim.Optimizer, got {checks.describe(optimizer)}")
        for name, steps in (("every", every), ("horizon", horizon), ("probe_every", probe_every)):
            checks.integer(name, steps, low=1)
        for name, steps in (("margin", margin), ("snapshot_every", snapshot_every), ("rescue_steps", rescue_steps)):
            checks.integer(name, steps, low=1)
        checks.known("CollapseGuard", options, _OPTIONS)
        checks.optional("on_alarm", on_alarm, Callable, "a function of an Alarm")
        self.model, self.action = model, checks.choice("action", action, ACTIONS)
        self.linearity, self.every = checks.flag("linearity", linearity), every
        checks.real("threshold", threshold, low=0, high=1)
        self._judge = Judge(horizon, threshold, checks.real("falls", falls, low=0, high=1))
        self.probe_every, self.margin, self.snapshot_every = probe_every, margin, snapshot_every
        self.rescue_steps, self.lam, self.on_alarm = rescue_steps, checks.real("lam", lam, low=0), on_alarm
        device = next((each.device for each in model.parameters()), torch.device("cpu"))
        self._generator = torch.Generator(device).manual_seed(checks.integer("seed", seed, low=0))
        whole = all(each.dtype == torch.float32 for each in model.parameters() if each.is_floating_point())
        given = {"triplet_precision": "fp32" if whole else None, **options}
        self._elin = LocalLinearity(eps, bounds=bounds, norm=norm, generator=self._generator, **given)
        check_relative(self._elin.options.alone)
        self._probe = None if held_out is None else Probe(held_out, self._elin, bounds)
        self._snapshots = Snapshots(model, optimizer, also, on_host=checks.flag("on_host", on_host))
        self.alarms: list[Alarm] = []
        self._step = 0
        self._rescue_until = 0
        self._quiet_until = 0  # numbers of earlier steps are those of weights that are gone, or on their way
        self._sent: deque[tuple[str, int, Tensor | HostCopy]] = deque()

    @property
    def eps(self) -> float:
        """The radius, which may be set, as in a warm-up."""
        return self._elin.eps

    @eps.setter
    def eps(self, value: float) -> None:
        if value != self._elin.eps:  # what a model withstood at another radius says nothing of this one
            self._judge.forget_best()
            self._sent = deque(each for each in self._sent if each[0] != "probe")
        self._elin.eps = value

    @property
    def rescuing(self) -> bool:
        """Whether the training is within ``rescue_steps`` steps of an alarm."""
        return self._step < self._rescue_until

    @property
    def hopeful(self) -> bool:
        """Whether an alarm, now or once a snapshot is old enough, could take the training back to finite weights."""
        step = self._snapshots.nearest(self._step) if self.action != "alarm" else None
        return step is not None and not self._in_vain(step)

    def penalty(self, x: Tensor, target: Tensor, model_kwargs: Mapping[str, Any] | None = None) -> Tensor | float:
        """What to add to the loss of this batch: ``lam`` E_lin after an alarm with ``action="elle"``, else 0.0.

        The arguments are those of :meth:`step`.
        """
        if not self.rescuing or self.action != "elle":
            return 0.0
        with in_precision(self.model, self._elin.triplet_precision):
            e_lin = self._elin(self.model, self._unrounded(x), target, model_kwargs=model_kwargs)
        return ddp.with_all_passes(self.model, self.lam * e_lin)

    def step(
        self,
        x: Tensor,
        target: Tensor,
        model_kwargs: Mapping[str, Any] | None = None,
        *,
        losses: tuple[Tensor, Tensor] | None = None,
    ) -> None:
        """Look at the model; call it after each optimiser step, with the batch of that step.

        Args:
            x, target: the clean batch.
            model_kwargs: what else the model takes, as in :meth:`ELLELoss.forward <elle_fast.ELLELoss.forward>`: a
                tensor whose dimension 0 is the batch goes with the samples.
            losses: of each sample ``[B]``, at the point where the attack took its gradient and at x_adv.

        Raises:
            TypeError, ValueError: for a batch that is none.
            CollapsedError: at an alarm with ``action="stop"``.
        """
        x = self._unrounded(x)
        self._elin.check(x, target)
        if losses is not None:
            if not isinstance(losses, (tuple, list)) or len(losses) != 2:
                raise TypeError(f"losses: expected two tensors [B], got {checks.describe(losses)}")
            before, after = losses
            if not all(isinstance(each, Tensor) and each.shape == x.shape[:1] for each in losses):
                got = f"{checks.describe(before)} and {checks.describe(after)}"
                expected = f"losses: expected two tensors [B = {len(x)}], before and after the attack's step"
                raise ValueError(f"{expected}, got {got}")
        self._step += 1
        if self._step % self.every == 0:
            self._read()
        if losses is not None:
            fell = (after < before).sum().float()
            fell = fell.where((before.isfinite() & after.isfinite()).all(), torch.nan)  # no loss of NaN falls
            self._send("falls", torch.stack([fell, torch.full_like(fell, len(after))]))
        if self.linearity and self._step % self.every == 0:
            kwargs = ModelKwargs.of(model_kwargs, x.shape[0])
            first = kwargs._replace(values=tuple(value[:SAMPLES] for value in kwargs.values))
            self._send("linearity", self._relative(x[:SAMPLES], target[:SAMPLES], first))
        if self._probe is not None and self._step % self.probe_every == 0:
            self._send("probe", self._probe.withstood(self.model, x))
        if self._worth_keeping():
            self._snapshots.take(self._step)

    def _worth_keeping(self) -> bool:
        if self._step == 1:  # not before: batch norm has seen nothing then
            return self.action != "alarm"
        # Two of them less than the margin apart would leave none that is old enough.
        apart = max(self.snapshot_every, self.margin)
        due = self._step >= max(self._quiet_until, self._snapshots.newest + apart)
        due = due and self.action != "alarm" and self._step % self.every == 0
        return due and self._judge.calm(["linearity"] if self.linearity else [])

    def _unrounded(self, x: Tensor) -> Tensor:
        """x in float32 for passes in float32, whatever the training rounds it to."""
        rounded = isinstance(x, Tensor) and x.dtype in (torch.float16, torch.bfloat16)
        return x.float() if rounded and self._elin.triplet_precision == "fp32" else x

    def _relative(self, x: Tensor, target: Tensor, kwargs: ModelKwargs) -> Tensor:
        """Numerator and denominator of relative E_lin ``[2]``."""
        elin = self._elin
        with looking(self.model, x.device, elin.triplet_precision), without_trace(self.model):
            rows, alpha = elin.triplets(unwrapped(self.model), x, target, elin.packing, None, kwargs)
            return relative_parts(elin.loss_fn, rows, target, alpha, elin.options.alone).float()

    def _send(self, signal: str, numbers: Tensor) -> None:
        """Sum a signal's numbers over the ranks and send them to the host."""
        if dist.is_available() and dist.is_initialized() and (ranks := dist.get_world_size()) > 1:
            ddp.refuse_join(self.model, "CollapseGuard, which sums its numbers")
            dist.all_reduce(numbers)
            if signal == "probe":  # of the same samples, perhaps: as many as each process has
                numbers /= ranks
        self._sent.append((signal, self._step, HostCopy.start(numbers) or numbers))

    def _read(self) -> None:
        """Judge what was sent ``every`` steps ago or earlier, and has arrived long since."""
        while self._sent and self._step - self._sent[0][1] >= self.every:
            signal, step, numbers = self._sent.popleft()
            early = step < self._quiet_until
            found = None if early else self._judge.take_in(signal, *numbers.tolist(), step=step)
            if found is not None:
                self._act(found)
                return

    def _act(self, found: Finding) -> None:
        back_to, why = None, f"no snapshot is {self.margin} steps old and finite"
        if self.action != "alarm":
            nearest = self._snapshots.nearest(self._step - self.margin)
            if nearest is not None and self._in_vain(nearest):
                why = f"the last {_RETURNS} returns to step {nearest} did not hold"
            elif nearest is not None:
                back_to = self._snapshots.go_back(nearest)
        alarm = Alarm(self._step, *found, back_to)
        self.alarms.append(alarm)
        self._judge.forget(back_to)
        self._quiet_until = self._step + self.margin
        if self.action != "alarm":
            self._rescue_until = self._step + self.rescue_steps
            if back_to is None:
                seen = f"{found.signal} is {found.value:.3g} in step {self._step}"
                user_line.warn(f"CollapseGuard: {seen}, and {why}: the weights stay as they are")
        if self.on_alarm is not None:
            self.on_alarm(alarm)
        if self.action == "stop":
            raise CollapsedError(f"the training collapsed: {alarm}")

    def _in_vain(self, step: int) -> bool:
        """Whether the last returns were all to the snapshot of this step."""
        returns = [each.back_to for each in self.alarms if each.back_to is not None]
        return returns[-_RETURNS:] == [step] * _RETURNS

    def state_dict(self) -> dict[str, Any]:
        """All that a resumed training needs to go on as if it had not stopped, the snapshots among it."""
        sent = [(signal, step, numbers.tolist()) for signal, step, numbers in self._sent]
        return {
            "step": self._step,
            "eps": self.eps,
            "rescue_until": self._rescue_until,
            "quiet_until": self._quiet_until,
            "judge": self._judge.state_dict(),
            "sent": sent,
            "alarms": [asdict(alarm) for alarm in self.alarms],
            "generator": self._generator.get_state(),
            "snapshots": self._snapshots.state_dict(),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from what :meth:`state_dict` gave.

        Raises:
            KeyError, ValueError, RuntimeError: for another state.
        """
        self._snapshots.load_state_dict(state["snapshots"])  # which refuses those of another model
        self._step, self.eps = state["step"], state["eps"]
        self._rescue_until, self._quiet_until = state["rescue_until"], state["quiet_until"]
        self._judge.load_state_dict(state["judge"])
        self._sent = deque(
            (signal, step, torch.tensor(numbers, device="cpu")) for signal, step, numbers in state["sent"]
        )
        self.alarms = [Alarm(**alarm) for alarm in state["alarms"]]
        self._generator.set_state(state["generator"].cpu())
