# SPDX-License-Identifier: Apache-2.0
"""The base model: its shape read without weights, its weights at one of four precisions, its task head."""

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from pydantic import ValidationError
from torch import nn

from fedpipe_api import wire
from fedpipe_api.base import UserError, explain
from fedpipe_api.job import ModelSource, Precision, Task
from fedpipe_api.names import ATTENTION_MODULES

from ..kernels import import_bitsandbytes
from .seeds import generator

HEAD_DEVIATION = 0.02
"""Standard deviation of fresh head weights."""


class Source:
    """Where a base model is stored: a directory, or a repository of the Hugging Face hub at a revision."""

    def __init__(self, text: str):
        """Parse `DIR` or `repo[@revision]`.

        Raises:
            UserError: the text is a path, but there is no model.
        """
        path = Path(text)
        self.revision: str | None = None
        if path.is_dir():
            if not (path / "config.json").is_file():
                raise UserError(
                    f"{text}: not a model: it has no config.json; give a transformers model directory"
                )
            self.name = str(path)
        elif path.exists() or not re.fullmatch(r"[\w.-]+/?[\w.-]*(@[\w./-]+)?", text) or text.startswith("."):
            raise UserError(
                f"{text}: not a model directory; give one, or a repository as owner/name@revision"
            )
        else:
            self.name, _, revision = text.partition("@")
            self.revision = revision or None
        self.local = path.is_dir()

    @property
    def arguments(self) -> dict[str, Any]:
        """Arguments of every `from_pretrained`."""
        found: dict[str, Any] = {"local_files_only": self.local}
        return {**found, "revision": self.revision} if self.revision else found


def read_tokenizer(source: Source) -> Any:
    """Return the tokenizer of a model; the end token pads where there is no padding token."""
    from transformers import AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(source.name, **source.arguments)
    except (OSError, ValueError, KeyError) as error:
        raise UserError(f"{source.name}: no usable tokenizer: {_line(error)}") from error
    if tokenizer.pad_token_id is None:
        if tokenizer.eos_token_id is None:
            raise UserError(f"{source.name}: its tokenizer has neither a padding nor an end token; add one")
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def read_config(source: Source, task: ModelSource, padding: int) -> Any:
    """Return the model's configuration for the task, all dropout off.

    Dropout off: adapters have few parameters and few local steps; without it a halved micro-batch gives the
    same gradients, and attention on CPU takes its fast path.
    """
    from transformers import AutoConfig

    try:
        config = AutoConfig.from_pretrained(source.name, **source.arguments)
    except Exception as error:  # a configuration may be wrong in every way; it holds no data
        raise UserError(f"{source.name}: not a model: {_line(error)}") from error
    for name, value in config.to_dict().items():
        if "drop" in name and isinstance(value, float):
            setattr(config, name, 0.0)
    config.use_cache = False
    config.pad_token_id = padding
    if task.task is Task.SEQUENCE_CLASSIFICATION:
        config.id2label = dict(enumerate(task.labels))
        config.label2id = {label: index for index, label in enumerate(task.labels)}
    return config


def longest_input(config: Any) -> int | None:
    """Return how many tokens the model can take; None where its configuration sets no limit."""
    positions = getattr(config, "max_position_embeddings", None)
    # RoBERTa's positions start after the padding index.
    return positions - config.pad_token_id - 1 if positions and "roberta" in config.model_type else positions


def read_shape(config: Any, task: Task, modules: tuple[str, ...] = ()) -> wire.ModelShape:
    """Return the shape of a model from its configuration, without weights.

    Args:
        config: from `read_config`.
        task: decides the head.
        modules: suffixes of the candidate matrices; empty for the architecture's attention matrices.

    Raises:
        UserError: the architecture is unknown or has no such task, its configuration makes no model, or no
            linear layer has one of the suffixes.
    """
    model = _empty_model(config, task)
    suffixes = modules or ATTENTION_MODULES.get(config.model_type, ())
    if not suffixes:
        raise UserError(
            f"spec.adapter.modules: {config.model_type!r} models have no default; name the module suffixes"
        )
    linear = {name: module for name, module in model.named_modules() if _is_linear(module)}
    matrices = tuple(
        wire.MatrixShape(name=name, rows=_sides(module)[0], columns=_sides(module)[1])
        for name, module in linear.items()
        if any(f".{name}".endswith(f".{suffix}") for suffix in suffixes)
    )
    if not matrices:
        raise UserError(
            f"spec.adapter.modules: no linear layer of {config.model_type!r} ends with {suffixes[0]!r}"
        )
    outside = tuple(_outside(model))
    head = dict(head_parameters(model, task))
    try:
        return wire.ModelShape(
            architecture=config.model_type,
            layers=config.num_hidden_layers,
            hidden=config.hidden_size,
            heads=config.num_attention_heads,
            key_value_heads=getattr(config, "num_key_value_heads", None) or config.num_attention_heads,
            intermediate=getattr(config, "intermediate_size", None)
            or getattr(config, "hidden_dim", None)
            or getattr(config, "n_inner", None)
            or 4 * config.hidden_size,
            vocabulary=config.vocab_size,
            causal=task is Task.CAUSAL_LM,
            gated_mlp=any(name.endswith("gate_proj") for name in linear),
            parameters=sum(p.numel() for name, p in model.named_parameters() if name not in head),
            linear_parameters=sum(
                module.weight.numel() for name, module in linear.items() if name.split(".")[0] not in outside
            ),
            matrices=matrices,
            head=tuple(wire.TensorShape(name=name, shape=tuple(p.shape)) for name, p in head.items()),
        )
    except ValidationError as error:
        raise UserError(f"the configuration of the {config.model_type} model: {explain(error)}") from None


def _empty_model(config: Any, task: Task) -> nn.Module:
    """Return the model without storage for its weights."""
    from transformers.models.auto.modeling_auto import MODEL_FOR_MASKED_LM_MAPPING_NAMES

    kind = config.model_type
    # Transformers builds it, but each position would see the token that it predicts.
    if (
        task is Task.CAUSAL_LM
        and kind in MODEL_FOR_MASKED_LM_MAPPING_NAMES
        and not getattr(config, "is_decoder", False)
    ):
        raise UserError(f"spec.model.task: a {kind} model is no causal-lm; use sequence-classification")
    try:
        with torch.device("meta"):
            model: nn.Module = _model_class(task).from_config(config, attn_implementation="sdpa")
    except Exception as error:  # of whatever its configuration lacks; it holds no data
        raise UserError(
            f"spec.model: the {kind} configuration makes no {task} model: {_line(error)}"
        ) from error
    return model


def load(source: Source, config: Any, task: Task, precision: Precision, device: torch.device) -> nn.Module:
    """Return the frozen base model at a precision with a trainable float32 head, in training mode.

    The head and the output embeddings are never quantized. What is not quantized computes in `compute_type`.

    Raises:
        UserError: the directory holds no complete model.
    """
    model_class = _model_class(task)
    quantized = precision in (Precision.INT8, Precision.NF4)
    dtype = compute_type(device) if quantized else torch.float32
    options: dict[str, Any] = {"dtype": torch.bfloat16 if precision is Precision.BF16 else dtype}
    if quantized:
        import_bitsandbytes()
        options["quantization_config"] = _quantization(precision, dtype, model_class, config)
        options["device_map"] = {"": device}
    try:
        model, report = model_class.from_pretrained(
            source.name,
            config=config,
            attn_implementation="sdpa",
            ignore_mismatched_sizes=True,
            output_loading_info=True,
            **options,
            **source.arguments,
        )
    except (OSError, ValueError) as error:
        raise UserError(f"{source.name}: the model cannot be loaded: {_line(error)}") from error
    head = dict(head_parameters(model, task))
    lacking = sorted(
        {name for name in report["missing_keys"] if name not in head}
        | {entry[0] for entry in report["mismatched_keys"] if entry[0] not in head}
    )
    if lacking:
        raise UserError(
            f"{source.name}: not a whole {config.model_type} model: {lacking[0]} is missing or misshapen"
        )
    model.requires_grad_(False)
    if head:
        for name in _outside(model):
            module = model.get_submodule(name)
            module.float().register_forward_pre_hook(_to_float)
            module.requires_grad_(True)
    _keep_training_kernels(model)
    if quantized and device.type == "cpu":
        _own_memory(model)
    return model.to(device).train()


def compute_type(device: torch.device) -> torch.dtype:
    """Return the type quantized layers compute in: bfloat16 where CUDA has it in hardware, else float32."""
    if device.type == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False):
        return torch.bfloat16
    return torch.float32


def head_parameters(model: nn.Module, task: Task) -> Iterator[tuple[str, nn.Parameter]]:
    """Yield the fully trained tensors: the classifier, which no base model holds; none for causal LM."""
    if task is Task.CAUSAL_LM:
        return
    for outside in _outside(model):
        for name, parameter in model.get_submodule(outside).named_parameters():
            yield f"{outside}.{name}", parameter


def fresh_head(shapes: tuple[wire.TensorShape, ...], seed: int) -> dict[str, np.ndarray]:
    """Return the head every node starts from: N(0, 0.02) from the job's seed, biases zero."""
    return {
        tensor.name: np.zeros(tensor.shape, dtype=np.float32)
        if len(tensor.shape) == 1
        else generator(seed, "head", tensor.name).normal(0.0, HEAD_DEVIATION, tensor.shape).astype(np.float32)
        for tensor in shapes
    }


@torch.no_grad()
def set_head(model: nn.Module, tensors: dict[str, np.ndarray]) -> None:
    """Write the head tensors, by state-dict name."""
    for name, value in tensors.items():
        model.get_parameter(name).copy_(torch.from_numpy(value))


def _model_class(task: Task) -> Any:
    from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

    return (
        AutoModelForSequenceClassification if task is Task.SEQUENCE_CLASSIFICATION else AutoModelForCausalLM
    )


def _quantization(precision: Precision, dtype: torch.dtype, model_class: Any, config: Any) -> Any:
    from transformers import BitsAndBytesConfig

    with torch.device("meta"):
        skipped = list(_outside(model_class.from_config(config, attn_implementation="sdpa")))
    if precision is Precision.INT8:
        return BitsAndBytesConfig(load_in_8bit=True, llm_int8_skip_modules=skipped)
    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=dtype,
        llm_int8_skip_modules=skipped,
    )


def _outside(model: nn.Module) -> Iterator[str]:
    """Yield the top-level modules beside the base model: the head, or the output embeddings."""
    for name, module in model.named_children():
        if name != model.base_model_prefix and any(True for _ in module.parameters()):
            yield name


def _is_linear(module: nn.Module) -> bool:
    from transformers.pytorch_utils import Conv1D

    return isinstance(module, nn.Linear | Conv1D)


def _sides(module: Any) -> tuple[int, int]:
    """Return (outputs, inputs); GPT-2's Conv1D stores its weight as (inputs, outputs)."""
    rows, columns = module.weight.shape
    return (rows, columns) if isinstance(module, nn.Linear) else (columns, rows)


def _to_float(module: nn.Module, inputs: tuple[Any, ...]) -> tuple[Any, ...]:
    return tuple(value.float() if isinstance(value, torch.Tensor) else value for value in inputs)


def _own_memory(model: nn.Module) -> None:
    """Copy what was not quantized: as views of it, it would keep the whole float32 checkpoint in memory."""
    for parameter in model.parameters():
        if parameter.is_floating_point():
            parameter.data = parameter.data.clone()


def _keep_training_kernels(model: nn.Module) -> None:
    """Stop bitsandbytes from repacking 4-bit weights for inference on CPU; packed they have no backward."""
    module: Any
    for module in model.modules():
        if hasattr(module, "support_avx512bf16_for_cpu"):
            module.support_avx512bf16_for_cpu = False


def _line(error: Exception) -> str:
    return next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)
