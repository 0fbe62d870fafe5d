# SPDX-License-Identifier: Apache-2.0
"""Gives a backup of the running engine's store to whom may open its socket beside the ledger."""

import asyncio
import logging
import os
import socket
from pathlib import Path
from typing import BinaryIO

from ..store.backup import pack
from .journal import Journal

log = logging.getLogger(__name__)

SOCKET = "backup.sock"
"""In the store's directory: who can open it can read the store itself."""


async def serve_backups(journal: Journal, directory: Path) -> None:
    """Answer every connection with a backup, until cancelled."""
    path = directory / SOCKET
    path.unlink(missing_ok=True)

    async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            async with journal.snapshot() as taken:
                descriptor = os.dup(writer.get_extra_info("socket").fileno())
                await asyncio.to_thread(_send, taken, descriptor)
            log.info("a backup was taken")
        except Exception as error:
            log.warning("a backup broke off: %s", error)
        finally:
            writer.close()

    try:
        # Closed by us too: a stop while the server starts would leave it open.
        with _listen(path) as listening:
            async with await asyncio.start_unix_server(answer, sock=listening) as server:
                await server.serve_forever()
    finally:
        path.unlink(missing_ok=True)


def _listen(path: Path) -> socket.socket:
    listening = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    # The address of a socket holds 107 bytes, which a path may exceed; that through the directory does not.
    directory = os.open(path.parent, os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        listening.bind(f"/proc/self/fd/{directory}/{path.name}")
        path.chmod(0o600)
    except OSError:
        listening.close()
        raise
    finally:
        os.close(directory)
    return listening


def _send(directory: Path, descriptor: int) -> None:
    os.set_blocking(descriptor, True)
    with os.fdopen(descriptor, "wb") as file:
        pack(directory, file)


def fetch_backup(directory: Path, file: BinaryIO) -> bool:
    """Write the running operator's backup to a file; return False when none runs on the store."""
    opened = os.open(directory, os.O_DIRECTORY | os.O_CLOEXEC)
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as connection:
        try:
            connection.connect(f"/proc/self/fd/{opened}/{SOCKET}")
        except (FileNotFoundError, ConnectionRefusedError):
            return False
        finally:
            os.close(opened)
        while chunk := connection.recv(1 << 20):
            file.write(chunk)
    return True
