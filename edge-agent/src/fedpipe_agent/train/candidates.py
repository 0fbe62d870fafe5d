# SPDX-License-Identifier: Apache-2.0
"""The linear layers that adapters may be attached to (METHOD §1): the job's choice, peft's, or all."""

import re
from collections.abc import Collection, Iterator
from typing import Any

from torch import nn

from fedpipe_api import wire
from fedpipe_api.base import UserError

from .precisions import import_peft

SCAN_MODELS = frozenset({"falcon_h1", "falcon_mamba", "jamba", "mamba", "mamba2", "nemotron_h"})
"""Models whose fused kernels read the weights of `SCAN_MODULES` past the layer, so that peft refuses them."""
SCAN_MODULES = frozenset({"conv1d", "dt_proj", "out_proj"})


def candidates(
    model: nn.Module, config: Any, head: Collection[str], suffixes: tuple[str, ...]
) -> tuple[dict[str, nn.Module], wire.ModulesFrom]:
    """Return the layers to adapt, in the model's order, and who chose them.

    Args:
        model: on the meta device.
        config: its configuration.
        head: modules that are trained whole, which have no adapters.
        suffixes: `spec.adapter.modules`; empty for the default.

    Raises:
        UserError: names the first suffix that no layer can be adapted by.
    """
    usable = dict(_usable(model, config, head))
    if suffixes:
        for suffix in suffixes:
            if not any(_ends(name, suffix) for name in usable):
                raise UserError(f"spec.adapter.modules: {_why_not(model, config, suffix)}")
        chosen = {name: m for name, m in usable.items() if any(_ends(name, suffix) for suffix in suffixes)}
        return chosen, wire.ModulesFrom.JOB
    text = {name: usable[name] for name in usable if _is_text(model, config, name)}
    mapped = {name: module for name, module in text.items() if _is_mapped(name, config)}
    if mapped:
        return mapped, wire.ModulesFrom.PEFT
    output = output_embeddings(model)
    linear = {name: module for name, module in text.items() if name != output}
    if not linear:
        raise UserError(f"spec.model: a {config.model_type} model has no linear layer to adapt")
    return linear, wire.ModulesFrom.ALL_LINEAR


def is_linear(module: nn.Module) -> bool:
    """Whether the module computes what `nn.Linear` does; routers of experts are of subclasses that do not."""
    from transformers.pytorch_utils import Conv1D

    plain = (nn.Linear.forward, Conv1D.forward)
    return isinstance(module, nn.Linear | Conv1D) and type(module).forward in plain


def is_transposed(module: nn.Module) -> bool:
    """Whether a layer stores its weight as (inputs, outputs), as GPT-2's Conv1D does unless quantized."""
    from transformers.pytorch_utils import Conv1D

    return isinstance(module, Conv1D)


def sides(module: Any) -> tuple[int, int]:
    """Return a linear layer's (outputs, inputs)."""
    rows, columns = module.weight.shape
    return (columns, rows) if is_transposed(module) else (rows, columns)


def output_embeddings(model: Any) -> str | None:
    """Return the name of the layer that puts out the vocabulary's logits."""
    try:
        found = model.get_output_embeddings()
    except (AttributeError, NotImplementedError):
        return None
    return next((name for name, module in model.named_modules() if module is found), None)


def text_config(config: Any) -> Any:
    """Return the part of a configuration that describes the text model."""
    try:
        return config.get_text_config()
    except ValueError:  # it names two
        return config


def _usable(model: Any, config: Any, head: Collection[str]) -> Iterator[tuple[str, nn.Module]]:
    inputs = getattr(model.get_input_embeddings(), "weight", None)
    experts: dict[str, bool] = {}
    for name, module in model.named_modules():
        in_head = any(name == outer or name.startswith(outer + ".") for outer in head)
        # An update of the output embeddings would be one of the input's, where they share their weights.
        if not is_linear(module) or in_head or module.weight is inputs or _is_scan(name, config):
            continue
        leaf = name.rpartition(".")[2]
        if leaf not in experts:
            experts[leaf] = _means_experts(leaf, model)
        if not experts[leaf]:
            yield name, module


def _is_scan(name: str, config: Any) -> bool:
    return config.model_type in SCAN_MODELS and name.rpartition(".")[2] in SCAN_MODULES


def _means_experts(leaf: str, model: nn.Module) -> bool:
    """Whether peft takes a layer's name for the model's experts, and adapts those in its place."""
    peft = import_peft()
    from peft.utils.transformers_weight_conversion import convert_peft_config_for_transformers

    config = peft.LoraConfig(target_modules=[leaf])
    try:
        convert_peft_config_for_transformers(config, model=model, conversions=None)
    except ValueError:  # of one name of several that became one
        return True
    return leaf not in (config.target_modules or ())


def _is_text(model: nn.Module, config: Any, name: str) -> bool:
    """Whether a layer is in the text part; all of a model that has no other part."""
    inner = text_config(config)
    if inner is config:
        return True
    parts = name.split(".")
    owners = [model.get_submodule(".".join(parts[:depth])) for depth in range(1, len(parts))]
    return any(type(getattr(owner, "config", None)) is type(inner) for owner in owners)


def _is_mapped(name: str, config: Any) -> bool:
    """Whether peft's own mapping has the layer."""
    mapping = import_peft().utils.TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING
    kinds = (config.model_type, text_config(config).model_type)
    keys = [key for kind in kinds for key in (kind, kind.replace("_", "-")) if key in mapping]
    found = mapping[keys[0]] if keys else ()
    if isinstance(found, str):
        return re.fullmatch(found, name) is not None
    return any(_ends(name, suffix) for suffix in found)


def _ends(name: str, suffix: str) -> bool:
    return f".{name}".endswith(f".{suffix}")


def _why_not(model: nn.Module, config: Any, suffix: str) -> str:
    kind = config.model_type
    named = [name for name, _ in model.named_modules() if name and _ends(name, suffix)]
    if any(_is_scan(name, config) for name in named):
        return f"{suffix!r} cannot be adapted in a {kind} model, whose kernels read its weights directly"
    if any(_ends(name, suffix) for name, _ in model.named_parameters()):
        return f"{suffix!r} of {kind!r} is a parameter, not a linear layer; it stays frozen"
    if any(is_linear(model.get_submodule(name)) for name in named) and _means_experts(suffix, model):
        return f"peft takes {suffix!r} of a {kind} model for its experts, which stay frozen; leave it out"
    if any(is_linear(model.get_submodule(name)) for name in named):
        return f"{suffix!r} of {kind!r} belongs to the head or shares the input embeddings; leave it out"
    return f"no linear layer of {kind!r} ends with {suffix!r}"
