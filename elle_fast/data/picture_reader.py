"""What reads the pictures of a stream, in worker processes or in the one that asks, and what is said of broken ones."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.data import Dataset as Indexed

from elle_fast._core import checks
from elle_fast.data.readers.decoding import decoding, optional
from elle_fast.data.sources import Source
from elle_fast.data.views import View


class Corrupt:
    """The pictures that could not be read, by name with the reason, and how many of them are let pass in a process."""

    def __init__(self, allowed: int = 0) -> None:
        self.allowed = checks.integer("skip_corrupt", allowed, low=0)
        self.found: dict[str, str] = {}
        self._news: list[str] = []

    def add(self, failure: tuple[str, Exception]) -> None:
        """Take one in; the error itself if there are more than are let pass."""
        name, error = failure
        if name in self.found:
            return
        self.found[name] = str(error)
        if (count := len(self.found)) > self.allowed:
            if self.allowed:
                others = (
                    f"{count} pictures cannot be read, more than skip_corrupt {self.allowed}: {', '.join(self.found)}"
                )
                raise type(error)(f"{error} ({others})") from error
            raise error
        self._news.append(f"skipped a picture that cannot be read ({count} of at most {self.allowed}): {error}")

    def news(self) -> list[str]:
        """A line for each that was found since the last call."""
        said, self._news = self._news, []
        return said


class Asked(NamedTuple):
    """The places in the split that a worker reads at a time, and the (seed, epoch) of their augmentation."""

    places: NDArray[np.int64]
    drawn_from: tuple[int, int] | None


class Read(NamedTuple):
    """What a worker hands out: uint8 [B, H, W, C], the places in the split that they are from, and what failed.

    ``whole``: whether all were read.
    """

    images: Tensor
    places: Tensor
    failures: list[tuple[str, Exception]]
    whole: bool


class Reader(Indexed[Read]):
    """Reads, decodes and augments; this is what worker processes have."""

    def __init__(
        self, source: Source, view: View, rows: Tensor, *, in_shape: tuple[int, int, int], allowed: int
    ) -> None:
        self.source, self.view, self.rows, self.allowed = source, view, rows.numpy(), allowed
        channels, height, width = in_shape
        self.shape = height, width, channels

    def __getitem__(self, asked: Asked) -> Read:
        images = np.empty((len(asked.places), *self.shape), dtype=np.uint8)
        places, failures, whole = asked.places.copy(), list[tuple[str, Exception]](), True
        for k, place in enumerate(asked.places.tolist()):
            # In place of a picture that cannot be read, the next one in the split that can.
            for step in range(min(self.allowed + 1, len(self.rows))):
                found = (place + step) % len(self.rows)
                try:
                    images[k] = self._picture(found, place, asked.drawn_from)
                    places[k] = found
                    break
                except (OSError, ValueError) as error:
                    failures.append((self.source.name(int(self.rows[found])), type_of(error)(str(error))))
            else:  # too many, which ends the run
                whole = False
                break
        return Read(torch.from_numpy(images), torch.from_numpy(places), failures, whole)

    def _picture(self, found: int, place: int, drawn_from: tuple[int, int] | None) -> NDArray[np.uint8]:
        row = int(self.rows[found])
        name, pillow = self.source.name(row), optional("PIL.Image")  # a module could not be sent to a process
        with decoding(name):
            data = self.source.read(row)
        with decoding(f"{name} ({len(data)} bytes)"):
            if drawn_from is None:
                image = self.view.of_test(pillow, data)
            else:
                image = self.view.of_training(pillow, data, (*drawn_from, place, 0))
        if image.shape != self.shape:
            sizes = [f"{shape[1]}x{shape[0]}" for shape in (self.shape, image.shape)]
            expected = f"expected pictures of one size, {sizes[0]} as the first (width x height)"
            raise ValueError(f"{name}: {expected}, got {sizes[1]}; give image_size to crop and resize them")
        return image


def type_of(error: Exception) -> type[Exception]:
    """A type that a worker's error has in the process that asked: one that is made of a message alone."""
    return OSError if isinstance(error, OSError) else ValueError
