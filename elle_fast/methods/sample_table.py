"""What a method keeps for each training sample, by its place in the training set."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.distributed as dist
from torch import Tensor, nn

from elle_fast._core import checks


class SampleTable(nn.Module):
    """A row for each training sample, ``[samples, ...]`` of one dtype, on the device of the batches.

    It is empty until :meth:`fill`, which takes the rows' shape from a batch. ``state_dict`` holds the rows.

    With several processes each has the whole table, and it is the same in all: a sample's next epoch may be another
    process' turn. So :meth:`fill` sends out those of process 0, and :meth:`write` exchanges the rows of all shares of a
    batch, which have to be of equal size: 3,072 bytes a CIFAR image in int8, where weights are 45 MB a step.
    """

    values: Tensor

    def __init__(self, samples: int, dtype: torch.dtype) -> None:
        super().__init__()
        self.samples, self.dtype = checks.integer("samples", samples, low=1), dtype
        self.values = torch.empty(0, dtype=dtype, device="cpu")

    @property
    def filled(self) -> bool:
        """Whether it has rows."""
        return self.values.numel() > 0

    def fill(self, x: Tensor, numbers: Callable[[Tensor], object]) -> None:
        """Begin anew with rows of the shape of x's, into which ``numbers`` writes."""
        self.values = torch.empty((self.samples, *x.shape[1:]), dtype=self.dtype, device=x.device)
        numbers(self.values)
        if _processes() > 1:
            dist.broadcast(self.values, 0)

    def read(self, index: Tensor, x: Tensor) -> Tensor:
        """The rows of the samples ``index``, those of the batch x; a copy.

        Raises:
            ValueError: if x has another shape than the rows, or a sample is not one of the training set's (on a GPU
                torch ends in a device-side assertion).
        """
        if self.values.shape[1:] != x.shape[1:]:
            raise ValueError(
                f"x: expected samples of shape {list(self.values.shape[1:])}, as those of which the criterion keeps "
                f"something, got {checks.describe(x)}"
            )
        self.values = self.values.to(x.device)
        try:
            return self.values.index_select(0, index)
        except (IndexError, RuntimeError) as error:
            if index.is_cuda:
                raise
            lowest, highest = index.aminmax()
            raise ValueError(
                f"samples: expected places in [0, {self.samples}), the size of the training set that the criterion was "
                f"built for, got some from {int(lowest)} to {int(highest)}"
            ) from error

    def write(self, index: Tensor, rows: Tensor) -> None:
        """Replace the rows of the samples ``index``."""
        count = _processes()
        if count == 1:
            self.values.index_copy_(0, index, rows)
            return
        indices = [torch.empty_like(index) for _ in range(count)]
        shares = [torch.empty_like(rows, memory_format=torch.contiguous_format) for _ in range(count)]
        dist.all_gather(indices, index.contiguous())
        dist.all_gather(shares, rows.contiguous())
        for places, share in zip(indices, shares, strict=True):  # a sampler may give one sample to two processes
            self.values.index_copy_(0, places, share)

    # Not a buffer, whose shape a checkpoint would have to share.
    def get_extra_state(self) -> Tensor:
        """The rows, for ``state_dict``."""
        return self.values

    def set_extra_state(self, state: Tensor) -> None:
        """The rows, from ``load_state_dict``."""
        if not isinstance(state, Tensor):
            raise TypeError(f"criterion: expected what it keeps of samples as a tensor, got {checks.describe(state)}")
        if state.dtype != self.dtype or len(state) not in (0, self.samples):
            raise ValueError(
                f"criterion: expected the state of {self.samples} training samples, {self.dtype}, got "
                f"{checks.describe(state)}: that of another training set or method"
            )
        self.values = state.clone()

    def extra_repr(self) -> str:
        """Size and dtype, as ``repr`` shows them."""
        return f"samples={self.samples}, dtype={self.dtype}"


def averaged(value: Tensor) -> Tensor:
    """The mean of a 0-dim tensor over the processes that train together."""
    count = _processes()
    if count == 1:
        return value
    value = value.clone()
    dist.all_reduce(value)
    return value / count


def _processes() -> int:
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1
