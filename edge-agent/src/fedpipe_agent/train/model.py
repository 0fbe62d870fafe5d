# SPDX-License-Identifier: Apache-2.0
"""The base model: where it is stored, its configuration, its weights at one of four precisions."""

import copy
import re
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import nn

from fedpipe_api.base import UserError
from fedpipe_api.job import ModelSource, Precision, Task

from ..errors import Failure
from .candidates import output_embeddings, text_config
from .device import is_out_of_memory
from .heads import head_modules, start_head
from .precisions import IMPLEMENTATIONS, compute_type, import_bitsandbytes

BUSY = (429, 500, 502, 503, 504)
"""Statuses of a hub that may answer later."""


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
        raise unusable(source, error, "no usable tokenizer") from error
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
        raise unusable(source, error, "not a model") from error
    for part in {id(part): part for part in (config, text_config(config))}.values():
        for name, value in part.to_dict().items():
            if "drop" in name and isinstance(value, float):
                setattr(part, name, 0.0)
        part.use_cache = False
        part.pad_token_id = padding
    if config.model_type == "falcon":
        _use_plain_layers()
    if task.task is Task.SEQUENCE_CLASSIFICATION:
        config.id2label = dict(enumerate(task.labels))
        config.label2id = {label: index for index, label in enumerate(task.labels)}
    return config


def loading(
    source: Source, config: Any, task: Task, *, packed: bool = False, **options: Any
) -> tuple[Any, frozenset[str]]:
    """Return a model as transformers loads it, and the parameters that its checkpoint lacks.

    Args:
        source: of the weights.
        config: from `read_config`.
        task: decides the class.
        packed: whether the checkpoint is quantized and the configuration is not: weights have other shapes.
        options: of `from_pretrained`.

    Raises:
        UserError: nothing can be loaded, or more is lacking than a task head.
        Failure: the hub does not answer now.
    """
    try:
        model, report = model_class(task).from_pretrained(
            source.name,
            config=config,
            ignore_mismatched_sizes=True,
            output_loading_info=True,
            **options,
            **source.arguments,
        )
    except Exception as error:  # a checkpoint may be wrong in every way; it holds no data
        if is_out_of_memory(error):
            raise
        raise unusable(source, error, "the model cannot be loaded") from error
    missing = frozenset(report["missing_keys"])
    if packed:
        _check_packed(source, model, report["unexpected_keys"])
    else:
        missing |= {entry[0] for entry in report["mismatched_keys"]}
    head = tuple(f"{name}." for name in head_modules(model, task, missing))
    lacking = sorted(name for name in missing if not name.startswith(head))
    if lacking:
        raise UserError(
            f"{source.name}: not a whole {config.model_type} model: {lacking[0]} is missing or misshapen"
        )
    return model, missing


def _check_packed(source: Source, model: Any, keys: Iterable[str]) -> None:
    """Refuse a packed base whose layers have other names than those of the model for the task.

    Of plain weights transformers adds the prefix, of packed ones it does not.
    """
    modules = {name for name, _ in model.named_modules()}
    for key in sorted(keys):
        layer, packed, _ = key.partition(".weight.absmax")
        if packed and layer not in modules:
            raise UserError(
                f"{source.name}: {layer} is stored in 4 bits, and transformers has no place for it in a "
                f"{type(model).__name__}; give the model in float32 or bf16"
            )


def load(
    source: Source, config: Any, task: Task, precision: Precision, device: torch.device, *, seed: int
) -> nn.Module:
    """Return the frozen base model at a precision with a trainable float32 head, in training mode.

    The head and the output embeddings are never quantized. What is not quantized computes in `compute_type`.

    Args:
        source: of the weights.
        config: from `read_config`.
        task: decides the class.
        precision: of the weights.
        device: where.
        seed: of the job; a fresh head is the same on every node.

    Raises:
        UserError: the directory holds no complete model.
    """
    quantization = IMPLEMENTATIONS[precision].quantization
    dtype = compute_type(precision, device)
    options: dict[str, Any] = {"dtype": dtype}
    if quantization:
        import_bitsandbytes()
        options["device_map"] = {"": device}
        bare = empty(config, task)
        kept = kept_modules(bare, head_modules(bare, task), config)
        if stored_precision(config) is None:
            options["quantization_config"] = quantization(dtype, kept)
        else:
            config = _stored_for(config, dtype, kept)
    model, missing = loading(source, config, task, **options)
    model.requires_grad_(False)
    start_head(model, head_modules(model, task, missing), missing, config.num_labels, seed)
    _keep_training_kernels(model)
    if quantization and device.type == "cpu":
        _own_memory(model)
    return model.to(device).train()


def empty(config: Any, task: Task) -> Any:
    """Return the model that a configuration describes, without storage for its weights."""
    with torch.device("meta"):
        return model_class(task).from_config(unquantized(config))


def unquantized(config: Any) -> Any:
    """Return a copy of a configuration that says nothing of quantization."""
    plain = copy.deepcopy(config)
    if getattr(plain, "quantization_config", None) is not None:
        del plain.quantization_config
    return plain


def _stored_for(config: Any, dtype: torch.dtype, kept: list[str]) -> Any:
    """Return a quantized checkpoint's configuration, to compute in a type and with `kept` as they are."""
    changed = copy.deepcopy(config)
    found = dict(_quantization(changed))
    found["llm_int8_skip_modules"] = kept
    found["bnb_4bit_compute_dtype"] = str(dtype).removeprefix("torch.")
    changed.quantization_config = found
    return changed


def _quantization(config: Any) -> dict[str, Any]:
    """Return what a configuration says of quantization; empty for nothing."""
    found = getattr(config, "quantization_config", None) or {}
    return found if isinstance(found, dict) else found.to_dict()


def stored_precision(config: Any) -> Precision | None:
    """Return the precision that a checkpoint is stored at by bitsandbytes; None for one of plain weights.

    Raises:
        UserError: it is quantized in a way that has no backward pass here.
    """
    found = _quantization(config)
    if not found:
        return None
    method = str(found.get("quant_method", "an unknown method"))
    for precision in Precision if method.startswith("bitsandbytes") else ():
        # transformers writes its flags with and without the underscore.
        if IMPLEMENTATIONS[precision].stores({name.lstrip("_"): value for name, value in found.items()}):
            return precision
    raise UserError(
        f"spec.model: its weights are quantized ({method}); "
        "give the model in float32, bf16 or bitsandbytes' own format"
    )


def model_class(task: Task) -> Any:
    """Return the class of transformers that makes models of a task."""
    from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

    return (
        AutoModelForSequenceClassification if task is Task.SEQUENCE_CLASSIFICATION else AutoModelForCausalLM
    )


READ_PAST_LAYER = {
    "jamba": ("dt_proj",),
    "longformer": ("query", "query_global"),
    "mamba": ("dt_proj",),
    "rwkv": ("attention.output", "feed_forward.value"),
}
"""Ends of the names of layers that cannot be packed: the model's own code computes with their weights, or
changes what they put out in place."""


def kept_modules(model: Any, head: tuple[str, ...], config: Any) -> list[str]:
    """Return the modules that are not quantized, or the ends of their names.

    The head, the output embeddings, what the model does not call as a layer, and what its quantized
    checkpoint keeps.

    Args:
        model: on any device.
        head: modules that are trained whole.
        config: as it was read.
    """
    output = output_embeddings(model)
    past = READ_PAST_LAYER.get(config.model_type, ())
    stored = _quantization(config).get("llm_int8_skip_modules") or ()
    return [*head, *([output] if output else []), *past, *stored]


def _use_plain_layers() -> None:
    """Have Falcon built of `nn.Linear`, the only class that bitsandbytes replaces.

    Falcon's own differs from it in one rounding, and that in 16 bits only.
    """
    from transformers.models.falcon import modeling_falcon

    patched: Any = modeling_falcon
    patched.FalconLinear = nn.Linear


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


def line(error: BaseException) -> str:
    """Return the first line of a library's error."""
    return next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)


def unusable(source: Source, error: BaseException, what: str) -> UserError | Failure:
    """Return what to raise where a library cannot load a part of a model; `what` says so in words.

    A Failure where the hub does not answer: that passes, so another try makes sense.
    """
    from huggingface_hub.errors import (
        GatedRepoError,
        HfHubHTTPError,
        LocalEntryNotFoundError,
        OfflineModeIsEnabled,
    )

    causes = list(_causes(error))
    answers = [cause.response.status_code for cause in causes if isinstance(cause, HfHubHTTPError)]

    def among(kind: type[BaseException]) -> bool:
        return any(isinstance(cause, kind) for cause in causes)

    if among(GatedRepoError) or not {401, 403}.isdisjoint(answers):
        return UserError(
            f"{source.name}: the hub wants a token that may read it; set HF_TOKEN, or "
            "spec.model.huggingFace.tokenSecret in a cluster, and accept the model's terms on its page"
        )
    away = among(LocalEntryNotFoundError) and not among(OfflineModeIsEnabled)
    if away or any(status in BUSY for status in answers):
        return Failure(f"{source.name}: the hub does not answer now, and the model is not in its cache")
    return UserError(f"{source.name}: {what}: {line(error)}")


def _causes(error: BaseException | None) -> Iterator[BaseException]:
    """Yield an error and those that led to it."""
    while error is not None:
        yield error
        error = error.__cause__ or error.__context__
