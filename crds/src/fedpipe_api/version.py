# SPDX-License-Identifier: Apache-2.0
"""The version of FedPipe: the packages, the chart and the images all have the same one."""

from importlib import metadata


def version() -> str:
    """Return the version of the installed packages, as written in crds/pyproject.toml."""
    return metadata.version("fedpipe-api")
