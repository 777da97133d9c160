"""Intervals and paired tests between runs. scipy and statsmodels do the arithmetic."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import combinations
from typing import NamedTuple

import numpy as np
from jaxtyping import Float
from scipy import stats

from medqlora.errors import ConfigError
from medqlora.schema import Prediction

LEVEL = 0.95
"""Coverage of every interval."""


class Interval(NamedTuple):
    """A two-sided interval."""

    low: float
    high: float


def wilson_interval(num_correct: int, n: int, level: float = LEVEL) -> Interval:
    """Wilson score interval of a proportion.

    Args:
        num_correct: Successes, 0..n.
        n: Trials, at least 1.
        level: Coverage, in (0, 1).

    Returns:
        Interval within [0, 1].

    Raises:
        ValueError: If n is 0 or `num_correct` lies outside 0..n.

    References:
        Wilson 1927, doi:10.1080/01621459.1927.10502953; Brown, Cai and DasGupta 2001,
        doi:10.1214/ss/1009213286.
    """
    if n < 1 or not 0 <= num_correct <= n:
        raise ValueError(f"No interval of {num_correct} right answers out of {n}.")
    interval = stats.binomtest(num_correct, n).proportion_ci(level, method="wilson")
    # Rounding may leave [0, 1] or the estimate itself by one part in 10^16.
    estimate = num_correct / n
    return Interval(
        float(min(max(interval.low, 0.0), estimate)), float(max(min(interval.high, 1.0), estimate))
    )


def mcnemar_exact(only_a: int, only_b: int) -> float:
    """Exact two-sided McNemar test of equal accuracy on the same questions.

    Args:
        only_a: Questions that only the first run has right.
        only_b: Questions that only the second run has right.

    Returns:
        The p-value; 1 where the runs never differ.

    References:
        McNemar 1947, doi:10.1007/BF02295996; the exact form is a binomial test of the discordant
        pairs.
    """
    discordant = only_a + only_b
    return 1.0 if discordant == 0 else float(stats.binomtest(only_a, discordant).pvalue)


def bootstrap_mean(
    values: Float[np.ndarray, " question"],
    level: float = LEVEL,
    num_resamples: int = 10_000,
    seed: int = 0,
) -> Interval:
    """Percentile bootstrap interval of a mean, resampling questions.

    Only few distinct values occur, so how often each is drawn follows a multinomial distribution:
    drawing those counts is the bootstrap itself, at a cost that does not grow with the questions.

    Args:
        values: One value a question, such as the difference of two runs' correctness.
        level: Coverage, in (0, 1).
        num_resamples: Bootstrap samples.
        seed: Seed of the draws; the same seed gives the same interval.

    Returns:
        The interval. Where all values are equal it has no width, for such data say nothing of
        spread.

    Raises:
        ValueError: If there are no values.

    References:
        Efron and Tibshirani 1993, "An Introduction to the Bootstrap", chapter 13.
    """
    if len(values) == 0:
        raise ValueError("No interval of the mean of nothing.")
    distinct, counts = np.unique(values, return_counts=True)
    draws = np.random.default_rng(seed).multinomial(
        len(values), counts / len(values), size=num_resamples
    )
    low, high = np.quantile(draws @ distinct / len(values), [(1 - level) / 2, (1 + level) / 2])
    return Interval(float(low), float(high))


def holm(p_values: Sequence[float]) -> list[float]:
    """Holm's step-down correction of a family of p-values, in the order given.

    References:
        Holm 1979, Scandinavian Journal of Statistics 6(2), 65-70.
    """
    from statsmodels.stats.multitest import multipletests  # a second to import, for reports only

    if not p_values:
        return []
    return [float(p) for p in np.asarray(multipletests(p_values, method="holm")[1])]


@dataclass(frozen=True, slots=True)
class Comparison:
    """Two runs on the same questions.

    Attributes:
        name_a: First run.
        name_b: Second run.
        n: Labelled questions, the same for both.
        accuracy_a: Accuracy of the first run.
        accuracy_b: Accuracy of the second run.
        difference: `accuracy_b - accuracy_a`.
        ci_low: Lower end of the difference's 95 % interval.
        ci_high: Upper end.
        only_a: Questions only the first run has right; None where seeds are pooled.
        only_b: Questions only the second run has right; None where seeds are pooled.
        p_value: Two-sided p-value of no difference.
        p_holm: The same after Holm's correction over the family; None for a single comparison.
        num_seeds_a: Runs pooled into the first.
        num_seeds_b: Runs pooled into the second.
        method: What the p-value and interval are.
    """

    name_a: str
    name_b: str
    n: int
    accuracy_a: float
    accuracy_b: float
    difference: float
    ci_low: float
    ci_high: float
    only_a: int | None
    only_b: int | None
    p_value: float
    p_holm: float | None = None
    num_seeds_a: int = 1
    num_seeds_b: int = 1
    method: str = "exact McNemar; bootstrap by question"


def compare_runs(
    predictions_a: Sequence[Prediction],
    predictions_b: Sequence[Prediction],
    *,
    name_a: str = "a",
    name_b: str = "b",
    sha256_a: str | None = None,
    sha256_b: str | None = None,
    num_resamples: int = 10_000,
    seed: int = 0,
) -> Comparison:
    """Compare two runs question by question: exact McNemar test, bootstrap of the difference.

    Args:
        predictions_a: The first run's predictions of one split.
        predictions_b: The second run's, in any order.
        name_a: Name of the first run.
        name_b: Name of the second run.
        sha256_a: Hash of the questions the first run scored (`metrics["test"]["sha256"]`), if
            known.
        sha256_b: The same of the second run.
        num_resamples: Bootstrap samples.
        seed: Seed of the bootstrap.

    Returns:
        The comparison over the labelled questions.

    Raises:
        ConfigError: If the runs scored different questions, or none has a label.
    """
    _check_hashes(name_a, sha256_a, name_b, sha256_b)
    correct = _paired_correctness({name_a: [predictions_a], name_b: [predictions_b]})
    first, second = correct[name_a][0], correct[name_b][0]
    only_a, only_b = int((first & ~second).sum()), int((second & ~first).sum())
    interval = bootstrap_mean(
        second.astype(np.float64) - first, num_resamples=num_resamples, seed=seed
    )
    return Comparison(
        name_a=name_a,
        name_b=name_b,
        n=len(first),
        accuracy_a=float(first.mean()),
        accuracy_b=float(second.mean()),
        difference=(only_b - only_a) / len(first),
        ci_low=interval.low,
        ci_high=interval.high,
        only_a=only_a,
        only_b=only_b,
        p_value=mcnemar_exact(only_a, only_b),
    )


def compare_seeds(
    runs_a: Sequence[Sequence[Prediction]],
    runs_b: Sequence[Sequence[Prediction]],
    *,
    name_a: str = "a",
    name_b: str = "b",
) -> Comparison:
    """Compare two settings, each run with several seeds on the same questions.

    Model: `correct[setting, seed, question] = accuracy[setting] + Seed[setting, seed] +
    Question[setting, question] + noise`, seeds and questions both random and crossed, so that the
    answer holds for other seeds and other questions. The variance is that of `crossed_variance`,
    the spread of seeds taken to be the same in both settings, so that one of them may have a single
    run; p-value and interval are Student's t. Two runs against one leave a single degree of freedom
    for the seeds: Satterthwaite's number, itself estimated from it, would call equal settings
    different in up to 10 % of cases, so t has that one degree then and tells large differences
    alone. Where all questions differ by the same and runs do not, there is no spread to go by: the
    p-value is the exact sign test's of the questions, as `compare_runs` has it, and the interval
    has no width.

    Args:
        runs_a: One list of predictions for each seed of the first setting.
        runs_b: The same of the second setting; seeds need not match.
        name_a: Name of the first setting.
        name_b: Name of the second setting.

    Returns:
        The comparison; `only_a` and `only_b` are None.

    Raises:
        ConfigError: If fewer than three runs are given in all (one seed each is `compare_runs`), or
            they scored different questions, or fewer than two questions are labelled.

    References:
        Clark 1973, doi:10.1016/S0022-5371(73)80014-3 (both factors random); Miller 2024,
        arXiv:2411.00640 (paired differences between models).
    """
    num_a, num_b = len(runs_a), len(runs_b)
    if min(num_a, num_b) < 1 or num_a + num_b < 3:
        raise ConfigError(
            f"{num_a} run(s) of {name_a} and {num_b} of {name_b} say nothing about seeds: give at "
            "least two runs of one of them, or compare two single runs question by question."
        )
    correct = _paired_correctness({name_a: runs_a, name_b: runs_b})
    first, second = (correct[name].astype(np.float64) for name in (name_a, name_b))
    n = first.shape[1]
    if n < 2:
        raise ConfigError(
            f"{name_a} and {name_b} share {n} labelled question(s), too few for an interval; "
            "evaluate them on more questions."
        )
    difference = float(second.mean() - first.mean())
    by_question = second.mean(axis=0) - first.mean(axis=0)
    question_part = float(by_question.var(ddof=1)) / n

    num_free = num_a + num_b - 2
    scale = 1 / num_a + 1 / num_b
    run_part = scale * sum(_squares(a.mean(axis=1)) for a in (first, second)) / num_free
    squares = sum(residual_squares(a) for a in (first, second))
    noise_part = scale * squares / (num_free * (n - 1)) / n
    variance, free = crossed_variance(question_part, run_part, noise_part, n, num_free)
    method = "crossed random effects of seed and question, Satterthwaite t"
    if variance == 0:
        interval = Interval(difference, difference)
        p_value = mcnemar_exact(int((by_question < 0).sum()), int((by_question > 0).sum()))
        method = "exact sign test of questions that all differ alike"
    else:
        if num_free == 1:
            free = 1.0
            method = (
                "crossed random effects of seed and question, t with 1 degree of freedom (three "
                "runs are too few seeds to tell any but large differences)"
            )
        error = variance**0.5
        low, high = stats.t.interval(LEVEL, free, loc=difference, scale=error)
        interval = Interval(max(float(low), -1.0), min(float(high), 1.0))
        p_value = float(2 * stats.t.sf(abs(difference) / error, free))
    return Comparison(
        name_a=name_a,
        name_b=name_b,
        n=n,
        accuracy_a=float(first.mean()),
        accuracy_b=float(second.mean()),
        difference=difference,
        ci_low=interval.low,
        ci_high=interval.high,
        only_a=None,
        only_b=None,
        p_value=p_value,
        num_seeds_a=num_a,
        num_seeds_b=num_b,
        method=method,
    )


def crossed_variance(
    question_part: float, run_part: float, noise_part: float, n: int, num_free: int
) -> tuple[float, float]:
    """Variance of a mean over seeds and questions, both random, and its degrees of freedom.

    `question_part + run_part - noise_part`, for both of the first hold the noise of single answers;
    neither falls below it, which cuts the components at zero as REML does. The degrees of freedom
    are Satterthwaite's of that sum of mean squares, each taken as it is and not as what is left of
    it: a seed component that comes out small, or as zero, is still known from few seeds alone.

    Args:
        question_part: Variance of the questions' means over the runs, divided by `n`.
        run_part: Mean square of the runs' accuracies, as a part of the variance of the mean.
        noise_part: Mean square of what neither runs nor questions explain, likewise.
        n: Questions.
        num_free: Degrees of freedom of the runs.

    Returns:
        Variance and degrees of freedom; the first is exactly 0 where nothing varies.

    References:
        Satterthwaite 1946, doi:10.2307/3002019; Clark 1973, doi:10.1016/S0022-5371(73)80014-3.
    """
    variance = max(question_part, noise_part) + max(run_part - noise_part, 0.0)
    if variance < _DUST:
        return 0.0, float(n - 1)
    squares = question_part**2 / (n - 1) + run_part**2 / num_free
    return variance, variance**2 / (squares + noise_part**2 / (num_free * (n - 1)))


_DUST = 1e-15
"""Below any variance of a mean: one question of 10^6 that one run of ten has makes 10^-14."""


def compare_family(
    runs: Mapping[str, Sequence[Sequence[Prediction]]],
    baseline: str | None = None,
    *,
    sha256: Mapping[str, str | None] | None = None,
) -> list[Comparison]:
    """Compare several settings and correct for their number with Holm's method.

    Args:
        runs: For each setting, the predictions of each of its runs (one list for a single run).
        baseline: Setting that all others are compared with; None compares every pair.
        sha256: Hash of the questions each setting scored, where known.

    Returns:
        The comparisons, `p_holm` filled in; pairs of single runs by `compare_runs`, others by
        `compare_seeds`.

    Raises:
        ConfigError: If the baseline is not among the settings, fewer than two settings are given,
            or two scored different questions.
    """
    if baseline is not None and baseline not in runs:
        raise ConfigError(f"No run is called {baseline!r}; choose one of {', '.join(runs)}.")
    if len(runs) < 2:
        raise ConfigError(
            f"{len(runs)} run(s) cannot be compared; give at least two that scored the same "
            "questions."
        )
    pairs = (
        list(combinations(runs, 2))
        if baseline is None
        else [(baseline, name) for name in runs if name != baseline]
    )
    hashes = sha256 or {}
    family = []
    for a, b in pairs:
        _check_hashes(a, hashes.get(a), b, hashes.get(b))
        if len(runs[a]) == 1 and len(runs[b]) == 1:
            family.append(compare_runs(runs[a][0], runs[b][0], name_a=a, name_b=b))
        else:
            family.append(compare_seeds(runs[a], runs[b], name_a=a, name_b=b))
    corrected = holm([comparison.p_value for comparison in family])
    return [replace(comparison, p_holm=p) for comparison, p in zip(family, corrected, strict=True)]


def _check_hashes(name_a: str, sha256_a: str | None, name_b: str, sha256_b: str | None) -> None:
    if sha256_a and sha256_b and sha256_a != sha256_b:
        raise ConfigError(
            f"{name_a} and {name_b} scored different questions (sha256 {sha256_a[:12]} and "
            f"{sha256_b[:12]}), so they cannot be compared pairwise; evaluate both on the same "
            "data."
        )


def _paired_correctness(
    runs: Mapping[str, Sequence[Sequence[Prediction]]],
) -> dict[str, np.ndarray]:
    """Correctness [run, labelled question] of each setting, questions in one common order."""
    reference: dict[tuple[str, str], int | None] = {}
    reference_name = ""
    tables: dict[str, list[list[bool]]] = {}
    for name, several in runs.items():
        tables[name] = []
        for predictions in several:
            by_id = {(p.split, p.id): p for p in predictions}
            answers = {key: p.answer for key, p in by_id.items()}
            if not reference_name:
                reference, reference_name = answers, name
            _check_same(reference_name, reference, name, answers, len(predictions))
            tables[name].append(
                [
                    by_id[key].correct is True
                    for key, answer in reference.items()
                    if answer is not None
                ]
            )
    if all(answer is None for answer in reference.values()):
        raise ConfigError(
            f"{' and '.join(runs)} scored no labelled question, so no accuracy can be compared; "
            "evaluate them on data with answers."
        )
    return {name: np.array(table, dtype=bool) for name, table in tables.items()}


def _check_same(
    name_a: str,
    answers_a: Mapping[tuple[str, str], int | None],
    name_b: str,
    answers_b: Mapping[tuple[str, str], int | None],
    num_predictions: int,
) -> None:
    advice = "so they cannot be compared pairwise; evaluate both on the same data."
    if len(answers_b) != num_predictions:
        raise ConfigError(
            f"{name_b} has {num_predictions - len(answers_b)} question(s) twice, {advice}"
        )
    if answers_a.keys() != answers_b.keys():
        shared = len(answers_a.keys() & answers_b.keys())
        raise ConfigError(
            f"{name_a} scored {len(answers_a)} questions and {name_b} {len(answers_b)}, {shared} "
            f"of them the same, {advice}"
        )
    wrong = [key for key, answer in answers_a.items() if answers_b[key] != answer]
    if wrong:
        raise ConfigError(
            f"{name_a} and {name_b} disagree about the right answer of {len(wrong)} question(s), "
            f"such as {wrong[0][1]}, {advice}"
        )


def _squares(values: np.ndarray) -> float:
    """Sum of squared deviations from the mean."""
    return float(((values - values.mean()) ** 2).sum())


def residual_squares(table: np.ndarray) -> float:
    """Sum of squares that neither the rows' nor the columns' means explain."""
    rows, columns = table.mean(axis=1, keepdims=True), table.mean(axis=0, keepdims=True)
    return float(((table - rows - columns + table.mean()) ** 2).sum())
