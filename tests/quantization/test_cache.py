"""A quantised copy gives the same model, and is never trusted blindly."""

from __future__ import annotations

import json
import logging
import shutil
import time

import pytest
import torch

from medqlora.errors import ConfigError
from medqlora.quantization import KeptBase, QuantConfig, footprint, load_base, loading
from medqlora.quantization.cache import checksum
from tests.quantization.conftest import save_gemma

FULL = QuantConfig("nf4", double_quant=True, embedding="nf4")


@torch.no_grad()
def logits(model, ids):
    return model(ids).logits


@pytest.fixture
def no_quantisation(monkeypatch):
    """Called after the copy is made: from here on the original weights must not be used."""

    def forbid():
        def refuse(*args):
            raise AssertionError("quantised again")

        monkeypatch.setattr(loading, "_fill", refuse)

    return forbid


@pytest.mark.parametrize(
    "quant",
    [
        FULL,
        QuantConfig("nf4", double_quant=False, block_size=128),
        QuantConfig("fp4", double_quant=True, embedding="int8"),
        QuantConfig("nf4", double_quant=True, quant_storage="bfloat16"),
        QuantConfig("int8", skip_modules=["lm_head", "v_proj"]),
        QuantConfig("none", embedding="nf4", compute_dtype="float32"),
    ],
    ids=lambda quant: f"{quant.data_type}-{quant.embedding}",
)
def test_second_load_gives_the_same_model(gemma_path, token_ids, tmp_path, quant, no_quantisation):
    first = load_base(gemma_path, quant, cache_dir=tmp_path)
    no_quantisation()
    second = load_base(gemma_path, quant, cache_dir=tmp_path)
    assert footprint(second) == footprint(first)
    torch.testing.assert_close(logits(second, token_ids), logits(first, token_ids), rtol=0, atol=0)
    assert not any(p.requires_grad for p in second.parameters())


def test_nothing_is_kept_where_nothing_is_quantised(gemma_path, tmp_path):
    load_base(gemma_path, QuantConfig("none"), cache_dir=tmp_path)
    assert not list(tmp_path.iterdir())


def test_torchao_has_no_copy_and_says_so(gemma_path, tmp_path, monkeypatch):
    monkeypatch.setattr(loading, "require_extra", lambda quant: None)
    with pytest.raises(ConfigError, match="cache_quantized"):
        load_base(gemma_path, QuantConfig("torchao_int8"), cache_dir=tmp_path)


def rebuilt(path, quant, cache_dir, caplog, token_ids, named):
    """Load, and check that the copy was made anew with one warning and works the next time."""
    caplog.clear()
    with caplog.at_level(logging.WARNING, logger="medqlora"):
        model = load_base(path, quant, cache_dir=cache_dir)
    (record,) = [r for r in caplog.records if r.name.startswith("medqlora")]
    assert named in record.getMessage()
    assert "\n" not in record.getMessage()
    caplog.clear()
    again = load_base(path, quant, cache_dir=cache_dir)
    assert not [r for r in caplog.records if r.name.startswith("medqlora")]
    assert torch.equal(logits(model, token_ids), logits(again, token_ids))
    return model


def test_stale_copy_is_made_anew_and_said_so(tmp_path, token_ids, caplog):
    path = str(save_gemma(tmp_path / "model", seed=0))
    old = load_base(path, FULL, cache_dir=tmp_path / "cache")
    shutil.rmtree(path)
    save_gemma(tmp_path / "model", seed=1)
    new = rebuilt(path, FULL, tmp_path / "cache", caplog, token_ids, "stale")
    assert not torch.equal(logits(old, token_ids), logits(new, token_ids))


def flip_a_bit(folder):
    file = max(folder.glob("*.safetensors"), key=lambda f: f.stat().st_size)
    data = bytearray(file.read_bytes())
    data[-5] ^= 1
    file.write_bytes(bytes(data))


def cut_short(folder):
    file = next(folder.glob("*.safetensors"))
    file.write_bytes(file.read_bytes()[:-7])


def lose_a_file(folder):
    next(folder.glob("*.safetensors")).unlink()


def tear_the_index(folder):
    (folder / "index.json").write_text('{"key": ')


def empty_the_index(folder):
    (folder / "index.json").write_text("[]")


@pytest.mark.parametrize(
    "damage", [flip_a_bit, cut_short, lose_a_file, tear_the_index, empty_the_index]
)
def test_damaged_copy_is_made_anew_and_said_so(gemma_path, tmp_path, token_ids, caplog, damage):
    good = load_base(gemma_path, FULL, cache_dir=tmp_path)
    (folder,) = tmp_path.iterdir()
    damage(folder)
    model = rebuilt(gemma_path, FULL, tmp_path, caplog, token_ids, "damaged")
    assert torch.equal(logits(model, token_ids), logits(good, token_ids))


def test_copy_of_other_versions_is_stale(gemma_path, tmp_path, token_ids, caplog):
    load_base(gemma_path, FULL, cache_dir=tmp_path)
    (folder,) = tmp_path.iterdir()
    index = json.loads((folder / "index.json").read_text())
    index["key"]["bitsandbytes"] = "0.1"
    (folder / "index.json").write_text(json.dumps(index))
    rebuilt(gemma_path, FULL, tmp_path, caplog, token_ids, "bitsandbytes changed")


def test_each_quantisation_has_its_own_copy(gemma_path, tmp_path):
    for quant in (FULL, QuantConfig("nf4"), QuantConfig("int8")):
        load_base(gemma_path, quant, cache_dir=tmp_path)
    assert len(list(tmp_path.iterdir())) == 3
    assert not list(tmp_path.glob("*.tmp"))


def test_copy_that_cannot_be_kept_does_not_end_the_run(gemma_path, tmp_path, caplog):
    blocked = tmp_path / "file"
    blocked.write_text("in the way")
    load_base(gemma_path, FULL, cache_dir=blocked)
    assert "No quantised copy was kept" in caplog.text


def test_checksum_sees_every_byte_at_every_length():
    for length in (0, 1, 7, 8, 9, 31):
        data = torch.arange(length, dtype=torch.uint8)
        for place in range(length):
            changed = data.clone()
            changed[place] += 1
            assert checksum(changed) != checksum(data)


def test_second_load_is_three_times_faster(tmp_path):
    path = str(
        save_gemma(
            tmp_path / "model",
            vocab_size=16_000,
            hidden_size=512,
            intermediate_size=2048,
            num_hidden_layers=4,
        )
    )

    def seconds():
        start = time.perf_counter()
        load_base(path, FULL, cache_dir=tmp_path / "cache")
        return time.perf_counter() - start

    first = seconds()
    assert first > 3 * min(seconds(), seconds())


# --- kept in memory between jobs ------------------------------------------------------------------


def _pointers(model) -> set[int]:
    return {parameter.data_ptr() for parameter in model.parameters()}


@pytest.mark.parametrize(
    "quant",
    [
        FULL,
        QuantConfig("fp4", double_quant=False, embedding="int8"),
        QuantConfig("int8"),
        QuantConfig("none"),
    ],
    ids=lambda quant: f"{quant.data_type}-{quant.embedding}",
)
def test_the_next_job_gets_another_model_around_the_same_weights(
    gemma_path, token_ids, quant, no_quantisation
):
    """The same scores bit for bit, no weight twice in memory, nothing of the last job's model."""
    kept = KeptBase()
    first = load_base(gemma_path, quant, kept=kept)
    expected = logits(first, token_ids)
    no_quantisation()
    next(first.model.norm.parameters()).requires_grad_(True)
    first.model.layers[0].mlp.register_forward_hook(lambda *args: torch.zeros(1))
    first.train()
    second = load_base(gemma_path, quant, kept=kept)
    torch.testing.assert_close(logits(second, token_ids), expected, rtol=0, atol=0)
    assert _pointers(second) == _pointers(first)
    assert not {id(m) for m in second.modules()} & {id(m) for m in first.modules()}
    assert not any(p.requires_grad for p in second.parameters())
    assert not any(m.training or m._forward_hooks for m in second.modules())
    assert footprint(second) == footprint(first)


def test_weights_that_a_job_changed_are_loaded_again(gemma_path, token_ids, caplog):
    kept, quant = KeptBase(), QuantConfig("none")
    first = load_base(gemma_path, quant, kept=kept)
    expected = logits(first, token_ids)
    with torch.no_grad():
        first.model.layers[1].mlp.up_proj.weight[3, 5] += 1
    second = load_base(gemma_path, quant, kept=kept)
    torch.testing.assert_close(logits(second, token_ids), expected, rtol=0, atol=0)
    assert "model.layers.1.mlp.up_proj.weight" in caplog.text
    assert not _pointers(second) & _pointers(first)


def test_another_storage_or_a_changed_file_is_another_base(tmp_path, token_ids):
    path = str(save_gemma(tmp_path / "model", seed=1))
    kept = KeptBase()
    first = load_base(path, QuantConfig("none"), kept=kept)
    quantised = load_base(path, QuantConfig("nf4"), kept=kept)
    assert quantised.is_loaded_in_4bit
    again = load_base(path, QuantConfig("none"), kept=kept)
    assert not _pointers(again) & _pointers(first)
    save_gemma(tmp_path / "model", seed=2)
    other = load_base(path, QuantConfig("none"), kept=kept)
    assert not torch.equal(logits(other, token_ids), logits(first, token_ids))
    kept.forget()
    assert not _pointers(load_base(path, QuantConfig("none"), kept=kept)) & _pointers(other)
