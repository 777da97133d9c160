"""A report shows what the run folders say, and no accuracy without baseline, n and interval."""

from __future__ import annotations

import itertools
import math
import re
import xml.etree.ElementTree as ET
from dataclasses import replace
from html import unescape
from html.parser import HTMLParser
from urllib.parse import unquote

import numpy as np
import pandas as pd
import pytest
import yaml
from scipy import stats

from medqlora.config import compose
from medqlora.errors import CheckpointError, ConfigError
from medqlora.evaluation import read_predictions, read_run, wilson_interval, write_metrics
from medqlora.evaluation.ablation import (
    analyse,
    pareto_front,
    read_sweep,
    setting_interval,
)
from medqlora.evaluation.html import report_page
from medqlora.evaluation.sweep_figures import (
    curves,
    forest_figure,
    label_places,
    learning_figure,
    milliseconds,
)
from medqlora.evaluation.tables import comparison_markdown
from medqlora.report import PUBLISHED_DIR, latex_tables, read_published, report, summary
from tests.browser import MISSING, Browser, free_port
from tests.fake_runs import PEFTS, QUANTS, base_config, make_questions, write_run, write_sweep


@pytest.fixture(scope="module")
def sweep(tmp_path_factory):
    return write_sweep(tmp_path_factory.mktemp("work") / "sweeps" / "demo")


@pytest.fixture(scope="module")
def ablation(sweep):
    return analyse(read_sweep(sweep))


@pytest.fixture(scope="module")
def folder(sweep):
    """A report beside the sweeps."""
    out = sweep.parent.parent / "reports" / "demo"
    report(compose("report", [f"runs={sweep}", "published=reference_study"]), out)
    return out


@pytest.fixture(scope="module")
def page(folder):
    return (folder / "report.html").read_text()


class Links(HTMLParser):
    """Addresses of a page, by attribute."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[tuple[str, str, str]] = []
        self.rows = 0

    def handle_starttag(self, tag, attrs):
        for name, value in attrs:
            if name in ("href", "src", "action", "xlink:href"):
                self.found.append((tag, name, value or ""))


# --- what was varied ------------------------------------------------------------------------------


def test_factors_are_what_was_varied_and_seeds_are_none(ablation):
    assert set(ablation.factors["trained"]) == {"quant", "peft"}
    assert ablation.factors["trained"]["peft"] == list(PEFTS)
    assert ablation.factors["base"] == {"quant": ["16 bit", "int8", "nf4"]}


def test_seeds_of_a_setting_are_averaged_and_copies_of_a_base_are_one_run(ablation):
    trained = [s for s in ablation.settings if s.kind == "trained"]
    assert len(trained) == len(QUANTS) * len(PEFTS)
    for setting in trained:
        accuracies = [e.run.metrics["test"]["accuracy"] for e in setting.entries]
        assert len(accuracies) == 2
        assert setting.accuracy == pytest.approx(np.mean(accuracies))
        assert setting.interval.low < setting.accuracy < setting.interval.high
    assert sorted(s.name for s in ablation.settings if s.kind == "base") == [
        "base, 16 bit",
        "base, int8",
        "base, nf4",
    ]


def test_runs_without_choices_are_told_apart_by_their_keys(tmp_path):
    """Runs that were not typed at a command line know no option names, only values."""
    config = base_config()
    for number, (rate, data_type) in enumerate([(1e-4, "nf4"), (1e-4, "int8"), (3e-4, "nf4")]):
        own = {
            **config,
            "optimizer": {**config["optimizer"], "lr": rate},
            "quant": {**config["quant"], "data_type": data_type, "double_quant": number == 0},
        }
        write_run(tmp_path / str(number), own)
    found = analyse(read_sweep(tmp_path))
    assert found.factors["trained"]["optimizer.lr"] == ["0.0001", "0.0003"]
    assert len({s.name for s in found.settings}) == 3


BARE = {"data_type": "none", "double_quant": False, "compute_dtype": "bfloat16"}


def test_a_bare_base_is_named_for_its_storage_and_is_one_run_however_it_was_asked_for(tmp_path):
    """`base_16bit`, and `base_quantized` of quant=none: the same weights, told apart by no key."""
    config = {k: v for k, v in base_config().items() if k not in ("optimizer", "scheduler")}
    full = {**BARE, "skip_modules": [], "block_size": 64, "embedding": "bf16"}
    storages = [BARE, full, {**full, "compute_dtype": "float32"}, config["quant"]]
    for number, quant in enumerate(storages):
        write_run(tmp_path / str(number), {**config, "quant": quant, "peft": {}}, trainable=0)
    found = analyse(read_sweep(tmp_path))
    assert [s.name for s in found.settings] == ["base, 16 bit", "base, 32 bit", "base, nf4"]
    assert found.baseline == "base, 16 bit"


def test_a_bare_base_is_one_run_whatever_its_training_would_have_been(tmp_path):
    """Counted once for each number of epochs it would enlarge the family of Holm's method."""
    config = base_config()
    scoring = ("data", "prompt", "model", "quant", "acceleration", "trainer", "seed")
    changes = [
        {},
        {"trainer": {"max_epochs": 2, "gradient_clip_val": None, "log_every_n_steps": 1}},
        {"trainer": {"max_steps": 30, "accumulate_grad_batches": 4, "val_check_interval": 0.5}},
        {"data": {"limit_train": 500}},
    ]
    for number, change in enumerate(changes):
        own = {**config, **{group: {**config[group], **keys} for group, keys in change.items()}}
        folder = write_run(tmp_path / str(number), own)
        for name, quant in {"base_16bit": BARE, "base_quantized": config["quant"]}.items():
            base = {**{key: own[key] for key in scoring}, "quant": quant, "peft": {}}
            write_run(folder / "baselines" / name, base, skill=0.1, trainable=0)
    found = analyse(read_sweep(tmp_path))
    assert [s.name for s in found.settings if s.kind == "base"] == ["base, 16 bit", "base, nf4"]
    assert len(found.comparisons) == len(changes) + 1
    assert found.factors["base"] == {"quant": ["16 bit", "nf4"]}


def test_training_questions_tell_bases_apart_where_prompts_hold_some_of_them(tmp_path):
    config = {k: v for k, v in base_config("prompt=few_shot").items() if k != "optimizer"}
    for number, limit in enumerate((None, 10)):
        own = {**config, "data": {**config["data"], "limit_train": limit}, "peft": {}}
        write_run(tmp_path / str(number), own, trainable=0)
    assert len(analyse(read_sweep(tmp_path)).settings) == 2


def _with_keys(config, group, **keys):
    return {**config, group: {**config[group], **keys}}


@pytest.mark.parametrize(("group", "key"), [("data", "train_file"), ("model", "path")])
def test_runs_of_other_files_or_folders_are_no_seeds_of_one_another(group, key, tmp_path):
    """`config_hash` leaves out where they lie; two of the same name are told apart all the same."""
    config = base_config("data=files", "data.test_file=t.jsonl")
    for number, place in enumerate(("one", "other", "one")):
        own = _with_keys(config, group, **{key: f"/data/{place}/same"})
        own["seed"] = number // 2
        write_run(tmp_path / str(number), own, skill=3.0 if place == "other" else 0.1)
    found = analyse(read_sweep(tmp_path))
    assert {s.name: len(s.entries) for s in found.settings} == {
        f"{group}.{key}=/data/one/same": 2,
        f"{group}.{key}=/data/other/same": 1,
    }


def test_a_file_that_was_changed_between_runs_makes_another_setting(tmp_path):
    config = base_config("data=files", "data.train_file=a.jsonl")
    for seed in (0, 1, 2):
        folder = write_run(tmp_path / str(seed), {**config, "seed": seed})
        metrics = read_run(folder).metrics
        metrics["data"]["sha256"] = "ab"[seed == 2] * 64
        write_metrics(folder, metrics)
    assert [len(s.entries) for s in analyse(read_sweep(tmp_path)).settings] == [2, 1]
    cut = _with_keys(config, "data", num_val=5)
    for seed in (0, 1, 2):
        (tmp_path / str(seed) / "config.yaml").write_text(yaml.safe_dump({**cut, "seed": seed}))
    assert [len(s.entries) for s in analyse(read_sweep(tmp_path)).settings] == [3]


def test_merged_models_of_two_runs_are_two_settings(tmp_path):
    """`export format=merged` gives every one of them the same name."""
    config = {k: v for k, v in base_config().items() if k != "optimizer"} | {"peft": {}}
    for number, run in enumerate(("first", "second")):
        own = _with_keys(config, "model", path=f"/runs/{run}/export/merged")
        write_run(tmp_path / str(number), own, skill=number, trainable=0)
    found = analyse(read_sweep(tmp_path))
    assert len(found.settings) == len(found.entries) == 2


def test_the_same_run_counted_twice_is_one_seed(tmp_path):
    """Trained again or scored again: the newest counts, in tests, means and effects."""
    config = base_config()
    for number, (seed, day) in enumerate([(0, 2), (0, 3), (0, 1), (1, 1)]):
        folder = write_run(tmp_path / str(number), {**config, "seed": seed}, skill=number)
        metrics = read_run(folder).metrics | {"started": f"2026-11-0{day}T00:00:00+00:00"}
        write_metrics(folder, metrics)
    for number in (4, 5):
        own = {key: value for key, value in config.items() if key != "optimizer"}
        own |= {"adapter": "/runs/0/adapter", "seed": number}
        write_run(tmp_path / str(number), own, skill=0, trainable=0)
    found = analyse(read_sweep(tmp_path))
    assert [[e.run.name for e in s.entries] for s in found.settings] == [["1", "3"], ["5"]]
    assert len(found.entries) == 6
    assert sum("no further seed" in note for note in found.notes) == 2


def test_a_value_varied_within_an_option_is_a_factor_of_its_own(tmp_path):
    config = base_config()
    for number, (option, r, alpha) in enumerate(
        [("lora_r8", 8, 16), ("lora_r16", 16, 32), ("lora_r8", 8, 64)]
    ):
        own = {**config, "peft": {**config["peft"], "r": r, "lora_alpha": alpha}}
        write_run(tmp_path / str(number), own, choices={"peft": option})
    factors = analyse(read_sweep(tmp_path)).factors["trained"]
    assert factors == {"peft": ["lora_r8", "lora_r16"], "peft.lora_alpha": ["16", "32", "64"]}


def test_main_effects_are_means_over_matched_blocks(ablation):
    effects = {(e.factor, e.level): e for e in ablation.effects}
    runs = [e for e in ablation.entries if e.kind == "trained" and e.run.status == "completed"]
    for quant in QUANTS:
        own = [e.run.metrics["test"]["accuracy"] for e in runs if e.levels["quant"] == quant]
        effect = effects["quant", quant]
        assert effect.accuracy == pytest.approx(np.mean(own))
        assert (effect.num_blocks, effect.num_runs) == (6, 6)
        assert effect.interval.low < effect.accuracy < effect.interval.high
    assert ("quant", "fp4") not in effects  # its only run failed


@pytest.mark.parametrize("skill", [50.0, -50.0])
def test_no_effect_is_certain_where_every_run_has_every_question_alike(skill, tmp_path):
    """All right or all wrong: 240 questions say no more than Wilson's interval of them."""
    config = base_config()
    for number, (quant, r) in enumerate(itertools.product(("nf4", "int8"), (4, 8))):
        own = {
            **config,
            "quant": {**config["quant"], "data_type": quant},
            "peft": {**config["peft"], "r": r},
        }
        options = {"quant": quant, "peft": f"lora_r{r}"}
        write_run(tmp_path / str(number), own, skill=skill, choices=options)
    effects = analyse(read_sweep(tmp_path)).effects
    assert len(effects) == 4
    for effect in effects:
        assert (effect.n, effect.num_runs) == (240, 2)
        assert effect.interval == wilson_interval(240 if skill > 0 else 0, 240)


def test_levels_that_scored_different_questions_have_no_main_effect(tmp_path):
    """Their means would compare questions, not options."""
    config = base_config()
    for number, (quant, r) in enumerate(itertools.product(("nf4", "int8"), (4, 8))):
        own = {
            **config,
            "quant": {**config["quant"], "data_type": quant},
            "peft": {**config["peft"], "r": r},
        }
        write_run(
            tmp_path / str(number),
            own,
            questions=make_questions(seed=r),
            choices={"quant": quant, "peft": f"lora_r{r}"},
        )
    found = analyse(read_sweep(tmp_path))
    assert found.effects == []
    for factor in ("quant", "peft"):
        assert f"No main effect of {factor}: its runs scored different questions." in found.notes


def test_a_missing_job_leaves_only_complete_blocks(sweep, tmp_path):
    """A level that was tried on easier settings only must not look better for it."""
    runs = [r for r in read_sweep(sweep) if r.status == "completed"]
    partial = [
        r
        for r in runs
        if (r.metrics["choices"].get("quant"), r.metrics["choices"].get("peft"))
        != ("nf4", "lora_r8")
    ]
    effects = {(e.factor, e.level): e for e in analyse(partial).effects}
    assert effects["quant", "nf4"].num_blocks == 4
    assert effects["quant", "none"].num_runs == 4


def test_the_interval_of_one_run_is_wilsons_and_seeds_widen_it():
    rng = np.random.default_rng(0)
    one = rng.random((1, 200)) < 0.4
    certain = np.ones((3, 200), dtype=bool)
    assert setting_interval(certain) == wilson_interval(200, 200), "not a point: 200 were asked"
    assert setting_interval(one) == wilson_interval(int(one.sum()), 200)
    same = np.repeat(one, 3, axis=0)
    spread = np.array([rng.random(200) < p for p in (0.25, 0.4, 0.55)])
    width = [i.high - i.low for i in map(setting_interval, (same, spread))]
    assert width[1] > 2 * width[0]
    assert width[0] == pytest.approx(
        wilson_interval(int(one.sum()), 200).high - wilson_interval(int(one.sum()), 200).low,
        rel=0.05,
    )


def test_the_interval_of_three_seeds_holds_the_accuracy_of_others():
    """Simulated: at least 91 % of 300 draws, which is 3 standard errors below 95 %."""
    rng, n, held = np.random.default_rng(0), 450, 0
    truth = stats.norm.sf(0.3 / (1 + 0.4**2 + 0.05**2) ** 0.5)
    for _ in range(300):
        own = rng.normal(0, 0.05, (3, 1)) + rng.normal(0, 0.4, (3, n))
        low, high = setting_interval(rng.normal(0, 1, n) + own > 0.3)
        held += low <= truth <= high
    assert held >= 0.91 * 300


def test_seeds_that_miss_other_questions_have_an_interval_of_some_width():
    """Each question is right in two of three runs: the means vary by rounding alone."""
    correct = np.array([[(i + seed) % 3 > 0 for i in range(30)] for seed in range(3)])
    low, high = setting_interval(correct)
    assert low < 0.6 < 2 / 3 < 0.73 < high


@pytest.mark.parametrize(
    ("costs", "gains", "expected"),
    [
        ([1, 2, 3], [0.1, 0.2, 0.3], [0, 1, 2]),
        ([1, 2, 3], [0.3, 0.2, 0.1], [0]),
        ([2, 1, 3, None], [0.3, 0.1, 0.3, 0.9], [1, 0]),
        ([1, 1], [0.2, 0.4], [1]),
    ],
)
def test_nothing_beats_a_point_of_the_pareto_front(costs, gains, expected):
    assert pareto_front(costs, gains) == expected
    for i in expected:
        for j, (cost, gain) in enumerate(zip(costs, gains, strict=True)):
            if cost is not None and j != i:
                assert not (cost <= costs[i] and gain > gains[i])


def test_labels_cover_neither_points_nor_one_another():
    points = [(50.0, 50.0), (53.0, 50.0), (56.0, 52.0), (290.0, 50.0), (150.0, 80.0)]
    widths = [60.0, 60.0, 60.0, 80.0, 500.0]
    places = label_places(points, widths, (0, 300))
    assert places[4] is None  # wider than the plot
    assert places[3] is not None
    assert places[3][2]  # at the right end it goes to the left
    boxes = []
    for place, width in zip(places, widths, strict=True):
        if place is not None:
            start = place[0] - width if place[2] else place[0]
            boxes.append((start, place[1] - 10, start + width, place[1] + 2))
    for a, b in itertools.combinations(boxes, 2):
        assert a[2] <= b[0] or b[2] <= a[0] or a[3] <= b[1] or b[3] <= a[1]
    for box, (x, y) in itertools.product(boxes, points):
        assert not (box[0] < x < box[2] and box[1] < y < box[3])


def test_comparisons_are_paired_with_the_bare_base_and_corrected(ablation):
    assert ablation.baseline == "base, 16 bit"
    assert len(ablation.comparisons) == len(ablation.settings) - 1
    for c in ablation.comparisons:
        assert c.p_holm is not None
        assert c.p_holm >= c.p_value
        assert c.ci_low <= c.difference <= c.ci_high


def test_runs_on_other_questions_are_shown_and_not_compared(tmp_path):
    config = base_config()
    for number in range(3):
        own = {**config, "optimizer": {**config["optimizer"], "lr": 1e-4 * (number + 1)}}
        questions = make_questions(seed=0 if number < 2 else 5)
        write_run(tmp_path / str(number), own, questions=questions)
    found = analyse(read_sweep(tmp_path))
    assert len(found.settings) == 3
    assert len(found.comparisons) == 1
    assert any("other questions" in note for note in found.notes)


# --- files ----------------------------------------------------------------------------------------


def test_the_summary_has_a_row_for_every_run_with_the_numbers_of_its_metrics(folder, sweep):
    table = pd.read_csv(folder / "summary.csv")
    pd.testing.assert_frame_equal(
        table, pd.read_parquet(folder / "summary.parquet"), check_dtype=False
    )
    assert len(table) == 18 + 3 + 2
    for row in table.to_dict("records"):
        if row["status"] != "completed":
            assert isinstance(row["error"], str)
            continue
        run = read_run(row["run"])
        assert row["accuracy"] == run.metrics["test"]["accuracy"]
        right = [p.correct for p in read_predictions(run.run_dir, "test")]
        assert row["accuracy"] == pytest.approx(np.mean(right))
        assert row["config_hash"] == run.metrics["config_hash"]
        assert row["command"] == run.metrics["command"]


def test_every_figure_is_there_twice_and_well_formed(folder):
    names = {path.stem for path in (folder / "figures").glob("*.png")}
    assert names == {
        "accuracy_gb",
        "accuracy_ms",
        "accuracy_trainable",
        "learning_curves",
        "subjects",
        "main_effects",
        "differences",
    }
    for name in names:
        assert (folder / "figures" / f"{name}.png").read_bytes().startswith(b"\x89PNG")
        assert ET.parse(folder / "figures" / f"{name}.svg").getroot().tag.endswith("svg")


def test_markdown_never_shows_an_accuracy_alone(folder):
    """Each line with a percentage has an interval, or belongs to a paired comparison."""
    text = (folder / "tables.md").read_text()
    rows = [line for line in text.splitlines() if line.startswith("|") and " % |" in line]
    assert len(rows) > 30
    for line in rows:
        assert re.search(r"\[[+-]?\d+\.\d, [+-]?\d+\.\d\]", line), line
    assert "majority" in text
    assert "| weights, 16 bit to 4 bit | 2009.06 MB to 398.72 MB | 5010.00 MB to " in text
    assert "lora_r16, fp4 (the loss is not finite" in text


@pytest.mark.parametrize("error", ["interrupted by SIGTERM", None])
def test_a_run_that_was_interrupted_is_called_so_everywhere(error, tmp_path):
    folder = tmp_path / "runs" / "0"
    write_run(folder, base_config(), status="interrupted", error=error, curve=False)
    report(compose("report", [f"runs={tmp_path / 'runs'}"]), tmp_path / "out")
    table = (tmp_path / "out" / "tables.md").read_text()
    page = (tmp_path / "out" / "report.html").read_text()
    assert "| interrupted |" in table
    for text in (table, page):
        assert "failed |" not in text
        assert "interrupted: None" not in text
    assert f"interrupted: {error or 'it was killed'}" in page


def test_where_interval_and_p_disagree_the_reader_is_told_which_decides(folder, ablation):
    """A bootstrap of five questions that differ leaves out 0 at p = 0.06."""
    words = "the exact test decides: the bootstrap interval is too narrow where few questions"
    few = replace(ablation, comparisons=[replace(ablation.comparisons[0], method=METHOD)])
    assert words in latex_tables(few)
    assert words in comparison_markdown(few.comparisons)
    assert words in report_page(few, folder, title="few", command="report")
    assert words not in comparison_markdown([replace(few.comparisons[0], method="another")])


METHOD = "exact McNemar; bootstrap by question"


def test_latex_escapes_what_latex_would_read(ablation):
    text = latex_tables(ablation)
    assert "lora\\_r16" in text
    assert text.count("\\begin{tabular}") == text.count("\\end{tabular}") == 2
    assert not re.search(r"(?<!\\)[%#&](?! )", text)
    for line in text.splitlines():
        if line.endswith("\\\\"):
            assert line.count(" & ") in (7, 5)


# --- the page -------------------------------------------------------------------------------------


def test_links_of_the_page_lead_to_run_folders_and_nowhere_else(page, folder, sweep):
    links = Links()
    links.feed(page)
    runs = 0
    for tag, name, value in links.found:
        if value.startswith("#") or value == "data:,":
            continue
        assert (tag, name) == ("a", "href")
        target = (folder / unquote(value)).resolve()
        assert target.is_dir()
        assert sweep.resolve() in target.parents
        runs += 1
    assert runs > 300
    assert not re.search(r"https?://|url\(|@import", page)


def test_every_run_has_its_exact_command(page, ablation):
    for run in (entry.run for entry in ablation.entries):
        if run.metrics["command"]:
            assert f"<pre>{run.metrics['command']}</pre>" in page
        assert f"--config-path {run.run_dir.resolve()} " in page


def test_what_a_run_folder_says_is_text_and_never_markup(page, tmp_path):
    assert "the loss is not finite &lt;b&gt;at&lt;/b&gt; update 12" in page
    config = base_config()
    evil = '"><script>alert(1)</script>'
    write_run(tmp_path / "a", config | {"seed": 1}, command=evil, choices={"quant": evil})
    write_run(tmp_path / "b", config | {"seed": 2}, command=evil, choices={"quant": "nf4"})
    report(compose("report", [f"runs={tmp_path}", f"title='{evil}'"]), tmp_path / "out")
    text = (tmp_path / "out" / "report.html").read_text()
    assert "<script>alert" not in text
    assert text.count("<script>") == 1


def test_published_numbers_stand_beside_ours_with_what_they_mean(page):
    section = page[page.index('<section id="published">') :]
    for text in (
        "2009.06 MB to 398.72 MB",
        "22.11 % to 33.35 %",
        "40 GB to 10 GB",
        "200 ms to 150 ms",
        "1.36",
        "22.1 %",
        "32.2 %",
        "1.386",
    ):
        assert text in section
    assert "5010.00 MB</a> to <a" in section
    assert re.search(r"majority \d\d\.\d %", section)
    assert "quoted as published" in section


def test_ours_beside_a_published_number_is_chosen_on_val_and_differs_in_storage_alone(tmp_path):
    """Test chooses nothing, and "16 bit" is said of 16 bit only."""
    config = base_config()
    for number, (peft, skill, quant, gb) in enumerate(
        (
            ("lora_r8", 0.4, {**BARE, "compute_dtype": "float32"}, 9.0),
            ("lora_r16", 3.0, {**BARE, "compute_dtype": "float32"}, 9.5),
            ("lora_r8", 2.0, config["quant"], 2.0),
            ("lora_r16", 0.1, config["quant"], 2.5),
        )
    ):
        own = {**config, "quant": quant, "peft": {**config["peft"], "r": number % 2}}
        option = "none" if quant["data_type"] == "none" else "nf4"
        options = {"quant": option, "peft": peft}
        write_run(tmp_path / str(number), own, skill=skill, choices=options, gb=gb)
    # The other one is better on test.
    metrics = dict(read_run(tmp_path / "3").metrics)
    metrics["test"] |= {"accuracy": 0.99, "ci_low": 0.97, "ci_high": 1.0}
    write_metrics(tmp_path / "3", metrics)
    ablation = analyse(read_sweep(tmp_path))
    assert max(ablation.settings, key=lambda s: s.accuracy).name == "lora_r16, nf4"
    rows = {row.quantity: row for row in read_published("reference_study", ablation).rows}
    memory = rows["memory of training, 16 bit to 4 bit"]
    assert memory.text == "18.00 GB to 4.00 GB"
    assert memory.remark == "lora_r8, unquantised (32 bit) to lora_r8, nf4"
    assert rows["weights, 16 bit to 4 bit"].text == "- to -"


def test_the_marks_of_an_axis_differ_where_its_values_hardly_do(tmp_path):
    for place, (peft, ms) in enumerate({"lora_r8": 4.5566, "lora_r16": 4.5644}.items()):
        config = base_config(f"peft={peft}", "seed=1")
        write_run(tmp_path / "runs" / str(place), config, choices={"peft": peft}, ms=ms)
    report(compose("report", [f"runs={tmp_path / 'runs'}"]), tmp_path / "out")
    page = (tmp_path / "out" / "report.html").read_text()
    [plot] = re.findall(r'<svg[^>]*aria-label="[^"]*scoring time[^"]*">.*?</svg>', page, re.DOTALL)
    marks = [text for text in re.findall(r">([\d.]+)</text>", plot) if text.startswith("4.5")]
    assert len(marks) == len(set(marks)) > 2, marks
    assert all(4.55 < float(mark) < 4.57 for mark in marks)


def test_published_numbers_come_by_themselves_with_their_sweep(tmp_path):
    config = base_config()
    write_run(tmp_path / "0", config, choices={"sweep": "reference_study"})
    report(compose("report", [f"runs={tmp_path / '0'}"]), tmp_path / "out")
    assert "2009.06 MB" in (tmp_path / "out" / "report.html").read_text()
    assert [path.stem for path in PUBLISHED_DIR.glob("*.yaml")] == ["reference_study"]


@pytest.mark.parametrize(
    ("case", "expected"),
    [("failed", "failed"), ("no predictions", "no part in tests"), ("one run", "accuracy")],
)
def test_a_report_of_little_says_what_is_missing(case, expected, tmp_path):
    status = "failed" if case == "failed" else "completed"
    error = "out of memory" if case == "failed" else None
    write_run(tmp_path / "0", base_config(), status=status, error=error, curve=False)
    if case == "no predictions":
        (tmp_path / "0" / "predictions.parquet").unlink()
    ablation = report(compose("report", [f"runs={tmp_path / '0'}"]), tmp_path / "out")
    assert len(summary(ablation)) == 1
    assert expected in (tmp_path / "out" / "report.html").read_text()


def test_a_run_that_another_sweep_did_is_in_the_report(tmp_path):
    write_run(tmp_path / "rank" / "3", base_config())
    (tmp_path / "quantization").mkdir()
    (tmp_path / "quantization" / "0").symlink_to("../rank/3")
    (tmp_path / "quantization" / "1").symlink_to("../rank/gone")
    runs = read_sweep(tmp_path / "quantization")
    assert [run.status for run in runs] == ["completed", "failed"]
    assert "not a folder" in runs[1].error


@pytest.mark.parametrize(
    ("overrides", "error", "words"),
    [
        ([], ConfigError, "runs=sweeps/rank"),
        (["runs=/nowhere"], CheckpointError, "not a folder"),
        (["runs=EMPTY"], CheckpointError, "no run folder"),
        (["runs=SWEEP", "split=train"], ConfigError, "Choose test, val"),
        (["runs=SWEEP", "baseline=nf5"], ConfigError, "base, nf4"),
        (["runs=SWEEP", "published=nature"], ConfigError, "reference_study"),
    ],
)
def test_a_bad_request_is_one_line_that_says_what_to_type(overrides, error, words, sweep, tmp_path):
    empty = tmp_path / "empty"
    empty.mkdir()
    overrides = [o.replace("EMPTY", str(empty)).replace("SWEEP", str(sweep)) for o in overrides]
    with pytest.raises(error, match=re.escape(words)) as caught:
        report(compose("report", overrides), tmp_path / "out")
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "out").exists()


def test_the_command_prints_a_table_and_where_the_page_is(sweep, tmp_path, run_command):
    ended = run_command("report", f"runs={sweep}", f"hydra.run.dir={tmp_path}/out")
    assert ended.code == 0, ended.err
    assert "majority" in ended.out
    assert "2 run(s) did not complete" in ended.out
    assert f"report: {tmp_path}/out/report.html" in ended.out
    assert run_command("report", "runs=/nowhere", f"hydra.run.dir={tmp_path}/no").code == 2


def test_the_command_says_so_where_no_run_completed(tmp_path, run_command):
    write_run(tmp_path / "runs" / "0", base_config(), status="failed", error="out of memory")
    words = [
        f"runs={tmp_path}/runs",
        "split=val",
        "published=none",
        f"hydra.run.dir={tmp_path}/out",
    ]
    ended = run_command("report", *words)
    assert ended.code == 0, ended.err
    assert "1 run(s) did not complete" in ended.out
    for word in ("accuracy", "majority", "pruned"):
        assert word not in ended.out
    assert "out of memory" in (tmp_path / "out" / "report.html").read_text()


def test_the_most_accurate_setting_is_printed_with_the_mean_of_its_seeds(tmp_path, run_command):
    """It was chosen by that mean; the numbers of its first seed are those of a run."""
    for seed in (1, 2, 3):
        write_run(tmp_path / "runs" / str(seed), base_config(f"seed={seed}"), skill=0.4 * seed)
    ended = run_command("report", f"runs={tmp_path}/runs", f"hydra.run.dir={tmp_path}/out")
    assert ended.code == 0, ended.err
    [best] = analyse(read_sweep(tmp_path / "runs")).settings
    low, high = best.interval
    assert (
        f"most accurate: {best.name}: {100 * best.accuracy:.1f} % [{100 * low:.1f}, " in ended.out
    )
    assert f"{100 * high:.1f}]  majority {100 * best.majority_accuracy:.1f} %" in ended.out
    assert "n=240, 3 seeds" in ended.out


def test_metrics_that_are_no_numbers_are_a_damaged_run_and_not_the_end(tmp_path, run_command):
    runs = tmp_path / "runs"
    for number in range(2):
        write_run(runs / str(number), base_config(f"seed={number}"))
    path = runs / "1" / "metrics.json"
    path.write_text(re.sub(r'"accuracy": [\d.]+', '"accuracy": "x"', path.read_text(), count=1))
    ended = run_command("report", f"runs={runs}", f"hydra.run.dir={tmp_path}/out")
    assert ended.code == 0, ended.err
    assert "1 run(s) did not complete" in ended.out
    [row] = [
        r
        for r in pd.read_csv(tmp_path / "out/summary.csv").to_dict("records")
        if r["error"] == r["error"]
    ]
    assert row["run"] == str(runs / "1")
    assert "val.accuracy='x' is no number" in row["error"]


# --- in a browser ---------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def browser(tmp_path_factory):
    if MISSING:
        pytest.skip(MISSING)
    window = Browser(free_port())
    yield window
    window.close()


@pytest.fixture
def opened(browser, folder):
    """The page, freshly loaded; afterwards it must have logged nothing and asked for nothing."""
    browser.requests()
    browser.log("browser")
    browser.open(folder / "report.html")
    yield browser
    assert browser.log("browser") == []
    asked = {url for url in browser.requests() if not url.startswith("data:")}
    assert asked <= {(folder / "report.html").as_uri()}


COLUMN = (
    "const i = [...document.querySelectorAll(`#${arguments[0]} thead th`)]"
    ".findIndex((h) => h.textContent.trim() === arguments[1]);"
    "return [...document.querySelectorAll(`#${arguments[0]} tbody tr:not(.detail)`)]"
    ".filter((r) => !r.hidden).map((r) => r.cells[i].dataset.v);"
)
CLICK = (
    "const h = [...document.querySelectorAll(`#${arguments[0]} thead th`)]"
    ".find((h) => h.textContent.trim() === arguments[1]);"
    "h.querySelector('button').click(); return h.getAttribute('aria-sort');"
)


@pytest.mark.parametrize("heading", ["accuracy", "GB", "ms a question", "seed"])
def test_a_heading_sorts_by_value_and_again_the_other_way(opened, heading):
    for _ in range(2):
        way = opened.run(CLICK, "table", heading)
        values = opened.run(COLUMN, "table", heading)
        known = [float(v) for v in values if v]
        assert known == sorted(known, reverse=way == "descending")
        assert len(set(known)) > 1
        assert all(values[: len(known)])  # the unknown ones are last


def test_words_and_numbers_in_names_sort_as_a_reader_expects(opened):
    opened.run(CLICK, "table", "peft")
    values = [v for v in opened.run(COLUMN, "table", "peft") if v]
    assert list(dict.fromkeys(values)) == ["dora_r16", "lora_r8", "lora_r16"]


def test_details_stay_under_their_run_when_sorted(opened):
    opened.run(CLICK, "table", "accuracy")
    assert opened.run(
        "return [...document.querySelectorAll('#table tr.run')].every((r) =>"
        " r.nextElementSibling.classList.contains('detail'));"
    )


def test_filtering_keeps_rows_that_have_every_word_and_dims_the_other_points(opened):
    assert len(opened.run(COLUMN, "table", "run")) == 23
    opened.run("document.getElementById('search').focus();")
    opened.type("nf4 lora_r16")
    assert len(opened.run(COLUMN, "table", "run")) == 2
    assert opened.run("return document.getElementById('count').value;") == "2 of 23 runs"
    dim, all_ = opened.run(
        "const p = [...document.querySelectorAll('#costs g.point')];"
        "return [p.filter((g) => g.classList.contains('dimmed')).length, p.length];"
    )
    assert 0 < dim < all_
    opened.run("document.getElementById('reset').click();")
    opened.run(
        "const s = document.querySelector('select[name=status]'); s.value = 'failed';"
        "s.dispatchEvent(new Event('change', {bubbles: true}));"
    )
    assert len(opened.run(COLUMN, "table", "run")) == 2


def test_a_tooltip_says_what_a_point_is_with_its_interval_and_n(opened):
    assert opened.run("return document.getElementById('tip').hidden;")
    opened.hover("#costs g.point .hit")
    shown, text = opened.run(
        "const t = document.getElementById('tip'); return [!t.hidden, t.textContent];"
    )
    assert shown
    assert re.search(r"accuracy \d+\.\d %, 95 % interval \[\d", text)
    assert re.search(r"majority \d+\.\d %, n=240", text)
    assert "python -m medqlora" in text
    opened.hover("h1")
    assert opened.run("return document.getElementById('tip').hidden;")


def test_a_tooltip_stays_within_the_window(opened):
    opened.hover("#costs figure:last-child g.point:last-of-type .hit")
    left, right, width = opened.run(
        "const b = document.getElementById('tip').getBoundingClientRect();"
        "return [b.left, b.right, innerWidth];"
    )
    assert 0 <= left < right <= width


def test_a_button_shows_the_exact_command(opened):
    assert opened.run(
        "const b = document.querySelector('#table button.command'); b.click();"
        "const d = b.closest('tr').nextElementSibling;"
        "return [d.hidden, b.getAttribute('aria-expanded'), d.querySelector('pre').textContent];"
    ) == [False, "true", "python -m medqlora.train quant=none peft=lora_r8 seed=1"]


LUMINANCE = (
    "const parse = (c) => c.match(/[\\d.]+/g).slice(0, 3).map((v) => {"
    " const s = v / 255; return s <= 0.03928 ? s / 12.92 : ((s + 0.055) / 1.055) ** 2.4; });"
    "const light = (c) => { const [r, g, b] = parse(c); return 0.2126*r + 0.7152*g + 0.0722*b; };"
    "const back = light(getComputedStyle(document.documentElement).backgroundColor"
    " === 'rgba(0, 0, 0, 0)' ? getComputedStyle(document.body).backgroundColor : '');"
    "return [back, ...['body', '.soft', 'a', 'tr.failed td', '.sure a'].map((s) =>"
    " light(getComputedStyle(document.querySelector(s)).color))];"
)


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_text_is_readable_in_light_and_dark(opened, scheme):
    """Contrast of at least 4.5, WCAG 2.1 criterion 1.4.3."""
    features = [{"name": "prefers-color-scheme", "value": scheme}]
    opened.devtools("Emulation.setEmulatedMedia", features=features)
    back, *inks = opened.run(LUMINANCE)
    assert (back > 0.5) is (scheme == "light")
    for ink in inks:
        low, high = sorted((back, ink))
        assert (high + 0.05) / (low + 0.05) >= 4.5


def test_the_page_fits_a_phone_and_a_sheet_of_paper(opened):
    opened.resize(390, 800)
    wide = "return document.documentElement.scrollWidth <= innerWidth;"
    assert opened.run(wide)
    opened.devtools("Emulation.setEmulatedMedia", media="print")
    assert opened.run(
        "return getComputedStyle(document.querySelector('.tools')).display === 'none'"
        " && getComputedStyle(document.querySelector('tr.detail')).display === 'table-row';"
    )
    pdf = opened.devtools("Page.printToPDF", printBackground=True)["data"]
    assert len(pdf) > 20_000
    opened.devtools("Emulation.setEmulatedMedia", media="")
    opened.resize(1280, 900)


def test_every_number_of_the_table_is_a_link(opened):
    assert (
        opened.run(
            "return [...document.querySelectorAll('#table tr.run:not(.failed) td[data-v], "
            "#settings-table td[data-v]')].filter((c) => /\\d/.test(c.textContent) &&"
            " !c.classList.contains('text') && !c.querySelector('a[href]'))"
            ".map((c) => c.outerHTML);"
        )
        == []
    )


def test_every_number_of_a_figure_and_of_the_effects_leads_to_its_runs(opened, ablation):
    """A mean over several runs has a link a run."""
    assert opened.run(
        "return [...document.querySelectorAll('#settings g.point text, #costs g.point')]"
        ".every((t) => t.closest('a[href]') || t.querySelector('a[href]'));"
    )
    assert opened.run("return document.querySelectorAll('#settings g.point text').length;") > 3
    links = opened.run(
        "return [...document.querySelectorAll('#effects-table tbody tr')]"
        ".map((r) => r.querySelectorAll('a[href]').length);"
    )
    assert links == [effect.num_runs for effect in ablation.effects]
    ours = opened.run(
        "return [...document.querySelectorAll('#published tbody tr')]"
        ".map((r) => r.cells[2].querySelectorAll('a[href]').length);"
    )
    assert ours == [2, 2, 2, 2, 1]


def test_a_row_says_its_name_however_far_its_table_is_scrolled(opened):
    opened.resize(700, 900)
    moved, first, second = opened.run(
        "const b = document.querySelector('#runs .scroll'); b.scrollLeft = 300;"
        "const r = document.querySelector('#table tbody tr');"
        "return [b.scrollLeft, r.cells[0].getBoundingClientRect().left -"
        " b.getBoundingClientRect().left, r.cells[1].getBoundingClientRect().left];"
    )
    opened.resize(1280, 900)
    assert moved == 300
    assert 0 <= first < 3
    assert second < 0


def test_loss_of_knowing_nothing_is_the_line_in_the_curves(page):
    assert "ln 4: knowing nothing" in page
    assert math.isclose(math.log(4), 1.386, abs_tol=5e-4)


def figure_of(page: str, heading: str) -> str:
    [found] = re.findall(rf"<figure><h3>{heading}</h3>.*?</figure>", page, re.DOTALL)
    return found


def test_the_curve_of_val_accuracy_has_its_baseline_n_and_intervals(page):
    plot = figure_of(page, "Validation accuracy, %")
    assert 'class="majority"' in plot
    assert re.search(r"val split, n=120\. Bands: 95 % .* majority letter \d+\.\d %", plot)
    assert plot.count('class="curve band ') == 18
    tips = re.findall(r'data-tip="([^"]*)"', plot)
    assert tips
    for tip in tips:
        assert re.search(r"\d+\.\d %, 95 % interval \[\d+\.\d, \d+\.\d\]", tip)
        assert re.search(r"majority \d+\.\d %, n=120", tip)


def test_a_run_without_a_val_score_has_no_curve_of_val_accuracy(tmp_path):
    """Nothing says how many questions it is of."""
    for number, status in enumerate(("completed", "interrupted")):
        write_run(tmp_path / str(number), base_config(f"seed={number}"), status=status)
    (tmp_path / "1" / "metrics.csv").write_text((tmp_path / "0" / "metrics.csv").read_text())
    page = report_page(analyse(read_sweep(tmp_path)), tmp_path, title="two", command="report")
    assert figure_of(page, "Validation loss, nats").count('class="curve k') == 2
    plot = figure_of(page, "Validation accuracy, %")
    assert plot.count('class="curve k') == 1
    assert "1 run(s) without a val score at the end are left out" in plot


def test_the_static_curves_have_baseline_n_and_intervals_too(ablation):
    run = next(e.run for e in ablation.entries if e.kind == "trained")
    figure = learning_figure({"one": [curves(run)]}, [run.metrics["val"]])
    [axes] = [a for a in figure.axes if "accuracy" in a.get_title(loc="left")]
    assert "n=120, 95 % intervals" in axes.get_title(loc="left")
    assert any("majority" in str(line.get_label()) for line in axes.lines)
    assert len(axes.collections) == 1
    other = {**run.metrics["val"], "n": 60}
    for unknown in ([], [run.metrics["val"], other]):
        assert len(learning_figure({"one": [curves(run)]}, unknown).axes) == 2  # losses alone


def _change_metrics(folder, **sections):
    metrics = read_run(folder).metrics
    for key, values in sections.items():
        metrics[key] |= values
    write_metrics(folder, metrics)


def test_a_validation_of_some_batches_counts_its_own_questions(tmp_path):
    """`trainer.limit_val_batches`: the curve is of fewer than the val score at the end."""
    folder = write_run(tmp_path / "0", base_config())
    lines = (folder / "metrics.csv").read_text().splitlines()
    lines = [f"{line},{'val/n' if i == 0 else 40.0}" for i, line in enumerate(lines)]
    (folder / "metrics.csv").write_text("\n".join(lines))
    found = analyse(read_sweep(tmp_path))
    plot = figure_of(
        report_page(found, tmp_path, title="some", command="report"), "Validation accuracy, %"
    )
    assert "val split, n=40. Bands" in plot
    last = curves(read_run(folder))["val/accuracy"][-1][1]
    low, high = wilson_interval(round(40 * last), 40)
    assert f"95 % interval [{100 * low:.1f}, {100 * high:.1f}]" in plot
    assert re.search(r"majority \d+\.\d % of all 120, n=40", plot)
    run = read_run(folder)
    figure = learning_figure({"one": [curves(run)]}, [run.metrics["val"]])
    assert "n=40, 95 % intervals" in figure.axes[2].get_title(loc="left")


def test_knowing_nothing_about_five_options_is_ln_5(tmp_path):
    folder = write_run(tmp_path / "0", base_config())
    _change_metrics(folder, val={"random_accuracy": 0.2})
    found = analyse(read_sweep(tmp_path))
    page = report_page(found, tmp_path, title="five", command="report")
    plot = figure_of(page, "Validation loss, nats")
    assert "ln 5: knowing nothing" in plot
    assert "ln 4" not in plot
    run = read_run(folder)
    axes = learning_figure({"one": [curves(run)]}, [run.metrics["val"]]).axes[1]
    assert [line.get_ydata()[0] for line in axes.lines if "ln 5" in str(line.get_label())] == [
        math.log(5)
    ]
    remarks = [row.remark for row in read_published("reference_study", found).rows]
    assert any(remark.endswith("ln 5") for remark in remarks)


def test_milliseconds_are_of_all_questions_that_were_scored(tmp_path):
    """Those without a label took as long."""
    folder = write_run(tmp_path / "0", base_config(), ms=0.5)
    assert milliseconds("test")(read_run(folder)) == pytest.approx(0.5)
    _change_metrics(folder, test={"num_unlabelled": 720})
    assert milliseconds("test")(read_run(folder)) == pytest.approx(0.5 / 4)


def test_figures_show_settings_on_the_same_questions_alone(tmp_path, run_command):
    """One on few and easy questions is neither the most accurate nor a point of a figure."""
    config = base_config()
    for number, rate in enumerate((3e-4, 1e-4, 2e-4)):
        own = _with_keys(config, "optimizer", lr=rate)
        questions = make_questions(60, seed=5) if number == 0 else make_questions()
        write_run(tmp_path / "runs" / str(number), own, skill=3 - number, questions=questions)
    found = analyse(read_sweep(tmp_path / "runs"))
    assert [s.n for s in found.settings] == [60, 240, 240]
    assert found.settings[0].accuracy > found.settings[1].accuracy
    page = report_page(found, tmp_path, title="mixed", command="report")
    cards = page[page.index('<div class="cards">') : page.index('<section id="runs">')]
    assert "n=60" not in cards
    assert "Chosen on the test split itself" in cards
    for part in (
        cards,
        figure_of(page, re.escape("Accuracy (%) against weights, GB")),
        page[page.index('<section id="subjects">') : page.index('<section id="notes">')],
    ):
        assert "optimizer.lr=0.0003" not in part
        assert "1 setting(s) on other questions are left out" in part
    ended = run_command("report", f"runs={tmp_path / 'runs'}", f"hydra.run.dir={tmp_path / 'out'}")
    assert f"most accurate: {found.settings[1].name}" in ended.out
    assert "Chosen on the test split itself" in ended.out
    assert "left out" in ended.out


def test_main_effects_say_how_many_questions_they_are_of(page, folder, ablation):
    section = page[page.index('<section id="effects">') : page.index('<section id="curves">')]
    assert section.count("<figcaption>n=240; ") == 2
    assert section.count("<td>240</td>") == len(ablation.effects)
    assert re.search(r"majority \d+\.\d %, n=240, \d+ run", section)
    assert "| 95 % interval | n | matched blocks |" in (folder / "tables.md").read_text()
    svg = (folder / "figures" / "main_effects.svg").read_text()
    assert re.search(r"n=240; line: majority letter", svg)


def test_rows_of_a_forest_plot_that_begin_alike_read_differently(tmp_path):
    config = base_config()
    patterns = [f"model.layers.*.self_attn.{'qkv'[i]}_proj.some.long.name" for i in range(3)]
    for number in range(3):
        modules = [*patterns[:2], f"{patterns[2]}.{number}"]
        own = {**config, "peft": {**config["peft"], "target_modules": modules}}
        write_run(tmp_path / str(number), own, skill=0.3 * number)
    found = analyse(read_sweep(tmp_path))
    assert min(len(c.name_b) for c in found.comparisons) > 45
    page = report_page(found, tmp_path, title="long", command="report")
    [plot] = re.findall(r'aria-label="paired differences">(.*?)</svg>', page, re.DOTALL)
    shown = "".join(unescape(text) for text in re.findall(r">([^<]+)</text>", plot))
    labels = [
        label.get_text() for label in forest_figure(found.comparisons).axes[0].get_yticklabels()
    ]
    for comparison in found.comparisons:
        name = comparison.name_b.replace(" ", "")
        assert name in shown.replace(" ", "")
        assert name in ["".join(label.split()) for label in labels]
    assert "…" not in shown
    assert all(len(line) <= 45 for label in labels for line in label.split("\n"))
