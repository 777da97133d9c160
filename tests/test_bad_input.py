"""Bad requests: one clear line on standard error, exit code 2, no half-written run folder."""

from __future__ import annotations

import gzip
import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from tests.conftest import Ended
from tests.data.data_tools import make_tokenizer, raw_row, write_jsonl

Change = Callable[[Path, str], list[str]]
"""Makes what is wrong in a folder, given that of the model; returns the overrides that name it."""


def rows(number: int = 24, **changes: object) -> list[dict]:
    return [raw_row(i) | changes for i in range(number)]


def file_of(folder: Path, given: list[dict], name: str = "bad.jsonl") -> list[str]:
    return [f"data.train_file={write_jsonl(folder / name, given)}"]


def unknown_column(folder: Path, model: str) -> list[str]:
    return file_of(folder, rows(difficulty="hard"))


def missing_column(folder: Path, model: str) -> list[str]:
    return file_of(folder, [{k: v for k, v in row.items() if k != "opc"} for row in rows()])


def empty_file(folder: Path, model: str) -> list[str]:
    (folder / "empty.jsonl").touch()
    return [f"data.train_file={folder / 'empty.jsonl'}"]


def no_such_file(folder: Path, model: str) -> list[str]:
    return [f"data.train_file={folder / 'nowhere.jsonl'}"]


def other_format(folder: Path, model: str) -> list[str]:
    (folder / "bad.xlsx").write_text("x")
    return [f"data.train_file={folder / 'bad.xlsx'}"]


def cut_off(folder: Path, model: str) -> list[str]:
    whole = gzip.compress("".join(json.dumps(row) + "\n" for row in rows()).encode())
    (folder / "bad.jsonl.gz").write_bytes(whole[: len(whole) // 2])
    return [f"data.train_file={folder / 'bad.jsonl.gz'}"]


def unlabelled_rows(folder: Path, model: str) -> list[str]:
    given = rows()
    given[5]["cop"] = -1
    return file_of(folder, given)


def contradictory_labels(folder: Path, model: str) -> list[str]:
    given = rows()
    given[5]["cop"] = 4
    return file_of(folder, given)


def letters_of_two_tokens(folder: Path, model: str) -> list[str]:
    """A tokenizer that never saw " A" spells it as a space and a byte."""
    tokenizer = make_tokenizer(letters="WXYZ")
    shutil.copytree(model, folder / "letters")
    tokenizer.save_pretrained(folder / "letters")
    return [f"model.path={folder / 'letters'}"]


def no_weights(folder: Path, model: str) -> list[str]:
    shutil.copytree(model, folder / "bare", ignore=shutil.ignore_patterns("*.safetensors"))
    return [f"model.path={folder / 'bare'}"]


def no_model(folder: Path, model: str) -> list[str]:
    return [f"model.path={folder / 'nowhere'}"]


def another_architecture(folder: Path, model: str) -> list[str]:
    shutil.copytree(model, folder / "other")
    config = json.loads((folder / "other" / "config.json").read_text())
    (folder / "other" / "config.json").write_text(json.dumps(config | {"model_type": "llama"}))
    return [f"model.path={folder / 'other'}"]


CASES: list[tuple[Change | list[str], list[str]]] = [
    (unknown_column, ["bad.jsonl", "difficulty", "data.ignore_columns"]),
    (missing_column, ["bad.jsonl", "opc"]),
    (empty_file, ["empty.jsonl", "empty"]),
    (no_such_file, ["nowhere.jsonl", "does not exist"]),
    (other_format, ["bad.xlsx", ".parquet"]),
    (cut_off, ["bad.jsonl.gz", "cut off"]),
    (unlabelled_rows, ["bad.jsonl", "row 6", "no label"]),
    (contradictory_labels, ["bad.jsonl", "cop=0", "cop=4"]),
    (["data.train_file=null"], ["no train questions", "data.train_file"]),
    (letters_of_two_tokens, ["' A'", "tokens", "model=gemma_2b"]),
    (["data.token_budget=16"], ["data.token_budget", "16", "at least"]),
    (["quant.compute_dtype=float16"], ["quant.compute_dtype=float16", "infinite", "bfloat16"]),
    (["+trainer.precision=16-mixed"], ["trainer.precision=16-mixed", "quant.compute_dtype"]),
    (no_weights, ["bare", "no safetensors weights"]),
    (no_model, ["nowhere", "model.path"]),
    (another_architecture, ["llama", "gemma"]),
    (["peft=none"], ["peft=none", "peft=lora_r16", "medqlora.evaluate"]),
    (
        ["callbacks=early_stopping", "data.val_file=null"],
        ["callbacks=early_stopping", "val/loss", "data.val_file"],
    ),
    (["peft.target_modules=[qq_proj]", "baselines=[base_quantized]"], ["qq_proj"]),
    (["loss._target_=medqlora.finetuning.NoLoss"], ["NoLoss"]),
    (["+peft.rank=8"], ["rank"]),
    (["loss._target_=os.system"], ["os.system"]),
    (["baselines=base_16bit"], ["baselines=base_16bit is no list", "base_quantized"]),
    (["baselines=[gpt4]"], ["gpt4", "base_16bit"]),
    (["select=newest"], ["select=newest", "best or last"]),
    (["data.limit_train=-1"], ["data.limit_train=-1", "0 to leave the split out"]),
    (["data.token_buget=64"], ["data.token_buget is no option", "Did you mean data.token_budget?"]),
    (["xyz=1"], ["xyz is no option of train", "--help"]),
    (["+qant=nf4"], ["qant is no option of train", "Did you mean quant?"]),
    (["+model.revison=abc"], ["model.revison is no option", "Did you mean model.revision?"]),
    (["quant=nf5"], ["quant/nf5", "nf4_full"]),
    (["experiment=quickstrat"], ["experiment/quickstrat", "quickstart"]),
    (["sweep=rnak"], ["sweep/rnak", "rank", "quantization"]),
    (["-m", "quant=nf5", "seed=1,2"], ["quant/nf5", "nf4_full"]),
    (["callbacks=null"], ["callbacks=null", "--help"]),
    (["optimizer.lr=-1"], ["optimizer.lr=-1", "above 0"]),
    (["peft.r=0"], ["peft=lora", "positive", ". Choose another"]),
    (["trainer.val_check_interval=100000"], ["trainer.val_check_interval=100000", "rows"]),
    (["trainer.val_check_interval=1.5"], ["trainer.val_check_interval=1.5", "fraction"]),
    (["trainer.accelerator=gpux"], ["accelerator", "gpux"]),
    (["trainer.max_epochs=-1"], ["trainer.max_epochs=-1", "trainer.max_steps"]),
]


def assert_refused(ended: Ended, run_dir: Path, words: list[str]) -> None:
    assert ended.code == 2, ended.err
    [line] = ended.errors
    assert ended.err.rstrip().splitlines()[-1] == line
    assert "Traceback" not in ended.err
    for word in words:
        assert word in line, line
    assert not run_dir.exists(), sorted(run_dir.rglob("*"))


def name_of(change: Change | list[str]) -> str:
    return " ".join(change) if isinstance(change, list) else change.__name__


@pytest.mark.parametrize(("change", "words"), CASES, ids=[name_of(change) for change, _ in CASES])
def test_bad_input_is_refused_in_one_line(
    change, words, run_command, tiny_options, tiny_gemma_folder, tmp_path
):
    overrides = change if isinstance(change, list) else change(tmp_path, tiny_gemma_folder)
    # Hydra refuses a key that is given twice, and the last one is meant.
    keys = {item.lstrip("+").split("=")[0] for item in overrides}
    options = [item for item in tiny_options if item.split("=")[0] not in keys]
    ended = run_command("train", *options, *overrides, f"hydra.run.dir={tmp_path}/run")
    assert_refused(ended, tmp_path / "run", words)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device here")
def test_a_gpu_that_is_not_there_is_refused(run_command, tiny_options, tmp_path):
    options = [option for option in tiny_options if option != "trainer=cpu"]
    ended = run_command("train", *options, "trainer=gpu", f"hydra.run.dir={tmp_path}/run")
    assert_refused(ended, tmp_path / "run", ["trainer=gpu", "trainer=cpu", "doctor"])


def test_a_run_folder_that_cannot_be_made_is_refused(run_command, tiny_options):
    ended = run_command("train", *tiny_options, "hydra.run.dir=/dev/null/run")
    assert_refused(ended, Path("/dev/null/run"), ["/dev/null", "hydra.run.dir=DIR"])


def test_a_folder_that_holds_a_run_is_never_overwritten(run_command, tiny_options, tmp_path):
    options = [*tiny_options, "trainer.max_steps=1", "data.val_file=null", "data.test_file=null"]
    first = run_command("train", *options, f"hydra.run.dir={tmp_path}/run")
    assert first.code == 0, first.err
    before = {path: path.read_bytes() for path in (tmp_path / "run").glob("*.*")}
    ended = run_command("train", *options, f"hydra.run.dir={tmp_path}/run")
    assert ended.code == 2
    [line] = ended.errors
    assert "already holds a run" in line
    for path, content in before.items():
        # The log may say that it was asked for again.
        assert path.read_bytes().startswith(content), path


def test_a_refused_run_leaves_other_things_in_its_folder_alone(run_command, tiny_options, tmp_path):
    """`hydra.run.dir=.` must not cost a user his files."""
    (tmp_path / "thesis").mkdir()
    (tmp_path / "thesis" / "chapter.txt").write_text("years of work")
    before = sorted(tmp_path.rglob("*"))
    ended = run_command("train", *tiny_options, "data.token_budget=16", f"hydra.run.dir={tmp_path}")
    assert ended.code == 2
    assert [path for path in sorted(tmp_path.rglob("*")) if path.suffix != ".log"] == before


def test_in_a_sweep_a_refused_job_keeps_its_row_and_the_others_run(
    run_command, tiny_options, tmp_path
):
    options = [*tiny_options, "trainer.max_steps=1", "data.val_file=null", "data.test_file=null"]
    ended = run_command(
        "train", "-m", *options, "peft=none,lora_r4", f"hydra.sweep.dir={tmp_path}/sweep"
    )
    assert ended.code != 0
    [line] = ended.errors
    assert "peft=none" in line
    found = [json.loads(f.read_text()) for f in sorted((tmp_path / "sweep").rglob("metrics.json"))]
    assert [metrics["status"] for metrics in found] == ["failed", "completed"]
    assert found[0]["error"] in line
