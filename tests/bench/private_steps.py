# SPDX-License-Identifier: Apache-2.0
"""What record-level privacy costs: time and memory of private steps over plain ones, on one CPU thread.

`python tests/bench/private_steps.py`: a BERT of MiniLM's size, rank 8 on query and value, 16 samples of 64
tokens. Steps of both kinds alternate in one process, timed by the CPU's clock; memory is the peak of a process of each.
"""

import json
import resource
import subprocess
import sys
import time
from contextlib import ExitStack
from statistics import median
from typing import Any

import numpy as np
import torch
from transformers import BertConfig, BertForSequenceClassification

from fedpipe_agent.train.data import Samples
from fedpipe_agent.train.device import Device
from fedpipe_agent.train.loop import MicroBatches
from fedpipe_agent.train.precisions import import_peft
from fedpipe_agent.train.private_gradients import Noise, private_gradients
from fedpipe_agent.train.tokenization import Sample
from fedpipe_api.job import Task
from fedpipe_api.node import Capacity

BATCH, LENGTH, STEPS = 16, 64, 12


def prepared() -> tuple[Any, Samples]:
    """Return the model with its adapters, and samples of one length."""
    torch.manual_seed(0)
    config = BertConfig(
        hidden_size=384, num_hidden_layers=6, num_attention_heads=12, intermediate_size=1536, num_labels=20
    )
    model = BertForSequenceClassification(config)
    peft = import_peft()
    model = peft.get_peft_model(
        model, peft.LoraConfig(r=8, target_modules=["query", "value"], modules_to_save=[])
    )
    model.base_model.model.classifier.requires_grad_(True)
    random = np.random.default_rng(0)
    rows = [Sample(random.integers(1000, 30000, LENGTH).tolist(), label=i % 20) for i in range(64)]
    return model.train(), Samples(rows, Task.SEQUENCE_CLASSIFICATION, 0)


def run(kinds: list[str]) -> dict[str, Any]:
    """Return the median CPU seconds of a step of each kind, and the process's peak bytes over its start."""
    model, samples = prepared()
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    device = Device(Capacity(threads=1))
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    times: dict[str, list[float]] = {kind: [] for kind in kinds}
    for _ in range(STEPS):
        for kind in kinds:
            with ExitStack() as stack:
                private = None
                if kind == "private":
                    private = stack.enter_context(
                        private_gradients(model, parameters, Noise(1.0, 1.0, BATCH))
                    )
                work = MicroBatches(model, parameters, samples, device, BATCH, private=private)
                begin = time.process_time()
                work.accumulate(np.arange(BATCH))
                if private:
                    private.finish()
                times[kind].append(time.process_time() - begin)
            model.zero_grad(set_to_none=True)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    seconds = {kind: median(found[2:]) for kind, found in times.items()}
    return {"seconds": seconds, "step_mib": (peak - before) / 1024, "peak_mib": peak / 1024}


def main() -> None:
    """Print the figures and both ratios as one JSON object."""
    if len(sys.argv) > 1:
        print(json.dumps(run([sys.argv[1]])))
        return
    memory = {}
    for kind in ("plain", "private"):
        done = subprocess.run([sys.executable, __file__, kind], stdout=subprocess.PIPE, check=True)
        memory[kind] = json.loads(done.stdout)
    seconds = run(["plain", "private"])["seconds"]
    ratios = {
        "time": seconds["private"] / seconds["plain"],
        "step_memory": memory["private"]["step_mib"] / memory["plain"]["step_mib"],
        "process_memory": memory["private"]["peak_mib"] / memory["plain"]["peak_mib"],
    }
    print(json.dumps({"seconds": seconds, "memory": memory, "ratios": ratios}, indent=1))


if __name__ == "__main__":
    main()
