"""Options change places in training, the label goes with its option, and a resume sees the same."""

from __future__ import annotations

import pytest
import torch

from medqlora.data.augmentation import OptionShuffle, is_movable, reorder
from medqlora.data.tokenization import TextEncoder
from medqlora.errors import ConfigError
from tests.data.data_tools import question, raw_row, write_jsonl


def texts_of(data, row) -> list[tuple[str, str]]:
    """Prompt and answer text of each question of a row, read back from its tokens."""
    found = []
    for place in range(row.num_questions):
        ids = row.input_ids[row.cu_seqlens[place] : row.cu_seqlens[place + 1]]
        text = data.tokenizer.decode(ids, skip_special_tokens=True)
        options = [line[3:] for line in text.splitlines() if line[1:2] == "."]
        found.append((text, options[int(row.answer[place])]))
    return found


def epoch_of(data, epoch: int) -> dict[int, tuple[str, str]]:
    loader = data.train_dataloader()
    loader.set_epoch(epoch)
    return {
        int(index): text
        for row in loader
        for index, text in zip(row.index, texts_of(data, row), strict=False)
        if index >= 0
    }


def test_the_label_follows_its_option_in_every_epoch_and_the_orders_differ(make_data):
    data = make_data(shuffle_options=True)
    data.setup()
    epochs = [epoch_of(data, epoch) for epoch in range(6)]
    orders = {index: set() for index in range(120)}
    for shown in epochs:
        assert shown.keys() == orders.keys()
        for index, (text, answer) in shown.items():
            given = data.questions["train"][index]
            assert answer == given.options[given.answer]
            places = [text.index(option) for option in given.options]
            assert sorted(places)[0] > text.index(given.stem)
            orders[index].add(tuple(places))
    # Six draws of 24 orders are five and more on average; every question moves.
    assert min(len(found) for found in orders.values()) > 1
    assert sum(len(found) for found in orders.values()) > 4.5 * 120
    # The right option is in each place about as often: 180 of 720, give or take 5 deviations.
    letters = torch.zeros(4)
    for epoch in range(6):
        loader = data.train_dataloader()
        loader.set_epoch(epoch)
        for row in loader:
            letters += torch.bincount(row.answer[row.answer >= 0], minlength=4)
    assert (letters - 180).abs().max() < 60


def test_rows_are_those_of_the_plan_with_other_tokens_only(make_data):
    plain, shuffled = make_data(), make_data(shuffle_options=True)
    for data in (plain, shuffled):
        data.setup()
    for a, b in zip(plain.train_dataloader(), shuffled.train_dataloader(), strict=True):
        for field in ("position_ids", "cu_seqlens", "last", "index"):
            assert torch.equal(getattr(a, field), getattr(b, field)), field
        assert torch.equal(a.input_ids.sort()[0], b.input_ids.sort()[0])
        assert not torch.equal(a.input_ids, b.input_ids)


def test_an_epoch_is_the_same_when_it_is_resumed_and_in_every_process(make_data):
    data = make_data(shuffle_options=True)
    data.setup()
    loader = data.train_dataloader()
    loader.set_epoch(3)
    whole = [row.input_ids for row in loader]
    again = make_data(shuffle_options=True, num_workers=1)
    again.setup()
    loader = again.train_dataloader()
    loader.load_state_dict({"epoch": 3, "rows_done": 2, "num_rows": len(whole)})
    loader.set_epoch(3)
    rest = [row.input_ids for row in loader]
    assert len(rest) == len(whole) - 2
    assert all(torch.equal(a, b) for a, b in zip(rest, whole[2:], strict=True))


def test_scoring_keeps_the_order_of_the_data(make_data):
    plain, shuffled = make_data(), make_data(shuffle_options=True)
    for data in (plain, shuffled):
        data.setup()
    for a, b in zip(plain.loader("train"), shuffled.loader("train"), strict=True):
        assert torch.equal(a.input_ids, b.input_ids)
        assert torch.equal(a.answer, b.answer)


@pytest.mark.parametrize(
    "option",
    [
        *("All of the above", "none of above", "None of these", "Both A and C", "both a & b"),
        *("A, B", "a+c", "Neither of them", "None", "Both.", "B or D", "All the above."),
    ],
)
def test_options_that_speak_of_others_stay_where_they_are(option, tmp_path, make_data):
    assert not is_movable(question(options=("Facial", "Vagus", "Optic", option)))
    row = raw_row(0, opd=option)
    file = write_jsonl(tmp_path / "above.jsonl", [row, raw_row(1)])
    data = make_data(train_file=file, shuffle_options=True)
    data.setup()
    for epoch in range(4):
        text, answer = epoch_of(data, epoch)[0]
        assert f"A. {row['opa']}\nB. {row['opb']}\nC. {row['opc']}\nD. {option}\n" in text
        assert answer == row["opa"]


@pytest.mark.parametrize(
    "option",
    [
        "Tethered cord syndrome",
        "Vitamin A",
        "Both kidneys",
        "None is known",
        "Vitamin B12 and iron",
    ],
)
def test_other_options_move(option):
    assert is_movable(question(options=("Facial", "Vagus", "Optic", option)))


def test_an_order_that_takes_other_tokens_keeps_that_of_the_data(make_data):
    """With less room than the row was built with, every prompt would be shorter."""
    data = make_data()
    data.setup()
    row = next(iter(data.train_dataloader()))
    encoder = TextEncoder(data.tokenizer)
    less = int(data._tokenized["train"].lengths.min()) - 1
    for limit, moves in ((less, False), (data.limit, True)):
        shuffle = OptionShuffle(data.questions["train"], data.prompt, encoder, limit=limit, seed=0)
        shown = shuffle(row, 0)
        assert torch.equal(shown.input_ids, row.input_ids) is not moves
        assert torch.equal(shown.answer, row.answer) is not moves


def test_an_unlabelled_question_has_no_label_in_any_order():
    assert reorder(question(answer=None), [3, 2, 1, 0]).answer is None
    moved = reorder(question(1), [3, 1, 0, 2])
    assert (moved.options, moved.answer) == (("Ulnar", "Vagus", "Facial", "Optic"), 1)


def test_explanations_that_name_a_letter_forbid_it(make_data):
    with pytest.raises(ConfigError, match=r"data\.shuffle_options=true.*loss=explanation") as error:
        make_data(shuffle_options=True, targets="explanation")
    assert "\n" not in str(error.value)
