"""The verb `evaluate`: every kind of model, everything beside the plain numbers, bad requests."""

from __future__ import annotations

import json
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

from medqlora import pipeline
from medqlora.config import compose
from medqlora.errors import CheckpointError, ConfigError
from medqlora.evaluate import evaluate, print_result, with_run
from medqlora.evaluation import (
    RunResult,
    apply_temperature,
    negative_log_likelihood,
    read_predictions,
    read_run,
    score_arrays,
    write_metrics,
)
from medqlora.evaluation.figures import split_figures
from medqlora.evaluation.generation import unpack
from medqlora.finetuning import ValidationReport
from medqlora.train import train
from tests.data.data_tools import raw_row, write_jsonl

FP32_TOLERANCE = 1e-4
"""Nats a score may move with the questions that share its row, in float32 (`medqlora.evaluate`)."""


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory, tiny_options: list[str]) -> Path:
    """A run of a few updates with its bare base beside it."""
    options = [option for option in tiny_options if not option.startswith("baselines")]
    cfg = compose(
        "train",
        [
            *options,
            "baselines=[base_quantized]",
            "quant=nf4_fp32",
            "optimizer=adamw",
            "optimizer.lr=0.01",
            "trainer.max_steps=6",
            "trainer.val_check_interval=2",
        ],
    )
    return train(cfg, tmp_path_factory.mktemp("runs") / "trained")


@pytest.fixture
def options(tiny_gemma_folder: str, question_files: dict[str, str]) -> list[str]:
    """A bare base in float32 on made-up questions."""
    return [
        "data=files",
        *(f"data.{split}_file={file}" for split, file in question_files.items()),
        "data.token_budget=512",
        f"model.path={tiny_gemma_folder}",
        "model.revision=null",
        "quant=none_fp32",
        "trainer=cpu",
        "evaluate.figures=false",
    ]


@pytest.fixture
def score(tmp_path: Path) -> Callable[..., RunResult]:
    """`score(*overrides)` runs one evaluation and reads its folder back."""

    def run(*overrides: str) -> RunResult:
        keys = {override.split("=")[0] for override in overrides}
        cfg = with_run(compose("evaluate", overrides), keys)
        folder = tmp_path / f"evaluation-{len(list(tmp_path.glob('evaluation-*')))}"
        return read_run(evaluate(cfg, folder))

    return run


def scores_by_id(folder: Path, split: str = "test") -> dict[str, np.ndarray]:
    return {p.id: np.array(p.scores) for p in read_predictions(folder, split)}


def assert_same_scores(a: Path, b: Path, tolerance: float) -> None:
    first, second = scores_by_id(a), scores_by_id(b)
    assert first.keys() == second.keys()
    for key, row in first.items():
        np.testing.assert_allclose(row, second[key], rtol=0, atol=tolerance)


# --- what can be scored ---------------------------------------------------------------------------


def test_a_run_scored_again_has_the_scores_it_ended_with(trained, score):
    again = score(f"run={trained}", "evaluate.figures=false")  # on the CPU, as it was trained
    assert again.config is not None
    assert again.config["trainer"]["accelerator"] == "cpu"
    assert_same_scores(trained, again.run_dir, 1e-6)
    before, after = read_run(trained).metrics, again.metrics
    for key in ("accuracy", "confusion", "by", "sha256", "letter_share"):
        assert after["test"][key] == before["test"][key], key
    assert after["data"]["sha256"] == before["data"]["sha256"]


def test_an_adapter_folder_scores_as_the_run_it_came_from(trained, score, options):
    of_run = score(f"run={trained}", "trainer=cpu", "evaluate.figures=false")
    of_folder = score(*options, "quant=nf4_fp32", f"adapter={trained / 'adapter'}")
    assert_same_scores(of_run.run_dir, of_folder.run_dir, 1e-6)


def repeat(run_command, first, second):
    """An evaluation again, from the config that it has written."""
    ended = run_command(
        "evaluate", "--config-path", str(first), "--config-name", "config",
        f"hydra.run.dir={second}",
    )  # fmt: skip
    assert ended.code == 0, ended.err


@pytest.mark.parametrize("more", [[], ["peft=none"]], ids=["adapter", "base"])
def test_the_config_of_an_evaluation_repeats_it(trained, run_command, tmp_path, more):
    first, second = tmp_path / "first", tmp_path / "second"
    ended = run_command(
        "evaluate", f"run={trained}", "trainer=cpu", "evaluate.figures=false", *more,
        f"hydra.run.dir={first}",
    )  # fmt: skip
    assert ended.code == 0, ended.err
    repeat(run_command, first, second)
    assert_same_scores(first, second, 0)
    once, again = read_run(first).metrics, read_run(second).metrics
    for key in ("config_hash", "test", "calibration", "paired"):
        assert again.get(key) == once.get(key), key


def test_peft_none_scores_the_base_of_a_run_without_its_adapter(trained, score):
    base = score(f"run={trained}", "peft=none", "trainer=cpu", "evaluate.figures=false")
    assert_same_scores(trained / "baselines" / "base_quantized", base.run_dir, 1e-6)
    assert "calibration" not in base.metrics


def test_an_evaluation_can_be_evaluated_with_the_adapter_it_scored(trained, score):
    first = score(f"run={trained}", "trainer=cpu", "evaluate.figures=false")
    second = score(f"run={first.run_dir}", "trainer=cpu", "evaluate.figures=false")
    assert_same_scores(first.run_dir, second.run_dir, 1e-6)


def test_one_value_of_the_runs_data_can_change_and_the_rest_stays(trained, score):
    part = score(f"run={trained}", "trainer=cpu", "data.limit_test=8", "evaluate.figures=false")
    assert part.metrics["test"]["n"] == 8
    assert scores_by_id(part.run_dir).keys() < scores_by_id(trained).keys()


@pytest.mark.parametrize(
    "changes",
    [["seed=7"], ["data.num_val=12", "seed=7"], ["data=files", "data.val_file={val}"]],
)
def test_questions_of_training_are_refused_where_the_data_are_cut_otherwise(
    tiny_options, question_files, score, tmp_path, changes
):
    """A run that cut val from train has trained on most of what another seed would cut."""
    cfg = compose(
        "train",
        [*tiny_options, "data.val_file=null", "data.num_val=16", "trainer.max_steps=1"],
    )
    run = train(cfg, tmp_path / "run")
    as_then = [f"run={run}", "trainer=cpu", "evaluate.figures=false"]
    assert score(*as_then, "split=val").metrics["val"]["n"] == 16
    given = [change.format(val=question_files["train"]) for change in changes]
    with pytest.raises(ConfigError, match=r"of these \d+ val questions were trained on: .*data"):
        score(*as_then, "split=val", *given)
    assert score(*as_then, "split=train", "seed=7").metrics["train_split"]["n"] == 48


def test_new_questions_are_scored_and_those_of_training_are_named_as_such(
    trained, score, question_files, tmp_path, caplog
):
    new = write_jsonl(tmp_path / "new.jsonl", [raw_row(i) for i in range(400, 408)])
    as_then = [f"run={trained}", "trainer=cpu", "evaluate.figures=false", "data=files"]
    assert score(*as_then, f"data.test_file={new}").metrics["test"]["n"] == 8
    known = f"data.test_file={question_files['train']}"
    with pytest.raises(ConfigError, match=r"^64 of these 64 test questions were trained on"):
        score(*as_then, known)
    assert score(*as_then, "peft=none", known).metrics["test"]["n"] == 64
    moved = tmp_path / "moved"
    shutil.copytree(trained, moved)
    config = yaml.safe_load((moved / "config.yaml").read_text())
    config["data"]["train_file"] = str(tmp_path / "gone.jsonl")
    (moved / "config.yaml").write_text(yaml.safe_dump(config))
    found = score(f"run={moved}", *as_then[1:], known)
    assert found.metrics["test"]["n"] == 64
    assert "trained on is not known" in caplog.text


def test_options_that_came_from_a_run_are_named_as_the_run_has_them(trained, run_command, tmp_path):
    """Hydra knows only what `evaluate` itself would have chosen."""
    path = trained.parent / "named"
    shutil.copytree(trained, path)
    metrics = read_run(path).metrics
    metrics["choices"] = {"quant": "nf4_fp32", "prompt": "harness", "data": "files", "model": "m"}
    write_metrics(path, metrics)
    first, second = tmp_path / "first", tmp_path / "second"
    given = ["data.limit_test=5", "prompt=letters", "evaluate.figures=false"]
    ended = run_command("evaluate", f"run={path}", *given, f"hydra.run.dir={first}")
    assert ended.code == 0, ended.err
    repeat(run_command, first, second)
    once, again = read_run(first).metrics, read_run(second).metrics
    expected = {"quant": "nf4_fp32", "data": "files", "model": "m"}
    assert once["choices"].items() >= (expected | {"prompt": "letters"}).items()
    assert again["choices"].items() >= expected.items()


def test_stock_transformers_gives_a_gemma_the_scores_of_packed_rows(score, options):
    packed = score(*options)
    stock = score(*options, "evaluate.backend=stock")
    assert (packed.metrics["scoring"]["backend"], stock.metrics["scoring"]["backend"]) == (
        "packed",
        "stock",
    )
    assert_same_scores(packed.run_dir, stock.run_dir, FP32_TOLERANCE)


@pytest.fixture(scope="module")
def llama_folder(tmp_path_factory: pytest.TempPathFactory, tiny_gemma_folder: str) -> str:
    """Another architecture with the same tokenizer."""
    folder = tmp_path_factory.mktemp("models") / "llama"
    torch.manual_seed(0)
    vocab = AutoModelForCausalLM.from_pretrained(tiny_gemma_folder).config.vocab_size
    LlamaForCausalLM(
        LlamaConfig(
            vocab_size=vocab,
            hidden_size=64,
            intermediate_size=128,
            num_hidden_layers=2,
            num_attention_heads=2,
            initializer_range=0.1,
        )
    ).save_pretrained(folder)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (folder / name).write_bytes((Path(tiny_gemma_folder) / name).read_bytes())
    return str(folder)


def test_any_causal_language_model_is_scored_at_its_own_last_token(score, options, llama_folder):
    """Left padding must not move a score: each prompt alone gives the same."""
    run = score(*options, f"model.path={llama_folder}")
    assert run.metrics["scoring"]["backend"] == "stock"
    datamodule = pipeline.build_datamodule(
        compose("evaluate", [*options, f"model.path={llama_folder}"])
    )
    datamodule.setup()
    model = AutoModelForCausalLM.from_pretrained(llama_folder)
    expected = {}
    for batch in datamodule.loader("test"):
        for index, prompt in unpack(batch):
            logits = model(torch.tensor([prompt])).logits[0, -1, list(datamodule.letter_ids)]
            identifier = datamodule.questions["test"][index].id
            expected[identifier] = torch.log_softmax(logits, dim=-1).detach().numpy()
    found = scores_by_id(run.run_dir)
    assert found.keys() == expected.keys()
    for key, row in expected.items():
        np.testing.assert_allclose(found[key], row, atol=FP32_TOLERANCE)


@pytest.mark.parametrize(
    ("override", "message"),
    [("quant=nf4", "quant=none"), ("evaluate.backend=packed", "model_type=llama")],
)
def test_what_a_foreign_model_cannot_have_is_refused(
    score, options, llama_folder, override, message
):
    with pytest.raises(ConfigError, match=message):
        score(*options, f"model.path={llama_folder}", override)


def test_a_model_folder_that_is_not_there_is_named(score, options, tmp_path):
    with pytest.raises(Exception, match="nowhere"):
        score(*options, f"model.path={tmp_path / 'nowhere'}", "evaluate.backend=stock")


# --- scores do not depend on company --------------------------------------------------------------


@pytest.mark.parametrize("budget", [128, 2048])
@pytest.mark.parametrize(
    ("quant", "tolerance"), [("none_fp32", FP32_TOLERANCE), ("none", 0.1), ("nf4", 0.1)]
)
def test_scores_do_not_depend_on_the_rows_that_questions_share(
    score, options, budget, quant, tolerance
):
    one = score(*options, f"quant={quant}")
    other = score(*options, f"quant={quant}", f"data.token_budget={budget}")
    assert_same_scores(one.run_dir, other.run_dir, tolerance)


def test_scores_do_not_depend_on_the_order_of_the_questions(
    score, options, question_files, tmp_path
):
    lines = Path(question_files["test"]).read_text().splitlines()
    (tmp_path / "reversed.jsonl").write_text("\n".join(reversed(lines)) + "\n")
    one = score(*options)
    other = score(*options, f"data.test_file={tmp_path / 'reversed.jsonl'}")
    assert_same_scores(one.run_dir, other.run_dir, FP32_TOLERANCE)
    assert one.metrics["test"]["sha256"] == other.metrics["test"]["sha256"]


def test_a_row_scored_before_the_clock_starts_leaves_nothing_behind(options, monkeypatch):
    cfg = compose("evaluate", options)
    datamodule = pipeline.build_datamodule(cfg)
    datamodule.setup()
    module = pipeline.build_scoring_module(cfg, pipeline.build_base(cfg), datamodule)
    plain = pipeline.score(cfg, module, datamodule, "test")
    metrics = module.metrics["test"]
    metrics.reset()
    monkeypatch.setattr(torch.cuda, "synchronize", lambda device: None)
    pipeline._score_first(module, datamodule.loader("test"))
    assert int(metrics.count) == 0
    again = pipeline.score(cfg, module, datamodule, "test")
    assert again.predictions == plain.predictions
    assert again.section == plain.section


# --- beside the plain numbers ---------------------------------------------------------------------


def test_robustness_has_keys_of_its_own_and_leaves_the_plain_numbers_alone(score, options):
    plain = score(*options)
    both = score(*options, "evaluate.permutations=4", "evaluate.contextual_calibration=true")
    assert both.metrics["test"] == plain.metrics["test"]
    assert_same_scores(plain.run_dir, both.run_dir, 0)
    orders = both.metrics["permutations"]
    assert orders["num_orders"] == 4
    assert orders["accuracy_by_order"][0] == pytest.approx(plain.metrics["test"]["accuracy"])
    assert orders["mean_accuracy"] == pytest.approx(np.mean(orders["accuracy_by_order"]))
    assert 0 <= orders["consistency"] <= 1
    assert orders["ci_low"] <= orders["mean_accuracy"] <= orders["ci_high"]
    assert orders["debiased"]["n"] == plain.metrics["test"]["n"]
    contextual = both.metrics["contextual_calibration"]
    assert sum(contextual["content_free"]) == pytest.approx(1)
    assert sum(contextual["letter_share"]) == pytest.approx(1)
    for name in ("permutations", "contextual_calibration"):
        assert scores_by_id(both.run_dir / name).keys() == scores_by_id(plain.run_dir).keys()
    for name in ("permutations", "contextual_calibration", "generation"):
        assert name not in plain.metrics


def test_debiased_scores_are_the_mean_over_the_orders_shown_one_by_one(
    score, options, question_files, tmp_path
):
    """Each cyclic order as a file of its own gives what `evaluate.permutations` scored."""
    rows = [json.loads(line) for line in Path(question_files["test"]).read_text().splitlines()]
    columns = ("opa", "opb", "opc", "opd")
    by_option: dict[str, list[np.ndarray]] = {row["id"]: [] for row in rows}
    for shift in range(4):
        shown = [
            row
            | {columns[p]: row[columns[(p + shift) % 4]] for p in range(4)}
            | {"cop": (row["cop"] - shift) % 4}
            for row in rows
        ]
        file = write_jsonl(tmp_path / f"order{shift}.jsonl", shown)
        # cop 0..3 is found from the data as long as a 0 is among it.
        run = score(*options, f"data.test_file={file}", "data.label_base=0")
        for key, row in scores_by_id(run.run_dir).items():
            by_option[key].append(np.roll(row, shift))
    together = score(*options, "evaluate.permutations=4")
    debiased = scores_by_id(together.run_dir / "permutations")
    for key, several in by_option.items():
        mean = np.mean(several, axis=0)
        expected = mean - np.logaddexp.reduce(mean)
        np.testing.assert_allclose(debiased[key], expected, atol=FP32_TOLERANCE)


def test_training_fits_a_temperature_on_val_and_evaluate_applies_it(trained, score):
    fitted = read_run(trained).metrics["calibration"]
    assert fitted["fitted_on"] == "val"
    assert (fitted["num_fitted"], fitted["n"]) == (16, 24)
    assert fitted["nll_before"] == pytest.approx(read_run(trained).metrics["test"]["loss"])
    again = score(f"run={trained}", "trainer=cpu", "evaluate.figures=false")
    assert again.metrics["calibration"]["temperature"] == fitted["temperature"]
    assert again.metrics["calibration"]["ece_after"] == pytest.approx(fitted["ece_after"])
    without = score(
        f"run={trained}", "trainer=cpu", "evaluate.calibrate=none", "evaluate.figures=false"
    )
    assert "calibration" not in without.metrics
    on_val = score(f"run={trained}", "trainer=cpu", "split=val", "evaluate.figures=false")
    measured = on_val.metrics["calibration"]
    assert (measured["n"], measured["ece_after"]) == (0, None)


def test_a_temperature_fitted_on_val_lowers_the_loss_there(trained):
    scores, answer = score_arrays(read_predictions(trained, "val"))
    temperature = read_run(trained).metrics["calibration"]["temperature"]
    scaled = apply_temperature(scores, temperature)
    assert negative_log_likelihood(scaled, answer) <= negative_log_likelihood(scores, answer)


def test_a_bare_base_is_calibrated_on_its_own_val_split(trained, score):
    base = score(
        f"run={trained}",
        "peft=none",
        "trainer=cpu",
        "evaluate.calibrate=val",
        "evaluate.figures=false",
    )
    reference = read_run(trained / "baselines" / "base_quantized").metrics["calibration"]
    assert base.metrics["calibration"]["temperature"] == pytest.approx(reference["temperature"])
    assert base.metrics["val"]["n"] == 16


def test_a_temperature_needs_labelled_val_questions(score, options, tmp_path):
    rows = [raw_row(i, cop=-1) for i in range(300, 308)]
    file = write_jsonl(tmp_path / "open.jsonl", rows)
    with pytest.raises(ConfigError, match=r"evaluate\.calibrate=val needs labelled val questions"):
        score(*options, f"data.val_file={file}", "evaluate.calibrate=val")


def test_a_temperature_is_measured_on_the_split_that_was_asked_for(score, options):
    found = score(*options, "split=train", "evaluate.calibrate=val").metrics["calibration"]
    assert (found["num_fitted"], found["n"]) == (16, 64)
    assert found["ece_after"] is not None


def test_difficulty_by_the_bases_loss_and_the_paired_test_come_with_a_base(trained, score):
    section = read_run(trained).metrics["test"]
    groups = section["by"]["difficulty_base_nll"]
    assert list(groups) == ["basic", "intermediate", "advanced"]
    assert sum(group["n"] for group in groups.values()) == section["n"]
    # The base has its lowest losses right more often than its highest.
    base = trained / "baselines" / "base_quantized"
    of_base = score(
        f"run={trained}", "peft=none", "trainer=cpu", f"evaluate.base={base}",
        "evaluate.figures=false",
    )  # fmt: skip
    own = of_base.metrics["test"]["by"]["difficulty_base_nll"]
    assert own["basic"]["accuracy"] > own["advanced"]["accuracy"]
    paired = read_run(trained).metrics["paired"]["test"]
    assert paired["n"] == section["n"]
    assert paired["accuracy_b"] == section["accuracy"]
    same = of_base.metrics["paired"]["test"]
    assert (same["difference"], same["p_value"]) == (0, 1)


def test_selective_accuracy_ends_in_the_plain_one(score, options):
    run = score(*options)
    points = run.metrics["selective"]["test"]
    assert points[-1]["coverage"] == 1
    assert points[-1]["accuracy"] == run.metrics["test"]["accuracy"]
    assert [point["n"] for point in points] == sorted(point["n"] for point in points)
    for point in points:
        assert point["ci_low"] <= point["accuracy"] <= point["ci_high"]


def test_a_base_that_scored_other_questions_is_refused_by_their_hash(
    trained, score, options, tmp_path
):
    other = write_jsonl(tmp_path / "other.jsonl", [raw_row(i) for i in range(300, 324)])
    base = score(*options, f"data.test_file={other}")
    with pytest.raises(ConfigError, match=r"other questions.*sha256"):
        score(f"run={trained}", "trainer=cpu", f"evaluate.base={base.run_dir}")


@pytest.mark.parametrize(
    ("given", "other"), [("prompt=letters", "prompt"), ("data.max_length=128", "data.max_length")]
)
def test_a_base_that_was_asked_otherwise_is_not_compared_unless_it_is_named(
    trained, score, caplog, given, other
):
    """The difference would be of the prompt as well, and the temperature was fitted for another."""
    caplog.set_level("INFO", "medqlora")
    asked = [f"run={trained}", "trainer=cpu", "evaluate.figures=false", given]
    alone = score(*asked)
    assert "paired" not in alone.metrics
    assert "calibration" not in alone.metrics
    assert f"it was scored with another {other}" in caplog.text
    assert f"was fitted with another {other}" in caplog.text
    base = trained / "baselines" / "base_quantized"
    named = score(*asked, f"evaluate.base={base}").metrics["paired"]["test"]
    assert named["name_a"] == f"base, NF4 (another {other})"


def test_a_temperature_is_of_one_storage(trained, score, caplog):
    caplog.set_level("INFO", "medqlora")
    options = ["trainer=cpu", "evaluate.figures=false", "quant=none_fp32"]
    found = score(f"run={trained}", *options)
    assert "calibration" not in found.metrics
    assert "was fitted with another quant" in caplog.text
    assert found.metrics["paired"]["test"]["name_a"] == "base, NF4"


def test_a_run_with_an_adapter_is_no_base(trained, score):
    with pytest.raises(ConfigError, match="not a bare base"):
        score(f"run={trained}", "trainer=cpu", f"evaluate.base={trained}")


# --- generated answers ----------------------------------------------------------------------------


def test_constrained_generation_writes_the_letter_of_the_highest_score(trained, score):
    """Greedy decoding over the letters alone is the argmax of their probabilities."""
    scored = score(f"run={trained}", "trainer=cpu", "evaluate.figures=false")
    written = score(
        f"run={trained}", "trainer=cpu", "evaluate.mode=generate", "evaluate.max_new_tokens=4",
        "evaluate.figures=false",
    )  # fmt: skip
    assert_same_scores(scored.run_dir, written.run_dir, FP32_TOLERANCE)
    section = written.metrics["generation"]
    assert section["constrained"]["num_unparsed"] == 0
    assert section["constrained"]["agreement"] == 1
    assert section["constrained"]["accuracy"] == written.metrics["test"]["accuracy"]


def test_generation_with_learned_tokens_in_front_is_not_moved_by_padding(
    tiny_options, score, tmp_path
):
    """Peft counts positions through left padding where virtual tokens stand before it."""
    options = ["quant=nf4_fp32", "optimizer=adamw", "trainer.max_steps=1", "peft=prompt_tuning"]
    run = train(compose("train", [*tiny_options, *options]), tmp_path / "prompt_tuning")
    written = score(
        f"run={run}", "trainer=cpu", "evaluate.mode=generate", "evaluate.max_new_tokens=2",
        "evaluate.figures=false",
    )  # fmt: skip
    assert_same_scores(run, written.run_dir, FP32_TOLERANCE)


def test_free_replies_are_kept_and_those_unread_count_for_no_letter(score, options):
    run = score(*options, "evaluate.mode=generate", "evaluate.max_new_tokens=4")
    free = run.metrics["generation"]["free"]
    lines = (run.run_dir / "generations.jsonl").read_text().splitlines()
    replies = [json.loads(line) for line in lines]
    unread = [reply for reply in replies if reply["letter"] is None]
    assert len(replies) == free["n"] == 24
    assert free["num_unparsed"] == len(unread)
    assert sum(free["letter_share"]) == pytest.approx(1 - len(unread) / 24)
    right = sum(reply["letter"] == reply["answer"] for reply in replies)
    assert free["accuracy"] == pytest.approx(right / 24)


# --- input that says little -----------------------------------------------------------------------


def test_an_unlabelled_test_split_gives_predictions_and_claims_no_accuracy(
    run_command, options, tmp_path
):
    rows = [{k: v for k, v in raw_row(i).items() if k != "cop"} for i in range(400, 412)]
    file = write_jsonl(tmp_path / "unlabelled.jsonl", rows)
    folder = tmp_path / "evaluation"
    ended = run_command(
        "evaluate",
        *options,
        "data.train_file=null",
        "data.val_file=null",
        f"data.test_file={file}",
        "evaluate.permutations=4",
        "evaluate.contextual_calibration=true",
        "evaluate.mode=generate",
        "evaluate.max_new_tokens=2",
        "evaluate.figures=true",
        f"hydra.run.dir={folder}",
    )
    assert ended.code == 0, ended.err
    assert "no labels" in ended.out
    assert "have no label" in ended.err
    metrics = read_run(folder).metrics
    section = metrics["test"]
    assert section["n"] == 0
    assert section["num_unlabelled"] == 12
    for key in ("accuracy", "ci_low", "loss", "ece", "macro_accuracy", "majority_accuracy"):
        assert section[key] is None, key
    assert all(groups == {} for groups in section["by"].values())
    assert sum(section["letter_share"]) == pytest.approx(1)
    assert metrics["permutations"]["mean_accuracy"] is None
    assert metrics["contextual_calibration"]["accuracy"] is None
    assert metrics["generation"]["free"]["accuracy"] is None
    table = pd.read_parquet(folder / "predictions.parquet")
    assert len(table) == 12
    assert table["correct"].isna().all()
    assert not (folder / "figures").exists()


def test_what_was_left_out_and_a_changed_file_show_in_the_metrics(
    score, options, question_files, tmp_path
):
    """Dropped by an audit finding, decontaminated, and the hash of what is left."""
    rows = [json.loads(line) for line in Path(question_files["train"]).read_text().splitlines()]
    asked = json.loads(Path(question_files["test"]).read_text().splitlines()[0])
    rows[1]["opb"] = rows[1]["opa"]
    rows[2] |= {key: asked[key] for key in ("question", "opa", "opb", "opc", "opd")}
    more = ["data.decontaminate=true", "data.drop=[repeated_options]"]
    file = write_jsonl(tmp_path / "train.jsonl", rows)
    cleaned = score(*options, f"data.train_file={file}", *more).metrics["data"]
    assert cleaned["dropped"] == {"repeated_options": 1, "near_duplicate": 1}
    assert (cleaned["num_dropped"], cleaned["num_train"]) == (2, len(rows) - 2)
    rows[3]["opc"] += "!"
    write_jsonl(tmp_path / "train.jsonl", rows)
    changed = score(*options, f"data.train_file={file}", *more).metrics["data"]
    assert changed["sha256"] != cleaned["sha256"]
    assert changed["num_train"] == cleaned["num_train"]


def test_a_group_whose_questions_have_no_label_is_not_listed(score, options, tmp_path):
    rows = [raw_row(i) for i in range(500, 510)]
    rows += [raw_row(i, cop=-1, subject_name="Skin") for i in range(510, 514)]
    file = write_jsonl(tmp_path / "mixed.jsonl", rows)
    section = score(*options, f"data.test_file={file}", "data.label_base=0").metrics["test"]
    assert (section["n"], section["num_unlabelled"]) == (10, 4)
    assert list(section["by"]["subject_name"]) == ["Anatomy"]
    assert section["macro_accuracy"] == pytest.approx(section["accuracy"])


@pytest.fixture
def speechless_folder(tiny_gemma_folder: str, tmp_path: Path) -> str:
    """A Gemma whose final norm is zero, so that every letter of every question ties."""
    folder = tmp_path / "speechless"
    folder.mkdir()
    for path in Path(tiny_gemma_folder).iterdir():
        (folder / path.name).write_bytes(path.read_bytes())
    weights = load_file(folder / "model.safetensors")
    weights["model.norm.weight"] = torch.full_like(weights["model.norm.weight"], -1.0)
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    return str(folder)


def test_equal_predictions_are_scored_as_the_constant_letter_they_are(
    score, options, speechless_folder, caplog, capsys
):
    run = score(
        *options,
        f"model.path={speechless_folder}",
        "evaluate.permutations=4",
        "evaluate.contextual_calibration=true",
        "evaluate.calibrate=val",
        "evaluate.figures=true",
    )
    section = run.metrics["test"]
    assert section["letter_share"] == [1, 0, 0, 0]
    assert section["accuracy"] == section["letter_accuracy"][0]
    assert section["loss"] == pytest.approx(np.log(4), abs=1e-6)
    assert "every one of the 24 predictions is A" in caplog.text
    assert run.metrics["permutations"]["consistency"] == 0
    assert run.metrics["calibration"]["temperature"] == 1
    assert (run.run_dir / "figures" / "reliability.png").is_file()
    print_result(run.run_dir, "test")
    assert "A 100 %" in capsys.readouterr().out


def test_figures_come_as_png_and_svg_and_tables_show_baseline_and_interval(
    run_command, trained, tmp_path
):
    folder = tmp_path / "evaluation"
    ended = run_command("evaluate", f"run={trained}", "trainer=cpu", f"hydra.run.dir={folder}")
    assert ended.code == 0, ended.err
    names = {path.name for path in (folder / "figures").iterdir()}
    stems = ("confusion", "coverage", "reliability", "subjects")
    assert names == {f"{stem}.{ending}" for stem in stems for ending in ("png", "svg")}
    for text in ("majority", "95 % interval", "base, NF4", "NF4 + LoRA r=16", "exact McNemar"):
        assert text in ended.out, text


# --- bad requests ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["evaluate.mode=talk"], "evaluate.mode=talk"),
        (["evaluate.backend=magic"], "evaluate.backend=magic"),
        (["evaluate.calibrate=test"], "evaluate.calibrate=test"),
        (["evaluate.calibrate=val", "split=val"], "split it would be measured on"),
        (["evaluate.permutations=3"], "Choose 1 or 4"),
        (["evaluate.permutations=0"], "evaluate.permutations=0"),
        (["evaluate.max_new_tokens=0"], "evaluate.max_new_tokens=0"),
        (["split=dev"], "split=dev"),
        (["peft=lora_r4"], "trains nothing"),
        (["data.val_file=null", "evaluate.calibrate=val"], "no val questions"),
    ],
)
def test_what_cannot_work_or_has_no_effect_is_refused(score, options, overrides, message):
    with pytest.raises(ConfigError, match=message) as caught:
        score(*options, *overrides)
    assert "\n" not in str(caught.value)


def test_a_run_without_its_adapter_is_refused(trained, run_command, tmp_path):
    copy = tmp_path / "run"
    copy.mkdir()
    for name in ("config.yaml", "metrics.json"):
        (copy / name).write_bytes((trained / name).read_bytes())
    ended = run_command("evaluate", f"run={copy}", "trainer=cpu", f"hydra.run.dir={tmp_path / 'e'}")
    assert ended.code == 2
    assert len(ended.errors) == 1
    assert "has no adapter" in ended.errors[0]
    assert not (tmp_path / "e").exists()


def test_run_and_adapter_together_are_refused(trained, score):
    with pytest.raises(ConfigError, match="Give one of them"):
        score(f"run={trained}", f"adapter={trained / 'adapter'}", "trainer=cpu")


def test_a_base_folder_that_is_no_run_is_refused_before_anything_is_loaded(score, options):
    with pytest.raises(CheckpointError, match="nowhere"):
        score(*options, "evaluate.base=nowhere")


# --- validation during training -------------------------------------------------------------------


def test_each_validation_is_logged_in_full_to_csv(trained):
    table = pd.read_csv(trained / "metrics.csv").dropna(subset=["val/accuracy"])
    assert len(table) >= 3
    assert (table["val/n"] == read_run(trained).metrics["val"]["n"]).all()
    for column in ("val/macro_accuracy", "val/ece", "val/brier", "val/subject_name/Anatomy"):
        assert table[column].between(0, 2).all(), column
    shares = table[[f"val/letter_share/{letter}" for letter in "ABCD"]]
    np.testing.assert_allclose(shares.sum(axis=1), 1, atol=1e-6)
    # One subject: its accuracy is that of the split.
    np.testing.assert_allclose(table["val/subject_name/Anatomy"], table["val/accuracy"], atol=1e-6)


def test_a_run_with_the_csv_logger_needs_no_wandb(tiny_options, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "wandb", None)  # importing it raises
    cfg = compose(
        "train", [*tiny_options, "quant=nf4_fp32", "optimizer=adamw", "trainer.max_steps=1"]
    )
    run_dir = train(cfg, tmp_path / "run")
    assert read_run(run_dir).status == "completed"


class WandbLogger:
    """Stands for Lightning's: the report knows it by its name alone."""

    def __init__(self) -> None:
        self.tables: dict[str, Any] = {}
        self.images: dict[str, Any] = {}

    def log_table(self, key: str, columns: list[str], data: list[list[Any]], step: int) -> None:
        self.tables[key] = (columns, data)

    def log_image(self, key: str, images: list[Any], step: int) -> None:
        self.images[key] = images[0]


def test_wandb_gets_tables_with_intervals_and_figures(trained):
    section = read_run(trained).metrics["val"]
    predictions = read_predictions(trained, "val")
    logger = WandbLogger()
    report = ValidationReport((), figures=split_figures)
    report._log_media(logger, section, predictions, step=3)
    assert {"val/by_subject_name", "val/by_difficulty", "val/by_negated"} <= logger.tables.keys()
    columns, rows = logger.tables["val/by_subject_name"]
    assert columns == ["group", "n", "accuracy", "ci_low", "ci_high"]
    assert rows[0][:2] == ["Anatomy", 16]
    stems = ("confusion", "coverage", "reliability", "subjects")
    assert logger.images.keys() == {f"val/figure_{stem}" for stem in stems}
    assert all(image.ndim == 3 and image.std() > 0 for image in logger.images.values())


def test_a_lost_connection_to_wandb_does_not_lose_the_run(trained, caplog):
    class Lost(WandbLogger):
        def log_table(self, *args: Any, **kwargs: Any) -> None:
            raise ConnectionError("gone")

    section = read_run(trained).metrics["val"]
    ValidationReport(())._log_media(Lost(), section, [], step=0)
    assert "gone" in caplog.text
