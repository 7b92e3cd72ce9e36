"""Training runs of methods that keep something for each training sample: its place, and a resume to the bit."""

from __future__ import annotations

import os
import signal
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from elle_fast import data
from elle_fast.recipes import checkpoint
from elle_fast.recipes import train as training
from elle_fast.recipes.train import CHECKPOINT, train
from tests.recipes.test_train import CONFIG, assert_same_run, dataset, quiet


@pytest.mark.parametrize("method", ["pgi", "mep-cs", "pco"])
def test_a_run_resumes_to_the_bit(method, monkeypatch, tmp_path):
    config, original, stop, seen = replace(CONFIG, method=method), training._Loop._step, 0, []

    def step(loop: Any, x: Any, y: Any) -> Any:
        images, samples = loop.run.train_split.images, loop.run.options["samples"]
        assert isinstance(samples, data.Samples)
        assert samples.offsets is not None
        assert torch.equal(samples.placed(images[samples.index]).float() / 255, x.contiguous())
        seen.append(samples.index)
        if loop.run.step == stop:
            os.kill(os.getpid(), signal.SIGTERM)
        return original(loop, x, y)

    monkeypatch.setattr(training._Loop, "_step", step)
    stop = -1
    train(config, tmp_path / "whole", dataset=dataset(), console=quiet())
    assert torch.cat(seen[:8]).sort().values.tolist() == list(range(8 * 16))  # every epoch has each once
    stop = 13
    with pytest.raises(training.InterruptedRunError):
        train(config, tmp_path / "resumed", dataset=dataset(), console=quiet())
    stop = -1
    train(config, tmp_path / "resumed", resume=True, dataset=dataset(), console=quiet())
    assert_same_run(tmp_path / "whole", tmp_path / "resumed")
    kept = checkpoint.load(tmp_path / "whole" / CHECKPOINT)["criterion"]
    values = kept["perturbations._extra_state"]
    assert values.shape == (8 * 16, 1, 8, 8)
    # Some kept their sign, some were turned, and some images are near the end of the range.
    assert values.unique().numel() > 3
    assert kept["_extra_state"] == 3 * 8


def test_another_training_set_is_refused_on_resume(tmp_path: Path) -> None:
    config = replace(CONFIG, method="pgi", epochs=1)
    train(config, tmp_path, dataset=dataset(), console=quiet())
    whole = dataset().train
    more = replace(
        dataset(), train=data.Split(torch.cat([whole.images, whole.images[:7]]), torch.arange(len(whole) + 7) % 3)
    )
    with pytest.raises(ValueError, match=r"^data: expected those of the training"):
        train(config, tmp_path, resume=True, dataset=more, console=quiet())
    with (
        pytest.warns(UserWarning, match="^data: expected those of the training"),
        pytest.raises(ValueError, match=r"criterion: expected the state of \d+ training samples, .*\[128, 1, 8, 8\]"),
    ):
        train(config, tmp_path, resume=True, allow_other_data=True, dataset=more, console=quiet())
