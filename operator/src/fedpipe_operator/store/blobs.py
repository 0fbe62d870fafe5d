# SPDX-License-Identifier: Apache-2.0
"""Files named by their sha256, written temp → fsync → rename, so that a name never stands for half a file."""

import contextlib
import hashlib
import logging
import os
import re
import shutil
import tempfile
import time
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import BinaryIO

log = logging.getLogger(__name__)

_DIGEST = re.compile(r"[0-9a-f]{64}")
_PROBE = 1 << 20
"""Bytes written to see whether the volume has room again: more than a record and SQLite's log need."""

FRESH_SECONDS = 60.0
"""A file that was found intact and has not been written to is not read again before so long."""

_PREFIX = re.compile(r"[0-9a-f]{2}")


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


@contextlib.contextmanager
def _discarded(incoming: Incoming) -> Iterator[Incoming]:
    try:
        yield incoming
    finally:
        incoming.discard()


class Blobs:
    """A directory of blobs. Digests are checked to be digests, so no name can lead outside it."""

    def __init__(self, directory: Path) -> None:
        self._directory = directory
        self.temporary = directory / "temp"
        # When a blob was last known to have its bytes, and what the file system said of it then.
        self._checked: dict[str, tuple[float, tuple[int, ...]]] = {}
        directory.mkdir(parents=True, exist_ok=True)
        if not self.temporary.is_dir() or self.temporary.is_symlink():
            _clear(self.temporary)
        self.temporary.mkdir(exist_ok=True)
        # Whatever is here was being written when a process died: no agent received an answer for it.
        for left in self.temporary.iterdir():
            _clear(left)
        for found in directory.iterdir():
            # In the way of a blob's directory; anything else is none of ours and does no harm.
            if _PREFIX.fullmatch(found.name) and (found.is_symlink() or not found.is_dir()):
                log.warning("%s: not a directory of blobs; it is removed", found)
                _clear(found)

    def path(self, digest: str) -> Path:
        """Return where the blob is stored or would be."""
        if not _DIGEST.fullmatch(digest):
            raise ValueError(f"{digest!r} is not a sha256 digest")
        return self._directory / digest[:2] / digest

    def incoming(self) -> Incoming:
        """Start receiving a file."""
        return Incoming(self.temporary)

    def adopt(self, temporary: Path, digest: str) -> Path:
        """Move a synced temporary file in under its digest and make the name durable.

        The caller has just made or checked the digest: `intact` takes the file's bytes for right.
        """
        path = self.path(digest)
        fresh = not path.parent.exists()
        path.parent.mkdir(exist_ok=True)
        temporary.replace(path)
        _sync_directory(path.parent)
        if fresh:
            _sync_directory(self._directory)
        self._checked[digest] = time.monotonic(), _mark(path.stat())
        return path

    def remove(self, digest: str) -> None:
        """Remove a blob; one that is not there is no error."""
        self.path(digest).unlink(missing_ok=True)
        self._checked.pop(digest, None)

    def intact(self, digest: str) -> bool:
        """Whether the blob is there and its bytes are those of its name. May read it all; use a thread."""
        at, mark = self._checked.pop(digest, (0.0, ()))
        try:
            with self.path(digest).open("rb") as file:
                found = _mark(os.fstat(file.fileno()))
                if found != mark or time.monotonic() - at >= FRESH_SECONDS:
                    at = time.monotonic()
                    if hashlib.file_digest(file, "sha256").hexdigest() != digest:
                        return False
        except OSError:
            return False
        self._checked[digest] = at, found
        return True

    def has_room(self) -> bool:
        """Whether a little can be written. Blocks; use a thread."""
        try:
            with _discarded(self.incoming()) as probe:
                probe.write(bytes(_PROBE))
                probe.finish()
        except OSError:
            return False
        return True

    def keep_only(self, digests: Iterable[str]) -> None:
        """Remove every blob that is not named; files that are no blobs are left alone."""
        keep = set(digests)
        for path in self.files():
            if path.is_dir() and not path.is_symlink():
                log.warning("%s: a directory in the place of a blob; it is removed", path)
            if path.name not in keep or path.is_dir():
                _clear(path)
                self._checked.pop(path.name, None)

    def volume(self) -> int:
        """Return the bytes of the file system that the blobs are on."""
        return shutil.disk_usage(self._directory).total

    def size(self) -> int:
        """Return the bytes of all blobs."""
        total = 0
        for path in self.files():
            # It may be removed meanwhile.
            with contextlib.suppress(OSError):
                total += path.stat().st_size
        return total

    def files(self) -> list[Path]:
        """Return what is stored under the names of blobs."""
        found: list[Path] = []
        for directory in self._directory.iterdir():
            if not _PREFIX.fullmatch(directory.name):
                continue
            try:
                found += [path for path in directory.iterdir() if _DIGEST.fullmatch(path.name)]
            except OSError as error:
                log.warning("%s: cannot be read (%s); it is left alone", directory, error.strerror)
        return found


def _mark(found: os.stat_result) -> tuple[int, ...]:
    """Return what changes when a file is replaced or written to."""
    return found.st_ino, found.st_size, found.st_mtime_ns, found.st_ctime_ns


def _clear(path: Path) -> None:
    """Remove a file, or a directory with all that is in it; what cannot be removed is logged and left."""
    try:
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        else:
            path.unlink(missing_ok=True)
    except OSError as error:
        log.warning("%s: cannot be removed (%s); it is left alone", path, error.strerror)
