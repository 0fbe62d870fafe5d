"""Which precisions really work here: one real kernel of each, forward and backward, in a child process.

Importing bitsandbytes proves nothing on old boards, and a broken kernel can crash or hang its process. This
module imports torch only in the child, `python -m fedpipe_agent.kernels fp32 nf4`: a JSON line each.
"""

import json
import os
import subprocess
import sys
import threading
import time
from collections.abc import Iterable
from typing import Any

from fedpipe_api import wire
from fedpipe_api.job import Precision

TIMEOUT = 60.0
"""Seconds for all kernels together, the import of torch included."""
WIDTH, ROWS, REPEATS = 512, 128, 3

TOLERANCES = {Precision.FP32: 5e-3, Precision.BF16: 3e-2, Precision.INT8: 5e-2, Precision.NF4: 0.25}
"""Relative error (Frobenius) against the exact product above which a kernel counts as broken."""


class Check:
    """A kernel check that runs beside other work; `results` waits for it."""

    def __init__(self, precisions: Iterable[Precision] = tuple(Precision), timeout: float = TIMEOUT):
        """Start the child process."""
        self._left = list(precisions)
        self._deadline = time.monotonic() + timeout
        self._timeout = timeout
        self._child = self._start()

    def results(self) -> tuple[wire.KernelResult, ...]:
        """Return one result per precision; a precision whose kernel crashed or hung is not usable."""
        found: list[wire.KernelResult] = []
        try:
            while self._left:
                found += self._harvest()
                if self._left:  # the child died over the first one left: the others get a new child
                    self._child = self._start()
        finally:
            self.stop()
        return tuple(found)

    def stop(self) -> None:
        """End the child process."""
        if self._child.poll() is None:
            self._child.kill()
            self._child.wait()
        if self._child.stdout is not None:
            self._child.stdout.close()

    def _start(self) -> subprocess.Popen[str]:
        return subprocess.Popen(
            [sys.executable, "-m", __name__, *self._left],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
            # One thread: the times of all machines mean the same.
            env={**os.environ, "OMP_NUM_THREADS": "1"},
        )

    def _harvest(self) -> list[wire.KernelResult]:
        """Read what one child says until it ends, and account for the precision it ended over."""
        hung = threading.Event()

        def kill() -> None:
            hung.set()
            self._child.kill()

        timer = threading.Timer(max(0.0, self._deadline - time.monotonic()), kill)
        timer.start()
        said, _ = self._child.communicate()
        whole = [line for line in said.splitlines(keepends=True) if line.endswith("\n")]
        found = [wire.KernelResult.model_validate_json(line) for line in whole]
        status = self._child.returncode
        timer.cancel()
        self._left = self._left[len(found) :]
        if self._left and hung.is_set():
            message = f"no answer within {self._timeout:g} s"
            found += [wire.KernelResult(precision=p, usable=False, message=message) for p in self._left]
            self._left = []
        elif self._left:
            how = f"was killed by signal {-status}" if status < 0 else f"exited {status}"
            message = f"the kernel check {how}"
            found.append(wire.KernelResult(precision=self._left.pop(0), usable=False, message=message))
        return found


def check(
    precisions: Iterable[Precision] = tuple(Precision), timeout: float = TIMEOUT
) -> tuple[wire.KernelResult, ...]:
    """Run one real kernel per precision in a child process, on CUDA if there is a GPU, else on CPU."""
    return Check(precisions, timeout).results()


def import_bitsandbytes() -> Any:
    """Import bitsandbytes without its use of `torch.compile`.

    It would compile its CPU fallbacks at first use wherever a C compiler happens to be present: seconds of
    work, and other rounding than on the next machine.
    """
    import torch

    def as_it_is(function: Any = None, **_: Any) -> Any:
        return function if function is not None else as_it_is

    compiler, torch.compile = torch.compile, as_it_is
    try:
        import bitsandbytes
    finally:
        torch.compile = compiler
    return bitsandbytes


def _layer(precision: Precision, exact: Any, device: Any) -> Any:
    import torch

    if precision in (Precision.FP32, Precision.BF16):
        layer = torch.nn.Linear(WIDTH, WIDTH, bias=False)
    else:
        bitsandbytes = import_bitsandbytes()
        if precision is Precision.INT8:
            layer = bitsandbytes.nn.Linear8bitLt(
                WIDTH, WIDTH, bias=False, has_fp16_weights=False, threshold=6.0
            )
        else:
            layer = bitsandbytes.nn.Linear4bit(
                WIDTH, WIDTH, bias=False, compress_statistics=True, quant_type="nf4"
            )
    layer.load_state_dict({"weight": exact})
    return (layer.bfloat16() if precision is Precision.BF16 else layer).to(device).requires_grad_(False)


def _run(precision: Precision) -> wire.KernelResult:
    """Run one kernel and compare its output and input gradient with the exact ones."""
    import torch

    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if device.type == "cuda" and precision is Precision.BF16 and not torch.cuda.is_bf16_supported(False):
        return wire.KernelResult(
            precision=precision, usable=False, message="bf16 is only emulated on this GPU"
        )
    torch.manual_seed(0)
    exact, x = torch.randn(WIDTH, WIDTH) / WIDTH**0.5, torch.randn(ROWS, WIDTH)
    layer = _layer(precision, exact, device)
    # bitsandbytes computes in half precision on CUDA; on CPU it takes float32.
    half = precision is Precision.BF16 or (device.type == "cuda" and precision is not Precision.FP32)
    dtype = (
        torch.bfloat16
        if half and (device.type == "cpu" or torch.cuda.is_bf16_supported(False))
        else torch.float32
    )
    seconds = []
    for _ in range(REPEATS):
        inputs = x.to(device, dtype, copy=True).requires_grad_()
        begin = time.perf_counter()
        output = layer(inputs)
        output.sum().backward()
        error = max(
            _distance(output, x @ exact.T),
            _distance(inputs.grad, exact.sum(0).expand_as(x)),
        )
        seconds.append(time.perf_counter() - begin)
    if not error < TOLERANCES[precision]:
        message = f"wrong result: relative error {error:.2g}"
        return wire.KernelResult(precision=precision, usable=False, message=message)
    return wire.KernelResult(precision=precision, usable=True, seconds=sorted(seconds)[len(seconds) // 2])


def _distance(value: Any, exact: Any) -> float:
    return float((value.detach().float().cpu() - exact).norm() / exact.norm())


def _child(names: list[str]) -> None:
    """Print one KernelResult per precision; a Python error is a result, a crash ends the process."""
    for name in names:
        try:
            result = _run(Precision(name))
        except Exception as error:
            reason = (str(error).splitlines() or [type(error).__name__])[0][:1024]
            result = wire.KernelResult(precision=Precision(name), usable=False, message=reason)
        sys.stdout.write(json.dumps(result.to_dict()) + "\n")
        sys.stdout.flush()


if __name__ == "__main__":
    _child(sys.argv[1:])
