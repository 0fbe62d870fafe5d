# SPDX-License-Identifier: Apache-2.0
"""Where the command `fedpipe` begins."""

import signal


def main() -> int:
    """Run the command line and return its exit status."""
    # Where nothing is to be cleaned up, the system ends the process on Ctrl-C. KeyboardInterrupt would print
    # a traceback, and is lost in libraries that catch every exception while they are imported.
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    from .cli import main

    return main()
