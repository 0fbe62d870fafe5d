# SPDX-License-Identifier: Apache-2.0
"""Server optimizers against each other: test loss after every round, on the small federation of attacks.py.

`OMP_NUM_THREADS=1 python tests/bench/outer.py [--news DIR] [--seeds 0 1 2] [--rounds 12] [--variants …] [--output FILE]`

Ten honest nodes of ranks 2 to 16, Dirichlet 0.5, every round through `aggregate_round` with the files of the server
optimizer's state. It takes seconds a training and is for choosing what `paper.py` then trains. Writes each result at
once; run the same command again to go on.
"""

import argparse
import json
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

import numpy as np
from attacks import RANKS, RATE, Model, aggregation_of, run
from attacks_data import mixture, news
from bench_machine import commit, machine

from fedpipe_api.job import FedPipeJobSpec, Optimizer, Rounds, ServerOptimizer
from fedpipe_operator.engine.decide import learning_rate
from fedpipe_operator.local.split import split

RESULTS = Path(__file__).parent / "results"
PLAIN = "none"
VARIANTS: dict[str, dict] = {
    PLAIN: {"name": "none"},
    "rate 1.5": {"name": "none", "learningRate": 1.5},
    "rate 2": {"name": "none", "learningRate": 2.0},
    **{f"momentum {beta}": {"name": "fedavgm", "momentum": beta} for beta in (0.3, 0.5, 0.7, 0.9)},
    "momentum 0.9, rate 0.3": {"name": "fedavgm", "momentum": 0.9, "learningRate": 0.3},
    **{f"fedadam {rate:g}": {"name": "fedadam", "learningRate": rate} for rate in (1e-3, 3e-3, 1e-2)},
}
SCHEDULES = ("constant", "linear", "cosine")


def rows(runs: list[dict], rounds: int) -> list[str]:
    """Return a Markdown table: losses, and the round at which the plain mean's last loss of the seed is reached."""
    lines = ["| schedule | server optimizer | seeds | " + " | ".join(f"loss at {n}" for n in marks(rounds))
             + " | accuracy % | plain mean's last loss after |", "|---" * (len(marks(rounds)) + 5) + "|"]  # fmt: skip
    for schedule in SCHEDULES:
        for name in VARIANTS:
            found = [r for r in runs if (r["schedule"], r["variant"]) == (schedule, name)]
            plain = {r["seed"]: r for r in runs if (r["schedule"], r["variant"]) == (schedule, PLAIN)}
            if not found:
                continue
            losses = np.array([r["losses"] for r in found])
            cells = [f"{losses[:, n - 1].mean():.3f}" for n in marks(rounds)]
            cells.append(f"{100 * np.mean([r['accuracies'][-1] for r in found]):.1f}")
            cells.append(" ".join(reached(r, plain[r["seed"]]) for r in found if r["seed"] in plain))
            lines.append(f"| {schedule} | {name} | {len(found)} | " + " | ".join(cells) + " |")
    return lines


def marks(rounds: int) -> list[int]:
    return sorted({max(1, round(rounds * share)) for share in (1 / 3, 1 / 2, 2 / 3, 1)})


def reached(one: dict, plain: dict) -> str:
    target = plain["losses"][-1]
    return next((str(n) for n, loss in enumerate(one["losses"], 1) if loss <= target), "–")


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--news", type=Path, help="folder of 20 Newsgroups; default: a mixture of Gaussians")
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--rounds", type=int, default=12)
    parser.add_argument("--variants", nargs="+", choices=VARIANTS, default=list(VARIANTS))
    parser.add_argument("--schedules", nargs="+", choices=SCHEDULES, default=["constant"])
    parser.add_argument("--split", choices=["dirichlet", "iid"], default="dirichlet")
    parser.add_argument("--output", type=Path, default=RESULTS / "outer.json")
    chosen = parser.parse_args()
    data = mixture(0) if chosen.news is None else news(chosen.news)
    about = {
        "data": "mixture" if chosen.news is None else "20 Newsgroups",
        "split": chosen.split,
        "rounds": chosen.rounds,
    }
    results = {"machine": machine(), **about, "runs": []}
    if chosen.output.exists():
        results = json.loads(chosen.output.read_text())
    code = commit()
    if any(results[name] != value for name, value in about.items()):
        raise SystemExit(f"outer.py: {chosen.output}: made with other settings; give another --output")
    done = {(r["schedule"], r["variant"], r["seed"]) for r in results["runs"]}
    for seed in chosen.seeds:
        shares = split(data.labels.tolist(), len(RANKS), chosen.split, 0.5, seed)
        for schedule in chosen.schedules:
            job = FedPipeJobSpec.model_construct(
                optimizer=Optimizer(learning_rate=RATE, schedule=schedule), rounds=Rounds(count=chosen.rounds)
            )
            rates = [learning_rate(job, number) for number in range(1, chosen.rounds + 1)]
            for name in chosen.variants:
                if (schedule, name, seed) in done:
                    continue
                server = ServerOptimizer.model_validate(VARIANTS[name])
                begin = time.perf_counter()
                aggregation = aggregation_of("filtered-mean", 0, server)
                one = run(Model(seed), data, shares, "none", [], aggregation, seed, rates)
                results["runs"].append(
                    {"schedule": schedule, "variant": name, "seed": seed, "server": server.to_dict(),
                     "losses": one.losses, "accuracies": one.accuracies, "verdicts": one.verdicts,
                     "seconds": time.perf_counter() - begin, "commit": code}
                )  # fmt: skip
                print(f"{schedule:9} {name:24} seed {seed}: loss {one.losses[-1]:.4f}", flush=True)
                chosen.output.write_text(json.dumps(results, indent=1) + "\n")
    print("\n".join(rows(results["runs"], chosen.rounds)))


if __name__ == "__main__":
    main()
