# SPDX-License-Identifier: Apache-2.0
"""Whole trainings of the paper comparison on a tiny model: measured, and the same when done again."""

import gzip
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import save_file

from agent_fixtures import LABELS, save_tiny_model, write_rows
from bench.paper_federation import Federation, _int8, _spectrum
from bench.paper_systems import SYSTEMS
from bench.paper_tasks import Scenario, Setting
from fedpipe_api.job import Method


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Setting]:
    """A folder of data and the setting of a tiny comparison."""
    root = tmp_path_factory.mktemp("paper")
    folder = root / "20newsgroups"
    folder.mkdir()
    for name, count in (("train", 160), ("test", 40)):
        rows = write_rows(root / "rows.jsonl", count, seed=count).read_bytes()
        (folder / f"{name}.jsonl.gz").write_bytes(gzip.compress(rows))
    (folder / "labels.json").write_text(json.dumps(LABELS))
    model = save_tiny_model("bert", root / "model")
    return root, Setting(rounds=2, documents=160, steps=4, batch=4, test=40, warmup=2, news=str(model))


def _trained(
    name: str, inputs: tuple[Path, Setting], work: Path, scores: dict[str, float] | None = None
) -> dict[str, Any]:
    root, setting = inputs
    scenario = Scenario("news", "heterogeneous", "dirichlet", name, 0)
    return Federation(scenario, setting, root, work, scores).run(lambda number, line: None)


@pytest.mark.parametrize("name", ["centralised", "vanilla", "zero-pad", "stack", "fedpipe"])
def test_a_training_is_measured_whole(name: str, inputs: tuple[Path, Setting], tmp_path: Path) -> None:
    run = _trained(name, inputs, tmp_path)
    first, last = run["rounds"]
    assert [first["round"], last["round"]] == [1, 2]
    assert 0 < last["loss"] < 2
    assert run["profile"]["seconds"] < first["seconds"] < last["seconds"]
    assert 0 < last["done"] <= last["planned"]
    if name == "centralised":
        assert last["up"] == last["down"] == 0
        assert last["planned"] == 8 * 4
        return
    assert first["down"] == 0  # there is no global adapter yet
    assert last["down"] > 0
    # Factors as they are on the wire; the rest is the files' headers and the head, always float32.
    width = 2 if SYSTEMS[name].method is Method.EXACT and name != "vanilla" else 4
    uploads = sum(width * run["trainable"][node] for node in run["plans"])
    assert uploads <= first["up"] - run["profile"]["up"] < uploads + 8 * 8192
    assert all(run["peak"][node] <= run["budget"][node] for node in run["peak"])
    if name == "fedpipe":
        assert set(run["scores"]) > set(run["selected"])
        assert first["relativeError"] < 1e-6
        assert run["final"]["levers"]["rank all, fp32"]["loss"] == pytest.approx(last["loss"])


def test_a_training_done_again_is_the_same(inputs: tuple[Path, Setting], tmp_path: Path) -> None:
    one, two = (_trained("fedpipe", inputs, tmp_path / name) for name in ("one", "two"))
    assert one["rounds"] == two["rounds"]
    assert one["plans"] == two["plans"]


def test_a_server_optimizer_has_its_state_in_the_next_round(
    inputs: tuple[Path, Setting], tmp_path: Path
) -> None:
    """And a training that is given the importance which another found plans as that one did."""
    inputs = inputs[0], replace(inputs[1], base="fp32")
    plain = _trained("fedpipe", inputs, tmp_path / "plain")
    momentum = _trained("momentum-0.5", inputs, tmp_path / "momentum", plain["scores"])
    assert momentum["plans"] == plain["plans"]
    ours, theirs = ([row["loss"] for row in run["rounds"]] for run in (momentum, plain))
    assert ours[0] == theirs[0]
    assert ours[1] != theirs[1]
    assert all(row["stateBytes"] > 0 for row in momentum["rounds"])
    assert all(row["stateBytes"] == 0 for row in plain["rounds"])


def test_spectrum_counts_components_by_energy(tmp_path: Path) -> None:
    left = np.diag([3.0, 1.0, 0.1]).astype(np.float32)
    save_file({"m.lora_B": left, "m.lora_A": np.eye(3, dtype=np.float32)}, tmp_path / "g")
    assert _spectrum(tmp_path / "g") == {"rank0.9": 2.0, "rank0.99": 2.0}


def test_int8_is_within_half_a_step_of_each_component() -> None:
    tensor = np.random.default_rng(0).normal(size=(20, 4)).astype(np.float32) * [100, 1, 0.01, 0]
    step = np.abs(tensor).max(axis=0) / 127
    assert (np.abs(_int8("m.lora_B", tensor) - tensor) <= step / 2 + 1e-6 * np.abs(tensor)).all()
