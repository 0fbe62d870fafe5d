# SPDX-License-Identifier: Apache-2.0
"""Gated models of a hub: read with HF_TOKEN, refused in one line without, the token said nowhere."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from agent_fixtures import save_tiny_model
from fedpipe_api.wire import Registration
from standins.hub import hub

TOKEN = "hf_secretsecretsecret"
AGENT = str(Path(sys.executable).with_name("fedpipe-agent"))


@pytest.fixture
def job(tmp_path):
    spec = {
        "model": {
            "huggingFace": {"repo": "org/gated"},
            "task": "sequence-classification",
            "labels": ["a", "b"],
        },
        "data": {"volume": {"hostPath": {"path": "/data"}}, "train": "train.jsonl", "maxLength": 8},
        "rounds": {"count": 1},
    }
    (tmp_path / "job.json").write_text(json.dumps({"metadata": {"name": "gated"}, "spec": spec}))
    rows = [{"text": "apple pear", "label": label} for label in "ab" * 10]
    (tmp_path / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return tmp_path


def describe(job, endpoint, token, cache="cache"):
    environment = {name: value for name, value in os.environ.items() if not name.startswith("HF_")}
    environment |= {"HF_ENDPOINT": endpoint, "HF_HOME": str(job / cache)}
    environment |= {"HF_TOKEN": token} if token else {}
    return subprocess.run(
        [AGENT, "describe", "--job", str(job / "job.json"), "--model", "org/gated@main", "--data", str(job)],
        capture_output=True, text=True, timeout=150, check=False, env=environment,
    )  # fmt: skip


def test_a_token_opens_the_model_and_is_said_nowhere(job, tmp_path_factory):
    files = tmp_path_factory.mktemp("files")
    save_tiny_model("bert", files)
    with hub("org/gated", files, TOKEN) as served:
        for token in (None, "hf_wrong"):
            refused = describe(job, served.url, token)
            assert refused.returncode == 2, refused.stderr
            assert refused.stderr == (
                "fedpipe-agent: org/gated: the hub wants a token that may read it; set HF_TOKEN, or "
                "spec.model.huggingFace.tokenSecret in a cluster, and accept the model's terms on its page\n"
            )
        assert served.refused > 0
        done = describe(job, served.url, TOKEN)
        served.status = 503
        away = describe(job, served.url, TOKEN, cache="other")
        assert away.returncode == 1, "a restart helps"
        assert away.stderr == (
            "fedpipe-agent: org/gated: the hub does not answer now, and the model is not in its cache\n"
        )
    assert done.returncode == 0, done.stderr
    assert Registration.model_validate_json(done.stdout).samples == 18
    assert TOKEN not in done.stdout + done.stderr
    left = [path for path in job.rglob("*") if path.is_file()]
    assert not [path for path in left if TOKEN.encode() in path.read_bytes()]
