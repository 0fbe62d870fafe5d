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

from agent_fixtures import END, LABELS, WORDS, registered, sample_of, save_tiny_model, write_rows
from fedpipe_agent.train import data
from fedpipe_agent.train.data import IGNORED, Samples, step_order
from fedpipe_agent.train.model import Source, read_tokenizer
from fedpipe_api.base import UserError
from fedpipe_api.job import Fields, Task

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def tokenizers(tmp_path_factory):
    found = {}
    for kind in ("bert", "gpt2"):
        path = save_tiny_model(kind, tmp_path_factory.mktemp(kind))
        found[kind] = read_tokenizer(Source(str(path)))
    return found


def load(tokenizer, directory, job, longest=64):
    return data.load(directory, job.data, job.model, tokenizer, seed=job.seed, longest=longest)[:2]


def write_lines(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def contents(samples):
    """Return each sample's ids, with its class or what is predicted of it."""
    return [
        (one.ids.tolist(), one.label if one.predicted is None else one.ids[one.predicted].tolist())
        for one in map(samples.sample, range(len(samples)))
    ]


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
        ("train.jsonl", '{"text": 5, "label": 0}\n', "train.jsonl:1: field 'text' is a number, not text"),
        ("train.jsonl", '{"text": "a", "label": 0}\n\n{"text": "a"}\n', "train.jsonl:3: no field 'label'"),
        (
            "train.jsonl",
            '{"text": "a", "label": 3}\n',
            "train.jsonl:1: field 'label' is a number, not one of the job's 3 labels: animal",
        ),
        ("train.jsonl", '{"text": "a", "label": true}\n', "field 'label' is true or false, not one"),
        ("train.jsonl", '{"text": "a", "label": "cow"}\n', "field 'label' is not one"),
        ("train.jsonl", '{"text": "a"\n', "train.jsonl:1: not a JSON object"),
        ("train.jsonl", "[1]\n", "train.jsonl:1: not a JSON object"),
        ("train.csv", "text,label\na,0\nb\n", "train.csv:3: 1 columns, but the header has 2"),
        ("train.csv", 'text,label\n"a,0\n', "train.csv:.*not CSV"),
        ("train.parquet", "PAR1 not", "train.parquet: not a readable Parquet or Arrow file"),
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
        {"prompt": "cat dog", "completion": " red"},
        {"prompt": "one two three", "completion": " green blue"},
    ]
    write_lines(tmp_path / "train.jsonl", rows)
    train, _ = load(tokenizers["gpt2"], tmp_path, registered(Task.CAUSAL_LM, evaluation_share=0))
    assert contents(train) == [([18, 19, 12, END], [12, END]), ([15, 16, 17, 13, 14, END], [13, 14, END])]
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
        {"prompt": " ".join(["cat"] * 30), "completion": " red green"},
        {"prompt": "cat", "completion": " red" * 40},
    ]
    write_lines(tmp_path / "train.jsonl", rows)
    train, _ = load(tokenizers["gpt2"], tmp_path, registered(Task.CAUSAL_LM, evaluation_share=0))
    assert contents(train) == [([18] * 13 + [12, 13, END], [12, 13, END]), ([18] + [12] * 15, [12] * 15)]


def test_a_prompt_without_completion_is_named(tokenizers, tmp_path):
    write_lines(tmp_path / "train.jsonl", [{"prompt": "cat", "completion": "red"}, {"prompt": "cat"}])
    with pytest.raises(UserError, match=r"train.jsonl:2: no field 'completion'"):
        load(tokenizers["gpt2"], tmp_path, registered(Task.CAUSAL_LM))


def some_samples(lengths, task=Task.SEQUENCE_CLASSIFICATION):
    samples = [sample_of([5] * n, i % len(LABELS), task) for i, n in enumerate(lengths)]
    return Samples(samples, task, 0)


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


def labelled(tokenizer, directory, labels, rows, name="train.jsonl", **options):
    job = registered(train=name, evaluation_share=0, **options)
    model = job.model.model_copy(update={"labels": labels})
    if name.endswith("jsonl"):
        write_lines(directory / name, [{"text": "cat", "label": row} for row in rows])
    found = data.load(directory, job.data, model, tokenizer, seed=7, longest=64)
    return found.train.classes.tolist(), found.notes.numbered_rows


def test_numbers_are_names_where_the_names_are_numbers_in_every_format(tokenizers, tmp_path):
    labels = ("1", "2", "3", "4", "5")
    (tmp_path / "train.csv").write_text("text,label\n" + "".join(f"cat,{i}\n" for i in range(1, 6)))
    pyarrow.parquet.write_table(
        pyarrow.table({"text": ["cat"] * 5, "label": [1, 2, 3, 4, 5]}), tmp_path / "train.parquet"
    )
    expected = ([0, 1, 2, 3, 4], 0)
    for rows in ([1, 2, 3, 4, 5], ["1", "2", "3", "4", "5"], [1.0, 2.0, 3.0, 4.0, 5.0]):
        assert labelled(tokenizers["bert"], tmp_path, labels, rows) == expected
    for name in ("train.csv", "train.parquet"):
        assert labelled(tokenizers["bert"], tmp_path, labels, [], name) == expected
    with pytest.raises(UserError, match=r":1: field 'label' is a number, not one of the job's 5 labels"):
        labelled(tokenizers["bert"], tmp_path, labels, [0])


def test_numbers_that_are_places_are_counted(tokenizers, tmp_path):
    assert labelled(tokenizers["bert"], tmp_path, LABELS, [0, "2", "animal", 1.0]) == ([0, 2, 0, 1], 3)


def test_class_names_kept_in_a_file_go_before_places(tokenizers, tmp_path):
    features = {"label": {"names": ["other", "animal", "colour"], "_type": "ClassLabel"}}
    table = pyarrow.table({"text": ["cat"] * 3, "label": [0, 1, 2]}).replace_schema_metadata(
        {"huggingface": json.dumps({"info": {"features": features}})}
    )
    pyarrow.parquet.write_table(table, tmp_path / "train.parquet")
    assert labelled(tokenizers["bert"], tmp_path, LABELS, [], "train.parquet") == ([2, 0, 1], 0)


def test_true_and_false_are_the_names_written_so(tokenizers, tmp_path):
    assert labelled(tokenizers["bert"], tmp_path, ("False", "True"), [True, False]) == ([1, 0], 0)
    assert labelled(tokenizers["bert"], tmp_path, ("true", "false"), [True, False]) == ([0, 1], 0)
    assert labelled(tokenizers["bert"], tmp_path, ("0.5", "1.5"), [1.5, 0.5]) == ([1, 0], 0)


@pytest.mark.parametrize(
    ("label", "what"),
    [("²", "is not"), ("٣", "is not"), ("-1", "is not"), (9**99, "is a number, not"), (1.5, "is a number, not"),
     ([], "is a list, not"), ({}, "is an object, not"), (None, "is null")],
)  # fmt: skip
def test_what_is_no_label_is_named_by_its_type(label, what, tokenizers, tmp_path):
    with pytest.raises(UserError, match=f"train.jsonl:1: field 'label' {what}"):
        labelled(tokenizers["bert"], tmp_path, LABELS, [label])


def test_pairs_are_tokenised_as_the_model_takes_them(tmp_path):
    from tokenizers import processors

    tokenizer = read_tokenizer(Source(str(save_tiny_model("bert", tmp_path / "bert"))))
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]",
        pair="[CLS] $A [SEP] $B:1 [SEP]:1",
        special_tokens=[("[CLS]", 2), ("[SEP]", 3)],
    )
    tokenizer.model_input_names = ["input_ids", "token_type_ids", "attention_mask"]
    rows = [
        {"text": "cat dog", "other": "red", "label": 0},
        {"text": "cat", "other": "red " * 30, "label": 1},
    ]
    write_lines(tmp_path / "train.jsonl", rows)
    job = registered(evaluation_share=0, fields=Fields(text_pair="other"))
    found = data.load(tmp_path, job.data, job.model, tokenizer, seed=7, longest=64)
    assert contents(found.train)[0] == ([2, 18, 19, 3, 12, 3], 0)
    assert found.notes.truncated_rows == 1
    assert contents(found.train)[1][0] == [2, 18, 3, *[12] * 12, 3]
    batch = found.train.batch(np.array([0, 1]), CPU)
    assert batch.inputs["token_type_ids"].tolist() == [[0] * 4 + [1] * 2 + [0] * 10, [0] * 3 + [1] * 13]


def test_fields_are_found_in_another_case_and_nested(tokenizers, tmp_path):
    (tmp_path / "train.csv").write_text("Text,LABEL\ncat,1\n")
    found = load(tokenizers["bert"], tmp_path, registered(train="train.csv", evaluation_share=0))[0]
    assert contents(found) == [([2, 18, 3], 1)]
    table = pyarrow.Table.from_pylist([{"sample": {"text": "cat"}, "label": "colour"}])
    pyarrow.parquet.write_table(table, tmp_path / "train.parquet")
    job = registered(train="train.parquet", evaluation_share=0, fields=Fields(text="sample.text"))
    assert contents(load(tokenizers["bert"], tmp_path, job)[0]) == [([2, 18, 3], 1)]
    write_lines(tmp_path / "train.jsonl", [{"Text": "a", "TEXT": "b", "label": 0}])
    with pytest.raises(UserError, match=r"train.jsonl:1: several fields are called 'text'"):
        load(tokenizers["bert"], tmp_path, registered())


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"text": None, "label": 0}, "field 'text' is null"),
        ({"text": "\ud800", "label": 0}, "half a surrogate"),
    ],
)
def test_null_and_half_surrogates_are_named(row, message, tokenizers, tmp_path):
    write_lines(tmp_path / "train.jsonl", [row])
    with pytest.raises(UserError, match=f"train.jsonl:1: .*{message}"):
        load(tokenizers["bert"], tmp_path, registered())


@settings(max_examples=40, deadline=None)
@given(st.lists(st.integers(1, 6), min_size=2, max_size=12), st.floats(0.05, 0.9), st.integers(0, 99))
def test_equal_rows_are_on_one_side_as_far_as_they_fit(sizes, share, seed):
    samples = Samples(
        [sample_of([group + 1], 0, Task.SEQUENCE_CLASSIFICATION) for group, size in enumerate(sizes) for _ in range(size)],
        Task.SEQUENCE_CLASSIFICATION,
        0,
    )  # fmt: skip
    count = round(share * len(samples))
    chosen = data._chosen(samples, count, np.random.default_rng(seed))
    assert chosen.sum() == count
    sides = [
        {int(samples.tokens(i)[0]) for i in range(len(samples)) if chosen[i] == side}
        for side in (True, False)
    ]
    # Groups are taken whole while they fit: where they are of one size that divides, no text is on both sides.
    if len(set(sizes)) == 1 and count % sizes[0] == 0:
        assert not sides[0] & sides[1]


def test_the_same_text_in_both_files_is_counted(tokenizers, tmp_path):
    write_lines(tmp_path / "train.jsonl", [{"text": "cat", "label": 0}, {"text": "dog", "label": 0}])
    write_lines(tmp_path / "test.jsonl", [{"text": "cat", "label": 1}, {"text": "red", "label": 0}])
    job = registered(evaluation="test.jsonl")
    found = data.load(tmp_path, job.data, job.model, tokenizers["bert"], seed=7, longest=64)
    assert found.notes.repeated_rows == 1


def test_texts_that_are_there_twice_are_not_on_both_sides(tokenizers, tmp_path):
    write_lines(
        tmp_path / "train.jsonl", [{"text": f"{a} {b}", "label": 0} for a in WORDS for b in WORDS[:3]] * 2
    )
    job = registered(evaluation_share=0.25)
    found = data.load(tmp_path, job.data, job.model, tokenizers["bert"], seed=7, longest=64)
    assert (len(found.train), len(found.held_out), found.notes.repeated_rows) == (72, 24, 0)
