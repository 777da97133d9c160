"""Agreement with the field: the task `medmcqa` of the real lm-evaluation-harness.

Same weights, same questions, float32 on both sides: the harness pads a batch and runs the whole
output head over every token, medqlora packs rows and multiplies four rows of it.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from tokenizers.processors import TemplateProcessing
from transformers import GemmaConfig, GemmaForCausalLM

from medqlora import instantiation, pipeline
from medqlora.config import compose
from medqlora.evaluate import evaluate
from medqlora.evaluation import read_predictions, read_run
from medqlora.export import export
from medqlora.schema import Question
from medqlora.train import train
from tests.data.data_tools import make_tokenizer, write_jsonl

COLUMNS = ("opa", "opb", "opc", "opd")
WORDS = tuple(
    re.split(
        r"\s+",
        """nerve muscle liver vagus facial optic artery of the in supplies except not tongue heart
        enzyme which following all are true about kinase drug 5 (a) 40% IV hypeension B12 µg""",
    )
)


class Size(NamedTuple):
    """A random Gemma and how many questions it is asked."""

    hidden_size: int
    num_layers: int
    vocab_size: int
    num_questions: int


SIZES = {"tiny": Size(64, 2, 1024, 200), "mid": Size(256, 4, 4096, 200)}


@pytest.fixture(scope="module")
def gemma(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], str]:
    """`gemma(size)`: folder of a random Gemma; its tokenizer puts BOS in front, as Gemma's."""
    made: dict[str, str] = {}

    def make(name: str) -> str:
        if name not in made:
            size = SIZES[name]
            tokenizer = make_tokenizer()
            tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
                single="<bos> $A", special_tokens=[("<bos>", tokenizer.bos_token_id)]
            )
            torch.manual_seed(1)
            model = GemmaForCausalLM(
                GemmaConfig(
                    vocab_size=size.vocab_size,
                    hidden_size=size.hidden_size,
                    intermediate_size=2 * size.hidden_size,
                    num_hidden_layers=size.num_layers,
                    num_attention_heads=4,
                    num_key_value_heads=1,
                    head_dim=size.hidden_size // 4,
                    max_position_embeddings=4096,
                    initializer_range=0.15,  # wide enough that the letters differ by question
                    pad_token_id=tokenizer.pad_token_id,
                    eos_token_id=tokenizer.eos_token_id,
                    bos_token_id=tokenizer.bos_token_id,
                )
            )
            folder = tmp_path_factory.mktemp("models") / name
            model.save_pretrained(folder)
            tokenizer.save_pretrained(folder)
            made[name] = str(folder)
        return made[name]

    return make


def made_up_rows(num: int, seed: int) -> list[dict[str, Any]]:
    """Questions of very different lengths in the columns of the hub copy, `cop` counted from 0."""
    rng = np.random.default_rng(seed)

    def text(low: int, high: int) -> str:
        return " ".join(rng.choice(WORDS, size=rng.integers(low, high)))

    rows = []
    for i in range(num):
        options: list[str] = []
        while len(options) < 4:
            option = text(1, 4)
            if option not in options:
                options.append(option)
        rows.append(
            {
                "id": f"{seed}-{i}",
                "question": text(3, 25) + f" {i}?",
                **dict(zip(COLUMNS, options, strict=True)),
                "cop": int(rng.integers(4)) if i > 4 else i % 4,
                "choice_type": "single",
                "subject_name": "Anatomy",
                "topic_name": None,
                "exp": "",
            }
        )
    return rows


def harness(folder: str, rows: list[dict[str, Any]], shots: list[dict[str, Any]]) -> dict[str, Any]:
    """What lm-evaluation-harness says: accuracy, and the prediction of each question."""
    import lm_eval
    from datasets import Dataset
    from lm_eval.models.huggingface import HFLM
    from lm_eval.tasks import TaskManager
    from lm_eval.tasks._yaml_loader import load_yaml

    config = load_yaml(Path(lm_eval.__file__).parent / "tasks" / "medmcqa" / "medmcqa.yaml")
    config |= {
        "custom_dataset": lambda **_: {
            "train": Dataset.from_list(rows[:1]),
            "validation": Dataset.from_list(rows),
        },
        "fewshot_config": {"sampler": "first_n", "samples": shots or rows[:1]},
    }
    model = HFLM(pretrained=folder, dtype="float32", device="cpu", batch_size=16)
    results = lm_eval.simple_evaluate(
        model=model,
        tasks=[config],
        num_fewshot=len(shots),
        bootstrap_iters=0,
        # The thousands of other tasks take half a minute to list.
        task_manager=TaskManager(include_defaults=False),
    )
    assert results is not None
    samples = results["samples"]["medmcqa"]
    return {
        "accuracy": results["results"]["medmcqa"]["acc,none"],
        "predictions": {
            s["doc"]["id"]: int(np.argmax([r[0] for r in s["filtered_resps"]])) for s in samples
        },
        "scores": {s["doc"]["id"]: [r[0] for r in s["filtered_resps"]] for s in samples},
        "prompt": samples[0]["arguments"][0][0],
    }


@pytest.mark.parametrize(
    ("size", "num_shots"), [("tiny", 0), ("mid", 0), ("tiny", 3)], ids=["tiny", "mid", "few-shot"]
)
def test_predictions_equal_those_of_lm_evaluation_harness(gemma, tmp_path, size, num_shots):
    """At least 99.9 % of the predictions and the accuracy to four decimals."""
    folder = gemma(size)
    rows = made_up_rows(SIZES[size].num_questions, seed=7)
    train = made_up_rows(20, seed=8)
    options = [
        "data=files",
        f"data.train_file={write_jsonl(tmp_path / 'train.jsonl', train)}",
        f"data.test_file={write_jsonl(tmp_path / 'test.jsonl', rows)}",
        "data.label_base=0",
        "data.token_budget=2048",
        f"model.path={folder}",
        "model.revision=null",
        "quant=none_fp32",
        "trainer=cpu",
        "evaluate.figures=false",
    ]
    if num_shots:
        options += ["prompt=few_shot", f"prompt.num_shots={num_shots}"]
    cfg = compose("evaluate", options)
    datamodule = pipeline.build_datamodule(cfg)
    datamodule.setup()
    by_id = {row["id"]: row for row in train}
    shots = [by_id[question.id] for question in datamodule.prompt.shots[:num_shots]]

    theirs = harness(folder, rows, shots)
    run_dir = evaluate(cfg, tmp_path / "evaluation")
    predictions = read_predictions(run_dir, "test")
    ours = {p.id: p.prediction for p in predictions}

    first = datamodule.questions["test"][0]
    assert theirs["prompt"] == "".join(map(str, datamodule.prompt.render(first)))
    assert ours.keys() == theirs["predictions"].keys()
    same = np.mean([ours[key] == theirs["predictions"][key] for key in ours])
    assert same >= 0.999
    assert round(read_run(run_dir).metrics["test"]["accuracy"], 4) == round(theirs["accuracy"], 4)
    for prediction in predictions:
        logits = np.array(theirs["scores"][prediction.id])
        np.testing.assert_allclose(
            prediction.scores, logits - np.logaddexp.reduce(logits), rtol=0, atol=1e-3
        )
    # Agreement on one constant letter would say little.
    shares = np.bincount(list(ours.values()), minlength=4) / len(ours)
    assert (shares > 0.02).sum() >= 3, shares


def test_a_merged_export_has_the_same_accuracy_in_lm_evaluation_harness(gemma, tmp_path):
    """The folder as it leaves the run, read by the harness alone, and again by `evaluate`."""
    rows = made_up_rows(100, seed=9)
    options = [
        "data=files",
        f"data.train_file={write_jsonl(tmp_path / 'train.jsonl', made_up_rows(64, seed=10))}",
        f"data.test_file={write_jsonl(tmp_path / 'test.jsonl', rows)}",
        "data.label_base=0",
        "data.token_budget=2048",
        "trainer=cpu",
    ]
    training = ["logger=csv", "callbacks.progress=null", "baselines=[]", "trainer.max_steps=6"]
    training += ["quant=nf4_fp32", "optimizer=adamw", "optimizer.lr=0.01"]
    model = [f"model.path={gemma('tiny')}", "model.revision=null"]
    run_dir = train(compose("train", [*options, *training, *model]), tmp_path / "run")
    folder = export(compose("export", [f"run={run_dir}", "device=cpu"]))

    theirs = harness(str(folder), rows, [])
    scoring = [f"model.path={folder}", "model.revision=null", "quant=none_fp32"]
    scored = evaluate(
        compose("evaluate", [*options, *scoring, "evaluate.figures=false"]), tmp_path / "scored"
    )
    section = read_run(scored).metrics["test"]
    ours = {p.id: p.prediction for p in read_predictions(scored, "test")}
    assert ours == theirs["predictions"]
    assert round(section["accuracy"], 4) == round(theirs["accuracy"], 4)
    stated = json.loads((folder / "export.json").read_text())
    near = stated["num_changed_answers"] / stated["n"] + 0.02  # the export scores in bfloat16
    assert abs(stated["merged"]["accuracy"] - theirs["accuracy"]) <= near
    # The adapter must matter, or the bare base would pass.
    bare = harness(gemma("tiny"), rows, [])["predictions"]
    assert np.mean([bare[key] != ours[key] for key in ours]) > 0.1


def test_the_prompt_of_every_question_is_that_of_the_task():
    """Word for word, from the harness's own `doc_to_text`."""
    import lm_eval
    from lm_eval.tasks._yaml_loader import load_yaml

    config = load_yaml(Path(lm_eval.__file__).parent / "tasks" / "medmcqa" / "medmcqa.yaml")
    prompt = instantiation.make(compose("evaluate", ["prompt=harness"]).prompt)

    for row in made_up_rows(50, seed=3):
        question = Question(row["id"], row["question"], tuple(row[c] for c in COLUMNS), row["cop"])
        assert prompt.render(question) == (config["doc_to_text"](row),)
    assert config["doc_to_choice"] == list("ABCD")
    assert prompt.answer_prefix == " "  # the harness's default target_delimiter
