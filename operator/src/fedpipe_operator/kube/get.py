"""`fedpipe get`: fetches finished adapters from a cluster through the API server's service proxy."""

import asyncio
import io
import tarfile
from pathlib import Path
from typing import Annotated

import typer

from fedpipe_api.base import UserError

get = typer.Typer(name="get", help="Fetch from a cluster.", no_args_is_help=True)

LIMIT = 4 << 30
"""Bytes of the largest adapter accepted."""

FILES = {"adapter_model.safetensors", "adapter_config.json", "README.md"}
"""What a PEFT directory holds; nothing else is unpacked."""


@get.callback()
def _several() -> None:
    """Keep `adapter` a subcommand."""


@get.command()
def adapter(
    job: Annotated[str, typer.Argument(metavar="JOB", help="Name of a FedPipeJob.")],
    out: Annotated[Path, typer.Option("--out", "-o", metavar="DIR", help="Where to write; must not exist.")],
    namespace: Annotated[str, typer.Option("--namespace", "-n", help="Namespace of the job.")] = "default",
    operator: Annotated[
        str, typer.Option(metavar="NAMESPACE/SERVICE", help="Service of the operator's HTTP port.")
    ] = "fedpipe/fedpipe-metrics",
    kubeconfig: Annotated[Path | None, typer.Option(help="Default: KUBECONFIG or ~/.kube/config.")] = None,
) -> int:
    """Write a job's latest adapter as a PEFT directory."""
    if out.exists():
        raise UserError(f"{out}: exists already; give another --out")
    where, _, service = operator.partition("/")
    if not where or not service:
        raise UserError("--operator: write it as NAMESPACE/SERVICE")
    body = asyncio.run(_fetch(kubeconfig, where, service, f"v1/jobs/{namespace}/{job}/adapter"))
    unpack(body, out)
    typer.echo(str(out))
    return 0


async def _fetch(kubeconfig: Path | None, namespace: str, service: str, path: str) -> bytes:
    # The client takes a second to import, which other commands need not wait for.
    import aiohttp
    from kubernetes.aio import client, config
    from kubernetes.aio.client import ApiException

    configuration = client.Configuration()
    try:
        await config.load_config(
            config_file=str(kubeconfig) if kubeconfig else None, client_configuration=configuration
        )
    except (config.ConfigException, OSError) as error:
        raise UserError(f"kubeconfig: {error}; set KUBECONFIG or give --kubeconfig") from None
    proxy = f"/api/v1/namespaces/{namespace}/services/http:{service}:metrics/proxy/{path}"
    async with client.ApiClient(configuration) as api_client:
        try:
            _, address, headers, _, _ = await api_client.param_serialize(
                "GET", proxy, auth_settings=["BearerToken"]
            )
            answer = await api_client.call_api("GET", address, headers, _preload_content=False)
            if (answer.response.content_length or 0) > LIMIT:
                raise UserError(f"the operator sends more than {LIMIT >> 30} GiB; this is no adapter")
            body: bytes = await answer.read()
        except (aiohttp.ClientError, ApiException, TimeoutError) as error:
            raise UserError(f"the API server does not answer: {error}") from None
    if answer.status != 200:
        text = body[:500].decode(errors="replace").strip()
        raise UserError(f"{namespace}/{service}: {text or answer.status}")
    return body


def unpack(body: bytes, directory: Path) -> None:
    """Write the files of a tar of a PEFT directory; UserError for anything that is none."""
    files = adapter_files(body)
    directory.mkdir(parents=True)
    for name, content in files.items():
        (directory / name).write_bytes(content)


def adapter_files(body: bytes) -> dict[str, bytes]:
    """Return the files of a tar of a PEFT directory by name; UserError for anything that is none."""
    try:
        with tarfile.open(fileobj=io.BytesIO(body), mode="r:") as archive:
            members = archive.getmembers()
            names = [member.name for member in members]
            if set(names) - FILES or len(names) != len(set(names)) or not all(m.isreg() for m in members):
                raise UserError(f"the operator sent an unexpected archive: {', '.join(names[:5])}")
            return {m.name: found.read() for m in members if (found := archive.extractfile(m))}
    except tarfile.TarError as error:
        raise UserError(f"the operator sent no archive: {error}") from None
