# SPDX-License-Identifier: Apache-2.0
"""A standard PEFT directory, written without torch; `peft.PeftModel.from_pretrained` loads it."""

import json
import os
import re
import shutil
import tempfile
from collections.abc import Mapping
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


def write_adapter(
    global_safetensors: Path, spec: FedPipeJobSpec, shape: ModelShape, directory: Path, facts: str = ""
) -> None:
    """Write a global adapter as a PEFT directory, in place of what the directory held.

    Each matrix keeps its own rank R, and alpha = R makes PEFT's scale 1: the plain product lora_B @ lora_A
    is the change of the weight. `facts` is a paragraph for the model card. The directory appears whole or
    not at all.
    """
    tensors = load_file(global_safetensors)
    directory.parent.mkdir(parents=True, exist_ok=True)
    temporary = Path(tempfile.mkdtemp(dir=directory.parent, prefix=f".{directory.name}."))
    try:
        save_file(_peft_tensors(tensors), temporary / "adapter_model.safetensors", {"format": "pt"})
        config = json.dumps(_config(tensors, spec, shape), indent=2, sort_keys=True)
        (temporary / "adapter_config.json").write_text(config + "\n", encoding="utf-8")
        (temporary / "README.md").write_text(_card(spec, facts), encoding="utf-8")
        temporary.chmod(0o755)
        for path in temporary.iterdir():
            path.chmod(0o644)
            with path.open("rb") as file:
                os.fsync(file.fileno())
        _replace(temporary, directory)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


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
    ranks = {n.removesuffix(LORA_A): t.shape[0] for n, t in sorted(tensors.items()) if n.endswith(LORA_A)}
    assert set(ranks) == {name.removesuffix(LORA_B) for name in tensors if name.endswith(LORA_B)}
    highest = max(ranks.values(), default=1)
    # PEFT reads these keys as regular expressions that end at the module's name.
    pattern = {f"^{re.escape(name)}": rank for name, rank in ranks.items() if rank != highest}
    name, revision = base_of(spec.model)
    return {
        "peft_type": "LORA",
        "task_type": _TASK_TYPES[spec.model.task],
        "base_model_name_or_path": name,
        "revision": revision,
        "inference_mode": True,
        "r": highest,
        "lora_alpha": highest,
        "rank_pattern": pattern,
        "alpha_pattern": pattern,
        "lora_dropout": 0.0,
        "bias": "none",
        "fan_in_fan_out": shape.architecture in _FAN_IN_FAN_OUT,
        "target_modules": sorted(ranks),
        "modules_to_save": sorted(shape.head_modules) or None,
    }


def base_of(model: ModelSource) -> tuple[str | None, str | None]:
    """Return PEFT's `base_model_name_or_path` and `revision` for the job's model."""
    if model.hugging_face is not None:
        return model.hugging_face.repo, model.hugging_face.revision
    return (model.host_path.path if model.host_path else None), None


def _card(spec: FedPipeJobSpec, facts: str) -> str:
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
        ]
    )  # fmt: skip
