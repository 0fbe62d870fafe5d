# SPDX-License-Identifier: Apache-2.0
"""Weights that are not quantized: float32 and bfloat16."""

from torch import nn

from fedpipe_api.precisions import Precision

from .implementation import IMPLEMENTATIONS, Implementation


def _layer(inputs: int, outputs: int) -> nn.Module:
    return nn.Linear(inputs, outputs, bias=False)


IMPLEMENTATIONS[Precision.FP32] = IMPLEMENTATIONS[Precision.BF16] = Implementation(_layer)
