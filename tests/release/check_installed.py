"""Whether an installed elle_fast works as a user's: a release's wheels are tried with it in fresh environments.

``python tests/release/check_installed.py [--pure]``, from any folder but the checkout's root. It asks that

- ``import elle_fast`` is silent and takes less than 1.5 s beyond torch's own import (of wall time; the best of three);
- the compiled kernels are there, or with ``--pure`` (a machine without a wheel of its own) are not;
- ``elle-fast info`` runs, and a training of two epochs on digits beats chance.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path

LIMIT = 1.5  # seconds
IMPORT = """
import time, torch
start = time.perf_counter()
import elle_fast
print(time.perf_counter() - start)
"""
WHERE = """
import json, elle_fast
from elle_fast.backends import extension
print(json.dumps([elle_fast.__file__, elle_fast.__version__, extension.cpp_why_not()]))
"""


def said_by(*command: str) -> str:
    """What a command prints; SystemExit with all that it said if it fails, or writes anything to stderr."""
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode or done.stderr:
        sys.exit(f"{' '.join(command)}\nended with {done.returncode}:\n{done.stdout}{done.stderr}")
    return done.stdout


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pure", action="store_true", help="the wheel has no compiled kernels")
    pure = parser.parse_args().pure
    if printed := said_by(sys.executable, "-c", "import elle_fast"):
        sys.exit(f"import elle_fast printed {printed!r}")
    seconds = min(float(said_by(sys.executable, "-c", IMPORT)) for _ in range(3))
    print(f"import elle_fast: {seconds:.3f} s beyond torch's own import, silent")
    if seconds > LIMIT:
        sys.exit(f"expected at most {LIMIT} s")
    file, version, why_not = json.loads(said_by(sys.executable, "-c", WHERE))
    print(f"elle_fast {version} at {file}; compiled kernels: {why_not or 'there'}")
    if (why_not is not None) != pure:
        sys.exit("expected no compiled kernels" if pure else "expected compiled kernels")
    print(said_by(sys.executable, "-m", "elle_fast", "info"))
    with tempfile.TemporaryDirectory() as folder:
        run = Path(folder) / "run"
        # It tells of its progress: what counts is that it ends well.
        command = [sys.executable, "-m", "elle_fast", "train", "--epochs", "2", "--out", str(run)]
        done = subprocess.run(command, capture_output=True, text=True, cwd=folder)
        if done.returncode:
            sys.exit(f"{' '.join(command)}\n{done.stdout}{done.stderr}")
        clean = json.loads((run / "result.json").read_text(encoding="utf-8"))["accuracy"]["clean"]["accuracy"]
    print(f"two epochs on digits: {clean:.1%} of the test images")
    if clean < 0.3:
        sys.exit("expected at least 30 %, three times chance")


if __name__ == "__main__":
    main()
