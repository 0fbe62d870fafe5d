# SPDX-License-Identifier: Apache-2.0
"""The report's plots, as PNG files. The only module that needs matplotlib."""

import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import matplotlib as mpl
import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import LogNorm
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from matplotlib.ticker import FuncFormatter, MaxNLocator
from matplotlib.typing import RcKeyType

RoundRow = dict[str, Any]
Value = Callable[[RoundRow], float | None]

NODES_SHOWN = 8
"""Nodes with a line or bar of their own; of more, the first in order of name are drawn."""

# Okabe and Ito's palette: colour-blind people can distinguish them too.
_COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000", "#8C6D31")
_MARKERS = "osD^vPX*"
_GREY = "#9A9A9A"

_PHASES = (
    ("downloadSeconds", "download", "#56B4E9"),
    ("evaluateSeconds", "evaluate", "#E69F00"),
    ("trainSeconds", "train", "#009E73"),
    ("waitSeconds", "upload, wait for others", "#D0D0D0"),
    ("aggregateSeconds", "aggregate", "#CC79A7"),
)

_STYLE: dict[RcKeyType, Any] = {
    "axes.axisbelow": True,
    "axes.edgecolor": "#888888",
    "axes.grid": True,
    "axes.spines.right": False,
    "axes.spines.top": False,
    "axes.titlelocation": "left",
    "axes.titlesize": 10,
    "figure.constrained_layout.use": True,
    "font.size": 9,
    "grid.color": "#E6E6E6",
    "legend.fontsize": 8,
    "legend.frameon": False,
    "lines.linewidth": 1.8,
    "lines.markersize": 4,
}


@dataclass(frozen=True)
class Plot:
    """One drawn plot: its file, a heading, and what it shows in words."""

    path: Path
    title: str
    words: str


def draw(
    rows: list[RoundRow], metric: str, scores: dict[str, float], chosen: set[str], directory: Path
) -> list[Plot]:
    """Draw every plot that there are measurements for, from `tracking.rows.rounds` with a round above 0."""
    directory.mkdir(parents=True, exist_ok=True)
    trained = [row for row in rows if row["round"] > 0]
    nodes = sorted({node for row in trained for node in row["nodes"]})[:NODES_SHOWN]
    rounds = f"over rounds {trained[0]['round']} to {trained[-1]['round']}"

    def save(
        name: str, title: str, words: str, size: tuple[float, float], fill: Callable[[Figure], None]
    ) -> Plot:
        path = directory / f"{name}.png"
        with mpl.rc_context(_STYLE):
            figure = Figure(figsize=size)
            fill(figure)
            figure.savefig(path, dpi=144)
        return Plot(path, title, words)

    plots = [
        save("metric", "Metric and loss", f"{metric} and loss on held-out data, {rounds}",
             (8, 3), lambda figure: _metric(figure, rows, metric, nodes)),
        save("nodes", "What each node carries", "precision, ranks, batch and memory of each node",
             (8, 1.6 + 0.34 * len(nodes)), lambda figure: _nodes(figure, trained, nodes)),
        save("phases", "Where the time goes", "mean seconds of a round in each phase, by node",
             (8, 1.3 + 0.32 * len(nodes)), lambda figure: _phases(figure, trained, nodes)),
        save("bytes", "Bytes on the wire", f"megabytes up and down per round, {rounds}",
             (8, 2.6), lambda figure: _bytes(figure, trained, nodes)),
        save("updates", "Updates of the nodes", f"norm of each update and its cosine to the others, {rounds}",
             (8, 2.8), lambda figure: _updates(figure, trained, nodes)),
        save("aggregation", "Aggregation", f"effective rank and error of the global adapter, {rounds}",
             (8, 2.8), lambda figure: _aggregation(figure, trained)),
    ]  # fmt: skip
    if scores:
        columns, layers = _layers(scores)
        plots.append(
            save("importance", "Importance of the matrices",
                 "score by layer and matrix, selected ones framed",
                 (8, 1.5 + 0.3 * len(layers)), lambda f: _importance(f, scores, chosen, columns, layers))
        )  # fmt: skip
    return plots


def _lines(axes: Axes, rows: list[RoundRow], nodes: list[str], value: Value) -> None:
    """Draw one line for each node through the rounds in which it has a value."""
    for i, node in enumerate(nodes):
        points = [(row["round"], value(row["nodes"].get(node, {}))) for row in rows]
        known = [(x, y) for x, y in points if y is not None]
        axes.plot(
            [x for x, _ in known], [y for _, y in known],
            color=_COLOURS[i % len(_COLOURS)], marker=_MARKERS[i % len(_MARKERS)], label=node, linewidth=1.2,
        )  # fmt: skip


def _get(key: str) -> Value:
    return lambda node: node.get(key)


def _by_round(axes: Axes, title: str) -> None:
    axes.set_title(title)
    axes.set_xlabel("round")
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))


def _legend(figure: Figure, axes: Axes) -> None:
    handles, labels = axes.get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=min(len(labels), 6))


def _metric(figure: Figure, rows: list[RoundRow], metric: str, nodes: list[str]) -> None:
    left, right = figure.subplots(1, 2)
    # Beside the loss itself its exponential is all there is to show.
    shown = "perplexity" if metric == "loss" else metric
    for axes, key in ((left, shown), (right, "loss")):
        _lines(axes, [row for row in rows if "nodes" in row], nodes, _get(key))
        for line in axes.lines:
            line.set_alpha(0.45)
        known = [(row["round"], row[key]) for row in rows if row[key] is not None]
        axes.plot(
            [x for x, _ in known], [y for _, y in known], color="#222222", linewidth=2.6, label="all nodes"
        )
        _by_round(axes, f"{'evaluation loss' if key == 'loss' else key}, held out")
    right.set_ylim(bottom=0)
    if shown == "accuracy":
        left.set_ylim(0, 1)
    elif shown == "perplexity":
        left.set_yscale("log")
        for which in (left.yaxis.set_major_formatter, left.yaxis.set_minor_formatter):
            which(FuncFormatter(lambda value, _: f"{value:.4g}"))
    _legend(figure, right)


def _bytes(figure: Figure, rows: list[RoundRow], nodes: list[str]) -> None:
    left, right = figure.subplots(1, 2)
    x = np.array([row["round"] for row in rows])
    left.bar(x - 0.2, [row["bytesDown"] / 1e6 for row in rows], 0.4, label="down", color=_COLOURS[5])
    left.bar(x + 0.2, [row["bytesUp"] / 1e6 for row in rows], 0.4, label="up", color=_COLOURS[1])
    _by_round(left, "MB per round, all nodes")
    left.legend(loc="upper left")
    left.set_ylim(top=left.get_ylim()[1] * 1.25)
    _lines(right, rows, nodes, lambda node: node["bytesUp"] / 1e6 if node.get("counted") else None)
    _by_round(right, "MB up, by node")
    right.set_ylim(0, right.get_ylim()[1] * 1.1)
    right.legend(ncols=2, loc="best")


def _nodes(figure: Figure, rows: list[RoundRow], nodes: list[str]) -> None:
    latest = {node: row["nodes"][node] for row in rows for node in nodes if node in row["nodes"]}
    ranks, batch, memory = figure.subplots(1, 3, sharey=True, width_ratios=(1, 0.8, 1.2))
    y = np.arange(len(nodes))
    for i, node in enumerate(nodes):
        facts, colour = latest[node], _COLOURS[i % len(_COLOURS)]
        ranks.plot(
            [facts["minRank"], facts["maxRank"]], [i, i], color=colour, linewidth=6, marker="o", markersize=6
        )
        batch.barh(i, facts["microBatch"], 0.55, color=colour)
        accumulation = f" ×{facts['accumulation']}" if facts["accumulation"] > 1 else ""
        batch.text(facts["microBatch"], i, f" {facts['microBatch']}{accumulation}", va="center", fontsize=8)
        peaks = [row["nodes"][node].get("peakBytes", 0) for row in rows if node in row["nodes"]]
        memory.barh(i - 0.19, facts["predictedBytes"] / 2**20, 0.36, color=colour, alpha=0.35)
        memory.barh(i + 0.19, max(peaks) / 2**20, 0.36, color=colour)
    ranks.set_yticks(y, [f"{node}\n{latest[node]['precision']}" for node in nodes])
    ranks.set_ylim(len(nodes) - 0.5, -0.5)
    ranks.set_xlim(left=0)
    ranks.xaxis.set_major_locator(MaxNLocator(integer=True))
    ranks.set_title("ranks, lowest to highest")
    batch.set_title("batch ×accumulation")
    batch.margins(x=0.3)
    memory.set_title("memory: predicted (pale), peak (full)")
    memory.set_xlabel("MiB")
    for axes in (ranks, batch, memory):
        axes.grid(visible=False, axis="y")


def _phases(figure: Figure, rows: list[RoundRow], nodes: list[str]) -> None:
    axes = figure.subplots()
    start = np.zeros(len(nodes))
    for key, name, colour in _PHASES:
        spent = np.array([_mean_seconds(rows, node, key) for node in nodes])
        axes.barh(nodes, spent, 0.62, left=start, color=colour, label=name)
        start += spent
    axes.invert_yaxis()
    axes.grid(visible=False, axis="y")
    axes.set_xlabel("seconds of a round, mean")
    _legend(figure, axes)


def _mean_seconds(rows: list[RoundRow], node: str, key: str) -> float:
    spent = []
    for row in rows:
        facts = row["nodes"].get(node, {})
        if not facts.get("counted"):
            continue
        if key == "aggregateSeconds":
            spent.append(row["seconds"] - row["collectSeconds"])
        elif key == "waitSeconds":
            busy = sum(facts[k] for k in ("downloadSeconds", "evaluateSeconds", "trainSeconds"))
            spent.append(max(0.0, row["collectSeconds"] - busy))
        else:
            spent.append(facts[key])
    return float(np.mean(spent)) if spent else 0.0


def _updates(figure: Figure, rows: list[RoundRow], nodes: list[str]) -> None:
    norms, cosines = figure.subplots(1, 2)
    _lines(norms, rows, nodes, _get("updateNorm"))
    _by_round(norms, "norm of the update")
    norms.set_ylim(bottom=0)
    _lines(cosines, rows, nodes, _get("updateCosine"))
    _by_round(cosines, "cosine to the mean of the others")
    cosines.axhline(0, color=_GREY, linewidth=0.8)
    _legend(figure, norms)


def _aggregation(figure: Figure, rows: list[RoundRow]) -> None:
    rank, error = figure.subplots(1, 2)
    x = [row["round"] for row in rows]
    rank.plot(x, [row["effectiveRank"] for row in rows], color=_COLOURS[0], marker="o")
    _by_round(rank, "effective rank, mean over matrices")
    rank.set_ylim(bottom=0)
    error.plot(
        x, [row["relativeError"] for row in rows], color=_COLOURS[1], marker="s", label="relative error"
    )
    error.plot(
        x, [row["discardedEnergy"] for row in rows], color=_COLOURS[2], marker="D", label="discarded energy"
    )
    _by_round(error, "against the exact weighted sum")
    error.set_ylim(bottom=0)
    error.legend(loc="best")


def _layers(scores: dict[str, float]) -> tuple[list[str], list[str]]:
    """Return the matrix kinds and the layers of full module names, split at the first number."""
    parts = [_place(name) for name in scores]
    kinds = list(dict.fromkeys(kind for _, kind in parts))
    return kinds, sorted({layer for layer, _ in parts}, key=lambda layer: (len(layer), layer))


def _place(name: str) -> tuple[str, str]:
    match = re.search(r"\.(\d+)\.", name)
    return (match[1], name[match.end() :]) if match else ("–", name)


def _importance(
    figure: Figure, scores: dict[str, float], chosen: set[str], kinds: list[str], layers: list[str]
) -> None:
    axes = figure.subplots()
    grid = np.full((len(layers), len(kinds)), np.nan)
    highest = max(scores.values()) or 1.0
    for name, score in scores.items():
        layer, kind = _place(name)
        row, column = layers.index(layer), kinds.index(kind)
        grid[row, column] = score / highest
        if name in chosen:
            frame = Rectangle((column - 0.46, row - 0.44), 0.92, 0.88, fill=False)
            frame.set(edgecolor=_COLOURS[1], linewidth=2)
            axes.add_patch(frame)
    # Scores span orders of magnitude.
    lowest = max(min(value for value in scores.values()) / highest, 1e-6)
    image = axes.imshow(grid, aspect="auto", cmap="Blues", norm=LogNorm(min(lowest, 0.1), 1, clip=True))
    axes.set_xticks(range(len(kinds)), kinds, fontsize=8)
    axes.set_yticks(range(len(layers)), layers)
    axes.set_ylabel("layer")
    axes.grid(visible=False)
    figure.colorbar(image, ax=axes, label="share of the highest")
