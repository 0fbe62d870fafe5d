# SPDX-License-Identifier: Apache-2.0
"""Before an uninstall: stop the operator, take away what it made, take its finalizer off every job.

Arguments: namespace and name of the operator's Deployment; comma list of the jobs' namespaces (empty: all);
the Secret of the operator's own certificate (empty: it has none). Jobs stay. Every step may be done twice.
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


namespace, operator, jobs_in, secret = sys.argv[1:]
call("PATCH", f"/apis/apps/v1/namespaces/{namespace}/deployments/{operator}/scale", {"spec": {"replicas": 0}})
pods = f"/api/v1/namespaces/{namespace}/pods" + labelled(
    f"app.kubernetes.io/component=operator,app.kubernetes.io/instance={os.environ['RELEASE']}"
)
end = time.monotonic() + STOP_SECONDS
while call("GET", pods).get("items"):
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
print("the operator is stopped, agents are deleted, jobs carry no finalizer of FedPipe")  # noqa: T201
