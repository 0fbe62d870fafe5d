# SPDX-License-Identifier: Apache-2.0
"""An existing PEFT adapter as the global adapter that a job starts from.

Nothing of its directory is trusted: JSON and safetensors alone are read, in bounds, and whatever has no
counterpart in the job's model is refused with the name of the field or tensor.
"""

import json
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from threadpoolctl import threadpool_limits  # type: ignore[import-untyped]

from fedpipe_api.base import UserError
from fedpipe_api.job import FedPipeJobSpec
from fedpipe_api.lora.codec import Float32, decode
from fedpipe_api.lora.format import HEAD, LORA_A, LORA_B, Encoding, scale
from fedpipe_api.wire import ModelShape

from .contribution import factors
from .factors import Factorization, Stack
from .files import MalformedFileError, TensorEntry, TensorFile, TensorWriter
from .messages import StoredFile

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
CONFIG_LIMIT = 1 << 20
RANK_LIMIT = 4096
"""The highest rank of any global adapter."""

_FIELD = "spec.adapter.from"
_PREFIX = "base_model.model."
_FACTORS = {".lora_A.weight": LORA_A, ".lora_B.weight": LORA_B}
_UNSUPPORTED = (
    "use_dora", "lora_bias", "target_parameters", "trainable_token_indices", "layer_replication",
    "use_qalora", "alora_invocation_tokens", "megatron_config",
)  # fmt: skip
"""Fields of a configuration with which an adapter is more than a product for each matrix."""
_PLAIN_STARTS = (True, False, None, "gaussian", "eva", "orthogonal")
"""Ways to start that leave the base model's weights as they are."""
_DTYPES = {"F32": np.float32, "F16": np.float16, "BF16": np.uint16}


@dataclass(frozen=True)
class Product:
    """One matrix of a PEFT adapter: the names of its factors, its rank and its scale."""

    left: str
    right: str
    rank: int
    scale: float


@dataclass(frozen=True)
class GivenAdapter:
    """A PEFT adapter that fits a job's model; `heads` are its fully trained tensors by their name there."""

    path: Path
    entries: Mapping[str, TensorEntry]
    products: Mapping[str, Product]
    heads: Mapping[str, str]


def read_given(directory: Path, spec: FedPipeJobSpec, model: ModelShape) -> GivenAdapter:
    """Read what a PEFT directory says of itself; its values are read only when it is converted.

    Raises:
        UserError: it is no LoRA adapter of this model; the message names the field or tensor.
    """
    directory = directory.expanduser()
    config = _config(directory)
    _check_config(config, directory / CONFIG, spec)
    path = directory / WEIGHTS
    if not path.is_file():
        other = " (adapter_model.bin is not read: save it as safetensors)"
        there = other if (directory / "adapter_model.bin").exists() else ""
        raise UserError(f"{_FIELD}: no file {path}{there}")
    try:
        file = TensorFile(path)
    except (MalformedFileError, OSError) as error:
        raise UserError(f"{_FIELD}: {path}: {error}") from None
    heads = {tensor.name: tensor.shape for tensor in model.head}
    found: dict[str, dict[str, str]] = {}
    whole: dict[str, str] = {}
    for name, entry in sorted(file.entries.items()):
        if entry.dtype not in _DTYPES:
            raise UserError(
                f"{_FIELD}: {path}: tensor {name!r:.200} is {entry.dtype}, not {', '.join(_DTYPES)}"
            )
        plain = name.removeprefix(_PREFIX)
        ending = next((ending for ending in _FACTORS if plain.endswith(ending)), None)
        if ending is not None:
            found.setdefault(plain.removesuffix(ending), {})[_FACTORS[ending]] = name
        elif heads.get(plain) == entry.shape:
            whole[plain] = name
        else:
            raise UserError(f"{_FIELD}: {path}: tensor {name!r:.200} is no part of the job's model")
    if not found and not whole:
        raise UserError(f"{_FIELD}: {path}: it holds no tensors")
    sides = {matrix.name: (matrix.rows, matrix.columns) for matrix in model.matrices}
    products = {}
    for matrix, names in found.items():
        if matrix not in sides:
            raise UserError(
                f"{_FIELD}: {path}: {matrix!r:.200} is no candidate; name its module in spec.adapter.modules"
            )
        products[matrix] = _product(matrix, names, file, sides[matrix], config)
    highest = max((product.rank for product in products.values()), default=0)
    if highest > spec.aggregation.max_global_rank:
        raise UserError(
            f"{_FIELD}: its rank is {highest}, above spec.aggregation.maxGlobalRank "
            f"{spec.aggregation.max_global_rank}; raise that"
        )
    return GivenAdapter(path, file.entries, products, whole)


def convert_given(directory: Path, spec: FedPipeJobSpec, model: ModelShape, target: Path) -> StoredFile:
    """Write a PEFT adapter as a global adapter, each matrix in SVD form, into a new file in `target`.

    Raises:
        UserError: as `read_given`, or a tensor is not finite.
    """
    given = read_given(directory, spec, model)
    names = [name + suffix for name in sorted(given.products) for suffix in (LORA_A, LORA_B)]
    names += [HEAD + name for name in sorted(given.heads)]
    with (
        threadpool_limits(limits=1, user_api="blas"),
        TensorWriter(target, "adapter", names) as writer,
    ):
        for matrix, product in sorted(given.products.items()):
            for suffix, tensor in _decomposed(given, product).items():
                writer.add(matrix + suffix, tensor)
        for name, stored in sorted(given.heads.items()):
            writer.add(HEAD + name, _values(given, stored))
    return writer.stored


def _decomposed(given: GivenAdapter, product: Product) -> dict[str, Float32]:
    left, right = _values(given, product.left), _values(given, product.right)
    stack = Stack(left.shape[0], right.shape[1], product.rank)
    stack.append(left.T, right, product.scale)
    found = Factorization(stack).truncate(np.ones(product.rank), product.rank)
    tensors = factors(found.left, found.right)
    if not all(np.isfinite(tensor).all() for tensor in tensors.values()):
        raise UserError(f"{_FIELD}: {given.path}: {product.left!r:.200} is too large")
    return tensors


def _values(given: GivenAdapter, name: str) -> Float32:
    """Return a tensor as float32."""
    entry = given.entries[name]
    kind = np.dtype(_DTYPES[entry.dtype])
    stored = np.fromfile(given.path, kind, entry.size // kind.itemsize, offset=entry.start)
    if len(stored) != entry.size // kind.itemsize:
        raise UserError(f"{_FIELD}: {given.path}: tensor {name!r:.200} is cut short")
    found = np.empty(len(stored), np.float32)
    decode(stored, Encoding.BFLOAT16 if entry.dtype == "BF16" else Encoding.FLOAT32, found)
    if not np.isfinite(found).all():
        raise UserError(f"{_FIELD}: {given.path}: tensor {name!r:.200} is not finite")
    return found.reshape(entry.shape)


def _config(directory: Path) -> dict[str, Any]:
    path = directory / CONFIG
    try:
        with path.open("rb") as file:
            data = file.read(CONFIG_LIMIT + 1)
        found = json.loads(data) if len(data) <= CONFIG_LIMIT else None
    except OSError as error:
        raise UserError(f"{_FIELD}: {path}: {os.strerror(error.errno or 0)}; give a PEFT directory") from None
    except (ValueError, RecursionError):
        found = None
    if not isinstance(found, dict):
        raise UserError(f"{_FIELD}: {path}: not a configuration of PEFT")
    return found


def _check_config(config: Mapping[str, Any], path: Path, spec: FedPipeJobSpec) -> None:
    def refuse(field: str, why: str) -> UserError:
        return UserError(f"{_FIELD}: {path}: {field} {why}")

    if config.get("peft_type") != "LORA":
        raise refuse("peft_type", "is not LORA; other adapters cannot be continued")
    for field in _UNSUPPORTED:
        if config.get(field):
            raise refuse(field, "is set; only plain LoRA can be continued")
    if config.get("bias", "none") != "none":
        raise refuse("bias", "is not none; trained biases cannot be continued")
    if config.get("init_lora_weights", True) not in _PLAIN_STARTS:
        raise refuse("init_lora_weights", "changed the base model; convert the adapter to plain LoRA in peft")
    base, job = config.get("base_model_name_or_path"), spec.model.hugging_face
    if job is not None and isinstance(base, str) and _is_repository(base) and base != job.repo:
        raise refuse("base_model_name_or_path", f"is {base:.200}, but spec.model names {job.repo}")


def _is_repository(name: str) -> bool:
    """Whether a base is named as on the hub, and is no directory of that name."""
    return re.fullmatch(r"[\w.-]+/[\w.-]+", name) is not None and not Path(name).exists()


def _product(
    matrix: str,
    names: Mapping[str, str],
    file: TensorFile,
    sides: tuple[int, int],
    config: Mapping[str, Any],
) -> Product:
    path = file.path
    if set(names) != {LORA_A, LORA_B}:
        raise UserError(f"{_FIELD}: {path}: {matrix!r:.200} has one factor of two")
    left, right = (file.shape(names[suffix]) for suffix in (LORA_B, LORA_A))
    rank = right[0] if len(right) == 2 else 0
    if left != (sides[0], rank) or right != (rank, sides[1]) or not 1 <= rank <= RANK_LIMIT:
        raise UserError(
            f"{_FIELD}: {path}: {matrix!r:.200} has factors {list(left)} and {list(right)}, which do not fit "
            f"a weight of {sides[0]} × {sides[1]}; is it of another base model?"
        )
    said = _number(config, "r", "rank_pattern", matrix, path)
    if said != rank:
        raise UserError(
            f"{_FIELD}: {path.parent / CONFIG}: says rank {said:g} of {matrix!r:.200}, it has {rank}"
        )
    alpha = _number(config, "lora_alpha", "alpha_pattern", matrix, path)
    return Product(
        names[LORA_B], names[LORA_A], rank, scale(alpha, rank, rs_lora=config.get("use_rslora") is True)
    )


def _number(config: Mapping[str, Any], field: str, patterns: str, matrix: str, path: Path) -> float:
    """Return rank or alpha of a matrix: of the first pattern that its name ends with, else of all."""
    given = config.get(patterns) or {}
    where = f"{_FIELD}: {path.parent / CONFIG}: {patterns}"
    if not isinstance(given, dict):
        raise UserError(f"{where} is not a mapping")
    value, name = config.get(field), field
    for pattern, one in given.items():
        literal = re.sub(r"\\(.)", r"\1", pattern.removeprefix("^").removesuffix("$"))
        # What a regular expression matches, and how long it takes, only running it would show.
        if not re.fullmatch(r"[\w.-]+", literal):
            raise UserError(f"{where} holds a regular expression; write the ends of module names")
        if matrix == literal or (not pattern.startswith("^") and matrix.endswith(f".{literal}")):
            value, name = one, patterns
            break
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value < 1e6:
        raise UserError(f"{_FIELD}: {path.parent / CONFIG}: {name} of {matrix!r:.200} is no positive number")
    return value
