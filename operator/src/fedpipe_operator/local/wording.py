# SPDX-License-Identifier: Apache-2.0
"""How the screen and the report call a node's plan and the metric of a round."""

from fedpipe_api.job import Task
from fedpipe_api.status import NodeStatus

from ..engine.decide import awaited_evaluations, metric_value
from ..engine.evaluations import evaluation_of
from ..engine.state import JobState
from ..engine.status import metric_name


def facts(node: NodeStatus) -> tuple[str, str, str]:
    """Return precision, ranks and batch of a node as people read them; empty without a plan."""
    if node.precision is None:
        return "", "", ""
    ranks = "–" if node.min_rank is None else f"r {node.min_rank}"
    if node.max_rank != node.min_rank:
        ranks += f"–{node.max_rank}"
    batch = f"{node.micro_batch}" + (f"×{node.accumulation}" if node.accumulation != 1 else "")
    return str(node.precision), ranks, batch


def shown_metric(state: JobState) -> str:
    """Return the metric to show: the job's, of a language model perplexity in place of loss."""
    name = metric_name(state)
    return "perplexity" if name == "loss" and state.spec.model.task is Task.CAUSAL_LM else name


def metric_text(state: JobState, number: int) -> str:
    """Return the metric of a round with its change, such as `accuracy 0.742 (+0.051)`; empty if unknown."""
    name = shown_metric(state)
    value = metric_value(state, number, name)
    if value is None:
        return ""
    before = metric_value(state, number - 1, name)
    change = "" if before is None else f" ({figure(name, value - before, '+')})"
    return f"{called(name)} {figure(name, value)}{change}"


def loss_text(state: JobState, number: int) -> str:
    """Return a round's evaluation loss, empty where it is the metric already or unknown."""
    found = evaluation_of(state, number)
    return "" if found is None or shown_metric(state) == "loss" else f"evaluation loss {found.loss:.3f}"


def called(metric: str) -> str:
    """Return the name of a metric; a loss is that of the evaluation."""
    return "evaluation loss" if metric == "loss" else metric


def figure(metric: str, value: float, sign: str = "") -> str:
    """Return a metric's value; a perplexity may be of any size, so it has four digits."""
    return f"{value:{sign}.4g}" if metric == "perplexity" else f"{value:{sign}.3f}"


def known_round(state: JobState) -> int:
    """Return the latest round that no further evaluation is awaited of; -1 for none."""
    if state.finished or not awaited_evaluations(state, state.done):
        return state.done if evaluation_of(state, state.done) else state.done - 1
    return state.done - 1
