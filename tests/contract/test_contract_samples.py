# SPDX-License-Identifier: Apache-2.0
"""The samples are valid, and kubectl shows them as the documentation promises."""

import itertools
import json
import re
from typing import Any

import pytest
import yaml

from fedpipe_api.job import FedPipeJob, Task
from fedpipe_api.node import Fleet
from kube.controlplane import REPOSITORY, ControlPlane

SAMPLES = sorted((REPOSITORY / "crds" / "samples").glob("*.yaml"))
JOBS = [path for path in SAMPLES if "fleet" not in path.name]


def load(prefix: str) -> Any:
    (path,) = (path for path in SAMPLES if path.name.startswith(prefix))
    return yaml.safe_load(path.read_text())


def test_samples_are_numbered_without_gaps() -> None:
    assert [path.name[:2] for path in SAMPLES] == [f"{i:02}" for i in range(1, len(SAMPLES) + 1)]
    reference = (REPOSITORY / "crds" / "README.md").read_text()
    assert all(f"`{path.name}`" in reference for path in SAMPLES)


@pytest.mark.parametrize("path", JOBS, ids=lambda path: path.stem)
def test_job_is_valid_and_explained(path: Any) -> None:
    text = path.read_text()
    assert text.startswith("# ")
    # Text that YAML 1.1 and 1.2 read differently would be one thing here and another in kubectl.
    assert not re.search(r":\s+[0-9]+e-?[0-9]+\s*$", text, re.MULTILINE)
    job = FedPipeJob.model_validate(yaml.safe_load(text))
    assert FedPipeJob.model_validate(job.to_dict()) == job


def test_quickstart_says_what_it_is_for() -> None:
    spec = FedPipeJob.model_validate(load("01")).spec
    assert len(spec.model.labels) == 12
    assert list(spec.model.labels) == sorted(spec.model.labels)
    assert (spec.nodes.min, spec.nodes.max, spec.rounds.count, spec.rounds.min_updates) == (3, 4, 8, 3)
    assert spec.rounds.deadline == 300


def test_samples_cover_both_tasks_and_suspension() -> None:
    jobs = [FedPipeJob.model_validate(yaml.safe_load(path.read_text())) for path in JOBS]
    assert {job.spec.model.task for job in jobs} == set(Task)
    assert [job.metadata.name for job in jobs if job.spec.suspend] == ["nightly"]


def test_fleet_fits_the_quickstart_and_shows_every_field() -> None:
    fleet = Fleet.model_validate(load("05"))
    assert len(fleet.nodes) == 4
    first = load("05")["nodes"][0]
    assert set(first) == {field.alias for field in type(fleet.nodes[0]).model_fields.values()}
    names = [node.name for node in fleet.nodes]
    assert all(a < b for a, b in itertools.pairwise(names))


@pytest.mark.parametrize("path", JOBS, ids=lambda path: path.stem)
def test_kubectl_applies_sample(path: Any, control_plane: ControlPlane) -> None:
    namespace = load(path.name[:2])["metadata"]["namespace"]
    control_plane.kubectl("create", "namespace", namespace)
    done = control_plane.kubectl("apply", "--dry-run=server", "-f", str(path))
    assert done.returncode == 0, done.stderr
    assert done.stdout.endswith("created (server dry run)\n")


def test_kubectl_says_what_is_wrong(control_plane: ControlPlane) -> None:
    document = load("01")
    document["spec"]["adapter"] = {"ranks": {"min": 8, "max": 4}}
    done = control_plane.kubectl("apply", "-f", "-", stdin=json.dumps(document))
    assert done.returncode == 1
    assert 'The FedPipeJob "quickstart" is invalid: spec.adapter.ranks: ' in done.stderr
    assert done.stderr.rstrip().endswith("min must not be above max")
    document = load("01")
    document["spec"]["rounds"]["localStep"] = 3
    done = control_plane.kubectl("apply", "-f", "-", stdin=json.dumps(document))
    assert 'unknown field "spec.rounds.localStep"' in done.stderr


def test_kubectl_explains_fields(control_plane: ControlPlane) -> None:
    done = control_plane.kubectl("explain", "fpj.spec.rounds.minUpdates")
    assert "Quorum" in done.stdout
