# SPDX-License-Identifier: Apache-2.0
"""The training loop and the evaluation: one forward pass, one loss, sums over targets."""

import math
import time
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from dataclasses import dataclass
from itertools import islice
from statistics import fmean, median
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.nn import functional

from fedpipe_api.wire import CONFUSION_CLASSES

from ..errors import Failure
from .data import IGNORED, Batch, Samples
from .device import Device, is_out_of_memory
from .private_gradients import Noise, PrivateGradients, private_gradients


@dataclass(frozen=True)
class Settings:
    """How to train: `steps` optimizer steps of micro_batch × accumulation samples each.

    With `packed` a step's samples are packed into sequences of at most so many tokens, and micro-batches are
    of sequences. The gradients are the same. With `noise` they are private.
    """

    steps: int
    micro_batch: int
    accumulation: int
    learning_rate: float
    weight_decay: float = 0.0
    max_grad_norm: float = 1.0
    proximal: float = 0.0
    checkpointing: bool = False
    packed: int | None = None
    noise: Noise | None = None

    @property
    def batch(self) -> int:
        """Samples of one optimizer step."""
        return self.micro_batch * self.accumulation


@dataclass(frozen=True)
class Step:
    """One optimizer step done: loss per target, and the mean speed so far; None where they are withheld."""

    number: int
    loss: float | None
    seconds: float
    tokens_per_second: float | None


@dataclass(frozen=True)
class Outcome:
    """What training came to. `loss` is the mean per target; `micro_batch` the one in use at the end.

    Of private gradients loss and tokens are not reported: they are sums over rows without noise.
    """

    steps: int
    loss: float | None
    step_seconds: float
    tokens: int
    micro_batch: int
    peak_bytes: int


@dataclass(frozen=True)
class Sums:
    """Sums of an evaluation; `correct` counts right classes.

    `confusion` counts samples by class (rows) and predicted class (columns), of CONFUSION_CLASSES at most.
    """

    samples: int
    targets: int
    loss: float
    correct: int | None
    confusion: np.ndarray | None


def losses(model: nn.Module, batch: Batch) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the loss summed over the batch's targets, and the logits at its predicted positions."""
    options = {} if batch.keep is None else {"logits_to_keep": batch.keep}
    logits = model(**batch.inputs, **options).logits.float()
    loss = functional.cross_entropy(
        logits.flatten(0, -2), batch.labels.flatten(), ignore_index=IGNORED, reduction="sum"
    )
    return loss, logits


class MicroBatches:
    """Forward and backward over the samples of a step, in micro-batches that shrink when memory runs out."""

    def __init__(
        self,
        model: nn.Module,
        parameters: list[nn.Parameter],
        samples: Samples,
        device: Device,
        size: int,
        *,
        packed: int | None = None,
        private: PrivateGradients | None = None,
    ):
        """Start with micro-batches of `size` samples; `parameters` are all that receive a gradient.

        With `packed` the samples of a step are packed first, as `Settings` says. With `private` the gradients
        are kept there, and the loss is not computed.
        """
        self._model = model
        self._parameters = parameters
        self._samples = samples
        self._device = device
        # What a quantized base unpacks, and oneDNN's bfloat16 kernels, leave gaps in the heap into which no
        # batch of another length fits. In float32 giving back costs a tenth of the time and saves little.
        self._gives_back = not device.cuda and any(
            parameter.dtype != torch.float32 for parameter in model.parameters()
        )
        self._packed = packed
        self._private = private
        self.size = size

    def accumulate(self, chosen: np.ndarray) -> tuple[float, int]:
        """Add the gradients of the mean loss per target to `.grad`; return that loss and the input tokens.

        When memory runs out the micro-batch is halved and the gradients are computed again; the result is the
        same up to the order of additions.

        Raises:
            Failure: not even one sample fits.
        """
        while True:
            try:
                done = self._accumulate(chosen)
                if self._gives_back:
                    self._device.give_back()
                return done
            except (RuntimeError, MemoryError) as error:
                if not is_out_of_memory(error):
                    raise
                if self.size == 1:
                    raise Failure("out of memory with micro-batch 1; give the node more memory") from error
            # Outside the handler: the traceback would keep the activations alive.
            for parameter in self._parameters:
                parameter.grad = None
            if self._private:
                self._private.forget()
            self._halve()

    def _accumulate(self, chosen: np.ndarray) -> tuple[float, int]:
        targets = max(1, self._samples.targets(chosen))
        samples, order = self._samples, chosen
        if self._packed is not None:
            samples = samples.packed(chosen, self._packed)
            order = np.arange(len(samples))
        total = torch.zeros((), device=self._device.torch)
        tokens = 0
        done = 0
        while done < len(order):
            batch = samples.batch(order[done : done + self.size], self._device.torch)
            if self._private:
                self._private.backward(self._model, batch)
                loss = total
            else:
                loss = losses(self._model, batch)[0] / targets
                loss.backward()
                total += loss.detach()
            tokens += batch.tokens
            done += self.size
            # And the graph with it: in that, bitsandbytes' int8 layers hold their inputs beyond backward.
            del batch, loss
            if self.size > 1 and self._device.over_budget():
                self._halve()
        return total.item(), tokens

    def _halve(self) -> None:
        self.size = max(1, self.size // 2)
        self._device.reset_peak()


def train(
    model: nn.Module,
    samples: Samples,
    order: Iterator[np.ndarray],
    settings: Settings,
    device: Device,
    *,
    after: Callable[[Step], object] = lambda _: None,
) -> Outcome:
    """Train the parameters that require a gradient.

    A fresh AdamW at a constant learning rate. Gradients are of the mean loss per target (sample, or predicted
    token), so that accumulation does not change them; with `proximal` μ that of μ/2·‖w − w₀‖² (FedProx) is
    added; then the norm is clipped.

    Args:
        model: the model, in training mode.
        samples: the data.
        order: the samples of each step.
        settings: see there.
        device: where; stretches the steps to its declared speed.
        after: called after each step; True ends training early.

    Raises:
        Failure: nothing is trainable, the loss is not finite, or one sample does not fit into memory.
    """
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    if not parameters:
        raise Failure("nothing to train: the plan gives no matrix a rank and the model has no head")
    origin = [parameter.detach().clone() for parameter in parameters] if settings.proximal else []
    optimizer = torch.optim.AdamW(
        parameters, lr=settings.learning_rate, weight_decay=settings.weight_decay, fused=True
    )
    checkpoint(model, settings.checkpointing)
    device.reset_peak()
    with private_gradients(model, parameters, settings.noise) if settings.noise else nullcontext() as private:
        work = MicroBatches(
            *(model, parameters, samples, device, settings.micro_batch),
            packed=settings.packed,
            private=private,
        )
        return _steps(
            work,
            private=private,
            optimizer=optimizer,
            origin=origin,
            order=islice(order, settings.steps),
            settings=settings,
            device=device,
            after=after,
        )


def _steps(
    work: MicroBatches,
    *,
    private: PrivateGradients | None,
    optimizer: torch.optim.Optimizer,
    origin: list[torch.Tensor],
    order: Iterator[np.ndarray],
    settings: Settings,
    device: Device,
    after: Callable[[Step], object],
) -> Outcome:
    """Do the optimizer steps of a prepared training."""
    parameters = optimizer.param_groups[0]["params"]
    history: list[float] = []
    times: list[float] = []
    tokens = 0
    for number, chosen in enumerate(order, 1):
        step_begin = time.perf_counter()
        loss, step_tokens = work.accumulate(chosen)
        if not math.isfinite(loss):
            raise Failure(f"the loss is not finite at local step {number}; lower spec.optimizer.learningRate")
        if private:
            private.finish()
        for parameter, first in zip(parameters, origin, strict=False):
            if parameter.grad is not None:
                parameter.grad.add_(parameter.detach() - first, alpha=settings.proximal)
        if not private:  # each sample's gradient was clipped
            nn.utils.clip_grad_norm_(parameters, settings.max_grad_norm)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        device.stretch(time.perf_counter() - step_begin)
        history.append(loss)
        times.append(time.perf_counter() - step_begin)
        tokens += step_tokens
        speed = None if private else tokens / sum(times)
        if after(Step(number, None if private else loss, times[-1], speed)):
            break
    return Outcome(
        steps=len(history),
        loss=None if private else fmean(history),
        # The first step pays for allocation and kernel selection.
        step_seconds=median(times[1:] or times),
        tokens=0 if private else tokens,
        micro_batch=work.size,
        peak_bytes=device.peak(),
    )


@torch.no_grad()
def evaluate(
    model: nn.Module, samples: Samples, micro_batch: int, device: Device, *, after: Callable[[int], object]
) -> Sums:
    """Return the sums over all samples, in batches of 2 × micro_batch (halved when memory runs out).

    Args:
        model: the model.
        samples: the held-out data.
        micro_batch: of training.
        device: where.
        after: called with the number of samples done.
    """
    # The longest first: what they leave has room for the others, and too little memory shows at once.
    order = np.argsort(-samples.lengths, kind="stable")
    size = 2 * micro_batch
    total, done = 0.0, 0
    correct: int | None = None
    confusion: np.ndarray | None = None
    while done < len(order):
        begin = time.perf_counter()
        try:
            batch = samples.batch(order[done : done + size], device.torch)
            loss, logits = losses(model, batch)
            if batch.keep is None:
                predicted = logits.argmax(-1)
                correct = (correct or 0) + int((predicted == batch.labels).sum())
                counted = _confusion(batch.labels, predicted, logits.shape[-1])
                confusion = counted if confusion is None else confusion + counted
            total += loss.item()
            done += size
            del batch, loss, logits  # not beside the next batch's
        except (RuntimeError, MemoryError) as error:
            if not is_out_of_memory(error):
                raise
            if size == 1:
                raise Failure("out of memory evaluating one sample; give the node more memory") from error
            size //= 2
        device.stretch(time.perf_counter() - begin)
        after(min(done, len(order)))
    return Sums(
        samples=len(samples),
        targets=max(1, samples.targets(order)),
        loss=total,
        correct=correct,
        confusion=confusion if confusion is not None and confusion.size else None,
    )


def _confusion(labels: torch.Tensor, predicted: torch.Tensor, classes: int) -> np.ndarray:
    """Return the samples by class and predicted class, (classes, classes); of too many classes (0, 0)."""
    if classes > CONFUSION_CLASSES:
        return np.zeros((0, 0), dtype=np.int64)
    pairs = (labels * classes + predicted).cpu().numpy()
    return np.bincount(pairs, minlength=classes**2).reshape(classes, classes)


def checkpoint(model: nn.Module, wanted: bool) -> None:
    """Switch gradient checkpointing on or off."""
    transformer: Any = model  # transformers' method, which a Module in general does not have
    if wanted:
        transformer.activation_checkpointing_enable({"use_reentrant": False})
    else:
        transformer.activation_checkpointing_disable()
