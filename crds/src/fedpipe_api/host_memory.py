# SPDX-License-Identifier: Apache-2.0
"""How much memory a process on this machine can have: the machine's, within its control groups' limits."""

from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple


class Memory(NamedTuple):
    """Bytes in all, and bytes that a new process could get."""

    total: int
    free: int


def read(root: Path = Path("/"), *, limited: bool = True) -> Memory:
    """Return the memory.

    Page cache that nobody uses (`inactive_file`) is free: the kernel gives it back before a limit is felt.

    Args:
        root: where /proc and /sys are found.
        limited: keep to the control groups of this process, version 2 or 1; False for the whole machine.
    """
    total, free = _machine(root / "proc/meminfo")
    if limited:
        for group, names in (
            *((g, _V2) for g in unified_groups(root)),
            *((g, _V1) for g in _v1_groups(root)),
        ):
            limit = _number(group / names.limit)
            if limit is not None:
                total = min(total, limit)
                free = min(free, max(0, limit - _charged(group, names)))
    return Memory(total, min(free, total))


def unified_groups(root: Path) -> Iterator[Path]:
    """Yield this process's cgroup v2 directories from its own up to the topmost."""
    for path in _paths(root, ""):
        yield from _upwards(root / "sys/fs/cgroup", path)


class _Names(NamedTuple):
    limit: str
    used: str
    cache: str


_V2 = _Names("memory.max", "memory.current", "inactive_file")
_V1 = _Names("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file")


def _v1_groups(root: Path) -> Iterator[Path]:
    for path in _paths(root, "memory"):
        yield from _upwards(root / "sys/fs/cgroup/memory", path)


def _paths(root: Path, controller: str) -> Iterator[str]:
    """Yield the paths of this process's groups that have the controller; "" is version 2's hierarchy."""
    for line in _text(root / "proc/self/cgroup").splitlines():
        _, _, rest = line.partition(":")
        controllers, _, path = rest.partition(":")
        if controller in controllers.split(","):
            yield path.removeprefix("/")


def _upwards(top: Path, path: str) -> Iterator[Path]:
    # A path with .. is outside this cgroup namespace, where only the top can be seen.
    group = top if ".." in path.split("/") else top / path
    while group != top:
        yield group
        group = group.parent
    yield top


def _machine(meminfo: Path) -> Memory:
    values = {}
    for line in meminfo.read_text(encoding="ascii").splitlines():
        key, _, rest = line.partition(":")
        values[key] = int(rest.split()[0]) * 1024
    return Memory(values["MemTotal"], values.get("MemAvailable", values["MemFree"]))


def _charged(group: Path, names: _Names) -> int:
    """Return bytes in use that the kernel could not give back."""
    used = _number(group / names.used) or 0
    for line in _text(group / "memory.stat").splitlines():
        key, _, value = line.partition(" ")
        if key == names.cache and value.isdecimal():
            return max(0, used - int(value))
    return used


def _number(path: Path) -> int | None:
    text = _text(path)
    return int(text) if text.isdecimal() else None


def _text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8", errors="replace").strip()
    except OSError:
        return ""
