# SPDX-License-Identifier: Apache-2.0
"""The commands for a cluster's jobs, of `fedpipe` and of the plugin `kubectl fedpipe`."""

import json
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import typer

from fedpipe_api import yaml_file
from fedpipe_api.base import UserError
from fedpipe_api.files import expanded
from fedpipe_api.job import FedPipeJob, Phase
from fedpipe_api.logs import one_line

from ..command_line import command_app, run_app
from .get import service_of

get = typer.Typer(name="get", help="Fetch from a cluster.", no_args_is_help=True)

JobFile = Annotated[Path, typer.Argument(parser=expanded, metavar="JOB.yaml", help="A FedPipeJob.")]
JobName = Annotated[str, typer.Argument(metavar="JOB", help="Name of a FedPipeJob.")]
Namespace = Annotated[
    str | None,
    typer.Option("--namespace", "-n", help="Of the job; default: its manifest's, the context's."),
]
Kubeconfig = Annotated[
    Path | None,
    typer.Option(parser=expanded, metavar="FILE", help="Default: KUBECONFIG or ~/.kube/config."),
]
Json = Annotated[bool, typer.Option("--json", help="Print JSON objects, one a line.")]


def apply(job: JobFile, namespace: Namespace = None, kubeconfig: Kubeconfig = None) -> int:
    """Check a job and create it in the cluster, or change it there to what the file says."""
    document = yaml_file.mapping(job)
    found = _of_file(job, lambda: _client(namespace or _own(document), kubeconfig).apply(document))
    return _say(f"{found.metadata.namespace}/{found.metadata.name}: applied")


def submit(
    job: JobFile, namespace: Namespace = None, kubeconfig: Kubeconfig = None, as_json: Json = False
) -> int:
    """Check a job, create it in the cluster and follow it to its end; Ctrl-C leaves it running."""
    document = yaml_file.mapping(job)
    client = _client(namespace or _own(document), kubeconfig)
    found = _of_file(job, lambda: client.submit(document))
    return _follow(client, found.metadata.name, as_json)


def watch(
    job: JobName, namespace: Namespace = None, kubeconfig: Kubeconfig = None, as_json: Json = False
) -> int:
    """Follow a job to its end; exit status 1 if it failed, 2 if its spec cannot be run."""
    return _follow(_client(namespace, kubeconfig), job, as_json)


def suspend(job: JobName, namespace: Namespace = None, kubeconfig: Kubeconfig = None) -> int:
    """Stop a job's agents; `resume` goes on where they stopped."""
    _client(namespace, kubeconfig).suspend(job)
    return _say(f"{job}: is being suspended")


def resume(job: JobName, namespace: Namespace = None, kubeconfig: Kubeconfig = None) -> int:
    """Have a suspended job go on."""
    _client(namespace, kubeconfig).resume(job)
    return _say(f"{job}: goes on")


def logs(
    job: JobName,
    node: Annotated[str | None, typer.Option(help="Of this node's agent alone.")] = None,
    follow: Annotated[bool, typer.Option("--follow", "-f", help="Go on with what one agent says.")] = False,
    namespace: Namespace = None,
    kubeconfig: Kubeconfig = None,
) -> int:
    """Print what a job's agents say, each line with its node."""
    for name, line in _client(namespace, kubeconfig).logs(job, node, follow=follow):
        _say(f"{name}  {one_line(line)}")
    return 0


@get.command()
def adapter(
    job: JobName,
    out: Annotated[
        Path,
        typer.Option("--out", "-o", parser=expanded, metavar="DIR", help="Where to write; must not exist."),
    ],
    namespace: Namespace = None,
    operator: Annotated[
        str | None, typer.Option(metavar="NAMESPACE/SERVICE", help="The operator's; default: found.")
    ] = None,
    kubeconfig: Kubeconfig = None,
) -> int:
    """Write a job's latest adapter as a PEFT directory."""
    if out.exists():
        raise UserError(f"{out}: exists already; give another --out")
    where = None if operator is None else service_of("--operator", operator)
    _client(namespace, kubeconfig).adapter(job, out, where)
    return _say(str(out))


@get.command()
def jobs(namespace: Namespace = None, kubeconfig: Kubeconfig = None, as_json: Json = False) -> int:
    """List the jobs of a namespace."""
    client = _client(namespace, kubeconfig)
    if as_json:
        for job in client.jobs():
            _say(json.dumps(job.to_dict()))
        return 0
    columns, rows = client.table()
    if not rows:
        return _say(f"namespace {client.namespace} has no jobs")
    widths = [max(map(len, column)) for column in zip(columns, *rows, strict=True)]
    for row in (columns, *rows):
        _say("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip())
    return 0


def add_commands(app: typer.Typer) -> None:
    """Add the commands to an app."""
    for command in (apply, submit, watch, suspend, resume, logs):
        app.command()(command)
    app.add_typer(get)


def plugin() -> int:
    """Run `kubectl fedpipe`."""
    app = command_app("kubectl fedpipe", "Submit and follow federated fine-tuning jobs.")
    add_commands(app)
    return run_app(app)


def _client(namespace: str | None, kubeconfig: Path | None) -> Any:
    from .client import Client

    return Client(namespace, kubeconfig)


def _own(document: dict[str, Any]) -> str | None:
    metadata = document.get("metadata")
    found = metadata.get("namespace") if isinstance(metadata, dict) else None
    return found if isinstance(found, str) else None


def _of_file(path: Path, send: Callable[[], FedPipeJob]) -> FedPipeJob:
    try:
        return send()
    except UserError as error:
        raise UserError(f"{path}: {error}") from None


def _follow(client: Any, name: str, as_json: bool) -> int:
    from .client import refused

    job, said = None, None
    for job in client.watch(name):
        line = _line(job)
        if as_json:
            _say(json.dumps(job.to_dict()))
        elif line != said:
            _say(f"{time.strftime('%H:%M:%S')}  {line}")
        said = line
    assert job is not None
    if (why := refused(job)) is not None:
        raise UserError(f"job {name}: {why}")
    return 0 if job.status and job.status.phase is Phase.SUCCEEDED else 1


def _line(job: FedPipeJob) -> str:
    status = job.status
    if status is None:
        return "the operator has not seen the job yet"
    parts = [str(status.phase), status.rounds or "", status.metric_summary or "", status.message or ""]
    return "  ".join(one_line(part) for part in parts if part)


def _say(line: str) -> int:
    sys.stdout.write(f"{line}\n")
    sys.stdout.flush()
    return 0
