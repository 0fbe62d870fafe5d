# SPDX-License-Identifier: Apache-2.0
"""The README's job of one's own data runs exactly as it is printed there."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

README = Path(__file__).parents[2] / "README.md"
BIN = Path(sys.executable).parent

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]


def blocks():
    """Return the fenced blocks of the section, as (language, text)."""
    section = README.read_text().split("## Your own data on this machine\n")[1].split("\n## ")[0]
    return re.findall(r"^```(\w+)\n(.*?)^```$", section, flags=re.MULTILINE | re.DOTALL)


def shell(command, directory):
    environment = os.environ | {"PATH": f"{BIN}:{os.environ['PATH']}"}
    done = subprocess.run(
        ["bash", "-euc", command], cwd=directory, env=environment, capture_output=True, text=True,
        timeout=600, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def test_the_blocks_of_the_readme_run_as_pasted(tmp_path):
    found = blocks()
    [rows] = [text for language, text in found if language == "sh"]
    shell(rows, tmp_path)
    for text in (text for language, text in found if language == "yaml"):
        name = text.split(":")[0].removeprefix("# ")
        (tmp_path / name).write_text(text)
    [commands, *_] = [text for language, text in found if language == "console"]
    lines = [line.removeprefix("$ ") for line in commands.splitlines() if line.startswith("$ ")]
    assert [line.split()[1] for line in lines][:4] == ["data", "plan", "run", "report"]
    for line in lines:
        shown = shell(line, tmp_path)
        if line.startswith("fedpipe run"):
            assert "round 3/3" in shown
            assert "report   runs/reviews/report.html" in shown
    assert (tmp_path / "runs/reviews/adapter/adapter_model.safetensors").exists()
    assert (tmp_path / "model/config.json").exists()


def test_the_mistake_that_the_readme_shows_is_the_one_that_is_made(tmp_path):
    found = blocks()
    job = next(text for language, text in found if language == "yaml" and "# job.yaml" in text)
    fleet = next(text for language, text in found if language == "yaml" and "# fleet.yaml" in text)
    (tmp_path / "job.yaml").write_text(
        job.replace("rounds: {", "nodes: {max: 4}\n  rounds: {minUpdates: 5, ")
    )
    (tmp_path / "fleet.yaml").write_text(fleet)
    [_, mistake] = [text for language, text in found if language == "console"]
    command, message = mistake.splitlines()
    done = subprocess.run(
        [BIN / "fedpipe", *command.split()[2:]], cwd=tmp_path, capture_output=True, text=True, check=False
    )
    assert (done.returncode, done.stderr) == (2, message + "\n")
