# SPDX-License-Identifier: Apache-2.0
from itertools import islice
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from peft.tuners.adalora.layer import RankAllocator

from agent_fixtures import registered, save_tiny_model
from fedpipe_agent.train import importance, loop
from fedpipe_agent.train import model as base
from fedpipe_agent.train.data import Samples, step_order
from fedpipe_agent.train.device import Device
from fedpipe_agent.train.importance import Increment, measure
from fedpipe_agent.train.loop import Settings
from fedpipe_agent.train.model import Source
from fedpipe_agent.train.shape import read_shape
from fedpipe_agent.train.tokenization import Sample
from fedpipe_api import wire
from fedpipe_api.job import Precision, Task
from fedpipe_api.node import Capacity

CPU = torch.device("cpu")
TASK = Task.SEQUENCE_CLASSIFICATION


class Triplets(torch.nn.Module):
    """The tensors of an increment under the names that peft's allocator looks for."""

    def __init__(self, increment):
        super().__init__()
        self.lora_A = torch.nn.ParameterDict({"x": torch.nn.Parameter(increment.q.detach().clone())})
        self.lora_E = torch.nn.ParameterDict(
            {"x": torch.nn.Parameter(increment.diagonal.detach()[:, None].clone())}
        )
        self.lora_B = torch.nn.ParameterDict({"x": torch.nn.Parameter(increment.p.detach().clone())})


def test_scores_agree_with_pefts_allocator():
    """The allocator's triplet scores, summed over the triplets, on the same weights and gradients."""
    random = np.random.default_rng(0)
    increment = Increment(wire.MatrixShape(name="m", rows=12, columns=10), 0, CPU)
    triplets = Triplets(increment)
    rank = importance.RANK
    settings = SimpleNamespace(beta1=0.85, beta2=0.85, target_r=1)
    allocator = RankAllocator(triplets, settings, "x")
    pairs = [
        (increment.p, triplets.lora_B["x"]),
        (increment.q, triplets.lora_A["x"]),
        (increment.diagonal, triplets.lora_E["x"]),
    ]
    for _ in range(6):
        for own, theirs in pairs:
            value = torch.from_numpy(random.normal(size=tuple(own.shape)).astype(np.float32))
            own.grad = torch.from_numpy(random.normal(size=tuple(own.shape)).astype(np.float32))
            own.data.copy_(value)
            theirs.data.copy_(value.view_as(theirs))
            theirs.grad = own.grad.view_as(theirs).clone()
        increment.update()
        allocator.update_ipt(triplets)
    scores = {name: allocator._element_score(f"lora_{name}.x") for name in "AEB"}
    per_triplet = allocator._combine_ipt(
        scores["E"], torch.cat([scores["A"].mean(1, keepdim=True), scores["B"].mean(0).view(-1, 1)], dim=1)
    )
    assert len(per_triplet) == rank
    assert increment.score() == pytest.approx(per_triplet.sum().item(), rel=1e-5)


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    return Source(str(save_tiny_model("bert", tmp_path_factory.mktemp("bert"))))


def prepared(source, precision=Precision.FP32):
    config = base.read_config(source, registered(TASK).model, 0)
    shape = read_shape(config, TASK)
    model = base.load(source, config, TASK, precision, CPU, seed=7)
    return model, shape


def some_samples():
    random = np.random.default_rng(1)
    tokens = [random.integers(4, 20, random.integers(3, 15)).tolist() for _ in range(24)]
    labels = random.integers(0, 3, 24).tolist()
    return Samples([Sample(each, label=label) for each, label in zip(tokens, labels, strict=True)], TASK, 0)


def scores_of(model, shape, samples, steps=4, micro_batch=8):
    return measure(
        model,
        matrices=shape.matrices,
        samples=samples,
        order=step_order(samples, 8, 0),
        settings=Settings(steps, micro_batch, 8 // micro_batch, learning_rate=2e-2),
        device=Device(Capacity(threads=1)),
        seed=3,
        after=lambda _: None,
    )


def test_scores_agree_with_a_float64_reference(source):
    """The same training with dense increments in float64, and the formulas of METHOD §1 in numpy."""
    samples = some_samples()
    model, shape = prepared(source)
    found = scores_of(model, shape, samples)
    model, _ = prepared(source)
    model.double()
    model.classifier._forward_pre_hooks.clear()
    increments = {m.name: Increment(m, 3, CPU).double() for m in shape.matrices}
    originals = {name: model.get_submodule(name).weight.detach().clone() for name in increments}
    weights = [w for i in increments.values() for w in i.parameters()] + list(model.classifier.parameters())
    optimizer = torch.optim.AdamW(weights, lr=2e-2, weight_decay=0.0)
    state = {}
    for chosen in islice(step_order(samples, 8, 0), 4):
        dense = {
            f"{name}.weight": originals[name] + i.p @ torch.diag(i.diagonal) @ i.q
            for name, i in increments.items()
        }
        batch = samples.batch(chosen, CPU)
        logits = torch.func.functional_call(model, dense, kwargs=batch.inputs).logits
        loss = torch.nn.functional.cross_entropy(logits.double(), batch.labels)
        norms = [
            torch.linalg.matrix_norm(gram - torch.eye(importance.RANK, dtype=torch.float64))
            for i in increments.values()
            for gram in (i.p.T @ i.p, i.q @ i.q.T)
        ]
        optimizer.zero_grad()
        loss.backward(retain_graph=True)
        for name, increment in increments.items():
            for part, weight in increment.named_parameters():
                w, g = weight.detach().numpy(), weight.grad.numpy()
                mean, spread = state.get((name, part), (0.0, 0.0))
                mean = 0.85 * mean + 0.15 * np.abs(w * g)
                spread = 0.85 * spread + 0.15 * np.abs(np.abs(w * g) - mean)
                state[name, part] = mean, spread
        (0.5 * torch.stack(norms).mean()).backward()
        torch.nn.utils.clip_grad_norm_(weights, 1.0)
        optimizer.step()
    for name in increments:
        s = {part: np.prod(state[name, part], axis=0) for part in ("p", "q", "diagonal")}
        expected = sum(
            s["diagonal"][i] + s["p"][:, i].mean() + s["q"][i].mean() for i in range(importance.RANK)
        )
        assert found[name] == pytest.approx(expected, rel=2e-2)


@pytest.mark.parametrize("precision", list(Precision))
def test_scores_repeat_and_leave_the_model_as_it_was(source, precision):
    samples = some_samples()
    found = []
    for micro_batch in (8, 8, 4):
        model, shape = prepared(source, precision)
        before = {n: p.detach().clone() for n, p in model.named_parameters() if not p.requires_grad}
        found.append(scores_of(model, shape, samples, micro_batch=micro_batch))
        assert all(torch.equal(p, before[n]) for n, p in model.named_parameters() if n in before)
        assert all(not module._forward_hooks for module in model.modules())
    assert found[0] == found[1]
    assert found[0].keys() == {matrix.name for matrix in shape.matrices}
    assert all(np.isfinite(score) and score >= 0 for score in found[0].values())
    if precision is Precision.FP32:
        assert found[2] == pytest.approx(found[0], rel=1e-2)


def test_a_fresh_increment_changes_nothing(source):
    model, shape = prepared(source)
    samples = some_samples()
    batch = samples.batch(np.arange(4), CPU)
    expected = loop.losses(model, batch)[1]
    increment = Increment(shape.matrices[0], 0, CPU)
    model.get_submodule(shape.matrices[0].name).register_forward_hook(increment.add)
    torch.testing.assert_close(loop.losses(model, batch)[1], expected)
