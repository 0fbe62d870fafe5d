# SPDX-License-Identifier: Apache-2.0
"""Built images: they are small, list what they hold, start, train a round, and build again to the same digest.

Skipped where there is no buildah or `make images` has not been run. BUILD_ARGS go to the build, as with `make images`.
"""

import json
import os
import shutil
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import yaml

from agent_fixtures import Coordinator, registered, save_tiny_model, write_rows
from chart.rendering import CHART, REPOSITORY
from fedpipe_agent.train import model as base
from fedpipe_agent.train.shape import read_shape
from fedpipe_api.job import Precision, Task
from fedpipe_api.wire import Assignment, AssignmentKind, NodePlan

NAMES = ("operator", "probe", "agent")
LIMIT = {"operator": 200_000_000, "probe": 150_000_000}
"""Bytes, unpacked."""

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]


def buildah(*arguments: str | Path, check: bool = True) -> subprocess.CompletedProcess[str]:
    return subprocess.run(["buildah", *arguments], capture_output=True, text=True, check=check)


def version() -> str:
    return str(yaml.safe_load((CHART / "Chart.yaml").read_text())["appVersion"])


@cache
def built(name: str) -> tuple[str, dict[str, Any]]:
    """Return a built image's name and description; skips where there is none."""
    image = f"docker.io/fedpipe/{name}:{version()}"
    if shutil.which("buildah") is None:
        pytest.skip("no buildah on PATH")
    done = buildah("inspect", "--type=image", image, check=False)
    if done.returncode:
        pytest.skip(f"{image} is not built (make images)")
    return image, json.loads(done.stdout)


@contextmanager
def container(name: str) -> Iterator[str]:
    """Yield a container of an image."""
    made = buildah("from", built(name)[0]).stdout.strip()
    try:
        yield made
    finally:
        buildah("rm", made)


def inside(name: str, *command: str, volume: str = "") -> subprocess.CompletedProcess[str]:
    """Run a command in a container of the image, as the image's user."""
    with container(name) as made:
        mounts = ["--volume", volume] if volume else []
        return buildah("run", "--isolation=chroot", *mounts, made, "--", *command, check=False)


@pytest.fixture(params=NAMES)
def root(request: pytest.FixtureRequest) -> Iterator[tuple[str, Path]]:
    """Yield the name of an image and where its files are."""
    with container(request.param) as made:
        yield request.param, Path(buildah("mount", made).stdout.strip())
        buildah("umount", made)


def test_files(root: tuple[str, Path]) -> None:
    name, files = root
    found = [path.lstat() for path in files.rglob("*") if path.is_symlink() or path.is_file()]
    assert sum(file.st_size for file in found) <= LIMIT.get(name, 4_000_000_000)
    described = built(name)[1]["OCIv1"]["config"]
    assert described["User"] == "65532:65532"
    bill = json.loads((files / described["Labels"]["io.fedpipe.sbom"].lstrip("/")).read_text())
    held = {entry["name"]: entry for entry in bill["components"]}
    assert {"fedpipe-api", "Python", "libc6"} <= set(held)
    assert ("torch" in held) == (name == "agent")
    assert len({entry["bom-ref"] for entry in bill["components"]}) == len(bill["components"])
    for entry in bill["components"]:
        assert entry["purl"].startswith(("pkg:pypi/", "pkg:deb/debian/", "pkg:generic/python@"))


@pytest.mark.parametrize(
    ("name", "command", "printed"),
    [
        ("operator", ("fedpipe-operator", "--help"), "run"),
        ("operator", ("fedpipe-operator", "run", "--help"), "--coordinator-port"),
        ("operator", ("fedpipe", "--help"), "export"),
        ("operator", ("python", "-c", "import fedpipe_operator.kube.run, sys; print(sys.version)"), "3."),
        ("probe", ("fedpipe-agent", "probe", "--once"), "CpuOnly"),
        ("agent", ("fedpipe-agent", "train", "--help"), "--coordinator"),
    ],
)
def test_it_starts(name: str, command: tuple[str, ...], printed: str) -> None:
    done = inside(name, *command)
    assert done.returncode == 0, done.stderr
    assert printed in done.stdout


def test_the_agent_trains_a_round(tmp_path: Path) -> None:
    save_tiny_model("bert", tmp_path / "model")
    write_rows(tmp_path / "train.jsonl")
    (tmp_path / "token").write_text("secret")
    (tmp_path / "capacity.json").write_text(
        json.dumps({"threads": 1, "precisions": ["fp32"], "device": "box"})
    )
    for path in (tmp_path, *tmp_path.rglob("*")):
        path.chmod(0o755 if path.is_dir() else 0o644)  # the image's user is not the owner
    job = registered()
    source = base.Source(str(tmp_path / "model"))
    shape = read_shape(base.read_config(source, job.model, 0), Task.SEQUENCE_CLASSIFICATION)
    plan = NodePlan(
        precision=Precision.FP32, ranks={matrix.name: 2 for matrix in shape.matrices}, micro_batch=4,
        accumulation=2, local_steps=3, predicted_bytes=0, predicted_step_seconds=0, predicted_round_seconds=0,
        limited_by="time",
    )  # fmt: skip
    with Coordinator(job) as coordinator:
        coordinator.assignments = [
            Assignment(kind=AssignmentKind.TRAIN, round=1, plan=plan, learning_rate=1e-2),
            Assignment(kind=AssignmentKind.STOP),
        ]
        done = inside(
            "agent", "fedpipe-agent", "train", f"--coordinator={coordinator.url}", "--model=/node/model",
            "--data=/node", "--token-file=/node/token", "--capacity=/node/capacity.json",
            volume=f"{tmp_path}:/node:ro",
        )  # fmt: skip
    assert done.returncode == 0, done.stderr
    [(manifest, update)] = coordinator.updates
    assert manifest.steps == 3
    assert len(update) > 1000


@pytest.mark.parametrize("name", ["operator", "probe"])
def test_the_same_commit_gives_the_same_digest(name: str) -> None:
    image, described = built(name)
    labels = described["OCIv1"]["config"]["Labels"]
    head = subprocess.run(
        ["git", "rev-parse", "HEAD"], cwd=REPOSITORY, capture_output=True, text=True, check=True
    ).stdout.strip()
    if labels["org.opencontainers.image.revision"] != head:
        pytest.skip(f"{image} is built from another commit (make images)")
    if buildah("inspect", "--type=image", labels["io.fedpipe.base"], check=False).returncode:
        pytest.skip(f"the base {labels['io.fedpipe.base']} is not in the local storage")
    arguments = (
        f"{os.environ.get('BUILD_ARGS', '')} --build-arg PYTHON={labels['io.fedpipe.base']} --no-cache"
    )
    again = {"BUILDER": "buildah", "TAG": "again", "BUILD_ARGS": arguments}
    subprocess.run(
        [REPOSITORY / "images/build.sh", name], env=os.environ | again, capture_output=True, check=True
    )
    try:
        second = json.loads(buildah("inspect", "--type=image", f"docker.io/fedpipe/{name}:again").stdout)
    finally:
        buildah("rmi", f"docker.io/fedpipe/{name}:again", check=False)
    assert second["FromImageDigest"] == described["FromImageDigest"]
