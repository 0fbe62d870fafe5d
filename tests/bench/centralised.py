# SPDX-License-Identifier: Apache-2.0
"""Centralised LoRA on the pooled data of a run: what federation is compared with.

`python tests/bench/centralised.py JOB.yaml FLEET.yaml RUN_DIR [--rank 16]` trains plain transformers + peft on the union of the nodes'
training shares, with the run's model, learning rate, length and number of steps, and evaluates on the union of their
held-out shares, as the run itself does: once with a batch for each step that is as large as those of all nodes
together (the same samples are seen), once with one node's. Writes results/centralised.json.
"""

import argparse
import json
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from bench_machine import machine
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

from fedpipe_agent.train import data as agent_data
from fedpipe_agent.train.loop import losses
from fedpipe_agent.train.model import Source, read_config, read_tokenizer
from fedpipe_agent.train.shape import longest_input, read_shape
from fedpipe_api.job import Task
from fedpipe_operator.local.manifest import LocalJob, read

RESULTS = Path(__file__).parent / "results"


def pooled(local: LocalJob, tokenizer: Any, longest: int | None) -> tuple[Any, Any]:
    """Return the union of the nodes' training samples, and of their held-out samples."""
    spec = local.job.spec
    shares = [
        agent_data.load(member.data, spec.data, spec.model, tokenizer, seed=spec.seed, longest=longest)
        for member in local.members
    ]

    def joined(parts: list[Any]) -> Any:
        samples = [part.sample(i) for part in parts for i in range(len(part))]
        return agent_data.Samples(samples, spec.model.task, tokenizer.pad_token_id)

    return joined([each.train for each in shares]), joined([each.held_out for each in shares])


def centralised(local: LocalJob, steps: int, rank: int, batch_size: int) -> dict[str, float]:
    """Train and return the final loss and accuracy on the held-out union, and the seconds taken."""
    spec, source = local.job.spec, Source(local.model)
    tokenizer = read_tokenizer(source)
    config = read_config(source, spec.model, tokenizer.pad_token_id)
    train, held_out = pooled(local, tokenizer, longest_input(config))
    shape = read_shape(config, spec.model.task, spec.adapter.modules, source)
    torch.manual_seed(spec.seed)
    classify = spec.model.task is Task.SEQUENCE_CLASSIFICATION
    kind = AutoModelForSequenceClassification if classify else AutoModelForCausalLM
    base = kind.from_pretrained(source.name, config=config)
    lora = LoraConfig(
        r=rank,
        lora_alpha=spec.adapter.alpha,
        target_modules=[matrix.name for matrix in shape.matrices],
        modules_to_save=list(shape.head_modules) or None,
    )
    model = get_peft_model(base, lora)
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=spec.optimizer.learning_rate, weight_decay=0.0)
    random, device, begin = np.random.default_rng(spec.seed), torch.device("cpu"), time.perf_counter()
    linear = spec.optimizer.schedule == "linear"
    for step in range(steps):
        for group in optimizer.param_groups:
            group["lr"] = spec.optimizer.learning_rate * (1 - step / steps if linear else 1)
        chosen = random.choice(len(train), batch_size, replace=False)
        loss, _ = losses(model, train.batch(chosen, device))
        (loss / train.targets(chosen)).backward()
        torch.nn.utils.clip_grad_norm_(trained, spec.optimizer.max_grad_norm)
        optimizer.step()
        optimizer.zero_grad()
    seconds = time.perf_counter() - begin
    total = correct = 0.0
    everything = np.arange(len(held_out))
    with torch.no_grad():
        for start in range(0, len(held_out), 64):
            batch = held_out.batch(everything[start : start + 64], device)
            loss, logits = losses(model, batch)
            total += loss.item()
            if classify:
                correct += float((logits.argmax(-1) == batch.labels).sum())
    return {
        "steps": steps,
        "batch_size": batch_size,
        "rank": rank,
        "loss": total / held_out.targets(everything),
        "accuracy": correct / len(held_out),
        "seconds": seconds,
    }


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__)
    for name in ("job", "fleet", "run"):
        parser.add_argument(name, type=Path)
    parser.add_argument("--rank", type=int, default=16)
    options = parser.parse_args()
    torch.set_num_threads(2)
    local = read(options.job, options.fleet)
    rows = [json.loads(line) for line in (options.run / "metrics.jsonl").read_text().splitlines()]
    federated = {key: rows[-1][key] for key in ("round", "loss", "accuracy")}
    rounds, nodes = local.job.spec.rounds, len(local.members)
    found = [
        centralised(local, rounds.count * (rounds.local_steps or 1), options.rank, rounds.batch_size * many)
        for many in (nodes, 1)
    ]
    result = {"machine": machine(), "seed": local.job.spec.seed, "federated": federated, "centralised": found}
    (RESULTS / "centralised.json").write_text(json.dumps(result, indent=1) + "\n")
    print(json.dumps(result, indent=1))


if __name__ == "__main__":
    main()
