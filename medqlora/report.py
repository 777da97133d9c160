"""Tables, paired tests, figures and one self-contained page of a sweep.

python -m medqlora.report runs=sweeps/rank
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pandas as pd
import yaml
from matplotlib.figure import Figure
from omegaconf import DictConfig
from rich.console import Console

from medqlora.entry import command, command_line
from medqlora.errors import CheckpointError, ConfigError
from medqlora.evaluation.ablation import (
    Ablation,
    Entry,
    Setting,
    analyse,
    is_quantised,
    read_sweep,
    storage,
)
from medqlora.evaluation.figures import save_figure
from medqlora.evaluation.html import Published, PublishedRow, report_page
from medqlora.evaluation.results import RunResult
from medqlora.evaluation.search_figures import (
    importance_figure,
    importances,
    parallel_figure,
    trials_of,
)
from medqlora.evaluation.sweep_figures import (
    cost_figure,
    curves,
    effects_figure,
    forest_figure,
    heat_figure,
    is_scored,
    learning_figure,
    milliseconds,
    num_options,
    num_trainable,
    weight_gb,
)
from medqlora.evaluation.tables import (
    UNKNOWN,
    ResultRow,
    accuracy_text,
    comparison_markdown,
    comparison_table,
    methods_text,
    result_markdown,
    result_row,
    result_table,
)

log = logging.getLogger("medqlora.report")

PUBLISHED_DIR = Path(__file__).parent / "evaluation" / "published"
"""Published results as data, one file each."""

MAX_CURVES = 21
"""Settings whose learning curves are drawn: as many as can be told apart."""


_TEXTS = (
    *("run", "setting", "kind", "status", "error", "split", "started", "device"),
    *("data", "data_sha256", "config_hash", "command"),
)

MAX_PRINTED = 40
"""Rows of a table in the terminal; the files hold all of them."""


def report(cfg: DictConfig, out_dir: Path) -> Ablation:
    """Write the report of a folder of runs.

    Args:
        cfg: The composed config of `report`.
        out_dir: Where it goes: `summary.csv`, `summary.parquet`, `tables.md`, `tables.tex`,
            `figures/` and `report.html`.

    Returns:
        What was found.

    Raises:
        ConfigError: If an option is unknown.
        CheckpointError: If there is no run.
    """
    if not cfg.runs:
        raise ConfigError("runs is missing: name the folder of a sweep, such as runs=sweeps/rank.")
    runs = read_sweep(cfg.runs)
    if not runs:
        raise CheckpointError(
            f"{cfg.runs} holds no run folder: train something first, or name another folder."
        )
    split = _split(cfg.split, runs)
    published = _published_name(cfg.published, runs)
    ablation = analyse(runs, split, cfg.baseline)
    beside = None if published is None else read_published(published, ablation)
    out_dir.mkdir(parents=True, exist_ok=True)
    table = summary(ablation)
    table.to_csv(out_dir / "summary.csv", index=False)
    table.to_parquet(out_dir / "summary.parquet", index=False)
    (out_dir / "tables.md").write_text(_markdown(ablation, beside), encoding="utf-8")
    (out_dir / "tables.tex").write_text(latex_tables(ablation), encoding="utf-8")
    _figures(ablation, out_dir / "figures")
    title = cfg.title or Path(cfg.runs).resolve().name
    page = report_page(
        ablation,
        out_dir,
        title=str(title),
        command=command_line("report"),
        published=beside,
    )
    (out_dir / "report.html").write_text(page, encoding="utf-8")
    return ablation


def summary(ablation: Ablation) -> pd.DataFrame:
    """One row a run, failed ones too: what it was, its numbers, where it lies, how to repeat it.

    Args:
        ablation: What `analyse` returned.

    Returns:
        A table; what is unknown is null. Columns of factors start with "factor.".
    """
    factors = list(dict.fromkeys(name for levels in ablation.factors.values() for name in levels))
    rows = [_summary_row(entry, ablation.split, factors) for entry in ablation.entries]
    table = pd.DataFrame(rows)
    for name in table.columns:
        if name not in _TEXTS and not name.startswith("factor."):
            table[name] = pd.to_numeric(table[name])  # a column of nulls stays one of numbers
    return table


def _summary_row(entry: Entry, split: str, factors: Sequence[str]) -> dict[str, Any]:
    run = entry.run
    metrics = run.metrics
    section, train, model = metrics[split], metrics["train"], metrics["model"]
    scores = ("n", "accuracy", "ci_low", "ci_high", "majority_accuracy", "macro_accuracy")
    speeds = ("num_steps", "num_questions", "questions_per_second", "tokens_per_second")
    return {
        "run": str(run.run_dir),
        "setting": entry.label,
        "kind": entry.kind,
        "status": run.ending,
        "error": run.error,
        **{f"factor.{name}": entry.levels.get(name) for name in factors},
        "seed": metrics["seed"],
        "split": split,
        **{key: section[key] for key in scores},
        **{key: section[key] for key in ("loss", "ece", "brier")},
        "val_accuracy": metrics["val"]["accuracy"],
        "val_loss": metrics["val"]["loss"],
        "weight_gb": model["weight_gb"],
        "weight_gb_16bit": model["weight_gb_16bit"],
        "num_parameters": model["num_parameters"],
        "num_trainable": model["num_trainable"],
        "milliseconds_per_question": milliseconds(split)(run),
        "train_loss": train["loss"],
        **{f"train_{key.removeprefix('num_')}": train[key] for key in speeds},
        "fill_fraction": train["fill_fraction"],
        "train_peak_memory_gb": train["peak_memory_gb"],
        "wall_seconds": metrics["wall_seconds"],
        "started": metrics["started"],
        "device": metrics["hardware"]["device"],
        "data": metrics["data"]["name"],
        "data_sha256": section.get("sha256") or metrics["data"]["sha256"],
        "config_hash": metrics["config_hash"],
        "command": metrics["command"],
    }


def latex_tables(ablation: Ablation) -> str:
    r"""The settings and the paired differences as LaTeX, for a document that uses booktabs.

    Args:
        ablation: What `analyse` returned.
    """
    majority = "always giving the most frequent letter"
    heads = [
        "setting",
        "accuracy (\\%)",
        "95 \\% interval",
        "majority (\\%)",
        "n",
        "seeds",
        "GB",
        "trainable",
    ]
    rows = []
    for setting in ablation.settings:
        low, high = setting.interval
        gb, trainable = setting.mean(weight_gb), setting.mean(num_trainable)
        rows.append(
            [
                _tex(setting.name),
                f"{100 * setting.accuracy:.1f}",
                f"[{100 * low:.1f}, {100 * high:.1f}]",
                f"{100 * setting.majority_accuracy:.1f}",
                str(setting.n),
                str(len(setting.entries)),
                "--" if gb is None else f"{gb:.3g}",
                "--" if trainable is None else f"{trainable:,.0f}".replace(",", "\\,"),
            ]
        )
    caption = (
        f"Accuracy on the {ablation.split} split. Seeds are averaged; intervals count seeds and "
        f"questions as random, those of single runs are Wilson's. Majority: {majority}."
    )
    text = _tex_table(heads, rows, caption, "tab:settings")
    if ablation.comparisons:
        rows = [
            [
                _tex(c.name_b),
                f"{100 * c.difference:+.1f}",
                f"[{100 * c.ci_low:+.1f}, {100 * c.ci_high:+.1f}]",
                _tex_p(c.p_value),
                "--" if c.p_holm is None else _tex_p(c.p_holm),
                str(c.n),
            ]
            for c in ablation.comparisons
        ]
        first = ablation.comparisons[0]
        caption = (
            f"Paired differences to {_tex(first.name_a)} ({100 * first.accuracy_a:.1f} \\%, "
            f"n={first.n}) in percentage points; p-values also after Holm's correction over "
            f"{len(rows)} comparisons. {_tex(methods_text(ablation.comparisons))}"
        )
        heads = ["setting", "difference", "95 \\% interval", "p", "p (Holm)", "n"]
        text += "\n" + _tex_table(heads, rows, caption, "tab:differences")
    return text


def read_published(name: str, ablation: Ablation) -> Published:
    """A published result with what was measured here beside it.

    Args:
        name: File in `PUBLISHED_DIR`, without its ending.
        ablation: What was measured here.
    """
    data = yaml.safe_load((PUBLISHED_DIR / f"{name}.yaml").read_text(encoding="utf-8"))
    rows = []
    for row in data["rows"]:
        ours, remark = _OURS[row["ours"]](ablation)
        rows.append(PublishedRow(row["quantity"], row["published"], ours, remark))
    return Published(data["title"], data["source"], rows, data["notes"])


# --- what stands beside a published number --------------------------------------------------------


def _config(setting: Setting) -> Mapping[str, Any]:
    return setting.entries[0].run.config or {}


def _best(settings: Sequence[Setting]) -> Setting | None:
    """The most accurate one on val, where all were scored on it: test chooses nothing."""
    by_val = [s.mean(lambda run: run.metrics["val"]["accuracy"]) for s in settings]
    known = [value for value in by_val if value is not None]
    ranks = known if len(known) == len(by_val) else [s.accuracy for s in settings]
    best = max(zip(ranks, settings, strict=True), key=lambda pair: pair[0], default=None)
    return None if best is None else best[1]


def _quantised(ablation: Ablation, kind: str) -> Setting | None:
    """The best quantised setting of a kind."""
    return _best([s for s in ablation.settings if s.kind == kind and is_quantised(_config(s))])


def _unquantised(ablation: Ablation, kind: str) -> Setting | None:
    """The unquantised setting of a kind, in 16 bit if there is one.

    The one that differs in nothing else from the quantised one beside it; the best where none does.
    """
    found = [s for s in ablation.settings if s.kind == kind and not is_quantised(_config(s))]
    found = [s for s in found if storage(_config(s)) == "16 bit"] or found
    beside = _quantised(ablation, kind)
    same = [s for s in found if beside is not None and _rest(s) == _rest(beside)]
    return _best(same) or _best(found)


def _rest(setting: Setting) -> dict[str, str]:
    return {k: v for k, v in setting.levels.items() if k.partition(".")[0] != "quant"}


_Ours = tuple[list[tuple[str, Setting | None]], str]
"""Our values, each with its setting, and what they are of."""


def _pair(
    before: Setting | None, after: Setting | None, text: Callable[[Setting], str | None]
) -> _Ours:
    parts: list[tuple[str, Setting | None]] = []
    for setting in (before, after):
        known = None if setting is None else text(setting)
        parts.append((UNKNOWN, None) if known is None else (known, setting))
    names = [_stored_name(s) for s in (before, after) if s is not None]
    return parts, " to ".join(names)


def _stored_name(setting: Setting) -> str:
    stored = storage(_config(setting))
    unclear = not is_quantised(_config(setting)) and stored not in setting.name
    return f"{setting.name} ({stored})" if unclear else setting.name


def _ours_weights(ablation: Ablation) -> _Ours:
    def text(setting: Setting) -> str | None:
        gb = setting.mean(weight_gb)
        return None if gb is None else f"{1000 * gb:.2f} MB"

    return _pair(_unquantised(ablation, "base"), _quantised(ablation, "base"), text)


def _ours_accuracy(ablation: Ablation) -> _Ours:
    def text(s: Setting) -> str:
        return f"{100 * s.accuracy:.2f} % [{100 * s.interval.low:.1f}, {100 * s.interval.high:.1f}]"

    before, after = (_quantised(ablation, kind) for kind in ("base", "trained"))
    ours, names = _pair(before, after, text)
    known = after or before
    if known is None:
        return ours, names
    return ours, f"{names}; n={known.n}, majority {100 * known.majority_accuracy:.1f} %"


def _ours_memory(ablation: Ablation) -> _Ours:
    def text(setting: Setting) -> str | None:
        gb = setting.mean(lambda run: run.metrics["train"]["peak_memory_gb"])
        return None if gb is None else f"{gb:.2f} GB"

    return _pair(_unquantised(ablation, "trained"), _quantised(ablation, "trained"), text)


def _ours_milliseconds(ablation: Ablation) -> _Ours:
    def text(setting: Setting) -> str | None:
        ms = setting.mean(milliseconds(ablation.split))
        return None if ms is None else f"{ms:.2f} ms"

    return _pair(_unquantised(ablation, "base"), _quantised(ablation, "base"), text)


def _ours_val_loss(ablation: Ablation) -> _Ours:
    setting = _quantised(ablation, "trained")
    loss = None if setting is None else setting.mean(lambda run: run.metrics["val"]["loss"])
    if setting is None or loss is None:
        return [(UNKNOWN, None)], ""
    k = num_options(setting.entries[0].run.metrics["val"])
    gain = math.log(k) - loss
    way = "below" if gain >= 0 else "above"
    return [(f"{loss:.3f}", setting)], f"{setting.name}; {abs(gain):.3f} nats {way} ln {k}"


_OURS: dict[str, Callable[[Ablation], _Ours]] = {
    "weights": _ours_weights,
    "accuracy": _ours_accuracy,
    "memory": _ours_memory,
    "milliseconds": _ours_milliseconds,
    "val_loss": _ours_val_loss,
}


# --- parts of the report --------------------------------------------------------------------------


def _split(split: str, runs: Sequence[RunResult]) -> str:
    if split not in ("auto", "test", "val"):
        raise ConfigError(f"split={split} is unknown. Choose test, val or auto.")
    if split != "auto":
        return split
    return "test" if any(run.metrics["test"]["accuracy"] is not None for run in runs) else "val"


def _published_name(name: str, runs: Sequence[RunResult]) -> str | None:
    there = sorted(path.stem for path in PUBLISHED_DIR.glob("*.yaml"))
    if name == "auto":
        sweeps = {(run.metrics.get("choices") or {}).get("sweep") for run in runs}
        return next((known for known in there if known in sweeps), None)
    if name in (None, "none"):
        return None
    if name not in there:
        raise ConfigError(f"published={name} is unknown. Choose {', '.join(there)}, auto or none.")
    return name


def _result_rows(ablation: Ablation) -> list[ResultRow]:
    rows = []
    for entry in ablation.entries:
        row = result_row(entry.run, ablation.split, name=entry.label)
        trainable, seed = num_trainable(entry.run), entry.run.metrics["seed"]
        extra = {
            "seed": UNKNOWN if seed is None else str(seed),
            "trainable": UNKNOWN if trainable is None else f"{trainable:,}",
        }
        rows.append(replace(row, extra=extra, error=_short(row.error)))
    return rows


def _short(error: str | None) -> str | None:
    return error if error is None or len(error) <= 200 else error[:199] + "…"


def _cell(text: str) -> str:
    return text.replace("|", "\\|")


def _setting_text(setting: Setting) -> str:
    """A setting with the mean over its seeds."""
    section = {
        "accuracy": setting.accuracy,
        "ci_low": setting.interval.low,
        "ci_high": setting.interval.high,
        "majority_accuracy": setting.majority_accuracy,
        "n": setting.n,
    }
    seeds = len(setting.entries)
    return f"{setting.name}: {accuracy_text(section)}, {seeds} seed{'s'[: seeds != 1]}"


def _setting_lines(ablation: Ablation) -> str:
    lines = [
        "| setting | accuracy | 95 % interval | majority | n | seeds |\n"
        "|---|---:|---:|---:|---:|---:|\n"
    ]
    for s in ablation.settings:
        name = _cell(s.name)
        lines.append(
            f"| {name} | {100 * s.accuracy:.1f} % | [{100 * s.interval.low:.1f}, "
            f"{100 * s.interval.high:.1f}] | {100 * s.majority_accuracy:.1f} % | {s.n} | "
            f"{len(s.entries)} |\n"
        )
    return "".join(lines)


def _markdown(ablation: Ablation, published: Published | None) -> str:
    parts = [f"## Runs, {ablation.split} split\n\n{result_markdown(_result_rows(ablation))}"]
    if ablation.settings:
        parts.append(
            f"## Settings, seeds averaged\n\n{_setting_lines(ablation)}\nIntervals count seeds and "
            "questions as random; those of single runs are Wilson's.\n"
        )
    if ablation.comparisons:
        parts.append(f"## Paired differences\n\n{comparison_markdown(ablation.comparisons)}")
    if ablation.effects:
        lines = "".join(
            f"| {e.factor} | {e.level} | {100 * e.accuracy:.1f} % | [{100 * e.interval.low:.1f}, "
            f"{100 * e.interval.high:.1f}] | {e.n} | {e.num_blocks} | {e.num_runs} |\n"
            for e in ablation.effects
        )
        majority = ablation.effects[0].majority_accuracy
        parts.append(
            "## Main effects\n\n| factor | level | accuracy | 95 % interval | n | matched blocks "
            f"| runs |\n|---|---|---:|---:|---:|---:|---:|\n{lines}\nMeans over runs that differ "
            f"in the factor alone; 0 blocks: not balanced. Majority {100 * majority:.1f} %.\n"
        )
    if published is not None:
        lines = "".join(
            f"| {row.quantity} | {row.published} | {row.text} | {_cell(row.remark)} |\n"
            for row in published.rows
        )
        notes = "".join(f"- {note}\n" for note in published.notes)
        parts.append(
            f"## {published.title}\n\n| quantity | published | here | of |\n|---|---:|---:|---|\n"
            f"{lines}\n{published.source}\n\n{notes}"
        )
    if ablation.notes:
        parts.append("## Notes\n\n" + "".join(f"- {note}\n" for note in ablation.notes))
    return "\n".join(parts)


def _tex(text: str) -> str:
    replaced = {
        "\\": "\\textbackslash{}",
        "~": "\\textasciitilde{}",
        "^": "\\textasciicircum{}",
        **{letter: f"\\{letter}" for letter in "&%$#_{}"},
    }
    return "".join(replaced.get(letter, letter) for letter in text)


def _tex_p(p: float) -> str:
    return "$<$ 0.001" if p < 0.001 else f"{p:.3f}"


def _tex_table(
    heads: Sequence[str], rows: Sequence[Sequence[str]], caption: str, label: str
) -> str:
    lines = "".join(" & ".join(row) + " \\\\\n" for row in rows)
    return (
        "\\begin{table}\n\\centering\n"
        f"\\caption{{{caption}}}\n\\label{{{label}}}\n"
        f"\\begin{{tabular}}{{l{'r' * (len(heads) - 1)}}}\n\\toprule\n"
        f"{' & '.join(heads)} \\\\\n\\midrule\n{lines}"
        "\\bottomrule\n\\end{tabular}\n\\end{table}\n"
    )


def _figures(ablation: Ablation, folder: Path) -> None:
    settings, split = ablation.same, ablation.split
    tables: dict[str, list[Any]] = {}
    for entry in ablation.entries:
        if entry.kind == "trained" and (found := curves(entry.run)):
            if not is_scored(entry.run.metrics["val"]):
                found.pop("val/accuracy", None)  # nothing says how many questions it is of
            tables.setdefault(entry.label, []).append(found)
    shown = dict(list(tables.items())[:MAX_CURVES])
    vals = [e.run.metrics["val"] for e in ablation.entries if e.kind == "trained"]
    majority = ablation.effects[0].majority_accuracy if ablation.effects else 0.0
    makers: dict[str, Callable[[], Figure]] = {
        "accuracy_gb": lambda: cost_figure(settings, weight_gb, "weights, GB", split),
        "accuracy_ms": lambda: cost_figure(
            settings, milliseconds(split), "scoring time, ms a question", split
        ),
        "accuracy_trainable": lambda: cost_figure(
            settings, num_trainable, "trainable parameters", split
        ),
        "learning_curves": lambda: learning_figure(shown, vals),
        "subjects": lambda: heat_figure(settings, split),
        "main_effects": lambda: effects_figure(ablation.effects, majority),
        "differences": lambda: forest_figure(ablation.comparisons),
    }
    if trials := trials_of(ablation):
        makers["search_trials"] = lambda: parallel_figure(trials)
        makers["search_importance"] = lambda: importance_figure(
            importances(trials), trials[0].metric
        )
    for name, make in makers.items():
        try:
            save_figure(make(), folder / name)
        except ValueError as error:
            log.info("no figure %s: %s", name, error)


@command("report")
def main(cfg: DictConfig, run_dir: Path) -> None:
    """Write the report, print its table."""
    ablation = report(cfg, run_dir)
    console = Console()
    rows = [
        result_row(entry.run, ablation.split, name=entry.label)
        for entry in ablation.entries
        if entry.run.status == "completed"
    ][:MAX_PRINTED]
    endings = [entry.run.ending for entry in ablation.entries]
    failed = sum(ending not in ("completed", "pruned") for ending in endings)
    if rows:
        console.print(result_table(rows, title=f"{Path(cfg.runs).name}, {ablation.split} split"))
    if ablation.comparisons:
        console.print(comparison_table(ablation.comparisons[:MAX_PRINTED]))
    best = max(ablation.same, key=lambda s: s.accuracy, default=None)
    if best is not None:
        console.print(f"most accurate: {_setting_text(best)}", soft_wrap=True, highlight=False)
        if remark := f"{ablation.chosen}{ablation.left_out}".strip():
            console.print(remark, soft_wrap=True, highlight=False)
    if pruned := endings.count("pruned"):
        console.print(f"{pruned} trial(s) were pruned", highlight=False)
    if failed:
        console.print(f"{failed} run(s) did not complete; report.html says why", highlight=False)
    console.print(f"report: {run_dir / 'report.html'}", soft_wrap=True, highlight=False)


if __name__ == "__main__":
    main()
