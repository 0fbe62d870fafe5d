"""Is a plan made for a memory budget ever exceeded? Random budgets and jobs, on CPU.

`OMP_NUM_THREADS=1 python tests/bench/budget.py [--pairs 200] [--seed 0]`

Each pair is a random BERT-, GPT-2- or Llama-shaped model with random weights, a job (sequence length, batch,
rank bounds, global rank, proximal term) with precision auto, and a budget around what the job needs. The
planner plans for the budget; the agent's own code then evaluates and trains two steps by the plan in a process of its
own. Compared are its peak resident size and the budget, both above the loaded runtime's.

To keep a pair short its process is forked from one that has trained before. What a first training takes beside
the model (modules, kernels, thread buffers) is measured once per precision, in fresh processes, and added to
every peak. Checkpoint pages read while loading are the kernel's to take back and do not count. Resumable.
"""

import argparse
import ctypes
import itertools
import json
import multiprocessing
import os
import random
import statistics
import sys
import tempfile
import time
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))

from bench_machine import machine

from fedpipe_api import wire
from fedpipe_api.job import FedPipeJobSpec, Precision, Task
from fedpipe_api.node import Capacity
from fedpipe_operator.planner import NodeFacts, PlanRequest, memory, plan
from fedpipe_operator.planner.workload import Configuration, workload

MIB = 2**20
OPERATIONS = (2e9, 2e10)
"""Of one optimizer step, at least and at most: keeps a pair to a few seconds."""
STEPS, ACCUMULATION = 2, 2
MADV_POPULATE_READ = 22


@dataclass(frozen=True)
class Pair:
    """A random model and job, and where the budget lies: 0 is the least that any plan takes, 1 the most."""

    kind: str
    hidden: int
    heads: int
    inner: int
    layers: int
    vocabulary: int
    length: int
    batch: int = 4
    low: int = 2
    high: int = 8
    global_rank: int = 16
    proximal: float = 0.0
    share: float = 1.0

    @property
    def task(self) -> Task:
        return Task.SEQUENCE_CLASSIFICATION if self.kind == "bert" else Task.CAUSAL_LM

    def operations(self) -> float:
        """Of a forward and backward pass over the batch."""
        weights = self.layers * self.hidden * (4 * self.hidden + 3 * self.inner)
        weights += 0 if self.kind == "bert" else self.hidden * self.vocabulary
        return 4.0 * self.batch * self.length * weights

    def config(self) -> Any:
        """Return the transformers configuration."""
        import transformers

        if self.kind == "gpt2":
            return transformers.GPT2Config(
                vocab_size=self.vocabulary,
                n_embd=self.hidden,
                n_head=self.heads,
                n_inner=self.inner,
                n_layer=self.layers,
                n_positions=512,
                bos_token_id=0,
                eos_token_id=0,
            )
        sizes = {
            "vocab_size": self.vocabulary,
            "hidden_size": self.hidden,
            "num_attention_heads": self.heads,
            "intermediate_size": self.inner,
            "num_hidden_layers": self.layers,
            "max_position_embeddings": 512,
        }
        if self.kind == "bert":
            return transformers.BertConfig(num_labels=3, **sizes)
        return transformers.LlamaConfig(**sizes)

    def spec(self) -> FedPipeJobSpec:
        """Return the job."""
        labels = {"labels": ("a", "b", "c")} if self.task is Task.SEQUENCE_CLASSIFICATION else {}
        return FedPipeJobSpec.model_validate(
            {
                "model": {"hostPath": {"path": "/model"}, "task": self.task} | labels,
                "data": {
                    "volume": {"hostPath": {"path": "/data"}},
                    "train": "t.jsonl",
                    "maxLength": self.length,
                },
                "rounds": {"count": 1, "localSteps": STEPS, "batchSize": self.batch, "deadline": "1h"},
                "adapter": {"ranks": {"min": self.low, "max": self.high}, "selection": {"mode": "all"}},
                "aggregation": {"maxGlobalRank": self.global_rank},
                "optimizer": {"proximal": self.proximal},
                "quantization": "auto",
            }
        )


def drawn(seed: int, index: int) -> Pair:
    """Return a random pair that a core trains within seconds."""
    random_ = random.Random(f"budget {seed} {index}")
    while True:
        heads = random_.choice((2, 4, 8))
        hidden = heads * random_.choice((16, 32, 64))
        pair = Pair(
            kind=random_.choice(("bert", "gpt2", "llama")),
            hidden=hidden,
            heads=heads,
            inner=hidden * random_.choice((2, 3, 4)),
            layers=random_.randint(1, 6),
            vocabulary=random_.choice((500, 2000, 8000, 30000)),
            length=random_.choice((16, 32, 64, 128, 256, 512)),
            batch=random_.choice((1, 2, 4, 8, 16, 32)),
            low=random_.choice((1, 2, 4)),
            high=random_.choice((4, 8, 16, 32)),
            global_rank=random_.choice((8, 16, 32, 64)),
            proximal=random_.choice((0.0, 0.0, 0.01)),
            share=random_.uniform(-0.1, 1.1),
        )
        if OPERATIONS[0] <= pair.operations() <= OPERATIONS[1]:
            return pair


def device_facts(overhead: int, free: int) -> wire.DeviceFacts:
    """Return a CPU node with so much memory, on which every precision works."""
    return wire.DeviceFacts(
        kind="cpu",
        name="cpu",
        free_memory=free,
        overhead=overhead,
        threads=1,
        speed=1.0,
        kernels=tuple(
            wire.KernelResult(precision=precision, usable=True, seconds=0.004) for precision in Precision
        ),
    )


def planned(pair: Pair, shape: wire.ModelShape, overhead: int) -> tuple[wire.NodePlan | str, int]:
    """Return the plan, or why there is none, and the bytes it may use above the runtime."""
    spec = pair.spec()
    work = workload(shape, spec, shape.matrices)
    empty = device_facts(overhead, overhead)
    needs = [
        memory.peak_bytes(work, empty, Configuration(precision, size, checkpointing), ranks)
        for precision in Precision
        for size, ranks in ((1, {}), (pair.batch, dict.fromkeys(work.sides, pair.high)))
        for checkpointing in (False, True)
    ]
    needed = min(needs) + pair.share * (max(needs) - min(needs))
    request = PlanRequest(shape, spec, (), headroom=0.1)
    free = round(needed / (1 - request.headroom))
    facts = NodeFacts("node", device_facts(overhead, free), samples=100)
    found = plan(PlanRequest(shape, spec, (facts,), headroom=request.headroom))
    return found.nodes.get("node") or found.left_out["node"], found.budgets["node"] - overhead


def map_libraries() -> None:
    """Map every page of the libraries in, so that none of them counts as growth."""
    libc = ctypes.CDLL(None)
    for line in Path("/proc/self/maps").read_text().splitlines():
        span, rights, _, _, _, *name = line.split()
        if name and name[0].startswith("/") and rights.startswith("r"):
            begin, end = (int(edge, 16) for edge in span.split("-"))
            libc.madvise(ctypes.c_void_p(begin), ctypes.c_size_t(end - begin), MADV_POPULATE_READ)


def growth(pair: Pair, precision: Precision, chosen: wire.NodePlan, warm: bool, results: Any) -> None:
    """Put the bytes of the process now, and the peak bytes above them of loading and training by a plan."""
    from memory_run import Base, write_global_adapter, write_model

    from fedpipe_agent.train.device import Device
    from fedpipe_agent.train.loop import Settings
    from fedpipe_agent.train.model import read_shape

    device = Device(Capacity(threads=1))
    shape = read_shape(pair.config(), pair.task)
    with tempfile.TemporaryDirectory() as scratch:
        directory = Path(scratch)
        write_model(pair.config(), pair.task, directory)
        write_global_adapter(shape, pair.global_rank, directory / "global")
        if warm:
            map_libraries()
        device.reset_peak()
        before = device.used()
        base = Base.load(directory, pair.spec(), precision, device)
        settings = Settings(
            steps=STEPS,
            micro_batch=chosen.micro_batch,
            accumulation=min(chosen.accumulation, ACCUMULATION),
            learning_rate=1e-4,
            proximal=pair.proximal,
            checkpointing=chosen.checkpointing,
        )
        peak = base.train(directory / "global", chosen.ranks, settings, evaluate=True)
    results.put((before, peak - before))


def apart(kind: str, *arguments: Any) -> tuple[int, int]:
    """Run `growth` in a process of its own and return what it put."""
    context: Any = multiprocessing.get_context(kind)
    results = context.SimpleQueue()
    process = context.Process(target=growth, args=(*arguments, results))
    process.start()
    process.join()
    if process.exitcode:
        sys.exit(f"a measuring process ended with {process.exitcode}")
    found: tuple[int, int] = results.get()
    return found


def first_use() -> dict[Precision, tuple[int, int]]:
    """Return by precision the loaded runtime's bytes and what its first training takes beside a tiny model."""
    tiny = Pair("bert", hidden=32, heads=2, inner=64, layers=1, vocabulary=64, length=16)
    names = [f"bert.encoder.layer.0.attention.self.{part}" for part in ("query", "key", "value")]
    return {
        precision: apart("spawn", tiny, precision, node_plan(precision, dict.fromkeys(names, 2)), False)
        for precision in Precision
    }


def node_plan(precision: Precision, ranks: dict[str, int]) -> wire.NodePlan:
    """Return a plan of one sample at once."""
    return wire.NodePlan(
        precision=precision,
        micro_batch=1,
        accumulation=1,
        ranks=ranks,
        local_steps=1,
        predicted_bytes=0,
        predicted_step_seconds=1.0,
        predicted_round_seconds=1.0,
        limited_by="ranks",
    )


def measured(pair: Pair, first: dict[Precision, list[float]]) -> dict[str, Any]:
    """Return what a pair came to; `first` holds MiB of the runtime and of the first use."""
    from fedpipe_agent.train.model import read_shape

    overhead = round(MIB * max(before for before, _ in first.values()))
    chosen, budget = planned(pair, read_shape(pair.config(), pair.task), overhead)
    result: dict[str, Any] = {**asdict(pair), "share": round(pair.share, 3)}
    result["budgetMiB"] = round(budget / MIB, 1)
    if isinstance(chosen, str):
        return result | {"infeasible": chosen}
    _, grown = apart("fork", pair, chosen.precision, chosen, True)
    peak = grown + MIB * first[chosen.precision][1]
    return result | {
        "precision": chosen.precision,
        "microBatch": chosen.micro_batch,
        "checkpointing": chosen.checkpointing,
        "ranks": sorted(set(chosen.ranks.values())),
        "limitedBy": chosen.limited_by,
        "predictedMiB": round((chosen.predicted_bytes - overhead) / MIB, 1),
        "grownMiB": round(grown / MIB, 1),
        "measuredMiB": round(peak / MIB, 1),
        "used": round(peak / budget, 4),
    }


def summary(pairs: list[dict[str, Any]]) -> dict[str, Any]:
    """Return how many pairs were infeasible and exceeded, and how much of the budget was used."""
    run = [pair for pair in pairs if "used" in pair]
    return {
        "pairs": len(pairs),
        "infeasible": len(pairs) - len(run),
        "exceeded": sum(pair["used"] > 1 for pair in run),
        "underpredicted": sum(pair["measuredMiB"] > pair["predictedMiB"] for pair in run),
        "medianUse": round(statistics.median(pair["used"] for pair in run), 3),
        "highestUse": max(pair["used"] for pair in run),
        "precisions": {p: sum(pair["precision"] == p for pair in run) for p in Precision},
        "checkpointing": sum(pair["checkpointing"] for pair in run),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--pairs", type=int, default=200)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results" / "budget.json")
    arguments = parser.parse_args()
    os.environ |= {"TRANSFORMERS_VERBOSITY": "error", "HF_HUB_DISABLE_PROGRESS_BARS": "1"}
    part = arguments.out.with_suffix(".part")
    begin = time.monotonic()
    if not part.exists():
        keep(part, {precision: [size / MIB for size in sizes] for precision, sizes in first_use().items()})
    lines = [json.loads(line) for line in part.read_text().splitlines()]
    first = {Precision(precision): sizes for precision, sizes in lines[0].items()}
    print("runtime and first use, MiB:", lines[0], flush=True)
    done = lines[1:]
    warm_up()
    pairs = [drawn(arguments.seed, index) for index in range(len(done), arguments.pairs)]
    context = multiprocessing.get_context("fork")
    with ProcessPoolExecutor(arguments.processes, mp_context=context) as pool:
        for found in pool.map(measured, pairs, itertools.repeat(first)):
            print(len(done), *(f"{name}={value}" for name, value in found.items()), flush=True)
            keep(part, found)
            done.append(found)
    report = {
        "machine": machine(),
        "seed": arguments.seed,
        "seconds": round(time.monotonic() - begin),
        "firstUseMiB": {precision: round(grown, 1) for precision, (_, grown) in first.items()},
        "summary": summary(done),
        "pairs": done,
    }
    print(json.dumps(report["summary"]))
    arguments.out.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    part.unlink()


def keep(part: Path, entry: dict[Any, Any]) -> None:
    """Append a line to what is kept until all pairs are done."""
    with part.open("a") as file:
        file.write(json.dumps(entry) + "\n")


def warm_up() -> None:
    """Import what a first training imports, so that the forked processes do not each do it."""
    import bitsandbytes  # noqa: F401
    import memory_run  # noqa: F401
    import peft  # noqa: F401

    from fedpipe_agent.train.model import read_shape

    for kind in ("bert", "gpt2", "llama"):
        pair = Pair(kind, hidden=32, heads=2, inner=64, layers=1, vocabulary=64, length=16)
        read_shape(pair.config(), pair.task)


if __name__ == "__main__":
    main()
