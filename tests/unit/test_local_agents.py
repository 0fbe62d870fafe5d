# SPDX-License-Identifier: Apache-2.0
from fedpipe_operator.local import agents


def test_a_fleet_s_nodes_have_a_gpu_only_where_the_environment_names_it(monkeypatch):
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    assert agents.environment(offline=True)["CUDA_VISIBLE_DEVICES"] == ""
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "1")
    assert agents.environment(offline=True)["CUDA_VISIBLE_DEVICES"] == "1"


def test_the_last_line_is_the_agent_s_own():
    assert (
        agents.last_line("loading\n\nfedpipe-agent: a.jsonl:1: no field 'text'\n \n")
        == "a.jsonl:1: no field 'text'"
    )
    assert agents.last_line("") == ""
