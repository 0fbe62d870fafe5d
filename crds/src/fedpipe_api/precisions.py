# SPDX-License-Identifier: Apache-2.0
"""The precisions of the frozen base: all that planner, probe and agent know of each (METHOD §3).

Another one is a record here, and its loading and kernel in the agent's `train/precisions/`.
"""

from dataclasses import dataclass
from typing import Annotated, ClassVar, Literal

from pydantic import AfterValidator, WithJsonSchema
from pydantic_core import PydanticCustomError

from .registry import Record


@dataclass(frozen=True, eq=False, repr=False)
class Precision(Record):
    """Precision of the frozen base (METHOD §3).

    Attributes:
        name: in manifests, on the wire and in status.
        weight_bytes: of one weight of a frozen linear layer.
        tolerance: relative error (Frobenius) of its kernel above which the kernel counts as broken.
        worth: to the planner, where all ranks at their upper bound are worth 1. So a higher precision is
            taken where it costs few ranks.
        computes_in: type of activations; `device`: bfloat16 where CUDA has it in hardware, else float32.
        slowdown: on CUDA, nominal, of the rate of the type that it computes in.
        capability: CUDA compute capability that it needs.
        quantized: its linear layers are unpacked to compute with.
        keeps_inputs: its linear layers keep their inputs for the backward pass, where checkpointing does not
            see them.
        takes_remainder: the frozen remainder of the global adapter goes into its weights.
        setting: the word for it in `spec.quantization`; default: its name.
    """

    name: str
    weight_bytes: float
    tolerance: float
    worth: float
    computes_in: Literal["float32", "bfloat16", "device"] = "device"
    slowdown: float = 1.0
    capability: tuple[int, int] | None = None
    quantized: bool = False
    keeps_inputs: bool = False
    takes_remainder: bool = False
    setting: str = ""

    FP32: ClassVar["Precision"]
    BF16: ClassVar["Precision"]
    INT8: ClassVar["Precision"]
    NF4: ClassVar["Precision"]


Precision.FP32 = Precision(
    "fp32",
    weight_bytes=4.0,
    tolerance=5e-3,
    worth=0.10,
    computes_in="float32",
    takes_remainder=True,
    setting="none",
)
Precision.BF16 = Precision(
    "bf16",
    weight_bytes=2.0,
    tolerance=3e-2,
    worth=0.09,
    computes_in="bfloat16",
    capability=(8, 0),  # its tensor cores came with Ampere
)
Precision.INT8 = Precision(
    "int8",
    weight_bytes=1.0,
    tolerance=5e-2,
    worth=0.05,
    slowdown=3.0,  # for handling outliers
    capability=(7, 5),  # the tensor cores that LLM.int8 needs came with Turing
    quantized=True,
    keeps_inputs=True,
)
Precision.NF4 = Precision(
    "nf4",
    # Half a byte, one byte of scale per 64 weights, and a float32 per 256 scales (double quantization).
    weight_bytes=0.516,
    tolerance=0.25,
    worth=0.0,
    slowdown=1.4,  # for unpacking
    capability=(6, 0),  # bitsandbytes builds its 4-bit kernels for Pascal and later
    quantized=True,
)

AUTO = "auto"


def allowed(quantization: str) -> tuple[Precision, ...]:
    """Return the precisions that `spec.quantization` allows."""
    return tuple(p for p in Precision if quantization in (AUTO, p.setting or p.name))


def _setting(value: str) -> str:
    if not allowed(value):
        *words, last = (repr(word) for word in _settings())
        wanted = f"{', '.join(words)} or {last}"
        raise PydanticCustomError("literal_error", "Input should be {expected}", {"expected": wanted})
    return value


def _settings() -> list[str]:
    return [AUTO, *(precision.setting or precision.name for precision in Precision)]


Quantization = Annotated[
    str, AfterValidator(_setting), WithJsonSchema({"type": "string", "enum": _settings()})
]
"""`spec.quantization`: a precision, or `auto`."""
