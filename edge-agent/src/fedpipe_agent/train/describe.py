# SPDX-License-Identifier: Apache-2.0
"""`fedpipe-agent describe`: the registration that an agent would send for a job, without a coordinator."""

import argparse
import json
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path

from fedpipe_api import wire
from fedpipe_api.base import UserError
from fedpipe_api.job import FedPipeJob, Precision
from fedpipe_api.node import Capacity

from ..console import own_lines_only
from ..documents import load
from ..kernels import Check
from .command import set_environment
from .examples import check_length, count

JOB_LIMIT = 2**20
"""Bytes of the largest manifest, as the API server limits them."""


def main(argv: Sequence[str]) -> int:
    """Print one registration a line, in the order of the data directories.

    Raises:
        UserError: a mistake in the arguments, the job, the model or the data.
    """
    options = _parser().parse_args(argv)
    job = load(options.job, FedPipeJob, JOB_LIMIT)
    capacities = [load(path, Capacity) for path in options.capacity] or [Capacity()] * len(options.data)
    if len(capacities) != len(options.data):
        raise UserError(
            f"--capacity: {len(capacities)} files for {len(options.data)} directories of --data; give as many"
        )
    set_environment(capacities[0])
    with own_lines_only():
        found = _describe(job, options, capacities)
    for registration in found:
        sys.stdout.write(json.dumps(registration.to_dict()) + "\n")
    return 0


def _describe(
    job: FedPipeJob, options: argparse.Namespace, capacities: list[Capacity]
) -> list[wire.Registration]:
    spec = job.spec
    precisions = dict.fromkeys(precision for capacity in capacities for precision in capacity.precisions)
    check = Check(precisions) if options.verify else None
    try:
        # The files first: they need no torch.
        counts = {path: count(path, spec.data, spec.model) for path in dict.fromkeys(options.data)}
        from . import model as base
        from .agent import registration
        from .device import Device
        from .packing import check_packing
        from .private_gradients import Budget, protectable
        from .shape import longest_input, read_shape

        source = base.Source(options.model)
        config = base.read_config(source, spec.model, base.read_tokenizer(source).pad_token_id)
        check_length(spec.data, longest_input(config))
        check_packing(spec.data, config.model_type)
        # A repository's weights are not fetched for a plan.
        stored = source if source.local else None
        shape = read_shape(config, spec.model.task, spec.adapter.modules, stored)
        shape = protectable(shape) if spec.privacy else shape
        results = check.results() if check else _as_declared(precisions)
    finally:
        if check:
            check.stop()
    kernels = {result.precision: result for result in results}
    found = []
    for capacity, directory in zip(capacities, options.data, strict=True):
        device = Device(capacity)
        device.reset_peak()
        train, held_out, rows = counts[directory]
        notes = rows.notes()
        if spec.privacy:
            # As the agent has it: nothing is held out, and what is counted of rows is withheld.
            train, held_out, notes = (
                train + (held_out if spec.data.evaluation is None else 0),
                0,
                wire.DataNotes(),
            )
            Budget(spec.privacy, train)
        facts = device.facts(tuple(kernels[precision] for precision in capacity.precisions))
        found.append(registration(facts, shape, (train, held_out), notes))
    return found


def _as_declared(precisions: Iterable[Precision]) -> tuple[wire.KernelResult, ...]:
    return tuple(wire.KernelResult(precision=precision, usable=True) for precision in precisions)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="fedpipe-agent describe",
        description="Print the registration that an agent would send, as JSON; trains nothing.",
    )
    parser.add_argument("--job", required=True, type=Path, help="manifest of the job, JSON or YAML")
    parser.add_argument(
        "--model", required=True, help="model directory, or repository as owner/name@revision"
    )
    parser.add_argument("--data", required=True, type=Path, nargs="+", help="directory of each node's data")
    parser.add_argument(
        "--capacity",
        type=Path,
        nargs="+",
        default=[],
        help="JSON or YAML file with the capacity of each node",
    )
    parser.add_argument(
        "--verify",
        action="store_true",
        help="run a kernel of each precision; without it those of the capacity are taken as usable",
    )
    return parser
