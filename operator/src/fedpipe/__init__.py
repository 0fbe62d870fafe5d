# SPDX-License-Identifier: Apache-2.0
"""FedPipe for Python programs: `fedpipe.Client` submits jobs to a cluster and follows them."""

from fedpipe_operator.kube.client import Client

__all__ = ["Client"]
