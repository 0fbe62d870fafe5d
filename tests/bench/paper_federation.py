# SPDX-License-Identifier: Apache-2.0
"""One training of the comparison, in one process: plan, train, aggregate and evaluate, on a virtual clock."""

import shutil
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.numpy import load_file, save_file

from bench import paper_fleet as fleet
from bench.paper_nodes import FullTrainer, Trainer, size
from bench.paper_systems import ALL, Assigned, Request, assign, spec_of
from bench.paper_tasks import Scenario, Setting, Task, measure, measure_bleu, prepare
from fedpipe_agent.train.device import Device
from fedpipe_agent.train.importance import RANK
from fedpipe_api import wire
from fedpipe_api.job import Method
from fedpipe_api.lora.format import LORA_A, LORA_B
from fedpipe_api.lora.methods import Start
from fedpipe_api.node import Capacity
from fedpipe_operator.aggregate import AggregationReport, AggregationRequest, NodeUpdate, aggregate_round
from fedpipe_operator.engine.decide import CALIBRATION_STEPS
from fedpipe_operator.planner import speed, training_memory
from fedpipe_operator.planner.workload import Configuration, workload

CENTRE = "a100-0"
SPECTRUM_SHARES = (0.9, 0.99)
LEVER_RANKS = (2, 4, 8, 16)

Show = Callable[[int, str], object]
"""Called with the rounds done and a line about the last."""


class Federation:
    """A scenario's nodes and server."""

    def __init__(
        self,
        scenario: Scenario,
        setting: Setting,
        root: Path,
        work: Path,
        scores: Mapping[str, float] | None = None,
    ):
        """Prepare; `scores` are the importance that another system's training found of the same data."""
        self.scenario = scenario
        self._scores = scores
        self.system = ALL[scenario.system]
        self.work = work
        central = self.system.layout == "central"
        names = (CENTRE,) if central else fleet.node_names(scenario.fleet)
        self.task: Task = prepare(scenario, setting, root, names, work)
        self.spec = spec_of(self.system, self.task.spec, len(fleet.node_names(scenario.fleet)))
        self.devices = {
            name: fleet.device(fleet.kind_of(name), self.task.shape, self.task.spec) for name in names
        }
        self.limit = float("inf") if central else self.spec.rounds.deadline
        self._moves = not central
        self._device = Device(Capacity(threads=1))
        make = FullTrainer if self.system.layout == "full" else Trainer
        self.nodes: dict[str, Any] = {
            name: make(name, self.task, self.spec, samples, self._device, work, setting)
            for name, samples in self.task.nodes.items()
        }
        self.server: Any = make("server", self.task, self.spec, self.task.test, self._device, work, setting)
        self._start = self.system.method.start
        self.seconds, self.down, self.up = 0.0, 0, 0
        self._server_state: Path | None = None

    def run(self, show: Show) -> dict[str, Any]:
        """Train; return everything that was measured."""
        begin = time.monotonic()
        assigned, scores = self._plan()
        profile = {"seconds": self.seconds, "down": self.down, "up": self.up}
        adapter, sent = None, None
        rounds: list[dict[str, Any]] = []
        for number in range(1, self.spec.rounds.count + 1):
            adapter, sent, row = self._round(number, adapter, sent, assigned)
            rounds.append(row)
            show(number, _line(row))
        assert adapter is not None
        final: dict[str, Any] = {}
        if self.task.references:
            self.server.hold(adapter)
            final["bleu"] = measure_bleu(self.task, self.server.model)
        if self.scenario.system == "fedpipe":
            final["levers"] = self._levers(adapter)
        return {
            **vars(self.scenario),
            "deadline": None if self.limit == float("inf") else self.limit,
            "profile": profile,
            "selected": list(assigned.selected),
            "scores": scores,
            "plans": {name: _described(plan) for name, plan in assigned.nodes.items()},
            "leftOut": assigned.left_out,
            "samples": {name: len(samples) for name, samples in self.task.nodes.items()},
            "trainable": self._trainable(assigned),
            "peak": {name: plan.predicted_bytes for name, plan in assigned.nodes.items()},
            "budget": {
                name: training_memory.budget(facts, fleet.HEADROOM) for name, facts in self.devices.items()
            },
            "rounds": rounds,
            "final": final,
            "wallSeconds": time.monotonic() - begin,
        }

    def _plan(self) -> tuple[Assigned, dict[str, float]]:
        """Return what every node carries; FedPipe profiles first, and its clock and links pay for that."""
        samples = {name: len(found) for name, found in self.task.nodes.items()}
        request = Request(self.system, self.task.shape, self.spec, samples, self.devices)
        first = assign(request)
        if self.system.layout != "planned":
            return first, {}
        scores = dict(self._scores or {}) if self.system.selection == "importance" else {}
        if self.system.selection == "importance" and not scores:
            total = sum(samples[name] for name in first.nodes)
            found = {name: self.nodes[name].scores(plan) for name, plan in first.nodes.items()}
            scores = {
                matrix.name: sum(samples[name] / total * found[name][matrix.name] for name in found)
                for matrix in self.task.shape.matrices
            }
        self.seconds = max(self._profile_seconds(name, plan) for name, plan in first.nodes.items())
        self.up = 8 * len(scores) * len(first.nodes)
        return assign(request, scores or None, first), scores

    def _profile_seconds(self, name: str, plan: wire.NodePlan) -> float:
        seconds = CALIBRATION_STEPS * plan.predicted_step_seconds
        if self.system.selection == "importance":
            work = workload(self.task.shape, self.spec, self.task.shape.matrices)
            configuration = Configuration(plan.precision, plan.micro_batch, plan.checkpointing)
            ranks = dict.fromkeys(work.sides, RANK)
            steps = self.spec.adapter.selection.warmup_steps
            seconds += steps * speed.step_time(work, self.devices[name], configuration, ranks)
        return seconds

    def _round(
        self, number: int, adapter: Path | None, sent: Path | None, assigned: Assigned
    ) -> tuple[Path, Path, dict[str, Any]]:
        """Train and aggregate one round; return the new global adapter, the same as sent, and the measures."""
        shares: dict[str, fleet.Share] = {}
        updates: list[NodeUpdate] = []
        losses: list[float] = []
        for name, plan in assigned.nodes.items():
            facts = self.devices[name]
            down = self._download(sent, plan) if sent and self._moves else 0
            up = self._upload(plan) if self._moves else 0
            shares[name] = part = fleet.share(
                speed.transfer_time(facts, down),
                plan.predicted_step_seconds,
                speed.transfer_time(facts, up),
                plan.local_steps,
                self.limit,
            )
            self.down += down
            if part.done:
                path, loss = self.nodes[name].train(sent, plan, self._start, number, part.done)
                updates.append(NodeUpdate(name, path, len(self.task.nodes[name]), plan.ranks))
                losses.append(loss)
                self.up += size(path) if self._moves else 0
        self.seconds += fleet.round_seconds(shares.values(), self.limit)
        report = aggregate_round(
            AggregationRequest(
                aggregation=self.spec.aggregation,
                alpha=self.spec.adapter.alpha,
                rs_lora=self.spec.adapter.rs_lora,
                updates=tuple(updates),
                directory=self.work,
                adapter=adapter,
                server_state=self._server_state,
                threads=1,
            )
        )
        kept = self.work / f"global-{number % 2}.safetensors"
        shutil.move(report.adapter.path, kept)
        sent = kept
        if report.sent is not None:
            sent = kept.with_name(f"sent-{number % 2}.safetensors")
            shutil.move(report.sent.path, sent)
        if report.server_state is not None:
            self._server_state = kept.with_name(f"state-{number % 2}.safetensors")
            shutil.move(report.server_state.path, self._server_state)
        self.server.hold(kept)
        planned, done = fleet.under_training(
            shares, len(assigned.left_out), self.spec.rounds.local_steps or 0
        )
        row = {
            "round": number,
            **measure(self.task, self.server.model, self._device),
            "trainLoss": float(np.mean(losses)),
            "seconds": self.seconds,
            "down": self.down,
            "up": self.up,
            "planned": planned,
            "done": done,
            "updates": len(updates),
            "stateBytes": report.server_state.size if report.server_state else 0,
            **_aggregated(report),
            **(_spectrum(kept) if self.system.method is Method.EXACT and report.matrices else {}),
        }
        return kept, sent, row

    def _download(self, sent: Path, plan: wire.NodePlan) -> int:
        """Return the bytes a node needs: the whole global adapter, or only its rank's part of it."""
        if self.system.layout == "full" or self._start in (Start.SPLIT, Start.FRESH):
            return size(sent)
        head = sum(int(np.prod(tensor.shape)) for tensor in self.task.shape.head)
        return 4 * (head + self._values(plan))

    def _upload(self, plan: wire.NodePlan) -> int:
        head = sum(int(np.prod(tensor.shape)) for tensor in self.task.shape.head)
        if self.system.layout == "full":
            return 4 * (head + self.task.shape.parameters)
        return 4 * head + self._start.upload.width * self._values(plan)

    def _values(self, plan: wire.NodePlan) -> int:
        """Return how many values the factors of a plan have."""
        sides = {matrix.name: matrix.rows + matrix.columns for matrix in self.task.shape.matrices}
        return sum(rank * sides[name] for name, rank in plan.ranks.items())

    def _trainable(self, assigned: Assigned) -> dict[str, int]:
        head = sum(int(np.prod(tensor.shape)) for tensor in self.task.shape.head)
        whole = self.task.shape.parameters if self.system.layout == "full" else 0
        return {name: head + (whole or self._values(plan)) for name, plan in assigned.nodes.items()}

    def _levers(self, adapter: Path) -> dict[str, dict[str, float]]:
        """Measure what a smaller download would cost: fewer components, or fewer bits, of the last adapter."""
        tensors = load_file(adapter)
        variants: dict[str, tuple[dict[str, np.ndarray], float]] = {"rank all, fp32": (tensors, 4.0)}
        for rank in LEVER_RANKS:
            variants[f"rank {rank}, fp32"] = ({n: _leading(n, t, rank) for n, t in tensors.items()}, 4.0)
        variants["rank all, bf16"] = ({n: _bf16(t) for n, t in tensors.items()}, 2.0)
        variants["rank all, int8"] = ({n: _int8(n, t) for n, t in tensors.items()}, 1.0)
        found = {}
        for title, (changed, width) in variants.items():
            path = self.work / "lever.safetensors"
            save_file(changed, path)
            self.server.hold(path)
            values = sum(tensor.size for tensor in changed.values())
            found[title] = {"bytes": width * values, **measure(self.task, self.server.model, self._device)}
        return found


def _described(plan: wire.NodePlan) -> dict[str, Any]:
    kept = plan.model_dump(mode="json", exclude={"predicted_round_seconds", "predicted_bytes"})
    kept["ranks"] = dict(sorted(plan.ranks.items()))
    return kept


def _aggregated(report: AggregationReport) -> dict[str, float]:
    return {
        "relativeError": report.relative_error,
        "discardedEnergy": report.discarded_energy,
        "effectiveRank": report.effective_rank,
        "globalRank": float(np.mean([found.rank for found in report.matrices.values()] or [0])),
    }


def _spectrum(adapter: Path) -> dict[str, float]:
    """Return how many leading components hold a share of a matrix's energy, on average; B is U·Σ."""
    energies = [
        np.square(tensor).sum(axis=0) for name, tensor in load_file(adapter).items() if name.endswith(LORA_B)
    ]
    return {
        f"rank{share:g}": float(
            np.mean([1 + int(np.searchsorted(np.cumsum(found), share * found.sum())) for found in energies])
        )
        for share in SPECTRUM_SHARES
    }


def _leading(name: str, tensor: np.ndarray, rank: int) -> np.ndarray:
    if name.endswith(LORA_B):
        return np.ascontiguousarray(tensor[:, :rank])
    return np.ascontiguousarray(tensor[:rank]) if name.endswith(LORA_A) else tensor


def _bf16(tensor: np.ndarray) -> np.ndarray:
    return torch.from_numpy(tensor).bfloat16().float().numpy()


def _int8(name: str, tensor: np.ndarray) -> np.ndarray:
    """Round to 8 bits, with one scale for each component of a factor and one for each other tensor."""
    axis = {LORA_B: 0, LORA_A: 1}.get(name[-len(LORA_A) :])
    scale = np.abs(tensor).max(axis=axis, keepdims=axis is not None) / 127 + 1e-30
    return (np.round(tensor / scale) * scale).astype(np.float32)


def _line(row: Mapping[str, Any]) -> str:
    metric = "accuracy" if "accuracy" in row else "perplexity"
    return (
        f"loss {row['loss']:.4f}  {metric} {row[metric]:.4f}  {row['seconds']:.1f} virtual s  "
        f"{(row['down'] + row['up']) / 1e6:.1f} MB  steps {row['done']}/{row['planned']}"
    )
