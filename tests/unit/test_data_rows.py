# SPDX-License-Identifier: Apache-2.0
"""The reader of data files: every format and encoding that people have, or one line that names file and row."""

import gzip
import json
import re

import pyarrow as pa
import pyarrow.ipc
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fedpipe_api import rows
from fedpipe_api.base import UserError
from fedpipe_api.job import DataSource, HostPath, Volume
from fedpipe_api.rows import json_rows, text_encoding
from fedpipe_api.rows.data_paths import created, found, locate

TWO = [{"text": "Grüße, é", "label": "a"}, {"text": "zwei\nZeilen", "label": "b"}]
CSV = 'text,label\n"Grüße, é",a\n"zwei\nZeilen",b\n'
LINES = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in TWO)
FRENCH = "Voilà déjà l'été où l'on rêve à la forêt, à côté du théâtre où l'élève très fatigué préfère être assis.\n"


def zstd(data):
    return pa.compress(data, "zstd", asbytes=True)


def parquet(table):
    out = pa.BufferOutputStream()
    pq.write_table(table, out)
    return out.getvalue().to_pybytes()


def arrow(table, new=pa.ipc.new_stream):
    out = pa.BufferOutputStream()
    with new(out, table.schema) as writer:
        writer.write_table(table)
    return out.getvalue().to_pybytes()


TABLE = pa.Table.from_pylist(TWO)
CLASSES = {"info": {"features": {"label": {"names": ["b", "a"], "_type": "ClassLabel"}, "text": {}}}}
INDEXED = pa.table({"text": [row["text"] for row in TWO], "label": [1, 0]}).replace_schema_metadata(
    {"huggingface": json.dumps(CLASSES)}
)

SAME = {
    "a.jsonl": LINES.encode(),
    "b.ndjson": LINES.encode(),
    "c.json": LINES.encode(),
    "crlf.jsonl": LINES.replace("\n", "\r\n").encode(),
    "array.json": json.dumps(TWO).encode(),
    "indented.json": json.dumps(TWO, indent=2, ensure_ascii=False).encode(),
    "array.jsonl": json.dumps(TWO).encode(),
    "bom.json": b"\xef\xbb\xbf" + json.dumps(TWO).encode(),
    "bom.jsonl": b"\xef\xbb\xbf" + LINES.encode(),
    "utf16.jsonl": LINES.encode("utf-16"),
    "utf16le.jsonl": LINES.encode("utf-16-le"),
    "utf16.json": json.dumps(TWO, ensure_ascii=False).encode("utf-16"),
    "utf32.jsonl": LINES.encode("utf-32"),
    "g.jsonl.gz": gzip.compress(LINES.encode()),
    "g.json.gz": gzip.compress(json.dumps(TWO).encode()),
    "z.jsonl.zst": zstd(LINES.encode()),
    "a.csv": CSV.encode(),
    "quoted.csv": CSV.replace("text,label", '"text","label"').encode(),
    "spaced.csv": CSV.replace("text,label", "text, label ").encode(),
    "blank.csv": CSV.replace("text,label\n", "\ntext,label\n\n").encode(),
    "bom.csv": CSV.encode("utf-8-sig"),
    "utf16.csv": CSV.encode("utf-16"),
    "semicolon.csv": b'text;label\n"Gr\xc3\xbc\xc3\x9fe, \xc3\xa9";a\n"zwei\nZeilen";b\n',
    "pipe.csv": 'text|label\n"Grüße, é"|a\n"zwei\nZeilen"|b\n'.encode(),
    "t.tsv": 'text\tlabel\nGrüße, é\ta\n"zwei\nZeilen"\tb\n'.encode(),
    "g.csv.gz": gzip.compress(CSV.encode()),
    "z.csv.zst": zstd(CSV.encode()),
    "UPPER.CSV": CSV.encode(),
    "a.parquet": parquet(TABLE),
    "classes.parquet": parquet(INDEXED),
    "stream.arrow": arrow(TABLE),
    "file.arrow": arrow(TABLE, pa.ipc.new_file),
    "classes.arrow": arrow(INDEXED),
    "a.feather": arrow(TABLE, pa.ipc.new_file),
}


@pytest.mark.parametrize("name", SAME)
def test_every_format_and_encoding_gives_the_same_rows(name, tmp_path):
    (tmp_path / name).write_bytes(SAME[name])
    assert [row.fields for row in rows.read(tmp_path / name)] == TWO


GOOD = b'{"text": "a"}\n'
FAULTS = {
    "syntax.jsonl": (GOOD + b'{"text": vault}\n', r":2: not a JSON object: its syntax is wrong at column 10"),
    "bytes.jsonl": (GOOD * 2 + b'{"text": "\xffvault"}\n', r":3: not a JSON object: byte 11 is not UTF-8"),
    "late.csv": ("text,label\né,a\n".encode() + b"vault\xff,b\n", r":3: not CSV: byte 6 is not UTF-8"),
    "mixed.csv": (f"text,label\n{FRENCH * 9}".encode("cp1252") + "é".encode(), r":\d+: "),
    "ambiguous.csv": (
        b"text,label\nna\xefve,a\n",
        r":2: not CSV: byte 3 is not UTF-8, see spec.data.encoding",
    ),
    "twice.jsonl": (GOOD + b'{"text": "vault", "text": "b"}\n', r":2: two fields have the same name"),
    "nested.jsonl": (b'{"a": {"b": "vault", "b": 1}}\n', r":1: two fields have the same name"),
    "list.jsonl": (GOOD + b'["vault"]\n', r":2: not a JSON object"),
    "text.jsonl": (b'"vault"\n', r":1: not a JSON object"),
    "deep.jsonl": (b"[" * 100_000, r":1: not a JSON array"),
    "number.jsonl": (b'{"a": ' + b"9" * 5000 + b"}\n", r":1: not a JSON object: a number is too long"),
    "cut.json": (b'[{"text": "a"},\n{"text": "vault"', r":2: not a JSON array: its syntax is wrong"),
    "comma.json": (b'[{"text": "a"}\n{"text": "vault"}]', r":2: not a JSON array: , is missing"),
    "open.json": (b'[{"text": "a"}\n', r":2: not a JSON array: it does not end with ]"),
    "after.json": (b'[{"text": "a"}]\n{"text": "vault"}', r":1: not a JSON array: something follows it"),
    "object.json": (b'{\n"data": []\n}', r":1: not a JSON object"),
    "utf16.jsonl": (LINES.encode("utf-16-le")[:-1], r": not UTF-16-LE after line \d"),
    "utf16.json": ('["é'.encode("utf-16") + b"\x00", r": not UTF-16 after line 1"),
    "twice.csv": (b"text,label,text\nvault,1,2\n", r":1: two columns have the same name"),
    "short.csv": (b"text,label\na,b\nvault\n", r":3: 1 columns, but the header has 2"),
    "long.csv": (b'text,label\n"two\nlines",b\nvault,a,b\n', r":4: 3 columns, but the header has 2"),
    "unclosed.csv": (b'text,label\na,b\n"vault,1\nc,2\n', r":3: not CSV: its quotes or line ends are wrong"),
    "quotes.tsv": (b'text\tlabel\n"vault\t1\nb"\t0\n', r":2: not CSV: a quote is not closed in its line"),
    "cut.jsonl.gz": (gzip.compress(GOOD * 99)[:-9], r": cannot be read: not a whole gzip file"),
    "plain.jsonl.gz": (GOOD, r": cannot be read: not a whole gzip file"),
    "plain.jsonl.zst": (b"vault" + GOOD, r": cannot be read: not a whole zstd file"),
    "no.parquet": (b"PAR1vaultPAR1", r": not a readable Parquet or Arrow file"),
    "no.arrow": (b"ARROW1\0\0vault", r": not a readable Parquet or Arrow file"),
    "cut.arrow": (arrow(TABLE)[:-150], r": not a readable Parquet or Arrow file"),
    "text.parquet": (
        parquet(TABLE).replace(b"zwei", b"zw\xff\xfe"),
        r": not a readable Parquet or Arrow file",
    ),
    "twice.arrow": (
        arrow(pa.Table.from_arrays([pa.array(["vault"])] * 2, ["a", "a"])),
        r": two columns have the same name",
    ),
    "what.txt": (GOOD, r": unknown suffix; name it .jsonl, .csv, .parquet or .arrow"),
}


@pytest.mark.parametrize("name", FAULTS)
def test_a_fault_is_one_line_with_file_and_row_and_without_a_value(name, tmp_path):
    content, message = FAULTS[name]
    (tmp_path / name).write_bytes(content)
    with pytest.raises(UserError, match=re.escape(name) + message) as caught:
        list(rows.read(tmp_path / name))
    assert not re.search(r"vault|\\x|\n", str(caught.value))


@pytest.mark.parametrize(
    ("encoding", "text"),
    [("cp1251", "привет, как твои дела сегодня? всё хорошо, спасибо"), ("cp932", "日本語のテキストです")],
)
def test_a_plain_old_encoding_of_csv_is_found(encoding, text, tmp_path, caplog):
    (tmp_path / "a.csv").write_bytes(f'text,label\nabc,b\n"{text}",a\n'.encode(encoding))
    found = [row.fields["text"] for row in rows.read(tmp_path / "a.csv")]
    assert found in (["abc", text], None)
    assert "which is a guess" in caplog.text


def test_a_given_encoding_is_used(tmp_path):
    for name in ("a.csv", "a.jsonl", "a.json"):
        text = {"a.csv": CSV, "a.jsonl": LINES, "a.json": json.dumps(TWO, ensure_ascii=False)}[name]
        (tmp_path / name).write_bytes(text.encode("iso-8859-1"))
        assert [row.fields for row in rows.read(tmp_path / name, encoding="windows-1252")] == TWO


def test_bad_rows_are_passed_over_where_asked(tmp_path):
    files = {
        "a.jsonl": GOOD + b'{"text": }\n{"text": "\xff"}\n[1]\n{"a": 1, "a": 2}\n' + GOOD,
        "a.json": b'[{"text": "a"}, 5, {"a": 1, "a": 2}, {"text": "a"}]',
        "a.csv": "text\né\na,b\nc\n".encode() + b"\xff\n" + b"a\n",
    }
    expected = {"a.jsonl": (2, 4), "a.json": (2, 2), "a.csv": (3, 2)}
    for name, content in files.items():
        (tmp_path / name).write_bytes(content)
        bad = []
        read = list(rows.read(tmp_path / name, bad=bad.append))
        assert (len(read), len(bad)) == expected[name]


def test_long_fields_are_read_and_endless_lines_refused(tmp_path, monkeypatch):
    (tmp_path / "a.csv").write_text(f"text,label\n{'x' * 300_000},a\n")
    assert len(next(rows.read(tmp_path / "a.csv")).fields["text"]) == 300_000
    monkeypatch.setattr(text_encoding, "LINE_LIMIT", 1000)
    for name in ("a.csv", "a.jsonl"):
        (tmp_path / name).write_text("a\n" + "x" * 2000)
        with pytest.raises(UserError, match="the line is longer"):
            list(rows.read(tmp_path / name, bad=lambda _: None))


@settings(max_examples=60, deadline=None)
@given(
    st.lists(
        st.dictionaries(st.text(max_size=4), st.none() | st.text(max_size=9) | st.floats(-9, 9)), max_size=9
    ),
    st.integers(1, 40),
    st.sampled_from([None, 1]),
)
def test_an_array_is_read_as_json_reads_it_whatever_the_pieces(tmp_path_factory, array, chunk, indent):
    path = tmp_path_factory.mktemp("array") / "a.json"
    path.write_text(json.dumps(array, indent=indent), encoding="utf-8")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(json_rows, "_CHUNK", chunk)
        assert [row.fields for row in rows.read(path)] == array


def source(train, evaluation=None, **data):
    return DataSource(
        volume=Volume(host_path=HostPath(path="/d")), train=train, evaluation=evaluation, **data
    )


def test_directories_and_globs_are_all_their_files_by_name(tmp_path):
    data = tmp_path / "data"
    data.mkdir()
    for name in ("b.jsonl", "a.jsonl", "c.jsonl.gz"):
        with created(data / name) as file:
            file.write(GOOD)
    for name in ("README.md", "_SUCCESS", ".hidden.jsonl", "state.json", "dataset_info.json"):
        (data / name).write_text("{}")
    (data / "part-3.jsonl").touch()  # an empty shard
    names = ["a.jsonl", "b.jsonl", "c.jsonl.gz"]
    assert [path.name for path in locate(tmp_path, source("data"))[0]] == names
    assert [path.name for path in locate(tmp_path, source("data/*.jsonl"))[0]] == names[:2]
    assert [path.name for path in locate(tmp_path, source("**/[ab].jsonl"))[0]] == names[:2]
    for train, evaluation, message in (
        ("data", "data/a.jsonl", "a.jsonl: both spec.data.train and spec.data.evaluation"),
        ("data/x*", None, r"data/x\*: no data files"),
        ("none", None, "none: no such file"),
        ("data/part-3.jsonl", None, "part-3.jsonl: the file is empty"),
    ):
        with pytest.raises(UserError, match=message):
            locate(tmp_path, source(train, evaluation))
    (data / "d.csv").write_text("text\na\n")
    with pytest.raises(UserError, match=r"data: files of several formats \(csv, jsonl\)"):
        found(data, "FILE")
