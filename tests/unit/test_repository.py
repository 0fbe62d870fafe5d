# SPDX-License-Identifier: Apache-2.0
"""What contributors and releases rely on: one version, `make help`, the changelog's section, local hooks."""

import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from fedpipe_api.version import version
from kube.controlplane import REPOSITORY

PACKAGES = ("crds", "operator", "edge-agent")


def written_version() -> str:
    return re.search(r'^version = "(.*)"$', (REPOSITORY / "crds/pyproject.toml").read_text(), re.M)[1]


@pytest.mark.parametrize("command", ["fedpipe", "fedpipe-operator", "fedpipe-agent"])
def test_every_command_prints_the_version(command: str) -> None:
    done = subprocess.run(
        [Path(sys.executable).parent / command, "--version"], capture_output=True, text=True, check=True
    )
    assert done.stdout == f"{version()}\n"


def test_packages_and_chart_take_the_version_from_one_file(tmp_path: Path) -> None:
    for part in (*PACKAGES, "charts"):
        shutil.copytree(REPOSITORY / part, tmp_path / part, ignore=shutil.ignore_patterns("src"))
    source = tmp_path / "crds/pyproject.toml"
    source.write_text(source.read_text().replace(f'"{written_version()}"', '"9.8.7"'))
    stale = ("charts/fedpipe/Chart.yaml", "operator/pyproject.toml", "edge-agent/pyproject.toml")

    def generate(*arguments: str) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, tmp_path / "charts/generate.py", *arguments]
        return subprocess.run(command, capture_output=True, text=True, check=False)

    checked = generate("--check")
    assert checked.returncode == 1
    assert {line.partition(":")[0] for line in checked.stdout.splitlines()} == set(stale)
    assert generate().returncode == 0
    chart = yaml.safe_load((tmp_path / stale[0]).read_text())
    assert chart["version"] == chart["appVersion"] == "9.8.7"
    for path in stale:
        assert written_version() not in (tmp_path / path).read_text()


def test_the_changelog_becomes_the_release_text(tmp_path: Path) -> None:
    changelog = tmp_path / "changelog.md"

    def notes(tag: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [REPOSITORY / ".ci/release-notes", tag],
            env={"CHANGELOG": str(changelog), "PATH": "/usr/bin:/bin"},
            capture_output=True,
            text=True,
            check=False,
        )

    mine = written_version()
    changelog.write_text(
        f"# Changelog\n\n## [Unreleased]\n\n- later\n\n## [{mine}] - 2026-01-01\n\n- this\n\n## [0.0.1]\n\n- old\n"
    )
    assert notes(f"v{mine}").stdout.strip() == "- this"
    assert "the tag is for 9.9.9" in notes("v9.9.9").stderr
    changelog.write_text("## [Unreleased]\n\n- later\n")
    refused = notes(f"v{mine}")
    assert refused.returncode == 2
    assert f"no section [{mine}]" in refused.stderr


def test_make_help_lists_every_target() -> None:
    shown = subprocess.run(
        ["make", "--no-print-directory", "help"], cwd=REPOSITORY, capture_output=True, text=True, check=True
    ).stdout
    phony = re.search(r"^\.PHONY: (.*)$", (REPOSITORY / "Makefile").read_text(), re.M)[1].split()
    assert [line.split()[0] for line in shown.splitlines()] == phony
    assert all(len(line.split()) > 1 for line in shown.splitlines())


def test_hooks_and_workflows_are_local_and_name_no_registry() -> None:
    hooks = yaml.safe_load((REPOSITORY / ".pre-commit-config.yaml").read_text())
    assert [repo["repo"] for repo in hooks["repos"]] == ["local"]
    for path in (REPOSITORY / ".github/workflows").iterdir():
        text = path.read_text()
        assert yaml.safe_load(text)["jobs"], path
        assert not re.search(r"ghcr|docker\.io|quay\.io|pypi\.org", text), path


def test_the_release_builds_every_image_by_scripts_that_parse() -> None:
    workflow = yaml.safe_load((REPOSITORY / ".github/workflows/release.yaml").read_text())
    built = workflow["jobs"]["images"]["strategy"]["matrix"]["image"]
    assert sorted(built) == sorted(path.parent.name for path in REPOSITORY.glob("images/*/Containerfile"))
    for job in workflow["jobs"].values():
        for step in job.get("steps", ()):
            script = re.sub(r"\$\{\{.*?\}\}", "x", step.get("run", ""))
            subprocess.run(["bash", "-n"], input=script, text=True, check=True)


def test_artifact_hub_is_shown_every_resource_of_the_chart() -> None:
    chart = yaml.safe_load((REPOSITORY / "charts/fedpipe/Chart.yaml").read_text())
    shown = {
        (one["name"], one["kind"], one["version"])
        for one in yaml.safe_load(chart["annotations"]["artifacthub.io/crds"])
    }
    written = {
        (crd["metadata"]["name"], crd["spec"]["names"]["kind"], version["name"])
        for crd in map(yaml.safe_load, (path.read_text() for path in REPOSITORY.glob("crds/*.yaml")))
        for version in crd["spec"]["versions"]
    }
    assert shown == written
