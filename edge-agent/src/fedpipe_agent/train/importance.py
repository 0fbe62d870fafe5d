# SPDX-License-Identifier: Apache-2.0
"""Which weight matrices matter: sensitivity × uncertainty of SVD-form increments (METHOD §1).

Each candidate matrix gets an increment P·Λ·Q; scores follow AdaLoRA (Zhang et al. 2023, eq. 5-9).
"""

import time
from collections.abc import Callable, Iterator
from functools import partial
from itertools import islice
from typing import Any

import numpy as np
import torch
from torch import nn

from fedpipe_api.lora.format import MatrixShape

from .data import Samples
from .device import Device
from .loop import MicroBatches, Settings, checkpoint
from .seeds import generator

RANK = 8
"""Triplets per matrix."""
DEVIATION = 0.02
"""Standard deviation of fresh P and Q."""
PENALTY = 0.5
"""Weight of the orthogonality penalty."""
BETA = 0.85
"""Smoothing of both sensitivity and uncertainty."""


class Sensitivity:
    """Smoothed sensitivity and uncertainty of the elements of one tensor.

    I = |w·∂L/∂w|, L the task's loss; Ī ← βĪ + (1−β)I; Ū ← βŪ + (1−β)|I − Ī| with the new Ī; s(w) = Ī·Ū.
    """

    def __init__(self, like: torch.Tensor):
        """Start at zero."""
        self._mean = torch.zeros_like(like)
        self._deviation = torch.zeros_like(like)

    @torch.no_grad()
    def update(self, weight: torch.Tensor, gradient: torch.Tensor) -> None:
        """Take in the weight and its gradient at one step."""
        sensitivity = (weight * gradient).abs()
        self._mean.lerp_(sensitivity, 1 - BETA)
        self._deviation.lerp_((sensitivity - self._mean).abs(), 1 - BETA)

    def score(self) -> torch.Tensor:
        """Return s(w) of each element."""
        return self._mean * self._deviation


class Increment(nn.Module):
    """P·Λ·Q beside one frozen linear layer: P (d, r), Λ (r), Q (r, c)."""

    def __init__(self, matrix: MatrixShape, seed: int, device: torch.device):
        """Draw P and Q from N(0, 0.02), the same on every node; Λ is zero."""
        super().__init__()
        random = generator(seed, "importance", matrix.name)

        def drawn(*size: int) -> nn.Parameter:
            values = random.normal(0.0, DEVIATION, size).astype(np.float32)
            return nn.Parameter(torch.from_numpy(values).to(device))

        self.p = drawn(matrix.rows, RANK)
        self.q = drawn(RANK, matrix.columns)
        self.diagonal = nn.Parameter(torch.zeros(RANK, device=device))
        self._sensitivities = {name: Sensitivity(value) for name, value in self.named_parameters()}

    def add(self, module: nn.Module, inputs: tuple[Any, ...], output: torch.Tensor) -> torch.Tensor:
        """Forward hook of the layer: add its input times the increment to its output."""
        x = inputs[0]
        inner = nn.functional.linear(x, self.q.to(x.dtype)) * self.diagonal.to(x.dtype)
        return output + nn.functional.linear(inner, self.p.to(x.dtype))

    def penalty(self) -> torch.Tensor:
        """Return ‖PᵀP − I‖_F + ‖QQᵀ − I‖_F."""
        identity = torch.eye(RANK, device=self.p.device)
        return (self.p.T @ self.p - identity).norm() + (self.q @ self.q.T - identity).norm()

    def update(self) -> None:
        """Take in the present weights and gradients."""
        for name, weight in self.named_parameters():
            if weight.grad is not None:
                self._sensitivities[name].update(weight, weight.grad)

    def score(self) -> float:
        """Return Σ_i S_i with S_i = s(λ_i) + mean_j s(P_ji) + mean_j s(Q_ij)."""
        scores = {name: sensitivity.score() for name, sensitivity in self._sensitivities.items()}
        return (scores["diagonal"] + scores["p"].mean(dim=0) + scores["q"].mean(dim=1)).sum().item()


def measure(
    model: nn.Module,
    *,
    matrices: tuple[MatrixShape, ...],
    samples: Samples,
    order: Iterator[np.ndarray],
    settings: Settings,
    device: Device,
    seed: int,
    after: Callable[[int], object],
) -> dict[str, float]:
    """Train increments of all candidate matrices (and the head) for a few steps; return each matrix's score.

    Args:
        model: the bare base model with its head.
        matrices: the candidates.
        samples: the data.
        order: the samples of each step.
        settings: steps, batch and optimizer.
        device: where.
        seed: of the job.
        after: called with the number of each step done.
    """
    increments = {matrix.name: Increment(matrix, seed, device.torch) for matrix in matrices}
    hooks = [
        model.get_submodule(name).register_forward_hook(partial(_add, increment))
        for name, increment in increments.items()
    ]
    trained = [weight for increment in increments.values() for weight in increment.parameters()]
    trained += [weight for weight in model.parameters() if weight.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=settings.learning_rate, weight_decay=0.0, fused=True)
    checkpoint(model, settings.checkpointing)
    work = MicroBatches(model, trained, samples, device, settings.micro_batch, packed=settings.packed)
    try:
        for number, chosen in enumerate(islice(order, settings.steps), 1):
            begin = time.perf_counter()
            work.accumulate(chosen)
            # Before the penalty's gradient joins: it depends on the random P and Q alone and is at first so
            # much larger that all scores would be equal within 10 % and say nothing of the data.
            for increment in increments.values():
                increment.update()
            penalty = sum((i.penalty() for i in increments.values()), start=trained[0].new_zeros(()))
            (PENALTY / (2 * len(increments)) * penalty).backward()
            nn.utils.clip_grad_norm_(trained, settings.max_grad_norm)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            device.stretch(time.perf_counter() - begin)
            after(number)
    finally:
        for hook in hooks:
            hook.remove()
        model.zero_grad(set_to_none=True)
    return {name: increment.score() for name, increment in increments.items()}


def _add(
    increment: Increment, module: nn.Module, inputs: tuple[Any, ...], output: torch.Tensor
) -> torch.Tensor:
    return increment.add(module, inputs, output)
