"""Laws of the bundled model and its tokenizer, proved on the shipped files."""

from __future__ import annotations

import json

import pytest
import torch
from tokenizers import Tokenizer
from transformers import AutoTokenizer, GemmaForCausalLM

from medqlora.assets import build_tiny_gemma as tiny
from medqlora.assets.build_sample import build_rows, read_facts, read_rows
from medqlora.config import compose

FOLDER = tiny.TINY_GEMMA_DIR


def row_text(row):
    return tiny.question_text(row["question"], [row[f"op{letter}"] for letter in "abcd"])


@pytest.fixture(scope="module")
def tokenizer():
    return AutoTokenizer.from_pretrained(FOLDER)


@pytest.fixture(scope="module")
def backend():
    return Tokenizer.from_file(str(FOLDER / "tokenizer.json"))


@pytest.fixture(scope="module")
def model():
    return GemmaForCausalLM.from_pretrained(FOLDER)


@pytest.fixture(scope="module")
def prompts():
    rows = read_rows("test")[:50]
    return [row_text(row) for row in rows]


def test_the_folder_is_small_and_complete():
    files = {path.name: path.stat().st_size for path in FOLDER.iterdir()}
    assert set(files) == {
        "config.json", "generation_config.json", "model.safetensors", "special_tokens_map.json",
        "tokenizer.json", "tokenizer_config.json",
    }  # fmt: skip
    assert sum(files.values()) <= 8e6


def test_the_files_name_no_machine():
    """A path of the machine that built them would end up in every clone."""
    for path in FOLDER.glob("*.json"):
        content = json.loads(path.read_text())
        assert "_name_or_path" not in content
        assert "name_or_path" not in content


def test_the_model_is_a_gemma_of_one_to_three_million_weights(model):
    config = model.config
    assert json.loads((FOLDER / "config.json").read_text())["model_type"] == "gemma"
    assert config.hidden_act == "gelu_pytorch_tanh"
    assert 1e6 <= sum(p.numel() for p in model.parameters()) <= 3e6
    assert config.num_key_value_heads < config.num_attention_heads
    assert config.head_dim % 16 == 0


def test_input_and_output_embedding_are_one(model):
    assert model.get_input_embeddings().weight is model.get_output_embeddings().weight


def test_weights_are_bfloat16_and_finite(model):
    for parameter in model.parameters():
        assert parameter.dtype == torch.bfloat16
        assert parameter.isfinite().all()


def test_a_block_of_64_weights_never_spans_two_rows(model):
    """NF4 keeps one constant per 64 weights (Dettmers et al. 2023, section 3)."""
    linears = [m for name, m in model.named_modules() if isinstance(m, torch.nn.Linear)]
    assert len(linears) == 7 * model.config.num_hidden_layers + 1
    assert all(linear.in_features % 64 == 0 for linear in linears)


def test_special_tokens_are_where_gemma_has_them(tokenizer):
    assert tokenizer.is_fast
    ids = tokenizer.convert_tokens_to_ids(["<pad>", "<eos>", "<bos>", "<unk>", "<mask>"])
    assert ids == [0, 1, 2, 3, 4]
    roles = [tokenizer.pad_token, tokenizer.eos_token, tokenizer.bos_token, tokenizer.unk_token]
    assert roles == ["<pad>", "<eos>", "<bos>", "<unk>"]
    for token in ("<start_of_turn>", "<end_of_turn>"):
        assert tokenizer(token, add_special_tokens=False)["input_ids"] == [
            tokenizer.convert_tokens_to_ids(token)
        ]


def test_every_piece_has_a_row_of_the_embedding(tokenizer, model):
    assert len(tokenizer) == model.config.vocab_size
    assert sorted(tokenizer.get_vocab().values()) == list(range(len(tokenizer)))


def test_exactly_one_bos_stands_in_front(tokenizer, prompts):
    for ids in tokenizer(prompts)["input_ids"]:
        assert ids[0] == tokenizer.bos_token_id
        assert ids.count(tokenizer.bos_token_id) == 1
        assert tokenizer.eos_token_id not in ids


def test_text_comes_back_as_it_went_in(tokenizer, prompts):
    """No dummy space in front, no lost line break, and bytes for what has no piece."""
    for text in [*prompts, " a  b\n\n c", "37 µg/dl, 12.5 %", "naïve 漢 🙂", "\ttab"]:
        ids = tokenizer(text, add_special_tokens=False)["input_ids"]
        assert tokenizer.decode(ids) == text
        assert tokenizer.unk_token_id not in ids


def test_digits_stand_apart(tokenizer):
    pieces = tokenizer.tokenize("1234 mg")
    assert pieces[:4] == ["1", "2", "3", "4"]


def test_the_letters_are_four_single_tokens_after_a_prompt(tokenizer, prompts):
    for prompt in prompts:
        bare = tokenizer(prompt)["input_ids"]
        answered = [tokenizer(f"{prompt} {letter}")["input_ids"] for letter in tiny.LETTERS]
        assert all(ids[:-1] == bare for ids in answered)
        assert len({ids[-1] for ids in answered}) == 4


def test_the_loaded_tokenizer_is_the_saved_one(tokenizer, backend, prompts):
    """Transformers builds a Gemma tokenizer anew from its vocabulary; the pieces must not move."""
    assert [backend.encode(prompt).ids for prompt in prompts] == tokenizer(prompts)["input_ids"]


def test_the_prompt_is_the_one_of_the_harness_option():
    row = read_rows("test")[0]
    prompt = compose("train", ["data=sample", "model=tiny_gemma", "prompt=harness"]).prompt
    options = "".join(
        prompt.option.format(letter=letter, text=row[f"op{letter.lower()}"])
        for letter in tiny.LETTERS
    )
    assert row_text(row) == prompt.text.format(stem=row["question"], options=options)


@pytest.fixture(scope="module")
def documents():
    facts = read_facts()
    return tiny.build_corpus(facts, build_rows(facts)["train"], num_documents=20_000)


def test_the_corpus_asks_no_question_of_val_or_test(documents):
    """Nothing the model has read holds a wording it will be asked."""
    read = {document.prompt.split("\n")[0] for document in documents}
    asked = {split: {f"Question: {row['question']}" for row in read_rows(split)} for split in
             ("train", "val", "test")}  # fmt: skip
    assert asked["val"]
    assert not read & (asked["val"] | asked["test"])
    # The comparison can see a question: most wordings of train are there.
    assert len(read & asked["train"]) > 0.8 * len(asked["train"])


def test_only_half_of_the_facts_are_asked_for_their_letter(documents):
    """The other half is what is left for fine-tuning to teach."""
    facts_of = {row["question"]: row["id"].rpartition("-")[0] for row in read_rows("train")}
    asked = {
        facts_of[stem]
        for document in documents
        if "Choices:" in document.prompt
        and (stem := document.prompt.split("\n")[0].removeprefix("Question: ")) in facts_of
    }
    assert len(asked) == pytest.approx(tiny.SCHOOLED * len(read_facts()), abs=9)


def test_a_label_is_the_next_token_and_never_part_of_a_prompt(backend):
    documents = [tiny.Document("Question: one", " two three"), tiny.Document("", "A statement.")]
    ids, labels, lengths = tiny.encode_corpus(documents, backend)
    for row, label, length in zip(ids, labels, lengths, strict=True):
        learnt = (label != tiny.IGNORE).nonzero()[:, 0]
        assert row[0] == tiny.BOS_ID
        assert learnt[-1] == length - 1
        assert label[learnt[-1]] == tiny.EOS_ID
        assert torch.equal(label[learnt[:-1]], row[learnt[:-1] + 1])
        document = next(d for d in documents if backend.decode(label[learnt].tolist()) == d.target)
        prompt = backend.encode(document.prompt, add_special_tokens=False).ids
        assert learnt[0] == len(prompt)


def test_the_same_seed_gives_the_same_corpus():
    facts = read_facts()[:5]
    rows = build_rows(facts)["train"]
    first, second = (tiny.build_corpus(facts, rows, num_documents=50, seed=3) for _ in range(2))
    assert first == second
    assert first != tiny.build_corpus(facts, rows, num_documents=50, seed=4)
