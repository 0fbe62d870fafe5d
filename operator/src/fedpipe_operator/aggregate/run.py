# SPDX-License-Identifier: Apache-2.0
"""One round's aggregation from files to files: the entry point of the worker process."""

import math
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from os import sched_getaffinity

import numpy as np
from threadpoolctl import threadpool_limits  # type: ignore[import-untyped]

from fedpipe_api.base import UserError
from fedpipe_api.lora.codec import Float32, quantize
from fedpipe_api.lora.format import HEAD, LORA_A, LORA_B, SCALE, Encoding, scale

from . import server_optimizer as optimizer
from .comparison import Comparison, NotFiniteError, Products
from .contribution import Contribution, Figures, Matrix, saved
from .files import MalformedFileError, TensorFile, TensorWriter
from .heads import aggregate_head
from .messages import AggregationReport, AggregationRequest, StoredFile
from .methods import RULES
from .screening import Findings, screen
from .tensor_averaging import TensorSource


@dataclass(frozen=True)
class _Piece:
    """One matrix or head tensor: tensors and optimizer state by full name; figures where it was trained.

    `clipped` are the nodes whose change of it was shrunk by itself.
    """

    name: str
    tensors: dict[str, Float32]
    state: dict[str, Float32]
    products: tuple[Products, ...] = ()
    figures: Figures | None = None
    clipped: Sequence[int] = ()


@dataclass(frozen=True)
class _Pass:
    """One pass over all updates under given findings."""

    adapter: StoredFile
    sent: StoredFile | None
    server_state: StoredFile | None
    comparison: Comparison
    figures: dict[str, Figures]
    clipped: Sequence[tuple[int, str]]

    def discard(self) -> None:
        """Remove its files."""
        for file in (self.adapter, self.sent, self.server_state):
            if file is not None:
                file.path.unlink()


def aggregate_round(request: AggregationRequest) -> AggregationReport:
    """Aggregate one round.

    Every file is read a tensor at a time and one matrix a thread is in memory, so memory grows neither with
    the nodes nor with the matrices. Each matrix is computed in node order by one thread, BLAS included, so
    the same request gives the same bytes on the same kind of processor, however many threads there are. A
    pass whose updates do not all count in full (`screen`) is repeated once with what was found.

    Args:
        request: the round.

    Raises:
        UserError: the method cannot aggregate these updates, or the sum does not fit float32.
        MalformedFileError: a file is not what was accepted.
        OSError: a file is missing, or the disk is full.
    """
    with threadpool_limits(limits=1, user_api="blas"):
        return _Round(request).aggregate()


class _Round:
    def __init__(self, request: AggregationRequest) -> None:
        self._request = request
        self._updates = sorted(request.updates, key=lambda update: update.node)
        self._files = [TensorFile(update.path) for update in self._updates]
        self._adapter = TensorFile(request.adapter) if request.adapter else None
        self._state = TensorFile(request.server_state) if request.server_state else None
        self._findings = Findings([update.samples for update in self._updates])

    def aggregate(self) -> AggregationReport:
        aggregation, findings = self._request.aggregation, self._findings
        done = self._finite_pass()
        comparison = done.comparison
        if screen(aggregation.checks, aggregation.robust, comparison, self._request.norms, findings):
            done.discard()
            done = self._finite_pass()
        for index, tensor in done.clipped:
            findings.clip_head(index, tensor)
        names = [update.node for update in self._updates]
        nodes = dict(zip(names, findings.reports(comparison), strict=True))
        reports = {name: figures.report for name, figures in done.figures.items()}
        totals = _totals(list(done.figures.values()))
        return AggregationReport(done.adapter, done.sent, done.server_state, reports, nodes, *totals)

    def _finite_pass(self) -> _Pass:
        while True:
            try:
                return self._pass()
            except NotFiniteError as error:
                self._findings.reject(error.node, "the update holds NaN or infinity")

    def _pass(self) -> _Pass:
        request, server = self._request, self._request.aggregation.server
        calls = self._calls()
        comparison, figures, clipped = Comparison(len(self._updates)), {}, list[tuple[int, str]]()
        threads = request.threads or min(4, len(sched_getaffinity(0)))
        with ExitStack() as opened:
            pool = opened.enter_context(ThreadPoolExecutor(threads, "aggregate"))
            adapter = opened.enter_context(TensorWriter(request.directory, "adapter", _tensor_names(calls)))
            sent = None
            if request.aggregation.method.download is Encoding.INT8:
                names = [name + suffix for name in _tensor_names(calls) for suffix in ("", SCALE)]
                sent = opened.enter_context(TensorWriter(request.directory, "sent", names))
            state = None
            if optimizer.has_momentum(server):
                names = _state_names(calls)
                state = opened.enter_context(TensorWriter(request.directory, "server-state", names))
            for piece in _in_order(pool, calls.values(), threads + 1):
                _add_all(adapter, piece.tensors)
                if sent is not None:
                    _add_sent(sent, piece)
                if state is not None:
                    _add_all(state, piece.state)
                clipped += [(node, piece.name) for node in piece.clipped]
                for products in piece.products:
                    comparison.add(products)
                if piece.figures is not None:
                    figures[piece.name] = piece.figures
        stored, kept = (file.stored if file else None for file in (sent, state))
        return _Pass(adapter.stored, stored, kept, comparison, figures, clipped)

    def _calls(self) -> dict[str, Callable[[], _Piece]]:
        """Return what is to be done for each matrix and head tensor, in the order of their names."""
        known = set(self._adapter.entries) if self._adapter else set()
        matrices = {name.removesuffix(LORA_A) for name in known if _is_factor(name)}
        heads = {name for name in known if name.startswith(HEAD)}
        for index in self._findings.accepted():
            matrices.update(name for name, rank in self._updates[index].ranks.items() if rank)
            heads.update(name for name in self._files[index].entries if name.startswith(HEAD))
        calls = {name: partial(self._matrix, name) for name in matrices}
        calls |= {name: partial(self._head, name) for name in heads}
        return dict(sorted(calls.items()))

    def _matrix(self, name: str) -> _Piece:
        trained = [index for index in self._findings.accepted() if self._updates[index].ranks.get(name)]
        if not trained:
            return self._carried_over(name)
        weights = self._findings.weights
        total = weights[trained].sum()
        parts = [
            Contribution(
                index,
                self._files[index],
                rank := self._updates[index].ranks[name],
                float(weights[index] / total),
                float(self._findings.clips[index]),
                scale(self._request.alpha, rank, self._request.rs_lora),
            )
            for index in trained
        ]
        aggregation = self._request.aggregation
        rounded = aggregation.method.download is Encoding.INT8 and not self._request.as_is
        matrix = Matrix(name, parts, self._adapter, self._state, aggregation, rounded)
        self._require_shapes(matrix)
        done = RULES[aggregation.method](matrix)
        tensors, state = (
            {name + suffix: tensor for suffix, tensor in found.items()}
            for found in (done.tensors, done.state)
        )
        return _Piece(name, tensors, state, done.products, done.figures)

    def _require_shapes(self, matrix: Matrix) -> None:
        rows, columns = matrix.shape
        held = [
            (f"the update of {self._updates[part.node].node}", part.file) for part in matrix.contributions
        ]
        ranks: list[int | None] = [part.rank for part in matrix.contributions]
        if self._adapter and matrix.name + LORA_A in self._adapter:
            held.append(("the global adapter", self._adapter))
            ranks.append(None)
        for (owner, file), rank in zip(held, ranks, strict=True):
            left, right = file.shape(matrix.name + LORA_B), file.shape(matrix.name + LORA_A)
            wanted = right[0] if rank is None else rank
            if left != (rows, wanted) or right != (wanted, columns):
                raise MalformedFileError(f"{owner}: matrix {matrix.name} has factors {left} and {right}")

    def _head(self, name: str) -> _Piece:
        senders = [index for index in self._findings.accepted() if name in self._files[index]]
        if not senders:
            return self._carried_over(name)
        shape = self._files[senders[0]].shape(name)
        size = math.prod(shape)
        weights = self._findings.weights
        total = weights[senders].sum()
        clips = self._findings.clips
        sources = [
            TensorSource(
                index,
                self._files[index],
                name,
                size,
                1,
                1.0,
                float(weights[index] / total),
                float(clips[index]),
            )
            for index in senders
        ]
        previous = saved(self._adapter, name, ("",)).get("")
        state = {
            suffix: tensor.reshape(-1, 1) if suffix != optimizer.STEPS else tensor
            for suffix, tensor in saved(self._state, name, optimizer.SUFFIXES).items()
        }
        aggregation = self._request.aggregation
        done, clipped = aggregate_head(
            sources,
            previous=None if previous is None else previous.reshape(-1, 1),
            robust=aggregation.robust,
            server=aggregation.server,
            state=state,
        )
        moved = {
            name + suffix: tensor.reshape(shape) if suffix != optimizer.STEPS else tensor
            for suffix, tensor in done.state.items()
        }
        products = () if previous is None else (done.products,)
        return _Piece(name, {name: done.new.reshape(shape)}, moved, products, clipped=clipped)

    def _carried_over(self, name: str) -> _Piece:
        """Keep what no node trained as it is."""
        kept, state = (
            {tensor: file.read(tensor) for tensor in names if tensor in file} if file else {}
            for file, names in ((self._adapter, _tensor_names([name])), (self._state, _state_names([name])))
        )
        return _Piece(name, kept, state)


def _is_factor(name: str) -> bool:
    return name.endswith(LORA_A) and not name.startswith(HEAD)


def _tensor_names(pieces: Iterable[str]) -> list[str]:
    """Return the names of the tensors that hold matrices and head tensors."""
    return [
        name + suffix for name in pieces for suffix in (("",) if name.startswith(HEAD) else (LORA_A, LORA_B))
    ]


def _state_names(pieces: Iterable[str]) -> list[str]:
    """Return every name that the server optimizer's state of matrices and head tensors may have."""
    pieces = list(pieces)
    tensors = _tensor_names(pieces)
    stems = dict.fromkeys([*pieces, *tensors])
    return [*tensors, *(stem + suffix for stem in stems for suffix in optimizer.SUFFIXES)]


def _add_all(writer: TensorWriter, tensors: Mapping[str, Float32]) -> None:
    for name, tensor in tensors.items():
        if not np.isfinite(tensor).all():
            raise UserError(
                f"{name} of the global adapter no longer fits float32: an update is far too large. Make "
                "spec.aggregation.checks.mode reject, or lower spec.optimizer.learningRate."
            )
        writer.add(name, tensor)


def _add_sent(writer: TensorWriter, piece: _Piece) -> None:
    """Write a piece as nodes receive it: factors quantized, head tensors as they are."""
    if piece.name.startswith(HEAD):
        _add_all(writer, piece.tensors)
        return
    found = quantize({name.removeprefix(piece.name): tensor for name, tensor in piece.tensors.items()})
    for suffix, tensor in found.items():
        writer.add(piece.name + suffix, tensor)


def _in_order(
    pool: ThreadPoolExecutor, calls: Iterable[Callable[[], _Piece]], ahead: int
) -> Iterator[_Piece]:
    """Yield the results of the calls in their order, with at most `ahead` of them begun or waiting."""
    waiting: deque[Future[_Piece]] = deque()
    try:
        for call in calls:
            waiting.append(pool.submit(_quietly, call))
            if len(waiting) >= ahead:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()
    finally:
        for future in waiting:
            future.cancel()


def _quietly(call: Callable[[], _Piece]) -> _Piece:
    # Values that are not finite are found in the results, node by node; the setting is the thread's own.
    with np.errstate(all="ignore"):
        return call()


def _totals(figures: Sequence[Figures]) -> tuple[float, float, float]:
    """Return relative error, discarded energy and effective rank over all matrices."""
    reference = sum(figure.reference_energy for figure in figures)
    energy = sum(figure.energy for figure in figures)
    squares = sum(figure.report.relative_error**2 * figure.reference_energy for figure in figures)
    discarded = sum(figure.report.discarded_energy * figure.energy for figure in figures)
    ranks = [figure.report.effective_rank for figure in figures]
    return (
        (squares / reference) ** 0.5 if reference else 0.0,
        discarded / energy if energy else 0.0,
        sum(ranks) / len(ranks) if ranks else 0.0,
    )
