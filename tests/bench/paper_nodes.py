# SPDX-License-Identifier: Apache-2.0
"""The nodes of the comparison: the agent's own parts in the order in which an agent uses them, without HTTP."""

import os
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import safe_open

from bench.paper_tasks import FULL_LEARNING_RATE, Setting, Task
from fedpipe_agent.train import data, importance, loop
from fedpipe_agent.train import model as base
from fedpipe_agent.train.adapters import Adapters, GlobalAdapter, save
from fedpipe_agent.train.device import Device
from fedpipe_agent.train.heads import head_tensors, set_head
from fedpipe_api import wire
from fedpipe_api.job import FedPipeJobSpec, Precision
from fedpipe_api.lora.format import HEAD, Encoding
from fedpipe_api.lora.methods import Start
from fedpipe_operator.engine.decide import learning_rate


class Trainer:
    """A node that trains adapters: one base model, loaded at the precision of its plan or of the setting."""

    def __init__(
        self,
        name: str,
        task: Task,
        spec: FedPipeJobSpec,
        samples: data.Samples,
        device: Device,
        work: Path,
        setting: Setting,
    ):
        self.name = name
        self.samples = samples
        self.model: Any = None
        self._base = None if setting.base == "planned" else Precision.of(setting.base)
        self._task, self._spec, self._device = task, spec, device
        self._work = work / name
        self._work.mkdir(parents=True)
        self._precision: Precision | None = None
        self._adapters: Any = None

    def scores(self, plan: wire.NodePlan) -> dict[str, float]:
        """Return the importance of every candidate matrix, as the agent's profiling measures it."""
        self._install(None, plan.precision, {}, Start.FRESH, 0)
        self._adapters.remove()
        return importance.measure(
            self.model,
            matrices=self._task.shape.matrices,
            samples=self.samples,
            order=self._order(plan, 0),
            settings=settings(
                self._spec,
                plan,
                self._spec.adapter.selection.warmup_steps,
                self._spec.optimizer.learning_rate,
            ),
            device=self._device,
            seed=self._spec.seed,
            after=lambda _: None,
        )

    def train(
        self, adapter: Path | None, plan: wire.NodePlan, rule: Start, number: int, steps: int
    ) -> tuple[Path, float]:
        """Train so many steps from the global adapter; return the update's file and the training loss."""
        self._install(adapter, plan.precision, plan.ranks, rule, number)
        outcome = loop.train(
            self.model,
            self.samples,
            self._order(plan, number),
            settings(self._spec, plan, steps, learning_rate(self._spec, number)),
            self._device,
        )
        head = head_tensors(self.model, self._task.shape.head)
        path = self._work / "update.safetensors"
        save(
            path,
            self._adapters.tensors(),
            head,
            rule.upload,
        )
        return path, outcome.loss

    def hold(self, adapter: Path) -> None:
        """Make the model base + global adapter, in float32."""
        self._install(adapter, Precision.FP32, {}, Start.SPLIT, 0)

    def _install(
        self, path: Path | None, precision: Precision, ranks: dict[str, int], rule: Start, number: int
    ) -> None:
        task, spec = self._task, self._spec
        precision = self._base or precision
        if precision is not self._precision:
            self.model = base.load(
                task.source, task.config, spec.model.task, precision, self._device.torch, seed=spec.seed
            )
            self._head = head_tensors(self.model, task.shape.head)
            self._precision = precision
            self._adapters = Adapters(
                self.model,
                task.shape,
                alpha=spec.adapter.alpha,
                rs_lora=spec.adapter.rs_lora,
                names=(spec.seed, self.name),
                pristine=self._work if precision is Precision.FP32 else None,
            )
        head = dict(self._head)
        if path is None:
            self._adapters.install(None, ranks, rule, number)
        else:
            with GlobalAdapter(path, task.shape) as adapter:
                self._adapters.install(adapter, ranks, rule, number)
                head.update(adapter.head())
        set_head(self.model, head)

    def _order(self, plan: wire.NodePlan, number: int) -> Any:
        size = plan.micro_batch * plan.accumulation
        return data.step_order(self.samples, size, self._spec.seed, number, self.name)


class FullTrainer:
    """A node that trains every parameter; on the wire each is a fully trained tensor, like a head's."""

    def __init__(
        self,
        name: str,
        task: Task,
        spec: FedPipeJobSpec,
        samples: data.Samples,
        device: Device,
        work: Path,
        setting: Setting,
    ):
        self.name = name
        self.samples = samples
        self._spec, self._device = spec, device
        self._work = work / name
        self._work.mkdir(parents=True)
        self.model = base.load(
            task.source, task.config, spec.model.task, Precision.FP32, device.torch, seed=spec.seed
        )
        self.model.requires_grad_(True)
        self._rate = FULL_LEARNING_RATE[task.name]

    def train(
        self, adapter: Path | None, plan: wire.NodePlan, rule: Start, number: int, steps: int
    ) -> tuple[Path, float]:
        """Train so many steps from the global parameters; return the update's file and the training loss."""
        if adapter is not None:
            self.hold(adapter)
        order = data.step_order(
            self.samples, plan.micro_batch * plan.accumulation, self._spec.seed, number, self.name
        )
        outcome = loop.train(
            self.model, self.samples, order, settings(self._spec, plan, steps, self._rate), self._device
        )
        path = self._work / "update.safetensors"
        save(
            path, {}, {name: _array(value) for name, value in self.model.named_parameters()}, Encoding.FLOAT32
        )
        return path, outcome.loss

    def hold(self, adapter: Path) -> None:
        """Give the model the global parameters."""
        with safe_open(adapter, framework="np") as file:
            names = list(file.keys())
            set_head(self.model, {name.removeprefix(HEAD): file.get_tensor(name) for name in names})


def settings(spec: FedPipeJobSpec, plan: wire.NodePlan, steps: int, rate: float) -> loop.Settings:
    """Return how a node trains by its plan."""
    return loop.Settings(
        steps=steps,
        micro_batch=plan.micro_batch,
        accumulation=plan.accumulation,
        learning_rate=rate,
        weight_decay=spec.optimizer.weight_decay,
        max_grad_norm=spec.optimizer.max_grad_norm,
        checkpointing=plan.checkpointing,
    )


def size(path: Path) -> int:
    """Return the bytes of a file."""
    return os.stat(path).st_size


def _array(value: torch.Tensor) -> np.ndarray:
    return value.detach().cpu().numpy()
