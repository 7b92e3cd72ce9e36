"""Inputs that cannot be what ``bounds`` says: an error on the CPU, on a GPU a warning that nothing waits for."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

from elle_fast import ELLELoss, LocalLinearity, attacks, methods, ranges
from elle_fast._core import checks
from elle_fast._core.host_copy import HostCopy
from elle_fast.ops import dispatch
from elle_fast.testing import no_host_sync
from tests.errors.cases import refused
from tests.helpers import Called, MustNotBeCalled, Smooth, built, labels, random

EPS = 0.03
BOX = (0.0, 1.0)
CALLS: dict[str, Callable[..., Any]] = {
    **{name: partial(attack, eps=EPS, bounds=BOX) for name, attack in attacks.SINGLE_STEP.items()},
    "pgd": partial(attacks.pgd, eps=EPS),  # whose default bounds are these
    "ELLELoss": ELLELoss(EPS, bounds=BOX),
    "ELLELoss-none": ELLELoss(EPS, bounds=BOX, attack="none", norm="l2"),
    "LocalLinearity": LocalLinearity(EPS, bounds=BOX),
    **{f"methods-{name}": Called(built(name, eps=EPS, bounds=BOX)) for name in methods.NAMES},
}
calls = pytest.mark.parametrize("name", CALLS)


def batch(dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
    return random(4, 5, seed=1, dtype=dtype), labels(4, 3)


def net() -> nn.Module:
    return Smooth(5, 3)


@calls
def test_inputs_outside_the_bounds_are_refused(name):
    x, y = batch()
    kinds: list[tuple[Tensor, str]] = [(x * 3 - 1, "from -"), (x * 255, "from "), (-x, "to -0.")]
    one = torch.tensor([1])
    for bad, got in (*kinds, (x.index_fill(1, one, math.nan), "nan"), (x.index_fill(1, one, math.inf), "inf")):
        refused(ValueError, "x", got, CALLS[name], MustNotBeCalled(), bad, y)


@calls
def test_inputs_within_the_bounds_are_taken(name):
    x, y = batch()
    CALLS[name](net(), x, y)
    CALLS[name](net(), torch.stack([torch.zeros(5), torch.ones(5)] * 2), y)


@calls
def test_a_batch_is_looked_at_once(name, monkeypatch):
    """A method and its attack both ask; a batch that was changed in place is another one."""
    looks: list[Any] = []
    outside = ranges._outside

    def counted(*args: Any) -> str | None:
        looks.append(args)
        return outside(*args)

    monkeypatch.setattr(ranges, "_outside", counted)
    model, (x, y) = net(), batch()
    for count in (1, 2):
        CALLS[name](model, x, y)
        assert len(looks) == count
        x.mul_(0.9)
    with torch.inference_mode():
        kept = x.clone()
    for count in (3, 4):
        ranges.check_range(kept, BOX)
        assert len(looks) == count
    x.mul_(300)
    for _ in range(2):  # what was refused is refused again
        refused(ValueError, "x", "from ", CALLS[name], MustNotBeCalled(), x, y)
    ranges.check_range(x, (0.0, 300.0))
    refused(ValueError, "x", "from ", CALLS[name], MustNotBeCalled(), x, y)  # within other bounds


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("bounds", [(0.0, 1.0), (-1.0, 1.0), (0.0, 255.0), (-2.1179, 2.64), (0.1, 0.7)])
def test_roundings_are_allowed_and_no_more(dtype, bounds):
    low, high = bounds
    x = (random(4, 50, seed=2, dtype=torch.float64) * (high - low) + low).to(dtype)
    x[0, :2] = torch.tensor(bounds, dtype=torch.float64)
    ranges.check_range(x, bounds)
    back = (x - 0.449) / 0.226 * 0.226 + 0.449  # normalized and put back
    ranges.check_range(back, bounds)
    eps, largest = torch.finfo(dtype).eps, max(map(abs, bounds))
    for sign, edge in ((-1, low), (1, high)):
        x = torch.full((2, 3), (low + high) / 2, dtype=dtype)
        x[1, 2] = edge + sign * 8 * eps * largest
        with pytest.raises(ValueError, match=r"^x: expected values within bounds="):
            ranges.check_range(x, bounds)


def test_no_bounds_no_check():
    x, y = batch()
    attacks.fgsm(net(), x * 9 - 4, y, EPS)
    attacks.pgd(net(), x * 9 - 4, y, EPS, bounds=None)
    ELLELoss(EPS)(net(), x * 9 - 4, y)


def test_bounds_of_normalized_inputs():
    x, y = batch()
    assert ELLELoss(EPS, bounds=(-1.0, 2.0))(net(), x * 3 - 1, y).isfinite()
    pixels = ELLELoss(EPS, bounds=BOX, mean=[0.5] * 5, std=[0.25] * 5)
    assert pixels(net(), x, y).isfinite()
    refused(ValueError, "x", "normalization belongs into", pixels, MustNotBeCalled(), (x - 0.5) / 0.25, y)


def test_values_are_not_looked_at_where_there_are_none():
    x, y = batch()
    bad = x * 9
    with FakeTensorMode() as mode:
        ranges.check_range(mode.from_tensor(bad), BOX)
    ranges.check_range(bad.to("meta"), BOX)

    def checked(t: Tensor) -> Tensor:
        ranges.check_range(t, BOX)
        return t + 1

    compiled: Any = torch.compile(checked, backend="eager", fullgraph=True)
    assert torch.equal(compiled(bad), bad + 1)
    assert torch.equal(torch.func.vmap(checked)(bad), bad + 1)
    # A step is tested on the CPU for what would wait on a GPU, where this would not.
    criterion = ELLELoss(EPS, bounds=BOX)
    with no_host_sync():
        criterion(net(), x, y)


# ---- On a GPU, whose copy to the host is in the test's hands


class Copies:
    """Stands for copies to the host: each is there when ``arrive`` was called."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.sent: list[Tensor] = []
        self.there = False
        monkeypatch.setattr(HostCopy, "start", self.send)

    def send(self, values: Tensor) -> HostCopy:
        self.there = False
        self.sent.append(torch.full_like(values, math.nan))
        self.values = values
        return HostCopy(values, values._version, self.sent[-1], self)  # type: ignore[arg-type]

    def query(self) -> bool:
        """The event's."""
        return self.there

    def arrive(self) -> None:
        self.sent[-1].copy_(self.values)
        self.there = True


@pytest.fixture
def copies(monkeypatch):
    return Copies(monkeypatch)


def test_a_warning_when_the_copy_is_there(copies):
    watch, (x, _) = ranges._Watch(), batch()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for _ in range(5):  # of which none reads what is not there yet
            watch.look(x * 3 - 1, BOX)
    assert len(copies.sent) == 1
    copies.arrive()
    with pytest.warns(
        UserWarning, match=r"^x: expected values within bounds=\(0.0, 1.0\), got some from -0.* to 1.*once"
    ):
        watch.look(x, BOX)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for _ in range(300):  # once is enough
            watch.look(x * 3 - 1, BOX)
    assert len(copies.sent) == 1


def test_the_first_batch_and_every_hundredth_are_looked_at(copies):
    watch, (x, _) = ranges._Watch(), batch()
    sent = []
    for _ in range(301):
        before = len(copies.sent)
        watch.look(x, BOX)
        sent.append(len(copies.sent) - before)
        copies.arrive()
    assert [i for i, count in enumerate(sent) if count] == [0, 100, 200, 300]


def test_a_later_batch_is_seen_with_its_own_bounds(copies):
    watch, (x, _) = ranges._Watch(), batch()
    for i in range(101):
        watch.look(x * 3 - 1 if i == 100 else x, BOX)
        copies.arrive()
    with pytest.warns(UserWarning, match=r"bounds=\(0.0, 1.0\)"):
        watch.look(x, (-9.0, 9.0))


def test_nothing_waits_for_the_device(copies):
    watch, (x, _) = ranges._Watch(), batch()
    with no_host_sync():
        for _ in range(3):
            watch.look(x * 3, BOX)
    assert len(copies.sent) == 1


def test_tensors_of_a_gpu_are_watched(monkeypatch):
    seen: list[Any] = []
    monkeypatch.setattr(ranges._watch, "look", lambda x, bounds: seen.append(bounds))
    capturing = iter([False, True])
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: next(capturing))

    class OnCuda:
        dtype, device, is_cuda = torch.float32, torch.device("cuda:0"), True

    monkeypatch.setattr(checks, "have_memory", lambda x: True)
    monkeypatch.setattr(dispatch, "eager", lambda x: True)
    x: Any = OnCuda()
    for _ in range(2):
        ranges.check_range(x, BOX)
    assert seen == [BOX]  # nothing is put into a graph


# ---- Pictures of which nothing says what they are


@pytest.fixture
def pixel_watch(monkeypatch):
    """As in a new process, which has not warned yet."""
    watch = ranges._Watch(ranges._not_pixels)
    monkeypatch.setattr(ranges, "_pixel_watch", watch)
    return watch


def pictures(channels: int = 3) -> tuple[Tensor, Tensor, nn.Module]:
    x = random(4, channels, 4, 4, seed=1)
    return x, labels(4, 3), nn.Sequential(nn.Flatten(), nn.Linear(16 * channels, 3))


UNTOLD: dict[str, Callable[..., Any]] = {
    **{name: partial(attack, eps=EPS) for name, attack in attacks.SINGLE_STEP.items()},
    "ELLELoss": ELLELoss(EPS),
    "ELLELoss-none": ELLELoss(EPS, clamp="none"),
    "LocalLinearity": LocalLinearity(EPS),
    "methods-n-fgsm": built("n-fgsm", eps=EPS),
    "methods-plain+elle": built("plain+elle", eps=EPS),
}
TOLD: dict[str, dict[str, Any]] = {
    "any": {"bounds": "any"},
    "bounds": {"bounds": (-3.0, 3.0)},
}


@pytest.mark.parametrize("name", UNTOLD)
@pytest.mark.parametrize("channels", [1, 3])
def test_a_warning_once_of_pictures_that_are_no_pixels(name, channels, pixel_watch):
    x, y, model = pictures(channels)
    normalized = (x - 0.5) / 0.25
    with pytest.warns(
        UserWarning, match=r"^x: expected pictures in \[0, 1\].* from -[12].* to [12].*mean=.*'any'.*once"
    ):
        UNTOLD[name](model, normalized, y)
    UNTOLD[name](model, normalized, y)  # a second warning would be an error
    assert pixel_watch.warned


@pytest.mark.parametrize("name", UNTOLD)
def test_no_warning_of_pixels_rows_or_maps(name, pixel_watch):
    x, y, model = pictures()
    UNTOLD[name](model, x, y)
    UNTOLD[name](model, torch.stack([torch.zeros(3, 4, 4), torch.ones(3, 4, 4)] * 2), y)
    pixel_watch.calls = 0
    UNTOLD[name](model, ((x - 0.449) / 0.226) * 0.226 + 0.449, y)
    UNTOLD[name](model, (x * 9).flatten(1), y)  # rows
    UNTOLD[name](model, x.reshape(4, 4, 4, 3) * 9, y)  # four channels
    assert not pixel_watch.warned


@pytest.mark.parametrize("told", TOLD)
def test_no_warning_where_it_is_said_what_x_is(told, pixel_watch):
    x, y, model = pictures()
    x, options = x * 4 - 2, TOLD[told]
    for attack in (*attacks.SINGLE_STEP.values(), attacks.pgd):
        attack(model, x, y, EPS, **options)  # type: ignore[operator]
    for clamp in ("all", "attack", "triplets", "none"):
        ELLELoss(EPS, clamp=clamp, **options)(model, x, y)
        for name in ("fgsm", "n-fgsm+elle", "plain+elle", "gat+elle", "advmixup-single+elle"):
            methods.build(name, eps=EPS, clamp=clamp, **options)(model, x, y)
    LocalLinearity(EPS, **options)(model, x, y)
    for name in ("n-aaer", "advmixup-single", "pgd-at", "n-fgsm"):
        methods.build(name, eps=EPS, **options)(model, x, y)
    ELLELoss(EPS, mean=[0.5] * 3, std=[0.25] * 3)(model, x, y)
    assert pixel_watch.calls == 0


def test_any_clamps_nothing(pixel_watch):
    x, y, model = pictures()
    x = x * 4 - 2
    found = attacks.fgsm(model, x, y, EPS, bounds="any")
    pixel_watch.warned = True
    assert torch.equal(found, attacks.fgsm(model, x, y, EPS))
    assert ELLELoss(EPS, bounds="any").packing.bounds is None
    refused(TypeError, "bounds", "'all'", ELLELoss, EPS, bounds="all")


def test_pictures_are_looked_at_now_and_then(pixel_watch, monkeypatch):
    looks: list[Any] = []
    monkeypatch.setattr(pixel_watch, "say", lambda values, bounds: looks.append(values))
    x, _, _ = pictures()
    for _ in range(201):
        ranges.check_pixels(x)
    assert len(looks) == 3


def test_a_warning_of_pictures_when_the_copy_is_there(copies):
    watch, (x, _, _) = ranges._Watch(ranges._not_pixels), pictures()
    with no_host_sync():
        watch.look(x * 3 - 1, BOX)
    copies.arrive()
    with pytest.warns(UserWarning, match=r"^x: expected pictures in \[0, 1\]"):
        watch.look(x, BOX)


def test_pictures_without_values_are_left_alone(pixel_watch):
    with FakeTensorMode():
        ranges.check_pixels(torch.ones(2, 3, 4, 4) * 9)
    ranges.check_pixels(torch.ones(2, 3, 4, 4, device="meta"))
    ranges.check_pixels(torch.full((2, 3, 4, 4), math.nan))  # of which other checks speak
    assert not pixel_watch.warned
