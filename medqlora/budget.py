"""`data.token_budget=auto`: the longest packed row that a device can train on, found by trying."""

from __future__ import annotations

import hashlib
import json
import logging
import os
from collections.abc import Callable, Sequence
from pathlib import Path

import psutil
import torch
from omegaconf import DictConfig, OmegaConf
from torch.optim import Optimizer

from medqlora import pipeline
from medqlora.errors import ConfigError
from medqlora.evaluation import hardware, versions
from medqlora.finetuning import MCQAModule, is_out_of_memory
from medqlora.runs import free_memory, resolved
from medqlora.schema import PackedBatch

log = logging.getLogger(__name__)

BUDGETS = (512, 1024, 2048, 4096, 8192, 16_384, 32_768)
"""Tokens a row that are tried, in order."""

MEMORY_MARGIN = 0.9
"""Part of a device's memory that a trial may use; validation and fragments take the rest."""

_QUESTION_LENGTH = 64
_DECIDES = ("model", "quant", "peft", "optimizer", "loss", "acceleration", "prompt")


def with_token_budget(cfg: DictConfig) -> DictConfig:
    """The config with `data.token_budget=auto` replaced by a number; unchanged otherwise.

    Args:
        cfg: The composed config of `train`.

    Raises:
        ConfigError: If not even the shortest row fits.
    """
    if cfg.data.token_budget != "auto":
        return cfg
    pipeline.check(cfg)
    cfg = OmegaConf.create(OmegaConf.to_container(cfg, resolve=False))  # type: ignore[assignment]
    cfg.data.token_budget = BUDGETS[0]
    key = _key(cfg)
    known = _read_cache()
    if key in known:
        cfg.data.token_budget = known[key]
        log.info("data.token_budget=auto: %d, found on this device before", known[key])
        return cfg
    found = largest_that_fits(_Trial(cfg), BUDGETS)
    cfg.data.token_budget = found
    _write_cache({**known, key: found})
    log.info("data.token_budget=auto: %d is the longest row that fits this device", found)
    return cfg


def largest_that_fits(trial: Callable[[int], None], budgets: Sequence[int]) -> int:
    """The last of rising budgets whose trial does not run out of memory.

    Args:
        trial: Takes a whole training step with a budget; raises where memory does not suffice.
        budgets: In rising order.

    Raises:
        ConfigError: If the first does not fit.
    """
    found = 0
    for budget in budgets:
        try:
            trial(budget)
        except Exception as error:
            if not is_out_of_memory(error):
                raise
            break
        found = budget
    free_memory()
    if not found:
        raise ConfigError(
            f"data.token_budget=auto found no row that fits: {budgets[0]} tokens are too many for "
            "this device. Set acceleration.gradient_checkpointing=true, choose quant=nf4_full, or "
            "use a larger device."
        )
    return found


class _Trial:
    """Forward, backward and optimiser step on a row of random tokens."""

    def __init__(self, cfg: DictConfig) -> None:
        self.cfg = cfg
        self.module: MCQAModule | None = None
        self.optimizer: Optimizer | None = None

    def __call__(self, budget: int) -> None:
        if self.module is None:
            datamodule = pipeline.build_datamodule(self.cfg)
            datamodule.prepare_letters()
            base = pipeline.build_base(self.cfg)
            self.module = pipeline.build_training_module(self.cfg, base, datamodule, 100)
            self.module.to(pipeline.device_of(self.cfg))
            self.optimizer = optimizer_of(self.module)
        module, optimizer = self.module, self.optimizer
        assert optimizer is not None
        pipeline.accelerate_for(self.cfg, module.model, budget)
        device = module.letter_rows.device
        if device.type == "cuda":
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats(device)
        row = random_row(budget, int(module.letter_ids.min()) + 1).to(device)
        take_updates(module, optimizer, row, 2)
        if _share_used(device) > MEMORY_MARGIN:
            raise torch.OutOfMemoryError(f"{budget} tokens leave no room: out of memory")


def optimizer_of(module: MCQAModule) -> Optimizer:
    """The optimiser that a run of this module would use."""
    made = module.configure_optimizers()
    return made["optimizer"] if isinstance(made, dict) else made


def take_updates(
    module: MCQAModule, optimizer: Optimizer, row: PackedBatch, num_updates: int
) -> None:
    """Forward pass, backward pass and optimiser step on the same row, again and again.

    Args:
        module: What is trained.
        optimizer: Its optimiser.
        row: On the device of the module.
        num_updates: Two at least to see the peak: the first allocates the optimiser's state, the
            second has everything alive at once.
    """
    assert module.loss is not None
    for _ in range(num_updates):
        total, count = module.loss(module.model, row, module.letter_rows, module.letter_ids)
        (total / count).backward()
        optimizer.step()
        optimizer.zero_grad()


def random_row(token_budget: int, vocab_size: int) -> PackedBatch:
    """A full row of random tokens in questions of equal length, with answers and labels."""
    number = max(1, token_budget // _QUESTION_LENGTH)
    length = token_budget // number
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(0, vocab_size, (token_budget,), generator=generator)
    places = number + number // 2
    boundaries = (torch.arange(places + 1).clamp(max=number) * length).to(torch.int32)
    last, answer = torch.zeros(places, dtype=torch.int64), torch.full((places,), -100)
    last[:number] = torch.arange(1, number + 1) * length - 1
    answer[:number] = torch.randint(0, 4, (number,), generator=generator)
    index = torch.where(answer >= 0, torch.arange(places), -1)
    return PackedBatch(
        input_ids=tokens,
        position_ids=torch.arange(token_budget) % length,
        cu_seqlens=boundaries,
        last=last,
        answer=answer,
        index=index,
        labels=tokens.roll(-1),
        num_questions=number,
        num_tokens=number * length,
        max_length=length,
    )


def _share_used(device: torch.device) -> float:
    """Part of the device's memory that was in use at the worst moment."""
    if device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(device)
        return torch.cuda.max_memory_reserved(device) / (free + torch.cuda.memory_reserved(device))
    return psutil.virtual_memory().percent / 100


def _key(cfg: DictConfig) -> str:
    values = resolved(cfg)
    parts = {name: values.get(name) for name in _DECIDES}
    device = hardware(pipeline.device_of(cfg))
    text = json.dumps([parts, device, versions()], sort_keys=True, default=str)
    return hashlib.sha256(text.encode()).hexdigest()


def _cache_file() -> Path:
    folder = os.environ.get("MEDQLORA_CACHE", "~/.cache/medqlora")
    return Path(folder).expanduser() / "token_budgets.json"


def _read_cache() -> dict[str, int]:
    try:
        known = json.loads(_cache_file().read_text())
        return {str(key): int(value) for key, value in known.items()}
    except (OSError, ValueError, AttributeError):
        return {}


def _write_cache(known: dict[str, int]) -> None:
    path = _cache_file()
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary = path.with_suffix(f".{os.getpid()}.tmp")
        temporary.write_text(json.dumps(known, indent=1))
        os.replace(temporary, path)
    except OSError as error:
        log.warning("the token budget that was found could not be kept: %s", error)
