# SPDX-License-Identifier: Apache-2.0
"""`fedpipe get adapter` against an operator, or somebody in its place, that means harm."""

import tarfile

import pytest

from fedpipe_api.base import UserError
from fedpipe_operator.kube import get
from fedpipe_operator.kube.get import adapter_files


def sparse(name: str, size: int) -> bytes:
    """Return an archive of three blocks whose one file has the given size once it is read."""
    entry = tarfile.TarInfo(name)
    entry.type = tarfile.GNUTYPE_SPARSE
    block = bytearray(entry.tobuf(tarfile.GNU_FORMAT))
    block[386:410] = 2 * (b"0" * 11 + b"\0")
    block[482:495] = b"\0" + b"%011o " % size
    block[148:156] = b" " * 8
    block[148:156] = b"%06o\0 " % sum(block)
    return bytes(block) + bytes(1024)


def test_an_archive_cannot_grow_when_it_is_read() -> None:
    with pytest.raises(UserError, match="unexpected archive"):
        adapter_files(sparse("README.md", 1 << 20))


def test_a_refusal_moves_no_cursor() -> None:
    with pytest.raises(UserError) as refused:
        adapter_files(tarfile.TarInfo("evil\x1b[2J\n").tobuf() + bytes(1024))
    assert str(refused.value).isprintable()
    assert get._message(500, b"\x1b[2J\r\nno such thing").isprintable()
    assert get._message(500, b'{"message": "\\u001b]0;x\\u0007"}').isprintable()
