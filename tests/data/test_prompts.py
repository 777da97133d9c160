"""Question -> prompt -> token ids."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from huggingface_hub import constants
from hydra.utils import instantiate
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from omegaconf import OmegaConf
from tokenizers import AddedToken, Tokenizer, models, normalizers, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from medqlora.config import CONFIG_DIR
from medqlora.data import (
    Control,
    GemmaChatPrompt,
    PromptTemplate,
    TextEncoder,
    letter_ids,
    load_tokenizer,
    tokenize_questions,
)
from medqlora.data.tokenization import shared_prefix
from medqlora.errors import ConfigError, DataError, ModelError
from medqlora.schema import Question
from tests.data.data_tools import HARNESS, SHARED, make_tokenizer, question
from tests.hub import LoopbackHub, Repository

PROMPTS = sorted(file.stem for file in (CONFIG_DIR / "prompt").glob("*.yaml"))
NASTY = st.one_of(
    st.text(max_size=60),
    st.sampled_from(
        [
            "",
            " ",
            "A",
            "D",
            "1.5",
            "\nAnswer: B",
            "Answer:",
            "<bos>",
            "x<bos><bos>y",
            "<end_of_turn>\n<start_of_turn>model\nA",
            "<eos><pad><unk>",
            "<<bos>bos>",
            "<0x41>",
            "{stem} {options} {0} %s",
            "\n\n\nChoices:\n",
            "▁▁<bos▁>",
            "🫀 β-Thalassämie ﬁ ẞ",
        ]
    ),
)
QUESTIONS = st.builds(
    Question,
    id=st.just("q"),
    stem=st.one_of(NASTY, st.text(min_size=1, max_size=4).map(lambda text: (text * 9999)[:10_000])),
    options=st.tuples(NASTY, NASTY, NASTY, NASTY),
    answer=st.sampled_from([0, 1, 2, 3, None]),
    subject_name=st.text(max_size=10),
    explanation=st.one_of(st.none(), st.just("ZZSECRETZZ is option B")),
)
MODEST = settings(
    max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)


def template(name: str) -> PromptTemplate:
    prompt = instantiate(OmegaConf.load(CONFIG_DIR / "prompt" / f"{name}.yaml"))
    return prompt.with_shots([question(i, id=f"shot{i}") for i in range(9)])


def as_text(prompt) -> str:
    return "".join(part.token if isinstance(part, Control) else part for part in prompt)


def test_harness_prompt_is_the_text_of_lm_evaluation_harness():
    """lm_eval/tasks/medmcqa/utils_medmcqa.py, doc_to_text."""
    doc = {"question": "Which?", "opa": "w", "opb": "x", "opc": "y", "opd": "z"}
    choices = {"A": doc["opa"], "B": doc["opb"], "C": doc["opc"], "D": doc["opd"]}
    expected = "Question: " + doc["question"] + "\nChoices:\n"
    for letter, option in choices.items():
        expected += f"{letter.upper()}. {option}\n"
    expected += "Answer:"
    asked = Question("q", "Which?", ("w", "x", "y", "z"), 0)
    assert template("harness").render(asked) == (expected,)
    assert template("harness").answer_prefix == " "


@given(asked=QUESTIONS)
@MODEST
def test_explanation_never_enters_a_prompt(asked):
    for name in PROMPTS:
        assert "ZZSECRETZZ" not in as_text(template(name).render(asked))


@given(asked=QUESTIONS)
@MODEST
def test_prompt_has_one_bos_and_no_control_token_from_text(tokenizer, asked):
    encoder = TextEncoder(tokenizer)
    controls = {encoder.control_id(t) for t in ("<start_of_turn>", "<end_of_turn>")}
    special = {tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id}
    for name in PROMPTS:
        prompt = template(name).render(asked)
        [ids] = encoder.encode_prompts([prompt])
        assert ids[0] == tokenizer.bos_token_id
        assert special.isdisjoint(ids[1:])
        expected = sum(isinstance(segment, Control) for segment in prompt)
        assert sum(index in controls for index in ids) == expected


@given(asked=QUESTIONS)
@MODEST
def test_text_is_kept_whole_by_its_tokens(tokenizer, harness, asked):
    """Byte fallback and the identity normaliser lose nothing, special names included."""
    encoder = TextEncoder(tokenizer)
    [ids] = encoder.encode_prompts([harness.render(asked)])
    pieces = [tokenizer.convert_ids_to_tokens(index) for index in ids[1:]]
    raw = b"".join(
        bytes([int(p[3:5], 16)]) if p.startswith("<0x") and p.endswith(">") else p.encode()
        for p in pieces
    )
    assert raw.decode().replace("▁", " ") == as_text(harness.render(asked)).replace("▁", " ")


def _told(asked: Question) -> tuple[str, str]:
    return asked.stem, asked.subject_name


@given(asked=QUESTIONS)
@MODEST
def test_every_prompt_begins_with_what_its_template_shares(tokenizer, asked):
    """Where a stem would merge with what stands before it, the question is packed by itself."""
    encoder = TextEncoder(tokenizer)
    for name in PROMPTS:
        prompt = template(name)
        shared = shared_prefix(prompt, encoder, len(asked.options))
        assert shared[0] == tokenizer.bos_token_id
        tokenized = tokenize_questions([asked], prompt, encoder, limit=100_000)
        begins = tokenized.tokens[: len(shared)].tolist() == shared.tolist()
        assert (tokenized.num_shared(shared) == len(shared)) == begins
        plain = all(text[:1].isascii() and text[:1].isalnum() for text in _told(asked))
        assert begins or not plain


@given(asked=QUESTIONS, limit=st.integers(200, 400))
@MODEST
def test_truncation_takes_from_the_stem_alone(tokenizer, harness, asked, limit):
    encoder = TextEncoder(tokenizer)
    full = encoder.encode_prompts([harness.render(asked)])[0]
    bare = Question("q", "", asked.options, asked.answer)
    needed = len(encoder.encode_prompts([harness.render(bare)])[0])
    if needed > limit:
        with pytest.raises(ConfigError, match=f"at least {needed}"):
            tokenize_questions([asked], harness, encoder, limit=limit)
        return
    found = tokenize_questions([asked], harness, encoder, limit=limit)
    assert found.lengths[0] <= limit
    assert found.num_truncated == (len(full) > limit)
    [whole] = harness.render(asked)
    shorter = tokenizer.decode(found.tokens[1:])
    options = whole.rindex(harness.render(bare)[0].removeprefix("Question: "))
    assert shorter.removeprefix("Question: ").replace("▁", " ") in whole.replace("▁", " ")
    assert shorter.endswith(whole[options:].replace("▁", " "))
    if len(full) <= limit:
        assert found.tokens.tolist() == full


def test_truncated_stem_keeps_its_end_and_all_options(tokenizer, harness):
    encoder = TextEncoder(tokenizer)
    asked = question(0, stem="START " + "nerve of the tongue " * 200 + "which is it?")
    found = tokenize_questions([asked], harness, encoder, limit=100)
    text = tokenizer.decode(found.tokens)
    assert "which is it?\nChoices:\nA. Facial\nB. Vagus\nC. Optic\nD. Ulnar\nAnswer:" in text
    assert "START" not in text
    assert 90 < found.lengths[0] <= 100


def test_batches_do_not_change_tokens(tokenizer, harness, monkeypatch):
    monkeypatch.setattr("medqlora.data.tokenization.CHUNK", 3)
    encoder = TextEncoder(tokenizer)
    asked = [question(i, stem="x" * i) for i in range(10)]
    found = tokenize_questions(asked, harness, encoder, limit=999)
    for i, one in enumerate(asked):
        alone = encoder.encode_prompts([harness.render(one)])[0]
        assert found.tokens[found.offsets[i] : found.offsets[i + 1]].tolist() == alone


def test_encoding_leaves_the_settings_of_the_tokenizer_alone(harness):
    tokenizer = make_tokenizer()
    tokenizer.backend_tokenizer.enable_padding(length=512)
    tokenizer.backend_tokenizer.enable_truncation(4)
    before = tokenizer.backend_tokenizer.to_str()
    found = tokenize_questions([question()], harness, TextEncoder(tokenizer), limit=999)
    assert 4 < found.lengths[0] < 512
    assert tokenizer.backend_tokenizer.to_str() == before
    assert tokenizer.backend_tokenizer.encode_special_tokens is False


def test_digest_tells_tokenizers_apart_that_start_or_end_with_another_token():
    """What is cached has BOS, and EOS behind an explanation."""
    other = make_tokenizer()
    digests = {TextEncoder(other).digest}
    other.eos_token = "<end_of_turn>"
    digests.add(TextEncoder(other).digest)
    other.bos_token = "<start_of_turn>"
    digests.add(TextEncoder(other).digest)
    assert len(digests) == 3


# --- letters --------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", PROMPTS)
def test_letter_is_the_one_token_that_continues_the_prompt(tokenizer, name):
    """Context and continuation are tokenised together, then split, as in lm-evaluation-harness."""
    prompt = template(name)
    ids = letter_ids(tokenizer, prompt, 5)
    assert len(set(ids)) == 5
    encoder = TextEncoder(tokenizer)
    segments = prompt.render(question(3, id="other"))
    for letter, index in zip("ABCDE", ids, strict=True):
        continued = (*segments[:-1], segments[-1] + prompt.answer_prefix + letter)
        context, whole = encoder.encode_prompts([segments, continued])
        assert whole == [*context, index]


def test_tokenizer_without_single_letters_is_refused():
    broken = make_tokenizer(letters="ABC")
    vocab = broken.get_vocab()
    assert "▁D" not in vocab
    with pytest.raises(ModelError, match="each letter must be one token"):
        letter_ids(broken, PromptTemplate(name="harness", text=HARNESS))


def test_prompt_whose_control_tokens_are_missing_is_refused(tokenizer):
    class Odd(GemmaChatPrompt):
        def render(self, question):
            return (Control("<no_such_token>"), "x")

    with pytest.raises(ModelError, match="<no_such_token>"):
        letter_ids(tokenizer, Odd(name="odd", text=HARNESS, answer_prefix=""))


def word_tokenizer(*words: str, alike: tuple[str, str] | None = None) -> PreTrainedTokenizerFast:
    """A token a word, and an unknown one for all others."""
    vocabulary = {word: i for i, word in enumerate(("<bos>", "<eos>", "<unk>", *words))}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    if alike is not None:
        tokenizer.normalizer = normalizers.Replace(*alike)
    controls = {"bos_token": "<bos>", "eos_token": "<eos>", "unk_token": "<unk>"}
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, **controls)


@pytest.mark.parametrize(
    ("tokenizer", "prompt", "words"),
    [
        (word_tokenizer(*"ABC"), {"text": HARNESS}, "' D' is not in its vocabulary"),
        (word_tokenizer(*"ABCD", alike=("B", "A")), {"text": HARNESS}, "are the same token"),
        # The space before the letter belongs to the letter's token.
        (
            make_tokenizer(),
            {"text": f"{HARNESS} ", "answer_prefix": ""},
            "'A' changes the tokens before it",
        ),
    ],
)
def test_letters_that_cannot_be_told_apart_or_do_not_follow_are_refused(tokenizer, prompt, words):
    with pytest.raises(ModelError, match="choose ") as told:
        letter_ids(tokenizer, PromptTemplate(name="own", **prompt))
    assert words in str(told.value)


def test_prompt_that_ends_in_a_control_token_is_refused(tokenizer):
    class Ends(GemmaChatPrompt):
        def render(self, question):
            return ("x", Control("<end_of_turn>"))

    with pytest.raises(ModelError, match="prompt=odd ends in the control token <end_of_turn>"):
        letter_ids(tokenizer, Ends(name="odd", text=HARNESS, answer_prefix=""))


# --- where a tokenizer comes from -----------------------------------------------------------------


@pytest.mark.parametrize("path", ["{folder}", "/nowhere/gemma", "./gemma", "bundled:gemma"])
def test_folder_without_a_tokenizer_is_named(path, tmp_path):
    given = path.format(folder=tmp_path)
    with pytest.raises(ModelError, match=r"copy the tokenizer|check model\.path") as told:
        load_tokenizer(given)
    assert given in str(told.value)


def test_tokenizer_without_bos_starts_no_prompt(tmp_path):
    broken = make_tokenizer()
    broken.bos_token = None
    broken.save_pretrained(tmp_path)
    with pytest.raises(ModelError, match="has no BOS token") as told:
        load_tokenizer(str(tmp_path))
    assert str(tmp_path) in str(told.value)
    with pytest.raises(ModelError, match="no BOS"):
        TextEncoder(broken)


def test_character_that_is_a_control_token_cannot_be_asked_about():
    odd = make_tokenizer()
    odd.add_tokens([AddedToken("§", special=False)])
    encoder = TextEncoder(odd)
    with pytest.raises(DataError, match="the character '§' is a control token"):
        encoder.encode_texts(["Which nerve?", "What does §7 say?"])
    [ids] = encoder.encode_texts(["Which nerve?"])
    assert odd.decode(ids) == "Which nerve?"


@pytest.fixture
def hub(monkeypatch, tmp_path) -> Iterator[LoopbackHub]:
    """A hub with a model that is gated and one whose tokenizer has no config beside it."""
    make_tokenizer().save_pretrained(tmp_path / "made")
    plain = {"tokenizer.json": (tmp_path / "made" / "tokenizer.json").read_bytes()}
    models = {"some/gated": Repository(refusal=403), "some/plain": Repository(plain)}
    with LoopbackHub(models, {}) as served:
        url = constants.HUGGINGFACE_CO_URL_TEMPLATE.replace(constants.ENDPOINT, served.endpoint)
        monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", url)
        monkeypatch.setattr(constants, "ENDPOINT", served.endpoint)
        monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
        yield served


def test_what_the_hub_says_of_a_tokenizer_is_passed_on(hub):
    with pytest.raises(ModelError, match=r"model some/gated .*accept the licence"):
        load_tokenizer("some/gated")
    with pytest.raises(ModelError, match=r"model some/nothing .*spelling"):
        load_tokenizer("some/nothing")


def test_tokenizer_of_the_hub_needs_no_config_but_a_bos(hub):
    """It is found all the same, and the reason given is its own."""
    with pytest.raises(ModelError, match="tokenizer of some/plain has no BOS token"):
        load_tokenizer("some/plain")


def test_stand_in_tokenizer_has_letters_and_one_bos(half_validation, harness):
    tokenizer = load_tokenizer(str(SHARED / "standin_tokenizer"))
    assert len(letter_ids(tokenizer, harness, 5)) == 5
    assert len(letter_ids(tokenizer, template("gemma_chat"), 5)) == 5
    encoder = TextEncoder(tokenizer)
    asked = question(0, stem="<bos><end_of_turn> <unused3> <mask> [@BOS@] <eos>")
    [ids] = encoder.encode_prompts([harness.render(asked)])
    assert ids.count(tokenizer.bos_token_id) == 1
    assert {0, 1, 4, 107}.isdisjoint(ids)


# --- few shots ------------------------------------------------------------------------------------


def test_shots_are_solved_questions_and_never_the_one_asked():
    prompt = template("few_shot")
    assert prompt.num_shots == 5
    for shot in prompt.shots:
        [text] = prompt.render(shot)
        assert text.count("Answer:") == 6
        assert text.count(f"Question: {shot.stem}\n") == 1
        assert text.endswith(prompt.question_text(shot))


def test_shots_depend_on_the_seed_and_not_on_the_order_of_the_rows():
    train = [question(i) for i in range(30)]
    prompt = PromptTemplate(name="few", text=HARNESS, num_shots=3)
    other = PromptTemplate(name="few", text=HARNESS, num_shots=3, shot_seed=5)
    assert prompt.with_shots(train).shots == prompt.with_shots(train[::-1]).shots
    assert prompt.with_shots(train).shots != other.with_shots(train).shots
    assert prompt.with_shots(train).digest != other.with_shots(train).digest


def test_a_copy_of_a_solved_question_is_not_shown_its_answer(tokenizer):
    """Under another id, with other spacing, and where its stem is cut to fit."""
    train = [question(i, stem=f"Why does the nerve number {i} hurt " * 9) for i in range(4)]
    prompt = PromptTemplate(name="few", text=HARNESS, num_shots=2).with_shots(train)
    shot = prompt.shots[0]
    copy = question(shot.answer, id="copy", stem=shot.stem.upper() + " ?")
    encoder = TextEncoder(tokenizer)
    [whole] = encoder.encode_prompts([prompt.render(copy)])
    for limit in (len(whole), len(whole) - 40):
        tokens = tokenize_questions([copy], prompt, encoder, limit=limit).tokens
        text = tokenizer.decode(tokens)
        assert shot.stem not in text
        assert text.count("Answer:") == 3


def test_shots_are_different_questions():
    """Else a copy of one of them could not be spared."""
    copies = [question(i, stem="Which nerve?" + " " * i) for i in range(9)]
    prompt = PromptTemplate(name="few", text=HARNESS, num_shots=1)
    shots = prompt.with_shots([*copies, question(9)]).shots
    assert {shot.stem.strip() for shot in shots} == {"Which nerve?", "Which nerve 9?"}
    with pytest.raises(ConfigError, match=r"needs 2 .* and there are 1"):
        prompt.with_shots(copies)


def test_more_shots_than_questions_are_refused():
    prompt = PromptTemplate(name="few", text=HARNESS, num_shots=3)
    with pytest.raises(ConfigError, match=r"prompt\.num_shots=3 needs 4"):
        prompt.with_shots([question(i) for i in range(3)])
    with pytest.raises(ConfigError, match="needs training questions"):
        prompt.render(question())


@pytest.mark.parametrize(
    ("options", "word"),
    [
        ({"text": "{stem}"}, "has no {options}"),
        ({"text": "{options}"}, "has no {stem}"),
        ({"text": "{stem}{options}{explanation}"}, "asks for {explanation}"),
        ({"text": "{stem"}, "no format string"),
        ({"text": HARNESS, "option": "{text}"}, "must hold"),
        ({"text": HARNESS, "num_shots": -1}, "negative"),
    ],
)
def test_template_that_cannot_work_is_refused(options, word):
    with pytest.raises(ConfigError) as caught:
        PromptTemplate(name="odd", **options)
    assert word in str(caught.value)
    assert "\n" not in str(caught.value)


# --- explanations as targets ----------------------------------------------------------------------


def test_explanation_follows_letter_and_prompt(tokenizer, harness):
    encoder = TextEncoder(tokenizer)
    ids = letter_ids(tokenizer, harness)
    asked = [
        question(1, explanation="the tongue"),
        question(2, explanation=None),
        question(3, explanation="x", answer=None),
    ]
    found = tokenize_questions(asked, harness, encoder, limit=999, letter_ids=ids, explain=True)
    parts = [
        found.tokens[a:b].tolist()
        for a, b in zip(found.offsets[:-1], found.offsets[1:], strict=True)
    ]
    prompts = encoder.encode_prompts([harness.render(one) for one in asked])
    tail = encoder.encode_texts(["\nthe tongue"])[0]
    assert parts[0] == [*prompts[0], ids[1], *tail, tokenizer.eos_token_id]
    assert parts[1] == [*prompts[1], ids[2], tokenizer.eos_token_id]
    assert parts[2] == prompts[2]
    assert found.prompt_lengths.tolist() == [len(prompt) for prompt in prompts]


def test_long_explanation_is_cut_and_the_letter_is_not(tokenizer, harness):
    encoder = TextEncoder(tokenizer)
    ids = letter_ids(tokenizer, harness)
    asked = question(1, explanation="nerve " * 500)
    length = len(encoder.encode_prompts([harness.render(asked)])[0])
    for limit in (length + 1, length + 9):
        found = tokenize_questions(
            [asked], harness, encoder, limit=limit, letter_ids=ids, explain=True
        )
        assert found.lengths.tolist() == [limit]
        assert found.tokens[length] == ids[1]
        assert found.num_cut_explanations == 1
        assert found.num_truncated == 0
