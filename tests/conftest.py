# SPDX-License-Identifier: Apache-2.0
"""Fixtures that several folders share."""

from importlib.metadata import version

from hypothesis import settings

from kube.controlplane import control_plane, describe_binaries, find_binaries
from standins.forked import preload

__all__ = ["control_plane"]

# On a busy machine any example may take long; a test that hangs meets pytest's own limit.
settings.register_profile("patient", deadline=None)
settings.load_profile("patient")

# Engines start by the hundred, and each would have a worker that imports numpy and scipy again.
preload()


def pytest_report_header() -> str:
    """Say what the tests of the cluster run against."""
    emulated = "" if find_binaries() else f"; emulated by kmock {version('kmock')}"
    return f"API server: {describe_binaries()}{emulated}"
