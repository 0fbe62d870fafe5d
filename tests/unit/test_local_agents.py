from fedpipe_api.node import FleetNode
from fedpipe_operator.local import agents
from fedpipe_operator.local.manifest import Member


def visible(tmp_path):
    member = Member(FleetNode(name="edge", memory="780Mi"), tmp_path)
    return agents._environment(member, offline=True)["CUDA_VISIBLE_DEVICES"]


def test_a_fleet_s_nodes_have_a_gpu_only_where_the_environment_names_it(tmp_path, monkeypatch):
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    assert visible(tmp_path) == ""
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "1")
    assert visible(tmp_path) == "1"
