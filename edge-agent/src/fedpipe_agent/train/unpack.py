# SPDX-License-Identifier: Apache-2.0
"""`fedpipe-agent unpack`, for `make quickstart-chat`: write a model that is stored as GGUF as a directory."""

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from fedpipe_api.base import UserError

from ..console import own_lines_only
from .merge import saved
from .model import line


def main(argv: Sequence[str]) -> int:
    """Load a causal language model and its tokenizer from a GGUF file, in float32, and save both.

    Raises:
        UserError: the file holds no model that transformers reads.
    """
    parser = argparse.ArgumentParser(prog="fedpipe-agent unpack")
    parser.add_argument("--gguf", required=True, type=Path)
    parser.add_argument("--out", required=True, type=Path)
    options = parser.parse_args(argv)
    with own_lines_only():
        model, tokenizer = _read(options.gguf)
        with saved(options.out) as directory:
            model.save_pretrained(directory)
            tokenizer.save_pretrained(directory)
    return 0


def _read(path: Path) -> tuple[Any, Any]:
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    given = {"gguf_file": path.name, "local_files_only": True}
    model: Any
    try:
        model = AutoModelForCausalLM.from_pretrained(path.parent, dtype=torch.float32, **given)
        tokenizer = AutoTokenizer.from_pretrained(path.parent, **given)
    except Exception as error:  # a file may be wrong in every way; it holds no data
        raise UserError(f"{path}: not a model that can be read: {line(error)}") from error
    # The weights are plain now; with these, transformers would save and load them as quantized.
    model.hf_quantizer = None
    del model.config.quantization_config
    return model, tokenizer
