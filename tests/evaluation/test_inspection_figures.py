"""Figures of weights and rows show every weight and every question, or say that there is none."""

from __future__ import annotations

import numpy as np
import pandas as pd
import pytest
import torch

from medqlora.evaluation.figures import save_figure
from medqlora.evaluation.inspection_figures import (
    change_figure,
    layer_figure,
    length_figure,
    levels_figure,
    packing_figure,
    rounding_figure,
    spectrum_figure,
)
from medqlora.schema import PackedBatch

LAYERS = (0, 0, 0, 1, 1, 1)
MODULES = ("q_proj", "up_proj", "down_proj") * 2


def make_changes() -> pd.DataFrame:
    numbers = np.linspace(0.1, 0.6, 6)
    return pd.DataFrame(
        {
            "layer": LAYERS,
            "module": MODULES,
            "relative_norm": numbers,
            "rounding_error": [0.09] * 5 + [0.0],
            "largest": 3 * numbers,
            "rounding_largest": [0.2] * 6,
        }
    )


def make_row(lengths: tuple[int, ...], budget: int = 32, places: int = 4) -> PackedBatch:
    ends = [0, *np.cumsum(lengths).tolist()]
    bounds = torch.tensor([*ends, *[ends[-1]] * (places + 1 - len(ends))], dtype=torch.int32)
    last = torch.tensor([end - 1 for end in ends[1:]] + [0] * (places - len(lengths)))
    nothing = torch.zeros(places, dtype=torch.long)
    tokens = torch.zeros(budget, dtype=torch.long)
    return PackedBatch(
        tokens, tokens, bounds, last, nothing, nothing, None, len(lengths), ends[-1], 16
    )


def test_a_map_shows_each_number_where_it_belongs(tmp_path):
    table = pd.DataFrame([[0.5, np.nan], [12.0, 3.0]], index=["q_proj", "up_proj"], columns=[0, 1])
    figure = layer_figure(table, "size")
    (axes,) = figure.axes
    found = {(text.get_position()): text.get_text() for text in axes.texts}
    assert found == {(0, 0): "0.5", (0, 1): "12", (1, 1): "3"}
    assert save_figure(figure, tmp_path / "map")[0].stat().st_size > 1000
    with pytest.raises(ValueError, match="No layer"):
        layer_figure(table.iloc[:0], "size")


def test_spectra_have_a_panel_a_module_and_a_line_a_layer():
    spectra = {f"m{i}": [[3.0, 1.0, 0.0], [2.0, 0.5, 0.1]] for i in range(5)}
    figure = spectrum_figure(spectra)
    shown = [axes for axes in figure.axes if axes.get_visible()]
    assert [axes.get_title(loc="left") for axes in shown] == list(spectra)
    assert all(len(axes.lines) == 2 for axes in shown)
    assert np.isnan(np.asarray(shown[0].lines[0].get_ydata(), dtype=float)).tolist() == [0, 0, 1]
    with pytest.raises(ValueError, match="nothing was added"):
        spectrum_figure({"q_proj": [[0.0, 0.0]]})


def test_changes_stand_beside_rounding_and_what_is_not_rounded_has_no_mark():
    left, right = change_figure(make_changes()).axes
    added, lost = (np.asarray(line.get_ydata(), dtype=float) for line in left.lines[:2])
    np.testing.assert_allclose(added, make_changes()["relative_norm"])
    assert np.isnan(lost).tolist() == [False] * 5 + [True]
    assert [tick.get_text() for tick in right.get_xticklabels()] == ["0", "1"]
    assert left.get_xticks().tolist() == [1, 4]


def test_rounding_errors_have_a_series_a_storage():
    errors = {name: dict.fromkeys("abcdef", 0.1) for name in ("nf4", "fp4")}
    (axes,) = rounding_figure(errors, LAYERS).axes
    assert [line.get_label() for line in axes.lines[:2]] == ["nf4", "fp4"]
    with pytest.raises(ValueError, match="series"):
        rounding_figure({}, [])


def test_levels_are_ticks_under_the_histogram():
    values = np.linspace(-1, 1, 500, dtype=np.float32)
    (axes,) = levels_figure(values, {"nf4": [-1, 0, 1], "fp4": [-1, 1]}).axes
    assert [list(np.asarray(line.get_xdata())) for line in axes.lines] == [[-1, 0, 1], [-1, 1]]
    assert axes.lines[0].get_label() == "nf4, 3 values"
    heights = [patch.get_height() for patch in axes.patches]  # pyright: ignore
    assert sum(heights) == 500


def test_rows_show_each_question_its_scored_token_and_the_padding():
    rows = [make_row((10, 8, 6)), make_row((16, 15))]
    (axes,) = packing_figure(rows).axes
    bars = [(p.get_x(), p.get_width()) for p in axes.patches]  # pyright: ignore
    assert bars == [(0, 10), (10, 8), (18, 6), (24, 8), (0, 16), (16, 15), (31, 1)]
    assert [list(np.asarray(line.get_xdata())) for line in axes.lines] == [[9, 17, 23], [15, 30]]
    assert axes.get_title(loc="left") == "2 rows of 32 tokens, 85.9 % filled"
    assert [text.get_text() for text in axes.texts] == ["3 questions", "2 questions"]
    with pytest.raises(ValueError, match="No row"):
        packing_figure([])


def test_lengths_are_shares_of_their_split():
    lengths = {"train": np.array([5, 6, 6, 90]), "val": np.array([7])}
    (axes,) = length_figure(lengths).axes
    assert [patch.get_label() for patch in axes.patches] == [
        "train: mean 26.8, n=4",
        "val: mean 7.0, n=1",
    ]
    tops = [float(np.asarray(patch.get_path().vertices)[:, 1].max()) for patch in axes.patches]
    assert tops == [50, 100]  # per cent of the split, in bins of two tokens
