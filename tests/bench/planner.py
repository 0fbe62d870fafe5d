# SPDX-License-Identifier: Apache-2.0
"""How long plans take: fleets of 1,000 nodes, 48 matrices.

`python tests/bench/planner.py [--out tests/bench/results/planner.json]`

BERT-base's 48 attention matrices, all selected, with importance scores; ranks 2 to 64. `kinds`: eight kinds of
nodes. `calibrated`: the same, each node with a measurement of its own. `distinct`: every node with its own free
memory, speed, link and amount of data.
"""

import argparse
import json
import random
import sys
import time
from dataclasses import replace
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

from bench_machine import machine

from fedpipe_api import wire
from fedpipe_api.job import FedPipeJobSpec, Precision
from fedpipe_operator.planner import Calibration, NodeFacts, PlanRequest, plan

NODES = 1000
MIB = 2**20
PARTS = ("self.query", "self.key", "self.value", "output.dense")
SHAPE = wire.ModelShape(
    architecture="bert",
    layers=12,
    hidden=768,
    heads=12,
    key_value_heads=12,
    intermediate=3072,
    vocabulary=30522,
    causal=False,
    parameters=109_482_240,
    linear_parameters=85_524_480,
    matrices=tuple(
        wire.MatrixShape(name=f"bert.encoder.layer.{layer}.attention.{part}", rows=768, columns=768)
        for layer in range(12)
        for part in PARTS
    ),
    head=(wire.TensorShape(name="classifier.weight", shape=(4, 768)),),
)
JOB = FedPipeJobSpec.model_validate(
    {
        "model": {"hostPath": {"path": "/m"}, "task": "sequence-classification", "labels": ["a", "b"]},
        "data": {"volume": {"hostPath": {"path": "/d"}}, "train": "t.jsonl", "maxLength": 128},
        "nodes": {"max": NODES},
        "rounds": {"count": 1, "deadline": "10m"},
        "adapter": {"ranks": {"min": 2, "max": 64}, "selection": {"mode": "all"}},
    }
)


def device(mib: int, speed: float, link_rate: int, seconds: float) -> wire.DeviceFacts:
    return wire.DeviceFacts(
        kind="cpu",
        name="cpu",
        free_memory=mib * MIB,
        overhead=400 * MIB,
        threads=4,
        speed=speed,
        link_rate=link_rate,
        kernels=tuple(
            wire.KernelResult(precision=precision, usable=True, seconds=seconds * factor)
            for precision, factor in zip(Precision, (1.0, 0.8, 1.3, 1.5), strict=True)
        ),
    )


def fleets() -> dict[str, list[NodeFacts]]:
    generator = random.Random(0)
    kinds = [
        device(mib, speed, 10**6, 0.004)
        for mib, speed in zip((800, 880, 950, 1000, 1200, 1700, 4000, 16000), (0.05, 1.0) * 4, strict=True)
    ]
    like = [NodeFacts(f"n{index}", kinds[index % len(kinds)], 2000) for index in range(NODES)]

    def measured(facts: NodeFacts) -> NodeFacts:
        bytes_factor = generator.uniform(0.9, 1.1)
        return replace(
            facts,
            calibration=Calibration(
                generator.lognormvariate(0, 0.3), bytes_factor, round((bytes_factor - 1) * 500 * MIB)
            ),
        )

    distinct = [
        NodeFacts(
            f"n{index}",
            device(
                generator.randint(700, 4000),
                generator.uniform(0.02, 1),
                generator.randint(10**5, 10**7),
                generator.uniform(0.003, 0.02),
            ),
            generator.randint(100, 10000),
        )
        for index in range(NODES)
    ]
    return {"kinds": like, "calibrated": [measured(facts) for facts in like], "distinct": distinct}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results" / "planner.json")
    arguments = parser.parse_args()
    generator = random.Random(1)
    importance = {matrix.name: generator.lognormvariate(0, 1) for matrix in SHAPE.matrices}
    results = []
    for name, nodes in fleets().items():
        begin, cpu = time.perf_counter(), time.process_time()
        found = plan(PlanRequest(SHAPE, JOB, tuple(nodes), importance))
        results.append(
            {
                "fleet": name,
                "nodes": len(nodes),
                "matrices": len(SHAPE.matrices),
                "seconds": round(time.perf_counter() - begin, 3),
                "cpuSeconds": round(time.process_time() - cpu, 3),
                "planned": len(found.nodes),
                "limitedBy": {
                    limit: sum(node.limited_by == limit for node in found.nodes.values())
                    for limit in ("memory", "time", "ranks")
                },
            }
        )
        print(json.dumps(results[-1]), flush=True)
    arguments.out.parent.mkdir(parents=True, exist_ok=True)
    arguments.out.write_text(json.dumps({"machine": machine(), "results": results}, indent=1) + "\n")


if __name__ == "__main__":
    main()
