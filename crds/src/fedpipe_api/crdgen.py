# SPDX-License-Identifier: Apache-2.0
"""Writes the generated half of `crds/`: `python -m fedpipe_api.crdgen [--check] DIR`."""

import argparse
import sys
from pathlib import Path
from typing import Any

import yaml

from .base import Model
from .docs import reference
from .job import FedPipeJob
from .names import GROUP, JOBS, NODES, VERSION
from .node import FedPipeNode
from .printer_columns import JOB_COLUMNS, NODE_COLUMNS
from .schema import structural


class PlainDumper(yaml.SafeDumper):
    """Writes shared parts out in full: anchors make a manifest hard to read."""

    def ignore_aliases(self, data: Any) -> bool:
        """Return True: nothing is an alias."""
        return True


HEADER = "# Generated from fedpipe_api by `make generate`; edit the models instead.\n"


def definition(
    kind: type[Model], plural: str, scope: str, short_name: str, columns: list[dict[str, Any]]
) -> dict[str, Any]:
    """Return the CustomResourceDefinition of a kind."""
    return {
        "apiVersion": "apiextensions.k8s.io/v1",
        "kind": "CustomResourceDefinition",
        "metadata": {"name": f"{plural}.{GROUP}"},
        "spec": {
            "group": GROUP,
            "names": {
                "kind": kind.__name__,
                "listKind": f"{kind.__name__}List",
                "plural": plural,
                "singular": kind.__name__.lower(),
                "shortNames": [short_name],
                "categories": ["fedpipe"],
            },
            "scope": scope,
            "versions": [
                {
                    "name": VERSION,
                    "served": True,
                    "storage": True,
                    "subresources": {"status": {}},
                    "additionalPrinterColumns": columns,
                    "schema": {"openAPIV3Schema": structural(kind)},
                }
            ],
        },
    }


def generate() -> dict[str, str]:
    """Return the text of every generated file by its name."""
    definitions = {
        JOBS: definition(FedPipeJob, JOBS, "Namespaced", "fpj", JOB_COLUMNS),
        NODES: definition(FedPipeNode, NODES, "Cluster", "fpn", NODE_COLUMNS),
    }
    files = {
        f"{GROUP}_{plural}.yaml": HEADER + yaml.dump(body, Dumper=PlainDumper, sort_keys=False, width=110)
        for plural, body in definitions.items()
    }
    return files | {"README.md": reference()}


def main(arguments: list[str] | None = None) -> int:
    """Write the files, or with `--check` name the first stale one and return 1."""
    parser = argparse.ArgumentParser(prog="python -m fedpipe_api.crdgen", description=__doc__)
    parser.add_argument("--check", action="store_true", help="change nothing; fail if a file is stale")
    parser.add_argument("directory", type=Path)
    options = parser.parse_args(arguments)
    for name, text in generate().items():
        path = options.directory / name
        if not options.check:
            path.write_text(text)
        elif not path.is_file() or path.read_text() != text:
            print(f"{path}: stale; run `make generate`", file=sys.stderr)  # noqa: T201
            return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
