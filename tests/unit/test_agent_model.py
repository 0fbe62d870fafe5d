# SPDX-License-Identifier: Apache-2.0
import gc
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

from agent_fixtures import KINDS, registered, save_tiny_model
from fedpipe_agent.train import model as base
from fedpipe_agent.train.heads import head_modules, head_parameters, head_tensors
from fedpipe_agent.train.model import Source
from fedpipe_agent.train.shape import read_shape
from fedpipe_api.base import UserError
from fedpipe_api.job import Precision, Task

CPU = torch.device("cpu")
TASKS = [(kind, task) for kind in KINDS for task in Task if (kind, task) != ("bert", Task.CAUSAL_LM)]


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    return {kind: save_tiny_model(kind, tmp_path_factory.mktemp(kind)) for kind in KINDS}


def config_of(path, task):
    return base.read_config(Source(str(path)), registered(task).model, 0)


@pytest.mark.parametrize(("kind", "task"), TASKS)
def test_the_shape_is_that_of_the_loaded_model(models, kind, task):
    config = config_of(models[kind], task)
    shape = read_shape(config, task)
    model = base.load(Source(str(models[kind])), config, task, Precision.FP32, CPU, seed=7)
    parameters = dict(model.named_parameters())
    head = {tensor.name: tensor.shape for tensor in shape.head}
    assert {name: tuple(parameters[name].shape) for name in head} == head
    assert bool(head) == (task is Task.SEQUENCE_CLASSIFICATION)
    assert shape.parameters == sum(p.numel() for name, p in parameters.items() if name not in head)
    assert (shape.layers, shape.hidden, shape.vocabulary) == (2, 32, 20)
    assert shape.causal == (task is Task.CAUSAL_LM)
    assert shape.gated_mlp == (kind == "llama")
    for matrix in shape.matrices:
        layer = model.get_submodule(matrix.name)
        output = layer(torch.zeros(1, matrix.columns))
        assert output.shape == (1, matrix.rows)
    assert {name for name, p in parameters.items() if p.requires_grad} == set(head)


def test_the_default_candidates_are_those_of_peft(models):
    expected = {"bert": ["query", "value"], "gpt2": ["attn.c_attn"], "llama": ["q_proj", "v_proj"]}
    for kind, suffixes in expected.items():
        task = Task.SEQUENCE_CLASSIFICATION
        shape = read_shape(config_of(models[kind], task), task)
        assert shape.modules_from == "peft"
        assert len(shape.matrices) == 2 * len(suffixes)
        assert all(any(matrix.name.endswith(s) for s in suffixes) for matrix in shape.matrices)


def test_named_modules_become_the_candidates(models):
    task = Task.SEQUENCE_CLASSIFICATION
    config = config_of(models["bert"], task)
    shape = read_shape(config, task, ("intermediate.dense",))
    assert [(m.rows, m.columns) for m in shape.matrices] == [(64, 32)] * 2
    with pytest.raises(UserError, match=r"no linear layer of 'bert' ends with 'q_proj'"):
        read_shape(config, task, ("q_proj",))


@pytest.mark.parametrize("precision", list(Precision))
@pytest.mark.parametrize(("kind", "task"), TASKS)
def test_every_precision_runs_forward_and_backward(models, kind, task, precision):
    config = config_of(models[kind], task)
    ids = torch.tensor([[4, 5, 6, 7, 8, 9]])
    source = Source(str(models[kind]))
    shape = read_shape(config, task)
    outputs = []
    for chosen in (Precision.FP32, precision):
        model = base.load(source, config, task, chosen, CPU, seed=7)
        embedded = model.get_input_embeddings()(ids).detach().requires_grad_()
        # With embeddings alone GPT-2's and Llama's classifiers look at the last position.
        logits = model(inputs_embeds=embedded, attention_mask=torch.ones_like(ids)).logits.float()
        logits.square().sum().backward()
        outputs.append((logits.detach(), embedded.grad.float()))
        for name, parameter in head_parameters(model, shape.head_modules):
            assert parameter.dtype == torch.float32, name
            assert parameter.grad is not None
        linear = model.get_submodule(shape.matrices[0].name)
        kept = {Precision.INT8: "Linear8bitLt", Precision.NF4: "Linear4bit"}.get(chosen)
        assert kept is None or type(linear).__name__ == kept
        for kept in base.kept_modules(model, shape.head_modules, config):
            assert type(model.get_submodule(kept)) is torch.nn.Linear
    (exact, exact_gradient), (found, gradient) = outputs
    tolerance = {Precision.FP32: 0, Precision.BF16: 0.05, Precision.INT8: 0.1, Precision.NF4: 0.6}[precision]
    assert (found - exact).norm() <= tolerance * exact.norm()
    assert torch.cosine_similarity(gradient.flatten(), exact_gradient.flatten(), dim=0) > 0.7


@pytest.mark.parametrize(("kind", "task"), TASKS)
def test_float32_is_what_transformers_computes(models, kind, task):
    model = base.load(
        Source(str(models[kind])), config_of(models[kind], task), task, Precision.FP32, CPU, seed=7
    )
    causal = task is Task.CAUSAL_LM
    plain = (AutoModelForCausalLM if causal else AutoModelForSequenceClassification).from_pretrained(
        models[kind], pad_token_id=0, **({} if causal else {"num_labels": 3})
    )
    state = {name: p.detach() for name, p in head_parameters(model, head_modules(model, task))}
    plain.load_state_dict({**plain.state_dict(), **state})
    ids = torch.tensor([[4, 5, 6, 7], [8, 9, 0, 0]])
    mask = (ids != 0).long()
    expected = plain.eval()(input_ids=ids, attention_mask=mask).logits
    found = model(input_ids=ids, attention_mask=mask).logits
    torch.testing.assert_close(
        found[mask.bool()] if causal else found, expected[mask.bool()] if causal else expected
    )


def test_the_head_starts_equal_on_every_node_and_precision(models):
    task = Task.SEQUENCE_CLASSIFICATION
    config, source = config_of(models["bert"], task), Source(str(models["bert"]))
    head, again, other = (
        head_tensors(
            base.load(source, config, task, precision, CPU, seed=seed), read_shape(config, task).head
        )
        for precision, seed in ((Precision.FP32, 7), (Precision.NF4, 7), (Precision.FP32, 8))
    )
    weight = head["classifier.weight"]
    assert np.array_equal(weight, again["classifier.weight"])
    assert not np.array_equal(weight, other["classifier.weight"])
    assert not head["classifier.bias"].any()
    assert abs(weight.std() - 0.02) < 0.005


@pytest.mark.parametrize("text", ["/no/such/model", "./nowhere", "a b", "too/many/parts"])
def test_a_path_without_a_model_is_named(text):
    with pytest.raises(UserError, match="not a model directory"):
        Source(text)


def test_a_directory_without_a_model_is_named(tmp_path, models):
    with pytest.raises(UserError, match=r"it has no config.json"):
        Source(str(tmp_path))
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(UserError, match="not a model"):
        config_of(tmp_path, Task.SEQUENCE_CLASSIFICATION)
    (tmp_path / "config.json").write_bytes((models["bert"] / "config.json").read_bytes())
    config = config_of(tmp_path, Task.SEQUENCE_CLASSIFICATION)
    with pytest.raises(UserError, match="cannot be loaded"):
        base.load(Source(str(tmp_path)), config, Task.SEQUENCE_CLASSIFICATION, Precision.FP32, CPU, seed=7)


def test_an_incomplete_model_is_refused(tmp_path, models):
    from safetensors.torch import load_file, save_file

    for file in models["bert"].iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    tensors = load_file(tmp_path / "model.safetensors")
    del tensors["encoder.layer.1.output.dense.weight"]
    save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    config = config_of(tmp_path, Task.SEQUENCE_CLASSIFICATION)
    with pytest.raises(UserError, match=r"bert.encoder.layer.1.output.dense.weight is missing"):
        base.load(Source(str(tmp_path)), config, Task.SEQUENCE_CLASSIFICATION, Precision.FP32, CPU, seed=7)


def test_a_repository_may_name_its_revision():
    source = Source("google-bert/bert-base-uncased@86b5e09")
    assert (source.name, source.arguments["revision"]) == ("google-bert/bert-base-uncased", "86b5e09")
    assert "revision" not in Source("gpt2").arguments


@pytest.mark.parametrize("precision", [Precision.BF16, Precision.INT8, Precision.NF4])
def test_a_smaller_base_does_not_keep_the_checkpoint_in_memory(models, precision):
    task = Task.CAUSAL_LM
    source = Source(str(models["gpt2"]))
    model = base.load(source, config_of(models["gpt2"], task), task, precision, CPU, seed=7)
    gc.collect()
    assert model is not None
    mapped = Path("/proc/self/maps").read_text()
    assert str(models["gpt2"] / "model.safetensors") not in mapped
