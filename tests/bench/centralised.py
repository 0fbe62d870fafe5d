"""Centralised LoRA on the pooled data of a run: what federation is compared with.

`python tests/bench/centralised.py RUN_DIR --steps N [--rank 16]` trains plain transformers + peft on the union of
the nodes' training shares, with the run's model, learning rate, batch size and length, and evaluates on the union
of their held-out shares, as the run itself does. Prints one JSON object.
"""

import argparse
import json
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

from fedpipe_agent.train import data as agent_data
from fedpipe_agent.train.loop import losses
from fedpipe_agent.train.model import Source, longest_input, read_config, read_tokenizer
from fedpipe_api.job import FedPipeJob, Task
from fedpipe_api.names import ATTENTION_MODULES
from fedpipe_api.node import Fleet


def pooled(job: FedPipeJob, fleet: Fleet, tokenizer: Any, longest: int | None) -> tuple[Any, Any]:
    """Return the union of the nodes' training samples, and of their held-out samples."""
    shares = [
        agent_data.load(
            Path(str(node.data)),
            job.spec.data,
            job.spec.model,
            tokenizer,
            seed=job.spec.seed,
            longest=longest,
        )
        for node in fleet.nodes
    ]

    def joined(parts: list[Any]) -> Any:
        tokens = [part.tokens(i).tolist() for part in parts for i in range(len(part))]
        marks = [mark for part in parts for mark in part.marks.tolist()]
        return agent_data.Samples(tokens, marks, job.spec.model.task, tokenizer.pad_token_id)

    return joined([train for train, _ in shares]), joined([held for _, held in shares])


def centralised(job: FedPipeJob, fleet: Fleet, steps: int, rank: int, batch_size: int) -> dict[str, float]:
    """Train and return the final loss and accuracy on the held-out union, and the seconds taken."""
    spec, source = job.spec, Source(str(fleet.model))
    tokenizer = read_tokenizer(source)
    config = read_config(source, spec.model, tokenizer.pad_token_id)
    train, held_out = pooled(job, fleet, tokenizer, longest_input(config))
    torch.manual_seed(spec.seed)
    classify = spec.model.task is Task.SEQUENCE_CLASSIFICATION
    kind = AutoModelForSequenceClassification if classify else AutoModelForCausalLM
    base = kind.from_pretrained(source.name, config=config)
    lora = LoraConfig(
        r=rank,
        lora_alpha=spec.adapter.alpha,
        target_modules=list(ATTENTION_MODULES[config.model_type]),
        modules_to_save=["classifier"] if classify else None,
    )
    model = get_peft_model(base, lora)
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=spec.optimizer.learning_rate, weight_decay=0.0)
    random, device, begin = np.random.default_rng(spec.seed), torch.device("cpu"), time.perf_counter()
    for _ in range(steps):
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


def load(run: Path) -> tuple[FedPipeJob, Fleet]:
    """Return the job and the fleet that a run directory keeps."""
    stored = json.loads((run / "run.json").read_text())
    return FedPipeJob.model_validate(stored["job"]), Fleet.model_validate(stored["fleet"])


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("run", type=Path)
    parser.add_argument("--steps", type=int, required=True)
    parser.add_argument("--batch-size", type=int, default=16)
    parser.add_argument("--rank", type=int, default=16)
    options = parser.parse_args()
    torch.set_num_threads(2)
    job, fleet = load(options.run)
    print(json.dumps(centralised(job, fleet, options.steps, options.rank, options.batch_size)))


if __name__ == "__main__":
    main()
