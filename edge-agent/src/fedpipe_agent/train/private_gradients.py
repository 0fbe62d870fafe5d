# SPDX-License-Identifier: Apache-2.0
"""Gradients under record-level differential privacy: DP-SGD (Abadi et al. 2016; METHOD §6).

Of each sample the gradients of all trainable parameters together are clipped to a norm; their sum gets
Gaussian noise once for each optimizer step. They are computed in the backward pass, where checkpointing and
every precision of the base have the layer's input at hand, and not by hooks of the forward pass.
"""

import secrets
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import nn
from torch.nn import functional

from fedpipe_api.accounting import Steps, epsilon
from fedpipe_api.base import UserError
from fedpipe_api.precisions import Precision
from fedpipe_api.privacy import Privacy
from fedpipe_api.wire import ModelShape, NodePlan

from ..errors import Failure
from .data import IGNORED, Batch

Record = Callable[[nn.Parameter, torch.Tensor], None]

PROBE_ROWS, PROBE_TOKENS = 3, 8
"""Size of the batch that shows whether every trained layer sees one row for each sample."""


@dataclass(frozen=True)
class Noise:
    """What DP-SGD does with the gradients of a step.

    Attributes:
        clip_norm: largest norm of one sample's gradient, over all trainable parameters.
        multiplier: standard deviation of the noise, in clip norms.
        expected_batch: mean number of samples of a step, by which the noisy sum is divided.
    """

    clip_norm: float
    multiplier: float
    expected_batch: float


def noise_of(privacy: Privacy | None, plan: NodePlan, expected_batch: float) -> Noise | None:
    """Return the noise of a plan's steps, None without privacy; raise Failure where the plan has none."""
    if privacy is None:
        return None
    if plan.noise_multiplier is None:
        raise Failure("assignment: the plan has no noise, which spec.privacy needs")
    return Noise(privacy.clip_norm, plan.noise_multiplier, expected_batch)


class Budget:
    """What this process has spent of the job's budget; it refuses a round that would exceed it."""

    def __init__(self, privacy: Privacy, samples: int, charge: Callable[[Steps], object] = lambda _: None):
        """Start with nothing spent; `charge` also gets all steps, and may refuse them.

        Raises:
            UserError: with this delta a whole row may be published.
        """
        if privacy.delta > 1 / samples:
            raise UserError(
                f"spec.privacy.delta: {privacy.delta:g} is above 1/{samples}, of the node's rows; lower it"
            )
        self._privacy = privacy
        self._charge = charge
        self._spent: tuple[Steps, ...] = ()

    def spend(self, steps: Steps) -> None:
        """Count steps before they are done.

        Raises:
            Failure: they would exceed the budget.
        """
        after = epsilon((*self._spent, steps), self._privacy.delta)
        if after > self._privacy.epsilon * (1 + 1e-9):
            raise Failure(
                f"spec.privacy.epsilon: {after:.4g} would be spent of {self._privacy.epsilon:g}; "
                "the plan has too little noise"
            )
        self._charge(steps)
        self._spent = (*self._spent, steps)


def protectable(shape: ModelShape) -> ModelShape:
    """Return the shape without the precisions that mix rows: int8 handles outliers by columns of a batch."""
    kept = tuple(precision for precision in shape.precisions if precision is not Precision.INT8)
    return shape.model_copy(update={"precisions": kept})


class PrivateGradients:
    """The clipped sum of a step's gradients, from micro-batches, and the noise on it."""

    def __init__(self, parameters: list[nn.Parameter], noise: Noise, generator: torch.Generator):
        """Keep what does not change; `generator` draws the noise and is on the parameters' device."""
        self._parameters = parameters
        self._noise = noise
        self._generator = generator
        self._rows = 0
        self._found: dict[nn.Parameter, torch.Tensor] = {}
        self._sums: dict[nn.Parameter, torch.Tensor] = {}

    def forget(self) -> None:
        """Drop what the step has summed so far: it is computed again."""
        self._found, self._sums = {}, {}

    def backward(self, model: nn.Module, batch: Batch) -> None:
        """Add the clipped gradients of a micro-batch's samples to the step's sum."""
        self._rows, self._found = len(batch.labels), {}
        self._loss(model, batch).backward()
        # A layer's own code may read its weights; such a gradient is not of one sample.
        if any(parameter.grad is not None for parameter in self._parameters):
            raise Failure("spec.privacy: this model reads a trained layer's weights; choose another model")
        self._clip()

    def finish(self) -> None:
        """Set `.grad` to the noisy sum over the expected batch; once for each optimizer step."""
        deviation = self._noise.multiplier * self._noise.clip_norm
        for parameter in self._parameters:
            noise = torch.randn(
                parameter.shape, generator=self._generator, device=parameter.device, dtype=parameter.dtype
            )
            noise.mul_(deviation)
            # An empty draw makes a step of noise: that there was none must not show.
            parameter.grad = noise.add_(self._sums.get(parameter, 0.0)).div_(self._noise.expected_batch)
        self.forget()

    def record(self, parameter: nn.Parameter, gradients: torch.Tensor) -> None:
        """Take in the gradients (b, *shape) of one use of a parameter."""
        known = self._found.get(parameter)
        self._found[parameter] = gradients if known is None else known.add_(gradients)

    def check_rows(self, x: torch.Tensor) -> None:
        """Raise Failure where a layer's first dimension is not that of the samples."""
        if x.ndim < 2 or len(x) != self._rows:
            raise Failure("spec.privacy: a trained layer of this model mixes samples; choose another model")

    @torch.no_grad()
    def probe(self, model: nn.Module) -> None:
        """Check by a batch without any data that every trained layer keeps samples apart."""
        self._rows = PROBE_ROWS
        device = self._parameters[0].device
        ids = torch.zeros((PROBE_ROWS, PROBE_TOKENS), dtype=torch.int64, device=device)
        model(input_ids=ids, attention_mask=torch.ones_like(ids))

    def _loss(self, model: nn.Module, batch: Batch) -> torch.Tensor:
        """Return the sum over samples of each one's mean loss per target.

        A mean over the batch's targets would make each sample's gradient depend on the others.
        """
        options = {} if batch.keep is None else {"logits_to_keep": batch.keep}
        logits = model(**batch.inputs, **options).logits.float()
        each = functional.cross_entropy(
            logits.flatten(0, -2), batch.labels.flatten(), ignore_index=IGNORED, reduction="none"
        ).view(self._rows, -1)
        targets = (batch.labels != IGNORED).view(self._rows, -1).sum(1).clamp(min=1)
        return (each.sum(1) / targets).sum()

    @torch.no_grad()
    def _clip(self) -> None:
        norms = torch.stack([found.flatten(1).norm(dim=1) for found in self._found.values()]).norm(dim=0)
        finite = norms.isfinite()
        factors = torch.where(finite, (self._noise.clip_norm / norms).clamp(max=1.0), 0.0)
        for parameter, found in self._found.items():
            if not finite.all():  # 0 · ∞ is not 0, and would undo the others' gradients
                found[~finite] = 0.0
            total = (factors @ found.flatten(1)).view_as(parameter)
            known = self._sums.get(parameter)
            self._sums[parameter] = total if known is None else known.add_(total)
        self._found = {}


@contextmanager
def private_gradients(
    model: nn.Module, parameters: list[nn.Parameter], noise: Noise, seed: int | None = None
) -> Iterator[PrivateGradients]:
    """Have a model's trained layers give the gradients of each sample, until the context ends.

    The noise is of a seed that the operating system draws and nobody else knows; `seed` is for tests.

    Raises:
        UserError: a layer of the model cannot be trained under privacy.
    """
    generator = torch.Generator(parameters[0].device)
    generator.manual_seed(secrets.randbits(63) if seed is None else seed)
    found = PrivateGradients(parameters, noise, generator)
    layers = _trained_layers(model, parameters)
    try:
        for layer in layers:
            own = _linear if isinstance(layer, nn.Linear) else _norm
            layer.forward = partial(own, layer, found)
        found.probe(model)
        yield found
    finally:
        for layer in layers:
            layer.__dict__.pop("forward", None)


def _trained_layers(model: nn.Module, parameters: list[nn.Parameter]) -> list[Any]:
    """Return the layers that hold the parameters; raises UserError for one of an unknown kind."""
    wanted, layers = set(parameters), []
    left = set(wanted)
    for name, module in model.named_modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            raise UserError(
                f"spec.privacy: {name} normalizes over the samples of a batch; choose another model"
            )
        own = [parameter for parameter in module.parameters(recurse=False) if parameter in wanted]
        if not own:
            continue
        if not isinstance(module, nn.Linear | nn.LayerNorm) or len(own) < len(list(module.parameters())):
            kind = type(module).__name__
            raise UserError(
                f"spec.privacy: {name} ({kind}) has no gradients per sample; choose another model"
            )
        layers.append(module)
        left.difference_update(own)
    if left:
        raise UserError("spec.privacy: a trained parameter is in no layer; choose another model")
    return layers


def _linear(layer: nn.Linear, found: PrivateGradients, x: torch.Tensor) -> torch.Tensor:
    found.check_rows(x)
    return _Linear.apply(x, layer.weight, layer.bias, found.record)


def _norm(layer: nn.LayerNorm, found: PrivateGradients, x: torch.Tensor) -> torch.Tensor:
    found.check_rows(x)
    normal = functional.layer_norm(x, layer.normalized_shape, None, None, layer.eps)
    return _Affine.apply(normal, layer.weight, layer.bias, found.record)


class _Linear(torch.autograd.Function):
    """x·Wᵀ + b that hands out the gradients of W and b of each sample (first dimension)."""

    @staticmethod
    def forward(
        ctx: Any, x: torch.Tensor, weight: nn.Parameter, bias: nn.Parameter | None, record: Record
    ) -> torch.Tensor:
        ctx.save_for_backward(x)
        ctx.weight, ctx.bias, ctx.record = weight, bias, record
        return functional.linear(x, weight.to(x.dtype), None if bias is None else bias.to(x.dtype))

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[torch.Tensor | None, None, None, None]:
        (gradient,), (x,), weight = gradients, ctx.saved_tensors, ctx.weight
        rows = len(x)
        outer = gradient.reshape(rows, -1, gradient.shape[-1]).float()
        ctx.record(weight, outer.transpose(1, 2) @ x.reshape(rows, -1, x.shape[-1]).float())
        if ctx.bias is not None:
            ctx.record(ctx.bias, outer.sum(1))
        return gradient @ weight.to(gradient.dtype) if ctx.needs_input_grad[0] else None, None, None, None


class _Affine(torch.autograd.Function):
    """x·w + b, entry by entry of the last dimension, that hands out the gradients of each sample."""

    @staticmethod
    def forward(
        ctx: Any, x: torch.Tensor, weight: nn.Parameter, bias: nn.Parameter | None, record: Record
    ) -> torch.Tensor:
        ctx.save_for_backward(x)
        ctx.weight, ctx.bias, ctx.record = weight, bias, record
        return x * weight if bias is None else x * weight + bias

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[torch.Tensor, None, None, None]:
        (gradient,), (x,) = gradients, ctx.saved_tensors
        outer = gradient.reshape(len(x), -1, x.shape[-1]).float()
        ctx.record(ctx.weight, (outer * x.reshape(outer.shape)).sum(1))
        if ctx.bias is not None:
            ctx.record(ctx.bias, outer.sum(1))
        return gradient * ctx.weight, None, None, None
