# SPDX-License-Identifier: Apache-2.0
"""`fedpipe-agent merge`, for `fedpipe export`: write a base model with a PEFT adapter added in."""

import argparse
import contextlib
import json
import shutil
import sys
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from fedpipe_api.base import UserError
from fedpipe_api.job import Task

from .model import Source, read_tokenizer
from .precisions import import_peft


def main(argv: Sequence[str]) -> int:
    """Merge and save whole or not at all; class names are a JSON list on standard input."""
    parser = argparse.ArgumentParser(prog="fedpipe-agent merge")
    parser.add_argument("--model", required=True)
    parser.add_argument("--adapter", required=True, type=Path)
    parser.add_argument("--task", required=True, type=Task)
    parser.add_argument("--out", required=True, type=Path)
    options = parser.parse_args(argv)
    source = Source(options.model)
    tokenizer = read_tokenizer(source)
    merged = _merged(source, options.task, json.load(sys.stdin), options.adapter)
    with saved(options.out) as directory:
        merged.save_pretrained(directory)
        tokenizer.save_pretrained(directory)
    return 0


@contextlib.contextmanager
def saved(out: Path) -> Iterator[Path]:
    """Give a directory to save a model in; it appears at `out` whole or not at all."""
    out.parent.mkdir(parents=True, exist_ok=True)
    temporary = Path(tempfile.mkdtemp(dir=out.parent, prefix=f".{out.name}."))
    try:
        yield temporary
        # Temporary directories, and weights as safetensors writes them, are for their owner alone.
        temporary.chmod(0o755)
        for path in temporary.iterdir():
            path.chmod(0o644)
        temporary.rename(out)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _merged(source: Source, task: Task, labels: list[str], adapter: Path) -> Any:
    import torch
    from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

    options: dict[str, Any] = {"dtype": torch.float32}
    kind: Any = AutoModelForCausalLM
    if task is Task.SEQUENCE_CLASSIFICATION:
        kind = AutoModelForSequenceClassification
        options |= {
            "id2label": dict(enumerate(labels)),
            "label2id": {name: i for i, name in enumerate(labels)},
        }
        options["num_labels"] = len(labels)
        options["ignore_mismatched_sizes"] = True
    try:
        model = kind.from_pretrained(source.name, **options, **source.arguments)
    except (OSError, ValueError) as error:
        raise UserError(f"{source.name}: the model cannot be loaded: {str(error).splitlines()[0]}") from error
    return import_peft().PeftModel.from_pretrained(model, adapter).merge_and_unload()
