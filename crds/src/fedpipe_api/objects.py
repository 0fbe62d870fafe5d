# SPDX-License-Identifier: Apache-2.0
"""What FedPipe's kinds borrow from Kubernetes: metadata, label selectors, volumes."""

from collections.abc import Mapping
from typing import Annotated, ClassVar, Literal

from pydantic import Field, StringConstraints

from .base import Model
from .rules import Rule, exactly_one, inside

LabelValue = Annotated[str, StringConstraints(max_length=63)]
SecretName = Annotated[
    str,
    StringConstraints(
        min_length=1,
        max_length=253,
        pattern=r"^[a-z0-9]([-a-z0-9]*[a-z0-9])?(\.[a-z0-9]([-a-z0-9]*[a-z0-9])?)*$",
    ),
]


class ObjectMeta(Model):
    """The part of Kubernetes metadata that FedPipe reads; everything else is ignored."""

    model_config = Model.model_config | {"extra": "ignore"}

    name: str = Field(
        min_length=1,
        max_length=253,
        pattern=r"^[a-z0-9]([-a-z0-9]*[a-z0-9])?(\.[a-z0-9]([-a-z0-9]*[a-z0-9])?)*$",
        description="Name of the object.",
    )
    namespace: str = Field(default="default", min_length=1, max_length=63, description="Its namespace.")
    uid: str | None = None
    generation: int | None = None
    labels: dict[str, str] = Field(default_factory=dict)
    annotations: dict[str, str] = Field(default_factory=dict)


class HostPath(Model):
    """A directory of the node."""

    path: str = Field(min_length=1, max_length=1024, description="Absolute path on the node.")


class Claim(Model):
    """A PersistentVolumeClaim of the job's namespace."""

    claim_name: str = Field(
        min_length=1,
        max_length=253,
        pattern=r"^([a-z0-9.-]|\{node\})+$",
        description="Its name; `{node}` in it stands for the node's name, which gives each node a claim.",
    )
    path: str = Field(default="", max_length=1024, description="Directory inside the volume.")

    rules: ClassVar = (inside("path"),)


class Volume(Model):
    """Where files are stored: a claim or a directory of the node."""

    persistent_volume_claim: Claim | None = None
    host_path: HostPath | None = None

    rules: ClassVar = (exactly_one("persistentVolumeClaim", "hostPath"),)


class LabelSelectorRequirement(Model):
    """One expression of a Kubernetes label selector."""

    key: str = Field(min_length=1, max_length=317, description="Label key.")
    operator: Literal["In", "NotIn", "Exists", "DoesNotExist"] = Field(description="How values are compared.")
    values: tuple[LabelValue, ...] = Field(default=(), max_length=100, description="For In and NotIn.")

    rules: ClassVar = (
        Rule(
            field="values",
            message="needed by In and NotIn, and by them only",
            cel="(self.operator in ['In', 'NotIn']) == (has(self.values) && size(self.values) > 0)",
            holds=lambda model: (model.operator in ("In", "NotIn")) == bool(model.values),
        ),
    )

    def matches(self, labels: Mapping[str, str]) -> bool:
        """Return whether the labels meet the expression."""
        value = labels.get(self.key)
        match self.operator:
            case "In":
                return value in self.values
            case "NotIn":
                return value not in self.values
            case "Exists":
                return value is not None
            case "DoesNotExist":
                return value is None


class LabelSelector(Model):
    """A Kubernetes label selector; empty selects every node."""

    match_labels: dict[str, LabelValue] = Field(
        default_factory=dict, max_length=100, description="Labels a node must have."
    )
    match_expressions: tuple[LabelSelectorRequirement, ...] = Field(
        default=(), max_length=100, description="Expressions a node must meet."
    )

    rules: ClassVar = (
        Rule(
            field="matchLabels",
            message="a label key has at most 317 characters",
            cel="!has(self.matchLabels) || self.matchLabels.all(key, size(key) <= 317)",
            holds=lambda model: all(len(key) <= 317 for key in model.match_labels),
        ),
    )

    def matches(self, labels: Mapping[str, str]) -> bool:
        """Return whether an object with these labels is selected."""
        if not self.match_labels.items() <= labels.items():
            return False
        return all(expression.matches(labels) for expression in self.match_expressions)
