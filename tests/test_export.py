"""What leaves a run folder: loads elsewhere, answers as the run does, and is whole or not there."""

from __future__ import annotations

import json
import multiprocessing
import os
import shutil
import signal
import subprocess
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import yaml
from omegaconf import DictConfig
from peft import PeftModel
from safetensors import safe_open
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

from medqlora import export as export_verb
from medqlora import instantiation, pipeline
from medqlora.config import compose
from medqlora.data.medmcqa import read_questions
from medqlora.evaluation import read_run
from medqlora.export import Change, export
from medqlora.finetuning.adapters import FULL_WEIGHTS
from medqlora.quantization import dequantize, load_base
from medqlora.schema import Prediction, Question
from tests.hub import LoopbackHub, Repository


def config(run_dir: Path, *overrides: str):
    return compose("export", [f"run={run_dir}", *overrides])


def stock_scores(model, tokenizer, run: pipeline.LoadedRun, questions: list[Question]):
    """Letter scores by stock transformers, one question at a time, with the whole head."""
    rows = []
    for question in questions:
        (text,) = run.datamodule.prompt.render(question)
        ids = [tokenizer.bos_token_id, *tokenizer.encode(text, add_special_tokens=False)]
        with torch.inference_mode():
            logits = model(torch.tensor([ids])).logits[0, -1]
        rows.append(logits[list(run.datamodule.letter_ids)].float().log_softmax(-1))
    return torch.stack(rows)


@pytest.fixture(scope="module")
def merged(trained_run: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    output = tmp_path_factory.mktemp("export") / "deep" / "merged"
    return export(config(trained_run, f"output={output}", "limit=10"))


def test_the_merged_model_answers_as_the_run_does_in_stock_transformers(
    merged, trained_run, question_files
):
    """Rounded base plus adapter, rounded once more to bfloat16 and to nothing else."""
    run = pipeline.load_run(trained_run, device="cpu")
    questions = read_questions(question_files["test"])
    tokenizer = AutoTokenizer.from_pretrained(merged)
    model = AutoModelForCausalLM.from_pretrained(merged)
    assert model.dtype == torch.bfloat16
    expected = torch.tensor([p.scores for p in run.predict(questions)])
    found = stock_scores(model.float(), tokenizer, run, questions)
    torch.testing.assert_close(found, expected, atol=0.05, rtol=0)
    bare = AutoModelForCausalLM.from_pretrained(run.config["model"]["path"]).float()
    without = stock_scores(bare, tokenizer, run, questions)
    assert (found - expected).abs().mean() < 0.2 * (without - expected).abs().mean()


def test_head_and_embedding_stay_one(merged):
    names: set[str] = set()
    for file in merged.glob("*.safetensors"):
        with safe_open(file, framework="pt") as weights:
            names.update(weights.keys())
            dtypes = {weights.get_slice(name).get_dtype() for name in weights.keys()}  # noqa: SIM118
            assert dtypes == {"BF16"}
    assert "lm_head.weight" not in names
    assert not [name for name in names if "lora" in name or "absmax" in name]
    model = AutoModelForCausalLM.from_pretrained(merged)
    assert model.lm_head.weight is model.model.embed_tokens.weight
    assert (merged / "generation_config.json").is_file()


def test_the_stated_change_is_that_of_the_same_questions(merged):
    change = json.loads((merged / "export.json").read_text())
    assert change["n"] == change["run"]["n"] == change["merged"]["n"] == 10
    assert 0 <= change["mean_score_difference"] <= change["max_score_difference"] < 0.1
    gap = abs(change["run"]["accuracy"] - change["merged"]["accuracy"])
    assert gap * change["n"] <= change["num_changed_answers"]


def test_a_change_is_counted_right():
    """Two questions; the second one's answer goes from right to wrong."""

    def made(scores):
        return Prediction("q", "test", "Anatomy", "single", 0, scores)

    before = [made((-0.1, -3.0)), made((-0.6, -0.8))]
    after = [made((-0.1, -3.0)), made((-0.8, -0.6))]
    found = Change("test", before, after).as_dict()
    assert found["num_changed_answers"] == 1
    assert found["run"]["accuracy"] == 1
    assert found["merged"]["accuracy"] == 0.5
    assert found["max_score_difference"] == pytest.approx(0.2)
    assert found["mean_score_difference"] == pytest.approx(0.1)


def test_the_adapter_answers_as_the_run_does_in_stock_peft(trained_run, tmp_path, question_files):
    output = export(config(trained_run, "format=adapter", f"output={tmp_path / 'adapter'}"))
    for file in (trained_run / "adapter").iterdir():
        copy = output / file.name
        assert file.name == "README.md" or copy.read_bytes() == file.read_bytes()
    run = pipeline.load_run(trained_run, device="cpu")
    questions = read_questions(question_files["test"])[:6]
    path = run.config["model"]["path"]
    # The run's base is rounded to NF4: the same numbers in a plain model.
    rounded = dequantize(load_base(path, instantiation.make(run.config["quant"])), torch.float32)
    plain = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)
    plain.load_state_dict(rounded.state_dict())
    model = PeftModel.from_pretrained(plain, str(output)).eval()
    found = stock_scores(model, AutoTokenizer.from_pretrained(path), run, questions)
    expected = torch.tensor([p.scores for p in run.predict(questions)])
    torch.testing.assert_close(found, expected, atol=1e-3, rtol=0)


def test_the_lines_of_the_card_load_the_adapter_over_a_stock_4bit_base(
    trained_run, tmp_path, question_files
):
    """Word for word but for the two folders: stock transformers, bitsandbytes and peft."""
    output = export(config(trained_run, "format=adapter", f"output={tmp_path / 'adapter'}"))
    run = pipeline.load_run(trained_run, device="cpu")
    path = run.config["model"]["path"]
    code = (output / "README.md").read_text().split("```python\n")[1].split("```")[0]
    assert "bnb_4bit_quant_type='nf4'" in code
    code = code.replace(repr(Path(path).name), repr(path)).replace('"FOLDER"', repr(str(output)))
    # Its kernel for some CPUs rounds block constants to bfloat16.
    unrounded = "for module in base.modules():\n    module.support_avx512bf16_for_cpu = False\n"
    names: dict = {}
    exec(code.replace("model = Peft", f"{unrounded}model = Peft"), names)
    questions = read_questions(question_files["test"])[:6]
    found = stock_scores(names["model"].eval(), names["tokenizer"], run, questions)
    expected = torch.tensor([p.scores for p in run.predict(questions)])
    torch.testing.assert_close(found, expected, atol=1e-3, rtol=0)


@pytest.mark.parametrize(
    ("quant", "words"),
    [
        ({"data_type": "int8"}, ["load_in_8bit=True", "as it was in training"]),
        ({"data_type": "none"}, ["quantization_config=None", "as it was in training"]),
        ({"data_type": "hqq_4bit"}, ["quantization_config=None", "scores differ from those"]),
        ({"data_type": "nf4", "block_size": 128}, ["quantization_config=None", "does not offer"]),
        ({"data_type": "nf4", "embedding": "nf4"}, ["quantization_config=None", "does not offer"]),
    ],
)
def test_the_card_says_when_stock_transformers_cannot_store_the_base_so(quant, words):
    text = export_verb._adapter_usage({"compute_dtype": "bfloat16"} | quant, "google/gemma-2b")
    for word in words:
        assert word in text


def test_a_merged_model_in_several_files_is_the_same_model(merged, trained_run, tmp_path):
    output = tmp_path / "shards"
    export(config(trained_run, f"output={output}", "limit=0", "max_shard_size=200KB"))
    assert len(list(output.glob("model-*.safetensors"))) > 2
    whole = AutoModelForCausalLM.from_pretrained(merged).state_dict()
    found = AutoModelForCausalLM.from_pretrained(output).state_dict()
    assert found.keys() == whole.keys()
    assert all(torch.equal(found[name], whole[name]) for name in whole)


def test_the_card_states_numbers_with_intervals_baseline_licence_and_disclaimer(
    merged, trained_run
):
    card = (merged / "README.md").read_text()
    run = read_run(trained_run)
    section = run.metrics["test"]
    for text in (
        f"{100 * section['accuracy']:.1f} %",
        f"[{100 * section['ci_low']:.1f}, {100 * section['ci_high']:.1f}]",
        f"{100 * section['majority_accuracy']:.1f} %",
        run.metrics["data"]["sha256"],
        run.metrics["config_hash"],
        "license: gemma",
        "Gemma Terms of Use",
        "no medical device",
        "r=16",
        "data_type=nf4",
        "Measured on 10 questions of test",
    ):
        assert text in card, text
    assert str(Path(run.config["model"]["path"]).parent) not in card
    assert "Gemma Terms of Use" in (merged / "NOTICE").read_text()


@pytest.mark.parametrize(
    ("overrides", "word"),
    [
        (["format=gguf"], "convert_hf_to_gguf"),
        (["format=onnx"], "Choose merged or adapter."),
        (["run=null"], "run=runs/DAY/TIME"),
        (["split=train"], "split=train"),
        (["limit=-1"], "limit=-1"),
        (["max_shard_size=abc"], "2GB"),
        (["max_shard_size=-5"], "2GB"),
        (["push_to_hub=a b/c"], "OWNER/NAME"),
        (["run={tmp}"], "metrics.json"),
        (["output={tmp}"], "nothing is overwritten"),
        (["device=tpu", "output={tmp}/x"], "device=tpu"),
    ],
)
def test_a_request_that_cannot_work_ends_in_one_line_and_leaves_nothing(
    overrides, word, trained_run, tmp_path, run_command
):
    given = [override.format(tmp=tmp_path) for override in overrides]
    ended = run_command("export", f"run={trained_run}", *given)
    assert ended.code == 2
    assert len(ended.errors) == 1
    assert word in ended.errors[0]
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("splits", "overrides", "words"),
    [
        ({"val_file": None}, ["split=val"], "choose split="),
        ({"test_file": "/gone.jsonl"}, [], "limit=0 to leave the measurement out"),
    ],
)
def test_data_that_are_gone_are_told_with_the_way_to_do_without(
    splits, overrides, words, trained_run, tmp_path
):
    run = tmp_path / "run"
    shutil.copytree(trained_run, run)
    written = yaml.safe_load((run / "config.yaml").read_text())
    written["data"] |= splits
    (run / "config.yaml").write_text(yaml.safe_dump(written))
    with pytest.raises(export_verb.MedQLoRAError) as told:
        export(config(run, f"output={tmp_path / 'out'}", *overrides))
    assert words in str(told.value)
    assert "measure what merging changes" in str(told.value)
    assert [path.name for path in tmp_path.iterdir()] == ["run"]


@pytest.mark.parametrize(
    ("kind", "words"), [("full", "peft=full, which has no adapter"), ("bare", "a bare base")]
)
def test_a_run_without_adapter_is_exported_merged_only(kind, words, trained_run, tmp_path):
    run = tmp_path / "run"
    shutil.copytree(trained_run, run)
    if kind == "full":
        (run / "adapter" / "adapter_model.safetensors").rename(run / "adapter" / FULL_WEIGHTS)
    else:
        shutil.rmtree(run / "adapter")
        written = yaml.safe_load((run / "config.yaml").read_text())
        (run / "config.yaml").write_text(yaml.safe_dump(written | {"peft": {}}))
    with pytest.raises(export_verb.ConfigError, match=words) as told:
        export(config(run, "format=adapter", f"output={tmp_path / 'out'}"))
    assert "format=merged" in str(told.value)
    assert not (tmp_path / "out").exists()


def test_a_run_that_did_not_complete_is_exported_with_a_warning(trained_run, tmp_path, caplog):
    run = tmp_path / "run"
    shutil.copytree(trained_run, run)
    metrics = json.loads((run / "metrics.json").read_text())
    (run / "metrics.json").write_text(json.dumps(metrics | {"status": "interrupted"}))
    output = export(config(run, "format=adapter", f"output={tmp_path / 'out'}"))
    assert (output / "adapter_model.safetensors").is_file()
    assert "did not complete (interrupted)" in caplog.text


def test_a_head_that_came_untied_is_no_merged_model(trained_run, tmp_path, monkeypatch):
    """In stock transformers it would be trained apart from the embedding that it is."""
    save = PreTrainedModel.save_pretrained

    def untied(self, folder, **options):
        save(self, folder, **options)
        written = json.loads((Path(folder) / "config.json").read_text())
        text = json.dumps(written | {"tie_word_embeddings": False})
        (Path(folder) / "config.json").write_text(text)

    monkeypatch.setattr(PreTrainedModel, "save_pretrained", untied)
    with pytest.raises(export_verb.MedQLoRAError, match="tied embeddings"):
        export(config(trained_run, f"output={tmp_path / 'out'}", "limit=0"))
    assert list(tmp_path.iterdir()) == []


def test_a_failure_in_the_middle_leaves_nothing_behind(trained_run, tmp_path, monkeypatch):
    """Disk full: the line says so, and neither the folder nor its half is there."""

    def full(*arguments, **options):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(export_verb, "write_card", full)
    with pytest.raises(export_verb.MedQLoRAError, match="No space left on device") as told:
        export(config(trained_run, "format=adapter", f"output={tmp_path / 'out'}"))
    assert told.value.exit_code == 1
    assert list(tmp_path.iterdir()) == []


def test_the_half_of_a_killed_export_is_cleared_away_and_that_of_a_living_one_is_not(
    trained_run, tmp_path
):
    dead = tmp_path / f".out.{2**22 + 1}.tmp"
    living = tmp_path / f".out.{os.getppid()}.tmp"
    for folder in (dead, living):
        folder.mkdir()
    export(config(trained_run, "format=adapter", f"output={tmp_path / 'out'}"))
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted([living.name, "out"])


@pytest.mark.parametrize(
    "trick", ["link", "folder", "no weights", "damaged", "no config", "no method"]
)
def test_an_adapter_folder_with_tricks_is_refused(trick, trained_run, tmp_path):
    """A run folder from elsewhere is data: a link would carry a file of this machine along."""
    run = tmp_path / "run"
    shutil.copytree(trained_run, run)
    adapter = run / "adapter"
    if trick == "link":
        (adapter / "notes.txt").symlink_to("/etc/hostname")
    elif trick == "folder":
        (adapter / "more").mkdir()
    elif trick == "no weights":
        (adapter / "adapter_model.safetensors").unlink()
    elif trick == "damaged":
        (adapter / "adapter_model.safetensors").write_bytes(b"\xff" * 64)
    elif trick == "no method":
        (adapter / "adapter_config.json").write_text('{"peft_type": null}')
    else:
        (adapter / "adapter_config.json").write_text("[]")
    with pytest.raises(export_verb.CheckpointError) as told:
        export(config(run, "format=adapter", f"output={tmp_path / 'out'}"))
    assert "\n" not in str(told.value)
    assert not (tmp_path / "out").exists()


# --- the card -------------------------------------------------------------------------------------


def card_of(run, *, config=None, metrics=None, format="adapter", change=None) -> str:
    """The card of a run whose config or metrics say something else in some sections."""

    def changed(own, sections):
        return own | {
            key: own[key] | part if isinstance(part, dict) else part
            for key, part in (sections or {}).items()
        }

    other = replace(run, config=changed(run.config, config), metrics=changed(run.metrics, metrics))
    return export_verb.card(other, format, change)


@pytest.fixture(scope="module")
def result(trained_run):
    return read_run(trained_run)


@pytest.mark.parametrize(("format", "relation"), [("adapter", "adapter"), ("merged", "finetune")])
def test_the_card_of_hub_names_links_base_and_data_for_the_hub(format, relation, result):
    card = card_of(
        result,
        format=format,
        config={
            "model": {"path": "google/gemma-2b"},
            "data": {"hub": "some/questions", "revision": "abc"},
        },
    )
    head = yaml.safe_load(card.split("---\n")[1])
    assert head["base_model"] == "google/gemma-2b"
    assert head["base_model_relation"] == relation
    assert head["datasets"] == ["some/questions"]
    assert head["license"] == "gemma"
    assert "(some/questions, revision abc)" in card


def test_the_bundled_model_is_nobodys_but_ours(result, tmp_path):
    other = replace(result, config=result.config | {"model": {"path": "bundled:tiny_gemma"}})
    export_verb.write_card(tmp_path, other, "adapter", None)
    card = (tmp_path / "README.md").read_text()
    assert "license: mit" in card
    assert "Gemma Terms of Use" not in card
    assert [path.name for path in tmp_path.iterdir()] == ["README.md"], "no NOTICE of Google's"


def test_the_card_says_what_was_not_scored_or_measured(result):
    empty = {"n": 0, "accuracy": None, "loss": None}
    bare = card_of(result, metrics={"val": empty, "test": empty}, format="merged")
    assert "This run was not scored." in bare
    assert "Not measured (limit=0)." in bare
    only_val = card_of(result, metrics={"test": empty})
    assert "On val:" in only_val
    assert "On test:" not in only_val
    short = card_of(result, metrics={"test": {"loss": None, "by": {}}})
    assert "On test:" in short
    assert "cross-entropy" not in short
    assert "By subject" not in short
    foreign = card_of(result, config={"prompt": {"text": None}, "scheduler": None})
    assert "The prompt, after one BOS" not in foreign
    assert "| schedule | none |" in foreign


def test_the_card_of_a_merged_model_tells_its_change_without_labels_too(result):
    open_ones = [Prediction("q", "test", "Anatomy", "single", None, (-0.1, -3.0))]
    card = card_of(result, format="merged", change=Change("test", open_ones, open_ones))
    assert "accuracy no labels before and no labels" in card
    assert "0 of 1 answers changed" in card


def test_a_damaged_baseline_costs_the_card_its_row_alone(result, trained_run, tmp_path):
    shutil.copytree(trained_run, tmp_path / "run")
    for name, text in (("whole", None), ("damaged", "{")):
        folder = tmp_path / "run" / "baselines" / name
        shutil.copytree(trained_run, folder)
        if text is not None:
            (folder / "metrics.json").write_text(text)
    found = export_verb.card(read_run(tmp_path / "run"), "adapter", None)
    tables = [card.count("\n| NF4 + LoRA") for card in (card_of(result), found)]
    assert tables == [2, 4], "on val and test: the run, and the baseline that can be read"


# --- push_to_hub ----------------------------------------------------------------------------------

TOKEN = "hf_a_token_that_nobody_may_see"
NAME = "somebody/something"


@pytest.fixture
def at_hub(monkeypatch):
    """`at_hub(endpoint)` sends the hub's client there, logged in, without waiting between tries."""
    from huggingface_hub import constants
    from huggingface_hub.utils import _http

    def point(endpoint: str) -> None:
        monkeypatch.setattr(constants, "ENDPOINT", endpoint)
        monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
        monkeypatch.setenv("HF_TOKEN", TOKEN)
        monkeypatch.setattr(_http.time, "sleep", lambda seconds: None)

    return point


@pytest.mark.parametrize(("format", "private"), [("adapter", "true"), ("merged", "false")])
def test_an_export_is_uploaded_whole_with_its_card_and_private_unless_said(
    format, private, trained_run, tmp_path, at_hub, run_command
):
    repository = Repository()
    with LoopbackHub({NAME: repository}, {}) as hub:
        at_hub(hub.endpoint)
        ended = run_command(
            "export",
            f"run={trained_run}",
            f"format={format}",
            f"output={tmp_path / 'out'}",
            f"push_to_hub={NAME}",
            "limit=0",
            *([] if private == "true" else ["private=false"]),
        )
    assert ended.code == 0, ended.err
    local = {path.name: path.read_bytes() for path in (tmp_path / "out").iterdir()}
    assert repository.files == local
    assert b"no medical device" in repository.files["README.md"]
    assert repository.private is (private == "true")
    assert f"uploaded to {hub.endpoint}/{NAME}" in ended.err
    assert TOKEN not in ended.out + ended.err
    assert not [name for name, content in local.items() if TOKEN.encode() in content]


@pytest.mark.parametrize(
    ("trouble", "words"),
    [
        (401, "hf auth login"),
        (403, "may not write"),
        (404, "no such owner"),
        (400, "refused it"),
        (503, "cannot be reached"),
        ("gone", "cannot be reached"),
        ("cut", "broke off"),
    ],
)
def test_a_hub_that_refuses_or_breaks_off_loses_no_export(
    trouble, words, trained_run, tmp_path, at_hub, run_command
):
    """One line, exit code 1, the folder whole, and how to upload it later."""
    repository = Repository(refusal=trouble if isinstance(trouble, int) else None)
    repository.cut_uploads = trouble == "cut"
    with LoopbackHub({NAME: repository}, {}) as hub:
        at_hub("http://127.0.0.1:9" if trouble == "gone" else hub.endpoint)
        ended = run_command(
            "export",
            f"run={trained_run}",
            "format=adapter",
            f"output={tmp_path / 'out'}",
            f"push_to_hub={NAME}",
        )
    assert ended.code == 1
    assert len(ended.errors) == 1
    assert words in ended.errors[0]
    assert f"hf upload {NAME} {tmp_path / 'out'}" in ended.errors[0]
    assert TOKEN not in ended.out + ended.err
    assert "Traceback" not in ended.err
    assert repository.files == {}
    assert list(tmp_path.iterdir()) == [tmp_path / "out"]
    for file in (trained_run / "adapter").iterdir():
        copy = tmp_path / "out" / file.name
        assert file.name == "README.md" or copy.read_bytes() == file.read_bytes()


def test_ctrl_c_in_an_upload_leaves_the_export(
    trained_run, tmp_path, at_hub, run_command, monkeypatch
):
    def interrupted(*arguments, **options):
        raise KeyboardInterrupt

    monkeypatch.setattr(export_verb.HfApi, "upload_folder", interrupted)
    with LoopbackHub({NAME: Repository()}, {}) as hub:
        at_hub(hub.endpoint)
        output = tmp_path / "out"
        ended = run_command(
            "export",
            f"run={trained_run}",
            "format=adapter",
            f"output={output}",
            f"push_to_hub={NAME}",
        )
    assert ended.code == 130
    assert len(ended.errors) == 1
    assert (output / "adapter_model.safetensors").is_file()


# --- faults ---------------------------------------------------------------------------------------


def test_a_read_only_folder_is_told_before_a_model_is_loaded(
    trained_run, tmp_path, run_command, monkeypatch
):
    """As root every folder can be written to, so the refusal of the system is played."""
    mkdir = Path.mkdir

    def refused(self, *arguments, **options):
        if self.is_relative_to(tmp_path):
            raise PermissionError(13, "Permission denied", str(self))
        mkdir(self, *arguments, **options)

    def loaded(*arguments, **options):
        raise AssertionError("loaded")

    monkeypatch.setattr(pipeline, "load_run", loaded)
    monkeypatch.setattr(Path, "mkdir", refused)
    ended = run_command("export", f"run={trained_run}", f"output={tmp_path / 'out'}")
    assert ended.code == 1
    assert len(ended.errors) == 1
    assert "Permission denied" in ended.errors[0]
    assert "output=DIR" in ended.errors[0]
    assert list(tmp_path.iterdir()) == []


def test_a_disk_that_fills_up_in_the_middle_of_the_weights_leaves_nothing(
    trained_run, tmp_path, run_command, limited_disk
):
    """A real file system of 256 kB: the merged model takes more."""
    ended = run_command("export", f"run={trained_run}", f"output={limited_disk / 'out'}", "limit=0")
    assert ended.code in (1, 2)
    assert len(ended.errors) == 1
    assert "free some space" in ended.errors[0]
    assert "Traceback" not in ended.err
    assert list(limited_disk.iterdir()) == []


@pytest.fixture
def limited_disk(tmp_path) -> Iterator[Path]:
    folder = tmp_path / "disk"
    folder.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=256k", "none", folder], capture_output=True
    )
    if mounted.returncode:
        pytest.skip("no file system can be mounted here")
    try:
        yield folder
    finally:
        subprocess.run(["umount", folder], check=True)


def export_and_die(cfg: DictConfig) -> None:
    """Export in a process of its own, killed when all but the new name is there."""
    write_card = export_verb.write_card

    def killed(*arguments):
        write_card(*arguments)
        os.kill(os.getpid(), signal.SIGKILL)

    export_verb.write_card = killed
    export(cfg)


def test_a_kill_in_the_middle_leaves_no_half_export_and_the_next_one_clears_up(
    trained_run, tmp_path
):
    cfg = config(trained_run, "format=adapter", f"output={tmp_path / 'out'}")
    process = multiprocessing.get_context("fork").Process(target=export_and_die, args=(cfg,))
    process.start()
    process.join(60)
    assert process.exitcode == -signal.SIGKILL
    assert not (tmp_path / "out").exists()
    assert len(list(tmp_path.iterdir())) == 1
    export(cfg)
    assert list(tmp_path.iterdir()) == [tmp_path / "out"]


def test_of_two_exports_into_one_folder_the_first_to_end_stays(
    trained_run, tmp_path, run_command, monkeypatch
):
    """The other writes beside it, finds the folder made when it ends, and says so."""
    output, other = tmp_path / "out", tmp_path / "other"
    quick = config(trained_run, "format=adapter", f"output={other}")
    write_card = export_verb.write_card

    def slow(folder, *arguments):
        monkeypatch.setattr(export_verb, "write_card", write_card)
        write_card(folder, *arguments)
        export(quick).rename(output)

    monkeypatch.setattr(export_verb, "write_card", slow)
    ended = run_command("export", f"run={trained_run}", "format=adapter", f"output={output}")
    assert ended.code == 2
    assert len(ended.errors) == 1
    assert "made meanwhile" in ended.errors[0]
    assert list(tmp_path.iterdir()) == [output]
    assert (output / "adapter_model.safetensors").is_file()
