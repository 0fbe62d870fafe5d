# SPDX-License-Identifier: Apache-2.0
"""Is a plan made for a memory budget ever exceeded? Random budgets and jobs, on CPU, under an enforced cap.

`OMP_NUM_THREADS=1 python tests/bench/budget.py [--pairs 200] [--seed 0]`

Each pair is a random BERT-, GPT-2- or Llama-shaped model with random weights, a job (sequence length, batch,
rank bounds, global rank, proximal term, quantization) and a budget between the least and the most that the job's
precisions need. A process does what an agent does: it registers with its overhead, gets the planner's plan for
the budget, loads the base, takes the global adapter in, evaluates, and trains eight steps by the plan. It is forked
from one that is about to register and has loaded and trained nothing; the pages of libraries that a fork drops
are mapped in again, so that it is as large as if it had started afresh.

From the loaded base on, the process may not be larger than its budget, runtime included: a watcher reads its
resident size every few milliseconds and kills it where it is larger. What slips between two looks shows in
VmHWM, which is compared with the budget too. Loading is not part of the plan: its most anonymous memory is
recorded, not capped. Resumable.
"""

import argparse
import ctypes
import json
import multiprocessing
import os
import random
import signal
import statistics
import sys
import tempfile
import time
from collections import Counter
from dataclasses import asdict, dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))

from bench_machine import machine

from fedpipe_api import wire
from fedpipe_api.job import FedPipeJobSpec, Precision, Task
from fedpipe_api.node import Capacity
from fedpipe_api.precisions import allowed
from fedpipe_operator.planner import NodeFacts, PlanRequest, plan, training_memory
from fedpipe_operator.planner.workload import Configuration, workload

MIB = 2**20
OPERATIONS = (2e9, 2e10)
"""Of one optimizer step, at least and at most: keeps a pair to a few seconds."""
STEPS, ACCUMULATION = 8, 2
LOOK_SECONDS = 0.002
"""Between two looks of the watcher."""
HEADROOM = 0.1
MADV_POPULATE_READ = 22

Span = tuple[int, int]
"""First address of a run of pages, and its bytes."""


@dataclass(frozen=True)
class Pair:
    """A random model and job, and the budget's place: 0 is the least that any plan takes, 1 the most."""

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
    quantization: str = "auto"
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
                "quantization": self.quantization,
            }
        )


def drawn(seed: int, index: int) -> Pair:
    """Return a random pair that a core trains within seconds."""
    random_ = random.Random(f"budget {seed} {index}")
    while True:
        heads = random_.choice((2, 4, 8, 12))
        hidden = heads * random_.choice((16, 32, 64))
        pair = Pair(
            kind=random_.choice(("bert", "gpt2", "llama")),
            hidden=hidden,
            heads=heads,
            inner=hidden * random_.choice((2, 3, 4)),
            layers=random_.randint(1, 12),
            vocabulary=random_.choice((500, 2000, 8000, 30000)),
            length=random_.choice((16, 32, 64, 128, 256, 512)),
            batch=random_.choice((1, 2, 4, 8, 16, 32)),
            low=random_.choice((1, 2, 4)),
            high=random_.choice((4, 8, 16, 32)),
            global_rank=random_.choice((8, 16, 32, 64)),
            proximal=random_.choice((0.0, 0.0, 0.01)),
            quantization=random_.choice(("auto", "auto", "int8", "nf4")),
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
    """Return the plan, or why there is none, and the bytes it may use, runtime included."""
    spec = pair.spec()
    work = workload(shape, spec, shape.matrices)
    empty = device_facts(overhead, overhead)
    needs = [
        training_memory.peak_bytes(work, empty, Configuration(precision, size, checkpointing), ranks)
        for precision in allowed(pair.quantization)
        for size, ranks in ((1, {}), (pair.batch, dict.fromkeys(work.sides, pair.high)))
        for checkpointing in (False, True)
    ]
    needed = min(needs) + pair.share * (max(needs) - min(needs))
    facts = NodeFacts("node", device_facts(overhead, round(needed / (1 - HEADROOM))), samples=100)
    found = plan(PlanRequest(shape, spec, (facts,), headroom=HEADROOM))
    return found.nodes.get("node") or found.left_out["node"], found.budgets["node"]


def mapped() -> list[Span]:
    """Return the pages of libraries that this process has in memory."""
    page = os.sysconf("SC_PAGE_SIZE")
    found = []
    with Path("/proc/self/pagemap").open("rb", buffering=0) as table:
        for line in Path("/proc/self/maps").read_text(encoding="ascii").splitlines():
            span, rights, _, _, _, *name = line.split()
            if not (name and name[0].startswith("/") and rights.startswith("r")):
                continue
            begin, end = (int(edge, 16) for edge in span.split("-"))
            table.seek(begin // page * 8)
            entries = table.read((end - begin) // page * 8)
            present = [byte >> 7 for byte in entries[7::8]]
            for at, here in enumerate(present):
                if here and (at == 0 or not present[at - 1]):
                    run = [*present[at:], 0].index(0)
                    found.append((begin + at * page, run * page))
    return found


def map_in(spans: list[Span]) -> None:
    """Map pages in as they were before the fork."""
    libc = ctypes.CDLL(None)
    for begin, size in spans:
        libc.madvise(ctypes.c_void_p(begin), ctypes.c_size_t(size), MADV_POPULATE_READ)


def agent(pair: Pair, directory: Path, spans: list[Span], link: Connection) -> None:
    """Register, load and train by the plan that comes back, telling what is done and the peak bytes at the end."""
    from memory_run import Base

    from fedpipe_agent.train.device import Device
    from fedpipe_agent.train.loop import Settings
    from fedpipe_agent.train.model import Source, read_config
    from fedpipe_agent.train.shape import read_shape

    map_in(spans)
    device = Device(Capacity(threads=1))
    shape = read_shape(read_config(Source(str(directory)), pair.spec().model, 0), pair.task)
    device.reset_peak()
    link.send((shape, device.used()))
    chosen: wire.NodePlan = link.recv()
    base = Base.load(directory, pair.spec(), chosen.precision, device)
    device.reset_peak()
    link.send("loaded")
    link.recv()
    settings = Settings(
        steps=STEPS,
        micro_batch=chosen.micro_batch,
        accumulation=min(chosen.accumulation, ACCUMULATION),
        learning_rate=1e-4,
        proximal=pair.proximal,
        checkpointing=chosen.checkpointing,
    )
    link.send(base.train(directory / "global", chosen.ranks, settings, evaluate=True))


def resident(process: int) -> tuple[int, int]:
    """Return the resident bytes of a process, and those of them that no file backs."""
    pages = Path(f"/proc/{process}/statm").read_text(encoding="ascii").split()
    size, files = int(pages[1]), int(pages[2])
    return size * os.sysconf("SC_PAGE_SIZE"), (size - files) * os.sysconf("SC_PAGE_SIZE")


def watch(process: Any, link: Connection, cap: int | None) -> tuple[Any, int, int]:
    """Wait for what a process sends, and kill it once it is larger than the cap.

    Returns:
        what it sent, None if it was killed; its most resident bytes seen, and those that no file backs.
    """
    largest, anonymous = 0, 0
    while not link.poll(LOOK_SECONDS):
        if not process.is_alive():
            sys.exit(f"a training process ended with {process.exitcode}")
        size, without_files = resident(process.pid)
        largest, anonymous = max(largest, size), max(anonymous, without_files)
        if cap is not None and size > cap:
            os.kill(process.pid, signal.SIGKILL)
            process.join()
            return None, largest, anonymous
    return link.recv(), largest, anonymous


def write(pair: Pair, directory: Path) -> None:
    """Write a pair's model and global adapter."""
    from memory_run import write_global_adapter, write_model

    from fedpipe_agent.train.shape import read_shape

    write_model(pair.config(), pair.task, directory)
    write_global_adapter(read_shape(pair.config(), pair.task), pair.global_rank, directory / "global")


def measured(pair: Pair, directory: Path, spans: list[Span]) -> dict[str, Any]:
    """Return what a pair came to, in MiB above the runtime."""
    context = multiprocessing.get_context("fork")
    writer = context.Process(target=write, args=(pair, directory))
    writer.start()
    writer.join()
    link, far = context.Pipe()
    process = context.Process(target=agent, args=(pair, directory, spans, far))
    process.start()
    (shape, overhead), _, _ = watch(process, link, None)
    _, bare = resident(process.pid or 0)
    chosen, budget = planned(pair, shape, overhead)
    result = asdict(pair) | {
        "share": round(pair.share, 3),
        "budgetMiB": mib(budget - overhead),
        "overheadMiB": mib(overhead),
    }
    if isinstance(chosen, str):
        process.kill()
        process.join()
        return result | {"infeasible": chosen}
    link.send(chosen)
    _, _, loading = watch(process, link, None)
    link.send("go")
    peak, largest, _ = watch(process, link, budget)
    process.join()
    used = (peak or largest) - overhead
    return result | {
        "precision": chosen.precision,
        "microBatch": chosen.micro_batch,
        "checkpointing": chosen.checkpointing,
        "ranks": sorted(set(chosen.ranks.values())),
        "limitedBy": chosen.limited_by,
        "predictedMiB": mib(chosen.predicted_bytes - overhead),
        "loadingMiB": mib(loading - bare),
        "measuredMiB": mib(used),
        "killed": peak is None,
        "used": round(used / (budget - overhead), 4),
    }


def mib(size: int) -> float:
    return round(size / MIB, 1)


def summary(pairs: list[dict[str, Any]]) -> dict[str, Any]:
    """Return how many pairs were infeasible and exceeded, how much of the budget was used, and what was chosen."""
    run = [pair for pair in pairs if "used" in pair]
    uses = sorted(pair["used"] for pair in run)

    def chosen(name: str) -> dict[str, int]:
        return {str(value): count for value, count in sorted(Counter(pair[name] for pair in run).items())}

    return {
        "pairs": len(pairs),
        "infeasible": len(pairs) - len(run),
        "killed": sum(pair["killed"] for pair in run),
        "exceeded": sum(pair["used"] > 1 for pair in run),
        "underpredicted": sum(pair["measuredMiB"] > pair["predictedMiB"] for pair in run),
        "loadingAboveBudget": sum(pair["loadingMiB"] > pair["budgetMiB"] for pair in run),
        "medianUse": round(statistics.median(uses), 3),
        "ninetiethUse": round(uses[len(uses) * 9 // 10], 3),
        "highestUse": uses[-1],
        "precisions": chosen("precision"),
        "microBatches": chosen("microBatch"),
        "checkpointing": chosen("checkpointing"),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--pairs", type=int, default=200)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results" / "budget.json")
    arguments = parser.parse_args()
    os.environ |= {"TRANSFORMERS_VERBOSITY": "error", "HF_HUB_DISABLE_PROGRESS_BARS": "1"}
    part = arguments.out.with_suffix(".part")
    done = [json.loads(line) for line in part.read_text().splitlines()] if part.exists() else []
    begin = time.monotonic()
    register()
    spans = mapped()
    for index in range(len(done), arguments.pairs):
        with tempfile.TemporaryDirectory() as scratch:
            found = measured(drawn(arguments.seed, index), Path(scratch), spans)
        print(index, *(f"{name}={value}" for name, value in found.items()), flush=True)
        with part.open("a") as file:
            file.write(json.dumps(found) + "\n")
        done.append(found)
    report = {
        "machine": machine(),
        "seed": arguments.seed,
        "seconds": round(time.monotonic() - begin),
        "summary": summary(done),
        "pairs": done,
    }
    print(json.dumps(report["summary"]))
    arguments.out.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    part.unlink()


def register() -> None:
    """Import what an agent has imported when it registers."""
    import memory_run  # noqa: F401

    from fedpipe_agent.train.shape import read_shape

    for kind in ("bert", "gpt2", "llama"):
        pair = Pair(kind, hidden=32, heads=2, inner=64, layers=1, vocabulary=64, length=16)
        read_shape(pair.config(), pair.task)


if __name__ == "__main__":
    main()
