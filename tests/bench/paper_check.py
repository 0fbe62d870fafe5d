# SPDX-License-Identifier: Apache-2.0
"""Every target of the comparison, recomputed from raw numbers; each figure passes, misses or has no data."""

import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

from bench.paper_systems import ABLATIONS, BASELINES, SYSTEMS

Run = dict[str, Any]
Found = tuple[bool | None, str]
"""Whether a target holds, None without data, and the figures."""

TASKS, SEEDS = ("news", "e2e"), 3
SPLITS = ("dirichlet", "iid")
"""Systems are compared on both, FedPipe's parts on the first."""
SHARE = 0.6
"""Of the best baseline's time and bytes, within which its final loss is to be reached."""
UNDER, OVER = 0.05, 0.30
"""Under-training of FedPipe at most, and of the homogeneous configuration at least."""
AGGREGATION_ERROR = 1e-6
UNBOUNDED = "paper-unbounded.json"
"""Of `paper.py run --systems fedpipe --global-rank 384 --rounds 4`: no matrix has a larger rank."""
COLLAPSE = 0.5
"""An effective rank below this share of its maximum over the rounds before has collapsed."""
MEMORY = {"cpu": 0.15, "cuda": 0.10}
PLANNER_NODES, PLANNER_MATRICES, PLANNER_SECONDS = 1000, 48, 5.0


@dataclass(frozen=True)
class Verdict:
    """One target at one place; `ok` is None where there are no data for it."""

    target: str
    where: str
    ok: bool | None
    figures: str

    def __str__(self) -> str:
        word = {True: "pass", False: "MISS", None: "NO DATA"}[self.ok]
        return f"{word:8}{self.target}, {self.where}: {self.figures}"


class Runs:
    """The finished runs of one task and split on the heterogeneous fleet."""

    def __init__(self, runs: Sequence[Run], task: str, split: str):
        self.task, self.split = task, split
        self._found = {
            (run["system"], run["seed"]): run
            for run in runs
            if (run["task"], run["split"], run["fleet"]) == (task, split, "heterogeneous")
        }

    def of(self, system: str, seed: int) -> Run:
        """Return a run; raises KeyError without it."""
        return self._found[system, seed]

    def seeds(self, *systems: str) -> list[int]:
        """Return the seeds that FedPipe and all the systems finished.

        Raises:
            MissingError: fewer than three.
        """
        wanted = ("fedpipe", *systems)
        seeds = sorted(
            {seed for _, seed in self._found if all((name, seed) in self._found for name in wanted)}
        )
        if len(seeds) < SEEDS:
            lacking = {
                name: sum(system == name for system, _ in self._found)
                for name in wanted
                if sum(system == name for system, _ in self._found) < SEEDS
            }
            text = ", ".join(f"{name} has {count}" for name, count in lacking.items()) or "not the same ones"
            raise MissingError(f"needs {SEEDS} common seeds: {text}")
        return seeds

    def values(self, system: str, seeds: Sequence[int], value: Callable[[Run], float]) -> list[float]:
        """Return a figure of each seed."""
        return [value(self.of(system, seed)) for seed in seeds]


class MissingError(Exception):
    """There are no data for a target; the message says which lack."""


def loss(run: Run) -> float:
    """Return the test loss after the last round."""
    return float(run["rounds"][-1]["loss"])


def accuracy(run: Run) -> float:
    return float(run["rounds"][-1]["accuracy"])


def perplexity(run: Run) -> float:
    return float(run["rounds"][-1]["perplexity"])


def bleu_of(run: Run) -> float:
    return float(run["final"]["bleu"])


def seconds(run: Run) -> float:
    """Return the virtual seconds of the whole training."""
    return float(run["rounds"][-1]["seconds"])


def traffic(row: Run) -> float:
    """Return the bytes up and down until a round's end."""
    return float(row["down"] + row["up"])


def peak(run: Run) -> float:
    """Return the predicted peaks of all nodes together."""
    return float(sum(run["peak"].values()))


def under_training(run: Run) -> float:
    """Return the share of planned local steps that were not done when their round closed."""
    planned = sum(row["planned"] for row in run["rounds"])
    return 1 - sum(row["done"] for row in run["rounds"]) / planned


def reached(run: Run, target: float) -> Run | None:
    """Return the first round with at most this test loss."""
    return next((row for row in run["rounds"] if row["loss"] <= target), None)


def check(results: dict[str, Any], beside: Path) -> Iterator[Verdict]:
    """Yield a verdict for every target.

    Args:
        results: of `paper.py run`.
        beside: folder with the results of the other benchmarks that targets need.
    """
    targets: list[tuple[str, Callable[[Runs], Found]]] = [
        ("final loss below every baseline's on every seed", _loss),
        ("quality at or above the baselines' within the spread", _quality),
        (f"best baseline's loss in at most {SHARE:.0%} of its time", lambda runs: _reach(runs, _time_of)),
        (f"best baseline's loss with at most {SHARE:.0%} of its bytes", lambda runs: _reach(runs, traffic)),
        (f"under-training below {UNDER:.0%} where homogeneous exceeds {OVER:.0%}", _under),
        (
            f"aggregation error below {AGGREGATION_ERROR:g} within the rank bound",
            lambda runs: _error(runs, beside),
        ),
    ]
    parts: list[tuple[str, Callable[[Runs], Found]]] = [
        *(
            (f"ablation: {name} is worse", lambda runs, name=name: _ablation(runs, name))
            for name in ABLATIONS
        ),
        ("importance selects better than chance", _chance),
    ]
    for task in TASKS:
        for split in SPLITS:
            runs = Runs(results.get("runs", []), task, split)
            for target, found in targets + (parts if split == SPLITS[0] else []):
                yield _verdict(target, f"{task} {split}", lambda found=found, runs=runs: found(runs))
    yield _verdict("effective rank does not collapse", "30 rounds", lambda: _collapse(beside))
    for device, tolerance in MEMORY.items():
        target = f"memory model within {tolerance:.0%}"
        yield _verdict(target, device, lambda device=device: _memory(beside, device))
    where = f"{PLANNER_NODES} nodes × {PLANNER_MATRICES} matrices"
    yield _verdict(f"planned in under {PLANNER_SECONDS:g} s", where, lambda: _planner(beside))


def _verdict(target: str, where: str, found: Callable[[], Found]) -> Verdict:
    try:
        return Verdict(target, where, *found())
    except MissingError as error:
        return Verdict(target, where, None, str(error))


def _loss(runs: Runs) -> Found:
    seeds = runs.seeds(*BASELINES)
    margins = {
        (seed, name): loss(runs.of("fedpipe", seed)) - loss(runs.of(name, seed))
        for seed in seeds
        for name in BASELINES
    }
    (seed, name), worst = max(margins.items(), key=lambda entry: entry[1])
    ours = " ".join(f"{loss(runs.of('fedpipe', seed)):.4f}" for seed in seeds)
    return worst < 0, f"FedPipe {ours}; closest {name} on seed {seed}: {worst:+.4f}"


def _quality(runs: Runs) -> Found:
    metrics = {"news": [(accuracy, 1)], "e2e": [(bleu_of, 1), (perplexity, -1)]}[runs.task]
    seeds = runs.seeds(*BASELINES)
    verdicts, figures = [], []
    for metric, sign in metrics:
        means = {name: fmean(runs.values(name, seeds, metric)) for name in BASELINES}
        best = max(means, key=lambda name: sign * means[name])
        ours, theirs = (runs.values(name, seeds, metric) for name in ("fedpipe", best))
        spread = max(stdev(ours), stdev(theirs))
        verdicts.append(sign * (fmean(ours) - fmean(theirs)) >= -spread)
        title = metric.__name__.removesuffix("_of")
        figures.append(f"{title} {fmean(ours):.4f}, best {best} {fmean(theirs):.4f} ± {spread:.4f}")
    return all(verdicts), "; ".join(figures)


def _time_of(row: Run) -> float:
    return float(row["seconds"])


def _reach(runs: Runs, cost: Callable[[Run], float]) -> Found:
    verdicts, figures = [], []
    for seed in runs.seeds(*BASELINES):
        best = min(BASELINES, key=lambda name: loss(runs.of(name, seed)))
        theirs = runs.of(best, seed)
        row = reached(runs.of("fedpipe", seed), loss(theirs))
        share = cost(row) / cost(theirs["rounds"][-1]) if row else None
        verdicts.append(share is not None and share <= SHARE)
        figures.append(f"seed {seed} {best} " + (f"{share:.0%}" if share is not None else "never"))
    return all(verdicts), "; ".join(figures)


COSTS: dict[str, Callable[[Run], float]] = {
    "loss": loss,
    "time": seconds,
    "bytes": lambda run: traffic(run["rounds"][-1]),
    "memory": peak,
}


def _ablation(runs: Runs, name: str) -> Found:
    seeds = runs.seeds(name)
    ratios = {
        title: fmean(runs.values(name, seeds, cost)) / fmean(runs.values("fedpipe", seeds, cost)) - 1
        for title, cost in COSTS.items()
    }
    text = ", ".join(f"{title} {ratio:+.1%}" for title, ratio in ratios.items())
    return any(ratio > 0 for ratio in ratios.values()), f"{text} against FedPipe"


def _chance(runs: Runs) -> Found:
    seeds = runs.seeds("random-selection")
    ours, chance = (fmean(runs.values(name, seeds, loss)) for name in ("fedpipe", "random-selection"))
    return ours < chance, f"loss {ours:.4f}, random selection of the same size {chance:.4f}"


def _under(runs: Runs) -> Found:
    seeds = runs.seeds("fedit")
    ours, theirs = (fmean(runs.values(name, seeds, under_training)) for name in ("fedpipe", "fedit"))
    return ours < UNDER and theirs > OVER, f"FedPipe {ours:.1%}, {SYSTEMS['fedit'].title} {theirs:.1%}"


def _error(runs: Runs, beside: Path) -> Found:
    rows = [row for seed in runs.seeds() for row in runs.of("fedpipe", seed)["rounds"]]
    if (beside / UNBOUNDED).is_file():
        unbounded = Runs(_other(beside / UNBOUNDED)["runs"], runs.task, runs.split)
        rows += [row for seed in unbounded.seeds() for row in unbounded.of("fedpipe", seed)["rounds"]]
    within = [row["relativeError"] for row in rows if row["discardedEnergy"] < AGGREGATION_ERROR**2]
    beyond = [row["relativeError"] for row in rows if row["discardedEnergy"] >= AGGREGATION_ERROR**2]
    hit = f"; {len(beyond)} rounds hit the bound, error up to {max(beyond):.2e}" if beyond else ""
    if not within:
        raise MissingError(f"every round hits the rank bound{hit}")
    return max(within) < AGGREGATION_ERROR, f"{max(within):.2e} in {len(within)} rounds within the bound{hit}"


def _collapse(beside: Path) -> Found:
    methods = _other(beside / "aggregation.json")["drift"]["methods"]
    ranks = {name: found["effective_rank"] for name, found in methods.items()}
    ours = ranks["exact"]
    if len(ours) < 30:
        raise MissingError(f"aggregation.json has {len(ours)} rounds")
    least = min(value / max(ours[: index + 1]) for index, value in enumerate(ours))
    ends = ", ".join(f"{name} {found[0]:.1f} → {found[-1]:.1f}" for name, found in ranks.items())
    return least >= COLLAPSE, f"{ends}; lowest {least:.0%} of the maximum before"


def _memory(beside: Path, device: str) -> Found:
    name = "memory_model.json" if device == "cpu" else f"memory_model_{device}.json"
    errors = [point["error"] for point in _other(beside / name)["points"]]
    good = sum(abs(error) <= MEMORY[device] for error in errors)
    return good == len(errors), f"{good} of {len(errors)} points, {min(errors):+.1%} to {max(errors):+.1%}"


def _planner(beside: Path) -> Found:
    fleets = [
        found
        for found in _other(beside / "planner.json")["results"]
        if found["nodes"] >= PLANNER_NODES and found["matrices"] >= PLANNER_MATRICES
    ]
    if not fleets:
        raise MissingError("planner.json has no fleet of that size")
    slowest = max(fleets, key=lambda found: found["seconds"])
    figures = ", ".join(f"{found['fleet']} {found['seconds']:.2f} s" for found in fleets)
    return slowest["seconds"] < PLANNER_SECONDS, figures


def _other(path: Path) -> dict[str, Any]:
    if not path.is_file():
        raise MissingError(f"no {path.name} beside the results")
    found: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    return found
