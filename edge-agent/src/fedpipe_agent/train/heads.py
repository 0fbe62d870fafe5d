# SPDX-License-Identifier: Apache-2.0
"""The task head: the modules of a classifier that are trained whole, and what every node starts them from."""

from collections.abc import Collection, Iterator
from typing import Any

import numpy as np
import torch
from torch import nn

from fedpipe_api.job import Task
from fedpipe_api.lora.format import TensorShape

from .seeds import generator

DEVIATION = 0.02
"""Standard deviation of fresh head weights."""
POOLER = "pooler"
"""The module of a base model that masked-LM training leaves out."""


def head_modules(model: nn.Module, task: Task, missing: Collection[str] = ()) -> tuple[str, ...]:
    """Return the modules that are trained whole, as peft's `modules_to_save` names them.

    Those beside the base model, and its pooler where the checkpoint has none: weights that no checkpoint
    holds are nowhere but in the adapter.

    Args:
        model: of transformers, for the task.
        task: a causal language model has no head.
        missing: parameters that the checkpoint lacks.
    """
    if task is Task.CAUSAL_LM:
        return ()
    base = getattr(model, "base_model_prefix", "")
    found = [name for name, module in _with_parameters(model) if name != base]
    pooler = f"{base}.{POOLER}."
    if any(name.startswith(pooler) for name in missing):
        found.insert(0, pooler.removesuffix("."))
    return tuple(found)


def head_parameters(model: nn.Module, modules: tuple[str, ...]) -> Iterator[tuple[str, nn.Parameter]]:
    """Yield the head's parameters by state-dict name."""
    for outer in modules:
        for name, parameter in model.get_submodule(outer).named_parameters():
            yield f"{outer}.{name}", parameter


def head_tensors(model: nn.Module, head: tuple[TensorShape, ...]) -> dict[str, np.ndarray]:
    """Return a copy of the head's present tensors by state-dict name, float32."""
    return {
        tensor.name: model.get_parameter(tensor.name).detach().float().cpu().numpy().copy() for tensor in head
    }


@torch.no_grad()
def set_head(model: nn.Module, tensors: dict[str, np.ndarray]) -> None:
    """Write the head tensors, by state-dict name."""
    for name, value in tensors.items():
        model.get_parameter(name).copy_(torch.from_numpy(value))


def start_head(
    model: nn.Module, modules: tuple[str, ...], missing: Collection[str], labels: int, seed: int
) -> None:
    """Make the head trainable, in float32, and set it to what every node starts from.

    A module that the checkpoint holds whole stays as it is: ModernBERT's was pretrained. The others, and the
    one that puts out the labels, start at N(0, 0.02) from the job's seed; their biases and norms as the
    architecture has them.
    """
    for outer in modules:
        module = model.get_submodule(outer)
        module.float().register_forward_pre_hook(_to_float)
        module.requires_grad_(True)
        if _is_pretrained(outer, module, missing, labels):
            continue
        for name, parameter in module.named_parameters():
            _start(f"{outer}.{name}", parameter, seed)


def _is_pretrained(outer: str, module: nn.Module, missing: Collection[str], labels: int) -> bool:
    names = {f"{outer}.{name}" for name, _ in module.named_parameters()}
    puts_out = any(isinstance(part, nn.Linear) and part.out_features == labels for part in module.modules())
    return not puts_out and names.isdisjoint(missing)


@torch.no_grad()
def _start(name: str, parameter: nn.Parameter, seed: int) -> None:
    if parameter.ndim > 1:
        drawn = generator(seed, "head", name).normal(0.0, DEVIATION, tuple(parameter.shape))
        parameter.copy_(torch.from_numpy(drawn.astype(np.float32)))
    elif name.endswith("bias"):
        parameter.zero_()


def _with_parameters(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    for name, module in model.named_children():
        if any(True for _ in module.parameters()):
            yield name, module


def _to_float(module: nn.Module, inputs: tuple[Any, ...]) -> tuple[Any, ...]:
    return tuple(value.float() if isinstance(value, torch.Tensor) else value for value in inputs)
