# SPDX-License-Identifier: Apache-2.0
"""How a command line of people ends."""

import sys

import typer

from fedpipe_api.base import UserError


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
