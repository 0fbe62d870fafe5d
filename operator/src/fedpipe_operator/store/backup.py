# SPDX-License-Identifier: Apache-2.0
"""Backup of a whole store into one tar file, and back: a copy of the ledger and the blobs beside it."""

import contextlib
import os
import re
import shutil
import tarfile
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import IO, BinaryIO

from fedpipe_api.base import UserError

from .blobs import Blobs
from .ledger import Ledger

LEDGER = "ledger.sqlite"
_BLOB = re.compile(r"blobs/([0-9a-f]{2})/(\1[0-9a-f]{62})")
_CHUNK = 1 << 20


@contextlib.contextmanager
def snapshot(ledger: Ledger, blobs: Blobs) -> Iterator[Path]:
    """Yield a directory with a copy of the ledger and links to the blobs, and remove it at the end.

    The caller sees to it that no blob comes or goes until this yields. Blocks; use a thread.
    """
    directory = Path(tempfile.mkdtemp(prefix="snapshot-", dir=blobs.temporary))
    try:
        ledger.copy(directory / LEDGER)
        for path in blobs.files():
            if path.is_file():
                target = directory / "blobs" / path.parent.name / path.name
                target.parent.mkdir(parents=True, exist_ok=True)
                target.hardlink_to(path)
        yield directory
    finally:
        shutil.rmtree(directory, ignore_errors=True)


def pack(directory: Path, file: BinaryIO) -> None:
    """Write a snapshot as a tar: the blobs, then the ledger that names them. Blocks; use a thread."""
    with tarfile.open(fileobj=file, mode="w|") as archive:
        for path in sorted(directory.glob("blobs/??/*")):
            archive.add(path, str(path.relative_to(directory)), recursive=False)
        archive.add(directory / LEDGER, LEDGER, recursive=False)


def back_up(directory: Path, file: BinaryIO) -> None:
    """Write a backup of a store that no process uses."""
    ledger = Ledger(directory / LEDGER)
    try:
        with snapshot(ledger, Blobs(directory / "blobs")) as taken:
            pack(taken, file)
    finally:
        ledger.close()


def restore(file: BinaryIO, directory: Path) -> None:
    """Fill an empty store from a backup; raises UserError when it is not empty or the backup is damaged.

    The ledger comes last and under its name in one step: a restore that is cut short leaves an empty store.
    """
    if (directory / LEDGER).exists():
        raise UserError(f"{directory}: there is a ledger already; move it and the blobs away first")
    directory.mkdir(parents=True, exist_ok=True)
    blobs, arrived = Blobs(directory / "blobs"), directory / f"{LEDGER}.restored"
    arrived.unlink(missing_ok=True)
    try:
        with tarfile.open(fileobj=file, mode="r|") as archive:
            for entry in archive:
                _restore_entry(archive, entry, blobs, arrived)
    except (tarfile.TarError, EOFError) as error:
        raise UserError(f"the backup is damaged or cut short ({error}); nothing was restored") from None
    if not arrived.exists():
        raise UserError("the backup is damaged or cut short (no ledger); nothing was restored")
    ledger = Ledger(arrived)  # refuses one of a later version, or of something else
    try:
        for _ in ledger.replay():
            pass
    finally:
        ledger.close()
    arrived.replace(directory / LEDGER)


def _restore_entry(archive: tarfile.TarFile, entry: tarfile.TarInfo, blobs: Blobs, ledger: Path) -> None:
    content = archive.extractfile(entry) if entry.isfile() else None
    match = _BLOB.fullmatch(entry.name)
    if content is None or not (match or entry.name == LEDGER):
        raise UserError(f"not a backup of FedPipe: it holds {entry.name!r:.80}")
    if match:
        return _restore_blob(blobs, content, match.group(2))
    with ledger.open("wb") as file:
        shutil.copyfileobj(content, file, _CHUNK)
        file.flush()
        os.fsync(file.fileno())
        if file.tell() != entry.size:
            raise UserError("the backup is cut short; nothing was restored")
    return None


def _restore_blob(blobs: Blobs, content: IO[bytes], digest: str) -> None:
    incoming = blobs.incoming()
    try:
        while chunk := content.read(_CHUNK):
            incoming.write(chunk)
        if incoming.finish() != digest:
            raise UserError(f"the backup is damaged (blob {digest[:12]}); nothing was restored")
        blobs.adopt(incoming.path, digest)
    finally:
        incoming.discard()
