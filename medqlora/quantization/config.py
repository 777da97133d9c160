"""How the frozen weights of a base model are stored."""

from __future__ import annotations

import importlib.util
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch

from medqlora.errors import ConfigError

BITSANDBYTES_4BIT = ("fp4", "nf4")
HQQ_BITS = {"hqq_4bit": 4, "hqq_3bit": 3, "hqq_2bit": 2}
TORCHAO = ("torchao_int4", "torchao_int8")
DATA_TYPES = ("none", "int8", *BITSANDBYTES_4BIT, *HQQ_BITS, *TORCHAO)
COMPUTE_DTYPES = {"bfloat16": torch.bfloat16, "float32": torch.float32}
STORAGE_DTYPES = {
    "uint8": torch.uint8,
    "bfloat16": torch.bfloat16,
    "float32": torch.float32,
}
BLOCK_SIZES = (64, 128, 256)
EMBEDDINGS = ("bf16", "int8", "nf4")

NESTED_BLOCK_SIZE = 256
"""Block constants that share one of the second level; fixed in bitsandbytes."""


@dataclass(frozen=True)
class QuantConfig:
    """How the weights of a frozen base model are stored; checked when it is made.

    Attributes:
        data_type: Storage code of a linear layer's weight: none, int8 (LLM.int8), fp4, nf4,
            hqq_4bit, hqq_3bit, hqq_2bit, torchao_int4 or torchao_int8.
        double_quant: Whether the block constants of fp4 and nf4 are quantised as well.
        compute_dtype: dtype of the matmul after dequantisation and of every weight that is not
            quantised: bfloat16 or float32.
        skip_modules: Linear layers left in `compute_dtype`, by full name or any dotted part of it,
            such as "down_proj" or "layers.0". The output head of Gemma is the embedding and never
            stored on its own, whether it is named here or not.
        block_size: Consecutive weights of a row that share one constant: 64, 128 or 256. Not used
            by int8, whose unit is the row.
        embedding: Storage of the token embedding and of the head tied to it: bf16 (not quantised,
            in `compute_dtype`), int8 (one constant a row) or nf4 (blocks of `block_size`).
        quant_storage: dtype in which fp4 and nf4 codes are packed: uint8, or the dtype of the other
            weights for FSDP, which shards only tensors of one dtype. None is uint8.

    Raises:
        ConfigError: If an option is unknown, cannot work, or could not take effect.

    References:
        Dettmers et al. 2022, LLM.int8(), arXiv:2208.07339; Dettmers et al. 2023, QLoRA,
        arXiv:2305.14314.
    """

    data_type: str = "nf4"
    double_quant: bool = False
    compute_dtype: str = "bfloat16"
    skip_modules: Sequence[str] = ("lm_head",)
    block_size: int = 64
    embedding: str = "bf16"
    quant_storage: str | None = None

    def __post_init__(self) -> None:
        if isinstance(self.skip_modules, str):
            raise ConfigError(
                f"quant.skip_modules={self.skip_modules} is one string: it is read letter by "
                f"letter. Write quant.skip_modules=[{self.skip_modules}]."
            )
        object.__setattr__(self, "skip_modules", tuple(self.skip_modules or ()))
        self._check_names()
        self._check_combinations()

    def _check_names(self) -> None:
        _check_choice("data_type", self.data_type, DATA_TYPES)
        if self.compute_dtype in ("float16", "fp16", "half"):
            raise ConfigError(
                f"quant.compute_dtype={self.compute_dtype} cannot hold Gemma's activations: they "
                "exceed 65504 and become infinite. Choose quant.compute_dtype=bfloat16, or "
                "float32 where the hardware has no bfloat16."
            )
        _check_choice("compute_dtype", self.compute_dtype, tuple(COMPUTE_DTYPES))
        _check_choice("embedding", self.embedding, EMBEDDINGS)
        if self.block_size not in BLOCK_SIZES:
            raise ConfigError(
                f"quant.block_size={self.block_size} has no kernel on both CPU and GPU. "
                f"Choose one of {_listed(BLOCK_SIZES)}."
            )
        if self.quant_storage is not None:
            _check_choice("quant_storage", self.quant_storage, tuple(STORAGE_DTYPES))

    def _check_combinations(self) -> None:
        is_4bit = self.data_type in BITSANDBYTES_4BIT
        if self.double_quant and not is_4bit:
            raise ConfigError(
                f"quant.double_quant=true has no effect with quant.data_type={self.data_type}: "
                "only nf4 and fp4 keep block constants to quantise again. Choose quant=nf4 or "
                "quant=fp4, or set quant.double_quant=false."
            )
        if self.quant_storage is not None and not is_4bit:
            raise ConfigError(
                f"quant.quant_storage={self.quant_storage} has no effect with quant.data_type="
                f"{self.data_type}: only nf4 and fp4 are packed. Set quant.quant_storage=null."
            )
        uses_blocks = self.data_type not in ("none", "int8", "torchao_int8")
        if self.block_size != BLOCK_SIZES[0] and not uses_blocks and self.embedding != "nf4":
            raise ConfigError(
                f"quant.block_size={self.block_size} has no effect with "
                f"quant.data_type={self.data_type}: it has no blocks. Choose quant=nf4, or leave "
                "quant.block_size=64."
            )
        own = [name for name in self.skip_modules if name != "lm_head"]
        if own and self.data_type == "none":
            raise ConfigError(
                f"quant.skip_modules={own} has no effect with quant.data_type=none: no layer is "
                "quantised. Leave quant.skip_modules=[]."
            )
        if self.data_type == "torchao_int4" and self.compute_dtype != "bfloat16":
            raise ConfigError(
                f"quant.compute_dtype={self.compute_dtype} cannot work with "
                "quant.data_type=torchao_int4: its kernel multiplies in bfloat16 only. Set "
                "quant.compute_dtype=bfloat16."
            )

    @property
    def torch_dtype(self) -> torch.dtype:
        """The compute dtype as torch names it."""
        return COMPUTE_DTYPES[self.compute_dtype]

    @property
    def storage_dtype(self) -> torch.dtype:
        """Dtype in which 4-bit codes are packed."""
        return STORAGE_DTYPES[self.quant_storage or "uint8"]

    @property
    def is_4bit(self) -> bool:
        """Whether the linear layers are in bitsandbytes' 4-bit format."""
        return self.data_type in BITSANDBYTES_4BIT

    @property
    def changes_weights(self) -> bool:
        """Whether any weight is stored in fewer than 16 bits."""
        return self.data_type != "none" or self.embedding != "bf16"

    @property
    def embedding_double_quant(self) -> bool:
        """Whether an nf4 embedding quantises its constants: unless fp4 or nf4 layers say no."""
        return self.double_quant or not self.is_4bit

    @property
    def bits(self) -> float:
        """Bits per weight of a large linear layer, block constants included.

        References:
            Dettmers et al. 2023, arXiv:2305.14314, section 3: 32/64 = 0.5 bit a weight for
            constants of blocks of 64, 8/64 + 32/(64 * 256) = 0.127 with double quantisation.
        """
        if self.is_4bit:
            return 4 + constant_bits(self.block_size, self.double_quant)
        if self.data_type in HQQ_BITS:
            # three bits are packed ten to an int32; scale and zero point are in compute_dtype
            code = {4: 4.0, 3: 3.2, 2: 2.0}[HQQ_BITS[self.data_type]]
            return code + 2 * 8 * self.torch_dtype.itemsize / self.block_size
        if self.data_type == "torchao_int4":
            return 4 + 2 * 16 / self.block_size
        if self.data_type in ("int8", "torchao_int8"):
            return 8.0
        return 8.0 * self.torch_dtype.itemsize

    def as_dict(self) -> dict[str, Any]:
        """The fields as plain values, for a cache key or `metrics.json`."""
        return {**asdict(self), "skip_modules": list(self.skip_modules)}


def constant_bits(block_size: int, double_quant: bool) -> float:
    """Bits a weight pays for its block's constant.

    Args:
        block_size: Weights that share a constant.
        double_quant: Whether the constants are 8-bit codes with one 32-bit constant per 256 of
            them.
    """
    if double_quant:
        return 8 / block_size + 32 / (block_size * NESTED_BLOCK_SIZE)
    return 32 / block_size


def require_extra(quant: QuantConfig) -> None:
    """Refuse an option whose optional package is not installed.

    Raises:
        ConfigError: Names the package and the command that installs it.
    """
    package = quant.data_type.split("_")[0]
    needed = {"hqq": ("hqq", "termcolor"), "torchao": ("torchao",)}.get(package, ())
    if missing := [name for name in needed if importlib.util.find_spec(name) is None]:
        raise ConfigError(
            f"quant.data_type={quant.data_type} needs the package {' and '.join(missing)}, which "
            f"is not installed. Run: pip install 'medqlora[{package}]', or choose quant=nf4."
        )


def _check_choice(key: str, value: str, choices: tuple[str, ...]) -> None:
    if value not in choices:
        raise ConfigError(f"quant.{key}={value} is unknown. Choose one of {_listed(choices)}.")


def _listed(choices: Sequence[object]) -> str:
    return ", ".join(str(choice) for choice in choices)
