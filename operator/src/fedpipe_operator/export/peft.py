# SPDX-License-Identifier: Apache-2.0
"""A standard PEFT directory, written without torch; `peft.PeftModel.from_pretrained` loads it."""

import json
import os
import shutil
import tempfile
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from fedpipe_api.job import FedPipeJobSpec, ModelSource, Task
from fedpipe_api.wire import ModelShape

from .peft_weights import PeftWeights, matrices_of

WEIGHTS = "adapter_model.safetensors"

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
    directory.parent.mkdir(parents=True, exist_ok=True)
    temporary = Path(tempfile.mkdtemp(dir=directory.parent, prefix=f".{directory.name}."))
    try:
        with global_safetensors.open("rb") as source, (temporary / WEIGHTS).open("wb") as file:
            weights = PeftWeights(source.fileno())
            file.writelines(weights.chunks())
        for name, text in peft_texts(weights, spec, shape, facts).items():
            (temporary / name).write_bytes(text)
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


def peft_texts(
    weights: PeftWeights, spec: FedPipeJobSpec, shape: ModelShape, facts: str = ""
) -> dict[str, bytes]:
    """Return the files of a PEFT directory beside its tensors by name; see `write_adapter`."""
    config = json.dumps(_config(weights, spec, shape), indent=2, sort_keys=True) + "\n"
    card = _card(spec, facts, weights.rank)
    return {"adapter_config.json": config.encode(), "README.md": card.encode()}


def _replace(new: Path, directory: Path) -> None:
    old = new.with_name(new.name + ".old")
    if directory.exists():
        directory.rename(old)
    new.rename(directory)
    shutil.rmtree(old, ignore_errors=True)


def _config(weights: PeftWeights, spec: FedPipeJobSpec, shape: ModelShape) -> dict[str, Any]:
    name, revision = base_of(spec.model)
    return {
        "peft_type": "LORA",
        "task_type": _TASK_TYPES[spec.model.task],
        "base_model_name_or_path": name,
        "revision": revision,
        "inference_mode": True,
        "r": weights.rank,
        "lora_alpha": weights.rank,
        "lora_dropout": 0.0,
        "bias": "none",
        "fan_in_fan_out": shape.architecture in _FAN_IN_FAN_OUT,
        "target_modules": matrices_of(weights.shapes),
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
