# SPDX-License-Identifier: Apache-2.0
"""What a finished run leaves: adapter, metrics and report, and the summary on the screen."""

import json
import sys
import tempfile
from pathlib import Path
from typing import Literal

from rich.console import Console
from rich.table import Table
from rich.text import Text

from fedpipe_api.base import UserError
from fedpipe_api.job import FedPipeJobSpec, Phase
from fedpipe_api.object_url import ObjectURL
from fedpipe_api.status import NodeStatus

from ..engine.state import JobState
from ..engine.status import status
from ..export import write_adapter, write_gguf
from ..export.upload import open_store, own_credentials, upload
from ..tracking.rows import RoundRow, rounds, times
from ..tracking.trackers import Trackers
from . import measures, samples
from .agents import ask_agent
from .directory import History, RunDirectory, write_text
from .interrupt import clean_interrupt
from .json_lines import print_end
from .live import stage
from .report import write_report
from .tokenizer import tokenizer_files
from .wording import facts


def write_all_results(directory: RunDirectory, trackers: Trackers, *, as_json: bool = False) -> int:
    """Write and send what a finished run lacks of its results, print the summary, return the exit status."""
    history = read(directory)
    state = history.state
    if state.adapter is not None and not directory.adapter.exists():
        export(directory, state, directory.adapter)
    if not directory.report.exists():
        write_results(directory, history)
    if not as_json:
        print_summary(directory, history)
    lines = deliver(directory.adapter, state) if directory.adapter.exists() else []
    lines += track(trackers, history)
    if as_json:
        print_end(directory, history)
    else:
        console = Console(highlight=False)
        for line in lines:
            console.print(Text(line), soft_wrap=True)
    return 0 if state.finished and state.finished.phase is Phase.SUCCEEDED else 1


def deliver(adapter: Path, state: JobState) -> list[str]:
    """Write the adapter to spec.output.url with the user's own credentials; a volume is a cluster's alone.

    Return lines for people: where it is stored, and where it is not.
    """
    output, lines = state.spec.output, []
    if output is not None and output.url is not None:
        place = ObjectURL.parse(output.url) / state.name
        upload({path.name: path.read_bytes() for path in adapter.iterdir()}, place, *own_credentials(place))
        lines.append(f"stored   {place}")
    if output is not None and output.volume is not None:
        lines.append("spec.output.volume is of a cluster; it is not written here")
    return lines


def track(trackers: Trackers, history: History) -> list[str]:
    """Send the rounds that trackers lack; return a line for each that has all, and say which have not."""
    state = history.state
    trackers.send(rounds(history.state), times(state))
    trackers.end(state.finished.phase if state.finished else None)
    for place, why in trackers.failed.items():
        sys.stderr.write(f"spec.tracking: {place} lacks rounds: {why}; the same command sends them\n")
    return [f"tracked  {place}" for place in trackers.places]


def check_output(spec: FedPipeJobSpec) -> None:
    """UserError, before any training, where the environment lacks the credentials for spec.output.url."""
    if spec.output is not None and spec.output.url is not None:
        url = ObjectURL.parse(spec.output.url)
        try:
            open_store(url, *own_credentials(url))
        except UserError as error:
            raise UserError(f"spec.output.url: in the environment, {error}") from None


def read(directory: RunDirectory) -> History:
    """Return the run's history; UserError when there is none."""
    directory.read_record()
    history = directory.history()
    if history is None:
        raise UserError(f"{directory.root}: the run stopped before it began; there is nothing to show")
    return history


def export(directory: RunDirectory, state: JobState, target: Path) -> None:
    """Write the latest global adapter as a PEFT directory."""
    source = directory.global_adapter(state)
    assert state.model is not None
    beside = tokenizer_files(directory.read_record().model)
    write_adapter(source, state.spec, state.model, target, _card_facts(state), beside=beside)


def write_results(directory: RunDirectory, history: History) -> None:
    """Write `metrics.jsonl`, the plots and `report.html` from the ledger."""
    rows = rounds(history.state)
    write_text(directory.metrics, measures.to_jsonl(rows))
    write_report(directory, history, rows)


def report_run(root: Path, prompts: Path | None) -> None:
    """Write a run's metrics, plots and report again, finished or not, and print its summary.

    With a file of prompts the model answers them, without its adapter and with it: in the report, and here in
    place of the summary.
    """
    directory = RunDirectory(root)
    history = read(directory)
    answered = _answer(directory, history.state, prompts) if prompts is not None else ()
    write_results(directory, history)
    if prompts is None:
        print_summary(directory, history)
        return
    console = Console(highlight=False)
    for sample in answered:
        lines = (sample.prompt, f"  before: {sample.before}", f"  after:  {sample.after}", "")
        for line in lines:
            console.print(Text(line), soft_wrap=True)
    console.print(Text(f"report   {directory.report}"), soft_wrap=True)


def _answer(directory: RunDirectory, state: JobState, prompts: Path) -> tuple[samples.Sample, ...]:
    samples.check_task(state)
    asked = samples.read_prompts(prompts)
    console = Console(highlight=False, stderr=True)
    with clean_interrupt(), tempfile.TemporaryDirectory() as temporary, stage(console, "answering prompts"):
        adapter = Path(temporary) / "adapter"
        export(directory, state, adapter)
        try:
            return samples.generate(directory, state, adapter, asked).samples
        except UserError as error:
            message = str(error)
            raise UserError(
                f"--prompts: {prompts}: {message}" if message.startswith("prompt ") else message
            ) from None


def export_run(root: Path, out: Path, form: Literal["peft", "model", "gguf"]) -> None:
    """Write a run's latest adapter: as a PEFT directory, merged into its base model, or as a GGUF file."""
    directory = RunDirectory(root)
    state = read(directory).state
    if out.exists() and (form == "gguf" or not out.is_dir() or any(out.iterdir())):
        raise UserError(f"--out: {out} exists and is not empty; choose another")
    source = directory.global_adapter(state)
    if form == "peft":
        export(directory, state, out)
        return
    if form == "gguf":
        assert state.model is not None
        out.parent.mkdir(parents=True, exist_ok=True)
        write_gguf(source, state.spec.model.task, state.model, out)
        return
    with clean_interrupt(), tempfile.TemporaryDirectory() as temporary:
        adapter = Path(temporary) / "adapter"
        export(directory, state, adapter)
        model = directory.read_record().model
        ask_agent(
            *("merge", "--model", model, "--adapter", str(adapter)),
            *("--task", state.spec.model.task, "--out", str(out)),
            model=model,
            given=json.dumps(state.spec.model.labels),
        )


def _card_facts(state: JobState) -> str:
    found = status(state, None, {})
    text = f"Job `{state.name}`: {state.done} rounds over {len(state.planned) or len(state.agents)} nodes"
    if found.metric is not None:
        text += f", {found.metric.name} {found.metric.value:.4g} on the nodes' held-out data"
    precisions = sorted({str(node.precision) for node in state.plan.nodes.values()}) if state.plan else []
    text += f". Trained and evaluated on a base held in {', '.join(precisions)}, node by node."
    privacy = state.spec.privacy
    if privacy is not None:
        text += (
            f" Differentially private for each row of each node (DP-SGD): ε = {found.epsilon:.4g} "
            f"at δ = {privacy.delta:g}."
        )
    return text


def print_summary(directory: RunDirectory, history: History) -> None:
    """Print the nodes' table, the result, and where adapter and report are stored."""
    console = Console(highlight=False)
    rows, state = rounds(history.state), history.state
    if state.plan is not None:
        console.print(_node_table(state, rows))
    if state.finished and state.finished.phase is Phase.FAILED:
        console.print(Text(f"failed: {state.finished.message}", "red"), soft_wrap=True)
    elif state.finished and state.finished.reason != "RoundsCompleted":
        console.print(Text(state.finished.message), soft_wrap=True)
    console.print(Text(measures.outcome(history, rows), "bold"), soft_wrap=True)
    lines = []
    if directory.report.exists():
        lines.append(f"report   {directory.report}")
    if directory.adapter.exists():
        lines.append(f"adapter  {directory.adapter}")
        lines.append(f'in peft  PeftModel.from_pretrained(base, "{directory.adapter}")')
    for line in lines:
        console.print(Text(line), soft_wrap=True)


def _node_table(state: JobState, rows: list[RoundRow]) -> Table:
    table = Table(box=None, padding=(0, 2, 0, 0), header_style="dim", pad_edge=False)
    # Losses stay on the nodes of a private job.
    last = "ε spent" if state.spec.privacy else "train loss"
    for name in ("node", "base", "ranks", "batch", "matrices", "memory", "planned", last, "rounds"):
        table.add_column(
            name, justify="left" if name in ("node", "base", "ranks", "batch") else "right", no_wrap=True
        )
    for node in status(state, None, {}).node_table:
        precision, ranks, batch = facts(node)
        counted = sum(row.get("nodes", {}).get(node.name, {}).get("counted", False) for row in rows)
        table.add_row(
            node.name, precision or node.state, ranks, batch,
            "" if node.matrices is None else str(node.matrices),
            measures.memory(node.measured_bytes), measures.memory(node.predicted_bytes),
            _last(node),
            f"{counted}/{state.done}",
        )  # fmt: skip
    return table


def _last(node: NodeStatus) -> str:
    """Return what a private job's node has spent, of another its train loss; empty where it is not known."""
    if node.epsilon is not None:
        return f"{node.epsilon:.3g}"
    return "" if node.train_loss is None else f"{node.train_loss:.3f}"
