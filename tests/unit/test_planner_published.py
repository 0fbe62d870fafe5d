# SPDX-License-Identifier: Apache-2.0
"""Plans of published models, from their configurations: exact parameter counts, and what each board carries."""

import pytest

from bench.published import BOARDS, MODELS, planned, shape_of

EXPECTED = {
    "Llama-3.1-8B": ("int8", "bf16", "bf16", "bf16"),
    "Qwen3-4B": ("int8", "bf16", "bf16", "bf16"),
    "Gemma-3-1B": ("fp32", "bf16", "bf16", "bf16"),
    "Mixtral-8x7B": (None, None, None, None),
}
"""The precision on each board, in their order; None where it does not fit."""


@pytest.mark.parametrize("name", MODELS)
def test_counts_are_exact_and_every_board_gets_what_it_carries(name):
    assert shape_of(name).parameters == MODELS[name][1]
    made = planned(name)
    found = tuple(made.nodes[each].precision if each in made.nodes else None for each in BOARDS)
    assert found == EXPECTED[name]
    assert all("needs" in reason for reason in made.left_out.values())


def test_experts_are_counted_as_they_are_loaded():
    shape = shape_of("Mixtral-8x7B")
    experts = 32 * 8 * 3 * 4096 * 14336
    # bitsandbytes has no layer for stacked experts: they stay in 16 bits, and two of eight work for a token.
    assert shape.linear_parameters == 32 * (2 * 4096 * 4096 + 2 * 4096 * 1024)
    assert shape.active_parameters == shape.linear_parameters + experts // 4
    assert {matrix.name.rpartition(".")[2] for matrix in shape.matrices} == {"q_proj", "v_proj"}
