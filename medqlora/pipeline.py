"""From a config to the parts of a run, and from a run folder back to a model that answers."""

from __future__ import annotations

import dataclasses
import gc
import logging
import os
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import lightning
import torch
from lightning import Callback, LightningModule, Trainer
from lightning.pytorch.loggers import Logger
from torch import Tensor, nn
from transformers import (
    AutoModelForCausalLM,
    GemmaForCausalLM,
    PretrainedConfig,
    PreTrainedModel,
)

from medqlora import processes
from medqlora.acceleration import (
    Acceleration,
    accelerate,
    prepare_for_training,
    use_packed_attention,
)
from medqlora.acceleration.memory import KNOWN_SHAPES, scoring_tokens
from medqlora.data import MedMCQADataModule, PromptTemplate, load_tokenizer
from medqlora.data.cache import KeptData
from medqlora.data.packing import PackedLoader
from medqlora.data.tokenization import TextEncoder
from medqlora.errors import CheckpointError, ConfigError, ModelError
from medqlora.evaluation import (
    PredictionCollector,
    check_letter_rows,
    read_run,
    summarise,
    to_predictions,
)
from medqlora.evaluation.generation import Generator, unpack
from medqlora.finetuning import (
    AdapterParallel,
    AtomicCheckpointIO,
    MCQAModule,
    attach_adapter,
    changes_base,
    count_trainable,
    load_adapter,
)
from medqlora.finetuning.callbacks import peak_memory_gb
from medqlora.hub import hub_error, resolve_path
from medqlora.instantiation import STRATEGIES, Config, device_of, make
from medqlora.quantization import KeptBase, QuantConfig, footprint, letter_rows, load_base
from medqlora.schema import Prediction, Question

log = logging.getLogger(__name__)


ADAPTER_DIR = "adapter"


BACKENDS = ("auto", "packed", "stock")
"""What `evaluate.backend` can be."""


_kept_base, _kept_data = KeptBase(), KeptData()


def forget_kept() -> None:
    """Let go of what jobs of this process share: a sweep calls it at its end."""
    _kept_base.forget()
    _kept_data.forget()


def build_datamodule(
    cfg: Config, *, loss_targets: str = "answer", share: bool = False
) -> MedMCQADataModule:
    """The questions of a run; they are read, checked, tokenised and packed by its `setup`.

    Args:
        cfg: A composed config.
        loss_targets: What the loss supervises: "answer" or "explanation".
        share: Whether what was read and tokenised is kept for the next job of this process.
    """
    prompt = make(cfg["prompt"])
    assert isinstance(prompt, PromptTemplate)
    datamodule = make(
        cfg["data"],
        tokenizer=load_tokenizer(cfg["model"]["path"], cfg["model"].get("revision")),
        prompt=prompt,
        seed=cfg["seed"],
        targets=loss_targets,
        most_eval_tokens=_most_eval_tokens(cfg),
        pin_memory=device_of(cfg).type == "cuda",
        rank=processes.rank(),
        world_size=processes.world_size(),
        kept=_kept_data if share else None,
    )
    assert isinstance(datamodule, MedMCQADataModule)
    return datamodule


def _most_eval_tokens(cfg: Config) -> int | None:
    """Longest row that `data.eval_token_budget=auto` may choose; None for that of training."""
    device = device_of(cfg)
    if cfg["data"].get("eval_token_budget") != "auto" or device.type != "cuda":
        return None
    memory = torch.cuda.get_device_properties(device).total_memory
    shape: Mapping[str, Any] = _model_config(cfg) or {}
    if shape.get("model_type") != "gemma":  # others may name their sizes otherwise
        shape = KNOWN_SHAPES["gemma-7b"]
    return scoring_tokens(shape, memory, make(cfg["quant"]).torch_dtype.itemsize)


def build_base(
    cfg: Config,
    quant: QuantConfig | None = None,
    *,
    cache_dir: Path | None = None,
    share: bool = False,
) -> GemmaForCausalLM:
    """The frozen base model on its device, stored as `quant` says, switched to packed rows.

    Args:
        cfg: A composed config.
        quant: Storage; that of the config if None.
        cache_dir: Folder for a quantised copy; None for this machine's, where
            `model.cache_quantized` asks for one.
        share: Whether its weights are kept for the next job of this process. A method that writes
            into them gets its own all the same.
    """
    model = cfg["model"]
    share = share and not changes_base(make(cfg.get("peft")))
    if not share:
        _kept_base.forget()  # two bases need not fit
    if cache_dir is None and model.get("cache_quantized"):
        cache_dir = _cache_dir()
    base = load_base(
        model["path"],
        quant or make(cfg["quant"]),
        revision=model.get("revision"),
        device=device_of(cfg),
        cache_dir=cache_dir,
        kept=_kept_base if share else None,
    )
    use_packed_attention(base)
    return base


def build_scoring_module(
    cfg: Config,
    base: GemmaForCausalLM,
    datamodule: MedMCQADataModule,
    adapter: str | Path | None = None,
) -> MCQAModule:
    """The LightningModule that scores with a base model and perhaps an adapter.

    Args:
        cfg: A composed config.
        base: What `build_base` returned.
        datamodule: Set up, so that its letters are known.
        adapter: A PEFT folder; a bare base if None.
    """
    rows = _letter_rows(base, datamodule)
    model = base if adapter is None else load_adapter(base, adapter)
    accelerate_for(cfg, model, datamodule.eval_token_budget)
    return MCQAModule(model, letter_ids=datamodule.letter_ids, letter_rows=rows).eval()


def scoring_backend(cfg: Config) -> str:
    """How a config scores: "packed", or "stock" for what `load_base` does not know.

    Raises:
        ConfigError: If `evaluate.backend` is unknown or does not fit the model or its storage.
    """
    backend = (cfg.get("evaluate") or {}).get("backend", "auto")
    if backend not in BACKENDS:
        raise ConfigError(f"evaluate.backend={backend} is unknown. Choose {' or '.join(BACKENDS)}.")
    kind = (_model_config(cfg) or {}).get("model_type")
    path = cfg["model"]["path"]
    if backend == "packed" and kind not in (None, "gemma"):
        raise ConfigError(
            f"evaluate.backend=packed knows Gemma of the first generation, and model.path={path} "
            f"has model_type={kind}. Choose evaluate.backend=stock quant=none."
        )
    if backend == "packed" or (backend == "auto" and kind in (None, "gemma")):
        return "packed"
    if make(cfg["quant"]).changes_weights:
        raise ConfigError(
            f"quant has no effect on model.path={path} (model_type={kind}), which stock "
            "transformers runs as it is stored. Add quant=none"
            + (", or choose evaluate.backend=packed." if kind == "gemma" else ".")
        )
    return "stock"


def _model_config(cfg: Config) -> dict[str, Any] | None:
    """What a model says of itself in its config.json; None where it cannot be read."""
    model = cfg["model"]
    try:
        raw, _ = PretrainedConfig.get_config_dict(
            resolve_path(model["path"]), revision=model.get("revision")
        )
    except Exception:  # who loads the model says what is wrong with it
        return None
    return raw


def build_generator(
    cfg: Config, datamodule: MedMCQADataModule, adapter: str | Path | None = None
) -> Generator:
    """A model with ordinary attention that writes answers, through stock `generate`.

    Args:
        cfg: A composed config.
        datamodule: Set up, so that its letters are known.
        adapter: A PEFT folder; a bare base if None.

    Raises:
        ModelError: If the model cannot be had.
    """
    if scoring_backend(cfg) == "stock":
        base = _load_stock(cfg)
    else:
        model = cfg["model"]
        base = load_base(
            model["path"],
            make(cfg["quant"]),
            revision=model.get("revision"),
            device=device_of(cfg),
            cache_dir=_cache_dir() if model.get("cache_quantized") else None,
        )
    tokenizer = datamodule.tokenizer
    encoder = TextEncoder(tokenizer)
    turn = tokenizer.get_vocab().get("<end_of_turn>", encoder.eos_id)
    pad = tokenizer.pad_token_id
    return Generator(
        base if adapter is None else load_adapter(base, adapter),  # pyright: ignore[reportArgumentType]
        letter_ids=datamodule.letter_ids,
        tokenizer=tokenizer,
        stop_ids=sorted({encoder.eos_id, turn}),
        pad_id=pad if isinstance(pad, int) else encoder.eos_id,
    )


def _load_stock(cfg: Config) -> PreTrainedModel:
    """Any causal language model as transformers loads it: safetensors only, none of its code."""
    path, revision = cfg["model"]["path"], cfg["model"].get("revision")
    name = resolve_path(path)
    if name.startswith(("/", ".", "~")) and not Path(name).expanduser().is_dir():
        raise ModelError(f"there is no folder {path}: check model.path.")
    try:
        model: Any = AutoModelForCausalLM.from_pretrained(
            str(Path(name).expanduser()) if Path(name).expanduser().is_dir() else name,
            revision=revision,
            dtype=make(cfg["quant"]).torch_dtype,
            use_safetensors=True,
            trust_remote_code=False,
        )
    except Exception as error:
        raise hub_error(error, f"model {path}") from error
    return model.to(device_of(cfg)).eval().requires_grad_(False)


def score_questions(
    scorer: MCQAModule | Generator, datamodule: MedMCQADataModule, questions: Sequence[Question]
) -> Tensor:
    """Letter scores of questions that need not belong to a split, such as reordered ones.

    Args:
        scorer: What answers.
        datamodule: Set up, with as many options as the questions have.
        questions: Any; which are asked together makes no difference.

    Returns:
        Log-probabilities in nats, [question, letter], float32 on the CPU.
    """
    scores = torch.zeros(len(questions), datamodule.num_options)
    with torch.inference_mode():
        for batch in datamodule.pack(questions):
            if isinstance(scorer, Generator):
                rows, prompts = zip(*unpack(batch), strict=True)
                scores[list(rows)] = scorer.letters(prompts)[1]
            else:
                row = scorer(batch.to(scorer.letter_rows.device)).float().cpu()
                there = batch.index >= 0
                scores[batch.index[there]] = row[there]
    return scores


def build_training_module(
    cfg: Config, base: GemmaForCausalLM, datamodule: MedMCQADataModule, num_training_steps: int
) -> MCQAModule:
    """The LightningModule that trains a fresh adapter on a base model.

    Args:
        cfg: The config of `train`.
        base: What `build_base` returned.
        datamodule: Set up, so that its letters are known.
        num_training_steps: Updates of the whole run, for the scheduler.
    """
    rows = _letter_rows(base, datamodule)
    lightning.seed_everything(cfg["seed"], workers=True, verbose=False)
    model = attach_adapter(base, make(cfg["peft"]), num_training_steps=num_training_steps)
    prepare_for_training(model, cfg["acceleration"]["gradient_checkpointing"])
    how = accelerate_for(cfg, model, datamodule.token_budget)
    if how.startswith("plain layers") and "fused=off" not in how:
        log.info("%s: slower than the fast path", how)
    return MCQAModule(
        model,
        letter_ids=datamodule.letter_ids,
        letter_rows=rows,
        loss=make(cfg["loss"]),
        optimizer=make(cfg["optimizer"]),
        scheduler=make(cfg["scheduler"]),
        num_training_steps=num_training_steps,
    )


def build_callbacks(
    cfg: Config, run_dir: Path, datamodule: MedMCQADataModule, identity: Mapping[str, Any]
) -> dict[str, Callback]:
    """The callbacks of a training run, by their name in the config.

    Args:
        cfg: The config of `train`.
        run_dir: The run folder.
        datamodule: Set up.
        identity: What a checkpoint must have in common with the run that resumes from it.
    """
    made = {name: make(node) for name, node in cfg["callbacks"].items() if node}
    if "checkpoints" in made:
        made["checkpoints"] = made["checkpoints"](run_dir / "checkpoints", identity=identity)
    if "report" in made:
        made["report"] = made["report"](datamodule.questions.get("val", ()), figures=_split_figures)
    if "nan_guard" in made:
        ids = [question.id for question in datamodule.questions["train"]]
        made["nan_guard"] = made["nan_guard"](ids)
    if "graceful_stop" in made:
        made["graceful_stop"] = made["graceful_stop"](made.get("checkpoints"))
    return made


def build_trainer(
    cfg: Config, run_dir: Path, callbacks: Mapping[str, Callback], loggers: list[Logger]
) -> Trainer:
    """Lightning's Trainer for one run."""
    strategy, device = cfg["trainer"].get("strategy"), device_of(cfg)
    where: dict[str, Any] = {"devices": [device.index]} if device.type == "cuda" else {}
    if strategy in STRATEGIES:
        where = {
            "strategy": AdapterParallel(shard_base=strategy == "fsdp"),
            "devices": processes.local_world_size(),
            "num_nodes": processes.world_size() // processes.local_world_size(),
        }
    return make(
        cfg["trainer"],
        **where,
        callbacks=list(callbacks.values()),
        logger=loggers,
        default_root_dir=str(run_dir),
        plugins=[AtomicCheckpointIO()],
        enable_checkpointing="checkpoints" in callbacks,
        enable_progress_bar="progress" in callbacks,
    )


def num_updates(cfg: Config, datamodule: MedMCQADataModule) -> int:
    """Updates of a whole run: what the scheduler plans over.

    Raises:
        ConfigError: If the run would have no end, or an epoch no validation.
    """
    trainer, num_rows = cfg["trainer"], datamodule.num_rows("train")
    an_epoch = -(-num_rows // trainer["accumulate_grad_batches"])
    between = trainer.get("val_check_interval")
    if isinstance(between, int) and between > num_rows:
        raise ConfigError(
            f"trainer.val_check_interval={between} is more than the {num_rows} rows of an epoch. "
            "Give fewer rows, or a fraction of an epoch, such as 1.0."
        )
    epochs, steps = trainer.get("max_epochs"), trainer.get("max_steps", -1)
    if steps is not None and steps > 0:
        return min(steps, an_epoch * epochs) if epochs and epochs > 0 else steps
    if not epochs or epochs < 0:
        raise ConfigError(
            f"trainer.max_epochs={epochs} and trainer.max_steps={steps} set no end. Give one of "
            "them."
        )
    return an_epoch * epochs


@dataclass(frozen=True)
class Scored:
    """A split after scoring.

    Attributes:
        predictions: One a question, in the order of the data.
        section: The keys of `val` or `test` in metrics.json.
        seconds: Time of scoring, loading and compilation not counted.
        peak_memory_gb: Most memory held while scoring, in 10^9 bytes.
    """

    predictions: list[Prediction]
    section: dict[str, Any]
    seconds: float
    peak_memory_gb: float


def score(cfg: Config, module: MCQAModule, datamodule: MedMCQADataModule, split: str) -> Scored:
    """Score a split with Lightning's Trainer.

    Args:
        cfg: A composed config.
        module: What answers.
        datamodule: Set up, with the split.
        split: "train", "val" or "test".
    """
    device = device_of(cfg)
    clock = _Clock()
    trainer = Trainer(
        accelerator=cfg["trainer"]["accelerator"],
        callbacks=[clock],
        # Each process scores its own rows, and the metrics gather them.
        devices=[device.index or 0] if device.type == "cuda" else 1,
        # Weights that are shared out cannot be fetched in inference mode.
        inference_mode=cfg["trainer"].get("strategy") != "fsdp",
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        use_distributed_sampler=False,
    )
    loader = datamodule.loader(split)
    module.to(device)
    if module.loss is not None:
        # Lightning has moved it in between: what reads its weights, and what was recorded, is of a
        # copy that is not needed.
        accelerate_for(cfg, module.model, datamodule.eval_token_budget)
        gc.collect()
        torch.cuda.empty_cache()  # does nothing without CUDA
    if device.type == "cuda":
        _score_first(module, loader)
        torch.cuda.reset_peak_memory_stats(device)
    trainer.test(module, dataloaders=loader, verbose=False)
    seconds = clock.seconds
    questions = datamodule.questions[split]
    collector = module.predictions["test"]
    assert isinstance(collector, PredictionCollector)
    predictions = collector.predictions(questions, split)
    return Scored(predictions, summarise(predictions, questions), seconds, peak_memory_gb(device))


class _Clock(Callback):
    """Seconds from the first row of a test to its metrics, without moves of the weights."""

    def on_test_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Start."""
        self._started = time.perf_counter()

    def on_test_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Stop; the metrics have waited for the device."""
        self.seconds = time.perf_counter() - self._started


def _score_first(module: MCQAModule, loader: PackedLoader) -> None:
    """Score a row before the clock starts, and forget it.

    Compilation is no part of what scoring takes, nor is loading the metrics' kernels, for which the
    device is waited for.
    """
    with torch.inference_mode():
        module.test_step(next(iter(loader)).to(module.device), 0)
    for metric in (module.metrics["test"], module.predictions["test"]):
        metric.reset()  # type: ignore[operator]
    torch.cuda.synchronize(module.device)


def data_section(datamodule: MedMCQADataModule) -> dict[str, Any]:
    """The keys of `data` in metrics.json."""
    counts = {f"num_{s}": len(datamodule.questions.get(s, ())) for s in ("train", "val", "test")}
    return {
        "name": datamodule.name,
        "sha256": datamodule.sha256,
        **counts,
        "num_dropped": datamodule.num_dropped,
        "dropped": dict(datamodule.dropped),
        "num_truncated": datamodule.num_truncated,
        "num_options": datamodule.num_options,
        "eval_token_budget": datamodule.eval_token_budget,
    }


def model_section(cfg: Config, model: nn.Module) -> dict[str, Any]:
    """The keys of `model` in metrics.json; sizes in GB of 10^9 bytes, the adapter included."""
    size = footprint(model)
    base = model.get_base_model() if hasattr(model, "get_base_model") else model  # type: ignore[operator]
    return {
        "name": cfg["model"]["path"],
        "revision": getattr(base.config, "_commit_hash", None) or cfg["model"].get("revision"),
        "num_parameters": size.num_parameters,
        "num_trainable": count_trainable(model),
        "weight_gb_16bit": size.weight_gb_16bit,
        "weight_gb": size.weight_gb,
        "parts": size.parts,
    }


@dataclass(frozen=True)
class LoadedRun:
    """A run read back: it answers questions.

    Attributes:
        run_dir: The run folder.
        config: Its config, as plain containers.
        metrics: Its metrics.json.
        module: Base and adapter.
        datamodule: Question -> text -> tokens -> rows, as in the run.
    """

    run_dir: Path
    config: dict[str, Any]
    metrics: dict[str, Any]
    module: MCQAModule
    datamodule: MedMCQADataModule

    def predict(self, questions: Sequence[Question]) -> list[Prediction]:
        """Answer questions, packed into rows; which are asked together makes no difference.

        Args:
            questions: With as many options as the run was trained on. A stem that is too long loses
                its beginning, with a warning.

        Returns:
            One prediction a question, in order.

        Raises:
            ConfigError: If the options of a question do not fit into a row.
        """
        scores = score_questions(self.module, self.datamodule, questions)
        return to_predictions(questions, "predict", torch.arange(len(questions)), scores)

    def shortens(self, question: Question) -> bool:
        """Whether a question's stem is too long and loses its beginning."""
        return self.datamodule.shortens(question)


def read_config(run_dir: str | Path) -> dict[str, Any]:
    """The config of a run folder, as data: nothing in it is run.

    Raises:
        CheckpointError: If the folder has none.
    """
    run = read_run(run_dir)
    if run.config is None:
        raise CheckpointError(f"{run_dir} has no config.yaml: it is not the folder of a run.")
    return {key: value for key, value in run.config.items() if key not in ("hydra", "defaults")}


def load_run(run_dir: str | Path, *, device: str = "auto") -> LoadedRun:
    """Read a run folder back: base, quantisation, adapter and prompt.

    Args:
        run_dir: A folder that `train` wrote.
        device: "auto" (a GPU where there is one), "cpu" or "cuda".

    Returns:
        The run, ready to answer.

    Raises:
        CheckpointError: If the folder is no run or has no adapter.
        ModelError: If its base model cannot be had.
    """
    run_dir = Path(run_dir)
    config = read_config(run_dir)
    if device not in ("auto", "cpu", "cuda"):
        raise ConfigError(f"device={device} is unknown. Choose auto, cpu or cuda.")
    parts = ("data", "prompt", "model", "quant", "trainer")
    if lacking := [part for part in parts if not isinstance(config.get(part), Mapping)]:
        raise CheckpointError(
            f"{run_dir}/config.yaml does not say what {', '.join(lacking)} was: it is damaged, or "
            "not of a run of train or evaluate."
        )
    gpu = device == "cuda" or (device == "auto" and torch.cuda.is_available())
    config["trainer"] = {**config["trainer"], "accelerator": "gpu" if gpu else "cpu"}
    metrics = read_run(run_dir).metrics
    adapter = adapter_of(run_dir, config)
    if config["data"].get("eval_token_budget") == "auto":
        config["data"] = {**config["data"], "eval_token_budget": None}  # for whole splits alone
    datamodule = build_datamodule(config)
    if config["prompt"].get("num_shots"):
        datamodule.setup()
    else:
        datamodule.prepare_letters(metrics["data"].get("num_options") or 4)
    base = build_base(config)
    module = build_scoring_module(config, base, datamodule, adapter)
    return LoadedRun(run_dir, config, metrics, module, datamodule)


def adapter_of(run_dir: Path, config: Mapping[str, Any]) -> Path | None:
    """The adapter folder of a run; None if it was a bare base.

    Raises:
        CheckpointError: If the run should have one and has not.
    """
    folder = run_dir / ADAPTER_DIR
    if folder.is_dir():
        return folder
    if config.get("adapter"):  # the folder of an evaluation names the adapter it scored
        return Path(config["adapter"])
    if make(config.get("peft")) is None:
        return None
    raise CheckpointError(
        f"{run_dir} has no adapter: the run ended before it was written. Go on with it "
        "(resume=auto), or score its bare base with peft=none."
    )


def _split_figures(section: Mapping[str, Any], predictions: Sequence[Prediction]) -> dict[str, Any]:
    from medqlora.evaluation.figures import split_figures  # a second to import, seldom needed

    return split_figures(section, predictions)


def _letter_rows(base: GemmaForCausalLM, datamodule: MedMCQADataModule) -> Tensor:
    rows = letter_rows(base, datamodule.letter_ids)
    check_letter_rows(rows)
    return rows


def accelerate_for(cfg: Config, model: nn.Module, token_budget: int) -> str:
    """Choose how the model runs rows of a length, and say it; see `acceleration.accelerate`."""
    options = make(cfg["acceleration"])
    assert isinstance(options, Acceleration)
    if cfg["trainer"].get("strategy") == "fsdp":
        # Neither finds the weights of a layer before it is fetched.
        options = dataclasses.replace(options, compile="none", fused="off")
    how = accelerate(model, options, device_of(cfg), token_budget)
    log.debug("rows of %d tokens: %s", token_budget, how)
    return how


def _cache_dir() -> Path:
    return Path(os.environ.get("MEDQLORA_CACHE", "~/.cache/medqlora")).expanduser() / "quantized"
