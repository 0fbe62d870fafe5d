# SPDX-License-Identifier: Apache-2.0
"""What a node's data files give to train on: texts with classes, or prompts with completions, checked."""

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

from fedpipe_api.base import UserError
from fedpipe_api.data_files import locate
from fedpipe_api.job import DataSource, ModelSource, Task
from fedpipe_api.rows import Row, read


class Example(NamedTuple):
    """One row: `text` is classified as `label`, or predicted; after the prompt, if there is one."""

    place: str
    text: str
    prompt: str | None = None
    label: int = 0


def examples(paths: Sequence[Path], source: DataSource, model: ModelSource) -> Iterator[Example]:
    """Yield the examples of files.

    Raises:
        UserError: a mistake in the file, named with its line and field, or no rows.
    """
    fields = source.fields
    classes = model.task is Task.SEQUENCE_CLASSIFICATION
    prompted: bool | None = None
    empty = True
    for row in (row for path in paths for row in read(path, source.format, source.encoding)):
        empty = False
        if classes:
            label = _label(row, fields.label, model.labels)
            yield Example(row.place, _text(row, fields.text), label=label)
            continue
        if prompted is None:
            prompted = fields.prompt in row.fields
        prompt = _text(row, fields.prompt) if prompted else None
        yield Example(row.place, _text(row, predicted_field(source, prompted)), prompt)
    if empty:
        raise UserError(f"{paths[0]}: no rows; it needs at least one")


def predicted_field(source: DataSource, prompted: bool) -> str:
    """Return the field whose tokens a language model learns to predict."""
    return source.fields.completion if prompted else source.fields.text


def count(directory: Path, source: DataSource, model: ModelSource) -> tuple[int, int]:
    """Return how many samples a node trains on and how many it holds out, from its checked files.

    Raises:
        UserError: as `examples`, or a file is missing.
    """
    train_path, evaluation_path = locate(directory, source)
    train = _count(train_path, source, model)
    if evaluation_path:
        return train, _count(evaluation_path, source, model)
    held_out = held_out_of(train, source)
    return train - held_out, held_out


def held_out_of(rows: int, source: DataSource) -> int:
    """Return how many of a file's rows are held out where there is no evaluation file."""
    held_out = round(source.evaluation_share * rows)
    return min(max(held_out, 1), rows - 1) if source.evaluation_share > 0 else held_out


def check_length(source: DataSource, longest: int | None) -> None:
    """Raise UserError where samples may be longer than the tokens that the model takes."""
    if longest is not None and source.max_length > longest:
        raise UserError(
            f"spec.data.maxLength: {source.max_length}, but the model has {longest} positions; lower it"
        )


def _count(paths: Sequence[Path], source: DataSource, model: ModelSource) -> int:
    return sum(1 for _ in examples(paths, source, model))


def _text(row: Row, field: str) -> str:
    value = _value(row, field)
    if not isinstance(value, str):
        raise UserError(f"{row.place}: field {field!r} is {type(value).__name__}, not text; write a string")
    if not value.isascii():
        try:
            value.encode()
        except UnicodeEncodeError:  # JSON can escape half a surrogate pair; no tokenizer takes it
            raise UserError(
                f"{row.place}: field {field!r} holds half a surrogate pair; fix or remove the row"
            ) from None
    return value


def _label(row: Row, field: str, labels: tuple[str, ...]) -> int:
    value = _value(row, field)
    if isinstance(value, str) and value in labels:
        return labels.index(value)
    if isinstance(value, str) and value.isdecimal() and len(value) < 10:
        value = int(value)
    if isinstance(value, int) and not isinstance(value, bool) and 0 <= value < len(labels):
        return value
    shown = ", ".join(labels[:8]) + (", …" if len(labels) > 8 else "")
    raise UserError(f"{row.place}: field {field!r} is not one of the job's {len(labels)} labels: {shown}")


def _value(row: Row, field: str) -> object:
    value: object = row.fields.get(field)
    if value is None:
        raise UserError(f"{row.place}: no field {field!r}; add it or correct spec.data.fields")
    return value
