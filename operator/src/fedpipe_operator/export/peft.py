# SPDX-License-Identifier: Apache-2.0
"""A standard PEFT directory, written without torch; `peft.PeftModel.from_pretrained` loads it."""

import json
import os
import shutil
import tempfile
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import load_file, save_file

from fedpipe_api.job import FedPipeJobSpec, ModelSource, Task
from fedpipe_api.lora.format import HEAD, LORA_A, LORA_B
from fedpipe_api.wire import ModelShape

_PREFIX = "base_model.model."
_TASK_TYPES = {Task.SEQUENCE_CLASSIFICATION: "SEQ_CLS", Task.CAUSAL_LM: "CAUSAL_LM"}
_AUTO_CLASSES = {
    Task.SEQUENCE_CLASSIFICATION: "AutoModelForSequenceClassification",
    Task.CAUSAL_LM: "AutoModelForCausalLM",
}

_FAN_IN_FAN_OUT = {"gpt2"}
"""Architectures whose linear layers store their weight as (inputs, outputs), transformers' Conv1D."""


VLLM_RANKS = (8, 16, 32, 64, 128, 256, 320, 512)
"""What vLLM's --max-lora-rank may be."""


def write_adapter(
    global_safetensors: Path,
    spec: FedPipeJobSpec,
    shape: ModelShape,
    directory: Path,
    facts: str = "",
    *,
    beside: Iterable[Path] = (),
) -> None:
    """Write a global adapter as a PEFT directory, in place of what the directory held.

    All matrices get one rank R, filled up with zeros, and alpha = R makes the scale 1: the plain product
    lora_B @ lora_A is the change of the weight. Readers that know one scale for all ranks compute that too.
    The directory appears whole or not at all.

    Args:
        global_safetensors: the global adapter's file.
        spec: of the job.
        shape: of its model.
        directory: to write.
        facts: a paragraph for the model card.
        beside: files that are copied into it, such as the tokenizer's.
    """
    tensors = padded(load_file(global_safetensors))
    directory.parent.mkdir(parents=True, exist_ok=True)
    temporary = Path(tempfile.mkdtemp(dir=directory.parent, prefix=f".{directory.name}."))
    try:
        save_file(_peft_tensors(tensors), temporary / "adapter_model.safetensors", {"format": "pt"})
        config = json.dumps(_config(tensors, spec, shape), indent=2, sort_keys=True)
        (temporary / "adapter_config.json").write_text(config + "\n", encoding="utf-8")
        (temporary / "README.md").write_text(_card(spec, facts, rank_of(tensors)), encoding="utf-8")
        temporary.chmod(0o755)
        for path in beside:
            shutil.copyfile(path, temporary / path.name)
        for path in temporary.iterdir():
            path.chmod(0o644)
            with path.open("rb") as file:
                os.fsync(file.fileno())
        _replace(temporary, directory)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def padded(tensors: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Return a global adapter whose matrices all have the highest rank; zeros change no product."""
    rank = rank_of(tensors)
    found = {}
    for name, tensor in tensors.items():
        axis = 0 if name.endswith(LORA_A) else 1
        factor = not name.startswith(HEAD) and name.endswith((LORA_A, LORA_B))
        missing = [
            (0, rank - tensor.shape[axis]) if factor and i == axis else (0, 0) for i in range(tensor.ndim)
        ]
        found[name] = np.pad(tensor, missing)
    return found


def rank_of(tensors: Mapping[str, np.ndarray]) -> int:
    """Return the highest rank of a global adapter's matrices; at least 1, as readers ask."""
    ranks = [len(tensor) for name, tensor in tensors.items() if _is_a(name)]
    return max([1, *ranks])


def _is_a(name: str) -> bool:
    return name.endswith(LORA_A) and not name.startswith(HEAD)


def _replace(new: Path, directory: Path) -> None:
    old = new.with_name(new.name + ".old")
    if directory.exists():
        directory.rename(old)
    new.rename(directory)
    shutil.rmtree(old, ignore_errors=True)


def _peft_tensors(tensors: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Return the tensors under PEFT's names; lora_A.weight is (r, c), lora_B.weight (d, r)."""
    named = {}
    for name, tensor in tensors.items():
        plain = name.removeprefix(HEAD) if name.startswith(HEAD) else f"{name}.weight"
        named[_PREFIX + plain] = np.ascontiguousarray(tensor)
    return named


def _config(tensors: Mapping[str, np.ndarray], spec: FedPipeJobSpec, shape: ModelShape) -> dict[str, Any]:
    rank = rank_of(tensors)
    name, revision = base_of(spec.model)
    return {
        "peft_type": "LORA",
        "task_type": _TASK_TYPES[spec.model.task],
        "base_model_name_or_path": name,
        "revision": revision,
        "inference_mode": True,
        "r": rank,
        "lora_alpha": rank,
        "lora_dropout": 0.0,
        "bias": "none",
        "fan_in_fan_out": shape.architecture in _FAN_IN_FAN_OUT,
        "target_modules": sorted(name.removesuffix(LORA_A) for name in tensors if _is_a(name)),
        "modules_to_save": sorted(shape.head_modules) or None,
    }


def base_of(model: ModelSource) -> tuple[str | None, str | None]:
    """Return PEFT's `base_model_name_or_path` and `revision` for the job's model."""
    if model.hugging_face is not None:
        return model.hugging_face.repo, model.hugging_face.revision
    return (model.host_path.path if model.host_path else None), None


def _card(spec: FedPipeJobSpec, facts: str, rank: int) -> str:
    """Return the model card: what the adapter is and how to load it."""
    name, revision = base_of(spec.model)
    front = ["library_name: peft", "tags: [lora, fedpipe]"]
    if spec.model.hugging_face is not None:
        front.append(f"base_model: {name}")
    base = repr(name or "PATH/OF/THE/BASE/MODEL")
    if revision:
        base += f", revision={revision!r}"
    if spec.model.labels:
        base += ", id2label=dict(enumerate(labels))"
    auto = _AUTO_CLASSES[spec.model.task]
    return "\n".join(
        [
            "---", *front, "---", "",
            "# LoRA adapter, trained by FedPipe on data that stayed where it was", "",
            *([facts, ""] if facts else []),
            "```python",
            f"from peft import PeftModel\nfrom transformers import {auto}\n",
            *([f"labels = {list(spec.model.labels)}"] if spec.model.labels else []),
            f"base = {auto}.from_pretrained({base})",
            'model = PeftModel.from_pretrained(base, "PATH/OF/THIS/DIRECTORY")',
            "```", "",
            *(_serving(name, rank) if spec.model.task is Task.CAUSAL_LM else ()),
        ]
    )  # fmt: skip


def _serving(base: str | None, rank: int) -> list[str]:
    """Return the card's lines on servers of language models."""
    highest = next((allowed for allowed in VLLM_RANKS if allowed >= rank), None)
    if highest is None:
        return [f"All matrices have rank {rank}, which is more than vLLM serves.", ""]
    return [
        f"All matrices have rank {rank}. With vLLM:", "",
        "```sh",
        f"vllm serve {base or 'PATH/OF/THE/BASE/MODEL'} --enable-lora --max-lora-rank {highest} \\",
        "  --lora-modules trained=PATH/OF/THIS/DIRECTORY",
        "```", "",
        "With llama.cpp: `fedpipe export RUN --gguf --out adapter.gguf`, then `llama-cli --model BASE.gguf "
        "--lora adapter.gguf`.", "",
    ]  # fmt: skip
