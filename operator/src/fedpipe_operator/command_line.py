# SPDX-License-Identifier: Apache-2.0
"""How the command lines of people begin and end."""

import sys

import typer

from fedpipe_api.base import UserError

from .version_option import add_version


def command_app(name: str, text: str, *, completion: bool = False) -> typer.Typer:
    """Return a command that has subcommands, with `--version` and a help without decoration."""
    app = typer.Typer(
        name=name,
        help=text,
        no_args_is_help=True,
        add_completion=completion,
        context_settings={"help_option_names": ["-h", "--help"]},
        rich_markup_mode=None,
        pretty_exceptions_enable=False,
    )
    add_version(app)
    return app


def run_app(app: typer.Typer) -> int:
    """Run a command line; exit 2 with one line for a mistake of the user, 130 when interrupted."""
    try:
        return app(standalone_mode=False) or 0
    except UserError as error:
        return _complain(str(error), 2)
    except typer.TyperException as error:
        return _complain(error.format_message(), 2)
    except (KeyboardInterrupt, typer.Abort):
        return _complain("interrupted", 130)


def _complain(message: str, status: int) -> int:
    sys.stderr.write(f"{message}\n")
    return status
