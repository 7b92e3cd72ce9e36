"""Pause the queue of evidence, so that something can be timed, and let it go on.

    make evidence-pause     # returns when the job has stopped
    make evidence-resume

The pause is a file in the work folder. The queue sees it within a second and asks its job to stop, which a training
does after the current step, or after the evaluation that ends an epoch. ``make evidence-pause`` waits for that; the
exit status is 1 if a job still runs after --timeout seconds. A queue that is started later waits as well.

Both targets act on one work folder, by default that of this checkout: with a queue of another checkout, pass
``ARGS="--work FOLDER"``.
"""

from __future__ import annotations

import argparse
import fcntl
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import IO

WORK = Path("runs") / "evidence"
# In the work folder: the pause; the lock of a queue, with its process id; the lock of a job that runs.
PAUSED, QUEUE, JOB = "paused", "queue.lock", "job.lock"
POLL = 0.5  # seconds between two looks at a file or a process


def lock(path: Path) -> IO[str] | None:
    """The file at ``path``, locked until it is closed, here and in a child that inherits it; None if it is in use.

    The system drops the lock of a process that dies, so a file that was left behind is free.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    file = path.open("a+")
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        file.close()
        return None
    return file


def is_free(path: Path) -> bool:
    """Whether nobody holds the lock."""
    if (file := lock(path)) is None:
        return False
    file.close()
    return True


def pause(work: Path, timeout: float) -> bool:
    """Pause the queue in ``work``; False if its job still runs after ``timeout`` seconds.

    A queue takes the lock of the job before it looks for the pause. So once that lock has been free behind the pause,
    no job begins.
    """
    work.mkdir(parents=True, exist_ok=True)
    (work / PAUSED).touch()
    end = time.monotonic() + timeout
    while not is_free(work / JOB):
        if time.monotonic() > end:
            return False
        time.sleep(POLL)
    return True


def resume(work: Path) -> None:
    """Let the queue in ``work`` go on."""
    (work / PAUSED).unlink(missing_ok=True)


def main(arguments: Sequence[str] | None = None) -> int:
    """Pause or resume; 1 if a job still runs after the time limit."""
    # The other programs' parser brings torch, which takes seconds to import.
    options_of = argparse.ArgumentParser(
        prog="python -m benchmarks.evidence.pause",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    options_of.add_argument("--work", type=Path, default=WORK, help="folder of the queue")
    options_of.add_argument("--timeout", type=float, default=180.0, help="seconds to wait for the job")
    options_of.add_argument("--resume", action="store_true", help="end the pause")
    options = options_of.parse_args(arguments)
    if options.resume:
        resume(options.work)
        print(f"{options.work}: no longer paused")
        return 0
    if not pause(options.work, options.timeout):
        print(f"{options.work}: a job still runs after {options.timeout:g} seconds", file=sys.stderr)
        return 1
    there = "" if not is_free(options.work / QUEUE) else "; no queue runs in this folder"
    print(f"{options.work}: paused, no job runs{there}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
