"""How long a packed row a device can train on: by estimate, and for `auto` by trying."""

from __future__ import annotations

import hashlib
import json
import logging
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import psutil
import torch
from huggingface_hub import try_to_load_from_cache as cached
from omegaconf import DictConfig, OmegaConf
from torch.optim import Optimizer

from medqlora import instantiation, pipeline
from medqlora.acceleration import one_stream
from medqlora.acceleration.backbone import Checkpointing
from medqlora.acceleration.folding import LINEARS
from medqlora.acceleration.memory import KNOWN_SHAPES, estimate_training_memory
from medqlora.errors import ConfigError, ModelError, is_out_of_memory
from medqlora.evaluation import hardware, versions
from medqlora.finetuning import MCQAModule
from medqlora.hub import resolve_path
from medqlora.quantization import Checkpoint
from medqlora.runs import free_memory, resolved
from medqlora.schema import PackedBatch

log = logging.getLogger(__name__)

BUDGETS = (512, 1024, 2048, 4096, 8192, 16_384, 32_768)
"""Tokens a row that are tried, in order."""

MEMORY_MARGIN = 0.9
"""Part of a device's memory that a trial may use; validation and fragments take the rest."""

LIKELY = 0.85
"""Part of it up to which an estimate is expected to fit: it is met within 7 %."""

_QUESTION_LENGTH = 64
# By the class in the config, as there is no model yet to ask `why_not_fused` about.
_FOLDED = (
    "LoraConfig", "AdaLoraConfig", "VeraConfig", "IA3Config", "LNTuningConfig",
    "PromptTuningConfig", "no_adapter",
)  # fmt: skip
_STATE_BYTES = {
    "adamw_8bit": 2.0, "paged_adamw_8bit": 2.0, "lion_8bit": 1.0, "muon": 4.0, "adafactor": 0.0,
}  # fmt: skip
"""Bytes of state a trained weight, by the optimiser's name; of others those of Adam in float32."""

_DECIDES = ("model", "quant", "peft", "optimizer", "loss", "acceleration", "prompt")


def with_token_budget(cfg: DictConfig) -> DictConfig:
    """The config with `data.token_budget=auto` replaced by a number; unchanged otherwise.

    Args:
        cfg: The composed config of `train`.

    Raises:
        ConfigError: If not even the shortest row fits, or by estimate not the one asked for.
    """
    if cfg.data.token_budget != "auto":
        check_memory(cfg)
        return cfg
    instantiation.check(cfg)
    cfg = OmegaConf.create(OmegaConf.to_container(cfg, resolve=False))  # type: ignore[assignment]
    cfg.data.token_budget = BUDGETS[0]
    key = _key(cfg)
    known = _read_cache()
    if key in known:
        cfg.data.token_budget = known[key]
        log.info("data.token_budget=auto: %d, found on this device before", known[key])
        return cfg
    found = largest_that_fits(_Trial(cfg), BUDGETS, first=_likely(cfg))
    cfg.data.token_budget = found
    _write_cache({**known, key: found})
    log.info("data.token_budget=auto: %d is the longest row that fits this device", found)
    return cfg


def largest_that_fits(
    trial: Callable[[int], None], budgets: Sequence[int], first: int | None = None
) -> int:
    """The last of rising budgets whose trial does not run out of memory.

    Args:
        trial: Takes a whole training step with a budget; raises where memory does not suffice.
        budgets: In rising order.
        first: The one to begin with, as a trial takes long: next to it the answer is expected. None
            for the lowest.

    Raises:
        ConfigError: If the first does not fit.
    """

    def fits(budget: int) -> bool:
        try:
            trial(budget)
        except Exception as error:
            if not is_out_of_memory(error):
                raise
            return False
        return True

    place = 0 if first is None else budgets.index(first)
    while place >= 0 and not fits(budgets[place]):
        free_memory()
        place -= 1
    begun_lower = first is not None and place < budgets.index(first)
    while 0 <= place < len(budgets) - 1 and not begun_lower and fits(budgets[place + 1]):
        place += 1
    free_memory()
    if place < 0:
        raise ConfigError(
            f"data.token_budget=auto found no row that fits: {budgets[0]} tokens are too many for "
            "this device. Set acceleration.gradient_checkpointing=true, choose quant=nf4_full, or "
            "use a larger device."
        )
    return budgets[place]


# --- by estimate ----------------------------------------------------------------------------------


def estimated_peak(
    cfg: DictConfig, token_budget: int, gradient_checkpointing: Checkpointing = False
) -> float:
    """Estimated peak of training in GB, for the model, storage and adapter of a config.

    Args:
        cfg: The composed config of `train` or `doctor`.
        token_budget: Tokens a row.
        gradient_checkpointing: What is computed again backwards.
    """
    quant = instantiation.make(cfg.quant)
    peft: Any = OmegaConf.to_container(cfg.peft, resolve=True) if cfg.peft else {}
    method = str(peft.get("_target_", "")).rpartition(".")[2]
    # Those of PEFT where the config leaves them out.
    ranks = {"": 16, "LoraConfig": peft.get("r", 8), "AdaLoraConfig": peft.get("init_r", 12)}
    rank = int(ranks.get(method, method == "VeraConfig"))
    names = peft.get("target_modules")
    targets = set(LINEARS) & set(names) if isinstance(names, list) else set(LINEARS)
    embedding = {
        "bf16": 8.0 * quant.torch_dtype.itemsize,
        "int8": 8.0,
        "nf4": 4.127 if quant.embedding_double_quant else 4.5,
    }[quant.embedding]
    optimizer = str((cfg.get("optimizer") or {}).get("_target_", "adamw_8bit"))
    acceleration = cfg.get("acceleration") or {}
    fused = (
        torch.cuda.is_available()
        and (quant.is_4bit or quant.data_type == "none")
        and quant.torch_dtype == torch.bfloat16
        and (method in _FOLDED or not method)
        and acceleration.get("fused") != "off"
    )
    return estimate_training_memory(
        model_shape(str(cfg.model.path), cfg.model.get("revision")),
        token_budget=token_budget,
        weight_bits=quant.bits,
        embedding_bits=embedding,
        r=rank,
        targets=targets if rank else (),
        optimizer_bytes=_STATE_BYTES.get(optimizer.rpartition(".")[2], 8.0),
        compute_bytes=quant.torch_dtype.itemsize,
        gradient_checkpointing=gradient_checkpointing,
        fused=fused,
        float8=fused and bool(acceleration.get("float8")),
        trains_base=method == "FullFinetuning",
        token_dropout=bool(peft.get("lora_dropout") or peft.get("vera_dropout"))
        and acceleration.get("dropout_per") != "row",
    ).total_gb


def check_memory(cfg: DictConfig) -> None:
    """Refuse a row that by estimate is far beyond what the device has; say what is expected.

    Raises:
        ConfigError: If the estimate is more than a tenth above the whole memory of the GPU: it is
            met within 7 % where it was compared. What is nearer is tried, and rows are
            halved if that fails.
    """
    device = instantiation.device_of(cfg)
    if device.type != "cuda" or not isinstance(cfg.data.token_budget, int):
        return
    instantiation.check(cfg)
    again = cfg.acceleration.gradient_checkpointing
    total = torch.cuda.get_device_properties(device).total_memory / 1e9
    peak = estimated_peak(cfg, cfg.data.token_budget, again)
    log.info("about %.1f GB of the %.1f GB of this device are expected at the peak", peak, total)
    if peak <= 1.1 * total:
        return
    fitting = [b for b in BUDGETS if estimated_peak(cfg, b, again) <= LIKELY * total]
    proposals = [f"data.token_budget={fitting[-1]}"] if fitting else []
    if not again and estimated_peak(cfg, cfg.data.token_budget, True) <= LIKELY * total:
        proposals.append("acceleration.gradient_checkpointing=true")
    raise ConfigError(
        f"data.token_budget={cfg.data.token_budget} would take about {peak:.0f} GB, and this "
        f"device has {total:.0f} GB. Set {' or '.join(proposals) or 'quant=nf4_full, or use a '}"
        f"{'' if proposals else 'larger device'}."
    )


def model_shape(path: str, revision: str | None) -> Any:
    """The model's config where it is on this machine, else the published shape of that name."""
    if not is_hub_model(path) or isinstance(cached(path, "config.json", revision=revision), str):
        try:
            if not is_hub_model(path):
                return Checkpoint(path).config
            from transformers import AutoConfig

            return AutoConfig.from_pretrained(
                path, revision=revision or "main", local_files_only=True, trust_remote_code=False
            )
        except (ModelError, OSError, ValueError):
            pass
    return KNOWN_SHAPES["gemma-7b" if "7b" in path.lower() else "gemma-2b"]


def is_hub_model(path: str) -> bool:
    """Whether `model.path` names a model of the hub, not a folder or a bundled one."""
    resolved_path = resolve_path(path)
    local = resolved_path != path or path.startswith((".", "/", "~"))
    return not local and not Path(path).is_dir()


def _likely(cfg: DictConfig) -> int | None:
    """The longest row that by estimate fits a GPU."""
    device = instantiation.device_of(cfg)
    if device.type != "cuda":
        return None
    room = LIKELY * torch.cuda.get_device_properties(device).total_memory / 1e9
    again = cfg.acceleration.gradient_checkpointing
    fitting = [budget for budget in BUDGETS if estimated_peak(cfg, budget, again) <= room]
    return fitting[-1] if fitting else None


class _Trial:
    """Forward, backward and optimiser step on a row of random tokens."""

    def __init__(self, cfg: DictConfig) -> None:
        self.cfg = cfg
        self.module: MCQAModule | None = None
        self.optimizer: Optimizer | None = None

    def __call__(self, budget: int) -> None:
        if self.module is None:
            datamodule = pipeline.build_datamodule(self.cfg)
            # A random row has no solved questions in front, which would have to be read.
            datamodule.prompt = datamodule.prompt.without_shots()
            datamodule.prepare_letters()
            base = pipeline.build_base(self.cfg)
            self.module = pipeline.build_training_module(self.cfg, base, datamodule, 100)
            self.module.to(instantiation.device_of(self.cfg))
            self.optimizer = optimizer_of(self.module)
        module, optimizer = self.module, self.optimizer
        assert optimizer is not None
        pipeline.accelerate_for(self.cfg, module.model, budget)
        device = module.letter_rows.device
        if device.type == "cuda":
            free_memory()  # also what the last length has recorded
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
    with one_stream(row.input_ids.device):
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
    device = hardware(instantiation.device_of(cfg))
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
