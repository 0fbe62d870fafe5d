# SPDX-License-Identifier: Apache-2.0
"""A node's samples: tokenised once, kept as one flat array, handed out as deterministic padded batches."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import chain, islice
from pathlib import Path
from typing import Any

import numpy as np
import torch

from fedpipe_api.base import UserError
from fedpipe_api.data_files import locate
from fedpipe_api.job import DataSource, ModelSource, Task

from ..errors import Stopped
from .examples import check_length, examples, held_out_of, predicted_field
from .seeds import generator

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

    `marks` holds the class index of each sample, or the number of its prompt tokens, not predicted.
    """

    def __init__(self, tokens: list[list[int]], marks: list[int], task: Task, padding: int):
        lengths = np.fromiter(map(len, tokens), dtype=np.int64, count=len(tokens))
        self._ends = np.cumsum(lengths)
        self._tokens = np.fromiter(chain.from_iterable(tokens), dtype=np.int32, count=int(lengths.sum()))
        self._task = task
        self._padding = padding
        self.marks = np.asarray(marks, dtype=np.int64)
        self.lengths = lengths

    def __len__(self) -> int:
        return len(self.lengths)

    def tokens(self, index: int) -> np.ndarray:
        """Return the token ids of one sample."""
        end = self._ends[index]
        return self._tokens[end - self.lengths[index] : end]

    def targets(self, indices: np.ndarray) -> int:
        """Return how many predictions the samples ask for: one each, or their predicted tokens."""
        if self._task is Task.SEQUENCE_CLASSIFICATION:
            return len(indices)
        return int((self.lengths[indices] - np.maximum(self.marks[indices], 1)).sum())

    def batch(self, indices: np.ndarray, device: torch.device) -> Batch:
        """Return the samples padded on the right, on the device; the host does not wait for the copy."""
        width = -(-int(self.lengths[indices].max()) // PADDING_MULTIPLE) * PADDING_MULTIPLE
        ids = np.full((len(indices), width), self._padding, dtype=np.int64)
        mask = np.zeros((len(indices), width), dtype=np.int64)
        for row, index in enumerate(indices):
            tokens = self.tokens(index)
            ids[row, : len(tokens)] = tokens
            mask[row, : len(tokens)] = 1
        keep = None
        if self._task is Task.SEQUENCE_CLASSIFICATION:
            labels = self.marks[indices]
        else:
            labels, keep = self._next_tokens(ids, indices)

        def moved(array: np.ndarray) -> torch.Tensor:
            tensor = torch.from_numpy(array)
            return tensor.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else tensor

        return Batch(
            inputs={"input_ids": moved(ids), "attention_mask": moved(mask)},
            labels=moved(labels),
            keep=None if keep is None else moved(keep),
            tokens=int(mask.sum()),
        )

    def _next_tokens(self, ids: np.ndarray, indices: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Return the labels (b, k) and the k positions at which at least one sample predicts."""
        places = np.arange(ids.shape[1])
        predicted = (places >= np.maximum(self.marks[indices], 1)[:, None]) & (
            places < self.lengths[indices][:, None]
        )
        keep = np.flatnonzero(predicted[:, 1:].any(axis=0))
        if not len(keep):
            keep = np.zeros(1, dtype=np.int64)
        labels = np.where(predicted, ids, IGNORED)[:, keep + 1]
        return np.ascontiguousarray(labels), keep

    def part(self, indices: np.ndarray) -> "Samples":
        """Return the samples of the given indices."""
        return Samples(
            [self.tokens(index).tolist() for index in indices],
            self.marks[indices].tolist(),
            self._task,
            self._padding,
        )


def load(
    directory: Path, source: DataSource, model: ModelSource, tokenizer: Any, *, seed: int, longest: int | None
) -> tuple[Samples, Samples]:
    """Return the train and the held-out samples of a node.

    The held-out part is the evaluation file, else `evaluation_share` of the train file, chosen by the seed.

    Args:
        directory: the node's data volume.
        source: files, fields and lengths.
        model: task and labels.
        tokenizer: a transformers tokenizer.
        seed: of the job.
        longest: tokens the model can take, None where it has no limit.

    Raises:
        UserError: a mistake in a file, named with its line, or a maximum length above the model's.
    """
    check_length(source, longest)
    train_path, evaluation_path = locate(directory, source)
    train = _tokenised(train_path, source, model, tokenizer)
    if evaluation_path:
        return train, _tokenised(evaluation_path, source, model, tokenizer)
    held_out = held_out_of(len(train), source)
    order = generator(seed, "evaluation").permutation(len(train))
    return train.part(np.sort(order[held_out:])), train.part(np.sort(order[:held_out]))


def _tokenised(paths: Sequence[Path], source: DataSource, model: ModelSource, tokenizer: Any) -> Samples:
    rows = examples(paths, source, model)
    classes = model.task is Task.SEQUENCE_CLASSIFICATION
    tokens: list[list[int]] = []
    marks: list[int] = []
    while chunk := list(islice(rows, READ_ROWS)):
        texts = [(row.place, row.text) for row in chunk]
        if classes:
            marks += [row.label for row in chunk]
            ids = _ids(tokenizer, texts, source.fields.text, truncation=True, max_length=source.max_length)
            # A tokenizer without special tokens gives nothing for an empty text.
            tokens += [sample or [tokenizer.eos_token_id] for sample in ids]
            continue
        prompts: list[list[int]] = [[]] * len(chunk)
        prompted = chunk[0].prompt is not None
        if prompted:
            prompts = _ids(tokenizer, [(row.place, row.prompt or "") for row in chunk], source.fields.prompt)
        predicted = predicted_field(source, prompted)
        completions = _ids(tokenizer, texts, predicted, add_special_tokens=not prompted)
        for prompt, completion in zip(prompts, completions, strict=True):
            sample, mark = _joined(prompt, completion, tokenizer.eos_token_id, source.max_length)
            tokens.append(sample)
            marks.append(mark)
    return Samples(tokens, marks, model.task, tokenizer.pad_token_id)


def _ids(tokenizer: Any, texts: list[tuple[str, str]], field: str, **options: Any) -> list[list[int]]:
    """Return the token ids of texts, each with its row's place and all of one field."""
    try:
        ids: list[list[int]] = tokenizer(
            [text for _, text in texts],
            return_attention_mask=False,
            return_token_type_ids=False,
            verbose=False,
            **options,
        )["input_ids"]
    except (Stopped, KeyboardInterrupt, MemoryError):
        raise
    except BaseException as error:  # a panic of its Rust is no Exception
        if len(texts) == 1:
            what = f"{texts[0][0]}: the tokenizer fails at field {field!r}: {type(error).__name__}"
            raise UserError(f"{what}; fix or remove the row") from None
        for one in texts:  # which one it is
            _ids(tokenizer, [one], field, **options)
        raise
    return ids


def _joined(prompt: list[int], completion: list[int], end: int, longest: int) -> tuple[list[int], int]:
    """Return prompt + completion + end token within `longest` tokens, and the prompt's length.

    The completion is what is learned, so the prompt gives way first, from its beginning.
    """
    if completion[-1:] != [end]:
        completion = [*completion, end]
    completion = completion[: longest - 1] if prompt else completion[:longest]
    prompt = prompt[max(0, len(prompt) + len(completion) - longest) :]
    return prompt + completion, len(prompt)


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
