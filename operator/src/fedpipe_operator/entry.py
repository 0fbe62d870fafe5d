# SPDX-License-Identifier: Apache-2.0
"""Where the commands `fedpipe` and `kubectl fedpipe` begin."""

import signal


def main() -> int:
    """Run `fedpipe` and return its exit status."""
    _end_on_interrupt()
    from .cli import main

    return main()


def plugin() -> int:
    """Run `kubectl fedpipe` and return its exit status."""
    _end_on_interrupt()
    from .kube.client_command import plugin

    return plugin()


def _end_on_interrupt() -> None:
    # Where nothing is to be cleaned up, the system ends the process on Ctrl-C. KeyboardInterrupt would print
    # a traceback, and is lost in libraries that catch every exception while they are imported.
    signal.signal(signal.SIGINT, signal.SIG_DFL)
