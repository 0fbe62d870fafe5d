# SPDX-License-Identifier: Apache-2.0
"""The command `fedpipe`."""

import sys
from pathlib import Path
from typing import Annotated, Literal

import typer

from fedpipe_api.base import UserError
from fedpipe_api.files import expanded

from .command_line import command_app, run_app
from .kube.client_command import add_commands

app = command_app(
    "fedpipe",
    "Fine-tune one language model over many unequal machines whose data stays where it is.",
    completion=True,
)
data = typer.Typer(name="data", help="Prepare data.", no_args_is_help=True)
app.add_typer(data)

JobFile = Annotated[Path, typer.Argument(parser=expanded, metavar="JOB.yaml", help="A FedPipeJob.")]
FleetFile = Annotated[
    Path,
    typer.Option(
        "--fleet", parser=expanded, metavar="FLEET.yaml", help="The nodes, their capacity and data."
    ),
]
RunDir = Annotated[Path, typer.Argument(parser=expanded, metavar="RUN_DIR", help="The --out of a run.")]


def main() -> int:
    """Run the command line of `fedpipe`."""
    return run_app(app)


@app.command()
def run(
    job: JobFile,
    *,
    fleet: FleetFile,
    out: Annotated[
        Path | None, typer.Option(parser=expanded, metavar="DIR", help="Default: runs/JOB-NAME.")
    ] = None,
    resume: Annotated[bool, typer.Option("--resume", help="Go on where the run in --out stopped.")] = False,
    port: Annotated[
        int, typer.Option(min=0, max=65535, help="Loopback port of the coordinator; 0: any.")
    ] = 0,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON objects, one a line.")] = False,
    quiet: Annotated[bool, typer.Option("--quiet", help="Print the summary alone.")] = False,
) -> int:
    """Run a job on this machine, one process for each node of the fleet."""
    from .local.manifest import read

    if as_json and quiet:
        raise UserError("--json and --quiet: give one of them")
    local = read(job, fleet)
    # Only now what takes long to import: a mistake in the manifests is reported at once.
    from .local.run import Output
    from .local.run import run as run_job

    output = Output.JSON if as_json else Output.QUIET if quiet else Output.PEOPLE
    return run_job(local, out, resume, port, output)


@app.command()
def plan(job: JobFile, fleet: FleetFile) -> int:
    """Print what each node of the fleet would carry, and why; nothing is started."""
    from .local.manifest import read
    from .local.plan import plan_job

    return plan_job(read(job, fleet))


@app.command()
def models() -> int:
    """Print the families of models that were tested."""
    from .local.models import lines, summary, tested

    found = tested()
    return _say("\n".join([summary(found), "", *lines(found)]))


@app.command()
def export(
    run_dir: RunDir,
    out: Annotated[
        Path, typer.Option(parser=expanded, metavar="DIR", help="Where to write; must not exist.")
    ],
    merge: Annotated[
        bool, typer.Option("--merge", help="Write the whole model with the adapter merged in.")
    ] = False,
    gguf: Annotated[
        bool, typer.Option("--gguf", help="Write the adapter as one file for llama.cpp.")
    ] = False,
) -> int:
    """Write a run's latest adapter as a PEFT directory, merged into its base model, or for llama.cpp."""
    from .local.results import export_run

    if merge and gguf:
        raise UserError("--gguf: not together with --merge; give one of them")
    export_run(run_dir, out, "model" if merge else "gguf" if gguf else "peft")
    return _say(str(out))


@app.command()
def report(
    run_dir: RunDir,
    prompts: Annotated[
        Path | None,
        typer.Option(
            parser=expanded,
            metavar="FILE",
            help="Text, a prompt a line: a language model answers them without its adapter and with it.",
        ),
    ] = None,
) -> int:
    """Write a run's report, plots and metrics again and print its summary."""
    from .local.results import report_run

    report_run(run_dir, prompts)
    return 0


@data.command()
def split(
    file: Annotated[
        Path,
        typer.Argument(parser=expanded, metavar="FILE", help="Data file, or directory or glob of shards."),
    ],
    *,
    nodes: Annotated[int, typer.Option(min=1, max=5000, help="Into how many shares.")],
    out: Annotated[
        Path, typer.Option(parser=expanded, metavar="DIR", help="Gets node-1/train.SUFFIX and so on.")
    ],
    by: Annotated[
        Literal["iid", "dirichlet", "size"], typer.Option(help="What differs between shares.")
    ] = "iid",
    alpha: Annotated[float, typer.Option(help="Dirichlet concentration; smaller is more unequal.")] = 0.5,
    seed: Annotated[int, typer.Option(min=0, help="Of the draw.")] = 0,
    label: Annotated[str, typer.Option(help="Field whose values dirichlet divides.")] = "label",
) -> int:
    """Cut one dataset into node shares; every row goes to exactly one."""
    from .local import split as shares

    dataset = shares.read(file, label if by == "dirichlet" else None)
    drawn = shares.split(dataset.labels, nodes, by, alpha, seed)
    names = [f"node-{number}" for number in range(1, nodes + 1)]
    shares.write_shares(dataset, drawn, names, out)
    sizes = ", ".join(f"{name} {len(share)}" for name, share in zip(names, drawn, strict=True))
    return _say(f"{out}: {sizes}")


def _say(message: str) -> int:
    sys.stdout.write(f"{message}\n")
    return 0


add_commands(app)

if __name__ == "__main__":
    sys.exit(main())
