"""Common random numbers: dropout and other random layers draw alike at x_adv, x_a, x_b and x_c of a sample.

With a mask for each row, E_lin would be the variance of the masks and not the curvature of the model. No change of the
model is needed: what is drawn from torch's default generators during a forward pass is drawn for the samples, and
repeated in each sample's rows. How, is found out in the first step that draws something, by forward passes that are
thrown away. A model without random layers has neither a mode nor another pass: the generators' states are compared.

Not seen: random numbers from elsewhere (NumPy, a generator of the model's own), from generators of devices other than
the CPU and the inputs' own, and those in a step that ``torch.compile`` compiles as a whole.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from enum import IntEnum
from functools import cache
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.compiler import is_compiling
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils._python_dispatch import TorchDispatchMode

from elle_fast._core import rng_states
from elle_fast._core.buffers import Buffers
from elle_fast._core.compiled import is_compiled
from elle_fast._core.unwrapping import Model, module_of, unwrapped
from elle_fast.ops.elle_loss.reference import widen

__all__ = ["Draws", "Level", "RandomLayers"]

T = TypeVar("T")


class Level(IntEnum):
    """What a model's random layers need; each level covers what those before it cover."""

    NOTHING = 0  # nothing is drawn
    ROWS = 1  # a dispatch mode draws for the samples and repeats
    ATTENTION = 2  # and attention whose kernel draws its own dropout is computed by plain operations
    BLOCKS = 3  # a forward pass for each point, all from one state of the generators


class RandomLayers:
    """What is known of a model's random layers: :meth:`run` begins with nothing and learns from the first steps."""

    def __init__(self) -> None:
        self.level = Level.NOTHING
        self.looked: bool | None = None  # in which mode of the model, in the last step
        self.overwrites = True  # whether the model changes what it is given

    def run(
        self, step: Callable[[Draws, Model], T], model: Model, x: Tensor, samples: int, *, rewind: bool = False
    ) -> T:
        """``step(draws, model)``, again at a higher level if the model draws what this one does not cover.

        Args:
            step: makes its forward passes by :meth:`Draws.passes`.
            model: may be wrapped: a repetition calls what is inside, as one pass a step goes through the wrapper.
            x: the points.
            samples: how many the points belong to.
            rewind: let the generators go back, so that the next passes draw the same.
        """
        if is_compiling():
            return step(Draws(Level.NOTHING, samples, None), model)
        # A pass that is thrown away leaves no trace, so that a resumed run has the same bits.
        module = module_of(model)
        mode = module is None or module.training
        kept = Buffers(module) if self.looked is not mode and module is not None else None
        if self.looked is not mode and x.is_cuda and module is not None and _cudnn_draws(module):
            warnings.warn(_IN_CUDNN, stacklevel=4)
        self.looked = mode
        while True:
            capturing = x.is_cuda and torch.cuda.is_current_stream_capturing()
            # In inference mode operations reach a mode before they are taken apart, and what they draw does not.
            level = Level.BLOCKS if self.level and torch.is_inference_mode_enabled() else self.level
            draws = Draws(level, samples, None if capturing else x.device, copies=self.overwrites)
            result = step(draws, model)
            needed = draws.needs(model)
            if needed > level:
                self.level = needed
                if needed == Level.BLOCKS and not draws.apart:
                    warnings.warn(_IN_BLOCKS, stacklevel=4)
            self.overwrites = draws.overwritten()
            # A model that has begun to change the points in place: the next step is the first one that is right.
            if needed == level or (self.overwrites and not draws.copies):
                draws.end(rewind)
                return result
            draws.end(rewind=True)
            model = unwrapped(model)
            del result  # its graph, before there is a second one
            if kept is not None:
                kept.restore()


class Draws:
    """The forward passes of one step at one level. Without a ``device`` the generators' states are out of reach."""

    def __init__(self, level: Level, samples: int, device: torch.device | None, copies: bool = False) -> None:
        self.level, self.needed, self.samples, self.device, self.copies = level, level, samples, device, copies
        self.start = rng_states.read(device)
        self.after: list[Tensor] | None = None
        self.begun, self.apart = False, False
        self.given: list[Tensor] = []

    def passes(
        self,
        function: Callable[..., T],
        blocks: Sequence[int],
        parts: Sequence[int],
        *inputs: Tensor | None,
        alike: bool = True,
    ) -> Iterator[tuple[Callable[..., T], Sequence[Tensor | None]]]:
        """What each forward pass calls, and its share of the inputs; a sample draws the same in all of them.

        Args:
            function: the forward pass; each draw within it is repeated in the pass' blocks.
            blocks: rows of each point.
            parts: rows of each pass, as long as the blocks can share one.
            inputs: what is cut into these parts.
            alike: whether the step is wrong where a later pass cannot draw what the first one drew.
        """
        cut, left = [], iter(blocks)
        for rows in blocks if self.level == Level.BLOCKS else parts:
            cut.append([next(left)])
            while sum(cut[-1]) < rows:
                cut[-1].append(next(left))
        self.apart = len(cut) == len(blocks)
        sizes = list(map(sum, cut))
        split = [[None] * len(cut) if each is None else self._own(each, sizes) for each in inputs]
        for *these, within in zip(*split, cut, strict=True):
            self._begin(alike or len(cut) > 2)
            yield self._common(function, within), these

    def _own(self, each: Tensor, sizes: Sequence[int]) -> list[Tensor]:
        """The parts. Nobody else reads one, so a model may change it in place."""
        if is_compiling() or each.requires_grad:  # as the points of alpha's ascent
            return [each] if len(sizes) == 1 else [part.clone() for part in each.split(sizes)]
        # As ``data`` each has a version of its own: autograd does not take a change for one of the parts before.
        parts = [part.clone() if self.copies else part.data for part in each.split(sizes)]
        self.given += parts
        return parts

    def overwritten(self) -> bool:
        """Whether a pass has changed what it was given."""
        return any(part._version > 0 for part in self.given if not part.is_inference())

    def _begin(self, alike: bool) -> None:
        again, self.begun = self.begun, True
        if not again or self.level == Level.NOTHING or (self.device is None and not alike):
            return
        self.after = self.after or rng_states.read(self.device)
        self._restore(self.start)

    def _common(self, function: Callable[..., T], blocks: Sequence[int]) -> Callable[..., T]:
        if self.level in (Level.NOTHING, Level.BLOCKS):
            return function

        def call(*inputs: Any) -> T:
            with ExitStack() as stack:
                if self.level == Level.ATTENTION:
                    stack.enter_context(sdpa_kernel(SDPBackend.MATH))
                stack.enter_context(_Repeating(self, blocks))
                return function(*inputs)

        return call

    def needs(self, model: Model) -> Level:
        """The level that the model has turned out to need."""
        if self.level == Level.NOTHING and self.moved(self.start):
            return Level.BLOCKS if is_compiled(model) else Level.ROWS
        return self.needed

    def moved(self, before: Sequence[Tensor]) -> bool:
        """Whether something has been drawn since the generators were in these states."""
        pairs = zip(before, rng_states.read(self.device), strict=True)
        return any(rng_states.differ(then, now) for then, now in pairs)

    def end(self, rewind: bool) -> None:
        """Let the generators go on from where the first pass has left them, or from the start."""
        if rewind:
            self.after = self.start
        if self.after is not None and (self.level > Level.NOTHING or self.moved(self.start)):
            self._restore(self.after)

    def _restore(self, states: Sequence[Tensor]) -> None:
        if self.device is None:
            raise RuntimeError(
                "model: a CUDA graph cannot repeat random numbers (dropout?) from one forward pass to the next, as "
                "forward='checkpoint', alpha='argmax', points='elle-2p' in two passes and random layers that are "
                "compiled or checkpointed need it"
            )
        rng_states.write(self.device, states)


_IN_BLOCKS = (
    "model: its random layers (compiled, checkpointed, drawn by kernels of their own, or of a shape that does not tell "
    "which rows they are for) cannot draw alike for a sample's points in one forward pass; from now on x_adv, x_a, x_b "
    "and x_c have a pass each, as with forward='checkpoint'. With triplet_fraction < 1 the x_b of points='elle-2p' has "
    "other masks all the same"
)


_IN_CUDNN = (
    "model: cuDNN draws the dropout between recurrent layers in a way that cannot be repeated, and E_lin counts it as "
    "curvature; use dropout=0 there, and nn.Dropout between layers of one each"
)


class _Repeating(TorchDispatchMode):
    """Draws for the samples and repeats in each block, wherever what is drawn has an entry for each row of the pass.

    The rows are the dimension that is as long as they are: the first, or the second of three, as in sequences that are
    not batch-first; not both. One number is common to all rows as it is. Of any other draw it cannot be told what it
    is for (weights, rows with heads or frames, a part of the rows): it needs a pass for each point. Weights that are by
    chance as long as the rows are taken for them.
    """

    def __init__(self, draws: Draws, blocks: Sequence[int]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.draws, self.blocks, self.rows = draws, blocks, sum(blocks)
        self.around = (_hooks(), torch.is_grad_enabled())

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        seeded = _seeded(func)
        if seeded is None:
            # An operation of another library, whose draws inside are not seen.
            before = rng_states.read(self.draws.device)
            result = func(*args, **kwargs)
            if self.draws.moved(before):
                self.draws.needed = Level.BLOCKS
            return result
        if not seeded or _no_dropout(func, args, kwargs):
            return func(*args, **kwargs)
        if types or self.around != (_hooks(), torch.is_grad_enabled()):
            # Tensors that wrap others; or activation checkpointing in the model, which recomputes outside of this mode.
            self.draws.needed = Level.BLOCKS
            return func(*args, **kwargs)
        return self._draw(func, args, kwargs)

    def _draw(self, func: Any, args: Any, kwargs: Any) -> Any:
        name, names = func._schema.name.removeprefix("aten::"), [each.name for each in func._schema.arguments]
        if func._overloadname.endswith("out"):
            self.draws.needed = Level.BLOCKS
            return func(*args, **kwargs)
        if "size" in names:
            at = names.index("size")
            size, dim = self._size(args[at])
            if dim is None:
                return func(*args, **kwargs)
            return self._repeated(func(*args[:at], size, *args[at + 1 :], **kwargs), dim)
        filled = args[0] if name in _FILLING else None
        if not isinstance(filled, Tensor):
            fused = name.startswith("_scaled_dot_product") and self.draws.level < Level.ATTENTION
            self.draws.needed = max(self.draws.needed, Level.ATTENTION if fused else Level.BLOCKS)
            return func(*args, **kwargs)
        size, dim = self._size(filled.shape)
        if dim is None:
            return func(*args, **kwargs)
        if name == "native_dropout":
            mask = self._repeated(func(filled.new_empty(size), *args[1:], **kwargs)[1], dim)
            return filled * mask * (0.0 if args[1] == 1 else 1 / (1 - args[1])), mask
        if name.startswith("bernoulli") and func._overloadname in ("default", "Tensor"):
            # The probability may be another in each row.
            uniform = filled.new_empty(size, dtype=widen(args[-1]).dtype).uniform_(**kwargs)
            drawn = (self._repeated(uniform, dim) < args[-1]).to(filled.dtype)
        else:
            drawn = self._repeated(func(filled.new_empty(size), *args[1:], **kwargs), dim)
        return filled.copy_(drawn) if name.endswith("_") else drawn

    def _size(self, size: Sequence[int]) -> tuple[list[int], int | None]:
        """The size for the samples instead of the rows, and the dimension that they are."""
        samples, (first, second) = list(size), [length == self.rows for length in (*size, 0, 0)[:2]]
        three = len(size) == 3
        if (first and not (three and second)) or (three and second and not first):
            samples[0 if first else 1] = self.draws.samples
            return samples, 0 if first else 1
        if math.prod(size) > 1:
            self.draws.needed = Level.BLOCKS
        return samples, None

    def _repeated(self, drawn: Tensor, dim: int) -> Tensor:
        return torch.cat([drawn.narrow(dim, 0, rows) for rows in self.blocks], dim)


# What is drawn into, or like, a tensor whatever its values. (normal without "_" takes tensors of means.)
_DISTRIBUTIONS = ("bernoulli", "cauchy", "exponential", "geometric", "log_normal", "random", "uniform")
_FILLING = {name for each in _DISTRIBUTIONS for name in (each, f"{each}_")}
_FILLING |= {"normal_", "rand_like", "randn_like", "randint_like", "native_dropout"}


@cache
def _seeded(func: Any) -> bool | None:
    """Whether an operation draws from a generator; None if it does not say so."""
    known = isinstance(func, torch._ops.OpOverload) and func.namespace == "aten"
    return torch.Tag.nondeterministic_seeded in func.tags if known else None


def _no_dropout(func: Any, args: Any, kwargs: Any) -> bool:
    """Whether an attention or a dropout draws nothing."""
    for at, argument in enumerate(func._schema.arguments):
        if argument.name in ("dropout_p", "train"):
            value = args[at] if at < len(args) else kwargs.get(argument.name, argument.default_value)
            return value is False or (argument.name == "dropout_p" and not value)
    return False


def _hooks() -> Any:
    """The innermost hooks of saved tensors, by which activations are checkpointed."""
    top = getattr(torch._C._autograd, "_top_saved_tensors_default_hooks", None)  # not public
    return None if top is None else top(False)


def _cudnn_draws(model: Model) -> bool:
    modules = model.modules() if isinstance(model, nn.Module) else ()
    return any(isinstance(each, nn.RNNBase) and each.dropout and each.training for each in modules)
