# SPDX-License-Identifier: Apache-2.0
"""The fleet's agents as processes of this machine: started, watched, started again, ended."""

import asyncio
import contextlib
import ctypes
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Mapping
from functools import partial
from pathlib import Path

from fedpipe_api.base import USER_MISTAKE, UserError
from fedpipe_api.node import Capacity
from fedpipe_api.policy import is_forbidden

from ..coordinator import Identity, Tokens
from ..engine import Engine
from .manifest import Member

RESTARTS = 3
"""An agent that fails more often in a row, without an update between, is not started again."""

GRACE_SECONDS = 5.0
"""How long an agent may take to end before it is killed."""

VMSTAT = Path("/proc/vmstat")
"""The kernel's counters; a kernel without them is taken for one that kills nothing for memory."""

_MESSAGE_PREFIX = "fedpipe-agent: "
_TAIL = 4096
_PR_SET_PDEATHSIG = 1
_libc = ctypes.CDLL(None)


def _die_with(parent: int) -> None:
    # Even a SIGKILL of this process must not leave agents behind.
    _libc.prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:
        os._exit(1)  # it was killed before the kernel knew


class Agents:
    """One agent for each member that the job desires.

    `failed` are those that will not be started again, and why; `mistakes` are those of them that a person
    has to help.
    """

    def __init__(
        self,
        engine: Engine,
        *,
        uid: str,
        members: tuple[Member, ...],
        model: str,
        directory: Path,
        tokens: Tokens,
        url: str,
    ) -> None:
        self.failed: dict[str, str] = {}
        self.mistakes: dict[str, str] = {}
        self._engine = engine
        self._uid = uid
        self._model = model
        self._directory = directory
        self._tokens = tokens
        self._url = url
        self._offline = Path(model).is_dir()
        self._command = agent_command()
        self._processes: dict[str, asyncio.subprocess.Process] = {}
        self._ending = False
        self._tasks = [asyncio.create_task(self._tend(member)) for member in members]

    async def end(self, grace: float) -> None:
        """End every agent: by itself within the grace (seconds), then by SIGTERM, then by SIGKILL."""
        self._ending = True
        await self._exited(grace)
        for sign in (signal.SIGTERM, signal.SIGKILL):
            for process in self._processes.values():
                if process.returncode is None:
                    with contextlib.suppress(ProcessLookupError):
                        os.killpg(process.pid, sign)
            await self._exited(GRACE_SECONDS)
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        for token in self._directory.glob("*/token"):
            token.unlink()

    async def _exited(self, seconds: float) -> None:
        waits = [asyncio.ensure_future(p.wait()) for p in self._processes.values() if p.returncode is None]
        if waits and seconds > 0:
            await asyncio.wait(waits, timeout=seconds)
        for wait in waits:
            wait.cancel()

    async def _tend(self, member: Member) -> None:
        """Keep the member's agent running while it is desired and does not fail for good."""
        node, failures = member.node.name, 0
        while not self._ending:
            counted = self._counted(node)
            kills = oom_kills()
            status, message = await self._run_once(member)
            # The kernel counts its kills and not whose they were: this SIGKILL is taken for one of them.
            killed = status == -signal.SIGKILL and oom_kills() > kills
            if self._ending:
                return
            if status == 0:
                await self._until_desired(node)
                continue
            if killed:
                message = "killed because the machine's memory, or its cgroup's, ran out"
            # A negative status is a signal's: somebody ended it, it did not fail.
            await self._engine.mark_lost(self._uid, node, message, failed=status > 0, killed=killed)
            failures = 1 if self._counted(node) > counted else failures + 1
            if status == USER_MISTAKE and not is_forbidden(message):
                self.mistakes[node] = message
            if status == USER_MISTAKE or failures > RESTARTS:
                self.failed[node] = message
                self._engine.jobs[self._uid].shown.fire()
                return
            await asyncio.sleep(2.0 ** (failures - 1))

    def _counted(self, node: str) -> int:
        rounds = self._engine.jobs[self._uid].state.rounds.values()
        return sum(node in known.updates for known in rounds)

    async def _until_desired(self, node: str) -> None:
        # An agent that ended as it was asked to may be wanted again after another plan.
        while not self._ending and node not in self._engine.jobs[self._uid].state.desired:
            await self._engine.moved(self._uid, 60.0)

    async def _run_once(self, member: Member) -> tuple[int, str]:
        """Run an agent to its end; return its exit status and its last line."""
        directory = self._directory / member.node.name
        directory.mkdir(parents=True, exist_ok=True, mode=0o700)
        token, capacity, log = (directory / name for name in ("token", "capacity.json", "log"))
        _write_secret(token, self._tokens.issue(Identity(self._uid, member.node.name)))
        capacity.write_text(capacity_of(member).to_json(), encoding="utf-8")
        with log.open("ab") as output:
            process = await asyncio.create_subprocess_exec(
                *self._command, "train",
                "--coordinator", self._url, "--model", self._model, "--data", str(member.data),
                "--token-file", str(token), "--capacity", str(capacity),
                *(("--policy", str(member.policy)) if member.policy else ()),
                stdin=asyncio.subprocess.DEVNULL, stdout=output, stderr=output,
                env=environment(offline=self._offline, threads=member.node.threads),
                start_new_session=True, preexec_fn=partial(_die_with, os.getpid()),
            )  # fmt: skip
            self._processes[member.node.name] = process
            status = await process.wait()
        if status < 0:
            return status, f"killed by {signal.Signals(-status).name}"
        return status, last_line(_tail(log)) or f"ended with status {status}"


def oom_kills() -> int:
    """Return how many processes the kernel has killed for memory since it started."""
    try:
        counters = dict(line.split() for line in VMSTAT.read_text(encoding="ascii").splitlines())
        return int(counters.get("oom_kill", 0))
    except (OSError, ValueError):
        return 0


def agent_command() -> list[str]:
    """Return how to start an agent; UserError when it is not installed."""
    beside = Path(sys.executable).with_name("fedpipe-agent")
    found = str(beside) if beside.exists() else shutil.which("fedpipe-agent")
    if found is None:
        raise UserError("fedpipe-agent is not installed; pip install 'fedpipe-operator[local]'")
    return [found]


def ask_agent(*arguments: str, model: str, given: str = "") -> str:
    """Return what a command of the agent prints: this package has neither torch nor transformers.

    Args:
        arguments: the command and its own arguments.
        model: the model that it reads; a hub is asked only for one that is not a directory.
        given: on its standard input.

    Raises:
        UserError: the last line of a command that failed.
    """
    done = subprocess.run(
        [*agent_command(), *arguments],
        input=given,
        capture_output=True,
        text=True,
        errors="replace",
        env=environment(offline=Path(model).is_dir()),
        check=False,
    )
    if done.returncode != 0:
        raise UserError(
            last_line(done.stderr) or f"fedpipe-agent {arguments[0]} ended with status {done.returncode}"
        )
    return done.stdout


def capacity_of(member: Member) -> Capacity:
    """Return the capacity that the member's agent keeps to."""
    return Capacity(**{field: getattr(member.node, field) for field in Capacity.model_fields})


def environment(*, offline: bool, threads: int | None = None) -> Mapping[str, str]:
    """Return the environment of a fleet's agent; `offline` keeps it from asking a hub."""
    # A fleet's nodes compute on the CPU, as `fedpipe plan` has them: many share this machine, and small ones
    # cannot hold a CUDA context. GPUs named in the environment are meant.
    default = {"CUDA_VISIBLE_DEVICES": ""}
    given = {"TOKENIZERS_PARALLELISM": "false", "HF_HUB_DISABLE_PROGRESS_BARS": "1"}
    if threads is not None:
        given["OMP_NUM_THREADS"] = given["MKL_NUM_THREADS"] = str(threads)
    if offline:
        given["HF_HUB_OFFLINE"] = "1"
    return default | os.environ | given


def _write_secret(path: Path, text: str) -> None:
    path.unlink(missing_ok=True)
    with os.fdopen(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "w") as file:
        file.write(text)


def _tail(log: Path) -> str:
    with log.open("rb") as file:
        file.seek(max(0, log.stat().st_size - _TAIL))
        return file.read().decode(errors="replace")


def last_line(said: str) -> str:
    """Return the last line of what an agent said, without the command's name; "" if it said nothing."""
    lines = [line.strip() for line in said.splitlines()]
    return next((line for line in reversed(lines) if line), "").removeprefix(_MESSAGE_PREFIX)
