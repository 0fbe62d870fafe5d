# SPDX-License-Identifier: Apache-2.0
"""Every name that two parts must agree on: the API group, labels, deterministic child names, defaults."""

import hashlib

GROUP = "fedpipe.io"
VERSION = "v1alpha1"
JOBS = "fedpipejobs"
NODES = "fedpipenodes"

JOB_LABEL = f"{GROUP}/job"
NODE_LABEL = f"{GROUP}/node"
COMPONENT_LABEL = "app.kubernetes.io/component"
FINALIZER = f"{GROUP}/finalizer"

AUDIENCE = "fedpipe"
"""Audience of the projected ServiceAccount token."""

ADAPTER_SUBRESOURCE = "adapter"
"""Who may `get` it of a FedPipeJob may read its adapter."""

ADAPTER_AUDIENCE = "fedpipe-adapter"
"""Audience of tokens that adapters are read with; such a token is good for nothing else."""

ADAPTER_READER = "fedpipe-adapter-reader"
"""ServiceAccount in a job's namespace in whose name `fedpipe get adapter` asks."""

TOKEN_HEADER = "FedPipe-Token"  # noqa: S105 - the header's name
"""Carries a token where Authorization does not arrive."""

CA_CONFIGMAP = "fedpipe-ca"
"""ConfigMap in every namespace that has jobs: the coordinator's certificate authorities, and where it is."""

MODEL_DIRECTORY = "/model"
"""Where an agent's container has a base model that is a directory or claim of the cluster."""

POLICY_DIRECTORY = "/etc/fedpipe"
"""Where an agent looks for the policy.yaml of its node."""

BUDGET_DIRECTORY = "/var/lib/fedpipe-budget"
"""Where an agent's Pod has the directory of its node's privacy ledger, to write."""

OPERATOR_KEY = "operator"
"""Its key with the operator's Service as NAMESPACE/NAME."""


def child_name(job: str, node: str) -> str:
    """Return the deterministic name of the agent Pod of a job on a node; at most 63 characters.

    The digest keeps `a-b` on `c` apart from `a` on `b-c` and survives the cut of long names.
    """
    digest = hashlib.sha256(f"{job}/{node}".encode()).hexdigest()[:8]
    return f"{f'{job}-{node}'.replace('.', '-')[:54].rstrip('-')}-{digest}"
