# SPDX-License-Identifier: Apache-2.0
"""The paper comparison's arithmetic: targets on synthetic results, the virtual clock, BLEU, resuming."""

import gzip
import hashlib
import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import save_file

from agent_fixtures import LABELS, save_tiny_model, write_rows
from bench import paper, paper_check, paper_report
from bench.paper_bleu import bleu
from bench.paper_federation import Federation, _int8, _spectrum
from bench.paper_fleet import KINDS, ORIN, common, deadline, device, round_seconds, share, under_training
from bench.paper_systems import ABLATIONS, BASELINES, SYSTEMS, Request, assign, spec_of
from bench.paper_tasks import Scenario, Setting, job
from fedpipe_api import wire
from fedpipe_api.base import UserError
from fedpipe_api.job import Method
from fedpipe_operator.planner import memory, speed
from fedpipe_operator.planner.workload import workload

ROUNDS = 10
SETTING = Setting(rounds=ROUNDS)
SHAPE = wire.ModelShape(
    architecture="bert",
    layers=6,
    hidden=384,
    heads=12,
    key_value_heads=12,
    intermediate=1536,
    vocabulary=30522,
    causal=False,
    parameters=22_713_216,
    linear_parameters=10_764_672,
    matrices=tuple(
        wire.MatrixShape(name=f"bert.encoder.layer.{layer}.attention.self.{part}", rows=384, columns=384)
        for layer in range(6)
        for part in ("query", "key", "value")
    ),
    head=(wire.TensorShape(name="classifier.weight", shape=(20, 384)),),
)
SPEC = job(Scenario("news", "heterogeneous", "iid", "fedpipe", 0), SETTING, ["a", "b"])


# BLEU


def test_bleu_by_hand() -> None:
    # Clipped by the reference that has most: 6 of 7 words ("the" counts twice), 5 of 6 pairs ("the cat" once),
    # 3 of 5 triples, 1 of 4 fours; longer than both references, so no brevity penalty.
    found = bleu(["the cat the cat on the mat"], [["the cat is on the mat", "a cat the cat on mats"]])
    assert math.isclose(found, (6 / 7 * 5 / 6 * 3 / 5 * 1 / 4) ** 0.25)


def test_bleu_of_a_short_text_pays_for_brevity() -> None:
    found = bleu(["a b c d"], [["a b c d e f"]])
    assert math.isclose(found, math.exp(1 - 6 / 4))


def test_bleu_takes_the_closest_length_and_the_whole_corpus() -> None:
    assert bleu(["A b, c d."], [["x", "a b , c d ."]]) == 1.0
    half = bleu(["a b c d", "v w x y"], [["a b c d"], ["k l m n"]])
    assert math.isclose(half, (4 / 8 * 3 / 6 * 2 / 4 * 1 / 2) ** 0.25)
    assert bleu(["a b"], [["a b"]]) == 0.0  # no 4-gram at all


# The virtual clock


def test_a_node_does_what_fits_before_the_deadline() -> None:
    part = share(download=1.0, step=0.5, upload=0.5, planned=10, limit=4.0)
    assert part.done == 5
    assert part.seconds == 4.0
    assert share(1.0, 0.5, 0.5, 3, 4.0).seconds == 3.0
    assert share(3.0, 0.5, 2.0, 3, 4.0).done == 0
    assert share(1.0, 0.5, 0.5, 7, math.inf).done == 7


def test_a_round_lasts_as_long_as_its_slowest_node() -> None:
    quick, slow = share(0.1, 0.1, 0.1, 10, 4.0), share(1.0, 0.9, 0.5, 10, 4.0)
    assert math.isclose(round_seconds([quick, slow], 4.0), slow.seconds)
    silent = share(3.0, 2.0, 2.0, 10, 4.0)
    assert round_seconds([quick, silent], 4.0) == 4.0


def test_under_training_counts_nodes_left_out() -> None:
    shares = {"a": share(0, 1, 0, 10, 4.0), "b": share(0, 0.1, 0, 10, 4.0)}
    assert under_training(shares, left_out=2, asked=10) == (40, 14)


def test_declared_memory_carries_the_kinds_rank() -> None:
    work = workload(SHAPE, SPEC, SHAPE.matrices)
    configuration, lowest = common(KINDS.values(), work.batch)
    assert (configuration.micro_batch, lowest) == (ORIN.micro_batch, ORIN.rank)
    for kind in KINDS.values():
        facts = device(kind, SHAPE, SPEC)
        ranks = dict.fromkeys(work.sides, kind.rank)
        assert memory.peak_bytes(work, facts, configuration, ranks) <= memory.budget(facts, 0.1)


def test_the_deadline_lets_the_slowest_do_a_quarter() -> None:
    work = workload(SHAPE, spec_of(SYSTEMS["fedit"], SPEC, 8), SHAPE.matrices)
    facts = device(ORIN, SHAPE, SPEC)
    configuration, rank = common((ORIN,), work.batch)
    ranks = dict.fromkeys(work.sides, rank)
    moved = speed.transfer_time(facts, speed.upload_bytes(work, ranks))
    step = speed.step_time(work, facts, configuration, ranks)
    limit = deadline(SHAPE, SPEC, 40)
    assert share(moved, step, moved, 40, limit + 1e-3).done == 10


# What systems ask of nodes


def _assigned(name: str) -> Any:
    limit = deadline(SHAPE, SPEC, SETTING.steps)
    spec = SPEC.model_copy(update={"rounds": SPEC.rounds.model_copy(update={"deadline": limit})})
    nodes = [f"{kind}-{index}" for index, kind in enumerate(KINDS)]
    devices = {node: device(KINDS[node.rpartition("-")[0]], SHAPE, spec) for node in nodes}
    system = SYSTEMS[name]
    request = Request(system, SHAPE, spec_of(system, spec, 8), dict.fromkeys(nodes, 300), devices)
    return assign(request), devices


@pytest.mark.parametrize("name", [name for name in SYSTEMS if name != "centralised"])
def test_every_system_keeps_to_the_nodes_memory(name: str) -> None:
    assigned, devices = _assigned(name)
    assert len(assigned.nodes) + len(assigned.left_out) == len(devices)
    for node, plan in assigned.nodes.items():
        assert plan.predicted_bytes <= memory.budget(devices[node], 0.1)
        assert plan.micro_batch * plan.accumulation == SETTING.batch


def test_baselines_are_alike_where_they_should_be() -> None:
    fedit, _ = _assigned("fedit")
    assert {rank for plan in fedit.nodes.values() for rank in plan.ranks.values()} == {ORIN.rank}
    stack, _ = _assigned("stack")
    ranks = [set(plan.ranks.values()) for plan in stack.nodes.values()]
    assert ranks == [{kind.rank} for kind in KINDS.values()]
    vanilla, _ = _assigned("vanilla")
    assert set(vanilla.left_out) >= {"orin-0"}
    uniform, _ = _assigned("no-heterogeneity")
    assert len({(plan.micro_batch, *plan.ranks.values()) for plan in uniform.nodes.values()}) == 1


# Whole trainings


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


def _trained(name: str, inputs: tuple[Path, Setting], work: Path) -> dict[str, Any]:
    root, setting = inputs
    scenario = Scenario("news", "heterogeneous", "dirichlet", name, 0)
    return Federation(scenario, setting, root, work).run(lambda number, line: None)


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


def test_spectrum_counts_components_by_energy(tmp_path: Path) -> None:
    left = np.diag([3.0, 1.0, 0.1]).astype(np.float32)
    save_file({"m.lora_B": left, "m.lora_A": np.eye(3, dtype=np.float32)}, tmp_path / "g")
    assert _spectrum(tmp_path / "g") == {"rank0.9": 2.0, "rank0.99": 2.0}


def test_int8_is_within_half_a_step_of_each_component() -> None:
    tensor = np.random.default_rng(0).normal(size=(20, 4)).astype(np.float32) * [100, 1, 0.01, 0]
    step = np.abs(tensor).max(axis=0) / 127
    assert (np.abs(_int8("m.lora_B", tensor) - tensor) <= step / 2 + 1e-6 * np.abs(tensor)).all()


# Targets


def _run(task: str, split: str, system: str, seed: int, loss: float, **changes: Any) -> dict[str, Any]:
    """Return a synthetic run: its loss falls linearly to `loss` at 1 s and 1 MB a round."""
    rate, size = changes.get("rate", 1.0), changes.get("size", 1e6)
    rows = [
        {
            "round": number,
            "loss": loss + 0.1 * (ROUNDS - number),
            "accuracy": 0.6 - 0.1 * loss,
            "perplexity": math.exp(loss),
            "seconds": rate * number,
            "down": size * number * 0.7,
            "up": size * number * 0.3,
            "planned": 80,
            "done": changes.get("done", 80),
            "relativeError": changes.get("error", 1e-7),
            "discardedEnergy": changes.get("discarded", 0.0),
            "rank0.9": 4.0,
            "rank0.99": 12.0,
        }
        for number in range(1, ROUNDS + 1)
    ]
    return {
        "task": task,
        "fleet": "heterogeneous",
        "split": split,
        "system": system,
        "seed": seed,
        "rounds": rows,
        "final": {"bleu": 0.5 - 0.1 * loss} if task == "e2e" else {},
        "trainable": {"orin-0": 1000, "a100-1": 2000},
        "peak": {"orin-0": changes.get("peak", 100), "a100-1": 200},
        "budget": {"orin-0": 120, "a100-1": 300},
    }


def _results(**fedpipe: Any) -> dict[str, Any]:
    """Return results in which every target of training holds, but for changes of FedPipe."""
    runs = []
    for task in ("news", "e2e"):
        for split in ("dirichlet", "iid"):
            for seed in range(3):
                runs.append(_run(task, split, "fedpipe", seed, **{"loss": 1.0} | fedpipe))
                for name in BASELINES:
                    runs.append(_run(task, split, name, seed, 1.5 + 0.01 * seed, done=50))
                for name in ABLATIONS:
                    runs.append(_run(task, split, name, seed, 1.1))
    return {
        "machine": {"cpu": "x", "cores": 2},
        "setting": SETTING.json(),
        "bases": {"news": "a" * 64},
        "runs": runs,
    }


def _beside(folder: Path) -> Path:
    write = {
        "aggregation.json": {
            "drift": {"methods": {name: {"effective_rank": [8.0] * 30} for name in ("exact", "truncate")}}
        },
        "memory_model.json": {"points": [{"error": 0.1}, {"error": -0.12}]},
        "memory_model_cuda.json": {"points": [{"error": 0.09}]},
        "planner.json": {"results": [{"fleet": "kinds", "nodes": 1000, "matrices": 48, "seconds": 3.0}]},
    }
    for name, content in write.items():
        (folder / name).write_text(json.dumps(content))
    return folder


def _verdicts(results: dict[str, Any], folder: Path) -> dict[tuple[str, str], paper_check.Verdict]:
    return {(found.target, found.where): found for found in paper_check.check(results, folder)}


def _missed(results: dict[str, Any], folder: Path) -> set[str]:
    return {target for (target, _), found in _verdicts(results, folder).items() if found.ok is False}


def test_all_targets_hold(tmp_path: Path) -> None:
    verdicts = _verdicts(_results(), _beside(tmp_path))
    assert all(found.ok for found in verdicts.values()), [str(f) for f in verdicts.values() if not f.ok]
    assert len(verdicts) == 2 * 12 + 2 * 6 + 4


@pytest.mark.parametrize(
    ("changes", "missed"),
    [
        ({"loss": 1.6}, "final loss below every baseline's on every seed"),
        ({"loss": 1.6}, "quality at or above the baselines' within the spread"),
        ({"rate": 1.3}, "best baseline's loss in at most 60% of its time"),
        ({"size": 1.3e6}, "best baseline's loss with at most 60% of its bytes"),
        ({"loss": 1.2, "rate": 1.1, "size": 1.1e6, "peak": 110}, "ablation: no-quantization is worse"),
        ({"loss": 1.2}, "importance selects better than chance"),
        ({"done": 75}, "under-training below 5% where homogeneous exceeds 30%"),
        ({"error": 2e-6}, "aggregation error below 1e-06 within the rank bound"),
    ],
)
def test_a_target_is_missed(changes: dict[str, Any], missed: str, tmp_path: Path) -> None:
    assert missed in _missed(_results(**changes), _beside(tmp_path))


def test_one_seed_above_a_baseline_misses_the_loss(tmp_path: Path) -> None:
    results = _results()
    run = next(r for r in results["runs"] if (r["task"], r["system"], r["seed"]) == ("news", "stack", 1))
    run["rounds"][-1]["loss"] = 0.9
    verdict = _verdicts(results, _beside(tmp_path))[
        "final loss below every baseline's on every seed", "news dirichlet"
    ]
    assert verdict.ok is False
    assert "stack on seed 1: +0.1000" in verdict.figures


def test_rounds_beyond_the_rank_bound_are_reported(tmp_path: Path) -> None:
    verdicts = _verdicts(_results(error=0.05, discarded=0.01), _beside(tmp_path))
    verdict = verdicts["aggregation error below 1e-06 within the rank bound", "news dirichlet"]
    assert verdict.ok is None
    assert "error up to 5.00e-02" in verdict.figures


@pytest.mark.parametrize(("error", "held"), [(1e-8, True), (1e-5, False)])
def test_rounds_within_a_larger_rank_bound_tell_the_error(error: float, held: bool, tmp_path: Path) -> None:
    folder = _beside(tmp_path)
    (folder / paper_check.UNBOUNDED).write_text(json.dumps(_results(error=error)))
    verdicts = _verdicts(_results(error=0.05, discarded=0.01), folder)
    verdict = verdicts["aggregation error below 1e-06 within the rank bound", "e2e iid"]
    assert verdict.ok is held
    assert "error up to 5.00e-02" in verdict.figures


def test_targets_without_data_are_named(tmp_path: Path) -> None:
    results = _results()
    results["runs"] = [r for r in results["runs"] if (r["system"], r["seed"]) != ("stack", 2)]
    verdicts = _verdicts(results, tmp_path)
    verdict = verdicts["final loss below every baseline's on every seed", "news iid"]
    assert verdict.ok is None
    assert "stack has 2" in verdict.figures
    assert verdicts["memory model within 15%", "cpu"].figures == "no memory_model.json beside the results"
    assert str(verdict).startswith("NO DATA")


def test_effective_rank_that_collapses_is_missed(tmp_path: Path) -> None:
    folder = _beside(tmp_path)
    ranks = [8.0, *[3.0] * 29]
    content = {"drift": {"methods": {"exact": {"effective_rank": ranks}}}}
    (folder / "aggregation.json").write_text(json.dumps(content))
    assert "effective rank does not collapse" in _missed(_results(), folder)


# The command


def test_check_ends_with_status(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = _beside(tmp_path) / "paper.json"
    path.write_text(json.dumps(_results()))
    assert paper.main(["--check", str(path)]) == 0
    path.write_text(json.dumps(_results(loss=1.6)))
    assert paper.main(["check", str(path)]) == 1
    assert "MISS    final loss below" in capsys.readouterr().out
    empty = {"machine": {}, "setting": {}, "bases": {}, "runs": []}
    path.write_text(json.dumps(empty))
    assert paper.main(["check", str(path)]) == 1
    assert "0 of 40 hold, 0 missed" not in capsys.readouterr().out
    assert paper.main(["check", str(tmp_path / "none.json")]) == 2
    for wrong in (3, [3], [{"task": "news"}]):
        path.write_text(json.dumps(empty | {"runs": wrong}))
        assert paper.main(["check", str(path)]) == 2


def test_results_of_other_settings_are_not_mixed(tmp_path: Path) -> None:
    path = tmp_path / "paper.json"
    path.write_text(json.dumps(_results()))
    with pytest.raises(UserError, match="made with rounds 10, not 3"):
        paper._opened(path, Setting(rounds=3))


def test_trainings_from_another_base_are_not_mixed(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "paper.json"
    (tmp_path / "model.safetensors").write_bytes(b"weights")
    results = _results() | {"setting": Setting(rounds=ROUNDS, news=str(tmp_path)).json(), "runs": []}
    path.write_text(json.dumps(results))
    given = ["--data-root", str(tmp_path), "--rounds", str(ROUNDS), "--model", f"news={tmp_path}"]
    assert paper.main(["run", *given, "--tasks", "news", "--out", str(path)]) == 2
    said = capsys.readouterr().err
    assert f"began from a base with sha256 {'a' * 64}, this one has " in said
    assert hashlib.sha256(b"weights").hexdigest() in said


def test_finished_trainings_are_not_done_again(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "paper.json"
    path.write_text(json.dumps(_results()))
    given = ["--data-root", str(tmp_path), "--rounds", str(ROUNDS), "--out", str(path)]
    assert paper.main(["run", *given, "--systems", "fedpipe", "stack"]) == 0
    assert "0 of 12 trainings to do" in capsys.readouterr().out


def test_report_writes_a_table_and_plots(tmp_path: Path) -> None:
    paths = paper_report.report(_results(), tmp_path, "paper")
    assert all(path.stat().st_size > 0 for path in paths)
    assert len(paths) == 1 + 4 * 2
    text = paths[0].read_text()
    assert "| FedPipe | 3 | 1.0000 ± 0.0000 |" in text
    assert "## news, heterogeneous fleet, dirichlet split" in text
