# SPDX-License-Identifier: Apache-2.0
"""Random schedules of faults over the real store: no accepted update lost or doubled, no job stuck without a reason.

Each schedule is drawn from its number and the seed: crashes, SIGKILL, a full disk, clock jumps, slow fsync,
deletion, suspension, edited specs, calls that are broken off, later and older versions, lost agents and flipped
bits, on a store of its own, with nodes that work between them. A crash leaves the engine as it stands and goes on
with the files as they are; of `--kills` of the schedules the first one or two parts run in processes that die by
SIGKILL, at a drawn place of the engine's work. What was answered is noted outside, and every start is compared
with it: the records, the state after each, the updates. At the end the job must succeed, with the bytes that an
undisturbed job has wherever the updates are the same.

    python tests/bench/chaos.py --schedules 1000 --seed 1 --out tests/bench/results/chaos.json
"""

import argparse
import asyncio
import contextlib
import json
import logging
import multiprocessing
import os
import random
import signal
import sys
import tempfile
import time
import traceback
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor, as_completed
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))

from bench_machine import commit, machine
from chaos_faults import PLACES, Kill
from chaos_schedule import LONGEST, Chaos
from chaos_witness import LATER, Broken, Witness, set_version

from fedpipe_operator.engine import background, driver, silence
from fedpipe_operator.engine.state import JobState
from fedpipe_operator.store.ledger import SCHEMA
from standins.server import job

Rounds = dict[int, tuple[dict[str, str], str]]
"""By round: the digest of each node's update, and of the adapter made of them."""

# Nothing here cuts the power, and a disk's fsyncs would be most of the time.
MEMORY = Path("/dev/shm") if Path("/dev/shm").is_dir() else None


@contextlib.contextmanager
def quick() -> Iterator[None]:
    """Shorten the engine's pauses, and keep its log of expected failures off the screen."""
    constants = [
        (driver, "RETRY_SECONDS", 0.02),
        (silence, "PAUSE_SECONDS", 0.02),
        (background, "FIRST_PAUSE", 0.02),
    ]
    before = [getattr(module, name) for module, name, _ in constants]
    logging.disable(logging.CRITICAL)
    for module, name, value in constants:
        setattr(module, name, value)
    try:
        yield
    finally:
        logging.disable(logging.NOTSET)
        for (module, name, _), value in zip(constants, before, strict=True):
            setattr(module, name, value)


def rounds_of(state: JobState) -> Rounds:
    """Return what went into each round of a job, and what came of it."""
    return {
        number: ({node: m.digest for node, m in known.updates.items()}, known.result.adapter.digest)
        for number, known in state.rounds.items()
        if known.result
    }


def undisturbed() -> Rounds:
    """Return the rounds of a job that nothing happens to."""

    async def work(chaos: Chaos) -> JobState:
        await chaos.start()
        return await finished(chaos)

    with quick(), stored() as (store, said):
        witness = Witness(said)
        witness.say("spec", job(3, LONGEST).to_dict())
        return rounds_of(asyncio.run(work(Chaos(store, random.Random(0), witness))))


@contextlib.contextmanager
def stored() -> Iterator[tuple[Path, Path]]:
    """Yield the paths of a store and of what is said of it, in a directory of their own."""
    with tempfile.TemporaryDirectory(prefix="chaos-", dir=MEMORY) as temporary:
        store = Path(temporary) / "store"
        (Path(temporary) / "first" / "store").mkdir(parents=True)
        store.symlink_to(Path(temporary) / "first" / "store")
        yield store, Path(temporary) / "said"


async def finished(chaos: Chaos) -> JobState:
    """Return the state of a job that is brought to its end; the engine is stopped."""
    try:
        return await chaos.conclude()
    finally:
        with contextlib.suppress(Exception):
            await chaos.engine.stop()


async def disturbed(chaos: Chaos, steps: int) -> JobState:
    """Run the last part of a schedule; raises Broken."""
    await chaos.run(steps)
    return await finished(chaos)


def killed(store: Path, said: Path, chance: random.Random) -> None:
    """Run a part of a schedule in a process of its own, which dies by SIGKILL; raises Broken."""
    place = chance.choice(sorted(PLACES))
    kill = Kill(place, chance.randint(1, PLACES[place]), chance.choice([0.0, chance.uniform(0, 0.02)]))
    child = os.fork()
    if child == 0:
        witness = Witness(said)
        try:
            asyncio.run(Chaos(store, chance, witness, kill).run(40))
            kill.place = "the end"
            kill.now(witness)
        except BaseException:
            witness.say("broken", traceback.format_exc()[-1500:])
        os._exit(1)
    _, ended = os.waitpid(child, 0)
    path = store / "ledger.sqlite"
    if path.exists() and set_version(path, SCHEMA) not in (LATER, SCHEMA):
        set_version(path, 0)
    with contextlib.closing(Witness(said)) as witness:
        if witness.broken or not os.WIFSIGNALED(ended) or os.WTERMSIG(ended) != signal.SIGKILL:
            raise Broken(witness.broken or f"the process ended with {ended}")


def schedule(seed: int, number: int, kill: bool, reference: Rounds) -> tuple[int, dict[str, int], str | None]:
    """Run a schedule by its number; return what happened in it, and which rule was broken."""
    chance = random.Random(f"{seed}/{number}")
    with quick(), stored() as (store, said):
        try:
            for part in range(chance.randint(1, 2) if kill else 0):
                killed(store, said, random.Random(f"{seed}/{number}/{part}"))
            with contextlib.closing(Witness(said)) as witness:
                found = rounds_of(
                    asyncio.run(disturbed(Chaos(store, chance, witness), chance.randint(8, 30)))
                )
                done = dict(witness.done)
            same = [n for n in found if all(found[m][0] == reference[m][0] for m in range(1, n + 1))]
            if any(found[n][1] != reference[n][1] for n in same):
                raise Broken("the same updates gave another adapter")
        except BaseException:
            return number, {}, traceback.format_exc()[-1500:]
    return number, done | {"rounds": len(found), "rounds compared": len(same)}, None


def run(schedules: int, seed: int, kills: float, processes: int) -> Iterator[dict[str, Any]]:
    """Yield the outcome of the schedules so far, after each of them."""
    started, total, failures = time.monotonic(), Counter[str](), {}
    reference, every, killed_in = undisturbed(), max(1, round(1 / kills)) if kills else 0, 0
    with ProcessPoolExecutor(processes, multiprocessing.get_context("spawn")) as pool:
        waiting = [
            pool.submit(schedule, seed, number, bool(every) and number % every == 0, reference)
            for number in range(schedules)
        ]
        for ended, found in enumerate(as_completed(waiting), 1):
            number, done, error = found.result()
            total.update(done)
            killed_in += any(kind.startswith("killed") for kind in done)
            if error is not None:
                failures[number] = error
                print(f"schedule {number}: {error}", file=sys.stderr, flush=True)
            yield {
                "schedules": ended,
                "with_sigkill": killed_in,
                "seed": seed,
                "store": str(MEMORY or tempfile.gettempdir()),
                "failures": failures,
                "happened": dict(sorted(total.items())),
                "seconds": round(time.monotonic() - started, 1),
            }


def main() -> int:
    """Run from the command line; exit 1 when a rule was broken."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--schedules", type=int, default=1000)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--kills", type=float, default=0.5, help="share of schedules with SIGKILLs")
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--out", type=Path, help="written after each schedule, so a run may be cut short")
    options = parser.parse_args()
    measured = {"commit": commit(), "machine": machine()}
    text, failed = "", False
    for found in run(options.schedules, options.seed, options.kills, options.processes):
        text, failed = json.dumps(found | measured, indent=1), bool(found["failures"])
        if options.out:
            options.out.write_text(text + "\n")
    print(text)
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
