# SPDX-License-Identifier: Apache-2.0
"""4-bit NormalFloat of bitsandbytes, with double quantization."""

from typing import Any

import torch
from torch import nn

from fedpipe_api.precisions import Precision

from .implementation import IMPLEMENTATIONS, Implementation, import_bitsandbytes


def _layer(inputs: int, outputs: int) -> nn.Module:
    kind: Any = import_bitsandbytes().nn.Linear4bit
    layer: nn.Module = kind(inputs, outputs, bias=False, compress_statistics=True, quant_type="nf4")
    return layer


def _quantization(dtype: torch.dtype, kept: list[str]) -> Any:
    from transformers import BitsAndBytesConfig

    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=dtype,
        llm_int8_skip_modules=kept,
    )


IMPLEMENTATIONS[Precision.NF4] = Implementation(
    _layer, _quantization, lambda found: bool(found.get("load_in_4bit"))
)
