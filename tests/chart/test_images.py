# SPDX-License-Identifier: Apache-2.0
"""Container images: how they are made and what they leave out."""

import importlib.util
import json
import re
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest

from chart.rendering import REPOSITORY, pods, rendered

IMAGES = REPOSITORY / "images"
NAMES = ("operator", "probe", "agent")


@pytest.fixture(scope="module")
def rootfs() -> ModuleType:
    spec = importlib.util.spec_from_file_location("rootfs", IMAGES / "rootfs.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("name", NAMES)
def test_containerfile(name: str) -> None:
    text = (IMAGES / name / "Containerfile").read_text()
    stages = re.findall(r"(?m)^FROM (\S+)", text)
    assert len(stages) == 2
    # The base is an argument, so that it can be pinned by digest and comes from anywhere.
    assert stages[0] == "${PYTHON}"
    assert re.search(r"(?m)^ARG PYTHON=python:3\.13", text)
    final = text[text.rindex("\nFROM ") :]
    assert "\nUSER 65532:65532\n" in final
    assert "RUN" not in re.findall(r"(?m)^[A-Z]+", final)
    for label in ("title", "version", "revision", "licenses"):
        assert f"org.opencontainers.image.{label}=" in final
    assert 'io.fedpipe.base="${PYTHON}"' in final
    assert 'io.fedpipe.sbom="/opt/fedpipe/sbom.cdx.json"' in final
    assert "--constraint constraints.txt" in text
    assert not re.search(r"\b(latest|apt-get|curl|ADD)\b", text)


@pytest.mark.parametrize("name", ["operator", "probe"])
def test_the_image_runs_what_the_chart_asks_for(name: str) -> None:
    text = (IMAGES / name / "Containerfile").read_text()
    [entry] = json.loads(re.findall(r"(?m)^ENTRYPOINT (.*)$", text)[0])
    documents = rendered("existing-tls") + rendered("gpu-nodes")
    [*containers] = [c for n, spec in pods(documents) for c in spec["containers"] if c["name"] == name]
    assert containers
    for container in containers:
        assert "command" not in container
        command, *arguments = container["args"]
        printed = subprocess.run(
            [Path(sys.executable).with_name(entry), command, "--help"],
            capture_output=True,
            text=True,
            check=True,
        ).stdout
        for argument in arguments:
            assert re.search(rf"{argument.split('=')[0]}\b", printed), f"{entry} {command} has no {argument}"


def test_nothing_that_is_left_out_is_imported(rootfs: ModuleType) -> None:
    code = """
import importlib, json, pkgutil, sys
import fedpipe_operator
for found in pkgutil.walk_packages(fedpipe_operator.__path__, "fedpipe_operator."):
    if ".local" not in found.name and not found.name.endswith("__main__"):
        importlib.import_module(found.name)
# What the planner, the aggregation and the API client import only when they are called.
from scipy.optimize import Bounds, LinearConstraint, milp
milp([1.0], integrality=[1], bounds=Bounds(0, 1), constraints=LinearConstraint([[1.0]], 0, 1))
from dp_accounting.rdp import RdpAccountant
from kubernetes.aio import client, config
client.ApiClient, client.Configuration, config.load_incluster_config
print(json.dumps([m.__file__ for m in list(sys.modules.values()) if getattr(m, "__file__", None)]))
"""
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", code], capture_output=True, text=True, check=True
    )
    # Setuptools hooks itself into every environment it is installed in.
    files = [Path(file) for file in json.loads(done.stdout) if "_distutils_hack" not in file]
    left_out = [str(f) for f in files if rootfs.is_unused(f.parts) or rootfs.is_test(f.parts)]
    assert left_out == []
    assert any("scipy" in file.parts for file in files)


def test_a_root_holds_what_its_interpreter_needs(rootfs: ModuleType, tmp_path: Path) -> None:
    package = tmp_path / "opt/lib/python3/site-packages/scipy"
    for name in (
        "optimize/a.py",
        "optimize/tests/test_a.py",
        "cluster/b.py",
        "optimize/__pycache__/a.pyc",
        "a.pyi",
    ):
        (package / name).parent.mkdir(parents=True, exist_ok=True)
        (package / name).write_text("")
    kept = {path.name for path in rootfs.tree(tmp_path / "opt", set())}
    assert kept == {"a.py"}
    libraries = rootfs.libraries([Path(sys.executable).resolve()], tmp_path)
    assert any(path.name.startswith("libc.so") for path in libraries)
