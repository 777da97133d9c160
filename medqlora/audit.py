"""Check a data set and say, row by row, what is wrong with it.

python -m medqlora.audit data=medmcqa
python -m medqlora.audit data=files data.test_file=mine.jsonl
"""

from __future__ import annotations

import copy
import json
import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pandas as pd
from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig, OmegaConf
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table
from rich.text import Text

from medqlora import instantiation
from medqlora.config import CONFIG_DIR
from medqlora.data import AuditReport, MedMCQADataModule, load_tokenizer
from medqlora.entry import command
from medqlora.errors import ModelError
from medqlora.evaluation import wilson_interval
from medqlora.evaluation.results import replace_file

log = logging.getLogger("medqlora.audit")  # under `python -m` the name would be __main__

SUMMARY_FILE = "audit.json"
FINDINGS_FILE = "audit.parquet"

MEANINGS = {
    "missing_field": "a text is empty",
    "unlabelled": "no answer is given",
    "duplicate_question": "repeats the question text of an earlier row",
    "identical": "repeats question and options of an earlier row",
    "conflicting": "one question and options, different answers",
    "repeated_options": "an option stands there twice",
    "ambiguous_gold": "the right text is another option as well",
    "image_reference": "speaks of an image that is not there",
    "deleted_rt": 'lost the letters "rt", as in "hypeension"',
    "negated": 'has a word such as "not" or "except" in its stem',
    "all_or_none_of_the_above": "an option speaks of the others",
    "near_duplicate": "a training question all but repeats one of another split",
    "missing_id": "has no id in a file with ids",
    "duplicate_id": "repeats the id of another row",
    "invalid_field": "a field is neither text nor number",
    "invalid_label": "the label names no option",
    "mixed_label_base": "labels count from 0 and from 1",
    "unknown_label_base": "labels may count from 0 or from 1",
    "mixed_options": "some rows have five options, others four",
}


def audit(cfg: DictConfig, run_dir: Path) -> AuditReport:
    """Audit a data set; write `audit.json` and `audit.parquet`.

    Args:
        cfg: The composed config of `audit`.
        run_dir: Where the files go.

    Returns:
        What was found.

    Raises:
        MedQLoRAError: If the data cannot be read.
    """
    report = _datamodule(cfg).audit(near=cfg.near)
    write(report, run_dir)
    return report


def _datamodule(cfg: DictConfig) -> MedMCQADataModule:
    cfg = copy.deepcopy(cfg)
    if cfg.data.get("token_budget") == "auto":
        cfg.data.token_budget = 2048  # rows are not packed here
    try:
        tokenizer = load_tokenizer(cfg.model.path, cfg.model.get("revision"))
    except ModelError as error:
        log.warning("lengths in tokens are left out: %s", error)
        tokenizer = None
    datamodule = instantiation.make(
        cfg.data, tokenizer=tokenizer, prompt=instantiation.make(cfg.prompt), seed=cfg.seed
    )
    assert isinstance(datamodule, MedMCQADataModule)
    return datamodule


def with_own_tokenizer(cfg: DictConfig, choices: Mapping[str, Any], given: set[str]) -> DictConfig:
    """Take the bundled tokenizer for the bundled questions, which need no hub, unless one is given.

    Args:
        cfg: The composed config.
        choices: Options by group, as composed.
        given: Groups and top-level keys that were given on the command line.
    """
    if choices.get("data") == "sample" and "model" not in given:
        cfg = OmegaConf.create(OmegaConf.to_container(cfg))  # type: ignore[arg-type]
        cfg.model = OmegaConf.load(CONFIG_DIR / "model" / "tiny_gemma.yaml")
    return cfg


def write(report: AuditReport, run_dir: Path) -> None:
    """Write `audit.json` and `audit.parquet`, each whole or not at all."""
    text = json.dumps(report.summary, indent=2, ensure_ascii=False) + "\n"
    replace_file(
        run_dir / FINDINGS_FILE, lambda file: report.findings.to_parquet(file, index=False)
    )
    replace_file(run_dir / SUMMARY_FILE, lambda file: file.write_text(text, encoding="utf-8"))


# --- tables ---------------------------------------------------------------------------------------


def tables(report: AuditReport, title: str) -> list[Table]:
    """What was found, for a terminal.

    Args:
        report: Of an audit.
        title: Name of the data set.
    """
    summary = report.summary
    splits: Mapping[str, Any] = summary["splits"]
    made = [
        _splits_table(summary, splits, title),
        _findings_table(summary, report.findings),
        _letters_table(summary, splits),
        _shares_table("subject", summary["subjects"], summary["num_rows"]),
        _shares_table("choice type", summary["choice_types"], summary["num_rows"]),
    ]
    if "length_tokens" in summary:
        made.append(_lengths_table(summary["length_tokens"]))
    return made


def _splits_table(summary: Mapping[str, Any], splits: Mapping[str, Any], title: str) -> Table:
    base = summary.get("label_base")
    told = "unknown" if base is None else f"counted from {base}"
    groups = ", ".join(f"{number} {name}" for name, number in summary["groups"].items())
    caption = (
        f"{summary['num_options']} options, labels {told}; groups of equal questions: {groups}"
    )
    rows = [
        [split, part["num_rows"], part["num_labelled"], part["null_explanations"]]
        for split, part in (*splits.items(), ("all", summary))
    ]
    return _table(["", "rows", "labelled", "without explanation"], rows, title, caption)


def _findings_table(summary: Mapping[str, Any], findings: pd.DataFrame) -> Table:
    first = findings.drop_duplicates("finding").set_index("finding")
    rows = []
    for name, number in summary["findings"].items():
        example = ""
        if number:
            found = first.loc[name]
            example = f"{found['split']} row {found['row']}"
        share = f"{100 * number / max(1, summary['num_rows']):.2f} %"
        rows.append([name, number, share, MEANINGS.get(name, ""), example])
    caption = "rows with the finding; each is in audit.parquet with its id"
    return _table(
        ["finding", "rows", "share", "meaning", "first"], rows, "findings", caption, texts=(0, 3, 4)
    )


def _letters_table(summary: Mapping[str, Any], splits: Mapping[str, Any]) -> Table:
    letters = list(summary["letter_counts"])
    rows = []
    for split, part in (*splits.items(), ("all", summary)):
        if part["majority_letter"] is None:
            continue
        number = part["letter_counts"][part["majority_letter"]]
        low, high = wilson_interval(number, part["num_labelled"])
        rows.append(
            [
                split,
                *(f"{100 * part['letter_shares'][letter]:.2f}" for letter in letters),
                f"{part['majority_letter']} {100 * part['majority_share']:.2f} %",
                f"[{100 * low:.2f}, {100 * high:.2f}]",
                part["num_labelled"],
            ]
        )
    caption = "accuracy of always giving one letter, in %; the best is the majority baseline"
    headings = ["", *letters, "majority", "95 % interval", "n"]
    return _table(headings, rows, "answer letters", caption)


def _shares_table(heading: str, counts: Mapping[str, int], total: int) -> Table:
    rows = [
        [name, number, f"{100 * number / max(1, total):.1f} %"] for name, number in counts.items()
    ]
    return _table([heading, "rows", "share"], rows, None, None)


def _lengths_table(lengths: Mapping[str, Mapping[str, float]]) -> Table:
    names = list(lengths["all"])
    rows = [
        [split, *(f"{values[name]:.0f}" for name in names)]
        for split, values in lengths.items()
        if values
    ]
    return _table(["", *names], rows, "prompt length in tokens", None)


def _table(
    headings: Sequence[str],
    rows: Sequence[Sequence[Any]],
    title: str | None,
    caption: str | None,
    texts: Sequence[int] = (0,),
) -> Table:
    """A table; what comes from the data is shown as it is, without markup."""
    table = Table(
        title=None if title is None else Text(title),
        caption=None if caption is None else Text(caption),
        title_justify="left",
        caption_justify="left",
        box=SIMPLE_HEAD,
        show_edge=False,
        pad_edge=False,
    )
    for index, heading in enumerate(headings):
        justify = "left" if index in texts else "right"
        # Texts fold in a narrow terminal; names and numbers stay whole.
        fold = index > 0 and index in texts
        table.add_column(Text(heading), justify=justify, overflow="fold", no_wrap=not fold)
    for row in rows:
        table.add_row(*(Text(str(cell)) for cell in row))
    return table


@command("audit")
def main(cfg: DictConfig, run_dir: Path) -> None:
    """Audit, write the findings, print the tables."""
    hydra = HydraConfig.get()
    given = {item.lstrip("+~").split("=")[0].split(".")[0] for item in hydra.overrides.task}
    report = audit(with_own_tokenizer(cfg, hydra.runtime.choices, given), run_dir)
    console = Console()
    for table in tables(report, cfg.data.name):
        console.print(table)
        console.print()
    console.print(f"findings: {run_dir / FINDINGS_FILE}", soft_wrap=True, highlight=False)


if __name__ == "__main__":
    main()
