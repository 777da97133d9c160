"""The main job from end to end, in this process: data, base, adapter, fit, test, run folder."""

from __future__ import annotations

import csv
import gzip
import json
import math
import re
import shutil
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
import torch
from omegaconf import OmegaConf
from peft import PeftModel
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from medqlora import pipeline
from medqlora.config import compose
from medqlora.data import read_questions
from medqlora.evaluation import empty_metrics, questions_sha256, read_predictions, read_run
from medqlora.quantization import dequantized_weight
from medqlora.schema import Prediction, Question
from medqlora.train import _score_baseline, train
from tests.data.data_tools import SHARED

SCORES = ["score_a", "score_b", "score_c", "score_d"]
FLOAT32 = "quant.compute_dtype=float32"


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("runs")


@pytest.fixture(scope="module")
def run_dir(runs, tiny_options) -> Path:
    """A whole run: NF4, LoRA, two epochs of eight rows, the base scored first."""
    options = ["quant=nf4", "peft=lora_r16", FLOAT32, "optimizer.lr=1e-2", "trainer.max_epochs=2"]
    options += ["data.token_budget=448", "baselines=[base_16bit,base_quantized]"]
    cfg = compose("train", [*tiny_options, *options])
    return train(cfg, runs / "whole")


def metrics_of(run_dir: Path) -> dict[str, Any]:
    return json.loads((run_dir / "metrics.json").read_text())


def keys_of(tree: dict[str, Any], prefix: str = "") -> set[str]:
    """Dotted names of all keys."""
    found = set()
    for key, value in tree.items():
        found.add(prefix + key)
        if isinstance(value, dict):
            found |= keys_of(value, f"{prefix}{key}.")
    return found


def scores_of(predictions: list[Prediction]) -> torch.Tensor:
    return torch.tensor([p.scores for p in predictions], dtype=torch.float64)


# --- the run folder -------------------------------------------------------------------------------


def test_the_run_folder_is_complete(run_dir):
    for name in (
        "config.yaml",
        "metrics.json",
        "metrics.csv",
        "predictions.parquet",
        "adapter/adapter_config.json",
        "adapter/adapter_model.safetensors",
        "checkpoints/last.ckpt",
        "checkpoints/best.ckpt",
        "baselines/base_16bit/metrics.json",
        "baselines/base_quantized/predictions.parquet",
    ):
        assert (run_dir / name).stat().st_size > 0, name


def test_metrics_have_every_key_of_the_contract_and_none_is_unknown(run_dir):
    metrics = metrics_of(run_dir)
    assert keys_of(empty_metrics()) <= keys_of(metrics)
    assert metrics["status"] == "completed"
    unknown = {"error", "model.revision"}  # a folder has no revision
    for section in ("", "versions", "hardware", "data", "model", "train", "val", "test"):
        values = metrics[section] if section else metrics
        for key, value in values.items():
            name = f"{section}.{key}".lstrip(".")
            assert (value is None) == (name in unknown), name


def test_metrics_count_what_was_given(run_dir):
    metrics = metrics_of(run_dir)
    data, training, model = metrics["data"], metrics["train"], metrics["model"]
    assert [data[f"num_{split}"] for split in ("train", "val", "test")] == [64, 16, 24]
    assert training["num_questions"] == 2 * 64
    assert 0 < training["fill_fraction"] <= 1
    assert training["questions_per_second"] > 0
    assert metrics["val"]["n"] == 16
    assert metrics["test"]["n"] == 24
    # r (d_in + d_out) for each of the seven linear layers of two blocks.
    shapes = [(128, 128), (128, 32), (128, 32), (128, 128), (128, 256), (128, 256), (256, 128)]
    assert model["num_trainable"] == 2 * sum(16 * (d_in + d_out) for d_in, d_out in shapes)
    assert model["weight_gb"] < model["weight_gb_16bit"]


def test_scores_follow_from_the_predictions(run_dir):
    """Nothing is typed: accuracy, loss and majority are those of predictions.parquet."""
    table = pd.read_parquet(run_dir / "predictions.parquet")
    assert list(table.columns) == [
        *("id", "split", "subject_name", "choice_type", "answer", "prediction"),
        *SCORES,
        "correct",
    ]
    for split, rows in table.groupby("split"):
        section = metrics_of(run_dir)[str(split)]
        scores = torch.tensor(rows[SCORES].to_numpy())
        answer = torch.tensor(rows["answer"].to_numpy(), dtype=torch.long)
        torch.testing.assert_close(scores.exp().sum(1), torch.ones(len(rows)).double())
        assert (scores.argmax(1).numpy() == rows["prediction"]).all()
        assert section["accuracy"] == pytest.approx(rows["correct"].mean())
        assert section["loss"] == pytest.approx(-scores.gather(1, answer[:, None]).mean().item())
        counts = rows["answer"].value_counts()
        assert section["majority_accuracy"] == pytest.approx(counts.max() / len(rows))
        assert section["ci_low"] < section["accuracy"] < section["ci_high"]
    assert set(table["split"]) == {"val", "test"}


def test_training_lowers_the_loss(run_dir):
    """Below ln 4, which is knowing nothing, on what it saw; below the base on what it did not."""
    metrics = metrics_of(run_dir)
    base = read_run(run_dir / "baselines" / "base_quantized").metrics
    assert metrics["train"]["loss"] < math.log(4)
    assert metrics["val"]["loss"] < base["val"]["loss"]


def test_metrics_csv_holds_the_course_of_the_run(run_dir):
    with (run_dir / "metrics.csv").open() as file:
        rows = list(csv.DictReader(file))
    for key, number in (("train/loss", 1), ("val/loss", 2), ("val/accuracy", 2)):
        values = [float(row[key]) for row in rows if row[key]]
        assert len(values) == number, key
    assert max(values) == metrics_of(run_dir)["val"]["accuracy"]


def test_baselines_are_runs_of_their_own_and_tell_the_storage_apart(run_dir):
    plain = read_run(run_dir / "baselines" / "base_16bit").metrics
    quantised = read_run(run_dir / "baselines" / "base_quantized").metrics
    assert plain["status"] == quantised["status"] == "completed"
    assert plain["test"]["n"] == quantised["test"]["n"] == 24
    assert plain["model"]["num_trainable"] == quantised["model"]["num_trainable"] == 0
    assert quantised["model"]["weight_gb"] < plain["model"]["weight_gb"]
    assert plain["test"]["loss"] != quantised["test"]["loss"]


def test_the_adapter_received_gradient_everywhere(run_dir):
    """LoRA starts at B = 0 (Hu et al. 2021, section 4.1), so what is not zero has learned."""
    state = load_file(run_dir / "adapter" / "adapter_model.safetensors")
    learned = [name for name in state if "lora_B" in name]
    assert len(learned) == 2 * 7
    for name in learned:
        assert state[name].abs().max() > 0, name


def test_checkpoints_hold_no_base_weights(run_dir):
    checkpoint = torch.load(run_dir / "checkpoints" / "last.ckpt", weights_only=True)
    assert checkpoint["state_dict"]
    assert all("lora_" in name for name in checkpoint["state_dict"])


# --- the same scores every way ------------------------------------------------------------


def test_reloading_a_run_gives_identical_scores(run_dir, question_files):
    loaded = pipeline.load_run(run_dir, device="cpu")
    again = loaded.predict(read_questions(question_files["test"]))
    kept = read_predictions(run_dir, "test")
    assert [p.id for p in again] == [p.id for p in kept]
    assert [p.scores for p in again] == [p.scores for p in kept]


def test_evaluating_a_run_gives_identical_scores(run_dir, run_command, tmp_path):
    folder = tmp_path / "evaluated"
    ended = run_command("evaluate", f"run={run_dir}", "trainer=cpu", f"hydra.run.dir={folder}")
    assert ended.code == 0, ended.err
    again, kept = read_predictions(folder, "test"), read_predictions(run_dir, "test")
    assert [p.scores for p in again] == [p.scores for p in kept]
    assert metrics_of(folder)["test"] == metrics_of(run_dir)["test"]


def test_config_yaml_repeats_the_run(run_dir, run_command, tmp_path):
    """The command of CONTRACT: same hash, same adapter, same scores, bit for bit."""
    ended = run_command(
        "train",
        *("--config-path", str(run_dir), "--config-name", "config"),
        f"hydra.run.dir={tmp_path}/again",
    )
    assert ended.code == 0, ended.err
    again = metrics_of(tmp_path / "again")
    assert again["config_hash"] == metrics_of(run_dir)["config_hash"]
    assert again["data"]["sha256"] == metrics_of(run_dir)["data"]["sha256"]
    for split in ("val", "test"):
        new, old = read_predictions(tmp_path / "again", split), read_predictions(run_dir, split)
        assert [p.scores for p in new] == [p.scores for p in old]
    weights = "adapter/adapter_model.safetensors"
    new, old = load_file(tmp_path / "again" / weights), load_file(run_dir / weights)
    assert new.keys() == old.keys()
    assert all(torch.equal(new[name], old[name]) for name in old)


def prompt_of(question: Question) -> str:
    """lm-evaluation-harness's text, written out once more."""
    options = "".join(
        f"{letter}. {text}\n" for letter, text in zip("ABCD", question.options, strict=True)
    )
    return f"Question: {question.stem}\nChoices:\n{options}Answer:"


def stock_scores(model: Any, tokenizer: Any, questions: list[Question]) -> torch.Tensor:
    """Each question alone through the whole model and its head, as anyone would do it."""
    letters = [tokenizer.encode(f" {x}", add_special_tokens=False)[-1] for x in "ABCD"]
    rows = []
    with torch.inference_mode():
        for question in questions:
            text = prompt_of(question)
            ids = [tokenizer.bos_token_id, *tokenizer.encode(text, add_special_tokens=False)]
            logits = model(torch.tensor([ids])).logits[0, -1, letters]
            rows.append(logits.double().log_softmax(0))
    return torch.stack(rows)


def rounded_base(run_dir: Path, folder: str) -> Any:
    """Stock transformers' Gemma with the weights that NF4 rounds to, in float32."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    ours = pipeline.build_base(pipeline.read_config(run_dir))
    with torch.no_grad():
        for name, module in ours.named_modules():
            if hasattr(getattr(module, "weight", None), "quant_state"):
                model.get_submodule(name).weight.copy_(dequantized_weight(module))
    return model.eval()


def test_packed_scores_equal_one_question_at_a_time_through_stock_libraries(
    run_dir, tiny_gemma_folder, question_files
):
    """And the adapter loads in stock peft. In float32, apart by rounding only: 1e-4 nats."""
    tokenizer = AutoTokenizer.from_pretrained(tiny_gemma_folder)
    base = rounded_base(run_dir, tiny_gemma_folder)
    questions = read_questions(question_files["test"])
    folder = run_dir / "baselines" / "base_quantized"
    alone = stock_scores(base, tokenizer, questions)
    packed = scores_of(read_predictions(folder, "test"))
    torch.testing.assert_close(packed, alone, rtol=0, atol=1e-4)
    adapted = PeftModel.from_pretrained(base, str(run_dir / "adapter")).eval()
    alone_adapted = stock_scores(adapted, tokenizer, questions)
    packed_adapted = scores_of(read_predictions(run_dir, "test"))
    torch.testing.assert_close(packed_adapted, alone_adapted, rtol=0, atol=1e-4)
    # The adapter changes the scores a thousand times as much as the tolerance.
    assert (packed_adapted - packed).abs().max() > 0.1


# --- parts ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "options",
    [
        ["quant=nf4", "loss=explanation", "scheduler=linear"],
        ["acceleration.gradient_checkpointing=true", "trainer.accumulate_grad_batches=2"],
    ],
    ids=lambda options: ",".join(options),
)
def test_parts_work_together(options, runs, tiny_options):
    """What `test_every_option` has no row for, in a run of a few updates."""
    name = "-".join(options).replace("=", "_")
    cfg = compose("train", [*tiny_options, "data.val_file=null", "trainer.max_steps=3", *options])
    folder = train(cfg, runs / name)
    metrics = metrics_of(folder)
    assert metrics["status"] == "completed"
    assert metrics["train"]["num_steps"] == 3
    assert math.isfinite(metrics["train"]["loss"])
    assert metrics["val"]["n"] is None
    assert metrics["test"]["n"] == 24
    state = load_file(folder / "adapter" / "adapter_model.safetensors")
    assert all(tensor.abs().max() > 0 for name, tensor in state.items() if "lora_B" in name)


def test_a_run_whose_val_loss_does_not_fall_is_stopped_early(runs, tiny_options):
    """At a learning rate of nothing the second validation is as good as the first."""
    options = ["callbacks=early_stopping", "callbacks.early_stopping.patience=1"]
    options += ["optimizer.lr=1e-12", "trainer.max_epochs=5", "data.test_file=null"]
    cfg = compose("train", [*tiny_options, "callbacks.progress=null", *options])
    metrics = metrics_of(train(cfg, runs / "early"))
    assert metrics["status"] == "completed"
    assert metrics["train"]["num_questions"] == 2 * 64


def test_weights_beyond_all_bounds_fail_the_run_and_name_the_rate(
    run_command, tiny_options, tmp_path
):
    """Every loss was finite; what the validation scores is not."""
    words = ["optimizer.lr=1e30", "trainer.max_steps=1", "trainer.max_epochs=1"]
    keys = {word.split("=")[0] for word in words}
    options = [word for word in tiny_options if word.split("=")[0] not in keys]
    ended = run_command("train", *options, *words, f"hydra.run.dir={tmp_path}/run")
    assert ended.code == 1
    [line] = ended.errors
    assert "after 1 updates" in line
    assert "optimizer.lr" in line
    assert read_run(tmp_path / "run").status == "failed"


def test_choice_and_token_loss_are_different_losses(runs, tiny_options):
    """Over four letters the random model knows nothing: ln 4; over the vocabulary, ln 440."""
    losses = {}
    for loss in ("choice", "token"):
        options = [f"loss={loss}", "optimizer.lr=1e-9", "trainer.max_steps=1"]
        parts = ["data.val_file=null", "data.test_file=null"]
        folder = train(compose("train", [*tiny_options, *options, *parts]), runs / f"loss-{loss}")
        losses[loss] = metrics_of(folder)["train"]["loss"]
    assert losses["choice"] == pytest.approx(math.log(4), abs=0.3)
    assert losses["token"] == pytest.approx(math.log(440), abs=1.0)


# --- real questions -------------------------------------------------------------------------------


@pytest.fixture
def real_questions() -> str:
    file = SHARED / "medmcqa_validation_half.jsonl.gz"
    if not file.is_file():
        pytest.skip("../shared is not here")
    return str(file)


def test_real_questions_train_and_score(real_questions, runs, tiny_options):
    """Rows of the official validation set as they were published, labels from 1."""
    options = [option for option in tiny_options if not option.startswith("data")]
    data = [
        "data=files",
        f"data.train_file={real_questions}",
        "data.splits=pool",
        "data.num_val=100",
        "data.num_test=400",
        "data.limit_train=30",
        "data.limit_val=20",
        "data.limit_test=40",
    ]
    cfg = compose("train", [*options, *data, "quant=nf4"])
    folder = train(cfg, runs / "real")
    metrics = metrics_of(folder)
    assert metrics["status"] == "completed"
    assert [metrics["data"][f"num_{split}"] for split in ("train", "val", "test")] == [30, 20, 40]
    assert metrics["train"]["num_questions"] == 30
    assert set(metrics["test"]["by"]["choice_type"]) == {"single", "multi"}
    assert len(metrics["test"]["by"]["subject_name"]) > 5
    # A random model knows nothing, and 1-based labels that were read as 0-based would show.
    table = pd.read_parquet(folder / "predictions.parquet")
    lines = gzip.decompress(Path(real_questions).read_bytes()).decode().splitlines()
    rows = [json.loads(line) for line in lines]
    labels = {row["id"]: row["cop"] - 1 for row in rows}
    assert all(labels[row.id] == row.answer for row in table.itertuples())


def test_in_a_terminal_news_stands_above_the_bar(run_command, tiny_options, tmp_path, monkeypatch):
    """On lines of its own: the bar is drawn anew below them."""
    monkeypatch.setenv("FORCE_COLOR", "1")  # what rich takes for a terminal
    options = [word for word in tiny_options if word != "callbacks.progress=null"]
    options += ["trainer.max_steps=2", "data.limit_val=0", f"hydra.run.dir={tmp_path}/run"]
    ended = run_command("train", *options)
    assert ended.code == 0
    lines = [re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", line) for line in ended.out.splitlines()]
    [news] = [line for line in lines if "first step after" in line]
    assert news.strip("\r").startswith("first step after")
    assert "first step after" not in ended.err


def test_a_run_that_is_not_on_the_fast_path_says_why(tiny_options, tmp_path, caplog):
    short = ["trainer.max_steps=1", "data.limit_val=4", "data.limit_test=4", "baselines=[]"]
    said = "plain layers (q_proj is stored neither in 4 bits nor in 16 or 32, or has a bias)"
    for quant, slower in (("int8", True), ("none", False)):
        caplog.clear()
        with caplog.at_level("INFO", logger="medqlora"):
            train(compose("train", [*tiny_options, *short, f"quant={quant}"]), tmp_path / quant)
        assert (f"{said}, compile=none: slower than the fast path" in caplog.text) == slower


@pytest.mark.parametrize("left", ["interrupted", "one split", "no metrics"])
def test_a_base_whose_scoring_was_cut_short_is_scored_again(run_dir, tmp_path, left):
    """Its predictions of the first split are there by then."""
    folder = Path(shutil.copytree(run_dir, tmp_path / "run"))
    base = folder / "baselines" / "base_quantized"
    whole = metrics_of(base)
    changed = json.loads(json.dumps(whole))
    if left == "interrupted":
        changed["status"] = "interrupted"
    changed["test"]["n"] = None
    (base / "metrics.json").write_text(json.dumps(changed))
    if left == "no metrics":
        (base / "metrics.json").unlink()
    cfg = OmegaConf.create(pipeline.read_config(folder))
    datamodule = pipeline.build_datamodule(cfg)
    datamodule.setup()
    _score_baseline(cfg, folder, datamodule, "base_quantized", ["val", "test"])
    again = metrics_of(base)
    assert again["status"] == "completed"
    assert again["test"] == whole["test"]
    assert again["started"] != whole["started"]
    _score_baseline(cfg, folder, datamodule, "base_quantized", ["val", "test"])
    assert metrics_of(base) == again


def test_a_base_that_answered_other_questions_is_scored_again(run_dir, tmp_path):
    """Such as those of before their labels were corrected in place."""
    folder = Path(shutil.copytree(run_dir, tmp_path / "run"))
    cfg = OmegaConf.create(pipeline.read_config(folder))
    corrected = tmp_path / "test.jsonl"
    rows = [json.loads(line) for line in Path(cfg.data.test_file).read_text().splitlines()]
    corrected.write_text(
        "".join(json.dumps(row | {"cop": (row["cop"] + 1) % 4}) + "\n" for row in rows)
    )
    cfg.data.test_file = str(corrected)
    datamodule = pipeline.build_datamodule(cfg)
    datamodule.setup()
    _score_baseline(cfg, folder, datamodule, "base_quantized", ["val", "test"])
    again = metrics_of(folder / "baselines" / "base_quantized")
    assert again["test"]["sha256"] == questions_sha256(datamodule.questions["test"])


@pytest.mark.parametrize("named", [False, True])
def test_a_folder_that_is_named_is_where_a_run_goes_on(named, tiny_options, monkeypatch, tmp_path):
    """Without, `resume=auto` looks for the newest unfinished run."""
    begun: list[Path] = []
    monkeypatch.setattr("medqlora.train.names_its_folder", lambda: named)
    monkeypatch.setattr("medqlora.train.find_unfinished", lambda root, config: tmp_path / "earlier")
    monkeypatch.setattr("medqlora.train.move_log", lambda old, new: None)
    monkeypatch.setattr(
        "medqlora.train._train_in", lambda cfg, run_dir, **how: begun.append(run_dir)
    )
    train(compose("train", [*tiny_options, "resume=auto"]), tmp_path / "day" / "time")
    assert begun == [tmp_path / "day" / "time" if named else tmp_path / "earlier"]
