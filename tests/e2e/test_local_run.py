# SPDX-License-Identifier: Apache-2.0
"""`fedpipe run` as a user runs it: real processes, a tiny BERT, data on disk."""

import json
import os
import random
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from peft import PeftModel
from safetensors.numpy import load_file
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import (
    AutoModelForSequenceClassification,
    AutoTokenizer,
    BertConfig,
    BertModel,
    PreTrainedTokenizerFast,
)

from fedpipe_api.lora.format import HEAD, LORA_A, LORA_B
from fedpipe_operator.local.directory import RunDirectory

FEDPIPE = str(Path(sys.executable).with_name("fedpipe"))
WORDS = {"fruit": ("apple", "pear", "plum", "fig"), "tool": ("saw", "axe", "drill", "file")}
LABELS = sorted(WORDS)
NODES = ("edge-a", "edge-b", "edge-c")
SECONDS = 300.0

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]


@pytest.fixture(scope="module")
def inputs(tmp_path_factory):
    """A base model, three nodes' data, a fleet and a job; all relative to the returned directory."""
    root = tmp_path_factory.mktemp("inputs")
    words = [word for group in WORDS.values() for word in group]
    vocabulary = {word: i for i, word in enumerate(["[PAD]", "[UNK]", "[CLS]", "[SEP]", *words])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="[PAD]", unk_token="[UNK]").save_pretrained(
        root / "base"
    )
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=len(vocabulary), hidden_size=32, num_hidden_layers=2, num_attention_heads=2,
        intermediate_size=64, max_position_embeddings=32,
    )  # fmt: skip
    BertModel(config).save_pretrained(root / "base")
    draw = random.Random(0)
    for i, node in enumerate(NODES):
        rows = []
        for _ in range(40 + 20 * i):
            label = draw.choice(LABELS)
            rows.append({"text": " ".join(draw.choices(WORDS[label], k=4)), "label": label})
        (root / node).mkdir()
        (root / node / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    nodes = [{"name": node, "data": node, "threads": 1, "precisions": ["fp32"]} for node in NODES]
    nodes[1]["precisions"] = ["bf16"]
    (root / "fleet.yaml").write_text(yaml.safe_dump({"model": "base", "nodes": nodes}))
    return root


def job_of(root, **rounds):
    return {
        "metadata": {"name": "fruit"},
        "spec": {
            "model": {
                "hostPath": {"path": str(root / "base")},
                "task": "sequence-classification",
                "labels": LABELS,
            },
            "data": {
                "volume": {"hostPath": {"path": "/nowhere"}},
                "train": "train.jsonl",
                "maxLength": 8,
                "evaluationShare": 0.25,
            },
            "rounds": {"count": 3, "localSteps": 4, "batchSize": 8, "minUpdates": 2, **rounds},
            "adapter": {"ranks": {"min": 1, "max": 4}},
            "optimizer": {"learningRate": 0.01},
            "tracking": {"tensorBoard": True},
        },
    }


def write_job(path, job):
    path.write_text(yaml.safe_dump(job))
    return path


def command(job, inputs, out, *more):
    return [FEDPIPE, "run", str(job), "--fleet", str(inputs / "fleet.yaml"), "--out", str(out), *more]


def fedpipe(arguments, **options):
    done = subprocess.run(arguments, capture_output=True, text=True, timeout=SECONDS, check=False, **options)
    assert "Traceback" not in done.stdout + done.stderr
    return done


@pytest.fixture(scope="module")
def finished(inputs, tmp_path_factory):
    """A run that nothing disturbed, and what it printed."""
    root = tmp_path_factory.mktemp("finished")
    job = write_job(root / "job.yaml", job_of(inputs))
    done = fedpipe(command(job, inputs, root / "runs/fruit"))
    assert done.returncode == 0, done.stdout + done.stderr
    return job, RunDirectory(root / "runs/fruit"), done.stdout


def test_a_run_leaves_what_it_promises(finished):
    _, directory, shown = finished
    left = {path.name for path in directory.root.iterdir()}
    assert {"adapter", "report.html", "metrics.jsonl", "plots", "run.json", "store"} <= left
    rows = [json.loads(line) for line in directory.metrics.read_text().splitlines()]
    assert [row["round"] for row in rows] == [0, 1, 2, 3]
    assert rows[-1]["loss"] < rows[0]["loss"]
    assert all(row["updates"] == 3 for row in rows[1:])
    assert "round 3/3" in shown
    assert f"adapter  {directory.adapter}" in shown
    assert f"tracked  {directory.root / 'tensorboard'}" in shown
    assert len(list((directory.root / "tensorboard").glob("events.*"))) == 1
    assert not list(directory.agents.glob("*/token"))


def test_peft_loads_the_adapter_and_gives_the_logits_of_the_global_model(finished, inputs):
    _, directory, _ = finished
    base = AutoModelForSequenceClassification.from_pretrained(inputs / "base", num_labels=len(LABELS))
    by_hand = AutoModelForSequenceClassification.from_pretrained(inputs / "base", num_labels=len(LABELS))
    tensors = load_file(directory.global_adapter(directory.history().state))
    assert np.abs(tensors[HEAD + "classifier.bias"]).max() > 0  # starts at zero: the head was trained
    with torch.no_grad():
        for name, parameter in by_hand.named_parameters():
            matrix = name.removesuffix(".weight")
            if HEAD + name in tensors:
                parameter.copy_(torch.from_numpy(tensors[HEAD + name]))
            elif matrix + LORA_B in tensors:
                change = tensors[matrix + LORA_B].astype(np.float64) @ tensors[matrix + LORA_A]
                parameter.add_(torch.from_numpy(change).float())
    tokens = AutoTokenizer.from_pretrained(inputs / "base")(
        ["apple fig", "saw axe drill"], return_tensors="pt", padding=True
    )
    loaded = PeftModel.from_pretrained(base, directory.adapter).eval()
    with torch.no_grad():
        ours = by_hand.eval()(tokens["input_ids"], tokens["attention_mask"]).logits
        theirs = loaded(input_ids=tokens["input_ids"], attention_mask=tokens["attention_mask"]).logits
    torch.testing.assert_close(theirs, ours, atol=1e-5, rtol=1e-5)


def test_export_merge_writes_a_whole_model(finished, inputs, tmp_path):
    _, directory, _ = finished
    done = fedpipe([FEDPIPE, "export", str(directory.root), "--merge", "--out", str(tmp_path / "merged")])
    assert done.returncode == 0, done.stderr
    merged = AutoModelForSequenceClassification.from_pretrained(tmp_path / "merged").eval()
    assert merged.config.id2label == dict(enumerate(LABELS))
    base = AutoModelForSequenceClassification.from_pretrained(inputs / "base", num_labels=len(LABELS))
    adapted = PeftModel.from_pretrained(base, directory.adapter).eval()
    tokens = torch.arange(4, 12).reshape(2, 4)
    with torch.no_grad():
        torch.testing.assert_close(merged(tokens).logits, adapted(tokens).logits, atol=1e-5, rtol=1e-5)
    AutoTokenizer.from_pretrained(tmp_path / "merged")
    assert {path.stat().st_mode & 0o777 for path in (tmp_path / "merged").iterdir()} == {0o644}


def test_a_run_goes_on_from_an_adapter(finished, inputs, tmp_path):
    _, directory, _ = finished
    before = [json.loads(line) for line in directory.metrics.read_text().splitlines()]
    document = job_of(inputs, count=1)
    document["spec"]["adapter"] |= {"from": {"path": str(directory.adapter)}}
    job = write_job(tmp_path / "job.yaml", document)
    done = fedpipe(command(job, inputs, tmp_path / "more"))
    assert done.returncode == 0, done.stdout + done.stderr
    after = [json.loads(line) for line in RunDirectory(tmp_path / "more").metrics.read_text().splitlines()]
    # The first run evaluated its adapter as nodes download it, rounded to int8.
    assert after[0]["loss"] == pytest.approx(before[-1]["loss"], rel=1e-3)
    assert after[0]["loss"] < 0.95 * before[0]["loss"]

    given = tmp_path / "given"
    shutil.copytree(directory.adapter, given)
    config = json.loads((given / "adapter_config.json").read_text())
    (given / "adapter_config.json").write_text(json.dumps(config | {"use_dora": True}))
    document["spec"]["adapter"]["from"]["path"] = str(given)
    arguments = [FEDPIPE, "plan", str(write_job(job, document)), "--fleet", str(inputs / "fleet.yaml")]
    assert_mistake(fedpipe(arguments), "job.yaml: spec.adapter.from: ")


def everything_under(root):
    return {path: path.stat().st_mtime_ns for path in root.rglob("*") if path.is_file()}


def test_a_second_run_says_what_is_there_and_does_nothing(finished, inputs):
    job, directory, _ = finished
    before = everything_under(directory.root)
    done = fedpipe(command(job, inputs, directory.root))
    assert done.returncode == 0
    assert done.stdout.startswith(f"{directory.root}: holds this run, finished")
    assert "done in" in done.stdout
    quiet = fedpipe(command(job, inputs, directory.root, "--quiet"))
    assert quiet.stdout == done.stdout.partition("\n")[2]
    both = fedpipe(command(job, inputs, directory.root, "--quiet", "--json"))
    assert_mistake(both, "--json and --quiet: give one")
    kept = {path: at for path, at in everything_under(directory.root).items() if path.suffix != ".sqlite"}
    assert kept == {path: at for path, at in before.items() if path.suffix != ".sqlite"}


@pytest.mark.parametrize(
    ("path", "value", "message"),
    [
        ("metadata.name", "veg", "holds a run of job fruit"),
        ("spec.seed", 7, "holds a run of this job with another spec (spec.seed: "),
        ("spec.rounds.count", 9, "finished, so rounds.count cannot grow"),
    ],
)
def test_another_run_into_the_same_directory_is_refused(path, value, message, finished, inputs, tmp_path):
    _, directory, _ = finished
    job = job_of(inputs)
    place = job
    *parents, last = path.split(".")
    for part in parents:
        place = place[part]
    place[last] = value
    done = fedpipe(command(write_job(tmp_path / "job.yaml", job), inputs, directory.root))
    assert_mistake(done, message)


def assert_mistake(done, message):
    assert done.returncode == 2, done.stdout + done.stderr
    assert message in done.stderr, done.stderr
    assert len(done.stderr.splitlines()) == 1, done.stderr


def wait_for(process, log, text):
    """Return once the run has printed the text."""
    end = time.monotonic() + SECONDS
    while text not in log.read_text():
        assert process.poll() is None, log.read_text()
        assert time.monotonic() < end, log.read_text()
        time.sleep(0.02)


def children_of(pid):
    path = Path(f"/proc/{pid}/task/{pid}/children")
    return [int(child) for child in path.read_text().split()]


def start(arguments, log):
    with log.open("w") as output:
        return subprocess.Popen(arguments, stdout=output, stderr=output)


def test_whatever_dies_the_run_goes_on_where_it_stopped(inputs, tmp_path):
    job = write_job(tmp_path / "job.yaml", job_of(inputs, count=8))
    out, log = tmp_path / "run", tmp_path / "log"

    process = start(command(job, inputs, out), log)
    wait_for(process, log, "round 1/8")
    agents = children_of(process.pid)
    os.kill(next(pid for pid in agents if b"edge-b" in arguments_of(pid)), signal.SIGKILL)
    wait_for(process, log, "AgentLost: edge-b")
    wait_for(process, log, "round 3/8")
    process.send_signal(signal.SIGINT)
    assert process.wait(30) == 130
    assert "suspended at round" in log.read_text()
    assert f"--out {out} --resume" in log.read_text()
    done = RunDirectory(out).history().state.done
    assert 3 <= done < 8
    assert_mistake(fedpipe(command(job, inputs, out)), "go on with --resume")

    process = start(command(job, inputs, out, "--resume"), log)
    wait_for(process, log, f"round {done + 1}/8")
    agents += children_of(process.pid)
    process.kill()
    process.wait()
    end = time.monotonic() + 10
    while any(alive(pid) for pid in agents):
        assert time.monotonic() < end, "agents outlived the run"
        time.sleep(0.05)

    finished = fedpipe(command(job, inputs, out, "--resume", "--json"))
    assert finished.returncode == 0, finished.stdout + finished.stderr
    events = [json.loads(line) for line in finished.stdout.splitlines()]
    rounds = [event["round"] for event in events if event["event"] == "round"]
    assert rounds == list(range(rounds[0], 9))
    assert {event["event"] for event in events} <= {"stage", "node", "plan", "round", "notice", "end"}
    assert events[-1]["event"] == "end"
    assert events[-1]["phase"] == "Succeeded"
    assert events[-1]["adapter"] == str(out / "adapter")
    state = RunDirectory(out).history().state
    assert state.done == 8
    assert {"edge-a", "edge-b", "edge-c"} == set(state.rounds[8].updates)
    assert (out / "adapter/adapter_model.safetensors").exists()


def arguments_of(pid):
    return Path(f"/proc/{pid}/cmdline").read_bytes()


def alive(pid):
    try:
        return "\nState:\tZ" not in Path(f"/proc/{pid}/status").read_text()
    except OSError:
        return False


def test_a_bad_row_ends_the_run_with_its_place_and_leaves_nothing(inputs, tmp_path):
    root = tmp_path / "inputs"
    shutil.copytree(inputs, root)
    data = root / "edge-b/train.jsonl"
    lines = data.read_text().splitlines()
    lines[2] = '{"text": "apple", "label": "weapon"}'
    data.write_text("\n".join(lines) + "\n")
    job = write_job(root / "job.yaml", job_of(root))
    done = fedpipe(command(job, root, tmp_path / "runs/fruit"))
    assert_mistake(done, "edge-b/train.jsonl:3")
    assert (done.stdout + done.stderr).count("train.jsonl:3") == 1
    assert "weapon" not in done.stdout + done.stderr
    assert not (tmp_path / "runs").exists()


def test_bad_input_is_refused_before_anything_starts(inputs, tmp_path):
    job = write_job(tmp_path / "job.yaml", job_of(inputs))
    bad = write_job(tmp_path / "bad.yaml", job_of(inputs, count=0))
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine/notes.txt").write_text("keep")
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = str(taken.getsockname()[1])
        out = tmp_path / "runs/fruit"
        for arguments, message in [
            (command(bad, inputs, out), "bad.yaml: spec.rounds.count: "),
            (command(tmp_path / "none.yaml", inputs, out), "none.yaml: No such file"),
            (command(job, inputs, tmp_path / "mine"), "exists and holds no run"),
            (command(job, inputs, out, "--resume"), "nothing to resume"),
            (command(job, inputs, out, "--port", port), f"--port: {port} is in use"),
            (command(job, inputs, job / "out"), "job.yaml"),
            ([FEDPIPE, "run", str(job)], "--fleet"),
            ([FEDPIPE, "run", str(job), "--fleet", str(inputs / "fleet.yaml"), "--colour"], "--colour"),
        ]:
            assert_mistake(fedpipe(arguments), message)
            assert not (tmp_path / "runs").exists()
    assert [path.name for path in (tmp_path / "mine").iterdir()] == ["notes.txt"]
