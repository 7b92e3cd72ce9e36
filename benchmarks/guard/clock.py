"""What CollapseGuard adds to the time of a step, by the clock.

    python -m benchmarks.guard.clock --threads 1

Two runs of `elle-fast train`, FGSM on the narrow PreActResNet with batches of 128 random pictures of 32x32, one of them
with --guard, take turns in one process: as many steps of each as are between two looks of the guard, in changing order,
over whole cycles of the steps between two probes. So each cycle has every part of the guard as often as a training has
it. The runs have the learning rate 0 and give no alarm. On a machine that has nothing else to do it takes four minutes.

"added" is the mean time of a step with the guard over that without, less 1; "added_typical" the same with, for each
kind of turn, the median in place of the mean, which a disturbance of the machine moves less. "linearity_ms", "probe_ms"
and "snapshot_ms" are the medians of what a look of the guard, a probe and a snapshot take: a turn that has it, less one
that has not.
"""

from __future__ import annotations

import argparse
import gc
import itertools
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, closing
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks.harness.program import ROOT, command, listed, number, parser
from benchmarks.harness.tables import VERDICTS, markdown, met
from benchmarks.harness.timing import NOT_MEASURED, threads
from benchmarks.step.train_rows import NETS, TINY, Net
from elle_fast._core.files import write_json
from elle_fast._core.kept_memory import keep_freed_memory
from elle_fast.recipes.config import TrainConfig
from elle_fast.recipes.distributed import Ranks
from elle_fast.recipes.provenance import provenance
from elle_fast.recipes.run import Run

LONGEST = 0.03  # of a step's time that the guard may add
PRECISIONS = ("fp32", "bf16")
_WARM = 8  # steps of each side before the first turn
_VALIDATION = 64


@dataclass
class Turns:
    """Seconds of each turn of one side, by what the guard did in it."""

    kinds: dict[str, list[float]] = field(default_factory=dict)

    def add(self, kind: str, seconds: float) -> None:
        """Take in a turn."""
        self.kinds.setdefault(kind, []).append(seconds)

    @property
    def mean(self) -> float:
        """Seconds of a turn."""
        return statistics.mean(itertools.chain.from_iterable(self.kinds.values()))

    @property
    def typical(self) -> float:
        """The same, with the median of each kind for each of its turns."""
        whole = sum(len(each) * statistics.median(each) for each in self.kinds.values())
        return whole / sum(map(len, self.kinds.values()))

    def median(self, kind: str) -> float | None:
        """Of a kind; ``None`` if there was none."""
        return statistics.median(self.kinds[kind]) if kind in self.kinds else None


def sides(net: Net, precision: str, batches: list[tuple[Tensor, Tensor]], stack: ExitStack) -> list[Run]:
    """Two runs of the same weights: alone, and with the guard."""
    folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
    config = TrainConfig(
        data="image-folder",
        model=net.model,
        width=net.width,
        method="fgsm",
        eps=8 / 255,
        batch_size=net.batch,
        epochs=1,
        learning_rate=0.0,
        validation=_VALIDATION,
        augment=False,
        precision=precision,
        device="cpu",
    )
    found = []
    for guard in (False, True):
        own = replace(config, guard=guard).resolved()
        dataset = Net(net.model, net.width, net.pixels, net.batch, 1 + -(-_VALIDATION // net.batch)).pictures()
        ranks = stack.enter_context(closing(Ranks(120.0)))
        run = Run(own, dataset, folder / f"{guard}.pt", ranks)
        run.model.train()
        batches[:] = batches or list(run.upcoming(1))
        found.append(run)
    return found


def turns(net: Net, precision: str, cycles: int) -> dict[str, Any]:
    """The times of a precision, over so many cycles."""
    with ExitStack() as stack:
        batches: list[tuple[Tensor, Tensor]] = []
        alone, guarded = sides(net, precision, batches, stack)
        guard, ((x, y),) = guarded.guard, batches
        assert guard is not None
        every, cycle = guard.every, guard.probe_every
        of_a_turn = cycle // every * every // every
        for run in (alone, guarded):
            for _ in range(_WARM // every * every):
                run.take_step(x, y)
        found = {"alone": Turns(), "guarded": Turns()}
        gc.collect()
        gc.disable()
        try:
            for i in range(cycles * of_a_turn):
                pairs: Iterator[tuple[str, Run]] = iter((("alone", alone), ("guarded", guarded)))
                for name, run in pairs if i % 2 else reversed(list(pairs)):
                    before = (guard._step, guard._snapshots.newest)
                    begin = time.perf_counter()
                    for _ in range(every):
                        run.take_step(x, y)
                    lasting = time.perf_counter() - begin
                    probed = guard._step // cycle > before[0] // cycle
                    kept = guard._snapshots.newest > before[1]
                    kind = (
                        "probe and snapshot" if probed and kept else "probe" if probed else "snapshot" if kept else ""
                    )
                    found[name].add(kind if name == "guarded" else "", lasting)
        finally:
            gc.enable()
        if guard.alarms:
            raise AssertionError(f"expected a training without an alarm, got {guard.alarms}")
    return summary(found["alone"], found["guarded"], every)


def summary(alone: Turns, guarded: Turns, every: int) -> dict[str, Any]:
    """As JSON types, from turns of ``every`` steps."""
    plain, looked = alone.median(""), guarded.median("")
    assert plain is not None
    assert looked is not None
    parts: dict[str, float | None] = {"linearity": looked - plain}
    for kind in ("probe", "snapshot"):
        with_it = guarded.median(kind)
        parts[kind] = None if with_it is None else with_it - looked
    both = guarded.median("probe and snapshot")
    if both is not None and parts["probe"] is None:
        parts["probe"] = both - looked - (parts["snapshot"] or 0.0)
    return {
        "step_ms": round(1e3 * alone.mean / every, 3),
        "step_guarded_ms": round(1e3 * guarded.mean / every, 3),
        "added": round(guarded.mean / alone.mean - 1, 5),
        "added_typical": round(guarded.typical / alone.typical - 1, 5),
        **{f"{name}_ms": None if each is None else round(1e3 * each, 2) for name, each in parts.items()},
        "turns": {name or "neither": len(each) for name, each in guarded.kinds.items()},
    }


def table(rows: dict[str, dict[str, Any]]) -> str:
    """Markdown: a line for each precision, with the verdict on the target."""
    lines = []
    for precision, row in rows.items():
        times = [f"{row[name]:.2f}" for name in ("step_ms", "step_guarded_ms")]
        shares = [f"{100 * row[name]:.2f} %" for name in ("added", "added_typical")]
        parts = [
            "-" if row[name] is None else f"{row[name]:.1f}" for name in ("linearity_ms", "probe_ms", "snapshot_ms")
        ]
        verdict = VERDICTS[met(row["added_typical"], LONGEST, at_most=True)]
        lines.append((precision, *times, *shares, *parts, f"at most {LONGEST:.0%}: {verdict}"))
    head = ["precision", "ms a step", "guarded", "added, mean", "added, typical", "a look, ms", "a probe, ms"]
    return markdown([*head, "a snapshot, ms", "target"], lines)


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure, print, write; 0."""
    options_of = _parser()
    options = options_of.parse_args(arguments)
    net, load = TINY["preact"] if options.quick else NETS["preact"], os.getloadavg()[0]
    keep_freed_memory()  # as `elle-fast train` does
    with threads(options.threads):
        rows = {precision: turns(net, precision, options.cycles) for precision in options.precisions}
        setting = {"net": vars(net), "method": "fgsm", "cycles": options.cycles, "load_before": load}
        note = {"note": NOT_MEASURED} if options.quick else {}
        about = " ".join((__doc__ or "").split("\n\n")[-1].split())
        content = {"about": about, **note, "setting": setting, "rows": rows}
        write_json(options.out, content | provenance(command(options_of, options)))
    print(table(rows))
    return 0


def _parser() -> argparse.ArgumentParser:
    options_of = parser("benchmarks.guard.clock", __doc__)
    options_of.add_argument("--precisions", type=listed(str), default=PRECISIONS, help="fp32,bf16: those of the steps")
    options_of.add_argument("--cycles", type=number, default=3, help="times the steps between two probes")
    options_of.add_argument("--threads", type=number, help="of torch; by default its own")
    options_of.add_argument("--quick", action="store_true", help="a tiny network: try the program")
    out = ROOT / "benchmarks" / "results" / "guard_clock.json"
    options_of.add_argument("--out", type=Path, default=out, help="the JSON file")
    return options_of


if __name__ == "__main__":
    torch.manual_seed(0)
    sys.exit(main())
