"""The local page and its HTTP interface: same answers as `predict`, whoever asks and however."""

from __future__ import annotations

import contextlib
import json
import math
import os
import random
import shutil
import signal
import socket
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import httpx
import numpy as np
import pytest

from medqlora import pipeline, web
from medqlora.answering import AnswerThread, BusyError
from medqlora.errors import CheckpointError, ConfigError
from medqlora.evaluation import apply_temperature, read_predictions, read_run
from medqlora.schema import Prediction
from medqlora.serve import describe_run, open_socket, temperature_of
from tests.browser import MISSING, Browser, free_port
from tests.data.data_tools import raw_row

LIMITS = web.Limits(max_bytes=20_000, max_questions=30, timeout=2.0)


@pytest.fixture(scope="module")
def run(trained_run: Path) -> pipeline.LoadedRun:
    return pipeline.load_run(trained_run, device="cpu")


@contextlib.contextmanager
def serving(run: Any, temperature: float | None = None, **limits: int) -> Iterator[str]:
    """Address of a server that answers with a run while it is entered."""
    answers = AnswerThread(run, temperature or 1.0, **limits)
    facts = describe_run(run, temperature)
    listener = open_socket("127.0.0.1", 0)
    server = web.QuietServer(web.server_config(web.build_app(answers, facts, LIMITS), LIMITS))
    thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]})
    thread.start()
    try:
        yield f"http://127.0.0.1:{listener.getsockname()[1]}"
    finally:
        server.should_exit = True
        thread.join(20)
        answers.close()
        listener.close()


@pytest.fixture(scope="module")
def address(run: pipeline.LoadedRun) -> Iterator[str]:
    with serving(run, temperature_of(run.run_dir, "auto")) as found:
        yield found


@pytest.fixture
def client(address: str) -> Iterator[httpx.Client]:
    with httpx.Client(base_url=address, trust_env=False, timeout=30) as found:
        yield found


def asked(number: int) -> dict[str, Any]:
    """One question of the test split, as a request."""
    row = raw_row(200 + number)
    return {key: row[key] for key in ("id", "question", "opa", "opb", "opc", "opd")}


# --- answers --------------------------------------------------------------------------------------


def test_answers_are_those_of_the_run_at_its_temperature(client, run, trained_run):
    """One by one and many at once, the scores in predictions.parquet again."""
    temperature = temperature_of(trained_run, "run")
    expected = {
        p.id: np.exp(apply_temperature(np.array([p.scores]), temperature)[0])
        for p in read_predictions(trained_run, "test")
    }
    many = client.post("/predict", json={"questions": [asked(i) for i in range(24)]}).json()
    single = [client.post("/predict", json=asked(i)).json() for i in range(0, 24, 6)]
    assert [line["row"] for line in many["answers"]] == list(range(1, 25))
    for line in (*many["answers"], *single):
        probabilities = list(line["probabilities"].values())
        np.testing.assert_allclose(probabilities, expected[line["id"]], atol=1e-5)
        assert line["prediction"] == "ABCD"[int(np.argmax(expected[line["id"]]))]
    for answer in (many, *single):
        assert answer["temperature"] == temperature
        assert "no medical device" in answer["disclaimer"]


def test_bad_rows_are_told_in_their_place_and_the_rest_is_answered(client):
    rows = [asked(0), {"question": "?"}, 7, asked(1), {**asked(2), "opd": " "}]
    response = client.post("/predict", json={"questions": rows})
    assert response.status_code == 200
    lines = response.json()["answers"]
    assert ["error" in line for line in lines] == [False, True, True, False, True]
    assert "opa" in lines[1]["error"]
    assert "opd is empty" in lines[4]["error"]
    alone = client.post("/predict", json=rows[4])
    assert alone.status_code == 400
    assert alone.json()["error"] == lines[4]["error"]


class Slow:
    """A run that answers when it is let, and keeps count of how many questions came together."""

    def __init__(self) -> None:
        self.datamodule = SimpleNamespace(num_options=4)
        self.started, self.go_on = threading.Event(), threading.Event()
        self.blocks: list[int] = []
        self.fails = False

    def predict(self, questions):
        self.blocks.append(len(questions))
        self.started.set()
        assert self.go_on.wait(20)
        if self.fails:
            raise RuntimeError("out of\nmemory")
        scores = (math.log(0.7), *(math.log(0.1),) * 3)
        return [Prediction(q.id, "x", "", "single", None, scores) for q in questions]

    def shortens(self, question):
        return False


def test_requests_that_arrive_while_rows_are_scored_share_the_next_ones():
    """Twenty requests behind a first one are one block, and each gets its own answers back."""
    run = Slow()
    answers = AnswerThread(run)  # pyright: ignore[reportArgumentType]
    first = answers.ask([asked(0)])
    assert run.started.wait(10)
    others = [answers.ask([asked(i), {**asked(i), "id": f"second {i}"}]) for i in range(1, 21)]
    others[3].cancel()
    run.go_on.set()
    assert first.result(10)[0]["id"] == asked(0)["id"]
    for i, future in enumerate(others, start=1):
        if i != 4:
            ids = [line["id"] for line in future.result(10)]
            assert ids == [asked(i)["id"], f"second {i}"]
    assert run.blocks == [1, 38]
    answers.close()


def test_a_block_that_fails_costs_its_own_requests_alone():
    run = Slow()
    run.go_on.set()
    answers = AnswerThread(run)  # pyright: ignore[reportArgumentType]
    run.fails = True
    with pytest.raises(RuntimeError):
        answers.ask([asked(0)]).result(10)
    run.fails = False
    assert answers.ask([asked(1)]).result(10)[0]["prediction"] == "A"
    answers.close()
    with pytest.raises(BusyError, match="ending"):
        answers.ask([asked(1)])


def test_concurrent_requests_are_scored_in_fewer_blocks_and_as_if_alone(run):
    """Through the whole server: what shares rows with others has the scores it has alone."""
    counted = Counting(run)
    with serving(counted) as address, ThreadPoolExecutor(12) as pool:

        def ask(i: int) -> dict[str, Any]:
            return httpx.post(f"{address}/predict", json=asked(i), trust_env=False).json()

        found = list(pool.map(ask, [i % 24 for i in range(60)]))
    assert len(counted.blocks) < 45
    assert sum(counted.blocks) == 60
    assert max(counted.blocks) > 1
    alone = run.predict([read_back(i) for i in range(24)])
    for i, line in enumerate(found):
        expected = np.exp(alone[i % 24].scores)
        np.testing.assert_allclose(list(line["probabilities"].values()), expected, atol=1e-5)


class Counting:
    """A run that keeps count of what it is asked together."""

    def __init__(self, run: pipeline.LoadedRun) -> None:
        self._run = run
        self.blocks: list[int] = []

    def __getattr__(self, name: str) -> Any:
        return getattr(self._run, name)

    def predict(self, questions):
        self.blocks.append(len(questions))
        return self._run.predict(questions)


def read_back(i: int) -> Any:
    from medqlora.answering import check_row

    return check_row(1, asked(i), 4).question


# --- refusals -------------------------------------------------------------------------------------


def bad_requests(n: int) -> Iterator[tuple[str, str, dict[str, str], bytes]]:
    """Method, path, headers and body of requests that cannot be answered."""
    rng = random.Random(7)
    kind = {"Content-Type": "application/json"}
    good = json.dumps(asked(0)).encode()

    def mutated() -> bytes:
        body = bytearray(good)
        for _ in range(rng.randint(1, 6)):
            place = rng.randrange(len(body))
            body[place : place + rng.randint(0, 3)] = rng.randbytes(rng.randint(0, 3))
        return bytes(body)

    def value(depth: int = 0) -> Any:
        choices = [None, True, -1, 10**400, math.nan, math.inf, "", "x", "\ud800", "ä" * 500]
        if depth < 3:
            choices += [[value(depth + 1) for _ in range(rng.randint(0, 3))]]
            keys = ["question", "questions", "opa", "opb", "opc", "opd", "id", "subject_name"]
            choices += [{rng.choice(keys): value(depth + 1) for _ in range(rng.randint(0, 6))}] * 3
        return rng.choice(choices)

    makers = [
        lambda: ("POST", "/predict", kind, mutated()),
        lambda: ("POST", "/predict", kind, json.dumps(value()).encode()),
        lambda: ("POST", "/predict", kind, rng.randbytes(rng.randint(0, 200))),
        lambda: ("POST", "/predict", kind, good[: rng.randrange(len(good))]),
        lambda: ("POST", "/predict", kind, b"[" * 15_000),
        lambda: ("POST", "/predict", kind, b" " * 25_000),
        lambda: ("POST", "/predict", kind, json.dumps({"questions": [1] * 31}).encode()),
        lambda: ("POST", "/predict", {"Content-Type": "text/plain"}, good),
        lambda: ("POST", "/predict", {}, good),
        lambda: ("POST", "/predict", {**kind, "Origin": "http://evil.example"}, good),
        lambda: ("GET", "/", {"Host": "evil.example"}, b""),
        lambda: ("PUT", "/predict", kind, good),
        lambda: ("GET", "/../../etc/passwd", {}, b""),
        lambda: ("GET", f"/{rng.randbytes(8).hex()}", {}, b""),
    ]
    for i in range(n):
        yield makers[i % len(makers)]()


SLOW = (
    b"POST /pred",
    b"GET / HTTP/1.1\r\nHost: 127.0.0.1\r\nX-",
    b"POST /predict HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Type: application/json\r\n"
    b"Content-Length: 100\r\n\r\n{",
    b"",
)
RAW = (
    b"\x00\x01\x02\r\n\r\n",
    b"GET / HTTP/9.9\r\n\r\n",
    b"POST /predict HTTP/1.1\r\nHost: a\r\nHost: b\r\n\r\n",
    b"POST /predict HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Length: -5\r\n\r\n",
    b"GET / HTTP/1.1\r\nHost: 127.0.0.1\r\nX: " + b"x" * 100_000 + b"\r\n\r\n",
    b"GET / HTTP/1.1\r\nHost: 127.0.0.1\r\nUpgrade: websocket\r\nConnection: upgrade\r\n\r\n",
    b"POST /predict HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Type: application/json\r\n"
    b"Transfer-Encoding: chunked\r\n\r\nzz\r\n",
)


def test_a_thousand_bad_requests_leave_it_serving(client, address, caplog):
    """Fuzzed, too large, of wrong types, no UTF-8, slow, half: each is refused, nobody waits."""
    before = client.post("/predict", json=asked(3)).json()
    host, _, port = address.removeprefix("http://").partition(":")
    slow = [socket.create_connection((host, int(port))) for _ in range(32)]
    for i, connection in enumerate(slow):
        connection.sendall(SLOW[i % len(SLOW)])
    opened = time.monotonic()
    statuses: dict[int, int] = {}
    for method, path, headers, body in bad_requests(900):
        response = client.request(method, path, headers=headers, content=body)
        statuses[response.status_code] = statuses.get(response.status_code, 0) + 1
        if response.status_code != 200:
            answer = response.json()
            assert set(answer) <= {"error", "row", "id", "temperature", "disclaimer"}
            assert answer["error"]
            assert "\n" not in answer["error"]
            assert "Traceback" not in answer["error"]
    for i in range(70):
        with socket.create_connection((host, int(port))) as connection:
            connection.sendall(RAW[i % len(RAW)])
            if i % 2:
                connection.settimeout(10)
                assert connection.recv(100).startswith((b"HTTP/1.1 4", b"HTTP/1.1 2"))
    for connection in slow:
        connection.settimeout(10)
        end = connection.recv(4096)
        assert end == b"" or end.startswith((b"HTTP/1.1 408", b"HTTP/1.1 400")), end
        connection.close()
    assert time.monotonic() - opened < 60
    assert {400, 403, 404, 405, 413, 415} <= set(statuses)
    assert not [status for status in statuses if status >= 500]
    # A mutation may leave a question whole; most do not.
    assert statuses.get(200, 0) < 60
    after = client.post("/predict", json=asked(3)).json()
    np.testing.assert_allclose(
        list(after["probabilities"].values()), list(before["probabilities"].values()), atol=1e-5
    )
    assert "Traceback" not in caplog.text


@pytest.mark.parametrize(
    ("headers", "status"),
    [
        ({}, 200),
        ({"Host": "localhost:8000"}, 200),
        ({"Host": "[::1]:8000"}, 200),
        ({"Host": "192.168.1.5"}, 200),
        ({"Host": "rebound.example"}, 403),
        ({"Host": "127.0.0.1.rebound.example:8000"}, 403),
        ({"Host": "localhost.rebound.example"}, 403),
        ({"Host": "[::1"}, 403),
        ({"Host": ""}, 403),
        ({"Host": "localhost", "Origin": "http://localhost"}, 200),
        ({"Host": "localhost", "Origin": "null"}, 403),
        ({"Host": "localhost", "Origin": "http://localhost:81"}, 403),
        ({"Origin": "https://evil.example"}, 403),
    ],
)
def test_only_requests_of_this_machine_and_this_page_are_let_in(headers, status, client):
    """DNS rebinding: a name that is pointed at the loopback is still sent as Host."""
    response = client.get("/run", headers=headers)
    assert response.status_code == status
    assert "access-control-allow-origin" not in response.headers
    assert "default-src 'none'" in response.headers["content-security-policy"]


def test_who_asks_for_too_much_is_told_to_come_back():
    run = Slow()
    answers = AnswerThread(run, max_waiting=3)  # pyright: ignore[reportArgumentType]
    first = answers.ask([asked(0)])
    assert run.started.wait(10)
    answers.ask([asked(1)] * 3)
    with pytest.raises(BusyError, match="3 questions wait already"):
        answers.ask([asked(2)])
    run.go_on.set()
    assert first.result(10)
    answers.close()


def test_a_failure_of_the_device_is_one_line_and_the_next_request_is_answered(run):
    class Fails(Counting):
        def predict(self, questions):
            if questions[0].stem.startswith("boom"):
                raise RuntimeError("out of\nmemory")
            return super().predict(questions)

    with serving(Fails(run)) as address:
        bad = httpx.post(f"{address}/predict", json={**asked(0), "question": "boom"})
        assert bad.status_code == 500
        assert bad.json()["error"].endswith("RuntimeError: out of, memory")
        assert httpx.post(f"{address}/predict", json=asked(0)).status_code == 200


# --- the run it tells of --------------------------------------------------------------------------


def test_what_it_says_of_the_run_is_what_the_run_folder_says(client, trained_run):
    found = client.get("/run").json()
    metrics = read_run(trained_run).metrics
    section = metrics["test"]
    for name, group in section["by"]["subject_name"].items():
        said = found["subjects"][name]
        assert {key: said[key] for key in group} == group
        answers = [
            p.answer for p in read_predictions(trained_run, "test") if p.subject_name == name
        ]
        most = max(answers.count(letter) for letter in range(4))
        assert said["majority_accuracy"] == most / len(answers)
    assert found["overall"]["accuracy"] == section["accuracy"]
    assert found["overall"]["majority_accuracy"] == section["majority_accuracy"]
    assert found["name"] == trained_run.name
    assert found["temperature"] == temperature_of(trained_run, "run")
    assert str(trained_run.parent) not in json.dumps(found)


def test_a_run_without_val_or_scores_says_so(run, trained_run, tmp_path):
    bare = tmp_path / "bare"
    shutil.copytree(trained_run, bare)
    (bare / "predictions.parquet").unlink()
    assert temperature_of(bare, "auto") is None
    assert temperature_of(bare, None) is None
    with pytest.raises(CheckpointError):
        temperature_of(bare, "run")
    empty = {"n": None, "by": {"subject_name": {}}}
    metrics = {**run.metrics, "val": empty, "test": empty}
    unscored = pipeline.LoadedRun(bare, run.config, metrics, run.module, run.datamodule)
    found = describe_run(unscored, None)
    assert found["overall"] is None
    assert found["subjects"] == {}
    without_file = pipeline.LoadedRun(bare, run.config, run.metrics, run.module, run.datamodule)
    subjects = describe_run(without_file, None)["subjects"]
    assert {group["majority_accuracy"] for group in subjects.values()} == {None}


# --- the command ----------------------------------------------------------------------------------


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_ends_it_with_exit_code_0(number, trained_run, run_command):
    port = free_port()
    answers = []

    def visit() -> None:
        try:
            for _ in range(400):
                with contextlib.suppress(httpx.TransportError):
                    url = f"http://127.0.0.1:{port}/predict"
                    answers.append(httpx.post(url, json=asked(0), trust_env=False, timeout=30))
                    break
                time.sleep(0.05)
        finally:
            os.kill(os.getpid(), number)

    visitor = threading.Thread(target=visit)
    visitor.start()
    before = signal.getsignal(number)
    ended = run_command("serve", f"run={trained_run}", f"port={port}", "device=cpu")
    visitor.join()
    assert ended.code == 0, ended.err
    assert answers[0].status_code == 200
    assert f"http://127.0.0.1:{port}" in ended.out
    assert not ended.errors
    assert signal.getsignal(number) is before


@pytest.mark.parametrize(
    ("overrides", "word"),
    [
        ([], "run=runs/DAY/TIME"),
        (["run={tmp}"], "metrics.json"),
        (["run={run}", "port=70000"], "port=70000"),
        (["run={run}", "port={taken}"], "port=0"),
        (["run={run}", "host=0.0.0.0"], "public=true"),
        (["run={run}", "host=no.such.host.invalid"], "127.0.0.1"),
        (["run={run}", "timeout=0"], "timeout=0"),
        (["run={run}", "max_bytes=0"], "max_bytes=0"),
        (["run={run}", "temperature=2"], "temperature=2"),
        (["run={run}", "public=maybe"], "public=maybe"),
        (["run={run}", "device=tpu"], "device=tpu"),
    ],
)
def test_a_request_that_cannot_work_ends_in_one_line(
    overrides, word, trained_run, tmp_path, run_command
):
    with socket.create_server(("127.0.0.1", 0)) as taken:
        names = {"run": trained_run, "tmp": tmp_path, "taken": taken.getsockname()[1]}
        given = [override.format(**names) for override in overrides]
        if not any(word.startswith("port") for word in given):
            given.append("port=0")
        ended = run_command("serve", *given)
    assert ended.code == 2
    assert ended.out == ""
    assert len(ended.errors) == 1
    assert word in ended.errors[0]


def test_an_address_others_can_reach_needs_to_be_meant(caplog):
    with pytest.raises(ConfigError, match="without a login"):
        open_socket("0.0.0.0", 0)
    assert not caplog.records
    open_socket("0.0.0.0", 0, public=True).close()
    assert "without a login" in caplog.text
    caplog.clear()
    open_socket("localhost", 0).close()
    assert not caplog.records


# --- the page -------------------------------------------------------------------------------------

browser_only = pytest.mark.skipif(MISSING is not None, reason=str(MISSING))


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    window = Browser(free_port())
    yield window
    window.close()


@pytest.fixture
def page(browser: Browser, address: str) -> Browser:
    browser.resize(1000, 900)
    browser.visit(address)
    browser.wait("return document.querySelectorAll('#options input').length === 4")
    return browser


def shown(browser: Browser) -> list[str]:
    return browser.run("return [...document.querySelectorAll('#bars li')].map(e => e.innerText)")


TAB, ENTER = ("Tab", 9), ("Enter", 13)


@browser_only
def test_a_question_typed_with_the_keyboard_is_answered(page, client):
    """From the field that has the focus to the button; what is shown is what the server says."""
    question = asked(5)
    for key in ("question", "opa", "opb", "opc", "opd"):
        page.type(question[key])
        page.press(*TAB)
    assert page.run("return document.activeElement.id") == "subject"
    page.press(*TAB)
    assert page.run("return document.activeElement.type") == "submit"
    page.devtools("Input.dispatchKeyEvent", type="char", text="\r", key="Enter")
    page.press(*ENTER)
    page.wait("return !document.querySelector('#result').hidden")
    expected = client.post("/predict", json=question).json()
    lines = shown(page)
    for letter, line in zip("ABCD", lines, strict=True):
        assert line.startswith(letter)
        assert f"{100 * expected['probabilities'][letter]:.1f} %" in line
        assert question[f"op{letter.lower()}"] in line
        assert ("likeliest" in line) == (letter == expected["prediction"])
    time.sleep(0.3)  # the bars grow for a fifth of a second
    widths = page.run(
        "return [...document.querySelectorAll('.fill')].map(e => e.getBoundingClientRect().width"
        " / e.parentElement.getBoundingClientRect().width)"
    )
    assert sum(widths) == pytest.approx(1, abs=0.02)
    assert "Calibrated with the run's temperature" in page.run("return document.body.innerText")


@browser_only
def test_the_page_says_that_a_question_lost_its_beginning(page, client):
    question = asked(5) | {"question": "word " * 3000 + "which?"}
    told = client.post("/predict", json=question).json()
    assert told.get("shortened"), told
    for key in ("question", "opa", "opb", "opc", "opd"):
        name = "question" if key == "question" else None
        page.run(
            "const field = arguments[0] ? document.getElementById(arguments[0])"
            " : document.querySelectorAll('#options input')[arguments[1]];"
            "field.value = arguments[2];",
            name,
            "abcd".find(key[-1]),
            question[key],
        )
    page.run("document.querySelector('#ask').requestSubmit()")
    page.wait("return !document.querySelector('#result').hidden")
    assert "the beginning of its stem was not read" in page.run("return document.body.innerText")


@browser_only
@pytest.mark.parametrize(
    ("text", "stem"),
    [
        ("Which nerve? A) one B) two C) three D) four", "Which nerve?"),
        ("Which?\nA. one\nB. two\nC. three\nD. four\n\nAnswer: B", "Which?"),
        ("Which?\n(a) one, (b) two, (c) three, (d) four", "Which?"),
        ("Which?\r\n1) one\r\n2) two\r\n3) three\r\n4) four\r\nAns: 2", "Which?"),
        ("Lack of vitamin A. What? A. one B. two C. three D. four", "Lack of vitamin A. What?"),
        ("Group A: what? A: one B: two C: three D: four", "Group A: what?"),
        ("No options at all", None),
        ("Three? A) one B) two C) three", None),
        ("Empty? A) one B) C) three D) four", None),
    ],
)
def test_a_pasted_question_is_split_into_stem_and_options(text, stem, page):
    found = page.run("return split(arguments[0], 4)", text)
    options = ["one", "two", "three", "four"]
    assert found == (None if stem is None else {"stem": stem, "options": options})


@browser_only
def test_pasting_fills_the_options_and_ctrl_enter_answers(page):
    page.run(
        "const area = document.querySelector('#question'); area.focus();"
        "document.execCommand('insertText', false, 'Which? A) one B) two C) three D) <b>four</b>');"
        "area.dispatchEvent(new ClipboardEvent('paste'));"
    )
    page.wait("return document.querySelector('#option-D').value === '<b>four</b>'")
    assert page.run("return document.querySelector('#question').value") == "Which?"
    page.press(*ENTER, ctrl=True)
    page.wait("return !document.querySelector('#result').hidden")
    assert "<b>four</b>" in shown(page)[3]


@browser_only
def test_the_subject_shows_how_often_the_run_is_right(page, client):
    facts = client.get("/run").json()
    name, group = next(iter(facts["subjects"].items()))
    page.run(
        "const s = document.querySelector('#subject'); s.value = arguments[0];"
        "s.dispatchEvent(new Event('change'));",
        name,
    )
    rows = page.run(
        "return [...document.querySelectorAll('#trust tbody tr')].map(r => r.innerText)"
    )
    assert len(rows) == 2
    for text in (
        name,
        f"{100 * group['accuracy']:.1f} %",
        f"[{100 * group['ci_low']:.1f}, {100 * group['ci_high']:.1f}]",
        f"{100 * group['majority_accuracy']:.1f} %",
        str(group["n"]),
    ):
        assert text in rows[0]
    text = page.run("return document.body.innerText")
    assert facts["name"] in text
    assert "Not medical advice" in text
    assert facts["disclaimer"] in text


@browser_only
def test_a_problem_is_told_and_puts_the_focus_where_it_is(page):
    page.run("document.querySelector('#question').value = 'Which?'")
    page.run("document.querySelector('button[type=submit]').click()")
    assert (
        page.run("return document.querySelector('[role=alert]').innerText") == "Option A is empty."
    )
    assert page.run("return document.activeElement.id") == "option-A"
    long = "x " * 12_000
    page.run(
        "document.querySelector('#question').value = arguments[0];"
        "document.querySelectorAll('#options input').forEach(e => e.value = 'y');"
        "document.querySelector('button[type=submit]').click()",
        long,
    )
    page.wait("return document.querySelector('[role=alert]').innerText.includes('20000 bytes')")


@browser_only
@pytest.mark.parametrize(("width", "scheme"), [(360, "light"), (360, "dark"), (1280, "dark")])
def test_it_fits_a_narrow_screen_and_reads_in_light_and_dark(width, scheme, page):
    """WCAG 2.2, 1.4.3: 4.5 to 1 for text; nothing is wider than the window."""
    features = [{"name": "prefers-color-scheme", "value": scheme}]
    page.devtools("Emulation.setEmulatedMedia", features=features)
    page.resize(width, 800)
    page.run(
        "document.querySelector('#question').value = 'Which?';"
        "document.querySelectorAll('#options input').forEach(e => e.value = 'longword'.repeat(8));"
        "const s = document.querySelector('#subject'); s.selectedIndex = 1;"
        "s.dispatchEvent(new Event('change'));"
        "document.querySelector('button[type=submit]').click()"
    )
    page.wait("return !document.querySelector('#result').hidden")
    assert page.run("return document.documentElement.scrollWidth") <= width
    assert page.run("const e = document.querySelector('.scroll'); return e.scrollWidth") <= width
    contrasts = page.run(CONTRASTS)
    assert len(contrasts) > 10
    assert not [entry for entry in contrasts if entry[1] < 4.5], scheme
    page.devtools("Emulation.setEmulatedMedia", features=[])


CONTRASTS = """
const channels = text => text.match(/[\\d.]+/g).map(Number);
const light = ([r, g, b]) => [r, g, b].map(v => v / 255)
  .map(v => v <= 0.04045 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4)
  .reduce((sum, v, i) => sum + v * [0.2126, 0.7152, 0.0722][i], 0);
const behind = element => {
  for (let e = element; e; e = e.parentElement) {
    const color = channels(getComputedStyle(e).backgroundColor);
    if (color.length < 4 || color[3] > 0) return color;
  }
};
const hasText = e => [...e.childNodes].some(n => n.nodeType === 3 && n.data.trim());
return [...document.querySelectorAll('body *')]
  .filter(e => e.checkVisibility() && hasText(e))
  .map(e => {
    const pair = [light(channels(getComputedStyle(e).color)), light(behind(e))];
    pair.sort((a, b) => b - a);
    return [e.tagName + ' ' + e.innerText, (pair[0] + 0.05) / (pair[1] + 0.05)];
  });
"""


@browser_only
def test_it_asks_nobody_but_its_own_server_and_logs_no_error(page, address):
    page.requests()
    page.log("browser")
    page.visit(address)
    page.wait("return document.querySelectorAll('#options input').length === 4")
    urls = page.requests()
    assert len(urls) >= 4
    assert not [url for url in urls if not url.startswith((address, "data:"))]
    assert not [entry for entry in page.log("browser") if entry["level"] in ("SEVERE", "WARNING")]
