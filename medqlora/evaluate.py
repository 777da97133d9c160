"""Score a run, a bare base, a PEFT folder or any causal language model.

python -m medqlora.evaluate run=runs/DAY/TIME split=val
python -m medqlora.evaluate peft=none quant=nf4

Which questions share a row, and in what order, moves a score by rounding alone: less than 1e-4 nats
where the base computes in float32, and less than 0.1 nats in bfloat16 (0.08 is the most seen in 300
questions of a small random Gemma), which can turn a question whose two best letters are that close.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig, OmegaConf
from rich.console import Console
from rich.table import Table

from medqlora import instantiation, pipeline
from medqlora.data import MedMCQADataModule
from medqlora.entry import command, is_sweep
from medqlora.errors import ConfigError, MedQLoRAError
from medqlora.evaluation import (
    Comparison,
    cyclic_orders,
    read_predictions,
    read_run,
    score_arrays,
    summarise,
    to_predictions,
    write_predictions,
)
from medqlora.evaluation.generation import (
    Generator,
    Reply,
    parse_letter,
    summarise_replies,
    unpack,
    write_replies,
)
from medqlora.evaluation.results import CONFIG_FILE, RunResult
from medqlora.evaluation.sections import (
    BASE_NLL,
    calibration_section,
    constant_letter,
    content_free_questions,
    contextual_section,
    permutation_section,
    reorder,
    selective_section,
)
from medqlora.evaluation.tables import (
    ResultRow,
    accuracy_text,
    breakdown_table,
    comparison_table,
    result_row,
    result_table,
)
from medqlora.finetuning import MCQAModule
from medqlora.finetuning.callbacks import peak_memory_gb
from medqlora.runs import (
    RunRecord,
    describe,
    from_run,
    record_base,
    record_calibration,
    record_score,
    recorded,
    resolved,
    score_into,
    section_key,
)
from medqlora.schema import LETTERS, Question

log = logging.getLogger("medqlora.evaluate")  # under `python -m` the name would be __main__

_FROM_RUN = ("data", "prompt", "model", "quant", "peft", "seed")
_SPLITS = ("train", "val", "test")
_MODES = ("score", "generate")
_CALIBRATE = ("auto", "val", "none")
_ASKED = ("prompt", "model", "data.max_length")
"""Keys that must be equal for two scores to differ by storage and adapter alone."""

_CUT = (
    *("data.hub", "data.revision", "data.train_file", "data.val_file", "data.test_file"),
    *("data.splits", "data.num_val", "data.num_test", "data.drop", "seed"),
)
"""Keys that decide which split a question is in."""


def evaluate(cfg: DictConfig, run_dir: Path) -> Path:
    """Score one split and keep a run folder.

    Args:
        cfg: The composed config of `evaluate`, complete (`with_run`).
        run_dir: Where the run folder goes.

    Returns:
        The run folder.

    Raises:
        MedQLoRAError: If the request cannot work.
    """
    sweep = is_sweep()
    backend = "" if sweep else _check(cfg)
    with recorded(cfg, run_dir, "evaluate", keep_refused=sweep) as record:
        record.metrics["choices"] |= resolved(cfg).get("choices") or {}
        if sweep:
            backend = _check(cfg)  # the table of a sweep has a row for a refused job as well
        datamodule = pipeline.build_datamodule(cfg)
        datamodule.setup()
        _check_data(cfg, datamodule)
        splits = ["val", cfg.split] if cfg.evaluate.calibrate == "val" else [cfg.split]
        _refuse_trained_on(cfg, datamodule, splits)
        datamodule.fit_eval_rows(splits)
        if backend == "packed" and cfg.evaluate.mode == "score":
            scorer = score_into(record, cfg, datamodule, splits)
        else:
            scorer = _generate_into(record, cfg, datamodule, splits)
        record.metrics["scoring"] |= {"backend": backend, "mode": cfg.evaluate.mode}
        _complete(record, cfg, datamodule, scorer)
    return run_dir


def _check(cfg: DictConfig) -> str:
    """Refuse what cannot work before any data or weight is read; the backend that scores."""
    options = cfg.evaluate
    for key, value, choices in (
        ("split", cfg.split, _SPLITS),
        ("evaluate.mode", options.mode, _MODES),
        ("evaluate.calibrate", options.calibrate, _CALIBRATE),
    ):
        if value not in choices:
            raise ConfigError(f"{key}={value} is unknown. Choose {', '.join(choices)}.")
    if cfg.adapter is None and instantiation.make(cfg.get("peft")) is not None:
        raise ConfigError(
            "peft chooses what is trained, and evaluate trains nothing. Give run=DIR or "
            "adapter=FOLDER to score an adapter, or peft=none for the bare base."
        )
    if options.calibrate == "val" and cfg.split == "val":
        raise ConfigError(
            "evaluate.calibrate=val fits the temperature on the split it would be measured on. "
            "Choose split=test, or evaluate.calibrate=none."
        )
    for key, least in (("permutations", 1), ("max_new_tokens", 1)):
        value = options[key]
        if not isinstance(value, int) or isinstance(value, bool) or value < least:
            raise ConfigError(f"evaluate.{key}={value} is no number from {least} up. Give one.")
    instantiation.check(cfg)
    if options.base is not None:
        read_run(options.base)
    return pipeline.scoring_backend(cfg)


def _check_data(cfg: DictConfig, datamodule: MedMCQADataModule) -> None:
    needed = {cfg.split} | ({"val"} if cfg.evaluate.calibrate == "val" else set())
    for split in sorted(needed - datamodule.questions.keys()):
        raise ConfigError(
            f"data={datamodule.name} has no {split} questions here. Choose split="
            f"{' or '.join(datamodule.questions)}, or give data.{split}_file."
            + ("" if split == cfg.split else " Or set evaluate.calibrate=none.")
        )
    if cfg.evaluate.permutations not in (1, datamodule.num_options):
        raise ConfigError(
            f"evaluate.permutations={cfg.evaluate.permutations} is not every cyclic order of "
            f"{datamodule.num_options} options, and a preference for places cancels only over all. "
            f"Choose 1 or {datamodule.num_options}."
        )


def _refuse_trained_on(
    cfg: DictConfig, datamodule: MedMCQADataModule, splits: Sequence[str]
) -> None:
    """Refuse questions that the adapter was trained on, where the data are cut otherwise than then.

    Raises:
        ConfigError: If val or test has some.
    """
    run_dir = None if cfg.adapter is None else Path(cfg.adapter).parent
    if run_dir is None or not (run_dir / CONFIG_FILE).is_file():
        return
    try:
        saved = pipeline.read_config(run_dir)
        changed = _differing(resolved(cfg), saved, _CUT)
        if not changed:
            return
        then = pipeline.build_datamodule(saved)
        then.setup()
    except MedQLoRAError as error:
        log.warning("which questions %s was trained on is not known: %s", run_dir, error)
        return
    trained = {(q.id, q.stem, q.options) for q in then.questions.get("train", ())}
    for split in splits:
        asked = datamodule.questions[split]
        known = sum((q.id, q.stem, q.options) in trained for q in asked)
        if known and split != "train":
            raise ConfigError(
                f"{known} of these {len(asked)} {split} questions were trained on: {run_dir} had "
                f"other values of {', '.join(changed)}. Leave those as they were, or give the "
                "questions as data.train_file with split=train, which claims nothing of new ones."
            )


def _differing(
    config: Mapping[str, Any], other: Mapping[str, Any], keys: Sequence[str]
) -> list[str]:
    """Dotted keys that have other values in another config."""
    one, two = OmegaConf.create(dict(config)), OmegaConf.create(dict(other))
    return [key for key in keys if OmegaConf.select(one, key) != OmegaConf.select(two, key)]


def _generate_into(
    record: RunRecord, cfg: DictConfig, datamodule: MedMCQADataModule, splits: list[str]
) -> Generator:
    """Score splits through stock `generate`; with mode=generate let the model reply as well."""
    generator = pipeline.build_generator(cfg, datamodule, cfg.adapter)
    record.metrics["data"] = pipeline.data_section(datamodule)
    record.metrics["model"] = pipeline.model_section(cfg, generator.model)
    device = instantiation.device_of(cfg)
    for split in splits:
        questions = datamodule.questions[split]
        scores = torch.zeros(len(questions), datamodule.num_options)
        written: list[int | None] = [None] * len(questions)
        texts = [""] * len(questions)
        replying = cfg.evaluate.mode == "generate" and split == cfg.split
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(device)
        started = time.perf_counter()
        for batch in datamodule.loader(split):
            rows, prompts = zip(*unpack(batch), strict=True)
            letters, scores[list(rows)] = generator.letters(prompts)
            if replying:
                replies = generator.replies(prompts, cfg.evaluate.max_new_tokens)
                for row, letter, text in zip(rows, letters.tolist(), replies, strict=True):
                    written[row], texts[row] = letter, text
        seconds = time.perf_counter() - started
        predictions = to_predictions(questions, split, torch.arange(len(questions)), scores)
        section = summarise(predictions, questions)
        record_score(
            record, split, pipeline.Scored(predictions, section, seconds, peak_memory_gb(device))
        )
        if replying:
            read = [
                parse_letter(text, question.options)
                for text, question in zip(texts, questions, strict=True)
            ]
            record.metrics["generation"] = {
                "max_new_tokens": cfg.evaluate.max_new_tokens,
                "constrained": summarise_replies(written, predictions),
                "free": summarise_replies(read, predictions),
            }
            write_replies(
                record.run_dir,
                [
                    Reply(p.id, split, p.answer, letter, text)
                    for p, letter, text in zip(predictions, read, texts, strict=True)
                ],
            )
    record_calibration(record, splits)
    return generator


def _complete(
    record: RunRecord,
    cfg: DictConfig,
    datamodule: MedMCQADataModule,
    scorer: MCQAModule | Generator,
) -> None:
    """Everything beside the plain numbers: base, temperature, orders, figures."""
    questions = datamodule.questions[cfg.split]
    name = name_of(resolved(cfg))
    base = base_of(cfg)
    if base is not None:
        _compare(record, cfg, base, questions, name)
    predictions = read_predictions(record.run_dir, cfg.split)
    section = record.metrics[section_key(cfg.split)]
    _calibrate(record, cfg, predictions)
    record.metrics["selective"] = {cfg.split: selective_section(predictions)}
    letter = constant_letter(section)
    if letter is not None and len(predictions) > 1:
        log.warning(
            "every one of the %d predictions is %s: this model tells no question from another",
            len(predictions),
            LETTERS[letter],
        )
    if section["num_unlabelled"]:
        log.warning(
            "%d of %d questions have no label: they are in predictions.parquet and in no accuracy",
            section["num_unlabelled"],
            len(predictions),
        )
    if cfg.evaluate.permutations > 1:
        scores = [score_arrays(predictions)[0]]
        for order in cyclic_orders(datamodule.num_options)[1:]:
            shown = [reorder(question, order) for question in questions]
            scores.append(pipeline.score_questions(scorer, datamodule, shown).double().numpy())
        permuted, debiased = permutation_section(predictions, np.stack(scores))
        record.metrics["permutations"] = permuted
        write_predictions(record.run_dir / "permutations", debiased)
    if cfg.evaluate.contextual_calibration:
        empty = content_free_questions(datamodule.num_options)
        content_free = pipeline.score_questions(scorer, datamodule, empty).double().numpy()
        contextual, calibrated = contextual_section(predictions, content_free)
        record.metrics["contextual_calibration"] = contextual
        write_predictions(record.run_dir / "contextual_calibration", calibrated)
    if cfg.evaluate.figures:
        _draw(record, cfg, predictions, section, name)


def _compare(
    record: RunRecord, cfg: DictConfig, base: Path, questions: Sequence[Question], name: str
) -> None:
    """Pair with a base; one that was asked otherwise only where it was named, and then it says so.

    Raises:
        MedQLoRAError: If the base that `evaluate.base` names cannot be compared.
    """
    named = cfg.evaluate.base is not None
    try:
        other = _differing(resolved(cfg), read_run(base).config or {}, _ASKED)
        if other and not named:
            log.info("not compared with %s: it was scored with another %s", base, ", ".join(other))
            return
        record_base(record, base, cfg.split, questions, name)
    except MedQLoRAError as error:
        if named:
            raise
        log.info("not compared with %s: %s", base, error)
        return
    if other and (paired := (record.metrics.get("paired") or {}).get(cfg.split)):
        paired["name_a"] += f" (another {', '.join(other)})"
        log.warning(
            "%s was scored with another %s: the difference is also of that", base, ", ".join(other)
        )


def _draw(
    record: RunRecord,
    cfg: DictConfig,
    predictions: list[Any],
    section: Mapping[str, Any],
    name: str,
) -> None:
    from medqlora.evaluation.figures import save_figure, split_figures  # a second to import

    calibration = record.metrics.get("calibration") or {}
    measured = calibration.get("split") == cfg.split
    figures = split_figures(
        section,
        predictions,
        temperature=calibration.get("temperature") if measured else None,
        title=f"{name}, {cfg.split}",
    )
    for stem, figure in figures.items():
        save_figure(figure, record.run_dir / "figures" / stem)


def base_of(cfg: DictConfig) -> Path | None:
    """The evaluated bare base to compare with, if any."""
    if cfg.evaluate.base is not None:
        return Path(cfg.evaluate.base)
    if cfg.get("of_run") is None or cfg.adapter is None:
        return None
    folders = (Path(cfg.of_run) / "baselines" / name for name in reversed(instantiation.BASELINES))
    return next((folder for folder in folders if (folder / "metrics.json").is_file()), None)


def _calibrate(record: RunRecord, cfg: DictConfig, predictions: list[Any]) -> None:
    """Use the temperature of the run where none was fitted here."""
    if cfg.evaluate.calibrate == "none":
        record.metrics.pop("calibration", None)
    elif cfg.evaluate.calibrate == "val":
        fitted = record.metrics.get("calibration")
        if fitted is None:
            raise ConfigError(
                "evaluate.calibrate=val needs labelled val questions, and these have no labels. "
                "Set evaluate.calibrate=none."
            )
        if cfg.split != "test":
            record.metrics["calibration"] = calibration_section(
                fitted["temperature"], predictions, num_fitted=fitted["num_fitted"]
            )
    # Measured on val, a temperature fitted on val would look too good.
    elif cfg.get("of_run") is not None and cfg.split != "val":
        run = read_run(cfg.of_run)
        fitted = run.metrics.get("calibration") or {}
        if not fitted.get("temperature"):
            return
        other = _differing(resolved(cfg), run.config or {}, ("quant", *_ASKED))
        if (pipeline.adapter_of(run.run_dir, run.config or {}) is None) != (cfg.adapter is None):
            other.append("peft")
        if other:
            log.info(
                "no temperature: that of %s was fitted with another %s",
                cfg.of_run,
                ", ".join(other),
            )
        else:
            record.metrics["calibration"] = calibration_section(
                fitted["temperature"], predictions, num_fitted=fitted.get("num_fitted")
            )


def with_run(cfg: DictConfig, overridden: set[str]) -> DictConfig:
    """Take what the command line left open from the run folder that `run` names.

    Args:
        cfg: The composed config.
        overridden: Keys that were given on the command line. A group ("data") comes whole from the
            command line; of one that comes from the run, single values ("data.limit_test") change.

    Returns:
        A config with `run` replaced by its parts: `adapter` names the run's adapter, `of_run` the
        run and `choices` the options of the groups that came from it, so that the result says all
        of it again when it is run a second time.

    Raises:
        ConfigError: If `run` and `adapter` are both given.
        CheckpointError: If the folder is no run.
    """
    if cfg.run is None:
        return cfg
    if cfg.adapter is not None:
        raise ConfigError("run and adapter are both given and one is scored. Give one of them.")
    saved = pipeline.read_config(cfg.run)
    bare = "peft" in overridden
    folder = None if bare else pipeline.adapter_of(Path(cfg.run), saved)
    on_cpu = saved.get("trainer", {}).get("accelerator") == "cpu"
    parts = (*_FROM_RUN, "trainer") if on_cpu else _FROM_RUN
    complete = from_run(cfg, {**saved, "peft": {}}, parts, overridden)
    if bare:
        complete.peft = {}
    known = read_run(cfg.run).metrics.get("choices") or {}
    complete.choices = {key: known.get(key) for key in parts if key not in {*overridden, "seed"}}
    complete.run, complete.of_run = None, str(cfg.run)
    complete.adapter = None if folder is None else str(folder)
    return complete


def print_result(run_dir: Path, split: str, *, base: Path | None = None) -> None:
    """The tables an evaluation ends in.

    Args:
        run_dir: Its run folder.
        split: What was scored.
        base: Run folder of the base it was compared with.
    """
    run = read_run(run_dir)
    key = section_key(split)
    section = run.metrics[key]
    console = Console()
    rows = [_row(run, key)]
    if base is not None and BASE_NLL in section["by"]:
        rows.insert(0, _row(read_run(base), key))
    title = f"{run.metrics['data']['name']}, {split} split"
    console.print(result_table(rows, title=title))
    if paired := (run.metrics.get("paired") or {}).get(split):
        console.print(comparison_table([Comparison(**paired)], title="question by question"))
    if section["n"]:
        console.print(breakdown_table(section, "subject_name"))
        for name, heading in (
            ("difficulty", "by difficulty, read from the stem"),
            (BASE_NLL, "by difficulty, tertiles of the base's loss"),
        ):
            if section["by"].get(name):
                console.print(breakdown_table(section, name, heading))
    if extra := _extra_table(run.metrics, section):
        console.print(extra)
    console.print(f"run folder: {run_dir}", soft_wrap=True, highlight=False)


def name_of(config: Mapping[str, Any]) -> str:
    """What was scored in a few words; an adapter of a run by how the run made it."""
    if config.get("of_run") and config.get("adapter"):
        made = pipeline.read_config(config["of_run"])
        if not made.get("adapter"):
            return describe({**made, "quant": config["quant"]})
    return describe(config)


def _row(run: RunResult, key: str) -> ResultRow:
    return result_row(run, key, name=name_of(run.config or {}))


def _extra_table(metrics: Mapping[str, Any], section: Mapping[str, Any]) -> Table | None:
    """One line each for letter shares, temperature, orders, contextual calibration and replies."""
    lines: list[tuple[str, str]] = []
    baseline = {key: section[key] for key in ("majority_accuracy", "num_unlabelled")}
    if section["letter_share"]:
        right = section["letter_accuracy"] or [None] * len(section["letter_share"])
        shares = (
            f"{letter} {100 * share:.0f} %"
            + ("" if is_right is None else f" ({100 * is_right:.0f})")
            for letter, share, is_right in zip(
                LETTERS, section["letter_share"], right, strict=False
            )
        )
        lines.append(("letters given (letters right)", "  ".join(shares)))
    calibration = metrics.get("calibration") or {}
    if calibration.get("n"):
        lines.append(
            (
                f"temperature {calibration['temperature']:.2f}, fitted on val",
                f"ECE {100 * calibration['ece_before']:.1f} -> "
                f"{100 * calibration['ece_after']:.1f} %, loss {calibration['nll_before']:.3f} -> "
                f"{calibration['nll_after']:.3f} nats, n={calibration['n']}",
            )
        )
    if orders := metrics.get("permutations"):
        lines.append(
            (
                f"{orders['num_orders']} orders of the options",
                f"same option in all of them: {100 * orders['consistency']:.1f} % of "
                f"{orders['num_questions']}",
            )
        )
        if orders["mean_accuracy"] is not None:
            mean = {**baseline, **orders, "accuracy": orders["mean_accuracy"]}
            mean["n"] = orders["num_labelled"]
            lines.append(("averaged over the orders", accuracy_text(mean)))
            lines.append(("debiased", accuracy_text({**baseline, **orders["debiased"]})))
    if contextual := metrics.get("contextual_calibration"):
        lines.append(("contextual calibration", accuracy_text({**baseline, **contextual})))
    for name, replies in (metrics.get("generation") or {}).items():
        if isinstance(replies, Mapping):
            unread = f"unparsed {100 * replies['unparsed_fraction']:.1f} %"
            lines.append(
                (f"generated, {name}", f"{accuracy_text({**baseline, **replies})}  {unread}")
            )
    if not lines:
        return None
    table = Table(box=None, show_header=False, pad_edge=False)
    for name, text in lines:
        table.add_row(name, text)
    return table


@command("evaluate")
def main(cfg: DictConfig, run_dir: Path) -> None:
    """Score, keep a run folder, print the result."""
    task = HydraConfig.get().overrides.task
    cfg = with_run(cfg, {item.lstrip("+").split("=")[0] for item in task if item[0] != "~"})
    evaluate(cfg, run_dir)
    print_result(run_dir, cfg.split, base=base_of(cfg))


if __name__ == "__main__":
    main()
