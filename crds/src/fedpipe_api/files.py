# SPDX-License-Identifier: Apache-2.0
"""Files that other programs read at any moment."""

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path
from tempfile import mkstemp
from typing import BinaryIO

from .base import UserError


def expanded(path: str | Path) -> Path:
    """Return a path that a person wrote, with the home directory for ~; UserError where there is none."""
    try:
        return Path(path).expanduser()
    except RuntimeError:
        raise UserError(f"{path}: ~ stands for no home directory here; write the path in full") from None


@contextlib.contextmanager
def replaced(path: Path, mode: int = 0o644) -> Iterator[BinaryIO]:
    """Yield a file to write, which takes the place of `path` when all of it is on disk.

    A reader of `path` sees the old content or the new, never a part; after an error the old one stays.

    Raises:
        OSError: the file cannot be written.
    """
    descriptor, name = mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with os.fdopen(descriptor, "wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.chmod(name, mode)
        os.replace(name, path)
    except BaseException:
        os.unlink(name)
        raise
