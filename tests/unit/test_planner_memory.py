# SPDX-License-Identifier: Apache-2.0
"""The memory model still says what its committed measurements were compared with."""

import json
from pathlib import Path

import pytest

from bench import memory_model
from fedpipe_api import wire
from fedpipe_api.job import Precision
from fedpipe_operator.planner import training_memory
from fedpipe_operator.planner.workload import Configuration, workload

RESULTS = Path(__file__).parents[1] / "bench/results"
CONFIGS = {
    "bert-base": {
        "model_type": "bert",
        "hidden_size": 768,
        "intermediate_size": 3072,
        "num_hidden_layers": 12,
        "num_attention_heads": 12,
        "max_position_embeddings": 512,
        "vocab_size": 30522,
    },
    "gpt2": {
        "model_type": "gpt2",
        "n_embd": 768,
        "n_layer": 12,
        "n_head": 12,
        "n_positions": 1024,
        "vocab_size": 50257,
    },
}


@pytest.fixture
def shapes(tmp_path: Path) -> dict[str, wire.ModelShape]:
    found = {}
    for name, config in CONFIGS.items():
        (tmp_path / name).mkdir()
        (tmp_path / name / "config.json").write_text(json.dumps(config))
        found[name] = memory_model.shape(name, tmp_path / name)
    return found


def test_committed_predictions_are_the_model_s(shapes: dict[str, wire.ModelShape]) -> None:
    """After a change of the model: `python tests/bench/memory_model.py`."""
    report = json.loads((RESULTS / "memory_model.json").read_text())
    for point in report["points"]:
        assert memory_model.predicted(point, shapes[point["model"]]) == point
    assert report["summary"]["points"] == report["summary"]["withinTolerance"] == len(report["points"])


def test_on_a_cpu_a_narrow_mlp_leaves_less_room_to_use_again(shapes: dict[str, wire.ModelShape]) -> None:
    """glibc keeps gaps where CUDA's caching allocator keeps none."""

    def activations(kind: str, shape: wire.ModelShape) -> int:
        device = wire.DeviceFacts(
            kind=kind, name="any", free_memory=0, overhead=0, threads=1, speed=1, kernels=()
        )
        work = workload(shape, memory_model.job("bert-base"), shape.matrices)
        one, four = (
            training_memory.fixed_bytes(work, device, Configuration(Precision.FP32, b)) for b in (1, 4)
        )
        return four - one

    wide = shapes["bert-base"]
    narrow = wide.model_copy(update={"intermediate": 1536})
    shares = [activations("cpu", shape) / activations("cuda", shape) for shape in (wide, narrow)]
    assert 1.5 < shares[0] < shares[1]


def test_checkpointing_does_not_free_what_bitsandbytes_keeps_in_int8(
    shapes: dict[str, wire.ModelShape],
) -> None:
    """On CUDA, where no gaps add to it: of 12 layers, the inputs of linear layers per token."""
    device = wire.DeviceFacts(
        kind="cuda", name="any", free_memory=0, overhead=0, threads=1, speed=1, kernels=()
    )
    shape = shapes["bert-base"]
    work = workload(shape, memory_model.job("bert-base"), shape.matrices)

    def added(precision: Precision) -> int:
        two, sixteen = (
            training_memory.fixed_bytes(work, device, Configuration(precision, size, checkpointing=True))
            for size in (2, 16)
        )
        return sixteen - two

    tokens = 14 * memory_model.LENGTH
    kept = 12 * tokens * (3 * shape.hidden + shape.intermediate) * 4
    assert added(Precision.INT8) - added(Precision.FP32) >= kept


def test_deeper_models_leave_more_holes_of_unpacked_weights(shapes: dict[str, wire.ModelShape]) -> None:
    device = wire.DeviceFacts(
        kind="cpu", name="any", free_memory=0, overhead=0, threads=1, speed=1, kernels=()
    )
    shape = shapes["bert-base"]
    least = Configuration(Precision.NF4, 1)

    def fragmentation(layers: int) -> int:
        deep = shape.model_copy(update={"layers": layers})
        work = workload(deep, memory_model.job("bert-base"), deep.matrices)
        return training_memory.fixed_bytes(work, device, least) - training_memory.base_bytes(
            deep, device, Precision.NF4
        )

    unpacked = shape.hidden * shape.intermediate * 4
    assert fragmentation(24) - fragmentation(12) >= 12 * unpacked
