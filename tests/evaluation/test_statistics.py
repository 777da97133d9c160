"""Known values and laws of intervals and paired tests."""

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats
from statsmodels.formula.api import ols
from statsmodels.stats.anova import anova_lm
from statsmodels.stats.contingency_tables import mcnemar
from statsmodels.stats.proportion import proportion_confint

from medqlora.errors import ConfigError
from medqlora.evaluation import (
    bootstrap_mean,
    compare_family,
    compare_runs,
    compare_seeds,
    holm,
    mcnemar_exact,
    wilson_interval,
)
from medqlora.schema import Prediction

from .conftest import make_predictions, make_questions


def _predict(correct, split="test"):
    """Predictions that are right where `correct` says so."""
    return [
        Prediction(f"q{i}", split, "s", "single", 0, (0.0, -9.0) if right else (-9.0, 0.0))
        for i, right in enumerate(correct)
    ]


def test_wilson_interval_has_the_published_values():
    """Newcombe 1998, Statistics in Medicine 17, 857-872, table I, method 3."""
    for num_correct, n, low, high in [
        (81, 263, 0.2553, 0.3662),
        (15, 148, 0.0624, 0.1605),
        (0, 20, 0.0, 0.1611),
        (1, 29, 0.0061, 0.1718),
    ]:
        assert wilson_interval(num_correct, n) == pytest.approx((low, high), abs=5e-5)


@settings(deadline=None)
@given(st.integers(1, 5000).flatmap(lambda n: st.tuples(st.integers(0, n), st.just(n))))
def test_wilson_interval_holds_its_estimate_and_agrees_with_statsmodels(case):
    num_correct, n = case
    low, high = wilson_interval(num_correct, n)
    assert 0 <= low <= num_correct / n <= high <= 1
    assert (low, high) == pytest.approx(
        proportion_confint(num_correct, n, method="wilson"), abs=1e-9
    )


def test_no_trials_have_no_interval():
    for num_correct, n in ((0, 0), (3, 2), (-1, 2)):
        with pytest.raises(ValueError, match="No interval"):
            wilson_interval(num_correct, n)


def test_mcnemar_is_the_binomial_test_of_the_discordant_pairs():
    assert mcnemar_exact(0, 5) == pytest.approx(2 / 2**5)
    assert mcnemar_exact(1, 9) == pytest.approx(2 * (1 + 10) / 2**10)
    assert mcnemar_exact(0, 0) == mcnemar_exact(7, 7) == 1
    for a, b in ((3, 12), (40, 21)):
        expected = mcnemar([[100, a], [b, 50]], exact=True).pvalue
        assert mcnemar_exact(a, b) == mcnemar_exact(b, a) == pytest.approx(expected)


def test_bootstrap_agrees_with_scipy():
    values = np.random.default_rng(0).choice([-1.0, 0.0, 0.0, 1.0], size=300)
    reference = stats.bootstrap(
        (values,), np.mean, n_resamples=4000, method="percentile", rng=1
    ).confidence_interval
    own = bootstrap_mean(values)
    assert own == pytest.approx((reference.low, reference.high), abs=0.01)
    assert bootstrap_mean(values) == own
    assert bootstrap_mean(np.ones(5)) == (1, 1)
    with pytest.raises(ValueError, match="nothing"):
        bootstrap_mean(np.zeros(0))


def test_holm_multiplies_the_smallest_by_the_family():
    """Holm 1979: p(1) * m, p(2) * (m - 1), ..., made monotone and cut at 1."""
    assert holm([0.01, 0.04, 0.03]) == pytest.approx([0.03, 0.06, 0.06])
    assert holm([0.9, 0.8]) == pytest.approx([1, 1])
    assert holm([]) == []


def test_comparison_counts_the_discordant_questions():
    a = _predict([1, 1, 1, 0, 0, 0, 0, 0])
    b = _predict([1, 0, 0, 1, 1, 1, 1, 0])
    result = compare_runs(a, list(reversed(b)), name_a="base", name_b="tuned")
    assert (result.n, result.only_a, result.only_b) == (8, 2, 4)
    assert (result.accuracy_a, result.accuracy_b) == (3 / 8, 5 / 8)
    assert result.difference == pytest.approx(0.25)
    assert result.ci_low <= result.difference <= result.ci_high
    assert result.p_value == mcnemar_exact(2, 4)


def test_comparison_turned_round_changes_only_the_sign():
    questions = make_questions(80)
    a, b = make_predictions(questions, 0.2, 1), make_predictions(questions, 1.5, 2)
    there, back = compare_runs(a, b), compare_runs(b, a)
    assert there.difference == -back.difference
    assert there.p_value == back.p_value
    assert there.ci_low == pytest.approx(-back.ci_high, abs=0.02)


def test_a_comparison_is_the_same_each_time_and_takes_its_seed_and_number_of_resamples():
    """The ends of the interval are drawn; those of another draw are near, not the same."""
    right = np.arange(97) % 7
    pair = _predict(right < 3), _predict((right * 5) % 7 < 4)

    def ends(**drawn):
        result = compare_runs(*pair, **drawn)
        return result.ci_low, result.ci_high

    few = {"num_resamples": 50}
    assert ends() == ends(seed=0, num_resamples=10_000)
    assert ends(**few) == ends(**few)
    assert len({ends(**few), ends(**few, seed=1), ends(num_resamples=60)}) == 3


def test_a_run_equals_itself(predictions):
    result = compare_runs(predictions, predictions)
    assert (result.difference, result.p_value) == (0, 1)


def test_predictions_of_other_data_are_refused(predictions):
    other_ids = [replace(p, id=f"x{p.id}") for p in predictions]
    other_answers = [replace(p, answer=(p.answer + 1) % 4) for p in predictions]
    unlabelled = [replace(p, answer=None) for p in predictions]
    val = [replace(p, split="val") for p in predictions]
    for other, message in (
        (other_ids, "0 of them the same"),
        (predictions[:-1], "^a scored 120 questions and b 119, 119 of them the same, so they"),
        (other_answers, "disagree about the right answer of 120"),
        (val, "0 of them the same"),
        ([*predictions, predictions[0]], r"^b has 1 question\(s\) twice, so they"),
    ):
        with pytest.raises(ConfigError, match=message):
            compare_runs(predictions, other)
        with pytest.raises(ConfigError, match=message):
            compare_seeds([predictions, predictions], [other])
    first = predictions[0].id
    one_answer = [
        replace(p, answer=(p.answer + 1) % 4) if p.id == first else p for p in predictions
    ]
    with pytest.raises(ConfigError, match=rf"of 1 question\(s\), such as {first}, so they cannot"):
        compare_runs(predictions, one_answer)
    hashes = {"name_a": "one", "name_b": "two", "sha256_a": "aa", "sha256_b": "bb"}
    with pytest.raises(ConfigError, match=r"^one and two .* \(sha256 aa and bb\)"):
        compare_runs(predictions, predictions, **hashes)
    for unknown in ({"sha256_a": "aa"}, {"sha256_b": "bb"}):
        assert compare_runs(predictions, predictions, **unknown).p_value == 1
    with pytest.raises(ConfigError, match="no labelled question"):
        compare_runs(unlabelled, unlabelled)


def test_unlabelled_questions_are_left_out(predictions):
    partly = [replace(p, answer=None) if i < 20 else p for i, p in enumerate(predictions)]
    assert compare_runs(partly, partly).n == 100


def _simulate(rng, effect, seed_spread, seeds=3, n=150):
    """Crossed seeds and questions, on the probability scale."""
    easy = rng.uniform(0.2, 0.7, size=n)

    def runs(shift):
        return [
            _predict(rng.random(n) < np.clip(easy + shift + rng.normal(0, seed_spread), 0, 1))
            for _ in range(seeds)
        ]

    return compare_seeds(runs(0.0), runs(effect))


def test_seed_spread_widens_the_interval():
    """Two settings whose seeds differ by much cannot be told apart on those questions alone."""
    n = 400
    steady = [_predict(np.arange(n) < 200) for _ in range(3)]
    better = [_predict(np.arange(n) < 240) for _ in range(3)]
    erratic = [_predict(np.arange(n) < m) for m in (140, 240, 340)]
    narrow, wide = compare_seeds(steady, better), compare_seeds(steady, erratic)
    assert narrow.difference == pytest.approx(0.1)
    assert wide.difference == pytest.approx(0.1)
    assert narrow.p_value < 1e-6
    assert wide.p_value > 0.1
    assert wide.ci_high - wide.ci_low > 3 * (narrow.ci_high - narrow.ci_low)


def test_identical_seeds_reduce_to_the_paired_t_test_on_questions():
    rng = np.random.default_rng(0)
    first, second = rng.random(200) < 0.4, rng.random(200) < 0.6
    result = compare_seeds([_predict(first)] * 2, [_predict(second)] * 2)
    expected = stats.ttest_rel(second.astype(float), first.astype(float))
    assert result.p_value == pytest.approx(expected.pvalue)
    interval = expected.confidence_interval()
    assert (result.ci_low, result.ci_high) == pytest.approx((interval.low, interval.high))


def test_mixed_comparison_covers_the_true_difference():
    """95 % intervals hold the truth in at least about 95 % of repeated experiments."""
    rng = np.random.default_rng(0)
    results = [_simulate(rng, effect=0.05, seed_spread=0.05) for _ in range(120)]
    # 106 of 120 or more: the 0.1 % point of 120 draws at 95 %.
    assert sum(r.ci_low <= 0.05 <= r.ci_high for r in results) >= 106
    assert np.mean([r.difference for r in results]) == pytest.approx(0.05, abs=0.015)


def _two_way(table):
    """Mean squares of runs and of the rest, by statsmodels, of one setting's [run, question]."""
    runs, questions = np.indices(table.shape)
    data = {"right": table.ravel(), "run": runs.ravel(), "question": questions.ravel()}
    anova = anova_lm(ols("right ~ C(run) + C(question)", data).fit())
    return anova["sum_sq"]["C(run)"], anova["sum_sq"]["Residual"]


@pytest.mark.parametrize(("seeds", "seed_spread"), [((3, 2), 0.3), ((2, 4), 0.3), ((1, 3), 0.3)])
def test_mixed_comparison_has_the_moment_estimates_of_a_two_way_analysis(seeds, seed_spread):
    """The sums of squares come from statsmodels; the rest is the formula of the docstring by hand.

    Runs of a setting differ by far more than the noise in them, so that every part counts.
    """
    rng, n = np.random.default_rng(4), 40
    ability = rng.uniform(0.2, 0.8, n)
    tables = []
    for shift, num in zip((0.0, 0.1), seeds, strict=True):
        chance = ability + shift + np.linspace(-seed_spread, seed_spread, num)[:, None] * (num > 1)
        tables.append((rng.uniform(size=(num, n)) < chance).astype(float))
    first, second = tables
    squares = [_two_way(table) for table in tables if len(table) > 1]
    free_runs = sum(seeds) - 2
    scale = (1 / seeds[0] + 1 / seeds[1]) / n
    from_runs = scale * sum(runs for runs, _ in squares) / free_runs
    from_noise = scale * sum(rest for _, rest in squares) / (free_runs * (n - 1))
    assert from_runs - from_noise > 0.01 * n * scale
    from_questions = np.var(second.mean(axis=0) - first.mean(axis=0), ddof=1) / n
    error = np.sqrt(max(from_questions, from_noise) + from_runs - from_noise)
    free = error**4 / (
        from_questions**2 / (n - 1)
        + from_runs**2 / free_runs
        + from_noise**2 / (free_runs * (n - 1))
    )
    difference = second.mean() - first.mean()
    reach = stats.t.ppf(0.975, free) * error

    runs_a, runs_b = ([_predict(row) for row in table] for table in tables)
    result = compare_seeds(runs_a, runs_b, name_a="one", name_b="other")
    assert result.difference == pytest.approx(difference)
    assert (result.ci_low, result.ci_high) == pytest.approx(
        (max(difference - reach, -1), min(difference + reach, 1))
    )
    assert result.p_value == pytest.approx(2 * stats.t.sf(abs(difference) / error, free))
    assert (result.accuracy_a, result.accuracy_b) == pytest.approx((first.mean(), second.mean()))
    assert (result.name_a, result.name_b, result.n) == ("one", "other", n)
    assert (result.num_seeds_a, result.num_seeds_b) == seeds
    assert result.method == "crossed random effects of seed and question, Satterthwaite t"


@pytest.mark.parametrize("seeds", [(1, 2), (1, 3), (2, 2), (3, 3)])
def test_equal_settings_are_called_different_in_five_of_a_hundred_cases(seeds):
    """However few the seeds: 8 % or less of 300 draws, which is 2.4 standard errors above 5 %."""
    rng, n = np.random.default_rng(1), 450
    called = 0
    for _ in range(300):
        ease = rng.normal(0, 1, n)

        def runs(number, ease=ease):
            own = rng.normal(0, 0.15, (number, 1)) + rng.normal(0, 0.4, (number, n))
            return [_predict(row) for row in ease + own > 0.3]

        called += compare_seeds(runs(seeds[0]), runs(seeds[1])).p_value < 0.05
    assert called <= 24


def test_two_seeds_against_one_run_are_said_to_tell_large_differences_alone():
    rng = np.random.default_rng(2)
    one, *two = (_predict(rng.random(300) < chance) for chance in (0.3, 0.6, 0.7))
    result = compare_seeds([one], two)
    assert "too few seeds" in result.method
    assert -1 <= result.ci_low <= 0 <= result.ci_high <= 1
    assert result.p_value > 0.05


def test_questions_that_differ_by_the_same_on_average_are_not_certain():
    """Each of three seeds has other 20 of 30 right: the means vary by rounding, the answers do."""
    wrong = [_predict([0] * 30)] * 3
    right = [_predict([(i + seed) % 3 > 0 for i in range(30)]) for seed in range(3)]
    result = compare_seeds(wrong, right)
    assert result.difference == pytest.approx(2 / 3)
    assert 0 < result.p_value < 0.05
    assert result.ci_low == pytest.approx(0.667 - 0.123, abs=0.005)
    assert result.ci_high == pytest.approx(0.667 + 0.123, abs=0.005)


def test_the_interval_of_a_difference_stays_within_its_range():
    n = 60
    poor = [_predict(np.arange(n) < m) for m in (0, 1, 20)]
    good = [_predict(np.arange(n) < m) for m in (40, 60, 60)]
    result = compare_seeds(poor, good)
    assert result.ci_high == 1
    assert compare_seeds(good, poor).ci_low == -1


@pytest.mark.parametrize(("n", "p_value"), [(2, 0.5), (3, 0.25), (10, 2**-9)])
def test_settings_that_differ_everywhere_and_never_vary_are_as_sure_as_their_questions(n, p_value):
    """As two single runs are: two questions say little. The interval has no width."""
    wrong, right = _predict([0] * n), _predict([1] * n)
    result = compare_seeds([wrong, wrong], [right])
    assert (result.difference, result.ci_low, result.ci_high) == (1, 1, 1)
    assert result.p_value == pytest.approx(p_value)
    assert result.p_value == compare_runs(wrong, right).p_value
    assert "sign test" in result.method
    same = compare_seeds([right, right], [right])
    assert (same.difference, same.p_value) == (0, 1)


def test_without_any_difference_there_is_none():
    same = [_predict([1, 0, 1, 1])] * 2
    result = compare_seeds(same, same)
    assert (result.difference, result.p_value, result.ci_low, result.ci_high) == (0, 1, 0, 0)


def test_one_run_of_each_says_nothing_about_seeds(predictions):
    with pytest.raises(ConfigError, match="two runs"):
        compare_seeds([predictions], [predictions])
    with pytest.raises(ConfigError, match="too few"):
        compare_seeds([predictions[:1]] * 2, [predictions[:1]])


def test_a_family_is_corrected_together():
    questions = make_questions(200)
    runs = {f"r={r}": [make_predictions(questions, r / 4, r)] for r in (1, 2, 8)}
    family = compare_family(runs, "r=1")
    assert [(c.name_a, c.name_b) for c in family] == [("r=1", "r=2"), ("r=1", "r=8")]
    assert [c.p_holm for c in family] == pytest.approx(holm([c.p_value for c in family]))
    assert len(compare_family(runs)) == 3
    runs["r=1"].append(make_predictions(questions, 0.25, 9))
    pooled = compare_family(runs)
    assert [c.num_seeds_a for c in pooled] == [2, 2, 1]
    assert [c.only_a is None for c in pooled] == [True, True, False]
    named = [("r=1", "r=2"), ("r=1", "r=8"), ("r=2", "r=8")]
    assert [(c.name_a, c.name_b) for c in pooled] == named


def test_a_family_needs_members_and_the_same_data(predictions):
    runs = {"a": [predictions], "b": [predictions]}
    with pytest.raises(ConfigError, match="choose one of a, b"):
        compare_family(runs, "c")
    with pytest.raises(ConfigError, match="at least two"):
        compare_family({"a": [predictions]})
    with pytest.raises(ConfigError, match=r"^a and b scored different questions"):
        compare_family(runs, sha256={"a": "1", "b": "2"})


def test_a_lower_level_is_a_narrower_interval():
    wide, narrow = wilson_interval(30, 100), wilson_interval(30, 100, level=0.5)
    assert wide.low < narrow.low < 0.3 < narrow.high < wide.high


def test_the_bootstrap_cuts_the_same_share_from_both_ends():
    """Ends of a mean of 400 values of spread 1: 1.96 and, at 50 %, 0.674 standard errors."""
    values = stats.norm.ppf((np.arange(400) + 0.5) / 400)
    values /= values.std()
    for level, reach in ((0.95, 0.0980), (0.5, 0.0337)):
        interval = bootstrap_mean(values, level=level)
        assert interval.low == pytest.approx(-reach, rel=0.05)
        assert interval.high == pytest.approx(reach, rel=0.05)
