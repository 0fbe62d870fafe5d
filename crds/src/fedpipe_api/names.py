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

ATTENTION_MODULES: dict[str, tuple[str, ...]] = {
    "bert": ("query", "key", "value", "attention.output.dense"),
    "roberta": ("query", "key", "value", "attention.output.dense"),
    "distilbert": ("q_lin", "k_lin", "v_lin", "out_lin"),
    "gpt2": ("attn.c_attn", "attn.c_proj"),
    "llama": ("q_proj", "k_proj", "v_proj", "o_proj"),
    "mistral": ("q_proj", "k_proj", "v_proj", "o_proj"),
    "qwen2": ("q_proj", "k_proj", "v_proj", "o_proj"),
    "qwen3": ("q_proj", "k_proj", "v_proj", "o_proj"),
}
"""Suffixes of the matrices that are candidates by default, by transformers' model_type (METHOD §1)."""


def child_name(job: str, node: str) -> str:
    """Return the deterministic name of the agent Pod of a job on a node; at most 63 characters.

    The digest keeps `a-b` on `c` apart from `a` on `b-c` and survives the cut of long names.
    """
    digest = hashlib.sha256(f"{job}/{node}".encode()).hexdigest()[:8]
    return f"{f'{job}-{node}'.replace('.', '-')[:54].rstrip('-')}-{digest}"
