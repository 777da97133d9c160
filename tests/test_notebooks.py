"""The notebooks run top to bottom on a run, define nothing, and are committed as they came out."""

from __future__ import annotations

import ast
import re
from pathlib import Path
from typing import Any

import nbformat
import pytest
from nbclient import NotebookClient

from medqlora.config import compose
from medqlora.evaluate import evaluate
from medqlora.evaluation.ablation import analyse, read_sweep
from tests.conftest import ROOT
from tests.fake_runs import base_config, write_run

FOLDER = ROOT / "notebooks"
NAMES = ("inspect_checkpoint", "compare_runs", "quantization_error", "data_tour")
MACHINE = re.compile(
    r"(?<![\w.])/(?:home|root|tmp|usr|work|opt|Users|mnt)\b|site-packages|\b[A-Z]:\\\w"
)


def read(name: str) -> Any:
    return nbformat.read(FOLDER / f"{name}.ipynb", as_version=4)


def code_cells(book: Any) -> list[Any]:
    return [cell for cell in book.cells if cell.cell_type == "code"]


def python_of(cell: Any) -> str:
    return "\n".join(line for line in cell.source.splitlines() if not line.startswith("%"))


def test_every_notebook_is_one_of_these_and_has_its_place_in_the_docs():
    assert {path.stem for path in FOLDER.glob("*.ipynb")} == set(NAMES)
    page = (ROOT / "docs" / "notebooks.md").read_text()
    for name in NAMES:
        assert f"{name}.ipynb" in page


@pytest.fixture(scope="module")
def runs(trained_run: Path, tiny_options: list[str], tmp_path_factory) -> Path:
    """A folder with a trained run and its bare base, as a sweep leaves them."""
    folder = tmp_path_factory.mktemp("runs")
    (folder / "trained").symlink_to(trained_run)
    foreign = ("logger", "callbacks", "baselines")
    options = [option for option in tiny_options if not option.startswith(foreign)]
    cfg = compose("evaluate", [*options, "quant=nf4_fp32", "peft=none", "evaluate.figures=false"])
    evaluate(cfg, folder / "base")
    return folder


def test_each_notebook_runs_top_to_bottom_on_a_run(runs, trained_run, monkeypatch):
    """In one kernel, whose names are cleared between them: only the imports are shared."""
    monkeypatch.setenv("MEDQLORA_RUN", str(trained_run))
    monkeypatch.setenv("MEDQLORA_RUNS", str(runs))
    cells: list[Any] = []
    for name in NAMES:
        cells += [nbformat.v4.new_code_cell("%reset -f"), *code_cells(read(name))]
    for cell in cells:
        cell.outputs = []
    book = nbformat.v4.new_notebook(cells=cells)
    client = NotebookClient(
        book, timeout=300, kernel_name="python3", resources={"metadata": {"path": str(FOLDER)}}
    )
    client.execute()  # raises the error of a cell with its source
    said = [o.get("text", "") for c in cells for o in c.outputs if o.output_type == "stream"]
    assert not [text for text in said if "Traceback" in text]
    figures = [o for c in cells for o in c.outputs if "image/png" in o.get("data", {})]
    assert len(figures) >= 15
    shown = [o.get("data", {}).get("text/markdown", "") for c in cells for o in c.outputs]
    assert any("p (Holm)" in table for table in shown)
    assert any("wrong → right" in table or "right → wrong" in table for table in shown)


def test_the_baseline_is_not_compared_with_itself_where_it_is_the_best(tmp_path):
    """The cell compares it with the best of the others."""
    config = base_config()
    for number, skill in enumerate((3.0, 0.1, 0.4)):
        own = {**config, "peft": {**config["peft"], "r": 4 * 2**number}}
        write_run(tmp_path / str(number), own, skill=skill, choices={"peft": f"lora_r{number}"})
    ablation = analyse(read_sweep(tmp_path))
    assert max(ablation.settings, key=lambda s: s.accuracy).name == ablation.baseline
    [line] = [
        line
        for cell in code_cells(read("compare_runs"))
        for line in cell.source.splitlines()
        if line.startswith("best = ")
    ]
    names = {"ablation": ablation, "baseline": ablation.baseline}
    exec(line, names)
    assert names["best"] == "lora_r2"


@pytest.mark.parametrize("name", ["compare_runs", "quantization_error"])
def test_a_notebook_that_tests_says_that_the_exact_test_decides(name):
    """A bootstrap interval leaves out 0 at p = 0.06 where five questions differ."""
    texts = [cell.source for cell in read(name).cells if cell.cell_type == "markdown"]
    said = " ".join(" ".join(texts).split())
    assert "test decides" in said
    assert "narrow where few questions differ" in said or "few questions that differ" in said
    assert "An interval that holds 0 is no difference" not in said


@pytest.mark.parametrize("name", NAMES)
def test_a_notebook_defines_nothing_that_belongs_in_the_package(name):
    for cell in code_cells(read(name)):
        for node in ast.walk(ast.parse(python_of(cell))):
            kinds = (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)
            assert not isinstance(node, kinds), ast.unparse(node)


@pytest.mark.parametrize("name", NAMES)
def test_committed_outputs_are_whole_and_say_nothing_of_the_machine(name):
    book = read(name)
    cells = code_cells(book)
    assert [cell.execution_count for cell in cells] == list(range(1, len(cells) + 1))
    num_figures = 0
    for output in (output for cell in cells for output in cell.outputs):
        assert output.output_type in ("stream", "display_data", "execute_result"), output
        assert output.get("name") != "stderr", output.text
        texts = [output.get("text", "")]
        for kind, value in output.get("data", {}).items():
            num_figures += kind == "image/png"
            texts += [] if kind == "image/png" else [value]
        for text in texts:
            assert not MACHINE.search(text), MACHINE.search(text)
    assert num_figures >= 2
    assert (FOLDER / f"{name}.ipynb").stat().st_size < 700_000
    assert not MACHINE.search("".join(cell.source for cell in book.cells))
