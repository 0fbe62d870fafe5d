# SPDX-License-Identifier: Apache-2.0
"""The files of `data_files.py`: their bytes, the job's fields, and what is expected of them."""

import json
from collections.abc import Iterator
from dataclasses import dataclass, field
from enum import Enum
from typing import Any

import pyarrow as pa

from fedpipe_api.job import Fields, Task
from standins.sft import CHATML, TEMPLATES
from unit import test_agent_chats as chats
from unit import test_data_rows as files

LABELS = ("a", "b")
QWEN = (TEMPLATES / "qwen3_training.jinja").read_text()
LLAMA = (TEMPLATES / "llama3_training.jinja").read_text()


class Expected(Enum):
    """What the tokens are compared with."""

    TOKENIZER = "the tokenizer"
    TRL = "TRL"
    BY_HAND = "written by hand"


@dataclass(frozen=True)
class Case:
    """One data set.

    Attributes:
        kind: of rows or fault, for the table.
        files: content by name; the first is `spec.data.train` unless `train` is.
        rows: as TRL or the tokenizer takes them; by hand, `parts` of text and whether each is learned.
        fault: what the one line says; "" where the file is good.
        expected: what the tokens are compared with.
        task: of the job.
        labels: of the job, where it has classes.
        template: of chats.
        train: spec.data.train.
        data: fields of spec.data.
        notes: what is counted.
        options: of TRL.
        longest: spec.data.maxLength.
    """

    kind: str
    files: dict[str, bytes]
    rows: list[dict[str, Any]] = field(default_factory=list)
    fault: str = ""
    expected: Expected = Expected.TOKENIZER
    task: Task = Task.SEQUENCE_CLASSIFICATION
    labels: tuple[str, ...] = LABELS
    template: str | None = None
    train: str = ""
    data: dict[str, Any] = field(default_factory=dict)
    notes: dict[str, int] = field(default_factory=dict)
    options: dict[str, Any] = field(default_factory=dict)
    longest: int = 4096

    @property
    def name(self) -> str:
        """The file, or what spec.data.train names."""
        return self.train or next(iter(self.files))


def texts() -> list[str]:
    """Return what the tokenizer is trained on."""
    return [json.dumps(chats.SYSTEM + chats.CALLS)] * 3


def lines(rows: list[Any]) -> bytes:
    """Return rows as JSON lines."""
    return "".join(json.dumps(row) + "\n" for row in rows).encode()


def cases() -> Iterator[Case]:
    """Yield all cases."""
    for name, content in files.SAME.items():
        yield Case("format and encoding", {name: content}, files.TWO)
    yield from _sets()
    yield from _labels()
    yield from _chats()
    yield from _texts()
    for name, (content, fault) in files.FAULTS.items():
        yield Case(
            "broken file", {name: content}, task=Task.CAUSAL_LM, fault=name.replace(".", r"\.") + fault
        )
    yield from _faults()


def _sets() -> Iterator[Case]:
    first, second = (lines([row]) for row in files.TWO)
    shards = {"part/0.jsonl": first, "part/1.jsonl": second}
    for train in ("part", "part/*.jsonl", "**/*.jsonl"):
        yield Case("shards", shards, files.TWO, train=train)
    yield Case(
        "shards",
        {**shards, "part/2.csv": b"text,label\nx,a\n"},
        train="part",
        fault="files of several formats",
    )
    yield Case("shards", shards, train="part/*.csv", fault=r"part/\*\.csv: no data files")
    yield Case(
        "another encoding",
        {"latin.csv": files.CSV.encode("cp1252")},
        files.TWO,
        data={"encoding": "windows-1252"},
    )
    yield Case(
        "other columns", {"case.csv": files.CSV.replace("text,label", "Text,LABEL").encode()}, files.TWO
    )
    nested = [{"sample": {"text": row["text"]}, "label": row["label"]} for row in files.TWO]
    given = {"fields": Fields(text="sample.text")}
    yield Case("other columns", {"nested.jsonl": lines(nested)}, files.TWO, data=given)
    yield Case(
        "other columns",
        {"nested.parquet": files.parquet(pa.Table.from_pylist(nested))},
        files.TWO,
        data=given,
    )
    pairs = [
        {"text": "Paris", "pair": "France", "label": "a"},
        {"text": "Madrid", "pair": "Spain", "label": "b"},
    ]
    yield Case("text pairs", {"pairs.jsonl": lines(pairs)}, pairs, data={"fields": Fields(text_pair="pair")})
    good, bad = files.TWO[0], {"text": "vault"}
    yield Case(
        "bad rows skipped", {"some.jsonl": lines([good, bad, good]) + b'{"text": \n'}, [good, good],
        data={"on_bad_row": "skip"}, notes={"skippedRows": 2},
    )  # fmt: skip
    yield Case(
        "bad rows skipped",
        {"all.jsonl": lines([bad, bad])},
        data={"on_bad_row": "skip"},
        fault="2 rows were skipped",
    )


def _labels() -> Iterator[Case]:
    numbers = ("1", "2", "3", "4", "5")
    expected = [{"text": "cat", "label": label} for label in numbers]
    integers = [{"text": "cat", "label": int(label)} for label in numbers]
    csv = "text,label\n" + "".join(f"cat,{label}\n" for label in numbers)
    for name, content in (
        ("integers.jsonl", lines(integers)),
        ("floats.jsonl", lines([{**row, "label": float(row["label"])} for row in integers])),
        ("integers.csv", csv.encode()),
        ("integers.parquet", files.parquet(pa.Table.from_pylist(integers))),
    ):
        yield Case("labels that are numbers", {name: content}, expected, labels=numbers)
    yield Case(
        "labels that are numbers", {"zero.jsonl": lines([{"text": "vault", "label": 0}])}, labels=numbers,
        fault=r"zero\.jsonl:1: field 'label' is a number, not one of the job's 5 labels",
    )  # fmt: skip
    places = [{"text": "x", "label": 1}, {"text": "y", "label": "a"}]
    yield Case(
        "labels by their place", {"places.jsonl": lines(places)}, [{"text": "x", "label": "b"}, {"text": "y", "label": "a"}],
        notes={"numberedRows": 1},
    )  # fmt: skip
    yield Case("labels that are true and false", {"booleans.jsonl": lines([{"text": "x", "label": True}])},
               [{"text": "x", "label": "true"}], labels=("true", "false"))  # fmt: skip
    for label, what in (
        (True, "is true or false, not one"), ("²", "is not one"), (None, "is null"), (1.5, "is a number, not"),
        ([], "is a list, not"), ("cow", "is not one"),
    ):  # fmt: skip
        yield Case("no label", {f"{type(label).__name__}.jsonl": lines([{"text": "vault", "label": label}])},
                   fault=f":1: field 'label' {what}")  # fmt: skip


def _chats() -> Iterator[Case]:
    chat = [{"messages": chats.CHAT}, {"messages": chats.SYSTEM}]
    learned = {"assistant_only_loss": True}
    table = pa.Table.from_pylist(chat)
    for name, content in {
        "chat.jsonl": lines(chat), "chat.json": json.dumps(chat, indent=1).encode(), "chat.ndjson": lines(chat),
        "chat.jsonl.zst": files.zstd(lines(chat)), "chat.parquet": files.parquet(table), "chat.arrow": files.arrow(table),
    }.items():  # fmt: skip
        yield Case(
            "chats",
            {name: content},
            chat,
            expected=Expected.TRL,
            task=Task.CAUSAL_LM,
            template=QWEN,
            options=learned,
        )
    yield Case("chats", {"llama.jsonl": lines(chat)}, chat, expected=Expected.TRL, task=Task.CAUSAL_LM, template=LLAMA,
               options=learned)  # fmt: skip
    tools = [{"messages": chats.CALLS, "tools": json.dumps([chats.FUNCTION])}]
    objects = [{"messages": chats.CALLS, "tools": [chats.FUNCTION]}]
    for name, rows in (("tools.jsonl", tools), ("tool_objects.jsonl", objects)):
        yield Case("chats with tools", {name: lines(rows)}, tools, expected=Expected.TRL, task=Task.CAUSAL_LM,
                   template=QWEN, options=learned)  # fmt: skip
    names = {"user": "human", "assistant": "gpt", "system": "system"}
    turns = [{"from": names[m["role"]], "value": m["content"]} for m in chats.SYSTEM]
    columns = {key: [turn[key] for turn in turns] for key in ("from", "value")}
    shared = {
        "sharegpt.jsonl": lines([{"conversations": turns, "id": "1"}]),
        "sharegpt_system.jsonl": lines([{"conversations": turns[1:], "system": "Be brief."}]),
        "sharegpt_columns.jsonl": lines([{"conversations": columns}]),
        "sharegpt.parquet": files.parquet(pa.Table.from_pylist([{"conversations": turns}])),
    }
    for name, content in shared.items():
        yield Case("ShareGPT", {name: content}, chat[1:], expected=Expected.TRL, task=Task.CAUSAL_LM, template=QWEN,
                   data={"format": "sharegpt"}, options=learned)  # fmt: skip
    row = {"instruction": "Translate.", "input": "Hello", "output": "Hallo"}
    alpaca = [
        {
            "messages": [
                {"role": "user", "content": "Translate.\n\nHello"},
                {"role": "assistant", "content": "Hallo"},
            ]
        }
    ]
    for name, content in {
        "alpaca.jsonl": lines([row]), "alpaca.json": json.dumps([row]).encode(),
        "alpaca.csv": b"instruction,input,output\nTranslate.,Hello,Hallo\n",
    }.items():  # fmt: skip
        yield Case("Alpaca", {name: content}, alpaca, expected=Expected.TRL, task=Task.CAUSAL_LM, template=QWEN,
                   data={"format": "alpaca"}, options=learned)  # fmt: skip
    completed = [{"prompt": one[:-1], "completion": one[-1:]} for one in (chats.CHAT, chats.SYSTEM)]
    for name, content in {
        "completed.jsonl": lines(completed), "completed.parquet": files.parquet(pa.Table.from_pylist(completed)),
    }.items():  # fmt: skip
        yield Case("chat prompt and completion", {name: content}, completed, expected=Expected.TRL, task=Task.CAUSAL_LM,
                   template=(TEMPLATES / "llama3.jinja").read_text())  # fmt: skip


def _texts() -> Iterator[Case]:
    completions = [
        {"prompt": "What is the capital of France?", "completion": " Paris."},
        {"prompt": "What is the capital of France? ", "completion": "Paris."},
        {"prompt": "Weath", "completion": "er in Paris?</s>"},
    ]
    plain = [{"text": "What is the weather?"}, {"text": "It is sunny.</s>"}, {"text": "é — "}]
    for rows, kind in ((completions, "prompt and completion"), (plain, "texts")):
        for name, content in {
            f"{kind.split()[0]}.jsonl": lines(rows), f"{kind.split()[0]}.arrow": files.arrow(pa.Table.from_pylist(rows)),
        }.items():  # fmt: skip
            yield Case(kind, {name: content}, rows, expected=Expected.TRL, task=Task.CAUSAL_LM)
    yield Case(
        "cut, and counted", {"long.jsonl": lines([{"prompt": "~" * 40, "completion": "@#"}])},
        [{"parts": [("~" * 6, False), ("@#</s>", True)]}],
        expected=Expected.BY_HAND, task=Task.CAUSAL_LM, longest=9, notes={"truncatedRows": 1},
    )  # fmt: skip
    mapped = {"fields": Fields(prompt="instruction", completion="output")}
    row = {"instruction": "Translate.", "input": "vault", "output": "a"}
    yield Case("Alpaca", {"mapped.jsonl": lines([row])}, task=Task.CAUSAL_LM, data=mapped,
               fault=":1: field 'input' would be left out; set spec.data.format: alpaca")  # fmt: skip


def _faults() -> Iterator[Case]:
    for name, (rows, fault) in chats.FAULTS.items():
        yield Case("broken row", {f"{name}.jsonl": lines(rows)}, fault=rf"\.jsonl:\d: .*{fault.lstrip(':12 ')}",
                   task=Task.CAUSAL_LM, template=CHATML)  # fmt: skip
    for field_, value, fault in (
        ("text", None, "field 'text' is null"), ("text", "\ud800", "half a surrogate"), ("text", 5, "is a number, not text"),
    ):  # fmt: skip
        yield Case("broken row", {f"{fault[-4:].strip()}.jsonl": lines([{field_: value, "label": "a"}])},
                   fault=rf"\.jsonl:1: .*{fault}")  # fmt: skip
