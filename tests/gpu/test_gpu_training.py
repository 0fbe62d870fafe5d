# SPDX-License-Identifier: Apache-2.0
"""The trainer on a real GPU: every precision, and the memory it is given, reports and keeps to."""

from collections.abc import Iterator

import pytest
import torch

from agent_fixtures import save_tiny_model
from fedpipe_agent import kernels
from fedpipe_agent.train.device import RESERVE, Device, is_out_of_memory
from fedpipe_agent.train.loop import Settings, evaluate, train
from fedpipe_agent.train.model import Source
from fedpipe_api.job import Precision, Task
from fedpipe_api.node import Capacity
from unit.test_agent_loop import KIND, prepared, samples_of, step_order

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA GPU"),
]

GIB = 2**30


@pytest.fixture(scope="module")
def sources(tmp_path_factory: pytest.TempPathFactory) -> dict[Task, Source]:
    return {
        task: Source(str(save_tiny_model(kind, tmp_path_factory.mktemp(kind)))) for task, kind in KIND.items()
    }


@pytest.fixture
def two_gib() -> Iterator[Device]:
    """A device that is declared to have 2 GiB."""
    device = Device(Capacity(device="small board", memory="2Gi"))
    yield device
    torch.cuda.set_per_process_memory_fraction(1.0)
    device.reset_peak()


def test_every_precision_runs_on_the_gpu() -> None:
    results = kernels.check()
    assert all(result.usable for result in results), results


@pytest.mark.parametrize("precision", list(Precision))
@pytest.mark.parametrize("task", Task)
def test_training_learns_on_the_gpu(sources, tmp_path, task, precision) -> None:
    device = Device(Capacity())
    samples = samples_of(task, 8)
    model = prepared(sources, task, tmp_path, precision, "cuda")
    before = evaluate(model, samples, 4, device, after=lambda _: None)
    settings = Settings(steps=15, micro_batch=4, accumulation=2, learning_rate=3e-2)
    outcome = train(model, samples, step_order(samples, 8, 0), settings, device)
    assert evaluate(model, samples, 4, device, after=lambda _: None).loss < 0.9 * before.loss
    assert outcome.peak_bytes > device.facts(()).overhead / 2


def test_the_facts_are_the_gpu_s_within_the_declared_memory(two_gib: Device) -> None:
    facts = two_gib.facts(())
    properties = torch.cuda.get_device_properties(0)
    assert (facts.kind, facts.name) == ("cuda", properties.name)
    assert facts.compute_capability == f"{properties.major}.{properties.minor}"
    assert str(properties.uuid) in (facts.uuid or "")
    assert RESERVE <= facts.overhead < facts.free_memory == 2 * GIB


def test_a_second_device_tells_the_same_context() -> None:
    """Also where the context is there already, if NVML lists this process."""
    first, second = (Device(Capacity()).used() for _ in range(2))
    if second == RESERVE + torch.cuda.memory_allocated():
        pytest.skip("NVML does not list this process: a PID namespace of its own")
    assert second == pytest.approx(first, rel=0.05)


def test_more_than_the_declared_memory_is_refused(two_gib: Device) -> None:
    held = torch.empty(GIB // 2, dtype=torch.uint8, device="cuda")
    with pytest.raises(RuntimeError) as refused:
        torch.empty(2 * GIB - held.numel(), dtype=torch.uint8, device="cuda")
    assert is_out_of_memory(refused.value)
    assert two_gib.peak() <= 2 * GIB
