# SPDX-License-Identifier: Apache-2.0
"""`fedpipe-operator` that keeps how late its event loop was: `python watched_operator.py FILE run …`.

FILE gets three float64 columns when the operator ends: when (monotonic seconds), how late the loop was, and how much
of that was waiting for a core while others had them (Linux, schedstat); the rest is the loop's own doing.
"""

import asyncio
import sys
import time
from array import array
from pathlib import Path

from fedpipe_operator.kube.command import main
from fedpipe_operator.metrics import OperatorMetrics

PERIOD = 0.01


def _waited_for_a_core() -> float:
    return int(Path("/proc/thread-self/schedstat").read_text().split()[1]) / 1e9


async def watch(out: Path) -> None:
    """Measure until cancelled, then write."""
    found = array("d")
    try:
        while True:
            begin, waited = time.monotonic(), _waited_for_a_core()
            await asyncio.sleep(PERIOD)
            now = time.monotonic()
            found.extend((now, now - begin - PERIOD, _waited_for_a_core() - waited))
    finally:
        out.write_bytes(found.tobytes())


if __name__ == "__main__":
    file = Path(sys.argv.pop(1))
    original = OperatorMetrics.watch_lag

    async def both(figures: OperatorMetrics) -> None:
        """Measure for the operator's own metrics too."""
        await asyncio.gather(original(figures), watch(file))

    OperatorMetrics.watch_lag = both  # type: ignore[method-assign]
    sys.exit(main())
