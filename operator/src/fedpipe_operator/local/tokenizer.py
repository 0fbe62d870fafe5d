# SPDX-License-Identifier: Apache-2.0
"""The files of a model's tokenizer, which go beside its adapter."""

from pathlib import Path

FILES = (
    "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json",
    "chat_template.jinja", "chat_template.json", "vocab.json", "vocab.txt", "merges.txt",
    "tokenizer.model", "spiece.model", "sentencepiece.bpe.model", "spm.model", "source.spm", "target.spm",
)  # fmt: skip
"""As transformers names them."""


def tokenizer_files(model: str) -> list[Path]:
    """Return the tokenizer's files of a model: an absolute path, or repo@revision in the hub's cache.

    A directory that is gone has none: the adapter is worth having without them.
    """
    directory = Path(model)
    if directory.is_absolute():
        return [directory / name for name in FILES if (directory / name).is_file()]
    # It comes with the agent, which has loaded the model.
    from huggingface_hub import try_to_load_from_cache

    repository, _, revision = model.partition("@")
    found = (try_to_load_from_cache(repository, name, revision=revision or None) for name in FILES)
    return [Path(path) for path in found if isinstance(path, str)]
