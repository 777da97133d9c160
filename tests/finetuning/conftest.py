"""A random two-layer Gemma in a folder, quantised copies of it, and packed rows of questions."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from hydra import compose, initialize_config_dir
from hydra.utils import instantiate
from lightning import LightningDataModule, Trainer
from transformers import GemmaConfig, GemmaForCausalLM

from medqlora.acceleration import use_packed_attention
from medqlora.config import CONFIG_DIR
from medqlora.finetuning import MCQAModule, attach_adapter
from medqlora.quantization import QuantConfig, load_base
from medqlora.quantization.embedding import letter_rows
from medqlora.schema import IGNORE, PackedBatch

LETTER_IDS = (10, 11, 12, 13)


def make_row(
    lengths: tuple[int, ...],
    seed: int,
    *,
    first_index: int = 0,
    budget: int = 40,
    places: int = 6,
    max_length: int = 12,
) -> PackedBatch:
    """A row of random questions whose answer depends on their last token."""
    generator = torch.Generator().manual_seed(seed)
    total, count = sum(lengths), len(lengths)
    ids = torch.zeros(budget, dtype=torch.long)
    ids[:total] = torch.randint(20, 96, (total,), generator=generator)
    positions = torch.zeros(budget, dtype=torch.long)
    positions[:total] = torch.cat([torch.arange(n) for n in lengths])
    ends = torch.tensor(lengths).cumsum(0)
    cu = torch.full((places + 1,), total, dtype=torch.int32)
    cu[0] = 0
    cu[1 : count + 1] = ends
    last = torch.zeros(places, dtype=torch.long)
    last[:count] = ends - 1
    answer = torch.full((places,), IGNORE)
    answer[:count] = ids[last[:count]] % 4
    index = torch.full((places,), -1)
    index[:count] = torch.arange(count) + first_index
    labels = torch.full((budget,), IGNORE)
    labels[last[:count]] = torch.tensor(LETTER_IDS)[answer[:count]]
    return PackedBatch(ids, positions, cu, last, answer, index, labels, count, total, max_length)


class Loader:
    """Rows as a loader; Lightning takes a list for several loaders."""

    def __init__(self, rows: list[PackedBatch]) -> None:
        self.rows = rows

    def __len__(self) -> int:
        return len(self.rows)

    def __iter__(self) -> Iterator[PackedBatch]:
        return iter(self.rows)


class Rows(LightningDataModule):
    """The same rows in an order that depends on the epoch, resumable in mid-epoch."""

    def __init__(self, rows: list[PackedBatch]) -> None:
        super().__init__()
        self.rows = rows
        self.epoch = self.position = 0

    def __len__(self) -> int:
        return len(self.rows)

    def __iter__(self) -> Iterator[PackedBatch]:
        generator = torch.Generator().manual_seed(self.epoch)
        order = torch.randperm(len(self.rows), generator=generator).tolist()
        for place in range(self.position, len(order)):
            self.position = place + 1
            if self.position == len(order):
                self.epoch, self.position = self.epoch + 1, 0
            yield self.rows[order[place]]

    def train_dataloader(self) -> Any:
        return self

    def val_dataloader(self) -> Any:
        return Loader(self.rows[:2])

    def state_dict(self) -> dict[str, Any]:
        return {"epoch": self.epoch, "position": self.position}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.epoch, self.position = state_dict["epoch"], state_dict["position"]


@pytest.fixture
def rows() -> list[PackedBatch]:
    lengths = [(5, 9, 3, 12), (12, 12), (4, 4, 4, 4, 4), (7, 11, 2), (3, 12, 9)]
    return [make_row(n, seed, first_index=10 * seed) for seed, n in enumerate(lengths)]


@pytest.fixture(scope="session")
def gemma_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.manual_seed(0)
    config = GemmaConfig(
        vocab_size=96,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=1,
        head_dim=16,
        max_position_embeddings=64,
        initializer_range=0.1,
        bos_token_id=2,
        eos_token_id=1,
        pad_token_id=0,
    )
    folder = tmp_path_factory.mktemp("gemma")
    GemmaForCausalLM(config).save_pretrained(folder)
    return folder


@pytest.fixture
def base(gemma_folder: Path) -> Callable[..., GemmaForCausalLM]:
    """`base("nf4")`: the quantised model, packed, computing in float32 unless told otherwise."""

    def load(data_type: str = "none", compute_dtype: str = "float32") -> GemmaForCausalLM:
        quant = QuantConfig(
            data_type=data_type,
            double_quant=data_type in ("nf4", "fp4"),
            compute_dtype=compute_dtype,
            skip_modules=() if data_type == "none" else ("lm_head",),
        )
        model = load_base(str(gemma_folder), quant)
        use_packed_attention(model)
        return model

    return load


def option(group: str, name: str, *overrides: str) -> Any:
    """An option of conf/, as Hydra makes it."""
    with initialize_config_dir(config_dir=str(CONFIG_DIR), version_base="1.3"):
        return instantiate(compose(f"{group}/{name}", list(overrides))[group])


@pytest.fixture
def make_module(base) -> Callable[..., MCQAModule]:
    """A module on the tiny model, its parts named as on the command line."""

    def make(
        quant: str = "nf4",
        peft: Any = "lora_r4",
        loss: Any = "choice",
        optimizer: str = "adamw",
        scheduler: str = "cosine",
        steps: int = 10,
        compute_dtype: str = "float32",
        overrides: tuple[str, ...] = (),
        seed: int = 0,
    ) -> MCQAModule:
        torch.manual_seed(seed)
        model = base(quant, compute_dtype)
        letters = letter_rows(model, LETTER_IDS)
        peft_config = option("peft", peft, *overrides) if isinstance(peft, str) else peft
        model = attach_adapter(model, peft_config, num_training_steps=steps)
        return MCQAModule(
            model,
            letter_ids=LETTER_IDS,
            letter_rows=letters,
            loss=option("loss", loss) if isinstance(loss, str) else loss,
            optimizer=option("optimizer", optimizer),
            scheduler=option("scheduler", scheduler),
            num_training_steps=steps,
        )

    return make


@pytest.fixture
def make_trainer(tmp_path: Path) -> Callable[..., Trainer]:
    def make(**options: Any) -> Trainer:
        defaults = {
            "accelerator": "cpu",
            "logger": False,
            "enable_checkpointing": False,
            "enable_progress_bar": False,
            "enable_model_summary": False,
            "default_root_dir": tmp_path,
            "max_epochs": 1,
            "num_sanity_val_steps": 0,
            "limit_val_batches": 0,
            "use_distributed_sampler": False,
            "barebones": False,
        }
        return Trainer(**(defaults | options))

    return make
