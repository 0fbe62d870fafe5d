# SPDX-License-Identifier: Apache-2.0
"""Packing: short samples put together to sequences with little padding, and the models that allow it.

Samples of a sequence must not see each other. Position ids that start again at each sample say where one
begins, and transformers makes a block-diagonal causal mask of them (`masking_utils.create_causal_mask`), but
not in every model: some never pass it the positions, and a recurrent state or a convolution has no mask.
"""

from bisect import bisect_left, insort

import numpy as np

from fedpipe_api.base import UserError
from fedpipe_api.job import DataSource

PACKABLE = frozenset(
    {
        *("apertus", "arcee", "codegen", "cohere", "cohere2", "ctrl", "deepseek_v2", "deepseek_v3"),
        *("diffllama", "ernie4_5", "exaone4", "gemma", "gemma2", "gemma3", "gemma3_text", "gemma4_text"),
        *("glm", "glm4", "glm4_moe", "gpt2", "gpt_bigcode", "gpt_neo", "gpt_neox", "gptj", "granite"),
        *("granitemoe", "helium", "jetmoe", "llama", "ministral", "mistral", "mixtral"),
        *("modernbert-decoder", "nemotron", "olmo", "olmo2", "olmo3", "olmoe", "persimmon", "phi", "phi3"),
        *("phimoe", "qwen2", "qwen2_moe", "qwen3", "qwen3_moe", "seed_oss", "smollm3", "stablelm"),
        "starcoder2",
    }
)
"""Models whose logits of a packed sample are those of the sample alone; tests/unit/test_packing.py computes
both. What is not here is refused: its gradients would be silently wrong. Llama 4 is not: its temperature goes
by the place in the sequence from 8192 tokens on."""


def check_packing(source: DataSource, architecture: str) -> None:
    """Raise UserError where samples are to be packed and the model would mix them."""
    if source.packing and architecture not in PACKABLE:
        raise UserError(
            f"spec.data.packing: a {architecture} model is not known to keep packed rows apart; "
            "set it to false"
        )


def pack(lengths: np.ndarray, capacity: int) -> list[np.ndarray]:
    """Return the samples of each sequence, by best fit of decreasing lengths; no sample is split.

    Args:
        lengths: tokens of each sample (n,), at most `capacity`.
        capacity: tokens of the longest sequence.

    Returns:
        Indices of samples, each once; the longest sequence first.
    """
    sequences: list[list[int]] = []
    rooms: list[tuple[int, int]] = []  # tokens left in a sequence, and its place; ascending
    for index in np.argsort(-lengths, kind="stable"):
        length = int(lengths[index])
        best = bisect_left(rooms, (length, 0))
        if best < len(rooms):
            room, place = rooms.pop(best)
        else:
            room, place = capacity, len(sequences)
            sequences.append([])
        sequences[place].append(int(index))
        insort(rooms, (room - length, place))
    packed = [np.array(sequence) for sequence in sequences]
    return sorted(packed, key=lambda sequence: -int(lengths[sequence].sum()))
