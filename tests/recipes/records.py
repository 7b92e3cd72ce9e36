"""Runs as a page shows them, without a training."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

from elle_fast.recipes.config import TrainConfig
from elle_fast.recipes.run_record import Record

NASTY = '<script>alert("x")</script> & <b>'
# Robust, collapsed, collapsed, recovered.
COLLAPSING = (0.5, 0.01, 0.02, 0.4)


def record(name: str, *, pgd: tuple[float, ...] = (0.3, 0.4, 0.5, 0.6), models: Any = None, **options: Any) -> Record:
    """A run of an epoch of 10 steps for each accuracy under PGD-10, by default a finished one."""
    config = asdict(TrainConfig(**{"method": "elle-a", "epochs": 4, **options}))
    rows = [
        {"step": 10.0 * epoch, "epoch": float(epoch), "loss": 2 / epoch, "e_lin": 1e-3 / epoch, "lam": 100.0 * epoch}
        | {"train_adv": 0.7, "seconds": 1.5, "val_clean": 0.9, "val_pgd": value, "val_e_lin": 10.0**-epoch}
        | {"robust": value > 0.2, "collapsed": value < 0.1, "never_robust": False}
        for epoch, value in enumerate(pgd, 1)
    ]
    if models is None:
        models = {
            kind: {"file": file, "epoch": len(rows), "accuracy": {"clean": clean, "pgd-20": attacked}}
            for kind, file, clean, attacked in (
                ("last", "checkpoint.pt", {"accuracy": 0.9, "samples": 40}, {"accuracy": pgd[-1], "samples": 40}),
                ("best", "best.pt", {"accuracy": 0.8, "samples": 40}, {"accuracy": max(pgd), "samples": 40}),
            )
        }
    origin = {"commit": "0123456789ab", "torch": "2.9.0"} if models else {}
    return Record(name, config, rows, 10 * len(rows), 1.5 * len(rows), [], models, origin)
