# SPDX-License-Identifier: Apache-2.0
"""Rounds written to files, and what METHOD §4 says of them with dense float64 matrices."""

from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from hypothesis import strategies as st
from safetensors.numpy import load_file, save_file
from safetensors.torch import save_file as save_torch_file

from fedpipe_api.job import Aggregation, Method
from fedpipe_api.lora.format import HEAD, LORA_A, LORA_B, scale
from fedpipe_operator.aggregate import AggregationReport, AggregationRequest, NodeUpdate, aggregate_round


@dataclass
class Node:
    """One update: factors by matrix, head tensors, samples; `bf16` says in which type the factors are written."""

    name: str
    samples: int
    factors: dict[str, tuple[np.ndarray, np.ndarray]]
    head: dict[str, np.ndarray] = field(default_factory=dict)
    bf16: bool = False

    @property
    def ranks(self) -> dict[str, int]:
        return {name: len(right) for name, (_, right) in self.factors.items()}

    def write(self, directory: Path) -> NodeUpdate:
        path = directory / f"{self.name}.safetensors"
        tensors = {n: torch.from_numpy(v) for n, v in as_tensors(self.factors, self.head).items()}
        if self.bf16:
            tensors = {n: v if n.startswith(HEAD) else v.bfloat16() for n, v in tensors.items()}
        save_torch_file(tensors, path)
        return NodeUpdate(self.name, path, self.samples, self.ranks)


def as_tensors(factors, head):
    tensors = {HEAD + name: np.float32(value) for name, value in head.items()}
    for name, (left, right) in factors.items():
        tensors[name + LORA_B] = np.ascontiguousarray(left, np.float32)
        tensors[name + LORA_A] = np.ascontiguousarray(right, np.float32)
    return tensors


@dataclass
class Round:
    """One round; `start` holds the global factors and head before it."""

    nodes: list[Node]
    start: dict[str, tuple[np.ndarray, np.ndarray]] | None = None
    start_head: dict[str, np.ndarray] = field(default_factory=dict)
    alpha: float = 16.0
    rs_lora: bool = False

    def scale(self, rank: int) -> float:
        return scale(self.alpha, rank, self.rs_lora)

    def run(self, directory: Path, aggregation: Aggregation, **options) -> tuple[AggregationReport, dict]:
        """Aggregate, and return the report and the tensors of the new global adapter."""
        adapter = None
        if self.start is not None:
            adapter = directory / "global.safetensors"
            save_file(as_tensors(self.start, self.start_head), adapter)
        request = AggregationRequest(
            aggregation=aggregation,
            alpha=self.alpha,
            rs_lora=self.rs_lora,
            updates=tuple(node.write(directory) for node in self.nodes),
            directory=directory,
            adapter=adapter,
            **options,
        )
        report = aggregate_round(request)
        return report, load_file(report.adapter.path)

    @property
    def matrices(self) -> list[str]:
        return sorted({name for node in self.nodes for name in node.factors} | set(self.start or {}))

    def trained(self, name: str) -> list[tuple[Node, float]]:
        """Return the nodes that trained a matrix, with their weights."""
        nodes = [node for node in self.nodes if name in node.factors]
        total = sum(node.samples for node in nodes)
        return [(node, node.samples / total) for node in nodes]

    def dense_start(self, name: str, rank: int | None = None) -> np.ndarray | float:
        """Return G, or its leading components."""
        if not self.start or name not in self.start:
            return 0.0
        left, right = self.start[name]
        return left[:, :rank].astype(float) @ right[:rank].astype(float)

    def product(self, node: Node, name: str) -> np.ndarray:
        left, right = node.factors[name]
        return self.scale(len(right)) * left.astype(float) @ right.astype(float)

    def change(self, node: Node, name: str, method: Method) -> np.ndarray:
        """Return D_k."""
        rank = 0 if method is Method.STACK else len(node.factors[name][1])
        start = self.dense_received(name, rank) if method is Method.EXACT else self.dense_start(name, rank)
        return self.product(node, name) - start

    def dense_received(self, name: str, rank: int) -> np.ndarray | float:
        """Return the leading components of G as a node of the exact method received them."""
        if not self.start or name not in self.start:
            return 0.0
        left, right = self.start[name]
        pairs = zip(left.T[:rank], right[:rank], strict=True)
        return sum((np.outer(in_steps(one), in_steps(other)) for one, other in pairs), start=0.0)

    def target(self, name: str, method: Method) -> np.ndarray:
        """Return G + Σ w D."""
        trained = self.trained(name)
        return self.dense_start(name) + sum(w * self.change(node, name, method) for node, w in trained)


def in_steps(component: np.ndarray) -> np.ndarray:
    """Return a component in whole steps, of which 127 make its largest entry."""
    step = np.float32(max(abs(component)) / np.float32(127))
    return np.array([float(np.rint(value / step) * step) if step else 0.0 for value in component])


def svd_form(dense: np.ndarray, rank: int) -> tuple[np.ndarray, np.ndarray]:
    left, sigma, right = np.linalg.svd(dense, full_matrices=False)
    return np.float32(left[:, :rank] * sigma[:rank]), np.float32(right[:rank])


def product_of(tensors: dict, name: str) -> np.ndarray:
    return tensors[name + LORA_B].astype(float) @ tensors[name + LORA_A].astype(float)


def rounded(factor: np.ndarray) -> np.ndarray:
    """Return a factor as bfloat16 holds it."""
    return torch.from_numpy(factor).bfloat16().float().numpy()


MATRICES = ("layer.0.query", "layer.0.value")


@st.composite
def rounds(draw, equal_ranks: bool = False, largest: int = 24, max_nodes: int = 5) -> Round:
    """Random shapes, ranks (above the dimensions too), weights, magnitudes, participation, zero updates."""
    random = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    shapes = {name: tuple(draw(st.integers(1, largest)) for _ in "dc") for name in MATRICES}
    one_rank = draw(st.integers(1, 8))
    head_shape = (3, draw(st.integers(1, 5)))
    nodes = []
    for index in range(draw(st.integers(1, max_nodes))):
        magnitude = 10.0 ** draw(st.integers(-2, 1))
        factors = {}
        for name, (rows, columns) in shapes.items():
            rank = draw(st.sampled_from([0, one_rank] if equal_ranks else [0, 1, 2, 3, 5, 8]))
            if rank:
                zero = draw(st.integers(0, 5)) == 0
                left = np.float32(random.standard_normal((rows, rank)) * (0 if zero else magnitude))
                factors[name] = (left, np.float32(random.standard_normal((rank, columns))))
        head = (
            {"classifier.weight": np.float32(random.standard_normal(head_shape))}
            if draw(st.booleans())
            else {}
        )
        bf16 = draw(st.booleans())
        if bf16:
            factors = {name: (rounded(left), rounded(right)) for name, (left, right) in factors.items()}
        nodes.append(Node(f"node-{index}", draw(st.integers(1, 5000)), factors, head, bf16))
    start, start_head = None, {}
    if draw(st.booleans()):
        start = {}
        for name, (rows, columns) in shapes.items():
            rank = one_rank if equal_ranks else draw(st.integers(0, 6))
            if rank:
                dense = random.standard_normal((rows, rank)) @ random.standard_normal((rank, columns))
                start[name] = svd_form(dense, rank)
        if equal_ranks:
            start = {
                name: (
                    np.float32(random.standard_normal((rows, one_rank))),
                    np.float32(random.standard_normal((one_rank, columns))),
                )
                for name, (rows, columns) in shapes.items()
            }
        start_head = {"classifier.weight": np.float32(random.standard_normal(head_shape))}
    return Round(nodes, start, start_head, draw(st.sampled_from([1.0, 16.0])), draw(st.booleans()))
