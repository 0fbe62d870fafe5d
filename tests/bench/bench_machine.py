# SPDX-License-Identifier: Apache-2.0
"""What a result was measured on."""

import os
import platform
import subprocess
import sys
from pathlib import Path


def machine() -> dict[str, object]:
    """Return processor, cores, memory, versions and the command of this process."""
    cpu = next(
        (
            line.split(":")[1].strip()
            for line in Path("/proc/cpuinfo").read_text().splitlines()
            if "model name" in line
        ),
        platform.processor(),
    )
    return {
        "cpu": cpu,
        "cores": len(os.sched_getaffinity(0)),
        "memory_gib": round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30, 1),
        "python": platform.python_version(),
        "system": platform.system(),
        "command": " ".join([Path(sys.argv[0]).name, *sys.argv[1:]]),
    }


def commit() -> str:
    """Return the commit that is checked out, with `-dirty` where files differ from it."""
    asked = ["git", "describe", "--always", "--dirty", "--exclude", "*"]
    found = subprocess.run(asked, check=True, capture_output=True, text=True, cwd=Path(__file__).parent)
    return found.stdout.strip()
