"""Fixtures that several folders share."""

from kube.controlplane import control_plane, describe_binaries

__all__ = ["control_plane"]


def pytest_report_header() -> str:
    """Say what the tests of the cluster run against."""
    return f"API server: {describe_binaries()}"
