"""Secrets given by override or environment are in nothing that a run writes."""

from __future__ import annotations

import ast
import importlib
import json
import logging
from pathlib import Path

import pytest

from medqlora.masking import MASK, MaskingFormatter, is_secret_name, mask, masked
from tests.conftest import ROOT

TOKEN = "hf_" + "aB3" * 12
WANDB_KEY = "0123456789abcdef" * 2 + "01234567"
PASSWORD = "correct-horse-battery"


@pytest.mark.parametrize(
    "name",
    [
        "HF_TOKEN",
        "HUGGING_FACE_HUB_TOKEN",
        "WANDB_API_KEY",
        "MLFLOW_TRACKING_PASSWORD",
        "AWS_SECRET_ACCESS_KEY",
        "GOOGLE_CREDENTIALS",
        "my_secret",
        "apikey",
        "token",
        "logger.wandb.api_key",
    ],
)
def test_names_of_secrets_are_known(name):
    assert is_secret_name(name)


@pytest.mark.parametrize(
    "name",
    [
        "data.token_budget",
        "eval_token_budget",
        "TOKENIZERS_PARALLELISM",
        "bos_token",
        "pad_token",
        "tokens_per_second",
        "num_tokens",
        "of_key",
        "revision",
        "config_hash",
    ],
)
def test_names_of_other_things_are_not(name):
    assert not is_secret_name(name)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (f"login with {TOKEN} failed", f"login with {MASK} failed"),
        ("+wandb.api_key=abcdef123 seed=1", f"+wandb.api_key={MASK} seed=1"),
        ("'+hub.token=\"x y\"'", "'+hub.token=\"" + MASK + " y\"'"),
        ("http://me:pass@host:5000/x", f"http://me:{MASK}@host:5000/x"),
        ("https://u:p@h/?token=abc&b=1", f"https://u:{MASK}@h/?token={MASK}&b=1"),
        ("data.token_budget=2048 pad_token=<pad>", "data.token_budget=2048 pad_token=<pad>"),
        ("revision " + "0f" * 20, "revision " + "0f" * 20),
        ("http://host:5000/x", "http://host:5000/x"),
        ("a token: b", "a token: b"),
    ],
)
def test_a_text_keeps_all_but_its_secrets(text, expected):
    assert mask(text) == expected
    assert mask(expected) == expected


def test_values_of_the_environment_are_known_wherever_they_stand(monkeypatch):
    monkeypatch.setenv("WANDB_API_KEY", WANDB_KEY)
    monkeypatch.setenv("DATABASE_PASSWORD", PASSWORD)
    monkeypatch.setenv("SHORT_TOKEN", "abc")
    monkeypatch.setenv("SERVICE_CREDENTIALS", "/home/me/key.json")
    given = {
        "a": [f"x{WANDB_KEY}y", {"b": (PASSWORD, 3, None, True)}],
        "password": "hunter2",
        "token": None,
        "path": "/home/me/key.json",
        "word": "abc",
    }
    assert masked(given) == {
        "a": [f"x{MASK}y", {"b": (MASK, 3, None, True)}],
        "password": MASK,
        "token": None,
        "path": "/home/me/key.json",
        "word": "abc",
    }


def test_a_traceback_in_a_log_is_masked():
    try:
        raise ConnectionError(f"401 for {TOKEN}")
    except ConnectionError as error:
        raised = (type(error), error, None)
        record = logging.LogRecord("x", 40, "f", 1, "failed %s", (TOKEN,), raised)
    text = MaskingFormatter("%(message)s").format(record)
    assert "ConnectionError: 401 for ***" in text
    assert TOKEN not in text


def written(folder: Path, secrets: tuple[str, ...]) -> list[str]:
    """Files below a folder that hold one of the secrets."""
    return [
        f"{path.relative_to(folder)}: {secret}"
        for path in sorted(folder.rglob("*"))
        if path.is_file() and not path.is_symlink()
        for secret in secrets
        if secret.encode() in path.read_bytes()
    ]


@pytest.mark.parametrize("ending", ["completed", "failed"])
def test_no_file_of_a_run_holds_a_secret(
    ending, run_command, tiny_options, tmp_path, monkeypatch, tiny_gemma_folder
):
    """With W&B kept offline: its own files are searched as well, which hold the command line."""
    import wandb

    from medqlora import pipeline

    monkeypatch.setenv("HF_TOKEN", TOKEN)
    monkeypatch.setenv("DATABASE_PASSWORD", PASSWORD)
    monkeypatch.setenv("WANDB_API_KEY", WANDB_KEY)
    monkeypatch.setenv("WANDB_MODE", "offline")
    if ending == "failed":

        def broken(*args: object, **kwargs: object) -> None:
            raise RuntimeError(f"http://me:{PASSWORD}@host said: {TOKEN} is no good")

        monkeypatch.setattr(pipeline, "score", broken)
    typed = "typed-by-the-user-1234"
    options = [option for option in tiny_options if option != "logger=csv"]
    ended = run_command(
        "train",
        *options,
        "logger=wandb",
        f"+logger.wandb.api_key={typed}",
        f"logger.wandb.tags=[{PASSWORD},quick]",
        f"logger.wandb.entity={TOKEN}",
        "trainer.max_steps=1",
        "data.val_file=null",
        f"hydra.run.dir={tmp_path}/run",
    )
    wandb.teardown()
    assert ended.code == (0 if ending == "completed" else 1), ended.err
    metrics = json.loads((tmp_path / "run" / "metrics.json").read_text())
    assert metrics["status"] == ending
    assert f"+logger.wandb.api_key={MASK}" in metrics["command"]
    assert list((tmp_path / "run" / "wandb").glob("offline-run-*/*.wandb"))
    assert written(tmp_path / "run", (TOKEN, PASSWORD, WANDB_KEY, typed)) == []
    for secret in (TOKEN, PASSWORD, WANDB_KEY, typed):
        assert secret not in ended.out + ended.err


# --- the source -----------------------------------------------------------------------------------

SOURCES = sorted((ROOT / "medqlora").rglob("*.py"))
LOADERS_OF_CODE = {
    "pickle": {"load", "loads", "Unpickler"},
    "cloudpickle": {"load", "loads"},
    "dill": {"load", "loads"},
    "joblib": {"load"},
    "marshal": {"load", "loads"},
    "shelve": {"open"},
    "yaml": {"load", "load_all", "unsafe_load", "full_load", "unsafe_load_all", "full_load_all"},
    "os": {"system", "popen", "execv", "execve", "execvp"},
    "torch": set(),
}
TORCH_LOADERS = ("torch.load", "torch.hub.load", "torch.jit.load")


def dangers(source: str) -> list[str]:
    """Calls that run what they read, by line."""
    found = []
    for node in ast.walk(ast.parse(source)):
        if not isinstance(node, ast.Call):
            continue
        name = ast.unparse(node.func)
        words = {word.arg: word.value for word in node.keywords}
        module, _, function = name.rpartition(".")
        if name in ("eval", "exec", "compile", "__import__"):
            found.append(name)
        if function in LOADERS_OF_CODE.get(module, ()):
            found.append(name)
        safe = name == "torch.load" and _is_constant(words.get("weights_only"), True)
        if name in TORCH_LOADERS and not safe:
            found.append(name)
        if name in ("np.load", "numpy.load") and not _is_constant(
            words.get("allow_pickle", ast.Constant(False)), False
        ):
            found.append(f"{name}(allow_pickle)")
        if "trust_remote_code" in words and not _is_constant(words["trust_remote_code"], False):
            found.append(f"{name}(trust_remote_code)")
        if "shell" in words and not _is_constant(words["shell"], False):
            found.append(f"{name}(shell)")
        if function in ("from_pretrained", "from_config") and "Auto" in module:
            found += [] if "trust_remote_code" in words else [f"{name} without trust_remote_code"]
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.ImportFrom) and node.module in LOADERS_OF_CODE:
            names = {alias.name for alias in node.names}
            risky = LOADERS_OF_CODE[node.module] | {"load"}
            found += [f"from {node.module} import {name}" for name in sorted(names & risky)]
    return found


def _is_constant(node: ast.expr | None, value: bool) -> bool:
    return isinstance(node, ast.Constant) and node.value is value


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: str(path.relative_to(ROOT)))
def test_nothing_that_is_read_is_run(path):
    assert dangers(path.read_text()) == []


@pytest.mark.parametrize(
    ("line", "number"),
    [
        ("torch.load(f)", 1),
        ("torch.load(f, weights_only=False)", 1),
        ("torch.load(f, weights_only=True)", 0),
        ("pickle.loads(x)", 1),
        ("except_ = pickle.UnpicklingError", 0),
        ("from pickle import loads", 1),
        ("from torch import load", 1),
        ("yaml.load(x)", 1),
        ("yaml.safe_load(x)", 0),
        ("AutoModel.from_pretrained(x, trust_remote_code=True)", 1),
        ("AutoModel.from_pretrained(x)", 1),
        ("AutoModel.from_pretrained(x, trust_remote_code=False)", 0),
        ("f(trust_remote_code=flag)", 1),
        ("eval('1')", 1),
        ("model.eval()", 0),
        ("subprocess.run(x, shell=True)", 1),
        ("np.load(x, allow_pickle=True)", 1),
        ("np.load(x)", 0),
    ],
)
def test_the_search_itself_finds_what_it_is_for(line, number):
    assert len(dangers(line)) == number


def test_modules_named_in_the_source_are_imported_by_literal_names_only():
    """`importlib.import_module(name)` of a name that was read would run somebody's file."""
    assert importlib  # what is searched for
    for path in SOURCES:
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Call) and ast.unparse(node.func).endswith("import_module"):
                assert isinstance(node.args[0], ast.Constant), f"{path}, line {node.lineno}"
