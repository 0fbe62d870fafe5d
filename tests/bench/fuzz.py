# SPDX-License-Identifier: Apache-2.0
"""Fuzz the wire of a real coordinator over TLS, with restarts in between.

`python tests/bench/fuzz.py --seconds 600 --seed 1` writes results/fuzz.json and exits 1 on any finding.

Three runs over one store: (a) requests with a SIGKILL and a restart after every accepted message, (b) one process
for as long as the rest, whose memory and files are watched, (c) SIGKILL and SIGTERM at random moments.
A finding is a failed start, a 5xx that is no documented lack of room, a traceback, an error in the log, a job set
aside, or no answer for HANG_SECONDS.
"""

import argparse
import asyncio
import contextlib
import copy
import json
import random
import re
import signal
import ssl
import statistics
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

import standins.serving
from bench.bench_machine import commit, machine
from bench.fuzz_inputs import HEADERS, METHODS, NASTY, PATHS, PIECES, Message
from bench.fuzz_server import Coordinator, Tally
from fedpipe_api.wire import MANIFEST_HEADER, Assignment, AssignmentKind, Evaluation, ProfileReport, Progress
from standins.agents import make_update, manifest_of, model_shape, registration
from standins.raw_http import Stream, answer, connect

HANG_SECONDS = 30.0
WORKERS = 6
ROOM = {503: b"Busy", 507: b"StoreFull"}
"""Documented answers of a server that has no room, by a word of their bodies; they have a Retry-After."""


class Worker:
    """Sends requests, as some agent or as none."""

    def __init__(self, server: Coordinator, tally: Tally, seed: str) -> None:
        self._server = server
        self._tally = tally
        self._random = random.Random(seed)
        self._stream: Stream | None = None
        self._shape = model_shape()
        self._work: dict[str, Assignment | None] = {}

    async def turn(self) -> bool:
        """Send one request; return whether it was accepted, that is, may have changed what is stored."""
        who = f"job-{self._random.randrange(4)}/node-{self._random.randrange(3)}"
        kind = self._random.choices(
            ["right", "json", "bytes", "grammar", "garbage", "half"], [40, 20, 12, 16, 6, 6]
        )[0]
        if kind in ("right", "json", "bytes", "half"):
            message = await self._right(who)
            if message.path.startswith("/v1/blobs"):  # with a header of any kind
                kind = "grammar"
            if kind == "json":
                message = self._with_json(message)
            sent = message.to_bytes()
            if kind == "bytes":
                sent = self._with_bytes(sent)
            if kind == "half":
                sent = sent[: self._random.randrange(len(sent))]
                await self._send(sent, kind, hang_up=True)
                return False
        elif kind == "grammar":
            message, sent = self._grammar(who)
        else:
            await self._send(self._garbage(), kind, hang_up=True, tls=self._random.random() < 0.6)
            return False
        status, _ = await self._send(sent, kind)
        accepted = (
            200 <= status < 300 and message.method in ("POST", "PUT") and message.path != "/v1/progress"
        )
        if accepted:
            self._tally.accepted[re.sub(r"\d+", "N", message.path.split("?")[0])[:40]] += 1
        return accepted

    async def _right(self, who: str) -> Message:
        """Return the message that the agent should send now."""
        token = b"Authorization: Bearer " + who.encode()
        status, body = await self._send(Message("GET", "/v1/assignment?wait=0", (token,)).to_bytes(), "right")
        work = Assignment.model_validate_json(body) if status == 200 else None
        node = who.split("/")[1]
        choice = self._random.random()
        if choice < 0.05 or who not in self._tally.registered:
            self._tally.registered.add(who)
            return Message("POST", "/v1/agents", (token,), registration(self._shape).to_json().encode())
        if work is None or work.plan is None:
            said = Progress(kind=AssignmentKind.TRAIN, round=1, state="waiting")
            return Message("POST", "/v1/progress", (token,), said.to_json().encode())
        if choice < 0.1:
            said = Progress(kind=work.kind, round=work.round, state="training", step=1, steps=2, loss=0.5)
            return Message("POST", "/v1/progress", (token,), said.to_json().encode())
        if work.adapter is not None and choice < 0.2:
            return Message("GET", f"/v1/blobs/{work.adapter.digest}", (token, self._random.choice(HEADERS)))
        if work.kind is AssignmentKind.PROFILE:
            scores = {m.name: 1.0 for m in self._shape.matrices} if work.importance else {}
            report = ProfileReport(
                step_seconds=0.01, peak_bytes=1 << 28, micro_batch=work.plan.micro_batch, scores=scores
            )
            return Message("POST", "/v1/profile", (token,), report.to_json().encode())
        if work.kind is AssignmentKind.EVALUATE or (work.evaluate and choice < 0.6):
            number = work.round - (work.kind is AssignmentKind.TRAIN)
            said_of = Evaluation(
                round=number, samples=10, tokens=10, loss_sum=20.0, correct=5, precision=work.plan.precision
            )
            path = f"/v1/rounds/{number}/evaluation"
            return Message("POST", path, (token,), said_of.to_json().encode())
        body = make_update(self._shape, work.plan, node, work.round)
        if self._random.random() < 0.2:
            body = self._with_bytes(body)
        manifest = manifest_of(body, work.plan, work.round, work.adapter)
        header = f"{MANIFEST_HEADER}: {manifest.to_json()}".encode()
        return Message("PUT", f"/v1/rounds/{work.round}/update", (token, header), body)

    def _with_json(self, message: Message) -> Message:
        """Return the message with something else in its JSON: of the body, or of the manifest."""
        prefix = f"{MANIFEST_HEADER}: ".encode()
        for number, header in enumerate(message.headers):
            if header.startswith(prefix):
                text = self._mutated(header.removeprefix(prefix)).replace("\n", "")
                changed = prefix + text.encode("utf-8", "surrogatepass")
                headers = (*message.headers[:number], changed, *message.headers[number + 1 :])
                return Message(message.method, message.path, headers, message.body)
        if not message.body:
            return message
        text = self._mutated(message.body)
        return Message(message.method, message.path, message.headers, text.encode("utf-8", "surrogatepass"))

    def _mutated(self, text: bytes) -> str:
        tree = json.loads(text)
        for _ in range(self._random.randint(1, 3)):
            at, keys = tree, []
            while isinstance(at, dict | list) and at:
                keys.append(self._random.choice(list(at) if isinstance(at, dict) else range(len(at))))
                if self._random.random() < 0.35 or not isinstance(at[keys[-1]], dict | list):
                    break
                at = at[keys[-1]]
            if not keys or not isinstance(at, dict | list) or not at:
                continue
            value = copy.deepcopy(self._random.choice(NASTY))
            if isinstance(at, dict) and self._random.random() < 0.15:
                at[self._random.choice(["", "extra", "\x00", "a" * 500])] = value
            elif self._random.random() < 0.15:
                del at[keys[-1]]
            else:
                at[keys[-1]] = value
        found = json.dumps(tree, ensure_ascii=self._random.random() < 0.7)
        if self._random.random() < 0.1:
            found = found.replace("{", '{"version": 1, ', 1)
        return found

    def _with_bytes(self, sent: bytes) -> bytes:
        changed = bytearray(sent)
        for _ in range(self._random.randint(1, 4)):
            place = self._random.randrange(len(changed) or 1)
            match self._random.randrange(4):
                case 0 if changed:
                    changed[place] = self._random.randrange(256)
                case 1:
                    changed[place:place] = self._random.choice(PIECES)
                case 2:
                    del changed[place : place + self._random.randint(1, 50)]
                case _:
                    changed[place:place] = changed[place : place + self._random.randint(1, 200)]
        return bytes(changed)

    def _grammar(self, who: str) -> tuple[Message, bytes]:
        pick = self._random.choice
        headers = [pick(HEADERS) for _ in range(self._random.randrange(4))]
        if self._random.random() < 0.7:
            headers.append(b"Authorization: Bearer " + who.encode())
        body = pick([b"", b"{}", b"null", b"[" * 100000, b'{"a":' * 5000, b"\xff" * 300, bytes(70000)])
        message = Message(pick(METHODS), pick(PATHS), tuple(headers), body)
        return message, message.to_bytes()

    def _garbage(self) -> bytes:
        if self._random.random() < 0.5:
            return self._random.randbytes(self._random.randint(1, 5000))
        return b"".join(self._random.choice(PIECES) for _ in range(self._random.randint(1, 6)))

    async def _send(
        self, sent: bytes, kind: str, *, hang_up: bool = False, tls: bool = True
    ) -> tuple[int, bytes]:
        """Send bytes and return the answer's status (0: none) and body; what must not be is a finding."""
        await self._server.up.wait()
        life = self._server.pid
        stream = self._stream if tls and not hang_up else None
        self._stream = None if stream else self._stream
        try:
            if stream is None or stream[1].is_closing():
                opening = (
                    connect(self._server.port)
                    if tls
                    else asyncio.open_connection("127.0.0.1", self._server.port)
                )
                stream = await asyncio.wait_for(opening, HANG_SECONDS)
            stream[1].write(sent)
            if hang_up:
                with contextlib.suppress(TimeoutError, ConnectionError, ssl.SSLError):
                    await asyncio.wait_for(stream[0].read(100), self._random.random() * 0.05)
                status, head, body = 0, b"", b""
            else:
                # A request whose body is shorter than it said is answered only when its time is over.
                seconds = HANG_SECONDS if kind in ("right", "json") else 2.0
                status, head, body = await answer(stream, seconds)
        except TimeoutError:
            if kind in ("right", "json") and self._server.pid == life and self._server.up.is_set():
                self._tally.find("hang", sent)
            status, head, body = 0, b"", b""
        except (OSError, ssl.SSLError):
            status, head, body = 0, b"", b""
        self._check(kind, sent, status, head, body)
        if status and b"connection: close" not in head.lower() and kind == "right":
            self.close()
            self._stream = stream
        elif stream:
            stream[1].transport.abort()
        return status, body

    def _check(self, kind: str, sent: bytes, status: int, head: bytes, body: bytes) -> None:
        self._tally.statuses[f"{kind} {status}"] += 1
        if status >= 500 and not (b"retry-after" in head.lower() and ROOM.get(status, b"-") in body):
            self._tally.find("5xx", sent, f"{status} {body!r}")
        if b"Traceback" in body:
            self._tally.find("traceback in an answer", sent, repr(body))

    def close(self) -> None:
        """Drop the connection."""
        if self._stream:
            self._stream[1].transport.abort()


async def jobs_are_whole(server: Coordinator, tally: Tally) -> None:
    """Ask for every job: one that was set aside is a finding."""
    for number in range(standins.serving.JOBS):
        stream = await connect(server.port)
        token = b"Authorization: Bearer job-%d/node-0" % number
        stream[1].write(Message("GET", "/v1/job", (token,)).to_bytes())
        status, _, body = await answer(stream)
        stream[1].transport.abort()
        if status != 200:
            tally.find("job lost", detail=f"job-{number}: {status} {body!r}")


async def restarts_after_every_message(
    server: Coordinator, tally: Tally, seed: int, requests: int, until: float
) -> int:
    """Send requests one by one, and kill the server after each that was accepted."""
    worker = Worker(server, tally, f"{seed}/a")
    sent = 0
    while sent < requests and time.monotonic() < until:
        sent += 1
        if await worker.turn():
            worker.close()
            await server.end(signal.SIGKILL)
            await server.start()
            await jobs_are_whole(server, tally)
    worker.close()
    return sent


async def at_work(server: Coordinator, tally: Tally, seed: str, until: float) -> None:
    """Let workers send until then."""

    async def work(number: int) -> None:
        worker = Worker(server, tally, f"{seed}/{number}")
        while time.monotonic() < until:
            await worker.turn()
        worker.close()

    await asyncio.gather(*(work(number) for number in range(WORKERS)))


async def watched(server: Coordinator, tally: Tally, seed: int, seconds: float) -> dict[str, object]:
    """Keep one process at work and return what it held: the medians of its second and last quarter."""
    until = time.monotonic() + seconds
    task = asyncio.create_task(at_work(server, tally, f"{seed}/b", until))
    seen: list[tuple[int, int]] = []
    while not task.done():
        seen.append(server.measure())
        await asyncio.wait({task}, timeout=0.5)
    await task
    quarter = max(1, len(seen) // 4)

    def medians(which: int) -> list[float]:
        parts = [row[which] for row in seen]
        return [statistics.median(parts[quarter : 2 * quarter] or parts), statistics.median(parts[-quarter:])]

    memory, files = medians(0), medians(1)
    await asyncio.sleep(min(12.0, seconds))  # what the last requests left open has its time
    return {
        "seconds": round(seconds),
        "memory_mib": [round(value / 2**20, 1) for value in memory],
        "open_files": files,
        "open_files_at_rest": server.measure()[1],
    }


async def random_restarts(server: Coordinator, tally: Tally, seed: int, until: float) -> None:
    """Keep workers at work while the server is killed or ended at random moments."""
    chance = random.Random(f"{seed}/c")
    task = asyncio.create_task(at_work(server, tally, f"{seed}/c", until))
    while not task.done():
        await asyncio.wait({task}, timeout=0.3 + 5 * chance.random())
        await server.end(chance.choice([signal.SIGKILL, signal.SIGKILL, signal.SIGTERM]))
        await server.start()
        await jobs_are_whole(server, tally)
    await task


async def fuzz(directory: Path, seconds: float, seed: int, requests: int) -> dict[str, object]:
    """Run all three and return the result."""
    tally, begin = Tally(), time.monotonic()
    sent, held = 0, {}
    with contextlib.suppress(SystemExit):
        async with Coordinator(directory, tally) as server:
            sent = await restarts_after_every_message(server, tally, seed, requests, begin + 0.5 * seconds)
            left = begin + seconds - time.monotonic()
            held = await watched(server, tally, seed, 0.6 * left)
            await random_restarts(server, tally, seed, begin + seconds)
    log = (directory / "log").read_text(errors="replace")
    for found in re.finditer(r"^\S+ \S+ (ERROR|CRITICAL) .*(\n  .*)*", log, re.MULTILINE):
        tally.find("log", detail=found[0])
    if "Traceback" in re.sub(r"^  .*\n", "", log, flags=re.MULTILINE):
        tally.find("traceback")
    return {
        "machine": machine(),
        "commit": commit(),
        "seed": seed,
        "seconds": round(time.monotonic() - begin),
        "requests": tally.statuses.total(),
        "requests_with_a_restart_after_each_accepted": sent,
        "accepted": dict(tally.accepted),
        "restarts": dict(tally.restarts),
        "one_process": held,
        "statuses": dict(sorted(tally.statuses.items())),
        "log_lines": log.count("\n"),
        "findings": tally.findings,
    }


def main() -> int:
    """Run as a script."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seconds", type=float, default=600)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--requests", type=int, default=1000, help="With a restart after each accepted one.")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results" / "fuzz.json")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as directory:
        result = asyncio.run(fuzz(Path(directory), options.seconds, options.seed, options.requests))
    options.out.write_text(json.dumps(result, indent=2) + "\n")
    sys.stdout.write(json.dumps({**result, "findings": result["findings"][:20]}, indent=2) + "\n")  # type: ignore[index]
    return 1 if result["findings"] else 0


if __name__ == "__main__":
    sys.exit(main())
