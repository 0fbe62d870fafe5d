# SPDX-License-Identifier: Apache-2.0
"""Draws the dashboards from a real run: `python tests/chart/pictures.py INPUTS` (as `make quickstart` writes them).

The operator runs on a real API server, agents train a BERT on four unequal nodes, probes report them, Prometheus
scrapes all; each panel is drawn from the answers to its own queries.
"""

import json
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import yaml
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle

from chart.hooks import token
from chart.rendering import CHART, REPOSITORY
from chart.watched import Prometheus, prometheus
from fedpipe_agent.probe.publish import Cluster as ApiServer
from kube.cluster import Cluster, free_port
from kube.controlplane import find_binaries, start_control_plane
from kube.kubelet import Process, start_process
from kube.pod_process import local_arguments
from nvml.running import running

AGENT = Path(sys.executable).with_name("fedpipe-agent")
ENVIRONMENT = {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "PATH": "/usr/bin:/bin", "TQDM_DISABLE": "1"}
SECONDS = 1500
WIDTH, HEIGHT = 0.55, 0.28
"""Inches of one of Grafana's columns and lines."""

TITLE, GAP = 0.4, 0.05
"""Inches above the panels; between a panel and its place's edge."""

DPI = 110
POINTS = 120
"""Points of a line at most, as Grafana chooses its step by the width."""

STYLE = {
    "figure.facecolor": "#f4f5f5", "text.color": "#24292e", "axes.edgecolor": "#9fa7b3", "axes.labelsize": 6.5,
    "xtick.color": "#6e7783", "ytick.color": "#6e7783", "grid.color": "#e4e7eb", "axes.axisbelow": True,
    "text.hinting": "none",
}  # fmt: skip


def main(inputs: Path) -> None:
    """Run the quickstart's job and draw."""
    fleet = yaml.safe_load((inputs / "fleet.yaml").read_text())
    job = yaml.safe_load((REPOSITORY / "crds/samples/01-quickstart.yaml").read_text())
    binaries = find_binaries()
    assert binaries is not None, "no kube-apiserver on this machine"
    with tempfile.TemporaryDirectory() as temporary, ExitStack() as stack:
        directory = Path(temporary)
        (directory / "plane").mkdir()
        plane = stack.enter_context(start_control_plane(directory / "plane", binaries))
        plane.install_crds()
        cluster = Cluster(plane, "demo", directory)
        stack.callback(cluster.tear_down)
        _allow_probes(cluster)
        nodes = {cluster.add_node(node["name"]): node for node in fleet["nodes"]}
        for name, node in nodes.items():
            keep = {key: value for key, value in node.items() if key not in ("name", "data", "labels")}
            (directory / f"{name}.json").write_text(json.dumps(keep))

        def start(pod: dict[str, Any], folder: Path) -> Process:
            name = pod["metadata"]["annotations"]["fedpipe.io/node"]
            paths = {"/model": fleet["model"], "/data": str((inputs / nodes[name]["data"]).resolve())}
            arguments = [*local_arguments(pod, folder, paths), "--capacity", str(directory / f"{name}.json")]
            return start_process([str(AGENT), "train", *arguments], folder, ENVIRONMENT)

        cluster.start_kubelet(start)
        cluster.start_operator()
        operator = {f"127.0.0.1:{cluster.metrics_port}": cluster.token(cluster.own, "prometheus")}
        targets = []
        for name in nodes:
            targets.append(stack.enter_context(_probe(cluster, name, directory / f"{name}.json")))
        watched = stack.enter_context(prometheus(directory, targets, operator))
        began = time.time()
        spec = job["spec"]
        spec["model"]["hostPath"] = {"path": "/srv/model"}
        del spec["model"]["huggingFace"]
        cluster.submit("quickstart", **spec)
        cluster.wait(
            "the job's end",
            lambda: cluster.status("quickstart").get("phase") in ("Succeeded", "Failed"),
            SECONDS,
        )
        print(
            json.dumps(cluster.status("quickstart").get("metric")),
            cluster.condition("Complete", "quickstart"),
        )
        time.sleep(5)
        for path in sorted((CHART / "dashboards").glob("*.json")):
            draw(json.loads(path.read_text()), watched, began, time.time(), path.with_suffix(".png"))


def _allow_probes(cluster: Cluster) -> None:
    """Give the probes' ServiceAccount its rights."""
    cluster.create(
        f"/api/v1/namespaces/{cluster.own}/serviceaccounts", {"metadata": {"name": "fedpipe-probe"}}
    )
    text = (REPOSITORY / "tests/nvml/admission.yaml").read_text().replace("default", cluster.own)
    rbac = "/apis/rbac.authorization.k8s.io/v1"
    for document in yaml.safe_load_all(text):
        if document["kind"].startswith("ClusterRole"):
            cluster.create(f"{rbac}/{document['kind'].lower()}s", document)


@contextmanager
def _probe(cluster: Cluster, node: str, capacity: Path) -> Iterator[str]:
    """Run the real probe of a node with its real token; yield where it serves its metrics."""
    pods = f"/api/v1/namespaces/{cluster.own}/pods"
    container = {"name": "probe", "image": "probe"}
    spec = {"nodeName": node, "serviceAccountName": "fedpipe-probe", "containers": [container]}
    uid = cluster.create(pods, {"metadata": {"name": f"probe-{node}"}, "spec": spec})["metadata"]["uid"]
    folder = cluster.directory / f"probe-{node}"
    folder.mkdir()
    (folder / "token").write_text(
        token(cluster.plane, cluster.own, "fedpipe-probe", name=f"probe-{node}", uid=uid)
    )
    port = free_port()
    server = ApiServer(cluster.plane.url, folder / "token", cluster.plane.ca)
    arguments = [
        "--capacity",
        str(capacity),
        "--interval",
        "5s",
        "--heartbeat",
        "20s",
        "--cache",
        str(folder),
    ]
    with running(server, {**ENVIRONMENT}, *arguments, port=port):
        yield f"127.0.0.1:{port}"


def draw(dashboard: dict[str, Any], watched: Prometheus, start: float, end: float, path: Path) -> None:
    """Draw every panel of a dashboard where Grafana would put it."""
    places = [panel["gridPos"] for panel in dashboard["panels"]]
    height = max(place["y"] + place["h"] for place in places)
    wide, high = 24 * WIDTH, height * HEIGHT + TITLE
    with plt.rc_context(STYLE):
        figure = plt.figure(figsize=(wide, high), dpi=DPI)
        figure.text(
            0.1 / wide, 1 - TITLE / 2 / high, dashboard["title"], fontsize=11, weight="bold", va="center"
        )
        for panel in dashboard["panels"]:
            place = panel["gridPos"]
            left, bottom = place["x"] * WIDTH, (height - place["y"] - place["h"]) * HEIGHT
            axes = _frame(figure, left, bottom, place["w"] * WIDTH, place["h"] * HEIGHT, panel["title"])
            {"timeseries": _lines, "stat": _stat, "table": _table}[panel["type"]](
                axes, panel, watched, start, end
            )
        figure.savefig(path)
        plt.close(figure)


def _frame(figure: Figure, left: float, bottom: float, wide: float, high: float, title: str) -> Axes:
    """Draw a panel's frame, in inches from the lower left; return the axes of its whole inside."""
    total_wide, total_high = figure.get_size_inches()
    box = (left + GAP) / total_wide, (bottom + GAP) / total_high
    size = (wide - 2 * GAP) / total_wide, (high - 2 * GAP) / total_high
    figure.add_artist(Rectangle(box, *size, facecolor="white", edgecolor="#d8d9da", linewidth=0.6, zorder=-1))
    top = (bottom + high - GAP - 0.17) / total_high
    figure.text((left + 0.13) / total_wide, top, title, fontsize=8, weight="bold", va="center")
    inside = (
        (left + 0.45) / total_wide,
        (bottom + 0.3) / total_high,
        (wide - 0.6) / total_wide,
        (high - 0.66) / total_high,
    )
    axes = figure.add_axes(inside)
    axes.set_facecolor("white")
    return axes


def _shrink(axes: Axes, below: float, left: float = 0.0) -> None:
    """Move an axes' lower edge up and its left edge by inches."""
    wide, high = axes.figure.get_size_inches()
    box = axes.get_position()
    axes.set_position(
        (box.x0 + left / wide, box.y0 + below / high, box.width - left / wide, box.height - below / high)
    )


def _filled(target: dict[str, Any], rate: str) -> str:
    text = target["expr"].replace("$namespace", ".*").replace("$job", ".*")
    return text.replace("$__rate_interval", rate)


def _legend(target: dict[str, Any], metric: dict[str, str]) -> str:
    if target["legendFormat"] == "__auto":
        return ""
    text = re.sub(r"{{(\w+)}}", lambda m: metric.get(m[1], ""), target["legendFormat"])
    return text.replace("demo-", "")


def _scaled(unit: str, top: float) -> tuple[float, str]:
    if unit in ("bytes", "Bps"):
        for size, name in ((2**30, "GiB"), (2**20, "MiB"), (2**10, "KiB")):
            if top >= size:
                return size, name + ("/s" if unit == "Bps" else "")
    return {"percentunit": (0.01, "%"), "s": (1, "s")}.get(unit, (1, ""))


def _lines(axes: Axes, panel: dict[str, Any], watched: Prometheus, start: float, end: float) -> None:
    series = []
    step = max(2.0, (end - start) / POINTS)
    for target in panel["targets"]:
        for found in watched.query_range(_filled(target, "20s"), start, end, step):
            points = [(float(t) - start, float(v)) for t, v in found["values"] if v != "NaN"]
            series.append((_legend(target, found["metric"]), points))
    values = [value for _, points in series for _, value in points]
    scale, unit = _scaled(panel["fieldConfig"]["defaults"]["unit"], max(map(abs, values), default=0))
    stacked = panel["fieldConfig"]["defaults"]["custom"]["stacking"]["mode"] == "normal"
    below: dict[float, float] = {}
    series = sorted(series)[:12]
    for number, (name, points) in enumerate(series):
        times = [t / 60 for t, _ in points]
        heights = [v / scale + (below.get(t, 0.0) if stacked else 0.0) for t, v in points]
        if stacked:
            bottoms = [below.get(t, 0.0) for t, _ in points]
            axes.fill_between(times, bottoms, heights, step="post", alpha=0.25, color=f"C{number}")
            below |= {t: h for (t, _), h in zip(points, heights, strict=True)}
        axes.step(times, heights, where="post", linewidth=1, label=name, color=f"C{number % 10}",
                  linestyle="--" if "predicted" in name else "-")  # fmt: skip
    axes.set_xlim(0, (end - start) / 60)
    if "min" in panel["fieldConfig"]["defaults"]:
        axes.set_ylim(bottom=0)
    axes.tick_params(labelsize=6.5, length=2, pad=1.5, width=0.5)
    axes.xaxis.set_major_formatter("{x:g} min")
    axes.yaxis.set_major_formatter(f"{{x:g}} {unit}".strip())
    if len(unit) > 2:
        _shrink(axes, 0, left=0.2)
    axes.grid(linewidth=0.5)
    axes.spines[["top", "right", "left"]].set_visible(False)
    if not values:
        axes.text(0.5, 0.5, "none", transform=axes.transAxes, ha="center", color="gray", fontsize=8)
    elif any(name for name, _ in series):
        _legend_below(axes, [name for name, _ in series])


def _legend_below(axes: Axes, names: list[str]) -> None:
    """Put the legend under the plot, in as many columns as it is wide enough for."""
    wide, high = axes.figure.get_size_inches()
    box = axes.get_position()
    columns = max(1, int(box.width * wide / (0.33 + 0.06 * max(map(len, names)))))
    rows = -(-len(names) // columns)
    _shrink(axes, 0.14 * rows)
    drop = -0.2 / (axes.get_position().height * high)
    axes.legend(fontsize=6.5, loc="upper left", bbox_to_anchor=(-0.01, drop), frameon=False, ncols=columns,
                handlelength=1.2, columnspacing=1.2, labelspacing=0.25, borderpad=0, borderaxespad=0)  # fmt: skip


def _stat(axes: Axes, panel: dict[str, Any], watched: Prometheus, start: float, end: float) -> None:
    axes.axis("off")
    parts = []
    for target in panel["targets"]:
        # Grafana shows the last value that is not null.
        for found in watched.query(f"last_over_time(({_filled(target, '20s')})[10m:2s])", end):
            value = float(found["value"][1])
            fresh = watched.query(_filled(target, "20s"), end)
            name = _legend(target, found["metric"])
            if panel["options"]["textMode"] == "name" or "{{phase}}" in target["legendFormat"]:
                if any(now["metric"] == found["metric"] for now in fresh):
                    parts.append(name if panel["options"]["textMode"] == "name" else f"{name} {value:.0f}")
                continue
            scale, unit = _scaled(panel["fieldConfig"]["defaults"]["unit"], value)
            label = "" if "{{job}}" in target["legendFormat"] else name
            parts.append(f"{label} {value / scale:.3g} {unit}".strip())
    _shrink(axes, 0, left=-0.3)
    axes.text(0.0, 0.4, "\n".join(parts) or "none", fontsize=13 if len(parts) < 2 else 9, va="center")


def _table(axes: Axes, panel: dict[str, Any], watched: Prometheus, start: float, end: float) -> None:
    axes.axis("off")
    [organize] = [t["options"] for t in panel["transformations"] if t["id"] == "organize"]
    rows: dict[tuple[tuple[str, str], ...], dict[str, str]] = {}
    heights: dict[tuple[tuple[str, str], ...], float] = {}
    names = []
    for target in panel["targets"]:
        names.append(target["legendFormat"])
        for found in watched.query(_filled(target, "20s"), end):
            labels = {k: v.replace("demo-", "") for k, v in found["metric"].items()
                      if k not in organize["excludeByName"]}  # fmt: skip
            value = float(found["value"][1])
            scale, unit = _scaled(panel["fieldConfig"]["defaults"]["unit"], value)
            key = next(
                (known for known in rows if set(labels.items()) <= set(known)), tuple(sorted(labels.items()))
            )
            rows.setdefault(key, {})[target["legendFormat"]] = f"{value / scale:.3g} {unit}".strip()
            heights.setdefault(key, -value)
    labels = list(dict.fromkeys(name for key in rows for name, _ in key))
    # Several queries: by node; one: what counts most comes first.
    order = sorted(rows, key=lambda key: (heights[key] if len(names) == 1 else 0.0, key))
    _grid(axes, [*labels, *names],
          [[dict(key).get(name, "–") for name in labels] + [rows[key].get(name, "–") for name in names]
           for key in order])  # fmt: skip


def _grid(axes: Axes, head: list[str], rows: list[list[str]]) -> None:
    """Draw as many rows of a table as the panel has room for, each column as wide as its longest cell."""
    _shrink(axes, 0, left=-0.3)
    if not rows:
        axes.text(0.5, 0.5, "none", ha="center", color="gray", fontsize=8)
        return
    wide, high = axes.figure.get_size_inches()
    box = axes.get_position()
    line = 0.17 / (box.height * high)
    at = 0.0
    for column in zip(head, *rows, strict=True):
        for number, text in enumerate(column[: int(1 / line)]):
            height = 1 - (number + 0.5) * line
            weight, colour = ("bold", "#6e7783") if number == 0 else ("normal", "#24292e")
            axes.text(at, height, text, fontsize=6.8, va="center", weight=weight, color=colour)
            axes.axhline(height - line / 2, color="#e4e7eb", linewidth=0.5)
        at += (0.2 + 0.058 * max(map(len, column))) / (box.width * wide)
    axes.set(xlim=(0, 1), ylim=(0, 1))


if __name__ == "__main__":
    if len(sys.argv) == 1:
        folder = Path("runs/quickstart-inputs")
        subprocess.run([sys.executable, "-m", "fedpipe_operator.local.quickstart", folder], check=True)
    main(Path(sys.argv[1]) if len(sys.argv) > 1 else folder)
