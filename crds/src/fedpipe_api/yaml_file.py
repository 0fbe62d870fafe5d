# SPDX-License-Identifier: Apache-2.0
"""YAML as people write it. Needs PyYAML, which the models do without."""

from pathlib import Path
from typing import Any

import yaml

from .base import UserError


class _Loader(yaml.SafeLoader):
    """The safe loader, strict about keys: of a key that is given twice it would take the last."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen: set[str] = set()
        for key in (key for key, _ in node.value if isinstance(key, yaml.ScalarNode)):
            if key.value in seen:
                raise yaml.MarkedYAMLError(problem=f"{key.value} is given twice", problem_mark=key.start_mark)
            seen.add(key.value)
        return super().construct_mapping(node, deep)


FILE_LIMIT = 1024 * 1024
"""Bytes of the largest manifest, as the API server limits them."""


def mapping(path: Path) -> dict[str, Any]:
    """Return the one mapping in a file; UserError names the file and, where it can, the line."""
    try:
        with path.open("rb") as file:
            data = file.read(FILE_LIMIT + 1)
    except OSError as error:
        raise UserError(f"{path}: {error.strerror}") from None
    if len(data) > FILE_LIMIT:
        raise UserError(f"{path}: larger than {FILE_LIMIT >> 20} MiB; this is no manifest")
    found = document(path, data)
    if not isinstance(found, dict):
        raise UserError(f"{path}: not a YAML mapping; a manifest has apiVersion, kind, metadata and spec")
    return found


def document(path: Path, data: bytes) -> Any:
    """Return the one document in a file's bytes; UserError names the file and, where it can, the line."""
    try:
        documents = list(yaml.load_all(data, _Loader))
    except yaml.MarkedYAMLError as error:
        line = f":{error.problem_mark.line + 1}" if error.problem_mark else ""
        raise UserError(f"{path}{line}: not YAML: {error.problem or error.context}") from None
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        raise UserError(f"{path}: not YAML: {' '.join(str(error).split())}") from None
    if len(documents) != 1:
        raise UserError(f"{path}: {len(documents)} YAML documents; give exactly one")
    return documents[0]
