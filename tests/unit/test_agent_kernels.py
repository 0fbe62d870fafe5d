import subprocess
import sys
import time

from fedpipe_agent import kernels
from fedpipe_api.job import Precision


def test_every_precision_is_really_run_here():
    results = kernels.check()
    assert [result.precision for result in results] == list(Precision)
    assert all(result.usable and result.seconds > 0 for result in results), results


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


def test_an_exception_is_a_reason(monkeypatch):
    monkeypatch.setattr(
        kernels, "_layer", lambda *_: (_ for _ in ()).throw(RuntimeError("no kernel image\nmore"))
    )
    written = []
    monkeypatch.setattr(sys.stdout, "write", written.append)
    kernels._child(["nf4"])
    assert '"usable": false, "message": "no kernel image"' in written[0]


def test_a_stopped_check_leaves_no_process():
    check = kernels.Check()
    check.stop()
    assert check._child.poll() is not None


def test_importing_the_parent_side_needs_no_torch():
    code = "import sys, fedpipe_agent.kernels, fedpipe_agent.transport; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
