# SPDX-License-Identifier: Apache-2.0
"""The operator's command in a forked process, with other periods than in production where a test asks for them."""

import importlib
import json
import os
import sys

from kubernetes.aio.config import kube_config

from fedpipe_operator.kube import command

VARIABLE = "OPERATOR_PERIODS"
PROGRAM = [sys.executable, "-m", "fedpipe_operator.kube"]
"""The operator that is not forked, as it is installed."""


def main() -> int:
    """Run the command line."""
    for name, seconds in json.loads(os.environ.pop(VARIABLE)).items():
        module, _, constant = name.rpartition(".")
        found = importlib.import_module(module)
        assert hasattr(found, constant), name
        setattr(found, constant, seconds)
    # It was read from the environment when the fork server imported this.
    kube_config.KUBE_CONFIG_DEFAULT_LOCATION = os.environ["KUBECONFIG"]
    return command.main()
