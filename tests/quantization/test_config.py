"""An option that cannot work or cannot take effect is refused when the config is made."""

from __future__ import annotations

import importlib.util

import pytest
import torch
import yaml
from hydra.utils import instantiate

from medqlora.config import CONFIG_DIR
from medqlora.errors import ConfigError
from medqlora.quantization import QuantConfig
from medqlora.quantization.config import constant_bits, require_extra

OPTIONS = sorted(path.stem for path in (CONFIG_DIR / "quant").glob("*.yaml"))


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ({"data_type": "int8", "double_quant": True}, "double_quant"),
        ({"data_type": "none", "double_quant": True}, "double_quant"),
        ({"data_type": "hqq_4bit", "double_quant": True}, "double_quant"),
        ({"data_type": "nf5"}, "nf5"),
        ({"compute_dtype": "float8"}, "float8"),
        ({"compute_dtype": "float16"}, "bfloat16"),
        ({"block_size": 65}, "block_size"),
        ({"data_type": "int8", "block_size": 128}, "block_size"),
        ({"embedding": "int4"}, "embedding"),
        ({"quant_storage": "int3"}, "quant_storage"),
        ({"data_type": "int8", "quant_storage": "uint8"}, "quant_storage"),
        ({"data_type": "none", "skip_modules": ["down_proj"]}, "skip_modules"),
        ({"skip_modules": "lm_head"}, "skip_modules"),
        ({"data_type": "torchao_int4", "compute_dtype": "float32"}, "torchao_int4"),
    ],
)
def test_what_cannot_take_effect_is_refused_in_one_line(options, named):
    with pytest.raises(ConfigError) as caught:
        QuantConfig(**options)
    assert named in str(caught.value)
    assert "\n" not in str(caught.value)


def test_block_size_has_an_effect_on_an_nf4_embedding_beside_int8_layers():
    assert QuantConfig("int8", embedding="nf4", block_size=128).block_size == 128


def test_bits_of_nf4_are_those_of_the_paper():
    """4.5 bits, 4.127 with double quantisation (Dettmers et al. 2023, section 3)."""
    assert QuantConfig("nf4", double_quant=False).bits == 4.5
    assert QuantConfig("nf4", double_quant=True).bits == pytest.approx(4.127, abs=5e-4)
    assert constant_bits(64, False) - constant_bits(64, True) == pytest.approx(0.373, abs=5e-4)


@pytest.mark.parametrize("option", OPTIONS)
def test_every_option_file_makes_the_config_it_names(option):
    node = yaml.safe_load((CONFIG_DIR / "quant" / f"{option}.yaml").read_text())
    quant = instantiate(node)
    assert isinstance(quant, QuantConfig)
    assert quant.torch_dtype in (torch.bfloat16, torch.float32)
    assert option.split("_")[0] in quant.data_type
    assert QuantConfig(**quant.as_dict()) == quant


def test_the_options_of_the_contract_are_there():
    assert {"none", "int8", "fp4", "nf4", "nf4_single", "nf4_full"} <= set(OPTIONS)


@pytest.mark.parametrize(("data_type", "extra"), [("hqq_4bit", "hqq"), ("torchao_int8", "torchao")])
def test_a_missing_extra_is_named_with_the_command_that_installs_it(monkeypatch, data_type, extra):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ConfigError, match=rf"pip install 'medqlora\[{extra}\]'"):
        require_extra(QuantConfig(data_type))


def test_no_extra_is_asked_for_where_none_is_used(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    require_extra(QuantConfig("nf4"))
