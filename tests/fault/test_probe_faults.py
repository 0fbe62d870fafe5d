# SPDX-License-Identifier: Apache-2.0
"""A running probe through the troubles of an edge node: each is a condition, none ends it."""

import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

from fedpipe_agent.probe.backends import nvml
from fedpipe_agent.probe.missed_passes import HELD_PASSES, Reader
from fedpipe_agent.probe.reading import Reading
from fedpipe_api.node import NodeReason
from nvml import apiserver
from nvml.running import running, until
from nvml.standin import StandIn, board, standin

__all__ = ["standin"]

FAST = ("--interval", "100ms", "--timeout", "500ms", "--heartbeat", "1m")
PATIENT = ("--interval", "100ms", "--timeout", "1m", "--heartbeat", "1m")
"""Where nothing hangs: on a busy machine a healthy reading may take longer than FAST waits."""


@pytest.fixture
def api(tmp_path: Path) -> Iterator[apiserver.ApiServer]:
    with apiserver.serve(tmp_path) as serving:
        yield serving


@pytest.fixture
def port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return int(free.getsockname()[1])


def state(api: apiserver.ApiServer, kind: str) -> tuple[str, str] | None:
    reported = ((api.node or {}).get("status") or {}).get("conditions", [])
    return next(((entry["status"], entry["reason"]) for entry in reported if entry["type"] == kind), None)


@pytest.mark.parametrize(
    ("trouble", "reason"),
    [
        (board("hanging"), "NvmlTimeout"),
        (board("driver-mismatch"), "DriverMismatch"),
        (board("no-permission"), "NoPermission"),
        ({"init": "!crash"}, "NvmlFailed"),
        ({"init": "!UNKNOWN"}, "NvmlFailed"),
        ({"count": "!LIB_RM_VERSION_MISMATCH"}, "DriverMismatch"),
        ({"devices": ["!GPU_IS_LOST"]}, "GpuIsLost"),
    ],
)
def test_trouble_becomes_a_condition_and_passes_go_on(
    api: apiserver.ApiServer, standin: StandIn, port: int, trouble: dict, reason: str
) -> None:
    with running(api.cluster(), standin.environment, *FAST, port=port) as probe:
        until(lambda: state(api, "Ready") == ("True", "GpuReady"))
        standin.play(trouble)
        until(lambda: state(api, "Ready") == ("False", reason))
        assert api.writes[-1]["precisions"] == []
        # As after a driver upgrade or a reset: the same process finds the GPU again.
        standin.play(board("rtx-4090"))
        until(lambda: state(api, "Ready") == ("True", "GpuReady"))
        assert api.writes[-1]["driverVersion"] == "570.124.06"
        code, log = probe.stop()
    assert code == 0
    assert log.count(f"({reason})") == 2, log
    assert "Traceback" not in log


def test_scrapes_and_sigterm_are_answered_while_nvml_hangs(
    api: apiserver.ApiServer, standin: StandIn, port: int
) -> None:
    standin.play(board("hanging"))
    arguments = ("--interval", "100ms", "--timeout", "1m")
    with running(api.cluster(), standin.environment, *arguments, port=port) as probe:
        children = until(psutil.Process(probe.process.pid).children)
        until(lambda: "fedpipe_probe" in probe.metrics())
        started = time.monotonic()
        code, _ = probe.stop()
        assert code == 0
        assert time.monotonic() - started < 2
        until(lambda: not children[0].is_running())
    assert api.writes == []


def test_a_lost_gpu_leaves_the_others_reported(api: apiserver.ApiServer, standin: StandIn, port: int) -> None:
    with running(api.cluster(), standin.environment, *FAST, port=port):
        until(lambda: state(api, "DeviceLost") == ("False", "AllDevicesAnswer"))
        standin.play(board("lost-mid-read"))
        until(lambda: state(api, "DeviceLost") == ("True", "GpuIsLost"))
        assert state(api, "Ready") == ("True", "GpuReady")
        assert [device["name"] for device in api.writes[-1]["devices"]] == ["Tesla T4"]


def test_two_processes_competing_for_memory_are_reported_at_once(
    api: apiserver.ApiServer, standin: StandIn, port: int
) -> None:
    with running(api.cluster(), standin.environment, *FAST, port=port) as probe:
        until(lambda: state(api, "MemoryPressure") == ("False", "MemoryFree"))
        standin.play(board("t4-shared"))
        until(lambda: state(api, "MemoryPressure") == ("True", "MemoryShared"))
        assert api.writes[-1]["devices"][0]["freeMemory"] == 1126 * 2**20
        device = board("t4")["devices"][0]["uuid"]
        free = f'fedpipe_node_memory_bytes{{device="{device}",kind="free",node="edge-1"}}'
        assert probe.metric(free) == 1126 * 2**20


def test_without_permission_it_keeps_looking_and_writes_once_allowed(
    api: apiserver.ApiServer, standin: StandIn, port: int
) -> None:
    api.refuse = (403, "Forbidden")
    with running(api.cluster(), standin.environment, *PATIENT, port=port) as probe:
        failures = 'fedpipe_probe_publish_failures_total{node="edge-1",reason="Forbidden"}'
        until(lambda: probe.metric(failures) >= 2)
        assert 'fedpipe_node_condition{node="edge-1",reason="GpuReady",type="Ready"} 1.0' in probe.metrics()
        api.refuse = None
        until(lambda: state(api, "Ready") == ("True", "GpuReady"))
        # The write that the API server has seen is reported when its answer has come, before the next pass.
        passes = probe.metric("fedpipe_probe_passes_total")
        until(lambda: probe.metric("fedpipe_probe_passes_total") > passes + 1)
        code, log = probe.stop()
    assert code == 0
    assert log.count("Forbidden by the test") == 1
    assert log.count("the FedPipeNode is written") == 1


@pytest.mark.parametrize("node", [apiserver.NODE, None])
def test_no_api_server_or_no_node_claim_is_a_state(
    api: apiserver.ApiServer, standin: StandIn, port: int, node: str | None
) -> None:
    cluster = api.cluster(node)
    if node:
        cluster = type(cluster)("http://127.0.0.1:1", cluster.token, None)
    reason = "Unreachable" if node else "NoNodeClaim"
    with running(cluster, standin.environment, *FAST, "--node", apiserver.NODE, port=port) as probe:
        until(lambda: f'reason="{reason}"' in probe.metrics())
        code, log = probe.stop()
    assert code == 0
    assert log.count(f"({reason})") == 1


def test_a_token_of_another_node_is_a_mistake_reported_at_once(
    api: apiserver.ApiServer, standin: StandIn, port: int
) -> None:
    with running(api.cluster(), standin.environment, "--node", "edge-2", port=port) as probe:
        _, log = probe.process.communicate(timeout=20)
    assert probe.process.returncode == 2
    assert log == "fedpipe-agent: --node: the token of this Pod is bound to edge-1, not to edge-2\n"


def test_a_scraper_that_says_nothing_does_not_stop_the_passes(
    api: apiserver.ApiServer, standin: StandIn, port: int
) -> None:
    with running(api.cluster(), standin.environment, *FAST, port=port) as probe:
        before = until(lambda: probe.metric("fedpipe_probe_passes_total"))
        with socket.create_connection(("127.0.0.1", port)):
            until(lambda: probe.metric("fedpipe_probe_passes_total") > before)


def test_nonsense_from_nvml_is_a_fault(standin: StandIn) -> None:
    script = board("t4")
    script["devices"][0]["utilization"] = 400
    standin.play(script)
    fault = standin.read().fault
    assert fault is not None
    assert fault.reason == NodeReason.NVML_FAILED


def test_a_child_that_cannot_be_killed_is_not_joined_by_others(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(nvml, "collect", lambda root: time.sleep(600))
    monkeypatch.setattr(nvml, "present", lambda root: True)
    killed: list[int] = []
    monkeypatch.setattr(os, "kill", lambda child, _: killed.append(child))
    reader = Reader(0.05)
    for message in ("did not answer", "hangs in the kernel", "hangs in the kernel"):
        fault = reader.read().fault
        assert fault is not None
        assert fault.reason == NodeReason.NVML_TIMEOUT
        assert message in fault.message
    monkeypatch.undo()
    assert len(killed) == 1
    # The call comes back from the kernel, the signal takes effect, and the next pass reads again.
    os.kill(killed[0], signal.SIGKILL)
    monkeypatch.setattr(nvml, "collect", lambda root: Reading(driver_version="1"))
    until(lambda: reader.read().driver_version == "1")


def test_a_node_without_a_gpu_stays_one_whatever_the_child_does(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    for collect in (lambda root: time.sleep(600), lambda root: os._exit(1), lambda root: os.abort()):
        monkeypatch.setattr(nvml, "collect", collect)
        reading = Reader(0.05, tmp_path).read()
        assert not reading.silent
        assert reading.fault is None


@pytest.mark.parametrize("loaded", nvml.DRIVERS)
def test_a_gpu_that_was_well_is_reported_so_for_some_passes_of_a_busy_node(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, loaded: str
) -> None:
    (tmp_path / loaded).mkdir(parents=True)
    reader = Reader(5, tmp_path)
    monkeypatch.setattr(nvml, "collect", lambda root: Reading(driver_version="1"))
    well = reader.read()
    assert well.driver_version == "1"
    starved = Reader(0.05, tmp_path)
    monkeypatch.setattr(reader, "_children", starved._children)
    monkeypatch.setattr(nvml, "collect", lambda root: time.sleep(600))
    for _ in range(HELD_PASSES):
        assert reader.read() == well
    fault = reader.read().fault
    assert fault is not None
    assert fault.reason == NodeReason.NVML_TIMEOUT


def test_the_child_holds_none_of_the_parent_s_sockets(monkeypatch: pytest.MonkeyPatch) -> None:
    def open_sockets(root: Path) -> Reading:
        links = [os.path.realpath(f"/proc/self/fd/{fd}") for fd in range(3, 100)]
        return Reading(driver_version=str(sum("socket:" in link for link in links)))

    monkeypatch.setattr(nvml, "collect", open_sockets)
    with socket.socket():
        assert Reader(5).read().driver_version == "0"


def test_hung_children_do_not_pile_up(api: apiserver.ApiServer, standin: StandIn, port: int) -> None:
    standin.play(board("hanging"))
    with running(api.cluster(), standin.environment, *FAST, port=port) as probe:
        until(lambda: probe.metric("fedpipe_probe_passes_total") >= 3)
        assert len(psutil.Process(probe.process.pid).children()) <= 1


def test_a_child_forked_while_its_parent_is_killed_ends_too() -> None:
    """Its stderr closes although the kernel was asked too late to end it with its parent."""
    program = """
import ctypes, os, signal, time
from fedpipe_agent.probe import child
class Late:
    def prctl(self, *_): os.kill(os.getppid(), signal.SIGKILL); time.sleep(0.2)
child.ctypes.CDLL = lambda _: Late()
child.Child(60).ask(lambda: time.sleep(600) or b"")
"""
    done = subprocess.run([sys.executable, "-c", program], check=False, stderr=subprocess.PIPE, timeout=60)
    assert done.returncode == -signal.SIGKILL
