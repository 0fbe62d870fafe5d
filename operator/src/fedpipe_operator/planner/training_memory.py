# SPDX-License-Identifier: Apache-2.0
"""How much memory training takes (METHOD §2), in bytes.

An upper estimate by intent: sequences count as `maxLength` tokens and the whole global rank is held.
"""

import math
from collections.abc import Mapping

from fedpipe_api import wire
from fedpipe_api.precisions import Precision

from .calibration import Calibration
from .workload import Configuration, Workload, compute_bytes

TRAINABLE_BYTES = 16
"""Of one trainable parameter: float32 weight and gradient, two Adam moments."""
CPU_SLACK, CUDA_SLACK = 72 * 2**20, 96 * 2**20
"""What the runtime takes only when training: modules and kernels loaded at first use, thread buffers; on CUDA
the workspace of cuBLAS."""
CPU_QUANTIZED = 40 * 2**20
"""And what bitsandbytes takes beside, with the buffers that it unpacks into."""
CPU_KERNELS = 12 * 2**20
"""What oneDNN's compiled bfloat16 kernels take: the agent keeps those of one layer (its train/device.py)."""
CUDA_ROUNDING = 1.06
"""What CUDA's caching allocator rounds up and cannot reuse, as a factor on activations."""

CPU_UNUSED = 0.9
"""Share of what a forward pass frees that glibc cannot use again before the backward pass: tensors are
aligned, and the gap of one is too small for the next of its size. Smaller ones fit into the gaps of an MLP
of four times the model's width; of a narrower one the share is more. Fitted (tests/bench/memory_model.py)."""
CPU_RECOMPUTED = 0.25
"""How much less that share is of what checkpointing frees as well. Fitted in the same way."""
CPU_HEAP = 32 * 2**20
"""The largest block glibc keeps in its heap; larger ones leave no gaps."""
CPU_UNPACKED = 0.8
"""Share of a layer's MLP weights, unpacked to compute with, that turn into gaps because what the layer keeps
is put where they were. Fitted; processes differ by a fifth."""


def base_bytes(shape: wire.ModelShape, device: wire.DeviceFacts, precision: Precision) -> int:
    """Return the bytes of the frozen base: linear layers at the precision, the rest at the compute type."""
    rest = shape.parameters - shape.linear_parameters
    other = compute_bytes(device, precision)
    return math.ceil(precision.weight_bytes * shape.linear_parameters) + other * rest


def fixed_bytes(work: Workload, device: wire.DeviceFacts, configuration: Configuration) -> int:
    """Return the peak bytes at rank 0, runtime excluded: base, head, remainder, activations.

    The peak is that of the backward pass of the last layer, or of the loss, with everything saved still held;
    evaluation takes batches of twice the micro-batch and saves nothing.
    """
    precision = configuration.precision
    element = compute_bytes(device, precision)
    tokens = configuration.micro_batch * work.length
    # A float32 base takes the remainder into its weights; another computes with a copy in its own type.
    copies = 0 if precision.takes_remainder else 4 if element == 4 else 6
    remainder = copies * work.remainder_rank * sum(work.sides.values())
    saved, layer = _saved(work, device, configuration), _transient(work, device, configuration)
    vocabulary = work.shape.vocabulary if work.shape.causal else 0
    # Log-probabilities and two gradients of them in float32; in evaluation logits and log-probabilities.
    losses = 12 * vocabulary * tokens
    if device.kind == "cpu" and 4 * vocabulary * tokens <= CPU_HEAP:
        losses *= 2  # the gaps of these and of the logits
    training = saved + max(layer, losses)
    widths = work.shape.intermediate * 2 + 4 * work.shape.hidden + 2 * work.length  # the mask, twice
    evaluating = 2 * tokens * (8 * vocabulary + element * widths)
    activations = max(training, evaluating)
    if device.kind == "cuda":
        activations = math.ceil(CUDA_ROUNDING * activations)
    slack = CUDA_SLACK if device.kind == "cuda" else CPU_SLACK
    if device.kind == "cpu" and precision.computes_in == "bfloat16":
        slack += CPU_KERNELS
    if device.kind == "cpu" and precision.quantized:
        slack += CPU_QUANTIZED
    per_parameter = TRAINABLE_BYTES + (4 if work.proximal else 0)
    per_parameter += _private_bytes(work, configuration)
    base = base_bytes(work.shape, device, precision)
    return base + per_parameter * work.head + remainder + activations + slack


def rank_bytes(work: Workload, configuration: Configuration, sides: int) -> int:
    """Return the bytes of one more rank of a matrix with so many rows and columns together.

    Its parameters, their copy in the compute type, and A·x kept for the backward pass.
    """
    per_parameter = TRAINABLE_BYTES + (4 if work.proximal else 0)
    per_parameter += _private_bytes(work, configuration)
    tokens = configuration.micro_batch * work.length
    return (per_parameter + 2) * sides + 4 * tokens


def _private_bytes(work: Workload, configuration: Configuration) -> int:
    """Return the bytes of a parameter's private gradients: of each sample, their sum, and the noise."""
    return 4 * configuration.micro_batch + 8 if work.private else 0


def peak_bytes(
    work: Workload,
    device: wire.DeviceFacts,
    configuration: Configuration,
    ranks: Mapping[str, int],
    calibration: Calibration | None = None,
) -> int:
    """Return the predicted peak of training, runtime included."""
    net = fixed_bytes(work, device, configuration) + sum(
        rank * rank_bytes(work, configuration, work.sides[name]) for name, rank in ranks.items()
    )
    return device.overhead + (calibration.bytes(net) if calibration else net)


def budget(device: wire.DeviceFacts, headroom: float, limit: int | None = None) -> int:
    """Return the bytes a plan may use: free memory less the headroom, to 8 significant bits, downwards.

    A limit is what it may use at most.

    The rounding (below 0.8 %) lets nodes that are the same for all purposes share one programme.
    """
    usable = math.floor(device.free_memory * (1 - headroom))
    usable = usable if limit is None else min(usable, limit)
    return usable // coarseness(usable) * coarseness(usable)


def coarseness(size: int) -> int:
    """Return the unit of a size that is kept to 8 significant bits."""
    return 1 << max(0, size.bit_length() - 8)


def _saved(work: Workload, device: wire.DeviceFacts, configuration: Configuration) -> int:
    """Return the bytes kept for the backward pass, A·x of the adapters apart.

    Layers before the first matrix to train need no backward pass and keep nothing.
    """
    tokens = configuration.micro_batch * work.length
    layers = work.shape.layers - work.first_layer
    within = tokens * _saved_per_token(work, device, configuration.precision)
    held = layers * within
    if configuration.checkpointing:
        held = layers * tokens * _checkpointed_per_token(work, device, configuration.precision) + within
    return held + (_fragmentation(work, device, configuration) if device.kind == "cpu" else 0)


def _fragmentation(work: Workload, device: wire.DeviceFacts, configuration: Configuration) -> int:
    """Return the bytes of glibc's heap lost to fragmentation between what the layers keep.

    Activations fill the gaps of unpacked weights while they are smaller, so that the larger kind of gaps
    counts; the nearer their size comes to that of the weights the fewer fit, and the weights' gaps come on
    top (how fast is fitted). Checkpointing leaves the gaps of all layers where it computes them first, and
    unpacks twice: in some processes nothing fits into the weights' gaps then.
    """
    shape, precision = work.shape, configuration.precision
    layers = shape.layers - work.first_layer
    tokens = configuration.micro_batch * work.length
    per_token = _freed_per_token(work, device, precision)
    unused = max(CPU_UNUSED, CPU_UNUSED + 0.5 - shape.intermediate / (8 * shape.hidden))
    if configuration.checkpointing:
        per_token += _saved_per_token(work, device, precision)
        per_token -= _checkpointed_per_token(work, device, precision)
        unused -= CPU_RECOMPUTED
    freed = unused * layers * tokens * per_token
    weight = shape.hidden * shape.intermediate * compute_bytes(device, precision)
    if not precision.quantized or weight > CPU_HEAP:
        return math.ceil(freed)
    # The last layer's serve its own backward pass.
    unpacked = (layers - 1) * (3 if shape.gated_mlp else 2) * weight
    times, share = (2, 1.0) if configuration.checkpointing else (1, CPU_UNPACKED)
    unfilled = times * math.pow(min(1.0, tokens / shape.hidden), 1.25)
    return math.ceil(max(share * unpacked, freed) + unfilled * unpacked)


def _checkpointed_per_token(work: Workload, device: wire.DeviceFacts, precision: Precision) -> int:
    """Return the bytes one layer keeps per token under checkpointing: its input.

    In int8 also what its linear layers take in: bitsandbytes keeps that where checkpointing does not see it.
    """
    hidden, inner = work.shape.hidden, work.shape.intermediate
    values = 4 * hidden + inner if precision.keeps_inputs else hidden
    return values * compute_bytes(device, precision)


def _saved_per_token(work: Workload, device: wire.DeviceFacts, precision: Precision) -> int:
    """Return the bytes one layer keeps per token (counted on the graphs of transformers and peft)."""
    shape = work.shape
    element = compute_bytes(device, precision)
    hidden, inner = shape.hidden, shape.intermediate
    # Query, key, value and output of the attention kernel, its mask and its log-sum.
    attention = 4 * hidden * element + work.length * element + 4 * shape.heads
    if shape.gated_mlp:
        norms, mlp = 2 * hidden * 4, 3 * inner * element  # RMSNorm in float32; gate, its activation, up
    elif shape.architecture == "gpt2":
        norms, mlp = 2 * hidden * element, 4 * inner * element  # GELU by tanh, step by step
    else:
        norms, mlp = 2 * hidden * element, inner * element
    quantizer = 0
    if precision.keeps_inputs:  # those of every linear layer; adapters share them
        quantizer = element * (hidden + inner + max(0, hidden - work.adapter_inputs))
    return attention + norms + mlp + 16 + quantizer + element * work.adapter_inputs


def _freed_per_token(work: Workload, device: wire.DeviceFacts, precision: Precision) -> int:
    """Return the bytes one layer computes per token in its forward pass and does not keep.

    Of each adapter its output, that scaled, and the sum with the layer's (a frozen one beside a quantized
    base counts half: fitted), both residual sums, what the MLP's last layer takes in, and the mask as it
    was before the attention kernel got a copy in its own type; int8 keeps what the MLP takes in, but of a
    gated one it leaves twice as much (fitted).
    """
    adapters = 1.5 if work.remainder_rank and precision.quantized else 1
    inners = (2 if work.shape.gated_mlp else 0) if precision.keeps_inputs else 1
    values = 3 * adapters * work.adapter_outputs + 2 * work.shape.hidden + inners * work.shape.intermediate
    values += work.length
    return math.ceil(values * compute_bytes(device, precision))


def _transient(work: Workload, device: wire.DeviceFacts, configuration: Configuration) -> int:
    """Return the bytes a layer needs for a moment in its backward pass."""
    shape = work.shape
    element = compute_bytes(device, configuration.precision)
    tokens = configuration.micro_batch * work.length
    unpacked = 0
    if configuration.precision.quantized:
        unpacked = shape.hidden * shape.intermediate * element
    gradients = 3 if device.kind == "cpu" else 2  # with a hole
    return gradients * tokens * (shape.intermediate + shape.hidden) * element + unpacked
