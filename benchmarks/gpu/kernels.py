"""The part of gpu_report.py that launches every kernel once, also for the memory checker."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from benchmarks.gpu.pack_points import pack_inputs
from benchmarks.gpu.run import Run, poisoned
from benchmarks.ops.sizes import BF16, CHANNELS, EPS, F32, PackCase
from elle_fast import AdaptiveLambda
from elle_fast.functional import elle_loss, local_linearity, pack_points, random_start


def part_kernels(run: Run) -> None:
    """Launch every kernel on small sizes, most of them odd, and compare with the reference."""
    device, launched = run.device.device, 0
    ball: dict[str, Any] = {"norm": "l2"}
    walk: dict[str, Any] = {"start": 1.0, "project": True, "bounds": (0.0, 1.0)}
    packings: list[tuple[tuple[int, ...], torch.dtype, dict[str, Any]]] = [
        ((3, 3, 7, 5), F32, {}),
        ((2, 3, 16, 16), BF16, {**walk, **CHANNELS}),
        ((2, 3, 16, 16), F32, {"memory_format": torch.channels_last, "dtype": BF16, **CHANNELS}),
        ((5, 129), BF16, {"points": "five-point", "triplets": 2}),
        ((4, 33), F32, {"points": "elle-2p", "fraction": 0.5, "alpha": "half"}),
        ((3, 3, 7, 5), F32, {**ball, **walk, **CHANNELS}),
        ((5, 600), BF16, {**ball, "triplets": 2, "fraction": 0.7}),
        ((2, 3, 4, 4), F32, {**ball, "memory_format": torch.channels_last}),
    ]
    for shape, dtype, options in packings:
        x, grad, seed = pack_inputs(PackCase(shape, dtype), device)
        begin: dict[str, Any] = {name: options[name] for name in ("start", "bounds", "norm") if name in options}
        calls: list[tuple[Any, tuple[Tensor, ...], dict[str, Any]]]
        calls = [(pack_points, (x, grad), options), (random_start, (x,), begin)]
        for function, arguments, chosen in calls:
            with poisoned():
                ours = function(*arguments, EPS, seed=seed, backend="triton", **chosen)
            theirs = function(*arguments, EPS, seed=seed, backend="reference", **chosen)
            torch.testing.assert_close(ours, theirs, rtol=2 * torch.finfo(BF16).eps, atol=1e-5)
            launched += 1
    losses: list[tuple[int, dict[str, Any], Any, bool]] = [
        (7, {}, 10.0, False),
        (1, {"penalty": "abs"}, torch.tensor(2.0, device=device), False),
        (129, {"label_smoothing": 0.1}, AdaptiveLambda(10.0), True),
        (40, {"of": "logits"}, AdaptiveLambda(10.0, window=5), False),
        (5000, {"of": "logits", "penalty": "smooth_l1", "points": "elle-2p"}, 1.0, True),
        (5000, {"points": "five-point", "triplets": 2}, 1.0, True),
    ]
    for classes, options, lam, soft in losses:
        samples, triplets = 5, options.get("triplets", 1)
        blocks = {"elle": 3, "elle-2p": 2, "five-point": 5}[options.get("points", "elle")]
        logits = torch.randn(samples * (1 + blocks * triplets), classes, device=device, requires_grad=True)
        target = torch.randint(classes, (samples,), device=device)
        if soft:
            target = torch.randn(samples, classes, device=device).softmax(1)
        alpha = torch.rand(samples * triplets, device=device)
        values: dict[str, list[Tensor]] = {}
        for backend in ("triton", "reference"):
            with poisoned():
                _, ce, e_lin = elle_loss(logits, target, alpha, lam, backend=backend, **options)
                alone = e_lin
                if options.get("of") == "logits" and options.get("points") != "elle-2p":
                    alone = local_linearity(logits[samples:], target, alpha, backend=backend, **options)
                values[backend] = [ce, e_lin, alone, *torch.autograd.grad(ce + alone, logits)]
        torch.testing.assert_close(values["triton"], values["reference"], rtol=1e-3, atol=1e-4)
        launched += 1
    controller = AdaptiveLambda(10.0).to(device)
    controller.update(torch.rand((), device=device), "triton")
    run.record["calls_checked"] = launched + 1
    if not run.device.dry:
        torch.cuda.synchronize()
