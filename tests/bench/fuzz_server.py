# SPDX-License-Identifier: Apache-2.0
"""The coordinator that is fuzzed, as a process that can be killed, and what is counted meanwhile."""

import asyncio
import base64
import os
import signal
import socket
import sys
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path

import psutil

import standins.serving


@dataclass
class Tally:
    """What came of the requests."""

    statuses: Counter[str] = field(default_factory=Counter)
    accepted: Counter[str] = field(default_factory=Counter)
    restarts: Counter[str] = field(default_factory=Counter)
    findings: list[dict[str, object]] = field(default_factory=list)
    registered: set[str] = field(default_factory=set)

    def find(self, kind: str, sent: bytes = b"", detail: str = "") -> None:
        """Note a finding with its input."""
        text = base64.b64encode(sent[:4000]).decode()
        self.findings.append({"kind": kind, "sent": text, "detail": detail[:300] + detail[300:][-2000:]})


class Coordinator:
    """The process under test; restarts cost no imports (see standins/serving.py)."""

    def __init__(self, directory: Path, tally: Tally) -> None:
        with socket.create_server(("127.0.0.1", 0)) as probe:
            self.port = int(probe.getsockname()[1])
        self.directory = directory
        self.log = directory / "log"
        self.pid = 0
        self.up = asyncio.Event()
        self._tally = tally

    async def __aenter__(self) -> "Coordinator":
        self._log = self.log.open("ab")
        self._parent = await asyncio.create_subprocess_exec(
            sys.executable, standins.serving.__file__, str(self.directory), str(self.port),
            stdin=asyncio.subprocess.PIPE, stdout=asyncio.subprocess.PIPE, stderr=self._log,
            env=os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)},
        )  # fmt: skip
        await self.start()
        return self

    async def __aexit__(self, *_: object) -> None:
        if self.up.is_set():
            await self.end(signal.SIGTERM)
        self._parent.kill()
        await self._parent.wait()
        self._log.close()

    async def start(self) -> None:
        """Start, and wait until it serves; a start that fails ends the fuzz."""
        assert self._parent.stdin
        self._parent.stdin.write(b"\n")
        self.pid = int((await self._line(b"pid"))[4:])
        line = await self._line(b"ready", b"exit")
        if line != b"ready":
            self._tally.find("failed start", detail=self.log.read_text(errors="replace")[-1000:])
            raise SystemExit(f"failed start: {line.decode()}")
        self.up.set()

    async def _line(self, *begins: bytes) -> bytes:
        assert self._parent.stdout
        while True:
            line = (await asyncio.wait_for(self._parent.stdout.readline(), 120)).strip()
            if not line or line.startswith(begins):
                return line

    async def end(self, sign: int) -> None:
        """End the process with a signal."""
        self.up.clear()
        os.kill(self.pid, sign)
        line = await self._line(b"exit")
        self._tally.restarts[signal.Signals(sign).name] += 1
        if line != (b"exit 0" if sign == signal.SIGTERM else b"exit -9"):
            self._tally.find("bad exit", detail=line.decode())

    def measure(self) -> tuple[int, int]:
        """Return resident bytes and open files."""
        process = psutil.Process(self.pid)
        return int(process.memory_info().rss), int(process.num_fds())
