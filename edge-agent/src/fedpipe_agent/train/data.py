# SPDX-License-Identifier: Apache-2.0
"""A node's samples: tokenised once, kept as one flat array, handed out as deterministic padded batches."""

import hashlib
import logging
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch

from fedpipe_api.job import DataSource, ModelSource, Task
from fedpipe_api.rows.data_paths import locate
from fedpipe_api.wire import DataNotes

from .examples import Found, check_length, examples, held_out_of
from .packing import pack
from .seeds import generator
from .tokenization import Sample, Tokenization

log = logging.getLogger(__name__)

IGNORED = -100
"""Label of a position that is not predicted."""
PADDING_MULTIPLE = 8
"""Batches are padded to a multiple of this many tokens."""
READ_ROWS = 1024
"""Rows tokenised together."""


@dataclass(frozen=True)
class Batch:
    """Padded samples on their device.

    `labels` are class indices (b,), or the next tokens (b, k) at the k positions `keep` of the sequence,
    IGNORED where nothing is predicted. `tokens` counts the input tokens without padding.
    """

    inputs: dict[str, torch.Tensor]
    labels: torch.Tensor
    keep: torch.Tensor | None
    tokens: int


class Samples:
    """Tokenised samples in one flat array.

    `classes` holds the class index of each sample where the task has classes.
    """

    def __init__(self, samples: Sequence[Sample], task: Task, padding: int):
        lengths = np.fromiter((len(one.ids) for one in samples), dtype=np.int64, count=len(samples))
        self._ends = np.cumsum(lengths)
        self._tokens = np.empty(int(lengths.sum()), dtype=np.int32)
        self._classes = task is Task.SEQUENCE_CLASSIFICATION
        self._task = task
        self._padding = padding
        self.classes = np.fromiter((one.label for one in samples), dtype=np.int64, count=len(samples))
        self._predicted = np.zeros(0 if self._classes else len(self._tokens), dtype=bool)
        for one, end, length in zip(samples, self._ends, lengths, strict=True):
            self._tokens[end - length : end] = one.ids
            if not self._classes:
                self._predicted[end - length : end] = one.predicted
        seconds = [one.second for one in samples]
        # Only pairs have them: all other inputs are of the first type, as models take them without.
        self._seconds = None
        if any(second is not None for second in seconds):
            filled = zip(seconds, lengths, strict=True)
            self._seconds = np.array([length if second is None else second for second, length in filled])
        self._positions = None
        if len(samples) and samples[0].positions is not None:
            self._positions = np.concatenate([one.positions for one in samples])
        self.lengths = lengths

    def __len__(self) -> int:
        return len(self.lengths)

    def tokens(self, index: int) -> np.ndarray:
        """Return the token ids of one sample."""
        end = self._ends[index]
        return self._tokens[end - self.lengths[index] : end]

    def key(self, index: int) -> bytes:
        """Return a digest of one sample's token ids: equal for equal texts, and smaller than they are."""
        return hashlib.blake2b(self.tokens(index).tobytes(), digest_size=16).digest()

    def predicted(self, index: int) -> np.ndarray:
        """Return of each token of one sample whether it is predicted; nothing precedes the first."""
        end = self._ends[index]
        found = self._predicted[end - self.lengths[index] : end].copy()
        found[:1] = False
        return found

    def targets(self, indices: np.ndarray) -> int:
        """Return how many predictions the samples ask for: one each, or their predicted tokens."""
        if self._classes:
            return len(indices)
        return sum(int(self.predicted(index).sum()) for index in indices)

    def batch(self, indices: np.ndarray, device: torch.device) -> Batch:
        """Return the samples padded on the right, on the device; the host does not wait for the copy."""
        width = -(-int(self.lengths[indices].max()) // PADDING_MULTIPLE) * PADDING_MULTIPLE
        ids = np.full((len(indices), width), self._padding, dtype=np.int64)
        mask = np.zeros((len(indices), width), dtype=np.int64)
        for row, index in enumerate(indices):
            tokens = self.tokens(index)
            ids[row, : len(tokens)] = tokens
            mask[row, : len(tokens)] = 1
        inputs = {"input_ids": ids, "attention_mask": mask}
        if self._positions is not None:
            # Without a mask transformers makes one of the positions. Padding, all at 0, sees itself alone.
            inputs = {"input_ids": ids, "position_ids": self._places(indices, width)}
        if self._seconds is not None:
            inputs["token_type_ids"] = (np.arange(width) >= self._seconds[indices, None]) * mask
        keep = None
        if self._classes:
            labels = self.classes[indices]
        else:
            labels, keep = self._next_tokens(ids, indices)

        def moved(array: np.ndarray) -> torch.Tensor:
            tensor = torch.from_numpy(array)
            return tensor.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else tensor

        return Batch(
            inputs={name: moved(array) for name, array in inputs.items()},
            labels=moved(labels),
            keep=None if keep is None else moved(keep),
            tokens=int(mask.sum()),
        )

    def _places(self, indices: np.ndarray, width: int) -> np.ndarray:
        """Return the positions of packed samples (b, width), 0 for padding."""
        assert self._positions is not None
        places = np.zeros((len(indices), width), dtype=np.int64)
        for row, index in enumerate(indices):
            end, length = self._ends[index], self.lengths[index]
            places[row, :length] = self._positions[end - length : end]
        return places

    def _next_tokens(self, ids: np.ndarray, indices: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Return the labels (b, k) and the k positions at which at least one sample predicts."""
        predicted = np.zeros(ids.shape, dtype=bool)
        for row, index in enumerate(indices):
            predicted[row, : self.lengths[index]] = self.predicted(index)
        keep = np.flatnonzero(predicted[:, 1:].any(axis=0))
        if not len(keep):
            keep = np.zeros(1, dtype=np.int64)
        labels = np.where(predicted, ids, IGNORED)[:, keep + 1]
        return np.ascontiguousarray(labels), keep

    def sample(self, index: int) -> Sample:
        """Return one sample."""
        ids = self.tokens(index)
        if not self._classes:
            return Sample(ids, self.predicted(index))
        second = None if self._seconds is None else int(self._seconds[index])
        return Sample(ids, label=int(self.classes[index]), second=second)

    def packed(self, indices: np.ndarray, length: int) -> "Samples":
        """Return samples packed into sequences of at most `length` tokens, the longest first.

        A sequence is one of the samples returned; in each part of it what was predicted still is.
        """
        return Samples(
            [
                Sample(
                    np.concatenate([self.tokens(index) for index in sequence]),
                    np.concatenate([self.predicted(index) for index in sequence]),
                    positions=np.concatenate([np.arange(self.lengths[index]) for index in sequence]),
                )
                for sequence in (indices[chosen] for chosen in pack(self.lengths[indices], length))
            ],
            self._task,
            self._padding,
        )

    def part(self, indices: np.ndarray) -> "Samples":
        """Return the samples of the given indices."""
        return Samples([self.sample(index) for index in indices], self._task, self._padding)


class Data(NamedTuple):
    """What a node trains on and what it holds out, and what was counted in its rows."""

    train: Samples
    held_out: Samples
    notes: DataNotes


def load(
    directory: Path,
    source: DataSource,
    model: ModelSource,
    tokenizer: Any,
    *,
    seed: int,
    longest: int | None,
    readable: frozenset[str] | None = None,
) -> Data:
    """Return the train and the held-out samples of a node.

    The held-out part is the evaluation data, else `evaluation_share` of the train data, chosen by the seed so
    that no text is on both sides, as far as texts that are there once allow.

    Args:
        directory: the node's data volume.
        source: files, fields and lengths.
        model: task and labels.
        tokenizer: a transformers tokenizer.
        seed: of the job.
        longest: tokens the model can take, None where it has no limit.
        readable: top-level fields of rows that may be read, None for all.

    Raises:
        UserError: a mistake in a file, named with its line, or a maximum length above the model's.
    """
    check_length(source, longest)
    train_paths, evaluation_paths = locate(directory, source)
    found = Found(source.on_bad_row == "skip", readable)
    train = _tokenised(train_paths, source, model, tokenizer, found)
    if evaluation_paths:
        held_out = _tokenised(evaluation_paths, source, model, tokenizer, found)
    else:
        chosen = _chosen(train, held_out_of(len(train), source), generator(seed, "evaluation"))
        held_out = train.part(np.flatnonzero(chosen))
        train = train.part(np.flatnonzero(~chosen))
    trained = {train.key(index) for index in range(len(train))} if len(held_out) else set()
    found.repeated = sum(held_out.key(index) in trained for index in range(len(held_out)))
    _warn(found, model)
    return Data(train, held_out, found.notes())


def _chosen(samples: Samples, count: int, random: np.random.Generator) -> np.ndarray:
    """Return which `count` samples are held out: in random order, equal ones together where they fit."""
    groups: dict[bytes, list[int]] = {}
    for index in random.permutation(len(samples)) if count else ():
        groups.setdefault(samples.key(index), []).append(index)
    chosen = np.zeros(len(samples), dtype=bool)
    for group in groups.values():
        if len(group) <= count:
            chosen[group] = True
            count -= len(group)
    rest = [index for group in groups.values() for index in group if not chosen[index]]
    chosen[rest[:count]] = True
    return chosen


def _warn(found: Found, model: ModelSource) -> None:
    """Log what was counted; none of it is an error."""
    if found.skipped:
        log.warning(
            "%d bad rows were skipped (spec.data.onBadRow); the first: %s", found.skipped, found.first
        )
    if found.truncated:
        log.warning("%d rows were cut to spec.data.maxLength", found.truncated)
    if found.repeated:
        log.warning("%d held-out rows are also in the train data", found.repeated)
    if found.numbered:
        what = "%d rows give their class as a number: its place in spec.model.labels, from 0 (%s)"
        log.warning(what, found.numbered, model.labels[0])


def _tokenised(
    paths: Sequence[Path], source: DataSource, model: ModelSource, tokenizer: Any, found: Found
) -> Samples:
    rows = examples(paths, source, model, found)
    tokenization = Tokenization(tokenizer, source.max_length, found)
    classes = model.task is Task.SEQUENCE_CLASSIFICATION
    samples: list[Sample] = []
    while chunk := list(islice(rows, READ_ROWS)):
        samples += tokenization.classified(chunk) if classes else tokenization.learned(chunk)
    if not samples:
        raise found.no_rows(paths)
    return Samples(samples, model.task, tokenizer.pad_token_id)


def step_order(samples: Samples, size: int, *parts: object) -> Iterator[np.ndarray]:
    """Yield the `size` samples of each optimizer step, without end.

    Whole permutations of the data follow one another; they depend on `parts` (seed, round, node) only. Within
    a step the longest come first, so that micro-batches carry little padding and what one leaves in memory
    has room for the next.
    """
    random = generator(*parts)
    left = np.empty(0, dtype=np.int64)
    while True:
        while len(left) < size:
            left = np.concatenate([left, random.permutation(len(samples))])
        step, left = left[:size], left[size:]
        yield step[np.argsort(-samples.lengths[step], kind="stable")]


def private_order(samples: Samples, rate: float) -> Iterator[np.ndarray]:
    """Yield the samples of each optimizer step by Poisson sampling: each is in it with a chance of `rate`.

    Of a seed that the operating system draws: who could tell the draws would have a weaker guarantee.
    """
    random = np.random.default_rng()
    while True:
        step = np.flatnonzero(random.random(len(samples)) < rate)
        yield step[np.argsort(-samples.lengths[step], kind="stable")]
