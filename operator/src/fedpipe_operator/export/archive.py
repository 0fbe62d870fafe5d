# SPDX-License-Identifier: Apache-2.0
"""The tar of a PEFT directory, made while it is sent: it takes no file, and no memory for the tensors."""

import tarfile
from collections.abc import Iterator

from fedpipe_api.job import FedPipeJobSpec
from fedpipe_api.wire import ModelShape

from .peft import WEIGHTS, peft_texts
from .peft_weights import PeftWeights


class AdapterArchive:
    """A tar whose bytes depend on the adapter and its job's spec alone.

    `source` is the global adapter, an open file that others close.
    """

    def __init__(self, source: int, spec: FedPipeJobSpec, shape: ModelShape) -> None:
        self._weights = PeftWeights(source)
        texts = peft_texts(self._weights, spec, shape)
        self._head = b"".join(
            _entry(name, len(text)) + text + _padding(len(text)) for name, text in sorted(texts.items())
        )
        self._head += _entry(WEIGHTS, len(self._weights))
        self._tail = _padding(len(self._weights)) + bytes(2 * tarfile.BLOCKSIZE)

    def __len__(self) -> int:
        return len(self._head) + len(self._weights) + len(self._tail)

    def chunks(self) -> Iterator[bytes]:
        """Yield its bytes in pieces that are not empty. Blocks; OSError where the file has become shorter."""
        yield self._head
        yield from self._weights.chunks()
        yield self._tail


def _entry(name: str, size: int) -> bytes:
    entry = tarfile.TarInfo(name)
    entry.size, entry.mode = size, 0o644
    return entry.tobuf()


def _padding(size: int) -> bytes:
    return bytes(-size % tarfile.BLOCKSIZE)
