"""Prompts -> token ids: exactly one BOS, letters read from the tokenizer, over-long stems cut."""

from __future__ import annotations

import contextlib
import hashlib
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import chain, pairwise, takewhile
from pathlib import Path
from typing import Any

import numpy as np
from huggingface_hub import errors as hub
from huggingface_hub import hf_hub_download
from jaxtyping import Bool, Int, Int8, Int32, Int64
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from medqlora.data.prompts import Control, Prompt, PromptTemplate
from medqlora.errors import ConfigError, DataError, ModelError
from medqlora.hub import hub_error, offline_unless_reachable, resolve_path
from medqlora.schema import LETTERS, Question

CHUNK = 8192
"""Questions encoded in one call: enough for every core, little enough that memory stays flat."""


def load_tokenizer(path: str, revision: str | None = None) -> PreTrainedTokenizerFast:
    """Load the tokenizer of a model; code that comes with it is never run.

    Args:
        path: Hub name, folder, or `bundled:...`.
        revision: Commit, branch or tag on the hub; None for the newest.

    Returns:
        A tokenizer with the fast backend and a BOS token.

    Raises:
        ModelError: If it is gated, missing, out of reach, slow, or lacks BOS or EOS.
    """
    name = resolve_path(path)
    folder = Path(name).expanduser()
    if folder.is_dir():
        if not any((folder / f).is_file() for f in ("tokenizer.json", "tokenizer.model")):
            raise ModelError(
                f"the folder {path} holds neither tokenizer.json nor tokenizer.model: copy the "
                "tokenizer of the model into it."
            )
        tokenizer = _from_pretrained(str(folder), None, path)
    elif path != name or name.startswith((".", "/", "~")):
        raise ModelError(
            f"there is no folder {path} to read a tokenizer from: check model.path, or give the "
            "name of a model on the hub."
        )
    else:
        with offline_unless_reachable():
            _ask_hub(name, revision)
            tokenizer = _from_pretrained(name, revision, path)
    if not isinstance(tokenizer, PreTrainedTokenizerFast) or not tokenizer.is_fast:
        raise ModelError(
            f"the tokenizer of {path} has no fast backend: add its tokenizer.json, or choose "
            "another model."
        )
    for role in ("bos", "eos"):
        if getattr(tokenizer, f"{role}_token_id") is None:
            raise ModelError(
                f"the tokenizer of {path} has no {role.upper()} token, and a prompt starts with "
                "BOS: choose a model whose tokenizer_config.json names one, such as model=gemma_2b."
            )
    return tokenizer


def _from_pretrained(name: str, revision: str | None, path: str) -> Any:
    try:
        return AutoTokenizer.from_pretrained(name, revision=revision, trust_remote_code=False)
    except Exception as error:
        raise hub_error(error, f"tokenizer of model {path}") from error


def _ask_hub(name: str, revision: str | None) -> None:
    """Fetch one small file, because AutoTokenizer hides what the hub said behind a guess."""
    try:
        hf_hub_download(name, "tokenizer_config.json", revision=revision)
    except hub.LocalEntryNotFoundError as error:
        raise hub_error(error, f"model {name}") from error
    except hub.EntryNotFoundError:
        return
    except Exception as error:
        raise hub_error(error, f"model {name}") from error


class TextEncoder:
    """Text and control tokens -> token ids.

    Text is text: a question that contains the string `<bos>` or `<end_of_turn>` gets the tokens of
    its letters and signs, never the control token of that name.

    Attributes:
        tokenizer: The tokenizer; its settings are as before after every call.
        bos_id: Id of the token that starts every prompt.
        eos_id: Id of the token that ends an explanation.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerFast) -> None:
        bos, eos = tokenizer.bos_token_id, tokenizer.eos_token_id
        if not isinstance(bos, int) or not isinstance(eos, int):
            raise ModelError(
                "the tokenizer has no BOS or no EOS token, and a prompt starts with BOS: choose a "
                "model whose tokenizer_config.json names them, such as model=gemma_2b."
            )
        self.tokenizer = tokenizer
        self.bos_id = bos
        self.eos_id = eos
        self._backend = tokenizer.backend_tokenizer
        added = self._backend.get_added_tokens_decoder()
        # Runs of spaces and line breaks are added tokens of Gemma's and mean nothing but
        # themselves; the unknown token is what a text without letters of the vocabulary must
        # become.
        self._controls = {
            index: token.content
            for index, token in added.items()
            if token.content.strip() and index != tokenizer.unk_token_id
        }
        self._control_ids = set(self._controls)
        names = sorted(self._controls.values(), key=len, reverse=True)
        self._control_names = re.compile("|".join(map(re.escape, names)) or r"(?!)")

    @property
    def digest(self) -> str:
        """Hash of the whole tokenizer, with the tokens that start and end a text."""
        with self._as_text():
            content = f"{self.bos_id} {self.eos_id} {self._backend.to_str()}"
        return hashlib.sha256(content.encode()).hexdigest()

    def control_id(self, token: str) -> int:
        """Id of a control token.

        Raises:
            ModelError: If the tokenizer does not know it.
        """
        index = self._backend.token_to_id(token)
        if index is None or index == self.tokenizer.unk_token_id:
            raise ModelError(
                f"the tokenizer has no token {token}, which this prompt needs: choose "
                "prompt=harness, or a model with Gemma's tokenizer."
            )
        return index

    def encode_texts(self, texts: Sequence[str]) -> list[list[int]]:
        """Token ids of each text, without BOS and never with a control token."""
        with self._as_text():
            encodings = self._backend.encode_batch_fast(list(texts), add_special_tokens=False)
            encoded = [encoding.ids for encoding in encodings]
            for position, ids in enumerate(encoded):
                if not self._control_ids.isdisjoint(ids):
                    encoded[position] = self._encode_in_pieces(texts[position])
        return encoded

    def encode_prompts(self, prompts: Sequence[Prompt]) -> list[list[int]]:
        """Token ids of each prompt, with one BOS in front."""
        texts = [segment for prompt in prompts for segment in prompt if isinstance(segment, str)]
        encoded = iter(self.encode_texts(texts))
        result = []
        for prompt in prompts:
            ids = [self.bos_id]
            for segment in prompt:
                if isinstance(segment, Control):
                    ids.append(self.control_id(segment.token))
                else:
                    ids += next(encoded)
            result.append(ids)
        return result

    def _encode_in_pieces(self, text: str) -> list[int]:
        """Encode a text whose tokens included a control token, by breaking up the token's name.

        The name is cut after its first character. A normaliser can make a name out of other
        characters, or the vocabulary can hold it as a word: then halving the text breaks it up in
        the end.
        """
        cuts = [match.start() + 1 for match in self._control_names.finditer(text)]
        bounds = [0, *(cut for cut in cuts if cut < len(text)), len(text)]
        if len(bounds) == 2:
            if len(text) < 2:
                raise DataError(
                    f"the character {text!r} is a control token of this tokenizer and cannot be "
                    "asked about: remove it from the question, or choose another model."
                )
            bounds = [0, len(text) // 2, len(text)]
        ids: list[int] = []
        for start, end in pairwise(bounds):
            piece = text[start:end]
            part = self._backend.encode(piece, add_special_tokens=False).ids
            if not self._control_ids.isdisjoint(part):
                part = self._encode_in_pieces(piece)
            ids += part
        return ids

    @contextlib.contextmanager
    def _as_text(self) -> Iterator[None]:
        """Set the backend to plain text without padding or truncation, and back afterwards."""
        backend = self._backend
        before = backend.encode_special_tokens, backend.padding, backend.truncation
        backend.encode_special_tokens = True
        backend.no_padding()
        backend.no_truncation()
        try:
            yield
        finally:
            backend.encode_special_tokens = before[0]
            if before[1] is not None:
                backend.enable_padding(**before[1])
            if before[2] is not None:
                backend.enable_truncation(**before[2])


def letter_ids(
    tokenizer: PreTrainedTokenizerFast, prompt: PromptTemplate, num_options: int = 4
) -> tuple[int, ...]:
    """Ids of the answer letters as they follow the prompt, read from the tokenizer.

    Args:
        tokenizer: Fast tokenizer of the model.
        prompt: Template whose last segment the letter continues.
        num_options: Number of letters, 4 or 5.

    Returns:
        One id a letter, in option order.

    Raises:
        ModelError: If a letter is not exactly one token more than the prompt, or two letters share
            one.
    """
    encoder = TextEncoder(tokenizer)
    answers = LETTERS[:num_options]
    probe = Question("probe", "Which?", tuple("wxyzv"[:num_options]), 0)
    segments = prompt.without_shots().render(probe)
    tail = segments[-1]
    if not isinstance(tail, str):
        raise ModelError(
            f"prompt={prompt.name} ends in the control token {tail.token}, so no text can be "
            "continued by a letter: end it with text."
        )
    continued = [(*segments[:-1], tail + prompt.answer_prefix + letter) for letter in answers]
    context, *whole = encoder.encode_prompts([segments, *continued])
    ids = []
    for letter, tokens in zip(answers, whole, strict=True):
        if tokens[:-1] != context or tokens[-1] == tokenizer.unk_token_id:
            extra = len(tokens) - len(context)
            reason = (
                "is not in its vocabulary"
                if tokens[-1] == tokenizer.unk_token_id
                else f"takes {extra} tokens"
                if tokens[: len(context)] == context
                else "changes the tokens before it"
            )
            raise ModelError(
                f"the answer {prompt.answer_prefix + letter!r} {reason} after prompt={prompt.name} "
                "with this tokenizer, and each letter must be one token: choose another prompt, or "
                "a model such as model=gemma_2b."
            )
        ids.append(tokens[-1])
    if len(set(ids)) != len(ids):
        raise ModelError(
            f"two of the letters {', '.join(answers)} are the same token of this tokenizer, so "
            "they cannot be told apart: choose a model such as model=gemma_2b."
        )
    return tuple(ids)


PROBE_TEXTS = ("Which?", "a", "0", "(x", "é", "ж", "中", "-", ".", " ", "\n", "")
"""Stems and subjects whose tokens have no beginning in common."""


def shared_prefix(
    prompt: PromptTemplate, encoder: TextEncoder, num_options: int = 4
) -> Int32[np.ndarray, " shared"]:
    """Tokens with which every question begins: BOS, solved examples, what stands before the stem.

    Args:
        prompt: Template, with its solved questions.
        encoder: Tokenizer.
        num_options: Options of a question.
    """
    options = tuple("wxyzv"[:num_options])
    probes = [Question("probe", text, options, 0, subject_name=text) for text in PROBE_TEXTS]
    encoded = encoder.encode_prompts([prompt.render(probe) for probe in probes])
    same = takewhile(lambda ids: len(set(ids)) == 1, zip(*encoded, strict=False))
    return np.array([ids[0] for ids in same], dtype=np.int32)


@dataclass(frozen=True)
class TokenizedQuestions:
    """Token ids of many questions, end to end in flat arrays.

    Attributes:
        tokens: Ids; question `i` is `tokens[offsets[i] : offsets[i + 1]]`.
        offsets: Start of each question, then the end of the last.
        prompt_lengths: Tokens of each prompt; what follows it is an answer to learn.
        answer: Index of the right option, -1 where unknown.
        stem_cut: Whether the stem was cut to fit.
        explanation_cut: Whether the explanation was cut to fit.
    """

    tokens: Int32[np.ndarray, " token"]
    offsets: Int64[np.ndarray, " boundary"]
    prompt_lengths: Int32[np.ndarray, " question"]
    answer: Int8[np.ndarray, " question"]
    stem_cut: Bool[np.ndarray, " question"]
    explanation_cut: Bool[np.ndarray, " question"]

    def __len__(self) -> int:
        """Number of questions."""
        return len(self.answer)

    @property
    def lengths(self) -> Int64[np.ndarray, " question"]:
        """Tokens of each question."""
        return np.diff(self.offsets)

    @property
    def num_truncated(self) -> int:
        """Questions whose stem was cut."""
        return int(self.stem_cut.sum())

    @property
    def num_cut_explanations(self) -> int:
        """Explanations that were cut."""
        return int(self.explanation_cut.sum())

    def num_shared(self, prefix: Int32[np.ndarray, " shared"]) -> int:
        """How many tokens of a prefix every question begins with, and goes on behind."""
        shortest = int(self.prompt_lengths.min()) - 1 if len(self) else 0
        begins = takewhile(
            lambda place: (self.tokens[self.offsets[:-1] + place] == prefix[place]).all(),
            range(min(len(prefix), shortest)),
        )
        return sum(1 for _ in begins)

    def take(self, rows: Int[np.ndarray, " member"]) -> TokenizedQuestions:
        """The questions of some rows, in the order of `rows`."""
        if len(rows) == len(self) and np.array_equal(rows, np.arange(len(self))):
            return self
        lengths = self.lengths[rows]
        offsets = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64)
        shift = np.repeat(self.offsets[rows] - offsets[:-1], lengths)
        return replace(
            self,
            tokens=self.tokens[np.arange(offsets[-1]) + shift],
            offsets=offsets,
            prompt_lengths=self.prompt_lengths[rows],
            answer=self.answer[rows],
            stem_cut=self.stem_cut[rows],
            explanation_cut=self.explanation_cut[rows],
        )


def tokenize_questions(
    questions: Sequence[Question],
    prompt: PromptTemplate,
    encoder: TextEncoder,
    *,
    limit: int,
    letter_ids: Sequence[int] = (),
    explain: bool = False,
) -> TokenizedQuestions:
    """Tokenise questions, in batches and on every core.

    A question longer than `limit` loses the beginning of its stem, since what is asked stands at
    its end; options and answer cue stay whole. With `explain`, the prompt of a labelled question
    goes on with the letter, then a line break, the explanation and EOS; a long explanation is cut
    at its end.

    Args:
        questions: What to tokenise.
        prompt: Template, with its solved questions.
        encoder: Tokenizer.
        limit: Most tokens of a question.
        letter_ids: Ids of the letters; needed with `explain`.
        explain: Whether to append answer and explanation.

    Returns:
        The token ids, in the order of the questions.

    Raises:
        ConfigError: If a question does not fit although its stem is gone.
    """
    room = limit - 1 if explain else limit
    flat: list[np.ndarray] = []
    lengths = np.zeros(len(questions), dtype=np.int64)
    prompt_lengths = np.zeros(len(questions), dtype=np.int32)
    stem_cut = np.zeros(len(questions), dtype=bool)
    explanation_cut = np.zeros(len(questions), dtype=bool)
    for start in range(0, len(questions), CHUNK):
        chunk = questions[start : start + CHUNK]
        encoded = encoder.encode_prompts([prompt.render(question) for question in chunk])
        for position, ids in enumerate(encoded):
            if len(ids) > room:
                encoded[position] = _truncate(chunk[position], prompt, encoder, room, limit)
                stem_cut[start + position] = True
        prompt_lengths[start : start + len(chunk)] = [len(ids) for ids in encoded]
        if explain:
            tails = encoder.encode_texts([f"\n{question.explanation or ''}" for question in chunk])
            for position, (question, ids, tail) in enumerate(
                zip(chunk, encoded, tails, strict=True), start=start
            ):
                if question.answer is None:
                    continue
                answer = [letter_ids[question.answer]]
                if question.explanation:
                    answer += tail
                answer.append(encoder.eos_id)
                free = limit - len(ids)
                explanation_cut[position] = len(answer) > free
                ids += answer[:free]
        lengths[start : start + len(chunk)] = [len(ids) for ids in encoded]
        total = int(lengths[start : start + len(chunk)].sum())
        flat.append(np.fromiter(chain.from_iterable(encoded), dtype=np.int32, count=total))
    return TokenizedQuestions(
        tokens=np.concatenate(flat) if flat else np.zeros(0, dtype=np.int32),
        offsets=np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64),
        prompt_lengths=prompt_lengths,
        answer=np.array([-1 if q.answer is None else q.answer for q in questions], dtype=np.int8),
        stem_cut=stem_cut,
        explanation_cut=explanation_cut,
    )


def _truncate(
    question: Question, prompt: PromptTemplate, encoder: TextEncoder, room: int, limit: int
) -> list[int]:
    """Tokens of the question with the longest end of its stem that fits."""
    prompt = prompt.shown_to(question)  # a cut stem no longer tells that it is a solved one's

    def encode(kept: int) -> list[int]:
        stem = question.stem[len(question.stem) - kept :]
        return encoder.encode_prompts([prompt.render(replace(question, stem=stem))])[0]

    best = encode(0)
    if len(best) > room:
        raise ConfigError(
            f"data.token_budget or data.max_length allows {limit} tokens a question, and question "
            f"{question.id!r} needs {len(best) + limit - room} for its options alone: set it to at "
            f"least {len(best) + limit - room}."
        )
    # Token counts grow with the text but for merges at the cut, so what is kept was itself tried.
    low, high = 0, len(question.stem)
    while high - low > 1:
        middle = (low + high) // 2
        ids = encode(middle)
        if len(ids) <= room:
            low, best = middle, ids
        else:
            high = middle
    return best
