"""Every command of the README and of docs/ is one that the package knows."""

from __future__ import annotations

import importlib.util
import re
import shlex

import pytest

from medqlora.config import compose
from tests.conftest import ROOT

README = (ROOT / "README.md").read_text()
PAGES = [README, *(path.read_text() for path in sorted((ROOT / "docs").glob("*.md")))]
COMMANDS = sorted(
    {
        line.split("#")[0].strip()
        for page in PAGES
        for block in re.findall(r"```bash\n(.*?)```", page, re.DOTALL)
        for line in block.replace("\\\n", " ").splitlines()
        if line.startswith("python -m medqlora.")
    }
)


def test_the_readme_shows_commands():
    assert len(COMMANDS) >= 6


@pytest.mark.parametrize("command", COMMANDS)
def test_a_command_of_the_readme_or_of_the_docs_composes(command):
    words = shlex.split(command)[2:]
    verb = words[0].removeprefix("medqlora.")
    assert importlib.util.find_spec(words[0]) is not None
    # Of the values that a sweep lists, the first stands for all; an interval is none of them.
    overrides = [word.split(",")[0] for word in words[1:] if word != "-m" and "(" not in word]
    if importlib.util.find_spec("hydra_plugins.hydra_ray_launcher") is None:
        of_ray = ("hydra/launcher=ray", "hydra.launcher.ray.", "+hydra.launcher.ray.")
        overrides = [word for word in overrides if not word.startswith(of_ray)]
    compose(verb, overrides)


@pytest.mark.parametrize("target", re.findall(r"^make (\w+)", "\n".join(PAGES), re.MULTILINE))
def test_a_make_target_of_the_readme_exists(target):
    assert re.search(rf"^{target}:", (ROOT / "Makefile").read_text(), re.MULTILINE)


def test_files_that_the_readme_links_to_are_there():
    for link in re.findall(r"\]\((?!http)([^)#]+)\)", README):
        assert (ROOT / link).exists(), link


def test_the_table_shows_every_accuracy_with_interval_baseline_and_n():
    table = re.search(r"```text\n(.*?)```", README, re.DOTALL)
    assert table is not None
    rows = [
        line
        for line in table[1].splitlines()
        if re.search(r"\d\.\d %", line) and "Wilson" not in line
    ]
    assert len(rows) == 3
    for row in rows:
        assert re.search(r"\d+\.\d %\s+\[\d+\.\d, \d+\.\d\]\s+\d+\.\d %\s+\d+", row), row
