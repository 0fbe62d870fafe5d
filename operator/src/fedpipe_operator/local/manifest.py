# SPDX-License-Identifier: Apache-2.0
"""Reads a job and a fleet and checks, before anything starts, that the one can run on the other."""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from pydantic import ValidationError
from pydantic.alias_generators import to_snake

from fedpipe_api import units, yaml_file
from fedpipe_api.base import Model, UserError, explain
from fedpipe_api.files import expanded
from fedpipe_api.job import FedPipeJob, FedPipeJobSpec
from fedpipe_api.node import Fleet, FleetNode
from fedpipe_api.rows.data_paths import locate

M = TypeVar("M", bound=Model)


@dataclass(frozen=True)
class Member:
    """A node that takes part in a local run, the directory of its data, and the policy of its owner."""

    node: FleetNode
    data: Path
    policy: Path | None = None


@dataclass(frozen=True)
class LocalJob:
    """A job on a fleet. `model` is a directory, or a hub repository with @revision."""

    job_file: Path
    fleet_file: Path
    job: FedPipeJob
    fleet: Fleet
    members: tuple[Member, ...]
    excluded: dict[str, str]
    model: str


def read(job_file: Path, fleet_file: Path) -> LocalJob:
    """Read a job and its fleet; UserError in one line for whatever would keep the job from running there."""
    job, fleet = load(job_file, FedPipeJob), load(fleet_file, Fleet)
    if job.spec.suspend:
        raise UserError(f"{job_file}: spec.suspend: a suspended job does not start; remove it")
    chosen, excluded = choose(job.spec, fleet)
    _check_numbers(job.spec, len(chosen), job_file, fleet_file)
    _check_start(job.spec, job_file)
    members = tuple(
        Member(
            node,
            _data(job.spec, node, job_file, fleet_file),
            fleet_file.parent.resolve() / expanded(node.policy) if node.policy else None,
        )
        for node in chosen
    )
    model = model_of(job.spec, fleet, job_file, fleet_file)
    return LocalJob(job_file, fleet_file, job, fleet, members, excluded, model)


def load(path: Path, kind: type[M]) -> M:
    """Return the one YAML document of a file, validated; UserError names the file and the line or field."""
    document = yaml_file.mapping(path)
    _check_kind(path, document, kind)
    try:
        return kind.model_validate(document)
    except ValidationError as error:
        raise UserError(f"{path}: {explain(error)}") from None


def _check_kind(path: Path, document: Mapping[str, Any], kind: type[Model]) -> None:
    """Raise UserError where a job is given in place of a fleet, or a fleet in place of a job."""
    job = "spec" in document or document.get("kind") == "FedPipeJob"
    if kind is FedPipeJob and not job and "nodes" in document:
        raise UserError(f"{path}: this is a fleet file, not a job; write JOB.yaml --fleet {path}")
    if kind is Fleet and job:
        raise UserError(f"{path}: this is a job, not a fleet file; write {path} --fleet FLEET.yaml")


def choose(spec: FedPipeJobSpec, fleet: Fleet) -> tuple[tuple[FleetNode, ...], dict[str, str]]:
    """Return the nodes that take part, the first `nodes.max` that match, and why others do not."""
    matching = [node for node in fleet.nodes if spec.nodes.selector.matches(node.labels)]
    excluded = {node.name: "its labels do not match spec.nodes.selector" for node in fleet.nodes}
    excluded |= {node.name: f"spec.nodes.max is {spec.nodes.max}" for node in matching}
    chosen = tuple(matching[: spec.nodes.max])
    for node in chosen:
        del excluded[node.name]
    return chosen, excluded


def _check_numbers(spec: FedPipeJobSpec, matching: int, job_file: Path, fleet_file: Path) -> None:
    least, quorum = spec.nodes.min, spec.rounds.min_updates
    if matching == 0:
        raise UserError(
            f"{job_file}: spec.nodes.selector: matches no node of {fleet_file}; compare their labels"
        )
    if matching < least:
        raise UserError(
            f"{job_file}: spec.nodes.min: {least} nodes are required but {matching} of {fleet_file} match. "
            "Lower min or add nodes."
        )
    if matching < quorum:
        raise UserError(
            f"{job_file}: spec.rounds.minUpdates: {quorum} updates are required but {matching} nodes of "
            f"{fleet_file} match. Lower minUpdates or add nodes."
        )


def _check_start(spec: FedPipeJobSpec, job_file: Path) -> None:
    """UserError where the adapter to start from is not here; whether it fits only the model shows."""
    given = spec.adapter.from_
    if given is None:
        return
    if given.path is None:
        raise UserError(
            f"{job_file}: spec.adapter.from.job: of a cluster; give path, such as runs/{given.job}/adapter"
        )
    if not (Path(given.path).expanduser() / "adapter_config.json").is_file():
        raise UserError(f"{job_file}: spec.adapter.from.path: {given.path} is no PEFT directory")


def _data(spec: FedPipeJobSpec, node: FleetNode, job_file: Path, fleet_file: Path) -> Path:
    """Return the directory of a node's data: of the fleet file, else the job's hostPath."""
    volume = spec.data.volume
    if node.data is not None:
        directory, named = fleet_file.parent / expanded(node.data), f"{fleet_file}: node {node.name}: data"
    elif volume is not None and volume.host_path is not None:
        directory, named = expanded(volume.host_path.path), f"{job_file}: spec.data.volume.hostPath"
    else:
        where = "is a claim" if volume else "has no volume"
        raise UserError(f"{fleet_file}: node {node.name}: data: required, because the job's data {where}")
    if not directory.is_dir():
        raise UserError(f"{named}: no directory {directory}")
    try:
        locate(directory, spec.data)
    except UserError as error:
        raise UserError(f"{named}: {error}") from None
    return directory


def model_of(spec: FedPipeJobSpec, fleet: Fleet, job_file: Path, fleet_file: Path) -> str:
    """Return the model to load: the fleet's local copy, else what the job names."""
    source = spec.model
    if fleet.model is not None:
        return str(_model_directory(fleet_file.parent / expanded(fleet.model), f"{fleet_file}: model"))
    if source.host_path is not None:
        return str(_model_directory(expanded(source.host_path.path), f"{job_file}: spec.model.hostPath"))
    if source.hugging_face is not None:
        return source.hugging_face.name
    raise UserError(f"{fleet_file}: model: required, because the job's model is stored in a claim")


def memory_warning(local: LocalJob, machine: int) -> str | None:
    """Return that the nodes declare more memory together than the machine has (bytes), or None."""
    declared = sum(member.node.memory or 0 for member in local.members)
    if declared <= machine:
        return None
    return (
        f"{local.fleet_file}: warning: its nodes declare {units.memory(declared)} of memory together, this "
        f"machine has {units.memory(machine)}; lower their memory, or the system may end them"
    )


def _model_directory(directory: Path, named: str) -> Path:
    if not directory.is_dir():
        raise UserError(f"{named}: no directory {directory}")
    config = directory / "config.json"
    try:
        if config.stat().st_size > yaml_file.FILE_LIMIT or "model_type" not in json.loads(
            config.read_bytes()
        ):
            raise UserError(f"{named}: {config} is not the configuration of a transformers model")
    except FileNotFoundError:
        raise UserError(f"{named}: {directory} is not a model: it has no config.json") from None
    except (ValueError, TypeError):
        raise UserError(f"{named}: {config} is not JSON") from None
    if not any(directory.glob("*.safetensors")):
        raise UserError(f"{named}: {directory} has no weights (*.safetensors)")
    return directory.resolve()


def forbidden_change(old: Model, new: Model, path: str = "spec") -> str | None:
    """Return the first field that may not change so, with the contract's own words, or None."""
    for rule in old.rules:
        if rule.holds is not None:
            continue
        before, after = (getattr(model, to_snake(rule.field)) for model in (old, new))
        if before != after and not (rule.field == "count" and after > before):
            return f"{path}.{rule.field}: {rule.message}"
    for field, info in type(old).model_fields.items():
        before, after = getattr(old, field), getattr(new, field)
        if isinstance(before, Model) and isinstance(after, Model):
            found = forbidden_change(before, after, f"{path}.{info.alias}")
            if found:
                return found
    return None
