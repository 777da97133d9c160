"""Take the result of a run out of its folder: a PEFT adapter, or one plain 16-bit model.

python -m medqlora.export run=runs/DAY/TIME format=adapter
python -m medqlora.export run=runs/DAY/TIME format=merged
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import re
import shlex
import shutil
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from huggingface_hub import HfApi
from huggingface_hub.utils import HFValidationError, disable_progress_bars, validate_repo_id
from omegaconf import DictConfig, OmegaConf
from rich.console import Console
from safetensors import SafetensorError, safe_open
from transformers import GenerationConfig, PreTrainedModel

from medqlora import pipeline
from medqlora.entry import command
from medqlora.errors import CheckpointError, ConfigError, MedQLoRAError
from medqlora.evaluation import RunResult, read_run, wilson_interval
from medqlora.evaluation.tables import (
    ResultRow,
    accuracy_text,
    breakdown_markdown,
    result_markdown,
    result_row,
)
from medqlora.finetuning import merge_adapter
from medqlora.finetuning.adapters import ADAPTER_CONFIG, ADAPTER_WEIGHTS, FULL_WEIGHTS
from medqlora.hub import (
    BUNDLED,
    display_name,
    http_statuses,
    is_hub_name,
    is_unreachable,
    offline_unless_reachable,
    resolve_path,
)
from medqlora.quantization import QuantConfig, dequantize
from medqlora.runs import describe, free_memory
from medqlora.schema import Prediction, Question

log = logging.getLogger("medqlora.export")

FORMATS = ("merged", "adapter")

_SHARD_SIZE = re.compile(r"[1-9]\d*[KMGT]B")

GEMMA_NOTICE = (
    "Gemma is provided under and subject to the Gemma Terms of Use found at "
    "ai.google.dev/gemma/terms"
)
"""The sentence that section 3.1 of the Gemma Terms of Use asks to be passed on."""


@dataclass(frozen=True)
class Change:
    """What merging did to the answers of the same questions.

    Attributes:
        split: Split the questions belong to.
        run: Predictions of the quantised base with its adapter.
        merged: Predictions of the merged model as read back from its files.
    """

    split: str
    run: Sequence[Prediction]
    merged: Sequence[Prediction]

    def as_dict(self) -> dict[str, Any]:
        """The numbers, for JSON; differences of scores in nats."""
        before = np.array([prediction.scores for prediction in self.run])
        after = np.array([prediction.scores for prediction in self.merged])
        difference = np.abs(after - before)
        return {
            "split": self.split,
            "n": len(self.run),
            "run": _accuracy(self.run),
            "merged": _accuracy(self.merged),
            "num_changed_answers": int((before.argmax(1) != after.argmax(1)).sum()),
            "mean_score_difference": float(difference.mean()),
            "max_score_difference": float(difference.max()),
        }


def export(cfg: DictConfig) -> Path:
    """Write the folder, whole or not at all.

    Args:
        cfg: The composed config of `export`.

    Returns:
        The folder.

    Raises:
        ConfigError: If the request cannot work, or the folder exists.
        CheckpointError: If the run folder is none, or its adapter is damaged.
        MedQLoRAError: If the folder cannot be written or uploaded.
    """
    _check(cfg)
    run_dir = Path(cfg.run)
    run = read_run(run_dir)
    config = pipeline.read_config(run_dir)
    output = Path(cfg.output) if cfg.output is not None else run_dir / "export" / cfg.format
    if output.exists() or output.is_symlink():
        raise ConfigError(
            f"{output} exists and nothing is overwritten. Remove it, or give another output=DIR."
        )
    adapter = pipeline.adapter_of(run_dir, config)
    if run.status != "completed":
        log.warning(
            "%s did not complete (%s): its adapter is exported as it is", run_dir, run.status
        )
    with _written_whole(output) as folder:
        if cfg.format == "adapter":
            _copy_adapter(run_dir, adapter, folder)
            change = None
        else:
            change = _merge(cfg, run_dir, folder)
        write_card(folder, run, cfg.format, change)
    if cfg.push_to_hub is not None:
        _push(output, cfg.push_to_hub, cfg.private)
    return output


def _check(cfg: DictConfig) -> None:
    if OmegaConf.is_missing(cfg, "run") or cfg.run is None:
        raise ConfigError("export needs run=runs/DAY/TIME, and run is not given.")
    if cfg.format not in FORMATS:
        hint = (
            " llama.cpp's convert_hf_to_gguf.py makes one from the folder of format=merged and the "
            "base's tokenizer.model."
            if cfg.format == "gguf"
            else ""
        )
        raise ConfigError(
            f"format={cfg.format} is not written here. Choose {' or '.join(FORMATS)}.{hint}"
        )
    if cfg.split not in ("val", "test"):
        raise ConfigError(f"split={cfg.split} is unknown. Choose val or test.")
    limit = cfg.limit
    if limit is not None and (isinstance(limit, bool) or not isinstance(limit, int) or limit < 0):
        raise ConfigError(f"limit={limit} is no number of questions: give 0 or more, or null.")
    if not _SHARD_SIZE.fullmatch(str(cfg.max_shard_size)):
        raise ConfigError(
            f"max_shard_size={cfg.max_shard_size} is no size of a file: write a number with its "
            "unit, such as 2GB or 500MB."
        )
    if cfg.push_to_hub is not None:
        try:
            validate_repo_id(cfg.push_to_hub)
        except HFValidationError as error:
            raise ConfigError(
                f"push_to_hub={cfg.push_to_hub} is no name of a repository: write OWNER/NAME."
            ) from error


@contextlib.contextmanager
def _written_whole(output: Path) -> Iterator[Path]:
    """A folder beside `output` that becomes `output` when everything in it was written."""
    temporary = output.with_name(f".{output.name}.{os.getpid()}.tmp")
    try:
        output.parent.mkdir(parents=True, exist_ok=True)
        _remove_leftovers(output)
        temporary.mkdir()
        try:
            yield temporary
            for file in temporary.rglob("*"):
                if file.is_file():
                    _make_durable(file)
            # A rename replaces an empty folder, which may have come into being meanwhile.
            if output.exists():
                raise ConfigError(f"{output} was made meanwhile: nothing is overwritten.")
            temporary.rename(output)
        finally:
            shutil.rmtree(temporary, ignore_errors=True)
    except (OSError, SafetensorError) as error:
        reason = getattr(error, "strerror", None) or " ".join(str(error).split())
        raise MedQLoRAError(
            f"{output} could not be written ({reason}): free some space, or give output=DIR on "
            "another disk that can be written to."
        ) from error


def _make_durable(file: Path) -> None:
    # safetensors keeps its files to their owner; an export is there to be passed on.
    file.chmod(file.stat().st_mode | (file.parent.stat().st_mode & 0o044))
    with file.open("rb") as stream:
        os.fsync(stream.fileno())


def _remove_leftovers(output: Path) -> None:
    """Folders of exports that were killed; those of a process that lives are left alone."""
    for folder in output.parent.glob(f".{output.name}.*.tmp"):
        number = folder.name.split(".")[-2]
        if number.isdecimal() and not _is_alive(int(number)):
            shutil.rmtree(folder, ignore_errors=True)


def _is_alive(process: int) -> bool:
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except OSError:
        return True
    return process != os.getpid()


# --- format=adapter -------------------------------------------------------------------------------


def _copy_adapter(run_dir: Path, adapter: Path | None, folder: Path) -> None:
    """Copy the adapter's files; a run folder from elsewhere is data and may hold anything."""
    if adapter is None:
        raise ConfigError(f"{run_dir} is a bare base without adapter: choose format=merged.")
    if (adapter / FULL_WEIGHTS).exists():
        raise ConfigError(
            f"{run_dir} was trained with peft=full, which has no adapter: choose format=merged."
        )
    for name in (ADAPTER_CONFIG, ADAPTER_WEIGHTS):
        if not (adapter / name).is_file():
            raise CheckpointError(f"{adapter} has no {name}: copy the run folder again.")
    for file in sorted(adapter.iterdir()):
        if file.is_symlink() or not file.is_file():
            raise CheckpointError(
                f"{file} is no plain file, and an adapter holds nothing else: remove it."
            )
        shutil.copyfile(file, folder / file.name)
    try:
        if not json.loads((folder / ADAPTER_CONFIG).read_text())["peft_type"]:
            raise KeyError("peft_type")
        with safe_open(folder / ADAPTER_WEIGHTS, framework="pt") as weights:
            weights.keys()
    except (ValueError, KeyError, TypeError, SafetensorError) as error:
        raise CheckpointError(
            f"{adapter} is damaged ({' '.join(str(error).split())}): copy the run folder again."
        ) from error


# --- format=merged --------------------------------------------------------------------------------


def _merge(cfg: DictConfig, run_dir: Path, folder: Path) -> Change | None:
    """Write the merged model and score what was written."""
    run = pipeline.load_run(run_dir, device=cfg.device)
    _check_space(run.metrics, folder)
    questions = _questions(cfg, run)
    before = run.predict(questions) if questions else []
    path, revision = run.config["model"]["path"], run.config["model"].get("revision")
    model = run.module.model
    run.module.model = torch.nn.Identity()
    merged = merge_adapter(cast(PreTrainedModel, model), dequantize)
    del model
    if (generation := _generation_config(path, revision)) is not None:
        merged.generation_config = generation
    merged.save_pretrained(folder, max_shard_size=cfg.max_shard_size)
    run.datamodule.tokenizer.save_pretrained(folder)
    _check_tied(folder)
    del merged
    free_memory()
    if not questions:
        return None
    plain = QuantConfig(data_type="none", double_quant=False, skip_modules=())
    config = run.config | {"model": {"path": str(folder)}, "acceleration": _PLAIN}
    base = pipeline.build_base(config, plain)
    reloaded = pipeline.LoadedRun(
        folder,
        config,
        run.metrics,
        pipeline.build_scoring_module(config, base, run.datamodule),
        run.datamodule,
    )
    return Change(cfg.split, before, reloaded.predict(questions))


_PLAIN = {
    "_target_": "medqlora.acceleration.Acceleration",
    "compile": "none",
    "fused": "off",
}


def _questions(cfg: DictConfig, run: pipeline.LoadedRun) -> list[Question]:
    """The questions that are scored before and after."""
    if cfg.limit == 0:
        return []
    try:
        run.datamodule.setup()
    except MedQLoRAError as error:
        raise type(error)(
            f"the data of the run cannot be had to measure what merging changes: {error} Or set "
            "limit=0 to leave the measurement out."
        ) from error
    if cfg.split not in run.datamodule.questions:
        raise ConfigError(
            f"the data of the run have no {cfg.split} questions to measure what merging changes: "
            f"choose split={' or '.join(run.datamodule.questions)}, or set limit=0 to leave the "
            "measurement out."
        )
    return run.datamodule.questions[cfg.split][: cfg.limit]


def _check_space(metrics: Mapping[str, Any], folder: Path) -> None:
    needed = float(metrics["model"].get("weight_gb_16bit") or 0.0)
    free = shutil.disk_usage(folder).free / 1e9
    if free < needed:
        raise ConfigError(
            f"{folder.parent} has {free:.1f} GB free and the merged model takes {needed:.1f} GB: "
            "free some space, or give output=DIR on another disk."
        )


def _generation_config(path: str, revision: str | None) -> GenerationConfig | None:
    """The base's own generation config; None where it has none."""
    folder = Path(resolve_path(path)).expanduser()
    with contextlib.suppress(OSError, ValueError):
        if folder.is_dir():
            return GenerationConfig.from_pretrained(str(folder))
        with offline_unless_reachable():
            return GenerationConfig.from_pretrained(path, revision=revision or "main")
    return None


def _check_tied(folder: Path) -> None:
    """Gemma's head is its embedding: a second copy in the files would come untied when trained."""
    names: set[str] = set()
    for file in folder.glob("*.safetensors"):
        with safe_open(file, framework="pt") as weights:
            names.update(weights.keys())
    config = json.loads((folder / "config.json").read_text())
    if "lm_head.weight" in names or not config.get("tie_word_embeddings", True):
        raise MedQLoRAError(
            "the merged model was not saved with tied embeddings: this version of transformers is "
            "not supported. Install transformers>=5.17,<5.24."
        )


def _accuracy(predictions: Sequence[Prediction]) -> dict[str, Any]:
    labelled = [p.correct for p in predictions if p.correct is not None]
    if not labelled:
        return {"n": 0, "accuracy": None, "ci_low": None, "ci_high": None}
    low, high = wilson_interval(sum(labelled), len(labelled))
    accuracy = sum(labelled) / len(labelled)
    return {"n": len(labelled), "accuracy": accuracy, "ci_low": low, "ci_high": high}


# --- the model card -------------------------------------------------------------------------------


def write_card(folder: Path, run: RunResult, format: str, change: Change | None) -> None:
    """Write README.md, NOTICE and, where a change was measured, export.json.

    Args:
        folder: The export.
        run: The run it comes from.
        format: "adapter" or "merged".
        change: What merging did; None if it was not measured.
    """
    (folder / "README.md").write_text(card(run, format, change), encoding="utf-8")
    if _is_gemma(run):
        (folder / "NOTICE").write_text(
            f"{GEMMA_NOTICE}\n\nThe weights were modified: see README.md.\n", encoding="utf-8"
        )
    if change is not None:
        text = json.dumps(change.as_dict(), indent=2) + "\n"
        (folder / "export.json").write_text(text, encoding="utf-8")


def card(run: RunResult, format: str, change: Change | None) -> str:
    """The model card, Markdown with the hub's front matter; every number is read from the run."""
    config = run.config or {}
    base = str(config["model"]["path"])
    name = display_name(base)
    parts = [
        _front_matter(run, format, base),
        f"# {name}, {describe(config)}, on {run.metrics['data']['name']}\n",
        _summary(format, name, config),
        "## Intended use and limits\n\n" + _USE,
        "## Licence\n\n" + _licence(run, name),
        "## Data\n\n" + _data(run),
        "## Method\n\n" + _method(run),
        "## Results\n\n" + _results(run),
    ]
    if format == "merged":
        parts.append("## What merging changed\n\n" + _change(change))
    parts.append("## How to use it\n\n" + _usage(run, format, name))
    return "\n".join(parts)


_USE = """\
For research on language models and medical multiple-choice questions. The model picks one of the
given options; it does not explain, and its probabilities are those of a model, not of a patient.

**This is no medical device and gives no medical advice.** It is wrong often, as the results below
show, and sounds no less sure when it is. Do not use it for the diagnosis, treatment or care of
anybody, or as the only source in teaching. How it answers questions unlike those it was scored on
was not measured.
"""

_USAGE_ADAPTER = """\
```python
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer, BitsAndBytesConfig

base = AutoModelForCausalLM.from_pretrained(
    {base!r}, dtype=torch.{dtype}, quantization_config={storage}
)
model = PeftModel.from_pretrained(base, "FOLDER")
tokenizer = AutoTokenizer.from_pretrained({base!r})
```

{remark}
"""

_SAME_STORAGE = "The base is stored here as it was in training; over another storage scores differ."
_OTHER_STORAGE = (
    "In training the base was stored as the table above says, which stock transformers does not "
    "offer: over the plain base of these lines the scores differ from those of the run."
)

_USAGE_MERGED = """\
```python
from transformers import AutoModelForCausalLM, AutoTokenizer

model = AutoModelForCausalLM.from_pretrained("FOLDER", dtype="bfloat16")
tokenizer = AutoTokenizer.from_pretrained("FOLDER")
```
"""


def _is_gemma(run: RunResult) -> bool:
    """Whether the base is Google's: the bundled model has only its architecture."""
    return not str((run.config or {})["model"]["path"]).startswith(BUNDLED)


def _front_matter(run: RunResult, format: str, base: str) -> str:
    lines = ["---", f"library_name: {'peft' if format == 'adapter' else 'transformers'}"]
    lines.append(f"license: {'gemma' if _is_gemma(run) else 'mit'}")
    if is_hub_name(base):
        lines += [f"base_model: {json.dumps(base)}"]
        relation = "adapter" if format == "adapter" else "finetune"
        lines += [f"base_model_relation: {relation}"]
    if (run.config or {})["data"].get("hub"):
        lines += ["datasets:", f"  - {json.dumps(run.config['data']['hub'])}"]  # type: ignore[index]
    lines += ["pipeline_tag: text-generation", "language: en"]
    lines += ["tags:", "  - medical", "  - multiple-choice", "  - medqlora", "---", ""]
    return "\n".join(lines)


def _summary(format: str, name: str, config: Mapping[str, Any]) -> str:
    what = (
        f"An adapter in PEFT's format for {name}."
        if format == "adapter"
        else f"{name} with an adapter folded into its weights, in bfloat16, never rounded back to "
        "fewer bits."
    )
    return f"{what} Made with medqlora: {describe(config)}.\n"


def _licence(run: RunResult, name: str) -> str:
    if not _is_gemma(run):
        return f"{name} is the toy model that comes with medqlora, MIT.\n"
    return (
        f"{GEMMA_NOTICE}. This is a modified version of {name}; its use is bound by those terms "
        "and by the Gemma Prohibited Use Policy (ai.google.dev/gemma/prohibited_use_policy).\n"
    )


def _data(run: RunResult) -> str:
    data = run.metrics["data"]
    config = (run.config or {})["data"]
    source = config.get("hub") or "files"
    lines = [
        f"- {data['name']} ({source}"
        + (f", revision {config['revision']}" if config.get("revision") else "")
        + ")",
        f"- questions: {data['num_train']} train, {data['num_val']} val, {data['num_test']} test; "
        f"{data['num_dropped']} left out because of an audit finding",
        f"- SHA-256 of the questions in use: `{data['sha256']}`",
        f"- prompt: `{(run.config or {})['prompt'].get('name')}`; explanations never enter it",
    ]
    return "\n".join(lines) + "\n"


def _method(run: RunResult) -> str:
    config, metrics = run.config or {}, run.metrics
    train, model = metrics["train"], metrics["model"]
    base = display_name(str(config["model"]["path"]))
    rows = [
        ("base", f"{base}, revision {model['revision'] or 'of the folder'}"),
        ("storage of the base", _options(config["quant"], _QUANT_KEYS)),
        ("adapter", _options(config.get("peft"), _PEFT_KEYS)),
        ("trained weights", f"{model['num_trainable'] or 0:,} of {model['num_parameters'] or 0:,}"),
        ("loss", str((config.get("loss") or {}).get("_target_", "none")).rpartition(".")[2]),
        ("optimiser", _options(config.get("optimizer"))),
        ("schedule", _options(config.get("scheduler"))),
        ("tokens a row", str(config["data"].get("token_budget"))),
        ("updates", str(train["num_steps"])),
        ("seed", str(metrics["seed"])),
        ("device", str(metrics["hardware"]["device"])),
        ("versions", ", ".join(f"{k} {v}" for k, v in metrics["versions"].items() if v)),
        ("config hash", f"`{metrics['config_hash']}`"),
    ]
    return "| | |\n|---|---|\n" + "".join(
        f"| {key} | {str(value).replace('|', '&#124;')} |\n" for key, value in rows
    )


_QUANT_KEYS = ("data_type", "double_quant", "block_size", "compute_dtype", "embedding")
_PEFT_KEYS = (
    "r",
    "lora_alpha",
    "lora_dropout",
    "use_dora",
    "use_rslora",
    "init_lora_weights",
    "target_modules",
)


def _options(node: Mapping[str, Any] | None, keys: Sequence[str] | None = None) -> str:
    """A config node in one line."""
    if not node:
        return "none"
    name = str(node.get("_target_", "")).rpartition(".")[2]
    chosen = keys or [key for key in node if not key.startswith("_")]
    values = [f"{key}={_value(node[key])}" for key in chosen if key in node]
    return ", ".join([name, *values] if name else values)


def _value(value: Any) -> str:
    return " ".join(map(str, value)) if isinstance(value, list) else str(value)


def _results(run: RunResult) -> str:
    baselines = sorted((run.run_dir / "baselines").glob("*"))
    found = []
    for folder in baselines:
        with contextlib.suppress(CheckpointError):
            found.append(read_run(folder))
    text = []
    for split in ("val", "test"):
        if not run.metrics[split]["n"]:
            continue
        rows: list[ResultRow] = [
            result_row(result, split, name=describe(result.config)) for result in (*found, run)
        ]
        text.append(f"On {split}:\n\n{result_markdown(rows)}")
    if not text:
        return "This run was not scored.\n"
    split = "test" if run.metrics["test"]["n"] else "val"
    section = run.metrics[split]
    if section["loss"] is not None:
        text.append(
            f"On {split}: {accuracy_text(section)}; cross-entropy {section['loss']:.3f} nats "
            f"(ln 4 = 1.386 is knowing nothing), calibration error (ECE) {section['ece']:.3f}.\n"
        )
    if section["by"].get("subject_name"):
        text.append(f"By subject, on {split}:\n\n{breakdown_markdown(section)}")
    return "\n".join(text)


def _change(change: Change | None) -> str:
    if change is None:
        return "Not measured (limit=0).\n"
    numbers = change.as_dict()

    def told(side: Mapping[str, Any]) -> str:
        if side["accuracy"] is None:
            return "no labels"
        return (
            f"{100 * side['accuracy']:.1f} % [{100 * side['ci_low']:.1f}, "
            f"{100 * side['ci_high']:.1f}]"
        )

    return (
        f"Measured on {numbers['n']} questions of {change.split}, the merged model as read back "
        f"from its files:\naccuracy {told(numbers['run'])} before and {told(numbers['merged'])} "
        f"after (95 % Wilson intervals), {numbers['num_changed_answers']} of {numbers['n']} "
        "answers changed;\n"
        f"log-probabilities of the letters differ by {numbers['mean_score_difference']:.2g} nats "
        f"on average and {numbers['max_score_difference']:.2g} at most.\n"
    )


def _usage(run: RunResult, format: str, name: str) -> str:
    config = run.config or {}
    code = _USAGE_MERGED if format == "merged" else _adapter_usage(config["quant"], name)
    prompt = config["prompt"].get("text")
    if not prompt:
        return code
    # An indented block shows a text of any content as it is.
    shown = "\n".join("    " + line for line in str(prompt).splitlines())
    return (
        f"{code}\nThe prompt, after one BOS:\n\n{shown}\n\nThe answer is the likeliest of the "
        "letters as the next token, each with a space before it where the prompt says so "
        f"(answer_prefix {config['prompt'].get('answer_prefix')!r}).\n"
    )


def _adapter_usage(quant: Mapping[str, Any], name: str) -> str:
    """Lines that load the adapter over the base as it was in training, where they can."""
    data_type, dtype = quant["data_type"], quant["compute_dtype"]
    usual = quant.get("embedding", "bf16") == "bf16" and quant.get("block_size", 64) == 64
    storage, remark = "None", _SAME_STORAGE
    if usual and data_type in ("nf4", "fp4"):
        storage = (
            f"BitsAndBytesConfig(\n        load_in_4bit=True,\n"
            f"        bnb_4bit_quant_type={data_type!r},\n"
            f"        bnb_4bit_use_double_quant={bool(quant['double_quant'])},\n"
            f"        bnb_4bit_compute_dtype=torch.{dtype},\n    )"
        )
    elif usual and data_type == "int8":
        storage = "BitsAndBytesConfig(load_in_8bit=True)"
    elif not usual or data_type != "none":
        remark = _OTHER_STORAGE
    return _USAGE_ADAPTER.format(base=name, dtype=dtype, storage=storage, remark=remark)


def _push(output: Path, name: str, private: bool) -> None:
    """Upload a finished export as one commit: the repository has all of it or none.

    Raises:
        MedQLoRAError: If it was not uploaded; the folder stays.
    """
    in_terminal = sys.stderr.isatty()
    if not in_terminal:
        disable_progress_bars()
    try:
        api = HfApi()
        api.create_repo(name, private=private, exist_ok=True)
        api.upload_folder(repo_id=name, folder_path=output, commit_message="Export of medqlora")
    except Exception as error:
        if in_terminal:
            print(file=sys.stderr)  # a progress bar that broke off has not ended its line
        raise MedQLoRAError(
            f"{output} is complete and was not uploaded to {name}: {_why_not_uploaded(error)} "
            f"Then upload it with `hf upload {name} {shlex.quote(str(output))}`."
        ) from error
    log.info("uploaded to %s/%s", api.endpoint, name)


def _why_not_uploaded(error: BaseException) -> str:
    """One sentence or two: what the hub said, and what to do about it."""
    statuses = http_statuses(error)
    if 401 in statuses:
        return (
            "the hub does not know who asks. Log in with `hf auth login` and a token that may "
            "write."
        )
    if 403 in statuses:
        return (
            "the account that is logged in may not write there. Take a token that may write, or a "
            "name of your own."
        )
    if 404 in statuses:
        return "there is no such owner on the hub. Check the spelling of OWNER/NAME."
    if is_unreachable(error):
        return (
            "the hub cannot be reached or broke off. Check the network, HF_ENDPOINT and "
            "HF_HUB_OFFLINE."
        )
    reason = " ".join(str(error).split())[:300] or type(error).__name__
    return f"the hub refused it ({reason.rstrip('.')}). Correct that."


@command("export")
def main(cfg: DictConfig, run_dir: Path) -> None:
    """Export, and say where it is and what it changed."""
    output = export(cfg)
    console = Console()
    file = output / "export.json"
    if file.is_file():
        numbers = json.loads(file.read_text())
        console.print(
            f"merging changed {numbers['num_changed_answers']} of {numbers['n']} answers on "
            f"{numbers['split']}, and scores by {numbers['mean_score_difference']:.2g} nats on "
            f"average, {numbers['max_score_difference']:.2g} at most",
            highlight=False,
        )
    console.print(f"exported to {output}", soft_wrap=True, highlight=False)


if __name__ == "__main__":
    main()
