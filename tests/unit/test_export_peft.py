# SPDX-License-Identifier: Apache-2.0
import json
import re

import numpy as np
import pytest
import torch
from peft import LoraConfig, PeftModel
from safetensors.numpy import load_file, save_file
from transformers import (
    AutoModelForSequenceClassification,
    BertConfig,
    BertForSequenceClassification,
    GPT2Config,
    GPT2ForSequenceClassification,
    GPT2LMHeadModel,
)

from fedpipe_api.job import FedPipeJobSpec
from fedpipe_api.lora.format import HEAD, LORA_A, LORA_B
from fedpipe_api.wire import (
    MatrixShape,
    ModelShape,
)
from fedpipe_operator.export import write_adapter
from fedpipe_operator.export.archive import AdapterArchive
from fedpipe_operator.kube.get import adapter_files
from fedpipe_operator.local.tokenizer import tokenizer_files


def bert():
    return BertForSequenceClassification(
        BertConfig(
            vocab_size=50, hidden_size=24, num_hidden_layers=12, num_attention_heads=2, intermediate_size=32,
            max_position_embeddings=32, num_labels=3,
        )
    )  # fmt: skip


def gpt2_config(**more):
    return GPT2Config(vocab_size=50, n_embd=24, n_layer=2, n_head=2, n_positions=32, pad_token_id=0, **more)


CASES = {
    "bert": (bert, "sequence-classification", ("query", "value", "attention.output.dense"), ("classifier",)),
    "gpt2-classes": (
        lambda: GPT2ForSequenceClassification(gpt2_config(num_labels=3)),
        "sequence-classification", ("attn.c_attn", "attn.c_proj"), ("score",),
    ),
    "gpt2-lm": (lambda: GPT2LMHeadModel(gpt2_config()), "causal-lm", ("attn.c_attn", "mlp.c_fc"), ()),
}  # fmt: skip


def spec_of(task, path="/base"):
    labels = ["a", "b", "c"] if task == "sequence-classification" else []
    return FedPipeJobSpec.model_validate(
        {
            "model": {"hostPath": {"path": str(path)}, "task": task, "labels": labels},
            "data": {"volume": {"hostPath": {"path": "/data"}}, "train": "train.jsonl"},
            "rounds": {"count": 1},
        }
    )


def shape_of(model):
    config = model.config
    return ModelShape(
        architecture=config.model_type, layers=2, hidden=24, heads=2, key_value_heads=2, intermediate=32,
        vocabulary=50, causal=config.model_type == "gpt2", parameters=1, linear_parameters=1,
        matrices=(MatrixShape(name="m", rows=1, columns=1),),
        head_modules=tuple(name for name, _ in model.named_children() if name in ("classifier", "score")),
    )  # fmt: skip


def global_adapter(model, suffixes, heads, seed=0):
    """Random factors of many ranks, a zero-rank-free subset of the matrices, and a new head."""
    random = np.random.default_rng(seed)
    tensors = {}
    conv = model.config.model_type == "gpt2"
    matching = [(n, m) for n, m in model.named_modules() if n.endswith(suffixes)]
    for i, (name, module) in enumerate(matching):
        rows, columns = module.weight.shape[::-1] if conv else module.weight.shape
        rank = 1 + (i * 5) % 7
        tensors[name + LORA_B] = random.normal(size=(rows, rank)).astype(np.float32) * 0.1
        tensors[name + LORA_A] = random.normal(size=(rank, columns)).astype(np.float32) * 0.1
    for name, parameter in model.named_parameters():
        if name.rpartition(".")[0] in heads:
            tensors[HEAD + name] = random.normal(size=tuple(parameter.shape)).astype(np.float32)
    return tensors


def add_by_hand(model, tensors):
    conv = model.config.model_type == "gpt2"
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if HEAD + name in tensors:
                parameter.copy_(torch.from_numpy(tensors[HEAD + name]))
            matrix = name.removesuffix(".weight")
            if matrix + LORA_B in tensors and name.endswith(".weight"):
                change = tensors[matrix + LORA_B].astype(np.float64) @ tensors[matrix + LORA_A]
                parameter.add_(torch.from_numpy(change.T if conv else change).to(parameter.dtype))


def logits(model):
    tokens = torch.arange(1, 21).reshape(2, 10)
    with torch.no_grad():
        return model.eval()(input_ids=tokens, attention_mask=torch.ones_like(tokens)).logits.double().numpy()


@pytest.mark.parametrize("case", CASES)
def test_peft_gives_the_logits_of_the_weights_added_by_hand(case, tmp_path):
    build, task, suffixes, heads = CASES[case]
    torch.manual_seed(3)
    model = build()
    model.save_pretrained(tmp_path / "base")
    tensors = global_adapter(model, suffixes, heads)
    save_file(tensors, tmp_path / "global.safetensors")
    write_adapter(
        tmp_path / "global.safetensors", spec_of(task, tmp_path / "base"), shape_of(model), tmp_path / "out"
    )

    loaded = PeftModel.from_pretrained(type(model).from_pretrained(tmp_path / "base"), tmp_path / "out")
    untrained = logits(model)
    add_by_hand(model, tensors)
    assert np.abs(logits(model) - untrained).max() > 0.1
    np.testing.assert_allclose(logits(loaded), logits(model), atol=2e-5)
    np.testing.assert_allclose(logits(loaded.merge_and_unload()), logits(model), atol=2e-5)


def test_the_config_alone_names_base_head_and_every_rank(tmp_path):
    torch.manual_seed(0)
    model = bert()
    tensors = global_adapter(model, ("query", "value", "attention.output.dense"), ("classifier",))
    save_file(tensors, tmp_path / "global.safetensors")
    spec = spec_of("sequence-classification")
    source = {"huggingFace": {"repo": "org/base", "revision": "abc"}, "task": "sequence-classification",
              "labels": ["a", "b", "c"]}  # fmt: skip
    spec = FedPipeJobSpec.model_validate(spec.to_dict() | {"model": source})
    write_adapter(tmp_path / "global.safetensors", spec, shape_of(model), tmp_path / "out", "Facts.")
    config = json.loads((tmp_path / "out/adapter_config.json").read_text())
    assert (config["base_model_name_or_path"], config["revision"]) == ("org/base", "abc")
    assert config["modules_to_save"] == ["classifier"]
    assert len(config["target_modules"]) == 36
    assert (config["r"], config["lora_alpha"]) == (7, 7)
    assert not {"rank_pattern", "alpha_pattern"} & set(config)
    card = (tmp_path / "out/README.md").read_text()
    assert "base_model: org/base" in card
    assert "Facts." in card
    code = card.split("```python\n")[1].split("```")[0]
    compile(code, "card", "exec")
    assert "labels = ['a', 'b', 'c']\n" in code
    assert "from_pretrained('org/base', revision='abc', id2label=dict(enumerate(labels)))" in code


def unpadded(directory, tensors):
    """Write an adapter as peft would with unequal ranks: each matrix with its own rank and alpha."""
    ranks = {name.removesuffix(LORA_A): len(t) for name, t in tensors.items() if name.endswith(LORA_A)}
    pattern = {f"^{re.escape(name)}": rank for name, rank in ranks.items()}
    config = LoraConfig(
        r=1, lora_alpha=1, target_modules=list(ranks), rank_pattern=pattern, alpha_pattern=pattern,
        fan_in_fan_out=True, task_type="CAUSAL_LM", inference_mode=True,
    )  # fmt: skip
    config.save_pretrained(directory)
    named = {f"base_model.model.{name}.weight": tensor for name, tensor in tensors.items()}
    save_file(named, directory / "adapter_model.safetensors", {"format": "pt"})


def test_one_rank_for_all_changes_no_logit(tmp_path):
    build, task, suffixes, heads = CASES["gpt2-lm"]
    torch.manual_seed(3)
    model = build()
    model.save_pretrained(tmp_path / "base")
    tensors = global_adapter(model, suffixes, heads)
    save_file(tensors, tmp_path / "global.safetensors")
    spec = spec_of(task, tmp_path / "base")
    write_adapter(tmp_path / "global.safetensors", spec, shape_of(model), tmp_path / "padded")
    unpadded(tmp_path / "unequal", tensors)

    found = []
    for directory in (tmp_path / "padded", tmp_path / "unequal"):
        base = GPT2LMHeadModel.from_pretrained(tmp_path / "base")
        loaded = PeftModel.from_pretrained(base, directory)
        found.append(logits(loaded))
    assert np.abs(found[0] - logits(model)).max() > 0.1
    np.testing.assert_allclose(found[0], found[1], atol=1e-5)
    stored = load_file(tmp_path / "padded/adapter_model.safetensors")
    assert {tensor.shape[0] for name, tensor in stored.items() if "lora_A" in name} == {6}


def test_the_tar_made_while_it_is_sent_holds_the_directory(tmp_path):
    build, task, suffixes, heads = CASES["gpt2-classes"]
    model = build()
    save_file(global_adapter(model, suffixes, heads), tmp_path / "global.safetensors")
    spec, shape = spec_of(task), shape_of(model)
    write_adapter(tmp_path / "global.safetensors", spec, shape, tmp_path / "out")
    with (tmp_path / "global.safetensors").open("rb") as source:
        archive = AdapterArchive(source.fileno(), spec, shape)
        body = b"".join(archive.chunks())
    assert len(body) == len(archive)
    assert adapter_files(body) == {path.name: path.read_bytes() for path in (tmp_path / "out").iterdir()}


def test_the_card_says_what_vllm_needs(tmp_path):
    build, task, suffixes, heads = CASES["gpt2-lm"]
    model = build()
    tensors = global_adapter(model, suffixes, heads)
    save_file(tensors, tmp_path / "global.safetensors")
    write_adapter(tmp_path / "global.safetensors", spec_of(task), shape_of(model), tmp_path / "out")
    card = (tmp_path / "out/README.md").read_text()
    assert "vllm serve /base --enable-lora --max-lora-rank 8 \\\n" in card
    assert "--lora adapter.gguf" in card


def test_the_tokenizer_goes_beside_the_adapter(tmp_path):
    build, task, suffixes, heads = CASES["gpt2-lm"]
    model = build()
    (tmp_path / "base").mkdir()
    for name in ("tokenizer.json", "chat_template.jinja", "model.safetensors"):
        (tmp_path / "base" / name).write_text(name)
    save_file(global_adapter(model, suffixes, heads), tmp_path / "global.safetensors")
    beside = tokenizer_files(str(tmp_path / "base"))
    write_adapter(
        tmp_path / "global.safetensors", spec_of(task), shape_of(model), tmp_path / "out", beside=beside
    )
    assert {path.name for path in (tmp_path / "out").iterdir()} == {
        "README.md", "adapter_config.json", "adapter_model.safetensors", "chat_template.jinja", "tokenizer.json",
    }  # fmt: skip
    assert (tmp_path / "out/chat_template.jinja").read_text() == "chat_template.jinja"
    assert not tokenizer_files(str(tmp_path / "gone"))


def test_an_adapter_is_replaced_whole(tmp_path):
    torch.manual_seed(0)
    model = AutoModelForSequenceClassification.from_config(bert().config)
    save_file(global_adapter(model, ("query",), ("classifier",)), tmp_path / "global.safetensors")
    (tmp_path / "out").mkdir()
    (tmp_path / "out/stale").write_text("old")
    for _ in range(2):
        write_adapter(
            tmp_path / "global.safetensors",
            spec_of("sequence-classification"),
            shape_of(model),
            tmp_path / "out",
        )
    assert {p.name for p in tmp_path.iterdir()} == {"global.safetensors", "out"}
    assert {p.name for p in (tmp_path / "out").iterdir()} == {
        "README.md", "adapter_config.json", "adapter_model.safetensors",
    }  # fmt: skip
