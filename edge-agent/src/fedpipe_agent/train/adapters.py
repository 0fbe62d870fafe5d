# SPDX-License-Identifier: Apache-2.0
"""Adapters: from the global adapter to a node's trainable part and frozen remainder, and back to an update.

METHOD §4. The trainable part and, on bases that cannot take it, the remainder are LoRA layers of `peft`; a
float32 base takes the remainder into its weights, which costs nothing per step.
"""

import math
import re
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import nn

from fedpipe_api import wire
from fedpipe_api.lora.codec import dequantize
from fedpipe_api.lora.format import HEAD, LORA_A, LORA_B, SCALE, Encoding, MatrixShape, adapter_ranks, scale
from fedpipe_api.lora.methods import Start

from ..errors import Failure
from .candidates import is_transposed
from .precisions import import_peft
from .seeds import generator

TRAINED, FROZEN = "trained", "frozen"
"""Names of the two peft adapters."""
ROW_NORM = 1 / math.sqrt(3)
"""Expected row norm c of a fresh A: uniform in ±1/√columns (kaiming_uniform with a = √5)."""

Factors = tuple[np.ndarray, np.ndarray]
"""(B, A): a (d, r) and a (r, c) matrix, float32, whose product is an increment."""


class GlobalAdapter:
    """A global adapter file, read matrix by matrix; every tensor is checked before it is handed out."""

    def __init__(self, path: Path, shape: wire.ModelShape):
        """Open and check names, shapes and types.

        Raises:
            Failure: the file is not a global adapter of this model.
        """
        self._head = tuple(tensor.name for tensor in shape.head)
        try:
            self._file: Any = safe_open(path, framework="np")
        except SafetensorError as error:
            raise Failure(f"global adapter: not a safetensors file: {error}") from error
        names = self._file.keys()
        parts = {name: self._file.get_slice(name) for name in names}
        found = {name: (part.get_dtype(), tuple(part.get_shape())) for name, part in parts.items()}
        self._names = found.keys()
        try:
            self.ranks = adapter_ranks(found, shape.matrices, shape.head)
        except ValueError as error:
            raise Failure(f"global adapter: {error}") from None

    def __enter__(self) -> Self:
        self._file.__enter__()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._file.__exit__(kind, error, trace)

    def factors(self, matrix: str) -> Factors | None:
        """Return B and A of a matrix, None where it has none."""
        if matrix not in self.ranks:
            return None
        return self._factor(matrix, LORA_B), self._factor(matrix, LORA_A)

    def _factor(self, matrix: str, suffix: str) -> np.ndarray:
        name = matrix + suffix
        value = self._tensor(name)
        return dequantize(suffix, value, self._tensor(name + SCALE)) if name + SCALE in self._names else value

    def head(self) -> dict[str, np.ndarray]:
        """Return the head tensors by state-dict name."""
        return {name: self._tensor(HEAD + name) for name in self._head if HEAD + name in self._names}

    def _tensor(self, name: str) -> np.ndarray:
        value: np.ndarray = self._file.get_tensor(name)
        if not np.isfinite(value).all():
            raise Failure(f"global adapter: tensor {name} is not finite")
        return value


@dataclass(frozen=True)
class Parts:
    """What a node makes of one matrix of the global adapter: scale · trained + frozen, either may be None."""

    trained: Factors | None
    frozen: Factors | None


def start(
    matrix: MatrixShape, factors: Factors | None, rule: Start, scale: float, fresh: np.ndarray
) -> Parts:
    """Split one matrix of the global adapter by a start rule (METHOD §4).

    Args:
        matrix: its shape (d, c).
        factors: B (d, R) and A (R, c), rows of A orthonormal, columns of B in falling order; None for zero.
        rule: how the trainable part starts.
        scale: the LoRA scale s of the trainable part.
        fresh: rows (r, c) for components that the global adapter lacks; their B is zero. No rows: all frozen.
    """
    rank = len(fresh)
    if rank == 0:
        return Parts(trained=None, frozen=factors)
    b, a = np.zeros((matrix.rows, rank), np.float32), fresh.copy()
    if factors is None or rule.fresh:
        return Parts(trained=(b, a), frozen=factors)
    global_b, global_a = factors
    kept = min(rank, len(global_a))
    # Rows of the norm of a fresh A, so that the rank does not change the effective learning rate.
    norm = 1.0 if rule.as_is else ROW_NORM
    a[:kept] = norm * global_a[:kept]
    b[:, :kept] = global_b[:, :kept] / (norm * scale)
    rest = None
    if rule.holds_remainder and kept < len(global_a):
        rest = np.ascontiguousarray(global_b[:, kept:]), np.ascontiguousarray(global_a[kept:])
    return Parts(trained=(b, a), frozen=rest)


class _Factor(nn.Linear):
    """One LoRA factor: float32 weights that compute in the type of their input.

    peft would cast the input to the weights' type: on a bfloat16 base a float32 copy of it per adapted layer.
    """

    def __init__(self, like: nn.Linear, trained: bool):
        super().__init__(
            like.in_features, like.out_features, bias=False, device=like.weight.device, dtype=torch.float32
        )
        self.weight.requires_grad_(trained)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return nn.functional.linear(x, self.weight.to(x.dtype))


class Adapters:
    """The adapters of one loaded base model, exchanged in place from round to round."""

    def __init__(
        self,
        model: nn.Module,
        shape: wire.ModelShape,
        *,
        alpha: float,
        rs_lora: bool,
        names: tuple[object, ...],
        pristine: Path | None,
    ):
        """Attach to a base model without adapters.

        Args:
            model: from `model.load`.
            shape: its shape.
            alpha: LoRA alpha.
            rs_lora: scale by alpha/√r instead of alpha/r.
            names: seed and node, which fresh rows depend on.
            pristine: directory for copies of the base weights that take a remainder; None where the base is
                not float32 and the remainder stays an adapter of its own.
        """
        self._model = model
        self._shape = shape
        self._alpha = alpha
        self._rs_lora = rs_lora
        self._names = names
        self._pristine = pristine
        self._merged: set[str] = set()
        self._head = [parameter for parameter in model.parameters() if parameter.requires_grad]
        self._layers: dict[str, Any] = {}
        self._ranks: dict[str, dict[str, int]] = {TRAINED: {}, FROZEN: {}}

    def scale(self, rank: int) -> float:
        """Return the LoRA scale s of a rank."""
        return scale(self._alpha, rank, self._rs_lora)

    def install(
        self, adapter: GlobalAdapter | None, ranks: dict[str, int], rule: Start, round_number: int
    ) -> None:
        """Make the model compute base + global adapter as the start rule has it.

        Args:
            adapter: the global adapter; None before the first update.
            ranks: of the matrices to train, by full name; the others only hold what the global adapter has.
            rule: how the trainable part starts.
            round_number: fresh rows depend on it.
        """
        unknown = ranks.keys() - {matrix.name for matrix in self._shape.matrices}
        if unknown:
            raise Failure(f"assignment: {min(unknown)} is not a candidate matrix of the model")
        parts = {}
        for matrix in self._shape.matrices:
            rank = ranks.get(matrix.name, 0)
            factors = adapter.factors(matrix.name) if adapter else None
            if rank or factors or matrix.name in self._merged:
                fresh = fresh_rows(rank, matrix.columns, *self._names, round_number, matrix.name)
                scale = self.scale(rank) if rank else 1.0
                parts[matrix.name] = start(matrix, factors, rule, scale, fresh)
        if self._pristine is not None:
            for name, part in parts.items():
                self._merge(name, part.frozen)
                parts[name] = Parts(trained=part.trained, frozen=None)
        self._attach(parts)
        for name, part in parts.items():
            self._write(name, TRAINED, part.trained)
            self._write(name, FROZEN, part.frozen)

    def parameters(self) -> list[nn.Parameter]:
        """Return the trainable adapter parameters in a fixed order."""
        return [
            factor[TRAINED].weight
            for name in self._ranks[TRAINED]
            for factor in (self._layers[name].lora_A, self._layers[name].lora_B)
        ]

    def tensors(self) -> dict[str, np.ndarray]:
        """Return the trainable factors by their names on the wire, float32."""
        found = {}
        for name in self._ranks[TRAINED]:
            layer = self._layers[name]
            found[name + LORA_A] = layer.lora_A[TRAINED].weight.detach().float().cpu().numpy()
            found[name + LORA_B] = layer.lora_B[TRAINED].weight.detach().float().cpu().numpy()
        return found

    def remove(self) -> None:
        """Take all adapters off, leaving the bare base; merged remainders stay until the next `install`."""
        for name, layer in self._layers.items():
            self._model.set_submodule(name, layer.get_base_layer())
        self._layers = {}
        self._ranks = {TRAINED: {}, FROZEN: {}}
        if hasattr(self._model, "peft_config"):
            del self._model.peft_config

    def _attach(self, parts: dict[str, Parts]) -> None:
        """Rebuild the peft layers where a rank differs from the last round's."""
        ranks = {
            TRAINED: {name: len(part.trained[1]) for name, part in parts.items() if part.trained},
            FROZEN: {name: len(part.frozen[1]) for name, part in parts.items() if part.frozen},
        }
        if ranks == self._ranks:
            return
        peft = import_peft()
        self.remove()
        for adapter, wanted in ranks.items():
            if not wanted:
                continue
            trained = adapter == TRAINED
            patterns = {f"^{re.escape(name)}$": rank for name, rank in wanted.items()}
            config = peft.LoraConfig(
                target_modules=list(wanted),
                rank_pattern=patterns,
                # The product of the frozen factors is the remainder itself: scale 1.
                alpha_pattern={} if trained else patterns,
                lora_alpha=self._alpha,
                use_rslora=self._rs_lora and trained,
                fan_in_fan_out=any(self._is_transposed(name) for name in wanted),
                init_lora_weights=False,
            )
            peft.inject_adapter_in_model(config, self._model, adapter_name=adapter)
        # peft freezes all that is not an adapter, the task head with it.
        for parameter in self._head:
            parameter.requires_grad_(True)
        self._ranks = ranks
        self._layers = {name: self._model.get_submodule(name) for name in {**ranks[TRAINED], **ranks[FROZEN]}}
        for layer in self._layers.values():
            layer.set_adapter([TRAINED, FROZEN])
            layer.cast_input_dtype_enabled = False
            for factors in (layer.lora_A, layer.lora_B):
                for adapter, factor in factors.items():
                    factors[adapter] = _Factor(factor, trained=adapter == TRAINED)

    def _is_transposed(self, name: str) -> bool:
        layer: Any = self._model.get_submodule(name)
        return is_transposed(layer.get_base_layer() if name in self._layers else layer)

    @torch.no_grad()
    def _write(self, name: str, adapter: str, factors: Factors | None) -> None:
        if factors is not None:
            layer = self._layers[name]
            layer.lora_B[adapter].weight.copy_(torch.from_numpy(factors[0]))
            layer.lora_A[adapter].weight.copy_(torch.from_numpy(factors[1]))

    @torch.no_grad()
    def _merge(self, name: str, factors: Factors | None) -> None:
        """Set a base weight to its pristine value plus B·A.

        The pristine copy is a file, not memory, and always the origin, so that rounds do not add up rounding.
        """
        assert self._pristine is not None
        copy = self._pristine / f"{name}.npy"
        layer: Any = self._model.get_submodule(name)
        weight = layer.get_base_layer().weight if name in self._layers else layer.weight
        if name in self._merged:
            weight.copy_(torch.from_numpy(np.load(copy)))
        elif factors is not None:
            np.save(copy, weight.detach().cpu().numpy())
        self._merged.discard(name)
        if factors is None:
            return
        self._merged.add(name)
        b, a = (torch.from_numpy(factor).to(weight.device) for factor in factors)
        weight.addmm_(*((a.T, b.T) if self._is_transposed(name) else (b, a)))


def fresh_rows(rank: int, columns: int, *names: object) -> np.ndarray:
    """Return rows (rank, columns) of a fresh A: uniform in ±1/√columns, kaiming_uniform with a = √5."""
    return (generator(*names).uniform(-1.0, 1.0, (rank, columns)) / math.sqrt(columns)).astype(np.float32)


def save(path: Path, factors: dict[str, np.ndarray], head: dict[str, np.ndarray], encoding: Encoding) -> None:
    """Write an update as safetensors, named as on the wire; the same tensors give the same bytes.

    Args:
        path: the file.
        factors: by name.
        head: by parameter's name; float32 in the file.
        encoding: of the factors in the file.
    """
    kind: torch.dtype = getattr(torch, encoding.name.lower())
    named = {name: torch.from_numpy(value).to(kind) for name, value in factors.items()}
    named |= {HEAD + name: torch.from_numpy(value).float() for name, value in head.items()}
    save_file({name: named[name].contiguous() for name in sorted(named)}, path)
