"""Files named by their sha256, written temp → fsync → rename, so that a name never stands for half a file."""

import hashlib
import os
import re
import shutil
import tempfile
from collections.abc import Iterable
from pathlib import Path
from typing import BinaryIO

_DIGEST = re.compile(r"[0-9a-f]{64}")


def _sync_directory(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


class Incoming:
    """A file being received: write, finish, then `Blobs.adopt` it or `discard`. Blocks; use a thread."""

    def __init__(self, directory: Path) -> None:
        descriptor, name = tempfile.mkstemp(dir=directory)
        self.path = Path(name)
        self._file: BinaryIO = os.fdopen(descriptor, "wb", buffering=0)
        self._hash = hashlib.sha256()
        self.size = 0

    def write(self, chunk: bytes | bytearray | memoryview) -> None:
        """Append bytes."""
        view = memoryview(chunk)
        self._hash.update(view)
        self.size += len(view)
        while view:
            view = view[self._file.write(view) :]

    def finish(self) -> str:
        """Make the bytes durable and return their sha256."""
        os.fsync(self._file.fileno())
        self._file.close()
        return self._hash.hexdigest()

    def discard(self) -> None:
        """Remove the file; safe after `finish` and after `adopt`."""
        self._file.close()
        self.path.unlink(missing_ok=True)


class Blobs:
    """A directory of blobs. Digests are checked to be digests, so no name can lead outside it."""

    def __init__(self, directory: Path) -> None:
        self._directory = directory
        self.temporary = directory / "temp"
        self.temporary.mkdir(parents=True, exist_ok=True)
        # Whatever is here was being written when a process died: nobody was told that it arrived.
        for left in self.temporary.iterdir():
            left.unlink()

    def path(self, digest: str) -> Path:
        """Return where the blob lies or would lie."""
        if not _DIGEST.fullmatch(digest):
            raise ValueError(f"{digest!r} is not a sha256 digest")
        return self._directory / digest[:2] / digest

    def incoming(self) -> Incoming:
        """Start receiving a file."""
        return Incoming(self.temporary)

    def adopt(self, temporary: Path, digest: str) -> Path:
        """Move a synced temporary file in under its digest and make the name durable."""
        path = self.path(digest)
        fresh = not path.parent.exists()
        path.parent.mkdir(exist_ok=True)
        temporary.replace(path)
        _sync_directory(path.parent)
        if fresh:
            _sync_directory(self._directory)
        return path

    def remove(self, digest: str) -> None:
        """Remove a blob; one that is not there is no error."""
        self.path(digest).unlink(missing_ok=True)

    def keep_only(self, digests: Iterable[str]) -> None:
        """Remove every blob that is not named."""
        keep = set(digests)
        for path in self._directory.glob("??/*"):
            if path.name not in keep:
                path.unlink(missing_ok=True)

    def volume(self) -> int:
        """Return the bytes of the file system that the blobs are on."""
        return shutil.disk_usage(self._directory).total

    def size(self) -> int:
        """Return the bytes of all blobs."""
        return sum(path.stat().st_size for path in self._directory.glob("??/*"))
