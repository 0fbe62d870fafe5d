# SPDX-License-Identifier: Apache-2.0
"""The command `fedpipe` as it is typed: help, version, completion; nothing that takes long."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from fedpipe_api.version import version

FEDPIPE = str(Path(sys.executable).with_name("fedpipe"))


def fedpipe(*arguments, **environment):
    given = os.environ | environment
    command = [FEDPIPE, *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=120, env=given, check=False)


@pytest.mark.parametrize("words", [[], ["run"], ["plan"], ["data"], ["data", "split"], ["get", "adapter"]])
def test_help_has_a_short_name_too(words):
    short, long = fedpipe(*words, "-h"), fedpipe(*words, "--help")
    assert (short.returncode, short.stderr) == (0, "")
    assert short.stdout == long.stdout
    assert "Usage: fedpipe" in short.stdout


def test_the_version_is_printed_alone():
    done = fedpipe("--version")
    assert (done.returncode, done.stdout, done.stderr) == (0, f"{version()}\n", "")


def test_a_shell_completes_commands_and_options():
    environment = {"_FEDPIPE_COMPLETE": "complete_bash", "COMP_WORDS": "fedpipe run --f", "COMP_CWORD": "2"}
    assert fedpipe(**environment).stdout.split() == ["--fleet"]
    environment |= {"COMP_WORDS": "fedpipe e", "COMP_CWORD": "1"}
    assert fedpipe(**environment).stdout.split() == ["export"]
    # Else typer looks for the shell among its parents, and make's is none that it knows.
    script = fedpipe("--show-completion", "bash", _TYPER_COMPLETE_TEST_DISABLE_SHELL_DETECTION="1")
    assert "complete -o default -F" in script.stdout
