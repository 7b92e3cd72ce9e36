"""Files that are either whole or not there: written beside their place, then renamed into it."""

from __future__ import annotations

import csv
import glob
import io
import json
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, BinaryIO


def write_atomically(path: Path, write: Callable[[BinaryIO], object]) -> None:
    """Call ``write`` on a temporary file in ``path``'s folder and rename it to ``path``; a failure leaves no trace.

    A process that is killed here leaves the temporary file; the next write to ``path`` removes it.

    Raises:
        OSError: naming ``path`` and the cause, such as a full disk.
    """
    with naming(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        _sweep(path)
        handle, temporary = _temporary(path)
        try:
            with os.fdopen(handle, "wb") as file:
                write(file)
                file.flush()
                os.fsync(file.fileno())
                # mkstemp makes files that only their owner can read; these get the rights that open() would give.
                umask = os.umask(0)
                os.umask(umask)
                temporary.chmod(0o666 & ~umask)
                temporary.replace(path)
        except BaseException:
            temporary.unlink(missing_ok=True)
            raise


def check_writable(path: Path) -> None:
    """Raise an OSError, naming ``path``, if no file can be made in its folder, which is made if it is not there."""
    with naming(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=path.parent):
            pass


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Where to write a file or a folder that takes ``path``'s place at the end; a failure leaves no trace.

    For what has to be looked at before it counts. A folder in ``path``'s place goes only when the new one is there. A
    process that is killed here leaves a temporary folder; the next call for ``path`` removes it.

    Raises:
        OSError: naming ``path`` and the cause, such as a full disk.
    """
    with naming(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        for left in path.parent.glob(f".{glob.escape(path.name)}.????????.dir"):
            with suppress(OSError), _open_folder(left) as handle:
                if _lock(handle, wait=False):
                    shutil.rmtree(left)
        work = Path(tempfile.mkdtemp(dir=path.parent, prefix=f".{path.name}.", suffix=".dir"))
        try:
            with _open_folder(work) as handle:
                _lock(handle, wait=True)
                made = work / path.name
                yield made
                for written in [made, *made.rglob("*")]:
                    if written.is_file():
                        with written.open("rb") as file:
                            os.fsync(file.fileno())
                before = work / "before"
                try:
                    if path.is_dir() and not path.is_symlink():
                        path.replace(before)
                    made.replace(path)
                except BaseException:
                    if before.exists() and not path.exists():
                        before.replace(path)
                    raise
        finally:
            shutil.rmtree(work, ignore_errors=True)


@contextmanager
def _open_folder(path: Path) -> Iterator[int]:
    """A folder's handle, to be locked."""
    handle = os.open(path, os.O_RDONLY)
    try:
        yield handle
    finally:
        os.close(handle)


@contextmanager
def naming(path: Path) -> Iterator[None]:
    """An OSError inside names ``path``, and no other or no file."""
    try:
        yield
    except OSError as error:
        raise OSError(error.errno, error.strerror or str(error), str(path)) from error


def _temporary(path: Path) -> tuple[int, Path]:
    """A new file, locked while its process lives, so that :func:`_sweep` leaves it alone."""
    while True:
        handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.", suffix=".tmp")
        _lock(handle, wait=True)
        if os.fstat(handle).st_nlink:  # not swept between its making and its locking
            return handle, Path(name)
        os.close(handle)


def _sweep(path: Path) -> None:
    """Remove what processes that were killed in a write to ``path`` have left."""
    for left in path.parent.glob(f".{glob.escape(path.name)}.????????.tmp"):
        with suppress(OSError), left.open("r+b") as file:
            if _lock(file.fileno(), wait=False):
                left.unlink()


def _lock(handle: int, *, wait: bool) -> bool:
    """Lock an open file; False if another process has, or where there are no locks."""
    try:
        import fcntl

        fcntl.flock(handle, fcntl.LOCK_EX if wait else fcntl.LOCK_EX | fcntl.LOCK_NB)
    except (ImportError, OSError):
        return False
    return True


def write_json(path: Path, value: Any) -> None:
    """Write ``value`` as indented JSON."""
    text = json.dumps(value, indent=2, allow_nan=True) + "\n"
    write_atomically(path, lambda file: file.write(text.encode()))


def write_csv(path: Path, rows: list[dict[str, Any]]) -> None:
    """Write rows under a header of the keys of all of them; a key that a row lacks is left empty."""
    names = list(dict.fromkeys(name for row in rows for name in row))
    buffer = io.StringIO()
    writer = csv.DictWriter(buffer, names, restval="", lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    write_atomically(path, lambda file: file.write(buffer.getvalue().encode()))
