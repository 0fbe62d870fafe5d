# SPDX-License-Identifier: Apache-2.0
"""A precision and an aggregation method that only this module knows, in a whole job with real agents."""

import asyncio
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from safetensors.numpy import load_file

from agent_fixtures import LABELS, save_tiny_model, write_rows
from fedpipe_agent import kernels
from fedpipe_agent.train.precisions import IMPLEMENTATIONS, Implementation
from fedpipe_api.job import FedPipeJob
from fedpipe_api.lora.format import LORA_A, Encoding
from fedpipe_api.lora.methods import Method, Start
from fedpipe_api.node import Capacity
from fedpipe_api.precisions import Precision
from fedpipe_api.wire import KernelResult
from fedpipe_operator.aggregate.methods import RULES
from fedpipe_operator.coordinator import application
from fedpipe_operator.engine import Engine
from fedpipe_operator.engine.state import JobState
from fedpipe_operator.engine.worker import Worker
from fedpipe_operator.serving import listen, serve
from standins.server import UID, identify, job

NODES = ("node-0", "node-1")


class Direct(Worker):
    """Computes in a thread: another process would not know what is registered here."""

    def start(self) -> None:
        """Nothing to start."""

    def stop(self) -> None:
        """Nothing to end."""

    async def run(self, namespace: str, call: Any, *args: Any, **kwargs: Any) -> Any:
        """Return what the call returns."""
        return await asyncio.to_thread(call, *args, **kwargs)


def train(directory: Path, node: str, url: str, model: Path, kernel: list[KernelResult]) -> None:
    """Work on the job as a node's agent."""
    from fedpipe_agent.train.agent import Agent
    from fedpipe_agent.train.device import Device
    from fedpipe_agent.train.model import Source
    from fedpipe_agent.train.site import Site
    from fedpipe_agent.transport import Transport

    data, work = directory / node, directory / f"{node}-work"
    data.mkdir()
    (work / "blobs").mkdir(parents=True)
    write_rows(data / "train.jsonl", 20, seed=int(node[-1]))
    (data / "token").write_text(f"token-{node}")
    transport = Transport(url, data / "token", work / "blobs", give_up=30)
    device = Device(Capacity(threads=1))
    agent = Agent(transport.job(), Source(str(model)), transport, device, work)
    agent.prepare(data, Site(transport.job(), str(model), data / "token"))
    agent.run(tuple(kernel))


async def run_job(
    directory: Path, submitted: FedPipeJob, kernel: list[KernelResult]
) -> tuple[JobState, Path]:
    """Run a job to its end; return its state and the file of its global adapter."""
    model = save_tiny_model("bert", directory / "model")
    engine = Engine(directory / "store")
    engine._worker = engine._driver._worker = engine.integrity._worker = Direct()
    await engine.start()
    socket = listen("127.0.0.1", 0)
    site = await serve(application(engine, identify), socket, shutdown_timeout=1)
    try:
        await engine.submit(submitted)
        await engine.set_eligible_nodes(UID, NODES)
        url = f"http://127.0.0.1:{socket.getsockname()[1]}"
        async with asyncio.TaskGroup() as agents:
            for node in NODES:
                agents.create_task(asyncio.to_thread(train, directory, node, url, model, kernel))
        state = engine.jobs[UID].state
        assert state.finished
        assert state.adapter
        return state, engine.blobs.path(state.adapter.digest)
    finally:
        await site.close()
        await engine.stop()


@pytest.fixture(autouse=True)
def one_load_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    """Agents are processes, here they are threads: transformers replaces functions of its own while it loads.

    What two loads replace and put back at once stays replaced, for all tests that come after.
    """
    from fedpipe_agent.train import model, shape

    turn = threading.Lock()

    def in_turn(load: Callable[..., Any]) -> Callable[..., Any]:
        def loaded(*args: Any, **options: Any) -> Any:
            with turn:
                return load(*args, **options)

        return loaded

    for name in ("loading", "empty"):
        load = in_turn(getattr(model, name))
        monkeypatch.setattr(model, name, load)
        monkeypatch.setattr(shape, name, load)


@pytest.fixture
def toys(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Register a precision and a method; return the matrices that the method's rule has aggregated."""
    monkeypatch.setattr(Precision, "known", dict(Precision.known))
    monkeypatch.setattr(Method, "known", dict(Method.known))
    precision = Precision("toy", weight_bytes=4.0, tolerance=1e-3, worth=0.5, computes_in="float32")
    method = Method("toy-sum", Start.TRUNCATE, download=Encoding.INT8)
    seen: list[str] = []

    def rule(matrix: Any) -> Any:
        seen.append(matrix.name)
        return RULES[Method.EXACT](matrix)

    monkeypatch.setitem(IMPLEMENTATIONS, precision, Implementation(IMPLEMENTATIONS[Precision.FP32].layer))
    monkeypatch.setitem(RULES, method, rule)
    return seen


def of(method: str, quantization: str) -> FedPipeJob:
    """Two rounds of both nodes."""
    return job(
        2,
        2,
        method,
        model={"hostPath": {"path": "/model"}, "task": "sequence-classification", "labels": list(LABELS)},
        data={"volume": {"hostPath": {"path": "/data"}}, "train": "train.jsonl", "maxLength": 16},
        quantization=quantization,
    )


async def test_a_method_and_a_precision_of_elsewhere(toys: list[str], tmp_path: Path) -> None:
    kernel = await asyncio.to_thread(kernels.run, Precision.of("toy"))
    assert kernel.usable
    assert kernel.precision is Precision.of("toy")

    state, adapter = await run_job(tmp_path, of("toy-sum", "toy"), [kernel])

    assert state.done == 2
    assert state.plan
    assert {plan.precision for plan in state.plan.nodes.values()} == {"toy"}
    assert {evaluation.precision for evaluation in state.evaluations[2].values()} == {"toy"}
    matrices = {name.removesuffix(LORA_A) for name in load_file(adapter) if name.endswith(LORA_A)}
    assert matrices == set(toys)
    # What nodes download has the encoding that the method's record names.
    sent = state.sent_after(2)
    assert sent
    assert {
        str(t.dtype)
        for n, t in load_file(adapter.parents[1] / sent.digest[:2] / sent.digest).items()
        if n.endswith(LORA_A)
    } == {"int8"}


def test_transformers_is_as_it_was() -> None:
    from transformers import PreTrainedModel

    assert PreTrainedModel.tie_weights.__qualname__ == "PreTrainedModel.tie_weights"
    assert PreTrainedModel.init_weights.__qualname__ == "PreTrainedModel.init_weights"
