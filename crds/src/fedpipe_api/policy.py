# SPDX-License-Identifier: Apache-2.0
"""FedPipePolicy: what the owner of a node's data lets jobs do there. A file of the node, not of the cluster.

The agent keeps to it. Neither a job nor the operator has a field or a message that changes it (METHOD §6).
"""

import posixpath
from fnmatch import fnmatchcase
from typing import Annotated, Literal

from pydantic import Field, StringConstraints

from .base import Model, UserError
from .conditions import Reason
from .data_source import ColumnName, DataSource, Fields
from .job import Task
from .wire import AgentConfig

Pattern = Annotated[str, StringConstraints(min_length=1, max_length=1024)]
Patterns = Annotated[tuple[Pattern, ...], Field(min_length=1, max_length=1000)]
"""Shell patterns: `*` stands for any characters, also `/`."""


class Forbidden(UserError):
    """The policy of the node forbids what is asked; the text begins with the reason that the status shows."""

    def __init__(self, why: str):
        """Keep one line that names the policy's file and field."""
        super().__init__(f"{Reason.POLICY_FORBIDS}: {why}")


def is_forbidden(message: str | None) -> bool:
    """Return whether an agent ended with `Forbidden`, by its last line."""
    return message is not None and f"{Reason.POLICY_FORBIDS}: " in message


class LeastPrivacy(Model):
    """The least privacy that a job must ask for."""

    level: Literal["record"] = Field(default="record", description="As spec.privacy.level of a job.")
    max_epsilon: float = Field(gt=0, le=1000, description="Largest epsilon of a job.")
    max_delta: float = Field(gt=0, lt=1, description="Largest delta of a job.")


class Jobs(Model):
    """Which jobs may train here."""

    namespaces: Patterns | None = Field(default=None, description="Namespaces of agent Pods; default: any.")
    names: Patterns | None = Field(default=None, description="Names of jobs; default: any.")


class ReadableData(Model):
    """What agents may read of the data."""

    fields: tuple[ColumnName, ...] = Field(
        min_length=1, max_length=1000, description="Top-level fields of rows; others are as if not there."
    )


class PrivacyBudget(Model):
    """What all jobs together may spend of the data's privacy, counted on the node."""

    epsilon: float = Field(gt=0, le=1000, description="For ever, over all jobs.")
    delta: float = Field(gt=0, lt=1, description="Chance that epsilon does not hold.")
    file: str = Field(
        pattern=r"^/[^\x00]*$",
        max_length=4096,
        description="Absolute path of the ledger; its owner creates it empty, once.",
    )


class PolicySpec(Model):
    """What a job must keep to; what is not given is not demanded."""

    privacy: LeastPrivacy | None = None
    budget: PrivacyBudget | None = None
    jobs: Jobs = Jobs()
    models: Patterns | None = Field(
        default=None,
        description="Base models: REPOSITORY, REPOSITORY@REVISION, a path, or claim:NAME; default: any.",
    )
    data: ReadableData | None = None
    min_participants: int = Field(
        default=1, ge=1, le=5000, description="Least rounds.minUpdates: no adapter is of fewer nodes."
    )


class FedPipePolicy(Model):
    """A node's policy."""

    api_version: Literal["fedpipe.io/v1alpha1"]
    kind: Literal["FedPipePolicy"]
    spec: PolicySpec


def forbidden(policy: FedPipePolicy, job: AgentConfig, *, namespace: str | None, model: str) -> str | None:
    """Return why a policy forbids a job, as `field of the policy: reason`; None where it does not.

    Args:
        policy: of the node.
        job: as the coordinator gave it.
        namespace: of the agent's Pod, None where there is none.
        model: what is loaded: REPOSITORY@REVISION, a path, or claim:NAME.
    """
    spec = policy.spec
    if spec.jobs.namespaces and not _matches(namespace, spec.jobs.namespaces):
        return f"spec.jobs.namespaces: jobs of {namespace or 'no namespace'} may not train here"
    if spec.jobs.names and not _matches(job.job, spec.jobs.names):
        return f"spec.jobs.names: job {job.job} may not train here"
    if spec.models and not any(_matches(name, spec.models) for name in _names_of(model)):
        return f"spec.models: model {model} may not be trained here"
    if job.min_updates < spec.min_participants:
        return (
            f"spec.minParticipants: at least {spec.min_participants}, but the job's rounds.minUpdates is "
            f"{job.min_updates}"
        )
    return _privacy(spec, job) or _data(spec, job)


def _privacy(spec: PolicySpec, job: AgentConfig) -> str | None:
    if job.privacy is None:
        field = "privacy" if spec.privacy else "budget" if spec.budget else None
        return f"spec.{field}: the job has no spec.privacy, which is needed here" if field else None
    if spec.privacy is None:
        return None
    for asked, most, limit, name in (
        (job.privacy.epsilon, spec.privacy.max_epsilon, "maxEpsilon", "epsilon"),
        (job.privacy.delta, spec.privacy.max_delta, "maxDelta", "delta"),
    ):
        if asked > most:
            return f"spec.privacy.{limit}: at most {most:g}, but the job's privacy.{name} is {asked:g}"
    return None


def _data(spec: PolicySpec, job: AgentConfig) -> str | None:
    if spec.data is None:
        return None
    for name in sorted(_asked_fields(job.data, job.model.task)):
        if not {name, name.partition(".")[0]} & set(spec.data.fields):
            return f"spec.data.fields: field {name!r}, which the job reads, may not be read"
    return None


def _asked_fields(data: DataSource, task: Task) -> set[str]:
    """Return the fields that a job needs, as far as its spec shows; rows of a causal-lm show the rest."""
    fields = data.fields
    if task is Task.SEQUENCE_CLASSIFICATION:
        return {fields.text, fields.label, *((fields.text_pair,) if fields.text_pair else ())}
    given, default = fields.to_dict(), Fields().to_dict()
    return {name for field, name in given.items() if name != default.get(field)}


def _names_of(model: str) -> set[str]:
    if model.startswith("/"):
        return {posixpath.normpath(model)}
    return {model, model.partition("@")[0]}


def _matches(name: str | None, patterns: tuple[str, ...]) -> bool:
    return name is not None and any(fnmatchcase(name, pattern) for pattern in patterns)
