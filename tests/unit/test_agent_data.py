# SPDX-License-Identifier: Apache-2.0
import gzip
import json

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from agent_fixtures import END, LABELS, WORDS, registered, save_tiny_model, write_rows
from fedpipe_agent.train import data
from fedpipe_agent.train.data import IGNORED, Samples, step_order
from fedpipe_agent.train.model import Source, read_tokenizer
from fedpipe_api.base import UserError
from fedpipe_api.job import Task

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def tokenizers(tmp_path_factory):
    found = {}
    for kind in ("bert", "gpt2"):
        path = save_tiny_model(kind, tmp_path_factory.mktemp(kind))
        found[kind] = read_tokenizer(Source(str(path)))
    return found


def load(tokenizer, directory, job, longest=64):
    return data.load(directory, job.data, job.model, tokenizer, seed=job.seed, longest=longest)


def write_lines(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def contents(samples):
    return [(samples.tokens(i).tolist(), int(samples.marks[i])) for i in range(len(samples))]


ROWS = [{"text": "cat dog", "label": "animal"}, {"text": "red", "label": 1}, {"text": "", "label": "2"}]


def test_every_format_gives_the_same_samples(tokenizers, tmp_path):
    write_lines(tmp_path / "train.jsonl", ROWS)
    with gzip.open(tmp_path / "train.jsonl.gz", "wb") as file:
        file.write((tmp_path / "train.jsonl").read_bytes())
    (tmp_path / "train.csv").write_bytes(b"\xef\xbb\xbftext,label\r\ncat dog,animal\r\nred,1\r\n,2\r\n")
    table = pyarrow.table({"text": ["cat dog", "red", ""], "label": [0, 1, 2]})
    pyarrow.parquet.write_table(table, tmp_path / "train.parquet")
    expected = [([2, 18, 19, 3], 0), ([2, 12, 3], 1), ([2, 3], 2)]
    for name in ("train.jsonl", "train.jsonl.gz", "train.csv", "train.parquet"):
        train, held_out = load(tokenizers["bert"], tmp_path, registered(train=name, evaluation_share=0))
        assert contents(train) == expected
        assert len(held_out) == 0


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("train.jsonl", None, "train.jsonl: no such file"),
        ("train.jsonl", "", "train.jsonl: the file is empty"),
        ("train.jsonl", "\n\n", "train.jsonl: no rows"),
        ("train.jsonl", '{"text": "a", "label": 0}\n{"label": 0}\n', "train.jsonl:2: no field 'text'"),
        ("train.jsonl", '{"text": 5, "label": 0}\n', "train.jsonl:1: field 'text' is int, not text"),
        ("train.jsonl", '{"text": "a", "label": 0}\n\n{"text": "a"}\n', "train.jsonl:3: no field 'label'"),
        (
            "train.jsonl",
            '{"text": "a", "label": 3}\n',
            "train.jsonl:1: field 'label' is not one of the job's 3 labels: animal",
        ),
        ("train.jsonl", '{"text": "a", "label": true}\n', "field 'label' is not one"),
        ("train.jsonl", '{"text": "a", "label": "cow"}\n', "field 'label' is not one"),
        ("train.jsonl", '{"text": "a"\n', "train.jsonl:1: not a JSON object"),
        ("train.jsonl", "[1]\n", "train.jsonl:1: not a JSON object"),
        ("train.csv", "text,label\na,0\nb\n", "train.csv:3: 1 columns, but the header has 2"),
        ("train.csv", 'text,label\n"a,0\n', "train.csv:.*not CSV"),
        ("train.parquet", "PAR1 not", "train.parquet: not a readable Parquet file"),
        ("train.txt", "a\n", "train.txt: unknown suffix"),
        ("train.jsonl.gz", "plain", "train.jsonl.gz: cannot be read"),
    ],
)
def test_mistakes_are_named_with_their_line(tokenizers, tmp_path, name, text, message):
    if text is not None:
        (tmp_path / name).write_text(text)
    with pytest.raises(UserError, match=message) as caught:
        load(tokenizers["bert"], tmp_path, registered(train=name))
    assert "\n" not in str(caught.value)


def test_bad_utf8_is_named_with_its_line(tokenizers, tmp_path):
    (tmp_path / "train.jsonl").write_bytes(b'{"text": "a", "label": 0}\n{"text": "\xff", "label": 0}\n')
    with pytest.raises(UserError, match=r"train.jsonl:2: not a JSON object"):
        load(tokenizers["bert"], tmp_path, registered())


def test_a_length_above_the_models_is_refused(tokenizers, tmp_path):
    write_rows(tmp_path / "train.jsonl")
    with pytest.raises(UserError, match=r"spec.data.maxLength: 16, but the model has 8 positions"):
        load(tokenizers["bert"], tmp_path, registered(), longest=8)


def test_long_texts_are_cut_and_keep_their_end(tokenizers, tmp_path):
    write_lines(tmp_path / "train.jsonl", [{"text": " ".join(["cat"] * 100), "label": 0}])
    train, _ = load(tokenizers["bert"], tmp_path, registered())
    assert train.tokens(0).tolist() == [2] + [18] * 14 + [3]


def test_the_held_out_share_is_disjoint_complete_and_repeatable(tokenizers, tmp_path):
    write_lines(
        tmp_path / "train.jsonl", [{"text": f"{a} {b}", "label": 0} for a in WORDS for b in WORDS[:5]]
    )
    job = registered(evaluation_share=0.25)
    train, held_out = load(tokenizers["bert"], tmp_path, job)
    again = load(tokenizers["bert"], tmp_path, job)
    assert (len(train), len(held_out)) == (60, 20)
    assert (contents(train), contents(held_out)) == tuple(map(contents, again))
    assert len({tuple(tokens) for tokens, _ in contents(train) + contents(held_out)}) == 80


def test_an_evaluation_file_is_held_out_as_it_is(tokenizers, tmp_path):
    write_rows(tmp_path / "train.jsonl", 10)
    write_rows(tmp_path / "test.jsonl", 4)
    train, held_out = load(tokenizers["bert"], tmp_path, registered(evaluation="test.jsonl"))
    assert (len(train), len(held_out)) == (10, 4)


def test_one_sample_is_never_held_out(tokenizers, tmp_path):
    write_rows(tmp_path / "train.jsonl", 1)
    train, held_out = load(tokenizers["bert"], tmp_path, registered(evaluation_share=0.9))
    assert (len(train), len(held_out)) == (1, 0)


def test_the_prompt_is_masked_and_the_completion_ends(tokenizers, tmp_path):
    rows = [
        {"prompt": "cat dog", "completion": "red"},
        {"prompt": "one two three", "completion": "green blue"},
    ]
    write_lines(tmp_path / "train.jsonl", rows)
    train, _ = load(tokenizers["gpt2"], tmp_path, registered(Task.CAUSAL_LM, evaluation_share=0))
    assert contents(train) == [([18, 19, 12, END], 2), ([15, 16, 17, 13, 14, END], 3)]
    batch = train.batch(np.array([0, 1]), CPU)
    assert batch.inputs["input_ids"].shape == (2, 8)
    assert batch.inputs["attention_mask"].sum(1).tolist() == [4, 6]
    # Position p predicts token p + 1: only positions before a completion token are kept.
    assert batch.keep.tolist() == [1, 2, 3, 4]
    assert batch.labels.tolist() == [[12, END, IGNORED, IGNORED], [IGNORED, 13, 14, END]]
    assert train.targets(np.array([0, 1])) == 5
    assert batch.tokens == 10


def test_plain_text_predicts_all_but_its_first_token(tokenizers, tmp_path):
    write_lines(tmp_path / "train.jsonl", [{"text": "cat dog red"}])
    train, _ = load(tokenizers["gpt2"], tmp_path, registered(Task.CAUSAL_LM, evaluation_share=0))
    batch = train.batch(np.array([0]), CPU)
    assert batch.labels.tolist() == [[19, 12, END]]
    assert train.targets(np.array([0])) == 3


def test_a_long_prompt_gives_way_to_its_completion(tokenizers, tmp_path):
    rows = [
        {"prompt": " ".join(["cat"] * 30), "completion": "red green"},
        {"prompt": "cat", "completion": "red " * 40},
    ]
    write_lines(tmp_path / "train.jsonl", rows)
    train, _ = load(tokenizers["gpt2"], tmp_path, registered(Task.CAUSAL_LM, evaluation_share=0))
    assert contents(train) == [([18] * 13 + [12, 13, END], 13), ([18] + [12] * 15, 1)]


def test_a_prompt_without_completion_is_named(tokenizers, tmp_path):
    write_lines(tmp_path / "train.jsonl", [{"prompt": "cat", "completion": "red"}, {"prompt": "cat"}])
    with pytest.raises(UserError, match=r"train.jsonl:2: no field 'completion'"):
        load(tokenizers["gpt2"], tmp_path, registered(Task.CAUSAL_LM))


def some_samples(lengths, task=Task.SEQUENCE_CLASSIFICATION):
    return Samples([[5] * n for n in lengths], [i % len(LABELS) for i in range(len(lengths))], task, 0)


@settings(max_examples=50, deadline=None)
@given(
    st.lists(st.integers(1, 20), min_size=1, max_size=30),
    st.integers(1, 40),
    st.integers(1, 5),
)
def test_steps_go_through_the_data_evenly_and_repeatably(lengths, size, steps):
    samples = some_samples(lengths)
    order, again = step_order(samples, size, 7, 1, "edge"), step_order(samples, size, 7, 1, "edge")
    taken = [next(order) for _ in range(steps)]
    assert all(np.array_equal(step, next(again)) for step in taken)
    counts = np.bincount(np.concatenate(taken), minlength=len(samples))
    assert counts.max() - counts.min() <= 1
    for step in taken:
        assert len(step) == size
        assert (np.diff(samples.lengths[step]) <= 0).all()


def test_another_round_or_node_takes_another_order():
    samples = some_samples([3] * 50)
    orders = {
        tuple(next(step_order(samples, 50, *names))) for names in [(7, 1, "a"), (7, 2, "a"), (7, 1, "b")]
    }
    assert len(orders) == 3


@settings(max_examples=50, deadline=None)
@given(st.lists(st.integers(1, 40), min_size=1, max_size=8))
def test_padding_is_masked_and_a_multiple_of_eight(lengths):
    samples = some_samples(lengths)
    batch = samples.batch(np.arange(len(lengths)), CPU)
    width = batch.inputs["input_ids"].shape[1]
    assert width % 8 == 0
    assert max(lengths) <= width < max(lengths) + 8
    assert batch.inputs["attention_mask"].sum(1).tolist() == lengths
    assert (batch.inputs["input_ids"] * (1 - batch.inputs["attention_mask"])).sum() == 0
    assert batch.tokens == sum(lengths)
