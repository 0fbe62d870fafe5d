"""Predicted against measured peak memory of training, on CPU.

`OMP_NUM_THREADS=1 python tests/bench/memory_model.py [--out tests/bench/results/memory_model.json]`

The agent's own loading, adapters and loop train BERT-base- and GPT-2-sized models with random weights, over
precision × micro-batch × rank, in one process per model and precision. Measured is the peak resident size
(VmHWM, reset through /proc/self/clear_refs); the size before the base is loaded is taken off both sides.
Resumable: measurements are kept beside the result until all are there.
"""

import argparse
import json
import multiprocessing
import sys
import tempfile
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))

from bench.bench_machine import machine
from fedpipe_api import wire
from fedpipe_api.job import FedPipeJobSpec, Precision, Task
from fedpipe_api.node import Capacity
from fedpipe_operator.planner import memory, read_shape
from fedpipe_operator.planner.workload import Configuration, workload

LENGTH, STEPS, GLOBAL_RANK = 64, 2, 32
MICRO_BATCHES, RANKS = (1, 4, 16), (4, 16)
LABELS = tuple(f"class {index}" for index in range(20))
TASKS = {"bert-base": Task.SEQUENCE_CLASSIFICATION, "gpt2": Task.CAUSAL_LM}
TOLERANCE = 0.15
MIB = 2**20


def job(name: str) -> FedPipeJobSpec:
    """The job that both sides are given."""
    labels = {"labels": LABELS} if TASKS[name] is Task.SEQUENCE_CLASSIFICATION else {}
    return FedPipeJobSpec.model_validate(
        {
            "model": {"hostPath": {"path": "/model"}, "task": TASKS[name]} | labels,
            "data": {"volume": {"hostPath": {"path": "/data"}}, "train": "t.jsonl", "maxLength": LENGTH},
            "rounds": {"count": 1, "localSteps": STEPS, "batchSize": max(MICRO_BATCHES)},
            "aggregation": {"maxGlobalRank": GLOBAL_RANK},
        }
    )


def write(name: str, directory: Path) -> None:
    """Write a model of the original size with random weights, and a global adapter."""
    import transformers

    from bench.memory_run import write_global_adapter, write_model

    labels = dict(enumerate(LABELS))
    config = transformers.BertConfig(id2label=labels) if name == "bert-base" else transformers.GPT2Config()
    write_model(config, TASKS[name], directory)
    write_global_adapter(shape(name, directory), GLOBAL_RANK, directory / "global")


def shape(name: str, directory: Path) -> wire.ModelShape:
    return read_shape(directory, TASKS[name], len(LABELS))


def measure(name: str, directory: Path, precision: Precision, results: Any) -> None:
    """Load the base and measure every point."""
    from bench.memory_run import Base
    from fedpipe_agent.train.device import Device
    from fedpipe_agent.train.loop import Settings
    from fedpipe_agent.train.model import Source, read_config
    from fedpipe_agent.train.model import read_shape as agent_shape

    device = Device(Capacity(threads=1))
    # What an agent has done when it registers and tells its overhead.
    agent_shape(read_config(Source(str(directory)), job(name).model, 0), TASKS[name])
    device.reset_peak()
    before = device.used()
    base = Base.load(directory, job(name), precision, device)
    for micro_batch in MICRO_BATCHES:
        for rank in RANKS:
            settings = Settings(steps=STEPS, micro_batch=micro_batch, accumulation=1, learning_rate=1e-4)
            ranks = {matrix.name: rank for matrix in base.shape.matrices}
            peak = base.train(directory / "global", ranks, settings)
            results.put(
                {
                    "model": name,
                    "precision": precision,
                    "microBatch": micro_batch,
                    "rank": rank,
                    "measuredMiB": round((peak - before) / MIB, 1),
                }
            )


def predicted(point: dict[str, Any], model: wire.ModelShape) -> dict[str, Any]:
    """Return a measured point with its prediction."""
    device = wire.DeviceFacts(
        kind="cpu", name="cpu", free_memory=0, overhead=0, threads=1, speed=1, kernels=()
    )
    work = workload(model, job(point["model"]), model.matrices)
    configuration = Configuration(Precision(point["precision"]), point["microBatch"])
    ranks = {matrix.name: point["rank"] for matrix in model.matrices}
    peak = memory.peak_bytes(work, device, configuration, ranks) / MIB
    return point | {"predictedMiB": round(peak, 1), "error": round(peak / point["measuredMiB"] - 1, 4)}


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
    arguments = parser.parse_args()
    part = arguments.out.with_suffix(".part")
    kept = [json.loads(line) for line in part.read_text().splitlines()] if part.exists() else []
    results = multiprocessing.get_context("fork").SimpleQueue()
    points = []
    with tempfile.TemporaryDirectory() as scratch:
        for name in TASKS:
            directory = Path(scratch) / name
            directory.mkdir()
            apart(write, name, directory)
            for precision in Precision:
                if not any((point["model"], point["precision"]) == (name, precision) for point in kept):
                    apart(measure, name, directory, precision, results)
                    fresh = [results.get() for _ in range(len(MICRO_BATCHES) * len(RANKS))]
                    with part.open("a") as file:
                        file.writelines(json.dumps(point) + "\n" for point in fresh)
                    kept += fresh
            for point in kept:
                if point["model"] == name:
                    points.append(predicted(point, shape(name, directory)))
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
    }
    print(json.dumps(summary))
    setting = {"length": LENGTH, "steps": STEPS, "globalRank": GLOBAL_RANK, "threads": 1, "seed": 0}
    report = {"machine": machine(), "setting": setting, "summary": summary, "points": points}
    arguments.out.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    part.unlink(missing_ok=True)


if __name__ == "__main__":
    main()
