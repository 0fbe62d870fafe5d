# SPDX-License-Identifier: Apache-2.0
"""An adapter for llama.cpp: a GGUF file with names and layout of its `convert_lora_to_gguf`."""

import tempfile
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from safetensors.numpy import load_file

from fedpipe_api.base import UserError
from fedpipe_api.job import Task
from fedpipe_api.lora.format import LORA_B
from fedpipe_api.wire import ModelShape

from .peft_weights import padded, rank_of


@dataclass(frozen=True)
class _Family:
    """A family by its name in GGUF; `rotated`: the rows of queries and keys are in another order there."""

    name: str
    rotated: bool = False


FAMILIES = {
    "llama": _Family("llama", rotated=True),
    "mistral": _Family("llama", rotated=True),
    "granite": _Family("granite", rotated=True),
    "smollm3": _Family("smollm3", rotated=True),
    "qwen2": _Family("qwen2"),
    "qwen3": _Family("qwen3"),
    "gemma": _Family("gemma"),
    "gemma2": _Family("gemma2"),
    "gemma3_text": _Family("gemma3"),
    "phi3": _Family("phi3"),
    "olmo2": _Family("olmo2"),
    "gpt2": _Family("gpt2"),
}
"""By transformers' name, those whose linear layers GGUF keeps as they are but for the order of rows."""


def write_gguf(global_safetensors: Path, task: Task, shape: ModelShape, path: Path) -> None:
    """Write a global adapter as a LoRA adapter in GGUF, all matrices at one rank, scale 1.

    Raises:
        UserError: llama.cpp does not run such a model, or not with these matrices.
    """
    from gguf import MODEL_ARCH, MODEL_ARCH_NAMES, GGUFType, GGUFWriter, Keys, get_tensor_name_map

    family = FAMILIES.get(shape.architecture)
    if task is not Task.CAUSAL_LM:
        raise UserError("--gguf: for causal-lm only; export a classifier as a PEFT directory")
    if family is None:
        raise UserError(f"--gguf: not for {shape.architecture}; only for {', '.join(FAMILIES)}")
    kind = next(kind for kind in MODEL_ARCH if MODEL_ARCH_NAMES[kind] == family.name)
    names = get_tensor_name_map(kind, shape.layers)
    tensors = padded(load_file(global_safetensors))
    with tempfile.TemporaryDirectory(dir=path.parent, prefix=f".{path.name}.") as temporary:
        written = Path(temporary) / path.name
        writer = GGUFWriter(written, family.name)
        writer.add_type(GGUFType.ADAPTER)
        writer.add_string(Keys.Adapter.TYPE, "lora")
        writer.add_float32(
            Keys.Adapter.LORA_ALPHA, rank_of({name: tensor.shape for name, tensor in tensors.items()})
        )
        for name, tensor in sorted(tensors.items()):
            matrix, _, factor = name.rpartition(".")
            target = names.get_name(matrix)
            if target is None:
                raise UserError(f"--gguf: llama.cpp has no matrix {matrix}; leave it out of adapter.modules")
            ordered = _rotated(tensor, matrix, shape) if family.rotated and name.endswith(LORA_B) else tensor
            writer.add_tensor(f"{target}.weight.{factor.lower()}", np.ascontiguousarray(ordered, np.float32))
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
        written.replace(path)


def _rotated(factor: np.ndarray, matrix: str, shape: ModelShape) -> np.ndarray:
    """Return a factor B (d, r) with each head's two halves of rows interleaved, as GGUF has them."""
    heads = {"q_proj": shape.heads, "k_proj": shape.key_value_heads}.get(matrix.rpartition(".")[2])
    if heads is None:
        return factor
    rows, rank = factor.shape
    return factor.reshape(heads, 2, rows // heads // 2, rank).swapaxes(1, 2).reshape(rows, rank)
