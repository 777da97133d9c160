"""A sweep ends, tells what failed, and typed again runs only what is missing."""

from __future__ import annotations

import fcntl
import gc
import itertools
import json
import logging
import math
import os
import re
import shutil
import signal
import socket
import struct
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import nullcontext, suppress
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import psutil
import pytest
from lightning import Trainer
from omegaconf import OmegaConf
from transformers import GemmaForCausalLM

from medqlora import instantiation, pipeline
from medqlora import train as train_verb
from medqlora.config import CONFIG_DIR, compose
from medqlora.data import datamodule
from medqlora.entry import sweep_name
from medqlora.errors import CheckpointError, ConfigError, MedQLoRAError
from medqlora.evaluation import config_hash, read_predictions, read_run, write_metrics
from medqlora.finetuning import MCQAModule
from medqlora.quantization import loading
from medqlora.report import report
from medqlora.runs import find_completed, find_unfinished, recorded, resolved, sweep_root
from medqlora.tracking import GuardedLogger, build_loggers, check_loggers, finish_loggers
from medqlora.train import train
from tests.conftest import ROOT
from tests.wandb_server import WandbServer

NAMED = sorted(path.stem for path in (CONFIG_DIR / "sweep").glob("*.yaml"))
SEARCHES = {"optuna_lora"}  # no grid of jobs: tests/test_search.py


@pytest.fixture(scope="module")
def small(tiny_options, question_files) -> list[str]:
    """A job of a second or two: one packed row."""
    short = ["data.limit_train=8", "data.limit_val=8", "data.limit_test=16"]
    return [*tiny_options, *short, "quant.compute_dtype=float32", "trainer.max_steps=2"]


@pytest.fixture
def sweep(run_command, small, tmp_path, monkeypatch):
    """`sweep("peft=lora_r4,lora_r8")`: `train -m` in a fresh working directory."""
    monkeypatch.chdir(tmp_path)

    def run(*words: str) -> Any:
        return run_command("train", "-m", *small, *words)

    return run


def statuses(folder: Path) -> dict[str, str | None]:
    """Status of each job of a sweep; those taken over from another sweep too."""
    return {p.name: read_run(p).status for p in sorted(folder.iterdir()) if p.is_dir()}


def only_sweep() -> Path:
    [folder] = Path("sweeps").iterdir()
    return folder


# --- names ----------------------------------------------------------------------------------------


def test_the_same_line_gets_the_same_folder_and_another_line_another():
    line = ["-m", "quant=nf4,none", "seed=1,2", "model=tiny_gemma"]
    assert sweep_name(line) == sweep_name(["model=tiny_gemma", "--multirun", *line[1:3]])
    assert sweep_name(line) == sweep_name([*line, "hydra/launcher=joblib"])
    assert sweep_name(line) != sweep_name([*line, "data.limit_train=5"])
    assert sweep_name(line).startswith("quant-seed-")
    assert "/" not in sweep_name(["a/b=1,2"])


@pytest.mark.parametrize(
    ("folder", "root"),
    [("/w/sweeps/rank", "/w/sweeps"), ("/w/sweeps/2026/x", "/w/sweeps"), ("/w/mine", "/w/mine")],
)
def test_runs_are_looked_for_below_the_folder_of_all_sweeps_only(folder, root):
    """Never above it: `hydra.sweep.dir=/tmp/mine` must not search /tmp."""
    assert sweep_root(Path(folder)) == Path(root)


# --- a real sweep ---------------------------------------------------------------------------------


def test_the_same_line_runs_only_what_is_missing(sweep, tmp_path):
    """The life of one sweep: a refused job, then everything done, interrupted, lost, changed."""
    line = ("peft=lora_r4,none,lora_r8", "baselines=[base_quantized]")
    ended = sweep(*line)
    assert ended.code == 1
    [error] = ended.errors
    assert error.startswith("error: job 1: peft=none")
    folder = only_sweep()
    assert statuses(folder) == {"0": "completed", "1": "failed", "2": "completed"}
    assert "peft=none" in str(read_run(folder / "1").error)
    command = read_run(folder / "2").metrics["command"]
    assert "peft=lora_r8" in command
    assert "-m " not in command.replace("-m medqlora", "")
    assert read_run(folder / "2").metrics["choices"]["peft"] == "lora_r8"
    # The second adapter found the bare base scored already.
    assert ended.err.count("the bare base was scored already") == 1
    bases = [read_run(folder / job / "baselines" / "base_quantized") for job in ("0", "2")]
    assert bases[0].metrics == bases[1].metrics
    assert "--config-name config" in bases[0].metrics["command"]
    before = {job: read_run(folder / job).metrics["started"] for job in ("0", "2")}

    # All that could be done is done: nothing but the refused job runs.
    again = sweep(*line)
    assert again.code == 1
    assert [text for text in again.err.splitlines() if text.startswith("done already: ")] == [
        f"done already: {(folder / job).resolve()}" for job in ("0", "2")
    ]
    assert "training " not in again.err
    assert {job: read_run(folder / job).metrics["started"] for job in before} == before

    # One was interrupted with a checkpoint, one without.
    for job in ("0", "2"):
        metrics = read_run(folder / job).metrics | {"status": "interrupted"}
        write_metrics(folder / job, metrics)
    shutil.rmtree(folder / "2" / "checkpoints")
    third = sweep(*line)
    assert third.code == 1
    assert f"going on with {(folder / '0').resolve()}" in third.err
    assert third.err.count("training ") == 2
    assert statuses(folder) == {"0": "completed", "1": "failed", "2": "completed"}
    assert (folder / "2" / "adapter" / "adapter_config.json").exists()

    # Another sweep takes over what this one did, and its report has it.
    other = sweep("peft=lora_r8,lora_r16", "baselines=[]")
    assert other.code == 0, other.err
    [second] = [path for path in Path("sweeps").iterdir() if path != folder]
    assert f"done already: {(folder / '2').resolve()}" in other.err
    assert (second / "0").is_symlink()
    ablation = report(compose("report", [f"runs={second}"]), tmp_path / "report")
    assert sorted(s.name for s in ablation.settings if s.kind == "trained") == [
        "lora_r16",
        "lora_r8",
    ]
    assert sorted(p.name for p in (folder / "2").iterdir()) == sorted(
        p.name for p in (folder / "0").iterdir()
    )


def test_without_hashes_a_younger_data_file_is_not_the_same_run(question_files, tmp_path):
    """config_hash leaves the content of files out; of runs of before, the file's date decides."""
    questions = tmp_path / "train.jsonl"
    shutil.copy(question_files["train"], questions)
    os.utime(questions, (1e9, 1e9))
    cfg = compose("train", [*_overrides(question_files, questions)])
    values = resolved(cfg)
    run = tmp_path / "sweeps" / "a" / "0"
    run.mkdir(parents=True)
    (run / "config.yaml").write_text(OmegaConf.to_yaml(OmegaConf.create(values)))
    write_metrics(
        run,
        {
            "status": "completed",
            "config_hash": config_hash(values),
            "started": datetime.now(UTC).isoformat(timespec="seconds"),
        },
    )
    assert find_completed(tmp_path / "sweeps", values) == run
    os.utime(questions, (later := time.time() + 5, later))
    assert find_completed(tmp_path / "sweeps", values) is None
    os.utime(questions, (1e9, 1e9))
    moved = {**values, "data": {**values["data"], "train_file": question_files["val"]}}
    assert config_hash(moved) == config_hash(values)
    assert find_completed(tmp_path / "sweeps", moved) is None


def test_a_data_file_of_another_content_is_not_the_same_run(question_files, tmp_path):
    """Whatever its date: `mv`, `cp -p`, rsync and unzip bring files older than the run."""
    questions = tmp_path / "train.jsonl"
    shutil.copy(question_files["train"], questions)
    cfg = compose("train", [*_overrides(question_files, questions)])
    run = tmp_path / "sweeps" / "a" / "0"
    with recorded(cfg, run, "train", keep_refused=False):
        pass
    content = questions.read_text()
    for change, expected in ((content[: content.index("\n", 999) + 1], None), (content, run)):
        questions.write_text(change)
        for date in (1e9, time.time() + 5):
            os.utime(questions, (date, date))
            assert find_completed(tmp_path / "sweeps", resolved(cfg)) == expected
    assert len(set(read_run(run).metrics["files"].values())) == 3


def test_a_run_that_goes_on_is_of_the_files_its_checkpoint_read(question_files, tmp_path):
    """Going on with changed data is refused, and leaves what the checkpoint is of unchanged."""
    questions = tmp_path / "train.jsonl"
    shutil.copy(question_files["train"], questions)
    cfg = compose("train", [*_overrides(question_files, questions), "resume=auto"])
    run = tmp_path / "sweeps" / "a" / "0"
    values = resolved(cfg)
    for content in (questions.read_text(), ""):
        questions.write_text(content)
        with suppress(CheckpointError), recorded(cfg, run, "train", keep_refused=True):
            (run / "checkpoints").mkdir(exist_ok=True)
            (run / "checkpoints" / "last.ckpt").touch()
            raise CheckpointError("other rows")
        unfinished = find_unfinished(tmp_path / "sweeps", config_hash(values), values)
        assert (unfinished == run) == bool(content)


def test_a_job_killed_before_its_data_were_changed_is_run_anew(sweep, question_files, tmp_path):
    """Its checkpoint is of rows that are no more; the bases it scored are as well."""
    questions = tmp_path / "train.jsonl"
    shutil.copy(question_files["train"], questions)
    os.utime(questions, (1e9, 1e9))
    line = (
        "peft=lora_r4",
        f"data.train_file={questions}",
        "baselines=[base_quantized]",
        "hydra.sweep.dir=sweeps/mine",
    )
    assert sweep(*line).code == 0
    job = Path("sweeps/mine/0")
    metrics = read_run(job).metrics
    kept = read_run(job / "baselines" / "base_quantized").metrics["started"]
    time.sleep(1.1)  # `started` is in whole seconds
    questions.write_text("".join(questions.read_text().splitlines(keepends=True)[:4]))
    # As an earlier attempt to go on left it, which began after the change and hashed no files.
    later = datetime.fromtimestamp(time.time() + 60, UTC).isoformat(timespec="seconds")
    for started in (metrics["started"], later):
        if started == later:
            del metrics["files"]
        write_metrics(job, metrics | {"status": "interrupted", "started": started})
        for path in (job / "checkpoints").iterdir():
            os.utime(path, (1.1e9, 1.1e9))
        os.utime(questions, (1.2e9, 1.2e9) if started == later else None)
        ended = sweep(*line)
        assert ended.code == 0, ended.err
        assert "going on with" not in ended.err
        assert statuses(Path("sweeps/mine")) == {"0": "completed"}
        assert read_run(job).metrics["data"]["num_train"] == 4
        metrics = read_run(job).metrics
    assert read_run(job / "baselines" / "base_quantized").metrics["started"] > kept


def test_an_unfinished_job_of_another_file_keeps_its_checkpoint(sweep, question_files, tmp_path):
    """config_hash leaves paths out: the same line with another file goes beside it."""
    questions = tmp_path / "other.jsonl"
    shutil.copy(question_files["train"], questions)
    line = ("peft=lora_r4", "hydra.sweep.dir=sweeps/mine")
    assert sweep(*line).code == 0
    job = Path("sweeps/mine/0")
    write_metrics(job, read_run(job).metrics | {"status": "interrupted"})
    ended = sweep(*line, f"data.train_file={questions}")
    assert ended.code == 0, ended.err
    assert statuses(Path("sweeps/mine")) == {"0": "interrupted", "0-2": "completed"}
    assert (job / "checkpoints" / "last.ckpt").exists()
    # Nor is what a job left overwritten when its metrics are lost.
    (job / "metrics.json").unlink()
    adapter = (job / "adapter" / "adapter_model.safetensors").stat().st_mtime_ns
    assert sweep(*line).code == 0
    assert (job / "adapter" / "adapter_model.safetensors").stat().st_mtime_ns == adapter
    assert read_run("sweeps/mine/0-3").status == "completed"


def _overrides(files: dict[str, str], train_file: Path) -> list[str]:
    return ["data=files", f"data.train_file={train_file}", f"data.val_file={files['val']}"]


def test_a_folder_with_another_config_is_kept_and_the_job_goes_beside_it(sweep):
    first = sweep("seed=1", "hydra.sweep.dir=sweeps/mine", "peft=lora_r4")
    second = sweep("seed=1", "hydra.sweep.dir=sweeps/mine", "peft=lora_r8")
    assert (first.code, second.code) == (0, 0), second.err
    assert statuses(Path("sweeps/mine")) == {"0": "completed", "0-2": "completed"}
    assert read_run("sweeps/mine/0").config["peft"]["r"] == 4
    assert read_run("sweeps/mine/0-2").config["peft"]["r"] == 8
    assert all((Path("sweeps/mine") / job / "train.log").exists() for job in ("0", "0-2"))


def test_a_job_under_way_elsewhere_is_left_alone(sweep):
    """Two terminals with the same line share the work instead of spoiling it."""
    folder = Path("sweeps/mine/0")
    folder.mkdir(parents=True)
    with (folder / ".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        ended = sweep("peft=lora_r4,lora_r8", "hydra.sweep.dir=sweeps/mine")
    assert ended.code == 1
    [error] = ended.errors
    assert "under way in another process" in error
    assert read_run("sweeps/mine/1").status == "completed"


# --- named sweeps ---------------------------------------------------------------------------------


def jobs_of(name: str) -> list[list[str]]:
    """The overrides of every job of a named sweep."""
    params = OmegaConf.to_container(OmegaConf.load(CONFIG_DIR / "sweep" / f"{name}.yaml"))[  # type: ignore[index]
        "hydra"
    ]["sweeper"]["params"]
    columns = []
    for key, value in params.items():
        text = str(value)
        values = [text] if text.startswith("[") else text.split(",")
        columns.append([f"{key}={item}" for item in values])
    return [list(job) for job in itertools.product(*columns)]


def test_the_named_sweeps_of_the_contract_are_there():
    assert set(NAMED) >= {
        "quantization",
        "rank",
        "peft_methods",
        "optimizer_scheduler",
        "learning_rate",
        "data_size",
        "reference_study",
    }


@pytest.mark.parametrize("name", [name for name in NAMED if name not in SEARCHES])
def test_every_job_of_a_named_sweep_can_be_made(name):
    """One seed each: composed, checked as before training, all with different config hashes."""
    config = OmegaConf.load(CONFIG_DIR / "sweep" / f"{name}.yaml")
    assert config.hydra.mode == "MULTIRUN"
    assert config.hydra.sweep.dir == f"sweeps/{name}"
    jobs = [job for job in jobs_of(name) if "seed=1" in job]
    assert len(jobs) > 1
    hashes = set()
    for job in jobs:
        cfg = compose("train", [f"sweep={name}", "trainer=cpu", *job])
        instantiation.check(cfg)
        hashes.add(config_hash(resolved(cfg)))
    assert len(hashes) == len(jobs)


def test_a_named_sweep_needs_no_m_and_its_values_can_be_given(
    run_command, small, tmp_path, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    ended = run_command("train", "sweep=rank", "peft=lora_r4", "seed=1,2", *small)
    assert ended.code == 0, ended.err
    assert statuses(Path("sweeps/rank")) == {"0": "completed", "1": "completed"}
    command = read_run("sweeps/rank/1").metrics["command"]
    assert "peft=lora_r4" in command
    assert "seed=2" in command
    assert "sweep=" not in command
    assert read_run("sweeps/rank/1").metrics["choices"]["sweep"] == "rank"


# --- what the jobs of one process share -----------------------------------------------------------


METHODS = ("dora_r16", "prompt_tuning", "norms", "lora_r4")


@pytest.fixture
def loads(monkeypatch) -> list[str]:
    """What was read: a base from its files, or a data set; one name a time, in order."""
    done: list[str] = []

    def count(module: Any, name: str) -> None:
        real = getattr(module, name)

        def counted(*args: Any, **kwargs: Any) -> Any:
            done.append(name)
            return real(*args, **kwargs)

        monkeypatch.setattr(module, name, counted)

    count(loading, "_fill")
    count(datamodule, "parse_rows")
    return done


def outcome(run_dir: Path) -> tuple[Any, ...]:
    """What a run learned and answered, to be compared bit for bit."""
    run = read_run(run_dir)
    weights = (run_dir / "adapter" / "adapter_model.safetensors").read_bytes()
    model = {key: run.metrics["model"][key] for key in ("num_trainable", "weight_gb")}
    return weights, read_predictions(run_dir), run.metrics["val"], run.metrics["test"], model


def test_adapters_over_one_base_load_it_once_and_equal_separate_processes(
    sweep, small, loads, tmp_path
):
    """Nothing of a job reaches the next: no adapter, hook, mode, random number or weight."""
    ended = sweep(f"peft={','.join(METHODS)}", "hydra.sweep.dir=sweeps/one")
    assert ended.code == 0, ended.err
    assert loads == ["parse_rows", "_fill"]
    for job, peft in enumerate(METHODS[:-1]):
        train(compose("train", [*small, f"peft={peft}"]), tmp_path / peft)
        assert outcome(tmp_path / peft) == outcome(Path("sweeps/one") / str(job)), peft
    alone = tmp_path / "alone"
    words = [*small, f"peft={METHODS[-1]}", f"hydra.run.dir={alone}"]
    command = [sys.executable, "-m", "medqlora.train", *words]
    subprocess.run(command, check=True, cwd=ROOT, capture_output=True)
    assert outcome(alone) == outcome(Path("sweeps/one") / str(len(METHODS) - 1))


def test_a_method_that_rewrites_the_base_gets_its_own(sweep, small, loads, tmp_path):
    plain = ["quant=none_fp32", "hydra.sweep.dir=sweeps/own"]
    ended = sweep("peft=lora_r4,pissa_r16,full,lora_r8", *plain)
    assert ended.code == 0, ended.err
    assert loads == ["parse_rows", *["_fill"] * 4]
    assert "loaded again" not in ended.err
    train(compose("train", [*small, "quant=none_fp32", "peft=lora_r8"]), tmp_path / "alone")
    assert outcome(tmp_path / "alone") == outcome(Path("sweeps/own/3"))


def test_nothing_is_kept_when_a_sweep_has_ended(sweep, loads):
    for seed in (1, 2):
        assert sweep(f"seed={seed}", "peft=lora_r4").code == 0
    assert loads == ["parse_rows", "_fill"] * 2


def test_a_hundred_jobs_in_one_process_leave_no_memory_behind(
    small, tmp_path, capsys, monkeypatch, loads
):
    """One job's models and optimiser take several megabytes."""
    monkeypatch.setattr(train_verb, "is_sweep", lambda: True)
    short = [*small, "data.limit_val=0", "trainer.max_steps=1"]
    configs = [compose("train", [*short, f"peft=lora_r{r}"]) for r in (4, 8, 16)]
    process, first = psutil.Process(), 0.0
    handlers = [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)]
    # What was there before is no job's.
    gc.collect()
    gc.freeze()
    for job in range(100):
        cfg = configs[job % 3]
        cfg.seed = job
        (run_dir := tmp_path / "sweeps" / "hundred" / str(job)).mkdir(parents=True)
        train(cfg, run_dir)
        if job == 19:
            first = process.memory_info().rss
    grown = (process.memory_info().rss - first) / 1e6
    assert loads.count("_fill") == 1
    pipeline.forget_kept()
    assert _models() == 0
    # A handler that is left behind holds its whole run, out of the garbage collector's sight.
    assert [signal.getsignal(n) for n in (signal.SIGINT, signal.SIGTERM)] == handlers
    assert grown < 20


def _models() -> int:
    return sum(type(o) in (GemmaForCausalLM, MCQAModule, Trainer) for o in gc.get_objects())


# --- Weights & Biases -----------------------------------------------------------------------------


@pytest.fixture
def unused_port() -> int:
    """A TCP port of this machine that nothing listens on."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def wandb_records(file: Path) -> Iterator[bytes]:
    """Records of a `.wandb` file: LevelDB's log format behind a head of seven bytes.

    References:
        https://github.com/google/leveldb/blob/main/doc/log_format.md
    """
    data = file.read_bytes()
    assert data[:4] == b":W&B"
    place, whole, size = 7, b"", 32768
    while place + 7 <= len(data):
        if size - place % size < 7:
            place += size - place % size
            continue
        length, kind = struct.unpack_from("<HB", data, place + 4)
        whole += data[place + 7 : place + 7 + length]
        place += 7 + length
        if kind in (1, 4):  # a whole record, or the last part of one
            yield whole
            whole = b""


def read_wandb(run_dir: Path, folder: str = "offline-run-*") -> dict[str, Any]:
    """What the file of a run says, as `wandb sync` would read it."""
    from wandb.proto import wandb_internal_pb2

    [file] = run_dir.glob(f"wandb/{folder}/*.wandb")
    found: dict[str, Any] = {"history": [], "exit_code": None}
    for data in wandb_records(file):
        record: Any = wandb_internal_pb2.Record()
        record.ParseFromString(data)
        kind = record.WhichOneof("record_type")
        if kind == "run":
            found["run"] = record.run
        elif kind == "exit":
            found["exit_code"] = record.exit.exit_code
        elif kind == "history":
            items = record.history.item
            row = {i.key or "/".join(i.nested_key): json.loads(i.value_json) for i in items}
            found["history"].append(row)
    return found


@pytest.fixture
def private_wandb(monkeypatch, tmp_path):
    monkeypatch.delenv("WANDB_API_KEY", raising=False)
    monkeypatch.delenv("WANDB_MODE", raising=False)
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))
    yield monkeypatch
    import wandb

    wandb.teardown()


def check_validation_media(run_dir: Path, history: list[dict[str, Any]]) -> None:
    """Each validation's tables and figures lie beside the file that names them."""
    [files] = run_dir.glob("wandb/offline-run-*/files")
    tables = [row for row in history if "val/by_subject_name/path" in row]
    assert tables
    table = json.loads((files / tables[-1]["val/by_subject_name/path"]).read_text())
    assert table["columns"] == ["group", "n", "accuracy", "ci_low", "ci_high"]
    groups = read_run(run_dir).metrics["val"]["by"]["subject_name"]
    assert [row[:2] for row in table["data"]] == [[g, v["n"]] for g, v in groups.items()]
    for stem in ("confusion", "reliability", "subjects"):
        key = f"val/figure_{stem}/filenames"
        shown = [row[key] for row in history if key in row]
        assert len(shown) == len(tables), stem
        for (name,) in shown:
            assert (files / name).read_bytes().startswith(b"\x89PNG")


def check_sync(sweep: Path, offline: list[dict[str, Any]], home: Path) -> None:
    """`wandb sync` sends every run of a sweep, and what arrives is what the folders hold."""
    folders = sorted(sweep.glob("*/wandb/offline-run-*"))
    server = WandbServer()
    try:
        for folder in folders:
            subprocess.run(
                [Path(sys.executable).with_name("wandb"), "sync", folder.resolve()],
                check=True,
                capture_output=True,
                timeout=120,
                cwd=home,
                env={**os.environ, **server.environment, "HOME": str(home)},
            )
    finally:
        server.close()
    assert list(server.runs) == [found["run"].run_id for found in offline]
    for found, sent in zip(offline, server.runs.values(), strict=True):
        run = found["run"]
        assert sent.about["groupName"] == run.run_group
        assert sent.about["displayName"] == run.display_name
        assert set(sent.about["tags"]) == set(run.tags)
        assert set(sent.config) >= {"quant", "peft", "data", "optimizer", "seed"}
        assert sent.exit_code == found["exit_code"]
        assert len(sent.history) == len(found["history"])
        for key in ("final/test/accuracy", "val/accuracy"):
            theirs = [row[key] for row in sent.history.values() if key in row]
            assert theirs == [row[key] for row in found["history"] if key in row]
    first = next(iter(server.runs.values()))
    assert first.files["config.yaml"]
    assert sum(name.endswith(".png") for name in first.files) >= 3
    assert any("by_subject_name" in name for name in first.artifacts)


def test_a_sweep_is_one_group_and_every_job_a_finished_run_of_its_own(
    sweep, private_wandb, tmp_path
):
    """Without a key the runs are kept offline, with the exit code of each ending."""
    ended = sweep("optimizer.lr=1e-4,1e30", "peft=lora_r4", "logger=wandb")
    assert ended.code == 1
    folder = only_sweep()
    assert statuses(folder) == {"0": "completed", "1": "failed"}
    first, second = (read_wandb(folder / job) for job in ("0", "1"))
    assert first["run"].run_id != second["run"].run_id
    for found, job, code in ((first, "0", 0), (second, "1", 1)):
        run = found["run"]
        assert run.run_group == folder.name
        assert run.display_name == f"{folder.name}-{job}"
        assert set(run.tags) >= {"peft=lora_r4", "data=files"}
        assert found["exit_code"] == code
        config = {item.key: json.loads(item.value_json) for item in run.config.update}
        config.pop("_wandb", None)
        saved = read_run(folder / job).config
        assert set(config) == set(saved) - {"hydra", "defaults"}
        assert config["peft"] == saved["peft"]
        # `wandb sync` names the folder it is given: it must be there and hold that one run.
        [offline] = (folder / job / "wandb").glob("offline-run-*")
        assert offline.name.endswith(run.run_id)
    check_validation_media(folder / "0", first["history"])
    check_sync(folder, [first, second], tmp_path)
    last = first["history"][-1]
    assert last["final/test/accuracy"] == read_run(folder / "0").metrics["test"]["accuracy"]
    assert last["final/test/majority_accuracy"] > 0


def test_an_unreachable_server_keeps_the_run_offline(small, tmp_path, private_wandb, unused_port):
    import wandb

    private_wandb.setenv("WANDB_API_KEY", "0" * 40)
    private_wandb.setenv("WANDB_BASE_URL", f"http://127.0.0.1:{unused_port}")
    settings = wandb.Settings

    def impatient(**options: Any) -> Any:
        return settings(**{**options, "init_timeout": 3})

    private_wandb.setattr(wandb, "Settings", impatient)
    train(compose("train", [*small, "logger=wandb", "peft=lora_r4"]), tmp_path / "run")
    assert read_run(tmp_path / "run").status == "completed"
    assert read_wandb(tmp_path / "run")["exit_code"] == 0


def test_a_run_with_a_key_is_sent_while_it_trains(small, tmp_path, private_wandb):
    server = WandbServer()
    for name, value in server.environment.items():
        private_wandb.setenv(name, value)
    train(compose("train", [*small, "logger=wandb", "peft=lora_r4"]), tmp_path / "run")
    server.close()
    [sent] = server.runs.values()
    assert sent.exit_code == 0
    saved = read_run(tmp_path / "run")
    assert sent.config["peft"] == (saved.config or {})["peft"]
    rows = list(sent.history.values())
    assert rows[-1]["final/test/accuracy"] == saved.metrics["test"]["accuracy"]
    assert any("val/accuracy" in row for row in rows)


def test_a_server_that_goes_away_in_the_middle_costs_a_wait_and_no_run(
    small, tmp_path, private_wandb
):
    """What was not sent is in the run folder, whole."""
    server = WandbServer()
    for name, value in server.environment.items():
        private_wandb.setenv(name, value)
    log_metrics = GuardedLogger.log_metrics

    def then_gone(self: Any, *args: Any, **kwargs: Any) -> None:
        log_metrics(self, *args, **kwargs)
        server.close()

    private_wandb.setattr(GuardedLogger, "log_metrics", then_gone)
    words = [*small, "logger=wandb", "logger.wandb.finish_timeout=3", "peft=lora_r4"]
    begun = time.monotonic()
    train(compose("train", words), tmp_path / "run")
    assert time.monotonic() - begun < 150
    assert read_run(tmp_path / "run").status == "completed"
    [sent] = server.runs.values()
    assert sent.exit_code is None
    found = read_wandb(tmp_path / "run", "run-*")
    accuracy = read_run(tmp_path / "run").metrics["test"]["accuracy"]
    assert found["history"][-1]["final/test/accuracy"] == accuracy
    assert found["exit_code"] == 0


@pytest.mark.parametrize("moment", ["start", "in the middle", "end"])
def test_a_full_disk_under_wandb_never_stops_training(
    moment, small, tmp_path, private_wandb, caplog
):
    import wandb
    from lightning.pytorch.loggers import WandbLogger

    def full(*args: Any, **kwargs: Any) -> Any:
        raise OSError(28, "No space left on device")

    finish = wandb.Run.finish
    if moment == "start":
        private_wandb.setattr(wandb, "init", full)
    elif moment == "in the middle":
        private_wandb.setattr(WandbLogger, "log_metrics", full)
    else:
        private_wandb.setattr(wandb.Run, "finish", full)
    with caplog.at_level(logging.WARNING):
        train(compose("train", [*small, "logger=wandb", "peft=lora_r4"]), tmp_path / "run")
    if moment != "start" and wandb.run is not None:
        finish(wandb.run)
    assert read_run(tmp_path / "run").status == "completed"
    warnings = [r.getMessage() for r in caplog.records if "W&B failed" in r.getMessage()]
    assert len(warnings) == 1
    assert "No space left" in warnings[0]


# --- loggers --------------------------------------------------------------------------------------


class _Breaks:
    """A service that fails after some calls."""

    def __init__(self, calls: int) -> None:
        self.left = calls
        self.asked = 0

    def log_metrics(self, metrics: Any, step: Any = None) -> None:
        self.asked += 1
        self.left -= 1
        if self.left < 0:
            raise ConnectionError("gone\naway")

    def save(self) -> None: ...


def test_a_logger_that_fails_is_one_warning_and_is_not_asked_again(caplog):
    inner: Any = _Breaks(2)
    ended: list[int] = []
    logger = GuardedLogger("Service", lambda: inner, lambda _, code: ended.append(code))
    for step in range(6):
        logger.log_metrics({"a": 1.0}, step)
    assert inner.asked == 3
    [record] = caplog.records
    assert record.getMessage() == "Service failed and the run goes on without it: gone away"
    finish_loggers([logger], 0)
    assert ended == []


def test_a_logger_is_ended_with_the_exit_code_of_the_run():
    ended: list[int] = []
    logger = GuardedLogger("S", lambda: _Breaks(99), lambda _, code: ended.append(code))  # type: ignore[arg-type,return-value]
    finish_loggers([logger], 3)  # never started: nothing to end
    logger = GuardedLogger("S", lambda: _Breaks(99), lambda _, code: ended.append(code))  # type: ignore[arg-type,return-value]
    logger.log_metrics({"a": 1.0}, 0)
    finish_loggers([logger], 130)
    finish_loggers([logger], 0)
    assert ended == [130]


@pytest.mark.parametrize("name", ["tensorboard", "mlflow"])
def test_a_logger_whose_package_is_missing_is_refused_before_anything_is_loaded(name, monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda package: None)
    cfg = compose("train", [f"logger={name}"])
    with pytest.raises(ConfigError, match=re.escape(f"pip install 'medqlora[{name}]'")):
        check_loggers(OmegaConf.to_container(cfg.logger))  # type: ignore[arg-type]


def test_an_unknown_mode_of_wandb_is_refused():
    with pytest.raises(ConfigError, match="auto, online, offline, disabled"):
        check_loggers({"wandb": {"mode": "onlin"}})


@pytest.mark.parametrize("ending", ["completed", "failed"])
@pytest.mark.parametrize("name", ["tensorboard", "mlflow"])
def test_a_run_is_read_back_from_a_further_logger(name, ending, small, tmp_path, monkeypatch):
    """Its scores at full length, its config, and how it ended."""
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{tmp_path}/mlflow.db")
    words = [*small, f"logger={name}", "peft=lora_r4", "optimizer=adamw"]

    def fail(*args: Any) -> Any:
        raise MedQLoRAError("no answer")

    if ending == "failed":
        monkeypatch.setattr(pipeline, "score", fail)
    with nullcontext() if ending == "completed" else pytest.raises(MedQLoRAError):
        train(compose("train", words), tmp_path / "run")
    saved = read_run(tmp_path / "run")
    assert saved.status == ending
    found = read_tensorboard(tmp_path) if name == "tensorboard" else read_mlflow(tmp_path, ending)
    for split in ("val", "test"):
        assert found.get(f"final/{split}/accuracy") == saved.metrics[split]["accuracy"]
        if ending == "completed":
            loss = saved.metrics[split]["loss"]
            assert math.isclose(found[f"final/{split}/loss"], loss, rel_tol=1e-6)
    assert found["peft/r"] == "4"


def read_tensorboard(folder: Path) -> dict[str, Any]:
    """The last value of each series of a run, and its config."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(folder / "run" / "tensorboard"))
    events.Reload()
    series = {tag: events.Scalars(tag)[-1].value for tag in events.Tags()["scalars"]}
    config: Any = OmegaConf.load(folder / "run" / "tensorboard" / "hparams.yaml")
    return {**series, "peft/r": str(config.peft.r)}


def read_mlflow(folder: Path, ending: str) -> dict[str, Any]:
    """The last value of each series of the only run, and its config."""
    from mlflow.tracking import MlflowClient

    client = MlflowClient(f"sqlite:///{folder}/mlflow.db")
    [experiment] = [e for e in client.search_experiments() if e.name == "medqlora"]
    [run] = client.search_runs([experiment.experiment_id])
    assert run.info.status == {"completed": "FINISHED", "failed": "FAILED"}[ending]
    return {**run.data.metrics, **run.data.params}


def test_without_options_there_is_the_csv_file_alone(tmp_path):
    [logger] = build_loggers(run_dir=tmp_path, run_config={})
    assert type(logger).__name__ == "RunCSVLogger"
