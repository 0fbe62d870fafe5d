# SPDX-License-Identifier: Apache-2.0
"""Sizes, durations and rates as people read them; `base` has the notation of manifests, which is exact."""


def memory(size: int) -> str:
    """Return bytes of memory or disk in binary units: `1.9 GiB`, `310 MiB`, `12 KiB`."""
    if size >= 1000 * 2**20:
        return f"{size / 2**30:.1f} GiB"
    return f"{size / 2**20:.0f} MiB" if size >= 2**20 or not size else f"{size / 2**10:.0f} KiB"


def transfer(size: float) -> str:
    """Return transferred bytes in decimal units: `1.2 GB`, `3.1 MB`, `40.0 kB`."""
    if size >= 10**9:
        return f"{size / 10**9:.1f} GB"
    return f"{size / 10**6:.1f} MB" if size >= 10**5 else f"{size / 1000:.1f} kB"


def rate(speed: int) -> str:
    """Return bytes per second: `2.0 MB/s`, `12.5 kB/s`, `1 B/s`."""
    for size, unit in ((1e6, "MB/s"), (1e3, "kB/s")):
        if speed >= size:
            return f"{speed / size:.1f} {unit}"
    return f"{speed} B/s"


def duration(seconds: float) -> str:
    """Return a duration to two units at most: `850ms`, `9.5s`, `2m55s`, `1h03m`."""
    if seconds < 1:
        return f"{round(1000 * seconds)}ms"
    if seconds < 10:
        return f"{seconds:.1f}s".replace(".0s", "s")
    whole = round(seconds)
    if whole < 60:
        return f"{whole}s"
    minutes, rest = divmod(whole, 60)
    if minutes < 60:
        return f"{minutes}m{rest:02}s" if rest else f"{minutes}m"
    hours, minutes = divmod(minutes, 60)
    return f"{hours}h{minutes:02}m" if minutes else f"{hours}h"
