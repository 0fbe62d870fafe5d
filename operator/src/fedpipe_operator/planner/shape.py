"""The shape of a base model from its config.json, without weights and without torch.

Module names are those transformers and peft use. The agent reads the same shape from the real modules.
"""

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fedpipe_api import wire
from fedpipe_api.base import UserError
from fedpipe_api.job import Task
from fedpipe_api.names import ATTENTION_MODULES

CONFIG_LIMIT = 2**20
"""Bytes of the largest config.json that is read."""


@dataclass(frozen=True)
class _Linear:
    """A linear layer: its name, outputs, inputs, and whether it has a bias."""

    name: str
    rows: int
    columns: int
    bias: bool

    @property
    def parameters(self) -> int:
        return self.rows * (self.columns + self.bias)


@dataclass(frozen=True)
class _Skeleton:
    """A model: its inner linear layers in order, those beside it, and all other parameters."""

    layers: int
    hidden: int
    heads: int
    key_value_heads: int
    intermediate: int
    vocabulary: int
    inner: tuple[_Linear, ...]
    outer: tuple[_Linear, ...]
    others: int
    tied: bool = False


class _Config:
    """A config.json whose fields are read with their type checked."""

    def __init__(self, path: Path, fields: dict[str, Any]):
        self._path = path
        self._fields = fields

    def count(self, name: str, default: int | None = None) -> int:
        """Return a positive whole number."""
        value = self._fields.get(name)
        value = default if value is None else value
        if not isinstance(value, int) or isinstance(value, bool) or not 0 < value < 2**31:
            raise UserError(
                f"{self._path}: {name}: {value!r} is not a positive whole number; correct the file"
            )
        return value

    def flag(self, name: str, default: bool) -> bool:
        """Return a truth value."""
        value = self._fields.get(name, default)
        if not isinstance(value, bool):
            raise UserError(f"{self._path}: {name}: {value!r} is neither true nor false; correct the file")
        return value


def read_shape(
    path: Path, task: Task, labels_count: int = 0, modules: tuple[str, ...] = ()
) -> wire.ModelShape:
    """Return the shape of a transformers model.

    Args:
        path: the model's directory, or its config.json.
        task: decides the head.
        labels_count: classes of a sequence classification.
        modules: suffixes of the candidate matrices; empty for the architecture's attention matrices.

    Raises:
        UserError: the file is missing, no model configuration, of an unknown architecture, or no linear layer
            has one of the suffixes.
    """
    file = path / "config.json" if path.is_dir() else path
    fields = _read(file)
    architecture = fields.get("model_type")
    build = _ARCHITECTURES.get(architecture) if isinstance(architecture, str) else None
    if build is None:
        raise UserError(
            f"{file}: model_type: {architecture!r} is not known; "
            f"use one of {', '.join(sorted(_ARCHITECTURES))}"
        )
    skeleton = build(_Config(file, fields), labels_count if task is Task.SEQUENCE_CLASSIFICATION else 0)
    if task is Task.CAUSAL_LM and not skeleton.outer:
        raise UserError(f"{file}: a {architecture} model is no causal-lm; use sequence-classification")
    suffixes = modules or ATTENTION_MODULES[str(architecture)]
    linear = (*skeleton.inner, *skeleton.outer)
    chosen = [
        layer for layer in linear if any(f".{layer.name}".endswith(f".{suffix}") for suffix in suffixes)
    ]
    if not chosen:
        raise UserError(
            f"spec.adapter.modules: no linear layer of {architecture!r} ends with {suffixes[0]!r}"
        )
    causal = task is Task.CAUSAL_LM
    parameters = skeleton.others + sum(layer.parameters for layer in skeleton.inner)
    if causal and not skeleton.tied:
        parameters += sum(layer.parameters for layer in skeleton.outer)
    return wire.ModelShape(
        architecture=str(architecture),
        layers=skeleton.layers,
        hidden=skeleton.hidden,
        heads=skeleton.heads,
        key_value_heads=skeleton.key_value_heads,
        intermediate=skeleton.intermediate,
        vocabulary=skeleton.vocabulary,
        causal=causal,
        gated_mlp=any(layer.name.endswith("gate_proj") for layer in linear),
        parameters=parameters,
        linear_parameters=sum(layer.rows * layer.columns for layer in skeleton.inner),
        matrices=tuple(
            wire.MatrixShape(name=layer.name, rows=layer.rows, columns=layer.columns) for layer in chosen
        ),
        head=() if causal else tuple(_head(skeleton.outer)),
    )


def longest_input(path: Path) -> int | None:
    """Return how many tokens the model in a directory takes; None where its config.json sets no limit."""
    file = path / "config.json"
    fields = _read(file)
    names = [name for name in ("max_position_embeddings", "n_positions") if fields.get(name) is not None]
    if not names:
        return None
    config = _Config(file, fields)
    positions = config.count(names[0])
    # RoBERTa's positions start after the padding index.
    return (
        positions - config.count("pad_token_id", 1) - 1
        if fields.get("model_type") == "roberta"
        else positions
    )


def _read(file: Path) -> dict[str, Any]:
    try:
        if file.stat().st_size > CONFIG_LIMIT:
            raise UserError(f"{file}: larger than {CONFIG_LIMIT} bytes; this is no model configuration")
        fields = json.loads(file.read_bytes())
    except OSError as error:
        raise UserError(
            f"{file}: cannot be read: {error.strerror}; give a transformers model directory"
        ) from None
    except ValueError as error:
        raise UserError(f"{file}: not JSON: {error}; give a transformers model directory") from None
    if not isinstance(fields, dict):
        raise UserError(f"{file}: not a JSON object; give a transformers model directory")
    return fields


def _head(outer: tuple[_Linear, ...]) -> Iterator[wire.TensorShape]:
    for layer in outer:
        yield wire.TensorShape(name=f"{layer.name}.weight", shape=(layer.rows, layer.columns))
        if layer.bias:
            yield wire.TensorShape(name=f"{layer.name}.bias", shape=(layer.rows,))


def _encoder_layer(prefix: str, names: tuple[str, ...], hidden: int, inner: int) -> Iterator[_Linear]:
    """Yield query, key, value, attention output, and both layers of the MLP."""
    sides = [(hidden, hidden)] * 4 + [(inner, hidden), (hidden, inner)]
    for name, (rows, columns) in zip(names, sides, strict=True):
        yield _Linear(f"{prefix}.{name}", rows, columns, bias=True)


_BERT_LAYER = (
    "attention.self.query",
    "attention.self.key",
    "attention.self.value",
    "attention.output.dense",
    "intermediate.dense",
    "output.dense",
)
_DISTILBERT_LAYER = (
    "attention.q_lin",
    "attention.k_lin",
    "attention.v_lin",
    "attention.out_lin",
    "ffn.lin1",
    "ffn.lin2",
)


def _bert(config: _Config, labels: int, name: str = "bert") -> _Skeleton:
    hidden, inner = config.count("hidden_size"), config.count("intermediate_size")
    layers, vocabulary = config.count("num_hidden_layers"), config.count("vocab_size")
    linear = [
        layer
        for index in range(layers)
        for layer in _encoder_layer(f"{name}.encoder.layer.{index}", _BERT_LAYER, hidden, inner)
    ]
    outer = []
    if labels and name == "bert":
        linear.append(_Linear("bert.pooler.dense", hidden, hidden, bias=True))
        outer = [_Linear("classifier", labels, hidden, bias=True)]
    elif labels:
        outer = [
            _Linear("classifier.dense", hidden, hidden, bias=True),
            _Linear("classifier.out_proj", labels, hidden, bias=True),
        ]
    positions = config.count("max_position_embeddings") + config.count("type_vocab_size", 2)
    return _Skeleton(
        layers=layers,
        hidden=hidden,
        heads=(heads := config.count("num_attention_heads")),
        key_value_heads=heads,
        intermediate=inner,
        vocabulary=vocabulary,
        inner=tuple(linear),
        outer=tuple(outer),
        # Embeddings, and two layer norms a layer beside theirs.
        others=hidden * (vocabulary + positions + 2 + 4 * layers),
    )


def _roberta(config: _Config, labels: int) -> _Skeleton:
    return _bert(config, labels, "roberta")


def _distilbert(config: _Config, labels: int) -> _Skeleton:
    hidden, inner = config.count("dim"), config.count("hidden_dim")
    layers, vocabulary = config.count("n_layers"), config.count("vocab_size")
    linear = [
        layer
        for index in range(layers)
        for layer in _encoder_layer(f"distilbert.transformer.layer.{index}", _DISTILBERT_LAYER, hidden, inner)
    ]
    outer = []
    if labels:
        outer = [
            _Linear("pre_classifier", hidden, hidden, bias=True),
            _Linear("classifier", labels, hidden, bias=True),
        ]
    return _Skeleton(
        layers=layers,
        hidden=hidden,
        heads=(heads := config.count("n_heads")),
        key_value_heads=heads,
        intermediate=inner,
        vocabulary=vocabulary,
        inner=tuple(linear),
        outer=tuple(outer),
        others=hidden * (vocabulary + config.count("max_position_embeddings") + 2 + 4 * layers),
    )


def _gpt2(config: _Config, labels: int) -> _Skeleton:
    hidden = config.count("n_embd")
    inner = config.count("n_inner", 4 * hidden)
    layers, vocabulary = config.count("n_layer"), config.count("vocab_size")
    linear = []
    for index in range(layers):
        prefix = f"transformer.h.{index}"
        linear += [
            _Linear(f"{prefix}.attn.c_attn", 3 * hidden, hidden, bias=True),
            _Linear(f"{prefix}.attn.c_proj", hidden, hidden, bias=True),
            _Linear(f"{prefix}.mlp.c_fc", inner, hidden, bias=True),
            _Linear(f"{prefix}.mlp.c_proj", hidden, inner, bias=True),
        ]
    return _Skeleton(
        layers=layers,
        hidden=hidden,
        heads=(heads := config.count("n_head")),
        key_value_heads=heads,
        intermediate=inner,
        vocabulary=vocabulary,
        inner=tuple(linear),
        outer=(_output(hidden, vocabulary, labels),),
        others=hidden * (vocabulary + config.count("n_positions") + 2 + 4 * layers),
        tied=config.flag("tie_word_embeddings", True),
    )


def _llama(
    config: _Config,
    labels: int,
    *,
    biased: bool | None = None,
    output_biased: bool | None = None,
    normed: bool = False,
) -> _Skeleton:
    """Return a Llama-like model.

    Args:
        config: of the model.
        labels: classes; 0 for a language model.
        biased: whether query, key and value have a bias; None: as `attention_bias` says.
        output_biased: the same of the attention's output.
        normed: whether queries and keys are normalised.
    """
    hidden, inner = config.count("hidden_size"), config.count("intermediate_size")
    layers, vocabulary = config.count("num_hidden_layers"), config.count("vocab_size")
    heads = config.count("num_attention_heads")
    groups = config.count("num_key_value_heads", heads)
    size = config.count("head_dim", max(1, hidden // heads))
    bias = config.flag("attention_bias", False) if biased is None else biased
    output_bias = bias if output_biased is None else output_biased
    mlp_bias = config.flag("mlp_bias", False) if biased is None and not normed else False
    linear = []
    for index in range(layers):
        attention, mlp = f"model.layers.{index}.self_attn", f"model.layers.{index}.mlp"
        linear += [
            _Linear(f"{attention}.q_proj", heads * size, hidden, bias),
            _Linear(f"{attention}.k_proj", groups * size, hidden, bias),
            _Linear(f"{attention}.v_proj", groups * size, hidden, bias),
            _Linear(f"{attention}.o_proj", hidden, heads * size, output_bias),
            _Linear(f"{mlp}.gate_proj", inner, hidden, mlp_bias),
            _Linear(f"{mlp}.up_proj", inner, hidden, mlp_bias),
            _Linear(f"{mlp}.down_proj", hidden, inner, mlp_bias),
        ]
    return _Skeleton(
        layers=layers,
        hidden=hidden,
        heads=heads,
        key_value_heads=groups,
        intermediate=inner,
        vocabulary=vocabulary,
        inner=tuple(linear),
        outer=(_output(hidden, vocabulary, labels),),
        others=hidden * (vocabulary + 1 + 2 * layers) + (2 * size * layers if normed else 0),
        tied=config.flag("tie_word_embeddings", False),
    )


def _mistral(config: _Config, labels: int) -> _Skeleton:
    return _llama(config, labels, biased=False)


def _qwen2(config: _Config, labels: int) -> _Skeleton:
    return _llama(config, labels, biased=True, output_biased=False)


def _qwen3(config: _Config, labels: int) -> _Skeleton:
    return _llama(config, labels, normed=True)


def _output(hidden: int, vocabulary: int, labels: int) -> _Linear:
    """Return the layer after a decoder: class scores, or the output embeddings."""
    return (
        _Linear("score", labels, hidden, bias=False)
        if labels
        else _Linear("lm_head", vocabulary, hidden, bias=False)
    )


_ARCHITECTURES = {
    "bert": _bert,
    "roberta": _roberta,
    "distilbert": _distilbert,
    "gpt2": _gpt2,
    "llama": _llama,
    "mistral": _mistral,
    "qwen2": _qwen2,
    "qwen3": _qwen3,
}
