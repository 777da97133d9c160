"""The summary of a split and the streaming metrics."""

import json
import multiprocessing
from dataclasses import replace

import numpy as np
import pytest
import torch
from torchmetrics.classification import MulticlassAccuracy

from medqlora.errors import DataError, ModelError
from medqlora.evaluation import (
    LetterMetrics,
    PredictionCollector,
    questions_sha256,
    score_arrays,
    summarise,
    wilson_interval,
)
from medqlora.evaluation.results import empty_section

from .conftest import make_predictions, make_questions


def test_summary_has_every_key_of_the_contract(predictions, questions):
    summary = summarise(predictions, questions)
    assert set(empty_section()) <= set(summary)
    assert set(summary["by"]) == {"subject_name", "choice_type", "difficulty", "negated", "length"}
    for groups in summary["by"].values():
        for group in groups.values():
            assert set(group) == {"n", "accuracy", "ci_low", "ci_high"}
    json.dumps(summary, allow_nan=False)


@pytest.mark.parametrize("k", [4, 5])
def test_summary_counts_what_it_says(k):
    questions = make_questions(90, k)
    predictions = make_predictions(questions)
    summary = summarise(predictions, questions)
    right = sum(p.prediction == p.answer for p in predictions)
    assert summary["n"] == 90
    assert summary["accuracy"] == right / 90
    assert (summary["ci_low"], summary["ci_high"]) == wilson_interval(right, 90)
    assert summary["loss"] == pytest.approx(-np.mean([p.scores[p.answer] for p in predictions]))
    assert len(summary["letter_share"]) == k
    assert sum(summary["letter_share"]) == pytest.approx(1)
    assert summary["random_accuracy"] == 1 / k
    assert np.trace(summary["confusion"]) == right
    assert np.sum(summary["confusion"], axis=0) == pytest.approx(
        90 * np.array(summary["letter_share"])
    )
    answers = np.bincount([q.answer for q in questions], minlength=k)
    assert summary["majority_accuracy"] == answers.max() / 90
    assert summary["majority_letter"] == "ABCDE"[answers.argmax()]


def test_every_breakdown_splits_the_same_questions(predictions, questions):
    summary = summarise(predictions, questions)
    for groups in summary["by"].values():
        assert sum(group["n"] for group in groups.values()) == summary["n"]
        right = sum(group["n"] * group["accuracy"] for group in groups.values())
        assert right == pytest.approx(summary["n"] * summary["accuracy"])
        assert all(group["n"] > 0 for group in groups.values())
    subjects = summary["by"]["subject_name"].values()
    assert summary["macro_accuracy"] == pytest.approx(np.mean([s["accuracy"] for s in subjects]))


def test_always_answering_a_scores_the_share_of_a(questions):
    """Anyone can have this accuracy; it is what the report puts beside every other."""
    constant = [replace(p, scores=(-0.1, -3.0, -3.0, -3.0)) for p in make_predictions(questions)]
    summary = summarise(constant, questions)
    assert summary["letter_share"] == [1, 0, 0, 0]
    assert summary["accuracy"] == summary["letter_accuracy"][0] <= summary["majority_accuracy"]


def test_order_of_predictions_and_questions_does_not_matter(predictions, questions):
    turned = summarise(predictions[::-1], questions[1:] + questions[:1])
    expected = summarise(predictions, questions)
    assert turned["by"] == expected["by"]
    assert turned["sha256"] == expected["sha256"]
    for key in ("accuracy", "macro_accuracy", "loss", "ece", "brier"):
        assert turned[key] == pytest.approx(expected[key])


def test_unlabelled_split_claims_nothing_but_letter_shares():
    questions = make_questions(10, labelled=False)
    summary = summarise(make_predictions(questions), questions)
    assert (summary["n"], summary["num_unlabelled"]) == (0, 10)
    assert sum(summary["letter_share"]) == pytest.approx(1)
    for key in (
        "accuracy",
        "ci_low",
        "macro_accuracy",
        "loss",
        "ece",
        "brier",
        "majority_accuracy",
    ):
        assert summary[key] is None
    assert all(groups == {} for groups in summary["by"].values())


def test_only_labelled_questions_count(questions):
    partly = [replace(q, answer=None) if i % 4 == 0 else q for i, q in enumerate(questions)]
    predictions = [
        replace(p, answer=q.answer)
        for p, q in zip(make_predictions(questions), partly, strict=True)
    ]
    labelled = [p for p in predictions if p.answer is not None]
    summary, expected = summarise(predictions, partly), summarise(labelled)
    assert (summary["n"], summary["num_unlabelled"]) == (90, 30)
    for key in ("accuracy", "loss", "ece", "brier", "majority_accuracy", "confusion"):
        assert summary[key] == expected[key]


def test_without_questions_their_breakdowns_stay_empty(predictions):
    summary = summarise(predictions)
    assert summary["by"]["subject_name"]
    assert summary["by"]["difficulty"] == summary["by"]["length"] == {}
    assert summary["sha256"] is None


def test_further_breakdowns_can_be_given(predictions, questions):
    groups = {"difficulty_base_nll": ["basic"] * 100 + ["advanced"] * 20}
    by = summarise(predictions, questions, groups=groups)["by"]
    assert {name: g["n"] for name, g in by["difficulty_base_nll"].items()} == {
        "basic": 100,
        "advanced": 20,
    }
    with pytest.raises(DataError, match="1 groups for 120"):
        summarise(predictions, questions, groups={"x": ["y"]})


def test_levels_are_listed_from_low_to_high(predictions, questions):
    by = summarise(predictions, questions)["by"]
    assert list(by["length"]) == ["short", "medium", "long"]
    sizes = [group["n"] for group in by["subject_name"].values()]
    assert sizes == sorted(sizes, reverse=True)


def test_nothing_scored_has_no_numbers():
    summary = summarise([], [])
    assert summary["n"] == 0
    assert summary["letter_share"] is summary["accuracy"] is None


def test_predictions_of_other_questions_are_refused(predictions, questions):
    with pytest.raises(DataError, match="share 119 ids"):
        summarise(predictions, questions[:-1])
    with pytest.raises(DataError, match="occur twice"):
        summarise([*predictions, predictions[0]], questions)
    changed = [replace(questions[0], answer=(questions[0].answer + 1) % 4), *questions[1:]]
    with pytest.raises(DataError, match="Question q0 has answer"):
        summarise(predictions, changed)


def test_scores_that_are_no_numbers_are_refused(predictions):
    broken = [replace(predictions[0], scores=(0.0, float("nan"), 0.0, 0.0)), *predictions[1:]]
    with pytest.raises(ModelError, match="q0 are not finite"):
        summarise(broken)
    with pytest.raises(DataError, match="4 and 5 options"):
        score_arrays([*predictions, *make_predictions(make_questions(1, 5))])
    with pytest.raises(DataError, match="has answer 7"):
        score_arrays([replace(predictions[0], answer=7)])


def test_hash_sees_content_and_not_order(questions):
    digest = questions_sha256(questions)
    assert questions_sha256(questions[::-1]) == digest
    for change in ({"stem": "x"}, {"options": ("x",)}, {"answer": None}, {"id": "x"}):
        assert questions_sha256([replace(questions[0], **change), *questions[1:]]) != digest
    assert questions_sha256([replace(questions[0], explanation="x"), *questions[1:]]) == digest


def _batches(predictions, size=7, places=10):
    """Packed rows: `size` real questions and empty places behind them."""
    for start in range(0, len(predictions), size):
        part = predictions[start : start + size]
        scores, answer = torch.zeros(places, 4), torch.full((places,), -100)
        index = torch.full((places,), -1)
        scores[: len(part)] = torch.tensor([p.scores for p in part])
        answer[: len(part)] = torch.tensor([p.answer for p in part])
        index[: len(part)] = torch.arange(start, start + len(part))
        yield scores, answer, index


def test_streamed_metrics_equal_the_summary_and_torchmetrics(predictions, questions):
    streamed = LetterMetrics()
    reference = MulticlassAccuracy(4, average="micro", ignore_index=-100)
    for scores, answer, _ in _batches(predictions):
        streamed.update(scores, answer)
        reference.update(scores, answer)
    values, expected = streamed.compute(), summarise(predictions, questions)
    assert values["n"] == 120
    assert values["accuracy"].item() == pytest.approx(expected["accuracy"])
    assert values["accuracy"].item() == pytest.approx(reference.compute().item())
    assert values["loss"].item() == pytest.approx(expected["loss"], rel=1e-6)
    streamed.reset()
    streamed.update(torch.zeros(2, 4), torch.tensor([-100, -100]))
    assert streamed.compute()["accuracy"].isnan()


def test_collected_predictions_come_back_once_and_in_order(predictions, questions):
    collector = PredictionCollector()
    batches = list(_batches(predictions))
    for scores, _, index in [*batches[::-1], batches[0]]:
        collector.update(scores, index)
    collected = collector.predictions(questions, "test")
    assert [p.id for p in collected] == [q.id for q in questions]
    assert [replace(p, scores=()) for p in collected] == [
        replace(p, scores=()) for p in predictions
    ]
    np.testing.assert_allclose(score_arrays(collected)[0], score_arrays(predictions)[0], rtol=1e-6)
    collector.reset()
    collector.update(torch.zeros(2, 4), torch.tensor([-1, -1]))
    assert collector.predictions(questions, "test") == []


def test_one_question_is_a_split(questions):
    collector = PredictionCollector()
    collector.update(torch.zeros(2, 4), torch.tensor([3, -1]))
    assert [p.id for p in collector.predictions(questions, "val")] == [questions[3].id]


def _rank(rank, port, queue):
    torch.distributed.init_process_group(
        "gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=2
    )
    questions = make_questions(10)
    batches = list(_batches(make_predictions(questions), size=4))
    # Three rows over two ranks: the second rank repeats the first row to even things out.
    collector, streamed = PredictionCollector(), LetterMetrics()
    for position in ([0, 1], [2, 0])[rank]:
        scores, answer, index = batches[position]
        collector.update(scores, index)
        if position or rank == 0:
            streamed.update(scores, answer)
    gathered = [p.id for p in collector.predictions(questions, "val")]
    alone = PredictionCollector()
    if rank == 0:
        alone.update(batches[0][0], batches[0][2])
    shared = [p.id for p in alone.predictions(questions, "val")]
    queue.put((gathered, shared, streamed.compute()["n"].item()))
    torch.distributed.destroy_process_group()


def test_copies_that_even_out_processes_are_counted_once(unused_port):
    context = multiprocessing.get_context("fork")
    queue = context.Queue()
    processes = [context.Process(target=_rank, args=(r, unused_port, queue)) for r in (0, 1)]
    for process in processes:
        process.start()
    results = [queue.get(timeout=120) for _ in processes]
    for process in processes:
        process.join(30)
    for gathered, shared, n in results:
        assert gathered == [f"q{i}" for i in range(10)]
        assert shared == gathered[:4]  # the second process had no row of this one
        assert n == 10
