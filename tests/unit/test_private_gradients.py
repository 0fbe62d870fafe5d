# SPDX-License-Identifier: Apache-2.0
"""Private gradients against Opacus, and what may not change the guarantee."""

from itertools import islice

import numpy as np
import pytest
import torch
from torch.nn import functional

from fedpipe_agent.errors import Failure
from fedpipe_agent.train import loop
from fedpipe_agent.train.data import private_order
from fedpipe_agent.train.loop import MicroBatches, Settings, checkpoint, train
from fedpipe_agent.train.private_gradients import Noise, private_gradients
from fedpipe_api.base import UserError
from fedpipe_api.job import Precision, Task
from unit.test_agent_loop import device, prepared, samples_of, sources, trained

__all__ = ["device", "sources"]

SILENT = Noise(clip_norm=0.5, multiplier=0.0, expected_batch=8.0)


def private_sum(model, samples, chosen, device, size, noise=SILENT, seed=0):
    """Return the gradients of one private step, in micro-batches of so many."""
    parameters = trained(model)
    with private_gradients(model, parameters, noise, seed) as private:
        MicroBatches(model, parameters, samples, device, size, private=private).accumulate(chosen)
        private.finish()
    found = [parameter.grad.clone() for parameter in parameters]
    model.zero_grad(set_to_none=True)
    return found


def by_opacus(model, samples, chosen, device):
    """Return the same gradients without noise, by Opacus's gradients of each sample."""
    from opacus import GradSampleModule

    wrapped = GradSampleModule(model, loss_reduction="sum")
    batch = samples.batch(chosen, device.torch)
    options = {} if batch.keep is None else {"logits_to_keep": batch.keep}
    logits = wrapped(**batch.inputs, **options).logits
    each = functional.cross_entropy(logits.flatten(0, -2), batch.labels.flatten(), reduction="none")
    each = each.view(len(chosen), -1)
    ((each.sum(1) / (each != 0).sum(1)).sum()).backward()
    found = [parameter.grad_sample for parameter in trained(model)]
    norms = torch.stack([one.flatten(1).norm(dim=1) for one in found]).norm(dim=0)
    factors = (SILENT.clip_norm / norms).clamp(max=1)
    assert (factors < 1).any()
    wrapped.to_standard_module()
    model.zero_grad(set_to_none=True)
    return [torch.einsum("n,n...->...", factors, one) / SILENT.expected_batch for one in found]


@pytest.mark.filterwarnings("ignore::UserWarning", "ignore::FutureWarning")
@pytest.mark.parametrize("task", Task)
def test_gradients_are_those_of_opacus(sources, device, tmp_path, task):
    model, samples, chosen = prepared(sources, task, tmp_path), samples_of(task), np.arange(8)
    # A B of zero would leave A without gradients.
    with torch.no_grad():
        for parameter in trained(model):
            parameter.add_(torch.randn(parameter.shape, generator=torch.manual_seed(1)), alpha=0.05)
    expected = by_opacus(model, samples, chosen, device)
    for size in (8, 3, 1):
        for wanted in (False, True):
            checkpoint(model, wanted)
            for mine, theirs in zip(private_sum(model, samples, chosen, device, size), expected, strict=True):
                torch.testing.assert_close(mine, theirs, atol=1e-5, rtol=0)
                assert theirs.abs().max() > 1e-4


@pytest.mark.parametrize("precision", [Precision.FP32, Precision.BF16, Precision.NF4])
def test_a_sample_moves_the_sum_by_at_most_the_clip_norm(sources, device, tmp_path, precision):
    task = Task.SEQUENCE_CLASSIFICATION
    model, samples = prepared(sources, task, tmp_path, precision), samples_of(task)
    whole, without = (private_sum(model, samples, np.arange(n), device, 4) for n in (7, 6))
    moved = torch.stack([(a - b).norm() for a, b in zip(whole, without, strict=True)]).norm()
    assert 0 < moved * SILENT.expected_batch <= SILENT.clip_norm * 1.001


def test_noise_is_added_once_a_step_and_also_without_samples(sources, device, tmp_path):
    task = Task.SEQUENCE_CLASSIFICATION
    model, samples = prepared(sources, task, tmp_path), samples_of(task)
    noise = Noise(clip_norm=0.5, multiplier=3.0, expected_batch=8.0)
    alone, *others = (private_sum(model, samples, np.arange(0), device, 4, noise, seed) for seed in range(8))
    values = torch.cat([one.flatten() for one in sum(others, alone)])
    assert values.std().item() == pytest.approx(3.0 * 0.5 / 8.0, rel=0.03)
    assert values.mean().item() == pytest.approx(0, abs=0.01)
    for size in (8, 2):
        noisy = private_sum(model, samples, np.arange(8), device, size, noise, seed=0)
        plain = private_sum(model, samples, np.arange(8), device, size)
        for one, other, only in zip(noisy, plain, alone, strict=True):
            torch.testing.assert_close(one - other, only, atol=1e-5, rtol=1e-4)


def test_a_gradient_that_is_not_finite_is_left_out(sources, device, tmp_path):
    task = Task.SEQUENCE_CLASSIFICATION
    model = prepared(sources, task, tmp_path)
    parameters = trained(model)
    with private_gradients(model, parameters, SILENT) as private:
        private._rows = 2
        gradients = [torch.ones((2, *parameter.shape)) for parameter in parameters]
        gradients[0][0] = torch.inf
        for parameter, one in zip(parameters, gradients, strict=True):
            private.record(parameter, one)
        private._clip()
        private.finish()
    total = torch.stack([parameter.grad.norm() for parameter in parameters]).norm()
    assert total.item() == pytest.approx(SILENT.clip_norm / SILENT.expected_batch, rel=1e-4)


def test_running_out_of_memory_changes_nothing(sources, device, tmp_path, monkeypatch):
    task = Task.SEQUENCE_CLASSIFICATION
    model, samples = prepared(sources, task, tmp_path), samples_of(task)
    expected = private_sum(model, samples, np.arange(8), device, 2)
    calls, batch = [], type(samples).batch

    def short(self, indices, where):
        calls.append(len(indices))
        if len(indices) > 2 and len(calls) > 1:
            raise RuntimeError("DefaultCPUAllocator: not enough memory")
        return batch(self, indices, where)

    monkeypatch.setattr(type(samples), "batch", short)
    found = private_sum(model, samples, np.arange(8), device, 4)
    assert calls[:3] == [4, 4, 2]
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other, atol=1e-6, rtol=1e-5)


def test_a_model_that_mixes_samples_is_refused(sources, device, tmp_path):
    model = prepared(sources, Task.SEQUENCE_CLASSIFICATION, tmp_path)
    layer = trained(model)[0]
    with private_gradients(model, trained(model), SILENT) as private, pytest.raises(Failure, match="mixes"):
        private.check_rows(torch.zeros(24, layer.shape[1]))
    model.bert.add_module("norm", torch.nn.BatchNorm1d(4).requires_grad_(False))
    with pytest.raises(UserError, match=r"spec.privacy: bert.norm normalizes"):
        with private_gradients(model, trained(model), SILENT):
            pass


def test_training_tells_nothing_of_the_rows_and_leaves_the_model_as_it_was(sources, device, tmp_path):
    task = Task.SEQUENCE_CLASSIFICATION
    model, samples = prepared(sources, task, tmp_path), samples_of(task)
    settings = Settings(
        steps=3, micro_batch=4, accumulation=2, learning_rate=1e-2, noise=Noise(1.0, 1.0, 8.0)
    )
    seen = []
    outcome = train(model, samples, private_order(samples, 0.4), settings, device, after=seen.append)
    assert (outcome.steps, outcome.loss, outcome.tokens) == (3, None, 0)
    assert all(step.loss is None and step.tokens_per_second is None for step in seen)
    assert not any("forward" in vars(module) for module in model.modules())
    assert loop.evaluate(model, samples, 4, device, after=lambda _: None).samples == 20


def test_each_sample_is_drawn_with_the_same_chance(sources):
    samples = samples_of(Task.SEQUENCE_CLASSIFICATION)
    draws = list(islice(private_order(samples, 0.3), 3000))
    counts = np.bincount(np.concatenate(draws), minlength=20) / 3000
    assert abs(counts - 0.3).max() < 0.04
    assert np.std([len(draw) for draw in draws]) == pytest.approx(np.sqrt(20 * 0.3 * 0.7), rel=0.1)
