# SPDX-License-Identifier: Apache-2.0
"""Messages about a node's data depend on where the mistake is, never on the values there."""

import csv
import gzip
import io
import json
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory

import pyarrow
import pyarrow.parquet
import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from agent_fixtures import registered, save_tiny_model
from fedpipe_agent.errors import describe
from fedpipe_agent.train import data
from fedpipe_agent.train.model import Source, read_tokenizer
from fedpipe_api.job import Task

FIRST, SECOND = "zq7vault", "kj4chest"
"""Two secrets; all is generated with the first, and once more with the second in its place."""


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    return read_tokenizer(Source(str(save_tiny_model("bert", tmp_path_factory.mktemp("bert")))))


@dataclass(frozen=True)
class Said:
    """What became of a data file."""

    message: str
    samples: int


def load(tokenizer, name, content, task, encoding=None):
    with TemporaryDirectory() as directory:
        (Path(directory) / name).write_bytes(content)
        job = registered(task, train=name)
        source = job.data.model_copy(update={"encoding": encoding})
        try:
            train, held_out, _ = data.load(
                Path(directory), source, job.model, tokenizer, seed=7, longest=None
            )
        except Exception as error:
            return Said(describe(error).replace(directory, ""), 0)
        return Said("", len(train) + len(held_out))


def agree(tokenizer, name, content, task=Task.SEQUENCE_CLASSIFICATION, encoding=None):
    """Load the content with each of the secrets; return the message, which must be the same."""
    first = load(tokenizer, name, content, task, encoding)
    second = load(tokenizer, name, content.replace(FIRST.encode(), SECOND.encode()), task, encoding)
    assert first == second
    assert FIRST not in first.message
    assert "\n" not in first.message
    return first.message


SECRETS = st.sampled_from(
    [FIRST, f"cat {FIRST}", f"{FIRST}\n", f'"{FIRST}', f"{FIRST} é", f"{FIRST}\ud800", "", "a"]
)
VALUES = st.recursive(
    st.one_of(
        SECRETS,
        st.none(),
        st.booleans(),
        st.integers(0, 10**6),
        st.floats(),
        st.just("²"),
        st.just("7" * 5000),
    ),
    lambda inner: st.lists(inner, max_size=2) | st.dictionaries(SECRETS, inner, max_size=2),
    max_leaves=4,
)
FIELDS = st.one_of(
    st.sampled_from(["text", "label", "prompt", "completion", "messages", "tools", "role", "content"]),
    SECRETS,
)
ROWS = st.lists(st.one_of(VALUES, st.dictionaries(FIELDS, VALUES, max_size=4)), min_size=1, max_size=5)


@st.composite
def files(draw):
    """A file's name and its bytes: rows in one of the forms, whole or damaged."""
    rows = draw(ROWS)
    form = draw(st.sampled_from(["jsonl", "csv"]))
    if form == "jsonl":
        content = "".join(json.dumps(row) + "\n" for row in rows).encode()
    else:
        text = io.StringIO()
        csv.writer(text).writerow(["text", "label", FIRST])
        for row in rows:
            values = list(row.values()) if isinstance(row, dict) else [row]
            csv.writer(text).writerow(values)
        content = text.getvalue().encode("utf-8", "surrogatepass")
    # Never inside a secret: the two files must be damaged alike.
    for damage in draw(
        st.lists(st.sampled_from([b"\xff", b"\x00", b'"', b"}", b"\\", b"[" * 5000]), max_size=2)
    ):
        place = draw(st.integers(0, len(content)))
        kept = content[:place]
        if FIRST.encode() not in content[max(0, place - 7) : place + 7]:
            content = kept + damage + content[place:]
    return f"train.{form}", content


@settings(max_examples=300, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(files(), st.sampled_from(list(Task)))
@example(
    ("train.csv", f"\xfftext,label,{FIRST}\r\n{FIRST}\r\n".encode("latin-1")), Task.SEQUENCE_CLASSIFICATION
)
def test_no_message_depends_on_a_value(tokenizer, file, task):
    # Given, because an encoding is guessed by the text itself, and a guess may differ by it.
    agree(tokenizer, *file, task, "utf-8")


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("train.jsonl", f'{{"text": "a", "label": "{FIRST}"}}', ":1: field 'label' is not one of the job's 3 labels"),
        ("train.jsonl", f'{{"text": "a", "label": ["{FIRST}"]}}', ":1: field 'label' is a list, not one of the job's 3"),
        ("train.jsonl", '{"text": "a", "label": "\\u00b2"}', ":1: field 'label' is not one of the job's 3 labels"),
        ("train.jsonl", f'{{"text": {{"{FIRST}": 1}}, "label": 0}}', ":1: field 'text' is an object, not text"),
        ("train.jsonl", f'{{"{FIRST}": 1}}', ":1: no field 'text'"),
        ("train.jsonl", f'{{"text": "{FIRST}", "label": 0}} {FIRST}', ":1: not a JSON object: its syntax is wrong at"),
        ("train.jsonl", f'{{"text": "{FIRST}\\q"}}', ":1: not a JSON object: its syntax is wrong at column"),
        ("train.jsonl", f'["{FIRST}"]', ":1: not a JSON object; write one"),
        ("train.jsonl", '{"text": ' + "7" * 5000 + "}", ":1: not a JSON object: a number is too long"),
        ("train.jsonl", "[" * 100_000, ":1: not a JSON array: it is nested too deep"),
        ("train.jsonl", f'{{"text": "{FIRST} \\ud800", "label": 0}}', ":1: field 'text' holds half a surrogate pair"),
        ("train.jsonl", f'{{"text": "{FIRST}\xff"}}', ":1: not a JSON object: byte 19 is not UTF-8"),
        ("train.csv", f"text,label\n{FIRST},0\n{FIRST}\xff,0\n", ":3: not CSV: byte 9 is not UTF-8"),
        ("train.csv", f'text,label\n{FIRST},0\n"{FIRST}" {FIRST},0\n', ":3: not CSV: its quotes or line ends are"),
        ("train.csv", f"{FIRST},{FIRST}\n{FIRST},{FIRST}\n", ":1: two columns have the same name"),
        ("train.jsonl", '{"text": ' + "[" * 100_000, ":1: not a JSON object: it is nested too deep"),
        ("train.csv", f"text,{FIRST}\n{FIRST},{FIRST}\n", ":2: no field 'label'"),
        ("train.csv", f"text,label\n{FIRST},0,{FIRST}\n", ":2: 3 columns, but the header has 2"),
        ("train.csv.gz", FIRST, ": cannot be read: not a whole gzip file"),
        ("train.parquet", FIRST, ": not a readable Parquet or Arrow file"),
        (FIRST + ".txt", "a", ": unknown suffix"),
    ],
)  # fmt: skip
def test_each_mistake_is_named_by_its_place(tokenizer, name, content, message):
    if name.startswith(FIRST):
        assert message in load(tokenizer, name, b"a", Task.SEQUENCE_CLASSIFICATION).message
        return
    assert message in agree(tokenizer, name, content.encode("latin-1"))


def test_a_gzip_file_that_is_cut_or_changed(tokenizer):
    whole = gzip.compress(f'{{"text": "{FIRST}", "label": 0}}\n'.encode() * 50, mtime=0)
    for damaged in (whole[:-20], whole[:20] + b"\xff\x00" + whole[22:], FIRST.encode()):
        said = load(tokenizer, "train.jsonl.gz", damaged, Task.SEQUENCE_CLASSIFICATION)
        assert said.message.startswith("/train.jsonl.gz")
        assert FIRST not in said.message


def test_a_parquet_file_of_unreadable_values(tokenizer):
    table = pyarrow.table({"text": [f"{FIRST} {i}" for i in range(3)], "label": [FIRST] * 3})
    buffer = io.BytesIO()
    pyarrow.parquet.write_table(table, buffer, compression="none", use_dictionary=False)
    whole = buffer.getvalue()
    assert agree(tokenizer, "train.parquet", whole).startswith(
        "/train.parquet:1: field 'label' is not one of"
    )
    damaged = whole.replace(FIRST[:2].encode() + b"7vault 2", b"\xff\xfe7vault 2")
    assert load(tokenizer, "train.parquet", damaged, Task.SEQUENCE_CLASSIFICATION).message.startswith(
        "/train.parquet: not a readable Parquet or Arrow file"
    )


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.integers(0, 400), st.binary(min_size=1, max_size=3))
def test_a_damaged_parquet_file_is_a_mistake_of_one_line(tokenizer, place, damage):
    table = pyarrow.table({"text": [f"{FIRST} {i}" for i in range(3)], "label": [0, 1, 2]})
    buffer = io.BytesIO()
    pyarrow.parquet.write_table(table, buffer)
    whole = buffer.getvalue()
    place = min(place, len(whole) - len(damage))
    content = whole[:place] + damage + whole[place + len(damage) :]
    said = load(tokenizer, "train.parquet", content, Task.SEQUENCE_CLASSIFICATION)
    assert FIRST not in said.message
    assert not said.message or said.message.startswith("/train.parquet")
