"""The data module under Lightning: batches, resuming, cache."""

from __future__ import annotations

import logging

import numpy as np
import pytest
import torch
from hydra.utils import instantiate
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from omegaconf import OmegaConf
from tokenizers import AddedToken

from medqlora.config import CONFIG_DIR
from medqlora.data import MedMCQADataModule, PromptTemplate, cache
from medqlora.data.medmcqa import sample_rows
from medqlora.data.packing import ROW_COST
from medqlora.errors import CheckpointError, ConfigError, DataError
from tests.data.data_tools import HARNESS, make_tokenizer, question, raw_row, write_jsonl


@pytest.mark.parametrize("option", sorted(f.stem for f in (CONFIG_DIR / "data").glob("*.yaml")))
def test_option_files_build_a_data_module(option, tokenizer, harness):
    config = OmegaConf.load(CONFIG_DIR / "data" / f"{option}.yaml")
    if option == "files":
        config.test_file = "questions.csv"
    data = instantiate(config, tokenizer=tokenizer, prompt=harness, seed=0, targets="answer")
    assert isinstance(data, MedMCQADataModule)
    assert data.name == option


def test_what_all_prompts_begin_with_stands_in_a_row_once(make_data):
    """With three solved examples in every prompt, most of a row would be copies of them."""
    few = PromptTemplate(name="few", text=HARNESS, num_shots=3)
    apart = make_data(num_val=50, prompt=few, token_budget=2048, share_prefix=False)
    shared = make_data(num_val=50, prompt=few, token_budget=2048)
    for data in (apart, shared):
        data.setup()
    assert apart.letter_ids == shared.letter_ids
    asked = {}
    for name, data in (("apart", apart), ("shared", shared)):
        rows = list(data.val_dataloader())
        asked[name] = {
            int(row.index[i]): row.question(i).tolist()
            for row in rows
            for i in range(row.num_questions)
        }
    assert asked["shared"] == asked["apart"]
    row = next(iter(shared.val_dataloader()))
    solved = shared.tokenizer.decode(row.input_ids[: row.prefix_length])
    assert solved.count("Answer:") == 3
    assert row.position_ids[row.cu_seqlens[0]] == row.prefix_length
    assert shared.num_rows("val") < apart.num_rows("val") / 2
    # A training question that is itself a solved example is shown another one in its place.
    assert 0 < next(iter(shared.train_dataloader())).prefix_length < row.prefix_length


def test_every_question_is_scored_once_with_its_own_answer(make_data):
    data = make_data(num_val=50, eval_token_budget=512)
    data.setup()
    seen = {}
    rows = list(data.val_dataloader())
    assert len(rows) == data.num_rows("val") == len(data.val_dataloader())
    for row in rows:
        assert row.input_ids.shape == (512,)
        for place in range(row.num_questions):
            seen[row.index[place].item()] = row.answer[place].item()
            assert row.last[place] == row.cu_seqlens[place + 1] - 1
            text = data.tokenizer.decode(row.question(place))
            asked = data.questions["val"][row.index[place]]
            assert text == "<bos>" + data.prompt.render(asked)[0]
    assert seen == {i: q.answer for i, q in enumerate(data.questions["val"])}


def test_rows_of_scoring_are_as_long_as_fills_them_where_that_is_asked_for(make_data):
    options = {"num": 400, "num_val": 150, "eval_token_budget": "auto"}
    data = make_data(**options, most_eval_tokens=4096)
    data.setup()
    budget = data.eval_token_budget
    assert 256 < budget < 4096
    assert budget % 256 == 0
    rows = list(data.val_dataloader())
    assert {tuple(row.input_ids.shape) for row in rows} == {(budget,)}
    assert sorted(i for row in rows for i in row.index.tolist() if i >= 0) == list(range(150))
    longest = make_data(num=400, num_val=150, eval_token_budget=4096)
    longest.setup()
    assert data.fill_fraction("val") > 0.9 > longest.fill_fraction("val")
    # Training keeps its rows, and a split of another size wants others.
    assert next(iter(data.train_dataloader())).input_ids.shape == (256,)
    data.fit_eval_rows(["train"])
    assert data.eval_token_budget != budget
    assert {row.input_ids.shape[0] for row in data.loader("train")} == {data.eval_token_budget}
    # Without a device that holds more, rows are those of training.
    same = make_data(**options)
    same.setup()
    assert same.eval_token_budget == 256


def test_one_length_serves_val_and_test_and_is_the_best_for_both(make_data, tmp_path):
    test = write_jsonl(tmp_path / "test.jsonl", [raw_row(i) for i in range(500, 560)])
    data = make_data(
        400, num_val=150, test_file=test, eval_token_budget="auto", most_eval_tokens=4096
    )
    data.setup()
    rows = [*data.val_dataloader(), *data.test_dataloader()]
    assert {row.input_ids.shape[0] for row in rows} == {data.eval_token_budget}
    chosen = len(rows) * (data.eval_token_budget + ROW_COST)
    for budget in range(512, 4096, 256):
        other = make_data(400, num_val=150, test_file=test, eval_token_budget=budget)
        other.setup()
        num_rows = other.num_rows("val") + other.num_rows("test")
        assert chosen <= num_rows * (budget + ROW_COST)


def test_all_rows_of_a_run_have_the_same_shapes_and_bounds(make_data):
    data = make_data(num_val=30)
    data.setup()
    rows = [*data.train_dataloader(), *data.val_dataloader()]
    assert {tuple(row.input_ids.shape) for row in rows} == {(256,)}
    assert {tuple(row.last.shape) for row in rows} == {(data.max_questions,)}
    assert {row.max_length for row in rows} == {data.max_length}
    assert {row.prefix_length for row in rows} == {
        1 + len(data.tokenizer("Question:", add_special_tokens=False).input_ids)
    }
    shared = rows[0].prefix_length
    longest = shared + max(int(np.diff(row.cu_seqlens).max()) for row in rows)
    assert longest <= data.max_length <= 256
    assert 0 < data.fill_fraction("train") <= 1
    tokens = sum(row.num_tokens - shared for row in rows[: data.num_rows("train")])
    assert data.fill_fraction("train") == tokens / (data.num_rows("train") * (256 - shared))


def test_lengths_are_those_of_the_tokenised_prompts(make_data):
    data = make_data(num_val=30)
    data.setup()
    for split, questions in data.questions.items():
        texts = [data.prompt.render(question)[0] for question in questions]
        expected = [1 + len(data.tokenizer.encode(t, add_special_tokens=False)) for t in texts]
        assert data.lengths(split).tolist() == expected
    with pytest.raises(ConfigError, match="no test questions"):
        data.lengths("test")


def test_explanations_are_targets_of_train_alone(make_data):
    data = make_data(num_val=30, targets="explanation")
    data.setup()
    row = next(iter(data.train_dataloader()))
    learned = row.input_ids[row.labels[:-1].ne(-100).nonzero().flatten() + 1]
    text = data.tokenizer.decode(learned)
    first = data.questions["train"][row.index[0]]
    assert text.strip().startswith(f"{'ABCD'[first.answer]}\n{first.explanation}<eos>")
    assert torch.equal(
        row.labels[row.last[: row.num_questions]],
        torch.tensor(data.letter_ids)[row.answer[: row.num_questions]],
    )
    for other in data.val_dataloader():
        assert other.labels is None
        assert "SECRET" not in data.tokenizer.decode(other.input_ids)


def test_prompts_of_a_run_never_hold_an_explanation(make_data):
    data = make_data(num_val=30)
    data.setup()
    for row in [*data.train_dataloader(), *data.val_dataloader()]:
        assert row.labels is None
        assert "SECRET" not in data.tokenizer.decode(row.input_ids)


def test_five_options_give_five_letters(tmp_path, make_data):
    rows = [raw_row(i, ope=f"None {i}", cop=i % 5) for i in range(12)]
    data = make_data(test_file=write_jsonl(tmp_path / "t.jsonl", rows), train_file=None)
    data.setup()
    assert data.num_options == len(data.letter_ids) == 5
    answers = torch.cat([row.answer[: row.num_questions] for row in data.test_dataloader()])
    assert sorted(answers.unique().tolist()) == [0, 1, 2, 3, 4]


def test_shots_come_from_train_and_not_from_val(make_data):
    config = OmegaConf.load(CONFIG_DIR / "prompt" / "few_shot.yaml")
    data = make_data(num_val=30, prompt=instantiate(config), token_budget=1024)
    data.setup()
    assert {q.id for q in data.prompt.shots} <= {q.id for q in data.questions["train"]}


def test_truncated_questions_are_counted_and_said(tmp_path, make_data, caplog):
    rows = [raw_row(0), raw_row(3, question="nerve of the tongue " * 60)]
    file = write_jsonl(tmp_path / "q.jsonl", rows)
    data = make_data(train_file=file, max_length=120)
    with caplog.at_level(logging.WARNING):
        data.setup()
    assert data.num_truncated == 1
    assert "1 question(s) were longer than 120 tokens" in caplog.text
    assert data.max_length == 128


@pytest.mark.parametrize("text", ["nerve " * 400, "\u00a7"])
def test_question_that_is_left_out_stops_no_run(tmp_path, make_data, text):
    """Options beyond the limit, or a character that is a control token."""
    odd = make_tokenizer()
    odd.add_tokens([AddedToken("\u00a7", special=False)])
    rows = [raw_row(i, opa=text if i == 7 else "Facial") for i in range(12)]
    options = {"train_file": write_jsonl(tmp_path / "q.jsonl", rows), "tokenizer": odd}
    with pytest.raises((ConfigError, DataError)):
        make_data(**options).setup()
    for limit in range(11, 0, -1):
        data = make_data(**options, limit_train=limit)
        left = sample_rows([question(i) for i in range(12)], limit)
        if 7 not in left:
            data.setup()
            assert len(data.questions["train"]) == limit
            return
    raise AssertionError("no limit leaves the question out")


def test_changed_file_changes_the_hash(tmp_path, make_data):
    rows = [raw_row(i) for i in range(8)]
    hashes = set()
    for changes in ({}, {"exp": "other"}, {"opa": "other"}, {"cop": 3}, {"id": "other"}):
        file = write_jsonl(tmp_path / "q.jsonl", [rows[0] | changes, *rows[1:]])
        data = make_data(train_file=file)
        data.setup()
        hashes.add(data.sha256)
    assert len(hashes) == 5


def test_worker_processes_yield_the_same_rows(make_data):
    plain, spread = make_data(), make_data(num_workers=1)
    plain.setup()
    spread.setup()
    for left, right in zip(plain.train_dataloader(), spread.train_dataloader(), strict=True):
        assert torch.equal(left.input_ids, right.input_ids)
        assert torch.equal(left.index, right.index)


def test_questions_of_no_split_are_packed_like_those_of_one(make_data):
    data = make_data(num_val=50)
    data.setup()
    bare = make_data()
    bare.prepare_letters(4)
    assert bare.letter_ids == data.letter_ids
    questions = data.questions["val"]
    for packer in (data, bare):
        members = []
        for row in packer.pack(questions):
            assert row.input_ids.shape == (256,)
            for place in range(row.num_questions):
                members.append(row.index[place].item())
                assert row.last[place] == row.cu_seqlens[place + 1] - 1
                text = data.tokenizer.decode(row.question(place))
                assert text == "<bos>" + data.prompt.render(questions[members[-1]])[0]
        assert sorted(members) == list(range(50))
    assert list(bare.pack([])) == []
    with pytest.raises(DataError, match="has 5 options"):
        list(bare.pack([question(options=tuple("vwxyz"))]))


def test_questions_that_come_one_by_one_have_few_shapes(make_data):
    """Each shape is compiled on CUDA, in the middle of a request."""
    bare = make_data(token_budget=2048)
    bare.prepare_letters(4)
    shapes = {
        (len(row.last), row.max_length)
        for words in range(1, 900, 9)
        for row in bare.pack([question(stem="why " * words)])
    }
    assert 1 < len(shapes) < 12


def test_train_can_be_scored_without_shuffle_or_labels(make_data):
    data = make_data(targets="explanation", eval_token_budget=512)
    data.setup()
    rows = list(data.loader("train"))
    assert all(row.labels is None and row.input_ids.shape == (512,) for row in rows)
    index = [i for row in rows for i in row.index[: row.num_questions].tolist()]
    assert sorted(index) == list(range(120))
    assert index[0] == 0


# --- resuming -------------------------------------------------------------------------------------


class Recorder(LightningModule):
    """Notes which questions a step saw; `fail_at` breaks off inside a step."""

    def __init__(self, fail_at: int | None = None) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(1))
        self.fail_at = fail_at
        self.seen: list[tuple[int, ...]] = []

    def training_step(self, batch, batch_idx):
        if len(self.seen) == self.fail_at:
            raise KeyboardInterrupt
        self.seen.append(tuple(batch.index[: batch.num_questions].tolist()))
        return self.weight.sum()

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1)


def fit(folder, module, data, ckpt_path=None, **options):
    saver = ModelCheckpoint(folder, save_last=True, save_top_k=0, every_n_train_steps=1)
    trainer = Trainer(
        accelerator="cpu",
        logger=False,
        callbacks=[saver],
        enable_progress_bar=False,
        enable_model_summary=False,
        num_sanity_val_steps=0,
        **options,
    )
    trainer.fit(module, datamodule=data, ckpt_path=ckpt_path, weights_only=False)
    return str(folder / "last.ckpt")


@pytest.mark.parametrize("stop", [1, 4, "epoch", "epoch + 3"])
@pytest.mark.parametrize("by_steps", [True, False])
def test_resumed_run_sees_exactly_the_rows_that_were_left(tmp_path, make_data, stop, by_steps):
    whole = Recorder()
    data = make_data()
    data.setup()
    rows = data.num_rows("train")
    length = {"max_steps": 3 * rows} if by_steps else {"max_epochs": 3}
    fit(tmp_path / "whole", whole, make_data(), **length)
    assert len(whole.seen) == 3 * rows
    assert len(set(whole.seen)) == 3 * rows
    for epoch in range(3):
        part = whole.seen[epoch * rows : (epoch + 1) * rows]
        assert sorted(i for row in part for i in row) == list(range(120))
    steps = {"epoch": rows, "epoch + 3": rows + 3}.get(stop, stop)
    first, second = Recorder(), Recorder()
    checkpoint = fit(tmp_path / "cut", first, make_data(), max_steps=steps)
    fit(tmp_path / "cut", second, make_data(), checkpoint, **length)
    assert first.seen + second.seen == whole.seen


def test_run_broken_off_inside_a_step_repeats_that_step(tmp_path, make_data):
    whole = Recorder()
    fit(tmp_path / "whole", whole, make_data(), max_epochs=2)
    first, second = Recorder(fail_at=5), Recorder()
    with pytest.raises((KeyboardInterrupt, SystemExit)):
        fit(tmp_path / "cut", first, make_data(), max_epochs=2)
    fit(tmp_path / "cut", second, make_data(), str(tmp_path / "cut" / "last.ckpt"), max_epochs=2)
    assert first.seen + second.seen == whole.seen


@pytest.mark.parametrize("change", [{"seed": 1}, {"token_budget": 512}, {"limit_train": 100}])
def test_checkpoint_of_other_data_is_refused(tmp_path, make_data, change):
    checkpoint = fit(tmp_path, Recorder(), make_data(), max_steps=2)
    with pytest.raises(CheckpointError, match="resume=never"):
        fit(tmp_path, Recorder(), make_data(**change), checkpoint, max_steps=4)


# --- cache ----------------------------------------------------------------------------------------


@pytest.fixture
def tiny_cache(monkeypatch):
    monkeypatch.setattr(cache, "MIN_ROWS", 10)


def arrow_files(tmp_path):
    return sorted((tmp_path / "cache").glob("*.arrow"))


def test_second_start_reads_the_cache_and_gives_the_same(
    tmp_path, make_data, tiny_cache, monkeypatch
):
    first = make_data(num_val=30)
    first.setup()
    assert len(arrow_files(tmp_path)) == 2
    for name in ("read_rows", "tokenize_questions"):
        monkeypatch.setattr(f"medqlora.data.datamodule.{name}", None)
    for change in ({}, {"token_budget": 512}):
        second = make_data(num_val=30, **change)
        second.setup()
        assert second.questions == first.questions
        assert second.sha256 == first.sha256
        for left, right in zip(first.val_dataloader(), second.val_dataloader(), strict=False):
            assert change or torch.equal(left.input_ids, right.input_ids)


def test_cache_is_keyed_by_file_prompt_and_tokenizer(tmp_path, make_data, tiny_cache):
    make_data().setup()
    config = OmegaConf.load(CONFIG_DIR / "prompt" / "letters.yaml")
    other = make_data(prompt=instantiate(config))
    other.setup()
    assert len(arrow_files(tmp_path)) == 3
    text = other.tokenizer.decode(next(iter(other.train_dataloader())).input_ids)
    assert "Question:" not in text
    changed = make_data(num=121)
    changed.setup()
    assert len(changed.questions["train"]) == 121
    assert len(arrow_files(tmp_path)) == 5


def test_limit_that_bites_is_not_read_from_the_cache_of_another(tmp_path, make_data, tiny_cache):
    wide = make_data()
    wide.setup()
    longest = max(int(t.lengths.max()) for t in wide._tokenized.values())
    narrow = make_data(max_length=longest - 1)
    narrow.setup()
    assert narrow.num_truncated > 0
    again = make_data()
    again.setup()
    assert again.num_truncated == 0


@pytest.mark.parametrize("damage", ["cut off", "one byte", "no arrow"])
def test_damaged_cache_is_said_and_made_again(tmp_path, make_data, tiny_cache, caplog, damage):
    first = make_data()
    first.setup()
    for file in arrow_files(tmp_path):
        content = bytearray(file.read_bytes())
        if damage == "one byte":
            content[len(content) // 3] ^= 1
        file.write_bytes(
            b"x" if damage == "no arrow" else content[: -99 if damage != "one byte" else None]
        )
    with caplog.at_level(logging.WARNING):
        second = make_data()
        second.setup()
    assert caplog.text.count("is damaged") == 2
    assert second.questions == first.questions
    caplog.clear()
    make_data().setup()
    assert "damaged" not in caplog.text


def test_cache_that_cannot_be_written_costs_only_the_time(tmp_path, make_data, tiny_cache, caplog):
    (tmp_path / "file").write_text("")
    data = make_data(cache_dir=str(tmp_path / "file" / "below"))
    with caplog.at_level(logging.WARNING):
        data.setup()
    assert "no cache" in caplog.text
    assert len(data.questions["train"]) == 120


def test_asking_for_a_split_that_is_left_out_is_refused(make_data):
    data = make_data()
    data.setup()
    with pytest.raises(ConfigError, match=r"no test questions.*data\.test_file"):
        data.num_rows("test")
