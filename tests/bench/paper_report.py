# SPDX-License-Identifier: Apache-2.0
"""Table and plots of the comparison's results."""

from collections.abc import Callable, Sequence
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

import matplotlib as mpl
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from bench import paper_check as figures
from bench.paper_fleet import KINDS, kind_of
from bench.paper_systems import ABLATIONS, SYSTEMS

Run = dict[str, Any]
MIB, MB = 2**20, 1e6

SETTLED = 3
"""Round from which losses set the scale of a plot."""

# Okabe and Ito's palette: colour-blind people can distinguish it too.
COLOURS = {
    "centralised": "#9A9A9A",
    "vanilla": "#8C6D31",
    "fedit": "#56B4E9",
    "zero-pad": "#E69F00",
    "truncate": "#CC79A7",
    "stack": "#009E73",
    "fedpipe": "#D55E00",
}
SHADES = dict(zip(ABLATIONS, ("#0072B2", "#56B4E9", "#009E73", "#CC79A7", "#E69F00"), strict=True))
STYLE = {
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
    "lines.linewidth": 1.6,
}


def report(results: dict[str, Any], directory: Path, stem: str) -> list[Path]:
    """Write `STEM.md` and a PNG per scenario and group of systems; return the paths."""
    groups: dict[tuple[str, str, str], list[Run]] = {}
    for run in results["runs"]:
        groups.setdefault((run["task"], run["fleet"], run["split"]), []).append(run)
    lines, paths = _head(results), [directory / f"{stem}.md"]
    for (task, fleet, split), runs in sorted(groups.items(), reverse=True):
        by_system = {name: found for name in SYSTEMS if (found := [r for r in runs if r["system"] == name])}
        lines += [f"## {task}, {fleet} fleet, {split} split", "", *table(task, by_system), ""]
        for part, colours in (("systems", COLOURS), ("parts", {"fedpipe": COLOURS["fedpipe"], **SHADES})):
            shown = {name: by_system[name] for name in colours if name in by_system}
            if not shown or (part == "parts" and len(shown) < 2):
                continue
            path = directory / f"{stem}-{task}-{fleet}-{split}-{part}.png"
            draw(task, shown, colours, path)
            paths.append(path)
            lines += [f"![{part}]({path.name})", ""]
        lines += _levers(by_system.get("fedpipe", []))
    paths[0].write_text("\n".join(lines).rstrip() + "\n", encoding="utf-8")
    return paths


def table(task: str, runs: dict[str, list[Run]]) -> list[str]:
    """Return the Markdown table of one scenario: mean ± standard deviation over the seeds."""
    quality: list[tuple[str, Callable[[Run], float], str]] = (
        [("accuracy %", lambda run: 100 * figures.accuracy(run), ".1f")]
        if task == "news"
        else [("perplexity", figures.perplexity, ".2f"), ("BLEU", lambda r: 100 * figures.bleu_of(r), ".1f")]
    )
    columns: list[tuple[str, Callable[[Run], float], str]] = [
        ("test loss", figures.loss, ".4f"),
        *quality,
        ("virtual s", figures.seconds, ".1f"),
        ("MB down", lambda run: run["rounds"][-1]["down"] / MB, ".1f"),
        ("MB up", lambda run: run["rounds"][-1]["up"] / MB, ".1f"),
        ("under-training %", lambda run: 100 * figures.under_training(run), ".1f"),
        ("trainable, thousands", lambda run: fmean(run["trainable"].values()) / 1e3, ".0f"),
        ("peak MiB, sum", lambda run: figures.peak(run) / MIB, ".0f"),
    ]
    lines = ["| system | seeds | " + " | ".join(title for title, _, _ in columns) + " |"]
    lines.append("|---" * (len(columns) + 2) + "|")
    for name, found in runs.items():
        cells = [_spread([value(run) for run in found], form) for _, value, form in columns]
        seeds = str(len(found))
        lines.append(f"| {SYSTEMS[name].title} | {seeds} | " + " | ".join(cells) + " |")
    return lines


def _spread(values: Sequence[float], form: str) -> str:
    text = format(fmean(values), form)
    return f"{text} ± {stdev(values):{form}}" if len(values) > 1 else text


def _head(results: dict[str, Any]) -> list[str]:
    setting, machine = results["setting"], results["machine"]
    said = ", ".join(f"{name} {value}" for name, value in setting.items() if value is not None)
    return [
        "# FedPipe and other systems, on a virtual clock",
        "",
        f"{said}. Seconds are virtual and memory is predicted: both follow from the declared fleet "
        f"(`tests/bench/paper_fleet.py`). Trained on {machine['cpu']}, {machine['cores']} cores. Bases by the sha256 of "
        "their weights: "
        + ", ".join(f"{task} {digest[:16]}…" for task, digest in results["bases"].items())
        + ".",
        "",
    ]


def _levers(runs: list[Run]) -> list[str]:
    """Return what the last global adapter would cost and lose with fewer components or bits."""
    found = [run["final"]["levers"] for run in runs if run["final"].get("levers")]
    if not found:
        return []
    last = [run["rounds"][-1] for run in runs]
    down, up = (fmean(row[way] for row in last) / MB for way in ("down", "up"))
    lines = [
        f"FedPipe moves {down:.1f} MB down and {up:.1f} MB up. Its last global adapter, sent smaller "
        f"(90 % of the energy is in {fmean(row['rank0.9'] for row in last):.1f} components a matrix, 99 % in "
        f"{fmean(row['rank0.99'] for row in last):.1f}):",
        "",
        "| download | kB | test loss |",
        "|---|---|---|",
    ]
    for title in found[0]:
        size = fmean(entry[title]["bytes"] for entry in found) / 1e3
        lines.append(f"| {title} | {size:.0f} | {fmean(entry[title]['loss'] for entry in found):.4f} |")
    return [*lines, ""]


def draw(task: str, runs: dict[str, list[Run]], colours: dict[str, str], path: Path) -> None:
    """Draw loss and quality against rounds, virtual seconds and bytes, and three bars a system."""
    metric = "accuracy" if task == "news" else "perplexity"
    with mpl.rc_context(STYLE):
        figure = Figure(figsize=(12, 9))
        axes = figure.subplots(3, 3)
        against: list[tuple[str, Callable[[Run], float]]] = [
            ("round", lambda row: row["round"]),
            ("virtual seconds", lambda row: row["seconds"]),
            ("MB down and up", lambda row: figures.traffic(row) / MB),
        ]
        for row, name in enumerate(("loss", metric)):
            for column, (title, place) in enumerate(against):
                _curves(axes[row][column], runs, colours, place, name)
                axes[row][column].set(xlabel=title, title=f"test {name}")
                if column == 2:
                    axes[row][column].set_xscale("log")
        _bars(axes[2][0], runs, colours, lambda run: 100 * figures.under_training(run), "under-training, %")
        _bars(
            axes[2][1],
            runs,
            colours,
            lambda run: fmean(run["trainable"].values()) / 1e3,
            "trainable parameters a node, thousands",
            logarithmic=True,
        )
        _peaks(axes[2][2], runs, colours)
        handles = [Line2D([], [], color=colours[name], label=SYSTEMS[name].title) for name in runs]
        figure.legend(handles=handles, loc="outside upper center", ncols=len(handles))
        figure.savefig(path, dpi=110)


def _curves(
    axes: Axes, runs: dict[str, list[Run]], colours: dict[str, str], place: Callable[[Run], float], name: str
) -> None:
    """Draw a line for each system, the mean of its seeds, in a band from the lowest to the highest of them.

    Where there is no transfer at all nothing is drawn. What only the first rounds lose, or full fine-tuning by
    diverging, is above the frame: it would flatten all else.
    """
    early = []
    for system, found in runs.items():
        places = np.mean([[place(row) for row in run["rounds"]] for run in found], axis=0)
        values = np.array([[row[name] for row in run["rounds"]] for run in found])
        early.append(values[:, min(SETTLED, values.shape[1]) - 1].max())
        if places[-1] > 0:
            axes.plot(places, values.mean(axis=0), color=colours[system])
            axes.fill_between(
                places, values.min(axis=0), values.max(axis=0), color=colours[system], alpha=0.15, linewidth=0
            )
    if name != "accuracy":
        bottom = axes.get_ylim()[0]
        axes.set_ylim(bottom, max(early) + 0.05 * (max(early) - bottom))


def _bars(
    axes: Axes,
    runs: dict[str, list[Run]],
    colours: dict[str, str],
    value: Callable[[Run], float],
    title: str,
    *,
    logarithmic: bool = False,
) -> None:
    heights = [fmean(value(run) for run in found) for found in runs.values()]
    bars = axes.bar(range(len(runs)), heights, color=[colours[name] for name in runs], width=0.7)
    axes.bar_label(bars, [f"{height:.0f}" for height in heights], fontsize=8, padding=1)
    axes.set(title=title, xticks=[])
    axes.grid(visible=False, axis="x")
    axes.margins(y=0.15)
    if logarithmic:
        axes.set_yscale("log")
    else:
        axes.set_ylim(0, max(1, axes.get_ylim()[1]))  # also where all are 0


def _peaks(axes: Axes, runs: dict[str, list[Run]], colours: dict[str, str]) -> None:
    """Draw the predicted peak of each kind of node as a group of bars, and its budget as a line over it."""
    present = {kind_of(node).name for found in runs.values() for run in found for node in run["budget"]}
    kinds = [kind for kind in KINDS if kind in present]
    width = 0.8 / len(runs)
    for index, (name, found) in enumerate(runs.items()):
        for place, kind in enumerate(kinds):
            peaks = [
                b / MIB for run in found for node, b in run["peak"].items() if kind_of(node).name == kind
            ]
            if peaks:
                offset = (index - (len(runs) - 1) / 2) * width
                axes.bar(place + offset, fmean(peaks), width=0.9 * width, color=colours[name])
    for place, kind in enumerate(kinds):
        budgets = [b for found in runs.values() for run in found for node, b in run["budget"].items()
                   if kind_of(node).name == kind]  # fmt: skip
        axes.hlines(
            max(budgets) / MIB, place - 0.42, place + 0.42, color="#333333", linewidth=1, linestyle="--"
        )
    axes.set(title="predicted peak, MiB (dashed: budget)", xticks=range(len(kinds)), xticklabels=kinds)
    axes.grid(visible=False, axis="x")
