# SPDX-License-Identifier: Apache-2.0
"""What a precision has to bring."""

import contextlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from fedpipe_api.precisions import Precision


@dataclass(frozen=True)
class Implementation:
    """One precision.

    Attributes:
        layer: returns a linear layer without bias of so many inputs and outputs. Weights are loaded into it
            as float32; on its way to the device it takes its precision.
        quantization: returns transformers' `quantization_config`, given the type to compute in and the names
            of the modules that stay as they are; None where weights are only cast.
        stores: whether a checkpoint is stored at it, by its own `quantization_config` of bitsandbytes.
    """

    layer: Callable[[int, int], nn.Module]
    quantization: Callable[[torch.dtype, list[str]], Any] | None = None
    stores: Callable[[dict[str, Any]], bool] = lambda found: False


IMPLEMENTATIONS: dict[Precision, Implementation] = {}


def compute_type(precision: Precision, device: torch.device) -> torch.dtype:
    """Return the type that a base at the precision computes in."""
    half = precision.computes_in == "bfloat16"
    if precision.computes_in == "device":
        half = device.type == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False)
    return torch.bfloat16 if half else torch.float32


def import_bitsandbytes() -> Any:
    """Import bitsandbytes without its use of `torch.compile`.

    It would compile its CPU fallbacks at first use wherever a C compiler happens to be present: seconds of
    work, and other rounding than on the next machine. Importing the compiler alone takes seconds.
    """

    def as_it_is(function: Any = None, **_: Any) -> Any:
        return function if function is not None else as_it_is

    patched: Any = torch
    compiler, patched.compile = patched.compile, as_it_is
    try:
        import bitsandbytes
    finally:
        patched.compile = compiler
    return bitsandbytes


def import_peft() -> Any:
    """Import peft; it imports bitsandbytes too, at every precision, so ours comes first."""
    with contextlib.suppress(ImportError):  # without bitsandbytes peft has no need of it either
        import_bitsandbytes()
    import peft

    return peft
