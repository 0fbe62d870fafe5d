# SPDX-License-Identifier: Apache-2.0
"""`data.packing` in whole runs: two nodes come to the same losses with and without it."""

import json
import random

import pytest
import torch
import yaml
from transformers import LlamaConfig, LlamaForCausalLM

from bench.families_models import trained_tokenizer
from e2e.test_local_run import FEDPIPE, fedpipe
from fedpipe_operator.local.directory import RunDirectory

NODES = ("edge-a", "edge-b")

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]


@pytest.fixture(scope="module")
def inputs(tmp_path_factory):
    """A small Llama, the fleet's data and its fleet.yaml."""
    root = tmp_path_factory.mktemp("packed")
    tokenizer = trained_tokenizer()
    tokenizer.save_pretrained(root / "base")
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=32, num_hidden_layers=2, num_attention_heads=2,
        intermediate_size=64, max_position_embeddings=64,
    )  # fmt: skip
    LlamaForCausalLM(config).save_pretrained(root / "base")
    draw = random.Random(0)
    for node in NODES:
        (root / node).mkdir()
        rows = [
            {"prompt": "a b c"[: draw.randint(1, 5)], "completion": " d" * draw.randint(1, 4)}
            for _ in range(40)
        ]
        (root / node / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    nodes = [{"name": node, "data": node, "threads": 1, "precisions": ["fp32"]} for node in NODES]
    (root / "fleet.yaml").write_text(yaml.safe_dump({"model": "base", "nodes": nodes}))
    return root


def losses(inputs, packing):
    """Return each round's loss and the nodes' training losses of a run."""
    data = {
        "volume": {"hostPath": {"path": "/data"}},
        "train": "train.jsonl",
        "maxLength": 32,
        "packing": packing,
    }
    spec = {
        "model": {"hostPath": {"path": str(inputs / "base")}, "task": "causal-lm"},
        "data": data | {"evaluationShare": 0.25},
        "rounds": {"count": 2, "localSteps": 3, "batchSize": 8},
        "adapter": {"ranks": {"min": 2, "max": 4}},
        "optimizer": {"learningRate": 0.01},
    }
    name = f"packed-{packing}".lower()
    job = inputs / f"{name}.yaml"
    job.write_text(yaml.safe_dump({"metadata": {"name": name}, "spec": spec}))
    out = inputs / name
    done = fedpipe([FEDPIPE, "run", str(job), "--fleet", str(inputs / "fleet.yaml"), "--out", str(out)])
    assert done.returncode == 0, done.stdout + done.stderr
    rows = [json.loads(line) for line in RunDirectory(out).metrics.read_text().splitlines()]
    return [row["loss"] for row in rows], [
        row["nodes"][node]["trainLoss"] for row in rows[1:] for node in NODES
    ]


def test_two_nodes_come_to_the_same_losses(inputs):
    plain, packed = losses(inputs, packing=False), losses(inputs, packing=True)
    assert len(plain[0]) == 3
    assert plain[0][-1] < plain[0][0]
    for expected, found in zip(plain, packed, strict=True):
        assert found == pytest.approx(expected, rel=1e-3)
