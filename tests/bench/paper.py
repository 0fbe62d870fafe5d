# SPDX-License-Identifier: Apache-2.0
"""The comparison of the FedPipe paper: systems × tasks × fleets × splits × seeds, on one virtual clock.

`python tests/bench/paper.py run --data-root DIR [--tasks news e2e] [--fleets …] [--splits …] [--systems …]
    [--seeds 0 1 2] [--rounds 12] [--documents 3000] [--model news=DIR] [--jobs 2] [--out RESULTS.json]`
`python tests/bench/paper.py report RESULTS.json`: table and plots beside the results
`python tests/bench/paper.py check RESULTS.json` (or `--check`): every target, from the raw numbers; status 1 where one
is missed or has no data

DIR holds the folders 20newsgroups and e2e_nlg with gzipped JSON Lines. Each finished training is written to the
results at once; run the same command again to go on. Nodes train here one after the other on one CPU thread; what the
fleet is, and what a second and a byte of memory mean, is declared in paper_fleet.py.
"""

import argparse
import json
import multiprocessing
import os
import queue
import sys
import tempfile
import time
import warnings
from collections.abc import Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from dataclasses import fields
from itertools import product
from pathlib import Path
from typing import Any

# The processes of --jobs share the machine; set before torch and numpy read it.
os.environ.setdefault("OMP_NUM_THREADS", "1")
sys.path.insert(0, str(Path(__file__).parents[1]))

from bench import paper_base
from bench.bench_machine import machine
from bench.paper_fleet import FLEETS
from bench.paper_systems import ALL, SYSTEMS
from bench.paper_tasks import TASKS, Scenario, Setting, base_digest, read_rows
from fedpipe_api.base import UserError
from fedpipe_api.precisions import Precision

RESULTS = Path(__file__).parent / "results"
SPLITS = ("dirichlet", "iid")
KEY = ("task", "fleet", "split", "system", "seed")

_progress: Any = None


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command; return the exit status."""
    given = list(sys.argv[1:] if arguments is None else arguments)
    if given[:1] == ["--check"]:
        given[0] = "check"
    options = _parser().parse_args(given)
    try:
        commands = {"run": run, "report": report, "check": check}
        return commands[options.command](options)
    except UserError as error:
        print(f"paper.py: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("paper.py: stopped; run the same command again to go on", file=sys.stderr)
        return 130


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    commands = parser.add_subparsers(dest="command", required=True)
    runs = commands.add_parser("run", help="train what the results lack")
    runs.add_argument("--data-root", type=Path, required=True, help="folder of 20newsgroups and e2e_nlg")
    runs.add_argument("--tasks", nargs="+", choices=TASKS, default=TASKS)
    runs.add_argument("--fleets", nargs="+", choices=FLEETS, default=["heterogeneous"])
    runs.add_argument("--splits", nargs="+", choices=SPLITS, default=["dirichlet"])
    runs.add_argument("--systems", nargs="+", choices=ALL, default=list(SYSTEMS), metavar="SYSTEM")
    runs.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    runs.add_argument("--model", nargs="+", default=[], metavar="TASK=DIR", help="base model of a task")
    runs.add_argument("--jobs", type=int, default=2, help="trainings at a time, a CPU thread each")
    runs.add_argument("--out", type=Path, default=RESULTS / "paper.json")
    for field in fields(Setting):
        if field.name not in TASKS:
            option = "--" + field.name.replace("_", "-")
            runs.add_argument(option, type=type(field.default), default=field.default)
    for name, text in (("report", "table and plots"), ("check", "every target, from the raw numbers")):
        commands.add_parser(name, help=text).add_argument("results", type=Path)
    return parser


def run(options: argparse.Namespace) -> int:
    """Train every scenario that the results lack."""
    models = dict(entry.partition("=")[::2] for entry in options.model)
    for name, directory in models.items():
        if name not in TASKS or not directory:
            raise UserError(f"--model {name}: write it as news=DIR or e2e=DIR")
    named = {field.name: getattr(options, field.name) for field in fields(Setting) if field.name not in TASKS}
    setting = Setting(**named, **models)
    bases = ("planned", *Precision)
    if setting.base not in bases:
        raise UserError(f"--base {setting.base}: must be one of {', '.join(bases)}")
    results = _opened(options.out, setting)
    scenarios = [
        Scenario(*chosen)
        for chosen in product(options.tasks, options.fleets, options.splits, options.systems, options.seeds)
    ]
    # Seed by seed, so that a comparison of all systems is there early.
    scenarios.sort(key=lambda scenario: scenario.seed)
    done = {_key(found) for found in results["runs"]}
    wanted = [scenario for scenario in scenarios if _key(vars(scenario)) not in done]
    if setting.e2e is None and any(scenario.task == "e2e" for scenario in wanted):
        paper_base.make(read_rows(options.data_root, "e2e", "train"))
    for task in sorted({scenario.task for scenario in wanted}):
        found = base_digest(task, setting)
        if results["bases"].setdefault(task, found) != found:
            raise UserError(
                f"{options.out}: its trainings of {task} began from a base with sha256 {results['bases'][task]}, "
                f"this one has {found}; give another --out"
            )
    print(f"{len(wanted)} of {len(scenarios)} trainings to do, {setting.rounds} rounds each", flush=True)
    failed = _train(wanted, setting, options, results)
    print(f"{len(results['runs'])} trainings in {options.out}")
    return 1 if failed else 0


def _train(
    wanted: list[Scenario], setting: Setting, options: argparse.Namespace, results: dict[str, Any]
) -> int:
    """Train in processes, writing each result when it is there; return how many failed."""
    context = multiprocessing.get_context("spawn")
    failed = rounds = 0
    begin = time.monotonic()
    with context.Manager() as manager:
        lines = manager.Queue()
        with ProcessPoolExecutor(
            options.jobs, mp_context=context, initializer=_begin, initargs=(lines,), max_tasks_per_child=1
        ) as pool:
            pending: set[Future[dict[str, Any]]] = {
                pool.submit(_one, scenario, setting, options.data_root, options.out) for scenario in wanted
            }
            while pending:
                finished, pending = wait(pending, timeout=1, return_when=FIRST_COMPLETED)
                for line in _drained(lines):
                    rounds += 1
                    left = len(wanted) * setting.rounds - rounds
                    eta = _clock((time.monotonic() - begin) / rounds * left)
                    print(f"{line}  ETA {eta}", flush=True)
                for future in finished:
                    try:
                        results["runs"].append(future.result())
                    except UserError:
                        pool.shutdown(wait=False, cancel_futures=True)
                        raise
                    except Exception as error:
                        failed += 1
                        print(f"failed: {error!r}", file=sys.stderr, flush=True)
                        continue
                    _write(options.out, results)
    return failed


def _begin(lines: Any) -> None:
    global _progress
    _progress = lines
    warnings.filterwarnings("ignore")


def _one(scenario: Scenario, setting: Setting, root: Path, out: Path) -> dict[str, Any]:
    """Train one scenario in this process, with the importance that a finished one of the same data has found."""
    from transformers.utils import logging

    from bench.paper_federation import Federation

    logging.set_verbosity_error()
    logging.disable_progress_bar()

    def show(number: int, line: str) -> None:
        _progress.put(f"{scenario}  round {number}/{setting.rounds}  {line}")

    with tempfile.TemporaryDirectory(prefix="paper-") as work:
        return Federation(scenario, setting, root, Path(work), _scores(scenario, out)).run(show)


def _scores(scenario: Scenario, out: Path) -> dict[str, float]:
    """Return the importance that a finished training of the same data has measured; empty without one."""
    same = ("task", "fleet", "split", "seed")
    runs = _read(out)["runs"] if out.exists() else []
    found = (run["scores"] for run in runs if all(run[name] == getattr(scenario, name) for name in same))
    return next((scores for scores in found if scores), {})


def _drained(progress: Any) -> list[str]:
    lines: list[str] = []
    while True:
        try:
            lines.append(progress.get_nowait())
        except queue.Empty:
            return lines


def report(options: argparse.Namespace) -> int:
    """Write the table and the plots."""
    from bench import paper_report

    results = _read(options.results)
    for path in paper_report.report(results, options.results.resolve().parent, options.results.stem):
        print(path)
    return 0


def check(options: argparse.Namespace) -> int:
    """Print a verdict for each target; status 1 unless all hold."""
    from bench import paper_check

    verdicts = list(paper_check.check(_read(options.results), options.results.resolve().parent))
    for verdict in verdicts:
        print(verdict)
    held, lacking = (sum(verdict.ok is ok for verdict in verdicts) for ok in (True, None))
    print(f"{held} of {len(verdicts)} hold, {len(verdicts) - held - lacking} missed, {lacking} without data")
    return 0 if held == len(verdicts) else 1


def _opened(path: Path, setting: Setting) -> dict[str, Any]:
    """Return the results so far, empty where there are none."""
    if not path.exists():
        return {"machine": machine(), "setting": setting.json(), "bases": {}, "runs": []}
    results = _read(path)
    other = {
        name: value
        for name, value in setting.json().items()
        if results["setting"].get(name, getattr(Setting, name)) != value
    }
    for name, value in other.items():
        raise UserError(
            f"{path}: made with {name} {results['setting'].get(name, getattr(Setting, name))}, not {value}; give another --out"
        )
    return results


def _read(path: Path) -> dict[str, Any]:
    try:
        results: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(f"{path}: {error.strerror}; make it with `paper.py run --out {path}`") from None
    except ValueError as error:
        raise UserError(f"{path}: not JSON: {error}") from None
    if not isinstance(results, dict) or not {"machine", "setting", "bases", "runs"} <= results.keys():
        raise UserError(f"{path}: no results of `paper.py run`")
    runs = results["runs"]
    if not isinstance(runs, list) or not all(
        isinstance(run, dict) and {*KEY, "rounds"} <= run.keys() for run in runs
    ):
        raise UserError(f"{path}: runs: not those of `paper.py run`")
    return results


def _write(path: Path, results: dict[str, Any]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_suffix(".tmp")
    temporary.write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
    temporary.replace(path)


def _key(found: Any) -> tuple[Any, ...]:
    return tuple(found[name] for name in KEY)


def _clock(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes // 60}h{minutes % 60:02}m" if minutes >= 60 else f"{minutes}m{rest:02}s"


if __name__ == "__main__":
    sys.exit(main())
