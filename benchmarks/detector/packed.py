"""All traces in one small file, and reading it.

    python -m benchmarks.detector.packed --work traces --out benchmarks/results/detector_traces.npz

Each finished trace is kept whole, with the columns that a detector looks at. A number >= 0 is kept as its logarithm to
the base 2, in steps of 1/32 (losses: of 1/128), so it comes back within a factor of 2^(1/64) (2^(1/256)); 0 and what is
not finite come back as 0 and NaN. Shares are kept in steps of 1/1024. The codes' differences from step to step are
compressed by LZMA, member by member, in an ordinary ``.npz``.
"""

from __future__ import annotations

import argparse
import io
import sys
import zipfile
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from numpy.typing import NDArray

from benchmarks.detector.recorder import COLUMNS, GROUP, GROUPS
from benchmarks.harness.program import parser
from elle_fast._core.files import write_atomically

Column = NDArray[np.float64]
SAMPLES = (16, 32, 64, 128)
# Steps of a code in one unit of log2; a share has none, and is kept as it is in steps of 1/1024.
STEPS: dict[str, int | None] = {
    "own_pass": 32,
    **{f"first_{count}": 32 for count in SAMPLES},  # mean r^2 of the batch's first samples, or of all if it has fewer
    "r4": 32,
    "rise": 32,
    "start": 128,
    "adv": 128,
    "predicted": 32,
    "falls": None,
    "lam": 32,
}
UNFINISHED = "unfinished"  # how a trace ended whose cell is under way
RUNNING = "running.npz"  # of a cell under way, in a folder of its name
_SHARE = 1024
_ZERO, _NOT_FINITE = -(2**15), 2**15 - 1


@dataclass(frozen=True)
class Recorded:
    """A finished trace: the columns of ``STEPS``, each [steps], and probes [n, 3]: step, clean and PGD-10 accuracy."""

    name: str
    columns: Mapping[str, Column]
    probes: Column
    ended: str
    commit: str

    @property
    def steps(self) -> int:
        """Recorded ones."""
        return len(self.columns["rise"])


def read(path: Path) -> Recorded:
    """One cell's own file, as benchmarks.detector.traces writes it; ValueError for another one."""
    with _opened(path, COLUMNS) as found:
        column = dict(zip(COLUMNS, found["rows"].astype(np.float64).T, strict=True))
        groups = np.stack([column[f"group_{i}"] for i in range(GROUPS)])
        filled = np.cumsum(~np.isnan(groups[:, :1]), axis=0)  # a batch of 64 has four groups in all steps
        sums = np.nancumsum(groups, axis=0) / np.maximum(filled, 1)
        bad = ~np.isfinite(column["rise"])
        sums[:, bad] = np.nan
        column |= {f"first_{count}": sums[count // GROUP - 1] for count in SAMPLES}
        columns = {name: column[name] for name in STEPS}
        ended, commit = (str(found[name]) if name in found else UNFINISHED for name in ("ended", "commit"))
        name = path.parent.name if path.name == RUNNING else path.stem
        return Recorded(name, columns, found["probes"], ended, commit)


def encode(values: Column, steps: int | None) -> NDArray[np.int16]:
    """Codes of a column, [steps]."""
    finite = np.isfinite(values)
    with np.errstate(divide="ignore", invalid="ignore"):
        scaled = values * _SHARE if steps is None else np.log2(np.maximum(values, 0)) * steps
    codes = np.clip(np.rint(np.where(np.isfinite(scaled), scaled, 0)), _ZERO + 1, _NOT_FINITE - 1)
    codes[finite & ~np.isfinite(scaled)] = _ZERO
    codes[~finite] = _NOT_FINITE
    return codes.astype(np.int16)


def decode(codes: NDArray[np.int16], steps: int | None) -> Column:
    """What :func:`encode` has kept of a column."""
    wide = codes.astype(np.float64)
    values = wide / _SHARE if steps is None else np.exp2(wide / steps)
    values[codes == _ZERO] = 0.0
    values[codes == _NOT_FINITE] = np.nan
    return values


def pack(traces: Sequence[Recorded], path: Path) -> None:
    """Write them all, sorted by name."""
    members: dict[str, NDArray[Any]] = {}
    for trace in sorted(traces, key=lambda each: each.name):
        codes = np.stack([encode(trace.columns[name], steps) for name, steps in STEPS.items()])
        members[f"{trace.name}/codes"] = _planes(np.diff(codes, axis=1, prepend=np.int16(0)))
        members[f"{trace.name}/probes"] = trace.probes.astype(np.float32)
        members[f"{trace.name}/about"] = np.array([trace.ended, trace.commit])
    members["columns"] = np.array(list(STEPS))

    def write(file: BinaryIO) -> None:
        with zipfile.ZipFile(file, "w", zipfile.ZIP_LZMA) as archive:
            for name, array in members.items():
                buffer = io.BytesIO()
                np.lib.format.write_array(buffer, array, allow_pickle=False)
                archive.writestr(zipfile.ZipInfo(f"{name}.npy"), buffer.getvalue(), zipfile.ZIP_LZMA)

    write_atomically(path, write)


def unpack(path: Path) -> dict[str, Recorded]:
    """The traces of a packed file, by name; ValueError for another file."""
    found = {}
    with _opened(path, STEPS) as file:
        for member in file.files:
            name, _, part = member.rpartition("/")
            if part != "codes":
                continue
            codes = np.cumsum(_whole(file[member]), axis=1, dtype=np.int16)
            columns = {each: decode(row, STEPS[each]) for each, row in zip(STEPS, codes, strict=True)}
            ended, commit = file[f"{name}/about"].tolist()
            found[name] = Recorded(name, columns, file[f"{name}/probes"].astype(np.float64), ended, commit)
    return found


@contextmanager
def _opened(path: Path, columns: Iterable[str]) -> Iterator[Any]:
    """An .npz of these columns, whose members are read while it is open."""
    expected = f"{path.name}: expected the columns {', '.join(columns)}"
    with path.open("rb") as opened:
        try:
            file = np.load(opened, allow_pickle=False)
        except (ValueError, EOFError, zipfile.BadZipFile) as error:
            raise ValueError(f"{expected}, got no .npz of arrays: {error}") from error
        if not isinstance(file, np.lib.npyio.NpzFile):
            raise ValueError(f"{expected}, got a single array {list(file.shape)}")
        with file:
            if "columns" not in file or file["columns"].tolist() != list(columns):
                got = file["columns"].tolist() if "columns" in file else f"the arrays {', '.join(file.files)}"
                raise ValueError(f"{expected}, got {got}")
            yield file


def _planes(codes: NDArray[np.int16]) -> NDArray[np.uint8]:
    """Zigzag codes, the low bytes before the high ones, which are 0 for small differences: LZMA likes that better."""
    folded = ((codes << 1) ^ (codes >> 15)).view(np.uint16)
    return np.stack([folded & 0xFF, folded >> 8]).astype(np.uint8)


def _whole(planes: NDArray[np.uint8]) -> NDArray[np.int16]:
    folded = planes[0].astype(np.uint16) | (planes[1].astype(np.uint16) << 8)
    codes: NDArray[np.int16] = ((folded >> 1) ^ (0 - (folded & 1)).astype(np.uint16)).view(np.int16)
    return codes


def main(arguments: Sequence[str] | None = None) -> int:
    """Join what there is; 0, or 1 if there is nothing."""
    options_of = _parser()
    options = options_of.parse_args(arguments)
    paths = sorted(options.work.glob("*.npz"))
    if options.unfinished:
        paths += sorted(options.work.glob(f"*/{RUNNING}"))
    if not paths:
        print(f"no finished trace in {options.work}", file=sys.stderr)
        return 1
    try:
        pack([read(path) for path in paths], options.out)
    except ValueError as error:
        options_of.error(f"argument --work: {error}")
    print(f"{len(paths)} traces, {options.out.stat().st_size / 2**20:.2f} MiB")
    return 0


def _parser() -> argparse.ArgumentParser:
    options_of = parser("benchmarks.detector.packed", __doc__)
    options_of.add_argument("--work", type=Path, required=True, help="folder of the traces")
    options_of.add_argument("--out", type=Path, required=True, help="the packed file")
    options_of.add_argument("--unfinished", action="store_true", help="with what is recorded of cells under way")
    return options_of


if __name__ == "__main__":
    sys.exit(main())
