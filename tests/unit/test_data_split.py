# SPDX-License-Identifier: Apache-2.0
import gzip
import json
import re
from collections import Counter

import numpy as np
import pyarrow as pa
import pyarrow.ipc
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fedpipe_api import rows
from fedpipe_api.base import UserError
from fedpipe_operator.cli import main
from fedpipe_operator.local.split import read, split, write_shares

LABELS = [i % 5 for i in range(1000)]


@given(
    labels=st.lists(st.integers(0, 4), min_size=1, max_size=80),
    nodes=st.integers(1, 12),
    by=st.sampled_from(["iid", "dirichlet", "size"]),
    alpha=st.sampled_from([0.01, 0.5, 100.0]),
    seed=st.integers(0, 10),
)
def test_every_row_goes_to_exactly_one_node_and_no_node_goes_empty(labels, nodes, by, alpha, seed):
    if len(labels) < nodes:
        with pytest.raises(UserError, match="cannot share"):
            split(labels, nodes, by, alpha, seed)
        return
    shares = split(labels, nodes, by, alpha, seed)
    assert len(shares) == nodes
    assert sorted(row for share in shares for row in share) == list(range(len(labels)))
    assert all(shares)
    assert shares == split(labels, nodes, by, alpha, seed)


def test_iid_shares_are_equal_in_size():
    assert {len(share) for share in split(LABELS, 7, "iid", 0.5, 0)} == {142, 143}


def skew(alpha):
    """Mean share of a node's most frequent label; 0.2 when mixed evenly."""
    shares = split(LABELS, 5, "dirichlet", alpha, 1)
    return np.mean([max(Counter(LABELS[r] for r in share).values()) / len(share) for share in shares])


def test_a_small_alpha_gives_nodes_few_labels():
    assert skew(0.05) > 0.7 > skew(1.0) > skew(1000.0)
    assert skew(1000.0) < 0.25


def test_by_size_mixes_labels_but_not_sizes():
    shares = split(LABELS, 4, "size", 0.5, 2)
    sizes = sorted(map(len, shares))
    assert sizes[-1] > 2 * sizes[0]
    largest = max(shares, key=len)
    assert max(Counter(LABELS[row] for row in largest).values()) / len(largest) < 0.3


@pytest.mark.parametrize(
    ("nodes", "alpha", "field"), [(0, 1, "--nodes"), (2, 0, "--alpha"), (2, -1, "--alpha")]
)
def test_impossible_options_are_named(nodes, alpha, field):
    with pytest.raises(UserError, match=field):
        split(LABELS, nodes, "dirichlet", alpha, 0)


ROWS = [{"text": f'a "quoted", line {i}', "label": f"l{i % 3}"} for i in range(30)]


def write_jsonl(path):
    path.write_text("".join(json.dumps(row) + "\n" for row in ROWS))


def write_csv(path):
    lines = ["text,label", *('"' + r["text"].replace('"', '""') + f'",{r["label"]}' for r in ROWS)]
    path.write_text("\n".join(lines) + "\n")


def write_parquet(path):
    pq.write_table(pa.Table.from_pylist(ROWS), path)


def write_gzipped(path):
    with gzip.open(path, "wb") as file:
        file.write("".join(json.dumps(row) + "\n" for row in ROWS).encode())


WRITERS = {"jsonl": write_jsonl, "csv": write_csv, "parquet": write_parquet, "jsonl.gz": write_gzipped}


@pytest.mark.parametrize("suffix", WRITERS)
def test_shares_hold_the_rows_in_the_file_s_format(suffix, tmp_path):
    source = tmp_path / f"all.{suffix}"
    WRITERS[suffix](source)
    dataset = read(source, "label")
    assert dataset.labels == [row["label"] for row in ROWS]
    shares = split(dataset.labels, 3, "size", 0.5, 0)
    write_shares(dataset, shares, ["a", "b", "c"], tmp_path / "out")
    for name, share in zip("abc", shares, strict=True):
        path = tmp_path / f"out/{name}/train.{suffix}"
        found = [row.fields for row in rows.read(path)]
        assert found == [ROWS[row] for row in share]


def test_an_out_that_is_no_directory_is_named(tmp_path):
    write_jsonl(tmp_path / "all.jsonl")
    dataset = read(tmp_path / "all.jsonl", "label")
    with pytest.raises(UserError, match=r"--out: .*all.jsonl/a: Not a directory; give a directory"):
        write_shares(dataset, [[0]], ["a"], tmp_path / "all.jsonl")


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("x.jsonl", '{"text": "a", "label": 1}\nnot json\n', r"x.jsonl:2: not a JSON object"),
        ("x.jsonl", "[1]\n", r"x.jsonl:1: not a JSON object"),
        ("x.jsonl", '{"text": "a"}\n', r"x.jsonl:1: no field 'label'"),
        ("x.csv", "text,topic\na,b\n", r"x.csv:2: no field 'label'"),
        ("x.csv", "text,label\na,b,c\n", r"x.csv:2: 3 columns, but the header has 2"),
        ("x.parquet", "not parquet at all", r"x.parquet: not a readable Parquet or Arrow file"),
        ("x.txt", "a", r"x.txt: unknown suffix"),
    ],
)
def test_bad_files_are_named(name, content, message, tmp_path):
    (tmp_path / name).write_text(content)
    with pytest.raises(UserError, match=message):
        read(tmp_path / name, "label")


def test_a_gzipped_file_gives_gzipped_shares(tmp_path, monkeypatch, capsys):
    with gzip.open(tmp_path / "all.jsonl.gz", "wb") as file:
        file.write(b'{"text": "x", "label": 1e3}\n' * 1000)
    source, out = str(tmp_path / "all.jsonl.gz"), str(tmp_path / "out")
    monkeypatch.setattr("sys.argv", ["fedpipe", "data", "split", source, "--nodes", "4", "--out", out])
    assert main() == 0
    assert capsys.readouterr().out == f"{out}: node-1 250, node-2 250, node-3 250, node-4 250\n"
    # Bytes as they were.
    share = gzip.decompress((tmp_path / "out" / "node-3" / "train.jsonl.gz").read_bytes())
    assert share == b'{"text": "x", "label": 1e3}\n' * 250


def test_a_quoted_newline_is_no_end_of_a_row(tmp_path):
    (tmp_path / "all.csv").write_bytes(b'text,label\r\n"two\r\nlines",a\r\n"one ""line""",b\r\n')
    assert len(list(rows.read(tmp_path / "all.csv"))) == 2
    dataset = read(tmp_path / "all.csv", "label")
    write_shares(dataset, [[0], [1]], ["a", "b"], tmp_path)
    shares = [[row.fields for row in rows.read(tmp_path / name / "train.csv")] for name in "ab"]
    assert shares == [[{"text": "two\r\nlines", "label": "a"}], [{"text": 'one "line"', "label": "b"}]]


def test_no_message_quotes_a_value(tmp_path):
    for name, content in {
        "a.jsonl": b'{"label": "vault"} vault\n',
        "b.csv": b"text,label\nvault\xff,1\n",
        "c.csv": b"vault,vault\n1,1\n",
        "d.jsonl.gz": b"vault",
        "e.parquet": b"PAR1vaultPAR1",
    }.items():
        (tmp_path / name).write_bytes(content)
        with pytest.raises(UserError) as caught:
            read(tmp_path / name, "label")
        assert not re.search(r"vault|xff|b'va", str(caught.value))


def data_split(monkeypatch, *arguments):
    monkeypatch.setattr("sys.argv", ["fedpipe", "data", "split", *map(str, arguments)])
    return main()


def test_rows_without_a_label_are_cut_unless_by_label(tmp_path, monkeypatch, capsys):
    (tmp_path / "all.json").write_text(json.dumps([{"prompt": "a", "completion": "b"}] * 4))
    arguments = (tmp_path / "all.json", "--nodes", 2, "--out", tmp_path / "out")
    assert data_split(monkeypatch, *arguments, "--by", "dirichlet") == 2
    assert "all.json:1: no field 'label'; name the label with --label" in capsys.readouterr().err
    assert data_split(monkeypatch, *arguments) == 0
    assert (tmp_path / "out/node-2/train.jsonl").read_text() == '{"prompt": "a", "completion": "b"}\n' * 2


def test_shares_are_never_mixed_with_earlier_ones(tmp_path, monkeypatch, capsys):
    write_jsonl(tmp_path / "all.jsonl")
    arguments = (tmp_path / "all.jsonl", "--out", tmp_path / "out")
    assert data_split(monkeypatch, *arguments, "--nodes", 4) == 0
    assert data_split(monkeypatch, *arguments, "--nodes", 2) == 2
    assert "out: it has shares already (node-1); give another directory" in capsys.readouterr().err
    assert len(list((tmp_path / "out").iterdir())) == 4


def test_shards_are_cut_as_one_data_set(tmp_path):
    table = pa.Table.from_pylist(ROWS)
    (tmp_path / "shards").mkdir()
    for number in (0, 1):
        with pa.OSFile(str(tmp_path / f"shards/data-{number}.arrow"), "wb") as file:
            with pa.ipc.new_stream(file, table.schema) as writer:
                writer.write_table(table.slice(15 * number, 15))
    dataset = read(tmp_path / "shards", "label")
    assert dataset.labels == [row["label"] for row in ROWS]
    write_shares(dataset, [list(range(10, 20))], ["a"], tmp_path)
    assert [row.fields for row in rows.read(tmp_path / "a/train.parquet")] == ROWS[10:20]
    for name, header in (("a.csv", "text,label"), ("b.csv", "label,text")):
        (tmp_path / name).write_text(f"{header}\nx,y\n")
    with pytest.raises(UserError, match=r"b.csv:2: its file has other columns than a.csv"):
        read(tmp_path / "*.csv", "label")
