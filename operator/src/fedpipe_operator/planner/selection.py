# SPDX-License-Identifier: Apache-2.0
"""Which weight matrices are trained (METHOD §1)."""

import math
import random
from collections.abc import Iterable, Mapping

from fedpipe_api import wire
from fedpipe_api.base import UserError
from fedpipe_api.job import Selection
from fedpipe_api.lora.format import MatrixShape

HYSTERESIS = 0.1
"""A newcomer must score so much above a selected matrix to take its place: scores are nearly tied there."""


def check_scores(scores: Mapping[str, float], names: Iterable[str]) -> None:
    """Check importance scores: one finite, non-negative score for each matrix and no other.

    Raises:
        UserError: names the first matrix that is missing, unknown or has no valid score.
    """
    known = set(names)
    for name in sorted(known - scores.keys()):
        raise UserError(f"importance: matrix {name} is missing; profile again with the same adapter.modules")
    for name, score in scores.items():
        if name not in known:
            raise UserError(f"importance: {name} is not a candidate matrix of the model; profile again")
        if not math.isfinite(score) or score < 0:
            raise UserError(
                f"importance: the score of {name} is {score}; profile again, or lower learningRate"
            )


def select_matrices(
    scores: Mapping[str, float],
    keep: float,
    previous: Iterable[str] = (),
    hysteresis: float = HYSTERESIS,
) -> tuple[str, ...]:
    """Return the best-scored share of the matrices, sorted by name.

    Args:
        scores: importance by matrix, checked.
        keep: share to keep, in (0, 1]; at least one matrix.
        previous: the selection so far, whose scores count 1 + hysteresis times.
        hysteresis: see there.
    """
    held = set(previous)

    def order(name: str) -> tuple[float, str]:
        return -scores[name] * (1 + hysteresis if name in held else 1), name

    return tuple(sorted(sorted(scores, key=order)[: count_kept(len(scores), keep)]))


def count_kept(candidates: int, keep: float) -> int:
    """Return how many matrices a share is, at least one."""
    return max(1, round(keep * candidates))


def selected_matrices(
    shape: wire.ModelShape,
    selection: Selection,
    scores: Mapping[str, float] | None,
    previous: Iterable[str],
    seed: int,
) -> tuple[MatrixShape, ...]:
    """Return the matrices to train by the job's selection mode, in the model's order.

    Before profiling, mode importance takes the largest matrices, so that whatever is selected later fits too.

    Raises:
        UserError: a listed matrix is no candidate, or the scores are not valid.
    """
    names = [matrix.name for matrix in shape.matrices]
    if scores is not None:
        check_scores(scores, names)
    kept = count_kept(len(names), selection.keep)
    chosen: set[str]
    if selection.mode == "all":
        chosen = set(names)
    elif selection.mode == "list":
        chosen = set(selection.matrices)
        for name in sorted(chosen - set(names)):
            raise UserError(
                f"spec.adapter.selection.matrices: {name} is not a candidate matrix of the model; "
                f"candidates are named like {names[0]}"
            )
    elif selection.mode == "random":
        chosen = set(random.Random(f"selection {seed}").sample(sorted(names), kept))  # noqa: S311
    elif scores is not None:
        chosen = set(select_matrices(scores, selection.keep, previous))
    else:
        largest = sorted(shape.matrices, key=lambda matrix: (-matrix.rows - matrix.columns, matrix.name))
        chosen = {matrix.name for matrix in largest[:kept]}
    return tuple(matrix for matrix in shape.matrices if matrix.name in chosen)
