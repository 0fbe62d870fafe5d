# SPDX-License-Identifier: Apache-2.0
"""Before an uninstall: stop operator and probe, take away what they made, take the finalizer off every job.

FedPipeNodes and jobs stay; the nodes say that nobody looks at them any more. Every step may be done twice.
Arguments: namespace and name of the operator's Deployment; comma list of the jobs' namespaces (empty: all);
the Secret of the operator's own certificate (empty: it has none); comma list of the probe's DaemonSets
(empty: there is no probe).
"""

import json
import os
import ssl
import sys
import time
import urllib.error
import urllib.parse
import urllib.request

ACCOUNT = "/var/run/secrets/kubernetes.io/serviceaccount"
FINALIZER = "fedpipe.io/finalizer"
STOP_SECONDS = 120
PROBE_SECONDS = 20
"""Most probes end sooner; one whose node is away ends when that is back, and holds up nothing."""

with open(f"{ACCOUNT}/token") as file:
    TOKEN = file.read().strip()
TLS = ssl.create_default_context(cafile=f"{ACCOUNT}/ca.crt")
HOST = f"https://{os.environ['KUBERNETES_SERVICE_HOST']}:{os.environ['KUBERNETES_SERVICE_PORT']}"


def call(method, path, patch=None):
    """Return the API's answer, or {} for what is gone already."""
    headers = {"Authorization": f"Bearer {TOKEN}", "Content-Type": "application/merge-patch+json"}
    body = None if patch is None else json.dumps(patch).encode()
    request = urllib.request.Request(HOST + path, body, headers, method=method)  # noqa: S310
    try:
        with urllib.request.urlopen(request, timeout=30, context=TLS) as answer:  # noqa: S310
            return json.load(answer)
    except urllib.error.HTTPError as error:
        if error.code == 404:
            return {}
        raise SystemExit(f"{method} {path}: {error.code} {error.read(500).decode()}") from None


def labelled(selector):
    """Return the query of a label selector."""
    return "?labelSelector=" + urllib.parse.quote(selector)


def pods_of(component):
    """Return the release's Pods of a component."""
    selector = f"app.kubernetes.io/component={component},app.kubernetes.io/instance={os.environ['RELEASE']}"
    return call("GET", f"/api/v1/namespaces/{namespace}/pods" + labelled(selector)).get("items", [])


def forget_nodes():
    """Set Ready to Unknown: what the last report said is no longer checked by anything."""
    now = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())
    unknown = {
        "type": "Ready", "status": "Unknown", "reason": "ProbeUninstalled", "lastTransitionTime": now,
        "message": "the probe was uninstalled; nobody looks at this node",
    }  # fmt: skip
    for node in call("GET", "/apis/fedpipe.io/v1alpha1/fedpipenodes").get("items", []):
        conditions = node.get("status", {}).get("conditions", [])
        if any(one["type"] == "Ready" and one["status"] != "Unknown" for one in conditions):
            rest = [one for one in conditions if one["type"] != "Ready"]
            path = f"/apis/fedpipe.io/v1alpha1/fedpipenodes/{node['metadata']['name']}/status"
            call("PATCH", path, {"status": {"conditions": [unknown, *rest]}})


namespace, operator, jobs_in, secret, probes = sys.argv[1:]
call("PATCH", f"/apis/apps/v1/namespaces/{namespace}/deployments/{operator}/scale", {"spec": {"replicas": 0}})
for probe in filter(None, probes.split(",")):
    call("DELETE", f"/apis/apps/v1/namespaces/{namespace}/daemonsets/{probe}")
end = time.monotonic() + STOP_SECONDS
while pods_of("operator"):
    if time.monotonic() > end:
        sys.exit(f"the operator's Pod did not stop within {STOP_SECONDS} s")
    time.sleep(1)

for place in [f"/namespaces/{name}" for name in jobs_in.split(",") if name] or [""]:
    for pod in call("GET", f"/api/v1{place}/pods" + labelled("fedpipe.io/job")).get("items", []):
        meta = pod["metadata"]
        call("DELETE", f"/api/v1/namespaces/{meta['namespace']}/pods/{meta['name']}")
    for job in call("GET", f"/apis/fedpipe.io/v1alpha1{place}/fedpipejobs").get("items", []):
        meta = job["metadata"]
        rest = [name for name in meta.get("finalizers", []) if name != FINALIZER]
        if rest != meta.get("finalizers", []):
            path = f"/apis/fedpipe.io/v1alpha1/namespaces/{meta['namespace']}/fedpipejobs/{meta['name']}"
            # The version makes a finalizer that somebody else just added a conflict, not a loss.
            version = meta["resourceVersion"]
            call("PATCH", path, {"metadata": {"finalizers": rest, "resourceVersion": version}})
    authorities = call("GET", f"/api/v1{place}/configmaps?fieldSelector=metadata.name%3Dfedpipe-ca")
    for found in authorities.get("items", []):
        call("DELETE", f"/api/v1/namespaces/{found['metadata']['namespace']}/configmaps/fedpipe-ca")
if secret:
    call("DELETE", f"/api/v1/namespaces/{namespace}/secrets/{secret}")
if probes:
    end = time.monotonic() + PROBE_SECONDS
    while pods_of("probe") and time.monotonic() < end:
        time.sleep(1)
    forget_nodes()
print("the operator is stopped, agents are deleted, jobs carry no finalizer of FedPipe")  # noqa: T201
