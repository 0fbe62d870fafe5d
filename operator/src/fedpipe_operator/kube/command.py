# SPDX-License-Identifier: Apache-2.0
"""The command `fedpipe-operator`."""

import asyncio
import contextlib
import logging
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, BinaryIO

import typer

from fedpipe_api.base import UserError
from fedpipe_api.files import replaced
from fedpipe_api.logs import LINE_FORMAT, LineFormatter
from fedpipe_api.object_url import ObjectURL

from ..command_line import command_app
from .api import own_namespace
from .settings import AllowedStore, OperatorSettings, parse_origin

app = command_app("fedpipe-operator", "The Kubernetes operator of FedPipe.")


def main() -> int:
    """Run the command line; exit 2 with one line for a mistake of the user."""
    try:
        return app(standalone_mode=False) or 0
    except UserError as error:
        return _complain(str(error))
    except typer.TyperException as error:
        return _complain(error.format_message())
    except (KeyboardInterrupt, typer.Abort):
        return 130


def _complain(message: str) -> int:
    sys.stderr.write(f"fedpipe-operator: {message}\n")
    return 2


@app.command()
def run(
    *,
    store: Annotated[Path, typer.Option(envvar="FEDPIPE_STORE", help="Directory of ledger and blobs.")],
    agent_image: Annotated[str, typer.Option(envvar="FEDPIPE_AGENT_IMAGE", help="Image of agent Pods.")],
    operator_image: Annotated[
        str, typer.Option(envvar="FEDPIPE_OPERATOR_IMAGE", help="Image of Pods that write spec.output.")
    ],
    namespace: Annotated[
        str | None, typer.Option(envvar="FEDPIPE_NAMESPACE", help="The operator's own; default: its Pod's.")
    ] = None,
    service: Annotated[
        str, typer.Option(envvar="FEDPIPE_SERVICE", help="Service in front of the coordinator.")
    ] = "fedpipe",
    watch: Annotated[
        list[str] | None,
        typer.Option("--watch", metavar="NAMESPACE", help="Namespace of jobs, repeatable; default: all."),
    ] = None,
    coordinator_url: Annotated[
        str | None,
        typer.Option(envvar="FEDPIPE_COORDINATOR_URL", help="Where agents call, if not at the Service."),
    ] = None,
    host: Annotated[str, typer.Option(help="Address to listen on.")] = "0.0.0.0",  # noqa: S104
    coordinator_port: Annotated[int, typer.Option(min=1, max=65535, help="For agents, HTTPS.")] = 8443,
    health_port: Annotated[
        int, typer.Option(min=1, max=65535, help="For the kubelet's probes, HTTP.")
    ] = 8080,
    metrics_port: Annotated[int, typer.Option(min=1, max=65535, help="For Prometheus, HTTPS.")] = 8444,
    tls_secret: Annotated[
        str | None, typer.Option(help="Secret with the coordinator's certificate; default: an own CA.")
    ] = None,
    ca_configmap: Annotated[
        str | None, typer.Option(help="ConfigMap to keep the CA in, for probes and Prometheus.")
    ] = None,
    model_cache: Annotated[
        str | None, typer.Option(help="Directory of every node for downloaded models; default: none.")
    ] = None,
    policy_directory: Annotated[
        str | None, typer.Option(help="Directory of every node with its owner's policy.yaml; default: none.")
    ] = None,
    budget_directory: Annotated[
        str | None, typer.Option(help="Directory of every node with its privacy ledger; default: none.")
    ] = None,
    runtime_class: Annotated[
        str | None, typer.Option(help="RuntimeClass for GPUs that are no resource of their node.")
    ] = None,
    image_pull_secret: Annotated[
        list[str] | None, typer.Option(help="For agent Pods, repeatable; in the job's namespace.")
    ] = None,
    output_allow: Annotated[
        list[str] | None,
        typer.Option(
            metavar="PREFIX[,ENDPOINT]",
            help="Object store that spec.output.url may name, such as s3://BUCKET/PATH, repeatable; "
            "default: none.",
        ),
    ] = None,
    tracking_allow: Annotated[
        list[str] | None,
        typer.Option(
            metavar="ORIGIN",
            help="MLflow server that spec.tracking may name, http(s)://HOST:PORT, repeatable; default: none.",
        ),
    ] = None,
    drop_unknown_jobs: Annotated[
        bool,
        typer.Option(
            "--drop-unknown-jobs",
            help="Start though the cluster has none of the store's jobs, and remove them.",
        ),
    ] = False,
    verbose: Annotated[bool, typer.Option("--verbose", help="Log kopf's details too.")] = False,
) -> int:
    """Run operator, coordinator and metrics."""
    own = namespace or own_namespace()
    if own is None:
        raise UserError("--namespace: required outside a cluster")
    settings = OperatorSettings(
        namespace=own,
        service=service,
        store=store,
        agent_image=agent_image,
        operator_image=operator_image,
        namespaces=tuple(watch or ()),
        coordinator_url=coordinator_url,
        host=host,
        coordinator_port=coordinator_port,
        health_port=health_port,
        metrics_port=metrics_port,
        tls_secret=tls_secret,
        ca_config_map=ca_configmap,
        model_cache=model_cache,
        policy_directory=policy_directory,
        budget_directory=budget_directory,
        runtime_class=runtime_class,
        image_pull_secrets=tuple(image_pull_secret or ()),
        drop_unknown_jobs=drop_unknown_jobs,
        output_allowed=tuple(AllowedStore.parse(text) for text in output_allow or ()),
        tracking_allowed=tuple(map(parse_origin, tracking_allow or ())),
    )
    _log(verbose)
    from .run import serve

    asyncio.run(serve(settings))
    return 0


Store = Annotated[Path, typer.Option(envvar="FEDPIPE_STORE", help="Directory of ledger and blobs.")]
BackupFile = Annotated[str, typer.Argument(metavar="FILE", help="A tar file; -: standard output or input.")]


@app.command()
def backup(file: BackupFile, *, store: Store) -> int:
    """Write a consistent backup of the store, also while the operator works on it."""
    from ..engine.backup import fetch_backup
    from ..store.backup import back_up

    if not store.is_dir():
        raise UserError(f"{store}: there is no store")
    with _written(file) as target:
        if not fetch_backup(store, target):
            back_up(store, target)
    return 0


@app.command()
def restore(file: BackupFile, *, store: Store) -> int:
    """Fill an empty store from a backup; the operator must not run meanwhile."""
    from ..store.backup import restore as fill

    if file == "-":
        fill(sys.stdin.buffer, store)
        return 0
    try:
        with Path(file).open("rb") as source:
            fill(source, store)
    except FileNotFoundError:
        raise UserError(f"{file}: there is no such backup") from None
    return 0


@contextlib.contextmanager
def _written(file: str) -> Iterator[BinaryIO]:
    """Yield where to write; a file appears under its name once it is whole."""
    if file == "-":
        yield sys.stdout.buffer
        sys.stdout.buffer.flush()
        return
    try:
        with replaced(Path(file), mode=0o600) as target:  # it holds every job's spec and adapters
            yield target
    except OSError as error:
        raise UserError(f"{file}: cannot be written ({error.strerror})") from None


@app.command()
def deliver(
    *,
    coordinator: Annotated[str, typer.Option(help="The coordinator's URL.")],
    token_file: Annotated[Path, typer.Option(help="The Pod's token.")],
    ca_file: Annotated[Path, typer.Option(help="The coordinator's CA.")],
    output: Annotated[Path | None, typer.Option(help="Directory to write.")] = None,
    url: Annotated[str | None, typer.Option(help="Object store to write to.")] = None,
    endpoint: Annotated[str | None, typer.Option(help="Of a store that is not the provider's own.")] = None,
    credentials: Annotated[
        Path | None, typer.Option(help="Directory of the credentials for --url, a file for each key.")
    ] = None,
) -> int:
    """Write a job's adapter into a mounted volume or an object store; the operator's own Pods run this."""
    from .deliver import Target
    from .deliver import deliver as write
    from .own_requests import Coordinator

    if url is not None and credentials is None:
        raise UserError("--credentials: required by --url")
    target = Target(ObjectURL.parse(url), endpoint, credentials) if url and credentials else None
    write(Coordinator(coordinator, token_file, ca_file), output, target)
    return 0


@app.command()
def track(
    *,
    coordinator: Annotated[str, typer.Option(help="The coordinator's URL.")],
    token_file: Annotated[Path, typer.Option(help="The Pod's token.")],
    ca_file: Annotated[Path, typer.Option(help="The coordinator's CA.")],
    tensorboard: Annotated[Path | None, typer.Option(help="Directory for event files.")] = None,
    mlflow: Annotated[str | None, typer.Option(help="URI of an MLflow server.")] = None,
    experiment: Annotated[str | None, typer.Option(help="For --mlflow; default: the job's name.")] = None,
) -> int:
    """Send a job's rounds to experiment trackers until it has ended; the operator's own Pods run this."""
    from .own_requests import Coordinator
    from .track import Targets
    from .track import track as follow

    _log(verbose=False)
    follow(Coordinator(coordinator, token_file, ca_file), Targets(tensorboard, mlflow, experiment))
    return 0


def _log(verbose: bool) -> None:
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(LineFormatter(LINE_FORMAT))
    logging.basicConfig(level=logging.DEBUG if verbose else logging.INFO, handlers=[handler])
    # kopf logs every patch it makes; the Events report what matters to people.
    logging.getLogger("kopf").setLevel(logging.DEBUG if verbose else logging.WARNING)
    logging.getLogger("aiohttp.access").setLevel(logging.WARNING)
