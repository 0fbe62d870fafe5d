# SPDX-License-Identifier: Apache-2.0
import io
import json
import os
import subprocess
import sys
import textwrap
import time

import pytest

from fedpipe_agent import kernels
from fedpipe_api.job import Precision


def test_every_precision_is_really_run_here():
    results = kernels.check()
    assert [result.precision for result in results] == list(Precision)
    assert all(result.usable and result.seconds > 0 for result in results), results
    assert all(result.float32_seconds > 0 for result in results), results


def test_only_the_offered_precisions_are_run():
    assert [result.precision for result in kernels.check([Precision.FP32])] == [Precision.FP32]


CHILD = """
import json, os, signal, sys, time
for name in sys.argv[1:]:
    if name == "{bad}":
        {act}
    print(json.dumps({{"precision": name, "usable": True, "seconds": 0.1}}), flush=True)
"""


def misbehaving(monkeypatch, bad, act):
    """Run a child in place of the real one that crashes or hangs over one precision."""
    script = CHILD.format(bad=bad, act=act)
    real = subprocess.Popen

    def start(command, **options):
        return real([sys.executable, "-c", script, *command[3:]], **options)

    monkeypatch.setattr(kernels.subprocess, "Popen", start)


def test_a_crash_costs_only_its_precision(monkeypatch):
    misbehaving(monkeypatch, "int8", "os.kill(os.getpid(), signal.SIGSEGV)")
    results = {result.precision: result for result in kernels.check()}
    assert [p for p in Precision if not results[p].usable] == [Precision.INT8]
    assert results[Precision.INT8].message == "the kernel check was killed by signal 11"


def test_a_silent_end_costs_only_its_precision(monkeypatch):
    misbehaving(monkeypatch, "fp32", "sys.exit(3)")
    results = kernels.check()
    assert [result.usable for result in results] == [False, True, True, True]
    assert results[0].message == "the kernel check exited 3"


def test_a_hang_ends_at_the_time_out(monkeypatch):
    misbehaving(monkeypatch, "nf4", "time.sleep(60)")
    begin = time.monotonic()
    results = kernels.check([Precision.FP32, Precision.NF4], timeout=2)
    assert time.monotonic() - begin < 5
    assert [result.usable for result in results] == [True, False]
    assert results[1].message == "no answer within 2 s"


@pytest.mark.parametrize("act", ["time.sleep(60)", "os.close(1); time.sleep(60)"], ids=["open", "closed"])
def test_a_hang_costs_only_its_precision(monkeypatch, act):
    misbehaving(monkeypatch, "fp32", act)
    results = kernels.check(timeout=2)
    assert [result.precision for result in results] == list(Precision)
    assert results[0].message == "no answer within 2 s"
    assert [(result.usable, result.seconds) for result in results[1:]] == [(True, 0.1)] * 3


def test_hangs_and_crashes_are_distinguished(monkeypatch):
    misbehaving(monkeypatch, "fp32", "time.sleep(60)\n    if name == 'int8': os.abort()")
    first, *_, int8, nf4 = kernels.check(timeout=2)
    assert first.message == "no answer within 2 s"
    assert int8.message == "the kernel check was killed by signal 6"
    assert nf4.usable


def test_the_results_of_a_check_that_nobody_asked_for_long_are_there(monkeypatch):
    misbehaving(monkeypatch, "nf4", "time.sleep(60)")
    check = kernels.Check(timeout=1)
    time.sleep(3)
    assert [result.usable for result in check.results()] == [True, True, True, False]


@pytest.mark.parametrize(
    "noise",
    [
        "print('bin /lib/bitsandbytes.so', flush=True)",
        "os.write(1, bytes(range(128, 256)) + b'\\n')",
        "print('{}', '[]', 'null', '', sep='\\n', flush=True)",
        """print('{"precision": "nf4", "usable": false}', flush=True)""",
    ],
    ids=["words", "bytes", "json", "another precision"],
)
def test_a_line_that_is_no_result_is_passed_over(monkeypatch, noise):
    misbehaving(monkeypatch, "int8", noise)
    assert [result.seconds for result in kernels.check()] == [0.1] * 4


@pytest.mark.parametrize("end", ["\\n", ""])
def test_endless_talk_is_a_hang(monkeypatch, end):
    misbehaving(monkeypatch, "fp32", f"[print('x' * 999, end='{end}') for _ in iter(int, 1)]")
    results = kernels.check([Precision.FP32, Precision.BF16], timeout=2)
    assert [result.usable for result in results] == [False, True]
    assert results[0].message == "no answer within 2 s"


def test_what_libraries_print_in_the_child_is_no_result(tmp_path):
    # As every library may: while the child imports it, from Python, from C and from a program it starts.
    (tmp_path / "torch.py").write_text(
        textwrap.dedent("""
            import ctypes, os, subprocess
            print("bin /lib/bitsandbytes.so")
            os.write(1, b"{}")
            subprocess.run(["echo", "no C compiler"])
            ctypes.CDLL(None).puts(b"CUDA SETUP: fine")
            ctypes.CDLL(None).fflush(None)
            raise RuntimeError("no torch here")
        """)
    )
    done = subprocess.run(
        [sys.executable, "-m", "fedpipe_agent.kernels", "fp32", "nf4"],
        env={**os.environ, "PYTHONPATH": str(tmp_path)},
        capture_output=True,
        text=True,
        check=True,
    )
    assert [json.loads(line)["message"] for line in done.stdout.splitlines()] == ["no torch here"] * 2
    for printed in ("bitsandbytes.so", "{}", "no C compiler", "CUDA SETUP"):
        assert printed in done.stderr


def test_an_exception_is_a_reason(monkeypatch):
    from fedpipe_agent.train.precisions import IMPLEMENTATIONS, Implementation

    def layer(*_):
        raise RuntimeError("no kernel image\nmore")

    monkeypatch.setitem(IMPLEMENTATIONS, Precision.NF4, Implementation(layer))
    written = io.StringIO()
    kernels._child(["nf4"], written)
    assert '"usable": false, "message": "no kernel image"' in written.getvalue()


def test_a_stopped_check_leaves_no_process():
    check = kernels.Check()
    check.stop()
    assert check._child.poll() is not None


def test_importing_the_parent_side_needs_no_torch():
    code = "import sys, fedpipe_agent.kernels, fedpipe_agent.transport; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
