# SPDX-License-Identifier: Apache-2.0
"""The paper comparison's targets on synthetic results, its report and its command."""

import hashlib
import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from bench import paper, paper_check, paper_report
from bench.paper_systems import ABLATIONS, BASELINES
from bench.paper_tasks import Scenario, Setting
from fedpipe_api.base import UserError

ROUNDS = 10
SETTING = Setting(rounds=ROUNDS)


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
    assert paper.main(["run", *given, "--base", "fp64"]) == 2
    assert "--base fp64: must be one of planned, fp32, bf16, int8, nf4" in capsys.readouterr().err


def test_importance_is_measured_once_for_the_same_data(tmp_path: Path) -> None:
    path = tmp_path / "paper.json"
    scenario = Scenario("news", "heterogeneous", "dirichlet", "momentum-0.5", 1)
    assert paper._scores(scenario, path) == {}
    runs = [
        vars(replace(scenario, **changes)) | {"rounds": [], "scores": scores}
        for changes, scores in (
            ({"system": "fedit"}, {}),
            ({"system": "fedpipe", "seed": 0}, {"other": 1.0}),
            ({"system": "fedpipe"}, {"m": 2.0}),
        )
    ]
    path.write_text(json.dumps(_results() | {"runs": runs}))
    assert paper._scores(scenario, path) == {"m": 2.0}


def test_report_writes_a_table_and_plots(tmp_path: Path) -> None:
    paths = paper_report.report(_results(), tmp_path, "paper")
    assert all(path.stat().st_size > 0 for path in paths)
    assert len(paths) == 1 + 4 * 2
    text = paths[0].read_text()
    assert "| FedPipe | 3 | 1.0000 ± 0.0000 |" in text
    assert "## news, heterogeneous fleet, dirichlet split" in text
