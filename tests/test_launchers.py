"""Jobs of a sweep in processes of their own: the launchers that the documentation names."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
from hydra import compose, initialize_config_dir

from medqlora.config import CONFIG_DIR
from medqlora.evaluation import read_run
from tests.conftest import ROOT

LAUNCHERS = {
    "joblib": ["hydra.launcher.n_jobs=2"],
    "submitit_local": ["hydra.launcher.timeout_min=10", "hydra.launcher.cpus_per_task=1"],
}


@pytest.mark.parametrize("launcher", LAUNCHERS)
def test_jobs_run_in_processes_of_their_own_and_a_bad_one_is_told(launcher, tiny_options, tmp_path):
    """One job trains, one cannot: a folder each, exit code 1, and its reason in a single line."""
    options = [*tiny_options, "quant=nf4_fp32", "optimizer=adamw", "trainer.max_steps=2"]
    options += ["data.limit_val=0", f"hydra/launcher={launcher}", *LAUNCHERS[launcher]]
    ended = subprocess.run(
        [sys.executable, "-m", "medqlora.train", "-m", *options, "peft=lora_r4,none"],
        cwd=tmp_path,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
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


def test_a_sweep_on_a_cluster_composes():
    words = ["hydra/launcher=submitit_slurm", "hydra.launcher.gpus_per_node=1"]
    with initialize_config_dir(str(CONFIG_DIR), version_base="1.3"):
        words += ["hydra.launcher.partition=gpu", "sweep=rank"]
        cfg = compose("train", words, return_hydra_config=True)
    assert cfg.hydra.launcher.gpus_per_node == 1
    assert cfg.hydra.launcher.partition == "gpu"
