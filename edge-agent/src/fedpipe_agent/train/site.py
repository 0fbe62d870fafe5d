# SPDX-License-Identifier: Apache-2.0
"""The policies that hold where this agent runs, and the one job that they let in."""

import base64
import json
import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from fedpipe_api import wire
from fedpipe_api.accounting import Steps
from fedpipe_api.base import UserError
from fedpipe_api.names import MODEL_DIRECTORY, POLICY_DIRECTORY
from fedpipe_api.policy import FedPipePolicy, Forbidden, forbidden

from ..documents import load
from . import privacy_ledger

POLICY = Path(POLICY_DIRECTORY, "policy.yaml")


class Site:
    """What the owner of the data allows one job; every policy that holds must allow it."""

    def __init__(self, job: wire.AgentConfig, model: str, token_file: Path, more: Iterable[Path] = ()):
        """Read the node's policy, where there is one, and `more`, which must be there, and check the job.

        Args:
            job: as the coordinator gave it.
            model: as it is given to the agent: a directory, or REPOSITORY@REVISION.
            token_file: of the agent; on a cluster its token says in which namespace the Pod is.
            more: policies besides the node's. They can forbid more, and never allow more.

        Raises:
            Forbidden: a policy forbids the job, or cannot be read: then everything is forbidden.
        """
        self._job = job.job
        # A directory without the file is a policy that is lost.
        paths = [POLICY] if os.path.lexists(POLICY.parent) else []
        self._policies = {path: _policy(path) for path in (*paths, *more)}
        namespace, named = _namespace(token_file), _model(job, model)
        for path, policy in self._policies.items():
            why = forbidden(policy, job, namespace=namespace, model=named)
            if why:
                raise Forbidden(f"{path}: {why}")
            if policy.spec.budget:
                privacy_ledger.check(policy.spec.budget)

    @property
    def fields(self) -> frozenset[str] | None:
        """Top-level fields of rows that may be read; None: all."""
        given = [frozenset(p.spec.data.fields) for p in self._policies.values() if p.spec.data]
        return frozenset.intersection(*given) if given else None

    def charge(self, steps: Steps) -> None:
        """Charge the node's budgets, durably, with private steps that are to be done.

        Raises:
            Forbidden: they would exceed one.
        """
        for policy in self._policies.values():
            if policy.spec.budget:
                privacy_ledger.charge(policy.spec.budget, self._job, steps)


def _policy(path: Path) -> FedPipePolicy:
    try:
        return load(path, FedPipePolicy)
    except UserError as error:
        raise Forbidden(str(error)) from None


def _namespace(token_file: Path) -> str | None:
    """Return the namespace that the kubelet's token is of; None for a token of another kind.

    Its signature is not checked: nobody but the kubelet and the agent's own Pod puts the file there.
    """
    try:
        claims = token_file.read_text(encoding="ascii").split(".")[1]
        decoded: Any = json.loads(base64.urlsafe_b64decode(claims + "=" * (-len(claims) % 4)))
        name = decoded["kubernetes.io"]["namespace"]
    except (OSError, ValueError, LookupError, TypeError, RecursionError):
        return None
    return name if isinstance(name, str) else None


def _model(job: wire.AgentConfig, model: str) -> str:
    """Return the model as a policy names it: of a Pod's mount, what the job says is mounted there."""
    source = job.model
    if model != MODEL_DIRECTORY:
        return str(Path(model).resolve()) if Path(model).is_dir() else model
    if source.host_path is not None:
        return source.host_path.path
    return f"claim:{source.persistent_volume_claim.claim_name}" if source.persistent_volume_claim else model
