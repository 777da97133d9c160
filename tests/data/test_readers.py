"""Files -> questions; what is wrong is said in one line that names the file and the row."""

from __future__ import annotations

import csv
import gzip
import io
import json
import re

import pandas as pd
import pytest
from huggingface_hub import constants

from medqlora.config import compose
from medqlora.data.medmcqa import parse_rows, read_questions
from medqlora.data.readers import read_hub, read_rows
from medqlora.errors import DataError
from tests.data.data_tools import raw_row, write_jsonl


def fails(path, *words, **options):
    with pytest.raises(DataError) as caught:
        read_questions(str(path), **options)
    message = str(caught.value)
    assert "\n" not in message
    for word in (*words, str(path)):
        assert word in message, message


@pytest.mark.parametrize(
    "name", ["q.json", "q.jsonl", "q.csv", "q.parquet", "q.json.gz", "q.jsonl.gz", "q.csv.gz"]
)
def test_every_format_gives_the_same_questions(tmp_path, name):
    rows = [raw_row(i, question='a, "b"\n\nAnswer: C — é') for i in range(5)]
    path = tmp_path / name
    if ".jsonl" in name:
        write_jsonl(path, rows)
    elif ".json" in name:
        text = json.dumps(rows).encode()
        path.write_bytes(gzip.compress(text) if name.endswith("gz") else text)
    elif ".csv" in name:
        pd.DataFrame(rows).to_csv(path, index=False)
    else:
        pd.DataFrame(rows).to_parquet(path)
    expected = read_questions(write_jsonl(tmp_path / "expected.jsonl", rows))
    assert read_questions(str(path)) == expected
    assert expected[3].answer == 3
    assert expected[3].explanation == "SECRET3 is why."
    assert expected[3].topic_name is None


def test_json_file_with_one_object_a_line_is_read_like_the_authors_files(tmp_path):
    path = tmp_path / "train.json"
    write_jsonl(path, [raw_row(i) for i in range(4)])
    assert len(read_questions(str(path))) == 4


def test_empty_csv_cell_is_an_empty_text_and_the_word_null_a_text(tmp_path):
    path = tmp_path / "q.csv"
    rows = [raw_row(0, opa="", opb="null", opc="None", opd="NA"), raw_row(3)]
    pd.DataFrame(rows).to_csv(path, index=False)
    assert read_questions(str(path))[0].options == ("", "null", "None", "NA")


def test_truncated_gzip_names_the_row_it_ends_after(tmp_path):
    path = tmp_path / "q.jsonl.gz"
    write_jsonl(path, [raw_row(i) for i in range(400)])
    path.write_bytes(path.read_bytes()[:-300])
    fails(path, "cut off after row")


def test_file_that_is_no_gzip_is_said_to_be_damaged(tmp_path):
    path = tmp_path / "q.csv.gz"
    path.write_text("id,question")
    fails(path, "damaged")


def test_wrong_delimiter_is_named(tmp_path):
    path = tmp_path / "q.csv"
    pd.DataFrame([raw_row(0), raw_row(3)]).to_csv(path, index=False, sep=";")
    fails(path, "semicolon", "commas")


def test_row_with_too_many_cells_is_named(tmp_path):
    path = tmp_path / "q.csv"
    rows = [raw_row(i) for i in range(4)]
    with open(path, "w", newline="") as stream:
        writer = csv.writer(stream)
        writer.writerow(rows[0])
        writer.writerows([*row.values()] for row in rows[:2])
        writer.writerow([*rows[2].values(), "more"])
    fails(path, "row 3", "12 cells", "11")


def test_broken_json_line_is_named(tmp_path):
    path = tmp_path / "q.jsonl"
    path.write_text(json.dumps(raw_row(0)) + "\n{'id': 1}\n")
    fails(path, "row 2", "not valid JSON")


@pytest.mark.parametrize(
    ("name", "content", "word"),
    [
        ("q.jsonl", "", "empty"),
        ("q.jsonl", "\n", "no rows"),
        ("q.csv", "id,question,opa,opb,opc,opd\n", "no rows"),
        ("q.json", "[]", "no rows"),
        ("q.json", "[1]", "row 1"),
        ("q.parquet", "no parquet", "parquet"),
        ("q.xlsx", "x", ".jsonl"),
        ("q.csv", "id,id,question\n", "two columns"),
    ],
)
def test_empty_and_foreign_files_are_refused(tmp_path, name, content, word):
    path = tmp_path / name
    path.write_text(content)
    fails(path, word)


def test_missing_file_and_text_that_is_not_utf8_are_refused(tmp_path):
    fails(tmp_path / "none.jsonl", "does not exist")
    path = tmp_path / "q.jsonl"
    path.write_bytes(json.dumps(raw_row(0)).encode() + b'\n{"id": "\xff"}\n')
    fails(path, "row", "UTF-8")


def test_unknown_and_missing_columns_are_named_with_those_there_are(tmp_path):
    row = raw_row(0)
    row["stem"] = row.pop("question")
    fails(write_jsonl(tmp_path / "a.jsonl", [row]), "question", "stem")
    extra = write_jsonl(tmp_path / "b.jsonl", [raw_row(0, meta="x")])
    fails(extra, "meta", "data.ignore_columns=[meta]")
    assert len(read_questions(extra, ignore_columns=["meta"])) == 1


@pytest.mark.parametrize("identifier", [None, float("nan"), "", "nan", True, ["x"]])
def test_rows_without_an_id_are_named(tmp_path, identifier):
    rows = [raw_row(0), raw_row(1, id=identifier)]
    fails(write_jsonl(tmp_path / "q.jsonl", rows), "row 2", "id=")


def test_duplicate_id_names_both_rows(tmp_path):
    rows = [raw_row(0), raw_row(1), raw_row(2, id="q0")]
    fails(write_jsonl(tmp_path / "q.jsonl", rows), "row 3", "row 1", "'q0'")


def test_ids_are_made_up_only_when_there_is_no_such_column(tmp_path):
    rows = [{k: v for k, v in raw_row(i).items() if k != "id"} for i in range(3)]
    assert len({q.id for q in read_questions(write_jsonl(tmp_path / "q.jsonl", rows))}) == 3


@pytest.mark.parametrize("name", ["q.csv", "q.parquet", "q.jsonl"])
def test_whole_numbers_that_pandas_wrote_as_fractions_are_whole(tmp_path, name):
    """One missing value makes numbers of a column floats."""
    rows = [raw_row(i, id=float(i), cop=float(i % 4)) for i in range(6)]
    rows[4]["cop"] = None
    table = pd.DataFrame(rows)
    write = {"csv": table.to_csv, "parquet": table.to_parquet}.get(name[2:])
    if write is None:
        table.to_json(tmp_path / name, orient="records", lines=True)
    else:
        write(tmp_path / name, index=False)
    found = read_questions(str(tmp_path / name))
    assert [question.id for question in found] == list("012345")
    assert [question.answer for question in found] == [0, 1, 2, 3, None, 1]


def test_ids_that_are_no_numbers_throughout_stay_as_they_are(tmp_path):
    rows = [raw_row(i, id=name) for i, name in enumerate(["1.0", "1.1", "1.10", "2.0"])]
    path = tmp_path / "q.csv"
    pd.DataFrame(rows).to_csv(path, index=False)
    assert [question.id for question in read_questions(str(path))] == ["1.0", "1.1", "1.10", "2.0"]
    rows = [raw_row(i, id=i + 0.5) for i in range(3)]
    fails(write_jsonl(tmp_path / "q.jsonl", rows), "row 1", "id=0.5")


def test_the_row_numbers_that_pandas_writes_are_no_column(tmp_path):
    table = pd.DataFrame([raw_row(i) for i in range(4)])
    path = tmp_path / "q.csv"
    table.to_csv(path)
    assert [question.id for question in read_questions(str(path))] == ["q0", "q1", "q2", "q3"]
    table[::2].to_csv(path)
    fails(path, "unknown column ''", """'data.ignore_columns=[""]'""")
    read_questions(str(path), ignore_columns=[""])


@pytest.mark.parametrize("name", ["", "Unnamed: 0", "2024", "my, column"])
def test_columns_of_any_name_can_be_ignored_as_is_said(tmp_path, name):
    path = write_jsonl(tmp_path / "q.jsonl", [raw_row(i) | {name: "x"} for i in range(4)])
    with pytest.raises(DataError) as refused:
        read_questions(path)
    [override] = re.findall("'(data.ignore_columns=.*)'", str(refused.value))
    cfg = compose("train", ["data=files", f"data.train_file={path}", override])
    assert len(read_questions(path, ignore_columns=cfg.data.ignore_columns)) == 4


def test_numbers_are_texts_and_lists_are_refused(tmp_path):
    rows = [raw_row(0, opa=1, opb=2.5, opc=0, opd=-3)]
    path = write_jsonl(tmp_path / "q.jsonl", rows)
    assert read_questions(path)[0].options == ("1", "2.5", "0", "-3")
    fails(write_jsonl(tmp_path / "r.jsonl", [raw_row(0, opb=["x"])]), "row 1", "list", "opb")


def test_half_a_surrogate_pair_is_no_text(tmp_path):
    path = tmp_path / "q.jsonl"
    path.write_text(json.dumps(raw_row(0, question="\ud800")))
    fails(path, "row 1", "surrogate")


def test_standard_input_is_read_as_json_lines(monkeypatch):
    lines = "".join(json.dumps(raw_row(i)) + "\n" for i in range(3))
    monkeypatch.setattr("sys.stdin", io.StringIO(lines))
    assert [question.id for question in read_questions("-")] == ["q0", "q1", "q2"]
    monkeypatch.setattr("sys.stdin", io.StringIO("{"))
    with pytest.raises(DataError, match="standard input, row 1 is not valid JSON"):
        read_questions("-")


def test_broken_array_is_told_by_its_line(tmp_path):
    path = tmp_path / "q.json"
    path.write_text("[\n" + json.dumps(raw_row(0)) + "\n" + json.dumps(raw_row(1)) + "\n]\n")
    fails(path, "line 3", "not valid JSON")


def test_empty_lines_of_a_csv_are_no_rows(tmp_path):
    path = tmp_path / "q.csv"
    pd.DataFrame([raw_row(0), raw_row(3)]).to_csv(path, index=False)
    path.write_text(path.read_text().replace("\n", "\n\n"))
    assert [question.id for question in read_questions(str(path))] == ["q0", "q3"]


# --- the hub --------------------------------------------------------------------------------------


@pytest.fixture
def from_hub(monkeypatch):
    """`from_hub({"train": rows}, kinds)`: what the hub's library reads, split by split."""
    import datasets

    def serve(splits: dict[str, list[dict]], **kinds) -> None:
        parts = {name: datasets.Dataset.from_list(rows) for name, rows in splits.items()}
        for column, kind in kinds.items():
            parts = {name: part.cast_column(column, kind) for name, part in parts.items()}
        monkeypatch.setattr(datasets, "load_dataset", lambda name, revision: parts)

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)  # the network is not asked first
    return serve


def test_a_split_of_the_hub_has_the_rows_of_a_file_and_knows_where_labels_start(from_hub, tmp_path):
    import datasets

    rows = [raw_row(i, cop=1 + i % 3) for i in range(6)]
    from_hub({"train": rows}, cop=datasets.ClassLabel(names=["a", "b", "c", "d"]))
    found = read_hub("some/questions", None, ["train"])["train"]
    assert found.source == "some/questions [train]"
    assert found.columns == read_rows(write_jsonl(tmp_path / "q.jsonl", rows)).columns
    assert [q.answer for q in parse_rows({"train": found})["train"]] == [1, 2, 3, 1, 2, 3]
    from_hub({"train": rows})
    with pytest.raises(DataError, match=r"data\.label_base=0"):
        parse_rows(read_hub("some/questions", None, ["train"]))


def test_a_split_that_the_hub_lacks_or_has_no_rows_of_is_named(from_hub):
    from_hub({"train": [raw_row(0)], "dev": [raw_row(1)], "empty": []})
    with pytest.raises(DataError, match="has no split 'validation', only train, dev, empty"):
        read_hub("some/questions", None, ["train", "validation"])
    with pytest.raises(DataError, match=r"some/questions \[empty\] holds no rows"):
        read_hub("some/questions", None, ["empty"])


# --- labels ---------------------------------------------------------------------------------------


def labels(tmp_path, values, **options):
    path = write_jsonl(tmp_path / "q.jsonl", [raw_row(i, cop=v) for i, v in enumerate(values)])
    return [question.answer for question in read_questions(path, **options)]


def test_label_base_is_found_from_the_data(tmp_path):
    assert labels(tmp_path, [0, 1, 2, 3]) == [0, 1, 2, 3]
    assert labels(tmp_path, [1, 2, 3, 4]) == [0, 1, 2, 3]
    assert labels(tmp_path, ["1", "2.0"[:1], 3.0, "4", -1, None, ""]) == [0, 1, 2, 3] + [None] * 3
    assert labels(tmp_path, [-1, None]) == [None, None]


def test_ambiguous_labels_ask_for_the_base(tmp_path):
    path = write_jsonl(tmp_path / "q.jsonl", [raw_row(i, cop=1 + i) for i in range(3)])
    fails(path, "data.label_base=0", "data.label_base=1")
    assert labels(tmp_path, [1, 2, 3], label_base=1) == [0, 1, 2]
    assert labels(tmp_path, [1, 2, 3], label_base=0) == [1, 2, 3]


def test_mixed_label_bases_name_both_rows(tmp_path):
    path = write_jsonl(tmp_path / "q.jsonl", [raw_row(i, cop=v) for i, v in enumerate([2, 0, 4])])
    fails(path, "row 2 has cop=0", "row 3 has cop=4")


def test_stated_label_base_is_held_against_the_data(tmp_path):
    path = write_jsonl(tmp_path / "q.jsonl", [raw_row(i, cop=v) for i, v in enumerate([2, 4])])
    fails(path, "row 2", "contradicts data.label_base=0", label_base=0)


@pytest.mark.parametrize("label", [5, -2, "A", 1.5, "0.5", "1e0", True, [0]])
def test_impossible_labels_name_the_row(tmp_path, label):
    path = write_jsonl(tmp_path / "q.jsonl", [raw_row(0), raw_row(1, cop=label)])
    fails(path, "row 2", "cop=")


def test_class_labels_count_from_zero(tmp_path):
    path = write_jsonl(tmp_path / "q.jsonl", [raw_row(i, cop=1 + i) for i in range(3)])
    raw = read_rows(path)
    named = type(raw)(raw.source, raw.columns, class_labels=True)
    assert [q.answer for q in parse_rows({"train": named})["train"]] == [1, 2, 3]


def test_fifth_option_is_read_and_counts_for_the_base(tmp_path):
    rows = [raw_row(i, ope=f"None {i}", cop=i) for i in range(1, 6)]
    found = read_questions(write_jsonl(tmp_path / "q.jsonl", rows))
    assert len(found[0].options) == 5
    assert [question.answer for question in found] == [0, 1, 2, 3, 4]


def test_rows_with_four_and_with_five_options_do_not_mix(tmp_path):
    rows = [raw_row(0, ope="x"), raw_row(1, ope=None)]
    fails(write_jsonl(tmp_path / "q.jsonl", rows), "row 1 has five", "row 2 has four")


def test_column_of_empty_fifth_options_is_no_fifth_option(tmp_path):
    rows = [raw_row(0, ope=None), raw_row(1, ope=""), raw_row(2, ope="  ")]
    assert len(read_questions(write_jsonl(tmp_path / "q.jsonl", rows))[0].options) == 4
