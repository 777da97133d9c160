"""The verb `audit`: files, tables and exit codes; what is found is tested in tests/data."""

from __future__ import annotations

import json

import pandas as pd
import pytest
from rich.console import Console

from medqlora import instantiation
from medqlora.audit import MEANINGS, tables, with_own_tokenizer
from medqlora.config import compose
from medqlora.data.audit import FINDERS
from tests.data.data_tools import SHARED, raw_row, write_jsonl


@pytest.fixture
def flawed(tmp_path) -> str:
    """Six rows: one id twice, one option twice, one label that names nothing."""
    rows = [raw_row(i) for i in range(4)]
    rows += [raw_row(4, opb="Facial 4"), raw_row(0, question="Which of [red]these[/red]?", cop=9)]
    return write_jsonl(tmp_path / "flawed.jsonl", rows)


def test_findings_are_written_with_their_rows_and_are_no_failure(
    flawed, tmp_path, tiny_gemma_folder, run_command
):
    folder = tmp_path / "audit"
    ended = run_command(
        "audit",
        "data=files",
        f"data.train_file={flawed}",
        f"model.path={tiny_gemma_folder}",
        "model.revision=null",
        f"hydra.run.dir={folder}",
    )
    assert ended.code == 0, ended.err
    summary = json.loads((folder / "audit.json").read_text())
    findings = pd.read_parquet(folder / "audit.parquet")
    assert summary["num_rows"] == 6
    by_name = findings.groupby("finding")["row"].apply(list).to_dict()
    assert by_name["repeated_options"] == [5]
    assert by_name["duplicate_id"] == [6]
    assert by_name["invalid_label"] == [6]
    counts = findings.drop_duplicates(["finding", "split", "row"])["finding"].value_counts()
    assert {name: number for name, number in summary["findings"].items() if number} == dict(counts)
    assert set(findings.columns) == {"id", "row", "split", "finding", "detail"}
    lengths = summary["length_tokens"]["all"]
    assert lengths["min"] <= lengths["p50"] <= lengths["max"]
    for word in ("repeated_options", "majority", "prompt length in tokens", "Anatomy"):
        assert word in ended.out


def test_lengths_are_left_out_with_a_warning_where_there_is_no_tokenizer(
    flawed, tmp_path, run_command
):
    folder = tmp_path / "audit"
    ended = run_command(
        "audit",
        "data=files",
        f"data.test_file={flawed}",
        f"model.path={tmp_path / 'none'}",
        f"hydra.run.dir={folder}",
    )
    assert ended.code == 0, ended.err
    assert "lengths in tokens are left out" in ended.err
    assert "length_tokens" not in json.loads((folder / "audit.json").read_text())
    assert "prompt length" not in ended.out


def test_data_that_cannot_be_read_end_in_one_line_and_leave_no_folder(tmp_path, run_command):
    folder = tmp_path / "audit"
    ended = run_command(
        "audit",
        "data=files",
        f"data.test_file={tmp_path / 'none.jsonl'}",
        f"model.path={tmp_path / 'none'}",
        f"hydra.run.dir={folder}",
    )
    assert ended.code == 2
    assert len(ended.errors) == 1
    assert "none.jsonl" in ended.errors[0]
    assert not folder.exists()


@pytest.mark.parametrize(
    ("given", "path"),
    [({"data"}, "bundled:tiny_gemma"), ({"data", "model"}, "google/gemma-2b")],
)
def test_bundled_questions_are_measured_with_the_bundled_tokenizer(given, path):
    """No hub is needed for what needs none; what was asked for is not changed."""
    cfg = compose("audit", ["data=sample"])
    assert with_own_tokenizer(cfg, {"data": "sample"}, given).model.path == path


def test_labels_that_may_count_from_0_or_from_1_are_shown(tmp_path):
    """There is no majority to show, and no row without a label."""
    rows = [raw_row(i, cop=1 + i % 2) for i in range(4)]
    file = write_jsonl(tmp_path / "q.jsonl", rows)
    cfg = compose("audit", ["data=files", f"data.train_file={file}"])
    data = instantiation.make(
        cfg.data, tokenizer=None, prompt=instantiation.make(cfg.prompt), seed=0
    )
    console = Console(width=200)
    with console.capture() as shown:
        for table in tables(data.audit(), "x"):
            console.print(table)
    assert "unknown_label_base" in shown.get()
    assert MEANINGS["unknown_label_base"] in shown.get()
    assert "labels unknown" in shown.get()


def test_every_finding_has_a_meaning_for_the_reader():
    assert set(FINDERS) <= set(MEANINGS)


def test_text_of_the_data_is_shown_as_it_is(flawed):
    """A question that looks like markup of the terminal colours nothing and hides nothing."""
    cfg = compose("audit", ["data=files", f"data.train_file={flawed}"])
    prompt = instantiation.make(cfg.prompt)
    data = instantiation.make(cfg.data, tokenizer=None, prompt=prompt, seed=0)
    report = data.audit()
    report.summary["subjects"] = {"[red]Skin[/red]": 6}
    console = Console(width=200)
    with console.capture() as shown:
        for table in tables(report, "[b]x[/b]"):
            console.print(table)
    assert "[red]Skin[/red]" in shown.get()
    assert "[b]x[/b]" in shown.get()


def test_half_of_the_official_validation_set(tmp_path, run_command):
    """Its counted facts: 2,078 rows, 18 that repeat an option, A right in 32.92 %."""
    file = SHARED / "medmcqa_validation_half.jsonl.gz"
    if not file.is_file():
        pytest.skip("../shared is not here")
    folder = tmp_path / "audit"
    ended = run_command(
        "audit",
        "data=files",
        f"data.test_file={file}",
        f"model.path={tmp_path / 'none'}",
        f"hydra.run.dir={folder}",
    )
    assert ended.code == 0, ended.err
    summary = json.loads((folder / "audit.json").read_text())
    assert summary["num_rows"] == 2078
    assert summary["label_base"] == 1
    assert summary["majority_letter"] == "A"
    assert round(100 * summary["majority_share"], 2) == 32.92
    assert "A 32.92 %" in ended.out


def test_numbers_and_names_stay_whole_on_a_narrow_terminal(tmp_path):
    """Five letters, and eighty columns as a terminal without a size has."""
    rows = [raw_row(i, ope=f"None {i}", cop=i % 5) for i in range(130)]
    file = write_jsonl(tmp_path / "five.jsonl", rows)
    cfg = compose("audit", ["data=files", f"data.train_file={file}"])
    prompt = instantiation.make(cfg.prompt)
    report = instantiation.make(cfg.data, tokenizer=None, prompt=prompt, seed=0).audit()
    console = Console(width=80)
    with console.capture() as shown:
        for table in tables(report, "five"):
            console.print(table)
    lines = shown.get().splitlines()
    for word in ("all_or_none_of_the_above", "A 20.00 %", "[14.03, 27.69]"):
        assert any(word in line for line in lines), word
    assert max(map(len, lines)) <= 80
