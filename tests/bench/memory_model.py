"""Predicted against measured peak memory of training, on CPU.

`python tests/bench/memory_model.py [--out tests/bench/results/memory_model.json]`

The agent's own loading, adapters and loop train BERT-base- and GPT-2-sized models with random weights, over
precision × micro-batch × rank, in one process per model and precision. Measured is the peak resident size
(VmHWM, reset through /proc/self/clear_refs); the size before the base is loaded is taken off both sides.
"""

import argparse
import ctypes
import json
import multiprocessing
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))

import numpy as np
from bench_machine import machine

from fedpipe_api import wire
from fedpipe_api.job import FedPipeJobSpec, Precision, Task
from fedpipe_api.node import Capacity
from fedpipe_operator.planner import memory
from fedpipe_operator.planner.workload import Configuration, workload

LENGTH, STEPS, GLOBAL_RANK = 64, 2, 32
MICRO_BATCHES, RANKS = (1, 4, 16), (4, 16)
LABELS = tuple(f"class {index}" for index in range(20))
TASKS = {"bert-base": Task.SEQUENCE_CLASSIFICATION, "gpt2": Task.CAUSAL_LM}
TOLERANCE = 0.15
M_MMAP_THRESHOLD, MAPPED_FROM = -3, 256 * 1024


def write_model(name: str, directory: Path) -> None:
    """Write a model of the original size with random weights."""
    import torch
    import transformers

    torch.manual_seed(0)
    if name == "bert-base":
        config = transformers.BertConfig()
        model = transformers.AutoModelForSequenceClassification.from_config(config)
    else:
        config = transformers.GPT2Config()
        model = transformers.AutoModelForCausalLM.from_config(config)
    model.save_pretrained(directory)


def job(task: Task) -> FedPipeJobSpec:
    """The job that both sides are given."""
    return FedPipeJobSpec.model_validate(
        {
            "model": {"hostPath": {"path": "/model"}, "task": task}
            | ({"labels": LABELS} if task is Task.SEQUENCE_CLASSIFICATION else {}),
            "data": {"volume": {"hostPath": {"path": "/data"}}, "train": "t.jsonl", "maxLength": LENGTH},
            "rounds": {"count": 1, "localSteps": STEPS, "batchSize": max(MICRO_BATCHES)},
            "aggregation": {"maxGlobalRank": GLOBAL_RANK},
        }
    )


def global_adapter(shape: wire.ModelShape, path: Path) -> None:
    """Write a global adapter at its full rank, so that there is a remainder to hold."""
    from safetensors.numpy import save_file

    generator = np.random.default_rng(0)
    tensors = {}
    for matrix in shape.matrices:
        tensors[matrix.name + wire.LORA_B] = generator.normal(0, 1e-3, (matrix.rows, GLOBAL_RANK))
        tensors[matrix.name + wire.LORA_A] = generator.normal(0, 1, (GLOBAL_RANK, matrix.columns))
    for tensor in shape.head:
        tensors[wire.HEAD + tensor.name] = generator.normal(0, 0.02, tensor.shape)
    save_file({name: value.astype(np.float32) for name, value in tensors.items()}, path)


def settle(loaded: Any, precision: Precision) -> None:
    """Bring the base to its lasting size: no checkpoint mapped beside it, all embeddings used."""
    if precision in (Precision.INT8, Precision.NF4):
        for parameter in loaded.parameters():
            parameter.data = parameter.data.clone()
    loaded.get_input_embeddings().weight.sum()


def measure_precision(name: str, directory: Path, precision: Precision, results: Any) -> None:
    """Load the base and measure every point."""
    import torch

    from fedpipe_agent.train import model as base
    from fedpipe_agent.train.adapters import Adapters, GlobalAdapter
    from fedpipe_agent.train.data import Samples
    from fedpipe_agent.train.device import Device
    from fedpipe_agent.train.loop import Settings, train

    # Left alone, glibc keeps freed activations in pieces it cannot use again: up to twice the memory.
    ctypes.CDLL(None).mallopt(M_MMAP_THRESHOLD, MAPPED_FROM)
    device = Device(Capacity(threads=1))
    torch.manual_seed(0)
    task = TASKS[name]
    spec = job(task)
    config = base.read_config(base.Source(str(directory)), spec.model, 0)
    shape = base.read_shape(config, task)
    path = directory / "global.safetensors"
    if not path.exists():
        global_adapter(shape, path)
    device.reset_peak()
    facts = device.facts(())
    loaded = base.load(base.Source(str(directory)), config, task, precision, device.torch)
    settle(loaded, precision)
    pristine = directory if precision is Precision.FP32 else None
    adapters = Adapters(loaded, shape, alpha=16, rs_lora=False, names=(0,), pristine=pristine)
    generator = np.random.default_rng(0)
    samples = Samples(
        generator.integers(1, 1000, (max(MICRO_BATCHES), LENGTH)).tolist(),
        [0] * max(MICRO_BATCHES),
        task,
        0,
    )
    work = workload(shape, spec, shape.matrices)

    def point(micro_batch: int, rank: int) -> None:
        ranks = {matrix.name: rank for matrix in shape.matrices}
        with GlobalAdapter(path, shape) as adapter:
            adapters.install(adapter, ranks, wire.Start.SPLIT, 1)
        settings = Settings(steps=STEPS, micro_batch=micro_batch, accumulation=1, learning_rate=1e-4)
        order = iter([np.arange(micro_batch)] * STEPS)
        outcome = train(loaded, samples, order, settings, device)
        configuration = Configuration(precision, micro_batch)
        predicted = memory.peak_bytes(work, facts, configuration, ranks) - facts.overhead
        measured = outcome.peak_bytes - facts.overhead
        results.put(
            {
                "model": name,
                "precision": precision,
                "microBatch": micro_batch,
                "rank": rank,
                "measuredMiB": round(measured / 2**20, 1),
                "predictedMiB": round(predicted / 2**20, 1),
                "error": round(predicted / measured - 1, 4),
                "stepSeconds": round(outcome.step_seconds, 3),
            }
        )

    for micro_batch in MICRO_BATCHES:
        for rank in RANKS:
            point(micro_batch, rank)


def apart(function: Any, *arguments: Any) -> None:
    """Run a function in a forked process and wait for it."""
    process = multiprocessing.get_context("fork").Process(target=function, args=arguments)
    process.start()
    process.join()
    if process.exitcode:
        sys.exit(f"a measuring process ended with {process.exitcode}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results" / "memory_model.json")
    parser.add_argument("--models", nargs="+", default=list(TASKS))
    parser.add_argument("--precisions", nargs="+", type=Precision, default=list(Precision))
    arguments = parser.parse_args()
    results = multiprocessing.get_context("fork").SimpleQueue()
    points = []
    begin = time.monotonic()
    with tempfile.TemporaryDirectory() as scratch:
        for name in arguments.models:
            directory = Path(scratch) / name
            directory.mkdir()
            apart(write_model, name, directory)
            for precision in arguments.precisions:
                apart(measure_precision, name, directory, precision, results)
                while not results.empty():
                    points.append(results.get())
                    print(
                        "{model:10} {precision:5} b {microBatch:2} r {rank:2}  measured {measuredMiB:7.1f}  "
                        "predicted {predictedMiB:7.1f} MiB  {error:+.1%}".format(**points[-1]),
                        flush=True,
                    )
    errors = [point["error"] for point in points]
    summary = {
        "points": len(points),
        "withinTolerance": sum(abs(error) <= TOLERANCE for error in errors),
        "tolerance": TOLERANCE,
        "worstUnder": min(errors),
        "worstOver": max(errors),
        "seconds": round(time.monotonic() - begin),
    }
    print(json.dumps(summary))
    setting = {"length": LENGTH, "steps": STEPS, "globalRank": GLOBAL_RANK, "threads": 1}
    report = {"machine": machine(), "setting": setting, "summary": summary, "points": points}
    arguments.out.parent.mkdir(parents=True, exist_ok=True)
    arguments.out.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
