# SPDX-License-Identifier: Apache-2.0
"""`report.html`: one file that needs nothing else, for eyes, screen readers and dark rooms."""

import base64
from html import escape
from typing import TYPE_CHECKING

import yaml

from fedpipe_api import units
from fedpipe_api.job import Task
from fedpipe_api.status import NodeStatus

from ..engine.state import JobState
from ..engine.status import status
from ..tracking.rows import RoundRow
from . import measures, samples
from .directory import History, RunDirectory, write_text
from .wording import facts, figure, shown_metric

if TYPE_CHECKING:
    from .plots import Plot

_CSS = """
:root { color-scheme: light dark; --ink: #1c1e21; --paper: #fff; --soft: #60656c; --line: #d9dce0; }
@media (prefers-color-scheme: dark) {
  :root { --ink: #e4e6e9; --paper: #17191c; --soft: #a0a6ad; --line: #3a3e44; } }
body { margin: 0 auto; max-width: 62rem; padding: 1.5rem; background: var(--paper); color: var(--ink);
  font: 16px/1.5 system-ui, sans-serif; }
h1 { font-size: 1.6rem; margin: 0; } h2 { font-size: 1.15rem; margin: 2.2rem 0 .6rem; }
p.sum { font-size: 1.1rem; margin: .2rem 0 0; } p.soft, figcaption { color: var(--soft); }
.wide { overflow-x: auto; }
table { border-collapse: collapse; width: 100%; font-variant-numeric: tabular-nums; }
figcaption { font-size: .875rem; padding: .2rem 0; text-align: left; }
th, td { border-bottom: 1px solid var(--line); padding: .25rem 0 .25rem .6rem; text-align: right;
  white-space: nowrap; }
thead th { vertical-align: bottom; white-space: normal; }
th:first-child { background: var(--paper); left: 0; padding-left: 0; position: sticky; text-align: left; }
thead th { color: var(--soft); font-weight: 500; }
figure { margin: 0; } img { background: #fff; border-radius: 6px; box-sizing: border-box;
  height: auto; min-width: 38rem; padding: .5rem; width: 100%; }
@media (max-width: 40rem) { body { padding: 1rem; } }
table.samples td { text-align: left; vertical-align: top; white-space: normal; }
table.samples th { min-width: 9rem; vertical-align: top; white-space: normal; text-align: left; }
table.matrix { width: auto; } table.matrix td { min-width: 1.6rem; padding: .2rem .4rem; }
table.matrix thead span { writing-mode: vertical-rl; transform: rotate(180deg); }
td.hit { background: rgb(0 114 178 / calc(var(--share) * 55%)); }
td.miss { background: rgb(213 94 0 / calc(var(--share) * 55%)); }
details { margin-top: 2rem; } pre { overflow-x: auto; }
"""


def write_report(directory: RunDirectory, history: History, rows: list[RoundRow]) -> None:
    """Draw the plots and write the report from `tracking.rows.rounds`."""
    state = history.state
    plots: list[Plot] = []
    if state.done:
        from .plots import draw

        scores, chosen = (state.plan.scores, set(state.plan.selected)) if state.plan else ({}, set())
        plots = draw(rows, shown_metric(state), scores, chosen, directory.plots)
    write_text(directory.report, _page(history, rows, plots, samples.read(directory, state)))


def _page(
    history: History, rows: list[RoundRow], plots: "list[Plot]", answers: tuple[samples.Sample, ...]
) -> str:
    state = history.state
    found = status(state, None, {})
    result = escape(measures.outcome(history, rows))
    why = state.finished.message if state.finished else f"at round {state.done} of {state.spec.rounds.count}"
    begun = f"{found.start_time:%Y-%m-%d %H:%M} UTC" if found.start_time else ""
    return "\n".join(
        [
            "<!doctype html>",
            f'<html lang="en"><head><meta charset="utf-8"><title>{escape(state.name)} · FedPipe</title>',
            '<meta name="viewport" content="width=device-width, initial-scale=1">',
            f"<style>{_CSS}</style></head><body><main>",
            f"<h1>{escape(state.name)}</h1>",
            f'<p class="sum">{result}</p>',
            f'<p class="soft">{found.phase}: {escape(why)} · begun {begun} · {escape(_what(state))}</p>',
            *(_figure(plot) for plot in plots[:1]),
            _confusion(state),
            _samples(state, answers),
            "<h2>Nodes</h2>",
            _node_table(found.node_table, rows, state.spec.model.task),
            *(_figure(plot) for plot in plots[1:]),
            "<h2>Rounds</h2>",
            _round_table(rows, state.spec.model.task),
            f"<details><summary>The job as it ran</summary><pre>{escape(_spec_text(state))}</pre></details>",
            "</main></body></html>",
            "",
        ]
    )


def _what(state: JobState) -> str:
    spec, model = state.spec, state.model
    size = f", {model.parameters / 1e6:.1f} million parameters" if model else ""
    architecture = f"{model.architecture}{size}" if model else ""
    return f"{spec.model.task} on {architecture}; {spec.aggregation.method} aggregation, seed {spec.seed}"


def _figure(plot: "Plot") -> str:
    image = base64.b64encode(plot.path.read_bytes()).decode()
    words = escape(plot.words[0].upper() + plot.words[1:])
    return (
        f"<h2>{escape(plot.title)}</h2>"
        f'<figure><div class="wide"><img alt="{words}" src="data:image/png;base64,{image}"></div>'
        f"<figcaption>{words}.</figcaption></figure>"
    )


def _table(caption: str, header: list[str], body: list[list[str]], kind: str = "") -> str:
    """Return a table whose first column names the row."""
    head = "".join(f'<th scope="col">{escape(cell)}</th>' for cell in header)
    lines = []
    for name, *cells in body:
        rest = "".join(f"<td>{escape(cell)}</td>" for cell in cells)
        lines.append(f'<tr><th scope="row">{escape(name)}</th>{rest}</tr>')
    return _captioned(caption, f"<thead><tr>{head}</tr></thead><tbody>{''.join(lines)}</tbody>", kind)


def _captioned(caption: str, content: str, kind: str = "") -> str:
    """Return a table that scrolls by itself where the screen is narrow; its caption does not."""
    words = escape(caption)
    return (
        f'<figure><figcaption>{words}.</figcaption><div class="wide" tabindex="0" role="region" '
        f'aria-label="{words}"><table{kind}>{content}</table></div></figure>'
    )


def _samples(state: JobState, answers: tuple[samples.Sample, ...]) -> str:
    """Return the answers to the user's prompts, side by side; nothing where none were asked."""
    if not answers:
        return ""
    body = [[answer.prompt, answer.before, answer.after] for answer in answers]
    caption = f"The most likely answers to {len(answers)} given prompts, after round {state.done}"
    header = ["prompt", "base model", "with the adapter"]
    return "<h2>Sample answers</h2>" + _table(caption, header, body, ' class="samples"')


def _confusion(state: JobState) -> str:
    """Return the confusion matrix of the latest round that has one, added over the nodes; else nothing."""
    if not state.confusion:
        return ""
    labels = state.spec.model.labels
    cells = [sum(counts) for counts in zip(*state.confusion.values(), strict=True)]
    rows = [cells[i : i + len(labels)] for i in range(0, len(cells), len(labels))]
    head = "".join(f'<th scope="col"><span>{escape(label)}</span></th>' for label in labels)
    lines = []
    for place, (label, row) in enumerate(zip(labels, rows, strict=True)):
        total = sum(row)
        shown = "".join(_cell(count, total, column == place) for column, count in enumerate(row))
        right = f"{row[place] / total:.0%}" if total else "–"
        lines.append(f'<tr><th scope="row">{escape(label)}</th>{shown}<td>{right}</td></tr>')
    when = f"round {state.confusion_round}" if state.confusion_round else "the untrained start"
    caption = (
        f"Held-out samples by their class (rows) and the class predicted (columns) after {when}, "
        f"{len(state.confusion)} nodes together; the darker, the larger the share of its row"
    )
    header = f'<tr><th scope="col">class</th>{head}<th scope="col">right</th></tr>'
    table = f"<thead>{header}</thead><tbody>{''.join(lines)}</tbody>"
    return "<h2>Confusion matrix</h2>" + _captioned(caption, table, ' class="matrix"')


def _cell(count: int, total: int, right: bool) -> str:
    """Return a cell of the matrix, shaded by its share of the row."""
    if not count:
        return "<td></td>"
    kind = "hit" if right else "miss"
    return f'<td class="{kind}" style="--share: {count / total:.2f}">{count}</td>'


def _metric(task: Task) -> str:
    return "perplexity" if task is Task.CAUSAL_LM else "accuracy"


def _node_table(nodes: tuple[NodeStatus, ...], rows: list[RoundRow], task: Task) -> str:
    name, private = _metric(task), any(node.epsilon is not None for node in nodes)
    body = []
    for node in nodes:
        parts = [row["nodes"][node.name] for row in rows if node.name in row.get("nodes", {})]
        counted = [part for part in parts if part["counted"]]
        body.append(
            [
                node.name, *facts(node), _number(node.matrices, "d"), node.limited_by or node.message or "",
                measures.memory(node.predicted_bytes), measures.memory(node.measured_bytes),
                _number(node.predicted_seconds, ".3f"), _number(node.measured_seconds, ".3f"),
                f"{len(counted)}/{len(parts)}", _number(node.train_loss, ".3f"),
                _figure_of(name, parts[-1].get(name) if parts else None),
                *([_number(node.epsilon, ".3g")] if private else []),
            ]
        )  # fmt: skip
    header = [
        "node", "precision", "ranks", "batch", "matrices", "limited by", "memory planned", "peak memory",
        "s/step planned", "s/step", "updates", "train loss", name,
        *(["ε spent"] if private else []),
    ]  # fmt: skip
    return _table("As planned last, and as measured in the last round it took part in", header, body)


def _round_table(rows: list[RoundRow], task: Task) -> str:
    name = _metric(task)
    body = []
    for row in rows:
        trained = row["round"] > 0
        body.append(
            [
                str(row["round"]) if trained else "untrained",
                _number(row["loss"], ".4f"), _figure_of(name, row[name]),
                f"{row['updates']}/{row['participants']}" if trained else "",
                units.transfer(row["bytesUp"]) if trained else "",
                units.transfer(row["bytesDown"]) if trained else "",
                _number(row.get("seconds"), ".2f"), _number(row.get("overheadSeconds"), ".2f"),
                _number(row.get("underTraining"), ".1%"), _number(row.get("relativeError"), ".2e"),
                _number(row.get("effectiveRank"), ".1f"),
            ]
        )  # fmt: skip
    header = [
        "round", "evaluation loss", name, "updates", "up", "down", "seconds", "not training",
        "under-training", "error", "effective rank",
    ]  # fmt: skip
    caption = f"Evaluation loss and {name} are of the global adapter on all nodes' held-out data"
    return _table(caption, header, body)


def _figure_of(metric: str, value: float | None) -> str:
    return "" if value is None else figure(metric, value)


def _number(value: float | None, form: str) -> str:
    return "" if value is None else f"{value:{form}}"


def _spec_text(state: JobState) -> str:
    return yaml.safe_dump(state.spec.to_dict(), sort_keys=False, allow_unicode=True)
