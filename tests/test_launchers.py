"""Jobs of a sweep in processes of their own: the launchers that the documentation names."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest
from hydra import compose, initialize_config_dir

from medqlora.config import CONFIG_DIR
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


def worker(visible: str, folder: Path, **slurm: str) -> subprocess.Popen[str]:
    """A process that takes a GPU, says which, and ends when its input does.

    What torch says of GPUs is made up: there are those that CUDA_VISIBLE_DEVICES names.
    """
    code = (
        "import os, sys, torch\n"
        "from medqlora.errors import ConfigError\n"
        "from medqlora.processes import take_gpu\n"
        "names = os.environ['CUDA_VISIBLE_DEVICES'].split(',')\n"
        "chosen = []\n"
        "torch.cuda.device_count, torch.cuda.set_device = lambda: len(names), chosen.append\n"
        "try:\n"
        "    take_gpu(), take_gpu()\n"
        "    print(*(names[index] for index in chosen), flush=True)\n"
        "except ConfigError as error:\n"
        "    print(error, flush=True)\n"
        "sys.stdin.read()\n"
    )
    return subprocess.Popen(
        [sys.executable, "-c", code],
        env=os.environ | {"CUDA_VISIBLE_DEVICES": visible, "TMPDIR": str(folder)} | slurm,
        cwd=ROOT,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )


def test_each_worker_sees_a_gpu_of_its_own_and_one_too_many_is_told(tmp_path):
    """Killed or not, a worker that ends gives its GPU back."""
    workers: list[subprocess.Popen[str]] = []

    def told(visible: str = "2,GPU-5f", **slurm: str) -> str:
        workers.append(worker(visible, tmp_path, **slurm))
        assert workers[-1].stdout is not None
        return workers[-1].stdout.readline().strip()

    assert [told(), told()] == ["2", "GPU-5f"]
    assert "all GPUs of this machine (2) are taken" in told()
    workers[0].kill()
    workers[0].wait()
    assert told() == "2"
    # In two jobs of Slurm the same number is not the same GPU; in one job it is.
    assert [told("0", SLURM_JOB_ID=job) for job in ("7", "8")] == ["0", "0"]
    assert "all GPUs of this machine (1) are taken" in told("0", SLURM_JOB_ID="8")
    for process in workers[1:]:
        process.communicate("")
    assert {process.returncode for process in workers[1:]} == {0}
