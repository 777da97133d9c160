"""What training changed and what storage cost, read from a real run folder."""

from __future__ import annotations

import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from medqlora import inspection, instantiation, pipeline
from medqlora.config import compose
from medqlora.errors import ConfigError
from medqlora.evaluation import mean_divergence, read_predictions, read_run
from medqlora.finetuning import attach_adapter
from medqlora.quantization import rounding_error


@pytest.fixture(scope="module")
def run(trained_run: Path) -> pipeline.LoadedRun:
    return pipeline.load_run(trained_run, device="cpu")


def test_every_adapted_weight_has_its_change_and_its_rounding_error(run):
    changes = inspection.adapter_changes(run)
    assert len(changes) == 14
    assert changes["layer"].tolist() == [0] * 7 + [1] * 7
    assert set(changes["rank"]) == {16}
    expected = rounding_error(run.module.model, run.config["model"]["path"])
    for row in changes.itertuples():
        assert row.rounding_error == pytest.approx(expected[row.name], rel=1e-5)
        assert row.norm == pytest.approx(float(np.linalg.norm(row.singular_values)), rel=1e-4)
        assert row.largest == max(row.singular_values)
        assert 1 < row.effective_rank < 16
        assert row.rounding_largest > 0
        # Six updates on made-up questions do not happen to undo rounding.
        assert abs(row.cosine) < 0.3


def test_an_adapter_made_of_the_rounding_error_points_along_it(run, tiny_gemma_folder):
    """LoftQ's start is the best rank-r part of what was lost, so <change, lost> = ||change||^2."""
    base = pipeline.build_base(run.config)
    peft = instantiation.make(compose("train", ["peft=loftq_r16"]).peft)
    started: Any = SimpleNamespace(
        module=SimpleNamespace(model=attach_adapter(base, peft)), config=run.config
    )
    for row in inspection.adapter_changes(started).itertuples():
        assert row.cosine == pytest.approx(row.relative_norm / row.rounding_error, rel=1e-3)
        assert row.largest == pytest.approx(row.rounding_largest, rel=1e-3)


def test_maps_and_spectra_keep_the_order_of_the_model(run):
    changes = inspection.adapter_changes(run)
    table = inspection.by_layer(changes, "norm")
    assert table.index.tolist() == changes["module"].tolist()[:7]
    (norm,) = changes.query("layer == 1 and module == 'up_proj'")["norm"]
    assert table.loc["up_proj", 1] == norm
    spectra = inspection.spectra(changes)
    assert list(spectra) == table.index.tolist()
    assert {len(lines) for lines in spectra.values()} == {2}


@pytest.mark.parametrize(
    ("name", "place"),
    [
        ("model.layers.3.mlp.up_proj", (3, "up_proj")),
        ("model.layers.17.self_attn.q_proj", (17, "q_proj")),
        ("model.embed_tokens", (-1, "embed_tokens")),
    ],
)
def test_a_weight_is_placed_by_its_path(name, place):
    assert inspection.place_of(name) == place


def test_the_base_of_a_run_answers_as_the_run_without_its_adapter(run):
    """And as `stored_bases` has it, which loads it by the option's name."""
    questions = inspection.questions_of(run, "test")
    found = inspection.base_predictions(run, "test")
    with run.module.model.disable_adapter():
        expected = run.predict(questions)
    for ours, theirs in zip(found, expected, strict=True):
        np.testing.assert_allclose(ours.scores, theirs.scores, atol=1e-5)
    (stored,) = inspection.stored_bases(run, ["nf4_fp32"], "test")
    assert [p.scores for p in stored.predictions] == [p.scores for p in found]
    assert [p.id for p in found] == [p.id for p in read_predictions(run.run_dir, "test")]


def test_answers_of_the_base_that_are_kept_beside_the_run_are_not_scored_again(
    run, tmp_path, monkeypatch
):
    folder = tmp_path / "baselines" / "base_quantized"
    folder.mkdir(parents=True)
    for name in ("metrics.json", "predictions.parquet", "config.yaml"):
        shutil.copy(run.run_dir / name, tmp_path)
        shutil.copy(run.run_dir / name, folder)
    monkeypatch.setattr(pipeline, "build_base", None)
    beside: Any = SimpleNamespace(run_dir=tmp_path)
    assert inspection.base_predictions(beside, "val") == read_predictions(run.run_dir, "val")
    assert inspection.base_run(read_run(run.run_dir)) is None


def test_storages_differ_in_size_and_error_as_their_theory_says(run):
    options = ["none_fp32", "int8", "nf4"]
    found = inspection.stored_bases(run, options, "val", 8)
    stored = dict(zip(("none", "int8", "nf4"), found, strict=True))
    rows = {name: inspection.storage_row(s, stored["none"]) for name, s in stored.items()}
    assert [s.option for s in stored.values()] == options
    assert stored["none"].errors == {}
    assert rows["none"].extra["KL nats"] == "0"
    assert rows["none"].extra["answers changed"] == "0"
    assert rows["none"].extra["bits"] == rows["none"].extra["error"] == "-"
    assert rows["nf4"].extra["bits"] == "4.13"
    means = {name: np.mean([*s.errors.values()]) for name, s in stored.items() if s.errors}
    assert means["int8"] < 0.02 < 0.06 < means["nf4"] < 0.13
    moved = {
        name: mean_divergence(stored["none"].predictions, s.predictions)
        for name, s in stored.items()
    }
    assert moved["nf4"] > moved["int8"] > moved["none"] == 0
    assert rows["nf4"].extra["KL nats"] == f"{moved['nf4']:.2g}"
    assert all(row.section is not None and row.section["n"] == 8 for row in rows.values())
    sizes = [rows[name].size_gb for name in ("nf4", "int8", "none")]
    assert sizes == sorted(sizes)


@pytest.mark.parametrize(
    ("options", "split", "words"),
    [(["nf5"], "val", "quant=nf5 is unknown"), (["nf4"], "exam", "no exam questions")],
)
def test_what_is_not_there_is_said_in_one_line(options, split, words, run):
    with pytest.raises(ConfigError, match=words) as error:
        list(inspection.stored_bases(run, options, split))
    assert "\n" not in str(error.value)
