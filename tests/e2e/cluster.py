# SPDX-License-Identifier: Apache-2.0
"""The whole of FedPipe on the cluster that KUBECONFIG names: `make e2e`, or `python tests/e2e/cluster.py --help`.

Installs the chart, writes a tiny model and private sentences onto each node, trains over all of them with an
upgrade in between, downloads the adapter, reads the metrics, rolls back, uninstalls, and looks at what is left.
Needs kubectl, rights of an administrator, nodes that can get the three images, and namespaces that may use hostPath.
"""

import argparse
import json
import ssl
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import helm_python
from safetensors.numpy import load

REPOSITORY = Path(__file__).resolve().parents[2]
CHART = REPOSITORY / "charts/fedpipe"
RELEASE, SYSTEM, JOBS = "fedpipe", "fedpipe-e2e-system", "fedpipe-e2e-jobs"
READER = "default"
"""ServiceAccount of the release's namespace that reads metrics."""

FEDPIPE = Path(sys.executable).with_name("fedpipe")
ON_NODE = "/var/tmp/fedpipe-e2e"
ROUNDS = 10
LABELS = ["sea", "town", "wood"]
LEFT = {"customresourcedefinitions", "persistentvolumeclaims"}
"""What an uninstall leaves by the chart's defaults."""


class Failed(Exception):
    """What is not as it should be."""


def kubectl(*arguments: str, stdin: str | None = None) -> Any:
    """Run kubectl; return its output, parsed where it is JSON."""
    done = subprocess.run(
        ["kubectl", *arguments], input=stdin and stdin.encode(), capture_output=True, check=False
    )
    if done.returncode:
        raise Failed(f"kubectl {' '.join(arguments)}: {done.stderr.decode().strip()}")
    text = done.stdout.decode()
    return json.loads(text) if "-o=json" in arguments else text


def apply(*documents: dict[str, Any]) -> None:
    """Apply objects."""
    kubectl("apply", "-f", "-", stdin=json.dumps({"apiVersion": "v1", "kind": "List", "items": documents}))


def get(*what: str) -> Any:
    """Return objects."""
    return kubectl("get", *what, "-o=json")


def wait(what: str, holds: Callable[[], Any], seconds: float) -> Any:
    """Wait until something holds; return it."""
    until = time.monotonic() + seconds
    while not (found := holds()):
        if time.monotonic() > until:
            raise Failed(f"{what}: not within {seconds:.0f} s")
        time.sleep(1)
    return found


def say(text: str) -> None:
    """Print how far it is."""
    print(f"{time.strftime('%H:%M:%S')} {text}", flush=True)


def values(options: argparse.Namespace) -> dict[str, Any]:
    """Return the chart's values for this run."""

    def image(name: str) -> dict[str, str]:
        return {"repository": f"{options.images}/{name}", "tag": options.tag}

    return {
        "namespaces": [JOBS],
        "operator": {"image": image("operator")},
        "probe": {"image": image("probe"), "intervalSeconds": 5},
        "agent": {"image": image("agent")},
        "metrics": {"readers": [{"namespace": SYSTEM, "name": READER}]},
        "persistence": {"enabled": options.persistence, "size": "1Gi"},
    }


def schedulable() -> list[str]:
    """Return the names of the nodes that Pods may run on."""
    found = []
    for node in get("nodes")["items"]:
        taints = [t for t in node["spec"].get("taints", []) if t["effect"] != "PreferNoSchedule"]
        if not taints and not node["spec"].get("unschedulable"):
            found.append(node["metadata"]["name"])
    return found


def ready_nodes() -> list[str]:
    """Return the names of the FedPipeNodes that are Ready."""
    found = []
    for node in get("fedpipenodes")["items"]:
        conditions = {c["type"]: c["status"] for c in node.get("status", {}).get("conditions", [])}
        if conditions.get("Ready") == "True":
            found.append(node["metadata"]["name"])
    return found


def on_each_node(nodes: list[str], name: str, image: str, command: list[str]) -> None:
    """Run a command on every node with the nodes' directory at /node, and wait for its end."""
    for number, node in enumerate(nodes):
        container = {
            "name": name, "image": image, "imagePullPolicy": "IfNotPresent",
            "command": [part.replace("{node}", node) for part in command],
            "env": [{"name": "HOME", "value": "/tmp"}],
            "securityContext": {"runAsUser": 0}, "volumeMounts": [{"name": "node", "mountPath": "/node"}],
        }  # fmt: skip
        volume = {"name": "node", "hostPath": {"path": ON_NODE, "type": "DirectoryOrCreate"}}
        spec = {"nodeName": node, "restartPolicy": "Never", "containers": [container], "volumes": [volume]}
        apply({"apiVersion": "v1", "kind": "Pod", "metadata": {"name": f"{name}-{number}", "namespace": JOBS},
               "spec": spec})  # fmt: skip

    def done() -> bool:
        pods = [get("pod", f"{name}-{number}", f"-n={JOBS}") for number in range(len(nodes))]
        for pod in pods:
            if pod["status"]["phase"] == "Failed":
                log = kubectl("logs", pod["metadata"]["name"], f"-n={JOBS}")
                raise Failed(f"{name} on {pod['spec']['nodeName']}: {log[-2000:]}")
        return all(pod["status"]["phase"] == "Succeeded" for pod in pods)

    wait(f"{name} on every node", done, 600)
    for number in range(len(nodes)):
        kubectl("delete", "pod", f"{name}-{number}", f"-n={JOBS}", "--now")


def job(nodes: int) -> dict[str, Any]:
    """Return the job: every node's sentences, a tiny BERT, ten rounds."""
    return {
        "apiVersion": "fedpipe.io/v1alpha1",
        "kind": "FedPipeJob",
        "metadata": {"name": "e2e", "namespace": JOBS},
        "spec": {
            "model": {
                "hostPath": {"path": f"{ON_NODE}/model"},
                "task": "sequence-classification",
                "labels": LABELS,
            },
            "data": {
                "volume": {"hostPath": {"path": f"{ON_NODE}/data"}},
                "train": "train.jsonl",
                "maxLength": 32,
            },
            "nodes": {"min": nodes},
            "rounds": {"count": ROUNDS, "localSteps": 30, "minUpdates": nodes, "deadline": "10m"},
            "adapter": {"ranks": {"min": 2, "max": 4}},
            "optimizer": {"learningRate": 0.01},
        },
    }


def follow(what: str, holds: Callable[[dict[str, Any]], bool]) -> dict[str, Any]:
    """Print the job's progress until something holds of its status; return the status."""
    seen = ""

    def look() -> Any:
        nonlocal seen
        status = get("fedpipejob", "e2e", f"-n={JOBS}").get("status", {})
        line = f"{status.get('phase')} {status.get('rounds', '')} {status.get('metricSummary', '')}"
        if line != seen:
            say(f"  {line} {status.get('message', '')}")
            seen = line
        if status.get("phase") == "Failed":
            raise Failed(f"the job failed: {status.get('message')}")
        return holds(status) and status

    found: dict[str, Any] = wait(what, look, 1800)
    return found


def trained(nodes: list[str]) -> None:
    """Wait for the job's success and check what it says of itself."""
    status = follow("the job's success", lambda status: status.get("phase") == "Succeeded")
    check(status["round"] == ROUNDS, f"{status['round']} of {ROUNDS} rounds")
    check({entry["name"] for entry in status["nodeTable"]} == set(nodes), "the nodes' table")
    losses = [entry["loss"] for entry in status["history"] if "loss" in entry]
    check(losses[-1] < 0.8 * losses[0], f"the loss falls: {losses}")
    complete = next(c for c in status["conditions"] if c["type"] == "Complete")
    check((complete["status"], complete["reason"]) == ("True", "RoundsCompleted"), f"{complete}")


def check(holds: bool, what: str) -> None:
    """Raise Failed unless it holds."""
    if not holds:
        raise Failed(what)


def adapter_and_metrics() -> None:
    """Download the adapter through the API server's proxy, and read the metrics as Prometheus does."""
    with tempfile.TemporaryDirectory() as temporary:
        adapter = Path(temporary) / "adapter"
        command = [FEDPIPE, "get", "adapter", "e2e", f"--namespace={JOBS}", f"--out={adapter}"]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        check(done.returncode == 0, f"fedpipe get adapter: {done.stderr}")
        names = {path.name for path in adapter.iterdir()}
        check({"adapter_config.json", "adapter_model.safetensors"} <= names, f"the adapter's files: {names}")
        weights = load((adapter / "adapter_model.safetensors").read_bytes())
    check(any(".lora_A." in name for name in weights), f"the adapter's tensors: {sorted(weights)[:3]}")
    metrics = scraped(kubectl("create", "token", READER, f"-n={SYSTEM}").strip())
    for name in (
        "fedpipe_job_loss",
        "fedpipe_round_relative_error",
        "fedpipe_operator_reconcile_seconds_count",
    ):
        check(name in metrics, f"metric {name}")


def scraped(token: str) -> str:
    """Return what the operator answers to a ServiceAccount's token, through a forwarded port."""
    command = ["kubectl", "port-forward", f"-n={SYSTEM}", f"service/{RELEASE}-metrics", ":8444"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as forward:
        try:
            # "Forwarding from 127.0.0.1:PORT -> 8444"
            port = forward.stdout.readline().split(" -> ")[0].rpartition(":")[2]
            request = urllib.request.Request(
                f"https://127.0.0.1:{port}/metrics", headers={"Authorization": f"Bearer {token}"}
            )
            context = ssl._create_unverified_context()
            with urllib.request.urlopen(request, timeout=30, context=context) as answer:
                return answer.read().decode()
        except OSError as error:
            raise Failed(f"metrics: {error}") from None
        finally:
            forward.terminate()


def left_over() -> set[str]:
    """Return every kind and name of FedPipe's in the cluster."""
    found = set()
    labels = f"app.kubernetes.io/instance={RELEASE},app.kubernetes.io/name=fedpipe"
    kinds = kubectl("api-resources", "--verbs=list,delete", "-o=name").split()
    for kind in kinds:
        for item in kubectl("get", kind, "-A", f"-l={labels}", "-o=name", "--ignore-not-found").split():
            found.add(f"{kind.split('.')[0]} {item.rsplit('/', 1)[1]}")
    for kind in ("secrets", "configmaps"):
        for item in kubectl("get", kind, "-A", "-o=name").split():
            if item.rsplit("/", 1)[1] in ("fedpipe-tls", "fedpipe-ca"):
                found.add(f"{kind} {item.rsplit('/', 1)[1]}")
    for item in kubectl("get", "customresourcedefinitions", "-o=name").split():
        if item.endswith(".fedpipe.io"):
            found.add(f"customresourcedefinitions {item.rsplit('/', 1)[1]}")
    return found


@contextmanager
def cleaned(nodes: list[str], options: argparse.Namespace) -> Iterator[None]:
    """Take away whatever the block leaves, also when it fails."""
    try:
        yield
    except (Failed, helm_python.HelmError):
        for text in (
            ("get", "pods", "-A", "-o=wide"),
            ("logs", f"deployment/{RELEASE}-operator", f"-n={SYSTEM}"),
        ):
            print(
                subprocess.run(["kubectl", *text], capture_output=True, text=True, check=False).stdout[-6000:]
            )
        raise
    finally:
        if not options.keep:
            say("cleaning up")
            with helm_python.Config(namespace=SYSTEM) as helm:
                helm.uninstall(RELEASE, ignore_not_found=True, timeout=300)
            for definition in ("fedpipejobs.fedpipe.io", "fedpipenodes.fedpipe.io"):
                kubectl(
                    "delete", "customresourcedefinition", definition, "--ignore-not-found", "--timeout=60s"
                )
            agent = f"{options.images}/agent:{options.tag}"
            on_each_node(nodes, "sweep", agent, ["sh", "-c", "rm -rf /node/model /node/data"])
            kubectl("delete", "namespace", JOBS, SYSTEM, "--ignore-not-found")


def run(options: argparse.Namespace) -> None:
    """Do everything."""
    there = left_over()
    check(not there, f"the cluster has a FedPipe already: {sorted(there)}")
    nodes = schedulable()
    check(bool(nodes), "no node that Pods may run on")
    say(f"{len(nodes)} nodes: {', '.join(nodes)}")
    for name in (SYSTEM, JOBS):
        policy = "privileged" if name == JOBS else "restricted"
        labels = {"pod-security.kubernetes.io/enforce": policy}
        apply({"apiVersion": "v1", "kind": "Namespace", "metadata": {"name": name, "labels": labels}})
    with cleaned(nodes, options), helm_python.Config(namespace=SYSTEM) as helm:
        say("helm install")
        given = values(options)
        helm.install(CHART, RELEASE, given, wait="watcher", timeout=600)
        wait("a Ready FedPipeNode for every node", lambda: set(nodes) <= set(ready_nodes()), 120)
        print(kubectl("get", "fedpipenodes"), end="")
        helm.test(RELEASE, timeout=300)
        say("smoke test passed")
        seed = Path(__file__).with_name("cluster_seed.py").read_text()
        agent = f"{options.images}/agent:{options.tag}"
        on_each_node(nodes, "seed", agent, ["python", "-c", seed, "/node", "{node}"])
        say("model and data are on every node")
        apply(job(len(nodes)))
        if options.persistence:
            # A new Pod of the operator must find everything in its store, and the agents must find it.
            follow("the first round", lambda status: status.get("round", 0) > 0)
            changed = given["operator"] | {"podAnnotations": {"fedpipe-e2e": "upgraded"}}
            helm.upgrade(CHART, RELEASE, given | {"operator": changed}, wait="watcher", timeout=300)
            say("upgraded while the job trains")
        trained(nodes)
        print(kubectl("get", "fedpipejobs", f"-n={JOBS}"), end="")
        adapter_and_metrics()
        say("adapter and metrics are there")
        if options.persistence:
            helm.rollback(RELEASE, wait="watcher", timeout=300)
            adapter_and_metrics()
            say("the rollback kept job and adapter")
        helm.uninstall(RELEASE, wait="watcher", timeout=300)
        wait("agents' end", lambda: not get("pods", f"-n={JOBS}")["items"], 120)
        left = left_over()
        kinds = {thing.split()[0] for thing in left}
        check(kinds <= LEFT, f"the uninstall left {sorted(left)}")
        check(get("fedpipejob", "e2e", f"-n={JOBS}")["status"]["phase"] == "Succeeded", "the job is kept")
        say(f"uninstalled; kept: {', '.join(sorted(left))}")


def main() -> int:
    """Read the options; return the exit status."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--images", default="fedpipe", help="what stands before /operator, /probe and /agent")
    parser.add_argument("--tag", default="0.1.0", help="tag of the images")
    parser.add_argument(
        "--no-persistence", dest="persistence", action="store_false", help="for clusters without storage"
    )
    parser.add_argument("--keep", action="store_true", help="leave everything for a look")
    options = parser.parse_args()
    try:
        run(options)
    except (Failed, helm_python.HelmError) as error:
        print(f"e2e: {error}", file=sys.stderr)
        return 1
    say("passed")
    return 0


if __name__ == "__main__":
    sys.exit(main())
