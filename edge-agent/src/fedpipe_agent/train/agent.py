# SPDX-License-Identifier: Apache-2.0
"""One agent's life in one job: register, then profile, train and evaluate as assigned until it is stopped."""

import contextlib
import hashlib
import logging
import math
import time
from collections.abc import Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np

from fedpipe_api import wire
from fedpipe_api.accounting import Steps, sampling_rate
from fedpipe_api.base import UserError
from fedpipe_api.lora.format import Encoding, trained_bytes
from fedpipe_api.lora.methods import Start
from fedpipe_api.precisions import Precision
from fedpipe_api.wire import AssignmentKind

from ..errors import Aborted, Failure, describe, trace
from ..heartbeat import Work
from ..transport import Transport
from . import data, importance, loop
from . import model as base
from .adapters import Adapters, GlobalAdapter, save
from .device import Device, is_out_of_memory
from .heads import head_tensors, set_head
from .packing import check_packing
from .private_gradients import Budget, noise_of, protectable
from .shape import longest_input, read_shape
from .site import Site

log = logging.getLogger(__name__)

ABORTED_PAUSE = 0.2
"""Seconds before asking for work again when the last was not wanted any more."""
MODEL_ERRORS = (RuntimeError, TypeError, ValueError, LookupError, AttributeError)
"""What the code of a model raises that cannot be trained as it is asked to."""
UPLOAD_RESERVE = 1.0
"""Seconds kept free before a round's deadline beside the expected upload."""


@dataclass(frozen=True)
class Times:
    """Of one round: when it began (monotonic), and the seconds of its download and evaluation."""

    begin: float
    download: float
    evaluate: float


class Agent:
    """The trainer of one node: one base model, loaded once per precision."""

    def __init__(
        self, job: wire.AgentConfig, source: base.Source, transport: Transport, device: Device, work: Path
    ):
        """Keep what does not change; nothing heavy is done yet."""
        self._job = job
        self._source = source
        self._transport = transport
        self._device = device
        self._work = work
        self._link_rate = device.link_rate
        self._task = job.model.task
        self._precision: Precision | None = None
        self._model: Any = None
        self._adapters: Any = None
        self._start_head: dict[str, np.ndarray] = {}
        self._upload_seconds = 0.0
        self.current: wire.Assignment | None = None

    def prepare(self, directory: Path, site: Site) -> None:
        """Read the model's configuration and the node's data, as its owner allows.

        Raises:
            UserError: a mistake in the model directory or the data.
        """
        job = self._job
        tokenizer = base.read_tokenizer(self._source)
        self._config = base.read_config(self._source, job.model, tokenizer.pad_token_id)
        check_packing(job.data, self._config.model_type)
        source = job.data
        if job.privacy:
            # Evaluations are withheld, so that no rows need be held out.
            source = source.model_copy(update={"evaluation": None, "evaluation_share": 0.0})
        self._shape = read_shape(self._config, self._task, job.adapter.modules, self._source)
        self._samples, self._held_out, self._notes = data.load(
            directory,
            source,
            job.model,
            tokenizer,
            seed=job.seed,
            longest=longest_input(self._config),
            readable=site.fields,
        )
        if job.privacy:
            self._shape, self._notes = protectable(self._shape), wire.DataNotes()
            self._budget = Budget(job.privacy, len(self._samples), site.charge)
        log.info("%s: %d samples, %d held out", job.node, len(self._samples), len(self._held_out))

    def run(self, kernels: tuple[wire.KernelResult, ...]) -> None:
        """Register with the verified precisions, then work until the job stops."""
        counts = len(self._samples), len(self._held_out)
        self._transport.register(registration(self._device.facts(kernels), self._shape, counts, self._notes))
        while True:
            assignment = self._transport.assignment()
            if assignment is None:
                continue
            if assignment.kind is AssignmentKind.STOP:
                log.info("%s: stopped: %s", self._job.node, assignment.reason or "the job is over")
                return
            self._do(assignment)

    def _do(self, assignment: wire.Assignment) -> None:
        begin = time.monotonic()
        self.current = assignment
        try:
            with Work(self._transport, assignment.kind, assignment.round) as work:
                if assignment.plan is None:
                    raise Failure(f"assignment: {assignment.kind} needs a plan")
                if assignment.kind is AssignmentKind.PROFILE:
                    self._profile(assignment, assignment.plan, work)
                elif assignment.kind is AssignmentKind.EVALUATE:
                    self._evaluate_only(assignment, assignment.plan, work)
                else:
                    self._train(assignment, assignment.plan, work, begin)
        except (RuntimeError, MemoryError) as error:
            if not is_out_of_memory(error):
                raise
            raise Failure(f"out of memory: {assignment.kind}; give the node more memory") from error
        except Aborted:
            log.info("%s of round %d is no longer wanted", assignment.kind, assignment.round)
            time.sleep(ABORTED_PAUSE)

    @contextlib.contextmanager
    def _first_work(self) -> Iterator[None]:
        """Say of an error of the model's code that it is nothing to try again; a GPU may have caused it."""
        try:
            yield
        except MODEL_ERRORS as error:
            if self._device.cuda or is_out_of_memory(error):
                raise
            log.error("%s", trace(error).rstrip())
            kind, why = self._shape.architecture, describe(error)
            raise UserError(
                f"spec.model: this {kind} model cannot be trained ({why}); choose another"
            ) from error

    def _profile(self, assignment: wire.Assignment, plan: wire.NodePlan, work: Work) -> None:
        """Measure a few steps of the plan, and the importance of every candidate matrix when asked."""
        with self._first_work():
            self._load(plan.precision)
            scores: dict[str, float] = {}
            if assignment.importance and not self._job.privacy:
                steps = self._job.adapter.selection.warmup_steps
                work.report(state="profiling", steps=steps)
                self._install(None, {}, Start.FRESH, 0)
                self._adapters.remove()
                scores = importance.measure(
                    self._model,
                    matrices=self._shape.matrices,
                    samples=self._samples,
                    order=self._order(plan, 0),
                    settings=self._settings(plan, steps, self._job.optimizer.learning_rate),
                    device=self._device,
                    seed=self._job.seed,
                    after=lambda step: _report(work, step=step),
                )
            steps = max(1, assignment.profile_steps)
            work.report(state="profiling", step=0, steps=steps)
            self._install(None, plan.ranks, Start.FRESH, 0)
            outcome = loop.train(
                self._model,
                self._samples,
                self._order(plan, 0),
                self._settings(plan, steps, self._job.optimizer.learning_rate),
                self._device,
                after=lambda step: _report(work, step=step.number),
            )
        self._transport.profile(
            wire.ProfileReport(
                step_seconds=outcome.step_seconds,
                peak_bytes=outcome.peak_bytes,
                micro_batch=outcome.micro_batch,
                scores=scores,
            )
        )
        log.info("profiled: %.3f s per step, peak %.0f MiB", outcome.step_seconds, outcome.peak_bytes / 2**20)

    def _evaluate_only(self, assignment: wire.Assignment, plan: wire.NodePlan, work: Work) -> None:
        path = self._transport.blob(assignment.adapter) if assignment.adapter else None
        self._load(plan.precision)
        with _opened(path, self._shape) as adapter:
            self._install(adapter, {}, Start.SPLIT, assignment.round)
        self._evaluate(assignment.round, plan, work)

    def _train(self, assignment: wire.Assignment, plan: wire.NodePlan, work: Work, begin: float) -> None:
        """One round: download, evaluate the global adapter when asked, train, upload."""
        number = assignment.round
        path = self._transport.blob(assignment.adapter) if assignment.adapter else None
        downloaded = time.monotonic() - begin
        self._load(plan.precision)
        evaluated = 0.0
        with _opened(path, self._shape) as adapter:
            # With the remainder a node starts with exactly the global adapter.
            exact = assignment.start.holds_remainder
            if assignment.evaluate:
                self._install(adapter, plan.ranks if exact else {}, assignment.start, number)
                evaluate_begin = time.monotonic()
                self._evaluate(number - 1, plan, work)
                evaluated = time.monotonic() - evaluate_begin
            if not (assignment.evaluate and exact):
                self._install(adapter, plan.ranks, assignment.start, number)
        work.report(state="training", step=0, steps=plan.local_steps)
        deadline = math.inf
        if assignment.remaining_seconds is not None:
            reserve = UPLOAD_RESERVE + 1.2 * self._upload_time(plan, assignment.start.upload)
            deadline = begin + assignment.remaining_seconds - reserve

        def after(step: loop.Step) -> bool:
            _report(
                work,
                step=step.number,
                loss=None if step.loss is None else _reported(step.loss),
                memory=self._device.used(),
                tokens_per_second=step.tokens_per_second,
            )
            return time.monotonic() + step.seconds > deadline

        settings = self._settings(plan, plan.local_steps, assignment.learning_rate)
        if settings.noise:
            self._budget.spend(Steps(settings.noise.multiplier, self._rate(plan), plan.local_steps))
        order = self._order(plan, number)
        outcome = loop.train(self._model, self._samples, order, settings, self._device, after=after)
        work.report(state="uploading")
        self._upload(assignment, plan, outcome, Times(begin, downloaded, evaluated))

    def _upload(
        self, assignment: wire.Assignment, plan: wire.NodePlan, outcome: loop.Outcome, times: Times
    ) -> None:
        number = assignment.round
        head = head_tensors(self._model, self._shape.head)
        tensors = self._adapters.tensors()
        if not all(np.isfinite(value).all() for value in (*tensors.values(), *head.values())):
            raise Failure(f"round {number}: the update is not finite; lower spec.optimizer.learningRate")
        path = self._work / "update.safetensors"
        save(path, tensors, head, assignment.start.upload)
        with path.open("rb") as file:
            digest = hashlib.file_digest(file, "sha256").hexdigest()
        manifest = wire.UpdateManifest(
            round=number,
            adapter=assignment.adapter.digest if assignment.adapter else None,
            digest=digest,
            size=path.stat().st_size,
            samples=len(self._samples),
            steps=outcome.steps,
            planned_steps=plan.local_steps,
            micro_batch=outcome.micro_batch,
            train_loss=None if outcome.loss is None else _reported(outcome.loss),
            step_seconds=outcome.step_seconds,
            peak_bytes=outcome.peak_bytes,
            tokens=outcome.tokens,
            download_seconds=times.download,
            evaluate_seconds=times.evaluate,
            # With all that training needs around its steps: installing the adapter, writing the update.
            train_seconds=time.monotonic() - times.begin - times.download - times.evaluate,
        )
        begin = time.monotonic()
        taken = self._transport.update(number, path, manifest)
        self._upload_seconds = time.monotonic() - begin
        if taken:
            log.info(
                "round %d: %d of %d steps, loss %s, %.3f s per step, %.1f kB up",
                *(number, outcome.steps, plan.local_steps),
                "withheld" if outcome.loss is None else f"{outcome.loss:.4f}",
                outcome.step_seconds,
                manifest.size / 1000,
            )

    def _upload_time(self, plan: wire.NodePlan, encoding: Encoding) -> float:
        """Return the seconds the upload will take: as last time, or by the declared link."""
        if self._upload_seconds or self._link_rate is None:
            return self._upload_seconds
        size = trained_bytes(self._shape.matrices, self._shape.head, plan.ranks, encoding)
        return size / self._link_rate

    def _evaluate(self, number: int, plan: wire.NodePlan, work: Work) -> None:
        """Evaluate the model as it is and report it as round `number`."""
        if not len(self._held_out):
            return
        work.report(state="evaluating", step=0, steps=len(self._held_out))
        sums = loop.evaluate(
            self._model,
            self._held_out,
            plan.micro_batch,
            self._device,
            after=lambda done: _report(work, step=done),
        )
        self._transport.evaluation(
            wire.Evaluation(
                round=number,
                samples=sums.samples,
                tokens=sums.targets,
                loss_sum=_reported(sums.loss, sums.targets),
                correct=sums.correct,
                confusion=() if sums.confusion is None else tuple(sums.confusion.ravel().tolist()),
                precision=plan.precision,
            )
        )

    def _load(self, precision: Precision) -> None:
        """Have the base model at a precision, loading it unless it is the present one."""
        if precision is self._precision:
            return
        self._model = self._adapters = None
        self._device.reset_peak()
        self._model = base.load(
            self._source, self._config, self._task, precision, self._device.torch, seed=self._job.seed
        )
        self._start_head = head_tensors(self._model, self._shape.head)
        self._precision = precision
        pristine = None
        if precision.takes_remainder:
            pristine = self._work / "base"
            pristine.mkdir(exist_ok=True)
        self._adapters = Adapters(
            self._model,
            self._shape,
            alpha=self._job.adapter.alpha,
            rs_lora=self._job.adapter.rs_lora,
            names=(self._job.seed, self._job.node),
            pristine=pristine,
        )

    def _install(
        self, adapter: GlobalAdapter | None, ranks: dict[str, int], rule: Start, number: int
    ) -> None:
        self._adapters.install(adapter, ranks, rule, number)
        set_head(self._model, {**self._start_head, **(adapter.head() if adapter else {})})

    def _order(self, plan: wire.NodePlan, number: int) -> Any:
        if self._job.privacy:
            return data.private_order(self._samples, self._rate(plan))
        size = plan.micro_batch * plan.accumulation
        return data.step_order(self._samples, size, self._job.seed, number, self._job.node)

    def _rate(self, plan: wire.NodePlan) -> float:
        return sampling_rate(plan.micro_batch * plan.accumulation, len(self._samples))

    def _settings(self, plan: wire.NodePlan, steps: int, learning_rate: float) -> loop.Settings:
        optimizer = self._job.optimizer
        return loop.Settings(
            steps=steps,
            micro_batch=plan.micro_batch,
            accumulation=plan.accumulation,
            learning_rate=learning_rate,
            weight_decay=optimizer.weight_decay,
            max_grad_norm=optimizer.max_grad_norm,
            proximal=optimizer.proximal,
            checkpointing=plan.checkpointing,
            packed=self._job.data.max_length if self._job.data.packing else None,
            noise=noise_of(self._job.privacy, plan, self._rate(plan) * len(self._samples)),
        )


def _reported(loss: float, targets: int = 1) -> float:
    """Return a sum of losses as it is reported; one that is not finite, or far too high, as the limit."""
    limit = wire.LOSS_LIMIT * targets
    return min(loss, limit) if math.isfinite(loss) else limit


def registration(
    device: wire.DeviceFacts, shape: wire.ModelShape, counts: tuple[int, int], notes: wire.DataNotes
) -> wire.Registration:
    """Return what an agent presents itself with; `counts` are its samples and those it holds out."""
    return wire.Registration(
        version=version("fedpipe-agent"),
        device=device,
        model=shape,
        samples=counts[0],
        evaluation_samples=counts[1],
        notes=notes,
    )


def _report(work: Work, **fields: Any) -> None:
    """Report progress; raises Aborted when the work is not wanted any more."""
    work.report(**fields)
    work.check()


def _opened(path: Path | None, shape: wire.ModelShape) -> AbstractContextManager[GlobalAdapter | None]:
    return GlobalAdapter(path, shape) if path else nullcontext()
