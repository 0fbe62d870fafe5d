# SPDX-License-Identifier: Apache-2.0
"""Hostile nodes against every robust rule: accuracy after a federation that some of the nodes attack.

`OMP_NUM_THREADS=1 python tests/bench/attacks.py [--news DIR] [--seeds 2] [--rounds 12] [--attacks …] [--rules …]
    [--fractions 0.2 …] [--server '{"name": "none"}']`

Ten nodes of unequal ranks, data cut by Dirichlet 0.5, samples as unequal as that makes them. The model has two
frozen layers with LoRA and a trained head, on features of 20 Newsgroups (`--news`, the folder with train.jsonl.gz
and test.jsonl.gz: TF-IDF, then its 128 principal components) or, without, of a mixture of Gaussians made here.
Training is numpy; every round goes through `aggregate_round` with its files. All fractions of attackers are run with
seed 0, that of 20 % with every seed. Writes results/attacks.json after every run, with the table in results/attacks.md.
"""

import argparse
import json
import sys
import tempfile
import time
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

import numpy as np
from attacks_data import CLASSES, WIDTH, Data, mixture, news
from bench_machine import commit, machine
from safetensors.numpy import load_file, save_file

from fedpipe_api.job import Aggregation, Checks, Robust, ServerOptimizer
from fedpipe_api.lora.codec import received
from fedpipe_api.lora.format import HEAD, LORA_A, LORA_B, scale
from fedpipe_operator.aggregate import AggregationRequest, NodeUpdate, aggregate_round
from fedpipe_operator.engine.weights import capped
from fedpipe_operator.local.split import split

RESULTS = Path(__file__).parent / "results"
RANKS = (2, 2, 4, 4, 8, 8, 8, 16, 16, 16)
ALPHA, BATCH, STEPS, RATE = 16.0, 32, 15, 8e-3
MATRICES, WEIGHT = ("layer.0", "layer.1"), HEAD + "weight"
ATTACKS = (
    "sign flip", "sign flip x10", "scaling x10", "gaussian", "ALIE", "IPM", "label flip", "backdoor", "backdoor x5",
)  # fmt: skip
ALIE_Z, IPM_EPSILON, TARGET = 1.5, 0.5, 0
RULES = {
    "no defence": ("none", "mean"),
    "filtered-mean": ("filtered-mean", "mean"),
    "geometric-median": ("geometric-median", "mean"),
    "centered-clipping": ("centered-clipping", "mean"),
    "multi-krum": ("multi-krum", "mean"),
}


class Model:
    """logits = head · relu(W₁ relu(W₀ x)); W frozen, each node with an increment of its own rank."""

    def __init__(self, seed: int) -> None:
        random = np.random.default_rng(seed)
        shape = (2, WIDTH, WIDTH)
        self.frozen = random.standard_normal(shape) * np.sqrt(2 / WIDTH)
        self.head = 0.02 * random.standard_normal((CLASSES, WIDTH))
        self.fresh = random.uniform(-1, 1, (2, max(RANKS), WIDTH)) / np.sqrt(WIDTH)

    def logits(self, layers, head, features):
        """Return logits and the layers' inputs, for stacks (K, …) of everything."""
        inputs = [features]
        for layer in layers:
            inputs.append(np.maximum(0, inputs[-1] @ np.swapaxes(layer, -1, -2)))
        return inputs[-1] @ np.swapaxes(head, -1, -2), inputs


@dataclass
class State:
    """The global adapter: dense increments as nodes receive them, by component, and the head."""

    path: Path | None
    left: list[np.ndarray]
    right: list[np.ndarray]
    head: np.ndarray


def train(model: Model, state: State, batches, random, rate=RATE) -> tuple[list, list, np.ndarray]:
    """Train all nodes side by side; return B (2, K, d, r), A (2, K, r, c), padded with zeros, and heads (K, …)."""
    nodes, widest = len(RANKS), max(RANKS)
    lefts, rights = np.zeros((2, nodes, WIDTH, widest)), np.zeros((2, nodes, widest, WIDTH))
    bases = np.repeat(model.frozen[:, None], nodes, axis=1)
    scales = np.array([scale(ALPHA, rank, False) for rank in RANKS])[:, None, None]
    norm = 1 / np.sqrt(3)
    for layer in range(2):
        for k, rank in enumerate(RANKS):
            held = min(rank, len(state.right[layer]))
            rights[layer, k, :rank] = model.fresh[layer, :rank]
            rights[layer, k, :held] = norm * state.right[layer][:held]
            lefts[layer, k, :, :held] = state.left[layer][:, :held] / (norm * scales[k, 0, 0])
            bases[layer, k] += state.left[layer][:, held:] @ state.right[layer][held:]
    values = [lefts[0], lefts[1], rights[0], rights[1], np.repeat(state.head[None], nodes, axis=0)]
    values, bases, scales = [np.float32(v) for v in values], np.float32(bases), np.float32(scales)
    means, squares = ([np.zeros_like(value) for value in values] for _ in "mv")
    for step in range(1, STEPS + 1):
        features, labels = batches(random)
        layers = [bases[layer] + scales * values[layer] @ values[2 + layer] for layer in range(2)]
        logits, inputs = model.logits(layers, values[4], features)
        error = np.exp(logits - logits.max(-1, keepdims=True))
        error /= error.sum(-1, keepdims=True)
        error[np.arange(nodes)[:, None], np.arange(BATCH), labels] -= 1
        error /= BATCH
        gradients = [None] * 5
        gradients[4] = np.swapaxes(error, 1, 2) @ inputs[2]
        back = error @ values[4]
        for layer in (1, 0):
            back = back * (inputs[layer + 1] > 0)
            outer = scales * (np.swapaxes(back, 1, 2) @ inputs[layer])
            gradients[layer] = outer @ np.swapaxes(values[2 + layer], 1, 2)
            gradients[2 + layer] = np.swapaxes(values[layer], 1, 2) @ outer
            back = back @ layers[layer]
        for i, gradient in enumerate(gradients):
            means[i] = 0.9 * means[i] + 0.1 * gradient
            squares[i] = 0.999 * squares[i] + 0.001 * gradient**2
            root = np.sqrt(squares[i] / (1 - 0.999**step)) + 1e-8
            values[i] = values[i] - rate * means[i] / (1 - 0.9**step) / root
    return values[:2], values[2:4], values[4]


def turned(attack: str, own: list, honest: list, random) -> list:
    """Return the changes (two matrices and a head) that a hostile node sends in place of its own."""
    match attack:
        case "sign flip":
            return [-change for change in own]
        case "sign flip x10":
            return [-10 * change for change in own]
        case "scaling x10":
            return [10 * change for change in own]
        case "gaussian":
            noise = [random.standard_normal(change.shape) for change in own]
            return [
                10 * np.linalg.norm(change) / np.linalg.norm(drawn) * drawn
                for change, drawn in zip(own, noise, strict=True)
            ]
        case "ALIE":
            return [np.mean(part, 0) - ALIE_Z * np.std(part, 0) for part in honest]
        case "IPM":
            return [-IPM_EPSILON * np.mean(part, 0) for part in honest]
        case "backdoor x5":
            return [5 * change for change in own]
    return own


def aggregation_of(rule: str, hostile: int, server: ServerOptimizer) -> Aggregation:
    name, head_rule = RULES[rule]
    robust = Robust(rule=name, head=head_rule, byzantine=max(0.2, hostile / len(RANKS)))
    checks = Checks(mode="none") if rule == "no defence" else Checks()
    return Aggregation(robust=robust, checks=checks, server=server)


@dataclass
class Trained:
    """What a federation came to: loss and accuracy on the test set after each round, its last model, verdicts."""

    losses: list[float]
    accuracies: list[float]
    fooled: float
    verdicts: dict[str, int]


def run(
    model: Model, data: Data, shares, attack: str, hostile: list[int], aggregation: Aggregation, seed: int,
    rates: list[float],
) -> Trained:  # fmt: skip
    """Train a federation, a round for each learning rate; `fooled` is how often the backdoor works at the end."""
    random = np.random.default_rng(seed)
    trigger = 3 * np.sign(np.random.default_rng(99).standard_normal(WIDTH)) * (np.arange(WIDTH) < 16)
    labels = np.repeat(data.labels[None], len(RANKS), axis=0)
    if attack == "label flip":
        labels[hostile] = CLASSES - 1 - labels[hostile]

    def batches(random):
        picked = np.array([random.choice(share, BATCH) for share in shares])
        features, wanted = data.train[picked], labels[np.arange(len(RANKS))[:, None], picked]
        if attack.startswith("backdoor"):
            for k in hostile:
                features[k, ::2] += trigger
                wanted[k, ::2] = TARGET
        return features, wanted

    counted = capped({f"node-{k}": len(share) for k, share in enumerate(shares)})
    state = State(None, [np.zeros((WIDTH, 0))] * 2, [np.zeros((0, WIDTH))] * 2, model.head)
    kept: Path | None = None
    losses: list[float] = []
    accuracies: list[float] = []
    norms: list[float] = []
    verdicts: Counter = Counter()
    fast = "/dev/shm" if Path("/dev/shm").is_dir() else None
    with tempfile.TemporaryDirectory(dir=fast) as folder:
        for number, rate in enumerate(rates):
            lefts, rights, heads = train(model, state, batches, random, rate)
            changes = changes_of(state, lefts, rights, heads)
            honest = [
                np.stack([changes[k][part] for k in range(len(RANKS)) if k not in hostile])
                for part in range(3)
            ]
            updates = []
            for k, rank in enumerate(RANKS):
                factors = [(lefts[m][k][:, :rank], rights[m][k][:rank]) for m in range(2)]
                head = heads[k]
                if k in hostile and attack not in ("label flip", "backdoor"):
                    sent = turned(attack, changes[k], honest, random)
                    factors = [low_rank(started(state, m, rank) + sent[m], rank) for m in range(2)]
                    head = state.head + sent[2]
                updates.append(write(Path(folder), number, k, rank, factors, head, counted[f"node-{k}"]))
            request = AggregationRequest(
                aggregation, ALPHA, False, tuple(updates), Path(folder), state.path, kept, tuple(norms[-200:])
            )
            report = aggregate_round(request)
            norms += [found.norm for found in report.nodes.values() if found.verdict == "ok"]
            for node, found in report.nodes.items():
                verdicts[("hostile " if int(node[5:]) in hostile else "honest ") + found.verdict] += 1
            state = state_of(report.adapter.path)
            kept = report.server_state.path if report.server_state else None
            for update in updates:
                update.path.unlink()
            layers = [model.frozen[m] + state.left[m] @ state.right[m] for m in range(2)]
            logits = model.logits(layers, state.head, data.test)[0]
            losses.append(cross_entropy(logits, data.truth))
            accuracies.append(float((logits.argmax(-1) == data.truth).mean()))
    other = data.truth != TARGET
    fooled = model.logits(layers, state.head, data.test[other] + trigger)[0].argmax(-1) == TARGET
    return Trained(losses, accuracies, float(fooled.mean()), dict(verdicts))


def cross_entropy(logits: np.ndarray, truth: np.ndarray) -> float:
    highest = logits.max(-1, keepdims=True)
    total = np.log(np.exp(logits - highest).sum(-1)) + highest[:, 0]
    return float((total - logits[np.arange(len(truth)), truth]).mean())


def started(state: State, matrix: int, rank: int) -> np.ndarray:
    return state.left[matrix][:, :rank] @ state.right[matrix][:rank]


def changes_of(state: State, lefts, rights, heads) -> list[list[np.ndarray]]:
    """Return each node's changes: two dense matrices and a head."""
    return [
        [
            *(
                scale(ALPHA, rank, False) * lefts[m][k] @ rights[m][k] - started(state, m, rank)
                for m in range(2)
            ),
            heads[k] - state.head,
        ]
        for k, rank in enumerate(RANKS)
    ]


def low_rank(dense: np.ndarray, rank: int) -> tuple[np.ndarray, np.ndarray]:
    """Return factors whose scaled product is the best one of that rank."""
    left, sigma, right = np.linalg.svd(dense)
    return left[:, :rank] * sigma[:rank] / scale(ALPHA, rank, False), right[:rank]


def write(folder: Path, number: int, k: int, rank: int, factors, head, samples: float) -> NodeUpdate:
    tensors = {WEIGHT: np.float32(head)}
    for name, (left, right) in zip(MATRICES, factors, strict=True):
        tensors[name + LORA_B] = np.ascontiguousarray(left, np.float32)
        tensors[name + LORA_A] = np.ascontiguousarray(right, np.float32)
    path = folder / f"{number}-{k}"
    save_file(tensors, path)
    return NodeUpdate(f"node-{k}", path, int(samples), dict.fromkeys(MATRICES, rank))


def state_of(path: Path) -> State:
    """Return the global adapter as nodes receive it."""
    tensors = load_file(path)
    pairs = [received({suffix: tensors[name + suffix] for suffix in (LORA_B, LORA_A)}) for name in MATRICES]
    lefts, rights = ([pair[suffix].astype(float) for pair in pairs] for suffix in (LORA_B, LORA_A))
    return State(path, lefts, rights, tensors[WEIGHT].astype(float))


def cases(chosen: argparse.Namespace):
    """Yield (seed, attack, fraction, rule); what decides the default first."""
    attacks = [attack for attack in chosen.attacks if attack != "none"]
    for seed in range(chosen.seeds):
        if "none" in chosen.attacks:
            for rule in chosen.rules:
                yield seed, "none", 0.0, rule
        if 0.2 in chosen.fractions:
            for attack in attacks:
                for rule in chosen.rules:
                    yield seed, attack, 0.2, rule
    for fraction in [fraction for fraction in chosen.fractions if fraction != 0.2]:
        for attack in attacks:
            for rule in chosen.rules:
                yield 0, attack, fraction, rule


def table(runs: list[dict]) -> str:
    """Return accuracy by attack and rule, in per cent; a backdoor's success in brackets."""
    lines = ["| attack | hostile | " + " | ".join(RULES) + " |", "|---|---|" + "---|" * len(RULES)]
    keys = dict.fromkeys((run["attack"], run["fraction"]) for run in runs)
    for attack, fraction in sorted(keys, key=lambda key: (["none", *ATTACKS].index(key[0]), key[1])):
        row = []
        for rule in RULES:
            found = [r for r in runs if (r["attack"], r["fraction"], r["rule"]) == (attack, fraction, rule)]
            if not found:
                row.append("")
                continue
            text = f"{100 * np.mean([r['accuracy'] for r in found]):.1f}"
            if attack.startswith("backdoor"):
                text += f" ({100 * np.mean([r['backdoor'] for r in found]):.0f})"
            row.append(text)
        lines.append(f"| {attack} | {100 * fraction:.0f} % | " + " | ".join(row) + " |")
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--news", type=Path, help="folder of 20 Newsgroups; default: a mixture of Gaussians")
    parser.add_argument("--seeds", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=12)
    parser.add_argument("--attacks", nargs="+", choices=["none", *ATTACKS], default=["none", *ATTACKS])
    parser.add_argument("--rules", nargs="+", choices=RULES, default=list(RULES))
    parser.add_argument("--fractions", nargs="+", type=float, default=[0.2, 0.4, 0.1, 0.3])
    parser.add_argument("--server", type=ServerOptimizer.model_validate_json, default=ServerOptimizer())
    parser.add_argument("--again", choices=RULES, help="run this rule again, and keep the other runs")
    parser.add_argument("--output", type=Path, default=RESULTS / "attacks")
    chosen = parser.parse_args()
    path, runs, before = chosen.output.with_suffix(".json"), [], 0.0
    if chosen.again and path.exists():
        old = json.loads(path.read_text())
        before, runs = old["seconds"], [one for one in old["runs"] if one["rule"] != chosen.again]
    data = mixture(0) if chosen.news is None else news(chosen.news)
    started_at = time.perf_counter()
    for seed, attack, fraction, rule in cases(chosen):
        if chosen.again and rule != chosen.again:
            continue
        shares = split(data.labels.tolist(), len(RANKS), "dirichlet", 0.5, seed)
        hostile = np.random.default_rng(seed).permutation(len(RANKS))[: round(fraction * len(RANKS))].tolist()
        aggregation = aggregation_of(rule, len(hostile), chosen.server)
        rates = [RATE] * chosen.rounds
        done = run(Model(seed), data, shares, attack, hostile, aggregation, seed, rates)
        accuracy = done.accuracies[-1]
        runs.append(
            {"seed": seed, "attack": attack, "fraction": fraction, "rule": rule, "accuracy": accuracy,
             "backdoor": done.fooled, "verdicts": done.verdicts, "commit": commit()}
        )  # fmt: skip
        print(
            f"{attack:14} {fraction:.0%} {rule:18} seed {seed}: {accuracy:.3f} {done.fooled:.2f} {done.verdicts}",
            flush=True,
        )
        results = {
            "machine": machine(), "seconds": before + time.perf_counter() - started_at,
            "data": "mixture" if chosen.news is None else "20 Newsgroups", "ranks": RANKS,
            "server": chosen.server.to_dict(),
            "rounds": chosen.rounds, "steps": STEPS, "batch": BATCH, "alie_z": ALIE_Z,
            "ipm_epsilon": IPM_EPSILON, "runs": runs,
        }  # fmt: skip
        path.write_text(json.dumps(results, indent=1) + "\n")
        chosen.output.with_suffix(".md").write_text(table(runs))


if __name__ == "__main__":
    main()
