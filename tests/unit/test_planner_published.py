# SPDX-License-Identifier: Apache-2.0
"""Plans of published models, from their configurations: exact parameter counts, and what each board carries."""

import pytest
import transformers

from fedpipe_agent.train.shape import read_shape
from fedpipe_api import wire
from fedpipe_api.job import FedPipeJobSpec, Precision, Task
from fedpipe_operator.planner import NodeFacts, PlanRequest, plan

GIB = 2**30
BOARDS = {"t4": (15, "7.5"), "orin": (58, "8.7"), "rtx4090": (23, "8.9"), "a100": (79, "8.0")}
"""Free GiB and compute capability."""
MODELS = {
    "Llama-3.1-8B": (
        transformers.LlamaConfig(
            vocab_size=128256, hidden_size=4096, intermediate_size=14336, num_hidden_layers=32,
            num_attention_heads=32, num_key_value_heads=8, max_position_embeddings=131072,
            tie_word_embeddings=False,
        ),
        8_030_261_248, {"t4": "int8", "orin": "bf16", "rtx4090": "bf16", "a100": "bf16"},
    ),
    "Qwen3-4B": (
        transformers.Qwen3Config(
            vocab_size=151936, hidden_size=2560, intermediate_size=9728, num_hidden_layers=36,
            num_attention_heads=32, num_key_value_heads=8, head_dim=128, max_position_embeddings=40960,
            tie_word_embeddings=True,
        ),
        4_022_468_096, {"t4": "int8", "orin": "bf16", "rtx4090": "bf16", "a100": "bf16"},
    ),
    "Gemma-3-1B": (
        transformers.Gemma3TextConfig(
            vocab_size=262144, hidden_size=1152, intermediate_size=6912, num_hidden_layers=26,
            num_attention_heads=4, num_key_value_heads=1, head_dim=256, max_position_embeddings=32768,
            sliding_window=512,
        ),
        999_885_952, {"t4": "fp32", "orin": "bf16", "rtx4090": "bf16", "a100": "bf16"},
    ),
    "Mixtral-8x7B": (
        transformers.MixtralConfig(
            vocab_size=32000, hidden_size=4096, intermediate_size=14336, num_hidden_layers=32,
            num_attention_heads=32, num_key_value_heads=8, num_local_experts=8, num_experts_per_tok=2,
            max_position_embeddings=32768, tie_word_embeddings=False,
        ),
        46_702_792_704, {"t4": None, "orin": None, "rtx4090": None, "a100": None},
    ),
}  # fmt: skip
SPEC = FedPipeJobSpec.model_validate(
    {
        "model": {"hostPath": {"path": "/model"}, "task": "causal-lm"},
        "data": {"volume": {"hostPath": {"path": "/data"}}, "train": "train.jsonl", "maxLength": 256},
        "rounds": {"count": 1, "localSteps": 4, "batchSize": 4, "deadline": "2h"},
        "adapter": {"ranks": {"min": 2, "max": 16}},
    }
)


def board(name):
    free, capability = BOARDS[name]
    kernels = tuple(
        wire.KernelResult(precision=precision, usable=precision is not Precision.BF16 or capability >= "8")
        for precision in Precision
    )
    facts = wire.DeviceFacts(
        kind="cuda", name=name, compute_capability=capability, free_memory=free * GIB, overhead=GIB // 2,
        threads=8, speed=1.0, kernels=kernels,
    )  # fmt: skip
    return NodeFacts(name, facts, 1000)


@pytest.mark.parametrize("name", MODELS)
def test_counts_are_exact_and_every_board_gets_what_it_carries(name):
    config, parameters, expected = MODELS[name]
    shape = read_shape(config, Task.CAUSAL_LM)
    assert shape.parameters == parameters
    made = plan(PlanRequest(model=shape, spec=SPEC, nodes=tuple(board(each) for each in BOARDS)))
    found = {each: made.nodes[each].precision if each in made.nodes else None for each in BOARDS}
    assert found == expected
    assert all("needs" in reason for reason in made.left_out.values())


def test_experts_are_counted_as_they_are_loaded():
    shape = read_shape(MODELS["Mixtral-8x7B"][0], Task.CAUSAL_LM)
    experts = 32 * 8 * 3 * 4096 * 14336
    # bitsandbytes has no layer for stacked experts: they stay in 16 bits, and two of eight work for a token.
    assert shape.linear_parameters == 32 * (2 * 4096 * 4096 + 2 * 4096 * 1024)
    assert shape.active_parameters == shape.linear_parameters + experts // 4
    assert {matrix.name.rpartition(".")[2] for matrix in shape.matrices} == {"q_proj", "v_proj"}
