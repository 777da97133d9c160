"""The main job against a hub: what it downloads, and what it says when the hub refuses."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from medqlora.config import compose
from tests.conftest import ROOT
from tests.data.data_tools import raw_row
from tests.hub import LoopbackHub, Repository

CARD = """\
---
dataset_info:
  splits: {splits}
configs:
- config_name: default
  data_files:
  - {{split: train, path: data/train-*}}
  - {{split: test, path: data/test-*}}
  - {{split: validation, path: data/validation-*}}
---
"""
NUMBERS = {"train": 80, "test": 8, "validation": 24}
TEXTS = ("id", "question", "opa", "opb", "opc", "opd")
MORE = ("choice_type", "exp", "subject_name", "topic_name")

REFUSALS = """
import contextlib, io, json, sys, urllib.request
from medqlora.train import main
told, lines, endpoint = [], json.loads(sys.argv[1]), sys.argv[2]
for line in lines:
    if line == "close":
        urllib.request.urlopen(endpoint + "/close").read()
        continue
    sys.argv[1:] = line
    heard, code = io.StringIO(), 0
    with contextlib.redirect_stderr(heard):
        try:
            main()
        except SystemExit as end:
            code = end.code
    told.append([code, heard.getvalue()])
print(json.dumps(told))
"""


@pytest.fixture(scope="module")
def model_files(tiny_gemma_folder) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in Path(tiny_gemma_folder).iterdir()}


@pytest.fixture(scope="module")
def dataset_files(tmp_path_factory) -> dict[str, bytes]:
    """Three parquet files in the layout of openlifescienceai/medmcqa, labels from 0, test -1."""
    import datasets

    texts = {name: datasets.Value("string") for name in (*TEXTS, *MORE)}
    kinds = datasets.Features(texts | {"cop": datasets.ClassLabel(names=["a", "b", "c", "d"])})
    folder = tmp_path_factory.mktemp("medmcqa")
    splits = [
        {"name": split, "num_bytes": 200 * number, "num_examples": number}
        for split, number in NUMBERS.items()
    ]
    files = {"README.md": CARD.format(splits=json.dumps(splits)).encode()}
    for split, number in NUMBERS.items():
        changes = {"cop": -1, "exp": None} if split == "test" else {}
        rows = [raw_row(i) | {"id": f"{split}-{i}"} | changes for i in range(number)]
        rows = [row | {"question": f"{split}: {row['question']}"} for row in rows]
        path = folder / f"{split}-00000-of-00001.parquet"
        datasets.Dataset.from_list(rows, features=kinds).to_parquet(path)
        files[f"data/{path.name}"] = path.read_bytes()
    return files


@pytest.fixture(scope="module")
def environment(tmp_path_factory) -> dict[str, str]:
    """This process's variables without a way out to another hub."""
    kept = {name: value for name, value in os.environ.items() if "proxy" not in name.lower()}
    cache = tmp_path_factory.mktemp("cache")
    return kept | {"PYTHONPATH": str(ROOT), "MEDQLORA_CACHE": str(cache)}


def test_the_command_of_the_main_job_runs_against_a_hub(
    model_files, dataset_files, environment, tmp_path
):
    """The exact command, limited in steps; one download breaks off in the middle and is resumed."""
    cfg = compose("train")
    weights = next(name for name in model_files if name.endswith(".safetensors"))
    model = Repository(model_files, cfg.model.revision, cuts={weights: 1})
    questions = Repository(dataset_files, cfg.data.revision)
    command = [
        *(sys.executable, "-m", "medqlora.train", "quant=nf4", "peft=lora_r16"),
        *("trainer=cpu", "trainer.max_steps=2", "data.num_val=16", "data.token_budget=512"),
        f"hydra.run.dir={tmp_path}/run",
    ]
    with LoopbackHub({cfg.model.path: model}, {cfg.data.hub: questions}) as hub:
        ended = subprocess.run(
            command,
            env=environment | hub.environment(tmp_path / "hf"),
            cwd=tmp_path,
            capture_output=True,
            text=True,
        )
    assert ended.returncode == 0, ended.stderr[-3000:]
    metrics = json.loads((tmp_path / "run" / "metrics.json").read_text())
    assert metrics["status"] == "completed"
    assert metrics["model"]["name"] == cfg.model.path == "google/gemma-2b"
    assert metrics["model"]["revision"] == cfg.model.revision
    assert metrics["data"]["name"] == "medmcqa"
    assert [metrics["data"][f"num_{split}"] for split in ("train", "val", "test")] == [64, 16, 24]
    assert metrics["train"]["num_steps"] == 2
    adapter = json.loads((tmp_path / "run" / "adapter" / "adapter_config.json").read_text())
    assert adapter["base_model_name_or_path"] == cfg.model.path
    assert adapter["revision"] == cfg.model.revision
    # W&B is the default and stays offline where nobody is logged in.
    assert list((tmp_path / "run" / "wandb").glob("offline-run-*"))
    file = f"/{cfg.model.path}/resolve/{cfg.model.revision}/{weights}"
    assert hub.requests.count(f"GET {file}") == 2
    assert not [line for line in hub.requests if "/main" in line], "a revision was not pinned"
    assert not list(tmp_path.glob("*")) or {path.name for path in tmp_path.iterdir()} == {
        "run",
        "hf",
    }


def test_every_refusal_of_the_hub_is_one_line_that_says_what_to_do(
    model_files, dataset_files, environment, tiny_gemma_folder, tmp_path
):
    """Gated, private, missing, no such revision, broken off for good, and out of reach."""
    weights = next(name for name in model_files if name.endswith(".safetensors"))
    parquet = "data/train-00000-of-00001.parquet"
    models = {
        "some/gated": Repository(refusal=403),
        "some/private": Repository(refusal=401),
        "some/broken": Repository(model_files, cuts={weights: -1}),
        "some/model": Repository(model_files),
    }
    sets = {
        "some/gated": Repository(refusal=403),
        "some/private": Repository(refusal=401),
        "some/broken": Repository(dataset_files, cuts={parquet: -1}),
        "some/questions": Repository(dataset_files),
    }
    whole = "data.hub=some/questions"
    cases: list[tuple[str, list[str], list[str]]] = [
        ("model.path=some/gated", [], ["model some/gated", "accept the licence", "hf auth login"]),
        ("model.path=some/private", [], ["model some/private", "hf auth login", "spelling"]),
        ("model.path=some/missing", [], ["model some/missing", "not found", "spelling"]),
        ("model.path=some/model", ["model.revision=v9"], ["model some/model", "revision"]),
        ("model.path=some/broken", [whole], ["model some/broken", "check the network"]),
        ("data.hub=some/gated", [], ["data set some/gated", "accept the licence", "hf auth login"]),
        ("data.hub=some/private", [], ["data set some/private", "hf auth login", "spelling"]),
        ("data.hub=some/missing", [], ["data set some/missing", "not found", "spelling"]),
        ("data.hub=some/questions", ["data.revision=v9"], ["data set some/questions", "revision"]),
        ("data.hub=some/broken", [], ["data set some/broken", "check the network"]),
        ("close", [], []),
        (
            "model.path=other/model",
            [],
            ["model other/model", "cannot be reached", "check the network"],
        ),
        ("data.hub=other/questions", [], ["data set other/questions", "cannot be reached"]),
    ]
    common = ["quant=nf4", "peft=lora_r16", "trainer=cpu", "logger=csv", "data.num_val=16"]
    lines: list[list[str] | str] = []
    for number, (wrong, more, _) in enumerate(cases):
        options = {"model.path": tiny_gemma_folder, "model.revision": "null"}
        options |= {"data.revision": "null", "hydra.run.dir": f"{tmp_path}/runs/{number}"}
        options |= dict(option.split("=") for option in (wrong, *more) if "=" in option)
        named = [f"{key}={value}" for key, value in options.items()]
        lines.append("close" if wrong == "close" else [*common, *named])
    with LoopbackHub(models, sets) as hub:
        ended = subprocess.run(
            [sys.executable, "-c", REFUSALS, json.dumps(lines), hub.endpoint],
            env=environment | hub.environment(tmp_path / "hf"),
            cwd=tmp_path,
            capture_output=True,
            text=True,
        )
    assert ended.returncode == 0, ended.stderr[-3000:]
    told = json.loads(ended.stdout.splitlines()[-1])
    asked = [case for case in cases if case[0] != "close"]
    for (wrong, more, words), (code, heard) in zip(asked, told, strict=True):
        errors = [line for line in heard.splitlines() if line.startswith("error: ")]
        assert code == 2, (wrong, more, heard)
        assert len(errors) == 1, heard
        assert heard.rstrip().endswith(errors[0])
        assert "Traceback" not in heard
        for word in (*words, "make quickstart") if "revision" not in words else words:
            assert word in errors[0], (wrong, errors[0])
    assert not list((tmp_path / "runs").rglob("*.*"))
