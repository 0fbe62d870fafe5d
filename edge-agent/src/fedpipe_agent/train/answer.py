# SPDX-License-Identifier: Apache-2.0
"""`fedpipe-agent answer`, for `make quickstart-chat`: what a chat model says before and after."""

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from fedpipe_api.base import UserError

from ..console import own_lines_only
from .model import Source, line, read_tokenizer

TOKENS = 64
"""Longest answer."""


def main(argv: Sequence[str]) -> int:
    """Answer each question of the JSON list on standard input, greedily; print a JSON object a line.

    Raises:
        UserError: the model cannot be loaded, or its tokenizer has no chat template.
    """
    parser = argparse.ArgumentParser(prog="fedpipe-agent answer")
    parser.add_argument("--model", required=True)
    parser.add_argument("--adapter", required=True, type=Path)
    options = parser.parse_args(argv)
    questions = json.load(sys.stdin)
    with own_lines_only():
        found = _answers(Source(options.model), options.adapter, questions)
    for one in found:
        sys.stdout.write(json.dumps(one) + "\n")
    return 0


def _answers(source: Source, adapter: Path, questions: list[str]) -> list[dict[str, str]]:
    import torch
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    tokenizer = read_tokenizer(source)
    if tokenizer.chat_template is None:
        raise UserError(f"{source.name}: its tokenizer has no chat template; give a chat model")
    try:
        base = AutoModelForCausalLM.from_pretrained(source.name, dtype=torch.float32, **source.arguments)
        model = PeftModel.from_pretrained(base, adapter).eval()
    except (OSError, ValueError) as error:
        raise UserError(f"{source.name}: the model cannot be loaded: {line(error)}") from error
    found = []
    for question in questions:
        with model.disable_adapter():
            before = _say(model, tokenizer, question)
        found.append({"before": before, "after": _say(model, tokenizer, question)})
    return found


def _say(model: Any, tokenizer: Any, question: str) -> str:
    """Return the most likely answer, on one line; … ends one that is cut."""
    asked = tokenizer.apply_chat_template(
        [{"role": "user", "content": question}],
        add_generation_prompt=True,
        return_tensors="pt",
        return_dict=True,
    )
    said = model.generate(
        **asked, max_new_tokens=TOKENS, do_sample=False, pad_token_id=tokenizer.pad_token_id
    )[0, asked["input_ids"].shape[1] :]
    text = " ".join(tokenizer.decode(said, skip_special_tokens=True).split())
    return text + ("…" if len(said) == TOKENS else "")
