"""Whatever stands in a row or a file: an answer or one line, never a traceback.

Each test tries some hundred cases; `HYPOTHESIS_PROFILE=long` tries ten thousand.
"""

from __future__ import annotations

import copy
import gzip
import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from medqlora import instantiation
from medqlora.answering import check_row
from medqlora.config import compose
from medqlora.data.medmcqa import read_questions
from medqlora.data.readers import FORMATS
from medqlora.errors import MedQLoRAError
from medqlora.train import _check as check

CASES = {"long": 10_000}.get(os.environ.get("HYPOTHESIS_PROFILE", ""), 0)


def cases(number: int) -> settings:
    """Settings of a test: so many cases, or ten thousand; no clock, as machines differ."""
    return settings(
        max_examples=CASES or number,
        deadline=None,
        derandomize=not CASES,
        suppress_health_check=list(HealthCheck),
    )


COLUMNS = ("id", "question", "opa", "opb", "opc", "opd", "ope", "cop", "exp", "subject_name")
SCALARS = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(),
    st.floats(),
    st.text(max_size=12),
    st.sampled_from(["", " ", "nan", "null", "\ud800", "\x00", "-1", "1e999", "${oc.env:HOME}"]),
)
VALUES = (
    SCALARS
    | st.lists(SCALARS, max_size=2)
    | st.dictionaries(st.text(max_size=3), SCALARS, max_size=2)
)
ROWS = st.fixed_dictionaries(
    {},
    optional={**dict.fromkeys(COLUMNS, VALUES), "other": VALUES},
)
GOOD = {"question": "Which?", "opa": "a", "opb": "b", "opc": "c", "opd": "d", "cop": 0}


def assert_bad_request(error: MedQLoRAError, *words: str) -> None:
    """One line and the exit code of a bad request."""
    assert error.exit_code == 2
    assert str(error)
    assert "\n" not in str(error)
    for word in words:
        assert word in str(error)


@cases(400)
@given(record=ROWS, whole=st.booleans())
def test_any_row_is_a_question_or_says_why_not(record, whole):
    asked = check_row(1, (GOOD | record) if whole else record, 4)
    assert (asked.question is None) != (asked.error is None)
    if asked.question is not None:
        assert len(asked.question.options) == 4
        json.dumps(asked.question.stem).encode()


@cases(150)
@given(
    records=st.lists(VALUES | ROWS, max_size=4),
    ending=st.sampled_from([".jsonl", ".json", ".jsonl.gz"]),
)
def test_any_json_file_is_read_or_refused_in_one_line(records, ending, tmp_path):
    lines = [json.dumps(record) for record in records]
    text = f"[{','.join(lines)}]" if ending == ".json" else "\n".join(lines)
    read(tmp_path / f"x{ending}", text.encode())


TEXTS = st.text(alphabet='ab,"\n\r\x00;\tquestionopabcd', max_size=200).map(str.encode)
HEADS = [b"", b"question,opa,opb,opc,opd,cop\n", b"\xef\xbb\xbf", b"PAR1", b"\x1f\x8b"]


@cases(150)
@given(
    content=st.binary(max_size=200) | TEXTS,
    head=st.sampled_from(HEADS),
    ending=st.sampled_from(FORMATS),
)
def test_any_bytes_are_read_or_refused_in_one_line(content, head, ending, tmp_path):
    read(tmp_path / f"x{ending}", head + content, compress=not content.startswith(b"\x1f"))


def read(file: Path, content: bytes, *, compress: bool = True) -> None:
    file.write_bytes(gzip.compress(content, 0) if file.suffix == ".gz" and compress else content)
    try:
        questions = read_questions(str(file))
    except MedQLoRAError as error:
        assert_bad_request(error, str(file))
    else:
        assert questions


# --- configs --------------------------------------------------------------------------------------

WHOLE = compose("train", ["trainer=cpu"])
ROOTS = {"seed", "resume", "select", "baselines", "peft", *instantiation.GROUPS} - {"callbacks"}


def leaves(node: Any, path: str = "") -> Iterator[str]:
    """Every key of a config as a command line names it, groups as well."""
    for key in node:
        where = f"{path}.{key}" if path else str(key)
        if where.split(".")[0] in ROOTS:
            yield where
            if OmegaConf.is_dict(node[key]):
                yield from leaves(node[key], where)


@cases(100)
@given(key=st.sampled_from(sorted(leaves(WHOLE))), value=VALUES)
@example(key="acceleration", value={})
@example(key="quant", value="two\nlines")
def test_any_value_of_any_key_is_taken_or_refused_in_one_line(key, value):
    """What `train` does before it reads data or weights."""
    cfg = copy.deepcopy(WHOLE)
    try:
        OmegaConf.update(cfg, key, value, merge=False)
        check(cfg)
        instantiation.make(cfg.prompt)
        instantiation.make(cfg.loss)
    except MedQLoRAError as error:
        assert_bad_request(error)
    except OmegaConfBaseException:
        pass  # the entry point says it in one line
