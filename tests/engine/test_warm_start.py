# SPDX-License-Identifier: Apache-2.0
"""Jobs that start from an adapter: of a PEFT directory, or of another job of the same namespace."""

import json

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from fedpipe_api.job import FedPipeJob, Phase
from fedpipe_api.lora.format import LORA_A, LORA_B
from fedpipe_operator.coordinator import Identity, application
from fedpipe_operator.engine import Engine
from fedpipe_operator.serving import listen, serve
from standins.agents import StandIn, model_shape
from standins.local import working
from standins.server import UID, identify, job

SHAPE = model_shape()


def peft_directory(path, rank=3):
    """Write a PEFT adapter of the stand-ins' model."""
    random = np.random.default_rng(0)
    tensors = {}
    for matrix in SHAPE.matrices:
        name = f"base_model.model.{matrix.name}"
        tensors[f"{name}.lora_A.weight"] = random.normal(size=(rank, matrix.columns)).astype(np.float32)
        tensors[f"{name}.lora_B.weight"] = random.normal(size=(matrix.rows, rank)).astype(np.float32)
    path.mkdir()
    config = {"peft_type": "LORA", "r": rank, "lora_alpha": 2 * rank, "bias": "none"}
    (path / "adapter_config.json").write_text(json.dumps(config))
    save_file(tensors, path / "adapter_model.safetensors")
    return path


class Served:
    """An engine with its coordinator; `start` takes it up again."""

    def __init__(self, directory, *, reads_paths=True):
        self.directory, self.reads_paths = directory, reads_paths

    async def __aenter__(self):
        self.engine = Engine(self.directory, reads_paths=self.reads_paths)
        await self.engine.start()
        self.site = await serve(
            application(self.engine, self.identify), listen("127.0.0.1", 0), shutdown_timeout=1
        )
        return self

    async def __aexit__(self, *_):
        await self.site.close()
        await self.engine.stop()

    @staticmethod
    async def identify(token):
        """Tokens are token-NODE of the first job, UID/NODE of any other."""
        uid, _, node = token.partition("/")
        return Identity(uid, node) if node else await identify(token)

    async def submit(self, given, uid=UID, name="test", **spec):
        document = job(1, 2, adapter={"ranks": {"min": 2, "max": 4}} | given, **spec).to_dict()
        document["metadata"] |= {"uid": uid, "name": name}
        await self.engine.submit(FedPipeJob.model_validate(document))
        await self.engine.set_eligible_nodes(uid, ["node-0"])

    def agent(self, uid=UID):
        return StandIn("node-0", f"{uid}/node-0", lambda: f"http://127.0.0.1:{self.site.port}", SHAPE)

    async def finish(self, uid=UID):
        async with working([self.agent(uid)]):
            while not self.engine.jobs[uid].state.finished:
                await self.engine.moved(uid, 1)
        return self.engine.jobs[uid].state


def stored(engine, blob):
    return load_file(engine.blobs.path(blob.digest))


def product(tensors, name):
    return tensors[name + LORA_B] @ tensors[name + LORA_A]


async def test_round_1_starts_from_a_peft_directory(tmp_path):
    given = peft_directory(tmp_path / "given")
    async with Served(tmp_path / "store") as served:
        await served.submit({"from": {"path": str(given)}})
        agent = served.agent()
        async with working([agent]):
            while not served.engine.jobs[UID].state.rounds:
                await served.engine.moved(UID, 1)
            state = served.engine.jobs[UID].state
            begun = stored(served.engine, state.given)
        plain = load_file(given / "adapter_model.safetensors")
        for matrix in SHAPE.matrices:
            name = f"base_model.model.{matrix.name}"
            wanted = 2 * plain[f"{name}.lora_B.weight"] @ plain[f"{name}.lora_A.weight"]
            np.testing.assert_allclose(product(begun, matrix.name), wanted, atol=1e-5)
    # A restart finds it in the store; the directory is not read again.
    (given / "adapter_config.json").unlink()
    async with Served(tmp_path / "store") as served:
        state = await served.finish()
        assert state.finished.phase is Phase.SUCCEEDED, state.finished
        assert set(state.evaluations) == {0, 1, 2}, "what was given is evaluated"
        assert not served.engine.blobs.path(state.given.digest).exists(), "nothing needs it any more"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda path: (path / "adapter_model.safetensors").unlink(), "spec.adapter.from: no file "),
        (
            lambda path: (path / "adapter_config.json").write_text('{"peft_type": "IA3"}'),
            "peft_type is not LORA",
        ),
    ],
)
async def test_what_does_not_fit_ends_the_job_with_one_line(change, message, tmp_path):
    given = peft_directory(tmp_path / "given")
    change(given)
    async with Served(tmp_path / "store") as served:
        await served.submit({"from": {"path": str(given)}})
        state = await served.finish()
        assert (state.finished.phase, state.finished.reason) == (Phase.FAILED, "Invalid")
        assert message in state.finished.message
        assert not list(served.engine.blobs.temporary.iterdir())


async def test_a_cluster_reads_no_paths(tmp_path):
    given = peft_directory(tmp_path / "given")
    async with Served(tmp_path / "store", reads_paths=False) as served:
        await served.submit({"from": {"path": str(given)}})
        state = await served.finish()
        assert (
            state.finished.message == "spec.adapter.from.path: is of `fedpipe run`; in a cluster name a job"
        )


async def test_a_job_goes_on_from_another(tmp_path):
    async with Served(tmp_path / "store") as served:
        await served.submit({})
        first = await served.finish()
        await served.submit({"from": {"job": "test"}}, uid="job-2", name="more")
        async with working([served.agent("job-2")]):
            while not served.engine.jobs["job-2"].state.rounds:
                await served.engine.moved("job-2", 1)
        assert served.engine.jobs["job-2"].state.given == first.adapter
        # The first may go: its adapter stays as long as the second needs it.
        await served.engine.delete(UID)
        assert served.engine.blobs.intact(first.adapter.digest)
        second = await served.finish("job-2")
        assert second.finished.phase is Phase.SUCCEEDED


@pytest.mark.parametrize(
    ("name", "spec", "message"),
    [
        ("none", {}, "none: no such job in namespace default"),
        ("more", {}, "more: no such job in namespace default"),
        ("test", {"aggregation": {"maxGlobalRank": 8}}, "spec.aggregation.maxGlobalRank must be at least 32"),
        (
            "test",
            {
                "model": {
                    "hostPath": {"path": "/m"}, "task": "sequence-classification", "labels": ["c", "b", "a"],
                }
            },
            "another spec.model.labels",
        ),
    ],
)  # fmt: skip
async def test_a_job_that_cannot_be_continued_is_named(name, spec, message, tmp_path):
    async with Served(tmp_path / "store") as served:
        await served.submit({})
        await served.finish()
        await served.submit({"from": {"job": name}}, uid="job-2", name="more", **spec)
        state = await served.finish("job-2")
        assert state.finished.phase is Phase.FAILED
        assert state.finished.message.startswith(f"spec.adapter.from.job: {name}: ")
        assert message in state.finished.message
