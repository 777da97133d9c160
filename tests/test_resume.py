"""A run that is killed at any moment goes on with the same command and ends as if it never was."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pandas as pd
import pytest

from medqlora.config import compose
from medqlora.train import train
from tests.conftest import ROOT

ADAPTER = Path("adapter") / "adapter_model.safetensors"


@pytest.fixture(scope="module")
def options(tiny_options) -> list[str]:
    """A run of 60 updates that saves often, validates, and draws random numbers for dropout."""
    return [
        *tiny_options,
        "resume=auto",
        "quant=nf4",
        "peft=lora_r4",
        "peft.lora_dropout=0.1",
        "optimizer.lr=1e-3",
        "trainer.max_epochs=15",
        "trainer.accumulate_grad_batches=2",
        "callbacks.checkpoints.every_n_steps=5",
    ]


@pytest.fixture(scope="module")
def uninterrupted(options, tmp_path_factory) -> Path:
    return train(compose("train", options), tmp_path_factory.mktemp("reference") / "day" / "time")


def start(options: list[str], folder: Path) -> subprocess.Popen[str]:
    """The command in a process of its own, its run folder where it is by default."""
    return subprocess.Popen(
        [sys.executable, "-m", "medqlora.train", *options],
        cwd=folder,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        stderr=subprocess.PIPE,
        stdout=subprocess.DEVNULL,
        text=True,
    )


def stop(process: subprocess.Popen[str], number: signal.Signals, folder: Path) -> tuple[str, str]:
    """Send a signal at a random moment after the process has written a checkpoint.

    Returns:
        What the process had written to standard error, and the moment, to tell in a failure.
    """
    started, deadline = time.time(), time.monotonic() + 300
    while process.poll() is None and time.monotonic() < deadline:
        written = [path.stat().st_mtime for path in folder.glob("runs/*/*/checkpoints/last.ckpt")]
        if any(moment >= started for moment in written):
            break
        time.sleep(0.01)
    delay = random.uniform(0, 0.4)
    time.sleep(delay)
    process.send_signal(number)
    _, told = process.communicate(timeout=120)
    return told, f"{number.name} {delay:.3f} s after the first checkpoint"


def only_run(folder: Path) -> Path:
    [found] = folder.glob("runs/*/*")
    return found


def assert_same_end(run_dir: Path, reference: Path, told: str) -> None:
    metrics, expected = (json.loads((d / "metrics.json").read_text()) for d in (run_dir, reference))
    assert metrics["status"] == expected["status"] == "completed", told
    assert (run_dir / ADAPTER).read_bytes() == (reference / ADAPTER).read_bytes(), told
    assert metrics["config_hash"] == expected["config_hash"]
    for key in ("num_steps", "num_questions", "best_step", "loss", "fill_fraction"):
        assert metrics["train"][key] == expected["train"][key], (key, told)
    assert metrics["val"] == expected["val"], told
    tables = [pd.read_parquet(d / "predictions.parquet") for d in (run_dir, reference)]
    pd.testing.assert_frame_equal(*tables, check_exact=True)


def test_a_killed_run_goes_on_to_the_same_adapter_bit_for_bit(
    options, uninterrupted, run_command, tmp_path, monkeypatch
):
    """SIGKILL twice, at random moments; then the same command runs to the end.

    For W&B, which is offline here, all three are one run.
    """
    options = [*(word for word in options if word != "logger=csv"), "logger=wandb"]
    folder = tmp_path / "killed"
    folder.mkdir()
    moments = []
    for _ in range(2):
        process = start(options, folder)
        told, moment = stop(process, signal.SIGKILL, folder)
        moments.append(moment)
        assert process.returncode == -signal.SIGKILL, told
        assert (
            json.loads((only_run(folder) / "metrics.json").read_text())["status"] == "interrupted"
        )
    monkeypatch.chdir(folder)
    ended = run_command("train", *options)
    assert ended.code == 0, (ended.err, moments)
    assert "resuming from" in ended.err
    assert_same_end(only_run(folder), uninterrupted, str(moments))
    parts = [path.name for path in (only_run(folder) / "wandb").glob("offline-run-*")]
    assert len(parts) == 3
    assert len({name.rpartition("-")[2] for name in parts}) == 1, parts


def test_sigterm_saves_says_so_and_goes_on_to_the_same_end(
    options, uninterrupted, run_command, tmp_path, monkeypatch
):
    folder = tmp_path / "stopped"
    folder.mkdir()
    process = start(options, folder)
    told, moment = stop(process, signal.SIGTERM, folder)
    assert process.returncode == 128 + signal.SIGTERM, told
    [line] = [line for line in told.splitlines() if line.startswith("error: ")]
    assert "SIGTERM" in line
    assert "resume=auto" in line
    assert "Traceback" not in told
    run_dir = only_run(folder)
    metrics = json.loads((run_dir / "metrics.json").read_text())
    assert metrics["status"] == "interrupted"
    assert metrics["error"] in line
    assert metrics["train"]["num_steps"] > 0
    monkeypatch.chdir(folder)
    ended = run_command("train", *options)
    assert ended.code == 0, (ended.err, moment)
    assert_same_end(only_run(folder), uninterrupted, moment)
