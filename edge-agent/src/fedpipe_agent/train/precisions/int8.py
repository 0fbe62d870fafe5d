# SPDX-License-Identifier: Apache-2.0
"""LLM.int8 of bitsandbytes."""

from typing import Any

import torch
from torch import nn

from fedpipe_api.precisions import Precision

from .implementation import IMPLEMENTATIONS, Implementation, import_bitsandbytes


def _layer(inputs: int, outputs: int) -> nn.Module:
    kind: Any = import_bitsandbytes().nn.Linear8bitLt
    layer: nn.Module = kind(inputs, outputs, bias=False, has_fp16_weights=False, threshold=6.0)
    return layer


def _quantization(dtype: torch.dtype, kept: list[str]) -> Any:
    from transformers import BitsAndBytesConfig

    return BitsAndBytesConfig(load_in_8bit=True, llm_int8_skip_modules=kept)


IMPLEMENTATIONS[Precision.INT8] = Implementation(
    _layer, _quantization, lambda found: bool(found.get("load_in_8bit"))
)
