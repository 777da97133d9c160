"""Tables for the terminal and for Markdown.

No accuracy is shown without baseline, n and interval: every function takes a whole section of
metrics.json, never a bare number.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from rich.box import SIMPLE_HEAD
from rich.table import Table
from rich.text import Text

from medqlora.evaluation.results import RunResult
from medqlora.evaluation.statistics import Comparison

SMALL = 30
"""Groups with fewer questions are greyed out: their interval spans a third or more."""

UNKNOWN = "-"


@dataclass(frozen=True, slots=True)
class ResultRow:
    """One line of a table of results.

    Attributes:
        name: What was measured, such as "base, NF4".
        section: `val` or `test` of metrics.json (`metrics.summarise`); None where nothing was
            scored.
        size_gb: Weights in 10^9 bytes.
        seconds: Time it took.
        extra: More columns, by heading; the same headings in every row.
        error: Why there is no result.
        ending: How it ended, if it did not complete; "failed" where there is only an `error`.
    """

    name: str
    section: Mapping[str, Any] | None
    size_gb: float | None = None
    seconds: float | None = None
    extra: Mapping[str, str] = field(default_factory=dict)
    error: str | None = None
    ending: str | None = None


def result_row(run: RunResult, split: str = "test", name: str | None = None) -> ResultRow:
    """The row of a run: its accuracy on a split, the size of its weights, its time."""
    return ResultRow(
        name=name or run.name,
        section=run.metrics[split],
        size_gb=run.metrics["model"]["weight_gb"],
        seconds=run.metrics["wall_seconds"],
        error=run.error if run.status != "completed" else None,
        ending=run.ending if run.status != "completed" else None,
    )


def _percent(fraction: float) -> str:
    """A fraction in percent with one decimal."""
    return f"{100 * fraction:.1f}"


def accuracy_text(section: Mapping[str, Any]) -> str:
    """Accuracy with everything needed to believe it.

    Args:
        section: `val` or `test` of metrics.json.

    Returns:
        "61.3 % [57.4, 65.1]  majority 27.0 %  n=600", or what is missing instead.

    Raises:
        ValueError: If the accuracy comes without interval, baseline or n.
    """
    accuracy, interval, baseline, n = accuracy_cells(section)
    return f"{accuracy} {interval}  majority {baseline}  n={n}" if interval else accuracy


def accuracy_cells(section: Mapping[str, Any]) -> tuple[str, str, str, str]:
    """Accuracy, interval, majority baseline and n as texts; the first says why where there is none.

    Raises:
        ValueError: If the accuracy comes without interval, baseline or n.
    """
    if section.get("accuracy") is None:
        unlabelled = section.get("num_unlabelled")
        if unlabelled:
            return "no labels", "", "", "0"
        return "not scored", "", "", str(section.get("n") or 0)
    lacking = [
        key for key in ("n", "ci_low", "ci_high", "majority_accuracy") if section.get(key) is None
    ]
    if lacking:
        raise ValueError(f"An accuracy without {', '.join(lacking)} is not shown.")
    return (
        f"{_percent(section['accuracy'])} %",
        _interval(section),
        f"{_percent(section['majority_accuracy'])} %",
        str(section["n"]),
    )


def result_table(rows: Sequence[ResultRow], title: str | None = None) -> Table:
    """A rich table of results: accuracy and interval beside the majority baseline and n.

    Args:
        rows: One line each; a failed one shows its error.
        title: Heading of the table.

    Returns:
        The table, for `rich.print`.
    """
    headings, cells = _result_cells(rows)
    errors = [f"{row.name}: {row.error}" for row in rows if row.error]
    table = _table(headings, title, "\n".join([_CAPTION, *errors]))
    for row, texts in zip(rows, cells, strict=True):
        table.add_row(*(Text(text) for text in texts), style="dim" if _failed(row) else None)
    return table


def result_markdown(rows: Sequence[ResultRow]) -> str:
    """The same table in Markdown."""
    headings, cells = _result_cells(rows)
    cells = [
        [f"{texts[0]} ({row.error})" if row.error else texts[0], *texts[1:]]
        for row, texts in zip(rows, cells, strict=True)
    ]
    return _markdown(headings, cells) + f"\n{_CAPTION}\n"


def breakdown_table(
    section: Mapping[str, Any], name: str = "subject_name", title: str | None = None
) -> Table:
    """A rich table of one breakdown: each group with n and interval, dim below 30 questions.

    Args:
        section: `val` or `test` of metrics.json.
        name: Key of `by`, such as "subject_name".
        title: Heading; the key if None.

    Returns:
        The table; its last line is the whole split with its majority baseline.
    """
    note = f"95 % Wilson intervals; dim: fewer than {SMALL} questions"
    headings = [_heading(name), "accuracy", "95 % interval", "n"]
    table = _table(headings, title or f"by {_heading(name)}", note)
    for cells, small in _breakdown_cells(section, name):
        table.add_row(*(Text(cell) for cell in cells), style="dim" if small else None)
    table.add_section()
    table.add_row(*(Text(cell) for cell in _total_cells(section)), style="bold")
    return table


def breakdown_markdown(section: Mapping[str, Any], name: str = "subject_name") -> str:
    """The same breakdown in Markdown; small groups in italics."""
    rows = [
        [f"*{cell}*" if small else cell for cell in cells]
        for cells, small in _breakdown_cells(section, name)
    ]
    headings = [_heading(name), "accuracy", "95 % interval", "n"]
    note = f"95 % Wilson intervals; in italics: fewer than {SMALL} questions."
    return _markdown(headings, [*rows, _total_cells(section)]) + f"\n{note}\n"


def comparison_table(comparisons: Sequence[Comparison], title: str | None = None) -> Table:
    """A rich table of paired comparisons: accuracies, difference with interval, p-values, n."""
    headings, cells = _comparison_cells(comparisons)
    table = _table(headings, title, methods_text(comparisons))
    for texts in cells:
        table.add_row(*(Text(text) for text in texts))
    return table


def comparison_markdown(comparisons: Sequence[Comparison]) -> str:
    """The same table in Markdown."""
    return _markdown(*_comparison_cells(comparisons)) + f"\n{methods_text(comparisons)}\n"


def methods_text(comparisons: Sequence[Comparison]) -> str:
    """What p-values and intervals are, and which of them decides where they disagree."""
    methods = "; ".join(dict.fromkeys(comparison.method for comparison in comparisons))
    return f"{methods}. {_DECIDES}" if "bootstrap" in methods else f"{methods}."


def text_table(
    headings: Sequence[str], rows: Sequence[Sequence[str]], title: str | None, caption: str
) -> Table:
    """A rich table of texts, the first column to the left; no accuracy goes through here."""
    table = _table(headings, title, caption)
    for texts in rows:
        table.add_row(*(Text(text) for text in texts))
    return table


def text_markdown(headings: Sequence[str], rows: Sequence[Sequence[str]], caption: str) -> str:
    """The same table in Markdown."""
    return _markdown(headings, rows) + f"\n{caption}\n"


_DECIDES = (
    "Where they disagree the exact test decides: the bootstrap interval is too narrow where few "
    "questions differ."
)
_CAPTION = "Intervals are 95 % Wilson; majority: always giving the most frequent answer letter."


def _table(headings: Sequence[str], title: str | None, caption: str) -> Table:
    """An empty table; in a narrow terminal cells fold and never lose a digit."""
    table = Table(
        title=None if title is None else Text(title),
        caption=Text(caption),
        title_justify="left",
        caption_justify="left",
        box=SIMPLE_HEAD,
        show_edge=False,
        pad_edge=False,
    )
    for index, heading in enumerate(headings):
        table.add_column(
            Text(heading),
            justify="left" if index == 0 else "right",
            overflow="fold",
        )
    return table


def _failed(row: ResultRow) -> bool:
    return row.error is not None or row.ending is not None or row.section is None


def _result_cells(rows: Sequence[ResultRow]) -> tuple[list[str], list[list[str]]]:
    extra = list(dict.fromkeys(heading for row in rows for heading in row.extra))
    headings = ["", "accuracy", "95 % interval", "majority", "n", "size GB", "seconds", *extra]
    cells = []
    for row in rows:
        accuracy = accuracy_cells(row.section or {})
        if not accuracy[1] and (row.error or row.ending):
            accuracy = (row.ending or "failed", *accuracy[1:])
        cells.append(
            [
                row.name,
                *(text or UNKNOWN for text in accuracy),
                UNKNOWN if row.size_gb is None else f"{row.size_gb:.3g}",
                UNKNOWN if row.seconds is None else f"{row.seconds:.1f}",
                *(row.extra.get(heading, UNKNOWN) for heading in extra),
            ]
        )
    used = [
        column
        for column in range(len(headings))
        if column < 5 or any(texts[column] != UNKNOWN for texts in cells)
    ]
    return [headings[c] for c in used], [[texts[c] for c in used] for texts in cells]


def _breakdown_cells(section: Mapping[str, Any], name: str) -> list[tuple[list[str], bool]]:
    rows = []
    for group, values in section["by"].get(name, {}).items():
        cells = [group, f"{_percent(values['accuracy'])} %", _interval(values), str(values["n"])]
        rows.append((cells, values["n"] < SMALL))
    return rows


def _total_cells(section: Mapping[str, Any]) -> list[str]:
    accuracy, interval, baseline, n = accuracy_cells(section)
    return [f"all (majority {baseline or UNKNOWN})", accuracy, interval or UNKNOWN, n]


def _comparison_cells(comparisons: Sequence[Comparison]) -> tuple[list[str], list[list[str]]]:
    pairs = [_names(c) for c in comparisons]
    references = {name_a for name_a, _ in pairs}
    # Many against one: it stands in the heading instead of in every row.
    shared = references.pop() if len(pairs) > 1 and len(references) == 1 else None
    first = "comparison" if shared is None else f"against {shared}"
    headings = [first, "accuracy", "difference", "95 % interval", "p", "p (Holm)", "n"]
    cells = []
    for c, (name_a, name_b) in zip(comparisons, pairs, strict=True):
        cells.append(
            [
                f"{name_b} vs {name_a}" if shared is None else name_b,
                f"{_percent(c.accuracy_b)} vs {_percent(c.accuracy_a)} %",
                f"{100 * c.difference:+.1f}",
                f"[{100 * c.ci_low:+.1f}, {100 * c.ci_high:+.1f}]",
                _p_value(c.p_value),
                UNKNOWN if c.p_holm is None else _p_value(c.p_holm),
                str(c.n),
            ]
        )
    return headings, cells


def _names(comparison: Comparison) -> tuple[str, str]:
    """The names of both, with their numbers of seeds where seeds were compared."""
    c = comparison
    if c.only_a is not None:
        return c.name_a, c.name_b
    return (
        f"{c.name_a} ({c.num_seeds_a} seed{'s'[: c.num_seeds_a > 1]})",
        f"{c.name_b} ({c.num_seeds_b} seed{'s'[: c.num_seeds_b > 1]})",
    )


def _interval(values: Mapping[str, Any]) -> str:
    return f"[{_percent(values['ci_low'])}, {_percent(values['ci_high'])}]"


def _p_value(p: float) -> str:
    return "< 0.001" if p < 0.001 else f"{p:.3f}"


def _heading(name: str) -> str:
    return name.removesuffix("_name").replace("_", " ")


def _markdown(headings: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    def line(cells: Sequence[str]) -> str:
        return "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |\n"

    rule = "|---|" + "---:|" * (len(headings) - 1) + "\n"
    return line(headings) + rule + "".join(line(row) for row in rows)
