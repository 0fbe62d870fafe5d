# SPDX-License-Identifier: Apache-2.0
"""What is said to be supported is what the benches found."""

import json

from typer.testing import CliRunner

from bench import supported
from fedpipe_operator.cli import app
from fedpipe_operator.local import models


def test_the_list_of_models_is_that_of_the_bench():
    assert supported.MODELS.read_text() == supported.models(), "run make generate"
    readme = supported.README.read_text()
    assert supported.readme(readme) == readme, "run make generate"


def test_most_families_are_green_and_the_rest_refused_in_a_line():
    rows = json.loads(supported.RESULTS.read_text())["rows"]
    assert {row["outcome"] for row in rows} == {"green", "refused"}
    assert all("\n" not in row["detail"] for row in rows)
    for task in ("causal-lm", "sequence-classification"):
        families = {row["family"] for row in rows if row["task"] == task}
        green = families - {
            row["family"] for row in rows if row["task"] == task and row["outcome"] != "green"
        }
        assert len(families) >= 45
        assert len(green) >= 40


def test_the_command_prints_every_family():
    result = CliRunner().invoke(app, ["models"])
    assert result.exit_code == 0
    assert all(line in result.stdout for line in models.lines(models.tested()))
    assert "roberta" in result.stdout


def test_no_data_file_is_silently_wrong():
    rows = json.loads(supported.RESULTS.with_name("data_files.json").read_text())["rows"]
    assert len(rows) >= 60
    assert {row["outcome"] for row in rows} == {"right", "refused"}
