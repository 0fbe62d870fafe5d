# SPDX-License-Identifier: Apache-2.0
"""`fedpipe-agent train`: arguments, signals, and the order in which the agent starts."""

import argparse
import logging
import os
import signal
import tempfile
import urllib.parse
from collections.abc import Sequence
from pathlib import Path
from types import FrameType
from typing import NoReturn

from fedpipe_api.base import UserError, parse_quantity
from fedpipe_api.node import Capacity
from fedpipe_api.rows.data_paths import locate
from fedpipe_api.wire import AssignmentKind

from ..console import own_lines_only
from ..documents import load
from ..errors import Stopped
from ..heartbeat import Work, report_failure
from ..kernels import Check
from ..transport import Transport
from .site import POLICY, Site


def main(argv: Sequence[str]) -> int:
    """Work on one job until it stops; torch is imported only once the arguments and the data files are good.

    Raises:
        UserError: a mistake in the arguments, the model directory or the data.
        Stopped: SIGTERM or SIGINT arrived.
    """
    options = _parser().parse_args(argv)
    capacity = load(options.capacity, Capacity) if options.capacity else Capacity()
    for field in ("token_file", "ca_file"):
        path = getattr(options, field)
        if path is not None and not path.is_file():
            raise UserError(f"--{field.replace('_', '-')} {path}: no such file; give a readable one")
    url = urllib.parse.urlsplit(options.coordinator)
    if url.scheme not in ("http", "https") or not url.netloc:
        raise UserError(f"--coordinator {options.coordinator}: not a URL; write http(s)://host:port")
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, _stop)
    set_environment(capacity)
    with own_lines_only(), tempfile.TemporaryDirectory(prefix="fedpipe-agent-") as work:
        _work(options, capacity, Path(work))
    return 0


def _work(options: argparse.Namespace, capacity: Capacity, work: Path) -> None:
    blobs = work / "blobs"
    blobs.mkdir()
    transport = Transport(
        options.coordinator,
        options.token_file,
        blobs,
        ca_file=options.ca_file,
        link_rate=capacity.link_rate,
        give_up=options.give_up,
    )
    job = transport.job()
    check = agent = None
    try:
        # Before anything of the data is opened.
        site = Site(job, options.model, options.token_file, options.policy)
        locate(options.data, job.data)
        with Work(transport, AssignmentKind.PROFILE, 0, state="importing") as starting:
            from .device import Device

            # Before the check: its child makes a CUDA context too, and ours may show only in free memory.
            device = Device(capacity, options.link_rate)
            check = Check(capacity.precisions)
            # Slow imports, while the kernels run.
            from .agent import Agent
            from .model import Source

            starting.report(state="reading data")
            agent = Agent(job, Source(options.model), transport, device, work)
            agent.prepare(options.data, site)
            starting.report(state="checking kernels")
            kernels = check.results()
        agent.run(kernels)
    except (Stopped, KeyboardInterrupt):
        raise
    except BaseException as error:  # a panic of a library's Rust is no Exception
        report_failure(transport, error, agent.current if agent else None)
        raise
    finally:
        if check:
            check.stop()


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="fedpipe-agent train", description="Work on one job of a coordinator."
    )
    parser.add_argument("--coordinator", required=True, help="http(s)://host:port")
    parser.add_argument(
        "--model", required=True, help="model directory, or repository as owner/name@revision"
    )
    parser.add_argument("--data", required=True, type=Path, help="directory of this node's data")
    parser.add_argument("--token-file", required=True, type=Path, help="file with the bearer token")
    parser.add_argument("--ca-file", type=Path, help="certificate authority of the coordinator (PEM)")
    parser.add_argument(
        "--link-rate",
        type=_link_rate,
        metavar="BYTES",
        help="measured rate of the link per second, for the plan; a declared one is kept to instead",
    )
    parser.add_argument("--capacity", type=Path, help="JSON or YAML file with a declared capacity to keep to")
    parser.add_argument(
        "--policy",
        type=Path,
        action="append",
        default=[],
        help=f"FedPipePolicy to keep to besides the node's own, {POLICY}; repeatable",
    )
    parser.add_argument(
        "--give-up", type=float, default=600.0, metavar="SECONDS", help="of an unreachable coordinator (600)"
    )
    return parser


def _link_rate(text: str) -> int:
    try:
        rate = parse_quantity(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from None
    if rate < 1:
        raise argparse.ArgumentTypeError(f"{text!r} must be above 0")
    return rate


def set_environment(capacity: Capacity) -> None:
    """Set what libraries read once, at import."""
    # Threads that wait by spinning take the cores of the other agents of a busy machine.
    os.environ.setdefault("OMP_WAIT_POLICY", "passive")
    if capacity.threads is not None:
        os.environ["OMP_NUM_THREADS"] = os.environ["RAYON_NUM_THREADS"] = str(capacity.threads)
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "true")
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)


def _stop(number: int, frame: FrameType | None) -> NoReturn:
    raise Stopped
