from functools import partial

from benchmarks.harness import timing
from benchmarks.harness.timing import DRY, Pace, Samples, Side


def test_sides_take_turns_and_a_slow_one_sits_out(monkeypatch):
    now, order = [0.0], []
    monkeypatch.setattr("benchmarks.harness.timing.time.perf_counter", lambda: now[0])

    def side(name: str, seconds: float) -> Side:
        def call() -> None:
            order.append(name)
            now[0] += seconds

        return Side(call)

    pace = Pace(sample=1.0, side=20.0, fewest=2, most=4)
    found = timing.in_turns({"fast": side("fast", 0.5), "slow": side("slow", 8.0)}, pace)
    assert found["fast"].calls == 2
    assert found["fast"].seconds == [0.5] * 4
    assert found["slow"].seconds == [8.0] * 2
    # One or two calls to warm up; then a call that is not timed before each sample of several.
    assert "".join(name[0] for name in order) == "ffs" + 2 * "ffffffs"
    # A millisecond of them, if they are short.
    order.clear()
    short = timing.in_turns({"fast": side("fast", 0.0003)}, Pace(sample=0.002, side=0.01, fewest=2, most=2))["fast"]
    assert (short.calls, len(order)) == (7, 2 + 2 * (4 + 7))


def test_what_runs_before_a_call_is_not_timed(monkeypatch):
    now = [0.0]
    monkeypatch.setattr("benchmarks.harness.timing.time.perf_counter", lambda: now[0])

    def lasting(seconds: float):
        def call() -> None:
            now[0] += seconds

        return call

    sides = {"between": Side(lasting(0.25), before=lasting(4.0))}
    assert timing.in_turns(sides, Pace(1.0, 10.0, 1, 3))["between"].seconds == [0.25] * 3


def test_results_are_medians_and_quantiles():
    samples = Samples(3, [5e-6, 1e-6, 2e-6, 3e-6, 4e-6, 100e-6], [0.0] * 6)
    row = samples.microseconds()
    assert (row["median_us"], row["low_us"], row["high_us"]) == (3.5, 2.0, 5.0)
    assert (row["samples"], row["calls_per_sample"]) == (6, 3)


def test_a_dry_run_makes_each_call_once():
    made: list[str] = []
    found = timing.in_turns({name: Side(partial(made.append, name)) for name in "ab"}, DRY)
    assert made == ["a", "b"]
    assert [(samples.calls, len(samples.seconds)) for samples in found.values()] == [(1, 1)] * 2


def test_a_call_that_stands_for_several_is_divided(monkeypatch):
    now = [0.0]
    monkeypatch.setattr("benchmarks.harness.timing.time.perf_counter", lambda: now[0])

    def replay() -> None:
        now[0] += 6.0

    assert timing.in_turns({"graph": Side(replay, holds=24)}, DRY)["graph"].seconds == [0.25]
