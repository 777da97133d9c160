"""Imports point down: schema, then the four modules side by side, fine-tuning, pipeline, verbs."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

PACKAGE = Path(__file__).resolve().parent.parent / "medqlora"
SOURCES = sorted(PACKAGE.rglob("*.py"))

LAYERS = {
    0: {"schema", "errors", "config", "hub", "assets", "processes", "masking", "options"},
    1: {"data", "quantization", "acceleration", "evaluation", "tracking"},
    2: {"finetuning"},
    3: {
        "instantiation",
        "pipeline",
        "foreign",
        "entry",
        "search",
        "runs",
        "budget",
        "answering",
        "web",
        "inspection",
    },
    4: {
        "train",
        "evaluate",
        "predict",
        "serve",
        "benchmark",
        "export",
        "report",
        "audit",
        "doctor",
    },
}
"""Parts of the package by layer; the last one holds a file for each verb."""

SAME_LAYER = {
    ("hub", "errors"),
    ("hub", "config"),
    ("entry", "foreign"),
    ("processes", "errors"),
    ("options", "errors"),
    ("pipeline", "instantiation"),
    ("runs", "pipeline"),
    ("runs", "entry"),
    ("budget", "instantiation"),
    ("budget", "pipeline"),
    ("budget", "runs"),
    ("answering", "pipeline"),
    ("answering", "entry"),
    ("inspection", "instantiation"),
    ("inspection", "pipeline"),
    ("web", "answering"),
    ("web", "entry"),
}
"""Imports within a layer that are meant; the parts of layers 1 and 4 never import one another."""

ONLY = {
    "finetuning": {
        *LAYERS[0],
        "acceleration",
        "evaluation.scoring",
        "evaluation.metrics",
    },  # is given a model and data, never loads them
    "tracking": {"errors", "masking"},
    "masking": set(),
    "assets": set(),
    "schema": set(),
    "errors": set(),
    "options": {"errors"},
}
"""What little a part may import of what is below it."""


def layer_of(part: str) -> int:
    return next(layer for layer, parts in LAYERS.items() if part in parts)


def part_of(path: Path) -> str:
    """The part a file belongs to: a package, or a file at the top."""
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


def imported(source: str) -> Iterator[list[str]]:
    """Every import of this package, also inside functions, as the names below `medqlora`."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.level:
            raise AssertionError(f"line {node.lineno}: a relative import; write medqlora.…")
        elif isinstance(node, ast.ImportFrom):
            names = [f"{node.module}.{alias.name}" for alias in node.names]
        else:
            continue
        for name in names:
            if name.split(".")[0] == "medqlora":
                yield name.split(".")[1:]


def violations(part: str, source: str) -> list[str]:
    """What a file of `part` imports against the direction."""
    found = []
    for names in imported(source):
        if not names or names[0] in ("__version__", part):
            continue
        other = names[0]
        allowed = layer_of(other) < layer_of(part) or (part, other) in SAME_LAYER
        if part in ONLY:
            allowed = bool({other, ".".join(names[:2])} & ONLY[part])
        if not allowed:
            found.append(f"{part} imports medqlora.{'.'.join(names)}")
    return found


@pytest.mark.parametrize(
    "path",
    [path for path in SOURCES if path.parent != PACKAGE or path.stem != "__init__"],
    ids=lambda path: str(path.relative_to(PACKAGE)),
)
def test_imports_point_down(path):
    assert violations(part_of(path), path.read_text()) == []


@pytest.mark.parametrize(
    ("part", "line", "allowed"),
    [
        ("data", "from medqlora.evaluation import metrics", False),
        ("data", "import medqlora.pipeline", False),
        ("data", "from medqlora import finetuning", False),
        ("data", "def f():\n    from medqlora.quantization import load_base", False),
        ("data", "from medqlora.schema import Question", True),
        ("finetuning", "from medqlora.evaluation.scoring import letter_scores", True),
        ("finetuning", "from medqlora.evaluation.results import read_run", False),
        ("finetuning", "from medqlora.data import letter_ids", False),
        ("tracking", "from medqlora.schema import Question", False),
        ("errors", "from medqlora.schema import Question", False),
        ("train", "from medqlora.evaluate import evaluate", False),
        ("train", "from medqlora import runs", True),
        ("pipeline", "from medqlora.runs import RunRecord", False),
    ],
)
def test_the_rule_itself_tells_up_from_down(part, line, allowed):
    assert (violations(part, line) == []) is allowed


def test_only_one_module_makes_objects_from_yaml_and_nothing_below_it_knows_hydra():
    for path in SOURCES:
        text, part = path.read_text(), part_of(path)
        if part != "instantiation":
            assert "instantiate(" not in text, path
        # config.py composes for notebooks and tests; it makes nothing.
        if part not in ("config", "__init__") and layer_of(part) < 3:
            for node in ast.walk(ast.parse(text)):
                if isinstance(node, ast.Import):
                    names = [alias.name for alias in node.names]
                elif isinstance(node, ast.ImportFrom):
                    names = [node.module or ""]
                else:
                    continue
                for name in names:
                    assert name.split(".")[0] not in ("hydra", "omegaconf"), path


def test_init_files_only_reexport():
    for path in PACKAGE.glob("*/__init__.py"):
        for node in ast.parse(path.read_text()).body:
            docstring = isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant)
            exported = isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "__all__"
            future = isinstance(node, (ast.Import, ast.ImportFrom))
            assert docstring or exported or future, f"{path}, line {node.lineno}"


def test_no_file_shadows_the_standard_library():
    """Run as a script, a neighbour would import it in place of the module it means."""
    assert not {path.stem for path in SOURCES} & {"inspect", "types", "tokenize"}


def test_every_part_has_a_layer():
    """A new or renamed part must not slip past the rule."""
    parts = {part_of(path) for path in SOURCES} - {"__init__"}
    known = set().union(*LAYERS.values())
    assert parts <= known
    assert known - parts <= LAYERS[4], "these are gone"
