"""The queue with real processes: killed, stopped, paused and resumed in the middle of a training, it loses nothing."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from typing import Any

import pytest
import torch
import yaml

from benchmarks.evidence import queue
from benchmarks.evidence.pause import JOB, PAUSED, QUEUE, is_free, lock, main, pause
from elle_fast.recipes import checkpoint
from elle_fast.recipes.config import TrainConfig
from elle_fast.recipes.train import train
from tests.helpers import use_threads

LONG: dict[str, Any] = {"width": 2, "epochs": 60, "limit": 160, "validation": 16, "test_limit": 16, "batch_size": 32}
LONG |= {"method": "n-fgsm", "eval_attacks": "clean,pgd-20", "device": "cpu"}
# It fails in its first epoch.
WILD = {"method": "fgsm", "learning_rate": 1e30}
PATIENCE = 120.0  # seconds, on a machine that does other things


def until(condition):
    end = time.monotonic() + PATIENCE
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.02)


@pytest.fixture
def arguments(tmp_path):
    entry: dict[str, Any] = {"name": "one", "result": "one.json", "note": "a note", "eps": [0.1], "seeds": [3]}
    entry |= {"variants": {"long": {}, "wild": WILD}}
    path = tmp_path / "list.yaml"
    path.write_text(yaml.safe_dump({"defaults": LONG, "entries": [entry]}))
    return [f"--queue={path}", f"--work={tmp_path / 'work'}", f"--results={tmp_path / 'results'}"]


@pytest.mark.long
def test_killed_stopped_paused_and_resumed_it_ends_with_the_same_bits(tmp_path, arguments):
    work, result = tmp_path / "work", tmp_path / "results" / "one.json"
    saved, done = (work / "one" / "long-eps25.5-seed3" / name for name in ("checkpoint.pt", "result.json"))
    processes = []

    def start():
        command = [sys.executable, "-m", "benchmarks.evidence.queue", *arguments]
        processes.append(subprocess.Popen(command, cwd=queue.ROOT, stdout=subprocess.DEVNULL))
        return processes[-1]

    def trains_on():
        """A step further than now."""
        before = saved.stat().st_mtime_ns if saved.exists() else None
        until(lambda: saved.exists() and saved.stat().st_mtime_ns != before)

    def stands_still():
        assert not done.exists()
        before = saved.read_bytes()
        time.sleep(1.5)
        assert saved.read_bytes() == before

    try:
        running = start()
        trains_on()
        assert os.getpriority(os.PRIO_PROCESS, running.pid) == 19
        with pytest.raises(
            ValueError, match=rf"work: expected no other queue in .*, got that of process {running.pid}$"
        ):
            queue.main(arguments)
        running.kill()
        # Its job ends by itself.
        until(lambda: is_free(work / JOB))
        stands_still()

        running = start()
        trains_on()
        running.terminate()
        assert running.wait(PATIENCE) == 130
        assert is_free(work / JOB)
        stands_still()

        running = start()
        trains_on()
        assert pause(work, PATIENCE)
        stands_still()
        assert is_free(work / JOB)
        assert running.poll() is None
        assert not result.exists()
        assert main([f"--work={work}", "--resume"]) == 0
        until(result.exists)
        # Written before the next row is begun.
        assert running.poll() is None
        written = json.loads(result.read_text())
        assert ([row["variant"] for row in written["runs"]], written["failed"]) == (["long"], [])
        assert running.wait(PATIENCE) == 1
    finally:
        for process in processes:
            process.kill()
            process.wait()
    written = json.loads(result.read_text())
    assert [failed["variant"] for failed in written["failed"]] == ["wild"]
    (row,) = written["runs"]
    with use_threads(1):
        undisturbed = train(TrainConfig(**LONG, eps=0.1, seed=3), tmp_path / "undisturbed")
    assert row["accuracy"] == undisturbed["accuracy"]
    assert (row["e_lin"], row["train_adv"]) == (undisturbed["e_lin"], undisturbed["train_adv"])
    one, other = (checkpoint.load(path)["model"] for path in (saved, tmp_path / "undisturbed" / "checkpoint.pt"))
    assert all(torch.equal(one[name], other[name]) for name in one)


def test_an_error_stops_the_queue_with_its_message(tmp_path, arguments, capfd):
    (tmp_path / "work" / "one" / "long-eps25.5-seed3").mkdir(parents=True)
    (tmp_path / "work" / "one" / "long-eps25.5-seed3" / "result.json").write_text('{"config": ')
    (tmp_path / "work" / QUEUE).write_text("1")  # left by a queue that is gone
    assert queue.main(arguments) == 1
    said = capfd.readouterr().err
    assert "evidence: expected a whole JSON file, got" in said
    assert "the queue stops: its job ended with status 1" in said
    assert (tmp_path / "work" / QUEUE).read_text() == str(os.getpid())


def test_a_pause_waits_for_the_job_and_holds_a_queue_back(tmp_path, arguments, monkeypatch, capsys):
    work = tmp_path / "work"
    running = lock(work / JOB)
    assert running is not None
    assert main([f"--work={work}", "--timeout=0.1"]) == 1
    assert (work / PAUSED).exists()
    running.close()
    assert main([f"--work={work}", "--timeout=0.1"]) == 0
    assert "paused, no job runs; no queue runs in this folder" in capsys.readouterr().out

    def woken(seconds):
        raise KeyboardInterrupt

    monkeypatch.setattr(time, "sleep", woken)
    monkeypatch.setattr(subprocess, "Popen", lambda *args, **options: pytest.fail("began in a pause"))
    assert queue.main(arguments) == 130
    assert is_free(work / JOB)


def test_a_job_that_does_not_stop_is_made_to(monkeypatch):
    monkeypatch.setattr(queue, "GRACE", 0.2)
    deaf = "import signal, time; signal.signal(signal.SIGTERM, signal.SIG_IGN); print(flush=True); time.sleep(600)"
    with subprocess.Popen([sys.executable, "-c", deaf], stdout=subprocess.PIPE, start_new_session=True) as child:
        assert child.stdout is not None
        child.stdout.readline()
        queue._stop(child)
        assert child.returncode == -signal.SIGKILL
