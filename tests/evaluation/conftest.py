"""Questions and predictions to measure."""

import socket

import numpy as np
import pytest

from medqlora.schema import Prediction, Question


def make_questions(n, k=4, seed=0, labelled=True):
    """Questions with random answers in three subjects of different sizes."""
    rng = np.random.default_rng(seed)
    subjects = rng.choice(["Anatomy", "Dental", "Skin"], size=n, p=[0.3, 0.6, 0.1])
    return [
        Question(
            id=f"q{i}",
            stem=f"Which of these is {'not ' if i % 5 == 0 else ''}fact {i}{'!' * (i % 7)}?",
            options=tuple(f"option {j}" for j in range(k)),
            answer=int(rng.integers(k)) if labelled else None,
            subject_name=str(subjects[i]),
            choice_type="multi" if i % 3 == 0 else "single",
        )
        for i in range(n)
    ]


def make_predictions(questions, skill=0.5, seed=1, split="test"):
    """Random scores that favour the right letter by `skill` standard deviations."""
    rng = np.random.default_rng(seed)
    predictions = []
    for question in questions:
        logits = rng.normal(size=len(question.options))
        if question.answer is not None:
            logits[question.answer] += skill
        scores = logits - np.logaddexp.reduce(logits)
        predictions.append(
            Prediction(
                id=question.id,
                split=split,
                subject_name=question.subject_name,
                choice_type=question.choice_type,
                answer=question.answer,
                scores=tuple(scores.tolist()),
            )
        )
    return predictions


@pytest.fixture
def questions():
    return make_questions(120)


@pytest.fixture
def predictions(questions):
    return make_predictions(questions)


@pytest.fixture
def unused_port():
    """A TCP port of this machine that nothing listens on."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]
