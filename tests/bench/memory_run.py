# SPDX-License-Identifier: Apache-2.0
"""The agent's own loading, adapters and loop on models with random weights, as the memory benches run them."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.numpy import save_file

from fedpipe_agent.train import loop
from fedpipe_agent.train import model as base
from fedpipe_agent.train.adapters import Adapters, GlobalAdapter
from fedpipe_agent.train.data import Samples, step_order
from fedpipe_agent.train.device import Device
from fedpipe_agent.train.shape import read_shape
from fedpipe_agent.train.tokenization import Sample
from fedpipe_api import wire
from fedpipe_api.job import FedPipeJobSpec, Precision, Task
from fedpipe_api.lora.format import HEAD, LORA_A, LORA_B
from fedpipe_api.lora.methods import Start


def write_model(config: Any, task: Task, directory: Path) -> None:
    """Write a model with random weights."""
    import transformers

    kind: Any = transformers.AutoModelForCausalLM
    if task is Task.SEQUENCE_CLASSIFICATION:
        kind = transformers.AutoModelForSequenceClassification
    torch.manual_seed(0)
    kind.from_config(config).save_pretrained(directory)


def write_global_adapter(shape: wire.ModelShape, rank: int, path: Path) -> None:
    """Write a global adapter at its full rank, so that there is a remainder to hold."""
    generator = np.random.default_rng(0)
    tensors = {}
    for matrix in shape.matrices:
        full = min(rank, matrix.rows, matrix.columns)
        tensors[matrix.name + LORA_B] = generator.normal(0, 1e-3, (matrix.rows, full))
        tensors[matrix.name + LORA_A] = generator.normal(0, 1, (full, matrix.columns))
    for tensor in shape.head:
        tensors[HEAD + tensor.name] = generator.normal(0, 0.02, tensor.shape)
    save_file({name: value.astype(np.float32) for name, value in tensors.items()}, path)


@dataclass
class Base:
    """A loaded base model."""

    model: Any
    shape: wire.ModelShape
    adapters: Adapters
    device: Device
    task: Task
    length: int

    @classmethod
    def load(cls, directory: Path, spec: FedPipeJobSpec, precision: Precision, device: Device) -> "Base":
        """Load as the agent does; the embeddings count as if the data had every word."""
        task = spec.model.task
        source = base.Source(str(directory))
        config = base.read_config(source, spec.model, 0)
        shape = read_shape(config, task, spec.adapter.modules)
        model: Any = base.load(source, config, task, precision, device.torch, seed=7)
        model.get_input_embeddings().weight.sum()
        pristine = directory if precision is Precision.FP32 else None
        adapters = Adapters(model, shape, alpha=16, rs_lora=False, names=(0,), pristine=pristine)
        return cls(model, shape, adapters, device, task, spec.data.max_length)

    def train(
        self, adapter: Path, ranks: dict[str, int], settings: loop.Settings, *, evaluate: bool = False
    ) -> int:
        """Return the peak bytes of a round from a global adapter on: evaluation if wanted, then training."""
        generator = np.random.default_rng(0)
        count = 2 * max(settings.batch * settings.steps, 2 * settings.micro_batch)
        # Every fourth is cut to the length, as real texts are; the rest make padding, and kernels, of any length.
        lengths = generator.integers(self.length // 4, self.length + 1, count)
        lengths[::4] = self.length
        tokens = [generator.integers(1, self.shape.vocabulary, length) for length in lengths]
        samples = Samples([Sample(ids, np.ones(len(ids), bool)) for ids in tokens], self.task, 0)
        self.device.reset_peak()
        with GlobalAdapter(adapter, self.shape) as opened:
            self.adapters.install(opened, ranks, Start.SPLIT, 1)
        if evaluate:
            loop.evaluate(self.model, samples, settings.micro_batch, self.device, after=lambda done: None)
        peak = self.device.peak()
        outcome = loop.train(
            self.model, samples, step_order(samples, settings.batch, 0), settings, self.device
        )
        assert outcome.micro_batch == settings.micro_batch
        return max(peak, outcome.peak_bytes)
