import pytest
import torch

from benchmarks.harness.device import Device


def test_a_replay_that_is_not_finite_or_not_the_call_is_an_error():
    device = Device(dry=True)
    found = device.replay({"one": [lambda: torch.ones(2)] * 2}, repeatable=True)
    assert len(found["one"].seconds) == 1
    with pytest.raises(AssertionError, match="not finite"):
        device.replay({"nan": [lambda: torch.tensor(float("nan"))]}, repeatable=False)
    with pytest.raises(AssertionError, match="not close"):
        device.replay({"random": [lambda: torch.rand(2)]}, repeatable=True)


@pytest.mark.gpu
def test_a_device_times_its_calls_by_events_replays_and_the_host():
    device = Device(dry=False)
    small, large = (torch.rand(elements, device="cuda") for elements in (1 << 12, 1 << 27))
    events = device.events({"small": small.clone, "large": large.clone})
    assert 0 < events["small"].median < events["large"].median
    assert all(len(samples.seconds) >= 10 for samples in events.values())
    # Half a gigabyte read and written, at no more than ten times the bandwidth of today's fastest memory.
    assert events["large"].median > 2 * large.nbytes / 80e12
    replayed = device.replay({"small": [small.clone] * 24, "double": [lambda: 2 * small] * 24}, repeatable=True)
    # Without the launches of the host, a call of a graph is no slower than one alone.
    assert 0 < replayed["small"].median < 2 * events["small"].median
    assert 0 < device.host({"small": small.clone})["small"].median < 1e-3
    assert device.launches(lambda: 2 * small) == 1


@pytest.mark.gpu
def test_the_waits_of_a_call_for_the_device_are_counted():
    device = Device(dry=False)
    x = torch.rand(4, device="cuda")
    assert device.waits(lambda: 2 * x) == 0
    assert device.waits(lambda: [x.sum().item(), x.max().item()]) == 2
