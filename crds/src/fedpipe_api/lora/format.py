# SPDX-License-Identifier: Apache-2.0
"""The tensors of updates and of the global adapter: names, shapes, encodings, bytes."""

import math
from collections.abc import Mapping, Sequence
from enum import StrEnum
from typing import Annotated

from pydantic import Field, StringConstraints

from ..base import Model, ModuleName

LORA_A = ".lora_A"
LORA_B = ".lora_B"
HEAD = "head."
"""Tensor names. Of matrix m (a full module name): `m.lora_B` (d, r), `m.lora_A` (r, c); of a fully trained
tensor t: `head.t`. In the global adapter the matrix is the plain product lora_B @ lora_A, scale included. In
an update the increment is scale(r) * lora_B @ lora_A. Head tensors are float32; the factors are encoded as
the method says (`methods`)."""

SCALE = ".scale"
"""Ending of the float32 scales (r,) of a factor sent as int8: a value is int8 * its component's scale."""

HEADER_BYTES = 1 << 20
"""That an update may hold beside its tensors."""


class Encoding(StrEnum):
    """How a factor's values are written: by torch's name, and safetensors' name as the value."""

    FLOAT32 = "F32"
    BFLOAT16 = "BF16"
    INT8 = "I8"

    @property
    def width(self) -> int:
        """Bytes of one value, scales aside."""
        return {Encoding.FLOAT32: 4, Encoding.BFLOAT16: 2, Encoding.INT8: 1}[self]


Side = Annotated[int, Field(ge=1, le=2**20)]
"""Rows or columns of a tensor; the largest vocabularies have a quarter of it."""

TensorName = Annotated[ModuleName, StringConstraints(pattern=r"^[A-Za-z0-9_.-]+$")]


class MatrixShape(Model):
    """A weight matrix (d rows = outputs, c columns = inputs)."""

    name: TensorName
    rows: Side
    columns: Side


class TensorShape(Model):
    """A fully trained tensor of the task head."""

    name: TensorName
    shape: tuple[Side, ...] = Field(max_length=8)

    @property
    def size(self) -> int:
        """Its parameters."""
        return math.prod(self.shape)


def scale(alpha: float, rank: int, rs_lora: bool) -> float:
    """Return the LoRA scale s: alpha/r, or alpha/sqrt(r) for rsLoRA (METHOD, symbols)."""
    return alpha / math.sqrt(rank) if rs_lora else alpha / rank


def factor_shapes(matrix: MatrixShape, rank: int) -> dict[str, tuple[int, ...]]:
    """Return the shapes of a matrix's two factors by their names."""
    return {matrix.name + LORA_B: (matrix.rows, rank), matrix.name + LORA_A: (rank, matrix.columns)}


def update_shapes(
    matrices: Sequence[MatrixShape], head: Sequence[TensorShape], ranks: Mapping[str, int]
) -> dict[str, tuple[int, ...]]:
    """Return the name and shape of every tensor of an update; `ranks` are those of the matrices trained."""
    shapes: dict[str, tuple[int, ...]] = {}
    for matrix in matrices:
        if rank := ranks.get(matrix.name, 0):
            shapes |= factor_shapes(matrix, rank)
    return shapes | {HEAD + tensor.name: tensor.shape for tensor in head}


def trained_bytes(
    matrices: Sequence[MatrixShape],
    head: Sequence[TensorShape],
    ranks: Mapping[str, int],
    encoding: Encoding = Encoding.FLOAT32,
) -> int:
    """Return the bytes of the tensors of an update whose factors are encoded so."""
    values = sum(ranks.get(matrix.name, 0) * (matrix.rows + matrix.columns) for matrix in matrices)
    return encoding.width * values + 4 * sum(tensor.size for tensor in head)


def adapter_bytes(
    matrices: Sequence[MatrixShape], head: Sequence[TensorShape], rank: int, encoding: Encoding
) -> int:
    """Return the bytes of the tensors of a global adapter at a rank, where the matrices have so much."""
    ranks = {matrix.name: min(rank, matrix.rows, matrix.columns) for matrix in matrices}
    return trained_bytes(matrices, head, ranks, encoding)


def adapter_ranks(
    tensors: Mapping[str, tuple[str, tuple[int, ...]]],
    matrices: Sequence[MatrixShape],
    head: Sequence[TensorShape],
) -> dict[str, int]:
    """Return the rank of every matrix of a global adapter as it was sent.

    Args:
        tensors: safetensors type and shape by name, as the file has them.
        matrices: the model's candidates.
        head: its fully trained tensors.

    Raises:
        ValueError: a tensor does not fit the model; the message names it.
    """
    wanted = {HEAD + tensor.name: {(Encoding.FLOAT32.value, tensor.shape)} for tensor in head}
    known = {matrix.name: matrix for matrix in matrices}
    ranks: dict[str, int] = {}
    for name in sorted(tensors):
        matrix = known.get(name.removesuffix(LORA_A))
        if matrix is None or not name.endswith(LORA_A) or len(tensors[name][1]) != 2:
            continue
        rank = ranks[matrix.name] = tensors[name][1][0]
        for factor, shape in factor_shapes(matrix, rank).items():
            found = tensors.get(factor, ("", ()))[0]
            if found == Encoding.INT8:
                wanted[factor + SCALE] = {(Encoding.FLOAT32.value, (rank,))}
                if factor + SCALE not in tensors:
                    continue
            wanted[factor] = {(Encoding.FLOAT32.value, shape), (Encoding.INT8.value, shape)}
        if matrix.name + LORA_B not in tensors:
            del wanted[name]
    for name, (kind, shape) in sorted(tensors.items()):
        if (kind, shape) not in wanted.get(name, set()):
            raise ValueError(f"tensor {name} {kind}{list(shape)} does not fit the model")
    return ranks
