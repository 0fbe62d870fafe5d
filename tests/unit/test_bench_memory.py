# SPDX-License-Identifier: Apache-2.0
"""The memory bench's side for CUDA, as far as it needs none."""

import json

import pytest

from bench import memory_model
from fedpipe_api.job import Precision

H100 = memory_model.CPU.model_copy(
    update={"kind": "cuda", "name": "H100", "compute_capability": "9.0", "overhead": 700 << 20}
)


LLAMA = {
    "model_type": "llama",
    "hidden_size": 4096,
    "intermediate_size": 11008,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 32,
    "vocab_size": 32000,
    "tie_word_embeddings": False,
}
"""The defaults of transformers' LlamaConfig."""


@pytest.fixture
def llama(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(LLAMA))
    return memory_model.shape("llama-7b", tmp_path)


def point(precision, **facts):
    return {"model": "llama-7b", "precision": precision, "microBatch": 1, "rank": 4, "length": 64} | facts


def test_the_largest_point_of_a_7b_fits_an_80_gb_gpu(llama):
    assert 6.7e9 < llama.parameters < 6.8e9
    grid = memory_model.GRIDS["cuda"]
    largest = {"length": max(grid.lengths), "microBatch": max(memory_model.MICRO_BATCHES), "rank": 16}
    for precision in grid.precisions:
        peak = memory_model.predict(point(precision, **largest), llama, H100)
        assert memory_model.predict(point(precision), llama, H100) < peak < 76 * 1024


def test_a_base_in_nf4_is_compared_with_the_same_in_bf16():
    sizes = {Precision.BF16: 1000.0, Precision.INT8: 600.0, Precision.NF4: 290.0}
    points = [point(precision, baseMiB=size) for precision, size in sizes.items()]
    assert memory_model.nf4_shares(points) == {"llama-7b": 0.29}
    assert memory_model.nf4_shares(points[1:]) == {}
