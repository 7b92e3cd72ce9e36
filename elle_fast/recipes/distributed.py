"""The processes that torchrun starts to train one model; one process alone is the simplest case."""

from __future__ import annotations

import os
import platform
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from datetime import timedelta
from pathlib import Path
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from elle_fast._core import checks

T = TypeVar("T")

# How long processes wait while one evaluates alone. One that dies ends the wait at once: its connections close.
_PATIENCE = timedelta(days=1)


def world_size() -> int:
    """The number of processes that torchrun started; 1 without it.

    Raises:
        ValueError: if the environment's ``WORLD_SIZE`` is not a number >= 1.
    """
    text = os.environ.get("WORLD_SIZE", "1")
    if not text.isdecimal() or int(text) < 1:
        raise ValueError(f"WORLD_SIZE: expected an integer >= 1 in the environment, got {text!r}")
    return int(text)


def local_device(name: str) -> str:
    """The device that ``name`` means here: ``auto`` is a GPU if there is one; under torchrun, each process has its own.

    Raises:
        ValueError: for a device that torch cannot use here, or one GPU that all processes would share.
    """
    if not isinstance(name, str):
        raise TypeError(f"device: expected a string, got {checks.describe(name)}")
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    if world_size() > 1 and name != "cpu":
        own = f"cuda:{os.environ.get('LOCAL_RANK', '0')}"
        if name not in ("cuda", own):
            raise ValueError(f"device: expected 'cpu' or 'cuda' under torchrun, which numbers the GPUs, got {name!r}")
        name = own
    try:
        torch.empty(0, device=name)
    except (RuntimeError, AssertionError) as error:  # torch without CUDA asserts
        raise ValueError(f"device: expected one that torch can use here, got {name!r}: {error}") from error
    return name


def _has_ended(node: str, pid: int) -> bool:
    """Whether a process of this machine has ended; False for one of another machine."""
    if node != platform.node():
        return False
    try:
        os.kill(pid, 0)
        # One that its parent has not asked for yet is a zombie; systems without this file do not tell.
        with suppress(OSError):
            return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "Z"
    except ProcessLookupError:
        return True
    except PermissionError:
        pass
    return False


@contextmanager
def process_group(device: torch.device, timeout: float) -> Iterator[bool]:
    """Connect torchrun's processes: by NCCL if this one trains on a CUDA ``device``, else by Gloo.

    A process that waits longer than ``timeout`` seconds for another one raises an error. Yields whether this is
    process 0, the only one that prints.

    Raises:
        TypeError, ValueError: unless ``device`` is a torch.device and ``timeout`` a number > 0.
    """
    if not isinstance(device, torch.device):
        raise TypeError(f"device: expected a torch.device, got {checks.describe(device)}")
    checks.real("timeout", timeout, low=0, low_allowed=False)
    if world_size() == 1:
        yield True
        return
    if not dist.is_available():
        raise RuntimeError("WORLD_SIZE: expected 1 with a torch that was built without torch.distributed")
    cuda = device.type == "cuda"
    if cuda:
        torch.cuda.set_device(device)
    dist.init_process_group(
        "nccl" if cuda else "gloo", timeout=timedelta(seconds=timeout), device_id=device if cuda else None
    )
    yield dist.get_rank() == 0
    # Not after an error, when it could wait for a process that is gone.
    dist.destroy_process_group()


class Ranks:
    """This process, number ``rank`` of the ``count`` in the default process group; alone if there is none.

    Process 0 (``is_main``) writes files and lines. A method raises RuntimeError if it waits longer than ``timeout``
    seconds for another process.
    """

    def __init__(self, timeout: float) -> None:
        checks.real("timeout", timeout, low=0, low_allowed=False)
        connected = dist.is_available() and dist.is_initialized()
        self.rank, self.count = (dist.get_rank(), dist.get_world_size()) if connected else (0, 1)
        self.is_main = self.rank == 0
        self._group, self._patient = None, None
        if self.count > 1:  # Gloo, so that Python objects travel without a GPU
            self._group = dist.new_group(backend="gloo", timeout=timedelta(seconds=timeout))
            self._patient = dist.new_group(backend="gloo", timeout=_PATIENCE)
        self._processes: list[Any] = [None] * self.count  # machine and process number by rank
        if self.count > 1:
            dist.all_gather_object(self._processes, (platform.node(), os.getpid()), group=self._group)
        self._earlier: tuple[dist.Work, Tensor] | None = None

    def close(self) -> None:
        """End the connections; no method may be called afterwards."""
        for group in (self._group, self._patient):
            if group is not None:
                dist.destroy_process_group(group)

    @contextmanager
    def naming_the_lost(self) -> Iterator[None]:
        """The error of a broken connection names the ranks that are gone, and how to go on."""
        try:
            yield
        except RuntimeError as error:
            if self.count == 1 or not (isinstance(error, dist.DistError) or "gloo" in str(error)):
                raise
            gone = self._gone()
            who = f"rank {', '.join(map(str, gone))} of {self.count} is gone"
            if not gone:
                who = f"one of {self.count} ranks is gone, or took longer than the timeout"
            first = str(error).splitlines()[0]
            raise RuntimeError(f"{who}; start all of them again with --resume ({first})") from error

    def _gone(self) -> list[int]:
        """The ranks on this machine whose processes have ended."""
        for _ in range(20):  # a connection closes a little before its process has ended
            if gone := [rank for rank, (node, pid) in enumerate(self._processes) if _has_ended(node, pid)]:
                return gone
            time.sleep(0.05)
        return []

    def on_main(self, make: Callable[[], T], *, patient: bool = False) -> T:
        """Call ``make`` in process 0; its result or error reaches every process. ``patient`` ones have no timeout."""
        if self.count == 1:
            return make()
        answer: list[Any] = [None, None]
        if self.is_main:
            try:
                answer[0] = make()
            except Exception as error:
                answer[1] = error
        dist.broadcast_object_list(answer, src=0, group=self._patient if patient else self._group)
        if answer[1] is not None:
            raise answer[1]
        value: T = answer[0]
        return value

    def gather(self, value: T) -> list[T]:
        """The values of all processes by rank in process 0; an empty list in the others."""
        if self.count == 1:
            return [value]
        values: list[Any] = [None] * self.count if self.is_main else []
        dist.gather_object(value, values if self.is_main else None, dst=0, group=self._group)
        return values

    def sum(self, tensor: Tensor) -> Tensor:
        """The sum over the processes, the same bits in each."""
        if self.count == 1:
            return tensor
        total = tensor.clone()
        dist.all_reduce(total)
        return total

    def any(self, flag: bool) -> bool:
        """Whether the flag is set in any process."""
        if self.count == 1:
            return flag
        total = torch.tensor(int(flag))
        dist.all_reduce(total, group=self._group)
        return bool(total)

    def any_earlier(self, flag: bool) -> bool:
        """Whether the flag of the previous call was set in any process; a process alone gets the flag of this call.

        All get the same answer, and wait only until all have made the previous call.
        """
        if self.count == 1:
            return flag
        total, earlier = torch.tensor(int(flag)), self._earlier
        work = dist.all_reduce(total, group=self._group, async_op=True)
        assert work is not None
        self._earlier = work, total
        if earlier is None:
            return False
        earlier[0].wait()
        if found := bool(earlier[1]):
            work.wait()  # the connections may be closed after this call
        return found
