"""Importing the package is silent, light, and takes nothing of the machine."""

from __future__ import annotations

import json
import subprocess
import sys
from typing import Any

SCRIPT = """
import json, sys, time
import torch
before = set(sys.modules)
start = time.process_time()
import elle_fast
seconds = time.process_time() - start
report = {
    "new": sorted(set(sys.modules) - before),
    "seconds": seconds,
    "cuda": torch.cuda.is_initialized(),
    "threads": torch.get_num_threads(),
    "grad": torch.is_grad_enabled(),
    "rng": torch.initial_seed() == torch.default_generator.initial_seed(),
    "version": elle_fast.__version__,
    "public": elle_fast.__all__,
}
sys.stderr.write(json.dumps(report))
"""


def python(script: str, *flags: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, *flags, "-c", script], capture_output=True, text=True, check=True)


def imported() -> dict[str, Any]:
    done = python(SCRIPT, "-W", "error")
    assert done.stdout == ""
    report: dict[str, Any] = json.loads(done.stderr)  # nothing but the report was written to stderr
    return report


def test_import_is_silent_and_light():
    report = imported()
    new = {name.split(".")[0] for name in report["new"]}
    assert "elle_fast" in new
    # numpy is there only if torch itself has imported it.
    heavy = {"triton", "sklearn", "matplotlib", "PIL", "tensorboard", "rich", "scipy", "numpy", "torchvision"}
    assert not new & heavy
    assert not [name for name in report["new"] if name.startswith("elle_fast.recipes")]
    assert not report["cuda"]
    assert report["grad"]
    # Beside torch's own: of the processor, so that a busy machine changes little; some 20 ms here.
    assert report["seconds"] < 0.5


def test_import_alone_prints_nothing():
    done = python("import elle_fast")
    assert (done.stdout, done.stderr) == ("", "")


def test_public_names():
    import elle_fast

    assert {"AdaptiveLambda", "ELLELoss", "LocalLinearity", "attacks", "functional"} <= set(elle_fast.__all__)
    assert all(hasattr(elle_fast, name) for name in elle_fast.__all__)
    for module in (elle_fast.attacks, elle_fast.functional):
        assert all(hasattr(module, name) for name in module.__all__)
