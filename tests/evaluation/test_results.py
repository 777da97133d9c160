"""metrics.json and predictions.parquet: complete, valid, whole or not there."""

import json
import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from medqlora.errors import CheckpointError, ConfigError
from medqlora.evaluation import (
    config_hash,
    empty_metrics,
    hardware,
    newest_run,
    read_predictions,
    read_run,
    read_runs,
    summarise,
    versions,
    write_metrics,
    write_predictions,
)
from medqlora.evaluation import results as results_module

from .conftest import make_predictions, make_questions

CONTRACT = {
    "": "schema_version status error config_hash seed started wall_seconds command versions "
    "hardware data model train val test",
    "versions": "python torch transformers peft bitsandbytes lightning medqlora",
    "hardware": "device memory_gb",
    "data": "name sha256 num_train num_val num_test num_dropped",
    "model": "name revision num_parameters num_trainable weight_gb_16bit weight_gb",
    "train": "num_steps num_questions loss questions_per_second tokens_per_second fill_fraction "
    "peak_memory_gb",
    "val": "n accuracy ci_low ci_high macro_accuracy loss ece brier majority_accuracy "
    "letter_share by",
    "test": "n accuracy ci_low ci_high macro_accuracy loss ece brier majority_accuracy "
    "letter_share by",
}


def test_empty_metrics_have_exactly_the_keys_of_the_contract():
    metrics = empty_metrics()
    for section, keys in CONTRACT.items():
        assert set(metrics[section] if section else metrics) == set(keys.split())
    by = metrics["test"]["by"]
    assert set(by) == {"subject_name", "choice_type", "difficulty", "negated", "length"}
    assert metrics["schema_version"] == 1


def test_every_key_is_there_whatever_was_known(tmp_path, predictions, questions):
    write_metrics(
        tmp_path,
        {"status": "failed", "train": {"loss": 1.4}, "val": None, "test": summarise(predictions)},
    )
    metrics = json.loads((tmp_path / "metrics.json").read_text())
    for section, keys in CONTRACT.items():
        assert set(metrics[section] if section else metrics) >= set(keys.split())
    assert metrics["train"]["loss"] == 1.4
    assert metrics["train"]["num_steps"] is None
    assert metrics["val"]["accuracy"] is None


def test_written_metrics_come_back(tmp_path, predictions, questions):
    metrics = empty_metrics()
    metrics |= {"status": "completed", "seed": 3, "test": summarise(predictions, questions)}
    metrics["extra"] = {"baseline": [1, 2.5, "µ"]}
    write_metrics(tmp_path / "new" / "run", metrics)
    run = read_run(tmp_path / "new" / "run")
    assert run.metrics == metrics
    assert (run.status, run.error, run.config, run.name) == ("completed", None, None, "run")


def test_numbers_json_cannot_hold_become_null(tmp_path):
    write_metrics(
        tmp_path,
        {
            "wall_seconds": math.inf,
            "seed": np.int64(7),
            "train": {"loss": float("nan"), "fill_fraction": np.float32(0.5)},
            "test": {"letter_share": torch.tensor([0.5, float("nan")]), "n": torch.tensor(3)},
            "command": ("python", Path("train.py")),
        },
    )
    text = (tmp_path / "metrics.json").read_text()
    assert "NaN" not in text
    assert "Infinity" not in text
    metrics = json.loads(text)
    assert metrics["wall_seconds"] is metrics["train"]["loss"] is None
    assert metrics["seed"] == 7
    assert metrics["train"]["fill_fraction"] == 0.5
    assert metrics["test"]["letter_share"] == [0.5, None]
    assert metrics["test"]["n"] == 3
    assert metrics["command"] == ["python", "train.py"]


json_values = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**53), 2**53) | st.floats() | st.text(max_size=5),
    lambda inner: (
        st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner, max_size=3)
    ),
    max_leaves=8,
)


@settings(max_examples=40, deadline=None)
@given(value=json_values)
def test_whatever_is_written_is_strict_json(tmp_path_factory, value):
    folder = tmp_path_factory.mktemp("run")

    def no_constant(name):
        raise AssertionError(name)

    write_metrics(folder, {"extra": value})
    json.loads((folder / "metrics.json").read_text(), parse_constant=no_constant)


def test_a_failed_write_leaves_the_old_file_and_nothing_else(tmp_path, monkeypatch):
    write_metrics(tmp_path, {"status": "completed"})
    with pytest.raises(TypeError, match=r"metrics\.train\.loss is a object"):
        write_metrics(tmp_path, {"train": {"loss": object()}})

    def full_disk(*_):
        raise OSError("No space left on device")

    monkeypatch.setattr(results_module.os, "replace", full_disk)
    with pytest.raises(OSError, match="No space"):
        write_metrics(tmp_path, {"status": "failed"})
    assert [path.name for path in tmp_path.iterdir()] == ["metrics.json"]
    assert read_run(tmp_path).status == "completed"


def test_a_run_that_cannot_be_read_says_why_in_one_line(tmp_path):
    cases = {"missing": None, "cut": '{"schema_version": 1, "sta', "list": "[]", "newer": None}
    for name, text in cases.items():
        (tmp_path / name).mkdir()
        if text is not None:
            (tmp_path / name / "metrics.json").write_text(text)
    (tmp_path / "newer" / "metrics.json").write_text('{"schema_version": 99}')
    expected = {
        "missing": "no metrics.json",
        "cut": "cannot be read",
        "list": "schema_version None",
        "newer": "schema_version 99",
        "nowhere": "not a folder",
    }
    for name, message in expected.items():
        with pytest.raises(CheckpointError, match=message) as caught:
            read_run(tmp_path / name)
        assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("key", "value", "words"),
    [
        ("test", {"accuracy": "x"}, "test.accuracy='x' is no number"),
        ("val", {"n": True}, "val.n=True is no number"),
        ("train", "x", "train='x' is no section"),
        ("wall_seconds", [1], r"wall_seconds=\[1\] is no number"),
        ("command", 7, "command=7 is no text"),
    ],
)
def test_metrics_of_another_kind_than_the_contract_has_are_damaged(tmp_path, key, value, words):
    text = json.dumps({"schema_version": 1, "status": "completed", key: value})
    (tmp_path / "metrics.json").write_text(text)
    with pytest.raises(CheckpointError, match=f"is damaged .*{words}") as caught:
        read_run(tmp_path)
    assert "\n" not in str(caught.value)
    assert read_runs(tmp_path)[0].damaged


def test_a_sweep_hides_no_run(tmp_path):
    for job in (0, 2, 10):
        write_metrics(tmp_path / str(job), {"status": "completed"})
        (tmp_path / str(job) / "config.yaml").write_text("seed: 1\n")
    (tmp_path / "2" / "metrics.json").write_text("{")
    (tmp_path / "3").mkdir()
    (tmp_path / "3" / "config.yaml").write_text("seed: 1\n")
    (tmp_path / "10" / "wandb" / "files").mkdir(parents=True)
    (tmp_path / "10" / "wandb" / "files" / "config.yaml").write_text("a: 1\n")
    (tmp_path / ".hydra").mkdir()
    (tmp_path / ".hydra" / "config.yaml").write_text("a: 1\n")
    runs = read_runs(tmp_path)
    assert [run.name for run in runs] == ["0", "2", "3", "10"]
    assert [run.status for run in runs] == ["completed", "failed", "failed", "completed"]
    assert [run.damaged for run in runs] == [False, True, True, False]
    assert "cannot be read" in (runs[1].error or "")
    assert "no metrics.json" in (runs[2].error or "")
    assert runs[0].config == {"seed": 1}
    assert set(runs[2].metrics) == set(empty_metrics())


def test_a_single_run_is_its_own_sweep(tmp_path):
    write_metrics(tmp_path, {"status": "completed"})
    assert [run.run_dir for run in read_runs(tmp_path)] == [tmp_path]
    with pytest.raises(CheckpointError, match="not a folder"):
        read_runs(tmp_path / "nowhere")


@pytest.mark.parametrize("k", [4, 5])
def test_predictions_come_back_exactly(tmp_path, k):
    predictions = make_predictions(make_questions(30, k))
    predictions[3] = replace(predictions[3], answer=None)
    write_predictions(tmp_path, predictions)
    assert read_predictions(tmp_path) == predictions


def test_predictions_have_the_columns_of_the_contract(tmp_path, predictions):
    path = write_predictions(tmp_path, [replace(predictions[0], answer=None), *predictions[1:]])
    rows = pq.read_table(path).to_pylist()
    assert list(rows[0]) == [
        *("id", "split", "subject_name", "choice_type", "answer", "prediction"),
        *("score_a", "score_b", "score_c", "score_d", "correct"),
    ]
    assert rows[0]["answer"] is rows[0]["correct"] is None
    assert all(row["correct"] == (row["answer"] == row["prediction"]) for row in rows[1:])


def test_writing_a_split_again_replaces_only_that_split(tmp_path, questions):
    val, test = (make_predictions(questions, split=split) for split in ("val", "test"))
    write_predictions(tmp_path, val)
    write_predictions(tmp_path, test)
    again = make_predictions(questions[:5], seed=9)
    write_predictions(tmp_path, again)
    assert read_predictions(tmp_path, "val") == val
    assert read_predictions(tmp_path, "test") == again
    with pytest.raises(ConfigError, match="only val, test"):
        read_predictions(tmp_path, "train")


def test_no_predictions_are_a_valid_file(tmp_path):
    write_predictions(tmp_path, [])
    assert read_predictions(tmp_path) == []


def test_damaged_predictions_are_named(tmp_path, predictions):
    with pytest.raises(CheckpointError, match="evaluate the run first"):
        read_predictions(tmp_path)
    path = write_predictions(tmp_path, predictions)
    path.write_bytes(path.read_bytes()[:100])
    with pytest.raises(CheckpointError, match="cannot be read"):
        read_predictions(tmp_path)
    pq.write_table(
        pq.read_table(write_predictions(tmp_path / "b", predictions)).drop("answer"), path
    )
    with pytest.raises(CheckpointError, match="lacks the column"):
        read_predictions(tmp_path)


CONFIG = {
    "seed": 0,
    "resume": "never",
    "data": {"name": "files", "train_file": "/a/train.jsonl", "val_file": None, "num_workers": 2},
    "model": {"path": "/home/x/gemma-2b", "revision": None},
    "optimizer": {"lr": 1.0, "betas": [0.9, 0.999]},
    "trainer": {"max_steps": 10, "enable_progress_bar": True},
    "callbacks": {"progress_bar": {"refresh_rate": 1}, "early_stopping": None},
    "logger": {"wandb": {"project": "x"}},
}


def _with(path, value):
    changed = json.loads(json.dumps(CONFIG))
    *parents, last = path.split(".")
    node = changed
    for parent in parents:
        node = node[parent]
    node[last] = value
    return changed


@pytest.mark.parametrize(
    ("path", "value"),
    [
        ("resume", "auto"),
        ("data.num_workers", 8),
        ("data.train_file", "/elsewhere/train.jsonl"),
        ("model.path", "/mnt/y/gemma-2b"),
        ("trainer.enable_progress_bar", False),
        ("callbacks.progress_bar", None),
        ("logger.wandb.project", "y"),
        ("logger", None),
        ("optimizer.lr", 1),
        ("hydra", {"run": {"dir": "x"}}),
    ],
)
def test_what_cannot_change_a_result_keeps_the_hash(path, value):
    assert config_hash(_with(path, value)) == config_hash(CONFIG)


@pytest.mark.parametrize(
    ("path", "value"),
    [
        ("seed", 1),
        ("data.val_file", "/a/val.jsonl"),
        ("model.path", "/home/x/gemma-7b"),
        ("model.path", "google/gemma-2b"),
        ("model.revision", "abc"),
        ("optimizer.lr", 2.0),
        ("optimizer.betas", [0.999, 0.9]),
        ("trainer.max_steps", 11),
        ("callbacks.early_stopping", {"patience": 3}),
    ],
)
def test_what_can_change_a_result_changes_the_hash(path, value):
    assert config_hash(_with(path, value)) != config_hash(CONFIG)


def test_hash_ignores_the_order_of_keys_and_sees_content():
    assert config_hash(dict(reversed(CONFIG.items()))) == config_hash(CONFIG)
    assert config_hash(CONFIG, content={"data": "1"}) != config_hash(CONFIG, content={"data": "2"})
    assert len(config_hash({})) == 64


def test_versions_and_hardware_have_the_keys_of_the_contract():
    found = versions()
    assert set(found) == set(CONTRACT["versions"].split())
    assert found["torch"] == torch.__version__.split("+")[0] or found["torch"] == torch.__version__
    machine = hardware("cpu")
    assert set(machine) == {"device", "memory_gb"}
    assert machine["device"]
    assert machine["memory_gb"] > 0.1


def test_a_package_that_is_not_installed_is_null(monkeypatch):
    def missing(name):
        raise results_module.importlib.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(results_module.importlib.metadata, "version", missing)
    monkeypatch.delitem(results_module.sys.modules, "bitsandbytes", raising=False)
    assert versions()["bitsandbytes"] is None
    assert versions()["python"]


def test_the_newest_run_is_the_last_started_of_the_trained_ones_that_completed(tmp_path):
    for name, started, status, trained in (
        ("a/old", "2026-11-01T00:00:00+00:00", "completed", True),
        ("b/newer", "2026-11-03T00:00:00+00:00", "completed", True),
        ("c/failed", "2026-11-04T00:00:00+00:00", "failed", True),
        ("b/newer/baselines/base", "2026-11-05T00:00:00+00:00", "completed", False),
    ):
        write_metrics(tmp_path / name, {"started": started, "status": status})
        if trained:
            (tmp_path / name / "adapter").mkdir()
    assert newest_run(tmp_path) == tmp_path / "b" / "newer"
    for nothing in (tmp_path / "c", tmp_path / "not there"):
        with pytest.raises(CheckpointError, match="make quickstart"):
            newest_run(nothing)
