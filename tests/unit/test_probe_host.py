# SPDX-License-Identifier: Apache-2.0
"""What the system reports, read from a made-up /proc and /sys."""

import os
from pathlib import Path

import pytest

from fedpipe_agent.probe import host
from fedpipe_agent.probe.backends import nvml, tegra
from fedpipe_api import host_memory
from fedpipe_api.node import Capacity

KIB = 1024
MEMINFO = "MemTotal:       16000000 kB\nMemFree:         1000000 kB\nMemAvailable:   12000000 kB\n"


def write(root: Path, files: dict[str, str]) -> None:
    for name, text in files.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)


@pytest.fixture
def root(tmp_path: Path) -> Path:
    write(tmp_path, {"proc/meminfo": MEMINFO})
    return tmp_path


def test_memory_is_what_a_new_process_could_get(root: Path) -> None:
    found = host.read(None, limited=False, root=root)
    assert (found.total_memory, found.free_memory) == (16_000_000 * KIB, 12_000_000 * KIB)
    assert (found.cores, found.cache_disk_free) == (os.cpu_count(), None)
    assert nvml.collect(root).boards == 0
    assert tegra.collect(root).devices == ()


def test_the_tightest_cgroup_limits_a_person_s_own_run_but_not_the_node_s_probe(root: Path) -> None:
    write(
        root,
        {
            "proc/self/cgroup": "0::/slice/unit\n",
            "sys/fs/cgroup/slice/memory.max": "2000000000\n",
            "sys/fs/cgroup/slice/memory.current": "1500000000\n",
            "sys/fs/cgroup/slice/memory.stat": "anon 9\ninactive_file 300000000\n",
            "sys/fs/cgroup/slice/cpu.max": "100000 100000\n",
            "sys/fs/cgroup/slice/unit/memory.max": "max\n",
            "sys/fs/cgroup/slice/unit/cpu.max": "max 100000\n",
        },
    )
    limited = host.read(None, limited=True, root=root)
    assert (limited.cores, limited.total_memory, limited.free_memory) == (1, 2_000_000_000, 800_000_000)
    assert host.read(None, limited=False, root=root).total_memory == 16_000_000 * KIB


@pytest.mark.parametrize("line", ["0::/../outside\n", "4:memory:/v1\n", "", "0::/gone\n"])
def test_a_cgroup_that_cannot_be_seen_limits_nothing(root: Path, line: str) -> None:
    write(root, {"proc/self/cgroup": line})
    assert host.read(None, limited=True, root=root).total_memory == 16_000_000 * KIB


@pytest.mark.parametrize(("chip", "capability"), [("35", "8.7"), ("25", "7.2"), ("38", "11.0"), ("99", None)])
def test_a_jetson_is_known_by_its_chip(root: Path, chip: str, capability: str | None) -> None:
    write(
        root,
        {
            "sys/devices/soc0/family": "Tegra\n",
            "sys/devices/soc0/machine": "NVIDIA Jetson Orin Nano Developer Kit\n",
            "sys/devices/soc0/soc_id": f"{chip}\n",
        },
    )
    (found,) = tegra.collect(root).devices
    assert (found.name, found.compute_capability) == ("NVIDIA Jetson Orin Nano Developer Kit", capability)
    assert found.unified_memory


def test_nvidia_gpus_on_pci_are_counted(root: Path) -> None:
    for slot, (vendor, kind) in enumerate(
        [("0x10de", "0x030200"), ("0x10de", "0x030000"), ("0x10de", "0x040300"), ("0x8086", "0x030000")]
    ):
        base = f"sys/bus/pci/devices/0000:0{slot}:00.0"
        write(root, {f"{base}/vendor": f"{vendor}\n", f"{base}/class": f"{kind}\n"})
    assert nvml.collect(root).boards == 2


def test_cache_disk(root: Path) -> None:
    assert (host.read(root, limited=False, root=root).cache_disk_free or 0) > 0
    assert host.read(root / "gone", limited=False, root=root).cache_disk_free is None


MIB = 2**20
CHARGED = 1900 * MIB
CACHE = 1500 * MIB
V2 = {
    "proc/self/cgroup": "0::/\n",
    "sys/fs/cgroup/memory.max": f"{2048 * MIB}\n",
    "sys/fs/cgroup/memory.current": f"{CHARGED}\n",
    "sys/fs/cgroup/memory.stat": f"anon {CHARGED - CACHE}\nfile {CACHE}\ninactive_file {CACHE}\n",
}
V1 = {
    "proc/self/cgroup": "12:cpu,cpuacct:/box\n5:memory:/box\n1:name=systemd:/box\n",
    "sys/fs/cgroup/memory/memory.limit_in_bytes": "9223372036854771712\n",
    "sys/fs/cgroup/memory/memory.usage_in_bytes": f"{CHARGED}\n",
    "sys/fs/cgroup/memory/box/memory.limit_in_bytes": f"{2048 * MIB}\n",
    "sys/fs/cgroup/memory/box/memory.usage_in_bytes": f"{CHARGED}\n",
    "sys/fs/cgroup/memory/box/memory.stat": f"inactive_file 7\ntotal_inactive_file {CACHE}\n",
}


@pytest.mark.parametrize("files", [V2, V1], ids=["v2", "v1"])
def test_the_page_cache_of_a_control_group_is_free(root: Path, files: dict[str, str]) -> None:
    write(root, files)
    assert host_memory.read(root) == (2048 * MIB, 1648 * MIB)
    cpu = host.read(None, limited=True, root=root)
    assert (cpu.total_memory, cpu.free_memory) == (2048 * MIB, 1648 * MIB)
    assert host_memory.read(root, limited=False) == (16_000_000 * KIB, 12_000_000 * KIB)


def test_the_agent_registers_what_the_probe_shows(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from fedpipe_agent.train.device import Device

    write(root, V2)
    monkeypatch.setattr(host_memory.read, "__defaults__", (root,))
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    facts = Device(Capacity()).facts(())
    assert facts.free_memory - facts.overhead == 1648 * MIB


def test_a_group_filled_by_its_siblings_leaves_what_it_leaves(root: Path) -> None:
    write(
        root,
        {
            "proc/self/cgroup": "0::/pods/pod\n",
            "sys/fs/cgroup/pods/pod/memory.max": f"{1024 * MIB}\n",
            "sys/fs/cgroup/pods/pod/memory.current": "0\n",
            "sys/fs/cgroup/pods/memory.max": f"{4096 * MIB}\n",
            "sys/fs/cgroup/pods/memory.current": f"{4000 * MIB}\n",
        },
    )
    assert host_memory.read(root) == (1024 * MIB, 96 * MIB)
