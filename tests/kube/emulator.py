# SPDX-License-Identifier: Apache-2.0
"""The API server for machines without one: kmock's emulator over HTTPS, and the little that it lacks.

kmock brings the objects, the discovery, the reads, the patches and the bus that watches hang on. Added are what the
API server puts into `metadata`, status as a subresource, graceful deletion, pages, watches that go on where they
broke off, tokens, and the schemas and rules of custom resources (`kube.custom`). Nothing of Kubernetes itself is
validated, nothing is collected or forbidden to anybody with a token: a test of such things says so with
`ControlPlane.needs`.
"""

import asyncio
import base64
import json
import secrets
import ssl
import sys
import threading
import time
import uuid
from collections import defaultdict
from collections.abc import AsyncIterator, Iterator
from concurrent.futures import Future
from contextlib import contextmanager
from datetime import UTC, datetime
from functools import reduce
from pathlib import Path
from typing import Any

import jsonpatch
import kmock
from aiohttp import web

from fedpipe_operator.kube.tls import load_certificate, now_utc, renew
from kube import custom

Document = dict[str, Any]
Key = tuple[kmock.resource, str | None, str]
"""An object's address: resource, namespace, name."""

AUDIENCE = "https://kubernetes.default.svc"
ACCOUNTS = kmock.resource("v1/serviceaccounts")
DEFINITIONS = kmock.resource("apiextensions.k8s.io/v1/customresourcedefinitions")
PODS = kmock.resource("v1/pods")
REVIEWS = kmock.resource("authentication.k8s.io/v1/tokenreviews")
SECRETS = kmock.resource("v1/secrets")
ACCESS_REVIEWS = kmock.resource("authorization.k8s.io/v1/subjectaccessreviews")
GRACE_SECONDS = 30
OWN = ("uid", "creationTimestamp", "generation", "resourceVersion", "namespace", "deletionTimestamp")
"""What the API server sets in `metadata` of an object that a client replaces."""
VERBS = ("get", "list", "watch", "create", "patch", "delete", "deletecollection")


class Emulator(kmock.KubernetesEmulator):
    """kmock's emulator with its own way of writing; `admin` is a token that is always good."""

    admin = ""

    def __attrs_post_init__(self) -> None:
        super().__attrs_post_init__()
        # By path, because `load_bundled` warns on Python 3.11.
        self.resources.load_path(Path(kmock.__file__).parent / "_internal" / "resources.json.gz")
        # What was put on a bus stays there: a watch may begin at any resourceVersion.
        self._buses = defaultdict(lambda: kmock.Bus(flush_threshold=sys.maxsize))
        self._version = 0
        self._tokens: dict[str, Document] = {}
        self._schemas: dict[kmock.resource, Document] = {}
        self._applied: dict[tuple[Key, str | None, str | None], Document] = {}

    async def __call__(self, raw: web.BaseRequest) -> web.StreamResponse:
        """Answer a request."""
        self._requests.clear()  # kmock keeps them for assertions
        self.errors.clear()
        if raw.path == "/api/v1/namespaces":
            # kmock 0.8 fails at this path. Nobody reads namespaces, and objects need none to be in.
            return web.json_response(await raw.json(), status=201)
        return await super().__call__(raw)

    async def _handle(self, request: kmock.Request) -> web.StreamResponse:
        token = request.headers.get("Authorization", "").removeprefix("Bearer ")
        if token != self.admin and AUDIENCE not in self._tokens.get(token, {}).get("aud", ()):
            raise kmock.KubernetesError(401, "Unauthorized", "Unauthorized")
        if request.method == "GET":
            return await super()._handle(request)
        if request.resource not in self.resources:
            raise kmock.KubernetesResourceNotFoundError
        async with self._lock:
            status, body = await self._write(request)
        return web.json_response(body, status=status)

    async def _write(self, request: kmock.Request) -> tuple[int, Document]:
        key: Key = (request.resource, request.namespace, request.name)
        match str(request.method.value), request.name, request.subresource:
            case "POST", None, None if request.resource == REVIEWS:
                return 201, request.data | {"status": self._review(request.data["spec"])}
            case "POST", None, None if request.resource == ACCESS_REVIEWS:
                return 201, request.data | {"status": {"allowed": True}}
            case "POST", None, None:
                return 201, await self._create((*key[:2], request.data["metadata"]["name"]), request)
            case "POST", _, "token":
                return 201, self._issue(key, request.data)
            case "POST", _, "binding":
                pod = self._read(key)
                spec = pod["spec"] | {"nodeName": request.data["target"]["name"]}
                return 201, await self._change(key, pod | {"spec": spec})
            case "PATCH", str(), None | "status":
                return await self._patch(key, request)
            case "PATCH", str(), "resize":
                return 200, await self._resize(key, request.data)
            case "PUT", str(), None | "status":
                return await self._update(key, request, request.data)
            case "DELETE", str(), None:
                return 200, await self._delete(key, request.data or {})
            case "DELETE", None, None:
                mine = [k for k in self.objects if k[0] == key[0] and request.namespace in (None, k[1])]
                return 200, {"items": [await self._delete(one, request.data or {}) for one in mine]}
        raise kmock.KubernetesError(405, "MethodNotAllowed", "the emulator knows no such request")

    # Writes; the lock is held.

    def _read(self, key: Key) -> Document:
        if key not in self.objects:
            raise kmock.KubernetesError(404, "NotFound", f'{key[0].plural} "{key[2]}" not found')
        return dict(self.objects[key].raw)

    async def _create(self, key: Key, request: kmock.Request) -> Document:
        resource, namespace, name = key
        body: Document = request.data
        if key in self.objects:
            raise kmock.KubernetesError(409, "AlreadyExists", f'{resource.plural} "{name}" already exists')
        own = {"name": name, "uid": str(uuid.uuid4()), "creationTimestamp": _now(), "generation": 1}
        if namespace:
            own["namespace"] = namespace
        made = self._type(resource) | _without(body, "status") | {"metadata": body["metadata"] | own}
        if resource == PODS:
            made["status"] = {"phase": "Pending"}
        if resource == SECRETS and (plain := made.pop("stringData", None)):
            encoded = {key: base64.b64encode(text.encode()).decode() for key, text in plain.items()}
            made["data"] = made.get("data", {}) | encoded
        if resource == DEFINITIONS:
            self._serve(made["spec"])
            made["status"] = {"conditions": [{"type": "Established", "status": "True"}]}
        made = self._admitted(made, None, request)
        return made if "dryRun" in request.params else await self._store("ADDED", key, made)

    def _admitted(self, new: Document, old: Document | None, request: kmock.Request) -> Document:
        """Return a custom resource as it is stored: pruned, with defaults; refuse it as its schema and rules say."""
        schema = self._schemas.get(request.resource)
        if schema is None:
            return new
        kind, name = new["kind"], new["metadata"]["name"]
        new, unknown = custom.pruned(schema, new)
        if unknown and request.params.get("fieldValidation") == "Strict":
            fields = ", ".join(f'unknown field "{field}"' for field in unknown)
            raise kmock.KubernetesError(400, "BadRequest", f"{kind}: strict decoding error: {fields}")
        custom.fill(schema, new)
        if causes := custom.causes(schema, new, old):
            message = f'{kind}.{request.resource.group} "{name}" is invalid: {", ".join(map(str, causes))}'
            details = {"name": name, "causes": [cause.to_dict() for cause in causes]}
            raise kmock.KubernetesError(422, "Invalid", message, details)
        return new

    def _type(self, resource: kmock.resource) -> Document:
        version = f"{resource.group}/{resource.version}".strip("/")
        return {"apiVersion": version, "kind": self.resources[resource].kind}

    def _serve(self, spec: Document) -> None:
        """Serve what a CustomResourceDefinition defines."""
        for version in spec["versions"]:
            names, namespaced = spec["names"], spec["scope"] == "Namespaced"
            resource = kmock.resource(spec["group"], version["name"], names["plural"])
            self._schemas[resource] = version["schema"]["openAPIV3Schema"]
            self.resources[resource] = kmock.ResourceInfo(
                kind=names["kind"], namespaced=namespaced, verbs=VERBS, subresources=version["subresources"]
            )

    async def _patch(self, key: Key, request: kmock.Request) -> tuple[int, Document]:
        changes = request.data
        if "apply-patch" in request.headers["Content-Type"]:
            owner = (key, request.params.get("fieldManager"), request.subresource)
            changes = _as_merge(self._applied.get(owner, {}), request.data)
            self._applied[owner] = request.data
            if key not in self.objects and request.subresource is None:
                return 201, await self._create(key, request)
        old = self._read(key)
        copy = kmock.Object(old)
        try:
            copy.patch(changes)
        except jsonpatch.JsonPatchException as error:
            raise kmock.KubernetesError(422, "Invalid", str(error)) from None
        return await self._update(key, request, dict(copy.raw))

    async def _resize(self, key: Key, patch: Document) -> Document:
        """Change resources of a Pod's containers, by their names."""
        old = self._read(key)
        if patch["metadata"]["uid"] != old["metadata"]["uid"]:
            raise kmock.KubernetesError(409, "Conflict", "the uid in the precondition is another one's")
        changed = {container["name"]: container["resources"] for container in patch["spec"]["containers"]}
        containers = [
            container | {"resources": container.get("resources", {}) | changed.get(container["name"], {})}
            for container in old["spec"]["containers"]
        ]
        return await self._change(key, old | {"spec": old["spec"] | {"containers": containers}})

    async def _update(self, key: Key, request: kmock.Request, new: Document) -> tuple[int, Document]:
        """Write a whole object or, through the subresource, its status."""
        old = self._read(key)
        own = {name: old["metadata"][name] for name in OWN if name in old["metadata"]}
        new = new | {"metadata": own | new["metadata"]}
        for field in ("uid", "resourceVersion"):
            if new["metadata"][field] != old["metadata"][field]:
                raise kmock.KubernetesError(409, "Conflict", f"the object has another {field}")
        if request.subresource == "status":
            new = old | {"status": new.get("status", {})}
        else:
            new = _without(new, "status") | ({"status": old["status"]} if "status" in old else {})
        new = self._admitted(new, old, request)
        return 200, new if "dryRun" in request.params else await self._change(key, new)

    async def _delete(self, key: Key, options: Document) -> Document:
        old = self._read(key)
        meta = dict(old["metadata"])
        if options.get("preconditions", {}).get("uid", meta["uid"]) != meta["uid"]:
            raise kmock.KubernetesError(409, "Conflict", "the uid in the precondition is another one's")
        running = "nodeName" in old.get("spec", {}) and old["status"]["phase"] not in ("Succeeded", "Failed")
        usual = old["spec"].get("terminationGracePeriodSeconds", GRACE_SECONDS) if running else 0
        meta.setdefault("deletionTimestamp", _now())
        meta["deletionGracePeriodSeconds"] = options.get("gracePeriodSeconds", usual)
        return await self._change(key, old | {"metadata": meta})

    async def _change(self, key: Key, new: Document) -> Document:
        """Store a new state; an object that is being deleted goes once nothing holds it."""
        old = self._read(key)
        meta = new["metadata"]
        held = meta.get("finalizers") or meta.get("deletionGracePeriodSeconds")
        if "deletionTimestamp" in meta and not held:
            return await self._store("DELETED", key, new)
        if new == old:
            return old
        if _without(new, "metadata", "status") != _without(old, "metadata", "status"):
            new |= {"metadata": meta | {"generation": meta["generation"] + 1}}
        return await self._store("MODIFIED", key, new)

    async def _store(self, event: str, key: Key, new: Document) -> Document:
        self._version += 1
        new = new | {"metadata": new["metadata"] | {"resourceVersion": str(self._version)}}
        if event == "DELETED":
            del self.objects[key]
        else:
            self.objects[key] = new
        await self._buses[key[0]].put({"type": event, "object": new})
        return new

    # Reads of many; kmock itself reads one.

    async def _serve_list(self, request: kmock.Request) -> Document:
        found = await super()._serve_list(request)
        after = request.params.get("continue", "")
        items = sorted((item for item in found["items"] if _wanted(item, request)), key=_address)
        items = [item for item in items if _address(item) > after]
        size = int(request.params.get("limit", 0)) or len(items)
        meta = {"resourceVersion": str(self._version)}
        if len(items) > size:
            items = items[:size]
            meta["continue"] = _address(items[-1])
        kind = self._type(request.resource)
        if "as=PartialObjectMetadataList" in request.headers.get("Accept", ""):
            kind = {"apiVersion": "meta.k8s.io/v1", "kind": "PartialObjectMetadata"}
            items = [{"metadata": item["metadata"]} for item in items]
        return kind | {"kind": f"{kind['kind']}List", "metadata": meta, "items": items}

    async def _serve_watch(self, request: kmock.Request) -> AsyncIterator[Any]:
        yield b""  # sends the headers
        bus = self._buses[request.resource]
        mark = await bus.mark()
        bus._offsets[mark] = 0  # kmock's own watches miss what comes between a list and their beginning
        since = int(request.params.get("resourceVersion") or 0)
        async for event in bus.stream(since=mark):
            item = event["object"]
            if int(item["metadata"]["resourceVersion"]) > since and _wanted(item, request):
                yield event

    # Tokens

    def _issue(self, account: Key, request: Document) -> Document:
        self._read((ACCOUNTS, *account[1:]))
        spec = request["spec"]
        claims = {
            "aud": spec.get("audiences") or [AUDIENCE],
            "exp": int(time.time()) + spec.get("expirationSeconds", 3600),
            "sub": f"system:serviceaccount:{account[1]}:{account[2]}",
            "bound": spec.get("boundObjectRef"),
        }
        body = base64.urlsafe_b64encode(json.dumps(claims).encode()).decode().rstrip("=")
        token = f"{secrets.token_hex(8)}.{body}.{secrets.token_hex(32)}"
        self._tokens[token] = claims
        return request | {"status": {"token": token}}

    def _review(self, spec: Document) -> Document:
        """Return a TokenReview's status."""
        claims = self._tokens.get(spec["token"], {})
        audiences = sorted(set(claims.get("aud", ())) & set(spec.get("audiences") or [AUDIENCE]))
        if not audiences or claims["exp"] < time.time():
            return {"authenticated": False, "error": "unknown or expired, or for other audiences"}
        user: Document = {"username": claims["sub"]}
        if bound := claims["bound"]:
            key = (PODS, claims["sub"].split(":")[2], bound["name"])
            if key not in self.objects or self.objects[key].raw["metadata"]["uid"] != bound["uid"]:
                return {"authenticated": False, "error": "the Pod of the token is gone"}
            prefix = "authentication.kubernetes.io/pod"
            user["extra"] = {f"{prefix}-name": [bound["name"]], f"{prefix}-uid": [bound["uid"]]}
        return {"authenticated": True, "user": user, "audiences": audiences}


def _now() -> str:
    return datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%SZ")


def _without(body: Document, *keys: str) -> Document:
    return {key: value for key, value in body.items() if key not in keys}


def _as_merge(before: Document, now: Document) -> Document:
    """Return what applying `now` means as a merge patch: what was applied before and no more, goes."""
    merged = {key: None for key in before if key not in now}
    for key, new in now.items():
        old = before.get(key)
        merged[key] = _as_merge(old, new) if isinstance(old, dict) and isinstance(new, dict) else new
    return merged


def _address(item: Document) -> str:
    return f"{item['metadata'].get('namespace', '')}/{item['metadata']['name']}"


def _wanted(item: Document, request: kmock.Request) -> bool:
    """Whether a list or watch asks for the object; of label selectors, KEY and KEY=VALUE are known."""
    meta = item["metadata"]
    for term in filter(None, request.params.get("fieldSelector", "").split(",")):
        path, _, value = term.partition("=")
        if str(reduce(lambda found, key: found.get(key, {}), path.split("."), item)) != value:
            return False
    labels = meta.get("labels") or {}
    terms = [term.partition("=") for term in request.params.get("labelSelector", "").split(",") if term]
    return request.namespace in (None, meta.get("namespace")) and all(
        key in labels and (not given or labels[key] == value.lstrip("=")) for key, given, value in terms
    )


@contextmanager
def start_emulator(directory: Path, admin: str) -> Iterator[tuple[str, Path]]:
    """Serve an emulator until the block ends; give its URL and the file of its CA."""
    material = renew(None, ["127.0.0.1"], now_utc())
    ca = directory / "ca.crt"
    ca.write_bytes(material.ca_crt)
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    load_certificate(context, material)
    started: Future[tuple[asyncio.AbstractEventLoop, asyncio.Event, int]] = Future()

    async def serve() -> None:
        stop = asyncio.Event()
        async with Emulator() as emulator:
            emulator.admin = admin
            # kmock's own server speaks no TLS, and patches aiohttp's resolver in the whole process.
            server = web.Server(emulator, access_log=None, handler_cancellation=True)
            runner = web.ServerRunner(server, shutdown_timeout=0.1)
            await runner.setup()
            await web.TCPSite(runner, "127.0.0.1", 0, ssl_context=context).start()
            started.set_result((asyncio.get_running_loop(), stop, runner.addresses[0][1]))
            await stop.wait()
            await runner.cleanup()

    thread = threading.Thread(target=asyncio.run, args=(serve(),), daemon=True, name="emulator")
    thread.start()
    loop, stop, port = started.result(30)
    try:
        yield f"https://127.0.0.1:{port}", ca
    finally:
        loop.call_soon_threadsafe(stop.set)
        thread.join(20)
