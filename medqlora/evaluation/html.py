"""One self-contained page of a sweep: works from a file, without network, in light, dark and print.

Drawn as inline SVG; a short script (`page/report.js`) sorts, filters and shows tooltips. Everything
that comes from a run folder is escaped, and the page's own policy forbids it to load anything.
"""

from __future__ import annotations

import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from html import escape
from pathlib import Path
from typing import Any
from urllib.parse import quote

from medqlora.evaluation.ablation import Ablation, Effect, Entry, Setting, pareto_front
from medqlora.evaluation.search_figures import Trial, goodness, importances, scales, trials_of
from medqlora.evaluation.statistics import Comparison
from medqlora.evaluation.sweep_figures import (
    KINDS,
    Value,
    curve_interval,
    curve_sizes,
    curves,
    is_scored,
    label_lines,
    label_places,
    milliseconds,
    num_options,
    num_trainable,
    subject_table,
    weight_gb,
)
from medqlora.evaluation.tables import SMALL, UNKNOWN, methods_text

MAX_LABELS = 8
"""Points of a scatter that all have a label; of more, those of the Pareto front."""

MAX_DOTS = 12
"""Points of a learning curve that each have a dot; more are a line alone."""

_PAGE = Path(__file__).parent / "page"
_POLICY = "default-src 'none'; style-src 'unsafe-inline'; script-src 'unsafe-inline'; img-src data:"


@dataclass(frozen=True)
class PublishedRow:
    """A published number with ours.

    Attributes:
        quantity: What was measured.
        published: Its published value.
        ours: Our values, before and after or one alone, each with the setting it was measured on.
        remark: What ours are of.
    """

    quantity: str
    published: str
    ours: Sequence[tuple[str, Setting | None]]
    remark: str

    @property
    def text(self) -> str:
        """Our values in one text."""
        return " to ".join(text for text, _ in self.ours)


@dataclass(frozen=True)
class Published:
    """A published result to put beside the runs.

    Attributes:
        title: What it is.
        source: Where the numbers come from, and that they were not measured here.
        rows: Its numbers with ours.
        notes: What the numbers mean.
    """

    title: str
    source: str
    rows: Sequence[PublishedRow] = ()
    notes: Sequence[str] = ()


@dataclass
class _Page:
    """What every part of the page needs."""

    ablation: Ablation
    folder: Path
    index: dict[str, int] = field(default_factory=dict)

    def href(self, entry: Entry) -> str:
        """Relative link to a run folder, which holds where the page and the runs move together."""
        relative = os.path.relpath(entry.run.run_dir.resolve(), self.folder.resolve())
        return quote(Path(relative).as_posix()) + "/"

    def number(self, setting: str) -> int:
        """A number for each setting, which ties its points to its rows."""
        return self.index.setdefault(setting, len(self.index))


def report_page(
    ablation: Ablation,
    folder: str | Path,
    *,
    title: str,
    command: str,
    published: Published | None = None,
) -> str:
    """The page.

    Args:
        ablation: What `analyse` returned.
        folder: Where the page will lie; links to run folders are relative to it.
        title: Heading, such as the name of the sweep.
        command: The command that makes the report again.
        published: A published result to compare with.

    Returns:
        HTML.
    """
    page = _Page(ablation, Path(folder))
    sections = [
        ("runs", "Runs", _runs(page)),
        ("search", "Search", _search(page)),
        ("costs", "Accuracy and cost", _costs(page)),
        ("settings", "Settings and paired differences", _settings(page)),
        ("effects", "Main effects", _effects(page)),
        ("curves", "Learning curves", _learning(page)),
        ("subjects", "Subjects", _subjects(page)),
        ("published", published.title if published else "", _published(page, published)),
        ("notes", "How to read this", _notes(page, command)),
    ]
    sections = [section for section in sections if section[2]]
    links = "".join(f'<a href="#{key}">{escape(head)}</a>' for key, head, _ in sections)
    body = "".join(
        f'<section id="{key}"><h2>{escape(head)}</h2>{text}</section>'
        for key, head, text in sections
    )
    style = (_PAGE / "report.css").read_text(encoding="utf-8")
    script = (_PAGE / "report.js").read_text(encoding="utf-8")
    return (
        '<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f'<meta http-equiv="Content-Security-Policy" content="{_POLICY}">\n'
        '<link rel="icon" href="data:,">\n'
        f"<title>{escape(title)}</title>\n<style>\n{style}</style>\n</head>\n<body>\n"
        f"<header><h1>{escape(title)}</h1>{_summary(page)}<nav>{links}</nav></header>\n"
        f'<main>{_cards(page)}{body}</main>\n<div id="tip" role="tooltip" hidden></div>\n'
        f"<script>\n{script}</script>\n</body>\n</html>\n"
    )


# --- header ---------------------------------------------------------------------------------------


def _summary(page: _Page) -> str:
    entries = page.ablation.entries
    completed = sum(e.run.status == "completed" for e in entries)
    rest = len(entries) - completed
    names = dict.fromkeys(
        f"{e.run.metrics['data']['name']}" for e in entries if e.run.metrics["data"]["name"]
    )
    devices = dict.fromkeys(
        str(e.run.metrics["hardware"]["device"])
        for e in entries
        if e.run.metrics["hardware"]["device"]
    )
    words = [
        f"{completed} completed run{'s'[: completed != 1]}",
        f"{rest} not completed" if rest else "",
        f"{page.ablation.split} split of {', '.join(names)}" if names else "",
        f"measured on {', '.join(devices)}" if devices else "",
    ]
    return f'<p class="soft">{escape("; ".join(word for word in words if word))}.</p>'


def _cards(page: _Page) -> str:
    settings = page.ablation.same
    if not settings:
        return (
            f"<p>No run has scored labelled questions of the {escape(page.ablation.split)} "
            "split yet.</p>"
        )
    best = max(settings, key=lambda s: s.accuracy)
    cards = [("most accurate setting", best)]
    reference = next((s for s in settings if s.name == page.ablation.baseline), None)
    if reference is not None and reference is not best:
        cards.append(("compared with", reference))
    sized = [(gb, s) for s in settings if (gb := s.mean(weight_gb)) is not None]
    html = "".join(
        f'<div class="card"><span>{escape(head)}</span><b>{_setting_link(page, s)}</b>'
        f"<span>{escape(_interval_text(s))}, n={s.n}</span><span>{escape(s.name)}</span>"
        + (f"<span>{escape(page.ablation.chosen)}</span>" if s is best else "")
        + "</div>"
        for head, s in cards
    )
    html += (
        '<div class="card"><span>always the most frequent letter</span>'
        f"<b>{_linked(page, best, f'{100 * best.majority_accuracy:.1f} %')}</b>"
        "<span>the accuracy that takes no knowledge, "
        f"n={best.n}</span></div>"
    )
    if sized:
        gb, smallest = min(sized, key=lambda pair: pair[0])
        html += (
            '<div class="card"><span>smallest weights</span>'
            f"<b>{_linked(page, smallest, _bytes(gb))}</b>"
            f"<span>{escape(smallest.name)}</span></div>"
        )
    rest = page.ablation.left_out
    note = f'<p class="soft">{escape(rest.strip())}</p>' if rest else ""
    return f'<div class="cards">{html}</div>{note}'


def _setting_link(page: _Page, setting: Setting) -> str:
    return _linked(page, setting, f"{100 * setting.accuracy:.1f} %")


def _linked(page: _Page, setting: Setting, text: str) -> str:
    entry = setting.entries[0]
    return (
        f'<a href="{escape(page.href(entry))}" data-tip="{escape(_setting_tip(setting))}" '
        f'data-setting="{page.number(entry.setting)}">{escape(text)}</a>'
    )


def _interval_text(setting: Setting) -> str:
    low, high = setting.interval
    return f"95 % interval [{100 * low:.1f}, {100 * high:.1f}]"


def _setting_tip(setting: Setting, *more: str) -> str:
    seeds = ", ".join(str(e.run.metrics["seed"]) for e in setting.entries)
    plural = "s"[: len(setting.entries) != 1]
    lines = [
        setting.name,
        f"accuracy {100 * setting.accuracy:.1f} %, {_interval_text(setting)}",
        f"majority {100 * setting.majority_accuracy:.1f} %, n={setting.n}, seed{plural} {seeds}",
        *more,
        *(e.run.metrics["command"] or "" for e in setting.entries[:1]),
    ]
    return "\n".join(line for line in lines if line)


# --- the table of runs ----------------------------------------------------------------------------


def _runs(page: _Page) -> str:
    factors = list(
        dict.fromkeys(name for levels in page.ablation.factors.values() for name in levels)
    )
    split = page.ablation.split
    heads: list[tuple[str, str]] = [
        ("run", "text"),
        *((factor, "text") for factor in factors),
        ("seed", ""),
        ("accuracy", "descending"),
        ("95 % interval", ""),
        ("majority", "descending"),
        ("n", "descending"),
        ("loss, nats", ""),
        ("GB", ""),
        ("trainable", ""),
        ("ms a question", ""),
        ("trained, questions/s", "descending"),
        ("peak GB", ""),
        ("seconds", ""),
    ]
    head = "".join(
        f'<th scope="col"{_class(kind)} data-first="{kind or "ascending"}">'
        f'<button type="button">{escape(name)}</button></th>'
        for name, kind in heads
    )
    width = len(heads) + 1
    body = "".join(_run_row(page, e, factors, split, width) for e in page.ablation.entries)
    kinds = dict.fromkeys(e.kind for e in page.ablation.entries)
    states = dict.fromkeys(e.run.ending for e in page.ablation.entries)
    return (
        '<div class="tools">'
        '<input id="search" type="search" placeholder="filter: words of a run, such as nf4 seed=1" '
        'aria-label="filter runs">'
        f"{_select('kind', 'every kind', kinds)}{_select('status', 'every ending', states)}"
        '<button id="reset" type="button">all</button><output id="count"></output></div>'
        '<div class="scroll"><table id="table"><caption hidden>Every run</caption>'
        f'<thead><tr>{head}<th class="text">command</th></tr></thead>'
        f"<tbody>{body}</tbody></table></div>"
        '<p class="soft">A heading sorts; every number leads to its run folder. Intervals of '
        "single runs are 95 % Wilson; majority: always giving the most frequent letter. "
        f"{_legend_kinds(kinds)}</p>"
    )


def _class(kind: str) -> str:
    return ' class="text"' if kind == "text" else ""


def _select(name: str, everything: str, values: Mapping[str, None]) -> str:
    if len(values) < 2:
        return ""
    options = "".join(f'<option value="{escape(v)}">{escape(v)}</option>' for v in values)
    return (
        f'<select name="{name}" aria-label="{name}"><option value="">{everything}</option>'
        f"{options}</select>"
    )


def _legend_kinds(kinds: Mapping[str, None]) -> str:
    words = {"trained": "● trained", "base": "□ bare base", "evaluated": "▲ adapter scored later"}
    return escape(", ".join(words[kind] for kind in kinds)) + "."


def _run_row(page: _Page, entry: Entry, factors: Sequence[str], split: str, width: int) -> str:
    run, href = entry.run, escape(page.href(entry))
    metrics, section = run.metrics, run.metrics[split]
    command = metrics["command"] or "no command is known"
    tip = escape(f"{entry.label}\n{run.run_dir}\n{command}")

    def cell(value: float | None, text: str, kind: str = "") -> str:
        if value is None:
            return f'<td{kind} data-v="">{UNKNOWN}</td>'
        return f'<td{kind} data-v="{value!r}"><a href="{href}" data-tip="{tip}">{text}</a></td>'

    accuracy = section["accuracy"]
    interval = (
        f"[{100 * section['ci_low']:.1f}, {100 * section['ci_high']:.1f}]"
        if accuracy is not None
        else ""
    )
    levels = "".join(
        f'<td class="text" data-v="{escape(entry.levels.get(f, ""))}">'
        f"{escape(entry.levels.get(f, UNKNOWN))}</td>"
        for f in factors
    )
    name = _name(page, entry)
    failed = run.status != "completed"
    words = f"{entry.label} {name} seed={metrics['seed']} {run.ending} {entry.kind} {command}"
    gb, speed = metrics["model"]["weight_gb"], metrics["train"]["questions_per_second"]
    ms, peak = milliseconds(split)(run), metrics["train"]["peak_memory_gb"]
    numbers = (
        cell(accuracy, f"{_scaled(accuracy)} %")
        + cell(section["ci_low"] if accuracy is not None else None, interval)
        + cell(section["majority_accuracy"], f"{_scaled(section['majority_accuracy'])} %")
        + cell(section["n"], f"{section['n']}")
        + cell(section["loss"], _decimals(section["loss"], 3))
        + cell(gb, _gb(gb).removesuffix(" GB"))
        + cell(metrics["model"]["num_trainable"], _count(metrics["model"]["num_trainable"]))
        + cell(ms, _decimals(ms, 2))
        + cell(speed, _decimals(speed, 1))
        + cell(peak, _decimals(peak, 2))
        + cell(metrics["wall_seconds"], _decimals(metrics["wall_seconds"], 1))
    )
    state = "failed" if failed and run.ending != "pruned" else entry.kind
    problem = f"{run.ending}: {run.error or 'it was killed'}" if failed else ""
    detail = (
        f'<tr class="detail" hidden><td colspan="{width}">'
        + (f"<p>{escape(problem)}</p>" if problem else "")
        + f"<pre>{escape(command)}</pre><p>The same, resolved: <code>python -m medqlora."
        f"{escape(_verb(command))} --config-path {escape(str(run.run_dir.resolve()))} "
        f'--config-name config</code></p><p>Run folder: <a href="{href}">'
        f"{escape(str(run.run_dir))}</a>; config hash <code>"
        f"{escape(str(metrics['config_hash'])[:16])}</code></p></td></tr>"
    )
    title = f'<a href="{href}" data-tip="{tip}">{escape(name)}</a>'
    if failed:
        # Why it has no numbers stands where they would be.
        numbers = numbers.replace(
            f'<td data-v="">{UNKNOWN}</td>',
            f'<td data-v="" data-tip="{escape(problem)}">{escape(run.ending)}</td>',
            1,
        )
    return (
        f'<tr class="run {state}" data-setting="{page.number(entry.setting)}" '
        f'data-kind="{entry.kind}" data-status="{escape(run.ending)}" '
        f'data-text="{escape(words.lower())}">'
        f'<td class="text" data-v="{escape(name)}">{title}</td>{levels}'
        f"{cell(metrics['seed'], escape(str(metrics['seed'])))}{numbers}"
        '<td class="text"><button class="command" type="button" aria-expanded="false">show'
        f"</button></td></tr>{detail}"
    )


def _verb(command: str) -> str:
    words = command.split("medqlora.")
    return words[1].split()[0] if len(words) > 1 and words[1].split() else "train"


def _name(page: _Page, entry: Entry) -> str:
    parts = [e.run.run_dir.resolve() for e in page.ablation.entries]
    common = Path(os.path.commonpath(parts)) if len(parts) > 1 else parts[0].parent
    name = entry.run.run_dir.resolve().relative_to(common).as_posix()
    return entry.run.name if name == "." else name


# --- search ---------------------------------------------------------------------------------------


def _search(page: _Page) -> str:
    """Parallel coordinates of a search and what its keys explain; empty where none was made."""
    trials = trials_of(page.ablation)
    shown = [trial for trial in trials if trial.value is not None]
    if len(shown) < 2:
        return ""
    figures = _parallel(page, shown)
    if shares := importances(trials):
        figures += _importance(shares, trials[0].metric)
    counts = {
        "completed": sum(not trial.pruned for trial in shown),
        "pruned": sum(trial.pruned for trial in shown),
        "failed": len(trials) - len(shown),
    }
    text = ", ".join(f"{number} {name}" for name, number in counts.items() if number)
    return (
        f'<div class="plots">{figures}</div><p class="soft">{len(trials)} trials: {text}. A trial '
        "that was pruned was ended early, with the value it had then (dotted). Importance: share "
        "of the variance over completed trials that a key explains (fANOVA). The best of many "
        "trials looks better on val than it is; test was not searched.</p>"
    )


def _parallel(page: _Page, trials: Sequence[Trial]) -> str:
    columns = scales(trials)
    axes = _Axes(
        120 + 120 * (len(columns) - 1), 300, (0, len(columns) - 1), (0, 1), right=74, top=26
    )
    for i, rank in sorted(enumerate(goodness(trials)), key=lambda pair: pair[1]):
        trial = trials[i]
        points = (f"{axes.px(x)},{axes.py(axis.places[i])}" for x, axis in enumerate(columns))
        words = "\n".join(f"{key} = {value}" for key, value in trial.params.items())
        ending = " (pruned)" if trial.pruned else ""
        tip = escape(f"trial {trial.number}: {trial.metric} {trial.value:.4f}{ending}\n{words}")
        kind = "trial best" if rank == 1 else "trial"
        axes.parts.append(
            f'<a href="{escape(page.href(trial.entry))}"><path class="{kind}" '
            f'd="M{"L".join(points)}" stroke-opacity="{0.15 + 0.85 * rank:.2f}" data-tip="{tip}"'
            + (' stroke-dasharray="2 3"' if trial.pruned else "")
            + "/></a>"
        )
    for x, axis in enumerate(columns):
        axes.line("axis", axes.px(x), axes.top, axes.px(x), axes.bottom)
        axes.text(axes.px(x), axes.top - 10, axis.name)
        for place, text in axis.ticks:
            axes.text(axes.px(x) + 4, axes.py(place) + 4, text[:14], "start", "soft")
    return (
        f'<figure class="wide"><h3>Every trial</h3>{axes.svg("parallel coordinates")}'
        "<figcaption>A line a trial; the better, the stronger. It leads to its run."
        "</figcaption></figure>"
    )


def _importance(shares: Mapping[str, float], metric: str) -> str:
    axes = _Axes(
        380, 40 + 26 * len(shares), (0, 1), (len(shares) - 0.5, -0.5), left=150, bottom=24, right=46
    )
    for place, (name, share) in enumerate(shares.items()):
        y, width = axes.py(place), max(axes.px(share) - axes.left, 1)
        axes.text(axes.left - 8, y + 4, name, "end")
        axes.parts.append(
            f'<rect class="mark k0 f0" x="{axes.left}" y="{y - 7}" width="{width:.1f}" height="14" '
            f'data-tip="{escape(f"{name}: {100 * share:.1f} % of the variance of {metric}")}"/>'
        )
        axes.text(axes.left + width + 5, y + 4, f"{100 * share:.0f} %", "start", "soft")
    return (
        f"<figure><h3>What mattered for {escape(metric)}</h3>{axes.svg('importance')}"
        "<figcaption>fANOVA over completed trials.</figcaption></figure>"
    )


# --- scatter plots --------------------------------------------------------------------------------


def _costs(page: _Page) -> str:
    settings = page.ablation.same
    split = page.ablation.split
    kinds: list[tuple[str, Value]] = [
        ("weights, GB", weight_gb),
        ("scoring time, ms a question", milliseconds(split)),
        ("trainable parameters", num_trainable),
    ]
    figures = [
        _scatter(page, settings, value, label)
        for label, value in kinds
        if any(s.mean(value) is not None for s in settings)
    ]
    return f'<div class="plots">{"".join(figures)}</div>' if figures else ""


class _Axes:
    """A plot area and how numbers become places in it."""

    def __init__(
        self,
        width: float,
        height: float,
        x: tuple[float, float],
        y: tuple[float, float],
        *,
        left: float = 46,
        bottom: float = 36,
        right: float = 12,
        top: float = 10,
        log: bool = False,
    ) -> None:
        self.width, self.height = width, height
        self.left, self.right, self.top, self.bottom = left, width - right, top, height - bottom
        self.log = log
        self.x0, self.x1 = (math.log10(v) for v in x) if log else x
        self.y0, self.y1 = y
        self.parts: list[str] = []

    def px(self, x: float) -> float:
        x = math.log10(x) if self.log else x
        share = (x - self.x0) / ((self.x1 - self.x0) or 1)
        return round(self.left + share * (self.right - self.left), 1)

    def py(self, y: float) -> float:
        share = (y - self.y0) / ((self.y1 - self.y0) or 1)
        return round(self.bottom - share * (self.bottom - self.top), 1)

    def line(self, kind: str, x0: float, y0: float, x1: float, y1: float) -> None:
        self.parts.append(f'<line class="{kind}" x1="{x0}" y1="{y0}" x2="{x1}" y2="{y1}"/>')

    def text(self, x: float, y: float, text: str, anchor: str = "middle", kind: str = "") -> None:
        self.parts.append(
            f'<text x="{x}" y="{y}" text-anchor="{anchor}"'
            + (f' class="{kind}"' if kind else "")
            + f">{escape(text)}</text>"
        )

    def frame(self, xlabel: str, *, percent: bool = True, x_ticks: bool = True) -> None:
        for tick in _ticks(self.y0, self.y1):
            y = self.py(tick)
            self.line("grid", self.left, y, self.right, y)
            self.text(self.left - 6, y + 4, _tick(100 * tick if percent else tick), "end", "soft")
        if x_ticks:
            for tick in _log_ticks(self.x0, self.x1) if self.log else _ticks(self.x0, self.x1):
                x = self.px(tick)
                self.line("grid", x, self.top, x, self.bottom)
                self.text(x, self.bottom + 15, _count(tick, digits=10), kind="soft")
        self.line("axis", self.left, self.bottom, self.right, self.bottom)
        middle = (self.left + self.right) / 2
        self.text(middle, self.height - 4, xlabel)

    def svg(self, label: str) -> str:
        return (
            f'<svg viewBox="0 0 {self.width:g} {self.height:g}" role="group" '
            f'style="max-width: {1.25 * self.width:g}px" '
            f'aria-label="{escape(label)}">{"".join(self.parts)}</svg>'
        )


def _scatter(page: _Page, settings: Sequence[Setting], value: Value, xlabel: str) -> str:
    points = [(cost, s) for s in settings if (cost := s.mean(value)) is not None]
    costs = [cost for cost, _ in points]
    majority = points[0][1].majority_accuracy
    positive = [cost for cost in costs if cost > 0]
    log = len(positive) == len(costs) and max(costs) / min(costs) > 20
    low = min(majority, *(s.interval.low for _, s in points))
    high = max(majority, *(s.interval.high for _, s in points))
    axes = _Axes(380, 280, _padded(costs, log), _padded((low, high), False), log=log)
    axes.frame(xlabel)
    y = axes.py(majority)
    axes.line("majority", axes.left, y, axes.right, y)
    front = pareto_front(costs, [s.accuracy for _, s in points])
    steps = ""
    for i, place in enumerate(front):
        x, y = axes.px(costs[place]), axes.py(points[place][1].accuracy)
        steps += f"M{x},{y}" if i == 0 else f"H{x}V{y}"
    if front:
        axes.parts.append(f'<path class="front" d="{steps}H{axes.right}"/>')
    on_front = set(front)
    for place, (cost, setting) in enumerate(points):
        more = f"{xlabel}: {_count(cost)}" + ("; on the Pareto front" if place in on_front else "")
        axes.parts.append(_point(page, axes, setting, axes.px(cost), setting.accuracy, more))
    pixels = [(axes.px(cost), axes.py(setting.accuracy)) for cost, setting in points]
    widths = [5.9 * len(setting.name) for _, setting in points]
    places = label_places(pixels, widths, (axes.left, axes.right))
    for i, (spot, (_, setting)) in enumerate(zip(places, points, strict=True)):
        if spot is not None and (len(points) <= MAX_LABELS or i in on_front):
            axes.text(spot[0], spot[1], setting.name, "end" if spot[2] else "start", "soft")
    kinds = dict.fromkeys(setting.kind for _, setting in points)
    return (
        f"<figure><h3>Accuracy (%) against {escape(xlabel)}</h3>{axes.svg(xlabel)}"
        f"<figcaption>Bars: 95 % interval. Line: majority letter {100 * majority:.1f} %. Dashed: "
        f"Pareto front. n={points[0][1].n}. {_legend_kinds(kinds)}"
        f"{page.ablation.left_out}</figcaption></figure>"
    )


def _point(page: _Page, axes: _Axes, setting: Setting, x: float, accuracy: float, more: str) -> str:
    k = KINDS[setting.kind]
    y, low, high = axes.py(accuracy), axes.py(setting.interval.low), axes.py(setting.interval.high)
    entry = setting.entries[0]
    shape = {
        0: f'<circle class="mark k0 f0" cx="{x}" cy="{y}" r="4.5"/>',
        1: f'<path class="mark k1 hollow" d="M{x - 4.2:.1f},{y - 4.2:.1f}h8.4v8.4h-8.4z"/>',
        2: f'<path class="mark k2 f2" d="M{x},{y - 5:.1f}l5,9h-10z"/>',
    }[k]
    return (
        f'<g class="point" data-setting="{page.number(entry.setting)}" '
        f'data-tip="{escape(_setting_tip(setting, more))}"><a href="{escape(page.href(entry))}">'
        f'<line class="bar k{k}" x1="{x}" y1="{low}" x2="{x}" y2="{high}"/>{shape}'
        f'<circle class="hit" cx="{x}" cy="{y}" r="10"/></a></g>'
    )


# --- settings -------------------------------------------------------------------------------------


def _settings(page: _Page) -> str:
    ablation = page.ablation
    if not ablation.settings:
        return ""
    by_name = {c.name_b: c for c in ablation.comparisons}
    # Heading, and which way a first click sorts.
    heads = [("setting", ""), ("accuracy", "descending"), ("95 % interval", "")]
    if by_name:
        heads += [("difference", "descending"), ("its 95 % interval", ""), ("p", "")]
        heads += [("p (Holm)", "")]
    heads += [("majority", "descending"), ("n", "descending"), ("seeds", "descending")]
    heads += [("GB", ""), ("trainable", ""), ("ms a question", "")]
    head = "".join(
        f'<th scope="col"{_class("text" if name == "setting" else "")} '
        f'data-first="{first or "ascending"}"><button type="button">{escape(name)}</button></th>'
        for name, first in heads
    )
    values: list[tuple[Value, Any]] = [
        (weight_gb, lambda v: _gb(v).removesuffix(" GB")),
        (num_trainable, _count),
        (milliseconds(ablation.split), lambda v: _decimals(v, 2)),
    ]
    rows = ""
    for setting in ablation.settings:
        entry = setting.entries[0]
        low, high = setting.interval
        runs = " ".join(
            f'<a href="{escape(page.href(e))}" data-tip="{escape(e.run.metrics["command"] or "")}">'
            f"{escape(_seed(e).removeprefix('seed '))}</a>"
            for e in setting.entries
        )

        def link(text: str, setting: Setting = setting) -> str:
            return _linked(page, setting, text)

        cells = [
            f'<td class="text" data-v="{escape(setting.name)}">{escape(setting.name)}</td>',
            f'<td data-v="{setting.accuracy!r}">{link(f"{100 * setting.accuracy:.1f} %")}</td>',
            f'<td data-v="{low!r}">{link(f"[{100 * low:.1f}, {100 * high:.1f}]")}</td>',
        ]
        if by_name:
            cells += _comparison_cells(by_name.get(setting.name), link)
        majority = setting.majority_accuracy
        cells += [
            f'<td data-v="{majority!r}">{link(f"{100 * majority:.1f} %")}</td>',
            f'<td data-v="{setting.n}">{link(str(setting.n))}</td>',
            f'<td data-v="{len(setting.entries)}">{runs}</td>',
        ]
        for value, text in values:
            mean = setting.mean(value)
            cells.append(
                '<td data-v="">-</td>'
                if mean is None
                else f'<td data-v="{mean!r}">{link(text(mean))}</td>'
            )
        rows += (
            f'<tr class="{setting.kind}" data-setting="{page.number(entry.setting)}">'
            f"{''.join(cells)}</tr>"
        )
    caption = (
        "Seeds of one setting are averaged; their interval counts seeds and questions as random. "
        + (
            f"Differences to {ablation.baseline} in percentage points, paired by question "
            f"and corrected for {len(by_name)} comparison{'s'[: len(by_name) != 1]} by Holm's "
            f"method: {methods_text(ablation.comparisons)}"
            if by_name
            else ""
        )
    )
    return (
        f'<div class="scroll"><table id="settings-table"><thead><tr>{head}</tr></thead><tbody>'
        f'{rows}</tbody></table></div><p class="soft">{escape(caption)}</p>{_forest(page)}'
    )


def _seed(entry: Entry) -> str:
    seed = entry.run.metrics["seed"]
    return "run" if seed is None else f"seed {seed}"


def _comparison_cells(comparison: Comparison | None, link: Any) -> list[str]:
    if comparison is None:
        return ['<td data-v="">-</td>'] * 4
    c = comparison
    p_holm = c.p_value if c.p_holm is None else c.p_holm
    sure = ' class="sure"' if p_holm < 0.05 else ""
    interval = f"[{100 * c.ci_low:+.1f}, {100 * c.ci_high:+.1f}]"
    return [
        f'<td{sure} data-v="{c.difference!r}">{link(f"{100 * c.difference:+.1f}")}</td>',
        f'<td data-v="{c.ci_low!r}">{link(interval)}</td>',
        f'<td data-v="{c.p_value!r}">{link(_p(c.p_value))}</td>',
        f'<td{sure} data-v="{p_holm!r}">{link(_p(p_holm))}</td>',
    ]


def _forest(page: _Page) -> str:
    comparisons = sorted(page.ablation.comparisons, key=lambda c: -c.difference)
    if not comparisons:
        return ""
    settings = {s.name: s for s in page.ablation.settings}
    low = 100 * min(0.0, *(c.ci_low for c in comparisons))
    high = 100 * max(0.0, *(c.ci_high for c in comparisons))
    names = [label_lines(c.name_b) for c in comparisons]
    left = 24 + 6.2 * max(len(line) for lines in names for line in lines)
    row = 10 + 12 * max(len(lines) for lines in names)
    axes = _Axes(
        860,
        56 + row * len(comparisons),
        _padded((low, high), False),
        (0, 1),
        left=left,
        right=126,
    )
    for tick in _ticks(axes.x0, axes.x1):
        axes.line("grid", axes.px(tick), axes.top, axes.px(tick), axes.bottom)
        axes.text(axes.px(tick), axes.bottom + 15, f"{tick:+g}" if tick else "0", kind="soft")
    axes.line("majority", axes.px(0), axes.top, axes.px(0), axes.bottom)
    axes.text((axes.left + axes.right) / 2, axes.height - 4, "percentage points, 95 % interval")
    for place, c in enumerate(comparisons):
        y = axes.top + row / 2 + row * place
        p = c.p_value if c.p_holm is None else c.p_holm
        sure = p < 0.05
        setting = settings[c.name_b]
        entry = setting.entries[0]
        x, x0, x1 = (axes.px(100 * v) for v in (c.difference, c.ci_low, c.ci_high))
        more = (
            f"difference {100 * c.difference:+.1f} points [{100 * c.ci_low:+.1f}, "
            f"{100 * c.ci_high:+.1f}], p {_p(c.p_value)}, Holm {_p(p)}"
        )
        kind = "k0" if sure else "unsure"
        for line, text in enumerate(names[place]):
            axes.text(axes.left - 8, y + 4 + 12 * (line - (len(names[place]) - 1) / 2), text, "end")
        axes.parts.append(
            f'<g class="point" data-setting="{page.number(entry.setting)}" data-tip="'
            f'{escape(_setting_tip(setting, more))}"><a href="{escape(page.href(entry))}">'
            f'<line class="bar {kind}" x1="{x0}" y1="{y}" x2="{x1}" y2="{y}"/>'
            f'<circle class="mark {kind} {"f0" if sure else "hollow"}" cx="{x}" cy="{y}" r="4.5"/>'
            f'<rect class="hit" x="{min(x0, x - 8)}" y="{y - 9}" '
            f'width="{max(x1, x + 8) - min(x0, x - 8):.1f}" height="18"/>'
        )
        sign = "" if _p(p).startswith("<") else "= "
        axes.text(axes.right + 10, y + 4, f"{100 * c.difference:+.1f}, p {sign}{_p(p)}", "start")
        axes.parts.append("</a></g>")
    first = comparisons[0]
    return (
        '<div class="plots"><figure class="wide"><h3>Difference to '
        f"{escape(first.name_a)} ({100 * first.accuracy_a:.1f} %, n={first.n})</h3>"
        f"{axes.svg('paired differences')}<figcaption>Filled: p &lt; 0.05 after Holm's correction."
        "</figcaption></figure></div>"
    )


# --- main effects, curves, subjects ---------------------------------------------------------------


def _effects(page: _Page) -> str:
    effects = page.ablation.effects
    if not effects:
        return ""
    majority = effects[0].majority_accuracy
    low = min(majority, *(e.interval.low for e in effects))
    high = max(majority, *(e.interval.high for e in effects))
    factors: dict[str, list[Effect]] = {}
    for effect in effects:
        factors.setdefault(effect.factor, []).append(effect)
    figures = "".join(
        _effect(factor, levels, majority, _padded((low, high), False))
        for factor, levels in factors.items()
    )
    rows = "".join(_effect_row(page, effect) for effect in effects)
    heads = ("factor", "level", "mean accuracy", "95 % interval", "n", "matched blocks", "runs")
    kinds = (' class="text"', ' class="text"', "", "", "", "", ' class="text"')
    head = "".join(f"<th{k}>{h}</th>" for h, k in zip(heads, kinds, strict=True))
    return (
        f'<div class="plots">{figures}</div><p class="soft">Mean accuracy (%) at each level. A '
        "block is a set of runs that differ in this factor alone and have each of its levels; each "
        "run scored the same n questions. "
        "Bars: 95 % interval over questions; they say nothing about other seeds. Line: majority "
        f'letter {100 * majority:.1f} %.</p><div class="scroll"><table id="effects-table"><thead>'
        f"<tr>{head}</tr></thead><tbody>{rows}</tbody></table></div>"
        '<p class="soft">Each mean with the runs behind it.</p>'
    )


def _effect_row(page: _Page, effect: Effect) -> str:
    runs = " ".join(
        f'<a href="{escape(page.href(e))}" data-setting="{page.number(e.setting)}" data-tip="'
        f'{escape(_entry_tip(page, e))}">{escape(_name(page, e))}</a>'
        for e in effect.entries
    )
    low, high = effect.interval
    return (
        f'<tr><td class="text">{escape(effect.factor)}</td>'
        f'<td class="text">{escape(effect.level)}</td><td>{100 * effect.accuracy:.1f} %</td>'
        f"<td>[{100 * low:.1f}, {100 * high:.1f}]</td><td>{effect.n}</td>"
        f'<td>{effect.num_blocks or "not balanced"}</td><td class="text wrap">{runs}</td></tr>'
    )


def _entry_tip(page: _Page, entry: Entry) -> str:
    section = entry.run.metrics[page.ablation.split]
    return (
        f"{entry.label}, {_seed(entry)}\naccuracy {_scaled(section['accuracy'])} %, 95 % interval "
        f"[{_scaled(section['ci_low'])}, {_scaled(section['ci_high'])}]\n"
        f"{entry.run.metrics['command'] or ''}"
    )


def _effect(factor: str, levels: Sequence[Effect], majority: float, y: tuple[float, float]) -> str:
    width = max(260, 70 + 62 * len(levels))
    axes = _Axes(width, 230, (-0.5, len(levels) - 0.5), y, bottom=58)
    axes.frame("", x_ticks=False)
    axes.line("majority", axes.left, axes.py(majority), axes.right, axes.py(majority))
    places = [(axes.px(i), axes.py(e.accuracy)) for i, e in enumerate(levels)]
    path = "M" + "L".join(f"{x},{y}" for x, y in places)
    axes.parts.append(f'<path class="front" d="{path}"/>')
    for (x, place), effect in zip(places, levels, strict=True):
        tip = (
            f"{factor} = {effect.level}\nmean accuracy {100 * effect.accuracy:.1f} %, 95 % "
            f"interval [{100 * effect.interval.low:.1f}, {100 * effect.interval.high:.1f}]\n"
            f"majority {100 * majority:.1f} %, n={effect.n}, "
            f"{effect.num_runs} run{'s'[: effect.num_runs != 1]}"
        )
        axes.parts.append(
            f'<g data-tip="{escape(tip)}" tabindex="0"><line class="bar k0" x1="{x}" '
            f'y1="{axes.py(effect.interval.low)}" x2="{x}" y2="{axes.py(effect.interval.high)}"/>'
            f'<circle class="mark k0 f0" cx="{x}" cy="{place}" r="4.5"/>'
            f'<circle class="hit" cx="{x}" cy="{place}" r="12"/></g>'
        )
        level = escape(_cut(effect.level, 18))
        axes.parts.append(
            f'<text x="{x}" y="{axes.bottom + 14}" text-anchor="end" '
            f'transform="rotate(-28 {x} {axes.bottom + 14})">{level}</text>'
        )
    blocks = levels[0].num_blocks
    runs = sum(e.num_runs for e in levels)
    balance = (
        f"{blocks} matched block{'s'[: blocks != 1]}, {runs} runs"
        if blocks
        else f"not balanced: means over {runs} runs that also differ in other factors"
    )
    return (
        f"<figure><h3>{escape(factor)}</h3>{axes.svg(factor)}"
        f"<figcaption>n={levels[0].n}; {balance}</figcaption></figure>"
    )


def _cut(text: str, most: int) -> str:
    """A text that is too long without its middle: names of one sweep often begin alike."""
    half = (most - 1) // 2
    return text if len(text) <= most else f"{text[: most - 1 - half]}…{text[-half:]}"


def _learning(page: _Page) -> str:
    tables = [
        (entry, curves(entry.run)) for entry in page.ablation.entries if entry.kind == "trained"
    ]
    keys = {
        "train/loss": "Training loss, nats",
        "val/loss": "Validation loss, nats",
        "val/accuracy": "Validation accuracy, %",
    }
    settings = list(dict.fromkeys(entry.setting for entry, table in tables if table))
    colour = {setting: f"k{i % 7} d{i // 7 % 3}" for i, setting in enumerate(settings)}
    figures = ""
    for key, head in keys.items():
        loss = key.endswith("loss")
        found = [
            (entry, table[key], [] if loss else curve_sizes(table, entry.run.metrics["val"]))
            for entry, table in tables
            if table.get(key) and (loss or is_scored(entry.run.metrics["val"]))
        ]
        if not found:
            continue
        xs = [x for _, points, _ in found for x, _ in points]
        ys = [y for _, points, _ in found for _, y in points]
        letters = sorted({num_options(entry.run.metrics["val"]) for entry, *_ in found})
        ys += [math.log(k) for k in letters] if loss else _band_ends(found)
        axes = _Axes(380, 250, (min(0.0, *xs), max(xs) or 1), _padded(ys, False))
        axes.frame("updates", percent=not loss)
        if loss:
            for k in letters:
                y = axes.py(math.log(k))
                axes.line("front", axes.left, y, axes.right, y)
                axes.text(axes.right, y - 5, f"ln {k}: knowing nothing", "end", "soft")
        else:
            for y in {axes.py(e.run.metrics["val"]["majority_accuracy"]) for e, *_ in found}:
                axes.line("majority", axes.left, y, axes.right, y)
            opacity = max(0.3 / len(found), 0.03)  # the more of them overlap, the fainter
            for entry, points, sizes in found:
                kind = colour[entry.setting].split()[0]
                axes.parts.append(_band(page, axes, entry, points, sizes, kind, opacity))
        for entry, points, sizes in found:
            places = [(axes.px(x), axes.py(y)) for x, y in points]
            step, last = points[-1]
            value = f"{last:.3f}" if loss else _val_text(entry, last, sizes[-1])
            tip = f"{entry.label}, {_seed(entry)}\n{key} at update {step:g}: {value}"
            common = (
                f'data-setting="{page.number(entry.setting)}" data-tip="{escape(tip)}" '
                f'class="curve {colour[entry.setting]}"'
            )
            d = "M" + "L".join(f"{x},{y}" for x, y in places)
            # A line of no length has round ends: a dot where something was measured.
            dots = "".join(f"M{x},{y}h0" for x, y in places) if len(places) <= MAX_DOTS else ""
            dots = dots and f'<path {common.replace("curve ", "curve dots ")} d="{dots}"/>'
            axes.parts.append(
                f'<a href="{escape(page.href(entry))}"><path {common} d="{d}"/>{dots}</a>'
            )
        caption = "" if loss else f"<figcaption>{_val_caption(found, tables)}</figcaption>"
        figures += f"<figure><h3>{head}</h3>{axes.svg(head)}{caption}</figure>"
    if not figures:
        return ""
    names = {entry.setting: entry.label for entry, _ in tables}
    legend = "".join(
        f'<span><svg viewBox="0 0 16 9"><path class="curve {colour[s]}" '
        f'data-setting="{page.number(s)}" d="M0,5H16"/></svg>{escape(names[s])}</span>'
        for s in settings
    )
    return f'<div class="plots">{figures}</div><div class="legend">{legend}</div>'


_Curves = Sequence[tuple[Entry, Sequence[tuple[float, float]], Sequence[int]]]
_Tables = Sequence[tuple[Entry, Mapping[str, Sequence[tuple[float, float]]]]]


def _band_ends(found: _Curves) -> list[float]:
    """All that a plot of val accuracies has to hold."""
    ends = [entry.run.metrics["val"]["majority_accuracy"] for entry, *_ in found]
    for _, points, sizes in found:
        for (_, y), n in zip(points, sizes, strict=True):
            ends += curve_interval(y, n)
    return ends


def _band(
    page: _Page,
    axes: _Axes,
    entry: Entry,
    points: Sequence[tuple[float, float]],
    sizes: Sequence[int],
    kind: str,
    opacity: float,
) -> str:
    """The intervals along a curve of val accuracies; of one point a bar."""
    lows, highs = [], []
    for (x, y), n in zip(points, sizes, strict=True):
        low, high = curve_interval(y, n)
        lows.append(f"{axes.px(x)},{axes.py(low)}")
        highs.append(f"{axes.px(x)},{axes.py(high)}")
    area = f"fill: var(--c{kind[1:]}); fill-opacity: {opacity:.3f}; stroke: none"
    style = f"pointer-events: none{'; ' + area if len(points) > 1 else ''}"
    return (
        f'<path class="curve band {kind}" data-setting="{page.number(entry.setting)}" '
        f'style="{style}" d="M{"L".join(lows + highs[::-1])}Z"/>'
    )


def _val_text(entry: Entry, accuracy: float, n: int) -> str:
    section = entry.run.metrics["val"]
    low, high = curve_interval(accuracy, n)
    of_all = f" of all {section['n']}" if n != section["n"] else ""
    return (
        f"{100 * accuracy:.1f} %, 95 % interval [{100 * low:.1f}, {100 * high:.1f}]\n"
        f"majority {_scaled(section['majority_accuracy'])} %{of_all}, n={n}"
    )


def _val_caption(found: _Curves, tables: _Tables) -> str:
    sections = [entry.run.metrics["val"] for entry, *_ in found]
    majorities = ", ".join(dict.fromkeys(f"{_scaled(s['majority_accuracy'])} %" for s in sections))
    sizes = ", ".join(map(str, sorted({n for *_, own in found for n in own})))
    left_out = sum("val/accuracy" in table for _, table in tables) - len(found)
    rest = f" {left_out} run(s) without a val score at the end are left out." if left_out else ""
    return (
        f"val split, n={sizes}. Bands: 95 % Wilson intervals. Line: majority letter {majorities}."
        f"{rest}"
    )


def _subjects(page: _Page) -> str:
    settings = page.ablation.same
    table = subject_table(settings, page.ablation.split)
    if not table:
        return ""
    shown = sorted(settings, key=lambda s: -s.accuracy)
    values = [a for cells in table.values() for a, _ in cells.values()]
    low, high = min(values), max(values)

    def shade(accuracy: float) -> str:
        share = (accuracy - low) / ((high - low) or 1)
        return f' style="background: rgba(var(--heat), {0.05 + 0.5 * share:.2f})"'

    head = "".join(f'<th scope="col" class="text">{escape(s.name)}</th>' for s in shown)
    first = "".join(f"<td>{_linked(page, s, f'{100 * s.accuracy:.1f}')}</td>" for s in shown)
    majority = 100 * shown[0].majority_accuracy
    rows = (
        f'<tr><th scope="row">all <span class="soft">n={shown[0].n}, majority {majority:.1f} %'
        f"</span></th>{first}</tr>"
    )
    for group, cells in table.items():
        n = max(count for _, count in cells.values())
        small = ' class="small"' if n < SMALL else ""
        row = ""
        for setting in shown:
            if setting.name not in cells:
                row += "<td>-</td>"
                continue
            accuracy, count = cells[setting.name]
            entry = setting.entries[0]
            tip = f"{group}, {setting.name}\n{_group_text(setting, page.ablation.split, group)}"
            row += (
                f"<td{small}{shade(accuracy) if count >= SMALL else ''}><a "
                f'href="{escape(page.href(entry))}" data-tip="{escape(tip)}">{100 * accuracy:.0f}'
                "</a></td>"
            )
        rows += (
            f'<tr><th scope="row">{escape(group)} <span class="soft">n={n}</span></th>{row}</tr>'
        )
    return (
        f'<div class="scroll"><table class="heat"><thead><tr><th></th>{head}</tr></thead><tbody>'
        f'{rows}</tbody></table></div><p class="soft">Accuracy in %, largest subjects first; each '
        f"number shows its interval. Italic and unshaded: fewer than {SMALL} questions."
        f"{page.ablation.left_out}</p>"
    )


def _group_text(setting: Setting, split: str, group: str) -> str:
    lines = []
    for entry in setting.entries:
        values = entry.run.metrics[split]["by"]["subject_name"].get(group)
        if values:
            lines.append(
                f"{_seed(entry)}: {100 * values['accuracy']:.1f} % "
                f"[{100 * values['ci_low']:.1f}, {100 * values['ci_high']:.1f}], n={values['n']}"
            )
    return "\n".join(lines)


# --- published, notes -----------------------------------------------------------------------------


def _published(page: _Page, published: Published | None) -> str:
    if published is None:
        return ""
    rows = ""
    for row in published.rows:
        ours = " to ".join(
            escape(text) if setting is None else _linked(page, setting, text)
            for text, setting in row.ours
        )
        rows += (
            f'<tr><td class="text">{escape(row.quantity)}</td><td>{escape(row.published)}</td>'
            f'<td>{ours}</td><td class="text wrap">{escape(row.remark)}</td></tr>'
        )
    notes = "".join(f"<li>{escape(note)}</li>" for note in published.notes)
    return (
        '<div class="scroll"><table><thead><tr><th class="text">quantity</th><th>published</th>'
        '<th>here</th><th class="text">remark</th></tr></thead><tbody>'
        f'{rows}</tbody></table></div><p class="soft">{escape(published.source)}</p>'
        f"<ul>{notes}</ul>"
    )


def _notes(page: _Page, command: str) -> str:
    notes = [
        "Accuracy means little without what takes no knowledge: always giving the most frequent "
        "letter. It stands beside every accuracy.",
        "Loss is cross-entropy in nats over the letters; ln 4 = 1.386 is knowing nothing about "
        "four of them.",
        "GB is 10^9 bytes of weights with the adapter. Milliseconds are those of scoring the whole "
        "split, packed into rows, divided by its questions; they are no latency of one question.",
        *page.ablation.notes,
    ]
    versions = dict.fromkeys(
        ", ".join(f"{k} {v}" for k, v in e.run.metrics["versions"].items() if v)
        for e in page.ablation.entries
        if e.run.status == "completed"
    )
    notes += [f"Measured with {text}." for text in versions if text]
    items = "".join(f"<li>{escape(note)}</li>" for note in notes)
    return f"<ul>{items}</ul><p>This report again: <code>{escape(command)}</code></p>"


# --- numbers --------------------------------------------------------------------------------------


def _scaled(fraction: float | None) -> str:
    return UNKNOWN if fraction is None else f"{100 * fraction:.1f}"


def _decimals(value: float | None, places: int) -> str:
    return UNKNOWN if value is None else f"{value:,.{places}f}"


def _gb(value: float | None) -> str:
    if value is None:
        return UNKNOWN
    return f"{value:.2f} GB" if value >= 0.1 else f"{value:.3g} GB"


def _bytes(gb: float) -> str:
    return f"{1000 * gb:.3g} MB" if gb < 0.1 else _gb(gb)


def _count(value: float | None, digits: int = 3) -> str:
    if value is None:
        return UNKNOWN
    for size, letter in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if abs(value) >= size:
            return f"{value / size:.{digits}g} {letter}"
    return f"{value:.{digits}g}"


def _p(p: float) -> str:
    return "< 0.001" if p < 0.001 else f"{p:.3f}"


def _tick(value: float) -> str:
    return f"{value:.10g}"


def _padded(values: Sequence[float], log: bool) -> tuple[float, float]:
    low, high = min(values), max(values)
    if log:
        return low / (high / low) ** 0.08, high * (high / low) ** 0.08
    margin = 0.08 * (high - low) or 0.05 * abs(high) or 1.0
    return low - margin, high + margin


def _ticks(low: float, high: float, most: int = 6) -> list[float]:
    """Round numbers from low to high."""
    span = high - low
    if span <= 0 or not math.isfinite(span):
        return [low]
    step = 10 ** math.floor(math.log10(span / most))
    step = next(step * m for m in (1, 2, 5, 10) if span / (step * m) <= most)
    first = math.ceil(low / step - 1e-9)
    return [round(i * step, 12) for i in range(first, math.floor(high / step + 1e-9) + 1)]


def _log_ticks(low: float, high: float) -> list[float]:
    """Powers of ten, with 2 and 5 between them where there is room; arguments are logarithms."""
    factors = (1, 2, 5) if high - low < 2.2 else (1,)
    ticks = [
        m * 10.0**power for power in range(math.floor(low), math.ceil(high) + 1) for m in factors
    ]
    return [tick for tick in ticks if low <= math.log10(tick) <= high]
