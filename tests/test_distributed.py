"""Two processes make the run that one makes with twice the rows an update, and write it once."""

from __future__ import annotations

import contextlib
import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pandas as pd
import pytest
import torch
from safetensors.torch import load_file

from medqlora import instantiation, processes
from medqlora.config import compose
from medqlora.entry import command_line
from medqlora.train import train
from tests.conftest import ROOT

ADAPTER = Path("adapter") / "adapter_model.safetensors"


@pytest.fixture(scope="module")
def options(tiny_options) -> list[str]:
    """A 16-bit base in float32, so that what is left of a difference is the order of sums.

    Plain layers, which are all that a shared-out base runs. Eight rows, so that one process has no
    other rows than two.
    """
    return [
        *(word for word in tiny_options if word not in ("trainer=cpu", "data.token_budget=512")),
        "data.token_budget=448",
        "trainer.accelerator=cpu",
        "quant=none_fp32",
        "acceleration.fused=off",
        "peft=lora_r4",
        "optimizer=adamw",
        "optimizer.lr=1e-3",
        "trainer.max_epochs=15",
        "callbacks.checkpoints.every_n_steps=5",
        "select=last",
    ]


def start(
    options: list[str], run_dir: Path | None, cwd: Path | None = None
) -> subprocess.Popen[str]:
    """`torchrun --nproc-per-node 2 -m medqlora.train`, in a folder of its own or the default."""
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    verb = ["--nproc-per-node", "2", "-m", "medqlora.train"]
    place = []
    if run_dir is not None:
        run_dir.parent.mkdir(parents=True, exist_ok=True)
        place = [f"hydra.run.dir={run_dir}"]
        cwd = cwd or run_dir.parent
    return subprocess.Popen(
        [*torchrun, *verb, *options, *place],
        cwd=cwd,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        stderr=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )


def metrics_of(run_dir: Path) -> dict:
    return json.loads((run_dir / "metrics.json").read_text())


@pytest.fixture(scope="module")
def two_processes(options, tmp_path_factory) -> Path:
    run_dir = tmp_path_factory.mktemp("two") / "run"
    process = start([*options, "trainer=ddp"], run_dir)
    out, err = process.communicate(timeout=300)
    assert process.returncode == 0, err[-3000:]
    assert out.count("run folder:") == 1, "the first process alone prints"
    return run_dir


def test_two_processes_make_the_run_of_one_with_the_same_effective_batch(
    two_processes, options, tmp_path
):
    """The same rows are in every update, so only the order of sums differs."""
    single = [*options, "trainer=cpu", "trainer.accumulate_grad_batches=2"]
    run_dir = train(compose("train", single), tmp_path / "one")
    ours, theirs = metrics_of(run_dir), metrics_of(two_processes)
    assert theirs["status"] == "completed"
    for key in ("num_steps", "num_questions", "fill_fraction"):
        assert theirs["train"][key] == ours["train"][key], key
    assert theirs["train"]["num_processes"] == 2
    for split in ("val", "test"):
        assert theirs[split]["n"] == ours[split]["n"]
        assert theirs[split]["loss"] == pytest.approx(ours[split]["loss"], abs=1e-4)
    mine, other = load_file(run_dir / ADAPTER), load_file(two_processes / ADAPTER)
    assert mine.keys() == other.keys()
    for name, weight in mine.items():
        # AdamW turns the rounding of a tiny gradient into a step of the whole learning rate.
        torch.testing.assert_close(other[name], weight, rtol=0, atol=2e-3, msg=name)


def test_each_question_is_counted_once_and_the_folder_written_by_one(two_processes):
    scored = pd.read_parquet(two_processes / "predictions.parquet")
    assert not scored.duplicated(["split", "id"]).any()
    metrics = metrics_of(two_processes)
    for split, rows in scored.groupby("split"):
        assert metrics[split]["n"] == len(rows) == metrics["data"][f"num_{split}"]
        assert metrics[split]["accuracy"] == pytest.approx(rows["correct"].mean())
    assert metrics["train"]["num_questions"] == 15 * metrics["data"]["num_train"]
    # metrics.csv has each validation once, with the numbers of all questions.
    table = pd.read_csv(two_processes / "metrics.csv")
    accuracies = table["val/accuracy"].dropna().tolist()
    assert len(accuracies) == len(table["val/letter_share/A"].dropna()) == 15
    assert accuracies[-1] == pytest.approx(metrics["val"]["accuracy"])
    assert metrics["command"].startswith("torchrun --nproc-per-node 2 -m medqlora.train ")
    assert len(list(two_processes.parent.iterdir())) == 1, "no folder of another process"


def test_a_base_that_is_shared_out_stops_resumes_and_ends_as_copies_of_it_do(
    two_processes, options, tmp_path
):
    """FSDP adds up nothing in another order, so the adapter is the same to the bit."""
    options = [*options, "trainer=fsdp", "resume=auto"]
    run_dir = tmp_path / "runs" / "day" / "time"
    process = start(options, run_dir)
    last = run_dir / "checkpoints" / "last.ckpt"
    deadline = time.monotonic() + 200
    while process.poll() is None and not last.exists() and time.monotonic() < deadline:
        time.sleep(0.01)
    process.send_signal(signal.SIGTERM)  # torchrun passes it on, at different moments
    _, err = process.communicate(timeout=120)
    assert process.returncode != 0
    stopped = metrics_of(run_dir)
    assert stopped["status"] == "interrupted", err[-2000:]
    numbers = re.search(r"keeps about ([\d,]+) of the ([\d,]+) frozen weights of the layers", err)
    assert numbers, err[-2000:]
    kept, all_of_them = (int(number.replace(",", "")) for number in numbers.groups())
    assert kept == pytest.approx(all_of_them / 2, rel=0.01), "half of the layers is elsewhere"
    assert "SIGTERM: state saved at step" in stopped["error"]
    assert 0 < stopped["train"]["num_steps"] < metrics_of(two_processes)["train"]["num_steps"]

    process = start(options, None, tmp_path)
    _, err = process.communicate(timeout=300)
    assert process.returncode == 0, err[-3000:]
    assert "resuming from" in err
    assert [*(tmp_path / "runs").glob("*/*")] == [run_dir]
    assert (run_dir / ADAPTER).read_bytes() == (two_processes / ADAPTER).read_bytes()
    ended, expected = metrics_of(run_dir), metrics_of(two_processes)
    for key in ("num_steps", "num_questions", "fill_fraction"):
        assert ended["train"][key] == expected["train"][key], key
    assert ended["val"] == expected["val"]


@pytest.fixture(scope="module")
def alone(options, tmp_path_factory) -> Path:
    """A run of two updates without torchrun."""
    return train(compose("train", [*options, *SHORT, "trainer=cpu"]), tmp_path_factory.mktemp("a"))


SHORT = ["trainer.max_epochs=null", "trainer.max_steps=2", "data.limit_val=0", "data.limit_test=0"]


@pytest.fixture
def torchrun_of_one(monkeypatch) -> None:
    """The environment in which `torchrun` starts a single process."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    values = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "LOCAL_WORLD_SIZE": "1"}
    values |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "GROUP_RANK": "0"}
    for name, value in {**values, "TORCHELASTIC_RUN_ID": "none"}.items():
        monkeypatch.setenv(name, value)


@pytest.mark.parametrize("trainer", ["ddp", "fsdp"])
def test_torchrun_with_one_process_makes_the_run_of_no_torchrun(
    trainer, alone, options, tmp_path, torchrun_of_one
):
    run_dir = train(compose("train", [*options, *SHORT, f"trainer={trainer}"]), tmp_path / "run")
    assert (run_dir / ADAPTER).read_bytes() == (alone / ADAPTER).read_bytes()
    assert metrics_of(run_dir)["train"]["num_processes"] == 1
    assert metrics_of(run_dir)["command"].startswith("torchrun --nproc-per-node 1 -m ")
    assert not torch.distributed.is_initialized(), "the process can begin another run"


# --- what does not go together --------------------------------------------------------------------


@pytest.fixture
def torchrun(monkeypatch):
    """The environment in which `torchrun` starts the first of two processes."""
    values = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2"}
    for name, value in {**values, "TORCHELASTIC_RUN_ID": "none"}.items():
        monkeypatch.setenv(name, value)
    return None


@pytest.mark.parametrize("trainer", ["ddp", "fsdp"])
def test_lightning_does_not_run_the_hydra_command_again(trainer, run_command, tiny_options):
    words = [word for word in tiny_options if word != "trainer=cpu"]
    ended = run_command("train", *words, f"trainer={trainer}", "trainer.accelerator=cpu")
    assert ended.code == 2
    [line] = ended.errors
    assert f"torchrun --nproc-per-node 2 -m medqlora.train trainer={trainer}" in line


def test_several_devices_without_processes_are_refused(run_command, tiny_options):
    ended = run_command("train", *tiny_options, "trainer.devices=2")
    assert ended.code == 2
    assert "torchrun" in ended.errors[0]


@pytest.mark.parametrize(
    ("verb", "arguments", "words"),
    [
        ("evaluate", ["peft=none"], "python -m medqlora.evaluate"),
        ("train", ["-m", "seed=1,2"], "one torchrun line a job"),
    ],
)
def test_torchrun_starts_only_what_works_in_several_processes(
    verb, arguments, words, run_command, torchrun
):
    ended = run_command(verb, *arguments)
    assert ended.code == 2
    [line] = ended.errors
    assert words in line


def test_only_the_first_process_refuses_aloud_and_makes_a_folder(
    run_command, tiny_options, torchrun, monkeypatch, tmp_path
):
    """The others ask for the same and are refused as it is: one line is enough."""
    monkeypatch.setattr(processes, "connected", lambda accelerator: contextlib.nullcontext())
    monkeypatch.setattr(processes, "gathered", lambda value: [value, value])
    request = [*tiny_options, "trainer.max_steps=1", f"hydra.run.dir={tmp_path}/run"]
    first = run_command("train", *request)
    monkeypatch.setenv("RANK", "1")
    second = run_command("train", *request)
    assert (first.code, second.code) == (2, 2)
    assert "trainer=ddp" in first.errors[0]
    assert second.err == ""
    assert list(tmp_path.iterdir()) == []


def test_what_one_process_alone_meets_is_told_with_its_number(
    run_command, tiny_options, torchrun, monkeypatch, tmp_path
):
    def broken(*arguments: object) -> None:
        raise RuntimeError("no space on this node")

    monkeypatch.setenv("RANK", "1")
    monkeypatch.setattr(processes, "connected", broken)
    ended = run_command("train", *tiny_options, f"hydra.run.dir={tmp_path}/run")
    assert ended.code == 1
    [line] = ended.errors
    assert line.startswith("error: process 1: RuntimeError: no space on this node")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("machines", "told"),
    [(2, "torchrun --nnodes 2 --nproc-per-node 2 -m "), (1, "torchrun --nproc")],
)
def test_the_command_of_a_run_repeats_it_on_as_many_machines(machines, told, torchrun, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", str(2 * machines))
    assert command_line("train").startswith(told)


@pytest.mark.parametrize(
    ("trainer", "overrides", "words"),
    [
        ("cpu", [], "trainer=ddp"),
        ("ddp", ["trainer.strategy=deepspeed"], "trainer.strategy=deepspeed"),
        ("fsdp", ["quant=nf4"], "quant=none"),
        ("fsdp", ["quant=none", "peft=full"], "peft=full"),
        ("fsdp", ["quant=none", "acceleration.fused=on"], "acceleration.fused"),
        ("fsdp", ["quant=none", "acceleration.compile=cuda_graphs"], "cuda_graphs"),
    ],
)
def test_what_cannot_be_shared_is_refused_by_name(
    trainer, overrides, words, tiny_options, torchrun, monkeypatch
):
    from medqlora.acceleration import Acceleration
    from medqlora.errors import ConfigError

    monkeypatch.setattr(Acceleration, "check_device", lambda self, device: None)
    options = [word for word in tiny_options if word != "trainer=cpu"]
    cfg = compose("train", [*options, f"trainer={trainer}", "trainer.accelerator=cpu", *overrides])
    with pytest.raises(ConfigError, match=words) as error:
        instantiation.check(cfg)
    assert "\n" not in str(error.value)
