# SPDX-License-Identifier: Apache-2.0
import gc
import math
import time
from collections import Counter
from itertools import islice

import numpy as np
import pytest
import torch
from torch.nn import functional

from agent_fixtures import registered, sample_of, save_tiny_model
from fedpipe_agent.errors import Failure
from fedpipe_agent.train import loop
from fedpipe_agent.train import model as base
from fedpipe_agent.train.adapters import Adapters
from fedpipe_agent.train.data import IGNORED, Samples, step_order
from fedpipe_agent.train.device import Device, is_out_of_memory
from fedpipe_agent.train.loop import MicroBatches, Settings, evaluate, train
from fedpipe_agent.train.model import Source
from fedpipe_agent.train.shape import read_shape
from fedpipe_api.job import Precision, Task
from fedpipe_api.lora.methods import Start
from fedpipe_api.node import Capacity

KIND = {Task.SEQUENCE_CLASSIFICATION: "bert", Task.CAUSAL_LM: "gpt2"}


@pytest.fixture(scope="module")
def sources(tmp_path_factory):
    return {
        task: Source(str(save_tiny_model(kind, tmp_path_factory.mktemp(kind)))) for task, kind in KIND.items()
    }


@pytest.fixture
def device():
    return Device(Capacity(threads=1))


def prepared(sources, task, tmp_path, precision=Precision.FP32, where="cpu"):
    config = base.read_config(sources[task], registered(task).model, 0)
    shape = read_shape(config, task)
    model = base.load(sources[task], config, task, precision, torch.device(where), seed=7)
    adapters = Adapters(model, shape, alpha=8, rs_lora=False, names=(7, "edge"), pristine=None)
    adapters.install(None, {matrix.name: 4 for matrix in shape.matrices}, Start.SPLIT, 1)
    return model


def samples_of(task, count=20, seed=0):
    random = np.random.default_rng(seed)
    tokens = [random.integers(4, 20, random.integers(3, 15)).tolist() for _ in range(count)]
    marks = [int(random.integers(3)) if task is Task.SEQUENCE_CLASSIFICATION else len(t) // 2 for t in tokens]
    return Samples([sample_of(*each, task) for each in zip(tokens, marks, strict=True)], task, 0)


def gradients(model):
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def trained(model):
    return [p for p in model.parameters() if p.requires_grad]


def assert_same(found, expected):
    assert found.keys() == expected.keys()
    for name in expected:
        torch.testing.assert_close(found[name], expected[name], atol=1e-6, rtol=1e-4)


@pytest.mark.parametrize("task", Task)
def test_gradients_are_those_of_the_mean_over_targets(sources, device, tmp_path, task):
    model, samples = prepared(sources, task, tmp_path), samples_of(task)
    chosen = np.arange(8)
    losses = []
    for index in chosen:
        tokens = torch.from_numpy(samples.tokens(index).astype(np.int64))[None]
        logits = model(input_ids=tokens).logits[0]
        if task is Task.CAUSAL_LM:
            mark = int(samples.predicted(index).argmax())
            losses.append(functional.cross_entropy(logits[mark - 1 : -1], tokens[0, mark:], reduction="none"))
        else:
            losses.append(
                functional.cross_entropy(
                    logits[None], torch.tensor([samples.classes[index]]), reduction="none"
                )
            )
    expected_loss = torch.cat(losses).mean()
    expected_loss.backward()
    expected = gradients(model)
    for size in (8, 3, 1):
        model.zero_grad()
        loss, tokens = MicroBatches(model, trained(model), samples, device, size).accumulate(chosen)
        assert loss == pytest.approx(expected_loss.item(), rel=1e-5)
        assert tokens == samples.lengths[chosen].sum()
        assert_same(gradients(model), expected)


def limited(model, largest, where):
    """Make the model run out of memory above a batch size, in forward or in the middle of backward."""

    def fail(*_):
        raise torch.OutOfMemoryError("out of memory")

    def hook(module, arguments, output):
        if len(output) > largest:
            if where == "forward":
                fail()
            output.register_hook(fail)

    model.get_submodule("bert.encoder.layer.0").register_forward_hook(hook)


@pytest.mark.parametrize("where", ["forward", "backward"])
def test_out_of_memory_halves_the_micro_batch_and_keeps_the_gradients(sources, device, tmp_path, where):
    task = Task.SEQUENCE_CLASSIFICATION
    model, samples = prepared(sources, task, tmp_path), samples_of(task)
    chosen = np.arange(16)
    MicroBatches(model, trained(model), samples, device, 16).accumulate(chosen)
    expected = gradients(model)
    model.zero_grad()
    limited(model, 5, where)
    work = MicroBatches(model, trained(model), samples, device, 16)
    work.accumulate(chosen)
    assert work.size == 4
    assert_same(gradients(model), expected)


def test_out_of_memory_with_one_sample_is_a_failure(sources, device, tmp_path):
    task = Task.SEQUENCE_CLASSIFICATION
    model = prepared(sources, task, tmp_path)
    limited(model, 0, "forward")
    with pytest.raises(Failure, match="micro-batch 1"):
        MicroBatches(model, trained(model), samples_of(task), device, 4).accumulate(np.arange(4))


@pytest.mark.parametrize("precision", [Precision.FP32, Precision.INT8])
def test_no_micro_batch_or_evaluated_batch_is_held_beside_the_next(sources, device, tmp_path, precision):
    task = Task.CAUSAL_LM
    model, samples = prepared(sources, task, tmp_path, precision), samples_of(task)
    held = []

    def look(*_):
        tensors = [found for found in gc.get_objects() if type(found) is torch.Tensor]
        held.append(
            [list(t.shape) for t in tensors if t.grad_fn is not None or t.shape[-1:] == (vocabulary,)]
        )

    vocabulary = model.config.vocab_size
    gc.collect()
    model.register_forward_pre_hook(look)
    MicroBatches(model, trained(model), samples, device, 2).accumulate(np.arange(8))
    evaluate(model, samples, 4, device, after=lambda _: None)
    assert held == [[]] * 7


@pytest.mark.parametrize("precision", list(Precision))
def test_after_a_step_memory_goes_back_unless_all_is_float32(sources, tmp_path, monkeypatch, precision):
    task = Task.CAUSAL_LM
    model, samples = prepared(sources, task, tmp_path, precision), samples_of(task)
    device, given = Device(Capacity(threads=1)), []
    monkeypatch.setattr(device, "give_back", lambda: given.append(True))
    work = MicroBatches(model, trained(model), samples, device, 2)
    for _ in range(3):
        work.accumulate(np.arange(4))
    assert len(given) == (0 if precision is Precision.FP32 else 3)


def test_a_passed_memory_budget_halves_the_micro_batch(sources, tmp_path):
    task = Task.SEQUENCE_CLASSIFICATION
    samples = samples_of(task)
    outcomes = []
    for memory in (None, "64Mi"):
        model = prepared(sources, task, tmp_path)
        settings = Settings(steps=3, micro_batch=8, accumulation=1, learning_rate=1e-2)
        order = step_order(samples, 8, 0)
        outcomes.append(train(model, samples, order, settings, Device(Capacity(threads=1, memory=memory))))
    assert [outcome.micro_batch for outcome in outcomes] == [8, 1]
    assert outcomes[0].loss == pytest.approx(outcomes[1].loss, rel=1e-4)


@pytest.mark.parametrize("precision", list(Precision))
@pytest.mark.parametrize("task", Task)
def test_training_learns_at_every_precision_and_repeats_exactly(sources, device, tmp_path, task, precision):
    samples = samples_of(task, 8)
    settings = Settings(steps=15, micro_batch=4, accumulation=2, learning_rate=3e-2)
    results = []
    for _ in range(2):
        model = prepared(sources, task, tmp_path, precision)
        before = evaluate(model, samples, 4, device, after=lambda _: None)
        steps = []
        outcome = train(model, samples, step_order(samples, 8, 0), settings, device, after=steps.append)
        after = evaluate(model, samples, 4, device, after=lambda _: None)
        assert after.loss < 0.9 * before.loss
        assert (outcome.steps, len(steps), outcome.micro_batch) == (15, 15, 4)
        assert outcome.tokens == 15 * samples.lengths.sum()
        results.append([p.detach().clone() for p in trained(model)])
    assert all(torch.equal(one, other) for one, other in zip(*results, strict=True))


def test_checkpointing_changes_no_gradient(sources, device, tmp_path):
    task = Task.CAUSAL_LM
    samples = samples_of(task)
    results = []
    for checkpointing in (False, True, False):
        model = prepared(sources, task, tmp_path)
        settings = Settings(2, 4, 1, learning_rate=1e-2, checkpointing=checkpointing)
        train(model, samples, step_order(samples, 4, 0), settings, device)
        results.append([p.detach() for p in trained(model)])
    for other in results[1:]:
        for one, two in zip(results[0], other, strict=True):
            torch.testing.assert_close(one, two)


def test_a_step_is_clipped_adamw_with_the_proximal_gradient(sources, device, tmp_path):
    task = Task.SEQUENCE_CLASSIFICATION
    samples = samples_of(task)
    settings = Settings(3, 8, 1, learning_rate=1e-2, weight_decay=0.1, max_grad_norm=0.05, proximal=0.5)
    model = prepared(sources, task, tmp_path)
    train(model, samples, step_order(samples, 8, 0), settings, device)
    reference = prepared(sources, task, tmp_path)
    weights = [p.detach().double().numpy().copy() for p in trained(reference)]
    first = [w.copy() for w in weights]
    moments = [(np.zeros_like(w), np.zeros_like(w)) for w in weights]
    for number, chosen in enumerate(islice(step_order(samples, 8, 0), 3), 1):
        reference.zero_grad()
        loss, _ = loop.losses(reference, samples.batch(chosen, torch.device("cpu")))
        (loss / 8).backward()
        slopes = [
            p.grad.double().numpy() + 0.5 * (w - o)
            for p, w, o in zip(trained(reference), weights, first, strict=True)
        ]
        norm = math.sqrt(sum((slope**2).sum() for slope in slopes))
        for index, (m, v) in enumerate(moments):
            slope = slopes[index] * min(1, 0.05 / (norm + 1e-6))
            m[:] = 0.9 * m + 0.1 * slope
            v[:] = 0.999 * v + 0.001 * slope**2
            step = (m / (1 - 0.9**number)) / (np.sqrt(v / (1 - 0.999**number)) + 1e-8)
            weights[index] = weights[index] * (1 - 1e-2 * 0.1) - 1e-2 * step
        with torch.no_grad():
            for p, w in zip(trained(reference), weights, strict=True):
                p.copy_(torch.from_numpy(w))
    for p, w in zip(trained(model), weights, strict=True):
        np.testing.assert_allclose(p.detach().numpy(), w, atol=2e-4)


def test_training_ends_early_when_asked(sources, device, tmp_path):
    task = Task.SEQUENCE_CLASSIFICATION
    model, samples = prepared(sources, task, tmp_path), samples_of(task)
    settings = Settings(steps=9, micro_batch=4, accumulation=1, learning_rate=1e-2)
    outcome = train(
        model, samples, step_order(samples, 4, 0), settings, device, after=lambda step: step.number == 2
    )
    assert outcome.steps == 2


def test_a_loss_that_is_not_finite_is_a_failure(sources, device, tmp_path):
    task = Task.SEQUENCE_CLASSIFICATION
    model, samples = prepared(sources, task, tmp_path), samples_of(task)
    model.classifier.weight.data.fill_(math.inf)
    settings = Settings(steps=2, micro_batch=4, accumulation=1, learning_rate=1e-2)
    with pytest.raises(Failure, match="not finite at local step 1"):
        train(model, samples, step_order(samples, 4, 0), settings, device)


def test_a_model_without_anything_to_train_is_a_failure(sources, device, tmp_path):
    model, samples = prepared(sources, Task.CAUSAL_LM, tmp_path), samples_of(Task.CAUSAL_LM)
    model.requires_grad_(False)
    settings = Settings(steps=2, micro_batch=4, accumulation=1, learning_rate=1e-2)
    with pytest.raises(Failure, match="nothing to train"):
        train(model, samples, step_order(samples, 4, 0), settings, device)


@pytest.mark.parametrize("task", Task)
def test_evaluation_sums_over_targets(sources, device, tmp_path, task):
    model, samples = prepared(sources, task, tmp_path), samples_of(task, 11)
    seen = []
    sums = evaluate(model, samples, 2, device, after=seen.append)
    total, correct, pairs = 0.0, 0, []
    for index in range(11):
        batch = samples.batch(np.array([index]), torch.device("cpu"))
        logits = model(**batch.inputs).logits.double()[0]
        if task is Task.CAUSAL_LM:
            tokens, mark = samples.tokens(index), int(samples.predicted(index).argmax())
            chances = logits.log_softmax(-1)
            total -= sum(chances[place - 1, tokens[place]].item() for place in range(mark, len(tokens)))
        else:
            total -= logits.log_softmax(-1)[samples.classes[index]].item()
            correct += int(logits.argmax()) == samples.classes[index]
            pairs.append((samples.classes[index], int(logits.argmax())))
    assert sums.loss == pytest.approx(total, rel=1e-4)
    assert sums.samples == seen[-1] == 11
    assert sums.correct == (None if task is Task.CAUSAL_LM else correct)
    if task is Task.CAUSAL_LM:
        assert sums.confusion is None
    else:
        assert len(pairs) == 11
        assert {(i, j): count for (i, j), count in np.ndenumerate(sums.confusion) if count} == Counter(pairs)
    assert sums.targets == samples.targets(np.arange(11))


def test_the_declared_speed_stretches_steps(sources, tmp_path):
    task = Task.SEQUENCE_CLASSIFICATION
    model, samples = prepared(sources, task, tmp_path), samples_of(task)
    device = Device(Capacity(threads=1, speed=0.2))
    begin = time.perf_counter()
    device.stretch(0.05)
    assert time.perf_counter() - begin >= 0.2
    settings = Settings(steps=3, micro_batch=4, accumulation=1, learning_rate=1e-2)
    clocks = []

    def after(_):
        clocks.append((time.perf_counter(), time.process_time()))
        return False

    train(model, samples, step_order(samples, 4, 0), settings, device, after=after)
    # From the first step's end to the last's one thread works at a fifth of its speed.
    (begin, worked), (end, done) = clocks[0], clocks[-1]
    assert end - begin >= 3 * (done - worked)


def test_a_sample_without_targets_does_no_harm(sources, device, tmp_path):
    model = prepared(sources, Task.CAUSAL_LM, tmp_path)
    samples = Samples([sample_of([token], 0, Task.CAUSAL_LM) for token in (5, 6)], Task.CAUSAL_LM, 0)
    batch = samples.batch(np.arange(2), torch.device("cpu"))
    assert (batch.labels == IGNORED).all()
    loss, _ = MicroBatches(model, trained(model), samples, device, 2).accumulate(np.arange(2))
    assert loss == 0


def test_the_peak_is_that_of_the_work_since_the_reset(device):
    device.reset_peak()
    before = device.peak()
    block = torch.ones(64 << 20, dtype=torch.uint8)
    assert device.peak() - before >= 60 << 20
    del block
    device.reset_peak()
    assert device.peak() - before < 20 << 20


def test_only_allocation_failures_are_out_of_memory():
    assert is_out_of_memory(MemoryError())
    with pytest.raises(RuntimeError) as caught:
        torch.empty(1 << 60, dtype=torch.uint8)
    assert is_out_of_memory(caught.value)
    assert is_out_of_memory(
        RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`")
    )
    assert not is_out_of_memory(RuntimeError("mat1 and mat2 shapes cannot be multiplied"))


def test_the_facts_keep_to_the_declared_capacity(device):
    facts = device.facts(())
    assert (facts.kind, facts.threads, facts.speed) == ("cpu", 1, 1.0)
    assert 0 < facts.overhead < facts.free_memory
    declared = Device(Capacity(device="Orin", memory="600Mi", threads=1, speed=0.5, link_rate=1000)).facts(())
    assert (declared.name, declared.free_memory, declared.link_rate) == ("Orin", 600 << 20, 1000)
    assert Device(Capacity(threads=1), 2000).facts(()).link_rate == 2000
    assert Device(Capacity(threads=1, link_rate=1000), 2000).facts(()).link_rate == 1000
