# SPDX-License-Identifier: Apache-2.0
"""Plans of published models from their configurations: what each of four boards carries."""

import transformers

from fedpipe_agent.train.shape import read_shape
from fedpipe_api import wire
from fedpipe_api.job import FedPipeJobSpec, Precision, Task
from fedpipe_operator.planner import NodeFacts, Plan, PlanRequest, plan, rows

GIB = 2**30
BOARDS = {"T4": (15, "7.5"), "Orin": (58, "8.7"), "4090": (23, "8.9"), "A100": (79, "8.0")}
"""Free GiB (Orin: of 64) and compute capability."""
MODELS = {
    "Llama-3.1-8B": (
        transformers.LlamaConfig(
            vocab_size=128256, hidden_size=4096, intermediate_size=14336, num_hidden_layers=32,
            num_attention_heads=32, num_key_value_heads=8, max_position_embeddings=131072,
            tie_word_embeddings=False,
        ),
        8_030_261_248,
    ),
    "Qwen3-4B": (
        transformers.Qwen3Config(
            vocab_size=151936, hidden_size=2560, intermediate_size=9728, num_hidden_layers=36,
            num_attention_heads=32, num_key_value_heads=8, head_dim=128, max_position_embeddings=40960,
            tie_word_embeddings=True,
        ),
        4_022_468_096,
    ),
    "Gemma-3-1B": (
        transformers.Gemma3TextConfig(
            vocab_size=262144, hidden_size=1152, intermediate_size=6912, num_hidden_layers=26,
            num_attention_heads=4, num_key_value_heads=1, head_dim=256, max_position_embeddings=32768,
            sliding_window=512,
        ),
        999_885_952,
    ),
    "Mixtral-8x7B": (
        transformers.MixtralConfig(
            vocab_size=32000, hidden_size=4096, intermediate_size=14336, num_hidden_layers=32,
            num_attention_heads=32, num_key_value_heads=8, num_local_experts=8, num_experts_per_tok=2,
            max_position_embeddings=32768, tie_word_embeddings=False,
        ),
        46_702_792_704,
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


def board(name: str) -> NodeFacts:
    """Return a board's facts, as an agent on it would register them."""
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


def shape_of(name: str) -> wire.ModelShape:
    """Return a model's shape, as an agent reads it."""
    return read_shape(MODELS[name][0], Task.CAUSAL_LM)


def planned(name: str) -> Plan:
    """Return the plan of a model for all boards together."""
    return plan(PlanRequest(model=shape_of(name), spec=SPEC, nodes=tuple(board(each) for each in BOARDS)))


def table() -> list[str]:
    """Return a line per model and plan: the boards that have it, and what limits it."""
    found = ["| model | board | plan | what limits it, and why |", "|---|---|---|---|"]
    for name, (_, parameters) in MODELS.items():
        shown = f"{name} ({parameters:,} parameters)"
        plans: dict[tuple[str, str], list[str]] = {}
        for row in rows(planned(name)):
            if row.precision == "–":
                cells = "–", row.limited_by
            else:
                ranks = row.ranks.partition(", ")[2]
                cells = (
                    f"{row.precision}, batch {row.batch}, {ranks}, {row.memory.partition(' of ')[0]} GiB",
                    f"{row.limited_by}: {row.reason}",
                )
            plans.setdefault(cells, []).append(row.node)
        for (carried, why), boards in plans.items():
            found.append(f"| {shown} | {', '.join(boards)} | {carried} | {why} |")
            shown = ""
    return found
