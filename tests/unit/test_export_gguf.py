# SPDX-License-Identifier: Apache-2.0
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from gguf import GGUFReader
from safetensors.numpy import save_file
from transformers.modeling_gguf_pytorch_utils import LlamaTensorProcessor

from fedpipe_api.base import UserError
from fedpipe_api.job import Task
from fedpipe_api.lora.format import LORA_A, LORA_B
from fedpipe_api.wire import MatrixShape, ModelShape
from fedpipe_operator.export import write_gguf

HEADS, KEY_VALUE_HEADS, HIDDEN, MLP = 4, 2, 32, 48
ROWS = {
    "self_attn.q_proj": (HIDDEN, HIDDEN, "attn_q"),
    "self_attn.k_proj": (HIDDEN // 2, HIDDEN, "attn_k"),
    "self_attn.v_proj": (HIDDEN // 2, HIDDEN, "attn_v"),
    "self_attn.o_proj": (HIDDEN, HIDDEN, "attn_output"),
    "mlp.gate_proj": (MLP, HIDDEN, "ffn_gate"),
    "mlp.down_proj": (HIDDEN, MLP, "ffn_down"),
}


def shape_of(architecture):
    return ModelShape(
        architecture=architecture, layers=2, hidden=HIDDEN, heads=HEADS, key_value_heads=KEY_VALUE_HEADS,
        intermediate=MLP, vocabulary=50, causal=True, parameters=1, linear_parameters=1,
        matrices=(MatrixShape(name="m", rows=1, columns=1),),
    )  # fmt: skip


@pytest.fixture
def adapter(tmp_path):
    """Factors of unequal ranks, as the engine stores them, and their file."""
    random = np.random.default_rng(0)
    tensors = {}
    for number, (name, (rows, columns, _)) in enumerate(ROWS.items()):
        full, rank = f"model.layers.1.{name}", 1 + number
        tensors[full + LORA_B] = random.normal(size=(rows, rank)).astype(np.float32)
        tensors[full + LORA_A] = random.normal(size=(rank, columns)).astype(np.float32)
    save_file(tensors, tmp_path / "global.safetensors")
    return tensors, tmp_path / "global.safetensors"


def changes(path):
    """Return architecture and the change of each weight as llama.cpp computes it: alpha / rank · B A."""
    reader = GGUFReader(path)
    fields = {name: field.contents() for name, field in reader.fields.items()}
    assert (fields["general.type"], fields["adapter.type"]) == ("adapter", "lora")
    tensors = {tensor.name: tensor.data for tensor in reader.tensors}
    found = {}
    for name, right in tensors.items():
        if name.endswith(".lora_a"):
            scale = fields["adapter.lora.alpha"] / len(right)
            found[name.removesuffix(".lora_a")] = scale * tensors[name[:-1] + "b"] @ right
    assert len(tensors) == 2 * len(found)
    return fields["general.architecture"], found


@pytest.mark.parametrize(
    ("architecture", "family", "rotated"), [("llama", "llama", True), ("qwen3", "qwen3", False)]
)
def test_llama_cpp_computes_what_is_stored(architecture, family, rotated, adapter, tmp_path):
    tensors, source = adapter
    write_gguf(source, Task.CAUSAL_LM, shape_of(architecture), tmp_path / "adapter.gguf")
    said, found = changes(tmp_path / "adapter.gguf")
    assert said == family
    assert set(found) == {f"blk.1.{target}.weight" for _, _, target in ROWS.values()}
    assert (tmp_path / "adapter.gguf").stat().st_mode & 0o777 == 0o644
    for name, (_, _, target) in ROWS.items():
        full = f"model.layers.1.{name}"
        change = found[f"blk.1.{target}.weight"]
        heads = {"self_attn.q_proj": HEADS, "self_attn.k_proj": KEY_VALUE_HEADS}.get(name)
        if rotated and heads:
            # What transformers does with llama.cpp's order of rows.
            change = LlamaTensorProcessor()._reverse_permute_weights(change, HEADS, heads)
        np.testing.assert_allclose(change, tensors[full + LORA_B] @ tensors[full + LORA_A], atol=1e-5)


def test_what_llama_cpp_does_not_run_is_refused(adapter, tmp_path):
    _, source = adapter
    out = tmp_path / "out.gguf"
    with pytest.raises(UserError, match=r"^--gguf: not for bloom; only for llama, "):
        write_gguf(source, Task.CAUSAL_LM, shape_of("bloom"), out)
    with pytest.raises(UserError, match=r"^--gguf: for causal-lm only"):
        write_gguf(source, Task.SEQUENCE_CLASSIFICATION, shape_of("llama"), out)
    with pytest.raises(UserError, match=r"^--gguf: llama.cpp has no matrix model.layers.1.mlp.down_proj"):
        write_gguf(source, Task.CAUSAL_LM, shape_of("llama").model_copy(update={"layers": 1}), out)
    assert [path.name for path in tmp_path.iterdir()] == ["global.safetensors"]


def test_one_form_is_exported_at_a_time(tmp_path):
    fedpipe = str(Path(sys.executable).with_name("fedpipe"))
    command = [fedpipe, "export", str(tmp_path), "--gguf", "--merge", "--out", str(tmp_path / "out")]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (2, "--gguf: not together with --merge; give one of them\n")
