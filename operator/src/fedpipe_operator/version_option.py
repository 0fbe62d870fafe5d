# SPDX-License-Identifier: Apache-2.0
"""The option `--version` of the commands `fedpipe` and `fedpipe-operator`."""

import sys
from typing import Annotated

import typer

from fedpipe_api.version import version


def _show(wanted: bool) -> None:
    if wanted:
        sys.stdout.write(f"{version()}\n")
        raise typer.Exit


def add_version(app: typer.Typer) -> None:
    """Add the option to a command that has subcommands."""

    @app.callback()
    def _options(
        show: Annotated[
            bool, typer.Option("--version", callback=_show, is_eager=True, help="Print the version.")
        ] = False,
    ) -> None:
        pass
