# SPDX-License-Identifier: Apache-2.0
"""What `data.packing` saves: padding, forward passes and time of a step, with and without it in turn.

`python tests/bench/packing.py` writes `results/packing.json`: a small random Llama in float32, rows of a prompt and a
completion whose lengths are drawn from a log-normal distribution.
"""

import json
import os
import sys
import time
from pathlib import Path
from statistics import median
from typing import Any

sys.path.insert(0, str(Path(__file__).parent.parent))
os.environ |= {"HF_HUB_OFFLINE": "1", "TRANSFORMERS_VERBOSITY": "error", "CUDA_VISIBLE_DEVICES": ""}

import numpy as np
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from bench.bench_machine import commit, machine
from fedpipe_agent.train.data import Samples, step_order
from fedpipe_agent.train.device import Device
from fedpipe_agent.train.loop import MicroBatches
from fedpipe_agent.train.tokenization import Sample
from fedpipe_api.job import Task
from fedpipe_api.node import Capacity

RESULTS = Path(__file__).parent / "results" / "packing.json"
LENGTH, MEDIAN, SPREAD = 256, 32, 0.7
ROWS, BATCH, STEPS = 1024, 32, 13
MICRO_BATCHES = (1, 4, 16)
MODEL = {
    "vocab_size": 4096, "hidden_size": 256, "intermediate_size": 1024, "num_hidden_layers": 4,
    "num_attention_heads": 4, "max_position_embeddings": LENGTH,
}  # fmt: skip


def rows() -> Samples:
    """Return rows of which the second half is learned."""
    random = np.random.default_rng(0)
    lengths = np.clip(random.lognormal(np.log(MEDIAN), SPREAD, ROWS), 4, LENGTH).astype(int)
    drawn = [random.integers(1, MODEL["vocab_size"], length) for length in lengths]
    return Samples([Sample(ids, np.arange(len(ids)) >= len(ids) // 2) for ids in drawn], Task.CAUSAL_LM, 0)


class Timed:
    """One way to compute a step: its seconds, and what the model saw."""

    def __init__(self, model: Any, samples: Samples, size: int, packed: int | None) -> None:
        self._model, self._work = (
            model,
            MicroBatches(
                model, list(model.parameters()), samples, Device(Capacity(threads=1)), size, packed=packed
            ),
        )
        self.seconds: list[float] = []
        self._tokens = self._computed = self._passes = 0

    def step(self, chosen: np.ndarray, *, counted: bool = True) -> None:
        """Compute the gradients of the rows of a step."""
        shapes: list[tuple[int, ...]] = []
        seen = self._model.model.embed_tokens.register_forward_pre_hook(
            lambda _, inputs: shapes.append(inputs[0].shape)
        )
        begin = time.perf_counter()
        tokens = self._work.accumulate(chosen)[1]
        seconds = time.perf_counter() - begin
        seen.remove()
        if counted:
            self.seconds.append(seconds)
            self._tokens += tokens
            self._computed += sum(rows * columns for rows, columns in shapes)
            self._passes += len(shapes)

    def figures(self) -> dict[str, float]:
        """Return the share of padding, forward passes of a step and its median seconds."""
        return {
            "padding": round(1 - self._tokens / self._computed, 3),
            "passes": round(self._passes / len(self.seconds), 1),
            "step_seconds": round(median(self.seconds), 3),
        }


def main() -> None:
    """Measure and write the result."""
    torch.set_num_threads(1)
    torch.manual_seed(0)
    model = LlamaForCausalLM(LlamaConfig(**MODEL, use_cache=False)).train()
    samples = rows()
    order = step_order(samples, BATCH, "packing")
    steps = [next(order) for _ in range(STEPS)]
    found = []
    for size in MICRO_BATCHES:
        plain, packed = (Timed(model, samples, size, length) for length in (None, LENGTH))
        for number, chosen in enumerate(steps):
            # The first warms up; who begins alternates, as a machine that slows down would favour one.
            for way in (plain, packed) if number % 2 else (packed, plain):
                way.step(chosen, counted=number > 0)
        ratios = sorted(a / b for a, b in zip(plain.seconds, packed.seconds, strict=True))
        found.append({
            "micro_batch": size, "plain": plain.figures(), "packed": packed.figures(),
            "speedup": {"median": round(median(ratios), 2), "least": round(ratios[0], 2), "most": round(ratios[-1], 2)},
        })  # fmt: skip
        print(found[-1], flush=True)
    rows_of = {
        "rows": ROWS,
        "median_tokens": float(np.median(samples.lengths)),
        "max_length": LENGTH,
        "batch": BATCH,
    }
    result = {"machine": machine(), "commit": commit(), "seed": 0, "model": MODEL, **rows_of, "found": found}
    RESULTS.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
