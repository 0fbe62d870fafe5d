# SPDX-License-Identifier: Apache-2.0
"""Tiny models, their data and a small coordinator for the agent's tests."""

import asyncio
import hashlib
import json
import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from aiohttp import web

from fedpipe_api import wire
from fedpipe_api.job import (
    Adapter,
    DataSource,
    HostPath,
    ModelSource,
    Optimizer,
    Selection,
    Task,
    Volume,
)
from fedpipe_api.lora.format import HEAD, LORA_A, LORA_B

WORDS = [
    *("alpha", "beta", "gamma", "delta", "eat", "drink", "run", "walk"),
    *("red", "green", "blue", "one", "two", "three", "cat", "dog"),
]
SPECIAL = ["[PAD]", "[UNK]", "[CLS]", "[SEP]"]
LABELS = ("animal", "colour", "other")
END = 3
KINDS = ("bert", "gpt2", "llama")


def save_tiny_model(kind: str, path: Path) -> Path:
    """Write a two-layer model of the kind with random weights and a word-level tokenizer."""
    import torch
    from tokenizers import Tokenizer, models, pre_tokenizers, processors
    from transformers import (
        BertConfig,
        BertModel,
        GPT2Config,
        GPT2LMHeadModel,
        LlamaConfig,
        LlamaForCausalLM,
        PreTrainedTokenizerFast,
    )

    vocabulary = {word: index for index, word in enumerate([*SPECIAL, *WORDS])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    if kind == "bert":
        tokenizer.post_processor = processors.TemplateProcessing(
            single="[CLS] $A [SEP]", special_tokens=[("[CLS]", 2), ("[SEP]", 3)]
        )
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="[PAD]", unk_token="[UNK]", sep_token="[SEP]", eos_token="[SEP]"
    ).save_pretrained(path)
    torch.manual_seed(0)
    size = len(vocabulary)
    if kind == "bert":
        model: Any = BertModel(
            BertConfig(
                vocab_size=size,
                hidden_size=32,
                num_hidden_layers=2,
                num_attention_heads=2,
                intermediate_size=64,
                max_position_embeddings=64,
                initializer_range=0.1,
            )
        )
    elif kind == "gpt2":
        model = GPT2LMHeadModel(
            GPT2Config(
                vocab_size=size,
                n_embd=32,
                n_layer=2,
                n_head=2,
                n_positions=64,
                bos_token_id=END,
                eos_token_id=END,
                initializer_range=0.1,
            )
        )
    else:
        model = LlamaForCausalLM(
            LlamaConfig(
                vocab_size=size,
                hidden_size=32,
                num_hidden_layers=2,
                num_attention_heads=4,
                num_key_value_heads=2,
                intermediate_size=64,
                max_position_embeddings=64,
                initializer_range=0.1,
            )
        )
    model.save_pretrained(path)
    return path


def registered(
    task: Task = Task.SEQUENCE_CLASSIFICATION, train: str = "train.jsonl", **data: Any
) -> wire.AgentConfig:
    """Return job facts for the tiny models."""
    classes = task is Task.SEQUENCE_CLASSIFICATION
    return wire.AgentConfig(
        job="tickets",
        node="edge-1",
        model=ModelSource(
            host_path=HostPath(path="/models/base"), task=task, labels=LABELS if classes else ()
        ),
        data=DataSource(volume=Volume(host_path=HostPath(path="/data")), train=train, max_length=16, **data),
        optimizer=Optimizer(learning_rate=1e-2),
        adapter=Adapter(selection=Selection(warmup_steps=3)),
        seed=7,
    )


def write_rows(path: Path, count: int = 24, seed: int = 0) -> Path:
    """Write labelled text rows whose label shows in the words."""
    random = np.random.default_rng(seed)
    kinds = {"animal": ["cat", "dog"], "colour": ["red", "green", "blue"], "other": ["one", "two", "three"]}
    with path.open("w", encoding="utf-8") as file:
        for _ in range(count):
            label = LABELS[random.integers(3)]
            words = [*random.choice(WORDS, random.integers(1, 9)), *random.choice(kinds[label], 3)]
            file.write(json.dumps({"text": " ".join(words), "label": label}) + "\n")
    return path


def sample_of(tokens: list[int], mark: int, task: Task) -> Any:
    """Return a sample of class `mark`, or with so many tokens of a prompt."""
    from fedpipe_agent.train.tokenization import Sample

    if task is Task.SEQUENCE_CLASSIFICATION:
        return Sample(tokens, label=mark)
    return Sample(tokens, [place >= mark for place in range(len(tokens))])


def global_adapter(
    shape: wire.ModelShape, rank: int, seed: int = 0, share: float = 1.0
) -> dict[str, np.ndarray]:
    """Return a global adapter of a share of the matrices as aggregation leaves it."""
    random = np.random.default_rng(seed)
    tensors: dict[str, np.ndarray] = {}
    for matrix in shape.matrices[: max(1, round(share * len(shape.matrices)))]:
        left = np.linalg.qr(random.normal(size=(matrix.rows, rank)))[0]
        right = np.linalg.qr(random.normal(size=(matrix.columns, rank)))[0]
        values = np.sort(random.uniform(0.5, 3, rank))[::-1]
        tensors[matrix.name + LORA_B] = (left * values).astype(np.float32)
        tensors[matrix.name + LORA_A] = right.T.astype(np.float32).copy()
    for tensor in shape.head:
        tensors[HEAD + tensor.name] = random.normal(size=tensor.shape).astype(np.float32)
    return tensors


@dataclass
class Coordinator:
    """A coordinator that hands out prepared assignments and keeps what agents send, over real HTTP.

    `faults` maps a path's second part (`blobs`, `rounds`) to functions that may answer in its place.
    """

    job: wire.AgentConfig
    assignments: list[wire.Assignment] = field(default_factory=list)
    blobs: dict[str, bytes] = field(default_factory=dict)
    wanted: bool = True
    registrations: list[wire.Registration] = field(default_factory=list)
    profiles: list[wire.ProfileReport] = field(default_factory=list)
    evaluations: list[wire.Evaluation] = field(default_factory=list)
    updates: list[tuple[wire.UpdateManifest, bytes]] = field(default_factory=list)
    progress: list[wire.Progress] = field(default_factory=list)
    requests: list[web.Request] = field(default_factory=list)
    faults: dict[str, list[Callable[[web.Request], Any]]] = field(default_factory=dict)
    url: str = ""

    def add(self, data: bytes) -> wire.Blob:
        """Keep a blob."""
        digest = hashlib.sha256(data).hexdigest()
        self.blobs[digest] = data
        return wire.Blob(digest=digest, size=len(data))

    def __enter__(self) -> "Coordinator":
        ready = threading.Event()
        self._loop = asyncio.new_event_loop()

        async def serve() -> None:
            app = web.Application(client_max_size=2**30, middlewares=[self._faulty])
            app.router.add_get("/v1/job", self._job)
            app.router.add_post("/v1/agents", self._register)
            app.router.add_get("/v1/assignment", self._assignment)
            app.router.add_get("/v1/blobs/{digest}", self._blob)
            app.router.add_post("/v1/profile", self._keep(self.profiles, wire.ProfileReport))
            app.router.add_post("/v1/rounds/{n}/evaluation", self._keep(self.evaluations, wire.Evaluation))
            app.router.add_put("/v1/rounds/{n}/update", self._update)
            app.router.add_post("/v1/progress", self._progress)
            self._runner = web.AppRunner(app, access_log=None)
            await self._runner.setup()
            site = web.TCPSite(self._runner, "127.0.0.1", 0)
            await site.start()
            self.url = f"http://127.0.0.1:{self._runner.addresses[0][1]}"

        def run() -> None:
            self._loop.run_until_complete(serve())
            # Not before the loop runs for good: a stop that comes earlier would be lost.
            self._loop.call_soon(ready.set)
            self._loop.run_forever()
            self._loop.run_until_complete(self._runner.cleanup())
            self._loop.close()

        self._thread = threading.Thread(target=run)
        self._thread.start()
        assert ready.wait(10)
        return self

    def __exit__(self, *_: object) -> None:
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()

    @web.middleware
    async def _faulty(self, request: web.Request, handler: Any) -> web.StreamResponse:
        self.requests.append(request)
        faults = self.faults.get(request.path.split("/")[2], [])
        if faults:
            answer = faults.pop(0)(request)
            answer = await answer if asyncio.iscoroutine(answer) else answer
            if answer is not None:
                return answer
        return await handler(request)

    async def _job(self, _: web.Request) -> web.Response:
        return _json(self.job)

    async def _register(self, request: web.Request) -> web.Response:
        self.registrations.append(wire.Registration.model_validate_json(await request.read()))
        return _json(self.job)

    async def _assignment(self, request: web.Request) -> web.Response:
        if self.assignments:
            return _json(self.assignments.pop(0))
        await asyncio.sleep(min(float(request.query["wait"]), 0.2))
        return web.Response(status=204)

    async def _blob(self, request: web.Request) -> web.Response:
        data = self.blobs[request.match_info["digest"]]
        start = request.http_range.start or 0
        headers = {"Content-Range": f"bytes {start}-{len(data) - 1}/{len(data)}"}
        return web.Response(body=data[start:], status=206, headers=headers)

    async def _update(self, request: web.Request) -> web.Response:
        manifest = wire.UpdateManifest.model_validate_json(request.headers[wire.MANIFEST_HEADER])
        self.updates.append((manifest, await request.read()))
        return web.Response()

    async def _progress(self, request: web.Request) -> web.Response:
        self.progress.append(wire.Progress.model_validate_json(await request.read()))
        return _json(wire.Answer(wanted=self.wanted))

    def _keep(self, kept: list[Any], kind: Any) -> Any:
        async def handler(request: web.Request) -> web.Response:
            kept.append(kind.model_validate_json(await request.read()))
            return web.Response()

        return handler


def _json(message: Any) -> web.Response:
    return web.Response(text=message.to_json(), content_type="application/json")


def refusal(status: int, reason: str = "Refused", error: str = "no") -> web.Response:
    """Return a refusal as the coordinator words it."""
    return web.Response(status=status, text=wire.Refusal(reason=reason, error=error).to_json())
