# SPDX-License-Identifier: Apache-2.0
"""What the probe costs the node it runs on: CPU per pass, memory, writes per hour.

`python tests/bench/probe.py [--seconds 36] [--out tests/bench/results/probe.json]`

The probe is a real process with its real NVML path over the stand-in library, reporting over TLS to a test
API server. Time runs a hundred times faster for it (a pass each 150 ms and a heartbeat of 1.2 s instead of
15 s and 2 min), so that 36 s count for an hour; what a pass costs does not depend on how often it is made.
"""

import argparse
import json
import socket
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))

import psutil
from bench_machine import machine

from nvml import apiserver
from nvml.running import running, until
from nvml.standin import StandIn, board

SPEED_UP = 100
INTERVAL, HEARTBEAT = 15.0, 120.0
HANG = {"devices": [board("t4")["devices"][0] | {"total": "!hang"}]}


def boards() -> dict[str, dict[str, Any]]:
    """The machines to probe."""
    one = board("h200")
    eight = [one["devices"][0] | {"uuid": f"GPU-{index}"} for index in range(8)]
    return {
        "no driver": {"init": "!DRIVER_NOT_LOADED"},
        "1 × T4": board("t4"),
        "A100, 3 MIG instances": board("a100-mig"),
        "8 × H200": one | {"devices": eight},
    }


def free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return int(free.getsockname()[1])


def cpu_seconds(process: psutil.Process) -> float:
    """CPU time of the process and of its ended children."""
    times = process.cpu_times()
    return times.user + times.system + times.children_user + times.children_system


def measure(script: dict[str, Any], seconds: float) -> dict[str, float]:
    """Run the probe on a quiet machine for so many seconds."""
    arguments = ("--interval", f"{INTERVAL / SPEED_UP}s", "--heartbeat", f"{HEARTBEAT / SPEED_UP}s")
    with tempfile.TemporaryDirectory() as scratch, apiserver.serve(Path(scratch), tls=True) as api:
        standin = StandIn(Path(scratch), script)
        with running(api.cluster(), standin.environment, *arguments, port=free_port()) as probe:
            until(lambda: probe.metric("fedpipe_probe_writes_total") >= 1)
            process = psutil.Process(probe.process.pid)
            before = probe.metric("fedpipe_probe_passes_total"), cpu_seconds(process), len(api.writes)
            time.sleep(seconds)
            after = probe.metric("fedpipe_probe_passes_total"), cpu_seconds(process), len(api.writes)
            passes, cpu, writes = (new - old for old, new in zip(before, after, strict=True))
            memory = process.memory_full_info()
            # A read that hangs holds still long enough for its child to be weighed.
            standin.play(HANG)
            child = until(lambda: [c for c in process.children() if c.memory_info().rss > 20e6])[0]
            time.sleep(0.1)
            together = process.memory_full_info().pss + child.memory_full_info().pss
    hours = seconds * SPEED_UP / 3600
    return {
        "cpu_ms_per_pass": round(1000 * cpu / passes, 1),
        "share_of_a_core": round(cpu / passes / INTERVAL, 5),
        "resident_mb": round(memory.rss / 1e6, 1),
        "proportional_mb_while_reading": round(together / 1e6, 1),
        "passes": int(passes),
        "writes_per_hour": round(writes / hours, 1),
    }


def main() -> None:
    """Measure every board and print or store the results."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seconds", type=float, default=36.0, help="for each board")
    parser.add_argument("--out", type=Path, help="write the JSON here")
    options = parser.parse_args()
    results = {name: measure(script, options.seconds) for name, script in boards().items()}
    limits = {"cpu_ms_per_pass": 50, "resident_mb": 40, "writes_per_hour": 3600 / HEARTBEAT}
    report = {
        "machine": machine(),
        "interval_seconds": INTERVAL,
        "heartbeat_seconds": HEARTBEAT,
        "limits": limits,
        "boards": results,
        "within_limits": all(
            row[name] <= limit for row in results.values() for name, limit in limits.items()
        ),
    }
    text = json.dumps(report, indent=2, ensure_ascii=False)
    print(text)
    if options.out:
        options.out.parent.mkdir(parents=True, exist_ok=True)
        options.out.write_text(f"{text}\n")


if __name__ == "__main__":
    main()
