"""A queue of long trainings, one after the other at the lowest priority, each row written as soon as it is done.

    nohup make evidence ARGS="--root DATA" > evidence.log &
    make evidence ARGS="--root DATA --only short --once"
    make evidence ARGS=--list                                   # what is done, begun and missing
    make paper ARGS="--redraw benchmarks/results/short.json"    # tables and pictures of what is there

DATA is the folder of the data. The list is queue.yaml, in order of worth; entries.py says what is in it. Without
``nohup ... &`` it runs in the foreground. The same command can be repeated at any time: it skips what is done and
resumes what was interrupted. --work holds the runs, --results the JSON files, one for each entry. Rows in a JSON file
count as done where --work lacks them, so the queue goes on from the committed files on another machine.

The paper's grid (benchmarks/paper/grid.py) answers one question, on one commit, as fast as the machine allows, and then
draws; it can be split. The queue has many questions, gives way to whatever else runs, can be paused for a measurement
(pause.py), and lasts for days in which the code goes on. Both train and attack the same cells (cells.py) and write the
same summary. So the queue takes runs of any commit: a row names the checkout's at its end, and in ``commits`` those
with which its training began and went on. A run that was cut off is continued by another commit if all its options are
the same, and is an error if not, as is a row of another configuration or version of elle_fast.

Each row is the work of a process of its own (job.py), which reads list and code anew: what is added to queue.yaml is
done without a restart. ``training_seconds`` are those of a shared machine, and no measurement. A training whose
loss or weights are no longer finite is listed under ``failed``, and the queue goes on; remove its failed.json to retry.
Anything else, such as memory or a disk that is full, missing data, or code that is half made, stops the queue. Ctrl-C
and SIGTERM stop the job after the current step; if the queue is killed, its job notices and stops too. Exit status: 1
if a row failed or the queue was stopped by an error, 130 if it was asked to stop.

Git calls a checkout changed once a committed JSON file is written anew, and a row's commit then ends in ``-dirty``. In
a worktree of its own, with --results elsewhere, the queue keeps clear of that, and of half-made changes to the code.
"""

from __future__ import annotations

import argparse
import os
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from benchmarks.evidence.pause import JOB, PAUSED, POLL, QUEUE, WORK, lock

ROOT = Path(__file__).resolve().parents[2]
# Exit statuses of a job, beside 0 for a row that was done (or failed) and others for an error.
NOTHING_LEFT, SOME_FAILED = 3, 4
GRACE = 120.0  # seconds that a job has to stop: the evaluation after an epoch takes a while


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the list to its end; the exit status."""
    options = options_of(__doc__).parse_args(arguments)
    if options.list:
        from benchmarks.evidence import job

        return job.main(arguments)
    held = lock(options.work / QUEUE)
    if held is None:
        process = (options.work / QUEUE).read_text()
        raise ValueError(f"work: expected no other queue in {str(options.work)!r}, got that of process {process}")
    with held:
        held.truncate(0)
        held.write(f"{os.getpid()}")
        held.flush()
        try:
            return _run(options)
        except KeyboardInterrupt:
            print("stopped; the same command goes on")
            return 130


def options_of(document: str | None) -> argparse.ArgumentParser:
    """The options, which the queue and its jobs share."""
    # The other programs' parser brings torch, which would take memory for days.
    parser = argparse.ArgumentParser(description=document, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--queue", type=Path, default=Path(__file__).with_name("queue.yaml"), help="the list")
    parser.add_argument("--root", type=Path, default=Path(), help="folder of the data")
    parser.add_argument("--work", type=Path, default=WORK, help="folder of the runs")
    parser.add_argument(
        "--results", type=Path, default=ROOT / "benchmarks" / "results", help="folder of the JSON files"
    )
    parser.add_argument("--only", default="", help="NAME,...: of entries or variants: these alone")
    parser.add_argument("--plot", action="store_true", help="draw the pictures beside a JSON file when it is written")
    parser.add_argument("--list", action="store_true", help="train nothing, and say what is done, begun and missing")
    parser.add_argument("--once", action="store_true", help="stop after one row")
    parser.add_argument("--threads", type=int, default=1, help="of a job")
    return parser


def _run(options: argparse.Namespace) -> int:
    """Start job after job until none is left."""
    while True:
        status = _job(options)
        if status in (NOTHING_LEFT, SOME_FAILED):
            return int(status == SOME_FAILED)
        if status != 0:
            print(f"the queue stops: its job ended with status {status}", file=sys.stderr)
            return 1
        if options.once:
            return 0


def _job(options: argparse.Namespace) -> int:
    """Run one job to its end, through all pauses; its exit status."""
    while True:
        with _start(options) as child:
            try:
                status = _watched(child, options.work / PAUSED)
            finally:
                _stop(child)
        if status is not None:
            return status


def _start(options: argparse.Namespace) -> subprocess.Popen[bytes]:
    """A new job, as soon as there is no pause, and no job that a killed queue has left and that is still saving."""
    words = [f"--{name}={getattr(options, name)}" for name in ("queue", "root", "work", "results", "only")]
    words += ["--plot"] * options.plot
    said = False
    while True:
        held = lock(options.work / JOB)
        if held is not None:
            with held:  # from here on the lock is the child's alone
                if not (options.work / PAUSED).exists():
                    return subprocess.Popen(
                        [sys.executable, "-m", "benchmarks.evidence.job", *words],
                        stdin=subprocess.PIPE,  # which ends with this process: the job's sign to stop
                        env={**os.environ, "OMP_NUM_THREADS": str(options.threads)},
                        pass_fds=[held.fileno()],
                        start_new_session=True,  # Ctrl-C is for the queue, which asks the job to stop
                    )
        if not said:
            why = "paused" if (options.work / PAUSED).exists() else "the job of a queue that is gone still runs"
            print(f"waiting: {why}", flush=True)
            said = True
        time.sleep(POLL)


def _watched(child: subprocess.Popen[bytes], paused: Path) -> int | None:
    """Wait for a job; its exit status, None if it is to be run again after a pause."""
    while True:
        try:
            return child.wait(POLL)
        except subprocess.TimeoutExpired:
            if paused.exists():
                _stop(child)
                # One that had just ended is not run again; one that met an error meets it again.
                return child.returncode if child.returncode in (0, NOTHING_LEFT, SOME_FAILED) else None


def _stop(child: subprocess.Popen[bytes]) -> None:
    """Ask a job that runs to stop, then make it."""
    if child.poll() is None:
        child.terminate()
        try:
            child.wait(GRACE)
        except subprocess.TimeoutExpired:
            os.killpg(child.pid, signal.SIGKILL)
            child.wait()


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    os.nice(19)
    try:
        sys.exit(main())
    except (ValueError, OSError) as problem:
        sys.exit(f"queue.py: {problem}")
