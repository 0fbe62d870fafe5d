# SPDX-License-Identifier: Apache-2.0
"""`fedpipe-agent probe` as a person uses it."""

import json
import os
import signal
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from fedpipe_agent.cli import main
from fedpipe_agent.probe import command, link, loop
from fedpipe_api.node import STALE_SECONDS, FedPipeNode
from nvml.standin import AGENT, StandIn, board, standin

__all__ = ["standin"]


def test_once_as_json_is_a_fedpipenode(standin: StandIn, tmp_path: Path) -> None:
    done = standin.probe("--once", "--output", "json", "--node", "edge.example", "--cache", str(tmp_path))
    assert (done.returncode, done.stderr) == (0, "")
    printed = json.loads(done.stdout)
    assert printed["metadata"] == {"name": "edge.example"}
    node = FedPipeNode.model_validate(printed)
    assert node.status is not None
    assert (node.status.source, node.status.device_summary) == ("nvml", "Tesla T4")
    assert node.status.cpu is not None
    assert node.status.cpu.cache_disk_free
    assert node.status.cpu.cores <= len(os.sched_getaffinity(0))


def test_once_as_a_table_names_every_fact(standin: StandIn) -> None:
    standin.play(board("a100-mig"))
    done = standin.probe("--once")
    assert done.returncode == 0
    for fact in ("driver 535.183.01 · CUDA 12.2", "400 W", "ECC on", "3g.20gb", "1g.5gb", "yes (unverified)"):
        assert fact in done.stdout
    assert max(map(len, done.stdout.splitlines())) <= 120


def test_once_on_a_node_that_is_not_ready_says_so(standin: StandIn) -> None:
    standin.play(board("driver-mismatch"))
    done = standin.probe("--once")
    assert done.returncode == 1
    assert "reload the module or reboot the node" in done.stdout
    assert done.stderr == ""


def test_without_nvml_it_is_a_cpu_node() -> None:
    done = subprocess.run(
        [AGENT, "probe", "--once", "--output", "json"], capture_output=True, text=True, check=False
    )
    assert done.stderr == ""
    assert json.loads(done.stdout)["status"]["conditions"][0]["type"] == "Ready"


def test_a_declared_capacity_needs_no_hardware(standin: StandIn, tmp_path: Path) -> None:
    standin.play(board("hanging"))
    for name, text in (
        (
            "capacity.json",
            '{"device": "T4", "memory": "15Gi", "linkRate": "1M", "precisions": ["fp32", "nf4"]}',
        ),
        ("capacity.yaml", "device: T4\nmemory: 15Gi\nlinkRate: 1M\nprecisions: [fp32, nf4]\n"),
    ):
        (tmp_path / name).write_text(text)
        done = standin.probe("--once", "--output", "json", "--capacity", str(tmp_path / name))
        assert (done.returncode, done.stderr) == (0, "")
        printed = json.loads(done.stdout)["status"]
        assert (printed["source"], printed["memorySummary"], printed["precisionSummary"]) == (
            "declared",
            "15Gi",
            "fp32,nf4",
        )
        assert printed["linkRate"] == 1_000_000


@pytest.mark.parametrize(
    ("text", "complaint"),
    [
        ("memory: -5", "memory: -5 is negative"),
        ("memory: -5Gi", "memory: '-5Gi' is not a size"),
        ("memory: 0", "memory"),
        ("precisions: [fp8]", "precisions[0]: "),
        ("precisions: []", "precisions: "),
        ("threads: 0", "threads: "),
        ("speed: 2", "speed: "),
        ("linkRate: fast", "linkRate: 'fast' is not a size"),
        ("ram: 5Gi", "ram: unknown field"),
        ("- 1", ""),
        ("a: [", ":1: not YAML: "),
        ("memory: 5Gi\nmemory: 6Gi", ":2: not YAML: memory is given twice"),
        ("\x00", "not YAML"),
        ("memory: 2001-99-99", "not YAML"),
        ("[" * 30_000, "not YAML"),
        ("# nothing", "0 YAML documents"),
        ("x: " + "y" * 70_000, "larger than 65536 bytes"),
    ],
)
def test_a_wrong_capacity_is_one_line_naming_file_and_field(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], text: str, complaint: str
) -> None:
    path = tmp_path / "capacity.yaml"
    path.write_text(text)
    assert main(["probe", "--once", "--capacity", str(path)]) == 2
    printed = capsys.readouterr()
    assert printed.out == ""
    place = complaint if complaint.startswith(":") else f": {complaint}"
    assert printed.err.startswith(f"fedpipe-agent: {path}{place}")
    assert printed.err.count("\n") == 1


def test_a_key_given_twice_in_a_json_capacity_is_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "capacity.json"
    path.write_text('{"memory": "5Gi", "memory": "6Gi"}')
    assert main(["probe", "--once", "--capacity", str(path)]) == 2
    assert capsys.readouterr().err == f"fedpipe-agent: {path}: not JSON: memory is given twice\n"


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        (["--once", "--capacity", "/nowhere.json"], "/nowhere.json: No such file"),
        (["--once", "--cache", "/nowhere"], "--cache: /nowhere is no directory"),
        (
            ["--once", "--coordinator", "host:8443"],
            "--coordinator: an http or https URL is needed, not 'host:8443'",
        ),
        (["--once", "--coordinator", "ftp://host/x"], "an http or https URL is needed, not 'ftp://host/x'"),
        (["--coordinator", ""], "--coordinator: '' is no URL; write it like https://host/path"),
        (["--ca-file", "/c.pem", "--coordinator", "http://h/x"], "--ca-file goes with a --coordinator that"),
        (["--once", "--ca-file", "/c.pem"], "--ca-file goes with a --coordinator that is an https URL"),
        (
            ["--once", "--ca-file", "/nowhere.pem", "--coordinator", "https://h/x"],
            "/nowhere.pem: No such file",
        ),
        (["--once", "--ca-file", "/tmp", "--coordinator", "https://h/x"], "--ca-file: /tmp: Is a directory"),
        (["--once", "--coordinator", "http://[bad"], "--coordinator: 'http://[bad' is no URL"),
        (["--once", "--coordinator", "http://host:99999/x"], "is no URL"),
        (["--once", "--coordinator", "http:///x"], "is no URL"),
        (["--coordinator", "http://h/ä"], "--coordinator: 'http://h/ä' is no URL"),
        (["--coordinator", "http://a..b/x"], "--coordinator: 'http://a..b/x' is no URL"),
        (["--coordinator", f"http://{'a' * 64}/x"], "is no URL"),
        (["--coordinator", "http://h/a b"], "is no URL"),
        (["--once", "--node", "Not A Node"], "--node: 'Not A Node'"),
        (["--verify"], "--verify goes with --once"),
        ([], "use --once"),
    ],
)
def test_a_wrong_option_is_one_line(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], arguments: list[str], complaint: str
) -> None:
    monkeypatch.delenv("KUBERNETES_SERVICE_HOST", raising=False)
    assert main(["probe", *arguments]) == 2
    printed = capsys.readouterr().err
    assert complaint in printed
    assert printed.count("\n") == 1


@pytest.mark.parametrize(
    "url",
    [
        "http://user:s3cret@host/x",
        "http://s3cret@host/x",
        "ftp://user:s3cret@host/x",
        "http:/user:s3cret@host/x",
        "user:s3cret@host/x",
        "http://user:s3cret/@host/x",
        "http://user:s3cret@ho st/x",
        "http://user:s3cret@[host/x",
    ],
)
def test_a_password_in_the_url_is_refused_and_not_repeated(
    url: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["probe", "--once", "--coordinator", url]) == 2
    printed = capsys.readouterr().err
    assert printed.startswith("fedpipe-agent: --coordinator: ")
    assert "s3cret" not in printed


def declared(directory: Path, **facts: object) -> list[str]:
    path = directory / "capacity.json"
    path.write_text(json.dumps(facts))
    return ["--once", "--capacity", str(path)]


@pytest.mark.parametrize(
    ("rate", "shown"),
    [(1, "1 B/s"), (12_500, "12.5 kB/s"), (999_000, "999.0 kB/s"), (1_000_000, "1.0 MB/s")],
)
def test_a_declared_rate_is_shown_as_such_and_nothing_is_measured(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], rate: int, shown: str
) -> None:
    with socket.create_server(("127.0.0.1", 0)) as coordinator:
        coordinator.setblocking(False)
        url = f"http://127.0.0.1:{coordinator.getsockname()[1]}/x"
        assert main(["probe", *declared(tmp_path, linkRate=rate), "--coordinator", url]) == 0
        with pytest.raises(BlockingIOError):
            coordinator.accept()
    printed = capsys.readouterr()
    [line] = [line for line in printed.out.splitlines() if line.startswith("link ")]
    assert line.split(maxsplit=1)[1] == f"{shown} declared"


def test_the_table_shows_no_control_characters(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["probe", *declared(tmp_path, device="T4\x1b[31m\nReady True fake")]) == 0
    printed = capsys.readouterr().out
    assert "T4\ufffd[31m\ufffdReady True fake" in printed
    assert "\x1b" not in printed


def test_a_reader_that_has_gone_is_no_failure(tmp_path: Path) -> None:
    receive, send = os.pipe()
    os.close(receive)
    try:
        done = subprocess.run(
            [AGENT, "probe", *declared(tmp_path)], stdout=send, stderr=subprocess.PIPE, text=True, check=False
        )
    finally:
        os.close(send)
    assert (done.returncode, done.stderr) == (0, "")


def test_a_full_disk_is_one_line(tmp_path: Path) -> None:
    with Path("/dev/full").open("w") as full:
        done = subprocess.run(
            [AGENT, "probe", *declared(tmp_path)], stdout=full, stderr=subprocess.PIPE, text=True, check=False
        )
    assert done.returncode == 1
    assert done.stderr == "fedpipe-agent: standard output: No space left on device\n"


def test_an_interrupt_while_the_coordinator_is_silent_ends_quietly(tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as silent:
        silent.settimeout(40)
        url = f"http://127.0.0.1:{silent.getsockname()[1]}/x"
        process = subprocess.Popen(
            # What runs these tests may ignore it, as a shell does for what it puts in the background.
            ["env", "--default-signal=INT", AGENT, "probe", *declared(tmp_path), "--coordinator", url],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        connection, _ = silent.accept()
        with connection:
            process.send_signal(signal.SIGINT)
            printed = process.communicate(timeout=20)
    assert (process.returncode, printed) == (130, ("", "fedpipe-agent: interrupted\n"))


@pytest.mark.parametrize(
    "arguments",
    [
        ["--interval", "soon"],
        ["--heartbeat", "0s"],
        ["--timeout", "-1"],
        ["--timeout", "99999999999h"],
        ["--interval", "99999999999h"],
        ["--interval", "3m"],
        ["--heartbeat", "10m"],
    ],
)
def test_a_wrong_duration_is_refused(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        main(["probe", *arguments])
    assert caught.value.code == 2
    assert f"error: argument {arguments[0]}: {arguments[1]!r}" in capsys.readouterr().err


def test_the_longest_times_that_are_taken_keep_a_report_from_growing_stale() -> None:
    options = command._parser().parse_args(["--interval", "2m", "--heartbeat", "2m", "--timeout", "1m"])
    late = options.heartbeat + (1 + loop.JITTER) * options.interval + options.timeout + link.DEADLINE
    assert late < STALE_SECONDS


def test_the_probe_imports_neither_torch_nor_anything_heavy() -> None:
    code = (
        "import sys; from fedpipe_agent.probe import command, loop; "
        "print(sorted({name.partition('.')[0] for name in sys.modules}))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    loaded = set(json.loads(done.stdout.replace("'", '"')))
    heavy = {"torch", "numpy", "transformers", "kubernetes", "aiohttp", "urllib3", "yaml", "pynvml"}
    assert not loaded & heavy


@pytest.mark.slow
def test_verify_runs_real_kernels(standin: StandIn) -> None:
    standin.play({"init": "!DRIVER_NOT_LOADED"})
    done = standin.probe("--once", "--output", "json", "--verify")
    assert done.returncode == 0, done.stderr
    precisions = {entry["precision"]: entry for entry in json.loads(done.stdout)["status"]["precisions"]}
    assert all(entry["verified"] for entry in precisions.values())
    assert precisions["fp32"]["usable"]
    assert precisions["fp32"]["seconds"] > 0
