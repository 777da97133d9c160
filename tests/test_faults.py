"""The machine fails in the middle of a run: one line says so, and nothing finished is lost."""

from __future__ import annotations

import csv
import errno
import fcntl
import json
import logging
import os
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
import pytest
from lightning import Callback

from medqlora import entry, pipeline
from medqlora.config import compose
from medqlora.errors import TrainingError
from medqlora.evaluation import read_predictions, read_run, write_metrics
from medqlora.finetuning import read_checkpoint
from medqlora.train import train
from tests.conftest import Ended

ADAPTER = Path("adapter") / "adapter_model.safetensors"
QUICK = ("trainer.max_steps=6", "callbacks.checkpoints.every_n_steps=2", "peft=lora_r4")


@pytest.fixture
def options(tiny_options: list[str]) -> list[str]:
    return [*tiny_options, *QUICK, "quant=nf4_fp32", "optimizer=adamw"]


@pytest.fixture
def fail_writing(monkeypatch) -> Callable[..., list[str]]:
    """`fail_writing("last.ckpt", after=1)`: the disk is full from the second such file on.

    Every file of a run is made durable before it gets its name, which is where a full disk shows.
    """
    fsync = os.fsync

    def arrange(name: str, number: int = errno.ENOSPC, after: int = 0) -> list[str]:
        tried: list[str] = []

        def full(handle: int) -> None:
            path = os.readlink(f"/proc/self/fd/{handle}")
            if name in Path(path).name:
                tried.append(path)
                if len(tried) > after:
                    raise OSError(number, os.strerror(number), path)
            fsync(handle)

        monkeypatch.setattr(os, "fsync", full)
        return tried

    return arrange


def assert_told(ended: Ended, *words: str, code: int = 1) -> None:
    assert ended.code == code, ended.err
    [line] = ended.errors
    for word in words:
        assert word in line, line
    assert "Traceback" not in ended.err


@pytest.mark.parametrize(
    ("name", "after"),
    [("last.ckpt", 1), ("predictions.parquet", 0), ("metrics.json", 2), ("metrics.json", 0)],
)
def test_a_disk_that_fills_up_ends_the_run_in_one_line_and_it_goes_on_later(
    name, after, options, tmp_path, run_command, fail_writing, monkeypatch
):
    run_dir = tmp_path / "day" / "run"
    tried = fail_writing(name, after=after)
    ended = run_command("train", *options, f"hydra.run.dir={run_dir}")
    assert_told(ended, "No space left on device", "resume=auto", f"hydra.run.dir={run_dir}")
    assert len(tried) > after
    assert not list(run_dir.rglob("*.tmp"))
    if name == "metrics.json":
        # What is there is whole: none, or the one that was written before.
        found = [json.loads(f.read_text()) for f in run_dir.glob("metrics.json")]
        assert [metrics["status"] for metrics in found] == ["interrupted"] * (after > 0)
    else:
        assert read_run(run_dir).status == "failed"
        assert "No space left" in read_run(run_dir).metrics["error"]
        step = read_checkpoint(run_dir / "checkpoints" / "last.ckpt")["global_step"]
        assert step == (2 if name == "last.ckpt" else 6)
    monkeypatch.undo()
    again = run_command("train", *options, f"hydra.run.dir={run_dir}", "resume=auto")
    assert again.code == 0, again.err
    assert read_run(run_dir).status == "completed"
    assert read_run(run_dir).metrics["train"]["num_steps"] == 6
    assert len(read_predictions(run_dir, "test")) == 24


def test_a_run_folder_that_becomes_read_only_is_told_and_keeps_what_it_has(
    options, tmp_path, run_command, fail_writing
):
    run_dir = tmp_path / "day" / "run"
    fail_writing("last.ckpt", errno.EROFS, after=1)
    ended = run_command("train", *options, f"hydra.run.dir={run_dir}")
    assert_told(ended, "Read-only file system", "make the folder writable")
    assert read_checkpoint(run_dir / "checkpoints" / "last.ckpt")["global_step"] == 2


def test_a_folder_on_a_read_only_disk_is_refused_before_anything_is_read(options, run_command):
    """The kernel's own file system, where not even root makes a folder."""
    ended = run_command("train", *options, "hydra.run.dir=/proc/sys/medqlora")
    assert_told(ended, "/proc/sys/medqlora", "hydra.run.dir=DIR", code=2)


def test_a_log_that_cannot_be_written_is_said_once_and_stops_nothing(tmp_path, capsys):
    """The file of Linux that is always full. Python's own handler would print a traceback each."""
    root = logging.getLogger()
    handlers = list(root.handlers)
    entry._log_to(Path("/dev/full"))
    try:
        for _ in range(3):
            logging.getLogger("medqlora.test").warning("something")
    finally:
        entry._close_logs()
        root.handlers[:] = handlers
    err = capsys.readouterr().err
    assert err.count("no more is written to /dev/full") == 1
    assert "No space left on device" in err
    assert "Traceback" not in err


@pytest.mark.parametrize("resume", ["never", "auto"])
def test_of_two_runs_in_one_folder_the_second_is_refused(resume, options, tmp_path, run_command):
    """Also with resume=auto, which would else go on with a run that is still under way."""
    run_dir = tmp_path / "day" / "run"
    run_dir.mkdir(parents=True)
    with (run_dir / ".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        ended = run_command("train", *options, f"hydra.run.dir={run_dir}", f"resume={resume}")
    assert_told(ended, "under way in another process", str(run_dir))
    assert not (run_dir / "metrics.json").exists()


@pytest.fixture
def finished(options, tmp_path, run_command) -> Path:
    """The folder of a completed run."""
    run_dir = tmp_path / "day" / "run"
    ended = run_command("train", *options, f"hydra.run.dir={run_dir}")
    assert ended.code == 0, ended.err
    return run_dir


@pytest.mark.parametrize("resume", ["never", "auto"])
def test_a_run_whose_metrics_are_lost_is_not_overwritten(resume, options, finished, run_command):
    """By a run of another config; whatever is left of it."""
    (finished / "metrics.json").unlink()
    before = {p: p.read_bytes() for p in finished.rglob("*") if p.is_file() and p.suffix != ".log"}
    line = ("train", *options, "seed=5", f"hydra.run.dir={finished}", f"resume={resume}")
    assert_told(run_command(*line), str(finished), "Choose another hydra.run.dir.", code=2)
    assert {p: p.read_bytes() for p in before} == before
    assert not (finished / "metrics.json").exists()
    for name in ("config.yaml", "predictions.parquet", "checkpoints"):
        path = finished / name
        shutil.rmtree(path) if path.is_dir() else path.unlink()
    assert_told(run_command(*line), str(finished), "adapter", code=2)
    assert (finished / ADAPTER).read_bytes() == before[finished / ADAPTER]


def test_a_run_whose_metrics_are_lost_goes_on_when_asked(options, finished, run_command):
    (finished / "metrics.json").unlink()
    line = ("train", *options, f"hydra.run.dir={finished}")
    assert_told(run_command(*line), str(finished), "or resume=auto", code=2)
    ended = run_command(*line, "resume=auto")
    assert ended.code == 0, ended.err
    assert "resuming from" in ended.err
    assert read_run(finished).status == "completed"


def test_a_config_of_somebody_else_is_not_overwritten(options, tmp_path, run_command):
    """Such as that of the folder where the command is typed, with `hydra.run.dir=.`."""
    (tmp_path / "config.yaml").write_text("mine: 2020-01-01\n")
    ended = run_command("train", *options, f"hydra.run.dir={tmp_path}")
    assert_told(ended, "config.yaml", "Choose another hydra.run.dir.", code=2)
    assert (tmp_path / "config.yaml").read_text() == "mine: 2020-01-01\n"


def test_the_lock_of_a_run_is_gone_when_it_ends(trained_run):
    assert not (trained_run / ".lock").exists()


def test_a_clock_that_jumps_back_changes_no_duration_and_loses_nothing(
    options, tmp_path, monkeypatch
):
    """By a day, at every third question for the time, as when a wrong clock is set right."""
    now, asked = time.time, [0]

    def jumping() -> float:
        asked[0] += 1
        return now() - 86_400 * (asked[0] // 3)

    monkeypatch.setattr(time, "time", jumping)
    train(compose("train", options), tmp_path / "run")
    metrics = read_run(tmp_path / "run").metrics
    assert metrics["status"] == "completed"
    assert 0 < metrics["wall_seconds"] < 600
    assert metrics["train"]["first_step_seconds"] >= 0
    assert all(part["seconds"] > 0 for part in metrics["scoring"].values())
    monkeypatch.undo()
    # The folder is found and read as ever, whatever its times say.
    with pytest.raises(Exception, match="already holds a run"):
        train(compose("train", options), tmp_path / "run")


def test_a_wandb_process_that_dies_never_stops_training(options, tmp_path, monkeypatch, caplog):
    """Its service is a process of its own, which a machine short of memory may end."""
    import wandb

    monkeypatch.setenv("WANDB_MODE", "offline")
    killed: list[int] = []

    class Kill(Callback):
        def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, row: int) -> None:
            if row != 2 or killed:
                return
            for child in psutil.Process().children(recursive=True):
                if "wandb" in child.name() or any("wandb" in word for word in child.cmdline()):
                    child.kill()
                    killed.append(child.pid)

    build = pipeline.build_callbacks
    monkeypatch.setattr(
        pipeline, "build_callbacks", lambda *given: {**build(*given), "kill": Kill()}
    )
    chosen = [option for option in options if option != "logger=csv"]
    with caplog.at_level(logging.WARNING):
        train(compose("train", [*chosen, "logger=wandb"]), tmp_path / "run")
    wandb.teardown()  # as when Python ends: nobody is left to ask
    assert killed
    assert read_run(tmp_path / "run").status == "completed"
    assert len(read_predictions(tmp_path / "run", "test")) == 24
    told = [r.getMessage() for r in caplog.records if "W&B failed" in r.getMessage()]
    assert len(told) <= 1
    assert not any("Traceback" in r.getMessage() for r in caplog.records)


def test_what_cannot_be_read_is_not_called_a_full_disk(options, tmp_path, monkeypatch):
    """Only writing fills a disk: a refusal elsewhere keeps its own words."""

    def refused(*args: Any, **kwargs: Any) -> None:
        raise PermissionError(errno.EACCES, "Permission denied", "/etc/shadow")

    monkeypatch.setattr(pipeline, "build_base", refused)
    with pytest.raises(PermissionError) as error:
        train(compose("train", options), tmp_path / "run")
    assert not isinstance(error.value, TrainingError)
    assert read_run(tmp_path / "run").status == "failed"


def test_a_run_shorter_than_the_logging_interval_logs_its_last_update(options, tmp_path):
    """And so has its metrics.csv, which nothing else would write without a validation."""
    words = [*options, "data.val_file=null", "trainer.log_every_n_steps=10"]
    train(compose("train", words), tmp_path / "run")
    [row] = csv.DictReader((tmp_path / "run" / "metrics.csv").open())
    assert row["step"] == "5"
    assert float(row["train/loss"]) == read_run(tmp_path / "run").metrics["train"]["loss"]


def test_where_a_run_cannot_go_on_the_advice_works(options, tmp_path, run_command):
    """In the same folder resume=never is refused."""
    line = ("train", *options, "trainer.val_check_interval=2")
    run_dir = tmp_path / "run"
    assert run_command(*line, f"hydra.run.dir={run_dir}").code == 0
    (run_dir / "checkpoints" / "best.ckpt").unlink()
    write_metrics(run_dir, read_run(run_dir).metrics | {"status": "interrupted"})
    ended = run_command(*line, f"hydra.run.dir={run_dir}", "resume=auto")
    assert_told(ended, "best.ckpt", "resume=never in another hydra.run.dir", code=2)
    again = run_command(*line, f"hydra.run.dir={tmp_path / 'other'}", "resume=never")
    assert again.code == 0, again.err
