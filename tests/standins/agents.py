# SPDX-License-Identifier: Apache-2.0
"""Agents that speak the real protocol over real HTTP; updates follow from (node, round), not training."""

import asyncio
import hashlib
import io
import ssl
from collections.abc import Callable
from dataclasses import dataclass, field

import aiohttp
import numpy as np
from safetensors.numpy import save

from fedpipe_api.lora.format import HEAD, LORA_A, LORA_B
from fedpipe_api.wire import (
    MANIFEST_HEADER,
    Assignment,
    AssignmentKind,
    Blob,
    DeviceFacts,
    Evaluation,
    KernelResult,
    MatrixShape,
    ModelShape,
    NodePlan,
    Precision,
    ProfileReport,
    Registration,
    TensorShape,
    UpdateManifest,
)


def model_shape(matrices: int = 4, rows: int = 16, columns: int = 12) -> ModelShape:
    """A BERT-shaped model with the given number of candidate matrices."""
    return ModelShape(
        architecture="bert",
        layers=max(1, matrices // 4),
        hidden=columns,
        heads=2,
        key_value_heads=2,
        intermediate=2 * columns,
        vocabulary=100,
        causal=False,
        parameters=matrices * rows * columns + 1000,
        linear_parameters=matrices * rows * columns,
        matrices=tuple(
            MatrixShape(name=f"encoder.{i}.query", rows=rows, columns=columns) for i in range(matrices)
        ),
        head=(TensorShape(name="classifier.weight", shape=(3, columns)),),
    )


def registration(shape: ModelShape, samples: int = 100, free_memory: int = 4 << 30) -> Registration:
    """A CPU node with all precisions."""
    kernels = tuple(KernelResult(precision=p, usable=True, seconds=0.01) for p in Precision)
    device = DeviceFacts(
        kind="cpu",
        name="stand-in",
        free_memory=free_memory,
        overhead=400 << 20,
        threads=1,
        speed=1.0,
        kernels=kernels,
    )
    return Registration(version="test", device=device, model=shape, samples=samples, evaluation_samples=10)


def make_update(shape: ModelShape, plan: NodePlan, node: str, round_number: int) -> bytes:
    """Return a small random safetensors update that depends on nothing but its arguments."""
    seed = int.from_bytes(hashlib.sha256(f"{node}/{round_number}".encode()).digest()[:8], "big")
    random = np.random.default_rng(seed)
    tensors: dict[str, np.ndarray] = {}
    for matrix in shape.matrices:
        rank = plan.ranks.get(matrix.name, 0)
        if rank:
            tensors[matrix.name + LORA_B] = 0.1 * random.standard_normal(
                (matrix.rows, rank), dtype=np.float32
            )
            tensors[matrix.name + LORA_A] = random.standard_normal((rank, matrix.columns), dtype=np.float32)
    for tensor in shape.head:
        tensors[HEAD + tensor.name] = random.standard_normal(tensor.shape, dtype=np.float32)
    return save(tensors)


def manifest_of(
    body: bytes, plan: NodePlan, round_number: int = 1, adapter: Blob | None = None, *, samples: int = 100
) -> UpdateManifest:
    """Return a truthful manifest of an update that started from the given adapter."""
    return UpdateManifest(
        round=round_number,
        adapter=adapter.digest if adapter else None,
        digest=hashlib.sha256(body).hexdigest(),
        size=len(body),
        samples=samples,
        steps=plan.local_steps,
        planned_steps=plan.local_steps,
        micro_batch=plan.micro_batch,
        train_loss=1.0,
        step_seconds=0.01,
        peak_bytes=1 << 28,
        tokens=100,
    )


@dataclass
class StandIn:
    """One agent; `address` may change while it runs (the coordinator is restarted elsewhere)."""

    node: str
    token: str
    address: Callable[[], str]
    shape: ModelShape = field(default_factory=model_shape)
    samples: int = 100
    free_memory: int = 4 << 30
    answered: dict[int, str] = field(default_factory=dict)
    """Digest of each update that was answered with success: these must not be lost."""
    context: ssl.SSLContext | None = None
    """For https."""

    async def run(self) -> None:
        """Work until stopped, retrying whatever fails."""
        headers = {"Authorization": f"Bearer {self.token}"}
        connector = aiohttp.TCPConnector(ssl=self.context or True)
        async with aiohttp.ClientSession(headers=headers, connector=connector) as session:
            self._session = session
            while True:
                try:
                    await self._register()
                    while True:
                        work = await self._work()
                        if work is not None and work.kind is AssignmentKind.STOP:
                            return
                except (aiohttp.ClientError, TimeoutError, ConnectionError):
                    await asyncio.sleep(0.05)

    async def _register(self) -> None:
        body = registration(self.shape, self.samples, self.free_memory)
        async with self._session.post(f"{self.address()}/v1/agents", data=body.to_json()) as response:
            response.raise_for_status()

    async def _work(self) -> Assignment | None:
        async with self._session.get(f"{self.address()}/v1/assignment?wait=10") as response:
            response.raise_for_status()
            if response.status == 204:
                return None
            work = Assignment.model_validate_json(await response.read())
        if work.adapter is not None:
            await self._download(work.adapter.digest)
        if work.kind is AssignmentKind.PROFILE:
            await self._profile(work)
        elif work.kind is AssignmentKind.TRAIN:
            if work.evaluate:
                await self._evaluate(work, work.round - 1)
            await self._train(work)
        elif work.kind is AssignmentKind.EVALUATE:
            await self._evaluate(work, work.round)
        return work

    async def _download(self, digest: str) -> None:
        async with self._session.get(f"{self.address()}/v1/blobs/{digest}") as response:
            response.raise_for_status()
            body = await response.read()
        assert hashlib.sha256(body).hexdigest() == digest

    async def _profile(self, work: Assignment) -> None:
        assert work.plan is not None
        scores = {m.name: 1.0 + i for i, m in enumerate(self.shape.matrices)} if work.importance else {}
        report = ProfileReport(
            step_seconds=0.01, peak_bytes=1 << 28, micro_batch=work.plan.micro_batch, scores=scores
        )
        async with self._session.post(f"{self.address()}/v1/profile", data=report.to_json()) as response:
            response.raise_for_status()

    async def _evaluate(self, work: Assignment, round_number: int) -> None:
        assert work.plan is not None
        body = Evaluation(
            round=round_number, samples=10, tokens=10, loss_sum=20.0 / (1 + round_number),
            correct=min(10, round_number), precision=work.plan.precision,
        )  # fmt: skip
        url = f"{self.address()}/v1/rounds/{round_number}/evaluation"
        async with self._session.post(url, data=body.to_json()) as response:
            if response.status != 409:  # the others were quicker and the round is history
                response.raise_for_status()

    async def _train(self, work: Assignment) -> None:
        assert work.plan is not None
        body = make_update(self.shape, work.plan, self.node, work.round)
        manifest = manifest_of(body, work.plan, work.round, work.adapter, samples=self.samples)
        url = f"{self.address()}/v1/rounds/{work.round}/update"
        headers = {MANIFEST_HEADER: manifest.to_json()}
        async with self._session.put(url, data=io.BytesIO(body), headers=headers) as response:
            if response.status == 409:
                return
            response.raise_for_status()
        self.answered[work.round] = manifest.digest
