"""Questions of every split, packed for training and scoring."""

from __future__ import annotations

import hashlib
import logging
import os
import re
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

import numpy as np
import torch
from jaxtyping import Int, Int32
from lightning.pytorch import LightningDataModule
from transformers import PreTrainedTokenizerFast

from medqlora.data import cache
from medqlora.data.audit import AuditReport, audit_rows, find, near_duplicates, options_key
from medqlora.data.augmentation import OptionShuffle
from medqlora.data.medmcqa import (
    cut_groups,
    dataset_sha256,
    group_of,
    parse_rows,
    question_digest,
    sample_rows,
)
from medqlora.data.packing import (
    ROW_COST,
    PackedLoader,
    RowPlan,
    build_row,
    full_budgets,
    max_questions_of,
)
from medqlora.data.prompts import PromptTemplate
from medqlora.data.readers import RawRows, read_hub, read_rows
from medqlora.data.tokenization import (
    TextEncoder,
    TokenizedQuestions,
    letter_ids,
    shared_prefix,
    tokenize_questions,
)
from medqlora.errors import CheckpointError, ConfigError, DataError
from medqlora.hub import resolve_path
from medqlora.schema import PackedBatch, Question

log = logging.getLogger(__name__)

SPLITS: tuple[str, ...] = ("train", "val", "test")
_COMMIT = re.compile(r"[0-9a-f]{40}")


@dataclass(frozen=True)
class _Source:
    """The questions of a data set before they are dropped, cut and limited."""

    questions: list[Question]
    splits: np.ndarray
    groups: np.ndarray
    digests: list[bytes]


class MedMCQADataModule(LightningDataModule):
    """MedMCQA, or any data set in its columns, as packed rows of fixed shape.

    The source is a hub copy (`hub`) or files. With `splits="official"` each file or hub split is
    what its name says, `val` being cut from train where there is none; with `splits="pool"` all
    labelled rows are pooled and cut anew. Cuts keep copies of a question together, so that none
    stands on both sides, and depend on the seed and the set of rows, not on their order.

    Args:
        name: Name for tables and `metrics.json`.
        tokenizer: Tokenizer of the base model.
        prompt: Template of the questions.
        seed: Seed of the cut and of the shuffles.
        hub: Name of a data set on the hub with the splits train and validation; None for files.
        revision: Commit of the hub copy.
        train_file: File of training questions; None leaves the split out.
        val_file: Likewise for val.
        test_file: Likewise for test.
        splits: "official" or "pool".
        num_val: Questions of val that are cut from train; 0 cuts none.
        num_test: Questions of test that are cut from the pool.
        token_budget: Tokens of a training row.
        eval_token_budget: Tokens of a val or test row; None for the same, "auto" for what scores
            them in the least time, `most_eval_tokens` at most.
        max_length: Most tokens of a question; None for `token_budget`.
        limit_train: Questions of train that are used; None for all, 0 leaves the split out.
        limit_val: Likewise for val.
        limit_test: Likewise for test.
        label_base: Value of `cop` that means the first option, 0 or 1; None to find it.
        ignore_columns: Unknown columns that are let pass.
        drop: Names of audit findings whose rows are left out of every split.
        decontaminate: Whether training questions that all but repeat a val or test question are
            left out.
        share_prefix: Whether the tokens with which all prompts begin stand in a row once instead of
            before each question: the same answers for less.
        shuffle_options: Whether each epoch shows the options of a training question in another
            order; see `OptionShuffle`.
        targets: "answer", or "explanation" to append answer and explanation to training questions.
        num_workers: Processes that build rows; building one takes microseconds, so 0 will do.
        pin_memory: Whether batches lie in page-locked memory; None for where there is CUDA.
        cache_dir: Folder of the Arrow cache; None for MEDQLORA_CACHE or `~/.cache/medqlora`.
        most_eval_tokens: Longest row that "auto" may choose; None for `token_budget`.
        rank: Number of this process, where no trainer tells.
        world_size: Number of processes, where no trainer tells.
        kept: Where what was read and tokenised is shared with other data modules of this process;
            None for nowhere.

    Attributes:
        questions: Questions by split, after `setup`; a split that was left out is absent.
        letter_ids: Token ids of the answer letters.
        num_options: Options of every question.
        sha256: Hash of the questions in use, whatever their order.
        dropped: Questions left out, by finding.
        num_truncated: Questions in use whose stem was cut to fit.
        max_length: Upper bound of a question's tokens, a multiple of 64 but for the budget.
        max_questions: Places of a training row.
        setup_seconds: Duration of `setup`.

    Raises:
        ConfigError: If options contradict each other or cannot take effect.
    """

    def __init__(
        self,
        name: str,
        *,
        tokenizer: PreTrainedTokenizerFast,
        prompt: PromptTemplate,
        seed: int,
        hub: str | None = None,
        revision: str | None = None,
        train_file: str | None = None,
        val_file: str | None = None,
        test_file: str | None = None,
        splits: Literal["official", "pool"] = "official",
        num_val: int = 0,
        num_test: int = 0,
        token_budget: int = 2048,
        eval_token_budget: int | Literal["auto"] | None = None,
        max_length: int | None = None,
        limit_train: int | None = None,
        limit_val: int | None = None,
        limit_test: int | None = None,
        label_base: int | None = None,
        ignore_columns: Sequence[str] = (),
        drop: Sequence[str] = (),
        decontaminate: bool = False,
        share_prefix: bool = True,
        shuffle_options: bool = False,
        targets: Literal["answer", "explanation"] = "answer",
        num_workers: int = 0,
        pin_memory: bool | None = None,
        cache_dir: str | None = None,
        most_eval_tokens: int | None = None,
        rank: int = 0,
        world_size: int = 1,
        kept: cache.KeptData | None = None,
    ) -> None:
        super().__init__()
        self.name = name
        self.tokenizer = tokenizer
        self.prompt = prompt
        self.seed = seed
        self.hub = hub
        self.revision = revision
        self.files = {
            split: file
            for split, file in zip(SPLITS, (train_file, val_file, test_file), strict=True)
            if file is not None
        }
        self.splits = splits
        self.num_val = num_val
        self.num_test = num_test
        self.token_budget = _budget("token_budget", token_budget)
        self._fits_eval_rows = eval_token_budget == "auto"
        self.eval_token_budget = (
            self.token_budget
            if eval_token_budget in (None, "auto")
            else _budget("eval_token_budget", eval_token_budget)
        )
        self.most_eval_tokens = max(most_eval_tokens or 0, self.token_budget)
        self.limit = self.token_budget if max_length is None else _budget("max_length", max_length)
        self.limits = dict(zip(SPLITS, (limit_train, limit_val, limit_test), strict=True))
        self.label_base = label_base
        self.ignore_columns = tuple(ignore_columns)
        self.drop = tuple(drop)
        self.decontaminate = decontaminate
        self.share_prefix = share_prefix
        self.shuffle_options = shuffle_options
        self.targets = targets
        self.num_workers = num_workers
        self.pin_memory = pin_memory
        self.cache_dir = cache.cache_dir(cache_dir)
        self.rank = rank
        self.world_size = world_size
        self.kept = kept
        self._check_options()

        self.questions: dict[str, list[Question]] = {}
        self.letter_ids: tuple[int, ...] = ()
        self.num_options = 0
        self.sha256 = ""
        self.dropped: dict[str, int] = {}
        self.num_truncated = 0
        self.max_length = 0
        self.max_questions = 0
        self.setup_seconds = 0.0
        self._tokenized: dict[str, TokenizedQuestions] = {}
        self._plans: dict[str, RowPlan] = {}
        self._train_loader: PackedLoader | None = None
        self._state: dict[str, Any] | None = None
        self._prefix: Int32[np.ndarray, " shared"] = np.zeros(0, dtype=np.int32)
        self._mean_length = 0.0

    # --- reading ----------------------------------------------------------------------------------

    def setup(self, stage: str | None = None) -> None:
        """Read, check, cut and tokenise every split that is not left out; once, whatever the stage.

        Row shapes are fixed from all splits together, so that training and scoring share them.

        Raises:
            DataError: If a file or the hub copy cannot be read or contradicts itself.
            ConfigError: If a split cannot be cut, or a question does not fit the token budget.
            ModelError: If an answer letter is not one token.
        """
        if self.questions:
            return
        started = time.perf_counter()
        # Hundred thousands of lasting objects are made, which the collector would visit in vain.
        with cache.no_garbage_collection():
            self._prepare()
        self.setup_seconds = time.perf_counter() - started
        log.info(
            "%s: %s questions, %.1f tokens on average, ready after %.1f s",
            self.name,
            ", ".join(f"{len(members)} {split}" for split, members in self.questions.items()),
            np.concatenate([t.lengths for t in self._tokenized.values()]).mean(),
            self.setup_seconds,
        )

    def _prepare(self) -> None:
        source = self._load_source()
        members = self._choose(source)
        questions = source.questions
        self.num_options = len(questions[0].options)
        # Solved examples come from train alone, so they belong to neither val nor test.
        self.prompt = self.prompt.with_shots([questions[i] for i in members.get("train", ())])
        self.prepare_letters(self.num_options)
        used = {
            split: rows[sample_rows([questions[i] for i in rows], self.limits[split])]
            for split, rows in members.items()
            if self.limits[split] != 0
        }
        if not used:
            raise ConfigError(
                "every split is left out: give data.train_file, data.val_file or data.test_file, "
                "or a limit above 0."
            )
        self._warn_of_copies(source, used)
        self.questions = {split: [questions[i] for i in rows] for split, rows in used.items()}
        self.sha256 = dataset_sha256(
            {split: [source.digests[i] for i in rows] for split, rows in used.items()}
        )
        encoder = TextEncoder(self.tokenizer)
        self._tokenized = self._tokenize(source, used, encoder)
        self._fix_shapes()

    def audit(self, *, near: bool = True) -> AuditReport:
        """Audit the source as it is, before anything is dropped; see `audit_rows`.

        Near-duplicates are those between the splits that a run would train and score on.
        """
        return audit_rows(
            self._read(),
            label_base=self.label_base,
            ignore_columns=self.ignore_columns,
            tokenizer=self.tokenizer,
            # Solved examples lengthen every prompt alike and need a cut to be chosen from.
            prompt=self.prompt if not self.prompt.num_shots or self.prompt.shots else None,
            near=near,
            cut=self._cut_places if self.splits == "pool" or self.num_val else None,
        )

    def _cut_places(self, questions: Mapping[str, Sequence[Question]]) -> dict[str, list[Any]]:
        """Split and row in the source of each question of each split."""
        places = [(s, row) for s, part in questions.items() for row in range(1, len(part) + 1)]
        everything = [question for part in questions.values() for question in part]
        groups = np.array([group_of(question) for question in everything], dtype=np.uint64)
        splits = np.array([split for split, _ in places])
        members = self._cut(everything, splits, groups, np.ones(len(everything), dtype=bool))
        return {split: [places[i] for i in rows] for split, rows in members.items()}

    def _check_options(self) -> None:
        if self.hub and self.files:
            raise ConfigError(
                f"data.hub={self.hub} and data.{next(iter(self.files))}_file are both given and "
                "only one can be read: choose data=files for files, or set the files to null."
            )
        if not self.hub and not self.files:
            raise ConfigError(
                "no data are given: set data.train_file, data.val_file or data.test_file, or "
                "choose data=sample or data=medmcqa."
            )
        if self.splits not in ("official", "pool"):
            raise ConfigError(f"data.splits={self.splits!r} is unknown: choose official or pool.")
        if self.targets not in ("answer", "explanation"):
            raise ConfigError(f"targets={self.targets!r} is unknown: choose answer or explanation.")
        if self.shuffle_options and self.targets == "explanation":
            raise ConfigError(
                "data.shuffle_options=true cannot work with loss=explanation: many explanations "
                "name the letter that the options had before. Choose loss=choice or loss=token, or "
                "set data.shuffle_options=false."
            )
        for option in ("num_val", "num_test"):
            if getattr(self, option) < 0:
                raise ConfigError(f"data.{option} is negative: choose 0 or more.")
        if self.splits == "official":
            if self.num_test:
                raise ConfigError(
                    f"data.num_test={self.num_test} has no effect with data.splits=official, where "
                    "test is given: set it to 0, or choose data.splits=pool."
                )
            if self.num_val and "val" in self.files:
                raise ConfigError(
                    f"data.num_val={self.num_val} has no effect beside data.val_file: set "
                    "data.num_val=0 to use the file, or data.val_file=null to cut val from train."
                )
            if self.num_val and not self.hub and "train" not in self.files:
                raise ConfigError(
                    f"data.num_val={self.num_val} cuts val from train, which is left out: give "
                    "data.train_file, or set data.num_val=0."
                )
        if self.limit > self.token_budget:
            raise ConfigError(
                f"data.max_length={self.limit} is above data.token_budget={self.token_budget}, and "
                f"a question must fit into a row: set data.token_budget={self.limit} or a smaller "
                "data.max_length."
            )
        if self.limit > self.eval_token_budget:
            raise ConfigError(
                f"data.eval_token_budget={self.eval_token_budget} is below the {self.limit} tokens "
                f"a question may have: set it to at least {self.limit}, or data.max_length="
                f"{self.eval_token_budget}."
            )
        for split, limit in self.limits.items():
            if limit is not None and (isinstance(limit, bool) or limit < 0):
                raise ConfigError(
                    f"data.limit_{split}={limit} is no number of questions: give 0 to leave the "
                    "split out, a number above, or null for all."
                )
        find({}, self.drop)

    def _read(self) -> dict[str, RawRows]:
        if self.hub is not None:
            rows = read_hub(self.hub, self.revision, ("train", "validation"))
            return {"train": rows["train"], "test": rows["validation"]}
        return {split: read_rows(file) for split, file in self.files.items()}

    def _load_source(self) -> _Source:
        """The questions of the source, kept or cached if the source is known to be unchanged."""
        identity: Any = None
        if self.hub is None:
            identity = {split: [file, _file_sha256(file)] for split, file in self.files.items()}
        elif self.revision and _COMMIT.fullmatch(self.revision):
            # The same name and commit on another hub, such as that of a test, are other data.
            endpoint = os.environ.get("HF_ENDPOINT", "")
            identity = [endpoint, self.hub, self.revision]
        strict = self.splits == "official" and self.limits["train"] != 0
        key = cache.cache_key(
            "source", identity, self.label_base, sorted(self.ignore_columns), strict
        )
        if self.kept is None or not identity:
            return self._read_source(key if identity else None)
        return self.kept.get("questions", key, lambda: self._read_source(key))

    def _read_source(self, key: str | None) -> _Source:
        file = self.cache_dir / f"questions-{key}.arrow"
        kept = cache.read_table(file) if key else None
        if kept is not None:
            table, _ = kept
            return _Source(
                questions=cache.table_to_questions(table),
                splits=np.array(table["split"].to_pylist()),
                groups=table["group"].combine_chunks().to_numpy(),
                digests=table["digest"].to_pylist(),
            )
        strict = self.splits == "official" and self.limits["train"] != 0
        parsed = parse_rows(
            self._read(),
            label_base=self.label_base,
            require_labels=("train",) if strict else (),
            ignore_columns=self.ignore_columns,
        )
        questions = [question for members in parsed.values() for question in members]
        source = _Source(
            questions=questions,
            splits=np.array([split for split, members in parsed.items() for _ in members]),
            groups=np.array([group_of(question) for question in questions], dtype=np.uint64),
            digests=[question_digest(question) for question in questions],
        )
        if key and len(questions) >= cache.MIN_ROWS:
            table = cache.questions_to_table(
                questions, source.splits.tolist(), source.groups, source.digests
            )
            cache.write_table(file, table, {"source": str(self.hub or self.files)})
        return source

    def _choose(self, source: _Source) -> dict[str, np.ndarray]:
        """Row numbers of each split: dropped, cut, decontaminated, not yet limited."""
        questions = source.questions
        keep = np.ones(len(questions), dtype=bool)
        if self.drop:
            # Of copies the first is kept, so held-out questions go first: a copy leaves train, not
            # test.
            order = np.argsort([-SPLITS.index(split) for split in source.splits], kind="stable")
            for name in self.drop:
                # Without what is left out already, of which a copy would be a copy of nothing.
                order = order[keep[order]]
                ordered = {"": [questions[i] for i in order]}
                rows = order[sorted({finding.row - 1 for finding in find(ordered, [name])})]
                self.dropped[name] = int(keep[rows].sum())
                keep[rows] = False
        members = self._cut(questions, source.splits, source.groups, keep)
        if bare := int(keep.sum()) - sum(map(len, members.values())):  # of a pool
            self.dropped["unlabelled"] = self.dropped.get("unlabelled", 0) + bare
        if self.decontaminate:
            self._decontaminate(questions, members)
        if self.dropped:
            log.warning(
                "%s: left out %s",
                self.name,
                ", ".join(f"{number} {name}" for name, number in self.dropped.items()),
            )
        for split, limit in self.limits.items():
            if split not in members and limit:
                raise ConfigError(
                    f"data.limit_{split}={limit} has no effect: the data have no {split} "
                    f"questions; give data.{split}_file or set data.limit_{split}=null."
                )
        return members

    def _cut(
        self,
        questions: Sequence[Question],
        splits: np.ndarray,
        groups: np.ndarray,
        keep: np.ndarray,
    ) -> dict[str, np.ndarray]:
        """Row numbers of each split that is not empty, of the questions to `keep`."""
        if self.splits == "pool":
            labelled = np.array([question.answer is not None for question in questions])
            pool = np.flatnonzero(keep & labelled)
            val, test, train = cut_groups(groups[pool], self.seed, (self.num_val, self.num_test))
            members = {"train": pool[train], "val": pool[val], "test": pool[test]}
        else:
            members = {split: np.flatnonzero(keep & (splits == split)) for split in SPLITS}
            if self.num_val:
                val, train = cut_groups(groups[members["train"]], self.seed, (self.num_val,))
                members["val"] = members["train"][val]
                members["train"] = members["train"][train]
        return {split: rows for split, rows in members.items() if len(rows)}

    def _decontaminate(self, questions: list[Question], members: dict[str, np.ndarray]) -> None:
        if "train" not in members or len(members) < 2:
            raise ConfigError(
                "data.decontaminate=true has no effect without training questions and others to "
                "compare them with: give both, or set it to false."
            )
        by_split = {split: [questions[i] for i in rows] for split, rows in members.items()}
        findings = near_duplicates(by_split["train"], by_split)
        rows = np.array([finding.row - 1 for finding in findings], dtype=np.int64)
        self.dropped["near_duplicate"] = len(rows)
        members["train"] = np.delete(members["train"], rows)
        if not len(members["train"]):
            raise DataError(
                "data.decontaminate=true leaves no training question, all repeat a val or test "
                "question: give other files, or set it to false."
            )

    def _warn_of_copies(self, source: _Source, used: Mapping[str, np.ndarray]) -> None:
        """Say how many training questions are scored as well, options in whatever order."""
        train, scored = used.get("train"), [used[split] for split in used if split != "train"]
        if train is None or not scored:
            return
        held_out = np.concatenate(scored)
        held_out = held_out[np.isin(source.groups[held_out], source.groups[train])]
        near = train[np.isin(source.groups[train], source.groups[held_out])]
        keys = {options_key(source.questions[i]) for i in held_out}
        if copies := sum(options_key(source.questions[i]) in keys for i in near):
            log.warning(
                "%s: %d of %d training questions stand in val or test as well, with the same "
                "options: set data.decontaminate=true to leave them out, or give other files",
                self.name,
                copies,
                len(train),
            )

    def _tokenize(
        self, source: _Source, used: dict[str, np.ndarray], encoder: TextEncoder
    ) -> dict[str, TokenizedQuestions]:
        """Tokens of each split, from the cache where there are any.

        The rows of train and those of the other splits are kept apart, as only train has
        explanations as targets. Unless a limit leaves most of them out, all rows of the source are
        tokenised, so that a run with another seed, which cuts elsewhere, finds its tokens; but one
        that is not used and cannot be asked stops no run.
        """
        explained = {split for split in used if split == "train" and self.targets == "explanation"}
        everything = np.arange(len(source.questions))
        digest = encoder.digest if len(everything) >= cache.MIN_ROWS else ""
        tokenized: dict[str, TokenizedQuestions] = {}
        for explain, splits in ((True, explained), (False, {*used} - explained)):
            if not splits:
                continue
            wanted = np.unique(np.concatenate([used[split] for split in splits]))
            rows = everything if 2 * len(wanted) >= len(everything) else wanted
            try:
                table = self._tokens_of(source, rows, encoder, digest, explain)
            except (ConfigError, DataError):
                rows = wanted
                table = self._tokens_of(source, rows, encoder, digest, explain)
            for split in splits:
                tokenized[split] = table.take(np.searchsorted(rows, used[split]))
        self.num_truncated = sum(tokens.num_truncated for tokens in tokenized.values())
        if self.num_truncated:
            log.warning(
                "%s: %d question(s) were longer than %d tokens and lost the beginning of their "
                "stem",
                self.name,
                self.num_truncated,
                self.limit,
            )
        if cut := sum(tokens.num_cut_explanations for tokens in tokenized.values()):
            log.warning("%s: %d explanations were cut to fit %d tokens", self.name, cut, self.limit)
        return tokenized

    def _tokens_of(
        self,
        source: _Source,
        rows: np.ndarray,
        encoder: TextEncoder,
        tokenizer_digest: str,
        explain: bool,
    ) -> TokenizedQuestions:
        cached = len(rows) >= cache.MIN_ROWS
        key = cache.cache_key(
            "tokens",
            hashlib.sha256(b"".join([source.digests[i] for i in rows])).hexdigest()
            if cached
            else "",
            tokenizer_digest,
            self.prompt.digest,
            explain,
        )

        def make() -> TokenizedQuestions:
            return self._make_tokens(source, rows, encoder, explain, key if cached else None)

        if self.kept is None or not cached:
            return make()
        return self.kept.get(f"tokens {explain}", f"{key} {self.limit}", make)

    def _make_tokens(
        self,
        source: _Source,
        rows: np.ndarray,
        encoder: TextEncoder,
        explain: bool,
        key: str | None,
    ) -> TokenizedQuestions:
        file = self.cache_dir / f"tokens-{key}.arrow"
        kept = cache.read_table(file) if key else None
        if kept is not None:
            tokenized = cache.table_to_tokens(kept[0])
            # Without a limit that bites, tokens are the same whatever the limit.
            whole = not (tokenized.num_truncated or tokenized.num_cut_explanations)
            if kept[1]["limit"] == self.limit or (whole and tokenized.lengths.max() <= self.limit):
                return tokenized
        tokenized = tokenize_questions(
            [source.questions[i] for i in rows],
            self.prompt,
            encoder,
            limit=self.limit,
            letter_ids=self.letter_ids,
            explain=explain,
        )
        if key:
            cache.write_table(file, cache.tokens_to_table(tokenized), {"limit": self.limit})
        return tokenized

    # --- rows -------------------------------------------------------------------------------------

    @property
    def num_dropped(self) -> int:
        """Questions of the source that were left out because of a finding."""
        return sum(self.dropped.values())

    @property
    def longest(self) -> int:
        """Tokens of the longest question of any split, below which no row can be."""
        return max(int(tokens.lengths.max()) for tokens in self._tokenized.values())

    def lengths(self, split: str) -> Int[np.ndarray, " question"]:
        """Tokens of each question of `split`, BOS included, in the order of `questions`.

        Raises:
            ConfigError: If the split was left out.
        """
        self._plan(split)
        return self._tokenized[split].lengths

    def num_rows(self, split: str) -> int:
        """Rows of one pass over `split` on each rank: steps an epoch before accumulation."""
        return self._plan(split).num_rows // self._world()[1]

    def fill_fraction(self, split: str) -> float:
        """Part of the tokens of `split`'s rows that belong to questions, in [0, 1]."""
        return self._plan(split).fill_fraction

    def _fix_shapes(self) -> None:
        self.max_length = min(64 * -(-self.longest // 64), self.token_budget)
        # The split with the shortest questions puts most of them into a row.
        self._mean_length = min(
            float(tokens.lengths.mean()) - self._prefix_length(tokens)
            for tokens in self._tokenized.values()
        )
        self.max_questions = max_questions_of(self._mean_length, self.token_budget)
        self.fit_eval_rows([split for split in ("val", "test") if split in self._tokenized])

    def fit_eval_rows(self, splits: Sequence[str]) -> None:
        """Choose the rows that score some splits in the least time, one length for all of them.

        Does nothing unless `eval_token_budget` is "auto". `setup` does it for val and test.

        Args:
            splits: What is going to be scored.
        """
        if not self._fits_eval_rows or not splits:
            return
        scored = [self._tokenized[split] for split in splits]
        budgets: set[int] = set()
        for tokens in scored:
            shared = self._prefix_length(tokens)
            total = int((tokens.lengths - shared).sum())
            budgets.update(full_budgets(total, self.most_eval_tokens, self.limit, shared))

        def cost(budget: int) -> int:
            options: dict[str, Any] = {"shuffle": False, "world_size": self._world()[1]}
            rows = sum(self._rows(tokens, budget, **options).num_rows for tokens in scored)
            return rows * (budget + ROW_COST)

        self.eval_token_budget = min(sorted(budgets), key=cost)
        for split in splits:
            self._plans.pop(split, None)

    def _prefix_length(self, tokenized: TokenizedQuestions) -> int:
        """Tokens that stand once in each row of these questions."""
        return tokenized.num_shared(self._prefix)

    def _rows(self, tokenized: TokenizedQuestions, token_budget: int, **options: Any) -> RowPlan:
        """Which of these questions share a row."""
        shared = self._prefix_length(tokenized)
        mean = self._mean_length or float(tokenized.lengths.mean()) - shared
        places = max_questions_of(mean, token_budget)
        if not self._mean_length:
            places = _power_of_two(places)
        return RowPlan(tokenized.lengths - shared, token_budget - shared, places, **options)

    def _world(self) -> tuple[int, int]:
        """Rank and number of processes."""
        if self.trainer is not None:
            return self.trainer.global_rank, self.trainer.world_size
        return self.rank, self.world_size

    def _budget_of(self, split: str) -> int:
        return self.token_budget if split == "train" else self.eval_token_budget

    def _plan(self, split: str) -> RowPlan:
        if split not in self._tokenized:
            raise ConfigError(
                f"the data have no {split} questions: give data.{split}_file, or choose a split of "
                f"{', '.join(self._tokenized) or 'a data module that was set up'}."
            )
        world_size = self._world()[1]
        plan = self._plans.get(split)
        if plan is None or plan.num_rows % world_size:
            budget = self._budget_of(split)
            plan = self._rows(
                self._tokenized[split],
                budget,
                seed=self.seed,
                shuffle=split == "train",
                world_size=world_size,
            )
            self._plans[split] = plan
        return plan

    def loader(self, split: str) -> PackedLoader:
        """Rows of any split for scoring: in the order of the data, each question once, no labels.

        Raises:
            ConfigError: If the split was left out.
        """
        plan = self._plan(split)
        if split == "train":
            plan = self._rows(
                self._tokenized[split],
                self.eval_token_budget,
                shuffle=False,
                world_size=self._world()[1],
            )
        return self._loader(split, plan, self.eval_token_budget)

    def prepare_letters(self, num_options: int = 4) -> None:
        """Find the letters without reading any data: enough for `pack`.

        Raises:
            ModelError: If a letter is not one token.
        """
        self.num_options = num_options
        self.letter_ids = letter_ids(self.tokenizer, self.prompt, num_options)
        if self.share_prefix:
            self._prefix = shared_prefix(self.prompt, TextEncoder(self.tokenizer), num_options)

    def pack(self, questions: Sequence[Question]) -> Iterator[PackedBatch]:
        """Rows of questions that belong to no split, in the shapes of scoring.

        Args:
            questions: With `num_options` options each; labels are not needed.

        Yields:
            Packed rows; `index` counts in `questions`.

        Raises:
            DataError: If a question has another number of options.
            ConfigError: If one does not fit into a row.
        """
        for question in questions:
            if len(question.options) != self.num_options:
                raise DataError(
                    f"question {question.id!r} has {len(question.options)} options, and this run "
                    f"answers with {self.num_options} letters: give as many."
                )
        if not questions:
            return
        encoder = TextEncoder(self.tokenizer)
        tokenized = tokenize_questions(questions, self.prompt, encoder, limit=self.limit)
        if tokenized.num_truncated:
            log.warning(
                "%d question(s) were longer than %d tokens and lost the beginning of their stem",
                tokenized.num_truncated,
                self.limit,
            )
        budget = self.eval_token_budget
        plan = self._rows(tokenized, budget, shuffle=False)
        longest = max(self.max_length, _power_of_two(max(64, int(tokenized.lengths.max()))))
        for members in plan.rows(0):
            yield build_row(
                tokenized,
                members,
                token_budget=budget,
                max_questions=plan.max_questions,
                max_length=min(longest, budget),
                prefix_length=self._prefix_length(tokenized),
            )

    def shortens(self, question: Question) -> bool:
        """Whether a question loses the beginning of its stem to fit into a row."""
        parts = self.prompt.render(question)
        sizes = [len(part.encode()) if isinstance(part, str) else 1 for part in parts]
        if sum(sizes) < self.limit:
            return False  # a token has a byte at least
        encoder = TextEncoder(self.tokenizer)
        tokenized = tokenize_questions([question], self.prompt, encoder, limit=self.limit)
        return bool(tokenized.num_truncated)

    def _loader(
        self,
        split: str,
        plan: RowPlan,
        token_budget: int,
        *,
        with_labels: bool = False,
        augment: OptionShuffle | None = None,
        num_done: Callable[[], int | None] | None = None,
    ) -> PackedLoader:
        rank, world_size = self._world()
        build: Callable[[Any], PackedBatch] = partial(
            build_row,
            self._tokenized[split],
            token_budget=token_budget,
            max_questions=plan.max_questions,
            max_length=self.max_length,
            with_labels=with_labels,
            prefix_length=self._prefix_length(self._tokenized[split]),
        )
        pin_memory = torch.cuda.is_available() if self.pin_memory is None else self.pin_memory
        return PackedLoader(
            plan,
            build,
            rank=rank,
            world_size=world_size,
            num_workers=self.num_workers,
            pin_memory=pin_memory,
            augment=augment,
            num_done=num_done,
        )

    def _option_shuffle(self) -> OptionShuffle | None:
        if not self.shuffle_options:
            return None
        return OptionShuffle(
            self.questions["train"],
            self.prompt,
            TextEncoder(self.tokenizer),
            limit=self.limit,
            seed=self.seed,
        )

    def train_dataloader(self) -> PackedLoader:
        """Shuffled rows of train; goes on where a restored checkpoint stopped."""
        self._train_loader = self._loader(
            "train",
            self._plan("train"),
            self.token_budget,
            with_labels=self.targets == "explanation",
            augment=self._option_shuffle(),
            num_done=self._rows_done,
        )
        if self._state is not None:
            self._restore(self._train_loader, self._state)
            self._state = None
        return self._train_loader

    def val_dataloader(self) -> PackedLoader | list[PackedLoader]:
        """Rows of val in the order of the data; no loader where val is left out."""
        return self.loader("val") if "val" in self._tokenized else []

    def test_dataloader(self) -> PackedLoader | list[PackedLoader]:
        """Rows of test in the order of the data; no loader where test is left out."""
        return self.loader("test") if "test" in self._tokenized else []

    # --- resuming ---------------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        """Place in the training rows, and what makes it a place in these rows and no others."""
        if self._train_loader is None:
            return {}
        return {
            **self._train_loader.state_dict(),
            "sha256": self.sha256,
            "seed": self.seed,
            "token_budget": self.token_budget,
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on with the rows that were left; takes effect at the next `train_dataloader`."""
        if self._train_loader is not None:
            self._restore(self._train_loader, state_dict)
        else:
            self._state = state_dict

    def _restore(self, loader: PackedLoader, state: dict[str, Any]) -> None:
        for key, option, value in (
            ("sha256", "data", self.sha256),
            ("seed", "seed", self.seed),
            ("token_budget", "data.token_budget", self.token_budget),
        ):
            if state[key] != value:
                raise CheckpointError(
                    f"the checkpoint was made with {option} {str(state[key])[:12]} and this run "
                    f"has {str(value)[:12]}, so the rows that are left are unknown: resume with "
                    "the same data and options, or start anew with resume=never in another "
                    "hydra.run.dir."
                )
        loader.load_state_dict(state)

    def _rows_done(self) -> int | None:
        """Rows of the current epoch whose step is complete, as the trainer counts them."""
        if self.trainer is None:
            return None
        return self.trainer.fit_loop.epoch_loop.batch_progress.current.processed  # pyright: ignore


def _power_of_two(number: int) -> int:
    """The next one: rows of questions that come one by one, of any length, have few shapes then."""
    return 1 << (number - 1).bit_length()


def _budget(option: str, value: Any) -> int:
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        hint = " (auto is turned into a number before the data are read)" if value == "auto" else ""
        auto = ", or auto" if option == "eval_token_budget" else ""
        raise ConfigError(
            f"data.{option}={value!r} is no number of tokens{hint}: give a whole number such as "
            f"2048{auto}."
        )
    return value


def _file_sha256(file: str) -> str:
    try:
        with open(os.path.expanduser(resolve_path(file)), "rb") as stream:
            return hashlib.file_digest(stream, "sha256").hexdigest()
    except OSError:
        # The reader says what is wrong with it.
        return ""
