"""From run folders to an ablation: what was varied, which runs are seeds of another, what it did.

Nothing here knows an option by name: factors are what differs between the configs of the runs.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Bool
from scipy import stats

from medqlora.errors import CheckpointError, ConfigError
from medqlora.evaluation.results import (
    EXCLUDED_KEYS,
    FILE_KEYS,
    FOLDER_KEYS,
    RunResult,
    config_hash,
    empty_metrics,
    is_folder,
    read_predictions,
    read_run,
    read_runs,
)
from medqlora.evaluation.statistics import (
    LEVEL,
    Comparison,
    Interval,
    compare_family,
    crossed_variance,
    residual_squares,
    wilson_interval,
)
from medqlora.schema import Prediction

SEED = "seed"
"""Key whose values are repetitions of one setting, not settings."""

_NOT_FACTORS = (
    *EXCLUDED_KEYS,
    SEED,
    "select",
    "defaults",
    "adapter",
    "run",
    "split",
    "acceleration*",
)
_MISSING = "none"


@dataclass(frozen=True)
class Entry:
    """A run of the ablation.

    Attributes:
        run: The run folder.
        kind: "trained"; "base" for a bare base model; "evaluated" for an adapter that was scored
            later.
        levels: Its level of each factor of its kind.
        label: Those levels in words; the name of the folder where nothing was varied.
        setting: What it shares with the other seeds of the same setting.
    """

    run: RunResult
    kind: str
    levels: Mapping[str, str]
    label: str
    setting: str


@dataclass
class Setting:
    """The runs that differ in their seed alone, on the same questions.

    Attributes:
        name: Levels in words.
        kind: As of `Entry`.
        levels: Level of each factor.
        entries: The runs, at least one, all completed and scored; of each seed the newest.
        n: Questions each of them scored.
        accuracy: Mean over the runs.
        interval: 95 % interval: Wilson's of one run, Student's t over seeds and questions of
            several.
        sha256: Hash of the questions.
    """

    name: str
    kind: str
    levels: Mapping[str, str]
    entries: list[Entry]
    n: int
    accuracy: float
    interval: Interval
    sha256: str | None
    majority_accuracy: float

    def mean(self, value: Callable[[RunResult], float | None]) -> float | None:
        """Mean of a quantity over the runs; None where one of them lacks it."""
        values = [value(entry.run) for entry in self.entries]
        known = [v for v in values if v is not None]
        return sum(known) / len(known) if known and len(known) == len(values) else None


@dataclass(frozen=True)
class Effect:
    """What one level of a factor does, all else equal.

    Attributes:
        factor: The factor.
        level: The level.
        accuracy: Mean accuracy over the blocks: sets of runs that differ in this factor alone and
            have each of its levels.
        interval: 95 % interval of that mean over questions; seeds and blocks are taken as they are.
        num_blocks: Blocks; 0 where no such set exists and all runs of the level are averaged.
        entries: The runs that were averaged.
        n: Questions each of them scored.
        majority_accuracy: Accuracy there of always giving the most frequent letter.
    """

    factor: str
    level: str
    accuracy: float
    interval: Interval
    num_blocks: int
    entries: Sequence[Entry]
    n: int
    majority_accuracy: float

    @property
    def num_runs(self) -> int:
        """Runs that were averaged."""
        return len(self.entries)


@dataclass
class Ablation:
    """The runs of a sweep, sorted out.

    Attributes:
        split: The split that is reported.
        entries: Every run, in the order of the folders; of the copies of a bare base one.
        factors: What was varied among the runs of each kind, and the levels in order.
        settings: Groups of seeds, among the runs that completed and scored the split.
        comparisons: Paired differences to the baseline, Holm-corrected over all of them.
        baseline: Name of the setting the others are compared with.
        effects: Main effects of each factor.
        notes: What could not be done, and why.
    """

    split: str
    entries: list[Entry]
    factors: dict[str, dict[str, list[str]]]
    settings: list[Setting] = field(default_factory=list)
    comparisons: list[Comparison] = field(default_factory=list)
    baseline: str | None = None
    effects: list[Effect] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    @property
    def same(self) -> list[Setting]:
        """Settings on the questions of the baseline, or of the most of them where there is none."""
        shas = [s.sha256 for s in self.settings]
        chosen = next((s.sha256 for s in self.settings if s.name == self.baseline), None)
        if self.baseline is None:
            chosen = max(shas, key=shas.count, default=None)
        return [s for s in self.settings if s.sha256 == chosen]

    @property
    def left_out(self) -> str:
        """What a figure of `same` leaves out, as a sentence; empty where that is nothing."""
        number = len(self.settings) - len(self.same)
        return f" {number} setting(s) on other questions are left out." if number else ""

    @property
    def chosen(self) -> str:
        """What the most accurate of `same` is to be read with; empty where it is the only one."""
        if len(self.same) < 2:
            return ""
        return f"Chosen on the {self.split} split itself, so it looks better than it is."


def read_sweep(root: str | Path) -> list[RunResult]:
    """Every run below a folder, with those that a sweep took over from another one.

    Args:
        root: The folder. A job that another sweep had done already is a link to its folder.

    Returns:
        The runs, each once.

    Raises:
        CheckpointError: If `root` is no folder.
    """
    found = read_runs(root)
    for link in sorted(path for path in Path(root).rglob("*") if path.is_symlink()):
        if link.is_dir():
            found += read_runs(link.resolve())
        elif not link.exists():
            try:
                read_run(link)
            except CheckpointError as error:
                metrics = {**empty_metrics(), "status": "failed", "error": str(error)}
                found.append(RunResult(link, metrics, None, damaged=True))
    seen: dict[Path, RunResult] = {}
    for run in found:
        seen.setdefault(run.run_dir.resolve(), run)
    return list(seen.values())


def analyse(
    runs: Sequence[RunResult], split: str = "test", baseline: str | None = None
) -> Ablation:
    """Sort out a sweep: factors, seeds, paired differences, main effects.

    Args:
        runs: What `read_sweep` returned.
        split: "test" or "val".
        baseline: Name of the setting the others are compared with; None for the bare base, the
            unquantised one if it was scored, else the first setting.

    Returns:
        The ablation. What cannot be computed (runs on different questions, no labels, missing
        predictions) is a note.

    Raises:
        ConfigError: If there is no setting called `baseline`.
    """
    runs = _once(runs)
    factors, levels = _factors(runs)
    entries = [_entry(run, levels[index]) for index, run in enumerate(runs)]
    ablation = Ablation(split, _told_apart(entries), factors)
    predictions = _read_all(ablation)
    ablation.settings = _settings(ablation, predictions)
    _compare(ablation, predictions, baseline)
    ablation.effects = main_effects(ablation, predictions)
    return ablation


def pareto_front(
    costs: Sequence[float | None], gains: Sequence[float], smaller_is_better: bool = True
) -> list[int]:
    """Which points no other point beats: none costs at most as much and gains at least as much.

    Args:
        costs: Such as GB; None for a point without one, which is never on the front.
        gains: Such as accuracies.
        smaller_is_better: Whether a small cost is wanted.

    Returns:
        Indices by rising cost. Of equal points the first is kept.
    """
    sign = 1 if smaller_is_better else -1
    known = [
        (sign * cost, -gain, index)
        for index, (cost, gain) in enumerate(zip(costs, gains, strict=True))
        if cost is not None
    ]
    front: list[int] = []
    best = -np.inf
    for _, negative_gain, index in sorted(known):
        if -negative_gain > best:
            best = -negative_gain
            front.append(index)
    return front


def setting_interval(correct: Bool[np.ndarray, "run question"]) -> Interval:
    """95 % interval of the mean accuracy of several runs on the same questions.

    Seeds and questions are both random: `crossed_variance` with Student's t. One run has Wilson's
    interval. Of two runs that differ by more than their noise it holds the truth in about 90 of 100
    cases: two seeds say little of a third.

    Args:
        correct: Whether each run has each question right.

    Returns:
        The interval, within [0, 1].

    References:
        Miller 2024, arXiv:2411.00640; the rest as of `crossed_variance`.
    """
    num_runs, n = correct.shape
    if num_runs == 1 or n < 2:
        return wilson_interval(int(correct[0].sum()), n)
    values = correct.astype(np.float64)
    mean = float(values.mean())
    question_part = float(values.mean(axis=0).var(ddof=1)) / n
    run_part = float(values.mean(axis=1).var(ddof=1)) / num_runs
    noise_part = residual_squares(values) / ((num_runs - 1) * (n - 1)) / n / num_runs
    variance, free = crossed_variance(question_part, run_part, noise_part, n, num_runs - 1)
    if variance == 0:
        # Every question right, or none: the runs are one run seen several times.
        return wilson_interval(int(correct[0].sum()), n)
    low, high = stats.t.interval(LEVEL, free, loc=mean, scale=variance**0.5)
    return Interval(max(float(low), 0.0), min(float(high), 1.0))


def main_effects(
    ablation: Ablation, predictions: Mapping[Path, Sequence[Prediction]]
) -> list[Effect]:
    """Mean accuracy at each level of each factor, over runs that differ in nothing else.

    Args:
        ablation: Entries and settings filled in.
        predictions: Predictions of the runs, by folder.

    Returns:
        Effects by factor, levels in order; of trained runs, or of bare bases where none was
        trained. A factor with runs on different questions is left out.
    """
    kind = next((s.kind for s in ablation.settings if s.kind == "trained"), "base")
    scored = [e for s in ablation.settings if s.kind == kind for e in s.entries]
    tables = {
        entry.run.run_dir: _correct(predictions[entry.run.run_dir])
        for entry in scored
        if entry.run.run_dir in predictions
    }
    effects: list[Effect] = []
    for factor, levels in ablation.factors.get(kind, {}).items():
        blocks: dict[Hashable, dict[str, list[Entry]]] = {}
        for entry in scored:
            if entry.run.run_dir in tables:
                others = tuple(v for k, v in entry.levels.items() if k != factor)
                block = blocks.setdefault(
                    (others, entry.run.metrics["seed"], _sha256(entry.run, ablation.split)), {}
                )
                block.setdefault(entry.levels[factor], []).append(entry)
        there = [lv for lv in levels if any(lv in block for block in blocks.values())]
        complete = [block for block in blocks.values() if all(lv in block for lv in there)]
        used = complete or list(blocks.values())
        if len(there) < 2:
            continue
        chosen = {level: [e for block in used for e in block.get(level, [])] for level in there}
        asked = {
            (_sha256(e.run, ablation.split), frozenset(tables[e.run.run_dir]))
            for entries in chosen.values()
            for e in entries
        }
        if len(asked) > 1:
            ablation.notes.append(
                f"No main effect of {factor}: its runs scored different questions."
            )
            continue
        effects += [
            _effect(factor, level, entries, tables, len(complete), ablation.split)
            for level, entries in chosen.items()
        ]
    return effects


def _effect(
    factor: str,
    level: str,
    entries: Sequence[Entry],
    tables: Mapping[Path, dict[str, bool]],
    num_blocks: int,
    split: str,
) -> Effect:
    ids = list(tables[entries[0].run.run_dir])
    correct = np.array([[tables[e.run.run_dir][i] for i in ids] for e in entries], dtype=bool)
    mean, by_question = float(correct.mean()), correct.mean(axis=0)
    if len(correct) == 1 or len(ids) < 2 or np.ptp(by_question) == 0:
        # Questions that all agree say as much as one run of them does, which is no certainty.
        interval = wilson_interval(round(mean * len(ids)), len(ids))
    else:
        error = 1.96 * float(by_question.std(ddof=1)) / len(ids) ** 0.5
        interval = Interval(max(mean - error, 0.0), min(mean + error, 1.0))
    majority = float(entries[0].run.metrics[split]["majority_accuracy"])
    return Effect(factor, level, mean, interval, num_blocks, entries, len(ids), majority)


def _once(runs: Sequence[RunResult]) -> list[RunResult]:
    """Every run, but a bare base that several jobs of a sweep hold only once."""
    seen: set[Hashable] = set()
    kept = []
    for run in runs:
        key: Hashable = run.run_dir
        if run.status == "completed" and _kind(run) == "base":
            key = (_setting_of(run), *(_sha256(run, split) for split in ("val", "test")))
        if key not in seen:
            seen.add(key)
            kept.append(run)
    return kept


def _kind(run: RunResult) -> str:
    config = run.config or {}
    if "optimizer" in config or run.config is None:
        return "trained"
    return "evaluated" if config.get("adapter") else "base"


def _entry(run: RunResult, levels: Mapping[str, str]) -> Entry:
    config = _effective(run)
    kind = _kind(run)
    words = ", ".join(_words(name, level) for name, level in levels.items())
    if kind == "base":
        words = f"base, {words or storage(config)}"
    elif not words:
        words = run.name
    setting = _setting_of(run) if config else str(run.run_dir)
    return Entry(run, kind, dict(levels), words, setting)


def _setting_of(run: RunResult) -> str:
    """Hash of what the seeds of a setting share: the config, and which files and folders it read.

    `config_hash` alone leaves out where those lie, for the same run elsewhere has the same hash.
    """
    config = _effective(run)
    read = {"adapter": config.get("adapter")}
    # A model that is not trained here meets the training questions in solved examples alone.
    files = FILE_KEYS if _kind(run) == "trained" or _num_shots(config) else ()
    for key in (*FOLDER_KEYS, *files):
        group, name = key.split(".")
        value = (config.get(group) or {}).get(name)
        read[key] = value if key in FILE_KEYS or is_folder(str(value)) else None
    paths = {k: str(Path(v).expanduser().resolve()) for k, v in read.items() if v is not None}
    return config_hash(_without_seed(config), content=paths)


def _told_apart(entries: list[Entry]) -> list[Entry]:
    """Entries whose label tells their setting from every other."""
    settings: dict[str, list[str]] = {}
    for entry in entries:
        if entry.setting not in settings.setdefault(entry.label, []):
            settings[entry.label].append(entry.setting)
    told = []
    for entry in entries:
        rivals = settings[entry.label]
        label = entry.label
        if len(rivals) > 1:
            label += f" ({_short(entry.run.run_dir)})"
        told.append(Entry(entry.run, entry.kind, entry.levels, label, entry.setting))
    return told


def _short(folder: Path) -> str:
    return "/".join(folder.parts[-2:])


def _words(name: str, level: str) -> str:
    """A level that speaks for itself, such as lora_r16, or one with its key."""
    if name == "quant":
        return level.replace("none", "unquantised")
    return level if "." not in name and level != _MISSING else f"{name}={level}"


def storage(config: Mapping[str, Any]) -> str:
    """How the weights of a run's base are stored, in words: "16 bit", "32 bit", "nf4".

    Args:
        config: Config of the run.
    """
    quant = config.get("quant") or {}
    code = str(quant.get("data_type", "unknown"))
    return _UNQUANTISED.get(str(quant.get("compute_dtype")), "16 bit") if code == "none" else code


def is_quantised(config: Mapping[str, Any]) -> bool:
    """Whether the weights of a run's base take fewer bits than a number of theirs has.

    Args:
        config: Config of the run.
    """
    return storage(config) not in _UNQUANTISED.values()


_UNQUANTISED = {"bfloat16": "16 bit", "float16": "16 bit", "float32": "32 bit"}
_OF_SCORING = ("accelerator", "devices", "num_nodes", "precision", "strategy")
"""Keys of `trainer` that a run without training reads."""

_OF_QUANTISED = ("double_quant", "skip_modules", "block_size", "quant_storage")


def _with_effect(config: Mapping[str, Any]) -> dict[str, Any]:
    """A config without the keys of `quant` that change nothing where nothing is quantised."""
    quant = config.get("quant") or {}
    if is_quantised(config):
        return dict(config)
    kept = {
        key: value
        for key, value in quant.items()
        if key not in (*_OF_QUANTISED, "_convert_") and (key, value) != ("embedding", "bf16")
    }
    return {**config, "quant": kept}


def _scoring_only(config: Mapping[str, Any]) -> dict[str, Any]:
    """The config of a bare base without the keys that only training reads."""
    kept = dict(config)
    if isinstance(trainer := config.get("trainer"), Mapping):
        kept["trainer"] = {k: v for k, v in trainer.items() if k in _OF_SCORING}
    if isinstance(data := config.get("data"), Mapping) and not _num_shots(config):
        kept["data"] = {k: v for k, v in data.items() if k not in ("limit_train", "train_file")}
    return kept


def _num_shots(config: Mapping[str, Any]) -> int:
    """Solved questions of train in front of each prompt."""
    return (config.get("prompt") or {}).get("num_shots") or 0


def _effective(run: RunResult) -> dict[str, Any]:
    """The config of a run; of a bare base only what can change its scores."""
    config = dict(run.config or {})
    return _with_effect(_scoring_only(config)) if _kind(run) == "base" else config


def _without_seed(config: Mapping[str, Any]) -> dict[str, Any]:
    dropped = (SEED, "choices", "defaults", "adapter")
    return {key: value for key, value in config.items() if key not in dropped}


def _factors(
    runs: Sequence[RunResult],
) -> tuple[dict[str, dict[str, list[str]]], list[dict[str, str]]]:
    """Factors of each kind of run with their levels, and the levels of each run."""
    factors: dict[str, dict[str, list[str]]] = {}
    levels: list[dict[str, str]] = [{} for _ in runs]
    for kind in dict.fromkeys(_kind(run) for run in runs):
        members = [i for i, run in enumerate(runs) if _kind(run) == kind and run.config is not None]
        flat = [_flatten(_effective(runs[i])) for i in members]
        options = [runs[i].metrics.get("choices") or {} for i in members]
        factors[kind] = {}
        for key in dict.fromkeys(name.split(".")[0] for table in flat for name in table):
            for name, column in _factors_of(key, flat, options).items():
                factors[kind][name] = _ordered(column)
                for i, level in zip(members, column, strict=True):
                    levels[i][name] = level
    return factors, levels


def _factors_of(
    group: str, flat: Sequence[Mapping[str, Any]], options: Sequence[Mapping[str, Any]]
) -> dict[str, list[str]]:
    """What was varied within one config group: the option, keys of it, or both."""
    names = dict.fromkeys(
        name for table in flat for name in table if name == group or name.startswith(f"{group}.")
    )
    columns = {name: [table.get(name) for table in flat] for name in names}
    varied = {name: column for name, column in columns.items() if len(_distinct(column)) > 1}
    if not varied:
        return {}
    chosen = [option.get(group) for option in options]
    found: dict[str, list[str]] = {}
    if all(c is not None for c in chosen) and len(set(chosen)) > 1:
        found[group] = [str(c) for c in chosen]
        # What an option brings with it is no factor of its own.
        varied = {
            name: column
            for name, column in varied.items()
            if any(
                len(_distinct([v for v, o in zip(column, chosen, strict=True) if o == option])) > 1
                for option in set(chosen)
            )
        }
    if group == "quant" and group not in found:
        stored = [storage({group: _keys_of(group, table)}) for table in flat]
        if len(set(stored)) > 1:
            found[group] = stored
    # What follows from another key, as double_quant from data_type, is no factor of its own.
    for name, column in sorted(varied.items(), key=lambda item: -len(_distinct(item[1]))):
        texts = [_text(name, value) for value in column]
        if name in FILE_KEYS and len(set(texts)) < len(_distinct(column)):
            texts = [_MISSING if value is None else str(value) for value in column]
        if not any(_follows(texts, other) for other in found.values()):
            found[name] = texts
    return found


def _keys_of(group: str, flat: Mapping[str, Any]) -> dict[str, Any]:
    start = f"{group}."
    return {k.removeprefix(start): v for k, v in flat.items() if k.startswith(start)}


def _flatten(config: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in config.items():
        name = f"{prefix}{key}"
        if any(fnmatchcase(name, pattern) for pattern in _NOT_FACTORS) or key == "_convert_":
            continue
        if isinstance(value, Mapping) and value:
            flat |= _flatten(value, f"{name}.")
        else:
            flat[name] = value
    return flat


def _text(name: str, value: Any) -> str:
    if value is None or value == {}:
        return "all" if name.rpartition(".")[2].startswith("limit_") else _MISSING
    if name in FILE_KEYS:
        return Path(str(value)).name
    if name.endswith("_target_"):
        return str(value).rpartition(".")[2]
    if isinstance(value, float):
        return f"{value:g}"
    if isinstance(value, list):
        return "[" + ", ".join(str(item) for item in value) + "]"
    return str(value).lower() if isinstance(value, bool) else " ".join(str(value).split())


def _distinct(column: Sequence[Any]) -> set[str]:
    return {repr(value) for value in column}


def _follows(column: Sequence[str], other: Sequence[str]) -> bool:
    """Whether a column is a function of another one."""
    seen: dict[str, str] = {}
    return all(seen.setdefault(b, a) == a for a, b in zip(column, other, strict=True))


def _ordered(column: Sequence[str]) -> list[str]:
    """Levels by value where they are numbers, else in the order of the runs."""
    levels = list(dict.fromkeys(column))

    def number(level: str) -> float:
        return float("inf") if level in ("all", _MISSING) else float(level)

    try:
        return sorted(levels, key=number)
    except ValueError:
        return levels


def _sha256(run: RunResult, split: str) -> str | None:
    return run.metrics[split].get("sha256") or run.metrics["data"].get("sha256")


def _read_all(ablation: Ablation) -> dict[Path, list[Prediction]]:
    """Labelled predictions of every completed run, by folder."""
    found: dict[Path, list[Prediction]] = {}
    for entry in ablation.entries:
        run = entry.run
        if run.status != "completed" or run.metrics[ablation.split]["accuracy"] is None:
            continue
        try:
            predictions = read_predictions(run.run_dir, ablation.split)
        except (CheckpointError, ConfigError) as error:
            ablation.notes.append(f"{entry.label} has no part in tests and effects: {error}")
            continue
        found[run.run_dir] = [p for p in predictions if p.answer is not None]
    return found


def _correct(predictions: Sequence[Prediction]) -> dict[str, bool]:
    return {p.id: p.correct is True for p in predictions}


def _settings(
    ablation: Ablation, predictions: Mapping[Path, Sequence[Prediction]]
) -> list[Setting]:
    grouped: dict[Hashable, list[Entry]] = {}
    for entry in ablation.entries:
        section = entry.run.metrics[ablation.split]
        if entry.run.status == "completed" and section["accuracy"] is not None:
            key = (entry.setting, _sha256(entry.run, ablation.split), _trained_on(entry))
            grouped.setdefault(key, []).append(entry)
    settings = []
    names: dict[str, int] = {}
    for several in grouped.values():
        entries = _newest_of_each_seed(several)
        first = entries[0]
        sha256 = _sha256(first.run, ablation.split)
        sections = [e.run.metrics[ablation.split] for e in entries]
        tables = [
            _correct(predictions[e.run.run_dir]) for e in entries if e.run.run_dir in predictions
        ]
        interval = Interval(min(s["ci_low"] for s in sections), max(s["ci_high"] for s in sections))
        if len(tables) == len(entries) and all(t.keys() == tables[0].keys() for t in tables):
            rows = [[table[key] for key in tables[0]] for table in tables]
            interval = setting_interval(np.array(rows, dtype=bool))
        name = first.label
        names[name] = names.get(name, 0) + 1
        if names[name] > 1:
            name += f" (other questions, {str(_trained_on(first) or sha256)[:8]})"
        if repeated := len(several) - len(entries):
            ablation.notes.append(
                f"{name}: {repeated} run(s) repeat another one of the same seed on the same "
                "questions. The newest of them counts, for a repeated run is no further seed."
            )
        settings.append(
            Setting(
                name=name,
                kind=first.kind,
                levels=first.levels,
                entries=entries,
                n=int(sections[0]["n"]),
                accuracy=sum(s["accuracy"] for s in sections) / len(sections),
                interval=interval,
                sha256=sha256,
                majority_accuracy=float(sections[0]["majority_accuracy"]),
            )
        )
    if any(len(setting.entries) == 2 for setting in settings):
        ablation.notes.append(
            "Two seeds say little of a third: where seeds matter, the interval of two holds in "
            "about 90 of 100 cases instead of 95."
        )
    return settings


def _newest_of_each_seed(entries: Sequence[Entry]) -> list[Entry]:
    """Of runs with the same seed the newest; what only scores has no seed of its own."""

    def seed(entry: Entry) -> int | None:
        return entry.run.metrics["seed"] if entry.kind == "trained" else None

    by_age = sorted(entries, key=lambda entry: str(entry.run.metrics["started"]))
    newest = {seed(entry): entry for entry in by_age}
    return [entry for entry in entries if newest[seed(entry)] is entry]


def _trained_on(entry: Entry) -> str | None:
    """Hash of all questions of a trained run; None where every seed cuts other ones."""
    data = (entry.run.config or {}).get("data") or {}
    cut = data.get("num_val") or data.get("splits") == "pool"
    return None if cut or entry.kind != "trained" else entry.run.metrics["data"]["sha256"]


def _compare(
    ablation: Ablation, predictions: Mapping[Path, Sequence[Prediction]], baseline: str | None
) -> None:
    usable = [s for s in ablation.settings if all(e.run.run_dir in predictions for e in s.entries)]
    names = [setting.name for setting in usable]
    if baseline is not None and baseline not in names:
        raise ConfigError(
            f"baseline={baseline!r} is no setting of these runs. Choose one of: "
            f"{'; '.join(names) or 'none scored the split'}."
        )
    if not usable:
        return
    common = max({s.sha256 for s in usable}, key=lambda h: sum(s.sha256 == h for s in usable))
    if baseline is None:
        same = [s for s in usable if s.sha256 == common]
        bases = [s for s in same if s.kind == "base"]
        unquantised = [s for s in bases if not is_quantised(s.entries[0].run.config or {})]
        baseline = (*unquantised, *bases, same[0])[0].name
    reference = next(s for s in usable if s.name == baseline)
    ablation.baseline = baseline
    family = {
        s.name: [list(predictions[e.run.run_dir]) for e in s.entries]
        for s in usable
        if s.sha256 == reference.sha256
    }
    left_out = len(usable) - len(family)
    if left_out:
        ablation.notes.append(
            f"{left_out} setting(s) scored other questions than {baseline} and are not compared "
            "with it."
        )
    if len(family) < 2:
        return
    try:
        ablation.comparisons = compare_family(family, baseline)
    except ConfigError as error:
        ablation.notes.append(f"No paired tests: {error}")
