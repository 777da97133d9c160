"""Questions -> rows of exactly `token_budget` tokens, and a loader that can be resumed.

Every step of a run has the same shapes, so one compilation serves them all, and no token is spent
on padding questions to a common length.
"""

from __future__ import annotations

import heapq
import math
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any, Protocol

import numpy as np
import torch
from jaxtyping import Int
from torch.utils.data import DataLoader, Dataset

from medqlora.data.tokenization import TokenizedQuestions
from medqlora.errors import CheckpointError
from medqlora.schema import IGNORE, PackedBatch

WINDOW = 4096
"""Questions a row can choose from; more fills no better, fewer leave gaps at small budgets."""

Rows = list[Int[np.ndarray, " _member"]]
"""Question numbers of each row."""


def max_questions_of(mean_length: float, token_budget: int) -> int:
    """Places a row has for questions, fixed for the whole run.

    Half as many again as an average row holds, rounded up to a multiple of 8: enough that the cap
    almost never binds, and little enough that empty places cost nothing.

    Args:
        mean_length: Mean tokens of a question.
        token_budget: Tokens of a row.
    """
    return max(8, 8 * math.ceil(1.5 * token_budget / mean_length / 8))


ROW_COST = 1024
"""Tokens that take as long as what a row costs beside its own: its weights are dequantised once."""


def full_budgets(total: int, most: int, least: int, shared: int = 0) -> list[int]:
    """Row lengths under which the rows of some questions are all full.

    Args:
        total: Tokens of all questions, without those they share.
        most: Longest row.
        least: Shortest row.
        shared: Tokens that stand once in each row.

    Returns:
        `most`, and for each number of rows, from the fewest on, a multiple of 256.
    """
    fewest = max(1, math.ceil(total / (most - shared)))
    even = (256 * math.ceil((total / n + shared) / 256) for n in range(fewest, fewest + 8))
    return [most, *(budget for budget in even if least <= budget < most)]


def pack(
    lengths: Int[np.ndarray, " question"],
    order: Int[np.ndarray, " question"],
    token_budget: int,
    max_questions: int,
    window: int = WINDOW,
) -> Rows:
    """Pack questions into rows, every question once.

    A row takes questions in the given order until about two more fit, then closes its gap with a
    question, or two, of the `window` next ones that fill it exactly, else with the longest that
    fits. With a shuffled order the members of a row are random.

    Args:
        lengths: Tokens of each question, none above `token_budget`.
        order: Question numbers in the order in which they are wanted.
        token_budget: Tokens a row holds.
        max_questions: Questions a row holds at most.
        window: How far ahead of the order a row may look.

    Returns:
        Question numbers of each row, in the order the rows were filled.
    """
    if not len(order):
        return []
    sizes: list[int] = lengths[order].tolist()
    if max(sizes) > token_budget:
        raise ValueError(f"a question of {max(sizes)} tokens is in no row of {token_budget}")
    reserve = min(token_budget // 2, 2 * (sum(sizes) // len(sizes)))
    placed = bytearray(len(sizes))
    waiting: dict[int, deque[int]] = {}
    count: dict[int, int] = {}
    head = tail = 0
    rows: list[list[int]] = []

    def take(position: int) -> None:
        placed[position] = 1
        size = sizes[position]
        count[size] -= 1
        if not count[size]:
            del count[size]
        row.append(position)

    def take_size(size: int) -> None:
        queue = waiting[size]
        while placed[queue[0]]:
            queue.popleft()
        take(queue.popleft())

    while True:
        while head < len(sizes) and placed[head]:
            head += 1
        if head == len(sizes):
            break
        row: list[int] = []
        remaining = token_budget
        while len(row) < max_questions and remaining:
            while head < len(sizes) and placed[head]:
                head += 1
            while tail < len(sizes) and tail < head + window:
                size = sizes[tail]
                waiting.setdefault(size, deque()).append(tail)
                count[size] = count.get(size, 0) + 1
                tail += 1
            if head == len(sizes):
                break
            size = sizes[head]
            if not row or remaining - size >= reserve:
                take(head)
                remaining -= size
                continue
            closing = _closing(count, remaining, max_questions - len(row))
            if not closing:
                break
            for size in closing:
                take_size(size)
                remaining -= size
        rows.append(row)
    return [order[row] for row in rows]


def _closing(count: dict[int, int], remaining: int, places: int) -> tuple[int, ...]:
    """Sizes that close a gap: one or two that fill it exactly, else the largest that fits."""
    if remaining in count:
        return (remaining,)
    if places > 1:
        for size, number in count.items():
            rest = remaining - size
            if rest in count and (rest != size or number > 1):
                return (size, rest)
    largest = max((size for size in count if size <= remaining), default=None)
    return () if largest is None else (largest,)


def spread(rows: Rows, num_rows: int) -> Rows:
    """Reach a number of rows by halving the fullest ones; empty rows only when questions run out.

    Ranks must take equally many steps. Halving neither repeats a question, which would count twice,
    nor hands a rank a step without anything to learn.
    """
    heap = [(-len(row), position, row) for position, row in enumerate(rows)]
    heapq.heapify(heap)
    position = len(rows)
    while len(heap) < num_rows:
        if not heap or heap[0][0] >= -1:
            heapq.heappush(heap, (0, position, np.zeros(0, dtype=np.int64)))
            position += 1
            continue
        _, original, row = heapq.heappop(heap)
        half = len(row) // 2
        heapq.heappush(heap, (-half, original, row[:half]))
        heapq.heappush(heap, (half - len(row), position, row[half:]))
        position += 1
    return [row for _, _, row in sorted(heap, key=lambda entry: entry[1])]


class RowPlan:
    """Which questions are in which row, in every epoch.

    The number of rows is the same in every epoch, as Lightning counts it once. An epoch is a
    function of `seed` and its number alone. Without shuffling there is one plan, in the order of
    the questions.

    Attributes:
        max_questions: Places of a row.
        num_rows: Rows an epoch over all ranks, a multiple of `world_size`.
    """

    def __init__(
        self,
        lengths: Int[np.ndarray, " question"],
        token_budget: int,
        max_questions: int,
        *,
        seed: int = 0,
        shuffle: bool = True,
        world_size: int = 1,
    ) -> None:
        self._lengths = lengths
        self._token_budget = token_budget
        self.max_questions = max_questions
        self._seed = seed
        self._shuffle = shuffle
        self._kept: tuple[int, Rows] | None = None
        first = self._pack(0, 0)
        # Row counts of shuffles differ by a few; a margin of 0.2 % spares packing an epoch
        # repeatedly.
        margin = len(first) // 500 if shuffle else 0
        self.num_rows = world_size * math.ceil((len(first) + margin) / world_size)
        self._first = first

    @property
    def fill_fraction(self) -> float:
        """Part of an epoch's tokens that belong to questions, in [0, 1]."""
        return float(self._lengths.sum()) / max(1, self.num_rows * self._token_budget)

    def rows(self, epoch: int) -> Rows:
        """Question numbers of each row of an epoch, over all ranks."""
        epoch = epoch if self._shuffle else 0
        if self._kept is None or self._kept[0] != epoch:
            self._kept = (epoch, self._plan(epoch))
        return self._kept[1]

    def _plan(self, epoch: int) -> Rows:
        if epoch == 0:
            packed = self._first
        else:
            attempts = 8 if self.num_rows >= 500 else 64
            tries = (self._pack(epoch, attempt) for attempt in range(attempts))
            # The rows of epoch 0 fit by construction; their order still changes.
            packed = next((rows for rows in tries if len(rows) <= self.num_rows), self._first)
        rows = spread(packed, self.num_rows)
        if self._shuffle:
            order = np.random.default_rng([self._seed, epoch, 1]).permutation(len(rows))
            rows = [rows[i] for i in order]
        return rows

    def _pack(self, epoch: int, attempt: int) -> Rows:
        if self._shuffle:
            generator = np.random.default_rng([self._seed, epoch, 0, attempt])
            order = generator.permutation(len(self._lengths))
        else:
            order = np.arange(len(self._lengths))
        return pack(self._lengths, order, self._token_budget, self.max_questions)


def build_row(
    tokenized: TokenizedQuestions,
    members: Int[np.ndarray, " member"],
    *,
    token_budget: int,
    max_questions: int,
    max_length: int,
    with_labels: bool = False,
    prefix_length: int = 0,
) -> PackedBatch:
    """Lay questions end to end in one row of fixed shapes.

    Args:
        tokenized: All questions of the split.
        members: Question numbers of the row; none for an empty row.
        token_budget: Tokens of the row.
        max_questions: Places of the row.
        max_length: Upper bound of a question's tokens, passed through.
        with_labels: Whether the tokens after each prompt are labels to learn.
        prefix_length: Tokens with which all questions of `tokenized` begin; they go to the front of
            the row, once.

    Returns:
        The row; see `PackedBatch` for its padding.
    """
    starts = tokenized.offsets[members] + prefix_length
    lengths = tokenized.offsets[members + 1] - starts
    number, total = len(members), prefix_length + int(lengths.sum())
    ends = prefix_length + np.cumsum(lengths)
    begins = ends - lengths
    inside = np.arange(prefix_length, total, dtype=np.int64) - np.repeat(begins, lengths)

    input_ids = np.zeros(token_budget, dtype=np.int64)
    position_ids = np.zeros(token_budget, dtype=np.int64)
    if number:
        first = tokenized.offsets[members[0]]
        input_ids[:prefix_length] = tokenized.tokens[first : first + prefix_length]
    input_ids[prefix_length:total] = tokenized.tokens[inside + np.repeat(starts, lengths)]
    position_ids[:prefix_length] = np.arange(prefix_length)
    position_ids[prefix_length:total] = prefix_length + inside
    cu_seqlens = np.full(max_questions + 1, total, dtype=np.int32)
    cu_seqlens[:number] = begins
    prompt_lengths = tokenized.prompt_lengths[members] - prefix_length
    last = np.zeros(max_questions, dtype=np.int64)
    last[:number] = begins + prompt_lengths - 1
    answer = np.full(max_questions, IGNORE, dtype=np.int64)
    known = tokenized.answer[members].astype(np.int64)
    answer[:number] = np.where(known < 0, IGNORE, known)
    index = np.full(max_questions, -1, dtype=np.int64)
    index[:number] = members
    labels = None
    if with_labels:
        labels = np.full(token_budget, IGNORE, dtype=np.int64)
        # Position i predicts token i + 1, from the last prompt token to the last but one.
        learns = (inside >= np.repeat(prompt_lengths - 1, lengths)) & (
            inside < np.repeat(lengths - 1, lengths)
        )
        where = prefix_length + np.flatnonzero(learns)
        labels[where] = input_ids[where + 1]
    return PackedBatch(
        input_ids=torch.from_numpy(input_ids),
        position_ids=torch.from_numpy(position_ids),
        cu_seqlens=torch.from_numpy(cu_seqlens),
        last=torch.from_numpy(last),
        answer=torch.from_numpy(answer),
        index=torch.from_numpy(index),
        labels=None if labels is None else torch.from_numpy(labels),
        num_questions=number,
        num_tokens=total if number else 0,
        max_length=max_length,
        prefix_length=prefix_length,
    )


class _PlannedRows(Dataset[PackedBatch]):
    """The rows of one epoch that one rank still has to see."""

    def __init__(
        self,
        rows: Sequence[np.ndarray],
        build: Callable[[Any], PackedBatch],
        augment: Callable[[PackedBatch], PackedBatch] | None,
    ) -> None:
        self.rows = rows
        self.build = build
        self.augment = augment

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, item: int) -> PackedBatch:
        row = self.build(self.rows[item])
        return row if self.augment is None else self.augment(row)


def _identity(batch: Any) -> Any:
    return batch


class Augment(Protocol):
    """Changes what is in the places of a row; an epoch always shows the same."""

    def __call__(self, row: PackedBatch, epoch: int) -> PackedBatch:
        """The row as an epoch, given by its number, shows it."""
        ...


class PackedLoader:
    """Iterates over the rows of one rank; its place in the epoch is saved and restored.

    Lightning recognises `state_dict` and `load_state_dict` and calls `sampler.set_epoch`. The
    length is that of a whole epoch also when rows are left out after resuming, since Lightning
    counts on.

    Args:
        plan: Rows of every epoch.
        build: Makes a batch of the question numbers of a row.
        rank: Number of this process.
        world_size: Number of processes.
        num_workers: Processes that build rows; building one takes far less than a step, so 0 will
            do.
        pin_memory: Whether batches lie in page-locked memory.
        augment: Makes of a row what an epoch, given by its number, shows of it; None for the row.
        num_done: Rows of this epoch whose training step is complete, where the trainer knows better
            than the loader, which only knows what it has handed out.
    """

    def __init__(
        self,
        plan: RowPlan,
        build: Callable[[Any], PackedBatch],
        *,
        rank: int = 0,
        world_size: int = 1,
        num_workers: int = 0,
        pin_memory: bool = False,
        augment: Augment | None = None,
        num_done: Callable[[], int | None] | None = None,
    ) -> None:
        self.plan = plan
        self.epoch = 0
        self._build = build
        self._rank = rank
        self._world_size = world_size
        self._num_workers = num_workers
        self._pin_memory = pin_memory
        self._augment = augment
        self._num_done = num_done
        self._position = 0
        self._resume: tuple[int, int] | None = None

    batch_sampler = None
    """Lightning asks a loader that has a `sampler` for this as well."""

    @property
    def sampler(self) -> PackedLoader:
        """What Lightning calls `set_epoch` on."""
        return self

    def set_epoch(self, epoch: int) -> None:
        """Choose the shuffle of the next pass; a pass that has begun is not disturbed."""
        self.epoch = epoch

    def __len__(self) -> int:
        """Rows a rank sees in a whole epoch."""
        return self.plan.num_rows // self._world_size

    def __iter__(self) -> Iterator[PackedBatch]:
        """Rows of the current epoch, from where the restored state says."""
        # Lightning makes the iterator before it sets the epoch, so both are read at the first step.
        start = 0
        if self._resume is not None:
            epoch, position = self._resume
            self._resume = None
            if epoch == self.epoch and position < len(self):
                start = position
        augment = None if self._augment is None else partial(self._augment, epoch=self.epoch)
        rows = self.plan.rows(self.epoch)[self._rank :: self._world_size][start:]
        loader = DataLoader(
            _PlannedRows(rows, self._build, augment),
            batch_size=None,
            num_workers=self._num_workers,
            collate_fn=_identity,
            pin_memory=self._pin_memory,
        )
        self._position = start
        for batch in loader:
            self._position += 1
            yield batch

    def state_dict(self) -> dict[str, int]:
        """Epoch, and rows of it whose step is complete."""
        if self._resume is not None:
            epoch, position = self._resume
            return {"epoch": epoch, "rows_done": position, "num_rows": len(self)}
        done = None if self._num_done is None else self._num_done()
        position = self._position if done is None else done
        return {"epoch": self.epoch, "rows_done": position, "num_rows": len(self)}

    def load_state_dict(self, state: dict[str, int]) -> None:
        """Go on where the state was saved, at the next pass.

        Raises:
            CheckpointError: If an epoch has another number of rows than when it was saved.
        """
        if state["num_rows"] != len(self):
            raise CheckpointError(
                f"the checkpoint has {state['num_rows']} rows an epoch and this run has "
                f"{len(self)}: resume with the same data, data.token_budget, prompt and number of "
                "devices, or start anew with resume=never."
            )
        self._resume = (state["epoch"], state["rows_done"])
