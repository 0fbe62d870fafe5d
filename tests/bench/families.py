# SPDX-License-Identifier: Apache-2.0
"""Every family of models in small: plan, two nodes, two rounds, and the adapter in plain peft.

`python tests/bench/families.py [FAMILY …]` writes `results/families.json` and `results/families.md`; the rows of the
families named are replaced. Each case runs in a process of its own, forked from one that has imported torch.
"""

import argparse
import json
import multiprocessing
import os
import shutil
import sys
import tempfile
import time
import traceback
from importlib.metadata import version
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent.parent))
os.environ |= {"HF_HUB_OFFLINE": "1", "TRANSFORMERS_VERBOSITY": "error", "CUDA_VISIBLE_DEVICES": ""}

from bench.bench_machine import commit, machine
from bench.families_models import LABELS, cases, save, write_data
from fedpipe_api import wire
from fedpipe_api.base import UserError
from fedpipe_api.job import FedPipeJobSpec, Precision, Task
from fedpipe_api.lora.methods import Start
from fedpipe_api.node import Capacity

RESULTS = Path(__file__).parent / "results"
COMMAND = "python tests/bench/families.py"
LIBRARIES = ("torch", "transformers", "peft", "bitsandbytes")
PRECISIONS = (Precision.FP32, Precision.NF4)
SECONDS = 120.0
NODES = ("one", "two")
CLOSE = 2e-4
"""Largest difference of logits, as a share of the largest logit."""


class Script:
    """The coordinator of one node, in memory: hands out an assignment at a time and keeps what is sent."""

    def __init__(self, directory: Path):
        self.directory = directory
        self.registration: Any = None
        self.update_file: Path | None = None
        self.manifest: Any = None
        self.scores: dict[str, float] = {}
        self.blobs: dict[str, Path] = {}

    def register(self, registration: wire.Registration) -> None:
        self.registration = wire.Registration.model_validate_json(json.dumps(registration.to_dict()))

    def blob(self, blob: wire.Blob) -> Path:
        return self.blobs[blob.digest]

    def progress(self, _: wire.Progress) -> None:
        return None

    def profile(self, report: wire.ProfileReport) -> None:
        self.scores = report.scores

    def evaluation(self, report: wire.Evaluation) -> None:
        assert report.samples

    def update(self, number: int, path: Path, manifest: wire.UpdateManifest) -> bool:
        self.update_file, self.manifest = self.directory / f"update-{number}.safetensors", manifest
        shutil.copy(path, self.update_file)
        return True


def spec_of(model: Path, task: Task, precision: Precision) -> FedPipeJobSpec:
    """Return a job of two rounds of two steps."""
    labels = list(LABELS) if task is Task.SEQUENCE_CLASSIFICATION else []
    return FedPipeJobSpec.model_validate(
        {
            "model": {"hostPath": {"path": str(model)}, "task": task, "labels": labels},
            "data": {"volume": {"hostPath": {"path": "/data"}}, "train": "train.jsonl", "maxLength": 16},
            "rounds": {"count": 2, "localSteps": 2, "batchSize": 4},
            "adapter": {"ranks": {"min": 2, "max": 4}, "selection": {"warmupSteps": 2}},
            "optimizer": {"learningRate": 1e-2},
            "quantization": "none" if precision is Precision.FP32 else precision,
            "nodes": {"min": 2},
        }
    )


def run_case(family: str, task: Task, precision: Precision, work: Path) -> str:
    """Run one case; return how far the logits are apart, or raise."""
    from fedpipe_agent.train.agent import Agent
    from fedpipe_agent.train.device import Device
    from fedpipe_agent.train.model import Source
    from fedpipe_agent.train.site import Site
    from fedpipe_operator.aggregate import AggregationRequest, NodeUpdate, aggregate_round
    from fedpipe_operator.export import write_adapter
    from fedpipe_operator.planner import NodeFacts, PlanRequest, plan

    base = work / "base"
    save(family, task, base)
    spec = spec_of(base, task, precision)
    kernels = tuple(wire.KernelResult(precision=p, usable=True) for p in PRECISIONS)
    agents: dict[str, Any] = {}
    for index, node in enumerate(NODES):
        write_data(task, work / node, index)
        job = wire.AgentConfig(
            job="families", node=node, model=spec.model, data=spec.data, optimizer=spec.optimizer,
            adapter=spec.adapter, seed=0,
        )  # fmt: skip
        device = Device(Capacity(threads=1))
        agent = Agent(job, Source(str(base)), Script(work / node), device, work / node)  # type: ignore[arg-type]
        agent.prepare(work / node, Site(job, str(base), work / "token"))
        agents[node] = agent
    shape = agents["one"]._shape
    facts = Device(Capacity(threads=1)).facts(kernels)
    nodes = tuple(NodeFacts(name, facts, 10, 2) for name in NODES)
    made = plan(PlanRequest(model=shape, spec=spec, nodes=nodes))
    if made.left_out:
        raise UserError(next(iter(made.left_out.values())))
    adapter: Path | None = None
    for number in (0, 1, 2):
        updates = []
        for node, agent in agents.items():
            script, planned = agent._transport, made.nodes[node]
            if number == 0:
                agent._do(
                    wire.Assignment(
                        kind=wire.AssignmentKind.PROFILE, plan=planned, profile_steps=1, importance=True
                    )
                )
                assert script.scores
                continue
            blob = None
            if adapter:
                blob = wire.Blob(digest=f"{number:064x}", size=adapter.stat().st_size)
                script.blobs[blob.digest] = adapter
            agent._do(
                wire.Assignment(
                    kind=wire.AssignmentKind.TRAIN,
                    round=number,
                    plan=planned,
                    adapter=blob,
                    evaluate=True,
                    learning_rate=1e-2,
                )
            )
            updates.append(NodeUpdate(node, script.update_file, script.manifest.samples, planned.ranks))
        if updates:
            done = aggregate_round(
                AggregationRequest(
                    spec.aggregation, spec.adapter.alpha, spec.adapter.rs_lora, tuple(updates), work, adapter
                )
            )
            adapter = work / f"global-{number}.safetensors"
            done.adapter.path.rename(adapter)
    assert adapter is not None
    write_adapter(adapter, spec, shape, work / "out")
    return _compare(agents["one"], adapter, spec, work)


def _compare(agent: Any, adapter: Path, spec: FedPipeJobSpec, work: Path) -> str:
    import torch
    from peft import PeftModel

    from fedpipe_agent.train.adapters import GlobalAdapter
    from fedpipe_agent.train.heads import set_head

    with GlobalAdapter(adapter, agent._shape) as opened:
        agent._adapters.install(opened, {}, Start.SPLIT, 3)
        set_head(agent._model, opened.head())
    batch = agent._samples.batch(list(range(4)), torch.device("cpu"))
    inputs = dict(batch.inputs)
    plain = PeftModel.from_pretrained(_plain(agent, spec), work / "out").eval()
    with torch.no_grad():
        mine = agent._model.eval()(**inputs).logits.float()
        theirs = plain(**inputs).logits.float()
        with plain.disable_adapter():
            bare = plain(**inputs).logits.float()
    if batch.keep is not None:
        mask = inputs["attention_mask"].bool()
        mine, theirs, bare = mine[mask], theirs[mask], bare[mask]
    apart = float((mine - theirs).abs().max() / theirs.abs().max())
    changed = float((mine - bare).abs().max() / theirs.abs().max())
    assert apart < CLOSE, f"logits differ by {apart:.2g}"
    assert changed > 10 * apart, f"the adapter changes nothing: {changed:.2g}"
    return f"{apart:.1g}"


def _plain(agent: Any, spec: FedPipeJobSpec) -> Any:
    """Return the base as a user of transformers loads it, quantized as the agent has it."""
    import torch
    from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, BitsAndBytesConfig

    options: dict[str, Any] = {"dtype": torch.float32}
    if agent._precision is Precision.NF4:
        options["quantization_config"] = BitsAndBytesConfig(
            load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True,
            bnb_4bit_compute_dtype=torch.float32,
            llm_int8_skip_modules=agent._model.config.quantization_config.llm_int8_skip_modules,
        )  # fmt: skip
        options["device_map"] = {"": "cpu"}
    kind: Any = AutoModelForCausalLM
    if spec.model.labels:
        kind = AutoModelForSequenceClassification
        options["id2label"] = dict(enumerate(spec.model.labels))
        options["ignore_mismatched_sizes"] = True
    model = kind.from_pretrained(spec.model.host_path.path, **options)
    model.config.pad_token_id = agent._config.pad_token_id
    return model


def _child(family: str, task: Task, precision: Precision, sender: Any) -> None:
    import torch

    log = os.open("/dev/null", os.O_WRONLY)
    os.dup2(log, 1)
    os.dup2(log, 2)
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory(prefix="families-") as work:
        try:
            sender.send(("green", run_case(family, task, precision, Path(work))))
        except UserError as error:
            sender.send(("refused", str(error).replace(work, "DIR")))
        except BaseException as error:
            frames = traceback.extract_tb(error.__traceback__)
            place = " < ".join(f"{Path(f.filename).name}:{f.lineno}" for f in frames[-4:][::-1])
            sender.send(
                ("failed", f"{type(error).__name__}: {(str(error).splitlines() or [''])[0][:200]} [{place}]")
            )


def measure(family: str, task: Task, precision: Precision) -> dict[str, Any]:
    """Run one case in a process of its own."""
    begin = time.monotonic()
    context = multiprocessing.get_context("fork")
    receiver, sender = context.Pipe(duplex=False)
    child = context.Process(target=_child, args=(family, task, precision, sender))
    child.start()
    sender.close()
    try:
        found = receiver.recv() if receiver.poll(SECONDS) else ("failed", f"no answer within {SECONDS:g} s")
    except EOFError:
        found = ("failed", "the process died")
    if found[1].startswith("no answer"):
        child.kill()
    child.join()
    return {
        "family": family, "task": str(task), "precision": str(precision), "outcome": found[0], "detail": found[1],
        "seconds": round(time.monotonic() - begin, 1), "commit": commit(),
    }  # fmt: skip


def table(result: dict[str, Any]) -> str:
    """Return the outcomes as a Markdown table, below what they were measured on."""
    found: dict[tuple[str, str], dict[str, str]] = {}
    for row in result["rows"]:
        text = "✓" if row["outcome"] == "green" else f"{row['outcome']}: {row['detail']}"
        found.setdefault((row["family"], row["task"]), {})[row["precision"]] = text.replace("|", "\\|")
    versions = ", ".join(f"{name} {number}" for name, number in result["versions"].items())
    commits = ", ".join(sorted({row["commit"] for row in result["rows"]}))
    lines = [
        f"`{COMMAND}` at {commits}; {versions}; {result['machine']['cores']} cores of {result['machine']['cpu']}.",
        "",
        "| family | task | " + " | ".join(PRECISIONS) + " |",
        "|---|---|" + "---|" * len(PRECISIONS),
    ]
    for (family, task), outcomes in sorted(found.items()):
        cells = " | ".join(outcomes.get(precision, "–") for precision in PRECISIONS)
        lines.append(f"| {family} | {task} | {cells} |")
    return "\n".join(lines) + "\n"


def main() -> None:
    """Run the cases named, or all, and write the table."""
    parser = argparse.ArgumentParser()
    parser.add_argument("families", nargs="*")
    options = parser.parse_args()
    import torch

    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory(prefix="families-") as work:  # imports what every case needs, once
        run_case("llama", Task.SEQUENCE_CLASSIFICATION, Precision.NF4, Path(work))
    path = RESULTS / "families.json"
    before = json.loads(path.read_text(encoding="utf-8"))["rows"] if path.exists() else []
    known = {(row["family"], row["task"], row["precision"]): row for row in before}
    rows = []
    for family, task in cases():
        for precision in PRECISIONS:
            row = known.get((family, task, precision))
            if not options.families or family in options.families:
                row = measure(family, task, precision)
                print(*row.values(), flush=True)
            rows += [row] if row else []
    found = {"machine": machine(), "versions": {name: version(name) for name in LIBRARIES}, "rows": rows}
    path.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    RESULTS.joinpath("families.md").write_text(table(found), encoding="utf-8")


if __name__ == "__main__":
    main()
