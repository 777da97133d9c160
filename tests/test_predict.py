"""Answers to files of questions: every row in its place, whatever stands in it."""

from __future__ import annotations

import gzip
import io
import json
import math
import shutil
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest

import medqlora
from medqlora.answering import answer
from medqlora.data.medmcqa import read_questions
from medqlora.errors import DataError
from medqlora.evaluation import fit_temperature, read_predictions
from medqlora.predict import CELL_LIMIT, check_row, in_blocks, open_rows
from medqlora.schema import Prediction
from tests.data.data_tools import raw_row, write_jsonl

BAD_LINES = {
    "no JSON": ("not json", "JSON"),
    "no object": ("[1, 2]", "list"),
    "deep": ("[" * 100_000, "JSON"),
    "no question": (json.dumps({"opa": "a", "opb": "b", "opc": "c", "opd": "d"}), "question"),
    "no fourth option": (json.dumps({"question": "?", "opa": 1, "opb": 2, "opc": 3}), "opd"),
    "null option": (json.dumps(raw_row(1, opc=None)), "opc"),
    "empty option": (json.dumps(raw_row(1, opd="  ")), "opd"),
    "empty question": (json.dumps(raw_row(1, question="")), "question"),
    "option is a list": (json.dumps(raw_row(1, opa=["x"])), "opa"),
    "five options": (json.dumps(raw_row(1, ope="fifth")), "5 options"),
    "id is an object": (json.dumps(raw_row(1, id={})), "id"),
    "half a character": (
        '{"question": "\\ud800", "opa":1, "opb":2, "opc":3, "opd":4}',
        "surrogate",
    ),
    "options longer than a row": (json.dumps(raw_row(1, opa="x " * 3000)), "token"),
}


def lines(text: str) -> list[dict]:
    return [json.loads(line) for line in text.splitlines()]


def test_a_bad_row_is_reported_in_its_place_and_the_rest_is_answered(
    trained_run, tmp_path, run_command
):
    """Order, ids and row numbers survive; the exit code and one line tell that some are missing."""
    file = tmp_path / "mixed.jsonl"
    bad = list(BAD_LINES.values())
    good = [json.dumps(raw_row(i)) for i in range(len(bad))]
    text = "".join(f"{line}\n{wrong}\n" for line, (wrong, _) in zip(good, bad, strict=True))
    file.write_text(text)
    ended = run_command("predict", f"run={trained_run}", f"questions={file}", "block=5")
    found = lines(ended.out)
    assert [line["row"] for line in found] == list(range(1, 2 * len(bad) + 1))
    assert [line["id"] for line in found[::2]] == [f"q{i}" for i in range(len(bad))]
    for line in found[::2]:
        assert line["prediction"] == "ABCD"[line["index"]]
        assert list(line["probabilities"]) == list("ABCD")
        assert math.isclose(sum(line["probabilities"].values()), 1, abs_tol=1e-9)
        assert max(line["probabilities"].values()) == line["probabilities"][line["prediction"]]
    for line, (name, (_, word)) in zip(found[1::2], BAD_LINES.items(), strict=True):
        assert "prediction" not in line, name
        assert word in line["error"], name
        assert "\n" not in line["error"], name
    assert ended.code == 1
    assert len(ended.errors) == 1
    assert f"{len(bad)} of {2 * len(bad)} rows" in ended.errors[0]


def test_answers_are_those_of_the_run_whatever_the_block_the_format_and_the_labels(
    trained_run, tmp_path, run_command, question_files, monkeypatch
):
    """The scores in predictions.parquet again; labels and explanations play no part."""
    expected = {
        prediction.id: np.exp(prediction.scores)
        for prediction in read_predictions(trained_run, "test")
    }
    text = Path(question_files["test"]).read_text()
    rows = lines(text)
    changed = [
        {**row, "cop": 3, "exp": "The answer is C.", "note": "an unknown column"} for row in rows
    ]
    relabelled = write_jsonl(tmp_path / "changed.jsonl.gz", changed)
    table = tmp_path / "table.csv"
    columns = ["id", "question", "opa", "opb", "opc", "opd"]
    quoted = [",".join(f'"{row[c]}"' for c in columns) for row in rows]
    table.write_text("\ufeff" + "\n".join([",".join(columns), *quoted]) + "\n", encoding="utf-8")
    stdin = io.TextIOWrapper(io.BytesIO(text.encode()))
    monkeypatch.setattr(sys, "stdin", stdin)
    for source, block in ((relabelled, 7), (table, 1024), ("-", 1)):
        ended = run_command(
            "predict", f"run={trained_run}", f"questions={source}", f"block={block}"
        )
        assert ended.code == 0, ended.err
        found = lines(ended.out)
        assert [line["id"] for line in found] == [row["id"] for row in rows]
        for line in found:
            scores = list(line["probabilities"].values())
            np.testing.assert_allclose(scores, expected[line["id"]], atol=1e-5)


def test_the_python_api_answers_the_same(trained_run, question_files):
    run = medqlora.load_run(trained_run, device="cpu")
    questions = read_questions(question_files["test"])
    expected = {p.id: p.scores for p in read_predictions(trained_run, "test")}
    for prediction in run.predict(questions):
        np.testing.assert_allclose(prediction.scores, expected[prediction.id], atol=1e-5)
    assert run.predict([]) == []


def test_the_temperature_of_the_run_changes_confidence_and_no_answer(
    trained_run, run_command, question_files
):
    """Probabilities at temperature T are proportional to p^(1/T): Guo et al. 2017, section 4.2."""
    val = read_predictions(trained_run, "val")
    temperature = fit_temperature(
        np.array([p.scores for p in val]), np.array([p.answer for p in val])
    )
    assert temperature != 1
    options = [f"run={trained_run}", f"questions={question_files['test']}"]
    plain = lines(run_command("predict", *options).out)
    calibrated = lines(run_command("predict", *options, "temperature=run").out)
    for before, after in zip(plain, calibrated, strict=True):
        assert before["prediction"] == after["prediction"]
        powers = np.array(list(before["probabilities"].values())) ** (1 / temperature)
        found = list(after["probabilities"].values())
        np.testing.assert_allclose(found, powers / powers.sum(), atol=1e-9)


@pytest.mark.parametrize(
    ("arguments", "word"),
    [
        (["questions={file}"], "run=runs/DAY/TIME"),
        (["run={run}"], "questions=mine.jsonl"),
        (["run={run}", "questions={tmp}/none.jsonl"], "cannot be opened"),
        (["run={run}", "questions={tmp}/table.xlsx"], ".jsonl"),
        (["run={run}", "questions={tmp}/empty.jsonl"], "no rows"),
        (["run={run}", "questions={tmp}/header.csv"], "lacks the column opd"),
        (["run={tmp}", "questions={file}"], "metrics.json"),
        (["run={run}", "questions={file}", "block=0"], "block=0"),
        (["run={run}", "questions={file}", "temperature=2"], "temperature=2"),
        (["run={run}", "questions={file}", "device=tpu"], "device=tpu"),
    ],
)
def test_a_request_that_cannot_work_ends_in_one_line(
    arguments, word, trained_run, tmp_path, run_command, question_files
):
    (tmp_path / "empty.jsonl").write_text("\n\n")
    (tmp_path / "header.csv").write_text("question,opa,opb,opc\na,b,c,d\n")
    names = {"run": trained_run, "tmp": tmp_path, "file": question_files["test"]}
    ended = run_command("predict", *(argument.format(**names) for argument in arguments))
    assert ended.code == 2
    assert ended.out == ""
    assert len(ended.errors) == 1
    assert word in ended.errors[0]


def test_a_question_that_lost_its_beginning_says_so(trained_run, tmp_path, run_command):
    stems = ["Which?", "word " * 5000, "word " * 40]
    rows = [raw_row(i, question=stem) for i, stem in enumerate(stems)]
    file = write_jsonl(tmp_path / "long.jsonl", rows)
    ended = run_command("predict", f"run={trained_run}", f"questions={file}")
    assert ended.code == 0, ended.err
    assert [line.get("shortened", False) for line in lines(ended.out)] == [False, True, False]


def test_a_damaged_config_is_told(trained_run, tmp_path, run_command, question_files):
    folder = Path(shutil.copytree(trained_run, tmp_path / "run"))
    (folder / "config.yaml").write_text("model: 3\n")
    ended = run_command("predict", f"run={folder}", f"questions={question_files['test']}")
    assert ended.code == 2
    assert "does not say what data, prompt, model, quant, trainer was" in ended.err


def test_a_run_without_labelled_val_predictions_has_no_temperature(
    trained_run, tmp_path, run_command, question_files
):
    shutil.copytree(trained_run, tmp_path / "run")
    table = pd.read_parquet(tmp_path / "run" / "predictions.parquet")
    table[table["split"] == "test"].to_parquet(tmp_path / "run" / "predictions.parquet")
    words = [f"run={tmp_path}/run", f"questions={question_files['test']}", "temperature=run"]
    ended = run_command("predict", *words)
    assert (ended.code, ended.out) == (2, "")
    assert "no labelled val predictions" in ended.errors[0]
    assert "temperature=null" in ended.errors[0]


def test_a_question_that_the_run_refuses_costs_itself_alone():
    """The block is scored in halves until the one that cannot be is found."""
    calls: list[int] = []

    def predict(questions):
        calls.append(len(questions))
        if any("long" in question.stem for question in questions):
            raise DataError("q5 is longer than a row: shorten it.")
        return [
            Prediction(q.id, "predict", "", "", None, (-0.1, -3.0, -4.0, -5.0)) for q in questions
        ]

    options = {"opa": "a", "opb": "b", "opc": "c", "opd": "d"}
    asked = [
        check_row(row, {"question": "a long one" if row == 5 else "Which?", **options}, 4)
        for row in range(1, 17)
    ]
    found = list(answer(SimpleNamespace(predict=predict, shortens=lambda question: False), asked))
    assert [line["row"] for line in found] == list(range(1, 17))
    assert [line["row"] for line in found if "error" in line] == [5]
    assert "longer than a row" in found[4]["error"]
    assert len(calls) == 9, "2 log2(16) + 1: not one call a question"


def test_what_came_before_a_damaged_place_is_answered(trained_run, tmp_path, run_command):
    """A gzip file that was cut off: its whole lines are answered, then one line says where."""
    rows = [
        raw_row(i, question=f"{i} {np.random.default_rng(i).bytes(300).hex()}") for i in range(40)
    ]
    whole = gzip.compress("".join(json.dumps(row) + "\n" for row in rows).encode())
    file = tmp_path / "cut.jsonl.gz"
    file.write_bytes(whole[: 2 * len(whole) // 3])
    ended = run_command("predict", f"run={trained_run}", f"questions={file}", "block=8")
    found = lines(ended.out)
    assert 5 < len(found) < 40
    assert [line["id"] for line in found] == [f"q{i}" for i in range(len(found))]
    assert ended.code == 2
    assert "damaged or cut off" in ended.errors[0]


def test_a_reader_that_has_enough_ends_it_quietly(
    trained_run, run_command, question_files, monkeypatch
):
    """As `predict ... | head -1`: no traceback, and the exit code of SIGPIPE."""

    class Closed(io.StringIO):
        def write(self, text: str) -> int:
            raise BrokenPipeError

    from medqlora import predict

    original = predict.predict
    monkeypatch.setattr(predict, "predict", lambda cfg, out: original(cfg, Closed()))
    ended = run_command("predict", f"run={trained_run}", f"questions={question_files['test']}")
    assert ended.code == 141
    assert not ended.errors
    assert "Traceback" not in ended.err


def test_rows_are_read_as_they_are_asked_for(tmp_path):
    """Memory stays flat: after one block no more of the file was read than it holds."""
    file = tmp_path / "endless.jsonl"
    with file.open("w") as stream:
        for i in range(20_000):
            stream.write(json.dumps(raw_row(i)) + "\n")
    with open_rows(str(file)) as rows:
        assert len(next(in_blocks(rows, 10))) == 10
        frame = rows.gi_frame  # pyright: ignore
        assert frame.f_locals["number"] == 10


def test_a_bad_csv_row_costs_itself_alone(tmp_path):
    """Too few cells, a quote in the middle, and one that would swallow the rest."""
    file = tmp_path / "table.csv"
    good = "q,one?,a,b,c,d\n"
    swallowed = "x" * (CELL_LIMIT // 10) + "\n"
    file.write_text(
        "id,question,opa,opb,opc,opd\n"
        + good
        + "q,two?,a\n"
        + good
        + 'q,"thr"ee?,a,b,c,d\n'
        + good
        + 'q,"four?,a,b,c,d\n'
        + swallowed * 11
        + good
    )
    with open_rows(str(file)) as rows:
        asked = [check_row(number, record, 4) for number, record in rows]
    answered = [entry.question is not None for entry in asked]
    assert answered[:5] == [True, False, True, False, True]
    assert answered[-1]
    assert not answered[5]
    assert [entry.row for entry in asked] == list(range(1, len(asked) + 1))


def test_bytes_that_are_no_utf8_are_a_bad_row(tmp_path):
    file = tmp_path / "latin1.jsonl"
    row = json.dumps(raw_row(0, question="Sjögren?"), ensure_ascii=False)
    file.write_bytes(row.encode("latin-1") + b"\n" + row.encode() + b"\n")
    with open_rows(str(file)) as rows:
        bad, good = (check_row(number, record, 4) for number, record in rows)
    assert bad.error is not None
    assert "UTF-8" in bad.error
    assert good.question is not None
    assert good.question.answer is None
    assert good.question.explanation is None
