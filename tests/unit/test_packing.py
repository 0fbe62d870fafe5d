# SPDX-License-Identifier: Apache-2.0
"""Packed rows: none is lost or split, none sees another, and gradients are those of the rows one by one."""

import json
import re
from itertools import pairwise

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers import AutoModelForCausalLM

from agent_fixtures import registered, sample_of, save_tiny_model
from bench.families_models import DECODERS, configured, trained_tokenizer
from fedpipe_agent import cli
from fedpipe_agent.train import model as base
from fedpipe_agent.train.adapters import Adapters
from fedpipe_agent.train.agent import Agent
from fedpipe_agent.train.data import Samples
from fedpipe_agent.train.device import Device
from fedpipe_agent.train.loop import MicroBatches, Settings, train
from fedpipe_agent.train.packing import PACKABLE, pack
from fedpipe_agent.train.shape import read_shape
from fedpipe_agent.train.site import Site
from fedpipe_api.base import UserError
from fedpipe_api.job import Precision, Task
from fedpipe_api.lora.methods import Start
from fedpipe_api.node import Capacity

CPU = torch.device("cpu")
LENGTH = 32


@given(st.lists(st.integers(1, 64), max_size=60), st.integers(64, 80))
def test_each_sample_is_in_one_sequence_and_none_is_too_long(lengths, capacity):
    sequences = pack(np.array(lengths, dtype=np.int64), capacity)
    assert sorted(index for sequence in sequences for index in sequence) == list(range(len(lengths)))
    filled = [sum(lengths[index] for index in sequence) for sequence in sequences]
    assert filled == sorted(filled, reverse=True)
    assert all(0 < tokens <= capacity for tokens in filled)
    # Two sequences that fit into one would have been one.
    assert all(a + b > capacity for a, b in pairwise(filled))


def test_sequences_are_as_full_as_those_of_trl():
    from datasets import Dataset, disable_progress_bars
    from trl import pack_dataset

    disable_progress_bars()
    random = np.random.default_rng(0)
    for capacity in (16, 50, 128):
        lengths = random.integers(1, capacity + 1, 200)
        rows = Dataset.from_dict({"input_ids": [list(range(length)) for length in lengths]})
        expected = sorted(map(sum, pack_dataset(rows, capacity)["seq_lengths"]), reverse=True)
        assert [int(lengths[sequence].sum()) for sequence in pack(lengths, capacity)] == expected


def samples_of(count=20, seed=0):
    random = np.random.default_rng(seed)
    tokens = [random.integers(4, 20, random.integers(2, 15)).tolist() for _ in range(count)]
    # A prompt before some, none before others.
    return Samples(
        [sample_of(t, len(t) // 2 * int(random.integers(2)), Task.CAUSAL_LM) for t in tokens],
        Task.CAUSAL_LM,
        0,
    )


def test_a_sequence_holds_its_samples_whole():
    samples, chosen = samples_of(), np.array([3, 1, 7, 12, 5])
    packed = samples.packed(chosen, LENGTH)
    assert packed.targets(np.arange(len(packed))) == samples.targets(chosen)
    found = []
    for index in range(len(packed)):
        batch = packed.batch(np.array([index]), CPU)
        begins = np.flatnonzero(batch.inputs["position_ids"][0, : packed.lengths[index]] == 0)
        found += [part.tolist() for part in np.split(packed.tokens(index), begins)[1:]]
        assert not packed.predicted(index)[begins].any()
        assert "attention_mask" not in batch.inputs
    assert sorted(found) == sorted(samples.tokens(index).tolist() for index in chosen)


@pytest.fixture(scope="module", params=["llama", "gpt2"])
def prepared(request, tmp_path_factory):
    """A tiny model in float32 with adapters to train."""
    source = base.Source(str(save_tiny_model(request.param, tmp_path_factory.mktemp(request.param))))
    config = base.read_config(source, registered(Task.CAUSAL_LM).model, 0)
    shape = read_shape(config, Task.CAUSAL_LM)
    model = base.load(source, config, Task.CAUSAL_LM, Precision.FP32, CPU, seed=7)
    adapters = Adapters(model, shape, alpha=8, rs_lora=False, names=(7, "edge"), pristine=None)
    return model, lambda: adapters.install(
        None, {matrix.name: 4 for matrix in shape.matrices}, Start.SPLIT, 1
    )


@pytest.mark.parametrize("size", [8, 3, 1])
def test_the_gradients_of_a_step_are_those_without_packing(prepared, size):
    model, install = prepared
    install()
    samples, chosen = samples_of(), np.arange(16)
    parameters = [p for p in model.parameters() if p.requires_grad]
    found = []
    for packed in (None, LENGTH):
        model.zero_grad()
        work = MicroBatches(model, parameters, samples, Device(Capacity(threads=1)), size, packed=packed)
        loss, tokens = work.accumulate(chosen)
        found.append((loss, tokens, [p.grad.clone() for p in parameters]))
    (loss, tokens, expected), (packed_loss, packed_tokens, gradients) = found
    assert packed_loss == pytest.approx(loss, rel=1e-5)
    assert packed_tokens == tokens == samples.lengths[chosen].sum()
    assert any(gradient.abs().max() > 1e-4 for gradient in expected)
    torch.testing.assert_close(gradients, expected, atol=1e-6, rtol=1e-4)


@pytest.mark.parametrize("checkpointing", [False, True])
def test_training_comes_to_the_same_and_makes_fewer_passes(prepared, checkpointing):
    model, install = prepared
    samples = samples_of()
    order = [np.arange(16), np.arange(4, 20)]
    passes = []
    model.register_forward_pre_hook(lambda *_: passes.append(1))
    outcomes = []
    for packed in (None, LENGTH):
        install()
        settings = Settings(2, 2, 8, 1e-2, packed=packed, checkpointing=checkpointing)
        outcomes.append(train(model, samples, iter(order), settings, Device(Capacity(threads=1))))
    assert outcomes[1].loss == pytest.approx(outcomes[0].loss, rel=1e-4)
    assert outcomes[1].tokens == outcomes[0].tokens
    assert len(passes) - 16 < 12


def apart(family, tokenizer, directory):
    """Return how far the logits of packed rows are from those of the rows alone, as a share of the largest."""
    written = configured(family, tokenizer)
    written.router_jitter_noise = written.input_jitter_noise = 0.0  # PhiMoE's, in training
    written.save_pretrained(directory)
    config = base.read_config(base.Source(str(directory)), registered(Task.CAUSAL_LM).model, 0)
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config).train()
    rows = [torch.randint(5, 300, (length,)) for length in (7, 5, 1, 3)]
    ids = torch.cat([*rows, torch.zeros(8, dtype=torch.long)])[None]
    places = torch.cat([*map(torch.arange, map(len, rows)), torch.zeros(8, dtype=torch.long)])[None]
    keep = torch.arange(16)
    with torch.no_grad():
        # Beside another, as a micro-batch has it.
        found = model(input_ids=ids.repeat(2, 1), position_ids=places.repeat(2, 1), logits_to_keep=keep)
        expected = torch.cat(
            [model(input_ids=row[None], attention_mask=torch.ones_like(row[None])).logits[0] for row in rows]
        )
    return float((found.logits - expected).abs().max() / expected.abs().max())


def test_the_models_that_are_packed_keep_rows_apart(tmp_path):
    tokenizer = trained_tokenizer()
    families = [family for family in DECODERS if family in PACKABLE]
    assert set(families) == PACKABLE
    far = {family: found for family in families if (found := apart(family, tokenizer, tmp_path)) > 1e-4}
    assert not far


def test_the_models_that_do_not_are_refused_in_one_line(tmp_path, capfd, monkeypatch):
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    monkeypatch.setenv("RAYON_NUM_THREADS", "1")
    tokenizer = trained_tokenizer()
    tokenizer.save_pretrained(tmp_path)
    (tmp_path / "train.jsonl").write_text('{"prompt": "a", "completion": " b"}\n')
    job = {
        "metadata": {"name": "packed"},
        "spec": {
            "model": {"hostPath": {"path": "/models/base"}, "task": "causal-lm"},
            "data": {
                "volume": {"hostPath": {"path": "/data"}}, "train": "train.jsonl", "maxLength": 16, "packing": True,
            },
            "rounds": {"count": 1},
        },
    }  # fmt: skip
    (tmp_path / "job.json").write_text(json.dumps(job))
    arguments = ["--job", str(tmp_path / "job.json"), "--model", str(tmp_path), "--data", str(tmp_path)]
    for family in ("mamba", "rwkv", "bloom", "lfm2", "falcon"):
        configured(family, tokenizer).save_pretrained(tmp_path)
        assert cli.main(["describe", *arguments]) == 2
        said = capfd.readouterr().err
        assert said.count("\n") == 1
        refused = (
            f"spec.data.packing: a {family} model is not known to keep packed rows apart; set it to false"
        )
        assert refused in said
        # An agent in a cluster has no plan's look before it.
        job = registered(Task.CAUSAL_LM, packing=True)
        agent = Agent(
            job,
            base.Source(str(tmp_path)),
            None,
            Device(Capacity(threads=1)),
            tmp_path,
        )
        with pytest.raises(UserError, match=re.escape(refused)):
            agent.prepare(tmp_path, Site(job, str(tmp_path), tmp_path / "token"))
