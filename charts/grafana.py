# SPDX-License-Identifier: Apache-2.0
"""Grafana's form of a dashboard, made from its panels."""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

Document = dict[str, Any]

SCHEMA_VERSION = 41
"""Of Grafana 12; Grafana migrates older and newer forms by itself."""

COLUMNS = 24


@dataclass(frozen=True)
class Panel:
    """One panel. `queries` are pairs of PromQL and legend; a legend of a table names the column."""

    kind: str
    title: str
    queries: Sequence[tuple[str, str]]
    unit: str = "short"
    width: int = 8
    height: int = 8
    text: str = ""
    stacked: bool = False
    low: float | None = None
    hide: Sequence[str] = ()
    """Columns of a table that say nothing."""
    names: bool = False
    """A stat shows which series there are, not their values."""


def dashboard(name: str, panels: Sequence[Panel]) -> Document:
    """Return the form of a dashboard, whose uid never changes."""
    return {
        "uid": f"fedpipe-{name}",
        "title": f"FedPipe / {name.capitalize()}",
        "tags": ["fedpipe"],
        "schemaVersion": SCHEMA_VERSION,
        "version": 1,
        "editable": True,
        "graphTooltip": 1,
        "refresh": "30s",
        "time": {"from": "now-3h", "to": "now"},
        "timezone": "browser",
        "templating": {"list": _variables()},
        "links": [
            {
                "type": "dashboards",
                "title": "FedPipe",
                "tags": ["fedpipe"],
                "asDropdown": True,
                "keepTime": True,
                "includeVars": True,
            }
        ],
        "annotations": {"list": []},
        "panels": _placed(panels),
    }


def _variables() -> list[Document]:
    def query(name: str, text: str) -> Document:
        return {
            "name": name,
            "type": "query",
            "datasource": _SOURCE,
            "query": {"query": text, "refId": name},
            "definition": text,
            "refresh": 2,
            "sort": 1,
            "multi": True,
            "includeAll": True,
            "current": {"text": ["All"], "value": ["$__all"]},
        }

    source = {"name": "datasource", "label": "Data source", "type": "datasource", "query": "prometheus"}
    return [
        source | {"current": {}},
        query("namespace", "label_values(fedpipe_job_info, namespace)"),
        query("job", 'label_values(fedpipe_job_info{namespace=~"$namespace"}, job)'),
    ]


_SOURCE = {"type": "prometheus", "uid": "${datasource}"}


def _placed(panels: Sequence[Panel]) -> list[Document]:
    """Return the panels' form, laid out in lines of 24 columns."""
    found, x, y, height = [], 0, 0, 0
    for number, panel in enumerate(panels, 1):
        if x + panel.width > COLUMNS:
            x, y, height = 0, y + height, 0
        place = {"x": x, "y": y, "w": panel.width, "h": panel.height}
        found.append({"id": number, "gridPos": place} | _form(panel))
        x, height = x + panel.width, max(height, panel.height)
    return found


def _form(panel: Panel) -> Document:
    instant = panel.kind == "table"
    targets = [
        {
            "refId": chr(ord("A") + number),
            "datasource": _SOURCE,
            "expr": expression,
            "legendFormat": legend or "__auto",
            "range": not instant,
            "instant": instant,
            "format": "table" if instant else "time_series",
        }
        for number, (expression, legend) in enumerate(panel.queries)
    ]
    defaults: Document = {"unit": panel.unit}
    if panel.low is not None:
        defaults["min"] = panel.low
    form: Document = {
        "type": panel.kind,
        "title": panel.title,
        "datasource": _SOURCE,
        "targets": targets,
        "fieldConfig": {"defaults": defaults, "overrides": []},
    }
    if panel.text:
        form["description"] = panel.text
    return form | {"timeseries": _timeseries, "stat": _stat, "table": _table}[panel.kind](panel, defaults)


def _timeseries(panel: Panel, defaults: Document) -> Document:
    defaults["custom"] = {
        "drawStyle": "line",
        "lineInterpolation": "stepAfter",
        "fillOpacity": 20 if panel.stacked else 0,
        "showPoints": "never",
        "stacking": {"mode": "normal" if panel.stacked else "none", "group": "A"},
    }
    legend = {"displayMode": "table", "placement": "bottom", "showLegend": True, "calcs": ["lastNotNull"]}
    return {"options": {"legend": legend, "tooltip": {"mode": "multi", "sort": "desc"}}}


def _stat(panel: Panel, defaults: Document) -> Document:
    return {
        "options": {
            "reduceOptions": {"calcs": ["lastNotNull"], "fields": "", "values": False},
            "textMode": "name" if panel.names else "auto",
            "colorMode": "none",
            "graphMode": "none",
        }
    }


def _table(panel: Panel, defaults: Document) -> Document:
    single = len(panel.queries) == 1
    names = {"Value": panel.queries[0][1]} if single else {}
    names |= {f"Value #{chr(ord('A') + number)}": name for number, (_, name) in enumerate(panel.queries)}
    organize = {
        "id": "organize",
        "options": {
            "excludeByName": dict.fromkeys(["Time", "__name__", "instance", *panel.hide], True),
            "renameByName": names,
        },
    }
    return {
        "options": {"showHeader": True, "cellHeight": "sm"},
        "transformations": [organize] if single else [{"id": "merge", "options": {}}, organize],
    }


def text(name: str, panels: Sequence[Panel]) -> str:
    """Return a dashboard as the file to write."""
    return json.dumps(dashboard(name, panels), indent=1) + "\n"
