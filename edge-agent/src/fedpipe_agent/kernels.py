# SPDX-License-Identifier: Apache-2.0
"""Which precisions really work here: one real kernel of each, forward and backward, in a child process.

Importing bitsandbytes proves nothing on old boards, and a broken kernel can crash or hang its process. This
module imports torch only in the child, `python -m fedpipe_agent.kernels fp32 nf4`: a JSON line each.
"""

import contextlib
import json
import os
import selectors
import subprocess
import sys
import time
from collections.abc import Iterable
from typing import IO, Any

from pydantic import ValidationError

from fedpipe_api import wire
from fedpipe_api.precisions import Precision

TIMEOUT = 60.0
"""Seconds for one kernel; for the first of a child process its start and the import of torch are among them.
A check of N precisions that all hang takes N times this."""
KILL_SECONDS = 5.0
"""Given to a killed child to end: one that is stuck in the driver may never."""
SAID_LIMIT = 2**20
"""Bytes that are read of one child: a result has some hundred, but libraries talk too."""
WIDTH, ROWS, REPEATS = 512, 128, 3


class Check:
    """A kernel check that runs beside other work; `results` waits for it."""

    def __init__(self, precisions: Iterable[Precision] = tuple(Precision), timeout: float = TIMEOUT):
        """Start the child process; `timeout` is in seconds for each precision."""
        self._left = list(precisions)
        self._timeout = timeout
        self._start()

    def results(self) -> tuple[wire.KernelResult, ...]:
        """Return one result per precision; a precision whose kernel crashed or hung is not usable."""
        found: list[wire.KernelResult] = []
        try:
            while self._left:
                result, reason = self._read()
                found.append(
                    result or wire.KernelResult(precision=self._left[0], usable=False, message=reason)
                )
                self._left.pop(0)
                self._deadline = time.monotonic() + self._timeout
                if result is None and self._left:  # the others get a new child
                    self.stop()
                    self._start()
        finally:
            self.stop()
        return tuple(found)

    def stop(self) -> None:
        """End the child process."""
        if self._child.poll() is None:
            self._child.kill()
            with contextlib.suppress(subprocess.TimeoutExpired):
                self._child.wait(KILL_SECONDS)
        if self._child.stdout is not None:
            self._child.stdout.close()

    def _start(self) -> None:
        self._said, self._allowed = b"", SAID_LIMIT
        self._deadline = time.monotonic() + self._timeout
        self._child = subprocess.Popen(
            [sys.executable, "-m", __name__, *self._left],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            # One thread: the times of all machines mean the same.
            env={**os.environ, "OMP_NUM_THREADS": "1"},
        )

    def _read(self) -> tuple[wire.KernelResult | None, str]:
        """Return the result of the first precision left, or None and why the child gives none."""
        for line in iter(self._line, None):
            with contextlib.suppress(ValidationError):  # what a library prints is no result
                result = wire.KernelResult.model_validate_json(line)
                if result.precision == self._left[0]:
                    return result, ""
        try:
            status = self._child.wait(max(0.0, self._deadline - time.monotonic()))
        except subprocess.TimeoutExpired:
            return None, f"no answer within {self._timeout:g} s"
        how = f"was killed by signal {-status}" if status < 0 else f"exited {status}"
        return None, f"the kernel check {how}"

    def _line(self) -> bytes | None:
        """Return the child's next whole line; None at its end, at the deadline or once it said too much."""
        assert self._child.stdout is not None
        with selectors.DefaultSelector() as selector:
            selector.register(self._child.stdout, selectors.EVENT_READ)
            while b"\n" not in self._said:
                # Also after the deadline: what was said while nobody asked is waiting to be read.
                if not selector.select(max(0.0, self._deadline - time.monotonic())):
                    return None
                chunk = os.read(self._child.stdout.fileno(), min(65536, self._allowed))
                if not chunk:
                    return None
                self._said += chunk
                self._allowed -= len(chunk)
        line, _, self._said = self._said.partition(b"\n")
        return line


def check(
    precisions: Iterable[Precision] = tuple(Precision), timeout: float = TIMEOUT
) -> tuple[wire.KernelResult, ...]:
    """Run one real kernel per precision in a child process, on CUDA if there is a GPU, else on CPU."""
    return Check(precisions, timeout).results()


def run(precision: Precision) -> wire.KernelResult:
    """Run one kernel and compare its output and input gradient with the exact ones."""
    import torch

    from .train.precisions import IMPLEMENTATIONS, compute_type

    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    bfloat16 = precision.computes_in == "bfloat16"
    if device.type == "cuda" and bfloat16 and not torch.cuda.is_bf16_supported(False):
        return wire.KernelResult(
            precision=precision, usable=False, message=f"{precision} is only emulated on this GPU"
        )
    torch.manual_seed(0)
    exact, x = torch.randn(WIDTH, WIDTH) / WIDTH**0.5, torch.randn(ROWS, WIDTH)
    layer = IMPLEMENTATIONS[precision].layer(WIDTH, WIDTH)
    layer.load_state_dict({"weight": exact})
    dtype = compute_type(precision, device)
    if not precision.quantized:
        layer.to(dtype)
    layer.to(device).requires_grad_(False)
    seconds, error = _timed(layer, x.to(device, dtype), x, exact)
    if not error < precision.tolerance:
        message = f"wrong result: relative error {error:.2g}"
        return wire.KernelResult(precision=precision, usable=False, message=message)
    plain = torch.nn.Linear(WIDTH, WIDTH, bias=False)
    plain.load_state_dict({"weight": exact})
    reference, _ = _timed(plain.to(device).requires_grad_(False), x.to(device), x, exact)
    return wire.KernelResult(precision=precision, usable=True, seconds=seconds, float32_seconds=reference)


def _timed(layer: Any, inputs: Any, x: Any, exact: Any) -> tuple[float, float]:
    """Return the median seconds of a layer's products, and its relative error.

    Args:
        layer: of the weights `exact`, (WIDTH, WIDTH).
        inputs: `x` where the layer is and in its type.
        x: of float32, on the CPU, (ROWS, WIDTH).
        exact: weights of float32, on the CPU.
    """
    seconds, error = [], 0.0
    for _ in range(REPEATS):
        given = inputs.clone().requires_grad_()
        begin = time.perf_counter()
        output = layer(given)
        output.sum().backward()
        error = max(_distance(output, x @ exact.T), _distance(given.grad, exact.sum(0).expand_as(x)))
        seconds.append(time.perf_counter() - begin)
    return sorted(seconds)[REPEATS // 2], error


def _distance(value: Any, exact: Any) -> float:
    return float((value.detach().float().cpu() - exact).norm() / exact.norm())


def _child(names: list[str], results: IO[str]) -> None:
    """Write one KernelResult per precision; a Python error is a result, a crash ends the process."""
    for name in names:
        try:
            result = run(Precision.of(name))
        except Exception as error:
            reason = (str(error).splitlines() or [type(error).__name__])[0][:1024]
            result = wire.KernelResult(precision=Precision.of(name), usable=False, message=reason)
        results.write(json.dumps(result.to_dict()) + "\n")
        results.flush()


def _own_stdout() -> IO[str]:
    """Return this process's stdout, and let all that libraries print, in Python or in C, go to stderr."""
    own = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)
    return own


if __name__ == "__main__":
    _child(sys.argv[1:], _own_stdout())
