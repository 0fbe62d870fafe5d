# SPDX-License-Identifier: Apache-2.0
"""What a node's data files give to train on: texts with classes, texts, or prompts and chats with answers."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fedpipe_api.base import UserError
from fedpipe_api.job import DataSource, ModelSource, Task
from fedpipe_api.rows import Row, read
from fedpipe_api.rows.data_paths import locate
from fedpipe_api.wire import DataNotes

from .chat_layouts import Message, alpaca, has, kind_of, messages_of, sharegpt, text_of, tools_of, value_of


@dataclass(frozen=True, slots=True)
class Example:
    """One row: `text` is classified as `label`, or predicted; after the prompt, if there is one.

    With `messages` it is a chat, whose assistant's messages are predicted, or those from `given` on. Where
    there is both, a tokenizer with a chat template takes the messages, another the text.
    """

    place: str
    field: str
    text: str = ""
    pair: str | None = None
    label: int = 0
    prompt: str | None = None
    messages: tuple[Message, ...] = ()
    given: int | None = None
    tools: list[Any] | None = None


@dataclass
class Found:
    """What was found in a node's data; `bad` decides by `onBadRow` whether one row's fault is everybody's.

    Of a row only the `readable` fields are looked at, where they are given.
    """

    skip: bool
    readable: frozenset[str] | None = None
    skipped: int = 0
    truncated: int = 0
    repeated: int = 0
    numbered: int = 0
    first: UserError | None = None

    def bad(self, error: UserError) -> None:
        """Count a bad row, or raise what is wrong with it."""
        if not self.skip:
            raise error
        self.skipped += 1
        self.first = self.first or error

    def only_readable(self, row: Row) -> Row:
        """Return a row as if it had no other fields than those that may be read."""
        if self.readable is None:
            return row
        return row._replace(fields={name: row.fields[name] for name in row.fields if name in self.readable})

    def no_rows(self, paths: Sequence[Path]) -> UserError:
        """Return what to raise where no row is left."""
        if self.first:
            return UserError(f"{self.first} ({self.skipped} rows were skipped, none is left)")
        return UserError(f"{paths[0]}: no rows; it needs at least one")

    def notes(self) -> DataNotes:
        """Return the counts as they are reported."""
        return DataNotes(
            skipped_rows=self.skipped,
            truncated_rows=self.truncated,
            repeated_rows=self.repeated,
            numbered_rows=self.numbered,
        )


def examples(
    paths: Sequence[Path], source: DataSource, model: ModelSource, found: Found
) -> Iterator[Example]:
    """Yield the examples of files.

    Raises:
        UserError: a mistake in a file, named with its line and field, or no rows.
    """
    make: Callable[[Row], Example] | None = None
    empty = True
    rows = (row for path in paths for row in read(path, source.format, source.encoding, found.bad))
    for row in map(found.only_readable, rows):
        try:
            make = make or _maker(row, source, model, found)
            example = make(row)
        except UserError as error:
            found.bad(error)
            continue
        empty = False
        yield example
    if empty:
        raise found.no_rows(paths)


def count(directory: Path, source: DataSource, model: ModelSource) -> tuple[int, int, Found]:
    """Return how many samples a node trains on and how many it holds out, from its checked files.

    Raises:
        UserError: as `examples`, or a file is missing.
    """
    found = Found(source.on_bad_row == "skip")
    train_paths, evaluation_paths = locate(directory, source)
    train = sum(1 for _ in examples(train_paths, source, model, found))
    if evaluation_paths:
        return train, sum(1 for _ in examples(evaluation_paths, source, model, found)), found
    held_out = held_out_of(train, source)
    return train - held_out, held_out, found


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


def _maker(row: Row, source: DataSource, model: ModelSource, found: Found) -> Callable[[Row], Example]:
    """Return what makes examples of rows such as this first one."""
    if model.task is Task.SEQUENCE_CLASSIFICATION:
        if source.format in ("sharegpt", "alpaca"):
            raise UserError(
                f"spec.data.format: {source.format} is for causal-lm; name the fields of text and label"
            )
        return lambda row: _classified(row, source, model.labels, found)
    fields = source.fields
    if source.format == "sharegpt":
        name = "conversations" if fields.messages == "messages" else fields.messages
        return lambda row: _chat(row, name, sharegpt(row, name), tools_of(row, fields.tools))
    if source.format == "alpaca":
        return _alpaca
    if {"chosen", "rejected"} <= row.fields.keys() and not {"chosen", "rejected"} & set(
        fields.to_dict().values()
    ):
        raise UserError(
            f"{row.place}: fields 'chosen' and 'rejected' are preference pairs, as for DPO, which FedPipe "
            "does not train; to learn the chosen, name it in spec.data.fields (completion or messages)"
        )
    if has(row, fields.messages):
        name = fields.messages
        return lambda row: _chat(row, name, messages_of(row, name), tools_of(row, fields.tools))
    if fields.prompt in row.fields and (has(row, fields.completion) or not has(row, fields.text)):
        return lambda row: _completed(row, source)
    if not has(row, fields.text):
        for names, layout in ((("conversations",), "sharegpt"), (("instruction", "output"), "alpaca")):
            if all(name in row.fields for name in names):
                raise UserError(f"{row.place}: no field {fields.text!r}; set spec.data.format: {layout}")
    return lambda row: Example(row.place, fields.text, _learned(row, fields.text))


def _classified(row: Row, source: DataSource, labels: tuple[str, ...], found: Found) -> Example:
    fields = source.fields
    text = text_of(row, fields.text)
    pair = text_of(row, fields.text_pair) if fields.text_pair else None
    label, numbered = _label(row, fields.label, labels)
    found.numbered += numbered
    return Example(row.place, fields.text, text, pair, label)


def _chat(row: Row, name: str, messages: list[Message], tools: list[Any] | None) -> Example:
    if not any(message["role"] == "assistant" for message in messages):
        raise UserError(
            f"{row.place}: field {name!r} has no message of the assistant; nothing is to be learned"
        )
    return Example(row.place, name, messages=tuple(messages), tools=tools)


def _completed(row: Row, source: DataSource) -> Example:
    """Return a prompt with its completion; both are texts, or both messages."""
    fields = source.fields
    prompt, completion = value_of(row, fields.prompt), value_of(row, fields.completion)
    if has(row, "label") and isinstance(value_of(row, "label"), bool):
        raise UserError(
            f"{row.place}: field 'label' is true or false, as for KTO, which FedPipe does not train; "
            "keep the good completions and remove the field"
        )
    if isinstance(prompt, list) and isinstance(completion, list):
        given = messages_of(row, fields.prompt)
        messages = messages_of(row, fields.completion)
        if not messages:
            raise UserError(f"{row.place}: field {fields.completion!r} is empty; nothing is to be learned")
        tools = tools_of(row, fields.tools)
        return Example(
            row.place, fields.completion, messages=(*given, *messages), given=len(given), tools=tools
        )
    unread = fields.prompt == "instruction" and fields.completion != "input"
    if unread and has(row, "input") and value_of(row, "input") != "":
        raise UserError(f"{row.place}: field 'input' would be left out; set spec.data.format: alpaca")
    text = _learned(row, fields.completion)
    return Example(row.place, fields.completion, text, prompt=text_of(row, fields.prompt))


def _alpaca(row: Row) -> Example:
    """Return a row of Alpaca as a chat, and in its authors' words for models without a chat template."""
    system, instruction, given, answer = alpaca(row)
    if not answer.strip():
        raise UserError(f"{row.place}: field 'output' is empty; nothing is to be learned")
    asked = f"{instruction}\n\n{given}" if given else instruction
    messages = [{"role": "system", "content": system}] if system else []
    messages += [{"role": "user", "content": asked}, {"role": "assistant", "content": answer}]
    context = ", paired with an input that provides further context" if given else ""
    opening = system or (
        f"Below is an instruction that describes a task{context}. "
        "Write a response that appropriately completes the request."
    )
    more = f"\n\n### Input:\n{given}" if given else ""
    prompt = f"{opening}\n\n### Instruction:\n{instruction}{more}\n\n### Response:\n"
    given_messages = len(messages) - 1
    return Example(row.place, "output", answer, prompt=prompt, messages=tuple(messages), given=given_messages)


def _learned(row: Row, name: str) -> str:
    text = text_of(row, name)
    if not text.strip():
        raise UserError(f"{row.place}: field {name!r} is empty; nothing is to be learned")
    return text


def _label(row: Row, name: str, labels: tuple[str, ...]) -> tuple[int, bool]:
    """Return the index of a row's class, and whether the row itself gives the index.

    A number is a name where names are numbers, else an index.
    """
    value = value_of(row, name)
    written = _names_of(value)
    for one in written:
        if one in labels:
            return labels.index(one), False
    numbers = not any(_is_number(label) for label in labels)
    index = next((one for one in written if one.isascii() and one.isdecimal() and len(one) < 10), None)
    if numbers and index is not None and int(index) < len(labels):
        return int(index), True
    shown = ", ".join(labels[:8]) + (", …" if len(labels) > 8 else "")
    what = "is not" if isinstance(value, str) else f"is {kind_of(value)}, not"
    raise UserError(f"{row.place}: field {name!r} {what} one of the job's {len(labels)} labels: {shown}")


def _names_of(value: object) -> list[str]:
    """Return how a class of this value may be called."""
    match value:
        case bool():
            return ["true", "True", "TRUE"] if value else ["false", "False", "FALSE"]
        case str():
            return [value]
        case int():
            return [str(value)] if abs(value) < 10**9 else []
        case float():  # columns of whole numbers become these where one is missing
            return [repr(value), *([str(int(value))] if value.is_integer() and abs(value) < 10**9 else [])]
    return []


def _is_number(label: str) -> bool:
    try:
        float(label)
    except ValueError:
        return False
    return True
