# SPDX-License-Identifier: Apache-2.0
"""Predicted against measured peak memory of training, on CUDA where it is there, else on CPU.

`OMP_NUM_THREADS=1 python tests/bench/memory_model.py [--out tests/bench/results/memory_model.json] [--without bf16]`

The agent's own loading, adapters and loop train BERT-base- and GPT-2-sized models with random weights, over
precision × micro-batch × rank, in one process per model and precision. Measured is the peak resident size
(VmHWM, reset through /proc/self/clear_refs); the size before the base is loaded is taken off both sides.
On CUDA (`memory_model_cuda.json`) also a Llama-7B-sized model, and over sequence lengths; measured is the peak that
torch's allocator gave out, and beside it what it reserved and what the base takes. Points that are predicted not to
fit are left out.
Resumable: measurements are kept beside the result until all are there.
"""

import argparse
import itertools
import json
import multiprocessing
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))

from bench.bench_machine import machine
from fedpipe_api import wire
from fedpipe_api.job import FedPipeJobSpec, Precision, Task
from fedpipe_api.node import Capacity
from fedpipe_operator.planner import training_memory
from fedpipe_operator.planner.workload import Configuration, workload

LENGTH, STEPS, ACCUMULATION, GLOBAL_RANK = 64, 8, 2, 32
MICRO_BATCHES, RANKS = (1, 4, 16), (4, 16)
LABELS = tuple(f"class {index}" for index in range(20))
TASKS = {"bert-base": Task.SEQUENCE_CLASSIFICATION, "gpt2": Task.CAUSAL_LM, "llama-7b": Task.CAUSAL_LM}
CPU = wire.DeviceFacts(kind="cpu", name="cpu", free_memory=0, overhead=0, threads=1, speed=1, kernels=())
RESULTS = Path(__file__).parent / "results"
MIB = 2**20


@dataclass(frozen=True)
class Grid:
    """What is measured on a kind of device, beside micro-batches and ranks."""

    file: str
    models: tuple[str, ...]
    precisions: tuple[Precision, ...]
    lengths: tuple[int, ...]
    tolerance: float


GRIDS = {
    "cpu": Grid("memory_model.json", ("bert-base", "gpt2"), tuple(Precision), (LENGTH,), 0.15),
    "cuda": Grid(
        "memory_model_cuda.json",
        tuple(TASKS),
        (Precision.BF16, Precision.INT8, Precision.NF4),
        (LENGTH, 512),
        0.10,
    ),
}
MODULES = {
    "bert-base": ("query", "key", "value", "attention.output.dense"),
    "gpt2": ("attn.c_attn", "attn.c_proj"),
    "llama-7b": ("q_proj", "k_proj", "v_proj", "o_proj"),
}
NF4_BASE = 0.30
"""Of the bf16 base of a Llama-7B, at most."""


def job(name: str, length: int = LENGTH) -> FedPipeJobSpec:
    """The job that both sides are given."""
    labels = {"labels": LABELS} if TASKS[name] is Task.SEQUENCE_CLASSIFICATION else {}
    return FedPipeJobSpec.model_validate(
        {
            "model": {"hostPath": {"path": "/model"}, "task": TASKS[name]} | labels,
            "data": {"volume": {"hostPath": {"path": "/data"}}, "train": "t.jsonl", "maxLength": length},
            "rounds": {"count": 1, "localSteps": STEPS, "batchSize": max(MICRO_BATCHES)},
            "adapter": {"modules": MODULES[name]},
            "aggregation": {"maxGlobalRank": GLOBAL_RANK},
        }
    )


def write(name: str, directory: Path) -> None:
    """Write a model of the original size with random weights, and a global adapter."""
    import transformers

    from bench.memory_run import write_global_adapter, write_model

    configs = {
        "bert-base": lambda: transformers.BertConfig(id2label=dict(enumerate(LABELS))),
        "gpt2": transformers.GPT2Config,
        # The configuration's own sizes are the 7B's. On disk in bf16, 13 GB.
        "llama-7b": lambda: transformers.LlamaConfig(dtype="bfloat16"),
    }
    write_model(configs[name](), TASKS[name], directory)
    write_global_adapter(shape(name, directory), GLOBAL_RANK, directory / "global")


def shape(name: str, directory: Path) -> wire.ModelShape:
    from fedpipe_agent.train.model import Source, read_config
    from fedpipe_agent.train.shape import read_shape

    spec = job(name)
    return read_shape(read_config(Source(str(directory)), spec.model, 0), TASKS[name], spec.adapter.modules)


def show(results: Any) -> None:
    """Report the facts of the device here."""
    from fedpipe_agent.train.device import Device

    results.put(Device(Capacity(threads=1)).facts(()).to_json())


def measure(name: str, directory: Path, precision: Precision, facts: wire.DeviceFacts, results: Any) -> None:
    """Load the base and measure every point."""
    import torch

    from bench.memory_run import Base
    from fedpipe_agent.train.device import Device
    from fedpipe_agent.train.loop import Settings

    device = Device(Capacity(threads=1))
    # What an agent has done when it registers and reports its overhead.
    shape(name, directory)
    device.reset_peak()
    before = device.used()
    base = Base.load(directory, job(name), precision, device)
    taken = device.used() - before
    points = []
    for base.length, micro_batch, rank in itertools.product(GRIDS[facts.kind].lengths, MICRO_BATCHES, RANKS):
        point = {"model": name, "precision": precision, "microBatch": micro_batch, "rank": rank}
        if device.cuda:
            point["length"] = base.length
            if facts.overhead + MIB * predict(point, base.shape, facts) > facts.free_memory:
                continue
        settings = Settings(STEPS, micro_batch, ACCUMULATION, learning_rate=1e-4)
        ranks = {matrix.name: rank for matrix in base.shape.matrices}
        peak = base.train(directory / "global", ranks, settings)
        point["measuredMiB"] = round((peak - before) / MIB, 1)
        if device.cuda:
            point["reservedMiB"] = round(torch.cuda.max_memory_reserved() / MIB, 1)
            point["baseMiB"] = round(taken / MIB, 1)
        points.append(point)
    results.put(points)


def predict(point: dict[str, Any], model: wire.ModelShape, device: wire.DeviceFacts) -> float:
    """Return the predicted peak of a point above the runtime, in MiB."""
    work = workload(model, job(point["model"], point.get("length", LENGTH)), model.matrices)
    configuration = Configuration(Precision.of(point["precision"]), point["microBatch"])
    ranks = {matrix.name: point["rank"] for matrix in model.matrices}
    return (training_memory.peak_bytes(work, device, configuration, ranks) - device.overhead) / MIB


def predicted(
    point: dict[str, Any], model: wire.ModelShape, device: wire.DeviceFacts = CPU
) -> dict[str, Any]:
    """Return a measured point with its prediction."""
    peak = predict(point, model, device)
    return point | {"predictedMiB": round(peak, 1), "error": round(peak / point["measuredMiB"] - 1, 4)}


def nf4_shares(points: list[dict[str, Any]]) -> dict[str, float]:
    """Return for each model the size of its NF4 base as a share of that in bf16."""
    sizes = {(point["model"], point["precision"]): point["baseMiB"] for point in points}
    return {
        name: round(size / sizes[name, Precision.BF16], 4)
        for (name, precision), size in sizes.items()
        if precision == Precision.NF4 and (name, Precision.BF16) in sizes
    }


def apart(function: Any, *arguments: Any) -> None:
    """Run a function in a forked process and wait for it."""
    process = multiprocessing.get_context("fork").Process(target=function, args=arguments)
    process.start()
    process.join()
    if process.exitcode:
        sys.exit(f"a measuring process ended with {process.exitcode}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, help="default: by the kind of device, in results")
    parser.add_argument(
        "--without",
        type=Precision.of,
        action="append",
        default=[],
        help="leave a precision out, as bf16 where the processor emulates it",
    )
    arguments = parser.parse_args()
    results = multiprocessing.get_context("fork").SimpleQueue()
    apart(show, results)
    facts = wire.DeviceFacts.model_validate_json(results.get())
    grid = GRIDS[facts.kind]
    out = arguments.out or RESULTS / grid.file
    part = out.with_suffix(".part")
    kept = [json.loads(line) for line in part.read_text().splitlines()] if part.exists() else []
    points = []
    with tempfile.TemporaryDirectory() as scratch:
        for name in grid.models:
            directory = Path(scratch) / name
            directory.mkdir()
            apart(write, name, directory)
            for precision in (each for each in grid.precisions if each not in arguments.without):
                if not any((point["model"], point["precision"]) == (name, precision) for point in kept):
                    apart(measure, name, directory, precision, facts, results)
                    fresh = results.get()
                    with part.open("a") as file:
                        file.writelines(json.dumps(point) + "\n" for point in fresh)
                    kept += fresh
            for point in kept:
                if point["model"] == name:
                    points.append(predicted(point, shape(name, directory), facts))
                    print(
                        "{model:10} {precision:5} l {length:3} b {microBatch:2} r {rank:2}  measured {measuredMiB:7.1f}  "
                        "predicted {predictedMiB:7.1f} MiB  {error:+.1%}".format(
                            **{"length": LENGTH} | points[-1]
                        ),
                        flush=True,
                    )
    errors = [point["error"] for point in points]
    summary = {
        "points": len(points),
        "withinTolerance": sum(abs(error) <= grid.tolerance for error in errors),
        "tolerance": grid.tolerance,
        "worstUnder": min(errors),
        "worstOver": max(errors),
    }
    setting = {
        "length": LENGTH,
        "steps": STEPS,
        "accumulation": ACCUMULATION,
        "globalRank": GLOBAL_RANK,
        "threads": 1,
        "seed": 0,
        "without": arguments.without,
    }
    if facts.kind == "cuda":
        summary |= {"nf4Base": nf4_shares(points), "nf4BaseLimit": NF4_BASE}
        setting |= {"length": grid.lengths, "device": facts.to_dict()}
    print(json.dumps(summary))
    report = {"machine": machine(), "setting": setting, "summary": summary, "points": points}
    out.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    part.unlink(missing_ok=True)


if __name__ == "__main__":
    main()
