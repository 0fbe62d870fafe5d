"""A capacity that a person declared in a file, in place of what the hardware reports."""

import json
from pathlib import Path

from pydantic import ValidationError

from fedpipe_api.base import UserError, explain
from fedpipe_api.node import Capacity

FILE_LIMIT = 64 * 1024


def load(path: Path) -> Capacity:
    """Return the capacity in a JSON or YAML file.

    Raises UserError naming the file and the field for anything that is not a capacity.
    """
    try:
        with path.open("rb") as file:
            data = file.read(FILE_LIMIT + 1)
    except OSError as error:
        raise UserError(f"{path}: {error.strerror}") from None
    if len(data) > FILE_LIMIT:
        raise UserError(f"{path}: larger than {FILE_LIMIT} bytes; a capacity is a few lines")
    try:
        return Capacity.model_validate(_parse(path, data))
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
    names = [name for name, _ in pairs]
    for name in names:
        if names.count(name) > 1:
            raise ValueError(f"{name} is given twice")
    return dict(pairs)
