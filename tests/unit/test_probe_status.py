# SPDX-License-Identifier: Apache-2.0
"""From facts to status: the rules, and what is worth a write."""

import itertools
import string
from datetime import UTC, datetime, timedelta

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fedpipe_agent.probe import status
from fedpipe_agent.probe.loop import Schedule
from fedpipe_agent.probe.reading import Fault, Lost, Reading
from fedpipe_api.node import (
    DEVICE_LOST,
    DRIVER_FAULT,
    MEMORY_PRESSURE,
    READY,
    Capacity,
    Cpu,
    FedPipeNodeStatus,
    GpuDevice,
    MigInstance,
    NodeReason,
    PrecisionSupport,
)
from fedpipe_api.precisions import Precision

NOW = datetime(2026, 1, 1, tzinfo=UTC)
GIB = 2**30
CPU = Cpu(cores=4, total_memory=16 * GIB, free_memory=12 * GIB)


def device(capability: str | None = "8.6", free: int | None = 20 * GIB, **facts: object) -> GpuDevice:
    known = {"uuid": "GPU-1", "name": "GPU", "total_memory": 24 * GIB, "free_memory": free}
    return GpuDevice(**known | {"compute_capability": capability} | facts)


def build(reading: Reading | None = None, **facts: object) -> FedPipeNodeStatus:
    return status.build(reading or Reading(), CPU, **{"now": NOW} | facts)


def condition(built: FedPipeNodeStatus, kind: str) -> tuple[str, str]:
    return next((known.status, known.reason) for known in built.conditions if known.type == kind)


def usable(built: FedPipeNodeStatus) -> str:
    return built.precision_summary


@pytest.mark.parametrize(
    ("capability", "expected"),
    [
        ("5.3", "fp32"),
        ("6.1", "fp32,nf4"),
        ("7.0", "fp32,nf4"),
        ("7.5", "fp32,int8,nf4"),
        ("8.0", "fp32,bf16,int8,nf4"),
        ("8.7", "fp32,bf16,int8,nf4"),
        ("9.0", "fp32,bf16,int8,nf4"),
        ("10.0", "fp32,bf16,int8,nf4"),
        ("12.1", "fp32,bf16,int8,nf4"),
        (None, "fp32"),
    ],
)
def test_precisions_follow_compute_capability_and_are_unverified(
    capability: str | None, expected: str
) -> None:
    built = build(Reading(devices=(device(capability),)))
    assert usable(built) == expected
    assert not any(support.verified for support in built.precisions)
    assert all(support.message for support in built.precisions if not support.usable)


def test_a_precision_needs_every_device() -> None:
    pair = (device("8.9"), device("7.5", uuid="GPU-2", name="Tesla T4"))
    built = build(Reading(devices=pair))
    assert usable(built) == "fp32,int8,nf4"
    assert "Tesla T4" in next(support.message or "" for support in built.precisions if not support.usable)


def test_verified_precisions_replace_derived_ones() -> None:
    proven = (
        PrecisionSupport(precision=Precision.NF4, verified=True, usable=False, message="no kernel image"),
        PrecisionSupport(precision=Precision.BF16, verified=True, seconds=0.01),
    )
    built = build(Reading(devices=(device("7.5"),)), verified=proven)
    assert usable(built) == "fp32,bf16,int8"
    assert set(proven) <= set(built.precisions)


def test_jetson_without_nvml_takes_the_memory_of_the_system() -> None:
    orin = GpuDevice(uuid="tegra-35", name="Jetson Orin", compute_capability="8.7", unified_memory=True)
    built = build(Reading(source="tegra", devices=(orin,)))
    assert built.source == "tegra"
    assert built.devices[0].total_memory == CPU.total_memory
    assert built.devices[0].free_memory == CPU.free_memory
    assert built.device_summary == "Jetson Orin (unified)"
    assert condition(built, READY) == ("True", "GpuReady")
    assert condition(built, DRIVER_FAULT) == ("False", "DriverLoaded")


def test_no_gpu_is_a_cpu_node_without_fault() -> None:
    fault = Fault(reason=NodeReason.DRIVER_MISSING, message="libnvidia-ml.so.1 is not found")
    built = build(Reading(fault=fault))
    assert (built.source, built.device_summary, built.memory_summary, built.free_summary) == (
        "cpu",
        "cpu",
        "–",
        "12Gi",
    )
    assert condition(built, READY) == ("True", "CpuOnly")
    assert condition(built, DRIVER_FAULT) == ("False", "NoGpu")


@pytest.mark.parametrize(("boards", "words"), [(1, "an NVIDIA board is"), (2, "2 NVIDIA boards are")])
def test_a_board_without_driver_is_reported(boards: int, words: str) -> None:
    fault = Fault(reason=NodeReason.DRIVER_MISSING, message="libnvidia-ml.so.1 is not found")
    built = build(Reading(fault=fault, boards=boards, vendor="NVIDIA"))
    assert condition(built, READY) == ("True", "CpuOnly")
    assert condition(built, DRIVER_FAULT) == ("True", "DriverMissing")
    assert words in built.conditions[1].message


def test_mig_without_instances_is_not_ready_and_offers_nothing() -> None:
    built = build(Reading(devices=(device(mig_enabled=True),)))
    assert condition(built, READY) == ("False", "NoMigInstances")
    assert built.precisions == ()
    assert built.memory_summary == "–"


def test_a_gpu_that_tells_no_memory_is_not_taken_for_a_unified_one() -> None:
    hidden = device(name="Tesla T4", total_memory=None, free=None)
    built = build(Reading(devices=(hidden,)))
    assert built.devices == (hidden,)
    assert (built.memory_summary, built.free_summary, built.precisions) == ("–", "–", ())
    assert condition(built, READY) == ("False", "NoPermission")
    assert "Tesla T4 does not report its memory" in built.conditions[0].message
    # Another one keeps the node in use.
    pair = build(Reading(devices=(hidden, device(uuid="GPU-2"))))
    assert condition(pair, READY) == ("True", "GpuReady")
    assert (pair.memory_summary, pair.free_summary) == ("24Gi", "20Gi")


@pytest.mark.parametrize(
    ("reasons", "advice"),
    [
        ([NodeReason.NO_PERMISSION], "Give the probe access to the GPU devices."),
        ([NodeReason.RESET_REQUIRED] * 2, "Drain the node and reset the GPU, or reboot."),
        (
            [NodeReason.GPU_LOST, NodeReason.DEVICE_FAILED],
            "Look at its power and cooling, and reboot the node. Run `nvidia-smi` on the node.",
        ),
    ],
)
def test_a_lost_gpu_comes_with_the_advice_of_its_reason(reasons: list[NodeReason], advice: str) -> None:
    lost = tuple(Lost(index=i, reason=reason, message="no answer") for i, reason in enumerate(reasons))
    built = build(Reading(lost=lost))
    assert condition(built, DEVICE_LOST) == ("True", reasons[0])
    message = next(known.message for known in built.conditions if known.type == DEVICE_LOST)
    assert message.endswith(f": no answer. {advice}")


def test_declared_capacity_stands_in_for_the_hardware() -> None:
    capacity = Capacity(device="cpu", memory=2 * GIB, threads=2, precisions=(Precision.FP32,))
    built = status.build(None, CPU, now=NOW, capacity=capacity)
    assert built.source == "declared"
    assert built.cpu == Cpu(cores=2, total_memory=2 * GIB, free_memory=2 * GIB)
    assert usable(built) == "fp32"
    assert condition(built, READY) == ("True", "Declared")
    proven = [PrecisionSupport(precision=precision, verified=True) for precision in Precision]
    assert usable(status.build(None, CPU, now=NOW, capacity=capacity, verified=proven)) == "fp32"
    board = status.build(None, CPU, now=NOW, capacity=Capacity(device="T4", memory=15 * GIB))
    assert (board.device_summary, board.memory_summary) == ("T4", "15Gi")
    assert board.cpu == CPU
    slow = capacity.model_copy(update={"link_rate": 1000})
    assert status.build(None, CPU, now=NOW, capacity=slow, link_rate=10**6).link_rate == 1000
    assert status.build(None, CPU, now=NOW, capacity=capacity, link_rate=10**6).link_rate == 10**6


def test_transition_time_moves_only_with_the_status() -> None:
    first = build(Reading(devices=(device(),)))
    later = NOW + timedelta(minutes=1)
    same = build(Reading(devices=(device(free=10 * GIB),)), before=first, now=later)
    assert {known.last_transition_time for known in same.conditions} == {NOW}
    fault = Fault(reason=NodeReason.NVML_TIMEOUT, message="hangs")
    broken = build(Reading(fault=fault), before=same, now=later)
    moved = {known.type for known in broken.conditions if known.last_transition_time == later}
    assert moved == {READY, DRIVER_FAULT}


def test_memory_pressure_rises_clears_late_and_names_competition() -> None:
    def at(share: float, before: FedPipeNodeStatus | None, processes: int = 1) -> FedPipeNodeStatus:
        held = device(free=int(24 * GIB * share))
        return build(Reading(devices=(held,), processes=(processes,)), before=before)

    calm = at(0.12, None)
    assert condition(calm, MEMORY_PRESSURE) == ("False", "MemoryFree")
    pressed = at(0.09, calm, processes=2)
    assert condition(pressed, MEMORY_PRESSURE) == ("True", "MemoryShared")
    assert condition(at(0.12, pressed), MEMORY_PRESSURE) == ("True", "MemoryInUse")
    assert condition(at(0.16, pressed), MEMORY_PRESSURE) == ("False", "MemoryFree")


shares = st.floats(0, 1)


@given(old=shares, new=shares, busy=st.integers(0, 100))
def test_free_memory_is_worth_a_write_past_five_percent_of_the_total(
    old: float, new: float, busy: int
) -> None:
    before, after = int(24 * GIB * old), int(24 * GIB * new)
    one = build(Reading(devices=(device(free=before, utilization=0),)))
    # The same conditions, so that memory pressure does not speak as well.
    two = build(Reading(devices=(device(free=after, utilization=busy),)))
    two = two.model_copy(update={"conditions": one.conditions})
    expected = "free memory" if abs(after - before) > 0.05 * 24 * GIB else None
    assert status.moved(one, two) == expected


@pytest.mark.parametrize(
    ("change", "what"),
    [
        ({"driver_version": "2"}, "devices"),
        ({"devices": (device(ecc=True),)}, "devices"),
        ({"devices": ()}, "devices"),
        ({"devices": (device(utilization=99, free=20 * GIB + 1),)}, None),
        ({"link_rate": 1_100_000}, None),
        ({"link_rate": 2_000_000}, "link rate"),
        ({"link_rate": None}, "link rate"),
        ({"cpu": CPU.model_copy(update={"cache_disk_free": 5})}, "cache disk"),
        ({"precisions": ()}, "precisions"),
        ({"conditions": ()}, "conditions"),
        ({"observed_at": NOW + timedelta(hours=1)}, None),
    ],
)
def test_what_is_worth_a_write(change: dict[str, object], what: str | None) -> None:
    written = build(Reading(driver_version="1", devices=(device(),)), link_rate=1_000_000)
    assert status.moved(written, written.model_copy(update=change)) == what


def test_free_memory_of_a_mig_instance_is_watched() -> None:
    def with_free(free: int) -> FedPipeNodeStatus:
        part = MigInstance(uuid="MIG-1", profile="1g.5gb", total_memory=5 * GIB, free_memory=free)
        return build(Reading(devices=(device(mig_enabled=True, mig_instances=(part,)),)))

    assert status.moved(with_free(5 * GIB), with_free(4 * GIB)) == "free memory"
    assert with_free(4 * GIB).free_summary == "4Gi"


@given(passes=st.lists(st.floats(13.5, 16.5), min_size=1, max_size=600))
def test_a_quiet_node_writes_no_more_often_than_its_heartbeat(passes: list[float]) -> None:
    schedule, quiet = Schedule(15, 120), build()
    now, writes = 0.0, []
    for seconds in passes:
        now += seconds
        if schedule.cause(quiet, now):
            writes.append(now)
            schedule.wrote(quiet, now)
    gaps = [later - earlier for earlier, later in itertools.pairwise(writes)]
    assert all(120 <= gap <= 120 + 16.5 for gap in gaps)
    assert len(writes) <= 1 + now / 120


def test_a_change_is_written_at_once_and_failures_back_off_up_to_the_heartbeat() -> None:
    schedule, quiet = Schedule(15, 120), build()
    busy = build(Reading(devices=(device(),)))
    schedule.wrote(quiet, 0)
    assert schedule.cause(busy, 15) == "conditions"
    waits, now = [], 15.0
    for _ in range(8):
        schedule.failed(now)
        start = now
        while schedule.cause(busy, now) is None:
            now += 1
        waits.append(now - start)
    assert waits == sorted(waits[:4]) + waits[4:]
    assert 13 <= waits[0] <= 18
    assert all(107 <= wait <= 133 for wait in waits[4:])


@given(
    names=st.lists(st.text(string.printable, max_size=128), max_size=64),
    total=st.integers(0, 2**45),
    capability=st.none() | st.tuples(st.integers(1, 30), st.integers(0, 20)),
)
def test_any_hardware_yields_a_status_within_its_limits(
    names: list[str], total: int, capability: tuple[int, int] | None
) -> None:
    text = ".".join(map(str, capability)) if capability else None
    devices = tuple(
        device(text, free=total // 2, uuid=f"GPU-{index}", name=name, total_memory=total)
        for index, name in enumerate(names)
    )
    built = build(Reading(devices=devices))
    assert FedPipeNodeStatus.model_validate(built.to_dict()) == built
