# SPDX-License-Identifier: Apache-2.0
"""Heads of classifiers: what they start from, and that plain peft loads them."""

import numpy as np
import pytest
import torch
import transformers
from peft import PeftModel
from safetensors.numpy import save_file
from transformers import AutoModelForSequenceClassification

from agent_fixtures import LABELS, global_adapter, registered
from fedpipe_agent.train import model as base
from fedpipe_agent.train.adapters import Adapters, GlobalAdapter
from fedpipe_agent.train.heads import head_tensors, set_head
from fedpipe_agent.train.model import Source
from fedpipe_agent.train.shape import read_shape
from fedpipe_api.base import UserError
from fedpipe_api.job import FedPipeJobSpec, Precision, Task
from fedpipe_api.lora.methods import Start
from fedpipe_operator.export import write_adapter

CPU, TASK = torch.device("cpu"), Task.SEQUENCE_CLASSIFICATION
SIZES = {
    "vocab_size": 40, "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2,
    "intermediate_size": 24, "max_position_embeddings": 24, "pad_token_id": 0, "initializer_range": 0.2,
}  # fmt: skip
MODELS = {
    "roberta": (transformers.RobertaConfig, transformers.RobertaModel, {}),
    "xlm-roberta": (transformers.XLMRobertaConfig, transformers.XLMRobertaModel, {}),
    "camembert": (transformers.CamembertConfig, transformers.CamembertModel, {}),
    "electra": (transformers.ElectraConfig, transformers.ElectraModel, {"embedding_size": 8}),
    "modernbert": (transformers.ModernBertConfig, transformers.ModernBertForMaskedLM, {}),
    "bert without pooler": (transformers.BertConfig, transformers.BertForMaskedLM, {}),
}


def saved(name, directory):
    config, kind, more = MODELS[name]
    special = {} if "bert" in name else {"bos_token_id": 1, "eos_token_id": 2}
    torch.manual_seed(0)
    model = kind(config(**{**SIZES, **special, **more}))
    model.save_pretrained(directory)
    return model


def prepared(directory, precision=Precision.FP32):
    source = Source(str(directory))
    config = base.read_config(source, registered(TASK).model, 0)
    shape = read_shape(config, TASK, (), source)
    return base.load(source, config, TASK, precision, CPU, seed=7), shape


@pytest.mark.parametrize("name", MODELS)
def test_peft_loads_the_adapter_and_its_head(name, tmp_path):
    saved(name, tmp_path / "base")
    model, shape = prepared(tmp_path / "base")
    save_file(global_adapter(shape, 2), tmp_path / "global.safetensors")
    adapters = Adapters(model, shape, alpha=8, rs_lora=False, names=(7, "edge"), pristine=tmp_path)
    with GlobalAdapter(tmp_path / "global.safetensors", shape) as adapter:
        adapters.install(adapter, {}, Start.SPLIT, 1)
        set_head(model, adapter.head())
    spec = FedPipeJobSpec.model_validate(
        {
            "model": {"hostPath": {"path": str(tmp_path / "base")}, "task": TASK, "labels": list(LABELS)},
            "data": {"volume": {"hostPath": {"path": "/data"}}, "train": "train.jsonl"},
            "rounds": {"count": 1},
        }
    )
    write_adapter(tmp_path / "global.safetensors", spec, shape, tmp_path / "out")
    plain = AutoModelForSequenceClassification.from_pretrained(tmp_path / "base", num_labels=3)
    loaded = PeftModel.from_pretrained(plain, tmp_path / "out").eval()
    ids = torch.tensor([[5, 6, 7, 8, 2], [9, 3, 4, 2, 0]])
    inputs = {"input_ids": ids, "attention_mask": (ids != 0).long()}
    with torch.no_grad():
        torch.testing.assert_close(
            loaded(**inputs).logits, model.eval()(**inputs).logits, rtol=1e-4, atol=1e-4
        )


def test_a_pretrained_head_stays_as_it_is(tmp_path):
    pretrained = saved("modernbert", tmp_path)
    model, shape = prepared(tmp_path)
    head = head_tensors(model, shape.head)
    assert shape.head_modules == ("head", "classifier")
    assert np.array_equal(head["head.norm.weight"], np.ones(16, np.float32))
    assert np.array_equal(head["head.dense.weight"], pretrained.head.dense.weight.detach().numpy())
    adapters = Adapters(model, shape, alpha=8, rs_lora=False, names=(7, "edge"), pristine=None)
    adapters.install(None, {matrix.name: 2 for matrix in shape.matrices}, Start.FRESH, 1)
    ids = torch.tensor([[5, 6, 7, 8, 2]])
    model(input_ids=ids, attention_mask=torch.ones_like(ids)).logits.square().sum().backward()
    assert any(parameter.grad.abs().max() > 0 for parameter in adapters.parameters())


def test_norms_of_a_fresh_head_start_as_the_architecture_has_them(tmp_path):
    config, _, more = MODELS["modernbert"]
    transformers.ModernBertModel(config(**{**SIZES, **more})).save_pretrained(tmp_path)
    model, shape = prepared(tmp_path)
    head = head_tensors(model, shape.head)
    assert np.array_equal(head["head.norm.weight"], np.ones(16, np.float32))
    assert 0.01 < head["head.dense.weight"].std() < 0.03


def test_a_pooler_that_the_checkpoint_lacks_is_trained_and_sent(tmp_path):
    saved("bert without pooler", tmp_path)
    model, shape = prepared(tmp_path)
    assert shape.head_modules == ("bert.pooler", "classifier")
    trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert trained == {tensor.name for tensor in shape.head} >= {"bert.pooler.dense.weight"}
    assert all(
        torch.equal(a, b) for a, b in zip(model.parameters(), prepared(tmp_path)[0].parameters(), strict=True)
    )


def test_an_incomplete_checkpoint_is_refused_before_its_weights_are_read(tmp_path):
    from safetensors.torch import load_file
    from safetensors.torch import save_file as save_torch

    saved("roberta", tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    del tensors["encoder.layer.1.output.dense.weight"]
    save_torch(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    source = Source(str(tmp_path))
    config = base.read_config(source, registered(TASK).model, 0)
    with pytest.raises(UserError, match=r"roberta.encoder.layer.1.output.dense.weight is missing") as caught:
        read_shape(config, TASK, (), source)
    assert "\n" not in str(caught.value)
