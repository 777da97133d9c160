"""Questions, files and a tokenizer small enough to make in a test."""

from __future__ import annotations

import gzip
import json
from pathlib import Path

from tokenizers import (
    AddedToken,
    Regex,
    Tokenizer,
    decoders,
    models,
    normalizers,
    pre_tokenizers,
    trainers,
)
from transformers import PreTrainedTokenizerFast

from medqlora.schema import Question

SHARED = Path(__file__).resolve().parents[3] / "shared" / "data"
HARNESS = "Question: {stem}\nChoices:\n{options}Answer:"
TEXTS = [
    "Question: Which nerve supplies the muscle of the tongue?\nChoices:\nA. Facial nerve\n"
    "B. Hypoglossal nerve\nC. Vagus nerve\nD. All of the above\nE. None\nAnswer:",
    "Question: All of the following are true about the liver except\nChoices:\nAnswer:",
    "user\nmodel\nSubject: Anatomy\n\nAnswer:",
]


def make_tokenizer(*, letters: str = "ABCDE") -> PreTrainedTokenizerFast:
    """A BPE tokenizer in Gemma's layout: byte fallback, no words, control tokens in front."""
    controls = ["<pad>", "<eos>", "<bos>", "<unk>", "<start_of_turn>", "<end_of_turn>"]
    learner = Tokenizer(models.BPE(unk_token="<unk>"))
    learner.normalizer = normalizers.Replace(" ", "▁")
    learner.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex("\n+"), "isolated"),
            pre_tokenizers.Split("▁", "merged_with_next"),
        ]
    )
    texts = [text for text in TEXTS for _ in range(3)] + [f"Answer: {x}" for x in letters] * 40
    learner.train_from_iterator(
        texts, trainers.BpeTrainer(vocab_size=500, special_tokens=controls, show_progress=False)
    )
    learned = json.loads(learner.to_str())["model"]
    vocab = dict(learned["vocab"])
    for byte in range(256):
        vocab[f"<0x{byte:02X}>"] = len(vocab)
    for piece in ("\n", "▁", "▁▁"):
        vocab.setdefault(piece, len(vocab))
    merges = [tuple(merge) for merge in learned["merges"]]
    tokenizer = Tokenizer(
        models.BPE(vocab, merges, unk_token="<unk>", byte_fallback=True, fuse_unk=True)
    )
    tokenizer.normalizer = normalizers.Replace(" ", "▁")
    tokenizer.pre_tokenizer = pre_tokenizers.Split(" ", "merged_with_previous")
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    )
    tokenizer.add_special_tokens([AddedToken(token, special=True) for token in controls[:4]])
    # Gemma's turn markers are added tokens, but not special ones in every copy of its tokenizer.
    tokenizer.add_tokens([AddedToken(token, special=False) for token in controls[4:]])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<pad>",
        eos_token="<eos>",
        bos_token="<bos>",
        unk_token="<unk>",
    )


def raw_row(number: int, **changes) -> dict:
    """A row in MedMCQA's columns; rows of different numbers differ in everything."""
    row = {
        "id": f"q{number}",
        "question": f"Which nerve number {number} supplies muscle {number * 7 % 31}?",
        "opa": f"Facial {number}",
        "opb": f"Vagus {number}",
        "opc": f"Optic {number}",
        "opd": f"Ulnar {number}",
        "cop": number % 4,
        "choice_type": "single",
        "subject_name": "Anatomy",
        "topic_name": None,
        "exp": f"SECRET{number} is why.",
    }
    return row | changes


def write_jsonl(path: Path, rows: list[dict]) -> str:
    """Write rows as JSON lines, gzipped if the name says so."""
    text = "".join(json.dumps(row) + "\n" for row in rows)
    if path.name.endswith(".gz"):
        path.write_bytes(gzip.compress(text.encode()))
    else:
        path.write_text(text)
    return str(path)


def question(number: int = 0, **changes) -> Question:
    """A labelled question."""
    values = {
        "id": f"q{number}",
        "stem": f"Which nerve {number}?",
        "options": ("Facial", "Vagus", "Optic", "Ulnar"),
        "answer": number % 4,
    }
    return Question(**(values | changes))
