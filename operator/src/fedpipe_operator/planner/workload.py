# SPDX-License-Identifier: Apache-2.0
"""What training a job takes, as the memory and time models see it (METHOD §2)."""

import math
import re
from dataclasses import dataclass
from functools import cached_property

from fedpipe_api import wire
from fedpipe_api.job import FedPipeJobSpec
from fedpipe_api.lora.format import Encoding, MatrixShape
from fedpipe_api.precisions import Precision

_SHARED_INPUT = {
    name: group[0]
    for group in (
        ("query", "key", "value"),
        ("q_lin", "k_lin", "v_lin"),
        ("q_proj", "k_proj", "v_proj"),
        ("gate_proj", "up_proj"),
    )
    for name in group
}
_ATTENTION_OUTPUT = ("attention.output.dense", "out_lin", "attn.c_proj", "o_proj")
_LAYER = re.compile(r"\.(\d+)\.")


@dataclass(frozen=True)
class Configuration:
    """What is chosen for a whole node, beside the ranks."""

    precision: Precision
    micro_batch: int
    checkpointing: bool = False


@dataclass(frozen=True)
class Workload:
    """A job as memory and time see it.

    Attributes:
        shape: of the base model.
        selected: the matrices to train.
        length: tokens of a sample.
        batch: samples of an optimizer step.
        remainder_rank: rank of the frozen remainder (METHOD §4); 0 for none.
        download_rank: rank of the global adapter.
        download: encoding of its factors.
        upload: encoding of the factors trained.
        proximal: whether FedProx keeps a copy of the start.
        private: whether each sample's gradients are held.
    """

    shape: wire.ModelShape
    selected: tuple[MatrixShape, ...]
    length: int
    batch: int
    remainder_rank: int
    download_rank: int
    download: Encoding
    upload: Encoding
    proximal: bool
    private: bool = False

    @cached_property
    def head(self) -> int:
        """Parameters of the fully trained task head."""
        return sum(math.prod(tensor.shape) for tensor in self.shape.head)

    @cached_property
    def sides(self) -> dict[str, int]:
        """Parameters of one rank, rows + columns, by matrix."""
        return {matrix.name: matrix.rows + matrix.columns for matrix in self.selected}

    @cached_property
    def first_layer(self) -> int:
        """The first layer with a matrix to train; those before it need no backward pass."""
        return min((_depth(matrix.name) for matrix in self.selected), default=0)

    @cached_property
    def adapter_inputs(self) -> int:
        """Values per token that adapters keep of their inputs, in the layer that keeps most.

        Adapters of the same input share it, and the attention's output is kept anyway.
        """
        per_layer: dict[int, dict[str, int]] = {}
        for matrix in self.selected:
            if not matrix.name.endswith(_ATTENTION_OUTPUT):
                parent, _, own = matrix.name.rpartition(".")
                group = f"{parent}.{_SHARED_INPUT.get(own, own)}"
                per_layer.setdefault(_depth(matrix.name), {})[group] = matrix.columns
        return max((sum(inputs.values()) for inputs in per_layer.values()), default=0)

    @cached_property
    def adapter_outputs(self) -> int:
        """Values per token that adapters put out, in the layer with most."""
        per_layer: dict[int, int] = {}
        for matrix in self.selected:
            depth = _depth(matrix.name)
            per_layer[depth] = per_layer.get(depth, 0) + matrix.rows
        return max(per_layer.values(), default=0)


def workload(shape: wire.ModelShape, spec: FedPipeJobSpec, selected: tuple[MatrixShape, ...]) -> Workload:
    """Return the workload of a job for the matrices selected."""
    method = spec.aggregation.method
    full = spec.aggregation.max_global_rank
    return Workload(
        shape=shape,
        selected=selected,
        length=spec.data.max_length,
        batch=spec.rounds.batch_size,
        remainder_rank=full if method.start.holds_remainder else 0,
        download_rank=spec.adapter.ranks.max if method.averages_factors else full,
        download=method.download,
        upload=method.start.upload,
        proximal=spec.optimizer.proximal > 0,
        private=spec.privacy is not None,
    )


def compute_bytes(device: wire.DeviceFacts, precision: Precision) -> int:
    """Return the bytes of one activation: as the precision computes."""
    if precision.computes_in == "device":
        return 2 if device.kind == "cuda" and _capability(device) >= 8 else 4
    return 2 if precision.computes_in == "bfloat16" else 4


def _depth(name: str) -> int:
    """Return the layer a matrix is in; 0 where its name has none."""
    found = _LAYER.search(name)
    return int(found.group(1)) if found else 0


def _capability(device: wire.DeviceFacts) -> int:
    major = (device.compute_capability or "0").split(".")[0]
    return int(major) if major.isdigit() else 0
