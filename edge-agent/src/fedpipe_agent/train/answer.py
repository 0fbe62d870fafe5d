# SPDX-License-Identifier: Apache-2.0
"""`fedpipe-agent answer`, for `fedpipe report`: what a model says without its adapter and with it."""

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from fedpipe_api.base import UserError

from ..console import own_lines_only
from .model import Source, read_tokenizer, unusable
from .precisions import import_peft
from .shape import longest_input

TOKENS = 64
"""Longest answer."""


def main(argv: Sequence[str]) -> int:
    """Answer each prompt of the JSON list on standard input, greedily; print a JSON object a line.

    Raises:
        UserError: the model cannot be loaded, or a prompt is too long for it.
    """
    parser = argparse.ArgumentParser(prog="fedpipe-agent answer")
    parser.add_argument("--model", required=True)
    parser.add_argument("--adapter", required=True, type=Path)
    options = parser.parse_args(argv)
    prompts = json.load(sys.stdin)
    with own_lines_only():
        found = _answers(Source(options.model), options.adapter, prompts)
    for one in found:
        sys.stdout.write(json.dumps(one) + "\n")
    return 0


def _answers(source: Source, adapter: Path, prompts: list[str]) -> list[dict[str, str]]:
    import torch
    from transformers import AutoModelForCausalLM

    tokenizer = read_tokenizer(source)
    asked = [_tokens(tokenizer, prompt) for prompt in prompts]
    try:
        base = AutoModelForCausalLM.from_pretrained(source.name, dtype=torch.float32, **source.arguments)
        model = import_peft().PeftModel.from_pretrained(base, adapter).eval()
    except (OSError, ValueError) as error:
        raise unusable(source, error, "the model cannot be loaded") from error
    longest = longest_input(base.config)
    room = [TOKENS if longest is None else min(TOKENS, longest - len(one)) for one in asked]
    if min(room) < 1:
        number = room.index(min(room))
        raise UserError(
            f"prompt {number + 1}: {len(asked[number])} tokens, the model takes {longest}; shorten it"
        )
    found = []
    for ids, most in zip(asked, room, strict=True):
        with model.disable_adapter():
            before = _say(model, tokenizer, ids, most)
        found.append({"before": before, "after": _say(model, tokenizer, ids, most)})
    return found


def _tokens(tokenizer: Any, prompt: str) -> list[int]:
    """Return a prompt as a user's message where the model chats, else as text that it goes on with."""
    if tokenizer.chat_template is not None:
        return list(
            tokenizer.apply_chat_template(
                [{"role": "user", "content": prompt}], add_generation_prompt=True, return_dict=True
            )["input_ids"]
        )
    found = list(tokenizer(prompt)["input_ids"])
    # Some tokenizers end every text.
    return found[:-1] if found[-1:] == [tokenizer.eos_token_id] else found


def _say(model: Any, tokenizer: Any, asked: list[int], most: int) -> str:
    """Return the most likely answer of at most so many tokens, on one line; … ends one that is cut."""
    import torch

    ids = torch.tensor([asked])
    said = model.generate(
        input_ids=ids,
        attention_mask=torch.ones_like(ids),
        max_new_tokens=most,
        do_sample=False,
        pad_token_id=tokenizer.pad_token_id,
    )[0, len(asked) :]
    text = tokenizer.decode(said, skip_special_tokens=True)
    # It is printed on a terminal.
    text = " ".join("".join(letter if letter.isprintable() else " " for letter in text).split())
    return text + ("…" if len(said) == most else "")
