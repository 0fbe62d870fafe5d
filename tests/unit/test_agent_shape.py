# SPDX-License-Identifier: Apache-2.0
import json
from pathlib import Path

import peft
import pytest
import torch
import transformers
from transformers.pytorch_utils import Conv1D

from fedpipe_agent.train.model import Source, read_config
from fedpipe_agent.train.shape import read_shape
from fedpipe_api.base import UserError
from fedpipe_api.job import HostPath, ModelSource, Task

LABELS = 3
TINY = {
    "bert": transformers.BertConfig(
        vocab_size=50, hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=40
    ),
    "roberta": transformers.RobertaConfig(
        vocab_size=50, hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=40
    ),
    "distilbert": transformers.DistilBertConfig(vocab_size=50, dim=16, n_layers=2, n_heads=2, hidden_dim=40),
    "gpt2": transformers.GPT2Config(vocab_size=50, n_embd=16, n_layer=2, n_head=2, n_positions=32),
    "gpt2 wide": transformers.GPT2Config(
        vocab_size=50, n_embd=16, n_layer=1, n_head=2, n_positions=32, n_inner=24, tie_word_embeddings=False
    ),
    "llama": transformers.LlamaConfig(
        vocab_size=50, hidden_size=16, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
        intermediate_size=40,
    ),
    "llama biased": transformers.LlamaConfig(
        vocab_size=50, hidden_size=16, num_hidden_layers=1, num_attention_heads=4, intermediate_size=40,
        attention_bias=True, mlp_bias=True, head_dim=8, tie_word_embeddings=True,
    ),
    "mistral": transformers.MistralConfig(
        vocab_size=50, hidden_size=16, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
        intermediate_size=40,
    ),
    "qwen2": transformers.Qwen2Config(
        vocab_size=50, hidden_size=16, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
        intermediate_size=40,
    ),
    "qwen3": transformers.Qwen3Config(
        vocab_size=50, hidden_size=16, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
        intermediate_size=40, head_dim=8,
    ),
}  # fmt: skip
CASES = [
    (name, task)
    for name in TINY
    for task in Task
    if task is Task.SEQUENCE_CLASSIFICATION or name.split()[0] not in ("bert", "roberta", "distilbert")
]


def build(name, task):
    config = TINY[name]
    config.num_labels = LABELS
    classes = {
        Task.CAUSAL_LM: transformers.AutoModelForCausalLM,
        Task.SEQUENCE_CLASSIFICATION: transformers.AutoModelForSequenceClassification,
    }
    with torch.device("meta"):
        return classes[task].from_config(config)


def shape_of(directory, task, modules=()):
    """Return the shape that an agent reads of the model in a directory."""
    labels = ("a", "b", "c") if task is Task.SEQUENCE_CLASSIFICATION else ()
    model = ModelSource(host_path=HostPath(path="/model"), task=task, labels=labels)
    return read_shape(read_config(Source(str(directory)), model, 0), task, modules)


def linear_layers(model):
    for name, module in model.named_modules():
        if isinstance(module, torch.nn.Linear):
            yield name, tuple(module.weight.shape)
        elif isinstance(module, Conv1D):
            yield name, tuple(module.weight.shape)[::-1]


@pytest.mark.parametrize(("name", "task"), CASES)
@pytest.mark.parametrize("modules", ["default", "mlp"])
def test_the_shape_is_that_of_the_real_modules(name, task, modules, tmp_path):
    model = build(name, task)
    TINY[name].save_pretrained(tmp_path)
    architecture = TINY[name].model_type
    mlp = {"gpt2": ("c_fc", "mlp.c_proj"), "distilbert": ("ffn.lin1", "ffn.lin2")}
    mlp |= dict.fromkeys(("bert", "roberta"), ("intermediate.dense", "output.dense"))
    suffixes = () if modules == "default" else mlp.get(architecture, ("up_proj", "down_proj"))

    shape = shape_of(tmp_path, task, suffixes)

    mapping = peft.utils.TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING
    wanted = suffixes or mapping.get(architecture)
    linear = list(linear_layers(model))
    beside = {child for child, _ in model.named_children()} - {model.base_model_prefix}
    head = {
        parameter: tuple(value.shape)
        for parameter, value in model.named_parameters()
        if parameter.split(".")[0] in beside and task is Task.SEQUENCE_CLASSIFICATION
    }
    assert {tensor.name: tensor.shape for tensor in shape.head} == head
    assert set(shape.head_modules) == {parameter.split(".")[0] for parameter in head}
    assert [(matrix.name, (matrix.rows, matrix.columns)) for matrix in shape.matrices] == [
        (layer, sides)
        for layer, sides in linear
        if layer.split(".")[0] not in beside
        and (wanted is None or any(f".{layer}".endswith(f".{end}") for end in wanted))
    ]
    assert shape.modules_from == ("job" if suffixes else "peft" if wanted else "all-linear")
    assert shape.parameters == sum(
        value.numel() for parameter, value in model.named_parameters() if parameter not in head
    )
    assert shape.linear_parameters == sum(
        rows * columns for layer, (rows, columns) in linear if layer.split(".")[0] not in beside
    )
    assert shape.causal is (task is Task.CAUSAL_LM)
    assert shape.gated_mlp is any(layer.endswith("gate_proj") for layer, _ in linear)


def written(directory: Path, **changes) -> Path:
    TINY["bert"].save_pretrained(directory)
    file = directory / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))
    return directory


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"hidden_size": "big"}, "not a model: .*hidden_size"),
        ({"hidden_size": 0}, "configuration"),
        (
            {"num_attention_heads": 3},
            "spec.model: the bert configuration makes no sequence-classification model",
        ),
        ({"num_hidden_layers": 0}, "configuration of the bert model: layers"),
        ({"model_type": "t6"}, "not a model: .*t6"),
        ({"model_type": ["bert"]}, "not a model: "),
    ],
)
def test_a_broken_configuration_is_named(changes, message, tmp_path):
    with pytest.raises(UserError, match=message) as caught:
        shape_of(written(tmp_path, **changes), Task.SEQUENCE_CLASSIFICATION)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("text", ["{", "[]", '"bert"', "null", "\xff", "[" * 100_000])
def test_what_is_no_configuration_is_named(text, tmp_path):
    (tmp_path / "config.json").write_text(text, encoding="latin-1")
    with pytest.raises(UserError, match=": not a model: ") as caught:
        shape_of(tmp_path, Task.CAUSAL_LM)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("name", ["bert", "roberta", "distilbert"])
def test_an_encoder_is_no_causal_lm(name, tmp_path):
    TINY[name].save_pretrained(tmp_path)
    with pytest.raises(UserError, match=f"spec.model.task: a {name} model is no causal-lm"):
        shape_of(tmp_path, Task.CAUSAL_LM)


def test_a_module_the_model_has_not_is_named(tmp_path):
    with pytest.raises(
        UserError, match=r"spec\.adapter\.modules: no linear layer of 'bert' ends with 'q_proj'"
    ):
        shape_of(written(tmp_path), Task.SEQUENCE_CLASSIFICATION, ("q_proj",))
