# SPDX-License-Identifier: Apache-2.0
"""Writes what an image holds as a CycloneDX bill of materials: `sbom.py NAME VERSION ROOT`.

The image's environment runs it. It lists every Python distribution, the interpreter, and the Debian packages
that files under ROOT came from; all that are installed where ROOT is /. The image's label io.fedpipe.sbom
names the file. It holds no time and no random serial number: the same packages give the same bytes. It is
written without a library, which the image would have to contain and list.
"""

import json
import os
import platform
import subprocess
import sys
from importlib.metadata import distributions
from pathlib import Path
from typing import Any

EPOCH = int(os.environ.get("SOURCE_DATE_EPOCH", "0"))
PLACE = "opt/fedpipe/sbom.cdx.json"


def document(name: str, version: str, root: Path) -> dict[str, Any]:
    """Return the bill of materials of the image whose files are under root."""
    found = {distribution_component(d.metadata) for d in distributions()}
    found |= {debian_component(package) for package in debian_packages(root)}
    found.add(("Python", platform.python_version(), f"pkg:generic/python@{platform.python_version()}", ""))
    return {
        "bomFormat": "CycloneDX",
        "specVersion": "1.6",
        "version": 1,
        "metadata": {"component": {"type": "container", "name": f"fedpipe/{name}", "version": version}},
        "components": [component(*entry) for entry in sorted(found)],
    }


def component(name: str, version: str, purl: str, licence: str) -> dict[str, Any]:
    """Return one entry of the bill."""
    entry: dict[str, Any] = {
        "type": "library",
        "bom-ref": purl,
        "name": name,
        "version": version,
        "purl": purl,
    }
    return entry | ({"licenses": [{"expression": licence}]} if licence else {})


def distribution_component(metadata: Any) -> tuple[str, str, str, str]:
    """Return name, version, package URL and SPDX licence of a Python distribution."""
    name = metadata["Name"]
    purl = f"pkg:pypi/{name.lower().replace('_', '-')}@{metadata['Version']}"
    return name, metadata["Version"], purl, metadata.get("License-Expression") or ""


def debian_component(line: str) -> tuple[str, str, str, str]:
    """Return name, version and package URL of a Debian package given as `name architecture version`."""
    name, architecture, version = line.split()
    return name, version, f"pkg:deb/debian/{name}@{version}?arch={architecture}", ""


def debian_packages(root: Path) -> list[str]:
    """Return `name architecture version` of every Debian package that a file under root came from."""
    shown = "--showformat=${Package} ${Architecture} ${Version}\n"
    if root == Path("/"):
        return asked("dpkg-query", "--show", shown)
    files = [f"/{path.relative_to(root)}" for path in root.rglob("*") if not path.is_dir()]
    # Debian's database knows files by their place before /lib moved into /usr.
    places = [*files, *(path.removeprefix("/usr") for path in files if path.startswith("/usr/lib"))]
    owners = set()
    for start in range(0, len(places), 1000):
        answer = asked("dpkg-query", "--search", "--", *places[start : start + 1000])
        owners |= {line.rsplit(": ", 1)[0] for line in answer if not line.startswith("diversion ")}
    return asked("dpkg-query", "--show", shown, *sorted(owners)) if owners else []


def asked(*command: str) -> list[str]:
    """Return the lines a command writes; a file that no package owns is no error."""
    try:
        return subprocess.run(command, capture_output=True, text=True, check=False).stdout.splitlines()
    except FileNotFoundError:
        return []  # a base that is not Debian's


def main(name: str, version: str, root: Path) -> None:
    """Write the bill into the root."""
    place = root / PLACE
    place.write_text(json.dumps(document(name, version, root), indent=1) + "\n")
    for path in (place, place.parent):
        os.utime(path, (EPOCH, EPOCH))


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2], Path(sys.argv[3]))
