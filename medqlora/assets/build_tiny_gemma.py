"""The tiny base model: a tokenizer in Gemma's layout and a Gemma of two million parameters.

    python -m medqlora.assets.build_tiny_gemma --device cuda

Both are made from the bundled facts and the train split alone. The model reads the facts and their
explanations, answers the questions of train in words, learns the form of a multiple-choice question
from questions that name the option they ask for, and joins the two on half of the facts.
Fine-tuning then has the other half to teach. It is a real `GemmaForCausalLM`; only its size and
its schooling are small. On a GPU it takes two minutes, on two CPU cores two hours.
"""

from __future__ import annotations

import argparse
import json
import math
import random
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from jaxtyping import Int
from tokenizers import AddedToken, Regex, Tokenizer, decoders, normalizers, pre_tokenizers
from tokenizers import processors as post_processors
from tokenizers.models import BPE
from tokenizers.trainers import BpeTrainer
from torch import Tensor, nn
from transformers import GemmaConfig, GemmaForCausalLM, GenerationConfig

from medqlora.assets.build_sample import Fact, Row, build_rows, check_split_law, read_facts

TINY_GEMMA_DIR = Path(__file__).resolve().parent / "tiny_gemma"
"""Where the built model and its tokenizer lie."""

SEED = 7
LETTERS = "ABCD"
SPECIAL_TOKENS = (
    "<pad>", "<eos>", "<bos>", "<unk>", "<mask>", "<start_of_turn>", "<end_of_turn>",
)  # fmt: skip
"""In the order of their ids; the first five are where Gemma has them."""

PAD_ID, EOS_ID, BOS_ID, UNK_ID = 0, 1, 2, 3
IGNORE = -100
VOCAB_SIZE = 3072

NUM_DOCUMENTS = 200_000
NUM_STEPS = 2500
BATCH_SIZE = 256
LEARNING_RATE = 3e-3
WARMUP_STEPS = 200
LETTER_WEIGHT = 2.0
"""Weight of an answer letter beside that of any other token."""

MAX_LENGTH = 128
SCHOOLED = 0.5
"""Part of the facts whose multiple-choice questions are in the corpus."""

SHARES = {"statement": 0.1, "open": 0.1, "choice": 0.6, "lookup": 0.2}
"""Kinds of documents, by number."""

LOOKUPS = (
    "Which of these is {}?",
    "Choose {}",
    "Where does it say {}?",
    "The option that reads {} is",
    "Pick out {} from the list.",
    "{}",
)
"""Questions that name the option they ask for: they need no knowledge."""


@dataclass(frozen=True, slots=True)
class Document:
    """A text of the corpus.

    Attributes:
        prompt: What is read but not learnt.
        target: What is learnt, the end of the text included unless it is a letter.
    """

    prompt: str
    target: str


def gemma_config(vocab_size: int) -> GemmaConfig:
    """A small Gemma: every width a multiple of 64, so that NF4 blocks end where rows end."""
    return GemmaConfig(
        vocab_size=vocab_size,
        hidden_size=128,
        intermediate_size=512,
        num_hidden_layers=6,
        num_attention_heads=4,
        num_key_value_heads=1,
        head_dim=32,
        hidden_act="gelu_pytorch_tanh",
        max_position_embeddings=2048,
        pad_token_id=PAD_ID,
        eos_token_id=EOS_ID,
        bos_token_id=BOS_ID,
        tie_word_embeddings=True,
        attention_bias=False,
    )


def train_tokenizer(texts: Sequence[str], vocab_size: int = VOCAB_SIZE) -> Tokenizer:
    """Byte-pair encoding in Gemma's layout: no space in front, digits apart, bytes for the rest."""
    letters = [f"▁{letter}" for letter in LETTERS]
    tokenizer = Tokenizer(BPE(unk_token="<unk>", fuse_unk=True, byte_fallback=True))
    tokenizer.normalizer = normalizers.Replace(" ", "▁")
    # Pieces are learnt within words, and a space goes with the word behind it. The finished
    # tokenizer needs no such border: no merge crosses one.
    tokenizer.pre_tokenizer = pre_tokenizers.Split(
        Regex(r"▁?\p{L}+|▁?\d|\n|▁?[^\s\p{L}\d▁]|▁"), behavior="isolated"
    )
    head = [*SPECIAL_TOKENS, *(f"<0x{byte:02X}>" for byte in range(256))]
    trainer = BpeTrainer(
        vocab_size=vocab_size, special_tokens=head, min_frequency=2, show_progress=False
    )
    # The letters are repeated often enough to be merged with their space first.
    tokenizer.train_from_iterator([*texts, *letters * len(texts)], trainer)
    state = json.loads(tokenizer.to_str())["model"]
    model = BPE(
        vocab=state["vocab"],
        merges=[tuple(merge) for merge in state["merges"]],
        unk_token="<unk>",
        fuse_unk=True,
        byte_fallback=True,
    )
    finished = Tokenizer(model)
    finished.normalizer = normalizers.Replace(" ", "▁")
    finished.pre_tokenizer = pre_tokenizers.Split(" ", behavior="merged_with_previous")
    finished.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    )
    finished.post_processor = post_processors.TemplateProcessing(
        single="<bos> $A", pair="<bos> $A <bos>:1 $B:1", special_tokens=[("<bos>", BOS_ID)]
    )
    finished.add_special_tokens(
        [AddedToken(token, normalized=False, special=True) for token in SPECIAL_TOKENS]
    )
    return finished


def save_tokenizer(tokenizer: Tokenizer, directory: Path) -> None:
    """Write the three files that `AutoTokenizer` reads as a Gemma tokenizer."""
    flags = dict.fromkeys(("lstrip", "normalized", "rstrip", "single_word"), False)
    names = dict(
        zip(
            ("pad_token", "eos_token", "bos_token", "unk_token", "mask_token"),
            SPECIAL_TOKENS,
            strict=False,
        )
    )
    config = {
        "add_bos_token": True,
        "add_eos_token": False,
        "added_tokens_decoder": {
            str(index): {"content": token, **flags, "special": True}
            for index, token in enumerate(SPECIAL_TOKENS)
        },
        **names,
        "clean_up_tokenization_spaces": False,
        "model_max_length": 2048,
        "spaces_between_special_tokens": False,
        "tokenizer_class": "GemmaTokenizer",
    }
    special = {name: {"content": token, **flags} for name, token in names.items()}
    tokenizer.save(str(directory / "tokenizer.json"))
    _write_json(directory / "tokenizer_config.json", config)
    _write_json(directory / "special_tokens_map.json", special)


def question_text(stem: str, options: Sequence[str]) -> str:
    """The prompt of conf/prompt/harness.yaml."""
    lines = "".join(
        f"{letter}. {option}\n" for letter, option in zip(LETTERS, options, strict=True)
    )
    return f"Question: {stem}\nChoices:\n{lines}Answer:"


def tokenizer_texts(facts: Sequence[Fact], train: Sequence[Row]) -> list[str]:
    """What the pieces are learnt from: statements, explanations and the train split."""
    texts = [text for fact in facts for text in (fact.fact, fact.explanation)]
    texts += [question_text(row["question"], [row[f"op{x}"] for x in "abcd"]) for row in train]
    return texts


def build_corpus(
    facts: Sequence[Fact], train: Sequence[Row], num_documents: int, seed: int = SEED
) -> list[Document]:
    """Draw the documents of the corpus.

    Only wordings of train are used, so no question of val or test is ever read.

    Args:
        facts: The facts.
        train: Rows of the train split.
        num_documents: Documents to draw.
        seed: Decides all that is drawn.
    """
    rng = random.Random(seed)
    stems: dict[str, list[str]] = {}
    for row in train:
        known = stems.setdefault(row["id"].rpartition("-")[0], [])
        if row["question"] not in known:
            known.append(row["question"])
    schooled = [fact for i, fact in enumerate(facts) if (i * 37) % 100 < 100 * SCHOOLED]
    everything = sorted({text for fact in facts for text in (fact.answer, *fact.distractors)})
    kinds, weights = list(SHARES), list(SHARES.values())
    documents = []
    for kind in rng.choices(kinds, weights, k=num_documents):
        fact = rng.choice(schooled if kind == "choice" else facts)
        if kind == "statement":
            documents.append(Document("", f"{fact.fact} {fact.explanation}"))
        elif kind == "open":
            stem = rng.choice(stems[fact.id])
            documents.append(Document(f"Question: {stem}\nAnswer:", f" {fact.answer}"))
        else:
            if kind == "choice":
                options = [fact.answer, *rng.sample(fact.distractors, 3)]
                rng.shuffle(options)
                answer, stem = options.index(fact.answer), rng.choice(stems[fact.id])
            else:
                pool = everything if rng.random() < 0.5 else [fact.answer, *fact.distractors]
                options, answer = rng.sample(pool, 4), rng.randrange(4)
                stem = rng.choice(LOOKUPS).format(options[answer])
            documents.append(Document(question_text(stem, options), f" {LETTERS[answer]}"))
    return documents


def encode_corpus(
    documents: Sequence[Document], tokenizer: Tokenizer
) -> tuple[Int[Tensor, "document token"], Int[Tensor, "document token"], Int[Tensor, " document"]]:
    """Tokens, next tokens to learn (-100: none) and lengths, the shortest document first."""
    prompts = tokenizer.encode_batch([d.prompt for d in documents], add_special_tokens=False)
    targets = tokenizer.encode_batch([d.target for d in documents], add_special_tokens=False)
    ids = torch.full((len(documents), MAX_LENGTH), PAD_ID, dtype=torch.int16)
    labels = torch.full((len(documents), MAX_LENGTH), IGNORE, dtype=torch.int16)
    lengths = torch.zeros(len(documents), dtype=torch.int64)
    for row, (document, prompt, target) in enumerate(zip(documents, prompts, targets, strict=True)):
        learnt = target.ids if document.target.strip() in LETTERS else [*target.ids, EOS_ID]
        text = [BOS_ID, *prompt.ids, *learnt[:-1]][:MAX_LENGTH]
        wanted = ([IGNORE] * len(prompt.ids) + learnt)[:MAX_LENGTH]
        ids[row, : len(text)] = torch.tensor(text)
        labels[row, : len(wanted)] = torch.tensor(wanted)
        lengths[row] = len(text)
    order = lengths.argsort(stable=True)
    return ids[order], labels[order], lengths[order]


def pretrain(
    model: GemmaForCausalLM,
    tokenizer: Tokenizer,
    documents: Sequence[Document],
    *,
    device: torch.device,
    num_steps: int = NUM_STEPS,
    seed: int = SEED,
) -> None:
    """Train from scratch: AdamW, a short warm-up, half a cosine down to zero.

    Args:
        model: A Gemma with random weights, on `device`.
        tokenizer: Its tokenizer.
        documents: The corpus.
        device: Where to train.
        num_steps: Updates, each on `BATCH_SIZE` documents of like length.
        seed: Decides the order of the batches.
    """
    ids, labels, lengths = encode_corpus(documents, tokenizer)
    ids, labels = ids.to(device), labels.to(device)
    letters = torch.tensor([tokenizer.token_to_id(f"▁{x}") for x in LETTERS], device=device)
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=LEARNING_RATE, betas=(0.9, 0.98), weight_decay=0.05
    )
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer,
        lambda step: (
            min(1.0, (step + 1) / WARMUP_STEPS) * (0.5 + 0.5 * math.cos(math.pi * step / num_steps))
        ),
    )
    generator = torch.Generator().manual_seed(seed)
    model.train()
    started = time.time()
    for step in range(1, num_steps + 1):
        first = int(torch.randint(0, len(ids) - BATCH_SIZE + 1, (1,), generator=generator))
        rows = slice(first, first + BATCH_SIZE)
        # A few widths only, so that memory is reused.
        width = 8 * -(-int(lengths[rows][-1]) // 8)
        wanted = labels[rows, :width].long().flatten()
        learnt = (wanted != IGNORE).nonzero()[:, 0]
        wanted = wanted[learnt]
        with torch.autocast(device.type, dtype=torch.bfloat16):
            output = model.model(input_ids=ids[rows, :width].long(), use_cache=False)
            hidden = output.last_hidden_state.flatten(0, 1)[learnt]
            logits = model.lm_head(hidden).float()
        losses = F.cross_entropy(logits, wanted, reduction="none")
        weights = torch.where(torch.isin(wanted, letters), LETTER_WEIGHT, 1.0)
        ((losses * weights).sum() / weights.sum()).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        if step % 250 == 0:
            print(
                f"step {step}/{num_steps}  loss {losses.mean().item():.3f}  "
                f"{time.time() - started:.0f} s",
                flush=True,
            )


def save_model(model: GemmaForCausalLM, directory: Path) -> None:
    """Write config.json, generation_config.json and bfloat16 safetensors."""
    model.generation_config = GenerationConfig(
        bos_token_id=BOS_ID, eos_token_id=EOS_ID, pad_token_id=PAD_ID
    )
    nn.Module.to(model.eval(), torch.bfloat16)
    model.save_pretrained(directory)


def main() -> None:
    """Build tokenizer and model and write them."""
    parser = argparse.ArgumentParser(description="Build the tiny base model.")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--output", type=Path, default=TINY_GEMMA_DIR)
    parser.add_argument("--steps", type=int, default=NUM_STEPS)
    arguments = parser.parse_args()
    facts = read_facts()
    rows = build_rows(facts)
    check_split_law(rows)
    arguments.output.mkdir(parents=True, exist_ok=True)
    tokenizer = train_tokenizer(tokenizer_texts(facts, rows["train"]))
    save_tokenizer(tokenizer, arguments.output)
    device = torch.device(arguments.device)
    torch.manual_seed(SEED)
    model = GemmaForCausalLM(gemma_config(tokenizer.get_vocab_size()))
    nn.Module.to(model, device)
    documents = build_corpus(facts, rows["train"], NUM_DOCUMENTS)
    print(
        f"{sum(p.numel() for p in model.parameters()):,} parameters, {len(documents):,} documents"
    )
    pretrain(model, tokenizer, documents, device=device, num_steps=arguments.steps)
    save_model(model, arguments.output)


def _write_json(path: Path, content: object) -> None:
    path.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
