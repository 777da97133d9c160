"""Jobs of a sweep in processes of their own: the launchers that the documentation names."""

from __future__ import annotations

import importlib.util
import multiprocessing
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from multiprocessing.connection import Connection

import pytest
import torch
from hydra import compose, initialize_config_dir

from medqlora import processes
from medqlora.config import CONFIG_DIR
from medqlora.errors import ConfigError
from medqlora.evaluation import read_run
from tests.conftest import ROOT

LAUNCHERS = {
    "joblib": ["hydra.launcher.n_jobs=2"],
    "submitit_local": ["hydra.launcher.timeout_min=10", "hydra.launcher.cpus_per_task=1"],
}


without_ray = pytest.mark.skipif(
    importlib.util.find_spec("hydra_plugins.hydra_ray_launcher") is None,
    reason="hydra-ray-launcher is not installed: extra [ray]",
)


def sweep_of_two(launcher: str, arguments: list[str], options: list[str], tmp_path, **env) -> None:
    """One job trains, one cannot: a folder each, exit code 1, and its reason in a single line."""
    options = [*options, "quant=nf4_fp32", "optimizer=adamw", "trainer.max_steps=2"]
    options += ["data.limit_val=0", f"hydra/launcher={launcher}", *arguments]
    ended = subprocess.run(
        [sys.executable, "-m", "medqlora.train", "-m", *options, "peft=lora_r4,none"],
        cwd=tmp_path,
        env=os.environ | {"PYTHONPATH": str(ROOT)} | env,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert ended.returncode == 1, ended.stderr[-2000:]
    assert "Traceback" not in ended.stderr
    [sweep] = (tmp_path / "sweeps").iterdir()
    jobs = [read_run(sweep / number) for number in ("0", "1")]
    assert [job.status for job in jobs] == ["completed", "failed"]
    assert "peft=none leaves nothing to train" in jobs[1].metrics["error"]
    assert (sweep / "0" / "adapter" / "adapter_model.safetensors").is_file()
    processes = {log.read_text().count("first step") for log in sweep.glob("*/train.log")}
    assert processes == {0, 1}


@pytest.mark.parametrize("launcher", LAUNCHERS)
def test_jobs_run_in_processes_of_their_own_and_a_bad_one_is_told(launcher, tiny_options, tmp_path):
    sweep_of_two(launcher, LAUNCHERS[launcher], tiny_options, tmp_path)


@without_ray
def test_jobs_run_on_ray_and_a_bad_one_is_told(tiny_options, tmp_path):
    """On a cluster of this machine alone, of one CPU."""
    with tempfile.TemporaryDirectory(prefix="ray-") as folder:  # its sockets need a short path
        settings = {"num_cpus": 1, "include_dashboard": "false", "_temp_dir": folder}
        arguments = [f"+hydra.launcher.ray.init.{key}={settings[key]}" for key in settings]
        environment = {"RAY_worker_niceness": "0", "RAY_AUTH_MODE": "disabled"}
        sweep_of_two("ray", arguments, tiny_options, tmp_path, **environment)


def test_a_sweep_on_a_cluster_composes():
    words = ["hydra/launcher=submitit_slurm", "hydra.launcher.gpus_per_node=1"]
    with initialize_config_dir(str(CONFIG_DIR), version_base="1.3"):
        words += ["hydra.launcher.partition=gpu", "sweep=rank"]
        cfg = compose("train", words, return_hydra_config=True)
    assert cfg.hydra.launcher.gpus_per_node == 1
    assert cfg.hydra.launcher.partition == "gpu"


@pytest.fixture
def worker(tmp_path, monkeypatch) -> Iterator[Callable[..., list[str]]]:
    """`worker("2,GPU-5f")` takes a GPU as the first and second job of a worker; the names it chose.

    A lock belongs to an open file, so that one process plays many workers by opening many. What
    torch says of GPUs is made up: there are those that CUDA_VISIBLE_DEVICES names.
    """
    locks: list[int] = []
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))

    def take(visible: str = "2,GPU-5f", **environment: str) -> list[str]:
        names, chosen = visible.split(","), []
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
        for name, value in environment.items():
            monkeypatch.setenv(name, value)
        monkeypatch.setattr(torch.cuda, "device_count", lambda: len(names) if visible else 0)
        monkeypatch.setattr(torch.cuda, "set_device", lambda index: chosen.append(names[index]))
        monkeypatch.setattr(processes, "_taken", taken := [])
        try:
            processes.take_gpu()
            processes.take_gpu()
        finally:
            locks.extend(taken)
        return chosen

    yield take
    for lock in locks:
        os.close(lock)


def takes_and_waits(worker: Callable[..., list[str]], told: Connection) -> None:
    told.send(worker())
    time.sleep(600)


def test_each_worker_sees_a_gpu_of_its_own_and_one_too_many_is_told(worker):
    """Killed or not, a worker that ends gives its GPU back."""
    fork = multiprocessing.get_context("fork")
    here, there = fork.Pipe()
    other = fork.Process(target=takes_and_waits, args=(worker, there))
    other.start()
    try:
        assert here.poll(60)
        assert here.recv() == ["2"]
        assert worker() == ["GPU-5f"]
        with pytest.raises(ConfigError, match=r"all GPUs of this machine \(2\) are taken") as told:
            worker()
        assert "hydra.launcher.n_jobs=2" in str(told.value)
    finally:
        other.kill()
        other.join()
    assert worker() == ["2"]


def test_in_two_jobs_of_slurm_the_same_number_is_not_the_same_gpu(worker):
    assert [worker("0", SLURM_JOB_ID=job) for job in ("7", "8")] == [["0"], ["0"]]
    with pytest.raises(ConfigError, match=r"all GPUs of this machine \(1\) are taken"):
        worker("0", SLURM_JOB_ID="8")


def test_without_gpus_none_is_taken_and_the_run_says_so_in_its_own_words(worker, tmp_path):
    assert worker("") == []
    assert list(tmp_path.iterdir()) == []
