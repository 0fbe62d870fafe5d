# SPDX-License-Identifier: Apache-2.0
"""The generated files: fresh, structural, bounded, and complete."""

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from contract.documents import crd, schema, version
from fedpipe_api.conditions import ADVICE, Reason
from fedpipe_api.crdgen import generate, main
from fedpipe_api.job import FedPipeJob, FedPipeJobSpec
from fedpipe_api.node import NODE_ADVICE, FedPipeNode, Fleet, NodeReason
from fedpipe_api.rules import IMMUTABLE
from kube.controlplane import REPOSITORY

PLURALS = ["fedpipejobs", "fedpipenodes"]


def walk(node: dict[str, Any], path: str = "") -> Iterator[tuple[str, dict[str, Any]]]:
    yield path, node
    for name, field in node.get("properties", {}).items():
        yield from walk(field, f"{path}.{name}")
    for key in ("items", "additionalProperties"):
        if key in node:
            yield from walk(node[key], f"{path}[]")


def test_files_are_fresh() -> None:
    assert main(["--check", str(REPOSITORY / "crds")]) == 0, "run `make generate`"


def test_check_names_the_stale_file_and_changes_nothing(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([str(tmp_path)]) == 0
    assert main(["--check", str(tmp_path)]) == 0
    for name, text in generate().items():
        stale = tmp_path / name
        stale.write_text(text + "\n")
        assert main(["--check", str(tmp_path)]) == 1
        assert capsys.readouterr().err == f"{stale}: stale; run `make generate`\n"
        assert stale.read_text() == text + "\n"
        stale.unlink()
        assert main(["--check", str(tmp_path)]) == 1
        capsys.readouterr()
        stale.write_text(text)
    assert main(["--check", str(tmp_path)]) == 0


@pytest.mark.parametrize("plural", PLURALS)
def test_schema_is_structural(plural: str) -> None:
    for path, node in walk(schema(plural)):
        assert node["type"] in ("object", "array", "string", "integer", "number", "boolean"), path
        assert not ("properties" in node and "additionalProperties" in node), path
        for key in node:
            assert key.startswith("x-kubernetes-") or key not in (
                "$ref",
                "title",
                "anyOf",
                "const",
                "nullable",
            ), path
        assert node["type"] != "array" or "items" in node, path
        for rule in node.get("x-kubernetes-validations", ()):
            assert rule["message"]
            assert rule["reason"].startswith("FieldValue")


@pytest.mark.parametrize("plural", PLURALS)
def test_everything_is_bounded(plural: str) -> None:
    # The API server bounds its own fields, and those it keeps as they are.
    free = {".apiVersion", ".kind", ".metadata"}
    for path, node in walk(schema(plural)):
        kind = node["type"]
        if path in free or "enum" in node or node.get("format") == "date-time":
            continue
        assert kind != "string" or "maxLength" in node, path
        assert kind != "array" or "maxItems" in node, path
        assert (
            kind != "object"
            or "properties" in node
            or "maxProperties" in node
            or path.startswith(".spec.podTemplate.")
        ), path
        if path.startswith(".spec") and kind in ("integer", "number") and not path.endswith(".reaches"):
            assert "minimum" in node, path
            assert "maximum" in node, path


@pytest.mark.parametrize("plural", PLURALS)
def test_every_field_tells_what_it_means(plural: str) -> None:
    silent = (".metadata", ".spec.podTemplate.metadata", ".spec.podTemplate.spec")
    for path, node in walk(schema(plural)):
        assert path.endswith("[]") or path in silent or node.get("description"), path


@pytest.mark.parametrize("plural", PLURALS)
def test_status_has_no_defaults_and_keyed_lists(plural: str) -> None:
    for path, node in walk(schema(plural)["properties"]["status"]):
        assert "default" not in node, path
        if node["type"] == "array" and node["items"]["type"] == "object":
            assert node["x-kubernetes-list-type"] == "map", path
            assert set(node["x-kubernetes-list-map-keys"]) <= set(node["items"]["required"]), path


def test_printer_columns() -> None:
    def columns(plural: str) -> list[str]:
        return [column["name"] for column in version(plural)["additionalPrinterColumns"]]

    assert columns("fedpipejobs") == [
        "Phase", "Reason", "Round", "Nodes", "Metric", "Best", "ETA", "Age", "Message"
    ]  # fmt: skip
    assert columns("fedpipenodes") == ["Device", "Memory", "Free", "Precisions", "Seen", "Ready"]
    for plural in PLURALS:
        for column in version(plural)["additionalPrinterColumns"]:
            first, *rest = re.findall(r"\w+", column["jsonPath"].partition("[")[0])
            node = schema(plural)["properties"][first]
            for name in rest:
                node = node.get("properties", {}).get(name, {})
            assert first == "metadata" or node, column


def test_names_and_status_subresource() -> None:
    assert crd("fedpipejobs")["spec"]["names"]["shortNames"] == ["fpj"]
    assert crd("fedpipejobs")["spec"]["scope"] == "Namespaced"
    assert crd("fedpipenodes")["spec"]["names"]["shortNames"] == ["fpn"]
    assert crd("fedpipenodes")["spec"]["scope"] == "Cluster"
    for plural in PLURALS:
        assert version(plural)["subresources"] == {"status": {}}


def test_only_the_stated_fields_may_change() -> None:
    def changeable(node: dict[str, Any], kept: tuple[str, ...] = ()) -> set[str]:
        rules = node.get("x-kubernetes-validations", ())
        fixed = {rule["fieldPath"][1:] for rule in rules if rule["message"].endswith(IMMUTABLE)}
        return set(node["properties"]) - fixed - set(kept)

    spec = schema("fedpipejobs")["properties"]["spec"]
    assert changeable(spec, ("rounds", "nodes")) == {
        "suspend",
        "ttlSecondsAfterFinished",
        "activeDeadlineSeconds",
        "podTemplate",
    }
    assert changeable(spec["properties"]["rounds"]) == {"count", "until", "deadline"}
    assert changeable(spec["properties"]["nodes"]) == {"min", "max"}


def test_every_rule_has_both_halves_or_is_about_a_change() -> None:
    models = [FedPipeJobSpec]
    for model in models:
        models += [kind for kind in model.__subclasses__() if kind not in models]
        for rule in model.rules:
            assert (rule.holds is None) == ("oldSelf" in rule.cel), rule


def test_reference_tells_every_type_field_and_reason() -> None:
    text = (REPOSITORY / "crds" / "README.md").read_text()
    for kind in (FedPipeJob, FedPipeNode, Fleet):
        assert f"\n## {kind.__name__}\n" in text
        for name, definition in kind.model_json_schema(by_alias=True)["$defs"].items():
            if "properties" in definition and not name.endswith("Meta"):
                section = text.partition(f"\n### {name}\n")[2].partition("\n#")[0]
                for field in definition["properties"]:
                    assert f"| `{field}` |" in section, f"{name}.{field}"
    for anchor in re.findall(r"\(#([a-z]+)\)", text):
        assert re.search(rf"^#+ {anchor}$", text, re.IGNORECASE | re.MULTILINE), anchor
    assert set(ADVICE) == set(Reason)
    assert set(NODE_ADVICE) == set(NodeReason)
    for reason, advice in (ADVICE | NODE_ADVICE).items():
        assert f"| `{reason}` | {advice.meaning} |" in text
    assert "METHOD" not in text
