"""What the system reports, read from a made-up /proc and /sys."""

import os
from pathlib import Path

import pytest

from fedpipe_agent.probe import host

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
    assert (found.cpu.total_memory, found.cpu.free_memory) == (16_000_000 * KIB, 12_000_000 * KIB)
    assert (found.cpu.cores, found.cpu.cache_disk_free) == (os.cpu_count(), None)
    assert (found.tegra, found.boards) == (None, 0)


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
    limited = host.read(None, limited=True, root=root).cpu
    assert (limited.cores, limited.total_memory, limited.free_memory) == (1, 2_000_000_000, 800_000_000)
    assert host.read(None, limited=False, root=root).cpu.total_memory == 16_000_000 * KIB


@pytest.mark.parametrize("line", ["0::/../outside\n", "4:memory:/v1\n", "", "0::/gone\n"])
def test_a_cgroup_that_cannot_be_seen_limits_nothing(root: Path, line: str) -> None:
    write(root, {"proc/self/cgroup": line})
    assert host.read(None, limited=True, root=root).cpu.total_memory == 16_000_000 * KIB


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
    found = host.read(None, limited=False, root=root).tegra
    assert found is not None
    assert (found.name, found.compute_capability) == ("NVIDIA Jetson Orin Nano Developer Kit", capability)
    assert found.unified_memory


def test_nvidia_gpus_on_pci_are_counted(root: Path) -> None:
    for slot, (vendor, kind) in enumerate(
        [("0x10de", "0x030200"), ("0x10de", "0x030000"), ("0x10de", "0x040300"), ("0x8086", "0x030000")]
    ):
        base = f"sys/bus/pci/devices/0000:0{slot}:00.0"
        write(root, {f"{base}/vendor": f"{vendor}\n", f"{base}/class": f"{kind}\n"})
    assert host.read(None, limited=False, root=root).boards == 2


def test_cache_disk(root: Path) -> None:
    assert (host.read(root, limited=False, root=root).cpu.cache_disk_free or 0) > 0
    assert host.read(root / "gone", limited=False, root=root).cpu.cache_disk_free is None
