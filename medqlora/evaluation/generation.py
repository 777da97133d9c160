"""Answers as generated text: letters read from replies, padded batches for stock `generate`.

For models that were tuned to reply in words. What cannot be read as one letter counts as no letter.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from transformers import (
    GenerationConfig,
    LogitsProcessor,
    LogitsProcessorList,
    PreTrainedModel,
)

from medqlora.evaluation.results import replace_file
from medqlora.evaluation.statistics import wilson_interval
from medqlora.schema import LETTERS, PackedBatch, Prediction

GENERATIONS_FILE = "generations.jsonl"

_LETTER = rf"[{LETTERS}{LETTERS.lower()}]"
_CAPITAL = f"[{LETTERS}]"
# "**B**", "`B`", "\boxed{B}": marks that a chat model puts around what it means.
_MARKUP = re.compile(r"\\boxed|\\text|[*_`#${}]")
# A base model goes on with a question of its own, whose answer is not ours.
_NEXT_QUESTION = re.compile(r"(?:^|\n)\s*(?:question|q)\s*\d*\s*[:.)]", re.IGNORECASE)
_LEADING = re.compile(rf"^[\s(\[\"']*({_LETTER})(?=[\s]*$|\s*\n|[.):,;\]]|[\"'](?!\w))")
# "E. coli" and "C. difficile" begin with no letter of an option.
_ABBREVIATED = re.compile(rf"^({_CAPITAL})\.\s+([a-z]\w*)")
_LEADING_DASH = re.compile(rf"^[\s(\[\"']*({_CAPITAL})\s+[-\u2013\u2014=]\s")
_STATED = re.compile(
    r"\b(?:answer|option|choice|letter)\b(?:\s+(?:is|would\s+be|should\s+be|must\s+be))?"
    rf"\s*:?\s*(?:option\s+|letter\s+)?[(\[\"']?({_CAPITAL})\b(?![\u2019']\w)",
    re.IGNORECASE,
)
_NEGATED = re.compile(r"\b(?:not|n't|isn't|never|neither|except)\b[^.\n]{0,20}$", re.IGNORECASE)
_SEVERAL = re.compile(
    rf"^[\s(\[\"']*{_CAPITAL}[).\]]?\s*(?:,|&|/|\+|\band\b|\bor\b)\s*[(\[]?{_CAPITAL}\b"
)


def parse_letter(reply: str, options: Sequence[str]) -> int | None:
    """The one option that a reply names, or None.

    Read in this order, up to where the reply starts a question of its own:

    1. a first line that is the text of exactly one option, perhaps after its letter;
    2. a letter at the very start, alone or before a full stop, bracket, colon or comma;
    3. "answer", "option", "choice" or "letter" followed by a capital letter ("The answer is (B)"),
       unless negated; several such places must agree.

    A reply that starts with several letters ("A and C") or states them ("The answer is A or C")
    names none. Neither the article in "A patient ..." nor the genus in "E. coli" is a letter.

    Args:
        reply: What was generated after the prompt, without control tokens.
        options: Texts of the options, in the order of `LETTERS`.

    Returns:
        Index of the option; None where no rule or more than one option applies.
    """
    text = _NEXT_QUESTION.split(_MARKUP.sub("", reply), maxsplit=1)[0].strip()
    if not text or _SEVERAL.match(text):
        return None
    first = _plain(text.splitlines()[0])
    texts = [_plain(option) for option in options]
    same = [
        index
        for index, option in enumerate(texts)
        if len(option) > 1 and first in (option, f"{LETTERS[index].lower()} {option}")
    ]
    if same:
        return same[0] if len(same) == 1 else None
    if (found := _LEADING.match(text) or _LEADING_DASH.match(text)) and not _genus(text, texts):
        return _index(found.group(1), len(options))
    stated = set()
    for match in _STATED.finditer(text):
        if match.group(1).isupper() and not _NEGATED.search(text[: match.start()]):
            if _SEVERAL.match(text[match.start(1) :]):
                return None
            stated.add(match.group(1))
    return _index(stated.pop(), len(options)) if len(stated) == 1 else None


def _genus(text: str, options: Sequence[str]) -> bool:
    """Whether the text begins with an abbreviated name and not with a letter and its option."""
    found = _ABBREVIATED.match(text)
    if found is None:
        return False
    index = _index(found.group(1), len(options))
    return index is None or not options[index].startswith(found.group(2))


def _index(letter: str, num_options: int) -> int | None:
    index = LETTERS.index(letter.upper())
    return index if index < num_options else None


def _plain(text: str) -> str:
    """Lower-case words with single spaces, signs at the ends left out."""
    return " ".join(text.casefold().split()).strip(" .,:;!?()[]\"'")


def unpack(batch: PackedBatch) -> Iterator[tuple[int, list[int]]]:
    """Row number and prompt tokens of each question of a packed row."""
    tokens, starts = batch.input_ids.tolist(), batch.cu_seqlens.tolist()
    shared = tokens[: batch.prefix_length]
    for place, index in enumerate(batch.index.tolist()):
        if index >= 0:
            yield index, shared + tokens[starts[place] : int(batch.last[place]) + 1]


def left_pad(
    prompts: Sequence[Sequence[int]], pad_id: int
) -> tuple[Int[Tensor, "question token"], Int[Tensor, "question token"]]:
    """Prompts of different lengths as one batch that ends in the last token of each.

    Args:
        prompts: Token ids, each at least one.
        pad_id: What goes in front of the shorter ones.

    Returns:
        Ids, and a mask that is 0 on the padding.
    """
    width = max(len(prompt) for prompt in prompts)
    ids = torch.full((len(prompts), width), pad_id)
    mask = torch.zeros(len(prompts), width, dtype=torch.int64)
    for row, prompt in enumerate(prompts):
        ids[row, width - len(prompt) :] = torch.tensor(list(prompt))
        mask[row, width - len(prompt) :] = 1
    return ids, mask


class _OnlyLetters(LogitsProcessor):
    """Leaves nothing but the letters to choose from."""

    def __init__(self, letter_ids: Sequence[int]) -> None:
        self.letter_ids = list(letter_ids)

    def __call__(self, input_ids: Any, scores: Any) -> Any:
        allowed = torch.full_like(scores, float("-inf"))
        allowed[:, self.letter_ids] = scores[:, self.letter_ids]
        return allowed


class Generator:
    """Greedy replies of stock `generate`, on left-padded batches.

    Args:
        model: A causal language model with ordinary attention, with or without a PEFT adapter.
        letter_ids: Token ids of the answer letters.
        tokenizer: Turns replies into text.
        stop_ids: Tokens that end a reply.
        pad_id: Padding.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        *,
        letter_ids: Sequence[int],
        tokenizer: Any,
        stop_ids: Sequence[int],
        pad_id: int,
    ) -> None:
        self.model = model
        self.letter_ids = list(letter_ids)
        self.tokenizer = tokenizer
        self.stop_ids = list(stop_ids)
        self.pad_id = pad_id

    def letters(
        self, prompts: Sequence[Sequence[int]]
    ) -> tuple[Int[Tensor, " question"], Float[Tensor, "question letter"]]:
        """One token each, with every other token than the letters forbidden.

        Args:
            prompts: Token ids of the prompts.

        Returns:
            Index of the letter written, and the log-probabilities of the letters in nats, both on
            the CPU. Logits come in the dtype the model computes in: in bfloat16 letters may tie.
        """
        index = torch.zeros(len(prompts), dtype=torch.int64)
        scores = torch.zeros(len(prompts), len(self.letter_ids))
        ids = torch.tensor(self.letter_ids)
        for rows in self._groups(prompts):
            output: Any = self._generate(
                [prompts[row] for row in rows],
                1,
                logits_processor=LogitsProcessorList([_OnlyLetters(self.letter_ids)]),
                output_logits=True,
                return_dict_in_generate=True,
            )
            written = output.sequences[:, -1].cpu()
            logits = output.logits[0][:, self.letter_ids].float().cpu()
            index[rows] = (written[:, None] == ids).int().argmax(dim=-1)
            scores[rows] = torch.log_softmax(logits, dim=-1)
        return index, scores

    def replies(self, prompts: Sequence[Sequence[int]], max_new_tokens: int) -> list[str]:
        """Free greedy replies as text, without control tokens."""
        texts = [""] * len(prompts)
        for rows in self._groups(prompts):
            output: Any = self._generate([prompts[row] for row in rows], max_new_tokens)
            new = output[:, max(len(prompts[row]) for row in rows) :].cpu()
            for row, text in zip(
                rows, self.tokenizer.batch_decode(new, skip_special_tokens=True), strict=True
            ):
                texts[row] = text
        return texts

    def _groups(self, prompts: Sequence[Sequence[int]]) -> list[list[int]]:
        """Which prompts go together: all, unless padding would come behind learned tokens.

        peft puts the virtual tokens of prompt learning in front of the padding and counts positions
        through it, so those prompts are never padded.
        """
        config = getattr(self.model, "active_peft_config", None)
        if config is None or not config.is_prompt_learning:
            return [list(range(len(prompts)))]
        by_length: dict[int, list[int]] = {}
        for row, prompt in enumerate(prompts):
            by_length.setdefault(len(prompt), []).append(row)
        return list(by_length.values())

    def _generate(self, prompts: Sequence[Sequence[int]], max_new_tokens: int, **options: Any):
        ids, mask = left_pad(prompts, self.pad_id)
        device, dtype = self.model.device, self.model.dtype
        config = GenerationConfig(
            do_sample=False,
            num_beams=1,
            max_new_tokens=max_new_tokens,
            eos_token_id=self.stop_ids,
            pad_token_id=self.pad_id,
        )
        half = dtype in (torch.bfloat16, torch.float16)
        # An adapter kept in float32 on a 16-bit base, as in training.
        with (
            torch.inference_mode(),
            torch.autocast(device.type, dtype if half else torch.bfloat16, enabled=half),
        ):
            return self.model.generate(  # pyright: ignore[reportCallIssue]
                input_ids=ids.to(device),
                attention_mask=mask.to(device),
                generation_config=config,
                **options,
            )


@dataclass(frozen=True, slots=True)
class Reply:
    """What a model wrote about one question.

    Attributes:
        id: The question's identifier.
        split: Its split.
        answer: Index of the right option, None where unknown.
        letter: Index of the option the reply names; None where it could not be read.
        text: The reply.
    """

    id: str
    split: str
    answer: int | None
    letter: int | None
    text: str


def write_replies(run_dir: str | Path, replies: Sequence[Reply]) -> Path:
    """Write generations.jsonl whole or not at all: one line a question, letters by name."""
    lines = [
        json.dumps(
            {
                "id": reply.id,
                "split": reply.split,
                "answer": _name(reply.answer),
                "letter": _name(reply.letter),
                "reply": reply.text,
            },
            ensure_ascii=False,
        )
        for reply in replies
    ]
    path = Path(run_dir) / GENERATIONS_FILE
    replace_file(path, lambda file: file.write_text("\n".join(lines) + "\n", encoding="utf-8"))
    return path


def _name(index: int | None) -> str | None:
    return None if index is None else LETTERS[index]


def summarise_replies(
    letters: Sequence[int | None], predictions: Sequence[Prediction]
) -> dict[str, Any]:
    """Accuracy of generated letters; a reply that names none is wrong and counts for no letter.

    Args:
        letters: Option each reply names, None where it could not be read.
        predictions: Letter scores of the same questions, in the same order.

    Returns:
        `n` (labelled questions), `accuracy` with `ci_low` and `ci_high` over all of those,
        `num_unparsed` and `unparsed_fraction` of all replies, `letter_share` (fractions of all
        replies, which add up to 1 minus the unparsed), `n_parsed` and `accuracy_parsed` over the
        labelled ones that could be read, `agreement` (fraction of the read ones that name the
        letter of the highest score), `confusion` (rows are answers, columns letters, then
        unparsed). None where nothing is labelled, or nothing was read.
    """
    k = len(predictions[0].scores) if predictions else len(LETTERS)
    # An unread reply has the column behind the letters.
    chosen = np.array([k if letter is None else letter for letter in letters], dtype=np.int64)
    answer = np.array([-1 if p.answer is None else p.answer for p in predictions], dtype=np.int64)
    scored = np.array([p.prediction for p in predictions], dtype=np.int64)
    total = max(len(chosen), 1)
    labelled, read = answer >= 0, chosen < k
    confusion = np.zeros((k, k + 1), dtype=np.int64)
    np.add.at(confusion, (answer[labelled], chosen[labelled]), 1)
    section: dict[str, Any] = {
        **_accuracy(chosen[labelled] == answer[labelled]),
        "num_unparsed": int((~read).sum()),
        "unparsed_fraction": float((~read).sum() / total),
        "letter_share": [float((chosen == letter).sum() / total) for letter in range(k)],
        "agreement": float((chosen == scored)[read].mean()) if read.any() else None,
        "confusion": confusion.tolist() if labelled.any() else None,
    }
    parsed = _accuracy((chosen == answer)[labelled & read])
    return section | {"n_parsed": parsed["n"], "accuracy_parsed": parsed["accuracy"]}


def _accuracy(correct: Bool[np.ndarray, " question"]) -> dict[str, Any]:
    n = len(correct)
    if n == 0:
        return {"n": 0, "accuracy": None, "ci_low": None, "ci_high": None}
    low, high = wilson_interval(int(correct.sum()), n)
    return {"n": n, "accuracy": float(correct.mean()), "ci_low": low, "ci_high": high}
