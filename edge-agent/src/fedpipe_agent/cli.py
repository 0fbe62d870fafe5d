# SPDX-License-Identifier: Apache-2.0
"""The command `fedpipe-agent`: hands its arguments to a subcommand, turns failures into exit codes."""

import importlib
import logging
import sys
from collections.abc import Sequence

from fedpipe_api.base import USER_MISTAKE, UserError
from fedpipe_api.logs import LineFormatter
from fedpipe_api.version import version

from . import console
from .errors import Failure, RequestRefused, Stopped, describe, trace

USAGE = """usage: fedpipe-agent train|probe|describe [options]

  train     work on one job: pull assignments, train, push updates
  probe     report what this node can carry
  describe  print the registration that train would send for a job

fedpipe-agent --version prints the version.
fedpipe-agent train --help and so on list the options."""


_COMMANDS = {
    "train": ".train.command",
    "probe": ".probe.command",
    "describe": ".train.describe",
    "merge": ".train.merge",
    "answer": ".train.answer",
    "unpack": ".train.unpack",
}
# USAGE leaves out what other commands of ours start: merge, answer, unpack.


def main(argv: Sequence[str] | None = None) -> int:
    """Run a subcommand.

    Exit 0 when done or stopped, 2 for a mistake of the user, 130 when interrupted, 1 for any other failure.
    """
    arguments = list(sys.argv[1:] if argv is None else argv)
    if arguments[:1] == ["--version"]:
        sys.stdout.write(f"{version()}\n")
        return 0
    if not arguments or arguments[0] not in _COMMANDS:
        wanted = bool(arguments) and arguments[0] in ("-h", "--help")
        (sys.stdout if wanted else sys.stderr).write(USAGE + "\n")
        return 0 if wanted else 2
    status = _run(arguments)
    if argv is None:  # the process itself
        console.end(status)
    return status


def _run(arguments: list[str]) -> int:
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(LineFormatter("%(message)s"))
    logging.basicConfig(level=logging.INFO, handlers=[handler])
    try:
        # Each subcommand imports only what it needs: the probe's image has no torch.
        command = importlib.import_module(_COMMANDS[arguments[0]], __package__)
        status: int = command.main(arguments[1:])
    except (Stopped, KeyboardInterrupt) as error:
        return 0 if isinstance(error, Stopped) else _complain("interrupted", 130)
    except SystemExit:  # of argparse, which has said why
        raise
    except (UserError, Failure, RequestRefused) as error:
        return _complain(describe(error), USER_MISTAKE if isinstance(error, UserError) else 1)
    except BaseException as error:  # a panic of a library's Rust is no Exception
        sys.stderr.write(trace(error))
        return _complain(describe(error), 1)
    return status


def _complain(line: str, status: int) -> int:
    sys.stderr.write(f"fedpipe-agent: {line}\n")
    return status


if __name__ == "__main__":
    sys.exit(main())
