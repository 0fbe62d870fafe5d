# SPDX-License-Identifier: Apache-2.0
"""Tiny random models of many families, each with a trained tokenizer and two nodes' data."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from fedpipe_api.job import Task

WORDS = [
    "alpha",
    "beta",
    "gamma",
    "delta",
    "eat",
    "drink",
    "run",
    "walk",
    "red",
    "green",
    "blue",
    "one",
    "two",
    "three",
    "cat",
    "dog",
]
LABELS = ("animal", "colour", "other")
ROWS = 12

_DECODER = {
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "intermediate_size": 64,
    "max_position_embeddings": 64,
}
_MOE = {
    **_DECODER,
    "moe_intermediate_size": 32,
    "num_experts_per_tok": 2,
    "num_experts": 4,
    "num_local_experts": 4,
}
_ENCODER = {
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 64,
    "max_position_embeddings": 64,
}
_GPT2 = {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64}
_MLA = {
    **_DECODER, "num_key_value_heads": 4, "q_lora_rank": 16, "kv_lora_rank": 16, "qk_rope_head_dim": 8,
    "qk_nope_head_dim": 8, "v_head_dim": 8, "moe_intermediate_size": 32, "n_routed_experts": 4,
    "num_experts_per_tok": 2, "n_shared_experts": 1, "first_k_dense_replace": 1, "n_group": 1, "topk_group": 1,
}  # fmt: skip
_SEQ2SEQ = {
    "d_model": 32, "encoder_layers": 2, "decoder_layers": 2, "encoder_attention_heads": 4,
    "decoder_attention_heads": 4, "encoder_ffn_dim": 64, "decoder_ffn_dim": 64, "max_position_embeddings": 64,
}  # fmt: skip
_T5 = {
    "d_model": 32,
    "d_kv": 8,
    "d_ff": 64,
    "num_layers": 2,
    "num_decoder_layers": 2,
    "num_heads": 4,
    "decoder_start_token_id": 0,
}
_VISION = {
    "hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32,
    "image_size": 28, "patch_size": 14,
}  # fmt: skip

DECODERS: dict[str, dict[str, Any]] = {
    "apertus": _DECODER,
    "arcee": _DECODER,
    "biogpt": _ENCODER,
    "bloom": {"hidden_size": 32, "n_layer": 2, "n_head": 4},
    "codegen": {**_GPT2, "rotary_dim": 4},
    "cohere": _DECODER,
    "cohere2": _DECODER,
    "ctrl": {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64, "dff": 64},
    "deepseek_v2": _MLA,
    "deepseek_v3": _MLA,
    "diffllama": _DECODER,
    "ernie4_5": _DECODER,
    "exaone4": {**_DECODER, "sliding_window": None, "layer_types": ["full_attention"] * 2},
    "falcon": {**_ENCODER, "new_decoder_architecture": False, "multi_query": True},
    "falcon_h1": {**_DECODER, "mamba_d_ssm": 32, "mamba_n_heads": 4, "mamba_d_head": 8, "mamba_d_state": 8},
    "falcon_mamba": {"hidden_size": 32, "num_hidden_layers": 2, "state_size": 4},
    "gemma": {**_DECODER, "head_dim": 8},
    "gemma2": {**_DECODER, "head_dim": 8},
    "gemma3_text": {**_DECODER, "head_dim": 8},
    "gemma3": {
        "text_config": {**_DECODER, "head_dim": 8, "model_type": "gemma3_text"},
        "vision_config": {**_VISION, "model_type": "siglip_vision_model"},
        "mm_tokens_per_image": 4,
    },
    "gemma4_text": {**_DECODER, "head_dim": 8, "global_head_dim": 8, "hidden_size_per_layer_input": 0},
    "glm": {**_DECODER, "head_dim": 8},
    "glm4": {**_DECODER, "head_dim": 8},
    "glm4_moe": {**_MOE, "head_dim": 8, "n_routed_experts": 4, "n_shared_experts": 1, "first_k_dense_replace": 1},
    "gpt2": _GPT2,
    "gpt_bigcode": _GPT2,
    "gpt_neo": {
        "hidden_size": 32, "num_layers": 2, "num_heads": 4, "max_position_embeddings": 64,
        "attention_types": [[["global", "local"], 1]], "window_size": 16,
    },
    "gpt_neox": _ENCODER,
    "gpt_oss": {**_MOE, "head_dim": 8, "sliding_window": 16},
    "gptj": {**_GPT2, "rotary_dim": 4},
    "granite": _DECODER,
    "granitemoe": _MOE,
    "helium": {**_DECODER, "head_dim": 8},
    "jetmoe": {**_DECODER, "kv_channels": 8, "num_experts_per_tok": 2, "num_local_experts": 4},
    "lfm2": {**_DECODER, "layer_types": ["conv", "full_attention"]},
    "llama": _DECODER,
    "llama4_text": {
        **_MOE, "head_dim": 8, "intermediate_size_mlp": 64, "moe_layers": [1], "no_rope_layers": [1, 1],
    },
    "mamba": {"hidden_size": 32, "num_hidden_layers": 2, "state_size": 4},
    "mamba2": {"hidden_size": 32, "num_hidden_layers": 2, "state_size": 4, "num_heads": 8, "head_dim": 8, "n_groups": 1},
    "ministral": {**_DECODER, "head_dim": 8, "layer_types": ["full_attention"] * 2},
    "mistral": _DECODER,
    "mixtral": _MOE,
    "modernbert-decoder": {**_ENCODER, "local_attention": 16},
    "mpt": {"d_model": 32, "n_layers": 2, "n_heads": 4, "max_seq_len": 64},
    "nemotron": _DECODER,
    "olmo": _DECODER,
    "olmo2": _DECODER,
    "olmo3": _DECODER,
    "olmoe": _MOE,
    "opt": {
        "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "ffn_dim": 64,
        "max_position_embeddings": 64, "word_embed_proj_dim": 32,
    },
    "persimmon": _DECODER,
    "phi": _DECODER,
    "phi3": _DECODER,
    "phimoe": _MOE,
    "qwen2": _DECODER,
    "qwen2_moe": {**_MOE, "shared_expert_intermediate_size": 32},
    "qwen3": {**_DECODER, "head_dim": 8},
    "qwen3_moe": {**_MOE, "head_dim": 8},
    "qwen3_5": {
        "text_config": {
            **_DECODER, "head_dim": 8, "layer_types": ["linear_attention", "full_attention"],
            "linear_num_key_heads": 2, "linear_num_value_heads": 4, "linear_key_head_dim": 8,
            "linear_value_head_dim": 8, "model_type": "qwen3_5_text",
        },
        "vision_config": {
            "hidden_size": 32, "depth": 1, "num_heads": 2, "intermediate_size": 32, "out_hidden_size": 32,
            "num_position_embeddings": 16,
        },
    },
    "qwen3_next": {
        **_MOE, "head_dim": 8, "layer_types": ["linear_attention", "full_attention"],
        "linear_num_key_heads": 2, "linear_num_value_heads": 4, "linear_key_head_dim": 8,
        "linear_value_head_dim": 8, "shared_expert_intermediate_size": 32,
    },
    "recurrent_gemma": {**_DECODER, "lru_width": 32, "attention_window_size": 16, "head_dim": 8},
    "rwkv": {"hidden_size": 32, "num_hidden_layers": 2, "attention_hidden_size": 32, "intermediate_size": 64},
    "seed_oss": {**_DECODER, "head_dim": 8},
    "smollm3": _DECODER,
    "stablelm": _DECODER,
    "starcoder2": _DECODER,
    "xglm": {"d_model": 32, "num_layers": 2, "attention_heads": 4, "ffn_dim": 64, "max_position_embeddings": 64},
    "zamba2": {
        **_DECODER, "num_key_value_heads": 4, "num_hidden_layers": 3, "layers_block_type": ["mamba", "hybrid", "mamba"],
        "mamba_d_state": 8, "n_mamba_heads": 4, "mamba_headdim": 16, "num_mem_blocks": 1, "use_mem_rope": True,
    },
}  # fmt: skip

ENCODERS: dict[str, dict[str, Any]] = {
    "albert": {**_ENCODER, "embedding_size": 16},
    "bart": _SEQ2SEQ,
    "bert": _ENCODER,
    "big_bird": {**_ENCODER, "attention_type": "original_full"},
    "camembert": _ENCODER,
    "convbert": {**_ENCODER, "embedding_size": 32},
    "data2vec-text": _ENCODER,
    "deberta": {**_ENCODER, "relative_attention": True, "pos_att_type": ["c2p", "p2c"]},
    "deberta-v2": {**_ENCODER, "relative_attention": True, "pos_att_type": ["c2p", "p2c"]},
    "distilbert": {"dim": 32, "n_layers": 2, "n_heads": 4, "hidden_dim": 64, "max_position_embeddings": 64},
    "electra": {**_ENCODER, "embedding_size": 16},
    "ernie": _ENCODER,
    "esm": {**_ENCODER, "mask_token_id": 4},
    "fnet": {"hidden_size": 32, "num_hidden_layers": 2, "intermediate_size": 64, "max_position_embeddings": 64},
    "funnel": {"d_model": 32, "n_head": 4, "d_head": 8, "d_inner": 64, "block_sizes": [1, 1], "num_decoder_layers": 1},
    "ibert": _ENCODER,
    "longformer": {**_ENCODER, "attention_window": 8},
    "mbart": _SEQ2SEQ,
    "megatron-bert": _ENCODER,
    "mobilebert": {
        **_ENCODER, "embedding_size": 32, "intra_bottleneck_size": 32, "true_hidden_size": 32,
        "num_feedforward_networks": 1,
    },
    "modernbert": {**_ENCODER, "local_attention": 16},
    "mpnet": _ENCODER,
    "nystromformer": {**_ENCODER, "num_landmarks": 4, "segment_means_seq_len": 16},
    "openai-gpt": _GPT2,
    "rembert": {**_ENCODER, "input_embedding_size": 16, "output_embedding_size": 16},
    "roberta": _ENCODER,
    "roberta-prelayernorm": _ENCODER,
    "roformer": {**_ENCODER, "embedding_size": 32},
    "squeezebert": {**_ENCODER, "embedding_size": 32},
    "t5": _T5,
    "umt5": _T5,
    "xlm": {"emb_dim": 32, "n_layers": 2, "n_heads": 4, "max_position_embeddings": 64},
    "xlm-roberta": _ENCODER,
    "xlnet": {"d_model": 32, "n_layer": 2, "n_head": 4, "d_inner": 64},
}  # fmt: skip


def cases() -> Iterator[tuple[str, Task]]:
    """Yield every family with each task that transformers has for it."""
    from transformers.models.auto.modeling_auto import MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES

    for family in DECODERS:
        yield family, Task.CAUSAL_LM
    for family in {**DECODERS, **ENCODERS}:
        if family in MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES:
            yield family, Task.SEQUENCE_CLASSIFICATION


def save(family: str, task: Task, directory: Path) -> None:
    """Write a base as people have it: a causal language model, or an encoder without a classifier."""
    import torch
    from transformers import AutoModel, AutoModelForCausalLM

    tokenizer = trained_tokenizer()
    config = configured(family, tokenizer)
    if family == "funnel":  # it has two base models
        config.architectures = ["FunnelBaseModel"]
    torch.manual_seed(0)
    kind = AutoModelForCausalLM if family in DECODERS else AutoModel
    kind.from_config(config).save_pretrained(directory)
    tokenizer.save_pretrained(directory)


def configured(family: str, tokenizer: Any) -> Any:
    """Return the configuration of a family's tiny model."""
    from transformers import AutoConfig

    fields = {**DECODERS, **ENCODERS}[family]
    special = {
        "vocab_size": len(tokenizer),
        "pad_token_id": tokenizer.pad_token_id,
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
    }
    if family == "rwkv":
        fields = {**fields, "context_length": 64}
    if "text_config" in fields:
        fields = {**fields, "text_config": {**fields["text_config"], **special}}
    # Random weights of a size that makes differences show.
    return AutoConfig.for_model(family, **{**special, **fields, "initializer_range": 0.1})


def trained_tokenizer() -> Any:
    """Return a byte-level BPE tokenizer, trained on a few words."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    special = ["<pad>", "<s>", "</s>", "<unk>", "<mask>"]
    trainer = trainers.BpeTrainer(
        vocab_size=320, special_tokens=special, initial_alphabet=pre_tokenizers.ByteLevel.alphabet()
    )
    tokenizer.train_from_iterator([" ".join(WORDS)] * 4, trainer)
    # T5 and BART classify at the end token.
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A </s>", pair="<s> $A </s> $B </s>", special_tokens=[("<s>", 1), ("</s>", 2)]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", bos_token="<s>", eos_token="</s>",
        unk_token="<unk>", mask_token="<mask>",
    )  # fmt: skip


def write_data(task: Task, directory: Path, seed: int) -> None:
    """Write one node's rows."""
    import numpy as np

    random = np.random.default_rng(seed)
    directory.mkdir(parents=True, exist_ok=True)
    rows = []
    for _ in range(ROWS):
        words = " ".join(random.choice(WORDS, random.integers(3, 8)))
        if task is Task.CAUSAL_LM:
            rows.append({"prompt": words, "completion": " " + str(random.choice(WORDS))})
        else:
            rows.append({"text": words, "label": str(random.choice(LABELS))})
    (directory / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
