# SPDX-License-Identifier: Apache-2.0
"""Some families through the whole bench: plan, two nodes, two rounds, and the adapter in plain peft."""

import json
import shutil

import pytest
import torch
from transformers import AutoModel, AutoModelForCausalLM, BitsAndBytesConfig

from bench import families, families_models
from bench.families import run_case
from fedpipe_api.base import UserError
from fedpipe_api.job import Precision, Task


@pytest.mark.parametrize(
    ("family", "task"),
    [("mamba", Task.CAUSAL_LM), ("rwkv", Task.CAUSAL_LM), ("longformer", Task.SEQUENCE_CLASSIFICATION)],
)
def test_a_model_that_goes_past_its_layers_trains_in_4_bits(family, task, tmp_path):
    assert run_case(family, task, Precision.NF4, tmp_path)


@pytest.mark.parametrize(
    ("family", "task", "why"),
    [
        ("recurrent_gemma", Task.CAUSAL_LM, "cannot be run without a cache, as training does"),
        ("nystromformer", Task.SEQUENCE_CLASSIFICATION, "takes inputs of one length alone"),
    ],
)
def test_a_model_that_cannot_be_trained_is_refused_in_one_line(family, task, why, tmp_path):
    message = rf"^spec\.model: a {family} model of transformers \S+ {why}; choose another$"
    with pytest.raises(UserError, match=message):
        run_case(family, task, Precision.FP32, tmp_path)


@pytest.mark.parametrize("family", ["roberta", "electra", "modernbert", "albert"])
def test_the_adapter_of_a_classifier_with_a_head_of_layers_loads(family, tmp_path):
    assert run_case(family, Task.SEQUENCE_CLASSIFICATION, Precision.FP32, tmp_path)


@pytest.fixture
def packed(monkeypatch, tmp_path):
    """Have the bench store its bases in 4 bits."""

    def save(family, task, directory):
        plain = tmp_path / "plain"
        families_models.save(family, task, plain)
        kind = AutoModelForCausalLM if family in families_models.DECODERS else AutoModel
        # Beside what plain transformers loads, which computes in the type that is stored.
        packing = BitsAndBytesConfig(
            load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.float32
        )
        model = kind.from_pretrained(plain, quantization_config=packing, device_map={"": "cpu"})
        model.save_pretrained(directory)
        for path in plain.glob("tokenizer*"):
            shutil.copy(path, directory)

    monkeypatch.setattr(families, "save", save)


@pytest.mark.parametrize("task", list(Task))
def test_a_base_stored_in_4_bits_trains_as_it_is(task, packed, tmp_path):
    assert run_case("llama", task, Precision.NF4, tmp_path)


def test_another_precision_of_a_base_stored_in_4_bits_is_refused(packed, tmp_path):
    message = r"^spec\.quantization: the model's weights are stored at nf4; set nf4 or auto, or give another spec\.model$"
    with pytest.raises(UserError, match=message):
        run_case("llama", Task.CAUSAL_LM, Precision.FP32, tmp_path)


def test_a_packed_base_without_place_for_a_head_is_refused(packed, tmp_path):
    with pytest.raises(UserError, match=r"is stored in 4 bits, .* give the model in float32 or bf16$"):
        run_case("bert", Task.SEQUENCE_CLASSIFICATION, Precision.NF4, tmp_path)


def test_a_base_stored_in_another_way_is_refused(monkeypatch, tmp_path):
    def save(family, task, directory):
        families_models.save(family, task, directory)
        path = directory / "config.json"
        config = json.loads(path.read_text()) | {"quantization_config": {"quant_method": "gptq", "bits": 4}}
        path.write_text(json.dumps(config))

    monkeypatch.setattr(families, "save", save)
    with pytest.raises(
        UserError, match=r"^spec\.model: its weights are quantized \(gptq\); give the model in "
    ):
        run_case("llama", Task.CAUSAL_LM, Precision.NF4, tmp_path)


def test_an_error_of_the_models_code_is_nothing_to_try_again(monkeypatch, tmp_path):
    def train(*_, **__):
        raise TypeError("vault")

    monkeypatch.setattr("fedpipe_agent.train.loop.train", train)
    message = r"^spec\.model: this llama model cannot be trained \(TypeError at .*\); choose another$"
    with pytest.raises(UserError, match=message):
        run_case("llama", Task.CAUSAL_LM, Precision.FP32, tmp_path)
