# SPDX-License-Identifier: Apache-2.0
"""What the planner needs to know of a model, read from its real modules on the meta device."""

from collections.abc import Collection
from dataclasses import dataclass
from importlib.metadata import version
from typing import Any

from pydantic import ValidationError
from torch import nn

from fedpipe_api import wire
from fedpipe_api.base import UserError, explain
from fedpipe_api.job import Precision, Task
from fedpipe_api.lora.format import MatrixShape, TensorShape

from .candidates import candidates, is_linear, is_transposed, output_embeddings, sides, text_config
from .heads import head_modules, head_parameters
from .model import Source, empty, kept_modules, line, loading, stored_precision, unquantized


@dataclass(frozen=True)
class Skeleton:
    """A model without storage for its weights.

    Attributes:
        model: on the meta device.
        missing: parameters that the checkpoint lacks.
        head: modules that are trained whole.
    """

    model: Any
    missing: Collection[str]
    head: tuple[str, ...]


def skeleton(config: Any, task: Task, source: Source | None = None) -> Skeleton:
    """Return a model's modules without its weights.

    Args:
        config: from `read_config`.
        task: decides the class.
        source: where to look what the checkpoint lacks; None takes it to be whole.

    Raises:
        UserError: the architecture has no such task, or its configuration makes no model.
    """
    _check_kind(config, task)
    missing: Collection[str] = ()
    try:
        packed = stored_precision(config) is not None
        if source is None:
            model = empty(config, task)
        else:
            model, missing = loading(source, unquantized(config), task, packed=packed, device_map="meta")
    except UserError:
        raise
    except Exception as error:  # of whatever its configuration lacks; it holds no data
        raise UserError(
            f"spec.model: the {config.model_type} configuration makes no {task} model: {line(error)}"
        ) from error
    return Skeleton(model, missing, head_modules(model, task, missing))


def read_shape(
    config: Any, task: Task, modules: tuple[str, ...] = (), source: Source | None = None
) -> wire.ModelShape:
    """Return the shape of a model, without reading its weights.

    Args:
        config: from `read_config`.
        task: decides the head.
        modules: suffixes of the candidate matrices; empty for the default.
        source: where to look what the checkpoint lacks; None takes it to be whole.

    Raises:
        UserError: the architecture is unknown or has no such task, its configuration or its checkpoint makes
            no model, or no linear layer has one of the suffixes.
    """
    found = skeleton(config, task, source)
    model, text = found.model, text_config(config)
    chosen, chooser = candidates(model, config, found.head, modules)
    head = dict(head_parameters(model, found.head))
    quantized = _quantized(found, config)
    try:
        return wire.ModelShape(
            architecture=config.model_type,
            layers=_layers(text),
            hidden=_number(text, "hidden_size", "d_model"),
            heads=_number(text, "num_attention_heads", default=1),
            key_value_heads=_number(text, "num_key_value_heads", "num_attention_heads", default=1),
            intermediate=_intermediate(text),
            vocabulary=_number(text, "vocab_size"),
            causal=task is Task.CAUSAL_LM,
            gated_mlp=any(name.endswith("gate_proj") for name, _ in model.named_modules()),
            parameters=sum(p.numel() for name, p in model.named_parameters() if name not in head),
            linear_parameters=quantized,
            active_parameters=_active(found, text),
            matrices=tuple(
                MatrixShape(name=name, rows=sides(module)[0], columns=sides(module)[1])
                for name, module in chosen.items()
            ),
            modules_from=chooser,
            head=tuple(TensorShape(name=name, shape=tuple(p.shape)) for name, p in head.items()),
            head_modules=found.head,
            precisions=_precisions(config, quantized),
            checkpointing=bool(getattr(model, "supports_gradient_checkpointing", False)),
        )
    except ValidationError as error:
        raise UserError(f"the configuration of the {config.model_type} model: {explain(error)}") from None


def longest_input(config: Any) -> int | None:
    """Return how many tokens the model can take; None where its configuration sets no limit."""
    text = text_config(config)
    positions = getattr(text, "max_position_embeddings", None)
    if not isinstance(positions, int) or positions < 1:
        return None
    # Their positions start after the padding index.
    return positions - text.pad_token_id - 1 if text.model_type in PADDED_POSITIONS else positions


PADDED_POSITIONS = frozenset(
    {
        "camembert",
        "data2vec-text",
        "esm",
        "longformer",
        "mpnet",
        "roberta",
        "roberta-prelayernorm",
        "xlm-roberta",
    }
)


UNUSABLE = {
    "nystromformer": "takes inputs of one length alone",
    "recurrent_gemma": "cannot be run without a cache, as training does",
}
"""Models that transformers builds and that cannot be trained here, and why."""


def _check_kind(config: Any, task: Task) -> None:
    from transformers.models.auto.modeling_auto import MODEL_FOR_MASKED_LM_MAPPING_NAMES

    kind = config.model_type
    if kind in UNUSABLE:
        library = f"transformers {version('transformers')}"
        raise UserError(f"spec.model: a {kind} model of {library} {UNUSABLE[kind]}; choose another")
    # Transformers builds it, but each position would see the token that it predicts.
    if (
        task is Task.CAUSAL_LM
        and kind in MODEL_FOR_MASKED_LM_MAPPING_NAMES
        and not getattr(config, "is_decoder", False)
    ):
        raise UserError(f"spec.model.task: a {kind} model is no causal-lm; use sequence-classification")


def _quantized(found: Skeleton, config: Any) -> int:
    """Return the weights of the layers that bitsandbytes replaces: of the very class, and not kept."""
    from transformers.quantizers.quantizers_utils import should_convert_module

    kept = kept_modules(found.model, found.head, config)
    kept += getattr(found.model, "_keep_in_fp32_modules", None) or ()
    layers: dict[str, Any] = dict(found.model.named_modules())
    return sum(
        layer.weight.numel()
        for name, layer in layers.items()
        if (type(layer) is nn.Linear or is_transposed(layer)) and should_convert_module(name, kept)
    )


def _active(found: Skeleton, text: Any) -> int:
    """Return the weights that one token is multiplied with; of experts those it is sent to."""
    model, output = found.model, output_embeddings(found.model)
    outside = {name for name, _ in head_parameters(model, found.head)}
    total = sum(
        module.weight.numel()
        for name, module in model.named_modules()
        if is_linear(module) and name != output and f"{name}.weight" not in outside
    )
    chosen = _number(
        text, "num_experts_per_tok", "num_experts_per_token", "moe_topk", "top_k_experts", default=1
    )
    stacked = [p for name, p in model.named_parameters() if p.ndim == 3 and "expert" in name]
    return total + sum(p.numel() * min(chosen, len(p)) // len(p) for p in stacked)


def _layers(text: Any) -> int:
    layers = _number(text, "num_hidden_layers", "num_layers")
    return layers + (_number(text, "num_decoder_layers", default=layers) if text.is_encoder_decoder else 0)


def _intermediate(text: Any) -> int:
    """Return the width of the MLP that a token goes through; of experts, those it is sent to together."""
    width = _number(
        text, "intermediate_size", "hidden_dim", "n_inner", "ffn_dim", "d_ff", "encoder_ffn_dim", default=0
    )
    experts = _number(text, "num_experts_per_tok", default=0)
    if experts:
        width = max(width, experts * _number(text, "moe_intermediate_size", default=width))
    return width or 4 * _number(text, "hidden_size", "d_model")


def _number(text: Any, *names: str, default: int | None = None) -> Any:
    """Return the first of a configuration's attributes that is set; of one per layer, the largest."""
    for name in names:
        value = getattr(text, name, None)
        if isinstance(value, list | tuple) and value:
            value = max(value)
        if value is not None:
            return value
    return default


def _precisions(config: Any, quantized: int) -> tuple[Precision, ...]:
    """Return the precisions that make a difference to the model."""
    own = stored_precision(config)
    if own is not None:
        return (own,)
    return tuple(p for p in Precision if quantized or not p.quantized)
