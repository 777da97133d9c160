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
from medqlora.evaluation import write_metrics
from medqlora.finetuning import read_checkpoint
from medqlora.tracking import RunCSVLogger
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
    assert_same_curve(run_dir, reference)


def assert_same_curve(run_dir: Path, reference: Path) -> None:
    """No row of metrics.csv twice, and none that the other has not.

    The row of the very update that a checkpoint was saved after may be missing: it is written
    behind the checkpoint.
    """
    ours, theirs = (pd.read_csv(d / "metrics.csv") for d in (run_dir, reference))
    for key in ("train/loss", "val/loss"):
        rows, expected = ([*t.dropna(subset=[key])["step"]] for t in (ours, theirs))
        assert rows == sorted(set(rows)), key
        assert set(rows) <= set(expected), key
        assert len(rows) >= len(expected) - 2, key


def test_rows_behind_the_checkpoint_are_dropped_and_earlier_ones_stay(tmp_path):
    """A killed run logged updates that the run that resumes makes once more."""
    first = RunCSVLogger(tmp_path)
    for step in range(4):
        first.log_metrics({"train/loss": 4.0 - step}, step)
        first.save()
    first.log_metrics({"val/loss": 1.5}, 3)
    first.save()
    with (tmp_path / "metrics.csv").open("a") as file:
        file.write("3,0.")  # power was lost while it wrote
    resumed = RunCSVLogger(tmp_path)
    resumed.save()
    resumed.log_metrics({"train/loss": 2.25}, 2)
    resumed.log_metrics({"train/loss": 1.25}, 3)
    resumed.log_metrics({"val/accuracy": 0.5}, 3)
    resumed.save()
    table = pd.read_csv(tmp_path / "metrics.csv")
    losses = table.dropna(subset=["train/loss"])
    assert [*losses["step"]] == [0, 1, 2, 3]
    assert [*losses["train/loss"]] == [4.0, 3.0, 2.25, 1.25]
    assert table["val/loss"].isna().all()
    assert [*table["val/accuracy"].dropna()] == [0.5]


def test_a_run_that_resumes_keeps_the_curve_of_before(tiny_options, tmp_path):
    """Its checkpoint is of update 4 of 6, and all six were logged before it was killed."""
    words = [
        *tiny_options,
        "peft=lora_r4",
        "optimizer=adamw",
        "trainer.max_steps=6",
        "trainer.log_every_n_steps=1",
        "callbacks.checkpoints.every_n_steps=2",
        "data.val_file=null",
        "resume=auto",
    ]
    run_dir = train(compose("train", words), tmp_path / "day" / "run")
    checkpoints = run_dir / "checkpoints"
    before = pd.read_csv(run_dir / "metrics.csv")
    assert [*before["step"]] == [*range(6)]
    assert read_checkpoint(checkpoints / "last.prev.ckpt")["global_step"] == 4
    (checkpoints / "last.prev.ckpt").replace(checkpoints / "last.ckpt")
    metrics = json.loads((run_dir / "metrics.json").read_text())
    write_metrics(run_dir, metrics | {"status": "interrupted"})
    train(compose("train", words), run_dir)
    columns = ["epoch", "step", "train/loss"]  # the speed is of each part
    after = pd.read_csv(run_dir / "metrics.csv")
    pd.testing.assert_frame_equal(after[columns], before[columns])
    # Stopped behind its last update, it sees no loss when it goes on, and keeps the one it had.
    again = json.loads((run_dir / "metrics.json").read_text())
    write_metrics(run_dir, again | {"status": "interrupted"})
    train(compose("train", words), run_dir)
    ended = json.loads((run_dir / "metrics.json").read_text())
    assert ended["train"]["loss"] == again["train"]["loss"] == metrics["train"]["loss"]


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
