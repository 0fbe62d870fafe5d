# SPDX-License-Identifier: Apache-2.0
"""Files that a person wrote: a capacity in place of what the hardware shows, a job's manifest."""

import json
from pathlib import Path
from typing import TypeVar

from pydantic import ValidationError

from fedpipe_api.base import Model, UserError, explain, given_twice

M = TypeVar("M", bound=Model)

FILE_LIMIT = 64 * 1024


def load(path: Path, kind: type[M], limit: int = FILE_LIMIT) -> M:
    """Return the document of a JSON or YAML file, validated.

    Raises:
        UserError: names the file and the field of anything that is not such a document.
    """
    try:
        with path.open("rb") as file:
            data = file.read(limit + 1)
    except OSError as error:
        raise UserError(f"{path}: {error.strerror}") from None
    if len(data) > limit:
        raise UserError(f"{path}: larger than {limit} bytes; this is no {kind.__name__}")
    try:
        return kind.model_validate(_parse(path, data))
    except ValidationError as error:
        raise UserError(f"{path}: {explain(error)}") from None


def _parse(path: Path, data: bytes) -> object:
    if path.suffix == ".json":
        try:
            return json.loads(data, object_pairs_hook=_once)
        except (ValueError, RecursionError) as error:
            raise UserError(f"{path}: not JSON: {error}") from None
    # The probe's loop has no use for a YAML parser's memory.
    from fedpipe_api import yaml_file

    return yaml_file.document(path, data)


def _once(pairs: list[tuple[str, object]]) -> dict[str, object]:
    twice = given_twice(name for name, _ in pairs)
    if twice is not None:
        raise ValueError(f"{twice} is given twice")
    return dict(pairs)
