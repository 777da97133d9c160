"""The verb `benchmark`: four states of one model, each with a run folder, and bad requests."""

from __future__ import annotations

import hashlib
import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

from medqlora import benchmark as verb
from medqlora import pipeline
from medqlora.benchmark import benchmark, print_result, with_run
from medqlora.config import compose
from medqlora.evaluation import holm, mcnemar_exact, read_predictions, read_run
from medqlora.evaluation.figures import benchmark_figure
from tests.data.data_tools import raw_row, write_jsonl

QUICK = (
    "benchmark.token_budgets=[256,512]",
    "benchmark.latency_questions=4",
    "benchmark.speed_questions=8",
    "benchmark.num_updates=2",
)
BF16_TOLERANCE = 0.1
"""Nats that storing the merged weights in bfloat16 may move a score of the tiny model."""


def fingerprint(folder: Path) -> dict[str, str]:
    """Hash of every file of a folder."""
    return {
        str(file.relative_to(folder)): hashlib.sha256(file.read_bytes()).hexdigest()
        for file in folder.rglob("*")
        if file.is_file()
    }


def measured(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "benchmark.json").read_text())


def scores(folder: Path) -> np.ndarray:
    return np.array([p.scores for p in sorted(read_predictions(folder), key=lambda p: p.id)])


@pytest.fixture(scope="module")
def finished(trained_run: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a benchmark of all four rows, the merged weights kept."""
    before = fingerprint(trained_run)
    given = [f"run={trained_run}", *QUICK, "benchmark.keep_merged=true"]
    cfg = with_run(compose("benchmark", given), {word.split("=")[0] for word in given})
    folder = benchmark(cfg, tmp_path_factory.mktemp("benchmark") / "all")
    assert fingerprint(trained_run) == before, "the run that is measured is only read"
    return folder


@pytest.fixture
def bare_options(tiny_options: list[str]) -> list[str]:
    """A bare base on the CPU; `logger`, `callbacks` and `baselines` are not of this verb."""
    foreign = ("logger", "callbacks", "baselines")
    mine = [option for option in tiny_options if not option.startswith(foreign)]
    return [*mine, *QUICK, "quant=nf4", "optimizer=adamw"]


def test_every_number_is_that_of_the_rows_own_run_folder(finished):
    result = measured(finished)
    assert list(result["rows"]) == ["base_16bit", "base_quantized", "adapter", "merged"]
    for row in result["rows"].values():
        run = read_run(finished / row["run_dir"])
        assert run.status == "completed"
        assert row["weight_gb"] == run.metrics["model"]["weight_gb"]
        for key in ("n", "accuracy", "ci_low", "ci_high", "majority_accuracy"):
            assert row["section"][key] == run.metrics["test"][key] is not None
        assert run.metrics["benchmark"]["latency"] == row["latency"]


def test_base_and_adapter_answer_as_the_run_did_and_merging_only_rounds(finished, trained_run):
    adapter, merged = (scores(finished / "scored" / name) for name in ("adapter", "merged"))
    np.testing.assert_allclose(
        adapter,
        np.array(
            [p.scores for p in sorted(read_predictions(trained_run, "test"), key=lambda p: p.id)]
        ),
        rtol=0,
        atol=1e-6,
    )
    np.testing.assert_allclose(merged, adapter, rtol=0, atol=BF16_TOLERANCE)
    assert np.abs(scores(finished / "scored" / "base_quantized") - adapter).max() > BF16_TOLERANCE


def test_rows_are_compared_with_the_16_bit_base_on_the_same_questions(finished):
    result = measured(finished)
    base, *others = result["rows"].values()
    comparisons = result["comparisons"]
    assert [c["name_b"] for c in comparisons] == [row["label"] for row in others]
    right = {
        row["label"]: np.array(
            [
                p.correct
                for p in sorted(read_predictions(finished / row["run_dir"]), key=lambda p: p.id)
            ]
        )
        for row in (base, *others)
    }
    expected = [
        mcnemar_exact(
            int((right[base["label"]] & ~right[c["name_b"]]).sum()),
            int((~right[base["label"]] & right[c["name_b"]]).sum()),
        )
        for c in comparisons
    ]
    assert [c["p_value"] for c in comparisons] == pytest.approx(expected)
    assert [c["p_holm"] for c in comparisons] == pytest.approx(holm(expected))


def test_sizes_are_those_of_the_storage(finished):
    rows = measured(finished)["rows"]
    size = {name: row["weight_gb"] for name, row in rows.items()}
    disk = {name: row["weight_gb_on_disk"] for name, row in rows.items()}
    assert size["base_quantized"] < size["adapter"]
    assert disk["base_quantized"] < disk["adapter"]
    assert size["base_16bit"] == pytest.approx(2 * rows["base_16bit"]["num_parameters"] / 1e9, 0.01)
    assert size["merged"] == pytest.approx(size["base_16bit"])
    for name, value in size.items():  # a file has a header besides
        assert value < disk[name] < value + 5e-5
    merged = finished / "merged_model"
    files = sum(file.stat().st_size for file in merged.glob("*.safetensors"))
    assert disk["merged"] == files / 1e9
    assert AutoModelForCausalLM.from_pretrained(merged).dtype == torch.bfloat16
    assert not list(finished.glob(".*")), "quantised copies are removed"


def test_times_and_memory_are_there_with_their_conditions(finished):
    result = measured(finished)
    for name, row in result["rows"].items():
        latency, throughput = row["latency"], row["throughput"]
        assert 0 < latency["p50_seconds"] <= latency["p95_seconds"]
        assert (latency["n"], throughput["n"]) == (4, 8)
        assert [one["token_budget"] for one in throughput["tried"]] == [256, 512]
        best = max(one["questions_per_second"] for one in throughput["tried"])
        assert throughput["questions_per_second"] == best
        assert row["scoring"]["token_budget"] == 512
        assert (row["training"] is None) == (name == "merged")
        if row["training"]:
            assert row["training"]["num_updates"] == 2
            assert row["training"]["num_trainable"] > 0
    conditions = result["conditions"]
    assert conditions["hardware"]["device"]
    assert conditions["versions"]["torch"] == torch.__version__
    assert conditions["num_questions"] == 24


@pytest.mark.skipif(sys.platform != "linux", reason="other systems cannot forget a peak")
def test_peak_memory_is_what_was_held_since_it_was_restarted():
    memory = verb._PeakMemory(torch.device("cpu"))
    held = torch.ones(50_000_000)  # 0.2 GB
    del held
    assert memory.peak()["peak_memory_gb"] == pytest.approx(0.2, abs=0.05)
    memory.restart()
    peak = memory.peak()["peak_memory_gb"]
    assert peak is not None
    assert peak < 0.05


def test_tables_and_figure_never_show_an_accuracy_alone(finished, capsys):
    print_result(finished)
    out = capsys.readouterr().out
    markdown = (finished / "benchmark.md").read_text()
    for row in measured(finished)["rows"].values():
        line = next(x for x in markdown.splitlines() if x.startswith(f"| {row['label']} |"))
        assert f"{100 * row['section']['accuracy']:.1f} %" in line
        assert f"[{100 * row['section']['ci_low']:.1f}, " in line
        assert "| 24 |" in line
    for text in (out, markdown):
        for word in ("majority", "p (Holm)", "p50 ms", "p95 ms", "questions/s", "bitsandbytes"):
            assert word in text.replace("\n", " "), word
    assert (finished / "benchmark.png").read_bytes().startswith(b"\x89PNG")


def test_figure_has_the_majority_line_and_says_where_labels_are_missing(finished):
    rows = list(measured(finished)["rows"].values())
    _, accuracies, _ = benchmark_figure(rows).axes
    majority = rows[0]["section"]["majority_accuracy"]
    assert any(np.asarray(line.get_xdata())[0] == majority for line in accuracies.lines)
    section = {"accuracy": None, "num_unlabelled": 24}
    _, accuracies, _ = benchmark_figure([{**row, "section": section} for row in rows]).axes
    assert [text.get_text() for text in accuracies.texts] == ["no labels"] * 4


def test_config_of_a_row_and_of_the_benchmark_repeat_them(finished, run_command, tmp_path):
    row = finished / "scored" / "adapter"
    ended = run_command(
        "evaluate", "--config-path", str(row), "--config-name", "config", "evaluate.figures=false",
        f"hydra.run.dir={tmp_path / 'row'}",
    )  # fmt: skip
    assert ended.code == 0, ended.err
    np.testing.assert_array_equal(scores(tmp_path / "row"), scores(row))
    ended = run_command(
        "benchmark", "--config-path", str(finished), "--config-name", "config",
        "rows=[adapter]", f"hydra.run.dir={tmp_path / 'again'}",
    )  # fmt: skip
    assert ended.code == 0, ended.err
    assert list(measured(tmp_path / "again")["rows"]) == ["adapter"]
    np.testing.assert_array_equal(scores(tmp_path / "again" / "scored" / "adapter"), scores(row))


def test_without_a_run_the_bare_bases_are_measured_and_a_fresh_adapter_if_named(
    bare_options, run_command, tmp_path
):
    ended = run_command(
        "benchmark", *bare_options, "rows=[base_quantized]", "peft=lora_r4",
        f"hydra.run.dir={tmp_path / 'lora'}",
    )  # fmt: skip
    assert ended.code == 0, ended.err
    assert measured(tmp_path / "lora")["rows"]["base_quantized"]["training"]["error"] is None
    ended = run_command("benchmark", *bare_options, f"hydra.run.dir={tmp_path / 'bare'}")
    assert ended.code == 0, ended.err
    rows = measured(tmp_path / "bare")["rows"]
    assert list(rows) == ["base_16bit", "base_quantized"]
    assert {row["training"] for row in rows.values()} == {None}


def test_an_adapter_that_cannot_train_on_a_storage_costs_that_number_only(
    bare_options, run_command, tmp_path
):
    ended = run_command(
        "benchmark", *bare_options, "rows=[base_quantized]", "peft=full",
        f"hydra.run.dir={tmp_path}",
    )  # fmt: skip
    assert ended.code == 0, ended.err
    training = measured(tmp_path)["rows"]["base_quantized"]["training"]
    assert training["peak_memory_gb"] is None
    assert "quantised" in training["error"]


def test_unlabelled_questions_get_no_accuracy_and_the_rest(bare_options, run_command, tmp_path):
    file = write_jsonl(
        tmp_path / "open.jsonl", [{**raw_row(i), "cop": -1} for i in range(300, 304)]
    )
    ended = run_command(
        "benchmark", *bare_options, f"data.test_file={file}", f"hydra.run.dir={tmp_path / 'run'}"
    )
    assert ended.code == 0, ended.err
    assert "no labels" in ended.out
    assert "question by question" not in ended.out
    result = measured(tmp_path / "run")
    assert result["comparisons"] == []
    for row in result["rows"].values():
        assert row["section"]["accuracy"] is None
        assert row["latency"]["p50_seconds"] > 0


def test_a_row_without_memory_is_named_and_the_others_are_kept(
    bare_options, run_command, tmp_path, monkeypatch
):
    build_base = pipeline.build_base

    def small(cfg, *arguments, **named):
        if cfg["quant"]["data_type"] == "none":
            raise torch.OutOfMemoryError("CUDA out of memory")
        return build_base(cfg, *arguments, **named)

    monkeypatch.setattr(pipeline, "build_base", small)
    ended = run_command("benchmark", *bare_options, f"hydra.run.dir={tmp_path}")
    assert ended.code == 1
    assert len(ended.errors) == 1
    assert "1 of 2 rows ran out of memory (base, 16 bit)" in ended.errors[0]
    rows = measured(tmp_path)["rows"]
    assert "out of memory" in rows["base_16bit"]["error"]
    assert rows["base_quantized"]["section"]["n"] == 24
    assert "failed" in ended.out


@pytest.mark.parametrize(
    ("options", "named"),
    [
        (["rows=[base,adapter]"], "rows=base is unknown"),
        (["rows=[]"], "rows=[] measures nothing"),
        (["rows=[merged]"], "there is no adapter"),
        (["rows=[base_quantized]", "quant=none"], "quant=none stores the base as base_16bit"),
        (["split=dev"], "split=dev is unknown"),
        (["split=train", "data.train_file=null"], "no train questions"),
        (["benchmark.latency_questions=0"], "benchmark.latency_questions=0"),
        (["benchmark.num_updates=-1"], "benchmark.num_updates=-1"),
        (["benchmark.token_budgets=[0]"], "benchmark.token_budgets=[0]"),
        (["benchmark.token_budgets=many"], "benchmark.token_budgets=many"),
        (["run=nowhere"], "nowhere"),
        (["run=a", "adapter=b"], "run and adapter are both given"),
    ],
)
def test_bad_requests_end_in_one_line_and_leave_nothing(
    bare_options, run_command, tmp_path, options, named
):
    ended = run_command(
        "benchmark", *bare_options, *options, f"hydra.run.dir={tmp_path / 'refused'}"
    )
    assert ended.code == 2
    assert len(ended.errors) == 1
    assert named in ended.errors[0]
    assert not (tmp_path / "refused").exists()


def test_a_run_without_an_adapter_is_refused(finished, run_command, tmp_path):
    base = finished / "scored" / "base_quantized"
    ended = run_command("benchmark", f"run={base}", f"hydra.run.dir={tmp_path / 'refused'}")
    assert (ended.code, len(ended.errors)) == (2, 1)
    assert "has no adapter" in ended.errors[0]
