"""Where the time of an epoch of ``elle-fast train`` goes, by torch's profiler; the labels are put around from here."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any
from unittest import mock

import torch
from torch.autograd.profiler_util import FunctionEvent
from torch.profiler import ProfilerActivity, profile, record_function

from benchmarks.harness.tables import rounded
from benchmarks.step.train_rows import ROWS, Net, Place, Recipe
from elle_fast import ELLELoss
from elle_fast.linearity import LocalLinearity

# Full steps where there are two kinds.
PROFILED = ("elle-a", "fast", "fast bf16", "fast bf16 compiled")
PARTS = ("attack", "packing", "forward", "loss", "backward", "optimiser", "data", "host")

ABOUT = {
    "profile": "milliseconds of a step by what it does, full steps with --fast: spans that the benchmark puts around "
    "the library's functions, each without the spans inside it; loss is the rest of the criterion, host that of the "
    "loop, with its log and what it counts. The profiler itself adds to small operations. On CUDA nothing is captured, "
    "and the device is waited for after each span",
    "operators": "the ten operators with the most time of their own, milliseconds of a step",
}
_PREFIX = "part: "
_LEFT_OUT = "the end of an epoch"


def profiles(net: Net, names: Sequence[str], options: argparse.Namespace) -> dict[str, Any]:
    """Of each row."""
    with Place(options.device) as place:
        return {name: _profile(net, name, place) for name in names}


def _profile(net: Net, name: str, place: Place) -> dict[str, Any]:
    eager = {"capture": False} if place.device.type == "cuda" else {}  # a replayed graph has no spans
    recipe = Recipe(net, place, **ROWS[name].options, **eager)
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if place.device.type == "cuda" else [])]

    def epoch() -> None:
        if ROWS[name].kinds:
            recipe.hold("full")
        with labelled(recipe):
            recipe.epoch()

    epoch()
    with profile(activities=activities) as profiled:
        epoch()
    events = list(profiled.events())
    steps = net.batches
    averages = sorted(profiled.key_averages(), key=lambda each: -each.self_cpu_time_total)
    shown = [each for each in averages if not each.key.startswith(_PREFIX)][:10]
    parts = spans(events)
    return {
        "parts": {part: rounded(1e-3 * parts.get(part, 0.0) / steps) for part in PARTS},
        "operators": {each.key: rounded(1e-3 * each.self_cpu_time_total / steps) for each in shown},
    }


@contextmanager
def labelled(recipe: Recipe) -> Iterator[None]:
    """Spans around what an epoch of a recipe calls."""
    run = recipe.run
    with ExitStack() as stack:
        for owner, name, part in (
            (LocalLinearity, "attacked", "attack"),
            (LocalLinearity, "pack", "packing"),
            (LocalLinearity, "rows", "forward"),
            (ELLELoss, "forward", "loss"),
            (torch.Tensor, "backward", "backward"),
            (run.optimizer, "step", "optimiser"),
            (recipe.loop, "_end_epoch", _LEFT_OUT),
        ):
            stack.enter_context(mock.patch.object(owner, name, _spanned(getattr(owner, name), part)))
        upcoming = run.upcoming

        def spanned(steps: int) -> Iterator[Any]:
            batches = upcoming(steps)
            following = _spanned(lambda: next(batches, None), "data")
            while (batch := following()) is not None:
                yield batch

        stack.enter_context(mock.patch.object(run, "upcoming", spanned))
        with _span("host"):
            yield


def _spanned(function: Callable[..., Any], part: str) -> Callable[..., Any]:
    def call(*args: Any, **kwargs: Any) -> Any:
        with _span(part):
            return function(*args, **kwargs)

    return call


@contextmanager
def _span(part: str) -> Iterator[None]:
    with record_function(_PREFIX + part):
        yield
        if torch.cuda.is_available():
            torch.cuda.synchronize()


def spans(events: Sequence[FunctionEvent]) -> dict[str, float]:
    """Microseconds of each part, without the parts inside it."""
    found: dict[str, float] = {}
    around: list[tuple[str, float]] = []  # the spans that hold the next one, and their ends
    own = [event for event in events if event.name.startswith(_PREFIX) and event.device_type.name == "CPU"]
    for event in sorted(own, key=lambda event: (event.time_range.start, -event.time_range.end)):
        part, begin, end = event.name.removeprefix(_PREFIX), event.time_range.start, event.time_range.end
        while around and around[-1][1] <= begin:
            around.pop()
        found[part] = found.get(part, 0.0) + end - begin
        if around:
            found[around[-1][0]] -= end - begin
        around.append((part, end))
    return found
