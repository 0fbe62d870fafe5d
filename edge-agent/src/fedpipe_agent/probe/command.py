# SPDX-License-Identifier: Apache-2.0
"""`fedpipe-agent probe`: the command line of the probe."""

import argparse
import importlib
import importlib.util
import json
import os
import re
import socket
import sys
from collections.abc import Callable
from pathlib import Path
from urllib.parse import urlsplit

from pydantic import ValidationError

from fedpipe_api.base import UserError, format_duration, parse_duration
from fedpipe_api.node import HEARTBEAT_SECONDS, READY, Capacity, FedPipeNode, PrecisionSupport
from fedpipe_api.objects import ObjectMeta

from ..documents import load
from ..errors import Failure
from .link import LinkError, check_authorities
from .loop import Coordinator, Link, Probe, run
from .metrics import NodeMetrics
from .publish import Cluster, Publisher, PublishError
from .table import table
from .waiting import Waiter

TIMEOUT_LIMIT = 60.0
"""Seconds. With it, HEARTBEAT_SECONDS as limit of the other times keeps a report within STALE_SECONDS."""


def main(argv: list[str]) -> int:
    """Run the probe; return 0, or 1 when --once finds a node that is not ready. Raises UserError."""
    options = _parser().parse_args(argv)
    capacity = load(options.capacity, Capacity) if options.capacity else None
    if options.cache and not options.cache.is_dir():
        raise UserError(f"--cache: {options.cache} is no directory; create or mount it")
    _check_link(options)
    if options.verify and not options.once:
        raise UserError("--verify goes with --once; in a cluster the agent verifies before it registers")
    in_pod = "KUBERNETES_SERVICE_HOST" in os.environ
    probe = Probe(options.timeout, cache=options.cache, capacity=capacity, limited=not in_pod)
    return _once(probe, options) if options.once else _forever(probe, options)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="fedpipe-agent probe",
        description="Report what this node can carry: in its FedPipeNode or, with --once, on the screen.",
    )
    parser.add_argument("--once", action="store_true", help="make one pass, print it and write nothing")
    parser.add_argument("--output", choices=("table", "json"), default="table", help="form of --once")
    parser.add_argument(
        "--verify", action="store_true", help="with --once: prove each precision by a real kernel"
    )
    parser.add_argument("--node", help="name of the Node (in a Pod: the one its token is bound to)")
    parser.add_argument("--capacity", type=Path, metavar="FILE", help="report this declared capacity instead")
    parser.add_argument("--cache", type=Path, metavar="DIR", help="directory of the model cache")
    parser.add_argument("--coordinator", metavar="URL", help="file to download to measure the link")
    parser.add_argument(
        "--ca-file", type=Path, metavar="FILE", help="certificate authorities (PEM) of --coordinator"
    )
    parser.add_argument(
        "--interval", type=_at_most(HEARTBEAT_SECONDS), default=15.0, help="time between passes (15s)"
    )
    parser.add_argument(
        "--heartbeat",
        type=_at_most(HEARTBEAT_SECONDS),
        default=HEARTBEAT_SECONDS,
        help=f"time between writes when nothing moves ({format_duration(HEARTBEAT_SECONDS)})",
    )
    parser.add_argument(
        "--timeout", type=_at_most(TIMEOUT_LIMIT), default=10.0, help="time NVML may take in a pass (10s)"
    )
    parser.add_argument("--metrics-port", type=int, metavar="PORT", help="serve Prometheus metrics here")
    return parser


def _check_link(options: argparse.Namespace) -> None:
    url: str | None = options.coordinator
    if url is not None and (complaint := _refusal(url)):
        raise UserError(f"--coordinator: {complaint}; write it like https://host/path")
    if options.ca_file is None:
        return
    if url is None or urlsplit(url).scheme != "https":
        raise UserError("--ca-file goes with a --coordinator that is an https URL; leave it out")
    if options.once:
        # In the loop it may come later: a ConfigMap that is mounted fills when the operator has started.
        try:
            check_authorities(options.ca_file)
        except LinkError as error:
            raise UserError(f"--ca-file: {error}; name a file of certificates (PEM)") from None


def _refusal(url: str) -> str | None:
    """Return why the URL cannot be taken, or None; what may be a password is not repeated."""
    shown = "this" if "@" in url else repr(url)
    try:
        parts = urlsplit(url)
        if "@" in parts.netloc:
            return "a URL with a user or password is not taken"
        # An empty or long label of the name is refused on encoding, the port on access.
        host = (parts.hostname or "").encode("idna")
        valid = bool(re.fullmatch("[!-~]+", url)) and parts.port != 0
    except ValueError:
        valid = False
    if not valid:
        return f"{shown} is no URL"
    if parts.scheme not in ("http", "https"):
        return f"an http or https URL is needed, not {shown}"
    return None if host else f"{shown} is no URL"


def _at_most(limit: float) -> Callable[[str], float]:
    """Return a parser of a duration above 0 and at most `limit` seconds."""

    def seconds(text: str) -> float:
        try:
            value = parse_duration(text)
        except ValueError as error:
            raise argparse.ArgumentTypeError(str(error)) from None
        if not 0 < value <= limit:
            raise argparse.ArgumentTypeError(f"{text!r} must be above 0 and at most {format_duration(limit)}")
        return value

    return seconds


def _once(probe: Probe, options: argparse.Namespace) -> int:
    status = probe.look(
        verified=_verified() if options.verify else (),
        link_rate=Link(_coordinator(probe, options)).look(),
    )
    node = FedPipeNode(metadata=_meta(options.node or socket.gethostname().lower()), status=status)
    if options.output == "json":
        # The kind is cluster-scoped and the rest of the metadata is the cluster's.
        shown = node.to_dict() | {"metadata": {"name": node.metadata.name}}
        _show(json.dumps(shown, indent=2, ensure_ascii=False))
    else:
        _show(table(node, probe.capacity))
    ready = next(condition for condition in status.conditions if condition.type == READY)
    return 0 if ready.status == "True" else 1


def _show(text: str) -> None:
    """Print the text. A reader that has gone, as of a pipe into `head`, is no failure."""
    try:
        print(text, flush=True)  # noqa: T201
    except OSError as error:
        # Python would try, and complain, once more when it ends.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        if not isinstance(error, BrokenPipeError):
            raise Failure(f"standard output: {error.strerror}") from None


def _forever(probe: Probe, options: argparse.Namespace) -> int:
    cluster = Cluster.of_pod()
    try:
        bound = cluster.identity().node
    except PublishError:
        # The loop reports it and tries again.
        bound = None
    if bound and options.node and options.node != bound:
        raise UserError(f"--node: the token of this Pod is bound to {bound}, not to {options.node}")
    metrics = NodeMetrics(bound or options.node or socket.gethostname().lower())
    try:
        waiter = Waiter(metrics.registry, options.metrics_port)
    except (OSError, OverflowError) as error:
        raise UserError(f"--metrics-port: {options.metrics_port} cannot be served: {error}") from None
    with waiter:
        run(
            probe,
            Publisher(cluster),
            waiter,
            metrics,
            interval=options.interval,
            heartbeat=options.heartbeat,
            coordinator=_coordinator(probe, options),
        )
    return 0


def _coordinator(probe: Probe, options: argparse.Namespace) -> Coordinator | None:
    """Return what to measure the link by; nothing is measured where its rate is declared."""
    if options.coordinator is None or (probe.capacity and probe.capacity.link_rate):
        return None
    return Coordinator(options.coordinator, options.ca_file)


def _verified() -> tuple[PrecisionSupport, ...]:
    if importlib.util.find_spec("torch") is None:
        raise UserError("--verify needs torch; install fedpipe-agent[train]")
    # By name: nothing that torch comes with may be in the probe's import path.
    kernels = importlib.import_module("fedpipe_agent.kernels")
    return tuple(PrecisionSupport(verified=True, **dict(result)) for result in kernels.check())


def _meta(name: str) -> ObjectMeta:
    try:
        return ObjectMeta(name=name)
    except ValidationError:
        raise UserError(
            f"--node: {name!r} is no name of a Node; use lower-case letters, digits, - and ."
        ) from None
