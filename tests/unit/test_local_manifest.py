# SPDX-License-Identifier: Apache-2.0
from copy import deepcopy
from datetime import date
from pathlib import Path

import pytest
import yaml

from fedpipe_api.base import UserError
from fedpipe_api.job import FedPipeJob
from fedpipe_operator.cli import main
from fedpipe_operator.local.manifest import choose, forbidden_change, memory_warning, read

JOB = {
    "apiVersion": "fedpipe.io/v1alpha1",
    "kind": "FedPipeJob",
    "metadata": {"name": "tickets"},
    "spec": {
        "model": {
            "huggingFace": {"repo": "org/base", "revision": "abc"},
            "task": "sequence-classification",
            "labels": ["a", "b"],
        },
        "data": {
            "volume": {"persistentVolumeClaim": {"claimName": "tickets-{node}"}},
            "train": "train.jsonl",
        },
        "nodes": {"selector": {"matchLabels": {"site": "edge"}}, "min": 2, "max": 3},
        "rounds": {"count": 2, "minUpdates": 2},
    },
}
FLEET = {
    "model": "base",
    "nodes": [{"name": f"edge-{i}", "labels": {"site": "edge"}, "data": f"data/{i}"} for i in range(4)]
    + [{"name": "office", "labels": {"site": "office"}, "data": "data/0"}],
}


def change(document, path, value):
    """Return a deep copy with one field set, or removed for None; numbers in the path are list indices."""
    copy = deepcopy(document)
    *parents, last = [int(part) if part.isdigit() else part for part in path.split(".")]
    place = copy
    for part in parents:
        place = place[part]
    if value is None:
        del place[last]
    else:
        place[last] = value
    return copy


@pytest.fixture
def place(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for i in range(4):
        (tmp_path / f"data/{i}").mkdir(parents=True)
        (tmp_path / f"data/{i}/train.jsonl").write_text('{"text": "x", "label": "a"}\n')
    (tmp_path / "base").mkdir()
    (tmp_path / "base/config.json").write_text('{"model_type": "bert"}')
    (tmp_path / "base/model.safetensors").write_bytes(b"weights")
    return tmp_path


def write(job=JOB, fleet=FLEET):
    Path("job.yaml").write_text(job if isinstance(job, str) else yaml.safe_dump(job))
    Path("fleet.yaml").write_text(fleet if isinstance(fleet, str) else yaml.safe_dump(fleet))
    return read(Path("job.yaml"), Path("fleet.yaml"))


def test_a_good_pair_gives_members_reasons_and_the_model(place):
    local = write()
    assert [member.node.name for member in local.members] == ["edge-0", "edge-1", "edge-2"]
    assert local.members[1].data == Path("data/1")
    assert local.excluded == {
        "edge-3": "spec.nodes.max is 3", "office": "its labels do not match spec.nodes.selector",
    }  # fmt: skip
    assert local.model == str(place / "base")
    assert write(fleet=change(FLEET, "model", None)).model == "org/base@abc"


SPEC = "spec."
BAD_JOBS = {
    "unknown field": (SPEC + "adapter", {"rank": 8}, "job.yaml: spec.adapter.rank: unknown field"),
    "no rounds": (SPEC + "rounds.count", 0, "job.yaml: spec.rounds.count: "),
    "crossed ranks": (SPEC + "adapter", {"ranks": {"min": 8, "max": 4}},
                      "job.yaml: spec.adapter.ranks: min must not be above max"),
    "quorum above max": (SPEC + "rounds.minUpdates", 5,
                         "job.yaml: spec.rounds.minUpdates: 5 updates are required but nodes.max is 3. "
                         "Lower minUpdates or raise nodes.max."),
    "one class": (SPEC + "model.labels", ["a"], "job.yaml: spec.model.labels: sequence-classification needs"),
    "no model": (SPEC + "model.huggingFace", None, "job.yaml: spec.model: give exactly one of huggingFace"),
    "missing train": (SPEC + "data.train", None, "job.yaml: spec.data.train: required, but not given"),
    "odd duration": (SPEC + "rounds.deadline", "20 minutes", "job.yaml: spec.rounds.deadline: '20 minutes'"),
    "suspended": (SPEC + "suspend", True, "job.yaml: spec.suspend: "),
    "other selector": (SPEC + "nodes.selector", {"matchLabels": {"site": "moon"}},
                       "job.yaml: spec.nodes.selector: matches no node of fleet.yaml"),
    "other file": (SPEC + "data.train", "rows.jsonl",
                   "fleet.yaml: node edge-0: data: data/0/rows.jsonl: no such file; "),
    "labels yes and no": (SPEC + "model.labels", [True, False], "job.yaml: spec.model.labels[0]: must be text, "
                          "but is true or false (YAML reads yes, no, on and off so too); put it in quotes"),
    "labels 0 and 1": (SPEC + "model.labels", [0, 1],
                       "job.yaml: spec.model.labels[0]: must be text, but is a number; put it in quotes"),
    "a label 2.5": (SPEC + "model.labels", ["a", 2.5],
                    "job.yaml: spec.model.labels[1]: must be text, but is a number; put it in quotes"),
    "a label null": (SPEC + "model.labels", ["a", None],
                     "job.yaml: spec.model.labels[1]: must be text, but is null; put it in quotes"),
    "a label that is a date": (SPEC + "model.labels", ["a", date(2024, 5, 1)],
                               "job.yaml: spec.model.labels[1]: must be text, but is a date; put it in quotes"),
    "a numbered column": (SPEC + "data.fields", {"text": 0},
                          "job.yaml: spec.data.fields.text: must be text, but is a number; put it in quotes"),
    "a wanted label of nodes": (SPEC + "nodes.selector", {"matchLabels": {"gpu": True}},
                                "job.yaml: spec.nodes.selector.matchLabels.gpu: must be text, but is true"),
    "path out": (SPEC + "data.train", "../train.jsonl", "job.yaml: spec.data.train: leaves the volume"),
    "start without adapter": (SPEC + "adapter", {"from": {"path": "data/0"}},
                              "job.yaml: spec.adapter.from.path: data/0 is no PEFT directory"),
    "start from a job": (SPEC + "adapter", {"from": {"job": "first"}},
                         "job.yaml: spec.adapter.from.job: of a cluster; give path, such as runs/first/adap"),
    "wrong kind": ("kind", "Job", "job.yaml: kind: "),
    "no name": ("metadata", {}, "job.yaml: metadata.name: required, but not given"),
}  # fmt: skip
BAD_FLEETS = {
    "unknown field": ("nodes.0.ram", "1Gi", "fleet.yaml: nodes[0].ram: unknown field"),
    "little memory": ("nodes.0.memory", "63Mi", "fleet.yaml: nodes[0].memory: must be at least 64Mi; "),
    "memory without its unit": (
        "nodes.0.memory",
        600,
        "fleet.yaml: nodes[0].memory: must be at least 64Mi; ",
    ),
    "no memory": ("nodes.0.memory", 0, "fleet.yaml: nodes[0].memory: must be at least 64Mi; "),
    "a label true": (
        "nodes.0.labels",
        {"gpu": True},
        "fleet.yaml: nodes[0].labels.gpu: must be text, but is ",
    ),
    "a name 1": ("nodes.0.name", 1, "fleet.yaml: nodes[0].name: must be text, but is a number; put it in "),
    "no nodes": ("nodes", [], "fleet.yaml: nodes: must have at least 1"),
    "no list": ("nodes", "edge-0", "fleet.yaml: nodes: must be a list"),
    "no link": ("nodes.0.linkRate", 0, "fleet.yaml: nodes[0].linkRate: must be above 0"),
    "same name": ("nodes.1.name", "edge-0", "fleet.yaml: nodes: edge-0 is given twice"),
    "odd memory": ("nodes.0.memory", "lots", "fleet.yaml: nodes[0].memory: 'lots' is not a size"),
    "odd speed": ("nodes.0.speed", 2, "fleet.yaml: nodes[0].speed: "),
    "data elsewhere": ("nodes.0.data", "data/9", "fleet.yaml: node edge-0: data: no directory data/9"),
    "no data": (
        "nodes.0.data",
        None,
        "fleet.yaml: node edge-0: data: required",
    ),
    "model elsewhere": ("model", "none", "fleet.yaml: model: no directory none"),
    "model is data": ("model", "data/0", "fleet.yaml: model: data/0 is not a model: it has no config.json"),
}


@pytest.mark.parametrize("case", BAD_JOBS)
def test_a_bad_job_is_one_line_that_names_the_field(case, place):
    path, value, message = BAD_JOBS[case]
    with pytest.raises(UserError) as caught:
        write(job=change(JOB, path, value))
    assert str(caught.value).startswith(message), str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("case", BAD_FLEETS)
def test_a_bad_fleet_is_one_line_that_names_the_field(case, place):
    path, value, message = BAD_FLEETS[case]
    with pytest.raises(UserError) as caught:
        write(fleet=change(FLEET, path, value))
    assert str(caught.value).startswith(message), str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a: [1\nb: 2\n", "job.yaml:2: not YAML: "),
        ("a: 1\n---\nb: 2\n", "job.yaml: 2 YAML documents; give exactly one"),
        ("", "job.yaml: 0 YAML documents"),
        ("- 1\n", "job.yaml: not a YAML mapping"),
        ("a: !!python/object/apply:os.system [true]\n", "job.yaml:1: not YAML: "),
        ("a: \x00\n", "job.yaml: not YAML: "),
        ("a: " + "x" * (1 << 20), "job.yaml: larger than 1 MiB"),
        ("[" * 5000, "job.yaml: not YAML: "),
        ("a:\n  b: 1\n  b: 2\n", "job.yaml:3: not YAML: b is given twice"),
    ],
)
def test_what_is_not_a_manifest_is_refused(text, message, place):
    with pytest.raises(UserError) as caught:
        write(job=text)
    assert str(caught.value).startswith(message), str(caught.value)
    assert "\n" not in str(caught.value)


def test_files_are_checked_before_anything_starts(place):
    for path, content, message in [
        ("data/1/train.jsonl", b"", "fleet.yaml: node edge-1: data: data/1/train.jsonl: the file is empty; "),
        ("base/config.json", b"{", "fleet.yaml: model: base/config.json is not JSON"),
        ("base/config.json", b"[]", "fleet.yaml: model: base/config.json is not the configuration"),
    ]:
        before = Path(path).read_bytes()
        Path(path).write_bytes(content)
        with pytest.raises(UserError) as caught:
            write()
        assert str(caught.value).startswith(message), str(caught.value)
        Path(path).write_bytes(before)
    Path("base/model.safetensors").unlink()
    with pytest.raises(UserError, match="has no weights"):
        write()
    with pytest.raises(UserError, match=r"none\.yaml: No such file"):
        read(Path("none.yaml"), Path("fleet.yaml"))


def test_a_fleet_in_place_of_a_job_is_recognised_and_the_other_way_round(place):
    write()
    job, fleet = Path("job.yaml"), Path("fleet.yaml")
    with pytest.raises(UserError) as caught:
        read(fleet, job)
    assert (
        str(caught.value) == "fleet.yaml: this is a fleet file, not a job; write JOB.yaml --fleet fleet.yaml"
    )
    with pytest.raises(UserError) as caught:
        read(job, job)
    assert str(caught.value) == "job.yaml: this is a job, not a fleet file; write job.yaml --fleet FLEET.yaml"


def test_a_policy_is_found_beside_the_fleet_file(place):
    nodes = [FLEET["nodes"][0] | {"policy": "owner/policy.yaml"}, *FLEET["nodes"][1:]]
    first, *others = write(fleet=FLEET | {"nodes": nodes}).members
    assert first.policy == place / "owner/policy.yaml"
    assert {other.policy for other in others} == {None}


def test_a_volume_may_be_left_out_where_the_fleet_names_the_data(place):
    job = change(JOB, "spec.data.volume", None)
    assert [member.data for member in write(job).members] == [Path(f"data/{i}") for i in range(3)]
    with pytest.raises(UserError) as caught:
        write(job, change(FLEET, "nodes.2.data", None))
    message = "fleet.yaml: node edge-2: data: required, because the job's data has no volume"
    assert str(caught.value) == message


@pytest.mark.parametrize("train", ["train", "train/*.jsonl"])
def test_data_may_be_a_directory_or_a_glob_of_shards(train, place):
    for i in range(4):
        (place / f"data/{i}/train").mkdir()
        (place / f"data/{i}/train/0.jsonl").write_text('{"text": "x", "label": "a"}\n')
    assert len(write(change(JOB, "spec.data.train", train)).members) == 3


def test_a_home_directory_is_found_in_every_path(place, monkeypatch, capsys):
    monkeypatch.setenv("HOME", str(place))
    fleet = change(FLEET, "model", "~/base")
    for i in range(4):
        fleet = change(fleet, f"nodes.{i}.data", f"~/data/{i}")
    local = write(fleet=fleet)
    assert [member.data for member in local.members] == [place / f"data/{i}" for i in range(3)]
    assert local.model == str(place / "base")

    job = change(JOB, "spec.data.volume", {"hostPath": {"path": "~/data/0"}})
    job = change(change(job, "spec.model.huggingFace", None), "spec.model.hostPath", {"path": "~/base"})
    fleet = change(fleet, "model", None)
    for i in range(4):
        fleet = change(fleet, f"nodes.{i}.data", None)
    local = write(job, fleet)
    assert {member.data for member in local.members} == {place / "data/0"}
    assert local.model == str(place / "base")

    for arguments in (
        ["plan", "~/no.yaml", "--fleet", "fleet.yaml"],
        ["plan", "job.yaml", "--fleet=~/no.yaml"],
        ["report", "~/no.yaml"],
        ["export", "~/no.yaml", "--out=~/x"],
        ["data", "split", "~/no.yaml", "--nodes=1", "--out=~/x"],
    ):
        monkeypatch.setattr("sys.argv", ["fedpipe", *arguments])
        assert main() == 2
        assert f"{place}/no.yaml: " in capsys.readouterr().err
    monkeypatch.setattr("sys.argv", ["fedpipe", "plan", "~nobody-has-this-name/a", "--fleet", "fleet.yaml"])
    assert main() == 2
    assert capsys.readouterr().err.startswith("~nobody-has-this-name/a: ~ stands for no home directory")


def test_more_memory_than_the_machine_has_is_warned_of(place):
    local = write(fleet=change(change(FLEET, "nodes.0.memory", "3Gi"), "nodes.2.memory", "2Gi"))
    assert memory_warning(local, 5 << 30) is None
    assert memory_warning(local, 4 << 30) == (
        "fleet.yaml: warning: its nodes declare 5.0 GiB of memory together, this machine has 4.0 GiB; "
        "lower their memory, or the system may end them"
    )


def test_too_few_matching_nodes_name_what_asks_for_more(place):
    few = change(FLEET, "nodes", FLEET["nodes"][:2])
    with pytest.raises(UserError, match=r"spec\.nodes\.min: 3 nodes are required but 2 of fleet\.yaml match"):
        write(change(JOB, "spec.nodes.min", 3), few)
    with pytest.raises(UserError, match=r"spec\.rounds\.minUpdates: 3 updates are required but 2 nodes"):
        write(change(JOB, "spec.rounds.minUpdates", 3), few)


@pytest.mark.parametrize(
    ("expression", "names"),
    [
        ({"key": "site", "operator": "In", "values": ["office"]}, ["office"]),
        ({"key": "site", "operator": "NotIn", "values": ["office"]}, ["edge-0", "edge-1", "edge-2"]),
        ({"key": "site", "operator": "Exists"}, ["edge-0", "edge-1", "edge-2"]),
        ({"key": "gpu", "operator": "Exists"}, []),
        ({"key": "gpu", "operator": "DoesNotExist"}, ["edge-0", "edge-1", "edge-2"]),
        ({"key": "gpu", "operator": "NotIn", "values": ["t4"]}, ["edge-0", "edge-1", "edge-2"]),
    ],
)
def test_selectors_match_as_in_kubernetes(expression, names, place):
    fleet = write().fleet
    spec = FedPipeJob.model_validate(
        change(JOB, "spec.nodes.selector", {"matchExpressions": [expression]})
    ).spec
    assert [node.name for node in choose(spec, fleet)[0]] == names


@pytest.mark.parametrize(
    ("path", "value", "message"),
    [
        ("spec.rounds.count", 5, None),
        ("spec.rounds.count", 1, "spec.rounds.count: may grow but not shrink"),
        ("spec.rounds.deadline", "1m", None),
        ("spec.nodes.max", 7, None),
        ("spec.rounds.localSteps", 9, "spec.rounds.localSteps: "),
        ("spec.seed", 9, "spec.seed: "),
        ("spec.optimizer", {"learningRate": 0.5}, "spec.optimizer: "),
        ("spec.data.maxLength", 99, "spec.data: "),
    ],
)
def test_only_what_the_contract_lets_change_may_change(path, value, message):
    old, new = (FedPipeJob.model_validate(job).spec for job in (JOB, change(JOB, path, value)))
    found = forbidden_change(old, new)
    assert found is None if message is None else found.startswith(message)
