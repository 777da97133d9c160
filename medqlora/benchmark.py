"""The before/after table: size, accuracy, memory and speed of one model in four states.

python -m medqlora.benchmark run=runs/DAY/TIME
python -m medqlora.benchmark model=gemma_2b quant=nf4_full

Each state is loaded alone, measured, kept as a run folder of its own, and freed before the next.
"""

from __future__ import annotations

import contextlib
import ctypes
import json
import logging
import shutil
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig, OmegaConf
from rich.console import Console
from transformers import PreTrainedModel

from medqlora import instantiation, pipeline
from medqlora.budget import optimizer_of, random_row, take_updates
from medqlora.config import CONFIG_DIR
from medqlora.data import MedMCQADataModule
from medqlora.entry import command, one_line
from medqlora.errors import ConfigError, MedQLoRAError, ModelError, is_out_of_memory
from medqlora.evaluation import Comparison, hardware, read_predictions, versions
from medqlora.evaluation.results import replace_file
from medqlora.evaluation.statistics import compare_family
from medqlora.evaluation.tables import (
    UNKNOWN,
    ResultRow,
    comparison_markdown,
    comparison_table,
    result_markdown,
    result_table,
    text_markdown,
    text_table,
)
from medqlora.finetuning import (
    MCQAModule,
    load_adapter,
    merge_adapter,
)
from medqlora.quantization import Checkpoint, QuantConfig, dequantize
from medqlora.runs import describe, free_memory, from_run, record_score, recorded, resolved
from medqlora.schema import PackedBatch, Question

log = logging.getLogger("medqlora.benchmark")  # under `python -m` the name would be __main__

BARE = ("base_16bit", "base_quantized")
ROWS = (*BARE, "adapter", "merged")

_FROM_RUN = (
    "data", "prompt", "model", "quant", "peft", "optimizer", "scheduler", "loss", "acceleration",
    "trainer", "seed",
)  # fmt: skip
_SCORING = ("data", "prompt", "model", "seed")
_SPLITS = ("train", "val", "test")
_PLAIN = {
    "_target_": "medqlora.quantization.QuantConfig",
    "data_type": "none",
    "double_quant": False,
    "compute_dtype": "bfloat16",
    "skip_modules": [],
}
_WARM_UP = 3


def with_run(cfg: DictConfig, overridden: set[str]) -> DictConfig:
    """Take what the command line left open from the run folder that `run` names.

    Args:
        cfg: The composed config.
        overridden: Keys that were given on the command line.

    Returns:
        A config with `run` replaced by its parts: `adapter` names the run's adapter and `of_run`
        the run. Only the device of its `trainer` is used.

    Raises:
        ConfigError: If the run has no adapter, or an adapter is given as well.
        CheckpointError: If the folder is no run.
    """
    if cfg.run is None:
        return cfg
    if cfg.adapter is not None:
        raise ConfigError("run and adapter are both given and one is measured. Give one of them.")
    saved = pipeline.read_config(cfg.run)
    folder = pipeline.adapter_of(Path(cfg.run), saved)
    if folder is None:
        raise ConfigError(
            f"run={cfg.run} has no adapter to set beside its base: it scored a bare base. Give a "
            "run of train, or leave run out and name the base with model=... quant=..."
        )
    complete = from_run(cfg, saved, _FROM_RUN, overridden)
    complete.run, complete.of_run, complete.adapter = None, str(cfg.run), str(folder)
    complete.trainer = {
        "_target_": "lightning.Trainer",
        "accelerator": complete.trainer.accelerator,
    }
    return complete


def benchmark(cfg: DictConfig, run_dir: Path) -> Path:
    """Measure the rows and keep a run folder.

    Args:
        cfg: The composed config of `benchmark`, complete (`with_run`).
        run_dir: Where the run folder goes; `benchmark.json`, `.md` and `.png` are in it, and the
            run folder of each row below `scored`.

    Returns:
        The run folder.

    Raises:
        MedQLoRAError: If the request cannot work; or if a row ran out of memory, after the others
            were measured and written.
    """
    rows = _check(cfg)
    with recorded(cfg, run_dir, "benchmark", keep_refused=False) as record:
        datamodule = pipeline.build_datamodule(cfg)
        datamodule.setup()
        if cfg.split not in datamodule.questions:
            raise ConfigError(
                f"data={datamodule.name} has no {cfg.split} questions here. Choose split="
                f"{' or '.join(datamodule.questions)}, or give data.{cfg.split}_file."
            )
        record.metrics["data"] = pipeline.data_section(datamodule)
        bench = _Bench(cfg, run_dir, datamodule)
        try:
            measured = {name: bench.measure(name) for name in rows}
        finally:
            bench.clean_up()
        result = {
            "conditions": _conditions(cfg, datamodule),
            "rows": measured,
            "comparisons": [asdict(c) for c in _compare(run_dir, cfg.split, measured)],
        }
        write_result(run_dir, result)
        if failed := [row["label"] for row in measured.values() if row["error"]]:
            raise MedQLoRAError(
                f"{len(failed)} of {len(rows)} rows ran out of memory ({', '.join(failed)}): the "
                f"others are in {run_dir}. Use a larger device, or name the rows with rows=[...]."
            )
    return run_dir


def _check(cfg: DictConfig) -> list[str]:
    """Refuse what cannot work before any data or weight is read; the rows to measure."""
    if cfg.split not in _SPLITS:
        raise ConfigError(f"split={cfg.split} is unknown. Choose {', '.join(_SPLITS)}.")
    _check_numbers(cfg.benchmark)
    instantiation.check(_scoring_config(cfg, "base_quantized"))
    for key in ("optimizer", "scheduler", "loss"):
        instantiation.make(cfg[key])
    quant = instantiation.make(cfg.quant)
    same = not quant.changes_weights and quant.compute_dtype == _PLAIN["compute_dtype"]
    there = [
        name
        for name in ROWS
        if (name in BARE or cfg.adapter is not None) and not (same and name == "base_quantized")
    ]
    if cfg.rows is None:
        return there
    rows = list(cfg.rows) if OmegaConf.is_list(cfg.rows) else [cfg.rows]
    if unknown := [str(row) for row in rows if row not in ROWS]:
        raise ConfigError(
            f"rows={','.join(unknown)} is unknown. Choose among {', '.join(ROWS)}, as in "
            "rows=[base_16bit,adapter]."
        )
    if not rows:
        raise ConfigError(f"rows=[] measures nothing. Choose among {', '.join(there)}.")
    for row in rows:
        if row == "base_quantized" and same:
            raise ConfigError(
                "rows names base_quantized, and quant=none stores the base as base_16bit does. "
                "Choose quant=nf4, or leave that row out."
            )
        if row not in there:
            raise ConfigError(
                f"rows names {row}, and there is no adapter. Give run=DIR or adapter=FOLDER, or "
                f"choose among {', '.join(BARE)}."
            )
    return [row for row in ROWS if row in rows]


def _check_numbers(options: DictConfig) -> None:
    for key, least in (("speed_questions", 1), ("latency_questions", 1), ("num_updates", 0)):
        value = options[key]
        if not isinstance(value, int) or isinstance(value, bool) or value < least:
            raise ConfigError(f"benchmark.{key}={value} is no number from {least} up. Give one.")
    budgets = options.token_budgets
    if not OmegaConf.is_list(budgets) or any(
        not isinstance(b, int) or isinstance(b, bool) or b < 1 for b in budgets
    ):
        raise ConfigError(
            f"benchmark.token_budgets={budgets} is no list of numbers of tokens. Write one, such "
            "as [2048,8192]; [] tries data.eval_token_budget alone."
        )


def _scoring_config(cfg: DictConfig, name: str, merged: Path | None = None) -> DictConfig:
    """The config of `evaluate` that scores a row."""
    values = resolved(cfg)
    plain = name in ("base_16bit", "merged")
    root = cast(DictConfig, OmegaConf.load(CONFIG_DIR / "evaluate.yaml"))
    row: dict[str, Any] = {key: root[key] for key in ("run", "seed", "evaluate")}
    row |= {key: values[key] for key in _SCORING}
    row |= {
        "peft": {},
        "split": values["split"],
        "quant": _PLAIN if plain else values["quant"],
        "adapter": values["adapter"] if name == "adapter" else None,
        "trainer": values["trainer"],
        # in their own arithmetic, whatever is asked of the quantised base
        "acceleration": values["acceleration"]
        | ({"fused": "auto", "float8": False} if plain else {}),
    }
    if merged is not None:
        row["model"] = {**values["model"], "path": str(merged), "revision": None}
    return OmegaConf.create(row)


class _Bench:
    """Measures one row after the other.

    Args:
        cfg: The composed config.
        run_dir: The run folder.
        datamodule: Set up, with the split.
    """

    def __init__(self, cfg: DictConfig, run_dir: Path, datamodule: MedMCQADataModule) -> None:
        self.cfg = cfg
        self.run_dir = run_dir
        self.datamodule = datamodule
        self.device = instantiation.device_of(cfg)
        self.questions = datamodule.questions[cfg.split]
        self.copies = run_dir / ".quantized"
        self.merged = run_dir / "merged_model"

    def measure(self, name: str) -> dict[str, Any]:
        """All numbers of a row; with `error` where memory did not suffice."""
        log.info("measuring %s", name)
        row: dict[str, Any] = {
            "label": self._label(name),
            "run_dir": f"scored/{name}",
            "error": None,
        }
        try:
            cfg = _scoring_config(self.cfg, name, self._merge() if name == "merged" else None)
            row |= self._score(name, cfg)
            row["training"] = None if name == "merged" else self._train(name, cfg)
        except Exception as error:
            if not is_out_of_memory(error):
                raise
            row["error"] = one_line(error)
            log.warning("%s: %s", name, row["error"])
        free_memory()
        return row

    def clean_up(self) -> None:
        """Remove the copies of weights that were made to be measured."""
        shutil.rmtree(self.copies, ignore_errors=True)
        if not self.cfg.benchmark.keep_merged:
            shutil.rmtree(self.merged, ignore_errors=True)

    def _label(self, name: str) -> str:
        if name == "merged":
            return "merged, 16 bit"
        row = resolved(_scoring_config(self.cfg, name))
        if name != "adapter":
            return describe(row)
        made = resolved(self.cfg).get("peft") or {}
        return describe({**row, "adapter": None, "peft": made} if made.get("r") else row)

    def _copies(self, cfg: DictConfig) -> Path | None:
        """Where a quantised copy goes; None where there is nothing to copy, or no format for it."""
        quant = instantiation.make(cfg.quant)
        keeps = quant.changes_weights and not quant.data_type.startswith("torchao")
        return self.copies if keeps else None

    def _score(self, name: str, cfg: DictConfig) -> dict[str, Any]:
        """Load and score a row, and take its times."""
        memory = _PeakMemory(self.device)
        folder = self.run_dir / "scored" / name
        with recorded(cfg, folder, "evaluate", keep_refused=True) as record:
            started = time.perf_counter()
            base = pipeline.build_base(cfg, cache_dir=self._copies(cfg))
            loading = {"seconds": time.perf_counter() - started, **memory.peak()}
            module = pipeline.build_scoring_module(cfg, base, self.datamodule, cfg.adapter)
            model = pipeline.model_section(cfg, module.model)
            record.metrics["data"] = pipeline.data_section(self.datamodule)
            record.metrics["model"] = model
            memory.restart()
            scored = pipeline.score(cfg, module, self.datamodule, cfg.split)
            scoring = {**memory.peak(), "token_budget": self.datamodule.eval_token_budget}
            record_score(record, cfg.split, scored)
            module.to(self.device)
            latency = self._latency(cfg, module)
            throughput = self._throughput(cfg, module)
            record.metrics["benchmark"] = {"latency": latency, "throughput": throughput}
        return {
            "weight_gb": model["weight_gb"],
            "weight_gb_on_disk": self._on_disk(cfg),
            "num_parameters": model["num_parameters"],
            "parts": model["parts"],
            "compute_dtype": cfg.quant.compute_dtype,
            "section": scored.section,
            "loading": loading,
            "scoring": scoring,
            "latency": latency,
            "throughput": throughput,
        }

    def _on_disk(self, cfg: DictConfig) -> float:
        """GB of the files that a row is loaded from: base or its quantised copy, and adapter."""
        copies = self._copies(cfg)
        if copies is not None:
            files = [file for file in copies.rglob("*") if file.is_file()]
        else:
            checkpoint = Checkpoint(cfg.model.path, cfg.model.get("revision"))
            files = list(set(checkpoint.files.values()))
        if cfg.adapter:
            files += Path(cfg.adapter).glob("*.safetensors")
        return sum(file.stat().st_size for file in files) / 1e9

    def _latency(self, cfg: DictConfig, module: MCQAModule) -> dict[str, Any]:
        """Seconds from a tokenised question to its scores, one question a row."""
        options = self.cfg.benchmark
        chosen = _spread(self.questions, options.latency_questions)
        with self._rows_of(cfg, module, self.datamodule.max_length) as pack:
            rows = [row for question in chosen for row in pack([question])]
            run = self._runner(module)
            for row in rows[:_WARM_UP] * 2:
                run(row)
            seconds = [run(row) for row in rows]
        p50, p95 = np.quantile(seconds, [0.5, 0.95])
        return {
            "p50_seconds": float(p50),
            "p95_seconds": float(p95),
            "n": len(seconds),
            "token_budget": self.datamodule.max_length,
            "num_warm_up": len(rows[:_WARM_UP]) * 2,
        }

    def _throughput(self, cfg: DictConfig, module: MCQAModule) -> dict[str, Any]:
        """Questions a second at each row length that is tried, and the best of them."""
        chosen = _spread(self.questions, self.cfg.benchmark.speed_questions)
        longest = self.datamodule.longest
        budgets = [b for b in self.cfg.benchmark.token_budgets if b >= longest]
        tried: list[dict[str, Any]] = []
        for budget in sorted(budgets) or [self.datamodule.eval_token_budget]:
            try:
                with self._rows_of(cfg, module, budget) as pack:
                    rows = list(pack(chosen))
                    run = self._runner(module)
                    for row in rows[:_WARM_UP]:
                        run(row)
                    seconds = sum(run(row) for row in rows)
            except Exception as error:
                if not is_out_of_memory(error):
                    raise
                tried.append({"token_budget": budget, "error": "out of memory"})
                break
            tried.append(
                {
                    "token_budget": budget,
                    "questions_per_second": len(chosen) / seconds,
                    "num_rows": len(rows),
                }
            )
        best = max(tried, key=lambda one: one.get("questions_per_second", 0.0))
        return {**best, "n": len(chosen), "tried": tried}

    @contextlib.contextmanager
    def _rows_of(
        self, cfg: DictConfig, module: MCQAModule, token_budget: int
    ) -> Iterator[Callable[[Sequence[Question]], Iterator[PackedBatch]]]:
        """Let the datamodule pack, and the model run, rows of another length for a while."""
        before = self.datamodule.eval_token_budget
        self.datamodule.eval_token_budget = token_budget
        pipeline.accelerate_for(cfg, module.model, token_budget)
        try:
            with torch.inference_mode():
                yield self.datamodule.pack
        finally:
            self.datamodule.eval_token_budget = before

    def _runner(self, module: MCQAModule) -> Callable[[PackedBatch], float]:
        """`run(row)`: seconds until the scores of a row are in main memory, copying it included."""

        def run(row: PackedBatch) -> float:
            started = time.perf_counter()
            module(row.to(self.device)).cpu()  # waits for the device
            return time.perf_counter() - started

        return run

    def _train(self, name: str, cfg: DictConfig) -> dict[str, Any] | None:
        """Peak memory of a few updates of a fresh adapter; None where no adapter is named."""
        num_updates = self.cfg.benchmark.num_updates
        if not num_updates or instantiation.make(self.cfg.get("peft")) is None:
            return None
        values = resolved(self.cfg) | {key: resolved(cfg)[key] for key in ("quant", "acceleration")}
        free_memory()
        memory = _PeakMemory(self.device)
        try:
            base = pipeline.build_base(cfg, cache_dir=self._copies(cfg))
            module = pipeline.build_training_module(values, base, self.datamodule, 100)
            module.to(self.device)
            module.model.train()
            row = random_row(self.datamodule.token_budget, int(module.letter_ids.min()) + 1)
            memory.restart()
            take_updates(module, optimizer_of(module), row.to(self.device), num_updates)
        except MedQLoRAError as error:  # such as an adapter that quantised weights do not bear
            log.warning("training of %s is not measured: %s", name, one_line(error))
            return {"peak_memory_gb": None, "error": one_line(error)}
        return {
            **memory.peak(),
            "num_updates": num_updates,
            "token_budget": self.datamodule.token_budget,
            "num_trainable": module.num_trainable,
            "optimizer": str(values["optimizer"].get("_target_", "")).rpartition(".")[2],
            "error": None,
        }

    def _merge(self) -> Path:
        """Write the dequantised base with the adapter folded in, in 16 bit, as export does.

        Raises:
            ConfigError: If the adapter cannot be merged.
        """
        cfg = _scoring_config(self.cfg, "adapter")
        base = pipeline.build_base(cfg, cache_dir=self._copies(cfg))
        model = load_adapter(base, cfg.adapter)
        try:
            merged = merge_adapter(cast(PreTrainedModel, model), dequantize)
        except ConfigError as error:
            raise ConfigError(
                f"{one_line(error)} Here: leave the row out with "
                "rows=[base_16bit,base_quantized,adapter]."
            ) from error
        try:
            merged.save_pretrained(self.merged, max_shard_size="2GB")
        except OSError as error:
            raise ModelError(
                f"{self.merged} could not be written ({error}): free some space, or leave the "
                "merged model out with rows=[base_16bit,base_quantized,adapter]."
            ) from error
        self.datamodule.tokenizer.save_pretrained(self.merged)
        del base, model, merged
        free_memory()
        return self.merged


class _PeakMemory:
    """Peak memory of what is done from here on, above what was held before.

    On a GPU that of torch's allocator. On the CPU the resident memory of the process, whose peak
    Linux can forget (proc(5), clear_refs); on other systems it stays unknown.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        free_memory()
        if device.type != "cuda":
            with contextlib.suppress(OSError, AttributeError):  # another C library
                ctypes.CDLL("libc.so.6").malloc_trim(0)
        self.before = self._read("VmRSS")
        self.restart()

    def restart(self) -> None:
        """Forget the peak so far."""
        if self.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self.device)
            return
        with contextlib.suppress(OSError):
            Path("/proc/self/clear_refs").write_text("5")

    def peak(self) -> dict[str, float | None]:
        """`peak_memory_gb` above what was held before, and that, in 10^9 bytes."""
        peak = self._read("VmHWM")
        if peak is None or self.before is None:
            return {"peak_memory_gb": None, "memory_before_gb": None}
        return {"peak_memory_gb": (peak - self.before) / 1e9, "memory_before_gb": self.before / 1e9}

    def _read(self, key: str) -> int | None:
        if self.device.type == "cuda":
            now = key == "VmRSS"
            return (
                torch.cuda.memory_allocated(self.device)
                if now
                else torch.cuda.max_memory_allocated(self.device)
            )
        try:
            lines = Path("/proc/self/status").read_text().splitlines()
        except OSError:
            return None
        return next((int(x.split()[1]) * 1024 for x in lines if x.startswith(f"{key}:")), None)


def _spread(questions: Sequence[Question], number: int) -> list[Question]:
    """So many questions, evenly spread over the split, which may be sorted."""
    number = min(number, len(questions))
    return [questions[i * len(questions) // number] for i in range(number)]


def _conditions(cfg: DictConfig, datamodule: MedMCQADataModule) -> dict[str, Any]:
    """What holds for every row."""
    device = instantiation.device_of(cfg)
    return {
        "data": {"name": datamodule.name, "sha256": datamodule.sha256, "split": cfg.split},
        "model": cfg.model.path,
        "quant": QuantConfig.as_dict(instantiation.make(cfg.quant)),
        "num_questions": len(datamodule.questions[cfg.split]),
        "hardware": hardware(device),
        "num_threads": torch.get_num_threads() if device.type == "cpu" else None,
        "versions": versions(),
        "memory": (
            "peak of torch's allocator"
            if device.type == "cuda"
            else "peak of the process above what it held before the row was loaded, uncertain by "
            "some 0.05 GB that it had freed and kept"
        ),
    }


def _compare(run_dir: Path, split: str, rows: Mapping[str, Mapping[str, Any]]) -> list[Comparison]:
    """Every row against the 16-bit base on the same questions, corrected for their number."""
    scored = {n: r for n, r in rows.items() if (r.get("section") or {}).get("accuracy") is not None}
    if BARE[0] not in scored or len(scored) < 2:
        return []
    return compare_family(
        {r["label"]: [read_predictions(run_dir / r["run_dir"], split)] for r in scored.values()},
        baseline=scored[BARE[0]]["label"],
        sha256={r["label"]: r["section"].get("sha256") for r in scored.values()},
    )


# --- output ---------------------------------------------------------------------------------------


def write_result(run_dir: Path, result: Mapping[str, Any]) -> None:
    """Write `benchmark.json`, `benchmark.md` and `benchmark.png`."""
    from medqlora.evaluation.figures import benchmark_figure, save_figure  # a second to import

    text = json.dumps(result, indent=2) + "\n"
    replace_file(run_dir / "benchmark.json", lambda path: path.write_text(text))
    markdown = benchmark_markdown(result)
    replace_file(run_dir / "benchmark.md", lambda path: path.write_text(markdown))
    figure = benchmark_figure(list(result["rows"].values()), title=_title(result))
    _, svg = save_figure(figure, run_dir / "benchmark")
    svg.unlink()


def benchmark_markdown(result: Mapping[str, Any]) -> str:
    """The tables in Markdown, with their conditions."""
    rows = list(result["rows"].values())
    parts = [f"## {_title(result)}\n", result_markdown(_result_rows(rows))]
    if result["comparisons"]:
        parts.append(comparison_markdown([Comparison(**c) for c in result["comparisons"]]))
    parts += [text_markdown(*_speed_cells(rows), _speed_note(result)), _setting(result) + "\n"]
    return "\n".join(parts)


def print_result(run_dir: Path) -> None:
    """The tables in the terminal."""
    result = json.loads((run_dir / "benchmark.json").read_text())
    rows = list(result["rows"].values())
    console = Console()
    console.print(result_table(_result_rows(rows), title=_title(result)))
    if result["comparisons"]:
        comparisons = [Comparison(**c) for c in result["comparisons"]]
        console.print(comparison_table(comparisons, title="question by question"))
    headings, cells = _speed_cells(rows)
    console.print(text_table(headings, cells, "memory and speed", _speed_note(result)))
    console.print(_setting(result), highlight=False)
    console.print(f"run folder: {run_dir}", soft_wrap=True, highlight=False)


def _title(result: Mapping[str, Any]) -> str:
    data = result["conditions"]["data"]
    return f"{data['name']}, {data['split']} split"


def _result_rows(rows: Sequence[Mapping[str, Any]]) -> list[ResultRow]:
    return [
        ResultRow(
            name=row["label"],
            section=row.get("section"),
            size_gb=row.get("weight_gb"),
            extra={"on disk GB": _number(row.get("weight_gb_on_disk"), ".3g")},
            error=row["error"],
        )
        for row in rows
    ]


def _speed_cells(rows: Sequence[Mapping[str, Any]]) -> tuple[list[str], list[list[str]]]:
    headings = [
        "", "scoring GB", "training GB", "p50 ms", "p95 ms", "questions/s", "tokens a row",
    ]  # fmt: skip
    cells = []
    for row in rows:
        scoring, training = row.get("scoring") or {}, row.get("training") or {}
        latency, throughput = row.get("latency") or {}, row.get("throughput") or {}
        cells.append(
            [
                row["label"],
                _number(scoring.get("peak_memory_gb"), ".3g"),
                _number(training.get("peak_memory_gb"), ".3g"),
                _number(latency.get("p50_seconds"), ".1f", 1000),
                _number(latency.get("p95_seconds"), ".1f", 1000),
                _number(throughput.get("questions_per_second"), ".0f"),
                _number(throughput.get("token_budget"), "d"),
            ]
        )
    return headings, cells


def _number(value: float | None, format_: str, factor: int = 1) -> str:
    return UNKNOWN if value is None else format(value * factor, format_)


def _speed_note(result: Mapping[str, Any]) -> str:
    """How memory and times were taken, from what the rows say."""
    rows = [row for row in result["rows"].values() if not row["error"]]
    notes = [f"GB: {result['conditions']['memory']}"]
    if rows:
        scoring, latency = rows[0]["scoring"], rows[0]["latency"]
        notes[0] += f"; scoring in rows of {scoring['token_budget']} tokens"
        trained = [row["training"] for row in rows if row["training"]]
        if done := [training for training in trained if not training["error"]]:
            notes[0] += (
                f", training {done[0]['num_updates']} updates of one row of "
                f"{done[0]['token_budget']} tokens, {done[0]['num_trainable']:,} trainable "
                f"numbers, {done[0]['optimizer']}"
            )
        notes += [
            f"ms: one tokenised question in a row of {latency['token_budget']} tokens, until its "
            f"scores are in main memory; n={latency['n']}, {latency['num_warm_up']} before to warm "
            "up",
            f"questions/s: {rows[0]['throughput']['n']} tokenised questions, at the best of "
            f"{_listed(rows[0]['throughput']['tried'])} tokens a row",
        ]
    return ". ".join(notes) + "."


def _listed(tried: Sequence[Mapping[str, Any]]) -> str:
    return ", ".join(str(one["token_budget"]) for one in tried)


def _setting(result: Mapping[str, Any]) -> str:
    conditions = result["conditions"]
    computed: dict[str, list[str]] = {}
    for row in result["rows"].values():
        if not row["error"]:
            computed.setdefault(row["compute_dtype"], []).append(row["label"])
    dtypes = "; ".join(f"in {dtype}: {' | '.join(rows)}" for dtype, rows in computed.items())
    packages = ", ".join(f"{name} {v}" for name, v in conditions["versions"].items() if v)
    threads = conditions["num_threads"]
    device = conditions["hardware"]["device"] + (
        f" ({threads} thread{'s'[: threads > 1]})" if threads else ""
    )
    return f"On {device}. Computed {dtypes}. {packages}."


@command("benchmark")
def main(cfg: DictConfig, run_dir: Path) -> None:
    """Measure, keep a run folder, print the tables."""
    task = HydraConfig.get().overrides.task
    cfg = with_run(cfg, {item.lstrip("+").split("=")[0] for item in task if item[0] != "~"})
    try:
        benchmark(cfg, run_dir)
    finally:
        if (run_dir / "benchmark.json").is_file():
            print_result(run_dir)


if __name__ == "__main__":
    main()
