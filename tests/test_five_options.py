"""Questions with five options through every verb: a fifth letter in each number and table."""

from __future__ import annotations

import json
import re
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from medqlora.config import compose
from medqlora.evaluation import read_predictions, read_run
from medqlora.train import train
from tests.data.data_tools import raw_row, write_jsonl

LETTERS = list("ABCDE")


def five(numbers: range) -> list[dict]:
    return [raw_row(i, ope=f"Sural {i}", cop=i % 5) for i in numbers]


@pytest.fixture(scope="module")
def run(tmp_path_factory, tiny_options) -> Path:
    """A run of a few updates, with its base, in a folder that a report can read."""
    folder = tmp_path_factory.mktemp("five")
    numbers = {"train": range(60), "val": range(100, 115), "test": range(200, 225)}
    files = {s: write_jsonl(folder / f"{s}.jsonl", five(n)) for s, n in numbers.items()}
    kept = [o for o in tiny_options if "_file=" not in o and not o.startswith("baselines")]
    options = [
        *kept,
        *(f"data.{split}_file={file}" for split, file in files.items()),
        "baselines=[base_quantized]",
        "quant=nf4_fp32",
        "optimizer=adamw",
        "trainer.max_steps=3",
        "trainer.val_check_interval=3",
    ]
    return train(compose("train", options), folder / "sweep" / "0")


def test_metrics_and_predictions_of_a_run_have_five_letters(run):
    metrics = read_run(run).metrics
    assert metrics["data"]["num_options"] == 5
    section = metrics["test"]
    assert (section["n"], section["random_accuracy"], section["majority_accuracy"]) == (
        25,
        0.2,
        0.2,
    )
    assert len(section["letter_share"]) == len(section["letter_accuracy"]) == 5
    assert np.shape(section["confusion"]) == (5, 5)
    table = pd.read_parquet(run / "predictions.parquet").query("split == 'test'")
    scores = table[[f"score_{letter.lower()}" for letter in LETTERS]]
    np.testing.assert_allclose(np.exp(scores).sum(axis=1), 1, atol=1e-6)
    assert (scores.to_numpy().argmax(axis=1) == table["prediction"]).all()
    assert table["correct"].mean() == pytest.approx(section["accuracy"])
    logged = pd.read_csv(run / "metrics.csv")
    assert "val/letter_share/E" in logged


def test_evaluate_shows_all_five_orders_and_writes_five_letters(run, run_command, tmp_path):
    folder = tmp_path / "evaluation"
    ended = run_command(
        "evaluate",
        f"run={run}",
        "trainer=cpu",
        "evaluate.permutations=5",
        "evaluate.contextual_calibration=true",
        "evaluate.mode=generate",
        "evaluate.max_new_tokens=2",
        f"hydra.run.dir={folder}",
    )
    assert ended.code == 0, ended.err
    metrics = read_run(folder).metrics
    assert metrics["permutations"]["num_orders"] == 5
    assert len(metrics["permutations"]["accuracy_by_order"]) == 5
    assert len(metrics["contextual_calibration"]["content_free"]) == 5
    assert metrics["generation"]["constrained"]["agreement"] == 1
    assert np.shape(metrics["generation"]["free"]["confusion"]) == (5, 6)  # the last: unparsed
    for once, again in zip(
        read_predictions(run, "test"), read_predictions(folder, "test"), strict=True
    ):
        np.testing.assert_allclose(once.scores, again.scores, atol=1e-4)
    assert (folder / "figures" / "confusion.svg").read_text().count(">E") >= 2
    assert re.search(r"\bE\s+\d+ %", ended.out)
    refused = run_command("evaluate", f"run={run}", "trainer=cpu", "evaluate.permutations=4")
    assert refused.code == 2
    assert "Choose 1 or 5" in refused.errors[0]


def test_predict_answers_with_five_letters_and_names_a_question_of_four(run, run_command, tmp_path):
    rows = [*five(range(300, 303)), raw_row(303)]
    file = write_jsonl(tmp_path / "mixed.jsonl", rows)
    ended = run_command("predict", f"run={run}", f"questions={file}", "device=cpu")
    answers = [json.loads(line) for line in ended.out.splitlines()]
    assert ended.code == 1
    for answer in answers[:3]:
        assert list(answer["probabilities"]) == LETTERS
        assert sum(answer["probabilities"].values()) == pytest.approx(1)
    assert "4 options" in answers[3]["error"]
    assert "5 letters" in answers[3]["error"]


def test_report_compares_the_run_with_its_base(run, run_command, tmp_path):
    folder = tmp_path / "report"
    ended = run_command("report", f"runs={run.parent}", f"hydra.run.dir={folder}")
    assert ended.code == 0, ended.err
    assert "20.0 %" in ended.out  # the majority of five letters
    table = pd.read_csv(folder / "summary.csv")
    assert table["n"].tolist() == [25, 25]
    assert (folder / "report.html").stat().st_size > 10_000
