# SPDX-License-Identifier: Apache-2.0
"""The chat quickstart with a tiny random model in place of SmolLM2."""

import itertools
import json
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from gguf import GGUFWriter, TokenType
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, AutoTokenizer

from fedpipe_agent.train import unpack
from fedpipe_api.base import UserError
from fedpipe_operator.local import quickstart_chat

AGENT = str(Path(sys.executable).with_name("fedpipe-agent"))
HIDDEN, HEADS, MLP = 32, 2, 48
TEMPLATE = "{% for message in messages %}<s>{{ message['content'] }}</s>{% endfor %}"


def agent(*arguments, given=""):
    done = subprocess.run(
        [AGENT, *map(str, arguments)], input=given, capture_output=True, text=True, check=False
    )
    assert "Traceback" not in done.stderr
    return done


def write_gguf_model(path):
    """Write a random one-layer Llama with a tokenizer of letters, as llama.cpp stores both."""
    random = np.random.default_rng(0)
    tokens = ["<unk>", "<s>", "</s>", *map(chr, range(33, 127)), "Ġ", "ab"]
    writer = GGUFWriter(path, "llama")
    writer.add_context_length(64)
    writer.add_embedding_length(HIDDEN)
    writer.add_block_count(1)
    writer.add_feed_forward_length(MLP)
    writer.add_head_count(HEADS)
    writer.add_head_count_kv(HEADS)
    writer.add_rope_freq_base(10000.0)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_vocab_size(len(tokens))
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list(tokens)
    writer.add_token_types([TokenType.CONTROL] * 3 + [TokenType.NORMAL] * (len(tokens) - 3))
    writer.add_token_merges(["a b"])
    writer.add_unk_token_id(0)
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_chat_template(TEMPLATE)
    shapes = {"attn_q": (HIDDEN, HIDDEN), "attn_k": (HIDDEN, HIDDEN), "attn_v": (HIDDEN, HIDDEN)}
    shapes |= {"attn_output": (HIDDEN, HIDDEN), "ffn_gate": (MLP, HIDDEN), "ffn_up": (MLP, HIDDEN)}
    shapes |= {"ffn_down": (HIDDEN, MLP), "attn_norm": (HIDDEN,), "ffn_norm": (HIDDEN,)}
    shapes = {f"blk.0.{name}": shape for name, shape in shapes.items()}
    shapes |= {"token_embd": (len(tokens), HIDDEN), "output": (len(tokens), HIDDEN), "output_norm": (HIDDEN,)}
    for name, shape in shapes.items():
        writer.add_tensor(f"{name}.weight", random.normal(size=shape).astype(np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    root = tmp_path_factory.mktemp("model")
    write_gguf_model(root / "tiny.gguf")
    done = agent("unpack", "--gguf", root / "tiny.gguf", "--out", root / "model")
    assert done.returncode == 0, done.stderr
    return root


def test_a_gguf_file_becomes_a_plain_directory(model):
    assert {path.name for path in model.iterdir()} == {"tiny.gguf", "model"}
    found = AutoModelForCausalLM.from_pretrained(model / "model")
    assert not hasattr(found.config, "quantization_config")
    assert {parameter.dtype for parameter in found.parameters()} == {torch.float32}
    tokenizer = AutoTokenizer.from_pretrained(model / "model")
    text = tokenizer.apply_chat_template([{"role": "user", "content": "hi"}], tokenize=False)
    assert text == "<s>hi</s>"


def test_what_is_no_gguf_is_refused_in_one_line(tmp_path):
    (tmp_path / "bad.gguf").write_bytes(b"GGUF?")
    with pytest.raises(UserError, match=r"bad\.gguf: not a model that can be read: .+") as caught:
        unpack.main(["--gguf", str(tmp_path / "bad.gguf"), "--out", str(tmp_path / "model")])
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "model").exists()


def test_the_inputs_are_written_once(model, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(quickstart_chat, "slower_than_float32", lambda: {"bf16"})
    few = tuple(dict(node, chats=5) for node in quickstart_chat.FLEET)
    monkeypatch.setattr(quickstart_chat, "FLEET", few)
    shutil.copytree(model / "model", tmp_path / "model")
    for _ in range(2):
        quickstart_chat.write(tmp_path, tmp_path / "none.gguf")  # not read: the directory is there
        assert "edge-a 5, edge-b 5, edge-c 5, edge-d 5" in capsys.readouterr().out
    assert (tmp_path / "fleet.yaml").read_text().startswith("model: model\n")
    assert "bf16" not in (tmp_path / "fleet.yaml").read_text()
    assert (tmp_path / "prompts.txt").read_text().splitlines() == list(quickstart_chat.QUESTIONS)
    rows = [json.loads(line) for line in (tmp_path / "nodes/edge-a/train.jsonl").read_text().splitlines()]
    assert [[one["role"] for one in row["messages"]] for row in rows] == [["user", "assistant"]] * 5


def test_a_topic_belongs_to_one_node_and_its_chats_are_prose():
    topics = quickstart_chat.TOPICS
    assert list(topics) == [node["name"] for node in quickstart_chat.FLEET]
    modules = [module for topic in topics.values() for module in topic]
    assert len(modules) == len(set(modules))
    found = list(itertools.islice(quickstart_chat.chats(topics["edge-a"]), 100))
    assert found == list(itertools.islice(quickstart_chat.chats(topics["edge-a"]), 100))
    questions, answers = zip(*([one["content"] for one in chat["messages"]] for chat in found), strict=True)
    assert len(set(answers)) == 100
    assert not set(questions) & set(quickstart_chat.QUESTIONS)
    shortest, longest = quickstart_chat.CHARACTERS
    for question, said in zip(questions, answers, strict=True):
        assert question.startswith(("What does ", "What is ")), question
        assert shortest <= len(said) <= longest
        assert said.endswith(".")


def test_it_answers_before_and_after(model, tmp_path):
    torch.manual_seed(0)
    base = AutoModelForCausalLM.from_pretrained(model / "model")
    config = LoraConfig(r=4, target_modules=["v_proj", "o_proj"], init_lora_weights=False)
    get_peft_model(base, config).save_pretrained(tmp_path / "adapter")
    arguments = ("answer", "--model", model / "model", "--adapter", tmp_path / "adapter")
    done = agent(*arguments, given=json.dumps(["hello", "hi"]))
    assert done.returncode == 0, done.stderr
    found = [json.loads(line) for line in done.stdout.splitlines()]
    assert [set(one) for one in found] == [{"before", "after"}] * 2
    assert all(one["before"] != one["after"] for one in found)
