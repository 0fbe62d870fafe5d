# SPDX-License-Identifier: Apache-2.0
"""Writes what the chart holds in a second form: `python charts/generate.py [--check]`.

CustomResourceDefinitions come from crds/, dashboards from dashboards/, the tables of the documents from
values.yaml, the alert rules, the contract's conditions and the definitions of metrics, and the version of
chart and packages from crds/pyproject.toml. tests/nvml/plans.py writes the tables of boards.
"""

import re
import sys
import tomllib
from pathlib import Path

import grafana
import yaml
from dashboards import DASHBOARDS

from fedpipe_agent.probe import metrics as probe_metrics
from fedpipe_api.conditions import ADVICE
from fedpipe_api.node import NODE_ADVICE
from fedpipe_operator import metrics as operator_metrics

HERE = Path(__file__).resolve().parent
CHART = HERE / "fedpipe"


def main(arguments: list[str]) -> int:
    """Write every file, or with --check name those that differ; return the exit status."""
    different = []
    for path, text in files().items():
        if path.exists() and path.read_text() == text:
            continue
        different.append(path)
        if "--check" not in arguments:
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(text)
    for path in different:
        print(f"{path.relative_to(HERE.parent)}: {'differs' if '--check' in arguments else 'written'}")  # noqa: T201
    return 1 if different and "--check" in arguments else 0


def files() -> dict[Path, str]:
    """Return the text of every generated file."""
    found = {
        CHART / "files/crds" / path.name: path.read_text()
        for path in sorted((HERE.parent / "crds").glob("fedpipe.io_*.yaml"))
    }
    found |= {
        CHART / f"dashboards/{name}.json": grafana.text(name, panels) for name, panels in DASHBOARDS.items()
    }
    chart = CHART / "README.md"
    parts = {"values": values_table(), "alerts": alerts_table(), "reasons": reasons_table()}
    found[chart] = filled(chart.read_text(), **parts)
    operator, agent = HERE.parent / "operator/README.md", HERE.parent / "edge-agent/README.md"
    found[operator] = filled(operator.read_text(), metrics=operator_metrics.markdown() + "\n")
    found[agent] = filled(agent.read_text(), metrics=probe_metrics.markdown() + "\n")
    version = tomllib.loads((HERE.parent / "crds/pyproject.toml").read_text())["project"]["version"]
    for path in (
        CHART / "Chart.yaml",
        HERE.parent / "operator/pyproject.toml",
        HERE.parent / "edge-agent/pyproject.toml",
    ):
        found[path] = stamped(path.read_text(), version)
    return found


def stamped(text: str, version: str) -> str:
    """Return a Chart.yaml or pyproject.toml with this version, its own and that of the packages it needs."""
    text = re.sub(r"(?m)^((?:version|appVersion): ).*$", rf"\g<1>{version}", text)
    text = re.sub(r'(?m)^(version = ").*"$', rf'\g<1>{version}"', text)
    return re.sub(r'("fedpipe-[a-z]+(?:\[[a-z]+\])?==)[^"]*"', rf'\g<1>{version}"', text)


def filled(text: str, **tables: str) -> str:
    """Return the text with tables between the comments that name them."""
    for name, table in tables.items():
        start, end = f"<!-- {name} -->\n", f"<!-- /{name} -->\n"
        before, _, rest = text.partition(start)
        _, _, after = rest.partition(end)
        text = f"{before}{start}{table}{end}{after}"
    return text


def values_table() -> str:
    """Return a table of every value, its default and its comment."""
    rows = ["| value | default | meaning |", "|---|---|---|"]
    path: list[str] = []
    comment = ""
    for line in (CHART / "values.yaml").read_text().splitlines():
        bare = line.strip()
        if bare.startswith("#"):
            comment = f"{comment} {bare.removeprefix('#').strip()}".strip()
        elif match := re.fullmatch(r"( *)([A-Za-z]+):(.*)", line):
            path = [*path[: len(match[1]) // 2], match[2]]
            default = match[3].strip()
            if path[-2:-1] == ["resources"]:
                continue
            if path[-1] == "resources":
                default = "see values.yaml"
            if default:
                shown = default if default == "see values.yaml" else f"`{default}`"
                rows.append(f"| `{'.'.join(path)}` | {shown} | {comment} |")
            comment = ""
        elif not bare:
            comment = ""
    return "\n".join(rows) + "\n"


def alerts_table() -> str:
    """Return a table of the alerts and what to do about them."""
    rows = ["| alert | severity | meaning | what to do |", "|---|---|---|---|"]
    for group in yaml.safe_load((CHART / "files/rules.yaml").read_text())["groups"]:
        for rule in group["rules"]:
            notes = rule["annotations"]
            rows.append(
                f"| {rule['alert']} | {rule['labels']['severity']} | {notes['meaning']} | {notes['action']} |"
            )
    return "\n".join(rows) + "\n"


def reasons_table() -> str:
    """Return a table of the reasons that ask for something to be done."""
    rows = ["| reason | why | what to do |", "|---|---|---|"]
    rows += [
        f"| `{reason}` | {advice.meaning} | {advice.action} |"
        for reason, advice in (ADVICE | NODE_ADVICE).items()
        if advice.action
    ]
    return "\n".join(rows) + "\n"


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
