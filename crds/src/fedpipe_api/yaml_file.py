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
